"""Nearest neighbours, the linear probe and principal axes, on numbers whose answer is known."""

import itertools

import numpy as np
import pytest

from calotype.stage1_vae import probes


def sample_of(train, val):
    return {"train": probes.Chosen([*range(len(train))], train), "val": probes.Chosen([*range(len(val))], val)}


def test_classes_far_apart_are_always_found():
    pytest.importorskip("sklearn", reason="pip install 'calotype[eval]'")
    rng = np.random.default_rng(0)
    labels = {"train": np.arange(300) % 3, "val": np.arange(90) % 3}
    centres = 10 * np.eye(3, 8)
    features = {split: centres[ids] + rng.normal(size=(len(ids), 8)) for split, ids in labels.items()}
    assert probes.accuracy(features, sample_of(**labels)) == (1.0, 1.0)


def test_noise_tells_nothing():
    pytest.importorskip("sklearn", reason="pip install 'calotype[eval]'")
    rng = np.random.default_rng(0)
    labels = {"train": rng.integers(0, 4, 1000), "val": rng.integers(0, 4, 2000)}
    features = {split: rng.normal(size=(len(ids), 8)).astype(np.float32) for split, ids in labels.items()}
    found = probes.accuracy(features, sample_of(**labels))
    assert found == pytest.approx((0.25, 0.25), abs=0.04)  # the standard error is 0.01
    assert probes.chance(sample_of(**labels)) == pytest.approx(0.25, abs=0.04)


def test_the_probe_does_not_depend_on_the_scale_of_a_feature():
    pytest.importorskip("sklearn", reason="pip install 'calotype[eval]'")
    rng = np.random.default_rng(0)
    labels = {"train": np.arange(300) % 2, "val": np.arange(200) % 2}
    features = {split: rng.normal(size=(len(ids), 5)) + ids[:, None] for split, ids in labels.items()}
    scaled = {split: x * [1e-4, 1, 1e4, 1, 1] + 3 for split, x in features.items()}
    assert probes.accuracy(features, sample_of(**labels)).linear == probes.accuracy(scaled, sample_of(**labels)).linear


@pytest.mark.parametrize("shape", [(50, 12), (12, 50)], ids=["more pictures", "more values"])
def test_principal_axes_are_those_of_scikit_learn(shape):
    decomposition = pytest.importorskip("sklearn.decomposition", reason="pip install 'calotype[eval]'")
    x = (np.random.default_rng(0).normal(size=shape) * np.linspace(1, 3, shape[1]) + 5).astype(np.float32)
    mean, axes = probes.principal_axes(x, 6)
    reference = decomposition.PCA(6, svd_solver="full").fit(x.astype(np.float64))
    np.testing.assert_allclose(mean, reference.mean_, atol=1e-5)
    sign = np.sign((axes * reference.components_).sum(1, keepdims=True))
    np.testing.assert_allclose(axes * sign, reference.components_, atol=1e-4)


def test_there_are_no_axes_without_variance():
    pytest.importorskip("scipy", reason="pip install 'calotype[eval]'")
    rng = np.random.default_rng(0)
    flat = np.concatenate([rng.normal(size=(40, 3)), np.ones((40, 20))], axis=1).astype(np.float32)
    assert probes.principal_axes(flat, 10)[1].shape == (3, 23)
    mean, axes = probes.principal_axes(rng.normal(size=(8, 30)).astype(np.float32), 20)
    assert axes.shape == (7, 30)  # eight points lie in a hyperplane of seven dimensions
    np.testing.assert_allclose(axes @ axes.T, np.eye(7), atol=1e-5)


def test_pictures_are_chosen_evenly_among_those_with_a_label(monkeypatch):
    monkeypatch.setattr(probes, "_MOST", {"train": 5, "val": 2})
    labels = np.array(list(itertools.chain.from_iterable((i, -1) for i in range(10))))
    sample = probes.choose({"train": labels, "val": labels})
    assert sample["train"].numbers == [0, 4, 8, 12, 16] and sample["train"].labels.tolist() == [0, 2, 4, 6, 8]
    assert sample["val"].labels.tolist() == [0, 5]


def test_where_labels_cannot_be_learnt_one_line_says_why():
    pytest.importorskip("sklearn", reason="pip install 'calotype[eval]'")
    one, two, none = np.zeros(5, int), np.array([0, 1]), np.array([], int)
    assert "one class" in probes.obstacle(sample_of(one, two))
    assert "no held-out picture" in probes.obstacle(sample_of(two, none))
    assert probes.obstacle(sample_of(two, one)) is None


def test_pca_takes_as_many_pictures_as_is_reasonable():
    numbers = list(range(20_000))
    assert probes.enough_to_fit(numbers, 3 * 32 * 32) == numbers
    assert len(probes.enough_to_fit(numbers, 3 * 64 * 64)) == 3072
    assert len(probes.enough_to_fit(numbers, 3 * 512 * 512)) * 3 * 512 * 512 * 4 <= 2**30
