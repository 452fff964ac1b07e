"""onnxruntime-web for a page that is opened from a disk: taken from its npm package, checked, written as scripts."""

import base64
import gzip
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calotype.checkpoint import sha256
from calotype.errors import UserError

NAME = "onnxruntime-web"
VERSION = "1.30.0"  # what --download takes
INTEGRITY = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="  # SHA-512
SCRIPT, MODULE, WASM = "ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"
MIT = """Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def install(package: Path | None, out: Path) -> dict[str, Any]:
    """Write what a page needs of the package, or of one that npm fetches, into `out`; returns where it came from."""
    if package is not None:
        return _install(_root(package), out)
    with _downloaded() as root:
        return _install(root, out)


def _root(package: Path) -> Path:
    """The folder with package.json, for the package or its dist; raises UserError."""
    folder = package.parent if package.name == "dist" else package
    try:
        facts = json.loads((folder / "package.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        facts = {}
    missing = [name for name in (SCRIPT, MODULE, WASM) if not (folder / "dist" / name).is_file()]
    if facts.get("name") != NAME or missing:
        what = f"{missing[0]} is missing" if missing else "package.json names another one"
        raise UserError(f"--ort {package} is not the npm package {NAME} ({what}); unpack one, or give --download.")
    return folder


def _install(root: Path, out: Path) -> dict[str, Any]:
    facts, dist = json.loads((root / "package.json").read_text(encoding="utf-8")), root / "dist"
    if not (dist / WASM).read_bytes()[:4] == b"\0asm":
        raise UserError(f"--ort {root}: {WASM} is not WebAssembly; unpack the package again.")
    shutil.copyfile(dist / SCRIPT, out / SCRIPT)
    (out / "runtime.js").write_text(_runtime(dist), encoding="utf-8")
    (out / f"LICENSE-{NAME}.txt").write_text(_licence(root, facts), encoding="utf-8")
    hashes = {name: sha256(dist / name) for name in (SCRIPT, MODULE, WASM)}
    return {"package": NAME, "version": facts["version"], "license": facts.get("license"), "sha256": hashes}


def _runtime(dist: Path) -> str:
    """A script that holds the WebAssembly and its module."""
    wasm = base64.b64encode(gzip.compress((dist / WASM).read_bytes(), mtime=0)).decode()
    module = base64.b64encode((dist / MODULE).read_bytes()).decode()
    return f'const ortRuntime = {{ module: "{module}", wasm: "{wasm}" }};\n'


def _licence(root: Path, facts: dict[str, Any]) -> str:
    """The package's licence; it comes without the file, so its notice is that of the script's first lines."""
    files = sorted(file for file in root.iterdir() if file.name.upper().startswith("LICEN"))
    if files:
        return files[0].read_text(encoding="utf-8")
    banner = (root / "dist" / SCRIPT).read_text(encoding="utf-8").partition("*/")[0]
    notice = [line.strip(" *") for line in banner.splitlines() if "Copyright" in line]
    if facts.get("license") != "MIT" or not notice:
        raise UserError(f"--ort {root} holds no licence that may be passed on; take another version of {NAME}.")
    return f"{NAME} {facts['version']}\n\nMIT License\n\n{notice[0]}\n\n{MIT}"


@contextmanager
def _downloaded() -> Iterator[Path]:
    """The package as npm's client fetches it, checked against the hash that we know; raises UserError."""
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"--download needs npm, which is not here; install it, or give --ort DIR with {NAME} unpacked.")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", f"{NAME}@{VERSION}", "--silent", "--ignore-scripts", "--pack-destination", folder]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        packed = next(Path(folder).glob("*.tgz"), None)
        if done.returncode or packed is None:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"--download: npm could not fetch {NAME} ({reason}); give --ort DIR.")
        _unpack(packed, Path(folder))
        yield Path(folder) / "package"


def _unpack(packed: Path, folder: Path) -> None:
    with packed.open("rb") as stream:
        found = base64.b64encode(hashlib.file_digest(stream, "sha512").digest()).decode()
    if found != INTEGRITY:
        raise UserError(f"--download: what npm fetched is not {NAME} {VERSION} as we know it; give --ort DIR.")
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")
