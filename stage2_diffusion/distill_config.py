"""Settings of `calotype distill`."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import tyro
from pydantic import Field, model_validator

from calotype.changes import Allowed, Fixed, Free
from calotype.config import Maybe, Rate, Steps, TrainSettings

_DECODER_SHARE = 0.4  # of --max-minutes


class DistillSettings(TrainSettings):
    """A student that draws in a few steps and a tiny decoder, out of a finished run; `--fast` draws with them."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"batch_size": 64, "lr": 5e-4},
        "small": {"batch_size": 128, "lr": 2e-4},
        "base": {"batch_size": 256, "lr": 1e-4},
        "large": {"batch_size": 512, "lr": 5e-5},
    }
    LENGTHS: ClassVar[dict[str, int]] = {"tiny": 600, "small": 6_000, "base": 20_000, "large": 40_000}
    DECODER_LENGTHS: ClassVar[dict[str, int]] = {"tiny": 5000, "small": 10_000, "base": 20_000, "large": 40_000}

    run: Free[tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]] = Field(description="finished run")
    out: Free[Maybe[Path]] = Field(None, description="folder of the student and the decoder (default: RUN/distilled)")
    latents: Free[Maybe[Path]] = Field(None, description="folder of the latent cache (default: RUN/latents)")
    vae: Free[Maybe[Path]] = Field(None, description="the cache's autoencoder (default: RUN/stage1_vae/vae)")
    data: Free[Maybe[Path]] = Field(None, description="data sheet of the run (default: RUN/data.json)")

    student_steps: Free[int] = Field(4, ge=1, le=8, description="evaluations in which the student draws by default")
    guidance: Fixed[Maybe[float]] = Field(
        None, ge=0, le=100, description="guidance that the student learns (default: the model's)"
    )
    teacher_steps: Fixed[int] = Field(
        24, ge=4, le=200, description="of the grid on which the student becomes consistent"
    )
    ema_width: Fixed[float] = Field(
        0.05, gt=0, lt=0.28, description="relative width of the weight average (EDM2's sigma_rel)"
    )

    decoder_steps: Allowed[Maybe[Steps]] = Field(
        None, ge=0, description="optimiser steps of the tiny decoder (default: by preset)"
    )
    decoder_width: Fixed[Maybe[int]] = Field(
        None, ge=4, le=4096, description="its channels (default: the autoencoder's first level)"
    )
    decoder_lr: Allowed[Rate] = Field(6e-3, description="its peak learning rate")

    @model_validator(mode="after")
    def _fewer_steps_than_the_teacher(self) -> Self:
        if self.student_steps > self.teacher_steps:
            raise ValueError(
                f"--student-steps {self.student_steps} must not be more than --teacher-steps {self.teacher_steps}; "
                "try 4 and 24."
            )
        return self

    @property
    def folder(self) -> Path:
        """Where the student and the decoder go."""
        return self.out or self.run / "distilled"

    def of_student(self) -> Self:
        """The settings of the student's training; what is about the decoder alone may change."""
        update = {"out": self.folder / "student_training"} | self._defaults(
            "decoder_steps", "decoder_width", "decoder_lr"
        )
        return self.model_copy(update=update | self._minutes(1 - _DECODER_SHARE))

    def of_decoder(self) -> Self:
        """The settings of the decoder's training; what is about the student alone may change."""
        steps = self.decoder_steps
        if steps is None and self.max_minutes is None:
            steps = self.DECODER_LENGTHS[self.preset]
        # Muon: 1.1 dB more than AdamW after the same time, for a network without normalisation
        update = {"out": self.folder / "decoder_training", "steps": steps, "lr": self.decoder_lr, "optimizer": "muon"}
        update["resume"] = False  # it is the student that --resume insists on
        return self.model_copy(
            update=update | self._defaults("guidance", "teacher_steps") | self._minutes(_DECODER_SHARE)
        )

    def _defaults(self, *names: str) -> dict[str, Any]:
        return {name: type(self).model_fields[name].default for name in names}

    def _minutes(self, share: float) -> dict[str, float]:
        return {} if self.max_minutes is None else {"max_minutes": self.max_minutes * share}
