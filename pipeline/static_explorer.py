"""`calotype export --explorer`: the latent explorer as a folder of files that a browser opens, with no server."""

import base64
import html
import json
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path

from calotype.autoencoder import Vae
from calotype.checkpoint import publish, sha256, write_text
from calotype.errors import UserError
from calotype.pipeline import onnxruntime_web
from calotype.pipeline.latent_map import LatentMap, open_run
from calotype.pipeline.onnx_export import autoencoder_parts, export_parts, refuse_missing_extra

_PAGE, _MANIFEST = "index.html", "manifest.json"
_MOST = 200_000_000  # bytes of a network that a script can hold as text
_ASSETS = files("calotype.pipeline")


def main(settings) -> None:
    """Write RUN/explorer, or the folder that --out names."""
    run, out = settings.run, (settings.out or settings.run / "explorer").resolve()
    refuse_missing_extra("--explorer")
    _refuse_to_replace(out)
    vae, latent_map = open_run(run)
    temporary = out.parent / f".{out.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    origin = onnxruntime_web.install(settings.ort, temporary)
    write_text(temporary / "model.js", _model(vae, latent_map))
    write_text(temporary / _PAGE, page(latent_map, run.resolve().name))
    hashes = {file.name: sha256(file) for file in sorted(temporary.iterdir())}
    write_text(temporary / _MANIFEST, json.dumps({"runtime": origin, "files": hashes}, indent=1) + "\n")
    publish(temporary, out)
    print(f"Explorer: {out / _PAGE} (open it in a browser)")


def _refuse_to_replace(out: Path) -> None:
    """Only an older explorer, or nothing at all, may make way for a new one."""
    if out.exists() and not ((out / _MANIFEST).is_file() or (out.is_dir() and not any(out.iterdir()))):
        raise UserError(f"--out {out} exists and is no explorer; give another.")


def _model(vae: Vae, latent_map: LatentMap) -> str:
    """A script that holds decoder and encoder."""
    facts = latent_map.facts
    with tempfile.TemporaryDirectory() as folder:
        export_parts(autoencoder_parts(vae, tuple(facts.shape), tuple(facts.image_size)), Path(folder))
        networks = {name: Path(folder) / f"{name}.onnx" for name in ("decoder", "encoder")}
        if any(file.stat().st_size > _MOST for file in networks.values()):
            raise UserError(f"--explorer: the autoencoder has more than {_MOST:,} bytes, too much for a browser.")
        held = [f'{name}: "{base64.b64encode(file.read_bytes()).decode()}"' for name, file in networks.items()]
    return f"const ortModel = {{ {', '.join(held)} }};\n"


def page(latent_map: LatentMap, title: str) -> str:
    """index.html with everything in it but the networks and what runs them."""
    height, width = latent_map.facts.image_size
    colour = "grey" if latent_map.facts.channels == 1 else "colour"
    parts = {
        "title": html.escape(title),
        "facts": f"{width}×{height} {colour} pictures, codes of {len(latent_map.mean):,} numbers",
        "map": json.dumps(latent_map.for_browser()).replace("<", "\\u003c"),
        "css": _asset("explorer.css"),
        "js": _asset("explorer.js"),
    }
    text = _asset("explorer.html")
    for name, value in parts.items():
        text = text.replace("{{ " + name + " }}", value)
    return text


def _asset(name: str) -> str:
    return _ASSETS.joinpath(name).read_text(encoding="utf-8")
