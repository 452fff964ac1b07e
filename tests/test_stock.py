"""Every kind of model, saved, is loaded by stock diffusers in a process that knows nothing of Calotype."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import FlowMatchLCMScheduler, LCMScheduler, StableDiffusionPipeline
from models import CAPTIONS, pipeline, text_parts, text_unet, tiny_unet, tiny_vae, variants
from PIL import Image
from torch.testing import assert_close

from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline
from calotype.pipeline.pictures import degrade, edges_of, given_latents, shrink

STRANGER = """
import sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "calotype":
            raise ImportError("calotype is not here")
sys.meta_path.insert(0, Wall())
import logging
said = []
class Ear(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
import warnings
import numpy as np, torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, DiffusionPipeline
from diffusers.utils import logging as theirs
from PIL import Image
root, caption = sys.argv[1:]
picture, mask = Image.open(root + "/picture.png"), Image.open(root + "/mask.png")
extra = {
    "class": {"label": "blue"}, "superres": {"label": "blue", "image": picture.resize((4, 4))},
    "inpaint": {"image": picture, "mask": mask}, "edges": {"image": picture}, "fast": {"label": "red", "fast": True},
}
for name in ("none", "class", "inpaint", "superres", "edges", "guide", "fast", "vq"):
    pipe = DiffusionPipeline.from_pretrained(f"{root}/{name}", trust_remote_code=True)
    assert type(pipe).__name__ == "LatentDiffusionPipeline" and "calotype" not in sys.modules
    pipe.set_progress_bar_config(disable=True)
    np.save(f"{root}/{name}.npy", pipe(num_images=2, seed=5, output_type="np", **extra.get(name, {})).images)
theirs.get_logger("diffusers").addHandler(Ear())
with warnings.catch_warnings():
    warnings.simplefilter("error", FutureWarning)  # how diffusers speaks of what it mends in a configuration
    pipe = DiffusionPipeline.from_pretrained(f"{root}/text")
assert type(pipe).__name__ == "StableDiffusionPipeline" and said == [], said
pipe.set_progress_bar_config(disable=True)
z = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(5 + i)) for i in range(2)])
order = {"num_inference_steps": 3, "guidance_scale": 1.5, "output_type": "np"}
np.save(f"{root}/text.npy", pipe([caption] * 2, latents=z, **order).images)
for kind, more in ((AutoPipelineForImage2Image, {}), (AutoPipelineForInpainting, {"mask_image": mask})):
    pipe = kind.from_pretrained(f"{root}/text")
    pipe.set_progress_bar_config(disable=True)
    x = pipe(caption, image=picture, strength=0.7, generator=torch.Generator().manual_seed(0), **order, **more).images
    assert x.shape == (1, 16, 16, 3) and np.isfinite(x).all(), x.shape
"""


def photograph(size=16):
    x, y = np.meshgrid(np.arange(size), np.arange(size))
    return Image.fromarray(np.stack([x * 15, y * 15, 255 * (x > y)], axis=-1).astype(np.uint8))


def hole(size=16):
    mask = np.zeros((size, size), np.uint8)
    mask[4:10, 4:12] = 255
    return Image.fromarray(mask)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    photograph().save(root / "picture.png")
    hole().save(root / "mask.png")
    for name, pipe in variants().items():
        pipe.save_pretrained(root / name)
    return root


def load(folder):
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_stock_diffusers_loads_and_draws_the_same(saved, tmp_path):
    hidden = {"PYTHONPATH", "PYTHONSTARTUP"}
    environment = {k: v for k, v in os.environ.items() if k not in hidden} | {"HF_HOME": str(tmp_path / "hf")}
    words = [sys.executable, "-c", STRANGER, str(saved), CAPTIONS[0]]
    subprocess.run(words, cwd=tmp_path, env=environment, check=True)
    given = {
        "class": {"label": "blue"},
        "superres": {"label": "blue", "image": photograph().resize((4, 4))},
        "inpaint": {"image": photograph(), "mask": hole()},
        "edges": {"image": photograph()},
        "fast": {"label": "red", "fast": True},
        "text": {"label": CAPTIONS[0]},
    }
    for name in variants():
        ours = load(saved / name)(num_images=2, seed=5, output_type="np", **given.get(name, {})).images
        np.testing.assert_allclose(np.load(saved / f"{name}.npy"), ours, atol=1e-5, err_msg=name)


def test_a_model_of_text_keeps_what_stock_does_not_know_beside_it(saved, tmp_path):
    index = json.loads((saved / "text/model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and index["safety_checker"] == [None, None]
    assert not {"condition", "default_steps", "id2label", "guide"} & set(index)
    pipe = pipeline(text_unet(), guide=text_unet(seed=7), sampler="unipc", **text_parts())
    pipe.save_pretrained(tmp_path / "once")
    again = load(tmp_path / "once")
    assert (again.condition, again.default_steps, again.guide is None) == ("text", 3, False)
    again.save_pretrained(tmp_path / "twice")
    twice = load(tmp_path / "twice")
    order = {"label": CAPTIONS[:2], "output_type": "np", "guidance_scale": 2.0}
    np.testing.assert_array_equal(pipe(**order).images, twice(**order).images)
    assert not hasattr(StableDiffusionPipeline.from_pretrained(tmp_path / "twice"), "guide")


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_text_is_drawn_as_stock_draws_it(rescale):
    parts = text_parts()
    ours = pipeline(text_unet(), **parts)
    missing = dict.fromkeys(("safety_checker", "feature_extractor"))
    stock = StableDiffusionPipeline(
        vae=ours.vae, unet=ours.unet, scheduler=ours.scheduler, requires_safety_checker=False, **parts, **missing
    )
    stock.set_progress_bar_config(disable=True)
    z = ours.prepare_latents([torch.Generator().manual_seed(i) for i in range(2)])
    order = {"num_inference_steps": 6, "guidance_scale": 4.0, "guidance_rescale": rescale, "output_type": "np"}
    theirs = stock(CAPTIONS[:2], latents=z, **order).images
    np.testing.assert_allclose(ours(CAPTIONS[:2], **order).images, theirs, atol=2e-5)
    assert np.abs(ours([CAPTIONS[0], CAPTIONS[2]], **order).images[1] - theirs[1]).max() > 1e-3


def test_prompts_are_checked():
    pipe = pipeline(text_unet(), **text_parts())
    assert pipe(None, 1, output_type="np").images.shape == (1, 16, 16, 3)  # the empty prompt
    with pytest.raises(ValueError, match="tokens, the model reads .*; shorten it"):
        pipe(" ".join(CAPTIONS * 4))
    with pytest.raises(ValueError, match="label=3: this model draws from text"):
        pipe(3)


def test_a_given_picture_stands_beside_the_latents():
    """The network is shown [z, latents of the given picture, mask], and z alone is drawn."""
    pipe, seen = pipeline(tiny_unet(9), condition="inpaint", default_guidance=1.0), []
    pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    z = pipe([None, None], image=photograph(), mask=hole(), output_type="latent").images
    assert z.shape == (2, 4, 8, 8) and pipe.latent_shape == (4, 8, 8)
    x = torch.from_numpy(np.array(photograph())).permute(2, 0, 1)[None] / 127.5 - 1
    mask = (torch.from_numpy(np.array(hole()))[None, None] > 127).float()
    expected = pipe.vae.encode(torch.where(mask > 0, 0.0, x)).latent_dist.mean
    for shown in seen:
        assert_close(shown[:, 4:8], expected.expand(2, -1, -1, -1))
        assert shown[:, 8].unique().tolist() == [0, 1] and shown[0, 8].sum() == 3 * 4
    assert_close(
        seen[0][:, :4], pipe.prepare_latents([torch.Generator().manual_seed(i) for i in range(2)]), atol=1e-4, rtol=0
    )


def test_known_pixels_are_put_back():
    pipe = pipeline(tiny_unet(9), condition="inpaint")
    order = {"image": photograph(), "mask": hole(), "output_type": "np"}
    kept, drawn = pipe(**order).images[0], pipe(paste=False, **order).images[0]
    known, original = np.asarray(hole()) == 0, np.asarray(photograph()) / 255
    np.testing.assert_allclose(kept[known], original[known], atol=1e-6)
    np.testing.assert_array_equal(kept[~known], drawn[~known])
    assert np.abs(drawn[known] - original[known]).max() > 0.01


def test_what_is_given_in_place_of_a_picture():
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert_close(degrade("superres:4", torch.full_like(x, 0.3)), torch.full_like(x, 0.3))
    assert_close(shrink(x, 4), x.unfold(2, 4, 4).unfold(3, 4, 4).mean((-2, -1)))
    step = torch.full((1, 3, 8, 8), -0.2)
    step[..., 4:] = 0.6
    edges = degrade("edges", step)
    assert_close(edges[0, :, 4], torch.tensor([-1, -1, -1, 1, 1, -1, -1, -1.0]).expand(3, 8))
    assert (degrade("edges", torch.zeros(1, 3, 8, 8)) == -1).all()
    assert edges_of(photograph()).mode == "RGB" and edges_of(photograph().convert("L")).size == (16, 16)
    vae, mask = tiny_vae(), torch.ones(1, 1, 16, 16)
    with torch.no_grad():
        blind = given_latents(vae, "inpaint", torch.rand(1, 3, 16, 16), mask)
        assert_close(blind, given_latents(vae, "inpaint", torch.zeros(1, 3, 16, 16), mask))


@pytest.mark.parametrize(
    "name, order, message",
    [
        ("inpaint", {}, "image: this model's condition is 'inpaint'; give a picture of 16x16"),
        ("inpaint", {"image": photograph()}, "mask: this model's condition is 'inpaint'"),
        ("edges", {"image": photograph(), "mask": hole()}, "mask: .*; leave it out"),
        ("none", {"mask": hole()}, "mask says where a picture becomes new; give image too"),
        ("none", {"strength": 0.5}, "strength=0.5 is about changing a picture; give image too"),
        ("edges", {"image": photograph(), "strength": 0.5}, "strength=0.5: this model draws beside its picture"),
        ("superres", {"image": photograph()}, "image: 16x16 pixels; resize to 4x4"),
        ("edges", {"image": [photograph()] * 2, "num_images": 3}, "image holds 2 pictures for num_images=3"),
        ("fast", {"fast": True, "guidance_scale": 2.0}, "guidance_scale=2.0 does not go with fast=True"),
        ("fast", {"fast": True, "sampler": "ddim"}, "sampler=ddim does not go with fast=True"),
    ],
)
def test_errors_name_the_argument(saved, name, order, message):
    with pytest.raises(ValueError, match=message):
        load(saved / name)(**order)


def test_each_given_picture_makes_one(saved):
    pipe = load(saved / "edges")
    x = pipe(image=[photograph(), edges_of(photograph())], output_type="np").images
    alone = pipe(image=edges_of(photograph()), seed=1, output_type="np").images
    assert len(x) == 2
    np.testing.assert_allclose(x[1:], alone, atol=1e-5)


@pytest.mark.parametrize("scheduler", [FlowMatchLCMScheduler(), LCMScheduler()], ids=["flow", "diffusion"])
def test_a_student_that_draws_noise_on_the_way_takes_each_pictures_own(scheduler):
    pipe = variants()["fast"]
    pipe.student_scheduler = scheduler
    calls = []
    pipe.student.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("the teacher was asked"))
    torch.manual_seed(0)
    whole = pipe(["red", "blue", None], 3, seed=4, fast=True, num_inference_steps=4, output_type="np").images
    assert calls == [3] * 4
    torch.manual_seed(1)
    alone = pipe("blue", 1, seed=5, fast=True, num_inference_steps=4, output_type="np").images
    np.testing.assert_allclose(whole[1:2], alone, atol=1e-5)
    assert calls[4:] == [1] * 4


def test_fast_drawings_and_previews_use_the_tiny_decoder():
    pipe, decoded = variants()["fast"], []
    pipe.tiny_decoder.decoder.register_forward_hook(lambda *_: decoded.append("tiny"))
    pipe.vae.decoder.register_forward_hook(lambda *_: decoded.append("full"))
    for order, expected in (
        ({"fast": True}, ["tiny"] * 2),
        ({"fast": True, "decoder": "full"}, ["full"] * 2),
        ({}, ["tiny", "tiny", "full"]),
        ({"decoder": "tiny"}, ["tiny"] * 3),
    ):
        decoded.clear()
        events = list(pipe.stream("red", 1, **order))
        assert decoded == expected and events[-1].images[0].size == (16, 16)
