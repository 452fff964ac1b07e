"""Two CPU processes against one with the same global batch: first gradient, losses, equality of the ranks.

    python -m benchmarks.processes --out /tmp/processes --steps 100

Parameters themselves drift apart under AdamW, which divides by the size of tiny gradients; with --optimizer sgd they
agree too. `--worlds 1 2 1` instead runs the command that a user would run, in so many processes after one another,
each going on where the one before ended, and compares its losses with those of one process without a break.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.tiny import CONDITIONS, MEMBERS, diffusion_flags, vae_flags, write_pictures


def main() -> int:
    """Print a table for both stages; 1 if a figure misses its goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="an empty folder to work in")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "sgd"])
    parser.add_argument("--member", default="kl", choices=MEMBERS, help="of the autoencoder family")
    parser.add_argument("--condition", default="class", choices=CONDITIONS, help="of stage 2")
    parser.add_argument("--stages", nargs="+", default=["train-vae", "train-diffusion"])
    parser.add_argument("--worlds", nargs="+", type=int, default=[], help="processes of the parts of one run")
    parser.add_argument("--work", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work, args.out, args.steps)
    if args.worlds:
        return in_parts(args)
    rows = [compare(stage, args) for stage in prepare(args) if stage in args.stages]
    print(f"{'stage':16} {'first gradient':>15} {'worst loss':>12} {'parameters':>12} {'ranks equal':>12}")
    for row in rows:
        print("{stage:16} {gradient:>15.2e} {loss:>12.2e} {parameters:>12.2e} {ranks_equal!s:>12}".format(**row))
    print("goal             <=        1e-05 <=     1e-05                      True")
    print(json.dumps({"optimizer": args.optimizer, "steps": args.steps, "rows": rows}))
    return int(any(row["gradient"] > 1e-5 or row["loss"] > 1e-5 or not row["ranks_equal"] for row in rows))


def in_parts(args) -> int:
    """Print the worst relative difference of a loss between a run in parts and a run in one; 1 if it is above 1e-5."""
    worst = {}
    prepare(args)
    for stage in args.stages:
        whole, parts = args.out / f"{stage}-whole", args.out / f"{stage}-parts"
        _train(args.commands[stage], whole, args.steps, 1)
        for i, world in enumerate(args.worlds, start=1):
            _train(args.commands[stage], parts, args.steps * i // len(args.worlds), world)
        a, b = _losses(whole), _losses(parts)
        assert sorted(a) == sorted(b) == list(range(1, args.steps + 1)), (len(a), len(b))
        worst[stage] = max(abs(a[step] - b[step]) / abs(a[step]) for step in a)
    print(json.dumps({"worlds": args.worlds, "steps": args.steps, "worst loss": worst, "goal": 1e-5}))
    return int(max(worst.values()) > 1e-5)


def _train(command: list[str], out: Path, steps: int, world: int) -> None:
    """A stage by its command up to a step, in so many processes."""
    module = {"train-vae": "stage1_vae", "train-diffusion": "stage2_diffusion"}[command[0]]
    launch = ["-m", "calotype.launch", "--standalone", f"--nproc_per_node={world}"] if world > 1 else []
    words = [*command[1:], "--out", str(out), "--steps", str(steps), "--lr-schedule", "constant", "--log-every", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, *launch, "-m", f"calotype.{module}.train", *words, "--validations", "1"]
    subprocess.run(words, check=True, env=environment)


def _losses(out: Path) -> dict[int, float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss[train]"] for line in lines if "loss[train]" in line}


def prepare(args) -> dict[str, list[str]]:
    """Pictures, their sheet, an autoencoder and its latents; returns the command of each stage."""
    from calotype import cli

    out = args.out
    sheet = out / "data.json"
    cli.main(["data", str(write_pictures(out / "pictures")), "--image-size", "16", "--out", str(out)])
    more = ["--optimizer", args.optimizer, *MEMBERS[args.member]]
    stage1 = vae_flags(sheet, out / "vae", *more, "--steps", "20")
    assert cli.main(stage1) == 0
    assert cli.main(["encode", str(sheet), "--vae", str(out / "vae" / "vae"), "--out", str(out / "latents")]) == 0
    rate = ["--lr", "1e-1", "--lr-schedule", "constant"] if args.optimizer == "sgd" else []
    condition = ["--optimizer", args.optimizer, *rate, *CONDITIONS[args.condition]]
    args.commands = {
        "train-vae": vae_flags(sheet, out / "unused", *more, *rate),
        "train-diffusion": diffusion_flags(out / "latents", out / "vae" / "vae", out / "unused", *condition),
    }
    return args.commands


def compare(stage: str, args) -> dict:
    """Run a stage in one process and in two, and compare what they wrote."""
    found = {}
    for world in (1, 2):
        folder = args.out / f"{stage}-{world}"
        folder.mkdir()
        launch = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={world}",
            "-m",
            "benchmarks.processes",
        ]
        words = ["--out", str(folder), "--steps", str(args.steps), "--work", *args.commands[stage]]
        subprocess.run([sys.executable, *launch, *words], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        found[world] = [load_file(folder / f"rank{rank}.safetensors") for rank in range(world)]
    one, (first, second) = found[1][0], found[2]
    losses = (first["losses"] + second["losses"]) / 2
    return {
        "stage": stage,
        "gradient": _relative(first["gradient"], one["gradient"]),
        "loss": ((losses - one["losses"]).abs() / one["losses"].abs()).max().item(),
        "parameters": _relative(first["parameters"], one["parameters"]),
        "ranks_equal": torch.equal(first["trace"], second["trace"]),
    }


def work(argv: list[str], out: Path, steps: int) -> int:
    """One process of a run: write the first gradient, each loss, and a checksum of the parameters at each step."""
    from calotype import loop
    from calotype.config import parse

    stage, settings = build(argv, parse)
    gradients, update = {}, loop.update

    def watched(accelerator, model, optimizer, clip):
        """Note the first gradient of each network: an autoencoder may have a discriminator or a critic beside it."""
        if id(model) not in gradients:
            found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            gradients[id(model)] = torch.cat(found).clone()
        return update(accelerator, model, optimizer, clip)

    loop.update = watched
    losses, trace = [], []
    batches = stage.batches(0)
    for step in range(steps):
        figures = stage.step(next(batches), step)
        losses.append(figures.get("loss", figures.get("discriminator")).double())
        state = [value for module in stage.models.values() for value in module.state_dict().values()]
        trace.append(torch.cat([value.flatten().view(torch.int32) for value in state]).long().sum())
    parameters = torch.cat([value.flatten() for value in state])
    found = {
        "gradient": torch.cat(list(gradients.values())),
        "losses": torch.stack(losses),
        "trace": torch.stack(trace),
        "parameters": parameters,
    }
    save_file(found, out / f"rank{stage.accelerator.process_index}.safetensors")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return 0


def build(argv: list[str], parse):
    """The stage that a command names."""
    from calotype import device

    if argv[0] == "train-vae":
        from calotype.sheet import read_sheet
        from calotype.stage1_vae.config import VaeSettings
        from calotype.stage1_vae.train import VaeStage

        settings = parse(VaeSettings, argv[1:], "train-vae")
        stage = VaeStage(settings, read_sheet(Path(settings.source)), device.accelerator("fp32"))
        if stage.adversary:
            stage.adversary.state["began"] = 0
        return stage, settings
    from calotype.stage2_diffusion.config import DiffusionSettings
    from calotype.stage2_diffusion.train import DiffusionStage

    settings = parse(DiffusionSettings, argv[1:], "train-diffusion")
    return DiffusionStage(settings, settings.vae, device.accelerator("fp32")), settings


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


if __name__ == "__main__":
    sys.exit(main())
