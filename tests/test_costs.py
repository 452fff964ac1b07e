"""Costs that must not grow unnoticed: arithmetic of a step, forwards of each network, evaluations a picture, bytes.

All are counted and none is timed, so they are the same on any machine. What is expected is written as a formula.
"""

import math
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from calotype import cli, latents
from calotype.config import parse
from calotype.device import accelerator
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline
from calotype.sheet import read_sheet
from calotype.stage1_vae.config import VaeSettings
from calotype.stage1_vae.losses import l1
from calotype.stage1_vae.perceptual import Lpips
from calotype.stage1_vae.train import VaeStage
from calotype.stage2_diffusion import train
from calotype.stage2_diffusion.config import DiffusionSettings
from calotype.stage2_diffusion.consistency import few_step_sampler

BATCH = 8
SHARED = f"--batch-size {BATCH} --precision fp32 --out unused".split()
UNET = "--width 32 --depth 2 --layers 1".split()
VAE = "--width 16 --factor 2 --layers 1".split()
GAN = "--adversarial 0.5 --adversarial-pretraining 0".split()
LATER = 1  # a step without the discriminator's gradient penalty, which comes at 0, 16, 32 …


@pytest.fixture(scope="module")
def diffusion(finished):
    words = ["--latents", str(finished / "latents"), *UNET, *SHARED]
    settings = parse(DiffusionSettings, words, "train-diffusion")
    return train.DiffusionStage(settings, finished / "stage1_vae" / "vae", accelerator("fp32"))


@pytest.fixture(scope="module")
def sheet(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("sheet")
    assert cli.main(["data", str(pictures), "--image-size", "16", "--out", str(out)]) == 0
    return out / "data.json"


def stage_1(sheet, *more):
    settings = parse(VaeSettings, [str(sheet), *VAE, *SHARED, *more], "train-vae")
    stage = VaeStage(settings, read_sheet(sheet), accelerator("fp32"))
    if stage.adversary:
        stage.adversary.state["began"] = 0
    return stage


@pytest.fixture(scope="module")
def plain(sheet):
    return stage_1(sheet)


@pytest.fixture(scope="module")
def adversarial(sheet):
    """The adversarial step beside LPIPS with a VGG16 of random weights."""
    pytest.importorskip("lpips")
    stage = stage_1(sheet, *GAN)
    stage.perceptual, stage.reconstruction = random_lpips(), l1
    return stage


def random_lpips():
    from torchvision.models.vgg import cfgs, make_layers

    torch.manual_seed(0)
    return Lpips({f"features.{name}": value for name, value in make_layers(cfgs["D"]).state_dict().items()})


class Flops(TorchDispatchMode):
    """Adds up torch's own formulae; FlopCounterMode would also hook modules, and so break gradients at their inputs."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if formula := flop_registry.get(function._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def flops(work):
    with Flops() as counter:
        work()
    return counter.total


@contextmanager
def counted(**networks):
    """How many times each network walks forward, and for how many examples."""
    calls, examples = Counter(), Counter()

    def note(name):
        def hook(_, inputs):
            calls[name] += 1
            examples[name] += len(inputs[0])

        return hook

    hooks = [network.register_forward_pre_hook(note(name)) for name, network in networks.items()]
    try:
        yield calls, examples
    finally:
        for hook in hooks:
            hook.remove()


def by_hand(work, *networks):
    """Multiplications and additions of the convolutions and linear layers that a piece of work passes through."""
    total = 0

    def note(layer, _, output):
        nonlocal total
        each = layer.weight[0].numel()  # of one number of the output
        total += 2 * each * output.numel()

    layers = [m for net in networks for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    work()
    for hook in hooks:
        hook.remove()
    return total


# Stage 2


def step_2(stage, step=LATER):
    return stage.step(next(stage.batches(step)), step)


def forward_2(stage):
    with torch.no_grad():
        stage.losses(next(stage.batches(LATER)))


def test_a_step_of_stage_2_is_three_forwards(diffusion):
    """One there, and one each for the gradients of inputs and of weights; the very first layer needs no former."""
    forward = flops(lambda: forward_2(diffusion))
    assert forward == by_hand(lambda: forward_2(diffusion), diffusion.net)
    assert 2.9 * forward < flops(lambda: step_2(diffusion)) <= 3 * forward


def test_a_step_of_stage_2_passes_the_network_once_and_never_the_autoencoder(diffusion):
    vae = diffusion.vae()
    networks = {"unet": diffusion.net.unet, "average": diffusion.averaged.unet}
    with counted(encoder=vae.encoder, decoder=vae.decoder, **networks) as (calls, examples):
        step_2(diffusion)
    assert calls == {"unet": 1} and examples == {"unet": BATCH}


def test_a_step_of_stage_2_draws_noise_for_the_latents_and_for_their_posterior(diffusion, monkeypatch):
    drawn = Counter()

    def noting(name, law):
        def call(seed, purpose, start, count, shape=()):
            drawn[name] += count * math.prod(shape)
            return law(seed, purpose, start, count, shape)

        return call

    for module in (latents, train):
        for name in ("normal", "uniform"):
            monkeypatch.setattr(module, name, noting(name, getattr(module, name)))
    step_2(diffusion)
    values = math.prod(diffusion.cache.index.shape)
    assert drawn["normal"] == 2 * BATCH * values
    assert drawn["uniform"] <= 2 * BATCH  # times, and whether a latent is mirrored


# Stage 1


def step_1(stage, step=LATER):
    return stage.step(next(stage.batches(step)), step)


def autoencoder(stage):
    """Arithmetic of one forward of the whole autoencoder."""
    x, damaged, eps = stage._inputs(next(stage.batches(LATER)))
    with torch.no_grad():
        return flops(lambda: stage.model(damaged, eps))


def test_a_step_of_stage_1_is_three_forwards(plain):
    x, _, eps = plain._inputs(next(plain.batches(LATER)))
    with torch.no_grad():
        assert autoencoder(plain) == by_hand(lambda: plain.model(x, eps), plain.model)
    assert 2.9 * autoencoder(plain) < flops(lambda: step_1(plain)) <= 3 * autoencoder(plain)


def test_an_adversarial_step_passes_the_autoencoder_once(adversarial):
    """LPIPS looks at the pictures and at their reconstructions; so does the discriminator, for both players' sake."""
    vae, vgg = adversarial.model.vae, adversarial.perceptual.whole.net
    networks = {"encoder": vae.encoder, "decoder": vae.decoder, "vgg": vgg}
    with counted(discriminator=adversarial.adversary.discriminator, **networks) as (calls, examples):
        step_1(adversarial)
    assert calls == {"encoder": 1, "decoder": 1, "vgg": 2, "discriminator": 2}
    assert set(examples.values()) == {BATCH, 2 * BATCH}


def test_the_gradient_penalty_costs_a_forward_every_sixteenth_step(adversarial):
    with counted(discriminator=adversarial.adversary.discriminator) as (calls, _):
        for step in (0, 1, 15, 16):
            step_1(adversarial, step)
    assert calls == {"discriminator": 2 * 4 + 2}


def test_the_arithmetic_of_an_adversarial_step(adversarial):
    """3 forwards of the autoencoder; of VGG16 the target, the reconstruction and the way back to it; of the critic 2,
    the way back to the reconstruction, and the gradients of inputs and weights for both sets of pictures.
    """
    x = torch.rand(BATCH, 3, 16, 16)
    with torch.no_grad():
        vgg = flops(lambda: adversarial.perceptual.features(x))
        critic = flops(lambda: adversarial.adversary.discriminator(x))
    expected = 3 * autoencoder(adversarial) + 3 * vgg + (2 + 1 + 2 * 2) * critic
    assert flops(lambda: step_1(adversarial)) == pytest.approx(expected, rel=0.04)


# Drawing


@pytest.mark.parametrize("count", [1, 5])
def test_a_picture_takes_fifteen_evaluations_guided_in_one_batch(diffusion, count):
    pipe = diffusion.pipeline()
    assert pipe.default_guidance > 1
    with counted(unet=pipe.unet, decoder=pipe.vae.decoder) as (calls, examples):
        pipe(pipe.labels[0], count, output_type="pt")
    assert calls == {"unet": 15, "decoder": 1}
    assert examples == {"unet": 15 * 2 * count, "decoder": count}


def test_a_student_takes_four_without_guidance(diffusion):
    pipe = diffusion.pipeline()
    student = train.models.build(diffusion.settings, inputs_of(diffusion)).eval()
    parts = {"student": student, "student_scheduler": few_step_sampler(diffusion.objective)}
    fast = LatentDiffusionPipeline(pipe.vae, pipe.unet, pipe.scheduler, **parts, **diffusion._drawing())
    fast.set_progress_bar_config(disable=True)
    with counted(unet=fast.unet, student=student, decoder=fast.vae.decoder) as (calls, examples):
        fast(fast.labels[0], 3, fast=True, output_type="pt")
    assert calls == {"student": 4, "decoder": 1} and examples == {"student": 4 * 3, "decoder": 3}


def inputs_of(stage):
    return train.models.Inputs(tuple(stage.cache.index.shape), classes=len(stage.class_names))


# The cache


def test_a_cached_sample_takes_two_bytes_for_each_mean_and_deviation(finished):
    """Beside them only the label (int32) and where its caption ends (int64), and a header for each shard."""
    index = latents.read_index(finished / "latents")
    each = 2 * 2 * math.prod(index.shape) + 4 + 8
    for split, names in index.shards.items():
        files = [finished / "latents" / name for name in names]
        captions = sum(load_file(file)["caption"].numel() for file in files)
        size = sum(file.stat().st_size for file in files)
        expected = each * index.counts[split] + captions
        assert expected <= size <= expected + 700 * len(files), split
