"""What a folder from the open world can hold: every file gets its verdict, none costs much, no run dies of it."""

import io
import json
import os
import re
import resource
import time

import hostile
import numpy as np
import pytest
from PIL import Image

from calotype.picture_files import MAX_PIXELS, UnreadableImage, inspect, load_image

pytestmark = [
    pytest.mark.reliability,
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
]
_MOST_MEMORY, _MOST_SECONDS = 64 * 2**20, 1.0  # what a bomb may cost


@pytest.fixture(scope="module")
def corpus():
    return hostile.corpus()


def verdict(look, *what, **how):
    """None for a good picture, else why it is not."""
    try:
        look(*what, **how)
    except UnreadableImage as error:
        assert "\n" not in str(error)
        return str(error)
    return None


def agrees(found, fault):
    return found is None if fault is None else found is not None and re.search(fault, found) is not None


# Verdicts


def test_every_file_gets_the_verdict_that_it_deserves(corpus, tmp_path):
    assert len(corpus) >= 60
    wrong = []
    for name, case in corpus.items():
        file = tmp_path / name
        file.write_bytes(case.data)
        found = {
            "load": verdict(load_image, file, channels=3),
            "decode": verdict(inspect, file, decode=True),
            "header": verdict(inspect, file),
        }
        for way, said in found.items():
            fault = None if way == "header" and case.deep else case.fault
            if not agrees(said, fault) or (said and not said.startswith(str(file))):
                wrong.append((name, way, said))
    assert wrong == []


def test_what_is_no_file_is_named_too(tmp_path):
    for name, fault in hostile.special_files(tmp_path).items():
        assert agrees(verdict(inspect, tmp_path / name), fault)
        assert agrees(verdict(load_image, tmp_path / name, channels=1), fault)


def cost(look, *what, **how):
    """Bytes by which a child's memory rises at its highest, and seconds of its CPU."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        verdict(look, *what, **how)
        rise = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os.write(write, json.dumps([rise * 1024, time.process_time() - began]).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return json.loads(answer)


def test_bombs_cost_next_to_nothing(capsys):
    for name in ("plain.jpeg", "plain.png", "plain.tiff", "plain.webp", "plain.gif"):
        load_image(io.BytesIO(hostile.good()[name].data), channels=3)  # what is loaded once is not a bomb's cost
    dear = {}
    for name, case in hostile.bombs().items():
        assert len(case.data) < 10_000_000
        for most in (16_000_000, MAX_PIXELS):
            memory, seconds = cost(load_image, io.BytesIO(case.data), channels=3, max_pixels=most)
            with capsys.disabled():
                print(f"{name:16} {len(case.data) / 1e3:9.1f} kB: {memory / 2**20:5.1f} MiB, {seconds:.2f} s")
            if memory > _MOST_MEMORY or seconds > _MOST_SECONDS:
                dear[name] = (memory, seconds)
    assert dear == {}


def test_a_bomb_would_be_seen():
    memory, _ = cost(Image.open(io.BytesIO(hostile.solid_png(5000))).load)
    assert memory > _MOST_MEMORY


def mutant(rng, data, other):
    """A file with some of its bytes changed, cut, doubled or taken from another."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        at, length = rng.integers(len(data)), int(rng.integers(1, 9))
        match rng.integers(5):
            case 0:
                data[at : at + length] = rng.bytes(length)
            case 1:
                data[at : at + length] = b"\xff" * length
            case 2:
                data[at:at] = data[at : at + 50 * length] * 20
            case 3:
                data[at:at] = other[rng.integers(len(other)) :][: 50 * length]
            case 4:
                data = data[: max(20, at)]
    return bytes(data)


def look_at_all(files):
    for file in files:
        verdict(load_image, io.BytesIO(file), channels=3, max_pixels=1_000_000)
        verdict(inspect, io.BytesIO(file), max_pixels=1_000_000)


def test_mutants_give_a_picture_or_a_refusal_and_cost_little(sized):
    """A child of its own for fifty at a time, so that one of them cannot hide behind another's memory."""
    rng, kinds = np.random.default_rng(0), [case.data for case in hostile.good().values()]
    for _ in range(sized(8, 200)):
        files = [mutant(rng, kinds[rng.integers(len(kinds))], kinds[rng.integers(len(kinds))]) for _ in range(50)]
        memory, seconds = cost(look_at_all, files)
        assert memory <= _MOST_MEMORY and seconds <= 50 * _MOST_SECONDS


def test_headers_of_a_thousand_pictures_a_second(tmp_path):
    """By the clock of one core, so that two are not needed and other work does not count."""
    kinds = [hostile.saved(fmt, Image.fromarray(hostile.gradient(240, 320))) for fmt in ("JPEG", "PNG", "WEBP", "GIF")]
    files = [tmp_path / f"{i}.jpg" for i in range(1200)]
    for i, file in enumerate(files):
        file.write_bytes(kinds[i % len(kinds)])
    began = time.process_time()
    for file in files:
        inspect(file)
    assert len(files) / (time.process_time() - began) > 1000
