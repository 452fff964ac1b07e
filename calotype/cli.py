"""`calotype <command>`: a table of commands, each imported only when it is used."""

import importlib
import os
import signal
import sys
import threading

from calotype import __version__
from calotype.errors import UserError, is_disk_full, one_line
from calotype.lock import refuse_held

# command: (settings, function, one line of help); names only, so that --help imports no torch
COMMANDS = {
    "run": ("calotype.settings:RunSettings", "calotype.run:main", "all of it: pictures to model, report and samples"),
    "plan": ("calotype.settings:PlanSettings", "calotype.plan:main", "what can be trained in so many hours here"),
    "data": ("calotype.settings:SheetSettings", "calotype.sheet:main", "read a source and write its data sheet"),
    "data check": (
        "calotype.settings:CheckSettings",
        "calotype.data_check:main",
        "which files of a folder cannot be read, and why",
    ),
    "train-vae": ("calotype.stage1_vae.config:VaeSettings", "calotype.stage1_vae.train:main", "stage 1: autoencoder"),
    "encode": (
        "calotype.stage1_vae.config:EncodeSettings",
        "calotype.stage1_vae.encode:main",
        "pictures to a cache of latents",
    ),
    "embed": (
        "calotype.stage1_vae.config:EmbedSettings",
        "calotype.stage1_vae.embed:main",
        "pictures to one file of codes, and what these tell about the labels",
    ),
    "tokens": (
        "calotype.stage1_vae.config:TokensSettings",
        "calotype.stage1_vae.tokens:main",
        "pictures to one file of code numbers",
    ),
    "evaluate-vae": (
        "calotype.stage1_vae.config:EvaluateVaeSettings",
        "calotype.stage1_vae.evaluate:main",
        "measure an autoencoder on held-out pictures",
    ),
    "convert": (
        "calotype.stage1_vae.config:ConvertSettings",
        "calotype.stage1_vae.convert:main",
        "an autoencoder from elsewhere to a folder",
    ),
    "train-diffusion": (
        "calotype.stage2_diffusion.config:DiffusionSettings",
        "calotype.stage2_diffusion.train:main",
        "stage 2: a diffusion model of the latents",
    ),
    "train-flow": (
        "calotype.density.config:FlowSettings",
        "calotype.density.train:main",
        "the exact density of latents, and a generator of one evaluation",
    ),
    "distill": (
        "calotype.stage2_diffusion.distill_config:DistillSettings",
        "calotype.stage2_diffusion.distill:main",
        "a student of few steps and a tiny decoder, for --fast",
    ),
    "posthoc-ema": (
        "calotype.stage2_diffusion.config:PosthocEmaSettings",
        "calotype.stage2_diffusion.posthoc_ema:main",
        "another weight average of a finished run",
    ),
    "export": ("calotype.settings:ExportSettings", "calotype.pipeline.export:main", "the parts to one model folder"),
    "evaluate": (
        "calotype.settings:EvaluateSettings",
        "calotype.pipeline.evaluate:main",
        "measure on held-out pictures",
    ),
    "likelihood": (
        "calotype.density.config:LikelihoodSettings",
        "calotype.density.likelihood:main",
        "how likely held-out pictures are under each model of a run",
    ),
    "anomaly fit": (
        "calotype.density.anomaly_config:AnomalyFitSettings",
        "calotype.density.fit:main",
        "learn what normal pictures look like",
    ),
    "anomaly score": (
        "calotype.density.anomaly_config:AnomalyScoreSettings",
        "calotype.density.score:main",
        "how strange the pictures of a folder are, where, and a page",
    ),
    "report": ("calotype.settings:ReportSettings", "calotype.report:main", "one page about a run"),
    "generate": (
        "calotype.pipeline.config:GenerateSettings",
        "calotype.pipeline.generate:main",
        "draw pictures with a model",
    ),
    "edit": (
        "calotype.pipeline.config:EditSettings",
        "calotype.pipeline.edit:main",
        "change pictures, or repaint parts of them",
    ),
    "interpolate": (
        "calotype.pipeline.config:InterpolateSettings",
        "calotype.pipeline.interpolate:main",
        "the way from one picture or seed to another",
    ),
    "regenerate": (
        "calotype.pipeline.config:RegenerateSettings",
        "calotype.pipeline.regenerate:main",
        "a picture drawn again from what its PNG carries",
    ),
    "push": ("calotype.pipeline.config:PushSettings", "calotype.pipeline.push:main", "send a model folder to the Hub"),
    "doctor": (
        "calotype.settings:DoctorSettings",
        "calotype.doctor:main",
        "try out this machine: disk, device, killing and resuming",
    ),
    "demo": ("calotype.settings:DemoSettings", "calotype.demo.app:main", "play with a model in the browser"),
}

_BY_PRIOR = {"flow": "calotype.density.generate:main"}  # who draws with another model than a diffusion model
_DRAWS = ("generate", "edit", "interpolate", "demo")  # with a model that they name, and with nothing else of diffusers
_ALONE = ("run", "train-vae", "encode", "train-diffusion", "train-flow")  # in their --out; another is refused at once


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code (2 for a user's error, 130 after Ctrl-C).

    Without `argv` the process is taken to be ours alone, as it is for the script `calotype`.
    """
    ours = argv is None
    if hasattr(signal, "SIGUSR1") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # it asks a training to save; to others it must not mean death
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(overview())
            return 0
        if argv[0] == "--version":
            print(f"calotype {__version__}")
            return 0
        words = 2 if " ".join(argv[:2]) in COMMANDS else 1  # a folder called check is ./check
        return run(" ".join(argv[:words]), argv[words:], ours)
    except UserError as error:
        print(f"calotype: {one_line(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has gone, as in `calotype --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0 if {"-h", "--help"} & set(argv) or not argv else 1
    except KeyboardInterrupt:
        print("calotype: interrupted; the same command goes on where it was.", file=sys.stderr)
        return 130
    except Exception as error:
        message = _of_the_system(error)
        if message is None:
            raise
        print(f"calotype: {one_line(message)}", file=sys.stderr)
        return 2


def _of_the_system(error: Exception) -> str | None:
    """One line for what the system refuses or ends; None for anything else, which is our own fault."""
    if is_disk_full(error):
        where = getattr(error, "filename", None)
        return f"no space left{f' for {where}' if where else ''}; free some and give the same command again."
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}; name another file or folder, or change its permissions."
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        return (
            f"one of the --workers that read pictures died ({str(error).strip().rstrip('.')}), perhaps for want of "
            "memory; give fewer. The same command goes on from the last checkpoint."
        )
    return None


def run(command: str, argv: list[str], ours: bool = False) -> int:
    """Parse the flags of one command and call it; raises UserError. `ours`: no other has a use for this process."""
    # Nothing is fetched unless somebody asks for it, and nothing reports home.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # diffusers imports ONNX Runtime wherever it is installed
    settings = settings_of([command, *argv])
    if command in _ALONE:
        refuse_held(settings.out)
    if ours and command in _DRAWS and getattr(settings, "prior", "") not in _BY_PRIOR:
        from calotype.lean import import_diffusers

        import_diffusers(settings.models if command == "demo" else [settings.model])
    function = _BY_PRIOR.get(getattr(settings, "prior", ""), COMMANDS[command][1])
    return _load(function)(settings) or 0


def settings_of(argv: list[str]):
    """The settings that a command and its flags make; raises UserError."""
    command, *flags = argv
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}; {_suggest(command)}")
    from calotype.config import parse

    return parse(_load(COMMANDS[command][0]), flags, prog=f"calotype {command}")


def overview() -> str:
    """The help of `calotype --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, _, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: calotype COMMAND [FLAGS]",
            "",
            "Train a latent diffusion model of your own on your own pictures.",
            "",
            *lines,
            "",
            "calotype COMMAND --help lists the flags of a command.",
            "Start here:  calotype run shapes --preset tiny --out runs/first",
        ]
    )


def _load(path: str):
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _suggest(command: str) -> str:
    import difflib

    close = difflib.get_close_matches(command, COMMANDS, n=1)
    return f"did you mean {close[0]!r}?" if close else "calotype --help lists them."


if __name__ == "__main__":
    sys.exit(main())
