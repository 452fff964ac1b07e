"""`calotype embed`: the code of every picture in one file, and what the codes tell about the labels."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from diffusers import VQModel
from torch import Tensor

from calotype import device
from calotype.autoencoder import Vae, downsampling, pad, posterior
from calotype.data import Pictures
from calotype.errors import UserError
from calotype.randomness import key
from calotype.sheet import summary
from calotype.stage1_vae import probes
from calotype.stage1_vae.columns import (
    SPLITS,
    Measure,
    describe_pictures,
    measure_pictures,
    open_autoencoder,
    open_pictures,
    refuse_out,
    replacing,
    write_npz,
)
from calotype.stage1_vae.config import EmbedSettings

_ROWS = 4096  # pictures in a row group of a parquet file


def main(settings: EmbedSettings) -> None:
    """Write the codes; where there are labels, print how well they can be read off them."""
    refuse_out(settings.out, settings.fresh, (".npz", ".parquet"))
    _refuse_missing_pyarrow(settings.out)
    vae = open_autoencoder(settings)
    sheet = open_pictures(vae, settings)
    print(summary(sheet))
    pictures = {split: Pictures(sheet, split) for split in SPLITS}
    with replacing(settings.out) as stream:
        codes, shape = _encode(vae, pictures, settings)
        write = write_npz if settings.out.suffix == ".npz" else write_parquet
        write(stream, describe_pictures(sheet) | {"code": codes, "shape": np.array(shape)})
    print(f"Wrote {len(codes):,} codes of {codes.shape[1]:,} numbers to {settings.out}.")
    if sheet.classes:
        _probe(vae, pictures, codes, settings)


def untrained(vae: Vae, seed: int) -> Vae:
    """An autoencoder of the same architecture with fresh weights, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "untrained"))
        fresh = type(vae).from_config(vae.config).eval()
    device.for_drawing(fresh)
    return fresh.to(vae.device)


def write_parquet(stream: BinaryIO, columns: dict[str, np.ndarray]) -> None:
    """Write text columns and the codes (N, d) as a column of lists; their shape (c, h, w) is JSON in the metadata."""
    import pyarrow as pa
    from pyarrow import parquet

    texts, code = ("file", "split", "label"), columns["code"]
    fields = [*((name, pa.string()) for name in texts), ("code", pa.list_(pa.float32(), code.shape[1]))]
    schema = pa.schema(fields, metadata={"shape": str(columns["shape"].tolist())})
    with parquet.ParquetWriter(stream, schema) as writer:
        for start in range(0, len(code), _ROWS):
            here = slice(start, start + _ROWS)
            arrays = [pa.array(map(_utf8, columns[name][here].tolist()), pa.string()) for name in texts]
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(code[here].ravel()), code.shape[1]))
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def _utf8(text: str) -> str:
    """A file name as parquet can hold it: bytes that are no text are spelt out."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _refuse_missing_pyarrow(out: Path) -> None:
    if out.suffix != ".parquet":
        return
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UserError(
            f"--out {out} needs pyarrow; pip install 'calotype[data]', or give a name that ends in .npz."
        ) from None


def _encode(vae: Vae, pictures: dict[str, Pictures], settings: EmbedSettings) -> tuple[np.ndarray, tuple[int, ...]]:
    """Posterior means (N, c * h * w) of both splits in float32, for VQ the quantised latents; and (c, h, w)."""

    def mean(x: Tensor) -> Tensor:
        with device.autocast(settings.precision):
            return posterior(vae, x)["mean"]

    found = [
        measure_pictures(mean, pictures[split], range(len(pictures[split])), settings.batch_size, f"Encoding {split}")
        for split in SPLITS
    ]
    return np.concatenate(found).reshape(sum(map(len, found)), -1), found[0].shape[1:]


def _probe(vae: Vae, pictures: dict[str, Pictures], codes: np.ndarray, settings: EmbedSettings) -> None:
    """Print the accuracies, or one line that says why there are none."""
    sample = probes.choose({split: pictures[split].labels.numpy() for split in SPLITS})
    if fault := probes.obstacle(sample):
        print(f"Accuracies are left out: {fault}")
        return
    held_out = len(pictures["train"]) + np.array(sample["val"].numbers)  # their rows among the codes
    features = {"code": {"train": codes[sample["train"].numbers], "val": codes[held_out]}}
    references = _References(pictures, sample, settings)
    features["PCA of the pixels"] = references.pca(codes.shape[1])
    features["untrained encoder"] = references.encoder(untrained(vae, settings.seed))
    print(
        probes.table({name: (f["train"].shape[1], probes.accuracy(f, sample)) for name, f in features.items()}, sample)
    )


class _References:
    """Features of the sampled pictures that cost no training."""

    def __init__(self, pictures: dict[str, Pictures], sample: probes.Sample, settings: EmbedSettings):
        self.pictures, self.sample, self.settings = pictures, sample, settings

    def encoder(self, vae: Vae) -> probes.Features:
        """Codes (n, d) of another autoencoder; of a VQModel before the codebook, which means nothing untrained."""

        def code(x: Tensor) -> Tensor:
            with device.autocast(self.settings.precision):
                if isinstance(vae, VQModel):
                    return vae.encode(pad(x, downsampling(vae))).latents.float().flatten(1)
                return posterior(vae, x)["mean"].flatten(1)

        return self._measure(code, "Encoding untrained")

    def pca(self, count: int) -> probes.Features:
        """The pixels (n, k) along at most `count` principal axes of the training pictures."""
        train = self.pictures["train"]
        numbers = probes.enough_to_fit(self.sample["train"].numbers, train[0].numel())
        pixels = measure_pictures(lambda x: x.flatten(1), train, numbers, self.settings.batch_size, "Reading pixels")
        mean, axes = (torch.from_numpy(part).to(device.device()) for part in probes.principal_axes(pixels, count))
        return self._measure(lambda x: (x.flatten(1) - mean) @ axes.T, "Projecting pixels")

    def _measure(self, measure: Measure, title: str) -> probes.Features:
        batch_size = self.settings.batch_size
        return {
            split: measure_pictures(measure, self.pictures[split], chosen.numbers, batch_size, f"{title}, {split}")
            for split, chosen in self.sample.items()
        }
