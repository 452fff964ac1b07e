import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UniPCMultistepScheduler
from PIL import Image
from torch.testing import assert_close

from calotype import cli
from calotype.pipeline import LatentDiffusionPipeline
from calotype.pipeline.order import Order
from calotype.pipeline.prediction import Conditions

STRANGER = """
import sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "calotype":
            raise ImportError("calotype is not here")
sys.meta_path.insert(0, Wall())
import numpy as np
from diffusers import DiffusionPipeline
folder, out, again = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
np.save(out + "/stock.npy", pipe(pipe.labels[1], 3, seed=5, output_type="np").images)
pipe.save_pretrained(again)
pipe = DiffusionPipeline.from_pretrained(again, trust_remote_code=True)
np.save(out + "/again.npy", pipe(pipe.labels[1], 3, seed=5, output_type="np").images)
"""


@pytest.fixture(scope="module")
def pipe(finished):
    pipe = LatentDiffusionPipeline.from_pretrained(finished / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_stock_diffusers_draws_the_same_without_calotype(finished, pipe, tmp_path):
    again = tmp_path / "again"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HOME": str(tmp_path / "hf")}
    words = [sys.executable, "-c", STRANGER, finished / "pipeline", tmp_path, again]
    subprocess.run(list(map(str, words)), cwd=tmp_path, env=environment, check=True)
    ours = pipe(pipe.labels[1], 3, seed=5, output_type="np").images
    np.testing.assert_allclose(np.load(tmp_path / "stock.npy"), ours, atol=1e-5)
    np.testing.assert_allclose(np.load(tmp_path / "again.npy"), ours, atol=1e-5)
    back = LatentDiffusionPipeline.from_pretrained(again)
    np.testing.assert_allclose(back(pipe.labels[1], 3, seed=5, output_type="np").images, ours, atol=1e-5)


def test_the_model_folder_holds_stock_parts_only(finished):
    index = json.loads((finished / "pipeline/model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "LatentDiffusionPipeline"]
    parts = {name: value for name, value in index.items() if isinstance(value, list) and name != "_class_name"}
    assert {library for library, _ in parts.values()} == {"diffusers"} and set(parts) == {"vae", "unet", "scheduler"}
    suffixes = {file.suffix for file in (finished / "pipeline").rglob("*") if file.is_file()}
    assert suffixes == {".json", ".safetensors", ".py", ".md", ".png"}
    card = (finished / "pipeline/README.md").read_text()
    assert "| psnr[val] |" in card
    texts = [f.read_text() for f in (finished / "pipeline").rglob("*") if f.suffix in {".json", ".md", ".py"}]
    assert not any(str(finished) in text for text in texts)  # no path of this machine is published


def test_a_picture_depends_on_its_own_seed_alone(pipe):
    whole = pipe([pipe.labels[0], pipe.labels[2], None], 3, seed=7, output_type="np").images
    alone = pipe(pipe.labels[2], 1, seed=8, output_type="np").images
    np.testing.assert_allclose(whole[1:2], alone, atol=1e-5)
    assert np.abs(whole[0] - whole[2]).max() > 1e-3


def test_guidance_is_the_formula(pipe):
    z, t, y = torch.randn(2, *pipe.latent_shape), torch.tensor(400), torch.tensor([0, 3])
    null = torch.full_like(y, len(pipe.labels))
    with torch.no_grad():
        labelled, unlabelled = (pipe.unet(z, t, class_labels=c).sample for c in (y, null))
        expected = unlabelled + 2.5 * (labelled - unlabelled)
        told = Conditions(labels=y), Conditions(labels=null)
        assert_close(pipe.predict(z, t, *told, Order(guidance_scale=2.5)), expected, atol=1e-5, rtol=1e-5)
        assert_close(pipe.predict(z, t, *told, Order(guidance_scale=1)), labelled)


def test_stream_counts_its_steps_shows_previews_and_can_be_left(pipe):
    events = list(pipe.stream(None, 2, seed=1))
    assert [e.step for e in events] == list(range(1, pipe.default_steps + 1)) and events[-1].steps == len(events)
    assert all(len(e.images) == 2 and isinstance(e.images[0], Image.Image) for e in events)
    whole = pipe(None, 2, seed=1).images
    assert np.array_equal(np.asarray(events[-1].images[1]), np.asarray(whole[1]))
    calls = []
    hook = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    stream = pipe.stream(None, 1)
    next(stream)
    stream.close()
    hook.remove()
    assert len(calls) == 1


def test_at_most_twenty_evaluations_by_default(finished):
    facts = json.loads((finished / "stage2_diffusion/model.json").read_text())
    from calotype.stage2_diffusion.config import DiffusionSettings

    default = DiffusionSettings.model_fields["sampler_steps"].default
    assert default <= 20 and facts["default_steps"] == 4


def test_threads_share_a_model(pipe):
    serial = [pipe(None, 1, seed=s, output_type="np").images for s in range(6)]
    found = [None] * 6

    def draw(s):
        found[s] = pipe(None, 1, seed=s, output_type="np").images

    threads = [threading.Thread(target=draw, args=(s,)) for s in range(6)]
    [t.start() for t in threads], [t.join() for t in threads]
    for a, b in zip(serial, found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, UniPCMultistepScheduler])
def test_other_schedulers_of_diffusers_fit_in(finished, scheduler):
    pipe = LatentDiffusionPipeline.from_pretrained(finished / "pipeline")
    config = {"use_flow_sigmas": True} if scheduler is UniPCMultistepScheduler else {"prediction_type": "epsilon"}
    pipe.scheduler = scheduler(**config)
    pipe.set_progress_bar_config(disable=True)
    assert np.isfinite(pipe(None, 1, num_inference_steps=5, output_type="np").images).all()


def test_reconstruct_is_encode_and_decode(pipe, finished, pictures):
    file = sorted(pictures.rglob("*.png"))[0]
    image = Image.open(file)
    x = torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mean).sample[0].clamp(-1, 1)
    ours = np.asarray(pipe.reconstruct([image])[0], dtype=np.float32)
    np.testing.assert_allclose(ours, (expected.permute(1, 2, 0).numpy() + 1) * 127.5, atol=0.51)
    with pytest.raises(ValueError, match="images: 10x9 pixels; resize to 16x16"):
        pipe.reconstruct([image.resize((10, 9))])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_images": 0}, "num_images=0"),
        ({"num_inference_steps": -5}, "num_inference_steps=-5"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"guidance_scale": 1e9}, "guidance_scale"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**63}, "seed="),
        ({"output_type": "jpeg"}, "output_type='jpeg'"),
        ({"label": "no such thing"}, "label='no such thing' is not known"),
        ({"label": 99}, "label=99"),
        ({"label": ["red"], "num_images": 2}, "label holds 1 labels for num_images=2"),
    ],
)
def test_errors_name_the_argument(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_numbers_that_are_not_finite_never_become_a_picture(finished):
    pipe = LatentDiffusionPipeline.from_pretrained(finished / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pipe.unet.conv_in.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        pipe(None, 1)


def generate(finished, out, *words):
    return cli.main(["generate", str(finished), *map(str, words), "--out", str(out), "--precision", "fp32"])


def test_generated_pngs_carry_their_settings(finished, pipe, tmp_path):
    label = pipe.labels[1]
    assert generate(finished, tmp_path, label, "-n", 3, "--seed", 7, "--steps", 5, "--batch-size", 2) == 0
    files = sorted(tmp_path.glob("*.png"))
    assert [file.name for file in files] == [f"{s:08d}.png" for s in (7, 8, 9)]
    facts = Image.open(files[2]).text
    assert (facts["calotype:label"], facts["calotype:seed"], facts["calotype:steps"]) == (label, "9", "5")
    again = pipe(label, 1, seed=9, num_inference_steps=5, guidance_scale=float(facts["calotype:guidance"])).images[0]
    difference = np.asarray(Image.open(files[2]), dtype=int) - np.asarray(again, dtype=int)
    assert np.abs(difference).max() <= 1


def test_without_a_label_the_classes_take_turns(finished, pipe, tmp_path):
    assert generate(finished, tmp_path, "-n", 2 * len(pipe.labels)) == 0
    assert {folder.name: len(list(folder.iterdir())) for folder in tmp_path.iterdir()} == dict.fromkeys(pipe.labels, 2)


def test_generate_refuses_with_one_line(finished, tmp_path, capsys):
    assert generate(finished, tmp_path / "x", "no such thing") == 2
    message = capsys.readouterr().err
    assert "LABEL 'no such thing'" in message and "red" in message and message.count("\n") == 1
    assert generate(tmp_path, tmp_path / "x") == 2
    assert f"MODEL {tmp_path}" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert generate(finished, tmp_path / "x", "-n", 2, "--seed", 2**63 - 1) == 2
    assert "--seed 9223372036854775807 leaves no room for" in capsys.readouterr().err
    theirs = tmp_path / "y" / "00000000.png"
    theirs.parent.mkdir()
    Image.new("L", (3, 3)).save(theirs)
    assert generate(finished, theirs.parent, "red", "-n", 1) == 2
    assert Image.open(theirs).size == (3, 3)


def test_export_refuses_parts_that_do_not_belong_together(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    config = tmp_path / "run/stage1_vae/vae/config.json"
    config.write_text(config.read_text().replace('"force_upcast": false', '"force_upcast": true'))
    assert cli.main(["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "model")]) == 2
    assert "another autoencoder" in capsys.readouterr().err
    (tmp_path / "run/stage2_diffusion/finished.json").unlink()
    assert cli.main(["export", "--run", str(tmp_path / "run")]) == 2
    assert "finish `calotype train-diffusion` first" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_stock_loading_needs_trust(finished):
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(finished / "pipeline")
