"""Students of few steps and tiny decoders: against exact solutions, stock schedulers, and themselves."""

import json
import os
import signal

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

from calotype import checkpoint, cli, shapes
from calotype.pipeline import LatentDiffusionPipeline
from calotype.pipeline.model_folder import load_scheduler
from calotype.stage2_diffusion.config import DiffusionSettings
from calotype.stage2_diffusion.consistency import Consistency, few_step_sampler
from calotype.stage2_diffusion.denoiser import Given, Prediction
from calotype.stage2_diffusion.objectives import Objective

OBJECTIVES = ["flow", "v", "epsilon", "x0"]
MEAN, STD = 0.7, 0.5
STOCK = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod


def objective(name):
    return Objective(DiffusionSettings(out="", latents="", objective=name))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_student_s_sampler_comes_back_from_its_folder(name, tmp_path):
    """Strictly read, as a model folder is; its lowest log-SNR is minus infinity."""
    sampler = few_step_sampler(objective(name))
    sampler.save_pretrained(tmp_path)
    again = load_scheduler(tmp_path, "MODEL")
    ours, theirs = ({k: v for k, v in s.config.items() if k[0] != "_"} for s in (sampler, again))
    assert ours == theirs and theirs["lambda_min_clipped"] == -float("inf")


def scales(name, t):
    """alpha and sigma at times t (B,), by the flow's definition or stock diffusers' table."""
    t = t.double()
    if name == "flow":
        return 1 - t / 1000, t / 1000
    low = t.long().clamp_max(998)
    alpha_bar = STOCK[low].double() * (1 - (t - low)) + STOCK[low + 1].double() * (t - low)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


class Exact:
    """The perfect network for latents that are N(MEAN, STD^2) each."""

    def __init__(self, name):
        self.name = name

    def __call__(self, z_t, t, given):
        alpha, sigma = (each[:, None, None, None] for each in scales(self.name, t))
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        z = MEAN + gain * (z_t - alpha * MEAN)
        eps = (z_t - alpha * z) / sigma
        said = {"flow": eps - z, "v": alpha * eps - sigma * z, "epsilon": eps, "x0": z}[self.name]
        return Prediction(said)


def on_the_curve(u, c):
    """The solution of the ODE at u (B,): the quantile c (B, ...) of the Gaussian that y is at u."""
    u = u.double()[:, None, None, None]
    return (1 - u) * MEAN + ((1 - u) ** 2 * STD**2 + u**2).sqrt() * c


def told(name, u, z, eps):
    """A prediction that means these clean latents and this noise at u, a number."""
    norm = 1.0 if name == "flow" else ((1 - u) ** 2 + u**2) ** 0.5
    alpha, sigma = (1 - u) / norm, u / norm
    return {"flow": eps - z, "v": alpha * eps - sigma * z, "epsilon": eps, "x0": z}[name]


class Consistent:
    """The perfect student: at each point it names the end of the exact curve through it."""

    def __init__(self, name, consistency):
        self.name, self.u, self.t = name, consistency.u.double(), consistency.t

    def __call__(self, z_t, t, given):
        u = torch.stack([self.u[:-1][self.t == each][0] for each in t])[:, None, None, None]
        norm = 1.0 if self.name == "flow" else ((1 - u) ** 2 + u**2).sqrt()
        y = z_t * norm
        z = MEAN + STD * (y - (1 - u) * MEAN) / ((1 - u) ** 2 * STD**2 + u**2).sqrt()
        return Prediction(told(self.name, u, z, (y - (1 - u) * z) / u))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_teachers_step_stays_on_the_exact_curve(name):
    """For Gaussian latents the curves are known; what the perfect student says after a step is where they end."""
    errors = []
    for steps in (24, 96):
        consistency = Consistency(objective(name), steps)
        i = torch.arange(steps)
        c = torch.tensor([-2.0, -0.5, 0.3, 1.7]).double().reshape(1, 4, 1, 1).expand(steps, 4, 1, 1)
        y = on_the_curve(consistency.u[i], c)
        student = Consistent(name, consistency)
        torch.testing.assert_close(consistency.clean(student, y, i, Given()), MEAN + STD * c, atol=2e-5, rtol=0)
        target = consistency.target(student, Exact(name), y, i, Given())
        errors.append((target - (MEAN + STD * c)).abs().mean().item())
    assert errors[0] < 0.02
    assert errors[1] < errors[0] / 6  # a step of a first-order method errs by the square of its length


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_perfect_student_draws_the_latents_distribution_with_the_saved_sampler(name, tmp_path):
    few_step_sampler(objective(name)).save_pretrained(tmp_path)
    consistency = Consistency(objective(name), 24)
    student, first = Consistent(name, consistency), consistency.u[:1]
    noise = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    for steps in (1, 2):
        scheduler = diffusers.DPMSolverMultistepScheduler.from_pretrained(tmp_path)
        scheduler.set_timesteps(steps)
        z_t = on_the_curve(first, noise) * sum(consistency.coordinates.scales(first.double()))
        generator = torch.Generator().manual_seed(1)
        for t in scheduler.timesteps:
            said = student(z_t, t.expand(len(z_t)), Given()).value
            z_t = scheduler.step(said, t, z_t, generator=generator).prev_sample
        assert z_t.mean().item() == pytest.approx(MEAN, abs=0.02)
        assert z_t.std().item() == pytest.approx(STD, rel=0.05)  # some of the noise is kept, not all drawn anew
        if steps == 1:  # and each one is the end of its own curve
            torch.testing.assert_close(z_t, MEAN + STD * noise, atol=2e-3, rtol=0, check_dtype=False)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_noise_is_where_a_drawing_begins_and_the_end_is_left_alone(name):
    consistency = Consistency(objective(name), 12)
    z, eps = torch.randn(2, 13, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    i = torch.arange(12)
    y = consistency.point(z[:12], eps[:12], i)
    norm = sum(consistency.coordinates.scales(consistency.u[i]))[:, None, None, None]
    torch.testing.assert_close((norm * y)[0], eps[0])
    u = consistency.u[i][1:, None, None, None]
    torch.testing.assert_close(y[1:], (1 - u) * z[1:12] + u * eps[1:12])
    end = consistency.clean(lambda *_: Prediction(torch.full_like(z[:1], 9.0)), z[:1], torch.tensor([12]), Given())
    assert torch.equal(end, z[:1])


SHORT = "--batch-size 8 --precision fp32 --validations 2 --warmup-steps 3 --steps 6 --decoder-steps 6".split()


def distill(run, out, *more):
    return ["distill", str(run), *SHORT, "--out", str(out), *more]


def weights(out):
    return [checkpoint.weights_hash(out / name) for name in ("student", "tiny_decoder")]


def test_interrupted_in_both_parts_it_ends_with_the_same_bits(finished, tmp_path, monkeypatch, capsys):
    assert cli.main(distill(finished, tmp_path / "whole")) == 0
    from calotype.stage2_diffusion.distill import StudentStage
    from calotype.stage2_diffusion.tiny_decoder import DecoderStage

    for stage, folder in ((StudentStage, "student_training"), (DecoderStage, "decoder_training")):
        step = stage.step

        def signalled(self, batch, number, step=step):
            if number == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, batch, number)

        monkeypatch.setattr(stage, "step", signalled)
        with pytest.raises(SystemExit):
            cli.main(distill(finished, tmp_path / "cut"))
        monkeypatch.setattr(stage, "step", step)
        kept = checkpoint.steps(tmp_path / "cut" / folder / "checkpoints")
        assert [path.name for path in kept] == ["step-00000004"]
        assert not (tmp_path / "cut/distilled.json").exists()
    assert cli.main(distill(finished, tmp_path / "cut")) == 0
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    capsys.readouterr()
    assert cli.main(distill(finished, tmp_path / "cut")) == 0
    assert capsys.readouterr().out.count("is finished") == 2
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_micro_batches_do_not_change_a_run(finished, tmp_path):
    for out, more in (("whole", []), ("parts", ["--micro-batches", "4"])):
        assert cli.main(distill(finished, tmp_path / out, *more)) == 0
    for part, rounding in (("student_training", 1e-4), ("decoder_training", 1e-2)):  # Muon rounds to bf16
        whole, parts = (losses(tmp_path / out / part) for out in ("whole", "parts"))
        assert parts == pytest.approx(whole, rel=rounding)


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss[train]"] for line in lines if "loss[train]" in line]


def test_what_is_saved_is_stock_and_draws_alone(finished, tmp_path):
    assert cli.main(distill(finished, tmp_path / "d", "--student-steps", "2")) == 0
    facts = json.loads((tmp_path / "d/distilled.json").read_text())
    assert facts["steps"] == 2 and facts["guidance"] == 1.5
    assert facts["teacher"] == checkpoint.weights_hash(finished / "stage2_diffusion/unet")
    parts = {}
    for name in ("student", "student_scheduler", "tiny_decoder"):
        config = next((tmp_path / "d" / name).glob("*config.json"))
        cls = getattr(diffusers, json.loads(config.read_text())["_class_name"])
        parts[name] = cls.from_pretrained(tmp_path / "d" / name)
    pipe = LatentDiffusionPipeline(
        parts["tiny_decoder"], parts["student"], parts["student_scheduler"], default_steps=2, default_guidance=1.0
    ).to("cpu")
    pipe.scheduler.set_timesteps(2)
    z = torch.randn(3, *pipe.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            said = parts["student"](z, t, class_labels=torch.tensor([0, 1, 2])).sample
            z = pipe.scheduler.step(said, t, z).prev_sample
        x = parts["tiny_decoder"].decode(z).sample
    assert x.shape == (3, 3, 16, 16) and x.isfinite().all()


def test_only_the_student_moves_and_it_comes_closer(finished, tmp_path):
    more = ["--steps", "60", "--decoder-steps", "150", "--guidance", "3"]
    assert cli.main(distill(finished, tmp_path / "d", *more)) == 0
    teacher = UNet2DModel.from_pretrained(finished / "stage2_diffusion/unet").state_dict()
    student = UNet2DModel.from_pretrained(tmp_path / "d/student").state_dict()
    assert all(not torch.equal(teacher[name], student[name]) for name in teacher if "time" not in name)
    for part, figure, better in (("student", "loss[val]", -1), ("decoder", "psnr[val]", 1)):
        lines = (tmp_path / "d" / f"{part}_training" / "metrics.jsonl").read_text().splitlines()
        values = [value for line in lines if (value := json.loads(line).get(figure)) is not None]
        assert better * (values[-1] - values[0]) > 0


def test_the_teacher_answers_as_the_pipeline_does(finished):
    from calotype.latents import LatentCache
    from calotype.stage2_diffusion.conditioning import Labels
    from calotype.stage2_diffusion.teacher import Teacher, trained_with

    folder = finished / "stage2_diffusion"
    settings = trained_with(folder, latents=finished / "latents", out=finished)
    condition = Labels(settings, LatentCache(finished / "latents", "train"), LatentCache(finished / "latents", "val"))
    teacher = Teacher(folder, condition, 2.5)
    pipe = LatentDiffusionPipeline.from_pretrained(finished / "pipeline")
    z = torch.randn(3, *pipe.latent_shape, generator=torch.Generator().manual_seed(0))
    y, t = torch.tensor([0, 2, len(pipe.labels)]), torch.full((3,), 400.0)
    with torch.no_grad():
        ours = teacher(z, t, Given(label=y)).value
        one, null = (pipe.unet(z, t, class_labels=each).sample for each in (y, torch.full_like(y, len(pipe.labels))))
    torch.testing.assert_close(ours, null + 2.5 * (one - null), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Data sheet, autoencoder and latents of 40 captioned shapes."""
    root, out = tmp_path_factory.mktemp("captioned"), tmp_path_factory.mktemp("run")
    for i in range(40):
        factors = shapes.draw_factors(0, i, shapes.PLAIN)
        shapes.render(factors, (16, 16)).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"a {factors.colour} {factors.shape}")
    length = ["--steps", "6", "--batch-size", "8", "--precision", "fp32", "--validations", "1"]
    vae = ["--width", "8", "--factor", "2", *length, "--out", str(out / "stage1_vae")]
    assert cli.main(["data", str(root), "--image-size", "16", "--out", str(out)]) == 0
    assert cli.main(["train-vae", str(out / "data.json"), *vae]) == 0
    encode = ["--vae", str(out / "stage1_vae/vae"), "--out", str(out / "latents")]
    assert cli.main(["encode", str(out / "data.json"), *encode]) == 0
    return out


@pytest.mark.parametrize("condition, objective", [("text", "flow"), ("superres:2", "v"), ("none", "epsilon")])
def test_every_kind_of_teacher_has_a_student(captioned, tmp_path, condition, objective, capsys):
    if condition == "text":
        pytest.importorskip("transformers", reason="pip install 'calotype[text]'")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("data.json", "manifest.jsonl", "latents", "stage1_vae"):
        (run / name).symlink_to(captioned / name)
    words = ["--width", "16", "--condition", condition, "--objective", objective]
    words += ["--text-width", "16"] if condition == "text" else []
    length = ["--steps", "4", "--batch-size", "8", "--precision", "fp32", "--validations", "1"]
    argv = ["train-diffusion", "--latents", str(run / "latents"), "--vae", str(run / "stage1_vae/vae")]
    assert (
        cli.main([*argv, "--data", str(run / "data.json"), *words, *length, "--out", str(run / "stage2_diffusion")])
        == 0
    )
    assert cli.main(distill(run, run / "distilled")) == 0
    kinds = [
        json.loads((run / f / "config.json").read_text())["_class_name"]
        for f in ("distilled/student", "stage2_diffusion/unet")
    ]
    assert kinds[0] == kinds[1]
    wanted = {"text": 2.0}.get(condition, 1.0)
    assert json.loads((run / "distilled/distilled.json").read_text())["guidance"] == wanted
    if condition == "none":
        assert cli.main(distill(run, tmp_path / "other", "--guidance", "2")) == 2
        assert "--guidance 2.0: this model knows neither classes nor captions" in capsys.readouterr().err


def test_a_run_without_a_model_is_refused(finished, captioned, tmp_path, capsys):
    assert cli.main(distill(captioned, tmp_path / "d")) == 2
    assert "finish `calotype train-diffusion` first" in capsys.readouterr().err
    other = ["--vae", str(captioned / "stage1_vae/vae")]
    assert cli.main(distill(finished, tmp_path / "d", *other)) == 2
    assert "is not the autoencoder that made" in capsys.readouterr().err


def test_other_settings_do_not_resume_but_the_steps_of_a_drawing_may_change(finished, tmp_path, capsys):
    assert cli.main(distill(finished, tmp_path / "d")) == 0
    assert cli.main(distill(finished, tmp_path / "d", "--guidance", "2")) == 2
    assert "--guidance by default, not 2.0" in capsys.readouterr().err
    assert cli.main(distill(finished, tmp_path / "d", "--student-steps", "2")) == 0
    assert json.loads((tmp_path / "d/distilled.json").read_text())["steps"] == 2
