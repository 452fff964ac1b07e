"""Whatever is asked for: pictures as they were asked for, or one line that names what cannot be."""

import re
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from models import CAPTIONS, variants
from PIL import Image

from calotype import cli
from calotype.demo.studio import _NAMES, LIMITS, Studio
from calotype.errors import UserError
from calotype.pipeline.generate import FLAGS
from calotype.pipeline.order import Order

pytestmark = pytest.mark.reliability
NAMES = {"label", "num_images", *Order._fields}
NAN, INFINITE = float("nan"), float("inf")
STRANGE = [NAN, INFINITE, -1, 0, 2.5, 10**6, 10**30, True, "3", "", b"1", [], {}, (), object(), 1j, "\ud800"]
PICTURE, SMALL = Image.new("RGB", (16, 16), (200, 40, 90)), Image.new("RGB", (4, 4))
MASK = Image.new("L", (16, 16), 255)


def asked(good, bad):
    """What may be asked, and in about every second request one thing that nobody should ask."""
    strange = some.tuples(some.sampled_from(sorted({**good, **bad})), some.sampled_from(STRANGE))
    pairs = some.sampled_from([(name, value) for name, values in bad.items() for value in values])
    spoilt = some.one_of(strange, pairs).map(lambda pair: dict([pair]))
    plain = some.fixed_dictionaries({}, optional={name: some.sampled_from(values) for name, values in good.items()})
    return some.tuples(plain, some.one_of(some.just({}), spoilt))


GOOD = {
    "seed": [0, 1, 2**63 - 9],
    "num_inference_steps": [1, 2, 3],
    "guidance_scale": [0, 1, 2.5, 100],
    "guidance_interval": [(0, 1), (0.2, 0.4), [0.5, 0.5]],
    "guidance_rescale": [0, 0.5, 1],
    "sampler": ["ddim", "unipc", "heun", "flow-euler", "dpm++2m"],
    "paste": [True, False],
    "reproducible": [True, False],
    "output_type": ["pil", "np", "pt", "latent"],
    "preview": [True, False, "full"],
    "callback_on_step_end": [lambda *_: None],
}
BAD = {
    "label": ["purple", 2, {}, {"red": NAN}, {"red": -1}, [], ["red"] * 3, "a " * 60, "a" * 10_001, [None, []]],
    "num_images": [4097, 10**9, 2.0],
    "seed": [2**63, 2**64],
    "num_inference_steps": [-5, 1001],
    "guidance_scale": [1e9, "2"],
    "guidance_interval": [(0.4, 0.2), (0, 1, 2), (0, NAN), 5],
    "guidance_rescale": [1.5],
    "sampler": ["magic", "flow-", 3],
    "fast": [1, "yes"],
    "decoder": ["linear", "best"],
    "height": [15, -16, 8193, 10**9, 16.0],
    "width": [17, 8],
    "image": [SMALL, [3], [], [PICTURE] * 5],
    "mask": [MASK, SMALL],
    "strength": [1.5, 0.5],
    "output_type": ["jpeg"],
    "preview": ["linear", None, 1],
    "latents": [torch.full((1, 4, 8, 8), NAN), torch.zeros(1, dtype=torch.int), torch.zeros(3, 4, 8, 8)],
    "generator": [[torch.Generator()] * 7, 3],
    "callback_on_step_end": [7],
}
KINDS = [
    ("class", {"label": "red"}),
    ("class", {"label": [0, {"red": 1, "blue": 2.0}]}),
    ("class", {"num_images": 2, "height": 20, "width": 24}),
    ("class", {"image": PICTURE, "strength": 0.5}),
    ("class", {"image": [PICTURE] * 2, "mask": MASK, "label": "blue"}),
    ("text", {"label": CAPTIONS[0], "num_images": 2}),
    ("text", {"label": ["", None, {CAPTIONS[0]: 1, CAPTIONS[1]: 3}]}),
    ("fast", {"fast": True, "label": "red", "sampler": None, "guidance_scale": None}),
    ("fast", {"decoder": "tiny"}),
    ("inpaint", {"image": PICTURE, "mask": MASK}),
    ("guide", {"autoguidance": True}),
    ("vq", {"latents": torch.zeros(1, 4, 8, 8)}),
    ("vq", {"generator": [torch.Generator()] * 2, "num_images": 2}),
]


@pytest.fixture(scope="module")
def pipes():
    return {
        name: pipe for name, pipe in variants().items() if name in ("class", "text", "fast", "inpaint", "guide", "vq")
    }


def tried(strategy, count, attempt):
    """`attempt` on so many examples of a strategy; how often it returned True."""
    outcomes = []
    rules = {"max_examples": count, "derandomize": True, "deadline": None, "database": None}

    @settings(**rules, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def once(example):
        outcomes.append(bool(attempt(example)))

    once()
    assert len(outcomes) >= count and 0.2 * len(outcomes) < sum(outcomes) < 0.8 * len(outcomes)  # both happen
    return f"{len(outcomes)} requests: {sum(outcomes)} drawn, {len(outcomes) - sum(outcomes)} refused by name"


def test_python(pipes, sized):
    def attempt(example):
        (name, kind), (good, bad) = example
        pipe, order = pipes[name], good | kind | bad
        try:
            images = pipe(**order).images
        except ValueError as error:
            word = re.match(r"\w+", str(error))
            assert word and word[0] in NAMES and "\n" not in str(error), str(error)
            return False
        check_pictures(pipe, order, images)
        return True

    print(tried(some.tuples(some.sampled_from(KINDS), asked(GOOD, BAD)), sized(200, 3500), attempt))


def check_pictures(pipe, order, images):
    """As many as were asked for, of the size that was asked for, and in numbers that are finite."""
    listed = next((order[n] for n in ("label", "image") if isinstance(order.get(n), list) and order[n]), [None])
    count = len(listed) if order.get("num_images") is None else order["num_images"]
    height, width = (order.get(side) or 16 for side in ("height", "width"))
    assert len(images) == count
    if isinstance(images, list):
        assert all(image.size == (width, height) for image in images)
        return
    factor = 2 if order["output_type"] == "latent" else 1
    where = slice(1, 3) if order["output_type"] == "np" else slice(2, 4)
    assert tuple(images.shape[where]) == (height // factor, width // factor)
    assert np.isfinite(np.asarray(images)).all()


VISITS = {
    "label": ["", None],
    "num_images": [1, 2, 2.0],
    "seed": [None, 0, 7.0, 2**32 - 20],
    "steps": [1, 2, 3.0],
    "guidance": [0, 1.5, 15],
    "sampler": [None, "", "ddim"],
    "low": [0, 0.5],
    "high": [1, 0.5],
    "rescale": [0, 0.5],
    "fast": [False],
}
STRAYS = {
    "label": ["purple", "a" * 401, "a " * 60],
    "num_images": [17, None],
    "seed": [2**32],
    "steps": [201, None],
    "guidance": [15.1, 1e9, None],
    "sampler": ["magic"],
    "low": [1.1],
    "high": [-0.1],
    "rescale": [2],
    "fast": [True],
}


def test_the_demo(pipes, sized):
    studios = {name: Studio(pipes[name]) for name in ("class", "text", "fast", "guide")}
    known = re.compile("|".join([*map(re.escape, _NAMES.values()), "the prompt", "guidance (from|to)", "this model"]))

    def attempt(example):
        name, (good, bad) = example
        try:
            request = studios[name].request(**{n: v[0] for n, v in VISITS.items()} | good | bad)
            images = list(studios[name].develop(request))[-1].images
        except UserError as error:
            assert known.match(str(error)) and "\n" not in str(error), str(error)
            return False
        assert len(images) == request.num_images <= LIMITS.images and request.num_inference_steps <= LIMITS.steps
        return True

    print(tried(some.tuples(some.sampled_from(sorted(studios)), asked(VISITS, STRAYS)), sized(60, 1000), attempt))


WORDS = {
    "-n": ["1", "2"],
    "--seed": ["0", "7", "9223372036854775800"],
    "--steps": ["1", "3"],
    "--guidance": ["0", "1", "2.5"],
    "--guidance-interval": ["0 1", "0.2 0.4"],
    "--guidance-rescale": ["0", "0.5"],
    "--sampler": ["ddim", "heun"],
    "--size": ["16", "20x16"],
    "--batch-size": ["1", "2"],
    "--reproducible": [None],
}
SLIPS = {
    "-n": ["0", "-1", "1.5", "x", "1000001"],
    "--seed": ["-1", "9223372036854775807", "9223372036854775808", "1e3"],
    "--steps": ["0", "-5", "2.5", "1000000", "nan", ""],
    "--guidance": ["nan", "inf", "1e9", "-1", "much"],
    "--guidance-interval": ["0.4 0.2", "0 nan", "0 2", "1"],
    "--guidance-rescale": ["1.5", "nan"],
    "--sampler": ["magic", "", "flow-"],
    "--size": ["15", "0", "99999", "16x", "1x1", "9" * 30],
    "--batch-size": ["0", "4097"],
    "--precision": ["fp8"],
    "--fast": [None],
}


def test_the_command_line(pipes, sized, tmp_path, capsys):
    for name in ("class", "fast"):
        pipes[name].save_pretrained(tmp_path / name)
    known = {*FLAGS.values(), *WORDS, *SLIPS}
    out = tmp_path / "out"

    def attempt(example):
        name, label, good, bad = example
        words = {"-n": "2", "--precision": "fp32"} | good | bad
        flags = [word for flag, value in words.items() for word in [flag, *([] if value is None else value.split(" "))]]
        before = len(list(out.rglob("*.png")))
        code = cli.main(["generate", str(tmp_path / name), *label, *flags, "--out", str(out)])
        said = capsys.readouterr().err
        if code == 0:
            return True
        assert code == 2 and said.startswith("calotype: ") and said.count("\n") == 1, (code, said)
        assert any(word in said for word in known) and len(list(out.rglob("*.png"))) == before, said
        return False

    slips = some.sampled_from([{flag: value} for flag, values in SLIPS.items() for value in values])
    plain = some.fixed_dictionaries({}, optional={flag: some.sampled_from(values) for flag, values in WORDS.items()})
    labels = some.sampled_from([[], ["red"], ["blue"], ["red"], ["purple"], [""]])
    models = some.sampled_from(["class", "fast"])
    examples = some.tuples(models, labels, plain, some.one_of(some.just({}), slips))
    print(tried(examples, sized(40, 500), attempt))


def test_threads_draw_what_one_draws_alone(pipes, sized):
    """Each drawing has a scheduler of its own, and nothing in the shared networks is touched."""
    pipe, count = pipes["fast"], sized(6, 50)
    orders = [order_of(i) for i in range(8 * count)]
    serial = [pipe(**order).images for order in orders]
    found = [None] * len(orders)
    gate = threading.Barrier(8)

    def draw(worker):
        gate.wait()
        for i in range(worker, len(orders), 8):
            found[i] = pipe(**orders[i]).images

    threads = [threading.Thread(target=draw, args=(worker,)) for worker in range(8)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    same = sum(np.array_equal(a, b) for a, b in zip(serial, found, strict=True))
    assert same == len(orders)
    print(f"{same} of {len(orders)} drawings by 8 threads are those that one draws.")


def order_of(i):
    """Drawings that differ from their neighbours in everything that a scheduler or network could keep."""
    labels = ["red", None, {"red": 1, "blue": 1 + i % 5}, "blue", 1]
    samplers = [None, "ddim", "unipc", "heun", "dpm++2m", "euler"]
    more = {"fast": True} if i % 7 == 3 else {"sampler": samplers[i % 6], "guidance_scale": 1 + i % 3}
    alone = {"reproducible": i % 11 == 5, "num_images": 1 + i % 2}
    return {"label": labels[i % 5], "seed": i, "num_inference_steps": 1 + i % 6, "output_type": "np"} | more | alone
