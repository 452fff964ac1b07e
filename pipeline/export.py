"""`calotype export`: the parts of a run in one folder that diffusers loads, with a model card and a sample sheet."""

import json
import shutil
from pathlib import Path
from typing import Any

from diffusers import AutoencoderTiny, UNet2DConditionModel, UNet2DModel

from calotype import __version__, device
from calotype.autoencoder import load_autoencoder
from calotype.checkpoint import publish, weights_hash
from calotype.errors import UserError
from calotype.pipeline import hashes, latent_map, latent_rgb, static_explorer
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline
from calotype.pipeline.model_folder import load_part, load_scheduler
from calotype.pipeline.onnx_export import export_onnx, refuse_missing_extra
from calotype.pipeline.sample_sheet import sample_sheet
from calotype.pipeline.stock import stock
from calotype.pipeline.verify import verify
from calotype.weights import load_network, read_json

_FACTS = ("id2label", "default_steps", "default_guidance", "condition", "sampler")


def main(settings) -> None:
    """Assemble RUN/stage1_vae/vae, RUN/stage2_diffusion and RUN/distilled into the model folder; or RUN/explorer."""
    if settings.explorer:
        static_explorer.main(settings)
        return
    run = settings.run
    out = (settings.out or run / ("stock" if settings.stock else "pipeline")).resolve()
    _refuse_to_replace(out)
    if settings.onnx:
        refuse_missing_extra("--onnx")
    pipe = assemble(run, settings.guide)
    temporary = out.parent / f".{out.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    (stock(pipe) if settings.stock else pipe).save_pretrained(temporary, safe_serialization=True)
    sample_sheet(pipe.to(device.device()), run, settings.seed).save(temporary / "samples.png")
    (temporary / "README.md").write_text(model_card(pipe, run, settings.stock), encoding="utf-8")
    if not settings.stock:
        latent_map.write(run, pipe.vae, temporary)
    if settings.onnx:
        export_onnx(pipe, temporary / "onnx")
    if settings.verify:
        difference = verify(pipe, temporary, settings.stock)
        print(f"Verified: two pictures drawn by diffusers alone differ from ours by at most {difference:.1g} of 1.")
    hashes.write(temporary)
    publish(temporary, out)
    print(f"Model: {out}")


def _refuse_to_replace(out: Path) -> None:
    """Only an older model, or nothing at all, may make way for a new one."""
    if out.exists() and not ((out / "model_index.json").is_file() or (out.is_dir() and not any(out.iterdir()))):
        raise UserError(f"--out {out} exists and is no model folder; give another.")


def assemble(run: Path, guide: Path | None = None) -> LatentDiffusionPipeline:
    """The pipeline of a run's finished stages; raises UserError where a part is missing or does not belong."""
    vae_folder, stage2 = run / "stage1_vae" / "vae", run / "stage2_diffusion"
    needed = {vae_folder / "config.json": "train-vae", stage2 / "finished.json": "train-diffusion"}
    for file, command in needed.items():
        if not file.is_file():
            raise UserError(f"--run {run}: {file} is not there; finish `calotype {command}` first.")
    facts = _read(stage2 / "model.json")
    if facts["vae"] != weights_hash(vae_folder):
        raise UserError(f"--run {run}: the diffusion model was trained for another autoencoder than {vae_folder}.")
    unet, scheduler = _unet(stage2 / "unet", "--run"), load_scheduler(stage2 / "scheduler", "--run")
    parts = {"vae": load_autoencoder(vae_folder, "--run"), "unet": unet, "scheduler": scheduler}
    parts |= _text_parts(stage2) | _distilled(run / "distilled", unet)
    if guide is not None:
        parts["guide"] = _guide(guide, unet)
    for part in parts.values():
        if hasattr(part, "register_to_config"):
            part.register_to_config(_name_or_path="")  # diffusers would publish where on this machine they lay
    steps = {"student_steps": _read(run / "distilled" / "distilled.json").get("steps", 4)}
    more = {"latent_rgb": latent_rgb.of_cache(run / "latents", parts["vae"])} if (run / "latents").is_dir() else {}
    return LatentDiffusionPipeline(**parts, **steps, **more, **{name: facts[name] for name in _FACTS if name in facts})


def _text_parts(stage2: Path) -> dict[str, Any]:
    """The text encoder and its tokenizer, where the run has them."""
    if not (stage2 / "text_encoder" / "config.json").is_file():
        return {}
    parts = {name: load_part(stage2, name, [], f"--run {stage2.parent}") for name in ("text_encoder", "tokenizer")}
    parts["text_encoder"].config._name_or_path = ""
    return parts


def _distilled(folder: Path, unet: UNet2DModel | UNet2DConditionModel) -> dict[str, Any]:
    """The student with its scheduler, and the tiny decoder, as far as `calotype distill` has made them."""
    parts: dict[str, Any] = {}
    if (folder / "student" / "config.json").is_file():
        parts["student"] = _unet(folder / "student", "--run")
        _refuse_other_inputs(f"{folder / 'student'}", parts["student"], unet)
        parts["student_scheduler"] = load_scheduler(folder / "student_scheduler", "--run")
    if (folder / "tiny_decoder" / "config.json").is_file():
        parts["tiny_decoder"] = load_network(AutoencoderTiny, folder / "tiny_decoder", "--run")
    return parts


def _guide(path: Path, unet: UNet2DModel | UNet2DConditionModel) -> UNet2DModel | UNet2DConditionModel:
    """The UNet in a folder, or that of another run; raises UserError."""
    folders = (path, path / "unet", path / "stage2_diffusion" / "unet")
    folder = next((folder for folder in folders if (folder / "diffusion_pytorch_model.safetensors").is_file()), None)
    if folder is None:
        raise UserError(f"--guide {path} holds no UNet; give the folder of one, or a run.")
    guide = _unet(folder, "--guide")
    _refuse_other_inputs(f"--guide {path}", guide, unet)
    return guide


def _refuse_other_inputs(name: str, other: UNet2DModel | UNet2DConditionModel, unet) -> None:
    for key in ("in_channels", "out_channels", "num_class_embeds", "cross_attention_dim"):
        theirs, ours = other.config.get(key), unet.config.get(key)
        if theirs != ours:
            raise UserError(f"{name}: its {key} is {theirs}, the model's {ours}; give a network with the same inputs.")


def _unet(folder: Path, flag: str) -> UNet2DModel | UNet2DConditionModel:
    kind = read_json(folder / "config.json", flag).get("_class_name")
    classes = {"UNet2DModel": UNet2DModel, "UNet2DConditionModel": UNet2DConditionModel}
    if kind not in classes:
        raise UserError(f"{flag}: {folder} holds a {str(kind)[:60]}, no UNet of diffusers; give another folder.")
    return load_network(classes[kind], folder, flag)


def model_card(pipe: LatentDiffusionPipeline, run: Path, stock: bool = False) -> str:
    """The README.md of a model folder."""
    facts = _read(run / "data.json")
    metrics = [
        f"| {name} | {entry['value']:.4g} | {entry['n']} |" for name, entry in _read(run / "metrics.json").items()
    ]
    table = ["| figure | value | n |", "|---|---|---|", *metrics] if metrics else []
    tag = {"none": "unconditional-image-generation", "class": "unconditional-image-generation", "text": "text-to-image"}
    return "\n".join(
        [
            "---",
            "library_name: diffusers",
            f"pipeline_tag: {tag.get(pipe.condition, 'image-to-image')}",
            "tags: [latent-diffusion, calotype]",
            "---",
            "# A latent diffusion model of one's own",
            "",
            "![samples](samples.png)",
            "",
            *_about(pipe, facts.get("counts", {})),
            "",
            *table,
            "",
            *_example(pipe, stock),
            "",
            f"Made with calotype {__version__}.",
            "",
        ]
    )


def _about(pipe: LatentDiffusionPipeline, counts: dict[str, int]) -> list[str]:
    """Sentences on what the model is."""
    height, width = pipe.image_size
    pixels = "grey" if pipe.image_channels == 1 else "colour"
    label = "prompt" if pipe.condition == "text" else "label"
    twice = f" (each evaluates the network with and without the {label})" if pipe.default_guidance != 1 else ""
    sentences = [
        f"A latent diffusion model of {height}x{width} {pixels} pictures, "
        f"with latents of shape {'x'.join(map(str, pipe.latent_shape))}.",
        f"Trained on {counts['train']:,} pictures; {counts['val']:,} were held out." if counts else "",
        f"Classes: {', '.join(pipe.labels[:60])}{' …' if len(pipe.labels) > 60 else ''}." if pipe.labels else "",
        f"It begins with a given picture of {pipe.given_size[1]}x{pipe.given_size[0]} pixels ({pipe.condition})."
        if pipe.takes_image
        else "",
        f"By default a picture takes {pipe.default_steps} steps at guidance {pipe.default_guidance}{twice}.",
        f"`fast=True` draws in {pipe.config.student_steps} steps with a distilled student." if pipe.student else "",
    ]
    return [sentence for sentence in sentences if sentence]


def _example(pipe: LatentDiffusionPipeline, stock: bool) -> list[str]:
    """How to draw with nothing but diffusers."""
    load = 'pipe = DiffusionPipeline.from_pretrained("PATH_OF_THIS_FOLDER"'
    steps = f"num_inference_steps={pipe.default_steps}"
    guided = f"{steps}, guidance_scale={pipe.default_guidance}"
    if pipe.condition == "text":
        lines = [f"{load})", f'pipe("a prompt", {guided}).images']
    elif stock and pipe.labels:
        lines = [f"{load})", f"pipe(pipe.get_label_ids([{pipe.labels[0]!r}]), {guided}).images"]
    elif stock:
        lines = [f"{load})", f"pipe(4, {steps}).images"]
    else:
        label = f"{pipe.labels[0]!r}, " if pipe.labels else ""
        given = "image=picture, " if pipe.takes_image else ""
        given += "mask=mask, " if pipe.condition == "inpaint" else ""
        lines = [f"{load}, trust_remote_code=True)", f"pipe({label}num_images=4, {given}seed=0).images"]
    return ["```python", "from diffusers import DiffusionPipeline", *lines, "```"]


def _read(file: Path) -> dict:
    return json.loads(file.read_text()) if file.is_file() else {}
