"""Saved autoencoders: any stock `AutoencoderKL` or `VQModel` folder."""

from pathlib import Path

from diffusers import AutoencoderKL, VQModel

from calotype.errors import UserError

Vae = AutoencoderKL | VQModel


def load_autoencoder(folder: Path, flag: str) -> Vae:
    """A saved autoencoder, never fetched from elsewhere; raises UserError naming the flag."""
    try:
        kind = AutoencoderKL.load_config(folder, local_files_only=True).get("_class_name")
        classes = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}
        if kind not in classes:
            raise UserError(f"{flag} {folder} holds a {kind}; give an AutoencoderKL or VQModel.")
        return classes[kind].from_pretrained(folder, use_safetensors=True, local_files_only=True).eval()
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{flag} {folder} is not a saved autoencoder ({str(error).splitlines()[0]}).") from None


def downsampling(vae: Vae) -> int:
    """Picture side divided by latent side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)
