"""What is said of a step that is not finite: the module or the gradient, and the examples; looking changes nothing."""

import re

import pytest
import torch
from test_faults import (
    KINDS,
    NAN,
    break_backward,
    break_forward,
    differing,
    diffusion_stage,
    everything,
    middle_of_decoder,
    middle_of_encoder,
    take,
    vae_stage,
)

from calotype.faults import locate

BACKWARD = [
    (lambda stage: stage.model.vae.decoder.conv_out, "vae.decoder.conv_out"),
    (middle_of_decoder, "vae.decoder.mid_block.resnets.0.conv1"),
    (lambda stage: stage.model.vae.decoder.up_blocks[0].resnets[0].conv1, "vae.decoder.up_blocks.0.resnets.0.conv1"),
    (lambda stage: stage.model.vae.quant_conv, "vae.quant_conv"),
    (middle_of_encoder, "vae.encoder.mid_block.resnets.0.conv1"),
]


@pytest.mark.parametrize("module_of, name", BACKWARD)
def test_the_gradient_nearest_to_the_loss_is_named(finished, monkeypatch, module_of, name):
    stage = vae_stage(finished)
    break_backward(monkeypatch, module_of, {0})
    sentence = locate(stage, 0)
    found = sentence.removeprefix("NaN or Inf at step 0 came up in the backward pass, in the gradient of ")
    assert found in (f"{name}.weight (examples 0 to 7)", f"{name}.bias (examples 0 to 7)")
    assert all(p.grad is None for p in stage.model.parameters())


def spoil(rows):
    """A hook that makes these rows of a module's output NaN."""

    def hook(_module, _inputs, output):
        return (
            output
            * torch.where(torch.isin(torch.arange(len(output)), torch.tensor(rows)), NAN, 1.0)[:, None, None, None]
        )

    return hook


def test_the_examples_are_named_where_it_came_from_them_alone(finished):
    stage = vae_stage(finished)
    stage.model.vae.encoder.conv_in.register_forward_hook(spoil([2]))
    file = stage.pictures.records[stage.batch_source.order.index(8 * 5 + 2)].file
    assert locate(stage, 5).endswith(f"(example 42, {file})") and file.endswith(".png")
    stage.model.vae.encoder.conv_in.register_forward_hook(spoil([0, 3, 4, 7]))
    assert re.search(r"\(example 40, \S+, example 42, \S+, example 43, \S+ and 2 more\)$", locate(stage, 5))


def test_latents_are_named_by_their_place_in_the_cache(finished):
    stage = diffusion_stage(finished)
    stage.net.unet.conv_in.register_forward_hook(spoil([6]))
    item = next(stage.batches(5)).item[6]
    assert locate(stage, 5).endswith(f"(example 46, latent {item})")


def test_a_fault_that_does_not_come_back_is_said_to_be_one(finished, monkeypatch):
    assert locate(vae_stage(finished, regularizer="vq"), 4) == (
        "NaN or Inf at step 4 did not come back when the step was repeated"
    )


@pytest.mark.parametrize("more", KINDS, ids=str)
def test_looking_for_a_fault_changes_nothing(finished, monkeypatch, more):
    stage = vae_stage(finished, **more)
    break_forward(monkeypatch, middle_of_encoder, {1})
    take(stage, 0)
    before = everything(stage)
    locate(stage, 1)
    assert differing(before, everything(stage)) == []
    after = take(stage, 2)
    again = vae_stage(finished, **more)
    take(again, 0)
    assert {name: value.item() for name, value in take(again, 2).items()} == {n: v.item() for n, v in after.items()}
