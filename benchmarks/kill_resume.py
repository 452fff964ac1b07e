"""SIGKILL at random instants, then the same command: does it end with the same bits as an undisturbed run?

    python -m benchmarks.kill_resume --kills 50 --out /tmp/kills

A subject is a member of the autoencoder family, the latent cache, or a condition of the diffusion model. Each trial
forks a process, kills it at a random instant (every second time a random moment after a checkpoint or a shard began to
be written), looks at what it left, repeats the command, and compares with the reference: every tensor of the last
checkpoint (weights, average, optimiser, discriminator), what was exported, and every figure of metrics.jsonl.
"""

import argparse
import importlib
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

STEPS, INTERVAL = 30, 2
SUBJECTS = ["vqgan", "cache", "class", "kl"]
_BY_THE_CLOCK = ("seconds", "images_per_second")


def main() -> int:
    """Run the trials and print a table; 1 if anything differs, is damaged or lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="trials a subject")
    parser.add_argument("--out", type=Path, required=True, help="an empty folder to work in")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    known = [*MEMBERS, "cache", *CONDITIONS]
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS, choices=known, metavar="SUBJECT", help=str(known))
    args = parser.parse_args()
    torch.set_num_threads(1)  # a forked child must not inherit a pool of threads
    for module in ("sheet", "stage1_vae.train", "stage1_vae.encode", "stage2_diffusion.train"):
        importlib.import_module(f"calotype.{module}")  # once, and not in every child
    args.out.mkdir(parents=True, exist_ok=True)
    work = Work(args.out, args.subjects)
    rows = [trials(work, subject, args.kills, random.Random(args.seed)) for subject in args.subjects]
    print(
        f"{'subject':10} {'same bits':>10} {'killed in a save':>17} {'damaged ones seen':>18} {'most steps lost':>16}"
    )
    for row in rows:
        same = f"{row['same']} of {row['trials']}"
        print(f"{row['subject']:10} {same:>10} {row['in_save']:>17} {row['bad']:>13} {row['lost']:>16}")
    print(json.dumps(rows))
    # with many trials some must have hit a save, or the instants were badly chosen
    blind = args.kills >= 10 and not all(row["in_save"] for row in rows)
    wrong = any(row["same"] != row["trials"] or row["bad"] or row["lost"] > INTERVAL for row in rows)
    return int(blind or wrong)


class Work:
    """The data, the undisturbed runs and what they left."""

    def __init__(self, out: Path, subjects: list[str]):
        self.out = out
        undisturbed(["data", str(write_pictures(out / "pictures")), "--image-size", "16", "--out", str(out)])
        if set(subjects) - set(MEMBERS):
            undisturbed(self.flags("kl", out / "model"))
        if set(subjects) & set(CONDITIONS):
            undisturbed(self.flags("cache", out / "latents"))
        self.seconds, self.expected = {}, {}
        for subject in subjects:
            reference = out / f"{subject}-reference"
            self.seconds[subject] = undisturbed(self.flags(subject, reference))
            self.expected[subject] = traces(reference)

    def flags(self, subject: str, out: Path) -> list[str]:
        """The command of a subject."""
        more = ["--steps", str(STEPS), "--checkpoint-every", str(INTERVAL), "--validations", "4", "--log-every", "1"]
        vae = self.out / "model" / "vae"
        if subject in MEMBERS:
            return vae_flags(self.out / "data.json", out, *more, *MEMBERS[subject])
        if subject == "cache":
            small = ["--shard-size", "4", "--batch-size", "4", "--precision", "fp32"]
            return ["encode", str(self.out / "data.json"), "--vae", str(vae), "--out", str(out), *small]
        return diffusion_flags(self.out / "latents", vae, out, *more, *CONDITIONS[subject])


def trials(work: Work, subject: str, kills: int, instants: random.Random) -> dict:
    """Kill, look, repeat, compare."""
    row = {"subject": subject, "trials": kills, "same": 0, "in_save": 0, "bad": 0, "lost": 0}
    for trial in range(kills):
        out = work.out / f"{subject}-{trial:03d}"
        child = fork(work.flags(subject, out))
        wait_for_a_file(out, 2 * work.seconds[subject])
        time.sleep(instants.uniform(0, 0.8) * work.seconds[subject])
        if trial % 2:
            wait_for_a_save(out, instants.choice((0, instants.uniform(0, 0.01))))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        row["in_save"] += bool(unfinished(out))
        row["bad"] += damaged(out, work.expected[subject])
        row["lost"] = max(row["lost"], lost(out))
        undisturbed(work.flags(subject, out))
        row["same"] += traces(out) == work.expected[subject]
        shutil.rmtree(out)
    return row


def unfinished(out: Path) -> list[Path]:
    """Half-written checkpoints, shards and lists of shards."""
    return [*(out / "checkpoints").glob(".step-*"), *out.glob(".*.safetensors"), *out.glob(".*.json.*")]


def damaged(out: Path, expected: dict[str, str]) -> int:
    """How many checkpoints, or shards of latents, bear their name and are not what they should be."""
    bad = sum(checkpoint.verify(folder) is not None for folder in checkpoint.steps(out / "checkpoints"))
    return bad + sum(checkpoint.sha256(file) != expected[file.name] for file in out.glob("[!.]*.safetensors"))


def lost(out: Path) -> int:
    """Steps that were taken and written down, but are in no checkpoint."""
    file = out / "metrics.jsonl"
    taken = max([0, *(line["step"] for line in lines_of(file))]) if file.exists() else 0
    kept = checkpoint.steps(out / "checkpoints")
    return taken - (int(kept[-1].name[-8:]) if kept else 0)


def wait_for_a_file(out: Path, patience: float) -> None:
    """Return when a command has made its folder, or when patience ends."""
    end = time.monotonic() + patience
    while time.monotonic() < end and not out.exists():
        time.sleep(0.002)


def wait_for_a_save(out: Path, more: float, patience: float = 2.0) -> None:
    """Return `more` seconds after a half-written checkpoint or shard came into sight, or when patience ends."""
    end = time.monotonic() + patience
    while time.monotonic() < end and not unfinished(out):
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


def traces(out: Path) -> dict[str, str]:
    """Hashes of the tensor files of the last checkpoint and of what was exported or cached; and all figures."""
    newest = checkpoint.steps(out / "checkpoints")[-1:]
    files = [file for folder in newest for file in folder.glob("*.safetensors")]
    files += [*out.glob("[!.]*.safetensors"), *out.glob("[!.]*/*.safetensors"), *out.glob("index.json")]
    found = {str(file.relative_to(out)): checkpoint.sha256(file) for file in files}
    for folder in newest:
        state = json.loads((folder / "state.json").read_text())
        found["state"] = json.dumps({name: state[name] for name in state if name != "seconds"}, sort_keys=True)
    for line in lines_of(out / "metrics.jsonl"):
        for name in line.keys() - {"step", *_BY_THE_CLOCK}:
            value = line[name]
            found[f"{name} at {line['step']}"] = value.hex() if isinstance(value, float) else str(value)
    return found


def lines_of(file: Path) -> list[dict]:
    """The lines of metrics.jsonl; one that a kill has torn is no line."""
    found = []
    for text in file.read_text().splitlines() if file.exists() else []:
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
