"""Codes and tokens in files, and what the codes tell about the labels."""

import json
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from PIL import Image

from calotype import cli, shapes
from calotype.images import normalize
from calotype.sheet import read_sheet
from calotype.stage1_vae import columns, embed, probes

FAST = ["--precision", "fp32", "--batch-size", "7"]  # 7 divides neither split


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """Forty grey pictures of 12x12 without labels, as a data sheet, and an autoencoder of a 1x1 code of them."""
    root = tmp_path_factory.mktemp("grey")
    (root / "pictures").mkdir()
    for i in range(40):
        picture = shapes.render(shapes.draw_factors(0, i, shapes.PLAIN), (12, 12)).convert("L")
        picture.save(root / "pictures" / f"{i}.png")
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(4,) * 5,
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        latent_channels=3,
        norm_num_groups=2,
        sample_size=12,
        mid_block_add_attention=False,
    )
    vae.save_pretrained(root / "vae")
    return root


@pytest.fixture(scope="module", params=["vq --codebook 300", "fsq --levels 5,4"], ids=lambda words: words[:3])
def quantised(request, finished, tmp_path_factory):
    """A VQModel folder that calotype trained."""
    out = tmp_path_factory.mktemp("quantised")
    words = ["--regularizer", *request.param.split(), "--width", "8", "--factor", "2", "--precision", "fp32"]
    length = ["--steps", "12", "--batch-size", "8", "--validations", "1"]
    assert cli.main(["train-vae", str(finished / "data.json"), *words, *length, "--out", str(out)]) == 0
    return out / "vae"


def command(name, source, vae, out, *more):
    return [name, str(source), "--vae", str(vae), "--out", str(out), *FAST, *map(str, more)]


def refused(capsys, argv):
    """The one line of a user's error."""
    assert cli.main(argv) == 2
    message = capsys.readouterr().err
    assert message.startswith("calotype: ") and message.count("\n") == 1, message
    return message


def read(file):
    with np.load(file, allow_pickle=False) as stored:
        return dict(stored)


def stored_pictures(root, files):
    """Pictures (N, C, H, W) in [-1, 1], read by Pillow."""
    pictures = [np.asarray(Image.open(root / file)) for file in files]
    x = torch.from_numpy(np.stack(pictures).reshape(len(pictures), *pictures[0].shape[:2], -1))
    return normalize(x.permute(0, 3, 1, 2))


def test_codes_are_the_posterior_means_of_stock_diffusers(finished, pictures, tmp_path, capsys):
    assert cli.main(command("embed", finished / "data.json", finished / "stage1_vae/vae", tmp_path / "codes.npz")) == 0
    found = read(tmp_path / "codes.npz")
    vae = AutoencoderKL.from_pretrained(finished / "stage1_vae/vae").eval()
    with torch.no_grad():
        mean = vae.encode(stored_pictures(pictures, found["file"])).latent_dist.mean
    assert found["code"].dtype == np.float32 and tuple(found["shape"]) == mean.shape[1:]
    np.testing.assert_allclose(found["code"], mean.flatten(1), atol=1e-4, rtol=0)

    records = read_sheet(finished / "data.json").records
    expected = {record.file: "val" if record.val else "train" for record in records}
    assert dict(zip(found["file"], found["split"])) == expected and len(found["file"]) == 96
    assert [file.split("/")[0] for file in found["file"]] == found["label"].tolist()
    assert sorted(found["split"]) == found["split"].tolist()  # the training pictures first
    for split in ("train", "val"):
        files = [record.file for record in records if expected[record.file] == split]
        assert found["file"][found["split"] == split].tolist() == files

    printed = capsys.readouterr().out
    assert "held-out pictures, learnt from" in printed
    rows = [line.rsplit(maxsplit=3) for line in printed.splitlines()[-3:]]
    assert [row[0].strip() for row in rows] == ["code", "PCA of the pixels", "untrained encoder"]
    assert rows[0][1] == rows[2][1] == "256" and int(rows[1][1]) < 96
    assert all(0 <= float(share) <= 1 for row in rows for share in row[2:])


def test_parquet_holds_the_same(finished, tmp_path, capsys):
    pytest.importorskip("pyarrow", reason="pip install 'calotype[data]'")
    from pyarrow import parquet

    for name in ("codes.npz", "codes.parquet"):
        words = command("embed", finished / "data.json", finished / "stage1_vae/vae", tmp_path / name)
        assert cli.main(words) == 0
    arrays, table = read(tmp_path / "codes.npz"), parquet.read_table(tmp_path / "codes.parquet")
    assert table.column_names == ["file", "split", "label", "code"]
    for name in ("file", "split", "label"):
        assert table[name].to_pylist() == arrays[name].tolist()
    codes = np.array(table["code"].to_pylist(), np.float32)
    np.testing.assert_array_equal(codes, arrays["code"])
    assert json.loads(table.schema.metadata[b"shape"]) == arrays["shape"].tolist()


def test_parquet_takes_names_that_are_no_text_and_many_pictures(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install 'calotype[data]'")
    monkeypatch.setattr(embed, "_ROWS", 3)
    names = [b"caf\xe9.png".decode("utf-8", "surrogateescape"), *"été b c d e f".split()]
    written = {
        "file": np.array(names),
        "split": np.array(["train"] * 7),
        "label": np.array([""] * 7),
        "code": np.arange(14, dtype=np.float32).reshape(7, 2),
        "shape": np.array([2, 1, 1]),
    }
    with columns.replacing(tmp_path / "codes.parquet") as stream:
        embed.write_parquet(stream, written)
    with columns.replacing(tmp_path / "codes.npz") as stream:
        columns.write_npz(stream, written)
    table = parquet.read_table(tmp_path / "codes.parquet")
    assert table["file"].to_pylist() == [r"caf\xe9.png", *names[1:]]
    assert np.array_equal(table["code"].to_pylist(), written["code"])
    assert read(tmp_path / "codes.npz")["file"].tolist() == names
    assert len(list(tmp_path.iterdir())) == 2


def test_tokens_decode_to_the_picture_that_stock_diffusers_gives(quantised, finished, pictures, tmp_path, capsys):
    assert cli.main(command("tokens", finished / "data.json", quantised, tmp_path / "tokens.npz")) == 0
    found = read(tmp_path / "tokens.npz")
    vae = VQModel.from_pretrained(quantised).eval()
    codes = vae.config.num_vq_embeddings
    assert found["codebook_size"] == codes and found["tokens"].shape == (96, 8, 8)
    assert found["tokens"].dtype == (np.uint8 if codes <= 256 else np.uint16)
    assert set(found["split"]) == {"train", "val"}
    assert [file.split("/")[0] for file in found["file"]] == found["label"].tolist()

    x = stored_pictures(pictures, found["file"][:20])
    numbers = torch.from_numpy(found["tokens"][:20].astype(np.int64))
    with torch.no_grad():
        expected = vae.decode(vae.encode(x).latents).sample
        z = vae.quantize.get_codebook_entry(numbers.flatten(), (*numbers.shape, vae.config.vq_embed_dim))
        decoded = vae.decode(z, force_not_quantize=True).sample
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=0)

    share = np.bincount(found["tokens"].ravel(), minlength=codes) / found["tokens"].size
    entropy = -sum(p * np.log(p) for p in share if p)
    expected = f"they use {np.mean(share > 0):.1%} of {codes} codes, perplexity {np.exp(entropy):.1f}."
    assert capsys.readouterr().out.endswith(expected + "\n")


def test_codes_of_a_quantised_autoencoder_are_its_code_vectors(quantised, finished, tmp_path):
    for name in ("embed", "tokens"):
        assert cli.main(command(name, finished / "data.json", quantised, tmp_path / f"{name}.npz")) == 0
    codes, tokens = read(tmp_path / "embed.npz"), read(tmp_path / "tokens.npz")
    book = VQModel.from_pretrained(quantised).quantize.embedding.weight.detach().numpy()
    vectors = book[tokens["tokens"]].transpose(0, 3, 1, 2)
    np.testing.assert_allclose(codes["code"].reshape(-1, *codes["shape"]), vectors, atol=1e-5)


@pytest.mark.parametrize("codes, dtype", [(2, np.uint8), (256, np.uint8), (257, np.uint16), (65537, np.uint32)])
def test_tokens_are_as_small_as_the_codebook_allows(grey, tmp_path, codes, dtype, capsys):
    common = dict(in_channels=1, out_channels=1, block_out_channels=(2, 2), norm_num_groups=1, latent_channels=2)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    vae = VQModel(**common, **blocks, num_vq_embeddings=codes, sample_size=12, mid_block_add_attention=False)
    with torch.no_grad():
        vae.quantize.embedding.weight.fill_(1e6)
        vae.quantize.embedding.weight[codes - 1] = 0.0  # the last number is the nearest
    vae.save_pretrained(tmp_path / "vae")
    assert cli.main(command("tokens", grey / "pictures", tmp_path / "vae", tmp_path / "tokens.npz")) == 0
    tokens = read(tmp_path / "tokens.npz")["tokens"]
    assert tokens.dtype == dtype and tokens.shape == (40, 6, 6) and (tokens == codes - 1).all()
    assert "perplexity 1.0." in capsys.readouterr().out


def test_a_small_picture_becomes_one_code_and_needs_no_labels(grey, tmp_path, capsys):
    assert cli.main(command("embed", grey / "pictures", grey / "vae", tmp_path / "codes.npz")) == 0
    assert "Accurac" not in capsys.readouterr().out
    found = read(tmp_path / "codes.npz")
    assert found["code"].shape == (40, 3) and set(found["label"]) == {""}
    x = stored_pictures(grey / "pictures", found["file"])
    vae = AutoencoderKL.from_pretrained(grey / "vae").eval()
    with torch.no_grad():
        mean = vae.encode(torch.nn.functional.pad(x, (2, 2, 2, 2), mode="replicate")).latent_dist.mean
    np.testing.assert_allclose(found["code"], mean.flatten(1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["embed", "tokens"])
def test_files_that_are_there_are_kept_unless_fresh_says_otherwise(grey, tmp_path, capsys, name):
    out = tmp_path / "x.npz"
    out.write_text("precious")
    message = refused(capsys, command(name, grey / "pictures", grey / "vae", out))
    assert f"--out {out} is there already" in message and "--fresh" in message
    assert out.read_text() == "precious"
    assert "must end in .npz" in refused(capsys, command(name, grey / "pictures", grey / "vae", tmp_path / "x.csv"))
    (tmp_path / "y.npz").mkdir()
    assert "is a folder" in refused(capsys, command(name, grey / "pictures", grey / "vae", tmp_path / "y.npz"))
    assert f"--vae {tmp_path}" in refused(capsys, command(name, grey / "pictures", tmp_path, tmp_path / "z.npz"))
    words = command(name, grey / "pictures", grey / "vae", tmp_path / "new" / "z.npz", "--image-size", "18")
    assert "--image-size 18x18" in refused(capsys, words) or name == "tokens"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npz", "y.npz"]


def test_fresh_replaces_a_file(grey, tmp_path):
    out = tmp_path / "x.npz"
    out.write_text("old")
    assert cli.main(command("embed", grey / "pictures", grey / "vae", out, "--fresh")) == 0
    assert len(read(out)["code"]) == 40


def test_an_autoencoder_without_codes_has_no_tokens(grey, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("calotype.stage1_vae.columns.open_sheet", lambda *_: pytest.fail("read for nothing"))
    message = refused(capsys, command("tokens", grey / "pictures", grey / "vae", tmp_path / "x.npz"))
    assert f"--vae {grey / 'vae'} is an AutoencoderKL, which has no tokens; train one with --regularizer vq" in message


@pytest.mark.parametrize("where", ["encoding", "writing"])
def test_an_interruption_leaves_the_old_file_and_no_other(grey, tmp_path, monkeypatch, where):
    out = tmp_path / "x.npz"
    out.write_text("old")

    def half(stream, *_, **__):
        stream.write(b"half")
        raise KeyboardInterrupt

    def stop(*_):
        raise KeyboardInterrupt

    if where == "writing":
        monkeypatch.setattr(np.lib.format, "write_array", half)
    else:
        monkeypatch.setattr(embed, "posterior", stop)
    assert cli.main(command("embed", grey / "pictures", grey / "vae", out, "--fresh")) == 130
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]


def test_without_scikit_learn_the_codes_are_written_all_the_same(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert cli.main(command("embed", finished / "data.json", finished / "stage1_vae/vae", tmp_path / "x.npz")) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Accuracies are left out") and "pip install 'calotype[eval]'" in last
    assert len(read(tmp_path / "x.npz")["code"]) == 96


def test_without_pyarrow_parquet_is_refused_before_any_work(grey, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setattr(embed, "open_autoencoder", lambda *_: pytest.fail("worked for nothing"))
    message = refused(capsys, command("embed", grey / "pictures", grey / "vae", tmp_path / "x.parquet"))
    assert f"--out {tmp_path / 'x.parquet'}" in message and "pip install 'calotype[data]'" in message


def test_a_picture_that_has_gone_bad_is_named_and_nothing_is_written(grey, tmp_path, capsys):
    assert cli.main(["data", str(grey / "pictures"), "--image-size", "12", "--out", str(tmp_path)]) == 0
    picture = grey / "pictures" / "5.png"
    content = picture.read_bytes()
    try:
        picture.write_bytes(content[:60])
        message = refused(capsys, command("embed", tmp_path / "data.json", grey / "vae", tmp_path / "x.npz"))
    finally:
        picture.write_bytes(content)
    assert "5.png can no longer be read" in message and not list(tmp_path.glob("*x.npz*"))


def test_the_untrained_encoder_is_the_same_for_the_same_seed_and_disturbs_nothing(grey):
    vae = AutoencoderKL.from_pretrained(grey / "vae")
    before = torch.random.get_rng_state()
    first, again, other = (embed.untrained(vae, seed).encoder.conv_in.weight for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first, vae.encoder.conv_in.weight)


def test_pca_of_the_pixels_is_fitted_on_the_training_pictures(finished, pictures, tmp_path, monkeypatch):
    """The features that are scored are scikit-learn's, up to the signs of the axes."""
    decomposition = pytest.importorskip("sklearn.decomposition", reason="pip install 'calotype[eval]'")
    seen = []
    monkeypatch.setattr(probes, "accuracy", lambda features, _: seen.append(features) or probes.Accuracy(0.0, 0.0))
    assert cli.main(command("embed", finished / "data.json", finished / "stage1_vae/vae", tmp_path / "x.npz")) == 0
    found = read(tmp_path / "x.npz")
    code, pca, untrained = seen
    train, val = found["split"] == "train", found["split"] == "val"
    np.testing.assert_array_equal(code["val"], found["code"][val])
    np.testing.assert_array_equal(code["train"], found["code"][train])
    x = stored_pictures(pictures, found["file"]).flatten(1).double().numpy()
    reference = decomposition.PCA(pca["train"].shape[1], svd_solver="full").fit(x[train])
    for split, here in (("train", train), ("val", val)):
        np.testing.assert_allclose(np.abs(pca[split][:, :20]), np.abs(reference.transform(x[here])[:, :20]), atol=2e-3)
    assert untrained["train"].shape == code["train"].shape
    assert not np.allclose(untrained["train"], code["train"], atol=0.1)
