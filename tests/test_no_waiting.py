"""Nobody waits for the device within a step: no value is asked for that it has not computed yet."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from calotype import device, updates
from calotype.config import parse
from calotype.sheet import read_sheet
from calotype.stage1_vae.config import VaeSettings
from calotype.stage1_vae.train import VaeStage
from calotype.stage2_diffusion.config import DiffusionSettings
from calotype.stage2_diffusion.train import DiffusionStage

ASKS = (
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.is_nonzero",
    "aten.equal",
    "aten.masked_select",
    "aten.unique",
)
GAN = "--perceptual features --adversarial 0.5 --adversarial-start 0 --adversarial-pretraining 0".split()


class Asked(TorchDispatchMode):
    """Notes the operations that would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = str(func).startswith("aten.index.") and any(i.dtype == torch.bool for i in args[1] if i is not None)
        if by_mask or str(func).startswith(ASKS):
            self.found.append(str(func))
        return func(*args, **kwargs or {})


def diffusion(finished, *more):
    words = ["--latents", str(finished / "latents"), "--width", "16", "--batch-size", "8", "--out", "unused", *more]
    settings = parse(DiffusionSettings, words, "train-diffusion")
    return DiffusionStage(settings, finished / "stage1_vae/vae", device.accelerator(settings.precision))


def vae(finished, *more):
    words = [
        str(finished / "data.json"),
        "--width",
        "8",
        "--factor",
        "2",
        "--batch-size",
        "8",
        "--out",
        "unused",
        *more,
    ]
    settings = parse(VaeSettings, words, "train-vae")
    return VaeStage(settings, read_sheet(finished / "data.json"), device.accelerator(settings.precision))


STAGES = {
    "flow by class": (diffusion, ["--precision", "fp32"]),
    "bf16, weighted": (diffusion, ["--weighting", "uncertainty"]),
    "epsilon, min-SNR": (diffusion, ["--objective", "epsilon", "--weighting", "min-snr"]),
    "kl": (vae, ["--precision", "fp32"]),
    "elbo": (vae, ["--beta", "1", "--free-bits", "0.1"]),
    "discriminator": (vae, GAN),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_step_asks_for_no_value(finished, monkeypatch, name):
    # On a CPU, where there is nothing to wait for, clipping looks at the norm; this is how it goes elsewhere.
    monkeypatch.setattr(updates, "_clip", lambda accelerator, model, most: _clip_unseen(model, most))
    make, words = STAGES[name]
    stage = make(finished, *words)
    batches = stage.batches(0)
    stage.step(next(batches), 0)
    batch = next(batches)
    with Asked() as asked:
        stage.step(batch, 1)
    assert asked.found == []


def test_what_asks_is_noticed():
    with Asked() as asked:
        assert torch.ones(1).sum() > 0
        torch.ones(2)[torch.tensor([True, False])]
    assert len(asked.found) == 2


def _clip_unseen(model, most):
    return torch.nn.utils.clip_grad_norm_(model.parameters(), most)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", STAGES)
def test_a_step_on_a_gpu_synchronises_nothing(finished, name):
    make, words = STAGES[name]
    stage = make(finished, *words)
    batches = stage.batches(0)
    stage.step(next(batches), 0)
    batch = next(batches)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stage.step(batch, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
