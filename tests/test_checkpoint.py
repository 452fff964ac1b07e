import json
import os
import random
import resource

import pytest
import torch
from torch import nn

from calotype import checkpoint
from calotype.errors import UserError


def save(folder, step, keep=2, also=None):
    tensors = {"w": torch.full((64, 64), float(step))}
    return checkpoint.save(folder, step, {"model": tensors}, {"seconds": 1.5}, keep, also)


def test_round_trip_and_keeping_the_newest(tmp_path):
    for step in (5, 10, 15):
        save(tmp_path, step)
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-00000010", "step-00000015"]
    parts, state = checkpoint.load(tmp_path)
    assert state == {"step": 15, "seconds": 1.5}
    assert torch.equal(parts["model"]["w"], torch.full((64, 64), 15.0))


def test_damage_of_any_kind_is_found_and_passed_over(tmp_path, capsys):
    rng = random.Random(0)
    for trial in range(60):
        folder = tmp_path / str(trial)
        save(folder, 5)
        newest = save(folder, 10)
        file = rng.choice(sorted(newest.iterdir()))
        content = bytearray(file.read_bytes())
        kind = rng.choice(["flip", "cut", "empty", "gone"])
        if kind == "flip":
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            content = content[: rng.randrange(len(content))]
        elif kind == "empty":
            content = bytearray(len(content))
        file.unlink() if kind == "gone" else file.write_bytes(content)
        _, state = checkpoint.load(folder)
        assert state["step"] == 5, (kind, file.name)
        assert "is passed over" in capsys.readouterr().out


def test_the_step_decides_and_never_the_clock(tmp_path):
    for step in (5, 10, 15):
        save(tmp_path, step, keep=3)
    rng, year_2038 = random.Random(0), 2**31
    for _ in range(20):
        for path in [*checkpoint.steps(tmp_path), *tmp_path.rglob("*")]:
            instant = rng.choice([0, 1, year_2038, rng.randrange(2**32)])
            os.utime(path, (instant, instant))
        assert checkpoint.load(tmp_path)[1]["step"] == 15
        assert checkpoint.load(tmp_path, up_to=12)[1]["step"] == 10
    save(tmp_path, 20, keep=3)
    assert kept(tmp_path) == [10, 15, 20]  # the oldest goes by its step too


def test_a_half_written_folder_is_never_read(tmp_path):
    save(tmp_path, 5)
    half = tmp_path / ".step-00000010.123"
    half.mkdir()
    (half / "state.json").write_text("{}")
    assert checkpoint.load(tmp_path)[1]["step"] == 5
    save(tmp_path, 10)
    assert not half.exists()


def test_a_full_disk_costs_nothing_that_was_there(tmp_path):
    save(tmp_path, 5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails as on a full disk
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        with pytest.raises(UserError, match="no space left in .* step 10"):
            save(tmp_path, 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    assert checkpoint.load(tmp_path)[1]["step"] == 5


def test_an_optimizer_goes_on_bit_for_bit():
    def three_steps(model, optimizer, seeds):
        for seed in seeds:
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    three_steps(model, optimizer, (1, 2, 3))
    saved = {k: v.clone() for k, v in checkpoint.optimizer_tensors(optimizer).items()}
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    three_steps(model, optimizer, (4, 5, 6))

    again = nn.Linear(3, 2)
    resumed = torch.optim.AdamW(again.parameters(), lr=0.1, fused=True)
    checkpoint.load_module(again, weights)
    checkpoint.load_optimizer(resumed, saved)
    three_steps(again, resumed, (4, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_missing_or_extra_weights_are_refused():
    with pytest.raises(RuntimeError, match="Missing key"):
        checkpoint.load_module(nn.Linear(2, 2), {"weight": torch.zeros(2, 2)})


def test_no_pickle_is_written(tmp_path):
    folder = save(tmp_path, 5)
    assert sorted(file.suffix for file in folder.iterdir()) == [".json", ".json", ".safetensors"]
    assert set(json.loads((folder / "manifest.json").read_text())) == {"model.safetensors", "state.json"}


def test_a_damaged_newer_one_does_not_push_out_a_good_one(tmp_path):
    save(tmp_path, 7, keep=1)
    bad = save(tmp_path, 10, keep=2)
    (bad / "model.safetensors").write_bytes(b"")
    save(tmp_path, 8, keep=1)
    assert checkpoint.load(tmp_path)[1]["step"] == 8


def test_the_same_step_is_not_written_twice(tmp_path):
    first = save(tmp_path, 5)
    inode = first.stat().st_ino
    assert save(tmp_path, 5) == first and first.stat().st_ino == inode
    (first / "model.safetensors").write_bytes(b"")
    save(tmp_path, 5)
    assert checkpoint.verify(first) is None


def kept(folder):
    return [int(path.name[-8:]) for path in checkpoint.steps(folder)]


def test_a_good_step_is_kept_for_as_long_as_it_is_asked_for(tmp_path):
    for step in (5, 10, 15, 20):
        save(tmp_path, step, also=5)
    assert kept(tmp_path) == [5, 15, 20]
    save(tmp_path, 25, also=15)
    assert kept(tmp_path) == [15, 20, 25]
    save(tmp_path, 30, also=30)
    assert kept(tmp_path) == [25, 30]
    save(tmp_path, 35, also=7)  # one that was never written
    assert kept(tmp_path) == [30, 35]


def test_what_came_later_is_not_gone_back_to(tmp_path):
    for step in (5, 10, 15, 20):
        save(tmp_path, step, also=5)
    for up_to, expected in ((None, 20), (20, 20), (19, 15), (15, 15), (14, 5), (5, 5)):
        parts, state = checkpoint.load(tmp_path, up_to=up_to)
        assert state["step"] == expected and parts["model"]["w"][0, 0] == expected
    assert checkpoint.load(tmp_path, up_to=4) is None
    (tmp_path / "step-00000015/model.safetensors").write_bytes(b"")
    assert checkpoint.load(tmp_path, up_to=15)[1]["step"] == 5  # the next older one, never a newer
