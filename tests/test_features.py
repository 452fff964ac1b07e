"""Feature networks: those that are always there, those from files, and the small one of one's own pictures."""

import json
import sys

import numpy as np
import onnx
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.testing import assert_close

from calotype import cli, features, own_features
from calotype.errors import UserError
from calotype.features import CheapKid, FeatureNetwork, SetDistance, encoder, standardised
from calotype.metrics import kernel_distance
from calotype.sheet import read_sheet

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_weights(tmp_path, monkeypatch):
    """Empty caches, whatever this machine has, and no way out."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse_download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub/hub/checkpoints"


def refuse_download(*_, **__):
    raise OSError("no network")


def noise(n=6, channels=3, side=16, seed=0):
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_equal_sets_have_no_distance_and_any_function_will_do():
    x = noise(40)
    network = FeatureNetwork("colour", lambda x: x.mean((2, 3)), "mean colour")
    for chosen, width in ((network, 3), (features.gradients(), 6 * 3 * 2)):
        same, apart = (SetDistance(chosen) for _ in range(2))
        same.add(x, x)
        apart.add(x, (x + 0.5).clamp(-1, 1))
        frechet, kernel, d = same.figures()
        assert frechet == pytest.approx(0, abs=1e-6) and d == width
        assert abs(kernel) < abs(apart.figures()[1]) and apart.figures()[0] > 100 * frechet + 1e-4


def test_pooled_gradients_of_a_flat_picture_are_nothing():
    found = features.gradients().features
    assert found(torch.full((2, 1, 12, 12), 0.3)).shape == (2, 12)
    assert found(torch.full((2, 1, 12, 12), 0.3)).abs().max() < 2e-3
    ramp = torch.linspace(-1, 1, 12).expand(1, 1, 12, 12)
    assert found(ramp)[0, 0] == pytest.approx(2 / 12, abs=1e-5)  # the mean horizontal step; the last is 0


def test_the_layout_tells_where_something_is():
    x = torch.full((3, 1, 32, 32), -1.0)
    x[0, :, 4:12, 4:12] = x[1, :, 5:13, 4:12] = x[2, :, 20:28, 20:28] = 1
    f = features.layout().features(x)
    assert 4 * (f[0] - f[1]).norm() < (f[0] - f[2]).norm()


def test_inception_comes_from_the_hub_folder_alone(no_weights):
    with pytest.raises(UserError, match="--allow-download") as told:
        features.build("inception", False, CPU)
    assert str(no_weights) in str(told.value)
    with pytest.raises(UserError, match="no network"):
        features.build("inception", True, CPU)
    no_weights.mkdir(parents=True, exist_ok=True)
    file = no_weights / "inception_v3_google-0cc3c7bd.pth"
    file.write_bytes(b"not weights")
    with pytest.raises(UserError, match="is damaged"):
        features.build("inception", False, CPU)

    from torchvision.models import inception_v3

    torch.manual_seed(0)
    stock = inception_v3(weights=None, init_weights=False).eval()
    torch.save(stock.state_dict(), file)
    before = torch.get_rng_state()
    network = features.build("inception", False, CPU)
    assert torch.equal(before, torch.get_rng_state())
    x = noise(3, side=299)
    kept = []
    stock.avgpool.register_forward_hook(lambda *call: kept.append(call[2].flatten(1)))
    with torch.no_grad():
        stock(x)
        assert_close(network.features(x), kept[0])
        assert network.features(x[:, :1, ::16, ::16]).shape == (3, 2048)
    assert network.name == "inception" and "torchvision" in network.about and network.identity


# Autoencoders


def small_vae(seed=0, channels=3):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoencoderKL(
            channels,
            channels,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            norm_num_groups=4,
        ).eval()


@torch.no_grad()
def test_the_encoder_s_innermost_maps_are_pooled():
    vae, x = small_vae(), noise()
    network = encoder(vae)
    maps = vae.encoder.conv_in(x)
    for block in vae.encoder.down_blocks:
        maps = block(maps)
    maps = vae.encoder.mid_block(maps)
    expected = torch.cat([maps.mean((2, 3)), maps.flatten(2).std(2, correction=0)], dim=1)
    assert_close(network.features(x), expected)
    assert network.name == "encoder" and network.features(x[:, :1]).shape == (6, 32)
    assert network.features(noise(2, side=1)).shape == (2, 32)  # padded, as the autoencoder does
    assert network.identity == encoder(small_vae()).identity != encoder(small_vae(1)).identity


def test_the_cheap_kid_grows_with_the_damage_and_keeps_its_reference():
    vae, x = small_vae(), noise(160)
    kid = CheapKid(vae, x[:80])
    calls = []
    vae.encoder.register_forward_hook(lambda *call: calls.append(len(call[1][0])))
    clean, damaged = kid.of(x[80:]), kid.of(x[80:] * 0.5)
    assert sum(calls) == 160 and abs(clean) < 0.1 * damaged
    by = encoder(vae).features(x[:80])
    f = [standardised(encoder(vae).features(part), by).detach() for part in (x[:80], x[80:])]
    assert clean == pytest.approx(kernel_distance(*f), rel=1e-3, abs=1e-6)


def test_standardised_features_have_a_unit_and_constant_ones_do_not_explode():
    f = torch.cat([100 + 7 * noise(50).flatten(1)[:, :4], torch.ones(50, 1)], dim=1)
    found = standardised(f, f)
    assert_close(found.std(0)[:4], torch.ones(4))
    assert found.mean(0).abs().max() < 1e-5
    assert standardised(f + 1, f)[:, 4].abs().max() < 100


# Files


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_a_folder_of_diffusers_gives_its_encoder(tmp_path, kind):
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    counts = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    vae = small_vae() if kind == "kl" else AutoencoderTiny(**blocks, **counts).eval()
    vae.save_pretrained(tmp_path / "given")
    network = features.build(str(tmp_path / "given"), False, CPU)
    x = noise()
    with torch.no_grad():
        assert_close(network.features(x), encoder(vae).features(x))
    assert network.name == "given" and type(vae).__name__ in network.about and len(network.identity) == 64


def transformer(folder, pooled):
    transformers = pytest.importorskip("transformers", reason="NOT tried: transformers is missing")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8
    )
    net = transformers.ViTModel(config, add_pooling_layer=pooled).eval()
    net.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    return net


@pytest.mark.parametrize("pooled", [True, False])
def test_a_folder_of_transformers_gives_what_it_pools(tmp_path, pooled):
    net = transformer(tmp_path / "vit", pooled)
    before = torch.get_rng_state()
    network = features.build(str(tmp_path / "vit"), False, CPU)
    assert torch.equal(before, torch.get_rng_state())
    x = noise()
    with torch.no_grad():
        output = net(pixel_values=x * 2)  # (x / 2 + 0.5 - 0.5) / 0.25
        expected = output.pooler_output if pooled else output.last_hidden_state.mean(1)
        assert_close(network.features(x), expected)
        assert network.features(noise(2, 1, 40)).shape == (2, 8)
    assert ("mean token" in network.about) != pooled


def test_a_folder_that_lacks_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    transformer(tmp_path / "vit", True)
    file = tmp_path / "vit/model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if "layernorm_after" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="has missing tensors: .*layernorm_after"):
        features.build(str(tmp_path / "vit"), False, CPU)


def test_dinov2_is_not_fetched_unasked():
    pytest.importorskip("transformers", reason="NOT tried: transformers is missing")
    with pytest.raises(UserError, match="--features dinov2 needs .*--allow-download"):
        features.build("dinov2", False, CPU)


def write_onnx(file, batch="n", channels=3, height="h", width="w"):
    """A convolution to 5 maps and a rectifier."""
    weight = np.random.default_rng(0).normal(size=(5, channels, 3, 3)).astype(np.float32)
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Relu", ["c"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, channels, height, width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(file))
    return lambda x: nn.functional.conv2d(x, torch.from_numpy(weight)).relu().mean((2, 3))


def test_an_onnx_file_takes_pictures_of_its_size(tmp_path):
    pytest.importorskip("onnxruntime", reason="NOT tried: onnxruntime is missing")
    net = write_onnx(tmp_path / "free.onnx")
    x = noise(7)
    network = features.build(str(tmp_path / "free.onnx"), False, CPU)
    assert_close(network.features(x), net(x), atol=1e-5, rtol=1e-5)
    assert network.name == "free.onnx" and len(network.identity) == 64

    net = write_onnx(tmp_path / "fixed.onnx", 3, 1, 8, 10)  # a batch of three at a time, grey, 8x10
    small = nn.functional.interpolate(x.mean(1, keepdim=True), (8, 10), mode="bilinear", antialias=True)
    found = features.build(str(tmp_path / "fixed.onnx"), False, CPU)
    assert_close(found.features(x), net(small), atol=1e-5, rtol=1e-5)
    assert found.identity != network.identity


def test_what_is_no_network_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "torn.onnx").write_bytes(b"no network")
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/config.json").write_text('{"model_type": "nothing known"}')
    for name in ("torn.onnx", "empty", "odd", "nowhere.onnx"):
        with pytest.raises(UserError, match=f"--features .*{name}") as told:
            features.build(str(tmp_path / name), False, CPU)
        assert "\n" not in str(told.value)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnxruntime; pip install 'calotype\[eval\]'"):
        features.build(str(tmp_path / "torn.onnx"), False, CPU)


# One's own


@pytest.fixture(scope="module")
def sheet(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("sheet")
    assert cli.main(["data", str(pictures), "--image-size", "16", "--val", "0.3", "--out", str(out)]) == 0
    return read_sheet(out / "data.json")


def test_one_s_own_network_is_trained_once_and_kept(sheet, tmp_path, capsys):
    before = torch.get_rng_state()
    own = own_features.own(sheet, tmp_path / "own", "fp32")
    assert torch.equal(before, torch.get_rng_state())
    assert "trained in" in capsys.readouterr().out and "held-out pictures" in own.network.about
    again = own_features.own(sheet, tmp_path / "own", "fp32")
    assert "trained in" not in capsys.readouterr().out
    anew = own_features.own(sheet, tmp_path / "other", "fp32")
    x = noise()
    for other in (again, anew):
        assert torch.equal(own.network.features(x), other.network.features(x))
        assert own.network.identity == other.network.identity
    assert own.network.features(x).shape == (6, 128) and own.classes == sheet.class_names


def test_pictures_that_changed_make_it_anew(sheet, tmp_path, capsys):
    from dataclasses import replace

    own_features.own(sheet, tmp_path / "own", "fp32")
    capsys.readouterr()
    own_features.own(replace(sheet, fingerprint="another"), tmp_path / "own", "fp32")
    assert "trained in" in capsys.readouterr().out


def test_one_s_own_network_knows_the_colours(sheet, tmp_path):
    from calotype.data import Pictures

    val = Pictures(sheet, "val")
    own = own_features.own(sheet, tmp_path / "own", "fp32")
    seen = own.classify(iter([torch.stack([val[i] for i in range(len(val))])]))
    share = (seen == val.labels).double().mean().item()
    assert share > 0.8 and f"{share:.1%} of {len(val)} held-out" in own.network.about


def test_without_classes_it_finds_pictures_again(sheet, tmp_path):
    from dataclasses import replace

    own = own_features.own(replace(sheet, classes={}), tmp_path / "own", "fp32")
    assert own.classes == [] and "again by another view" in own.network.about
    share = float(own.network.about.split("finds ")[1].split("%")[0])
    assert share > 15  # a guess finds one in the number of held-out pictures


def test_barlow_twins_is_zero_for_equal_views_without_a_correlation():
    z = torch.linalg.qr(torch.randn(64, 9, generator=torch.Generator().manual_seed(0)).double())[0]
    z = torch.linalg.qr(torch.cat([torch.ones(64, 1).double(), z], dim=1))[0][:, 1:]  # and without a mean
    equal, apart = own_features.barlow_twins(z, z), own_features.barlow_twins(z, z.roll(1, 1))
    assert equal < 0.01 and apart > 8


def test_large_pictures_are_made_smaller_and_keep_their_shape():
    assert own_features.shrunk(torch.zeros(1, 1, 128, 96)).shape == (1, 1, 64, 48)
    assert own_features.shrunk(torch.zeros(1, 1, 20, 64)).shape == (1, 1, 20, 64)
