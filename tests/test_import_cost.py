"""What a command imports before its first word, and before its first picture; each in a process of its own."""

import json
import os
import subprocess
import sys

import pytest
from models import pipeline, tiny_unet

HEAVY = {"torch", "numpy", "PIL", "pydantic", "tyro", "rich", "diffusers", "accelerate", "gradio", "safetensors"}
NOT_FOR_SETTINGS = {"torch", "numpy", "PIL", "diffusers", "accelerate", "gradio", "safetensors", "scipy"}
NOT_TO_DRAW = {"torch._dynamo", "torch._inductor", "sympy", "transformers", "torchvision", "gradio", "pandas"}
NOT_TO_DRAW |= {"scipy.stats._stats_py", "diffusers.models.transformers.transformer_flux", "fastapi", "uvicorn"}
SAY = "; import sys, json; print(json.dumps([name for name, module in sys.modules.items() if module]))"
CLI = "import sys; from calotype.cli import main; assert main() == 0"
# What was put off is the real thing for whoever asks, and the compiler still works.
AFTERWARDS = """
import scipy.stats
from scipy import integrate
import diffusers
from diffusers.models.transformers import DiTTransformer2DModel
from diffusers.models.autoencoders import AutoencoderKL
from diffusers.models import unets
import torch
assert abs(scipy.stats.norm.cdf(0.0) - 0.5) < 1e-9 and abs(integrate.quad(lambda x: x, 0, 1)[0] - 0.5) < 1e-9
assert diffusers.AutoencoderKL is AutoencoderKL and diffusers.DiTTransformer2DModel is DiTTransformer2DModel
assert diffusers.UNet2DModel is unets.UNet2DModel and hasattr(unets, "UNetSpatioTemporalConditionModel")
assert not hasattr(unets, "no_such_network")
net = torch.compile(torch.nn.Linear(2, 2), backend="eager")
net(torch.ones(1, 2))
from diffusers.utils.torch_utils import is_compiled_module
assert is_compiled_module(net) and not is_compiled_module(torch.nn.Linear(2, 2))
"""


def python(code: str, *words: str) -> str:
    """What a fresh process prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    given = [sys.executable, "-c", code, *words]
    done = subprocess.run(given, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported(*words: str) -> set[str]:
    """The modules that `calotype WORDS` has imported when it is done."""
    return set(json.loads(python(CLI + SAY, *words).splitlines()[-1]))


def test_the_help_imports_nothing_heavy():
    found = imported("--help")
    assert not HEAVY & found
    assert {name for name in found if name.startswith("calotype")} == {
        "calotype", "calotype.cli", "calotype.disk", "calotype.errors", "calotype.lock",
    }  # fmt: skip


@pytest.mark.parametrize("command", ["train-vae", "generate", "demo"])
def test_flags_are_read_without_torch(command):
    code = f"from calotype.cli import settings_of\ntry: settings_of(['{command}', '--help'])\nexcept SystemExit: pass\n"
    found = set(json.loads(python(code + SAY.removeprefix("; ")).splitlines()[-1]))
    assert not NOT_FOR_SETTINGS & found


def test_a_picture_is_drawn_without_what_only_others_need(tmp_path):
    pipeline(tiny_unet(classes=1), id2label={"0": "disc"}).save_pretrained(tmp_path / "model")
    words = ["generate", str(tmp_path / "model"), "disc", "-n", "1", "--steps", "2", "--out", str(tmp_path / "out")]
    say = SAY.replace("print(", "sys.stdout.write('\\n' + ").rstrip(")") + "))"
    printed = python(CLI + say + "\n" + AFTERWARDS, *words)
    found = set(json.loads(printed.splitlines()[-1]))
    assert not NOT_TO_DRAW & found and "diffusers.pipelines.pipeline_utils" in found
    assert len(list((tmp_path / "out").glob("*.png"))) == 1
