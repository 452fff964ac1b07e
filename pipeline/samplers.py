"""Stock samplers by name, whatever was trained, and the few things to know of each to begin or to look in the middle.

This file travels inside every saved model beside `pipeline.py`, so it imports nothing but torch and diffusers.
"""

from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers import SchedulerMixin
from torch import Tensor

SAMPLERS = ("ddim", "dpm++2m", "unipc", "heun", "euler")
TIMES = 1000
_LAST_SIGMA = 50.0  # of a chain that ends in pure noise: above it a solver would only waste its steps
_FLOW_SHIFT = 1.2  # of UniPC: with a little more of the evaluations near noise, 6 of them do what else takes 8


def make_scheduler(config: Mapping[str, Any], name: str) -> SchedulerMixin:
    """The sampler `name` for a network that was trained as the config of its saved scheduler says.

    One of `SAMPLERS`; "flow-" may stand before it and insists on a flow. Raises ValueError.
    """
    method = name.removeprefix("flow-") if isinstance(name, str) else ""
    if method not in SAMPLERS:
        raise ValueError(f"sampler={name!r} must be one of {', '.join(SAMPLERS)}.")
    if is_flow(config):
        return _flow_sampler(config, method)
    if method != name:
        raise ValueError(f"sampler={name!r}: this model was not trained by flow matching; give {method!r}.")
    return _diffusion_sampler(config, method)


def is_flow(config: Mapping[str, Any]) -> bool:
    """Schedulers that are made for flows alone name neither a prediction nor betas."""
    unnamed = "epsilon" if "beta_schedule" in config else "flow_prediction"
    return config.get("prediction_type", unnamed) == "flow_prediction"


def _flow_sampler(config: Mapping[str, Any], method: str) -> SchedulerMixin:
    """For z_s = (1 - s) z + s eps and v = eps - z. DDIM's step is Euler's: both keep the straight line's two ends."""
    if method == "heun":
        return diffusers.FlowMatchHeunDiscreteScheduler()
    # The stock Euler for flows walks to s = 0.001 and wastes its last step on the rest; order 1 here is the same step.
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    if method == "unipc":
        return diffusers.UniPCMultistepScheduler(solver_order=3, flow_shift=_FLOW_SHIFT, **flow)
    return diffusers.DPMSolverMultistepScheduler(solver_order=2 if method == "dpm++2m" else 1, **flow)


def _diffusion_sampler(config: Mapping[str, Any], method: str) -> SchedulerMixin:
    """For z_t = alpha_t z + sigma_t eps, whether eps, v or z is predicted."""
    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    trained = {name: config[name] for name in kept if name in config}
    zero_snr = bool(config.get("rescale_betas_zero_snr"))
    if method in ("ddim", "euler"):
        # DPM-Solver++ of order 1 is DDIM (Lu et al. 2022); the stock DDIM needs steps that divide 1000.
        whole = trained | {"rescale_betas_zero_snr": zero_snr, "timestep_spacing": "trailing"}
        solver = diffusers.EulerDiscreteScheduler if method == "euler" else diffusers.DPMSolverMultistepScheduler
        return solver(**whole, **({"solver_order": 1} if method == "ddim" else {}))
    trained = _shortened(trained) if zero_snr else trained
    if method == "heun":
        return diffusers.HeunDiscreteScheduler(**trained)
    if method == "unipc":  # both grids are even in log signal-to-noise
        return diffusers.UniPCMultistepScheduler(**trained, solver_order=3, use_exponential_sigmas=True)
    return diffusers.DPMSolverMultistepScheduler(**trained, use_lu_lambdas=True)


def _shortened(trained: dict[str, Any]) -> dict[str, Any]:
    """A chain that ends in pure noise without its last part, so that a grid by noise level spends no steps there."""
    whole = diffusers.DPMSolverMultistepScheduler(**trained, rescale_betas_zero_snr=True)
    length = int((whole.alphas_cumprod > 1 / (1 + _LAST_SIGMA**2)).sum())
    return trained | {"num_train_timesteps": length, "trained_betas": whole.betas[:length].tolist()}


def clean(scheduler: SchedulerMixin, result: Any, z: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
    """What a solver takes the clean latents to be after a step from z: some say it, multistep solvers keep a list."""
    said = [getattr(result, name, None) for name in ("pred_original_sample", "denoised")]
    clean = [x for x in (*getattr(scheduler, "model_outputs", []), *said) if x is not None]
    if clean:
        return clean[-1]
    return z - t / TIMES * prediction if is_flow(scheduler.config) else result.prev_sample


def begin_at(scheduler: SchedulerMixin, strength: float) -> int:
    """The first step whose time is at most `strength` from 0 to 1, where the scheduler is then told to begin.

    A step of a two-stage solver is two evaluations, and only the first of them can be a beginning.
    """
    times, stride = scheduler.timesteps, getattr(scheduler, "order", 1)
    late_enough = (i for i in range(0, len(times), stride) if float(times[i]) <= TIMES * strength)
    begin = next(late_enough, len(times)) if strength else len(times)
    if hasattr(scheduler, "set_begin_index"):  # the others go by the time that they are given
        scheduler.set_begin_index(begin)
    return begin


def noised(scheduler: SchedulerMixin, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Clean latents z (B, c, h, w) with noise of the same shape, as the scheduler has them at its time t."""
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(z, t[None], eps)
    return scheduler.add_noise(z, eps, t[None])
