"""Stage 2: a diffusion model of latents."""
