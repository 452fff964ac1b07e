"""More or fewer processes, workers and micro-batches: the same run. A process that dies or differs ends it, by name."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from calotype import checkpoint, cli
from calotype.data import PictureBatches, Pictures, Share
from calotype.randomness import KeyedOrder
from calotype.sheet import read_sheet

# The order


@pytest.mark.parametrize("world, batch_size", [(1, 6), (2, 6), (3, 6), (2, 10), (5, 10)])
def test_every_picture_comes_once_an_epoch_whatever_the_processes(world, batch_size):
    size, epochs = 97, 5  # a prime: no batch size divides it
    order = KeyedOrder(size, seed=3)
    steps = -(-size * epochs // batch_size)
    seen = sorted(
        (position, order.index(position))
        for rank in range(world)
        for step in range(steps)
        for position in Share(batch_size, rank, world).positions(step)
    )
    assert [position for position, _ in seen] == list(range(steps * batch_size))
    for epoch in range(epochs):
        items = [item for position, item in seen if position // size == epoch]
        assert Counter(items) == Counter(range(size))


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("world, parts", [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4)])
def test_the_same_pictures_whatever_the_workers_processes_and_micro_batches(finished, world, parts, workers):
    source = PictureBatches(Pictures(read_sheet(finished / "data.json"), "train"), seed=0, flip=True)
    expected = [source[position] for position in range(5 * 8, 7 * 8)]
    found = {}
    for rank in range(world):
        batches = source.from_step(5, Share(8, rank, world), workers)
        for batch in (next(batches), next(batches)):
            for i in range(parts):
                part = batch.part(i, parts)
                found |= {part.start + j: (part.x[j], part.label[j]) for j in range(len(part.x))}
    assert sorted(found) == [position for _, _, position, _ in expected]
    for x, label, position, _ in expected:
        assert torch.equal(found[position][0], x) and found[position][1] == label


# Runs

MODEL = "--width 8 --factor 2 --batch-size 8 --precision fp32 --validations 1 --log-every 1 --flip".split()


def train(finished, out, *more):
    assert cli.main(["train-vae", str(finished / "data.json"), *MODEL, "--out", str(out), *more]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss[train]"] for line in lines if "loss[train]" in line], checkpoint.weights_hash(out / "vae")


@pytest.mark.reliability
def test_workers_change_no_bit_and_micro_batches_hardly_any(finished, tmp_path, sized):
    length = ["--steps", str(sized(20, 100)), "--lr", "1e-3"]
    losses, weights = train(finished, tmp_path / "plain", *length)
    for workers in sized(["4"], ["1", "4"]):
        assert train(finished, tmp_path / f"workers{workers}", *length, "--workers", workers) == (losses, weights)
    for parts in sized(["4"], ["2", "4"]):
        found, _ = train(finished, tmp_path / f"parts{parts}", *length, "--micro-batches", parts)
        assert found == pytest.approx(losses, rel=1e-5)


@pytest.mark.reliability
@pytest.mark.parametrize("stage", ["train-vae", "train-diffusion"])
def test_one_process_then_two_then_one(tmp_path, run_benchmark, sized, stage):
    if stage in sized(["train-vae"], []):
        pytest.skip("with --nightly")
    run_benchmark("processes", "--worlds", 1, 2, 1, "--steps", sized(30, 100), "--out", tmp_path, "--stages", stage)


# A process that dies

posix = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def ranks_below(launcher):
    """The processes of a run by rank, once they train."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "environ").read_bytes().split(b"\0")
            if launcher in ancestors(int(folder.name)):
                found |= {int(word[5:]): int(folder.name) for word in words if word.startswith(b"RANK=")}
        except OSError:
            continue
    return found


def ancestors(pid):
    chain = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        chain.append(pid)
    return chain


def killed(words, out, rank, steps):
    """Start a run, kill one of its processes after some steps; returns exit code, seconds until the end, and stderr."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        metrics, end = out / "stage1_vae" / "metrics.jsonl", time.monotonic() + 240
        while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        os.kill(ranks_below(process.pid)[rank], signal.SIGKILL)
        began = time.monotonic()
        message = process.communicate(timeout=120)[1]
        return process.returncode, time.monotonic() - began, message
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


@posix
@pytest.mark.reliability
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_run_by_name(pictures, tmp_path, rank, sized):
    if rank in sized([0], []):
        pytest.skip("with --nightly")
    draw = random.Random(rank)
    for attempt in range(sized(1, 5)):
        out = tmp_path / f"run{attempt}"
        run = ["run", str(pictures), "--image-size", "16", "--factor", "2", "--batch-size", "8", "--nproc", "2"]
        words = [sys.executable, "-m", "calotype", *run, "--steps", "100000", "--out", str(out)]
        code, seconds, message = killed(words, out, rank, draw.randrange(1, 10))
        print(f"rank {rank} killed: exit code {code} after {seconds:.1f} s")
        assert code == 2 and seconds < 10 + 20 * (os.getloadavg()[0] > 1.5)  # a crowded machine starts Python slowly
        assert f"process {rank} of the run was killed by SIGKILL" in message
        assert message.splitlines()[-1].startswith("calotype: train-vae ended with exit code 137")


@posix
@pytest.mark.reliability
def test_a_worker_that_is_killed_ends_the_run_by_name(finished, tmp_path):
    out = tmp_path / "run"
    words = ["train-vae", str(finished / "data.json"), *MODEL, "--workers", "1", "--steps", "100000", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "calotype", *words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    try:
        while not (out / "metrics.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        worker = next(int(pid) for pid in children if "calotype" in Path(f"/proc/{pid}/cmdline").read_text())
        os.kill(worker, signal.SIGKILL)
        began = time.monotonic()
        message = process.communicate(timeout=60)[1].splitlines()[-1]
    finally:
        process.kill()
    print(f"worker killed: exit code {process.returncode} after {time.monotonic() - began:.1f} s")
    # torch says "(pid N) is killed by signal" or "(pid(s) N) exited unexpectedly", whichever it notices first
    assert process.returncode == 2 and f" {worker})" in message and "--workers" in message


# Processes that differ

PERTURBED = """
import os, sys, torch
from calotype import device, ranks
from calotype.config import parse
from calotype.errors import UserError
from calotype.stage1_vae.config import VaeSettings

second = os.environ["RANK"] == "1"
accelerator = device.accelerator("fp32")
settings = parse(VaeSettings, ["x", "--out", "y", "--lr", "0.002" if second else "0.001"], "")
same = parse(VaeSettings, ["x", "--out", "y", "--workers", os.environ["RANK"]], "")
model = torch.nn.Linear(3, 3)
with torch.no_grad():
    model.weight[:] = 1.0
    model.bias[:] = 0.5

def told(call):
    try:
        return call() or "nothing"
    except UserError as error:
        return str(error)

said = [told(lambda: ranks.refuse_differences(accelerator, settings, {}))]
said += [told(lambda: ranks.refuse_differences(accelerator, same, {"the data": "ab" if second else "cd"}))]
said += [told(lambda: ranks.refuse_differences(accelerator, same, {"the data": "ab"}))]
said += [told(lambda: ranks.refuse_drift(accelerator, {"vae": model}, 7))]
with torch.no_grad():
    model.bias[1] = 0.5 + 2**-24 * second  # the last bit
said += [told(lambda: ranks.refuse_drift(accelerator, {"vae": model}, 8))]
code = ranks.code_hash
ranks.code_hash = lambda: code() + str(second)
said += [told(lambda: ranks.refuse_differences(accelerator, same, {}))]
open(sys.argv[1] + os.environ["RANK"], "w").write("\\n".join(said))
accelerator.wait_for_everyone()
device.leave(lambda: 0)
"""


@pytest.mark.reliability
def test_processes_that_differ_are_told_what_differs(tmp_path):
    script = tmp_path / "perturbed.py"
    script.write_text(PERTURBED)
    launch = [sys.executable, "-m", "calotype.launch", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run([*launch, str(tmp_path / "said")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = [(tmp_path / f"said{rank}").read_text().splitlines() for rank in (0, 1)]
    assert said[0] == said[1]
    settings, data, nothing, even, drift, code = said[0]
    assert settings.startswith("process 1 differs from process 0 in --lr: 0.002, not 0.001; start every process")
    assert data.startswith("process 1 differs from process 0 in the data: ab, not cd")
    assert nothing == even == "nothing"
    assert drift.startswith("process 1 has other weights than process 0 (vae) at step 8")
    assert code.startswith("process 1 differs from process 0 in the code: ")
