"""SIGKILL at random instants, then the same command: does it end with the same bits as an undisturbed run?

    python -m benchmarks.kill_resume --kills 20 --out /tmp/kills

Each trial forks a training process, kills it at a random instant (every second time a random moment after a checkpoint
began to be written), repeats the command, and compares every file of the last checkpoint and of the exported weights
with the reference.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from benchmarks.tiny import CONDITIONS, MEMBERS, diffusion_flags, vae_flags, write_pictures
from calotype import checkpoint, cli

STEPS = 40


def main() -> int:
    """Run the trials for both stages and print a table; 1 if any differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="trials a stage")
    parser.add_argument("--out", type=Path, required=True, help="an empty folder to work in")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--member", default="kl", choices=MEMBERS, help="of the autoencoder family")
    parser.add_argument("--condition", default="class", choices=CONDITIONS, help="of stage 2")
    parser.add_argument("--stages", nargs="+", default=["stage1", "stage2"])
    args = parser.parse_args()
    torch.set_num_threads(1)  # a forked child must not inherit a pool of threads
    args.out.mkdir(parents=True, exist_ok=True)
    work = Work(args.out, MEMBERS[args.member], CONDITIONS[args.condition])
    rows = [trials(work, stage, args.kills, random.Random(args.seed)) for stage in args.stages]
    print(f"{'stage':8} {'same bits':>10} {'killed in a save':>17} {'bad checkpoints seen':>21}")
    for row in rows:
        print(f"{row['stage']:8} {row['same']:>4} of {row['trials']:<3} {row['in_save']:>17} {row['bad']:>21}")
    print(json.dumps(rows))
    # with many trials some must have hit a save, or the instants were badly chosen
    blind = args.kills >= 10 and not all(row["in_save"] for row in rows)
    return int(blind or any(row["same"] != row["trials"] or row["bad"] for row in rows))


class Work:
    """The data, the undisturbed runs and their hashes."""

    def __init__(self, out: Path, member: list[str], condition: list[str]):
        self.out = out
        self.more = ["--steps", str(STEPS), "--checkpoint-every", "2", "--validations", "4"]
        self.member, self.condition = member, condition
        pictures = write_pictures(out / "pictures")
        undisturbed(["data", str(pictures), "--image-size", "16", "--out", str(out)])
        self.seconds = {"stage1": undisturbed(self.flags("stage1", out / "reference1"))}
        vae = out / "reference1" / "vae"
        undisturbed(["encode", str(out / "data.json"), "--vae", str(vae), "--out", str(out / "latents")])
        self.seconds["stage2"] = undisturbed(self.flags("stage2", out / "reference2"))
        self.expected = {s: fingerprint(out / f"reference{s[-1]}") for s in ("stage1", "stage2")}

    def flags(self, stage: str, out: Path) -> list[str]:
        """The command of a stage."""
        if stage == "stage1":
            return vae_flags(self.out / "data.json", out, *self.more, *self.member)
        return diffusion_flags(self.out / "latents", self.out / "reference1" / "vae", out, *self.more, *self.condition)


def trials(work: Work, stage: str, kills: int, instants: random.Random) -> dict:
    """Kill, repeat, compare."""
    row = {"stage": stage, "trials": kills, "same": 0, "in_save": 0, "bad": 0}
    for trial in range(kills):
        out = work.out / f"{stage}-{trial:03d}"
        child = fork(work.flags(stage, out))
        checkpoints = out / "checkpoints"
        time.sleep(instants.uniform(0.05, 0.9) * work.seconds[stage])
        if trial % 2:
            wait_for_a_save(checkpoints, instants.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        row["in_save"] += bool(list(checkpoints.glob(".step-*")))
        row["bad"] += sum(checkpoint.verify(folder) is not None for folder in checkpoint.steps(checkpoints))
        undisturbed(work.flags(stage, out))
        row["same"] += fingerprint(out) == work.expected[stage]
        shutil.rmtree(out)
    return row


def wait_for_a_save(checkpoints: Path, more: float, patience: float = 2.0) -> None:
    """Return `more` seconds after a half-written checkpoint came into sight, or when patience ends."""
    end = time.monotonic() + patience
    while time.monotonic() < end and not list(checkpoints.glob(".step-*")):
        pass
    time.sleep(more)


def fork(argv: list[str]) -> int:
    """Start a command in a forked child; returns its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    with open(os.devnull, "w") as silence:
        os.dup2(silence.fileno(), 1)
        os._exit(cli.main(argv))


def undisturbed(argv: list[str]) -> float:
    """Run a command to its end; returns its seconds."""
    began = time.monotonic()
    _, status = os.waitpid(fork(argv), 0)
    if status:
        sys.exit(f"calotype {' '.join(argv)} ended with status {status}")
    return time.monotonic() - began


def fingerprint(out: Path) -> dict[str, str]:
    """Hashes of every tensor file of the last checkpoint and of the exported weights."""
    files = sorted([*checkpoint.steps(out / "checkpoints")[-1].glob("*.safetensors"), *out.glob("*/*.safetensors")])
    return {str(file.relative_to(out)): checkpoint.sha256(file) for file in files}


if __name__ == "__main__":
    sys.exit(main())
