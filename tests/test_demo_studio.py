"""What the page may ask of a model, without a page."""

import pytest
from PIL import Image
from studios import LABELS, tiny_pipeline

from calotype.demo.studio import Studio
from calotype.errors import UserError


@pytest.fixture(scope="module")
def studio():
    return Studio(tiny_pipeline(LABELS))


def test_requests_out_of_range_are_refused_by_name(studio):
    request = studio.request("disc", 2.0, 3.0, 4, 1)
    assert (request.num_images, request.seed) == (2, 3) and isinstance(request.seed, int)
    for order, reason in (
        (("cat", 1, 0, 1, 1), "label 'cat'"),
        (("disc", None, 0, 1, 1), "number of images 'None' is not a number"),
        (("disc", 17, 0, 1, 1), "number of images 17 must be a whole number from 1 to 16"),
        (("disc", 2.9, 0, 1, 1), "number of images 2.9 must be"),
        (("disc", 1, "x", 1, 1), "seed 'x' is not a number"),
        (("disc", 2, 2**32 - 1, 1, 1), f"seed 4294967295 must be a whole number from 0 to {2**32 - 2}"),
        (("disc", 1, 0, 201, 1), "steps 201 must be a whole number from 1 to 200"),
        (("disc", 1, 0, 1, 1e9), "guidance 1000000000.0 must be a number from 0 to 15"),
        (("disc", 1, 0, 1, float("nan")), "guidance 'nan' is not a number"),
        (("disc", 1, 0, 1, 1, None, 0.5, 2), r"guidance from and to \(0.5, 2\) must be two times"),
    ):
        with pytest.raises(UserError, match=reason):
            studio.request(*order)


def test_any_label_follows_the_seed(studio):
    labels = studio.request("", 16, 5, 1, 1).label
    assert set(labels) == set(LABELS) and studio.request("", 15, 6, 1, 1).label == labels[1:]


def test_closing_stops_the_sampler_and_opens_the_lock(studio):
    from calotype.demo import generate as tab

    seen = []
    real = studio.pipe.stream
    studio.pipe.stream = lambda **order: (seen.append(event.step) or event for event in real(**order))
    events = studio.develop(studio.request("disc", 1, 0, 50, 1))
    next(events)
    assert studio._lock.locked()
    events.close()
    assert seen == [1] and not studio._lock.locked()
    *_, last = tab.developing(studio, "disc", 1, 0, False, 2, 1)
    assert last[2].startswith("Seed 0 · 2 steps")
    studio.pipe.stream = real


def test_damaged_weights_are_a_clear_error(studio):
    pipe = tiny_pipeline([])
    pipe.unet.conv_in.bias.data.fill_(float("nan"))
    broken = type(studio)(pipe)
    with pytest.raises(UserError, match="not finite"):
        list(broken.develop(broken.request("", 1, 0, 2, 1)))


def test_page_without_labels(studio):
    from calotype.demo import page

    blocks = page.build(type(studio)(tiny_pipeline([])), "<plain>")
    dropdown = next(block for block in blocks.blocks.values() if getattr(block, "label", "") == "Label")
    assert not dropdown.visible
    assert "&lt;plain&gt;" in page.masthead(studio, "<plain>")


def test_a_text_model_is_asked_with_a_prompt(studio):
    from models import pipeline, text_parts, text_unet

    from calotype.demo import page

    text_studio = type(studio)(pipeline(text_unet(), **text_parts()))
    shown = {getattr(block, "label", "") for block in page.build(text_studio, "text").blocks.values()}
    assert "Prompt" in shown and "Label" not in shown
    drawn = [list(text_studio.develop(text_studio.request(prompt, 1, 0, 2, 1)))[-1] for prompt in ("a blue disc", "")]
    assert drawn[0].images[0].tobytes() != drawn[1].images[0].tobytes()
    for bad in (["a"], 7, "a" * 401):
        with pytest.raises(UserError, match="prompt must be a text"):
            text_studio.request(bad, 1, 0, 2, 1)
    with pytest.raises(UserError, match="tokens"):
        list(text_studio.develop(text_studio.request("a b c d e f g h i j k l m n o p", 1, 0, 2, 1)))


def test_psnr():
    from calotype.demo.codes import psnr

    grey, lighter = Image.new("L", (4, 4), 100), Image.new("L", (4, 4), 110)
    assert psnr(grey, lighter) == pytest.approx(28.1308, abs=1e-3)
    assert psnr(grey, grey) == float("inf")
