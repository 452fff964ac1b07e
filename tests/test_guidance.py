"""Guidance in closed form: networks that are exact for Gaussians, and counts of evaluations."""

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from models import FLOW, pipeline, tiny_unet, tiny_vae
from torch.testing import assert_close

from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline
from calotype.pipeline.order import Order
from calotype.pipeline.prediction import Conditions, guide
from calotype.pipeline.samplers import make_scheduler

MEANS, STD = (0.2, 0.8, 0.5), 0.3  # of two classes, and without a class
CHAIN = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


class Exact(UNet2DModel):
    """The best network for pixels that are N(mean of the class, STD^2), and a count of the latents it has seen."""

    @classmethod
    def of(cls, means, predicted="flow_prediction"):
        small = {"block_out_channels": (4,), "norm_num_groups": 2, "layers_per_block": 1, "add_attention": False}
        blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        unet = cls(sample_size=8, in_channels=4, out_channels=4, **small, **blocks)
        unet.means, unet.predicted, unet.seen = torch.tensor(means), predicted, 0
        return unet

    def forward(self, z, t, class_labels=None):
        self.seen += len(z)
        if self.predicted == "flow_prediction":
            alpha, sigma = 1 - t / 1000, t / 1000
        else:
            alpha_bar = make_scheduler(CHAIN, "ddim").alphas_cumprod[int(t)]
            alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        mean = self.means[0] if class_labels is None else self.means[class_labels][:, None, None, None]
        variance = (alpha * STD) ** 2 + sigma**2
        eps = sigma / variance * (z - alpha * mean)
        x0 = mean + alpha * STD**2 / variance * (z - alpha * mean)
        kinds = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0, "flow_prediction": eps - x0}
        return UNet2DOutput(sample=kinds[self.predicted])


def exact_pipeline(predicted="flow_prediction", means=MEANS, guide=None):
    names = {"0": "low", "1": "high"} if len(means) > 1 else None
    config = FLOW if predicted == "flow_prediction" else CHAIN | {"prediction_type": predicted}
    guide = None if guide is None else Exact.of(guide, predicted)
    unet, scheduler = Exact.of(means, predicted), make_scheduler(config, "dpm++2m")
    pipe = LatentDiffusionPipeline(tiny_vae(), unet, scheduler, id2label=names, guide=guide, default_steps=20)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PREDICTED = ["flow_prediction", "epsilon", "v_prediction", "sample"]


@pytest.mark.parametrize("predicted", PREDICTED)
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_guidance_moves_the_gaussian_where_it_should(predicted, scale):
    """Of Gaussians with the same deviation, weak + w (strong - weak) is the Gaussian with such a mean."""
    z = exact_pipeline(predicted)("high", 60, guidance_scale=scale, output_type="latent").images
    assert abs(z.mean() - (MEANS[2] + scale * (MEANS[1] - MEANS[2]))) < 0.03
    assert abs(z.std() / STD - 1) < 0.04


@pytest.mark.parametrize("predicted", PREDICTED)
@pytest.mark.parametrize("means", [MEANS, (0.8,)], ids=["classes", "no classes"])
def test_autoguidance_leads_away_from_the_guide(predicted, means):
    pipe = exact_pipeline(predicted, means, guide=(0.1, 0.6, 0.3) if len(means) > 1 else (0.6,))
    z = pipe("high" if len(means) > 1 else None, 60, guidance_scale=2.5, output_type="latent").images
    assert abs(z.mean() - (0.6 + 2.5 * (0.8 - 0.6))) < 0.03
    assert abs(z.std() / STD - 1) < 0.04


def test_without_autoguidance_a_guide_is_not_asked():
    pipe = exact_pipeline(guide=(5.0, 5.0, 5.0))
    z = pipe("high", 60, guidance_scale=2.0, autoguidance=False, output_type="latent").images
    assert abs(z.mean() - 1.1) < 0.03 and pipe.guide.seen == 0
    one = pipe("high", 4, guidance_scale=1.0, output_type="latent").images
    assert pipe.guide.seen == 0
    assert_close(one, exact_pipeline()("high", 4, guidance_scale=1.0, output_type="latent").images)


@pytest.mark.parametrize("guide", [None, (0.0, 0.0, 0.0)], ids=["labels", "guide"])
def test_outside_the_interval_a_step_is_one_evaluation(guide):
    pipe = exact_pipeline(guide=guide)
    order = {"num_inference_steps": 10, "output_type": "latent", "guidance_scale": 2.0, "sampler": "euler"}

    def seen(**more):
        for network in filter(None, (pipe.unet, pipe.guide)):
            network.seen = 0
        pipe("high", 3, **order | more)
        return sum(network.seen for network in filter(None, (pipe.unet, pipe.guide))) / 3

    assert seen() == 20 and seen(guidance_scale=1.0) == 10
    assert seen(guidance_interval=(0.25, 0.75)) == 15  # of ten times from 0.999 down to 0.1 five are inside
    assert seen(guidance_interval=(0.0, 0.05)) == 10


def test_inside_the_interval_guidance_is_as_ever():
    pipe = exact_pipeline()
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    told = Conditions(labels=torch.tensor([0, 1])), Conditions(labels=torch.tensor([2, 2]))
    half = Order(guidance_scale=3.0, guidance_interval=(0.0, 0.5))
    everywhere, nowhere = Order(guidance_scale=3.0), Order(guidance_scale=1.0)
    for t, same in ((400.0, everywhere), (500.0, everywhere), (501.0, nowhere)):
        t = torch.tensor(t)
        assert_close(pipe.predict(z, t, *told, half), pipe.predict(z, t, *told, same))


def test_rescaling_is_that_of_diffusers_and_of_the_paper():
    g = torch.Generator().manual_seed(0)
    strong, weak = torch.randn(3, 4, 5, 6, generator=g), torch.randn(3, 4, 5, 6, generator=g)
    guided = weak + 4 * (strong - weak)
    assert_close(guide(strong, weak, 4.0, 0.7), rescale_noise_cfg(guided, strong, guidance_rescale=0.7))
    assert_close(guide(strong, weak, 4.0, 1.0).std((1, 2, 3)), strong.std((1, 2, 3)))
    assert_close(guide(strong, weak, 4.0), guided)


def test_a_label_for_some_pictures_guides_these_alone():
    pipe = exact_pipeline()
    z = pipe(["high", None], 2, guidance_scale=2.0, output_type="latent").images
    alone = pipe(None, 1, seed=1, guidance_scale=2.0, output_type="latent").images
    assert_close(z[1:], alone)


@pytest.mark.parametrize(
    "order, message",
    [
        ({"guidance_interval": (0.6, 0.4)}, r"guidance_interval=\(0.6, 0.4\)"),
        ({"guidance_interval": (0, 400)}, r"guidance_interval=\(0, 400\)"),
        ({"guidance_rescale": 1.5}, "guidance_rescale=1.5"),
        ({"autoguidance": True}, "autoguidance=True: this model has no guide"),
        ({"sampler": "flow-dpm"}, "sampler='flow-dpm'"),
        ({"fast": True}, "calotype distill"),
        ({"decoder": "tiny"}, "calotype distill"),
        ({"decoder": "small"}, "decoder='small'"),
    ],
)
def test_errors_name_the_argument(order, message):
    with pytest.raises(ValueError, match=message):
        pipeline(tiny_unet())(None, 1, **order)
