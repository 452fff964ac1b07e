"""The doctor on a healthy machine, and on ones that are sick in one way."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from calotype import cli, doctor_disk, doctor_machine, doctor_packages
from calotype.doctor_drill import _verdict, differing
from calotype.finding import examine


def verdicts(findings):
    return {finding.what: finding.verdict for finding in findings}


def elsewhere(code, *words, **environment):
    """Run a few lines in another process; returns what they print."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_quick_look_at_this_machine(tmp_path, capsys):
    assert cli.main(["doctor", "--quick", "--out", str(tmp_path / "new" / "folder")]) == 0
    table = capsys.readouterr().out
    rows = [line for line in table.splitlines() if line[:1].strip()]
    named = "Versions,Known holes,Extras,Network policy,Device,Processors,Precision,Weights,Folder,Free space,Writing"
    for name in (*named.split(","), "Renaming", "Locks", "File names"):
        assert sum(row.startswith(name) for row in rows) == 1, table
    assert all(len(line) <= 110 for line in table.splitlines()[:-1])
    assert rows[-1].startswith("14 examinations in") and "all well" in rows[-1]
    assert "Traceback" not in table and "FAIL" not in table
    assert list(tmp_path.iterdir()) == []


def test_a_healthy_disk_passes(tmp_path):
    findings = doctor_disk.examine_disk(tmp_path)
    assert len(findings) == 5
    assert {f.what for f in findings if f.verdict == "FAIL"} == set(), findings
    assert verdicts(findings)["Renaming"] == verdicts(findings)["File names"] == "pass"


LIMITED = """
import resource, sys
from pathlib import Path
from types import SimpleNamespace
resource.setrlimit(resource.RLIMIT_FSIZE, (5 * 2**20, 5 * 2**20))
from calotype.doctor_disk import examine_disk
for finding in examine_disk(Path(sys.argv[1])):
    print(*finding, sep="|")
"""


def test_a_limit_on_the_size_of_files_is_found(tmp_path):
    lines = elsewhere(LIMITED, tmp_path).splitlines()
    writing = next(line for line in lines if line.startswith("Writing"))
    assert writing.startswith("Writing|FAIL|") and "File too large" in writing and "ulimit -f" in writing
    assert sum("|FAIL|" in line for line in lines) == 1


SPEAKS = """
import sys
from pathlib import Path
from types import SimpleNamespace
from calotype.doctor_disk import names
for finding in names(Path(sys.argv[1])):
    print(ascii(tuple(finding)))
"""


def test_a_locale_without_letters_is_found(tmp_path):
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert "'FAIL'" in elsewhere(SPEAKS, tmp_path, **ascii_only)
    told = elsewhere(SPEAKS, tmp_path, PYTHONIOENCODING="latin-1")
    assert "'note'" in told and "PYTHONUTF8=1" in told and "iso8859-1" in told


def test_replacements_that_can_be_seen_half_done_are_found(tmp_path, monkeypatch):
    def in_two_steps(self, target):
        shutil.copyfile(self, target)  # as over some network mounts: emptied, then filled
        self.unlink()

    monkeypatch.setattr(Path, "replace", in_two_steps)
    finding = doctor_disk.renaming(tmp_path)
    assert finding.verdict == "FAIL" and "torn or missing" in finding.found


def test_locks_that_bind_nobody_are_found(tmp_path, monkeypatch):
    class Nothing:
        def __init__(self, *_, **__):
            pass

        __enter__ = __exit__ = lambda *_: None

    monkeypatch.setattr(doctor_disk, "FileLock", Nothing)
    assert doctor_disk.locks(tmp_path).found == "two processes hold the same lock"


@pytest.mark.parametrize("path, kind", [("/proc/self", "proc"), ("/sys/kernel", "sysfs")])
def test_the_kind_of_file_system_is_that_of_the_innermost_mount(path, kind):
    if not Path(path).exists():
        pytest.skip("no such file system here")
    assert doctor_disk.file_system(Path(path)) == kind


def test_a_disk_of_which_too_little_is_left(tmp_path, monkeypatch):
    for free, verdict in ((100e6, "FAIL"), (2e9, "note"), (50e9, "pass")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert doctor_disk.free_space(tmp_path).verdict == verdict


@pytest.mark.parametrize(
    "name, value", [("GRADIO_ANALYTICS_ENABLED", "True"), ("HF_HUB_DISABLE_TELEMETRY", "0"), ("GRADIO_SHARE", "1")]
)
def test_whoever_would_report_home_is_found(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    finding = next(doctor_packages.policy())
    assert finding.verdict == "FAIL" and f"{name}={value}" in finding.found and finding.way_out == f"unset {name}"


def test_the_policy_says_what_offline_would_change(monkeypatch):
    for name in doctor_packages._POLICY:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    strict = next(doctor_packages.policy())
    monkeypatch.delenv("HF_HUB_OFFLINE")
    usual = next(doctor_packages.policy())
    assert strict.verdict == usual.verdict == "pass"
    assert strict.found.endswith("; HF_HUB_OFFLINE forbids even that") and "(HF_HUB_OFFLINE=1" in usual.found


def test_a_missing_extra_is_a_note_with_its_purpose(tmp_path, monkeypatch):
    info = tmp_path / "calotype-0.1.dist-info"
    info.mkdir()
    needs = ["numpy>=2", 'nowhere-to-be-had; extra == "data"', 'tensorboard>=2; extra == "track"']
    lines = ["Metadata-Version: 2.1", "Name: calotype", "Version: 0.1", *(f"Requires-Dist: {text}" for text in needs)]
    (info / "METADATA").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor_packages.extras()
    assert finding.verdict == "note" and finding.way_out.endswith("pip install 'calotype[data]'")
    assert finding.found == "installed: track; not installed: data (codes as parquet; nowhere-to-be-had)"
    assert doctor_packages.versions().verdict == "pass"
    (info / "METADATA").write_text("\n".join([*lines, "Requires-Dist: numpy>=99"]))
    assert "numpy" in doctor_packages.versions().found and doctor_packages.versions().verdict == "FAIL"


def test_whatever_an_examination_raises_is_a_row():
    def sick():
        raise OSError(5, "Input/output error", "/dev/sick")

    [finding] = examine("Disk", sick)
    assert finding[:3] == ("Disk", "FAIL", "/dev/sick: Input/output error")
    [finding] = examine("Device", lambda: iter([1 / 0]))
    assert finding[:3] == ("Device", "FAIL", "division by zero")


REACHES = """
import socket, sys
from calotype.doctor_watch import listen
reached = listen()
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname()).close()
print(reached)
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("192.0.2.1", 9))  # sends nothing
try:
    socket.getaddrinfo("nobody.invalid", 443)
except OSError:
    pass
print(reached)
"""


def test_connections_beyond_this_machine_are_heard():
    quiet, loud = elsewhere(REACHES).splitlines()
    assert quiet == "[]"
    assert loud == "['connection to 192.0.2.1', 'look-up of nobody.invalid']"


def stage(folder, weights, loss):
    """The checkpoint of a finished stage, written by hand: a header of JSON, then numbers."""
    checkpoint = folder / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    data = struct.pack(f"<{len(weights)}f", *weights)
    header = json.dumps({"w": {"dtype": "F32", "shape": [len(weights)], "data_offsets": [0, len(data)]}}).encode()
    (checkpoint / "vae.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "seconds": id(folder), "loss[train]": loss}))
    return folder


def test_runs_are_compared_bit_for_bit(tmp_path):
    calm = stage(tmp_path / "calm", [1.0, 2.0], 0.5)
    assert differing(calm, stage(tmp_path / "same", [1.0, 2.0], 0.5)) is None
    assert differing(calm, stage(tmp_path / "losses", [1.0, 2.0], 0.5000001)) == "other losses"
    off = differing(calm, stage(tmp_path / "weights", [1.0, 2.0002], 0.5))
    assert off == pytest.approx(1e-4, rel=1e-2)
    assert _verdict("Kill and resume", "killed", off, on_cpu=True).verdict == "FAIL"
    assert _verdict("Kill and resume", "killed", off, on_cpu=False).verdict == "note"
    assert _verdict("Kill and resume", "killed", 100 * off, on_cpu=False).verdict == "FAIL"
    assert _verdict("Kill and resume", "killed", None, on_cpu=True).verdict == "pass"


def test_a_card_that_torch_does_not_reach_is_found(tmp_path, monkeypatch):
    version = tmp_path / "version"
    version.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (builder@host)\n"
        "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n"
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(doctor_machine, "_NVIDIA", version)
    finding = doctor_machine._without_gpu("The NVIDIA driver on your system is too old")
    assert finding.verdict == "FAIL" and "driver 580.65.06" in finding.found and "too old" in finding.found
    assert "pytorch.org/get-started" in finding.way_out
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor_machine._without_gpu("").verdict == "note"  # hidden on purpose
    version.unlink()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert doctor_machine._without_gpu("").verdict == "pass"


def test_damaged_weights_on_disk_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert next(doctor_machine.weights()).verdict == "note"
    file = tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"half of it")
    finding = next(doctor_machine.weights())
    assert finding.verdict == "FAIL" and str(file) in finding.found and str(file) in finding.way_out


def test_a_product_of_matrices_shows_a_wrong_bf16(monkeypatch):
    import torch

    assert doctor_machine.precision().verdict in ("pass", "note")
    right = torch.Tensor.bfloat16
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: right(x) * 1.1)
    finding = doctor_machine.precision()
    assert finding.verdict == "FAIL" and "--precision fp32" in finding.way_out
