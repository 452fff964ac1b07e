"""The explorer as files: opened from the disk in a real browser, decoded by onnxruntime-web."""

import base64
import gzip
import json
import re
import shutil
import tarfile

import onnxruntime
import pytest
import torch
from browser import CHROMIUM, FLAGS, Explorer, share_of_a_core, watched

from calotype import cli
from calotype.autoencoder import load_autoencoder, posterior
from calotype.checkpoint import sha256
from calotype.errors import UserError
from calotype.images import normalize
from calotype.pipeline import onnxruntime_web
from calotype.pipeline.latent_map import open_run

try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None
needs_npm = pytest.mark.skipif(not shutil.which("npm"), reason="onnxruntime-web is NOT tried: npm is missing")


@pytest.fixture
def package(tmp_path):
    """A package with the names and the notice of the real one."""
    dist = tmp_path / "package/dist"
    dist.mkdir(parents=True)
    facts = {"name": "onnxruntime-web", "version": "9.9.9", "license": "MIT"}
    (dist.parent / "package.json").write_text(json.dumps(facts))
    (dist / onnxruntime_web.SCRIPT).write_text("/*!\n * X\n * Copyright (c) Somebody.\n * MIT.\n */\nlet a;")
    (dist / onnxruntime_web.MODULE).write_text("export default 'ü';")
    (dist / onnxruntime_web.WASM).write_bytes(b"\0asm\1\0\0\0")
    return dist.parent


def test_what_is_taken_of_the_package_is_all_there(package, tmp_path):
    out = tmp_path / "out"
    for given in (package, package / "dist"):
        out.mkdir()
        origin = onnxruntime_web.install(given, out)
        assert origin["version"] == "9.9.9" and origin["sha256"]["ort.wasm.min.js"] == sha256(out / "ort.wasm.min.js")
        module, wasm = re.findall(r'"([^"]+)"', (out / "runtime.js").read_text())
        assert base64.b64decode(module).decode() == "export default 'ü';"
        assert gzip.decompress(base64.b64decode(wasm)) == b"\0asm\1\0\0\0"
        licence = (out / "LICENSE-onnxruntime-web.txt").read_text()
        assert "Copyright (c) Somebody." in licence and "Permission is hereby granted" in licence
        shutil.rmtree(out)


def test_what_is_not_the_package_is_refused(package, tmp_path):
    dist = package / "dist"

    def refused(reason):
        with pytest.raises(UserError, match=f"^--ort .*{reason}"):
            onnxruntime_web.install(package, tmp_path)

    (dist / onnxruntime_web.WASM).write_bytes(b"<html>")
    refused("is not WebAssembly")
    (dist / onnxruntime_web.WASM).write_bytes(b"\0asm")
    (dist / onnxruntime_web.SCRIPT).write_text("let a;")
    refused("no licence that may be passed on")
    (package / "LICENSE").write_text("As you like.")
    onnxruntime_web.install(package, tmp_path)
    assert (tmp_path / "LICENSE-onnxruntime-web.txt").read_text() == "As you like."
    (dist / onnxruntime_web.WASM).unlink()
    refused("wasm is missing")
    (dist / onnxruntime_web.WASM).write_bytes(b"\0asm")
    (package / "package.json").write_text('{"name": "left-pad"}')
    refused("another one")


def test_a_package_with_another_hash_is_not_unpacked(package, tmp_path):
    with tarfile.open(tmp_path / "packed.tgz", "w:gz") as archive:
        archive.add(package, "package")
    with pytest.raises(UserError, match="not onnxruntime-web .* as we know it"):
        onnxruntime_web._unpack(tmp_path / "packed.tgz", tmp_path / "unpacked")
    assert not (tmp_path / "unpacked").exists()


@pytest.fixture(scope="module")
def exported(two_numbers, tmp_path_factory):
    """RUN/explorer with the real onnxruntime-web, which npm fetches or has kept from the last time."""
    out = tmp_path_factory.mktemp("static") / "explorer"
    words = ["export", "--run", str(two_numbers), "--explorer", "--download", "--out", str(out)]
    if cli.main(words):
        pytest.skip("the static explorer is NOT tried: npm could not fetch onnxruntime-web")
    return out


@needs_npm
def test_the_folder_names_all_that_it_holds(exported, two_numbers):
    manifest = json.loads((exported / "manifest.json").read_text())
    assert manifest["files"] == {f.name: sha256(f) for f in exported.iterdir() if f.name != "manifest.json"}
    assert manifest["runtime"]["version"] == onnxruntime_web.VERSION
    assert "Copyright" in (exported / "LICENSE-onnxruntime-web.txt").read_text()
    for file in (exported / "index.html", exported / "model.js"):
        assert str(two_numbers) not in file.read_text() and "http" not in file.read_text()


@needs_npm
def test_the_networks_in_it_are_the_runs(exported, two_numbers, tmp_path):
    _, encoder = re.findall(r'"([^"]+)"', (exported / "model.js").read_text())
    (tmp_path / "encoder.onnx").write_bytes(base64.b64decode(encoder))
    x = torch.rand(1, 3, 12, 12) * 2 - 1
    mean, _ = onnxruntime.InferenceSession(tmp_path / "encoder.onnx").run(None, {"x": x.numpy()})
    vae = load_autoencoder(two_numbers / "stage1_vae/vae", "--vae")
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(mean), posterior(vae, x)["mean"], atol=1e-4, rtol=1e-4)


@needs_npm
@pytest.mark.skipif(not (CHROMIUM and sync_playwright), reason="NOT opened in a browser: no Chromium, or no playwright")
def test_opened_from_the_disk_it_decodes_what_the_dot_is_dragged_to(exported, two_numbers, capsys):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page, complaints, strangers = watched(browser.new_context(), (exported.as_uri(), "data:", "blob:"))
        page.goto((exported / "index.html").as_uri())
        visit = Explorer(page)
        visit.drag((0.5, 0.5), (0.2, 0.3))
        visit.settle()
        first = visit.picture()
        visit.drag((0.2, 0.3), (0.8, 0.7))
        visit.settle()
        assert visit.picture() != first
        page.get_by_role("button", name="Encode picture 3").click()
        visit.settle()
        vae, latent_map = open_run(two_numbers)
        with torch.no_grad():
            expected = posterior(vae, normalize(latent_map.pictures[2:3]))["mean"].flatten().tolist()
        assert visit.place() == pytest.approx(expected, abs=0.02)
        page.get_by_role("switch").check()
        page.wait_for_timeout(500)
        seen = {
            visit.picture(),
            page.wait_for_timeout(400) or visit.picture(),
            page.wait_for_timeout(400) or visit.picture(),
        }
        assert len(seen) >= 2
        page.get_by_role("switch").uncheck()
        share, found = share_of_a_core(), max(visit.frames_per_second() for _ in range(2))
        with capsys.disabled():
            print(f"\nstatic explorer: {found:.0f} frames/s; a busy loop gets {100 * share:.0f} % of a core")
        assert found > 1 and complaints == [] and strangers == []  # a quiet machine shows 40 and more
        browser.close()
