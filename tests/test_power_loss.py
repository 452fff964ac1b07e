"""The power goes at any instant of a save: whatever the disk then holds, the last acknowledged state can be read."""

import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from power import Recorder, states

from calotype import checkpoint, disk
from calotype.errors import UserError
from calotype.latents import VERSION, Index, LatentCache, Shards
from calotype.lock import claimed
from calotype.tracking import Journal

pytestmark = [
    pytest.mark.reliability,
    pytest.mark.skipif(sys.platform != "linux", reason="names of open files are read from /proc"),
]
ONE = SimpleNamespace(is_main_process=True, log=lambda *_, **__: None)
EVERY = 5  # steps between checkpoints


def parts_of(step):
    g = torch.Generator().manual_seed(step)
    return {"vae": {"w": torch.randn(9, generator=g)}, "vae_optimizer": {"0.step": torch.tensor(float(step))}}


def save(run, step, keep=2, also=None):
    return checkpoint.save(run / "checkpoints", step, parts_of(step), {"seconds": 0.5, "step": step}, keep, also)


def train(root, recorder, until):
    """What a run does to the disk, without its arithmetic: lines, and a checkpoint now and then."""
    with claimed(root / "runs" / "mine"):
        run = root / "runs" / "mine"
        journal = Journal(run / "metrics.jsonl", 0, ONE)
        for step in range(1, until + 1):
            journal.write(step, 0.5 * step, {"loss[train]": 1 / step})
            if step % EVERY == 0:
                journal.to_disk()
                save(run, step, also=5)
                recorder.ack(step)


class InTurn(ThreadPoolExecutor):
    """One call after the other, so that it is certain what came before what."""

    def submit(self, call, *inputs):
        future = Future()
        future.set_result(call(*inputs))
        return future


def recorded(root, work):
    root.mkdir()
    recorder = Recorder(root)
    with recorder.on(), patch.object(checkpoint, "ThreadPoolExecutor", InTurn):
        work(root, recorder)
    return states(recorder.log)


def faults(folder, all_states, check):
    """The states that break the promise, and why; each is made real, read, and thrown away."""
    found = []
    for number, state in enumerate(all_states):
        place = state.write(folder / str(number))
        fault = check(place, state.acknowledged)
        if fault:
            found.append((number, fault))
        shutil.rmtree(place)
    return found


def check_run(root, acknowledged):
    run = root / "runs" / "mine"
    found = checkpoint.load(run / "checkpoints")
    if found is None:
        return f"nothing is left of {acknowledged}" if acknowledged else None
    parts, state = found
    step = state["step"]
    if step < max(acknowledged, default=0):
        return f"step {step} is older than {acknowledged}"
    expected = parts_of(step)
    if not all(torch.equal(parts[p][n], t) for p in expected for n, t in expected[p].items()):
        return f"step {step} has other content"
    Journal(run / "metrics.jsonl", step, ONE)
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss[train]"' in line]
    return None if len(lines) == step else f"{len(lines)} lines of {step} steps"


def and_goes_on(root, acknowledged):
    """The same, and then the next save is as good as any."""
    if fault := check_run(root, acknowledged):
        return fault
    run = root / "runs" / "mine"
    step = (max(acknowledged, default=0) // EVERY + 2) * EVERY
    save(run, step)
    parts, state = checkpoint.load(run / "checkpoints")
    leftovers = list((run / "checkpoints").glob(".*"))
    return None if state["step"] == step and not leftovers else f"the next save left {leftovers}"


def test_every_instant_of_several_saves(tmp_path, sized, capsys):
    all_states = recorded(tmp_path / "real", lambda root, recorder: train(root, recorder, sized(20, 60)))
    assert len(all_states) >= sized(500, 2000)
    assert faults(tmp_path, all_states, check_run) == []
    assert faults(tmp_path, all_states[:: sized(10, 3)], and_goes_on) == []
    with capsys.disabled():
        print(f"\npower loss: {len(all_states)} states of a run, all with a valid checkpoint as new as acknowledged")


def test_a_damaged_one_is_replaced_without_a_gap(tmp_path):
    def work(root, recorder):
        run = root / "runs" / "mine"
        save(run, 5)
        damaged = save(run, 10)
        (damaged / "vae.safetensors").write_bytes(b"rotten")
        recorder.look()
        for path in (damaged / "vae.safetensors", damaged):
            disk.sync(path)
        recorder.ack(5)
        save(run, 10)
        recorder.ack(10)

    def check(root, acknowledged):
        found = checkpoint.load(root / "runs/mine/checkpoints") if acknowledged else None
        return None if not acknowledged or found[1]["step"] >= max(acknowledged) else "older than acknowledged"

    assert faults(tmp_path, recorded(tmp_path / "real", work), check) == []


def export(root, version):
    """A model folder of several files and a sub-folder, as `export` writes it."""
    made = root / ".pipeline"
    (made / "unet").mkdir(parents=True)
    for name in ("model_index.json", "unet/config.json", "unet/weights.safetensors")[:version]:
        (made / name).write_text(f"{name} of version {version} " * 20)
    disk.publish(made, root / "pipeline")


def versions(root):
    """Which versions lie there whole, by name."""
    wholes = {}
    for folder in root.glob("*pipeline*"):
        files = disk.files_of(folder)
        texts = [file.read_text().split(" of version ") for file in files]
        for version in (2, 3):
            whole = len(files) == version and all(len(t) == 21 and t[1][0] == str(version) for t in texts)
            if whole:
                wholes[folder.name] = version
    return wholes


def work_of_exports(root, recorder):
    for version in (2, 3, 2):
        export(root, version)
        recorder.ack(version)


def check_export(root, acknowledged):
    if not acknowledged:
        return None if not (root / "pipeline").exists() or "pipeline" in versions(root) else "half of the first"
    allowed = {acknowledged[-1], {1: 3, 2: 2, 3: 2}[len(acknowledged)]}
    return None if versions(root).get("pipeline") in allowed else f"{versions(root)} after {acknowledged}"


def test_an_export_is_the_old_one_or_the_new_one(tmp_path):
    all_states = recorded(tmp_path / "real", work_of_exports)
    assert disk.swap(*[_folder(tmp_path / name) for name in "ab"]), "this disk cannot swap names: nothing was tried"
    assert len(all_states) > 100 and faults(tmp_path, all_states, check_export) == []


def test_where_names_cannot_be_swapped_the_old_one_lies_beside(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "swap", lambda *_: False)

    def check(root, acknowledged):
        fault = check_export(root, acknowledged)
        beside = versions(root).get(".pipeline.old") or versions(root).get(".pipeline")
        return fault if fault and not (beside and not (root / "pipeline").exists()) else None

    assert faults(tmp_path, recorded(tmp_path / "real", work_of_exports), check) == []


def _folder(path):
    path.mkdir()
    return path


def test_a_small_file_is_the_old_one_or_the_new_one(tmp_path):
    def work(root, recorder):
        for number in range(3):
            disk.write_text(root / "facts.json", f"number {number}" * 9)
            recorder.ack(number)

    def check(root, acknowledged):
        file = root / "facts.json"
        allowed = [f"number {n}" * 9 for n in range(len(acknowledged) - 1, len(acknowledged) + 1) if n >= 0]
        text = file.read_text() if file.exists() else None
        return None if text in allowed or not acknowledged and text is None else f"{text} after {acknowledged}"

    assert faults(tmp_path, recorded(tmp_path / "real", work), check) == []


def moments(number):
    return {"mean": torch.full((3, 1, 2, 2), float(number))}, torch.full((3,), number), [f"caption {number}"] * 3


def cache(root, recorder):
    shards, names = Shards(root), [f"train-{i:05d}.safetensors" for i in range(3)]
    for number, name in enumerate(names):
        if not shards.has(name):
            shards.write(name, *moments(number))
        recorder.ack(name)
    known = ("data", "vae", [1, 2, 2], False, [], [8, 8], {"train": 9}, {"train": names}, shards.sha256)
    Index(VERSION, *known).write(root)
    recorder.ack("index")


def check_cache(root, acknowledged):
    accepted = [name for name in (f"train-{i:05d}.safetensors" for i in range(3)) if Shards(root).has(name)]
    if set(acknowledged) - {"index"} - set(accepted):
        return f"acknowledged {acknowledged}, and there are {accepted}"
    try:
        found = LatentCache(root, "train")
    except UserError as error:
        return None if "index" not in acknowledged else str(error)
    return None if all(found.shards[i]["mean"].eq(i).all() for i in range(3)) else "other latents"


def test_a_cache_of_latents_is_whole_or_unfinished(tmp_path):
    all_states = recorded(tmp_path / "real", cache)
    assert len(all_states) >= 40 and faults(tmp_path, all_states, check_cache) == []

    for number, state in enumerate(all_states[::20]):  # and `encode` makes it whole
        place = state.write(tmp_path / f"again-{number}")
        cache(place, SimpleNamespace(ack=lambda _: None))
        assert check_cache(place, ["index"]) is None


@pytest.mark.parametrize(
    "broken", ["no sync", "no sync of folders", "no sync of files", "no sync of new folders", "old one first"]
)
def test_the_test_sees_what_breaks_the_law(tmp_path, monkeypatch, broken):
    sync = disk.sync
    if broken == "old one first":
        publish = checkpoint.publish

        def late(temporary, final):
            for old in checkpoint.steps(final.parent):
                shutil.rmtree(old)
            publish(temporary, final)

        monkeypatch.setattr(checkpoint, "publish", late)
    elif broken == "no sync of new folders":
        monkeypatch.setattr(checkpoint, "make_folder", lambda folder: folder.mkdir(parents=True, exist_ok=True))
    else:
        spared = {"no sync": (True, True), "no sync of folders": (True, False), "no sync of files": (False, True)}
        folders, files = spared[broken]
        for module in (disk, checkpoint):
            monkeypatch.setattr(module, "sync", lambda path: (folders if path.is_dir() else files) or sync(path))
    all_states = recorded(tmp_path / "real", lambda root, recorder: train(root, recorder, 15))
    monkeypatch.undo()

    def check(root, acknowledged):
        try:
            return check_run(root, acknowledged)
        except UserError as error:
            return str(error)

    assert faults(tmp_path, all_states[::3], check)
