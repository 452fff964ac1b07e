"""`calotype posthoc-ema`: another weight average of a finished run, without training again."""

import json
import shutil
from pathlib import Path

from calotype import posthoc
from calotype.checkpoint import publish, write_text
from calotype.errors import UserError
from calotype.stage2_diffusion.config import PosthocEmaSettings
from calotype.stage2_diffusion.models import load_unet
from calotype.weights import load_network


def main(settings: PosthocEmaSettings) -> None:
    """Write the UNet (and the text encoder that was trained with it) in place of the exported ones, or into --out."""
    source = stage_folder(settings.run)
    out = settings.out or source
    if settings.until and out == source:
        raise UserError(f"--until {settings.until} makes an earlier model; give it an --out of its own.")
    modules = {"unet": load_unet(source / "unet", f"RUN {settings.run}")}
    if (source / "text_encoder").is_dir() and not json.loads((source / "config.json").read_text())["text_encoder"]:
        from transformers import CLIPTextModel

        modules["text_encoder"] = load_network(CLIPTextModel, source / "text_encoder", f"RUN {settings.run}")
    averaged = posthoc.average(source / "ema", settings.width, list(modules), settings.until)
    out.mkdir(parents=True, exist_ok=True)
    for name, module in modules.items():
        posthoc.load_average(module, averaged[name])
        module.save_pretrained(out / f".{name}")
        publish(out / f".{name}", out / name)
    facts = json.loads((source / "model.json").read_text()) | {"ema_width": settings.width}
    write_text(out / "model.json", json.dumps(facts, indent=1, ensure_ascii=False))
    if out != source:
        for name in ("scheduler", "tokenizer"):
            if (source / name).is_dir():
                shutil.copytree(source / name, out / name, dirs_exist_ok=True)
    print(f"Averaged weights of width {settings.width}: {out}. Next: calotype export --run {settings.run}")


def stage_folder(run: Path) -> Path:
    """The folder of stage 2 that `run` names: itself or RUN/stage2_diffusion; raises UserError."""
    for folder in (run, run / "stage2_diffusion"):
        if (folder / "unet").is_dir() and (folder / "model.json").is_file():
            return folder
    raise UserError(f"RUN {run} holds no finished diffusion model; finish `calotype train-diffusion` first.")
