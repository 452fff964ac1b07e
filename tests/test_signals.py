"""Signals at random instants, from outside, to a real training process: what is saved, and how it goes on."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from calotype import checkpoint, cli
from calotype.stage1_vae.train import VaeStage

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its processes, to import torch once")
STEPS = 30


def words(finished, out):
    model = "--width 8 --factor 2 --batch-size 8 --precision fp32 --validations 2 --log-every 1".split()
    kept = ["--checkpoint-every", "1000", "--keep-checkpoints", "100", "--steps", str(STEPS)]
    return ["train-vae", str(finished / "data.json"), *model, *kept, "--out", str(out)]


def start(argv, trace=None):
    """A command in a forked child, which notes when each of its steps begins; returns its process id."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    step = VaeStage.step

    def noted(stage, batch, number):
        with open(trace, "a") as stream:
            stream.write(f"{number} {time.monotonic_ns()}\n")
        return step(stage, batch, number)

    VaeStage.step = noted if trace else step
    try:
        code = cli.main(argv)
    except SystemExit as stop:
        code = stop.code
    os._exit(code)


def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def begun(trace):
    """Number and instant (ns) of each step that has begun."""
    text = trace.read_text() if trace.exists() else ""
    return [tuple(map(int, line.split())) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def kept(out):
    return [int(path.name[-8:]) for path in checkpoint.steps(out / "checkpoints")]


def traces(out):
    """Everything learnt, and the loss of every step to the last bit."""
    parts, _ = checkpoint.load(out / "checkpoints")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss[train]"].hex() for line in lines if "loss[train]" in line}
    return {f"{p}/{n}": t.clone() for p, part in parts.items() for n, t in part.items()}, losses


def same(a, b):
    return a[1] == b[1] and a[0].keys() == b[0].keys() and all(torch.equal(a[0][name], t) for name, t in b[0].items())


def signalled(argv, out, number, after):
    """Send a signal when a random moment of the step `after` has come; returns the exit code and the step it met."""
    trace = out.with_suffix(".trace")
    child = start(argv, trace)
    while len(begun(trace)) <= after:
        time.sleep(0.001)
    time.sleep(random.Random(after).uniform(0, 0.03))
    os.kill(child, number)
    sent = time.monotonic_ns()
    code = end(child)
    return code, max(step for step, instant in begun(trace) if instant <= sent)


def attempt(finished, folder, number, after):
    """One signal: whether it was saved in time and said rightly, and the run that came of it."""
    argv = words(finished, folder)
    code, met = signalled(argv, folder, number, after)
    expected = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0}[number]
    saved = [step for step in kept(folder) if met < step <= met + 2]
    goes_on = number == signal.SIGUSR1 or end(start(argv)) == 0
    return code == expected and bool(saved) and goes_on


@pytest.mark.reliability
def test_signals_at_random_instants(finished, tmp_path, sized, capsys):
    assert end(start(words(finished, tmp_path / "whole"))) == 0
    whole, rng, trials, good = traces(tmp_path / "whole"), random.Random(0), sized(9, 20), 0
    for trial in range(trials):
        number = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)[trial % 3]
        out = tmp_path / f"{trial}"
        assert attempt(finished, out, number, rng.randrange(STEPS - 6)), (trial, number, kept(out))
        assert same(traces(out), whole), (trial, number)
        good += 1
        shutil.rmtree(out)
    with capsys.disabled():
        print(f"\nsignals: {good} of {trials} saved within two steps; 0 different bits after going on")


@pytest.mark.reliability
def test_several_processes_save_at_the_same_step_when_one_is_asked(finished, tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "calotype.stage1_vae.train"]
    out = tmp_path / "run"
    argv = [*words(finished, out)[1:], "--steps", "200"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    both = subprocess.Popen([sys.executable, *launch, *argv], env=environment, stdout=subprocess.DEVNULL)
    while not (out / "metrics.jsonl").exists():
        assert both.poll() is None
        time.sleep(0.01)
    first = int((out / ".holder").read_text().split()[1])
    os.kill(first, signal.SIGUSR1)
    assert both.wait() == 0
    early, *late = kept(out)
    assert 0 < early < 100 and late[-1] == 200
    assert checkpoint.load(out / "checkpoints", up_to=early)[1]["step"] == early


def test_sigusr1_saves_and_goes_on(finished, tmp_path, monkeypatch, capsys):
    step = VaeStage.step

    def asked(stage, batch, number):
        if number in (4, 9):
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(stage, batch, number)

    monkeypatch.setattr(VaeStage, "step", asked)
    argv = words(finished, tmp_path / "run")
    assert cli.main([*argv, "--steps", "12"]) == 0
    assert kept(tmp_path / "run") == [5, 10, 12]
    assert capsys.readouterr().out.count("Saving after this step.") == 2


def test_where_nothing_trains_sigusr1_is_not_the_end(finished):
    earlier = signal.getsignal(signal.SIGUSR1)
    try:
        assert cli.main(["--version"]) == 0
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, earlier)


def test_a_signal_that_comes_while_the_last_state_is_exported_loses_nothing(finished, tmp_path, monkeypatch):
    export = VaeStage.export

    def told(stage, folder):
        os.kill(os.getpid(), signal.SIGTERM)
        export(stage, folder)

    monkeypatch.setattr(VaeStage, "export", told)
    argv = [*words(finished, tmp_path / "run"), "--steps", "6"]
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 143
    assert (tmp_path / "run/finished.json").exists() and (tmp_path / "run/vae/config.json").exists()
    assert cli.main(argv) == 0
