"""The locks of the process that opens pickles, each tried with the others open."""

import inspect
import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from hostile_weights import Call, swollen

from calotype import unpickle

pytestmark = pytest.mark.reliability


@pytest.fixture
def ordinary(monkeypatch):
    """The child with an ordinary unpickler, which would call anything; only the audit hook is left."""
    program = unpickle._program().replace("weights_only=True", "weights_only=False")
    program = program.replace("pickle.find_class", "nothing of the kind")
    monkeypatch.setattr(unpickle, "_program", lambda: program)


@pytest.mark.parametrize(
    "call, event",
    [
        (Call(socket.create_connection, ("127.0.0.1", 9)), "socket."),
        (Call(socket.getaddrinfo, "localhost", 80), "socket.getaddrinfo"),
        (Call(subprocess.call, ["true"]), "subprocess.Popen"),
        (Call(os.remove, "precious"), "os.remove"),
        (Call(os.mkdir, "made"), "os.mkdir"),
        (Call(open, "made", "w"), "open"),
    ],
    ids=["connect", "look up", "start", "delete", "make a folder", "write"],
)
def test_the_audit_hook_alone_stops_it(ordinary, tmp_path, monkeypatch, call, event):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "precious").write_text("years of work")
    torch.save({"state_dict": {}, "more": call}, tmp_path / "kl.ckpt")
    assert f"it tried {event}" in unpickle.as_safetensors(tmp_path / "kl.ckpt", tmp_path / "out.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kl.ckpt", "precious"]


def test_a_swollen_tensor_does_not_fill_the_memory(tmp_path):
    file = swollen(tmp_path / "kl.ckpt", None)
    complaint = unpickle.as_safetensors(file, tmp_path / "out.safetensors")
    assert "alloc" in complaint and not (tmp_path / "out.safetensors").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limits")
def test_the_limits_are_set_and_grow_with_the_file(tmp_path):
    names = ["RLIMIT_DATA", "RLIMIT_FSIZE", "RLIMIT_CPU", "RLIMIT_CORE"]
    shown = f"import json, resource\nprint(json.dumps([resource.getrlimit(getattr(resource, n))[1] for n in {names}]))"
    found = []
    for size in (10, 10 * 2**20):
        (tmp_path / "x").write_bytes(bytes(size))
        program = f"{inspect.getsource(unpickle._limit)}\n_limit({str(tmp_path / 'x')!r})\n{shown}"
        found.append(json.loads(subprocess.check_output([sys.executable, "-I", "-c", program])))
    assert all(0 < small < large < 2**40 for small, large in zip(*(limits[:3] for limits in found), strict=True))
    assert found[0][3] == 0 and "_limit(source)" in unpickle._program()
