import pytest
import torch
from torch.testing import assert_close

from calotype.errors import UserError
from calotype.stage1_vae.corruption import parse_corruption

X = torch.full((40, 3, 16, 16), 0.25)


def test_gaussian_noise_has_the_wished_deviation():
    noise = parse_corruption("gaussian:0.3")(X, 0, 0, "train") - X
    assert_close(noise.std(), torch.tensor(0.3), atol=0.005, rtol=0)
    assert abs(noise.mean()) < 0.005


@pytest.mark.parametrize("kind, values", [("mask", {0.0}), ("salt", {-1.0, 1.0})])
def test_the_wished_share_of_pixels_is_replaced_in_all_channels(kind, values):
    damaged = parse_corruption(f"{kind}:0.5")(X, 0, 0, "train")
    changed = damaged != X
    assert abs(changed.float().mean() - 0.5) < 0.02
    assert (changed[:, :1] == changed).all()
    assert set(damaged[changed].tolist()) == values


@pytest.mark.parametrize("text", ["gaussian:0.3", "mask:0.5", "salt:0.2"])
def test_damage_follows_from_the_position(text):
    damage = parse_corruption(text)
    whole = damage(X, 1, 100, "train")
    assert torch.equal(whole[10:20], damage(X[10:20], 1, 110, "train"))
    assert not torch.equal(whole, damage(X, 1, 100, "validation"))


@pytest.mark.parametrize("text", ["gaussian", "gaussian:x", "mask:1.5", "salt:0", "blur:1", "gaussian:-1"])
def test_other_words_are_refused(text):
    with pytest.raises(UserError, match="--corruption"):
        parse_corruption(text)
