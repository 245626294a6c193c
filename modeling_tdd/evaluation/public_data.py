# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The public pictures of the experiments as parquet files: CIFAR-10, Fashion-MNIST and Tux Paint's stamps."""

import gzip
from collections.abc import Callable, Iterable
from pathlib import Path

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage


SPLITS = ("train", "validation", "test")
NUM_VALIDATION = 5_000  # the last rows of the published training split
NUM_STAMPS = 100  # of the validation and of the test split each
SHARES = (1, 10)  # percent of the training rows that `train_<share>` has, from the first
HUB_NAMES = {"cifar10": "uoft-cs/cifar10", "fashion_mnist": "zalando-datasets/fashion_mnist"}
CLOTHES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle-boot"]


def prepare_splits(name: str, source: Path, folder: Path) -> None:
    r"""
    Writes the splits of a data set as parquet files with the columns `image` and `label`: `train` without the last
    5,000 rows, which are `validation`; `test`, the published one; and `train_1` and `train_10`, the first 1 and 10 %
    of `train`. Files that exist are left alone.

    Args:
        name (`str`): `"cifar10"` or `"fashion_mnist"`.
        source (`Path`):
            A folder with `train.parquet` and `test.parquet`, or with the four files of MNIST's format that Debian's
            package `dataset-fashion-mnist` has. If there is none, the data set is loaded from the Hub.
        folder (`Path`): Where the files go.

    Raises:
        `ValueError`: for another name.
    """
    if name not in HUB_NAMES:
        raise ValueError(f"`name` must be one of {', '.join(HUB_NAMES)}, got {name!r}.")
    if _are_written((*SPLITS, *(f"train_{share}" for share in SHARES)), folder):
        return
    read = _reader(name, source)
    rows, test = read("train"), read("test")
    count = len(rows) - NUM_VALIDATION
    splits = {"train": rows.select(range(count)), "validation": rows.select(range(count, len(rows))), "test": test}
    splits |= {f"train_{share}": rows.select(range(count * share // 100)) for share in SHARES}
    _write(splits, folder)


def prepare_stamps(source: Path, folder: Path) -> None:
    r"""
    Writes 785 captioned pictures as parquet files with the columns `image` and `caption`, in an order drawn at random:
    100 of them are `validation`, 100 `test`, and the others `train`. Files that exist are left alone. The pictures are
    under the GPL-2: what was made of them is for experiments, and is not published.

    Args:
        source (`Path`): The folder of stamps of Debian's package `tuxpaint-stamps-default`.
        folder (`Path`): Where the files go.

    Raises:
        `FileNotFoundError`: if `source` has no pictures.
    """
    if _are_written(SPLITS, folder):
        return
    pictures = [path for path in sorted(source.rglob("*.png")) if path.with_suffix(".txt").exists()]
    if not pictures:
        raise FileNotFoundError(
            f"{source} has no pictures. `apt-get download tuxpaint-stamps-default`, unpack the package by `dpkg -x`, "
            f"and move its folder usr/share/tuxpaint/stamps to {source}."
        )
    captions = [path.with_suffix(".txt").read_text(encoding="utf-8").splitlines()[0] for path in pictures]
    columns = {"image": [{"bytes": path.read_bytes()} for path in pictures], "caption": captions}
    rows = Dataset.from_dict(columns, features=Features({"image": Image(), "caption": Value("string")}))
    order = np.random.default_rng(0).permutation(len(rows))
    parts = zip(("validation", "test", "train"), np.split(order, [NUM_STAMPS, 2 * NUM_STAMPS]))
    _write({split: rows.select(part) for split, part in parts}, folder)


def _are_written(splits: Iterable[str], folder: Path) -> bool:
    return all((folder / f"{split}.parquet").exists() for split in splits)


def _write(splits: dict[str, Dataset], folder: Path) -> None:
    """Writes each split with its images inside, or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        temporary = folder / f"{split}.tmp"
        rows.to_parquet(temporary)
        temporary.replace(folder / f"{split}.parquet")


def _reader(name: str, source: Path) -> Callable[[str], Dataset]:
    """A function that reads the published `train` or `test` split with the columns `image` and `label`."""
    if (source / "train.parquet").exists():
        return lambda split: datasets.load_dataset("parquet", data_files=str(source / f"{split}.parquet"))["train"]
    if (source / "train-images-idx3-ubyte.gz").exists():
        return lambda split: read_idx(source, {"train": "train", "test": "t10k"}[split])

    def from_hub(split: str) -> Dataset:
        rows = datasets.load_dataset(HUB_NAMES[name], split=split)
        return rows.rename_column("img", "image") if "img" in rows.column_names else rows

    return from_hub


def read_idx(folder: Path, prefix: str) -> Dataset:
    """Reads Fashion-MNIST's images and labels in MNIST's format, such as `train-images-idx3-ubyte.gz`."""
    labels = np.frombuffer(gzip.decompress((folder / f"{prefix}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, -1, 8)
    pixels = np.frombuffer(gzip.decompress((folder / f"{prefix}-images-idx3-ubyte.gz").read_bytes()), np.uint8, -1, 16)
    images = [PILImage.fromarray(image) for image in pixels.reshape(len(labels), 28, 28)]
    features = Features({"image": Image(), "label": ClassLabel(names=CLOTHES)})
    return Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features)
