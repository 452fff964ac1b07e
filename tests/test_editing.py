"""Pictures changed, repainted, blended and enlarged, against stock pipelines and what must hold exactly."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
)
from models import CAPTIONS, pipeline, text_parts, text_unet, tiny_unet
from PIL import Image
from torch.testing import assert_close

from calotype import shapes
from calotype.pipeline import latent_rgb
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline
from calotype.pipeline.pictures import fill_hole, new_latents, to_tensor
from calotype.pipeline.prediction import Conditions, evaluate, in_windows, windows
from calotype.pipeline.samplers import SAMPLERS, make_scheduler

NAMES = {"0": "red", "1": "blue", "2": "green"}
DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon"}


def picture(seed=0, size=(16, 16)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def pipe():
    return pipeline(tiny_unet(classes=3), id2label=NAMES, default_guidance=1.5)


def code(pipe, image):
    with torch.no_grad():
        return pipe.encode_images([image])


@pytest.mark.parametrize("strength, steps", [(0.4, 4), (0.8, 8)])
def test_a_changed_picture_is_that_of_stock_diffusers(strength, steps):
    """Where the grid is even in time, stock diffusers begins at the same step from the same latents."""
    parts = text_parts()
    ours = pipeline(text_unet(), sampler="dpm++2m", **parts)
    missing = dict.fromkeys(("safety_checker", "feature_extractor"))
    stock = StableDiffusionImg2ImgPipeline(
        vae=ours.vae, unet=ours.unet, scheduler=ours.scheduler, requires_safety_checker=False, **parts, **missing
    )
    stock.set_progress_bar_config(disable=True)
    z = code(ours, picture())
    order = {"num_inference_steps": 10, "strength": strength, "guidance_scale": 3.0, "output_type": "np"}
    theirs = stock(CAPTIONS[0], image=z, generator=[torch.Generator().manual_seed(4)], **order).images
    events = list(ours.stream(CAPTIONS[0], 1, image=picture(), seed=4, **order))
    assert len(events) == events[-1].steps == steps
    np.testing.assert_allclose(events[-1].images, theirs, atol=2e-5)


@pytest.mark.parametrize("trained", [{"prediction_type": "flow_prediction"}, DIFFUSION])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_share_that_is_changed(pipe, trained, sampler):
    """Without any noise the code comes back; the more noise, the further the picture goes."""
    pipe = LatentDiffusionPipeline(pipe.vae, pipe.unet, make_scheduler(trained, sampler), id2label=NAMES)
    pipe.set_progress_bar_config(disable=True)
    z = code(pipe, picture())
    order = {"image": picture(), "output_type": "latent", "num_inference_steps": 10, "guidance_scale": 1.0}
    found = [pipe("red", strength=s, **order).images for s in (0, 0.3, 0.9)]
    assert_close(found[0], z)
    near, far = ((x - z).square().mean() for x in found[1:])
    assert torch.isfinite(far) and near < far


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler, PNDMScheduler, EulerAncestralDiscreteScheduler])
def test_stock_schedulers_change_pictures_too(pipe, scheduler):
    pipe = LatentDiffusionPipeline(pipe.vae, pipe.unet, scheduler(), id2label=NAMES)
    pipe.set_progress_bar_config(disable=True)
    z = code(pipe, picture())
    order = {"image": picture(), "output_type": "latent", "num_inference_steps": 10, "guidance_scale": 1.0}
    near, far = ((pipe("red", strength=s, **order).images - z).square().mean() for s in (0.2, 0.95))
    assert torch.isfinite(far) and near < far


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_not_to_be_new_is_kept(pipe, sampler):
    mask = Image.new("L", (16, 16))
    mask.paste(255, (4, 4, 12, 12))
    new = to_tensor([mask])[0, 0, ::2, ::2] > 0
    order = {"image": picture(), "mask": mask, "sampler": sampler, "num_inference_steps": 6}
    found = pipe("red", output_type="latent", **order).images
    hidden = fill_hole(to_tensor([picture()]), (to_tensor([mask]) > 0).float())
    with torch.no_grad():
        z = pipe.vae.encode(hidden).latent_dist.mean
    assert_close(found[..., ~new], z[..., ~new])
    assert (found - z)[..., new].abs().mean() > 0.1
    inside = to_tensor([mask])[0, 0].numpy() > 0
    pasted = pipe("red", output_type="np", **order).images[0]
    np.testing.assert_allclose(pasted[~inside], np.asarray(picture())[~inside] / 255, atol=1e-6)
    assert np.abs(pasted - pipe("red", output_type="np", paste=False, **order).images[0]).max() > 0.01
    z, near = code(pipe, picture()), pipe("red", output_type="latent", strength=0.4, **order).images
    assert_close(near[..., ~new], z[..., ~new])
    assert (near - z)[..., new].abs().mean() < (found - z)[..., new].abs().mean()


def test_nothing_of_what_is_hidden_shines_through(pipe):
    """Pictures that differ in the hole alone are repainted alike."""
    mask, other = Image.new("L", (16, 16)), picture()
    mask.paste(255, (3, 5, 11, 12))
    other.paste((255, 0, 0), (3, 5, 11, 12))
    a, b = (pipe("red", image=image, mask=mask, output_type="np").images for image in (picture(), other))
    np.testing.assert_array_equal(a, b)


def test_a_hole_is_filled_from_around_it():
    x = torch.arange(16.0).expand(1, 3, 16, 16) / 8 - 1
    new = torch.zeros(1, 1, 16, 16)
    new[:, :, 5:11, 5:11] = 1
    filled = fill_hole(x, new)
    assert_close(torch.where(new > 0, x, filled), x)
    assert (filled - x).abs().max() < 0.4
    assert_close(fill_hole(torch.full_like(x, 0.3), new), torch.full_like(x, 0.3))
    assert_close(fill_hole(x, torch.zeros_like(new)), x)
    assert torch.isfinite(fill_hole(x, torch.ones_like(new))).all()


def test_which_latents_become_new():
    new = torch.zeros(1, 1, 16, 16)
    new[:, :, 3:9] = 1  # rows 3 to 8: a quarter of the first cell of four rows, all of the second, one row of the third
    assert new_latents(new, (4, 4))[0, 0, :, 0].tolist() == [0, 1, 0, 0]
    stroke = torch.zeros(1, 1, 16, 16)
    stroke[:, :, 6] = 1
    assert new_latents(stroke, (4, 4))[0, 0, :, 0].tolist() == [0, 1, 0, 0]
    assert new_latents(torch.zeros(1, 1, 16, 16), (4, 4)).max() == 0


def test_a_blend_of_labels_is_the_blend_of_their_embeddings(pipe):
    z, t = torch.randn(2, *pipe.latent_shape), torch.tensor(300)
    y = pipe.class_labels([{"red": 3, "green": 1}, "blue"])
    assert_close(y, torch.tensor([[0.75, 0, 0.25, 0], [0, 1, 0, 0]]))
    emb = pipe.unet.time_embedding(pipe.unet.time_proj(t[None])) + y @ pipe.unet.class_embedding.weight
    seen = []
    hook = pipe.unet.mid_block.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    with torch.no_grad():
        blended = evaluate(pipe.unet, z, t, Conditions(labels=y))
        assert_close(seen[0], emb)
        assert_close(blended[1:], evaluate(pipe.unet, z[1:], t, Conditions(labels=torch.tensor([1]))))
    hook.remove()
    pure = pipe(["red", "blue"], seed=3, output_type="np").images
    np.testing.assert_allclose(pipe([{"red": 1.0}, {"blue": 0.2}], seed=3, output_type="np").images, pure, atol=1e-5)
    np.testing.assert_allclose(
        pipe([{"red": 1, "blue": 0}] * 2, seed=3, output_type="np").images[0], pure[0], atol=1e-5
    )
    middle = pipe({"red": 1, "blue": 1}, seed=3, output_type="np").images[0]
    assert np.abs(middle - pure[0]).max() > 1e-3


def test_a_blend_of_prompts_is_the_blend_of_their_states():
    pipe = pipeline(text_unet(), **text_parts())
    with torch.no_grad():
        a, b, mixed = pipe.encode_prompts([*CAPTIONS[:2], {CAPTIONS[0]: 1, CAPTIONS[1]: 3}])
    assert_close(mixed, a / 4 + 3 * b / 4)


@pytest.mark.parametrize("label", [{}, {"red": -1, "blue": 1}, {"red": 0}, {"red": float("nan")}, {"red": "much"}])
def test_shares_are_checked(pipe, label):
    with pytest.raises(ValueError, match="label=.*: a blend needs shares from 0 on"):
        pipe(label)


def test_windows_cover_everything_and_overlap():
    seen = torch.zeros(20, 13)
    for rows, columns in windows((20, 13), (8, 8)):
        assert seen[rows, columns].shape == (8, 8)
        seen[rows, columns] += 1
    assert seen.min() >= 1 and seen[4:-4, 4:-4].min() >= 2
    assert windows((8, 8), (8, 8)) == [(slice(0, 8), slice(0, 8))]


def test_larger_pictures_are_drawn_in_windows(pipe):
    big = pipe("red", 2, height=32, width=24, output_type="np").images
    assert big.shape == (2, 32, 24, 3) and np.isfinite(big).all()
    np.testing.assert_allclose(
        pipe("red", 1, seed=1, height=32, width=24, output_type="np").images[0], big[1], atol=1e-5
    )
    # A network that looks at each place alone says the same in every window as of the whole.
    z, parts = torch.randn(1, 4, 16, 12), windows((16, 12), (8, 8))
    whole = in_windows(lambda z, told: z * 2 + told[0].given, z, (Conditions(given=z**2), None), parts)
    assert_close(whole, z * 2 + z**2)


def test_sizes_are_checked(pipe):
    for order, message in (
        ({"height": 15}, "height=15 must be 16 or more and a multiple of 2"),
        ({"width": 33}, "width=33 must be 16 or more and a multiple of 2"),
        ({"latents": torch.zeros(1, 4, 8, 9)}, r"latents of shape \(1, 4, 8, 9\) must be \(1, 4, 8, 8\)"),
        ({"strength": 1.5, "image": picture()}, "strength=1.5 must be a number from 0"),
        ({"image": picture(size=(8, 8))}, "image: 8x8 pixels; resize to 16x16"),
        ({"preview": "best"}, "preview='best' must be True, False or one of"),
        ({"decoder": "linear"}, "decoder='linear': this model has no map"),
        ({"generator": [torch.Generator()] * 2, "num_images": 1}, "generator holds 2 generators for num_images=1"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe("red", **order)


def test_noise_comes_from_seeds_generators_or_the_caller(pipe):
    by_seed = pipe("red", 2, seed=5, output_type="np").images
    generators = [torch.Generator().manual_seed(5 + i) for i in range(2)]
    np.testing.assert_array_equal(pipe("red", 2, generator=generators, output_type="np").images, by_seed)
    noise = pipe.prepare_latents([torch.Generator().manual_seed(5 + i) for i in range(2)])
    np.testing.assert_array_equal(pipe("red", 2, latents=noise, output_type="np").images, by_seed)
    one = pipe("red", 2, generator=torch.Generator().manual_seed(5), output_type="np").images
    np.testing.assert_allclose(one[0], by_seed[0], atol=1e-6)
    assert np.abs(one[1] - by_seed[1]).max() > 1e-3


def test_a_callback_sees_and_changes_the_latents(pipe):
    seen = []

    def freeze(of, i, t, kwargs):
        assert of is pipe
        seen.append((i, float(t)))
        return {"latents": torch.zeros_like(kwargs["latents"])} if i == pipe.default_steps - 1 else None

    z = pipe("red", 2, output_type="latent", callback_on_step_end=freeze).images
    assert z.abs().max() == 0 and [i for i, _ in seen] == list(range(pipe.default_steps))
    assert sorted(seen, key=lambda pair: -pair[1]) == seen


def test_components_build_another_pipeline_that_draws_the_same(pipe):
    parts = pipe.components
    again = LatentDiffusionPipeline(**parts, **{n: pipe.config[n] for n in ("id2label", "default_steps")})
    again.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(again("red", output_type="np").images, pipe("red", output_type="np").images)
    assert set(parts) == {"vae", "unet", "scheduler", *LatentDiffusionPipeline._optional_components}


def test_the_shape_of_an_answer(pipe):
    (images,) = pipe("red", 2, return_dict=False, output_type="pt")
    assert images.shape == (2, 3, 16, 16) and images.min() >= 0 and images.max() <= 1
    array = pipe("red", 2, output_type="np").images
    assert_close(images.permute(0, 2, 3, 1), torch.from_numpy(array))
    pil = pipe("red", 2).images
    np.testing.assert_array_equal(np.stack([np.asarray(x) for x in pil]), (array * 255).round().astype(np.uint8))


def test_in_bfloat16_the_picture_is_nearly_the_same():
    pipe = pipeline(tiny_unet(classes=3), id2label=NAMES)
    exact = pipe(["red", {"red": 1, "blue": 1}], output_type="np").images
    coarse = pipe.to(torch.bfloat16)(["red", {"red": 1, "blue": 1}], output_type="np").images
    assert 0 < np.abs(coarse - exact).mean() < 0.02
    assert pipe(image=picture(), strength=0.5, output_type="np").images.dtype == np.float32


def test_a_linear_preview_is_its_map(pipe):
    weight = {str(i): [0.1 * i, 0.2, -0.1] for i in range(4)}
    linear = LatentDiffusionPipeline(
        pipe.vae, pipe.unet, pipe.scheduler, id2label=NAMES, latent_rgb={"weight": weight, "bias": [0.0, 0.5, -0.5]}
    )
    z = torch.randn(2, 4, 8, 8)
    x = linear.decode_latents(z, "pt", "linear")
    assert x.shape == (2, 3, 16, 16)
    expected = torch.einsum("bchw,cd->bdhw", z, torch.tensor([weight[str(i)] for i in range(4)]))
    expected = ((expected + torch.tensor([0.0, 0.5, -0.5])[:, None, None]) / 2 + 0.5).clamp(0, 1)
    small = torch.nn.functional.interpolate(x[..., 2:-2, 2:-2], scale_factor=0.5, mode="area")
    assert (small - expected[..., 1:-1, 1:-1]).abs().mean() < 0.2
    flat = linear.decode_latents(torch.ones(1, 4, 8, 8), "pt", "linear")
    assert_close(flat[0, :, 0, 0], torch.tensor([0.6, 1.3, -0.9]).div(2).add(0.5).clamp(0, 1))
    previews = [e.images for e in linear.stream("red", output_type="pt", num_inference_steps=3)]
    assert_close(previews[-1], linear("red", output_type="pt", num_inference_steps=3).images)
    full = [e.images for e in linear.stream("red", output_type="pt", num_inference_steps=3, preview="full")]
    assert (previews[0] - full[0]).abs().max() > 1e-3


def test_the_map_to_colours_is_found(finished):
    """A decoder that is a linear map is found again; a real one is met better than by grey."""
    z, weight, bias = torch.randn(8, 4, 6, 6), torch.randn(4, 3), torch.randn(3)
    small = torch.einsum("bchw,cd->bdhw", z, weight) + bias[:, None, None]
    found = latent_rgb.fit(z, torch.nn.functional.interpolate(small, scale_factor=4))
    assert_close(torch.tensor([found["weight"][str(i)] for i in range(4)]), weight, atol=1e-4, rtol=1e-4)
    assert_close(torch.tensor(found["bias"]), bias, atol=1e-4, rtol=1e-4)
    pipe = LatentDiffusionPipeline.from_pretrained(finished / "pipeline")
    images = [shapes.render(shapes.draw_factors(0, i, shapes.PLAIN), (16, 16)) for i in range(8)]
    z = pipe.encode_images(images)
    full, glance = (pipe.decode_latents(z, "pt", decoder) for decoder in ("full", "linear"))
    assert (glance - full).square().mean() < 0.9 * (full.mean((0, 2, 3), keepdim=True) - full).square().mean()


def test_the_progress_bar_counts_the_steps_and_can_be_silenced(capfd):
    pipe = pipeline(tiny_unet(classes=3), id2label=NAMES)
    pipe.set_progress_bar_config(disable=False)
    pipe("red", num_inference_steps=7)
    assert "7/7" in capfd.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    pipe("red", num_inference_steps=7)
    assert "7/7" not in capfd.readouterr().err
