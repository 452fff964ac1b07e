"""Sample latents and decode them."""
