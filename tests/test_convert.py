"""Checkpoints from elsewhere: stock autoencoders renamed by hand, as latent-diffusion would have saved them."""

import os
import re
import socket
import sys
import types

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from calotype import cli, unpickle
from calotype.autoencoder import load_autoencoder
from calotype.errors import UserError
from calotype.stage1_vae import ldm_layout

# name in diffusers -> name in latent-diffusion, written down from the two implementations
RENAMES = [
    (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d+)\.attentions\.(\d+)", r"down.\1.attn.\2"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d+)\.resnets\.(\d+)", r"up.\1.block.\2"),
    (r"up_blocks\.(\d+)\.attentions\.(\d+)", r"up.\1.attn.\2"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", r"up.\1.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"group_norm", "norm"),
    (r"to_out\.0", "proj_out"),
    (r"to_([qkv])\.", r"\1."),
]


def stock(widths=(32, 64), z=4, channels=3, blocks=1, attention=(), **more):
    """A small stock autoencoder with random weights everywhere; `attention` numbers the levels that have it."""
    kinds = ["Attn" if i in attention else "" for i in range(len(widths))]
    torch.manual_seed(len(widths) + 10 * blocks + channels)
    vae = AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        down_block_types=[f"{kind}DownEncoderBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)],
        layers_per_block=blocks,
        latent_channels=z,
        **more,
    ).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return vae


def theirs(vae):
    """The weights of a stock autoencoder under latent-diffusion's names."""
    levels = len(vae.config.block_out_channels)
    renamed = {}
    for name, tensor in vae.state_dict().items():
        for pattern, new in RENAMES:
            name = re.sub(pattern, new, name)
        name = re.sub(r"\.up\.(\d+)", lambda found: f".up.{levels - 1 - int(found[1])}", name)
        is_linear = ".attn" in name and tensor.ndim == 2
        renamed[name] = (tensor[:, :, None, None] if is_linear else tensor).contiguous()
    return renamed


def whole_model(weights):
    """What a latent-diffusion training saves: the autoencoder among a U-Net, an average and optimiser states."""
    state = {f"first_stage_model.{name}": tensor for name, tensor in weights.items()}
    state |= {"model.diffusion_model.out.weight": torch.ones(3), "model_ema.decay": torch.tensor(0.9999)}
    state |= {"cond_stage_model.embedding.weight": torch.ones(2, 2), "betas": torch.ones(4)}
    state |= {"first_stage_model.loss.logvar": torch.zeros(()), "first_stage_model.model_ema.decay": torch.zeros(())}
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}
    return {"epoch": 3, "state_dict": state, "optimizer_states": [optimizer], "lr_schedulers": []}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, lambda *_: pytest.fail("the network was asked"))


def converted(file, *more):
    """The autoencoder that the command makes of a file."""
    out = file.parent / f"{file.name} folder"
    assert cli.main(["convert", str(file), "--out", str(out), *more]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert not list(file.parent.glob(".*"))
    return load_autoencoder(out, "--vae")


@torch.no_grad()
def assert_same(vae, other):
    x = torch.rand(2, vae.config.in_channels, 16, 16) * 2 - 1
    ours, original = vae.encode(x).latent_dist, other.encode(x).latent_dist
    assert original.mean.std() > 0.1
    assert_close(ours.mean, original.mean, atol=1e-5, rtol=1e-5)
    assert_close(ours.std, original.std, atol=1e-5, rtol=1e-5)
    assert_close(vae.decode(ours.mean).sample, other.decode(ours.mean).sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"blocks": 2, "widths": (32, 64, 64), "channels": 1},
        {"mid_block_add_attention": False, "widths": (32, 32)},
        {"widths": (32,), "z": 3},
        {"widths": (32, 32, 64, 96), "attention": (1, 3), "blocks": 2, "z": 1},
        {"use_quant_conv": False, "use_post_quant_conv": False, "z": 16},
    ],
    ids=["plain", "grey", "no attention", "one level", "attention in levels", "no quant conv"],
)
def test_every_layout_encodes_and_decodes_as_before(tmp_path, layout):
    vae = stock(**layout)
    save_file(theirs(vae), tmp_path / "kl.safetensors")
    found = converted(tmp_path / "kl.safetensors", "--image-size", "64")
    assert_same(found, vae)
    same = ("block_out_channels", "layers_per_block", "latent_channels", "mid_block_add_attention", "use_quant_conv")
    assert all(list_of(found.config[name]) == list_of(vae.config[name]) for name in same)
    assert (found.config.sample_size, found.config.force_upcast) == (64, False)
    assert str(tmp_path) not in (tmp_path / "kl.safetensors folder/config.json").read_text()


def list_of(value):
    return list(value) if isinstance(value, tuple | list) else value


@pytest.mark.parametrize("form", ["whole model.ckpt", "bare and old.pt", "half.ckpt"])
def test_every_form_of_pickle_is_read(tmp_path, form):
    vae = stock().half().float()
    weights = theirs(vae)
    half = {name: tensor.half() for name, tensor in weights.items()}
    content = {
        "whole model.ckpt": whole_model(weights),
        "bare and old.pt": weights | {"step": 7},
        "half.ckpt": {"state_dict": half | {"loss.discriminator.main.0.weight": torch.ones(2)}},
    }[form]
    torch.save(content, tmp_path / form, _use_new_zipfile_serialization="old" not in form)
    found = converted(tmp_path / form)
    assert_same(found, vae)
    assert found.dtype == torch.float32 and found.config.sample_size == 256


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae."])
def test_a_whole_model_as_safetensors(tmp_path, prefix):
    vae = stock()
    state = whole_model(theirs(vae))["state_dict"]
    state = {name.replace("first_stage_model.", prefix): tensor for name, tensor in state.items()}
    save_file(state, tmp_path / "model.safetensors")
    assert_same(converted(tmp_path / "model.safetensors"), vae)


def test_the_class_that_lightning_notes_is_no_obstacle(tmp_path, monkeypatch):
    """Its checkpoints name the class of a callback, which need not be installed."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    vae = stock()
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
            patch.setitem(sys.modules, name, module)
        note = {"callbacks": {module.ModelCheckpoint: {"best_model_score": torch.tensor(0.3)}}}
        torch.save(whole_model(theirs(vae)) | note, tmp_path / "model.ckpt")
    assert_same(converted(tmp_path / "model.ckpt"), vae)


def refused(capsys, file, *more):
    """The one line that says no, after which nothing has been made."""
    before = sorted(file.parent.iterdir())
    out = file.parent / "out"
    assert cli.main(["convert", str(file), "--out", str(out), *more]) == 2
    message = capsys.readouterr().err
    assert message.startswith("calotype: ") and message.count("\n") == 1 and str(file.parent) in message, message
    assert sorted(file.parent.iterdir()) == before
    return message


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_that_would_run_something_is_refused(tmp_path, capsys, new_format):
    content = {"state_dict": theirs(stock()), "callbacks": Evil(tmp_path / "made")}
    torch.save(content, tmp_path / "kl.ckpt", _use_new_zipfile_serialization=new_format)
    message = refused(capsys, tmp_path / "kl.ckpt")
    assert f"{tmp_path / 'kl.ckpt'} holds more than weights (" in message and ".system); where you trust it" in message


def test_even_the_ordinary_unpickler_could_run_nothing(tmp_path, capsys, monkeypatch):
    """The second lock: the same child without weights_only, which would run anything."""
    torch.save({"state_dict": {}, "callbacks": Evil(tmp_path / "made")}, tmp_path / "kl.ckpt")
    open_lock = unpickle._program().replace("weights_only=True", "weights_only=False")
    assert open_lock != unpickle._program()
    monkeypatch.setattr(unpickle, "_program", lambda: open_lock)
    assert "it tried pickle.find_class" in refused(capsys, tmp_path / "kl.ckpt")
    monkeypatch.setattr(unpickle, "_program", lambda: open_lock.replace("pickle.find_class", "nothing of the kind"))
    assert "it tried os.system" in refused(capsys, tmp_path / "kl.ckpt")


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_a_truncated_file(tmp_path, capsys, suffix):
    file = tmp_path / f"kl.{suffix}"
    (torch.save if suffix == "ckpt" else save_file)(theirs(stock()), file)
    file.write_bytes(file.read_bytes()[:-1000])
    assert f"{file} cannot be read as a checkpoint (" in refused(capsys, file)


def test_files_that_are_no_checkpoint_at_all(tmp_path, capsys):
    (tmp_path / "text.ckpt").write_text("hello\n" * 100)
    assert "cannot be read as a checkpoint" in refused(capsys, tmp_path / "text.ckpt")
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    assert "(TypeError: it is a Tensor, not a table of tensors); fetch" in refused(capsys, tmp_path / "tensor.pth")
    assert "is not there" in refused(capsys, tmp_path / "none.ckpt")
    (tmp_path / "notes.txt").write_text("hello")
    assert "must end in .ckpt, .pt, .pth, .bin or .safetensors" in refused(capsys, tmp_path / "notes.txt")
    (tmp_path / "folder.ckpt").mkdir()
    assert "is a folder" in refused(capsys, tmp_path / "folder.ckpt")


def without(name):
    return lambda weights: {k: v for k, v in weights.items() if k != name}


def with_(**more):
    return lambda weights: weights | {name.replace("__", "."): tensor for name, tensor in more.items()}


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda _: {"fc.weight": torch.ones(2)}, "holds no autoencoder"),
        (lambda _: {"model.diffusion_model.out.weight": torch.ones(2)}, "holds no autoencoder"),
        (lambda _: {"encoder.layers.0.weight": torch.ones(2)}, "lacks encoder.conv_in.weight"),
        (lambda _: stock().state_dict(), "is the weights of a diffusers folder already; give that folder"),
        (with_(quantize__embedding__weight=torch.ones(8, 4)), "is a VQ autoencoder"),
        (without("decoder.conv_in.bias"), "lacks decoder.conv_in.bias;"),
        (without("encoder.mid.attn_1.k.weight"), "lacks encoder.mid.attn_1.k.weight"),
        (without("decoder.up.1.block.1.conv2.weight"), "lacks decoder.up.1.block.1.conv2.weight"),
        (with_(decoder__up__2__block__0__conv1__weight=torch.ones(2)), "holds decoder.up.2.block.0.conv1.weight,"),
        (with_(encoder__conv_out__weight=torch.ones(4, 64, 3, 3)), "encoder.conv_out.weight of 4x64x3x3, not the 8x"),
        (with_(encoder__conv_in__weight=torch.ones(32, 3, 3, 3, 3)), "32x3x3x3x3, which is no 2D convolution"),
        (with_(post_quant_conv__weight=torch.ones(4, 2, 1, 1)), "embed_dim 2 and z_channels 4"),
        (with_(quant_conv__bias=torch.tensor([float("nan")] * 8)), "quant_conv.bias holds values that are not finite"),
        (with_(quant_conv__bias=torch.ones(8, dtype=torch.int32)), "quant_conv.bias is of torch.int32"),
        (lambda _: theirs(stock(widths=(16, 48), norm_num_groups=8)), "a level of 16 channels, no multiple of 32"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, capsys, change, expected):
    save_file(change(theirs(stock())), tmp_path / "kl.safetensors")
    message = refused(capsys, tmp_path / "kl.safetensors")
    assert expected in message and f"FILE {tmp_path / 'kl.safetensors'} " in message and "give" in message, message


def test_flags_that_do_not_fit(tmp_path, capsys):
    file = tmp_path / "kl.safetensors"
    save_file(theirs(stock(widths=(32, 32, 32))), file)
    assert cli.main(["convert", str(file), "--out", str(tmp_path / "out"), "--image-size", "30"]) == 2
    assert "--image-size 30 must be a multiple of 4" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    for out in (tmp_path / "mine", tmp_path / "mine/thesis.txt"):
        assert cli.main(["convert", str(file), "--out", str(out)]) == 2
        assert f"--out {out} exists and is not empty" in capsys.readouterr().err
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert cli.main(["convert", str(file), "--out", str(tmp_path / "empty")]) == 0
    assert load_file(tmp_path / "empty/diffusion_pytorch_model.safetensors")


def test_whoever_gives_a_file_for_a_folder_is_shown_the_way(tmp_path):
    file = tmp_path / "kl.ckpt"
    file.write_text("")
    with pytest.raises(UserError, match=f"--vae {file} is a file; .*: calotype convert {file} --out DIR"):
        load_autoencoder(file, "--vae")


@pytest.mark.parametrize("widths, attention", [((128, 256, 512, 512), ()), ((128, 128, 256, 256, 512), (4,))])
def test_the_published_sizes_are_understood(widths, attention):
    """Every tensor of kl-f8 and kl-f16 in full size, without the memory for it."""
    z = 4 * 4 ** len(attention)
    with torch.device("meta"):
        vae = stock(widths, z=z, blocks=2, attention=attention)
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs(vae).items()}
    found = ldm_layout.understand(shapes)
    assert found.widths == widths and (found.blocks, found.latent, found.channels) == (2, z, 3)
    if not attention:
        assert sum(tensor.numel() for tensor in vae.parameters()) == 83_653_863  # as published for kl-f8
