import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from torch.testing import assert_close

from calotype.stage1_vae.folding import RunningStatistics, Statistics, ensure_quant_convs, fix_variance, fold

TINY = {
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 3,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}
STATISTICS = Statistics(torch.tensor([0.5, -2.0, 7.0]).double(), torch.tensor([0.1, 3.0, 20.0]).double())


def x():
    return torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def kl(**more):
    torch.manual_seed(0)
    return AutoencoderKL(**TINY, **more).eval()


@torch.no_grad()
def test_kl_latents_move_and_pictures_stay():
    vae = kl()
    before = vae.encode(x()).latent_dist
    decoded = vae.decode(before.mean).sample
    fold(vae, STATISTICS)
    after = vae.encode(x()).latent_dist
    m, s = (v.float()[:, None, None] for v in STATISTICS)
    assert_close(after.mean, (before.mean - m) / s, atol=1e-5, rtol=1e-5)
    assert_close(after.std, before.std / s, atol=1e-6, rtol=1e-5)
    assert_close(vae.decode(after.mean).sample, decoded, atol=1e-5, rtol=1e-5)
    assert vae.config.scaling_factor == 1.0


@torch.no_grad()
def test_vq_keeps_its_codes_and_pictures():
    torch.manual_seed(0)
    vae = VQModel(**TINY, num_vq_embeddings=32, vq_embed_dim=3).eval()
    vae.quantize.embedding.weight.normal_(0, 0.3)
    h = vae.encode(x()).latents
    numbers, decoded = vae.quantize(h)[2][2], vae.decode(h).sample
    assert numbers.unique().numel() > 4
    fold(vae, STATISTICS)
    h = vae.encode(x()).latents
    assert torch.equal(vae.quantize(h)[2][2], numbers)
    assert_close(vae.decode(h).sample, decoded, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_folding_the_measured_statistics_gives_unit_variance():
    vae = kl()
    running = RunningStatistics()
    for part in x().split(2):
        running.add(vae.encode(part).latent_dist.mean)
    fold(vae, running.result())
    z = vae.encode(x()).latent_dist.mean
    assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    assert_close(z.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)


def test_statistics_are_those_of_sampled_latents():
    mean = torch.randn(4, 3, 5, 5)
    running = RunningStatistics()
    running.add(mean[:1], torch.tensor(0.25))
    running.add(mean[1:], torch.tensor(0.25))
    found = running.result()
    expected = (mean.double().var((0, 2, 3), correction=0) + 0.25).sqrt()
    assert_close(found.std, expected)
    assert_close(found.mean, mean.double().mean((0, 2, 3)))


@torch.no_grad()
@pytest.mark.parametrize("log_variance", [-30.0, -4.6])
def test_a_fixed_variance_is_what_the_encoder_reports(log_variance):
    vae = kl()
    mean = vae.encode(x()).latent_dist.mean
    fix_variance(vae, log_variance)
    after = vae.encode(x()).latent_dist
    assert_close(after.mean, mean)
    assert torch.equal(after.logvar, torch.full_like(mean, log_variance))


@torch.no_grad()
def test_an_autoencoder_without_quant_convolutions_gets_a_neutral_pair():
    vae = kl(use_quant_conv=False, use_post_quant_conv=False)
    before = vae.encode(x()).latent_dist
    decoded = vae.decode(before.mean).sample
    ensure_quant_convs(vae)
    assert_close(vae.encode(x()).latent_dist.mean, before.mean)
    assert_close(vae.decode(before.mean).sample, decoded)
    assert vae.config.use_quant_conv and vae.config.use_post_quant_conv
