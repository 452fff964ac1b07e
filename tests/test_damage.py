"""Rotten bits, short files, zeros and files in each other's place: found every time, named, and passed over."""

import json
import random
import shutil

import pytest
import torch

from calotype import checkpoint
from calotype.errors import UserError
from calotype.latents import VERSION, Index, LatentCache, Shards, read_index

pytestmark = pytest.mark.reliability
KINDS = ["flip", "flips", "noise", "cut", "longer", "zeros", "some zeros", "empty", "gone", "swap", "copy"]
STEPS = (5, 10, 15)


def parts_of(step):
    g = torch.Generator().manual_seed(step)
    optimizer = {"0.exp_avg": torch.randn(32, generator=g), "0.step": torch.tensor(float(step))}
    return {
        "vae": {"w": torch.randn(32, 4, generator=g)},
        "vae_ema": {"w": torch.full((8,), step / 3)},
        "vae_optimizer": optimizer,
    }


def spoil(file, other, kind, rng):
    """Damage a file in one way; `other` is its older neighbour. Returns whether it changed."""
    before = file.read_bytes()
    content = bytearray(before)
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.randrange(1, 200))
    if kind == "gone":
        file.unlink()
        return True
    if kind == "swap":
        file.write_bytes(other.read_bytes())
        other.write_bytes(before)
    elif kind == "copy":
        file.write_bytes(other.read_bytes())
    else:
        if kind == "flip":
            content[start] ^= 1 << rng.randrange(8)
        elif kind == "flips":
            for place in rng.sample(range(len(content)), min(8, len(content))):
                content[place] ^= 1 << rng.randrange(8)
        elif kind == "noise":
            content[start:end] = rng.randbytes(end - start)
        elif kind == "cut":
            del content[start:]
        elif kind == "longer":
            content += rng.randbytes(end - start)
        elif kind == "zeros":
            content = bytearray(len(content))
        elif kind == "some zeros":
            content[start:end] = bytes(end - start)
        elif kind == "empty":
            content.clear()
        file.write_bytes(content)
    return not file.exists() or file.read_bytes() != before


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for step in STEPS:
        checkpoint.save(folder, step, parts_of(step), {"seconds": 1.0, "good_step": None}, keep=3)
    return folder


def same(parts, step):
    expected = parts_of(step)
    return parts.keys() == expected.keys() and all(
        parts[p].keys() == expected[p].keys() and all(torch.equal(parts[p][n], t) for n, t in expected[p].items())
        for p in expected
    )


def test_damage_to_the_newest_falls_back_to_the_one_before(saved, tmp_path, sized, capsys):
    rng, fell_back, trials = random.Random(0), 0, sized(100, 1000)
    for trial in range(trials):
        folder = shutil.copytree(saved, tmp_path / str(trial))
        newest, before = checkpoint.steps(folder)[-1], checkpoint.steps(folder)[-2]
        kind, file = KINDS[trial % len(KINDS)], rng.choice(sorted(newest.iterdir()))
        while not spoil(file, before / file.name, kind, rng):
            pass
        capsys.readouterr()
        parts, state = checkpoint.load(folder)
        printed = capsys.readouterr().out
        expected = 5 if kind == "swap" else 10  # a swap spoils both
        assert (state["step"], same(parts, expected)) == (expected, True), (trial, kind, file.name)
        assert f"{newest} is passed over: " in printed, (trial, kind, file.name)
        fell_back += 1
        shutil.rmtree(folder)
    with capsys.disabled():
        print(f"\ndamage: {fell_back} of {trials} fell back to the last good checkpoint, 0 silent")


def test_a_checkpoint_under_another_s_name_is_no_checkpoint(saved, tmp_path, capsys):
    folder = shutil.copytree(saved, tmp_path / "mixed")
    newest, before = checkpoint.steps(folder)[-1], checkpoint.steps(folder)[-2]
    shutil.rmtree(newest)
    shutil.copytree(before, newest)
    assert checkpoint.load(folder)[1]["step"] == 10
    assert f"{newest} is passed over: it holds step 10" in capsys.readouterr().out


def test_where_nothing_is_intact_the_run_does_not_begin_again_by_itself(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "all")
    for path in checkpoint.steps(folder):
        (path / "state.json").write_text("{}")
    with pytest.raises(UserError, match="none of 3 checkpoints is intact; restore one, or give --fresh"):
        checkpoint.load(folder)


# The cache of latents


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached")
    written, names = Shards(folder), [f"train-{i:05d}.safetensors" for i in range(2)]
    for number, name in enumerate(names):
        g = torch.Generator().manual_seed(number)
        moments = {"mean": torch.randn(6, 2, 4, 4, generator=g), "std": torch.ones(6, 2, 4, 4)}
        written.write(name, moments, torch.arange(6), [f"a caption {i}" for i in range(6)])
    known = ("data", "vae", [2, 4, 4], False, ["a"], [8, 8], {"train": 12}, {"train": names}, written.sha256)
    Index(VERSION, *known).write(folder)
    return folder


def contents(folder):
    cache = LatentCache(folder, "train")
    return cache.index, [{name: tensor.clone() for name, tensor in shard.items()} for shard in cache.shards]


def test_damaged_latents_are_refused_and_only_they_are_written_again(cached, tmp_path, sized):
    rng, (index, shards) = random.Random(1), contents(cached)
    for trial in range(sized(60, 600)):
        folder = shutil.copytree(cached, tmp_path / str(trial))
        kind = KINDS[trial % len(KINDS)]
        name = rng.choice(["train-00001.safetensors", "train-00001.safetensors", "index.json"])
        while not spoil(folder / name, folder / "train-00000.safetensors", kind, rng):
            pass
        try:
            found, tensors = contents(folder)
        except UserError as error:
            assert "calotype encode" in str(error) and name in str(error) or kind in ("swap", "gone"), str(error)
        else:  # a blank in the index may turn into another blank
            assert name == "index.json" and found == index
            assert all(torch.equal(a[n], b[n]) for a, b in zip(tensors, shards, strict=True) for n in b)
        left = [Shards(folder).has(shard) for shard in ("train-00000.safetensors", "train-00001.safetensors")]
        assert left == [kind != "swap", name == "index.json"], (trial, kind, name)
        shutil.rmtree(folder)


def test_a_damaged_list_of_shards_costs_time_and_nothing_else(cached, tmp_path):
    folder = shutil.copytree(cached, tmp_path / "list")
    for text in ("", "[1]", '"text"', '{"train-00000.safetensors": "0"}'):
        (folder / "shards.json").write_text(text)
        assert not Shards(folder).has("train-00000.safetensors")


def test_a_cache_of_an_earlier_version_is_named(cached, tmp_path):
    folder = shutil.copytree(cached, tmp_path / "old")
    content = json.loads((folder / "index.json").read_text())
    for name in ("self", "sha256"):
        del content[name]
    (folder / "index.json").write_text(json.dumps(content | {"version": 1}))
    with pytest.raises(UserError, match="has format 1, not 2; run `calotype encode --fresh`"):
        read_index(folder)
