"""The page is there before the weights; who asks waits for them, and what is wrong with them ends the server."""

import os
import shutil
import threading

import httpx
import pytest
import torch
from models import pipeline, tiny_unet
from safetensors.torch import load_file, save_file

from calotype.demo import app
from calotype.demo.cache import Cache
from calotype.demo.listening import listen
from calotype.demo.loading import Loading
from calotype.errors import UserError
from calotype.pipeline.model_folder import fill, load, outlined

gradio_client = pytest.importorskip("gradio_client", reason="loading is NOT tested: gradio_client is missing")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "prints"
    pipeline(tiny_unet(classes=1), id2label={"0": "disc"}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def environment():
    with pytest.MonkeyPatch.context() as environment:
        for name in (*app.ENVIRONMENT, "GRADIO_TEMP_DIR"):
            environment.setenv(name, "")  # so that what build() sets is undone
        yield


@pytest.fixture
def damaged(model, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(model, folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.weight"] = torch.full_like(tensors["conv_in.weight"], torch.nan)
    save_file(tensors, file)
    return folder


def draw(pipe):
    return pipe("disc", 2, seed=3, num_inference_steps=3, output_type="np").images


def test_an_outline_knows_the_model_and_becomes_it(model):
    pipe, whole = outlined(model), load(model)
    networks = pipe.unet, pipe.vae
    assert {parameter.device.type for parameter in pipe.unet.parameters()} == {"meta"}
    assert (pipe.labels, pipe.image_size, pipe.default_steps) == (whole.labels, whole.image_size, whole.default_steps)
    fill(pipe, model)
    assert (pipe.unet, pipe.vae) == networks and not pipe.unet.training
    assert (draw(pipe) == draw(whole)).all()


def test_the_page_is_there_before_the_weights(model, environment, tmp_path):
    from calotype.demo import server

    loading, found = Loading(), []
    blocks = app.build([model], str(tmp_path), loading)
    page = server.application(blocks, Cache(os.environ["GRADIO_TEMP_DIR"]), loading=loading)
    served = server.Background(page, blocks, listen("127.0.0.1", None))
    assert '"disc"' in httpx.get(served.url).text
    waiting = httpx.get(f"{served.url}readyz")
    assert (waiting.status_code, waiting.text) == (503, "loading") and "retry-after" in waiting.headers
    client = gradio_client.Client(served.url, verbose=False, analytics_enabled=False, download_files=str(tmp_path))
    order = client.submit(label="disc", count=1, seed=3, roll=False, steps=3, api_name="/generate")
    threading.Timer(1.0, loading.start, [lambda: found.append("failed")]).start()
    *_, note, seed = order.result(timeout=120)
    assert note.startswith("Seed 3 · 3 steps") and seed == 3 and found == []
    loading.raise_error()
    assert httpx.get(f"{served.url}readyz").text == "ready"
    client.close()
    served.close()


def test_an_explorer_says_that_it_waits():
    from calotype.demo.explore import Explorer
    from calotype.demo.studio import Studio

    explorer = Explorer(torch.nn.Conv2d(3, 4, 1), latent_map=None)
    studio, told = Studio(None, explorer), []
    studio.tell = told.append
    done = studio.load_later(lambda: None)
    assert studio.is_loading and explorer.is_loading and explorer.lock.locked()
    threading.Timer(0.3, done).start()
    with studio.working():
        assert not explorer.is_loading
    assert len(told) == 1 and "still being loaded" in told[0]
    assert explorer.vae.weight.is_contiguous(memory_format=torch.channels_last)


def test_what_is_wrong_with_the_weights_ends_it(damaged):
    loading, ended = Loading(), threading.Event()
    pipe = outlined(damaged)
    loading.add(lambda: fill(pipe, damaged))
    loading.start(ended.set)
    assert ended.wait(60) and not loading.is_done
    with pytest.raises(UserError, match=r"conv_in\.weight: not all numbers there are finite"):
        loading.raise_error()


def test_what_is_known_cheaply_is_known_before(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        outlined(tmp_path / "model")
    with pytest.raises(UserError, match="holds no model"):
        outlined(tmp_path)
