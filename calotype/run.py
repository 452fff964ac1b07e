"""`calotype run`: the whole way, as a list of the commands that a user could type one by one."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from calotype import __version__, cli
from calotype.changes import Changed, changes_since, comes_too_late, goes_further
from calotype.checkpoint import write_text
from calotype.complaints import flag
from calotype.config import PRESET_IMAGE_SIZE, height_width
from calotype.data_change import holds_other_pictures
from calotype.errors import UserError
from calotype.feasible import refuse_what_pictures_lack
from calotype.lock import claimed
from calotype.sheet import read_sheet

# Of --max-minutes: the end of stage 1, and the end of stage 2, whatever came before them took.
STAGE1_UNTIL, STAGE2_UNTIL = 0.36, 0.92
_SHARED = (
    "preset", "seed", "precision", "compile", "checkpoint_every", "batch_size", "lr", "steps", "allow_data_change",
)  # fmt: skip
_MODULES = {"train-vae": "calotype.stage1_vae.train", "train-diffusion": "calotype.stage2_diffusion.train"}
_COMMANDS = ("train-vae", "encode", "train-diffusion", "export", "evaluate")
_OWN = ("stage1_vae", "latents", "stage2_diffusion", "pipeline", "metrics.json", "report.html", "run.json")


def main(settings) -> None:
    """Run every command that is not finished yet; interrupted and repeated, it goes on where it was."""
    out = settings.out
    config = out / "config.json"
    changes: dict[str, Changed] = {}
    if config.exists() and not settings.fresh:
        changes = changes_since(settings, config)
        _refuse_what_comes_too_late(settings, changes)
    elif settings.resume:
        raise UserError(f"--resume: {out} holds no run; leave the flag out to begin.")
    _refuse_strange_folder(out)
    _refuse_what_cannot_work(settings)
    began = time.monotonic()
    with claimed(out) if out.exists() else nullcontext():  # a source that is refused leaves no folder behind
        _execute(data_command(settings), settings.nproc)
        refuse_what_pictures_lack(settings, read_sheet(out / "data.json"))
    with claimed(out):
        log = _begin(settings, config, time.monotonic() - began)
        log.accept(changes)
        if settings.allow_data_change and holds_other_pictures(settings.out):
            log.begin_again("encode", "export", "evaluate")
        for name in _COMMANDS:
            log.run(name)
        _execute(["report", str(out)], 1)
    _tell(settings)


def data_command(settings) -> list[str]:
    """`calotype data` for these settings."""
    names = ("fit", "channels", "val", "allow_bad", "seed", "fresh", "allow_data_change")
    size = settings.image_size or PRESET_IMAGE_SIZE[settings.preset]
    return ["data", settings.source, "--image-size", size, *_flags(settings, names), "--out", str(settings.out)]


def command(name: str, settings, spent: float) -> list[str]:
    """One of the commands of a run, after `spent` seconds of it."""
    out = settings.out
    sheet, vae, latents = str(out / "data.json"), str(out / "stage1_vae" / "vae"), str(out / "latents")
    if name == "train-vae":
        names = (*_SHARED, "factor", "regularizer", "perceptual", "adversarial", "flip")
        if settings.vae:
            kept = ("preset", "seed", "precision", "allow_data_change")
            own = ["--init", str(settings.vae), "--steps", "0", *_flags(settings, kept)]
        else:
            own = [*_flags(settings, names), *_minutes(settings, STAGE1_UNTIL, spent)]
        return ["train-vae", sheet, *own, "--out", str(out / "stage1_vae")]
    if name == "encode":
        own = [*_flags(settings, ("flip", "precision", "allow_bad", "allow_data_change"))]
        own += ["--fresh"] if settings.allow_data_change and holds_other_pictures(settings.out) else []
        return ["encode", sheet, "--vae", vae, *own, "--out", latents]
    if name == "train-diffusion":
        names = (*_SHARED, "condition", "objective")
        own = [*_flags(settings, names), *_minutes(settings, STAGE2_UNTIL, spent)]
        return ["train-diffusion", "--latents", latents, "--vae", vae, *own, "--out", str(out / "stage2_diffusion")]
    if name == "export":
        return ["export", "--run", str(out), "--out", str(out / "pipeline")]
    return ["evaluate", str(out), *_flags(settings, ("precision",))]


class Log:
    """run.json: the commands of a run, their time, and which are finished."""

    def __init__(self, settings, entries: list[dict], changes: list[dict]):
        self.settings, self.entries, self.changes = settings, entries, changes

    @property
    def finished(self) -> bool:
        """Whether every command is."""
        return {entry["name"] for entry in self.entries if entry["finished"]} >= set(_COMMANDS)

    def accept(self, changes: dict[str, Changed]) -> None:
        """Go on with other settings. What is finished stays; a whole run that is goes on with its second stage."""
        if not changes:
            return
        if self.finished:
            for entry in self.entries:
                entry["finished"] = entry["name"] not in _COMMANDS[2:]
        done = [entry["name"] for entry in self.entries if entry["finished"] and entry["name"] in _MODULES]
        for change in changes.values():
            print(f"run: {change} from here on{f'; {done[0]} is finished and stays' if done else ''}.")
            self.changes.append({"setting": change.name, "was": change.was, "now": change.now, "finished": done})
        self.write()
        write_text(self.settings.out / "config.json", json.dumps(self.settings.to_json(), indent=1))

    def begin_again(self, *names: str) -> None:
        """Other pictures came in: what is trained to its end stays, these commands are not finished any more."""
        for entry in self.entries:
            entry["finished"] = entry["finished"] and entry["name"] not in names
        done = [entry["name"] for entry in self.entries if entry["finished"] and entry["name"] in _MODULES]
        print(f"run: other pictures from here on{f'; {done[-1]} is finished and stays' if done else ''}.")
        self.write()

    def run(self, name: str) -> None:
        """Run a command unless it is finished; its share of the time is fixed when it first begins."""
        entry = next((e for e in self.entries if e["name"] == name), None)
        if entry is None:
            entry = {"name": name, "spent": self.spent, "seconds": 0.0, "finished": False}
            self.entries.append(entry)
        if entry["finished"]:
            return
        argv = command(name, self.settings, entry["spent"])
        entry["command"] = _typed(argv)
        self.write()
        began, earlier = time.monotonic(), entry["seconds"]
        try:
            _execute(argv, self.settings.nproc)
            entry["finished"] = True
        finally:
            # The stage's own clock also knows of sessions that were killed.
            seconds = max(earlier + time.monotonic() - began, _stage_seconds(self.settings.out, name))
            entry["seconds"] = round(seconds, 1)
            self.write()

    @property
    def spent(self) -> float:
        """Seconds of all commands so far."""
        return sum(entry["seconds"] for entry in self.entries)

    def write(self) -> None:
        """Write run.json."""
        text = {"version": __version__, "commands": self.entries}
        text |= {"changes": self.changes} if self.changes else {}
        write_text(self.settings.out / "run.json", json.dumps(text, indent=1))


def _refuse_what_comes_too_late(settings, changes: dict[str, Changed]) -> None:
    """A finished run may go on with more steps or minutes; any other change would do nothing."""
    file = settings.out / "run.json"
    if not (changes and file.exists()):
        return
    log = Log(settings, json.loads(file.read_text())["commands"], [])
    if not log.finished:
        return
    spent = next(entry["spent"] for entry in log.entries if entry["name"] == "train-diffusion")
    stage = cli.settings_of(command("train-diffusion", settings, spent))
    if not goes_further(stage, json.loads((stage.out / "finished.json").read_text())):
        raise comes_too_late(settings.out, changes)


def _stage_seconds(out: Path, name: str) -> float:
    folder = {"train-vae": "stage1_vae", "train-diffusion": "stage2_diffusion"}.get(name, name)
    file = out / folder / "finished.json"
    return json.loads(file.read_text())["seconds"] if file.is_file() else 0.0


def _begin(settings, config: Path, seconds: float) -> Log:
    """The log of a new run or of the one that is there."""
    out = settings.out
    if settings.fresh and config.exists():
        for name in _OWN:
            shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink(missing_ok=True)
    if settings.fresh or not config.exists():
        write_text(config, json.dumps(settings.to_json(), indent=1))
    if (out / "run.json").exists():
        earlier = json.loads((out / "run.json").read_text())
        return Log(settings, earlier["commands"], earlier.get("changes", []))
    data = {"name": "data", "command": _typed(data_command(settings)), "spent": 0.0, "finished": True}
    return Log(settings, [data | {"seconds": round(seconds, 1)}], [])


def _execute(argv: list[str], nproc: int) -> None:
    """Print a command and run it: here, or in `nproc` processes if it trains."""
    print(f"\n$ {_typed(argv)}", flush=True)
    if nproc == 1 or argv[0] not in _MODULES:
        cli.run(argv[0], argv[1:])
        return
    launch = ["-m", "calotype.launch", "--standalone", f"--nproc_per_node={nproc}", "-m", _MODULES[argv[0]]]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // nproc))}
    code = _launch([sys.executable, *launch, *argv[1:]], threads | os.environ)
    if code:
        raise UserError(f"{argv[0]} ended with exit code {code} in one of {nproc} processes; its message is above.")


def _launch(words: list[str], environment: dict[str, str]) -> int:
    """Run a launcher to its end; a signal that is meant to end us goes to it, and its processes get time to save."""
    process = subprocess.Popen(words, env=environment, start_new_session=True)  # a terminal's Ctrl-C comes to us alone
    told = []

    def pass_on(number: int, _frame) -> None:
        told.append(number)
        process.send_signal(number)

    earlier = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
    if told:
        raise SystemExit(128 + told[0])
    return code


def _refuse_strange_folder(out: Path) -> None:
    """A folder with other people's files in it is no place for a run."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder.")
    ours = ("config.json", "data.json")
    if out.exists() and any(out.iterdir()) and not any((out / name).is_file() for name in ours):
        raise UserError(f"--out {out} is not empty and holds no run; give another folder.")


def _refuse_what_cannot_work(settings) -> None:
    """Find what a later command would refuse before hours go by, and before anything is written."""
    stages = [cli.settings_of(command(name, settings, 0.0)) for name in _MODULES]
    factor = _foreign_factor(settings) if settings.vae else stages[0].factor
    size = settings.image_size or PRESET_IMAGE_SIZE[settings.preset]
    if any(side % factor for side in height_width(size)):
        near = "x".join(str(max(factor, side // factor * factor)) for side in height_width(size))
        raise UserError(f"--image-size {size} must be a multiple of {factor}, the autoencoder's --factor; try {near}.")
    for stage in stages:
        if stage.batch_size % settings.nproc:
            raise UserError(
                f"--batch-size {stage.batch_size} must be a multiple of --nproc {settings.nproc}; "
                f"try {max(1, stage.batch_size // settings.nproc) * settings.nproc}."
            )


def _foreign_factor(settings) -> int:
    """How far the autoencoder that --vae names shrinks pictures."""
    for name in ("factor", "regularizer", "perceptual", "adversarial"):
        if getattr(settings, name) is not None:
            raise UserError(f"{flag(name)} {getattr(settings, name)}: --vae brings its own; leave one of them out.")
    try:
        return 2 ** (len(json.loads((settings.vae / "config.json").read_text())["block_out_channels"]) - 1)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--vae {settings.vae} is not a saved autoencoder; give a diffusers folder.") from None


def _minutes(settings, until: float, spent: float) -> list[str]:
    if settings.max_minutes is None:
        return []
    return ["--max-minutes", f"{max(until * settings.max_minutes - spent / 60, 0.1 * settings.max_minutes):.2f}"]


def _flags(settings, names: tuple[str, ...]) -> list[str]:
    """The flags of settings that differ from their default."""
    words: list[str] = []
    for name in names:
        value, field = getattr(settings, name), type(settings).model_fields[name]
        if value is True:
            words.append(flag(name))
        elif value is not None and value is not False and value != field.default:
            words += [flag(name), str(value)]
    return words


def _typed(argv: list[str]) -> str:
    return shlex.join(["calotype", *argv])


def _tell(settings) -> None:
    out = settings.out
    print(f"\nSamples  {out / 'pipeline' / 'samples.png'}\nModel    {out / 'pipeline'}\nReport   {out / 'report.html'}")
    print(f"\nNext:    calotype generate {out} -n 16 --seed 7 --out samples\n         calotype demo {out}")
