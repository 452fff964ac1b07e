"""Calotype: from a folder of pictures to a latent diffusion model of one's own."""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout the stages lie beside this folder; an installed copy has them inside it.
if not Path(__file__).with_name("pipeline").exists():
    __path__.append(str(Path(__file__).parents[1]))
