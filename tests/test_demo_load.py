"""The demo under load: pictures of the right seed, level memory, drawings that end when nobody waits for them."""

import pytest
from models import pipeline, tiny_unet

pytestmark = pytest.mark.reliability


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("load") / "prints"
    pipeline(tiny_unet(classes=3), id2label={"0": "disc", "1": "star", "2": "square"}).save_pretrained(folder)
    return folder


def test_every_picture_is_its_seeds_and_who_leaves_stops_the_drawing(model, run_benchmark, sized):
    generations, clients, leave = sized(("100", "8", "5"), ("2000", "16", "50"))
    run_benchmark("demo_exact", model, "--generations", generations, "--clients", clients, "--leave", leave)
