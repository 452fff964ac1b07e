import json
import os
import subprocess
import sys

import pytest

from calotype import cli
from calotype.cli import COMMANDS

HEAVY = ("torch", "diffusers", "gradio", "torchvision", "accelerate", "numpy")
PROBE = """
import sys
try:
    from calotype.cli import main
    main({argv})
except SystemExit as stop:
    assert not stop.code
print(*sorted(set({heavy}) & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize("argv", [["--help"], *[[name, "--help"] for name in COMMANDS]], ids=" ".join)
def test_help_is_quick_and_imports_nothing_heavy(argv):
    seconds = []
    for _ in range(3):
        began = os.times()
        code = PROBE.format(argv=argv, heavy=HEAVY)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        ended = os.times()  # of the child, and not by the clock: other tests share the cores
        seconds.append(ended.children_user - began.children_user + ended.children_system - began.children_system)
        assert done.returncode == 0 and done.stderr.strip() == ""
    assert argv[0] in done.stdout or "usage" in done.stdout
    assert min(seconds) < (0.5 if argv == ["--help"] else 1.0), seconds  # twice of what it takes on a crowded machine


@pytest.mark.parametrize(
    "words",
    [
        ["train-vae", "shapes", "--out", "x", "--batch-sze", "3"],
        ["train-vae", "shapes", "--out", "x", "--lr", "nan"],
        ["train-vae", "shapes", "--out", "x", "--" + "z" * 40_000, "9" * 40_000],
        ["run", "shapes", "--out", "x", "--steps", "1e308"],
        ["train-diffusion", "--latents", "l", "--out", "x", "--guidance", "2", "--condition", "none"],
        ["generate", "m", "--out", "x", "--guidance-interval", "0.9", "0.1"],
        ["distill", "r", "--config", "{config}"],
    ],
    ids=lambda words: " ".join(words)[:60],
)
def test_a_refusal_takes_half_a_second_at_most_and_imports_nothing_heavy(words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"teacher_steps": 1e308, "x" * 100_000: None}))
    argv = [word.format(config=tmp_path / "config.json") for word in words]
    code = f"""
import sys, time
from calotype.cli import main
assert main({argv}) == 2
print(*sorted(set({HEAVY}) & set(sys.modules)), time.process_time())
"""
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
        seconds.append(float(done.stdout))  # whatever else was printed, a module that is heavy, is no number
    assert min(seconds) <= 0.5, seconds
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def refused(capsys, *argv):
    """The one line that a user's error gives."""
    assert cli.main([str(word) for word in argv]) == 2
    message = capsys.readouterr().err
    assert message.startswith("calotype: ") and message.count("\n") == 1, message
    return message


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--batch-size", "-3"], ["--batch-size -3", "1 or more", "try 64"]),
        (["--batch-size", "many"], ["--batch-size", "many"]),
        (["--batch-sze", "3"], ["--batch-sze", "did you mean --batch-size?"]),
        (["--steps", "1e308"], ["--steps 1e308", "a whole number"]),
        (["--steps", "9" * 400], ["--steps 999", "1,000,000,000 or less"]),
        (["--steps", "2.5"], ["--steps 2.5", "a whole number"]),
        (["--width", "1000000000"], ["--width 1000000000", "4,096 or less"]),
        (["--lr", "nan"], ["--lr nan", "finite"]),
        (["--lr", "-inf"], ["--lr -inf", "finite"]),
        (["--lr", "1e308"], ["--lr 1e+308", "100 or less"]),
        (["--seed", "-1"], ["--seed -1", "0 or more"]),
        (["--lr"], ["--lr needs a value"]),
        (["--fresh=no"], ["--fresh takes no value"]),
        (["another"], ["another is one word too many"]),
        (["--init="], ["--init is empty"]),
        (["--fit", "squeeze"], ["--fit", "squeeze", "crop"]),
        (["--val", "1.5"], ["--val 1.5", "between 0 and 1"]),
        (["--image-size", "0.5"], ["--image-size 0.5"]),
        (["--preset", "gigantic"], ["--preset", "gigantic", "tiny"]),
        (["--resume", "--fresh"], ["--resume and --fresh"]),
    ],
)
def test_wrong_flags_get_one_line_with_flag_value_and_way_out(capsys, tmp_path, words, expected):
    message = refused(capsys, "train-vae", "shapes", "--out", tmp_path / "x", *words)
    assert all(part in message for part in expected), message
    assert not (tmp_path / "x").exists()


def test_missing_flags_and_unknown_commands(capsys):
    assert "--out" in refused(capsys, "train-vae", "shapes")
    assert "did you mean 'train-vae'" in refused(capsys, "train-vea")


def test_settings_files(capsys, tmp_path):
    from calotype.config import parse
    from calotype.stage1_vae.config import VaeSettings

    file = tmp_path / "config.json"
    file.write_text(json.dumps({"preset": "small", "batch_size": 7}))
    base = ["shapes", "--out", "x", "--config", str(file)]
    settings = parse(VaeSettings, base, "train-vae")
    assert (settings.width, settings.batch_size) == (32, 7)
    assert parse(VaeSettings, [*base, "--batch-size", "9"], "train-vae").batch_size == 9

    file.write_text(json.dumps({"batch_sze": 7}))
    message = refused(capsys, "train-vae", *base)
    assert "batch_sze" in message and "batch_size" in message and str(file) in message
    file.write_text(json.dumps({"batch_size": "many"}))
    assert "--batch-size many" in refused(capsys, "train-vae", *base)
    for content in ("5", "[1]"):
        file.write_text(content)
        assert "holds no settings" in refused(capsys, "train-vae", *base)
    file.write_text("{")
    assert "not JSON" in refused(capsys, "train-vae", *base)
    assert "cannot be read" in refused(capsys, "train-vae", "shapes", "--out", "x", "--config", tmp_path / "none.json")


def test_the_written_config_can_be_given_back(finished):
    from calotype.config import parse
    from calotype.stage1_vae.config import VaeSettings

    file = finished / "stage1_vae/config.json"
    written = json.loads(file.read_text())
    settings = parse(VaeSettings, [written["source"], "--out", "x", "--config", str(file)], "train-vae")
    assert settings.to_json() | {"out": 0} == written | {"out": 0}


def test_presets_move_width_rate_and_length_together():
    from calotype.config import parse
    from calotype.stage1_vae.config import VaeSettings
    from calotype.stage2_diffusion.config import DiffusionSettings

    for cls, argv in ((VaeSettings, ["shapes", "--out", "x"]), (DiffusionSettings, ["--latents", "l", "--out", "x"])):
        found = [parse(cls, [*argv, "--preset", p], "x") for p in ("tiny", "small", "base", "large")]
        for name, sign in (("width", 1), ("length", 1), ("lr", -1)):
            values = [sign * getattr(settings, name) for settings in found]
            assert values == sorted(values) and len(set(values)) == 4


def test_what_is_said_once_is_not_written_down(tmp_path):
    from calotype.config import parse
    from calotype.stage1_vae.config import VaeSettings

    settings = parse(VaeSettings, ["shapes", "--out", "x", "--fresh"], "train-vae")
    assert settings.fresh and "fresh" not in settings.to_json()
    file = tmp_path / "config.json"
    file.write_text('{"fresh": true}')
    assert not parse(VaeSettings, ["shapes", "--out", "x", "--config", str(file)], "train-vae").fresh


def test_a_preset_on_the_command_line_wins_over_the_file(tmp_path):
    from calotype.config import parse
    from calotype.stage1_vae.config import VaeSettings

    base = ["shapes", "--out", "x", "--preset"]
    tiny, large = (parse(VaeSettings, [*base, preset], "train-vae") for preset in ("tiny", "large"))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(tiny.to_json() | {"seed": 9}))
    found = parse(VaeSettings, [*base, "large", "--config", str(file)], "train-vae")
    assert found.to_json() == large.to_json() | {"seed": 9}


def test_what_the_file_system_refuses_is_one_line(tmp_path, capsys):
    file = tmp_path / "a file"
    file.write_text("mine")
    assert str(file) in refused(capsys, "run", "shapes", "--out", file)
    assert str(file) in refused(capsys, "data", "shapes", "--out", file / "x")
    assert file.read_text() == "mine"


def test_a_full_disk_is_one_line(monkeypatch, capsys):
    import errno

    for error in (OSError(errno.ENOSPC, "No space left on device", "x/y"), RuntimeError("I/O error: os error 28")):

        def full(*_, error=error):
            raise error

        monkeypatch.setattr(cli, "run", full)
        assert "no space left" in refused(capsys, "data")
    monkeypatch.setattr(cli, "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # our own faults are not dressed up
        cli.main(["data"])
