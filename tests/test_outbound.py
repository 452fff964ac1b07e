"""Nobody but this machine is asked for anything: not in training, nor in drawing, nor in serving."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.reliability
# What commands look up or connect to, by Python's own word, on stderr.
WATCHED = """
import json, sys
def watch(event, args):
    if event == "socket.getaddrinfo":
        print("ASKED", args[0], file=sys.stderr)
    if event == "socket.connect" and isinstance(args[1], tuple):
        print("ASKED", args[1][0], file=sys.stderr)
sys.addaudithook(watch)
from calotype import cli
sys.exit(max([cli.main(argv) for argv in json.loads(sys.argv[1])]))
"""
# And by the kernel's, since compiled libraries ask nobody in Python.
STRACE = "strace -f --seccomp-bpf -qq -e trace=connect,sendto,sendmsg,sendmmsg -e signal=none".split()
HERE = {"127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "None"}
DEMO = 120  # seconds until a demo must have answered


@pytest.fixture
def command(tmp_path):
    """The words that run a command watched, and what it asked."""
    tracer = [*STRACE, "-o", str(tmp_path / "trace")] if shutil.which("strace") else []

    def asked(errors):
        trace = (tmp_path / "trace").read_text(errors="replace") if tracer else ""
        found = re.findall(r"^ASKED (.*)$", errors, re.MULTILINE)
        return {*found, *re.findall(r'(?:inet_addr\(|inet_pton\(AF_INET6, )"([^"]+)"', trace)} - HERE

    return [*tracer, sys.executable, "-c", WATCHED], asked


def test_the_watch_would_see_somebody_asked(command):
    words, asked = command
    code = words[-1].replace("from calotype import cli", "import socket; s = socket.socket(socket.AF_INET, 2)")
    code = code.partition("sys.exit")[0] + "s.connect(('192.0.2.1', 9))"
    errors = subprocess.run([*words[:-1], code], capture_output=True, text=True, check=True).stderr
    assert asked(errors) == {"192.0.2.1"}


def test_training_and_drawing_ask_nobody(command, pictures, tmp_path):
    words, asked = command
    out, length = tmp_path / "run", ["--steps", "2", "--batch-size", "4", "--precision", "fp32", "--validations", "1"]
    commands = [
        ["data", str(pictures), "--image-size", "16", "--out", str(out)],
        ["train-vae", str(out / "data.json"), "--width", "8", *length, "--out", str(out / "stage1_vae")],
        ["encode", str(out / "data.json"), "--vae", str(out / "stage1_vae/vae"), "--out", str(out / "latents")],
        ["train-diffusion", "--latents", str(out / "latents"), "--width", "16", *length]
        + ["--out", str(out / "stage2_diffusion")],
        ["export", "--run", str(out)],
        ["generate", str(out), "--steps", "2", "-n", "2", "--out", str(tmp_path / "drawn")],
    ]  # fmt: skip
    done = subprocess.run([*words, json.dumps(commands)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert asked(done.stderr) == set() and len(list((tmp_path / "drawn").rglob("*.png"))) == 2


def test_serving_asks_nobody_and_ends_cleanly(command, finished, tmp_path, monkeypatch):
    words, asked = command
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    serving = subprocess.Popen(
        [*words, json.dumps([["demo", str(finished)]])], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        url = re.search(r"http://[^ ]+/", serving.stdout.readline()).group()
        until = time.monotonic() + DEMO
        while httpx.get(f"{url}readyz", timeout=DEMO).status_code != 200 and time.monotonic() < until:
            time.sleep(0.2)
        assert httpx.get(url, timeout=DEMO).status_code == 200
    finally:
        child = serving.pid if not shutil.which("strace") else int(_child_of(serving.pid))
        subprocess.run(["kill", f"-{signal.SIGTERM.value}", str(child)], check=True)
        said, errors = serving.communicate(timeout=DEMO)
    assert serving.returncode == 0 and said == "The demo has ended.\n", errors
    assert asked(errors) == set() and list((tmp_path / "temporary").iterdir()) == []


def _child_of(process):
    """The command that strace runs."""
    return Path(f"/proc/{process}/task/{process}/children").read_text().split()[0]
