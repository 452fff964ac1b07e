"""The doctor in full, as a person calls it: on this machine, on sick ones, and interrupted."""

import os
import resource
import signal
import subprocess
import sys
import time

import psutil
import pytest

pytestmark = pytest.mark.reliability
DOCTOR = [sys.executable, "-m", "calotype", "doctor"]
TRAINED = ("Kill and resume", "Damaged checkpoint", "Export and reload", "Connections")
SABOTAGE = """
import sys
if "calotype.doctor_watch" in sys.orig_argv:
    import socket
    from calotype import checkpoint
    keep = checkpoint.write_text
    def report_home(*words):
        try:
            socket.getaddrinfo("telemetry.invalid", 443)
        except OSError:
            pass
        return keep(*words)
    checkpoint.write_text = report_home
    checkpoint.verify = lambda *_: None
    checkpoint.load_optimizer = lambda *_: None
"""


def call(out, *words, limit=None, **environment):
    """Run the doctor to its end; returns the exit code, {row: verdict}, everything that it said, unwrapped."""
    done = subprocess.run(
        [*DOCTOR, "--out", str(out), *words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        errors="replace",
        preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None,
        check=False,
    )
    said = done.stdout + done.stderr
    assert "Traceback" not in said and done.stderr == "", said
    cells = [line.split("  ") for line in done.stdout.splitlines() if line[:1].strip()]
    rows = {row[0]: next((cell.strip() for cell in row[1:] if cell), "") for row in cells}
    return done.returncode, rows, " ".join(said.split())


def test_all_of_it_passes_here_within_a_minute_of_work(tmp_path):
    before = os.times()
    code, rows, said = call(tmp_path)
    after = os.times()
    spent = after.children_user - before.children_user + after.children_system - before.children_system
    print(f"\n{said}\n{after.elapsed - before.elapsed:.1f} s by the clock, {spent:.1f} s of CPU")
    assert code == 0, said
    assert {rows[name] for name in TRAINED} == {"pass"}
    assert "with the same bits" in said and "flipped; passed over" in said and "all well. Next: calotype run" in said
    assert spent < 120, "two cores must do it in a minute"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_leaves_the_rest_examined(tmp_path):
    (tmp_path / "file").write_text("kept")
    code, rows, said = call(tmp_path / "file")
    assert code == 2 and rows["Folder"] == "FAIL" and "it is a file" in said
    assert rows["Device"] in ("pass", "note") and "failed: Folder." in said
    assert (tmp_path / "file").read_text() == "kept"


def test_where_files_may_not_grow_all_that_writes_fails(tmp_path, sized):
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code, rows, said = call(tmp_path, *sized(["--quick"], []), limit=40_000, **ascii_only)
    assert code == 2, said
    assert rows["Writing"] == rows["File names"] == rows.get("A tiny run", "FAIL") == "FAIL"
    assert rows["Device"] in ("pass", "note")
    assert list(tmp_path.iterdir()) == []


def test_a_sick_store_and_a_talkative_one_are_found(tmp_path, sized):
    if not sized(False, True):
        pytest.skip("only in full size")
    (tmp_path / "sitecustomize.py").write_text(SABOTAGE)
    (tmp_path / "out").mkdir()
    code, rows, said = call(tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert code == 2
    assert {name: rows[name] for name in TRAINED} == dict.fromkeys(TRAINED, "FAIL") | {"Export and reload": "pass"}
    assert "look-up of telemetry.invalid" in said


def test_interrupted_it_leaves_nothing_behind(tmp_path, sized):
    for number, code in sized([(signal.SIGINT, 130)], [(signal.SIGINT, 130), (signal.SIGTERM, 143)]):
        process = subprocess.Popen([*DOCTOR, "--out", tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while not any(tmp_path.glob(".calotype-doctor-*/drill/killed/checkpoints/step-*")):
            assert process.poll() is None
            time.sleep(0.01)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2
        process.send_signal(number)
        told = process.communicate()[1].decode()
        assert process.returncode == code and "Traceback" not in told, told
        assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
        assert list(tmp_path.iterdir()) == []
