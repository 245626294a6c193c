# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Every data format of the paper's data sets, streamed and from local folders, whole and broken."""

import logging
import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from samples import (
    CLASSES,
    grey,
    halve,
    noise_bytes,
    write_class_folders,
    write_coco,
    write_imagenet_parquet,
    write_tar,
    write_vl_enriched,
    write_webdataset,
)

from modeling_tdd.training.caption_data import load_caption_data, open_caption_shards, sample_captions
from modeling_tdd.training.data import load_classification_data
from modeling_tdd.training.examples import BadExample, ReadCaptioned, ReadLabelled
from modeling_tdd.training.recipe import CaptionDataRecipe, DataRecipe
from modeling_tdd.training.shards import ShardedRows


def read_all(data: Dataset | ShardedRows, read: ReadLabelled | ReadCaptioned) -> list[dict]:
    if isinstance(data, Dataset):
        return list(data)
    return [read(row) for shard in range(len(data.shard_names)) for row in data.rows(shard)]


CLASSIFICATION = {
    "imagenet-1k": (write_imagenet_parquet, {"path": "parquet"}),
    "class folders": (write_class_folders, {"path": "imagefolder"}),
    "webdataset, cls": (
        write_webdataset,
        {"path": "webdataset", "image_column": "jpg", "label_column": "cls", "num_labels": 3},
    ),
    "webdataset, json": (
        write_webdataset,
        {"path": "webdataset", "image_column": "jpg", "label_column": "json.label", "num_labels": 3},
    ),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["local", "streamed"])
@pytest.mark.parametrize("name", CLASSIFICATION)
def test_images_and_labels(tmp_path: Path, name: str, streaming: bool) -> None:
    write, fields = CLASSIFICATION[name]
    write(tmp_path / "data")
    recipe = DataRecipe(**fields, data_dir=str(tmp_path / "data"), streaming=streaming)
    train, held_out, names = load_classification_data(recipe)
    assert names == (CLASSES if "num_labels" not in fields else ["0", "1", "2"])
    assert isinstance(train, ShardedRows) == streaming and isinstance(held_out, Dataset)
    for data in (train, held_out):
        pairs = [(grey(example["image"]), example["label"]) for example in read_all(data, ReadLabelled(3))]
        assert sorted(pairs) == [(i, i % 3) for i in range(12)]


CAPTIONING = {
    "imagenet-1k-vl-enriched": (write_vl_enriched, {"path": "parquet", "caption_column": "caption_enriched"}),
    "coco": (write_coco, {"path": "coco", "train_split": "train2017", "eval_splits": ["val2017"]}),
    "webdataset, txt": (
        write_webdataset,
        {"path": "webdataset", "image_column": "jpg", "caption_column": "txt"},
    ),
    "webdataset, json": (
        write_webdataset,
        {"path": "webdataset", "image_column": "jpg", "caption_column": "json.caption"},
    ),
}


def expected_captions(name: str, index: int) -> list[str]:
    if name == "coco":
        return [f"picture {index} of kind {number}" for number in range(2)]
    return [f"json of {index}" if "json" in name else f"picture {index}"]


@pytest.mark.parametrize("streaming", [False, True], ids=["local", "streamed"])
@pytest.mark.parametrize("name", CAPTIONING)
def test_images_and_captions(tmp_path: Path, name: str, streaming: bool) -> None:
    write, fields = CAPTIONING[name]
    write(tmp_path / "data")
    recipe = CaptionDataRecipe(**fields, data_dir=str(tmp_path / "data"), streaming=streaming)
    data = load_caption_data(recipe)
    train = open_caption_shards(recipe) if streaming else data[recipe.train_split]
    for split in (train, data[recipe.eval_splits[0]]):
        examples = read_all(split, ReadCaptioned())
        assert {grey(e["image"]): e["captions"] for e in examples} == {
            i: expected_captions(name, i) for i in range(12)
        }
    if streaming:
        assert sorted(sample_captions(recipe, train)) == sorted(
            c for i in range(12) for c in expected_captions(name, i)
        )


def test_a_stream_names_its_shards_and_knows_its_size(tmp_path: Path) -> None:
    write_webdataset(tmp_path / "tars")
    recipe = DataRecipe("webdataset", data_dir=str(tmp_path / "tars"), image_column="jpg", label_column="cls")
    recipe.streaming, recipe.num_labels = True, 3
    train, _, _ = load_classification_data(recipe)
    assert [Path(name).name for name in train.shard_names] == [f"train-{i:06d}.tar" for i in range(3)]
    assert train.num_examples is None  # tar files do not say it
    write_class_folders(tmp_path / "folders")
    train, _, _ = load_classification_data(
        DataRecipe("imagefolder", data_dir=str(tmp_path / "folders"), streaming=True)
    )
    assert train.num_examples == 12


def test_integer_labels_need_their_number_and_stay_below_it(tmp_path: Path) -> None:
    write_webdataset(tmp_path)
    fields = {"path": "webdataset", "data_dir": str(tmp_path), "image_column": "jpg", "label_column": "cls"}
    with pytest.raises(ValueError, match="'cls' must be a `datasets.ClassLabel`, or hold integers with `data.num_lab"):
        load_classification_data(DataRecipe(**fields))
    train, held_out, _ = load_classification_data(DataRecipe(**fields, num_labels=2))
    assert set(train["label"]) == set(held_out["label"]) == {0, 1}  # rows of the label 2 are bad


def test_missing_splits_and_columns_of_a_stream_are_named(tmp_path: Path) -> None:
    write_imagenet_parquet(tmp_path)
    fields = {"path": "parquet", "data_dir": str(tmp_path), "streaming": True}
    with pytest.raises(ValueError, match="`parquet` has no split 'test'; it has train, validation"):
        load_classification_data(DataRecipe(**fields, eval_split="test"))
    with pytest.raises(ValueError, match="no column 'class' in 'train'; it has image, label"):
        load_classification_data(DataRecipe(**fields, label_column="class"))
    with pytest.raises(ValueError, match="'label' must hold strings or lists of strings, got ClassLabel"):
        load_caption_data(CaptionDataRecipe(**fields, caption_column="label"))


def test_bad_images_of_class_folders_are_skipped_and_reported(tmp_path: Path, caplog) -> None:
    write_class_folders(tmp_path)
    short = tmp_path / "train" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG"
    short.write_bytes(noise_bytes())
    halve(short)
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        train, held_out, _ = load_classification_data(DataRecipe("imagefolder", data_dir=str(tmp_path)))
    assert len(train) == 11 and len(held_out) == 12
    assert "1 of 12 examples of 'train' are bad: row" in caplog.text and f"{CLASSES[0]}_0.JPEG): unread" in caplog.text


def test_a_broken_first_shard_of_a_webdataset_does_not_hide_the_others(tmp_path: Path) -> None:
    write_webdataset(tmp_path)
    halve(tmp_path / "train-000000.tar")
    shutil.copy(tmp_path / "train-000000.tar", tmp_path / "validation-000000.tar")
    recipe = DataRecipe("webdataset", data_dir=str(tmp_path), image_column="jpg", label_column="cls", num_labels=3)
    recipe.streaming = True
    train, held_out, _ = load_classification_data(recipe)
    assert sorted(grey(image) for image in held_out["image"]) == [0, 1, *range(4, 12)]
    assert len(train.shard_names) == 3


def test_rejected_rows_of_a_stream(tmp_path: Path) -> None:
    members = {"0.jpg": b"no image", "0.txt": b"a cat", "1.jpg": noise_bytes(), "1.txt": b" ", "2.txt": b"a dog"}
    for split in ("train", "validation"):
        # The first rows determine the columns
        write_tar(
            tmp_path / f"{split}-0.tar", {f"{i}.{e}": members[f"1.{e}"] for i in "abcde" for e in ("jpg", "txt")}
        )
        write_tar(tmp_path / f"{split}-1.tar", members)
    fields = {"data_dir": str(tmp_path), "image_column": "jpg", "caption_column": "txt", "streaming": True}
    rows = open_caption_shards(CaptionDataRecipe("webdataset", **fields))
    problems = []
    for row in rows.rows(1):
        with pytest.raises(BadExample) as error:
            ReadCaptioned()(row)
        problems.append(str(error.value))
    assert problems == ["unreadable image (UnidentifiedImageError)", "no caption", "no image"]
