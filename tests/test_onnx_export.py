import subprocess
import sys

import onnxruntime
import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from models import pipeline, text_parts, text_unet, tiny_unet, tiny_vae
from torch import nn
from torch.testing import assert_close

from calotype import cli
from calotype.autoencoder import decode, posterior
from calotype.errors import UserError
from calotype.pipeline import onnx_export

pytestmark = pytest.mark.filterwarnings("ignore")


def run(file, **inputs):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(x) for x in session.run(None, {name: x.numpy() for name, x in inputs.items()})]


def close(a, b):
    assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 3, 70])
@torch.no_grad()
def test_a_model_of_classes_in_onnxruntime_is_the_model_in_diffusers(of_classes, count):
    pipe, folder = of_classes
    z, x, t = torch.randn(count, 4, 8, 8), torch.rand(count, 3, 16, 16) * 2 - 1, torch.rand(count) * 999
    labels = torch.arange(count) % 3  # the last one is the null class
    close(run(folder / "decoder.onnx", z=z)[0], pipe.vae.decode(z).sample)
    mean, std = run(folder / "encoder.onnx", x=x)
    close(mean, pipe.vae.encode(x).latent_dist.mean)
    close(std, pipe.vae.encode(x).latent_dist.std)
    close(run(folder / "unet.onnx", z=z, t=t, labels=labels)[0], pipe.unet(z, t, class_labels=labels).sample)


@pytest.fixture(scope="module")
def of_classes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    pipe = pipeline(tiny_unet(classes=2), id2label={"0": "red", "1": "blue"})
    onnx_export.export_onnx(pipe, folder)
    return pipe, folder


def test_files_hold_everything_and_no_path_of_this_machine(of_classes):
    _, folder = of_classes
    assert sorted(file.name for file in folder.iterdir()) == ["decoder.onnx", "encoder.onnx", "unet.onnx"]
    for file in folder.iterdir():
        assert not any(word in file.read_bytes() for word in (b"site-packages", b"onnx_export.py", b"stack_trace"))


@torch.no_grad()
def test_vq_decodes_the_nearest_code_and_encodes_without_quantising(tmp_path):
    vae = tiny_vae(VQModel).eval()
    onnx_export.export_parts(onnx_export.autoencoder_parts(vae, (4, 8, 8), (16, 16)), tmp_path)
    for count in (1, 3):
        x = torch.rand(count, 3, 16, 16) * 2 - 1
        z = vae.encode(x).latents
        close(run(tmp_path / "encoder.onnx", x=x)[0], z)
        (made,) = run(tmp_path / "decoder.onnx", z=z)
        close(made, vae.decode(z).sample)
        close(run(tmp_path / "decoder.onnx", z=vae.quantize(z)[0])[0], made)


@torch.no_grad()
def test_a_small_codebook_takes_any_batch(tmp_path):
    """torch.cdist goes different ways for few and for many vectors; an exporter must not settle for one of them."""
    torch.manual_seed(0)
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    levels |= {"block_out_channels": (8, 8), "norm_num_groups": 4}
    vae = VQModel(**levels, latent_channels=4, num_vq_embeddings=16).eval()
    onnx_export.export_parts(onnx_export.autoencoder_parts(vae, (4, 4, 4), (8, 8))[:1], tmp_path)
    for count in (1, 2, 70):
        z = torch.randn(count, 4, 4, 4) / 16
        close(run(tmp_path / "decoder.onnx", z=z)[0], vae.decode(z).sample)


@torch.no_grad()
def test_twelve_pixels_are_two_numbers(tmp_path):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 5, "up_block_types": ("UpDecoderBlock2D",) * 5}
    vae = AutoencoderKL(1, 1, **blocks, block_out_channels=(8,) * 5, latent_channels=2, norm_num_groups=4).eval()
    onnx_export.export_parts(onnx_export.autoencoder_parts(vae, (2, 1, 1), (12, 12)), tmp_path)
    x = torch.rand(3, 1, 12, 12) * 2 - 1
    mean, std = run(tmp_path / "encoder.onnx", x=x)
    (made,) = run(tmp_path / "decoder.onnx", z=mean)
    assert mean.shape == (3, 2, 1, 1) and made.shape == x.shape
    moments = posterior(vae, x)
    close(mean, moments["mean"]), close(std, moments["std"]), close(made, decode(vae, moments["mean"], (12, 12)))


@torch.no_grad()
def test_networks_of_text_and_of_given_pictures(tmp_path):
    text = pipeline(text_unet(), **text_parts())
    inpaint = pipeline(tiny_unet(9), condition="inpaint")
    z, t = torch.randn(2, 4, 8, 8), torch.tensor([800.0, 20.0])
    onnx_export.export_parts([onnx_export.unet_part(text)], tmp_path / "text")
    words = text.encode_prompts(["a blue disc", None])
    close(
        run(tmp_path / "text/unet.onnx", z=z, t=t, text=words)[0], text.unet(z, t, encoder_hidden_states=words).sample
    )
    onnx_export.export_parts([onnx_export.unet_part(inpaint)], tmp_path / "inpaint")
    more = torch.randn(2, 9, 8, 8)
    close(run(tmp_path / "inpaint/unet.onnx", z=more, t=t)[0], inpaint.unet(more, t).sample)


class Liar(nn.Module):
    """Another network while it is exported than afterwards."""

    def __init__(self, error):
        super().__init__()
        self.weight, self.error = nn.Parameter(torch.ones(1)), error

    def forward(self, x):
        return x * self.weight + (self.error if torch.compiler.is_exporting() else 0.0)


def test_what_differs_from_torch_is_refused(tmp_path):
    for error in (0.01, float("nan")):
        part = onnx_export.Part("liar", Liar(error), {"x": torch.zeros(3, 2)}, ["y"])
        with pytest.raises(UserError, match="liar.onnx differs from torch by (1.0e-02|nan), more than 0.001"):
            onnx_export.export_parts([part], tmp_path)


def test_a_missing_extra_is_one_line(monkeypatch):
    monkeypatch.setattr(onnx_export, "_NEEDED", ("onnx", "no_such_package"))
    with pytest.raises(UserError, match=r"^--onnx needs no_such_package; pip install 'calotype\[export\]' first.$"):
        onnx_export.refuse_missing_extra("--onnx")
    monkeypatch.undo()
    onnx_export.refuse_missing_extra("--onnx")


def test_the_command_writes_them_into_the_model_folder(finished, tmp_path, capsys):
    assert cli.main(["export", "--run", str(finished), "--out", str(tmp_path / "model"), "--onnx"]) == 0
    assert capsys.readouterr().out.count("from torch") == 3
    stranger = "import sys, onnxruntime; onnxruntime.InferenceSession(sys.argv[1]); assert 'torch' not in sys.modules"
    for name in ("decoder", "encoder", "unet"):
        file = tmp_path / "model" / "onnx" / f"{name}.onnx"
        subprocess.run([sys.executable, "-c", stranger, file], check=True)
