import json
import shutil
import time

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch.testing import assert_close

from calotype import cli
from calotype.data import Pictures
from calotype.images import normalize
from calotype.latents import VERSION, Index, LatentBatches, LatentCache, write_shard
from calotype.sheet import read_sheet


def cache_of(folder, n=1000, shape=(4, 8, 8), shards=1, flip=False):
    folder.mkdir(exist_ok=True)
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(n, *shape, generator=g)
    moments = {"mean": mean, "std": torch.full_like(mean, 0.5)}
    if flip:
        moments |= {"mean_flipped": mean.flip(-1), "std_flipped": moments["std"]}
    parts = np.array_split(np.arange(n), shards)
    names = [f"train-{i:05d}.safetensors" for i in range(shards)]
    sums = {}
    for part, name in zip(parts, names, strict=True):
        here = {k: v[torch.from_numpy(part)] for k, v in moments.items()}
        sums[name] = write_shard(folder / name, here, torch.from_numpy(part), [f"caption {i} é" for i in part])
    known = ("data", "vae", list(shape), flip, [], [32, 32], {"train": n}, {"train": names}, sums)
    Index(VERSION, *known).write(folder)
    return mean.half().float()


@pytest.mark.parametrize("shards", [1, 4])
def test_what_is_written_is_read(tmp_path, shards):
    mean = cache_of(tmp_path, 101, shards=shards)
    cache = LatentCache(tmp_path, "train")
    items = np.array([100, 0, 57, 57, 25, 26])
    assert torch.equal(cache.gather(items, "mean"), mean[items])
    assert cache.gather(items, "label").tolist() == items.tolist()
    assert [cache.caption(int(i)) for i in items] == [f"caption {i} é" for i in items]


def test_samples_have_the_posterior_s_moments(tmp_path):
    mean = cache_of(tmp_path, 2)
    cache = LatentCache(tmp_path, "train")
    eps = torch.randn(20_000, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    z = cache.sample(np.zeros(20_000, dtype=np.int64), eps)
    assert_close(z.mean(0), mean[0], atol=0.02, rtol=0)
    assert_close(z.std(0), torch.full((4, 8, 8), 0.5), atol=0.02, rtol=0)


def test_half_of_the_batch_is_mirrored_where_mirror_images_are_cached(tmp_path):
    mean = cache_of(tmp_path, 64, flip=True)
    cache = LatentCache(tmp_path, "train")
    mirrored = torch.arange(64) % 2 == 0
    z = cache.sample(np.arange(64), torch.zeros(64, 4, 8, 8), mirrored)
    assert torch.equal(z[1::2], mean[1::2]) and torch.equal(z[::2], mean[::2].flip(-1))


def test_batches_depend_on_the_position_alone(tmp_path):
    cache_of(tmp_path, 300, shards=2)
    batches = LatentBatches(LatentCache(tmp_path, "train"), seed=0)
    whole, part = batches.at(range(280, 320)), batches.at(range(300, 310))
    assert torch.equal(whole.x[20:30], part.x) and torch.equal(whole.label[20:30], part.label)


def test_fifty_thousand_latents_a_second(tmp_path):
    """Order, moments, labels and the posterior's noise together, on one core; today about 100,000."""
    cache_of(tmp_path, 20_000, shards=2)
    batches = LatentBatches(LatentCache(tmp_path, "train"), seed=0)
    batches.at(range(20_000))  # the disk's share, once
    rates = []
    for _ in range(5):
        began = time.process_time()
        for start in range(0, 12_800, 128):
            batches.at(range(start, start + 128))
        rates.append(12_800 / (time.process_time() - began))
    assert max(rates) > 50_000, rates


def test_the_cache_holds_what_the_autoencoder_says(finished):
    sheet = read_sheet(finished / "data.json")
    vae = AutoencoderKL.from_pretrained(finished / "stage1_vae/vae").eval()
    cache, pictures = LatentCache(finished / "latents", "train"), Pictures(sheet, "train")
    assert len(cache) == len(pictures) and len(cache.shards) == 3
    items = np.array([0, 41, len(cache) - 1])
    with torch.no_grad():
        posterior = vae.encode(normalize(torch.stack([pictures[int(i)] for i in items]))).latent_dist
    assert_close(cache.gather(items, "mean"), posterior.mean, atol=2e-3, rtol=2e-3)
    assert_close(cache.gather(items, "std"), posterior.std, atol=2e-3, rtol=2e-3)
    assert cache.gather(items, "label").tolist() == pictures.labels[items].tolist()


def encode(finished, out, *more):
    vae = str(finished / "stage1_vae/vae")
    return cli.main(["encode", str(finished / "data.json"), "--vae", vae, "--out", str(out), *more])


def test_an_interrupted_cache_goes_on_with_the_missing_shard(finished, tmp_path):
    flags = ["--precision", "fp32", "--shard-size", "40"]
    shutil.copytree(finished / "latents", tmp_path / "latents")
    (tmp_path / "latents/index.json").unlink()
    (tmp_path / "latents/train-00001.safetensors").unlink()
    kept = (tmp_path / "latents/train-00000.safetensors").stat().st_mtime_ns
    assert encode(finished, tmp_path / "latents", *flags) == 0
    assert (tmp_path / "latents/train-00000.safetensors").stat().st_mtime_ns == kept
    ours = load_file(tmp_path / "latents/train-00001.safetensors")
    theirs = load_file(finished / "latents/train-00001.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_cache_of_another_autoencoder_is_refused(finished, tmp_path, capsys):
    shutil.copytree(finished / "stage1_vae/vae", tmp_path / "vae")
    config = tmp_path / "vae/config.json"
    config.write_text(config.read_text().replace('"force_upcast": false', '"force_upcast": true'))
    flags = ["--latents", str(finished / "latents"), "--vae", str(tmp_path / "vae"), "--out", str(tmp_path / "s2")]
    assert cli.main(["train-diffusion", *flags]) == 2
    assert "made by another autoencoder" in capsys.readouterr().err
    assert not (tmp_path / "s2").exists()


def test_latents_of_something_else_are_not_overwritten(finished, tmp_path, capsys):
    shutil.copytree(finished / "latents", tmp_path / "latents")
    claim = tmp_path / "latents/encoding.json"
    claim.write_text(json.dumps(json.loads(claim.read_text()) | {"vae": "another"}))
    before = {file.name: file.read_bytes() for file in (tmp_path / "latents").iterdir()}
    assert encode(finished, tmp_path / "latents") == 2
    assert "--fresh" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in (tmp_path / "latents").iterdir()} == before


def test_mirror_images_of_captioned_pictures_are_refused(tmp_path, finished, capsys):
    assert cli.main(["data", "shapes", "--image-size", "16", "--out", str(tmp_path)]) == 0
    vae = str(finished / "stage1_vae/vae")
    argv = ["encode", str(tmp_path / "data.json"), "--vae", vae, "--out", str(tmp_path / "latents"), "--flip"]
    assert cli.main(argv) == 2
    assert "--flip" in capsys.readouterr().err
