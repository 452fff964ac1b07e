"""`calotype <command>`: a table of commands, each imported only when it is used."""

import errno
import importlib
import os
import sys

from calotype import __version__
from calotype.errors import UserError

# command: (settings, function, one line of help); names only, so that --help imports no torch
COMMANDS = {
    "run": ("calotype.settings:RunSettings", "calotype.run:main", "all of it: pictures to model, report and samples"),
    "data": ("calotype.settings:SheetSettings", "calotype.sheet:main", "read a source and write its data sheet"),
    "train-vae": ("calotype.stage1_vae.config:VaeSettings", "calotype.stage1_vae.train:main", "stage 1: autoencoder"),
    "encode": (
        "calotype.stage1_vae.config:EncodeSettings",
        "calotype.stage1_vae.encode:main",
        "pictures to a cache of latents",
    ),
    "train-diffusion": (
        "calotype.stage2_diffusion.config:DiffusionSettings",
        "calotype.stage2_diffusion.train:main",
        "stage 2: a diffusion model of the latents",
    ),
    "export": ("calotype.settings:ExportSettings", "calotype.pipeline.export:main", "the parts to one model folder"),
    "evaluate": (
        "calotype.settings:EvaluateSettings",
        "calotype.pipeline.evaluate:main",
        "measure on held-out pictures",
    ),
    "report": ("calotype.settings:ReportSettings", "calotype.report:main", "one page about a run"),
    "generate": ("calotype.settings:GenerateSettings", "calotype.pipeline.generate:main", "draw pictures with a model"),
    "demo": ("calotype.settings:DemoSettings", "calotype.demo.app:main", "play with a model in the browser"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code (2 for a user's error, 130 after Ctrl-C)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(overview())
            return 0
        if argv[0] == "--version":
            print(f"calotype {__version__}")
            return 0
        return run(argv[0], argv[1:])
    except UserError as error:
        print(f"calotype: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has gone, as in `calotype --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" for {error.filename}" if error.filename else ""
        print(f"calotype: no space left{where}; free some and give the same command again.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("calotype: interrupted; the same command goes on where it was.", file=sys.stderr)
        return 130


def run(command: str, argv: list[str]) -> int:
    """Parse the flags of one command and call it; raises UserError."""
    # Nothing is fetched unless somebody asks for it, and nothing reports home.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}; {_suggest(command)}")
    from calotype.config import parse

    settings_path, function_path, _ = COMMANDS[command]
    settings = parse(_load(settings_path), argv, prog=f"calotype {command}")
    return _load(function_path)(settings) or 0


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
