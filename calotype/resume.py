"""The folder of a stage before it trains: its own run, nothing at all, or a refusal."""

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from calotype.changes import Changed, changes_since, comes_too_late, goes_further
from calotype.checkpoint import write_text
from calotype.config import Settings
from calotype.errors import UserError

_OWN_FILES = ("config.json", "metrics.jsonl", "finished.json", "samples", "checkpoints")


def prepare(out: Path, settings: Settings, exports: tuple[str, ...], accelerator: Accelerator) -> dict[str, Changed]:
    """Check that the folder holds this run or nothing, and write its config.json; returns what may change and did.

    The first process does it for all. A finished run that now goes further is finished no more.
    """
    changes = [_prepare(out, settings, exports) if accelerator.is_main_process else {}]
    if accelerator.num_processes > 1:
        broadcast_object_list(changes)
    return changes[0]


def _prepare(out: Path, settings: Settings, exports: tuple[str, ...]) -> dict[str, Changed]:
    config, finished = out / "config.json", out / "finished.json"
    if settings.fresh and config.exists():
        for name in (*_OWN_FILES, *exports):
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    elif not config.exists() and (strange := [name for name in (*_OWN_FILES, *exports) if (out / name).exists()]):
        raise UserError(f"--out {out} holds {strange[0]} but no run; give another --out.")
    if not config.exists():
        write_settings(settings)
        return {}
    changes = changes_since(settings, config)
    if changes and finished.exists():
        if not goes_further(settings, json.loads(finished.read_text())):
            raise comes_too_late(out, changes)
        finished.unlink()
    return changes


def refuse_other_identity(out: Path, then: dict[str, str], now: dict[str, str], allow_data_change: bool) -> None:
    """Raise UserError if what a stage reads is not what the run began with; other data alone may be allowed."""
    changed = [name for name, value in now.items() if then.get(name) != value]
    if changed == ["the data"]:
        if not allow_data_change:
            raise UserError(
                f"--out {out}: the data changed since this run began; put it back, give --allow-data-change to go on "
                "with it as it is now, or --fresh to begin again."
            )
    elif changed:
        raise UserError(f"--out {out}: {changed[0]} changed since this run began; restore it, or give --fresh.")


def write_settings(settings: Settings) -> None:
    """Write config.json, which says with what the run goes on."""
    write_text(settings.out / "config.json", json.dumps(settings.to_json(), indent=1))


def take_over(changes: dict[str, Changed], settings: Settings, state: dict[str, dict[str, Any]]) -> None:
    """Let allowed changes win over what the checkpoint remembers."""
    if "micro_batches" in changes and "memory" in state:
        state["memory"]["parts"] = settings.micro_batches
