"""`calotype export --verify`: what diffusers alone draws with the folder in another process, against ours."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from calotype.errors import UserError
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline

_SEEDS = [1, 2]
_TOLERANCE = 5e-3  # of pictures in [0, 1]: about one grey level
_STRANGER = """
import sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "calotype":
            raise ImportError("calotype is not to be used here")
sys.meta_path.insert(0, Wall())
import json
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
folder, out, order = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **order["load"])
pipe.set_progress_bar_config(disable=True)
call = order["call"] | {name: Image.open(file) for name, file in order["pictures"].items()}
call["generator"] = [torch.Generator().manual_seed(seed) for seed in order["seeds"]]
np.save(out, pipe(**call, output_type="np").images)
"""


def verify(pipe: LatentDiffusionPipeline, folder: Path, stock: bool = False) -> float:
    """The largest difference of two pictures in [0, 1] drawn here and there; raises UserError where it is too large."""
    pipe = pipe.to("cpu")
    with tempfile.TemporaryDirectory(prefix="calotype-verify-") as temporary:
        pictures = _given(pipe, Path(temporary))
        ours = _draw(pipe, pictures)
        theirs = _drawn_elsewhere(pipe, folder, stock, pictures, Path(temporary) / "drawn.npy")
    difference = float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else float("inf")
    if not difference <= _TOLERANCE:
        raise UserError(f"--verify: diffusers alone draws other pictures with {folder} (by {difference:.3g} of 1).")
    return difference


def _draw(pipe: LatentDiffusionPipeline, pictures: dict[str, Path]) -> np.ndarray:
    generators = [torch.Generator().manual_seed(seed) for seed in _SEEDS]
    given = {name: Image.open(file) for name, file in pictures.items()}
    label, steps = [_label(pipe)] * len(_SEEDS), {"num_inference_steps": 4, "guidance_scale": _guidance(pipe)}
    return pipe(label, len(_SEEDS), generator=generators, output_type="np", **steps, **given).images


def _drawn_elsewhere(pipe, folder: Path, stock: bool, pictures: dict[str, Path], out: Path) -> np.ndarray:
    order = {"seeds": _SEEDS, "pictures": {name: str(file) for name, file in pictures.items()}}
    order |= {"load": {} if stock or pipe.condition == "text" else {"trust_remote_code": True}}
    order |= {"call": {"num_inference_steps": 4} | _words(pipe, stock)}
    words = [sys.executable, "-c", _STRANGER, str(folder), str(out), json.dumps(order)]
    # Code that a folder brings is copied to a cache before it runs: to one that goes with us.
    environment = os.environ | {"HF_MODULES_CACHE": str(out.parent), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=out.parent, check=False)
    if result.returncode:
        last = (result.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"--verify: diffusers alone cannot draw with {folder} ({last}).")
    return np.load(out)


def _words(pipe: LatentDiffusionPipeline, stock: bool) -> dict[str, Any]:
    """What a pipeline of its class is told to draw the same."""
    guidance, count = {"guidance_scale": _guidance(pipe)}, len(_SEEDS)
    if pipe.condition == "text":
        return guidance | {"prompt": [_label(pipe)] * count}
    if not stock:
        return guidance | {"label": [_label(pipe)] * count, "num_images": count}
    return guidance | {"class_labels": [0] * count} if pipe.labels else {"batch_size": count}


def _guidance(pipe: LatentDiffusionPipeline) -> float:
    return 2.0 if pipe.labels or pipe.condition == "text" else 1.0


def _label(pipe: LatentDiffusionPipeline) -> str | None:
    return "a picture" if pipe.condition == "text" else pipe.labels[0] if pipe.labels else None


def _given(pipe: LatentDiffusionPipeline, folder: Path) -> dict[str, Path]:
    """Pictures that a model which needs some is given: a ramp, and a hole in its middle."""
    if not pipe.takes_image:
        return {}
    height, width = pipe.given_size
    ramp = Image.linear_gradient("L").resize((width, height))
    ramp.convert("L" if pipe.image_channels == 1 else "RGB").save(folder / "image.png")
    if pipe.condition != "inpaint":
        return {"image": folder / "image.png"}
    hole = Image.new("L", (width, height))
    hole.paste(255, (width // 4, height // 4, width - width // 4, height - height // 4))
    hole.save(folder / "mask.png")
    return {"image": folder / "image.png", "mask": folder / "mask.png"}
