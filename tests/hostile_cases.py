"""Every place where a user can name a file or folder, with something hostile in it: commands by name."""

import json
import os

import hostile_weights as hostile

from calotype import cli


def converts(place, few):
    """Pickles of every opcode by which something can be called, for the converter."""
    trace, root = place / "trace", place / "root"
    payloads = list(hostile.payloads(trace).items())
    for i, (name, content) in enumerate(payloads[:few]):
        file = root / f"pickle {i}{('.ckpt', '.pt', '.pth', '.bin')[i % 4]}"
        file.write_bytes(content)
        yield f"convert, {name}", ["convert", str(file), "--out", str(place / "out")]
    for name, make in list(hostile.ARCHIVES.items())[:few]:
        file = make(root / f"{name}.ckpt", trace)
        yield f"convert, {name}", ["convert", str(file), "--out", str(place / "out")]
    for name, content in hostile.HEADERS.items():
        file = root / f"{name}.safetensors"
        file.write_bytes(content)
        yield f"convert, {name}", ["convert", str(file), "--out", str(place / "out")]


def model_folders(place):
    """Model folders that are hostile in one place each: name, folder."""
    root, plain = place / "root", place / "models/class"
    evil = hostile.CODE.format(str(place / "trace"))

    def model(name, source=plain):
        return hostile.copied(source, root / "models" / name)

    for part in ("vae", "unet"):
        folder = model(f"pickled {part}")
        (folder / part / "diffusion_pytorch_model.safetensors").unlink()
        hostile.zipped(folder / part / "diffusion_pytorch_model.bin", place / "trace")
        yield folder
    folder = model("pickled words", place / "models/text")
    (folder / "text_encoder/model.safetensors").unlink()
    hostile.zipped(folder / "text_encoder/pytorch_model.bin", place / "trace")
    yield folder
    for name, entry in {
        "a module beside it": ["evil", "Evil"], "the system": ["os", "system"], "a process": ["subprocess", "Popen"],
        "another part": ["diffusers", "DiffusionPipeline"], "no class": ["diffusers", {"a": 1}],
    }.items():  # fmt: skip
        folder = model(f"unet is {name}")
        (folder / "evil.py").write_text(evil)
        (folder / "unet/evil.py").write_text(evil)
        hostile.altered(folder / "model_index.json", unet=entry)
        yield folder
    for name, entry in {"its own": ["evil", "Evil"], "text": "evil.Evil", "stock": "StableDiffusionXLPipeline"}.items():
        folder = model(f"class is {name}")
        (folder / "evil.py").write_text(evil)
        hostile.altered(folder / "model_index.json", _class_name=entry)
        yield folder
    for name, more in {
        "code of its own": {"auto_map": {"AutoModel": "evil.Evil"}}, "quantised": {"quantization_config": {"a": 1}},
        "endless": {"layers_per_block": 10**6}, "vast": {"block_out_channels": [10**12, 10**12]},
        "wide": {"block_out_channels": [2**20, 2**20]},
    }.items():  # fmt: skip
        folder = model(f"unet {name}")
        (folder / "unet/evil.py").write_text(evil)
        hostile.altered(folder / "unet/config.json", **more)
        yield folder
    for name, more in {"foreign": {"_class_name": "os.system"}, "endless": {"num_train_timesteps": 10**7}}.items():
        folder = model(f"scheduler {name}")
        hostile.altered(folder / "scheduler/scheduler_config.json", **more)
        yield folder
    for name, text in {
        "deep": "[" * 10**5,
        "endless": f'{{"a": {"9" * 5000}}}',
        "large": " " * 17_000_000,
        "list": "[]",
    }.items():
        folder = model(f"index {name}")
        (folder / "model_index.json").write_text(text)
        yield folder
    for name, content in {"tokenizer.json": "{", "tokenizer_config.json": '{"added_tokens_decoder": 3}'}.items():
        folder = model(f"broken {name}", place / "models/text")
        (folder / "tokenizer" / name).write_text(content)
        yield folder
    folder = model("steps without end")
    hostile.altered(folder / "model_index.json", default_steps=10**6)
    yield folder
    folder = model("hashes that climb")
    climbing = {"format": 1, "files": {"../../../canary.txt": "0"}}
    (folder / "sha256.json").write_text(json.dumps(climbing))
    yield folder
    for name, content in list(hostile.HEADERS.items()):
        folder = model(f"weights with {name}")
        (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(content)
        yield folder


def flags(place, finished):
    """Every other flag by which a user names a file or folder: name, words."""
    root, trace, canary = place / "root", place / "trace", place / "canary.txt"
    bin_model = root / "models/pickled unet"
    pickled = hostile.zipped(root / "weights.ckpt", trace)
    data, latents, out = str(finished / "data.json"), str(finished / "latents"), str(place / "out")
    words = {
        "MODEL is a pickle": ["generate", str(pickled), "--out", out],
        "--vae is a pickle": ["encode", data, "--vae", str(pickled), "--out", out],
        "--vae holds a pickle": ["encode", data, "--vae", str(root / "models/pickled vae/vae"), "--out", out],
        "embed --vae": ["embed", data, "--vae", str(root / "models/pickled vae/vae"), "--out", f"{out}.npz"],
        "train-vae --init": ["train-vae", data, "--init", str(root / "models/pickled vae/vae"), "--out", out],
        "--init holds a pickle": ["train-diffusion", "--latents", latents, "--init", str(bin_model), "--out", out],
        "--guide holds a pickle": ["export", "--run", str(finished), "--guide", str(bin_model / "unet"), "--out", out],
        "--run is hostile": ["export", "--run", str(bin_model), "--out", out],
        "--config is a pickle": ["generate", str(place / "models/class"), "--config", str(pickled), "--out", out],
        "regenerate a pickle": ["regenerate", str(pickled), "--model", str(place / "models/class")],
        "demo": ["demo", str(bin_model)],
        "edit a pickle": ["edit", str(place / "models/class"), "--image", str(pickled), "--out", out],
    }  # fmt: skip
    features, evaluate = root / "features", ["evaluate", str(finished), "-n", "8", "--reference", "train", "--features"]
    for name, config in {
        "code": {"auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}, "model_type": "evil"},
        "pickle": {"_class_name": "AutoencoderKL"},
        "words": {"model_type": "vit"},
    }.items():
        (features / name).mkdir(parents=True)
        (features / name / "config.json").write_text(json.dumps(config))
        (features / name / "evil.py").write_text(hostile.CODE.format(str(trace)))
        for file in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
            hostile.zipped(features / name / file, trace)
        words[f"--features with {name}"] = [*evaluate, str(features / name)]
    for name, elsewhere in {"climbing": os.path.relpath(canary, features), "absolute": canary}.items():
        file = hostile.external_onnx(features / f"{name}.onnx", elsewhere)
        words[f"--features {name} ONNX"] = [*evaluate, str(file)]
    words |= hostile_latents(place, finished) | hostile_text(place, finished) | hostile_checkpoint(place, finished)
    return words


def hostile_latents(place, finished):
    found = {}
    for name, shard in {
        "a pickle": "shard.pt",
        "elsewhere": "../../canary.txt",
        "absolute": str(place / "canary.txt"),
    }.items():
        folder = place / "root" / f"latents {name}"
        folder.mkdir()
        index = json.loads((finished / "latents/index.json").read_text())
        index["shards"] = {"train": [shard], "val": [shard]}
        (folder / "index.json").write_text(json.dumps(index))
        hostile.zipped(folder / "shard.pt", place / "trace")
        words = ["train-diffusion", "--latents", str(folder), "--vae", str(finished / "stage1_vae/vae")]
        found[f"--latents names {name}"] = [*words, "--data", str(finished / "data.json"), "--out", str(place / "out")]
    return found


def hostile_text(place, finished):
    folder = place / "root/models/pickled words"
    words = ["train-diffusion", "--latents", str(finished / "latents"), "--condition", "text"]
    return {"--text-encoder": [*words, "--text-encoder", str(folder), "--out", str(place / "out")]}


def hostile_checkpoint(place, finished):
    """A run that was begun, with pickles under the names of a checkpoint."""
    run = place / "root/run"
    words = [
        "train-vae",
        str(finished / "data.json"),
        "--width",
        "8",
        "--factor",
        "2",
        "--steps",
        "2",
        "--out",
        str(run),
    ]
    words += ["--precision", "fp32", "--batch-size", "2"]
    assert cli.main(words) == 0
    for folder in (run / "checkpoints").iterdir():
        for file in [*folder.glob("*.safetensors"), folder / "optimizer.pt"]:
            hostile.zipped(file, place / "trace")
    (run / "finished.json").unlink(missing_ok=True)
    return {"a checkpoint of pickles": [*words, "--resume"]}
