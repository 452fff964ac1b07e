"""One process at a time in a folder: who holds it is named at once, and whoever is killed holds nothing."""

import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from calotype import cli
from calotype.errors import UserError
from calotype.lock import claimed, refuse_held

HOLD = "import sys, time; from pathlib import Path; from calotype.lock import claimed\n"
HOLD += "with claimed(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"

BEGIN = "import sys; from calotype.cli import main; code = main(sys.argv[1:])\n"
BEGIN += "sys.exit('torch was imported' if 'torch' in sys.modules else code)"


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_holder_is_named_and_nothing_is_held_after_kill_9(tmp_path, holder):
    named = re.escape(f"in use by process {holder.pid} on {socket.gethostname()}")
    with pytest.raises(UserError, match=named), claimed(tmp_path):
        pass
    with pytest.raises(UserError, match=named):
        refuse_held(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    refuse_held(tmp_path)
    with claimed(tmp_path):
        assert (tmp_path / ".holder").read_text() == f"process {os.getpid()} on {socket.gethostname()}"


@pytest.mark.parametrize("command", ["run shapes", "train-vae shapes", "encode shapes", "train-diffusion"])
def test_a_second_start_is_refused_before_anything_heavy_is_imported(tmp_path, holder, command):
    """By CPU time, of which a crowded machine takes no more; today a third of a second, and importing torch is 3."""
    given = {"encode": ["--vae", "v"], "train-diffusion": ["--latents", "l"]}.get(command.split()[0], [])
    words = [*command.split(), *given, "--out", str(tmp_path)]
    before = os.times()
    done = subprocess.run([sys.executable, "-c", BEGIN, *words], capture_output=True, text=True, check=False)
    after = os.times()
    assert done.returncode == 2 and f"process {holder.pid} on" in done.stderr, done
    assert after.children_user - before.children_user + after.children_system - before.children_system < 1


def test_the_other_processes_of_a_run_do_not_mind_its_first(tmp_path, holder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    refuse_held(tmp_path)


def test_reading_is_allowed_meanwhile(finished):
    with claimed(finished / "stage1_vae"), claimed(finished / "latents"):
        assert cli.main(["report", str(finished)]) == 0


def test_a_folder_nobody_holds_is_left_as_it_was(tmp_path):
    refuse_held(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with claimed(tmp_path / "one"):
        pass
    before = sorted(path.name for path in (tmp_path / "one").iterdir())
    refuse_held(tmp_path / "one")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == before
