"""Stage 1: images to latents."""
