"""What a resumed run does with each setting that has changed: nothing, say so, or refuse."""

import importlib
import json
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from calotype import cli
from calotype.changes import Allowed, Change, Free, change_of, changes_since
from calotype.complaints import called
from calotype.errors import UserError

TRAINING = ("run", "train-vae", "train-diffusion", "distill")
ONCE = ("resume", "fresh")
# Another value, where a trial of the usual ones does not find a valid one.
OTHERS = {
    "val": ("0.2",),
    "image_size": ("48", "32x16"),
    "corruption": ("gaussian:0.3",),
    "adversarial_start": ("0.25",),
    "levels": ("4,4",),
    "condition": ("none", "class"),
    "trackers": (("tensorboard",),),
    "vae": ("elsewhere",),
}
USUAL = (2, 0.25, 1, 32, 64, True, "fp32", "elsewhere", 16)
# What a setting needs beside it to make sense.
BESIDE = {
    "text_encoder": {"condition": "text"},
    "text_width": {"condition": "text"},
    "text_layers": {"condition": "text"},
    "zero_terminal_snr": {"objective": "v"},
    "codebook": {"regularizer": "vq"},
    "commitment": {"regularizer": "vq"},
    "levels": {"regularizer": "fsq"},
    "gamma": {"regularizer": "tc"},
    "likelihood_scale": {"likelihood": "gaussian"},
    "perceptual_weight": {"perceptual": "features"},
    "free_bits_per_sample": {"free_bits": 0.5},
    "adversarial_start": {"adversarial": 0.5},
    "adversarial_pretraining": {"adversarial": 0.5},
    "adversarial_cap": {"adversarial": 0.5},
    "r1": {"adversarial": 0.5},
    "max_psnr_drop": {"adversarial": 0.5},
    "discriminator_lr": {"adversarial": 0.5},
}


def settings_class(command):
    module, _, name = cli.COMMANDS[command][0].partition(":")
    return getattr(importlib.import_module(module), name)


FIELDS = [(command, name) for command in TRAINING for name in settings_class(command).model_fields]
TABLE = {(command, name): change_of(settings_class(command), name) for command, name in FIELDS}


def begun(cls, out, **given):
    """Settings of a run, and its config.json in `out`."""
    required = {name: "here" for name, field in cls.model_fields.items() if field.is_required()}
    settings = cls(**required | {"out": out} | given)
    out.mkdir(exist_ok=True)
    (out / "config.json").write_text(json.dumps(settings.to_json()))
    return settings, out / "config.json"


def with_another(cls, settings, name):
    """The same settings but for one."""
    for value in (*OTHERS.get(name, ()), *_literals(cls, name), *USUAL):
        try:
            changed = cls(**settings.model_dump() | {name: value})
        except ValidationError:
            continue
        if getattr(changed, name) != getattr(settings, name):
            return changed
    raise AssertionError(f"no other value for {name}; add one to OTHERS")


def _literals(cls, name):
    return cls.model_json_schema()["properties"][name].get("enum") or [
        value for kind in cls.model_json_schema()["properties"][name].get("anyOf", []) for value in kind.get("enum", [])
    ]


@pytest.mark.parametrize(("command", "name"), FIELDS, ids=map("-".join, FIELDS))
def test_every_setting_says_what_becomes_of_a_change_and_that_happens(command, name, tmp_path):
    cls, expected = settings_class(command), TABLE[command, name]
    settings, file = begun(cls, tmp_path / "run", **BESIDE.get(name, {}))
    changed = with_another(cls, settings, name)
    assert changes_since(settings, file) == {}
    if expected is Change.REFUSED:
        with pytest.raises(UserError) as refusal:
            changes_since(changed, file)
        assert called(cls, name) in str(refusal.value) and "--fresh" in str(refusal.value)
        return
    found = changes_since(changed, file)
    if expected is Change.FREE:
        assert found == {}
    else:
        assert list(found) == [name] and str(found[name]).startswith(f"{called(cls, name)} ")
        assert " -> " in str(found[name])


def test_the_table_is_as_it_was_decided():
    """Whoever moves a setting must mean it: what is free may change no bit, what is refused makes another run."""
    kinds = {kind: {name for (_, name), found in TABLE.items() if found is kind} for kind in Change}
    assert kinds[Change.FREE] == set(
        "out source run latents vae data text_encoder resume fresh checkpoint_every keep_checkpoints log_every workers "
        "trackers allow_bad allow_data_change allow_download nproc student_steps".split()
    )
    assert kinds[Change.ALLOWED] == set(
        "preset steps max_minutes micro_batches lr lr_schedule warmup_steps weight_decay clip precision validations "
        "compile adversarial_start adversarial_pretraining adversarial_cap max_psnr_drop discriminator_lr "
        "gradient_checkpointing kid_samples guidance sampler_steps decoder_steps decoder_lr".split()
    )
    assert {"seed", "batch_size", "width", "objective", "flip", "optimizer", "ema_width"} <= kinds[Change.REFUSED]


def test_a_setting_that_says_nothing_or_two_things_is_found():
    class Settings(BaseModel):
        mute: int = 0
        loud: Free[Allowed[int]] = 0

    for name in Settings.model_fields:
        with pytest.raises(LookupError, match=name):
            change_of(Settings, name)


def test_a_run_that_is_older_than_a_setting_had_its_default(tmp_path):
    cls = settings_class("train-vae")
    settings, file = begun(cls, tmp_path / "run")
    file.write_text(json.dumps({k: v for k, v in settings.to_json().items() if k not in ("clip", "r1")}))
    assert changes_since(settings, file) == {}
    assert list(changes_since(cls(**settings.model_dump() | {"clip": 2.0}), file)) == ["clip"]


@pytest.mark.parametrize("content", ["{", "[1]", "", "\x00"])
def test_a_damaged_config_is_named(tmp_path, content):
    settings, file = begun(settings_class("train-vae"), tmp_path / "run")
    Path(file).write_text(content)
    with pytest.raises(UserError, match="config.json is damaged"):
        changes_since(settings, file)
