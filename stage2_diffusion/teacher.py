"""A finished run of stage 2 as a teacher: its averaged network under its guidance."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calotype import device
from calotype.checkpoint import weights_hash
from calotype.errors import UserError
from calotype.stage2_diffusion import models, text
from calotype.stage2_diffusion.conditioning import Condition
from calotype.stage2_diffusion.config import DiffusionSettings
from calotype.stage2_diffusion.denoiser import Denoiser, Given, Prediction


def trained_with(folder: Path, **here: Any) -> DiffusionSettings:
    """What the finished stage-2 run in a folder was trained with, some settings as they are `here`; raises UserError.

    What makes its network what it is stands in model.json; settings that have come or gone since do not matter.
    """
    if not (folder / "finished.json").is_file():
        raise UserError(f"RUN: {folder / 'finished.json'} is not there; finish `calotype train-diffusion` first.")
    facts, config = (json.loads((folder / name).read_text()) for name in ("model.json", "config.json"))
    given = {name: config[name] for name in ("zero_terminal_snr", "label_dropout") if name in config}
    given |= {
        "objective": facts["objective"],
        "condition": facts.get("condition", "class" if facts["id2label"] else "none"),
    }
    if (folder / "text_encoder").is_dir():
        given["init"] = folder  # the captions' words are those of the run
    return DiffusionSettings(**given | here)


class Teacher:
    """The network that is distilled; `guidance` w makes its answer null + w (asked - null) (Ho & Salimans 2022)."""

    def __init__(self, folder: Path, condition: Condition, guidance: float | None):
        self.folder, self.condition = folder, condition
        self.facts = json.loads((folder / "model.json").read_text())
        self.guidance = self.facts["default_guidance"] if guidance is None else guidance
        self.classes, self.tokenizer = len(condition.class_names), condition.tokenizer
        if guidance not in (None, 1.0) and not (self.classes or self.tokenizer):
            raise UserError(f"--guidance {guidance}: this model knows neither classes nor captions; leave it out.")
        if not (self.classes or self.tokenizer):
            self.guidance = 1.0
        self.hash = weights_hash(folder / "unet")
        if condition.text_encoder:
            condition.text_encoder.eval().requires_grad_(False)
        self.net = self.network().eval().requires_grad_(False)

    def network(self) -> Denoiser:
        """A copy of the averaged network, with the text encoder that all copies share."""
        net = Denoiser(models.load_unet(self.folder / "unet", f"RUN: {self.folder}"), self.condition.text_encoder)
        device.for_training(net)
        return net

    def __call__(self, z_t: Tensor, t: Tensor, given: Given) -> Prediction:
        """The guided prediction (B, c, h, w)."""
        if self.guidance == 1:
            return self.net(z_t, t, given)
        pairs = [None if a is None else torch.cat([a, b]) for a, b in zip(given, self.null(given), strict=True)]
        asked, null = self.net(torch.cat([z_t, z_t]), torch.cat([t, t]), Given(*pairs)).value.chunk(2)
        return Prediction(null + self.guidance * (asked - null))

    def null(self, given: Given) -> Given:
        """The same without class or caption."""
        label = None if given.label is None else torch.full_like(given.label, self.classes)
        if given.tokens is None:
            return given._replace(label=label)
        nothing = text.tokens(self.tokenizer, [""]).to(given.tokens.device)
        return given._replace(tokens=nothing.expand_as(given.tokens))
