"""Sample latents and decode them."""


def __getattr__(name: str):
    """Import the pipeline class only when it is asked for: diffusers takes seconds."""
    if name == "LatentDiffusionPipeline":
        from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline

        return LatentDiffusionPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
