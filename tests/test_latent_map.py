import base64
import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.decomposition import PCA
from torch.testing import assert_close

from calotype import cli
from calotype.autoencoder import decode, load_autoencoder
from calotype.data import Pictures
from calotype.errors import UserError
from calotype.images import denormalize
from calotype.latents import LatentCache
from calotype.pipeline import LatentDiffusionPipeline, latent_map
from calotype.pipeline.latent_map import LatentMap, principal_components
from calotype.sheet import read_sheet


@pytest.mark.parametrize("shape", [(40, 90), (90, 12), (9, 30)])
def test_directions_are_those_of_scikit_learn(shape):
    z = torch.randn(shape) @ torch.diag(torch.linspace(3, 0.1, shape[1])) + 5
    pca = PCA().fit(z.double().numpy())
    mean, directions, variances = principal_components(z, 6)
    theirs = torch.from_numpy(pca.components_[:6]).float()
    assert_close(mean, torch.from_numpy(pca.mean_).float(), atol=1e-4, rtol=1e-4)
    assert_close(variances, torch.from_numpy(pca.explained_variance_[:6]).float(), atol=1e-4, rtol=1e-3)
    assert_close((directions * theirs).sum(1).abs(), torch.ones(6), atol=1e-4, rtol=1e-4)
    assert (directions.gather(1, directions.abs().argmax(1, keepdim=True)) > 0).all()  # so that nothing flips


def test_a_code_of_two_numbers_keeps_its_axes_and_a_line_has_one_direction():
    mean, directions, _ = principal_components(torch.randn(50, 2) + 3, 8)
    assert mean.tolist() == [0, 0] and directions.tolist() == [[1, 0], [0, 1]]
    line = torch.randn(50, 1) * torch.tensor([1.0, 2.0, 2.0])
    assert_close(principal_components(line, 8)[1], torch.tensor([[1.0, 2.0, 2.0]]) / 3)


@pytest.fixture(scope="module")
def surveyed(finished):
    vae = load_autoencoder(finished / "stage1_vae/vae", "--vae")
    return LatentMap.survey(finished, vae), vae


def test_points_are_the_training_latents_on_the_plane(finished, surveyed):
    found, _ = surveyed
    cache = LatentCache(finished / "latents", "train")
    z = cache.gather(np.arange(len(cache)), "mean").flatten(1)
    assert found.points.shape == (len(cache), 2) and torch.equal(
        found.labels, cache.gather(np.arange(len(cache)), "label")
    )
    theirs = PCA(2).fit_transform(z.numpy())
    assert_close(found.points.abs(), torch.from_numpy(theirs).abs().float(), atol=1e-3, rtol=1e-3)
    ratio = PCA().fit(z.double().numpy()).explained_variance_ratio_[: len(found.facts.shares)]
    np.testing.assert_allclose(found.facts.shares, ratio, atol=1e-4)
    assert found.facts.limit == pytest.approx(2 * float(z.abs().max())) and found.facts.noise


def test_pictures_are_held_out_ones_of_every_class(finished, surveyed):
    found, _ = surveyed
    source = Pictures(read_sheet(finished / "data.json"), "val")
    assert found.facts.split == "val" and found.picture_labels.tolist() == sorted(found.picture_labels.tolist())
    assert set(found.picture_labels.tolist()) == set(source.labels.tolist())
    held_out = [source[i].numpy().tobytes() for i in range(len(source))]
    assert all(pixels.numpy().tobytes() in held_out for pixels in found.pictures)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([1, 0, 0, 1, 0, 1], [0, 0, 1, 1]),  # two of each
        (list(range(10)) * 3, list(range(10))),
        (list(range(48)), list(range(0, 48, 4))),
        ([-1] * 40, [-1] * 12),
    ],
)
def test_a_few_pictures_of_each_class(labels, expected):
    items = latent_map._some_of_each(torch.tensor(labels))
    assert [labels[i] for i in items] == expected and len(set(items)) == len(items)


def test_where_the_source_has_gone_pictures_come_from_their_latents(finished, surveyed, tmp_path):
    shutil.copytree(finished / "latents", tmp_path / "latents")
    found = LatentMap.survey(tmp_path, surveyed[1])
    cache = LatentCache(finished / "latents", "val")
    with torch.no_grad():
        z = cache.gather(np.arange(len(cache)), "mean")
        made = denormalize(decode(surveyed[1], z, (16, 16)))
    assert all(any((pixels.int() - other.int()).abs().max() <= 1 for other in made) for pixels in found.pictures)


def test_it_travels_in_the_model_folder(finished, surveyed):
    back = LatentMap.load(finished / "pipeline")
    assert back.facts == surveyed[0].facts and torch.equal(back.directions, surveyed[0].directions)
    assert str(finished) not in (finished / "pipeline/explorer.json").read_text()
    LatentDiffusionPipeline.from_pretrained(finished / "pipeline")  # nothing of it is in the way


def test_the_browser_is_given_the_same_numbers(surveyed):
    found, given = surveyed[0], json.loads(json.dumps(surveyed[0].for_browser()))
    directions = np.frombuffer(base64.b64decode(given["directions"]), "<f4").reshape(found.directions.shape)
    np.testing.assert_array_equal(directions, found.directions.numpy())
    np.testing.assert_allclose(given["points"], found.points.numpy(), atol=6e-4)
    picture = Image.open(io.BytesIO(base64.b64decode(given["pictures"][0].partition(",")[2])))
    assert np.array_equal(np.asarray(picture), found.pictures[0].permute(1, 2, 0).numpy())
    assert np.mean(np.abs(np.asarray(given["points"])) <= given["range"]) > 0.98


def test_a_damaged_map_is_a_user_error(surveyed, tmp_path):
    assert LatentMap.load(tmp_path) is None
    surveyed[0].save(tmp_path)
    tensors, text = load_file(tmp_path / "explorer.safetensors"), (tmp_path / "explorer.json").read_text()
    save_file(tensors | {"points": tensors["points"][:, :1].clone()}, tmp_path / "explorer.safetensors")
    with pytest.raises(UserError, match="explorer.json is damaged .*export the model again"):
        LatentMap.load(tmp_path)
    save_file(tensors, tmp_path / "explorer.safetensors")
    for damage in ("{", text.replace('"version": 1', '"version": 9'), text.replace('"limit"', '"most"')):
        (tmp_path / "explorer.json").write_text(damage)
        with pytest.raises(UserError, match="damaged"):
            LatentMap.load(tmp_path)
    (tmp_path / "explorer.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="damaged"):
        LatentMap.load(tmp_path)


def test_latents_of_another_autoencoder_give_no_map(finished, surveyed, tmp_path):
    for part in ("latents", "stage1_vae/vae"):
        shutil.copytree(finished / part, tmp_path / part)
    latent_map.write(tmp_path, surveyed[1], tmp_path)
    assert (tmp_path / "explorer.json").is_file()
    (tmp_path / "explorer.json").unlink()
    config = tmp_path / "stage1_vae/vae/config.json"
    config.write_text(config.read_text() + "\n")
    latent_map.write(tmp_path, surveyed[1], tmp_path)
    assert not (tmp_path / "explorer.json").exists()
    with pytest.raises(UserError, match="latents are of another autoencoder"):
        latent_map.open_run(tmp_path)


def test_flags_of_the_static_explorer(finished, tmp_path, capsys):
    def refused(*words):
        assert cli.main(["export", "--run", str(finished), "--explorer", *map(str, words)]) == 2
        return capsys.readouterr().err

    assert refused().startswith("calotype: --explorer needs onnxruntime-web; give --ort DIR")
    assert "is not the npm package onnxruntime-web" in refused("--ort", tmp_path)
    (tmp_path / "keep.txt").touch()
    assert "exists and is no explorer" in refused("--ort", tmp_path, "--out", tmp_path)
