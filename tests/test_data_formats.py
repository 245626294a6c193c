# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Every data format of the paper's data sets, streamed and from local folders, whole and broken."""

import io
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from samples import (
    CLASSES,
    grey,
    halve,
    noise_bytes,
    picture_bytes,
    write_class_folders,
    write_coco,
    write_imagenet_parquet,
    write_tar,
    write_vl_enriched,
    write_webdataset,
)

from modeling_tdd.training.data import CaptionData, LabelData, caption_texts, load_captions, load_labels, read_image
from modeling_tdd.training.streaming import ImageStream


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


def cases(formats: dict, tables: str) -> list:
    """All formats as they are and, except for `tables`, streamed."""
    local = [pytest.param(name, False, id=name) for name in formats]
    return local + [pytest.param(name, True, id=f"{name}, streamed") for name in formats if name != tables]


@pytest.mark.parametrize(("name", "streaming"), cases(CLASSIFICATION, tables="class folders"))
def test_images_and_labels(tmp_path: Path, name: str, streaming: bool) -> None:
    write, fields = CLASSIFICATION[name]
    write(tmp_path / "data")
    size = {"num_examples": 12, "streaming": True} if streaming else {}
    splits, names = load_labels(LabelData(**fields, data_dir=str(tmp_path / "data"), **size))
    assert names == (CLASSES if "num_labels" not in fields else ["0", "1", "2"])
    assert list(splits) == ["train", "validation"]
    assert isinstance(splits["train"], ImageStream if streaming else Dataset)
    for rows in splits.values():
        pairs = [(grey(example["image"]), example["label"]) for example in rows]
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


@pytest.mark.parametrize(("name", "streaming"), cases(CAPTIONING, tables="coco"))
def test_images_and_captions(tmp_path: Path, name: str, streaming: bool) -> None:
    write, fields = CAPTIONING[name]
    write(tmp_path / "data")
    size = {"num_examples": 12, "streaming": True} if streaming else {}
    splits = load_captions(CaptionData(**fields, data_dir=str(tmp_path / "data"), **size))
    expected = {i: expected_captions(name, i) for i in range(12)}
    for rows in splits.values():
        assert {grey(example["image"]): example["captions"] for example in rows} == expected
        assert sorted(caption_texts(rows)) == sorted(sum(expected.values(), []))


def test_a_stream_names_its_shards(tmp_path: Path) -> None:
    write_webdataset(tmp_path)
    fields = {"data_dir": str(tmp_path), "image_column": "jpg", "label_column": "cls", "num_labels": 3}
    stream = load_labels(LabelData("webdataset", **fields, streaming=True, num_examples=11))[0]["train"]
    assert [Path(name).name for name in stream.names] == [f"train-{i:06d}.tar" for i in range(3)]
    assert stream.num_examples == 11


def test_integer_labels_of_a_stream_need_their_number_and_stay_below_it(tmp_path: Path) -> None:
    write_webdataset(tmp_path)
    fields = {"path": "webdataset", "data_dir": str(tmp_path), "image_column": "jpg", "label_column": "cls"}
    stream = {"streaming": True, "num_examples": 12}
    with pytest.raises(ValueError, match="'cls' must be a `datasets.ClassLabel`, integers with `data.num_lab"):
        load_labels(LabelData(**fields, **stream))
    with pytest.raises(ValueError, match="'txt' must be a `datasets.ClassLabel`, integers .*'string'"):
        load_labels(LabelData(**{**fields, "label_column": "txt"}, num_labels=3, **stream))
    splits, _ = load_labels(LabelData(**fields, num_labels=2))
    assert set(splits["train"]["label"]) == set(splits["validation"]["label"]) == {0, 1}  # rows of label 2 are bad
    with pytest.raises(ValueError, match="`data.num_labels` must be 12, as in the data, got 3"):
        load_labels(LabelData(**{**fields, "label_column": "__key__"}, num_labels=3))


def write_labels(folder: Path, feature: Any, **labels: list[Any]) -> LabelData:
    """Parquet files of a split each, whose picture i has the label i of a list."""
    folder.mkdir()
    for split, values in labels.items():
        own = feature[split] if isinstance(feature, dict) else feature
        images = [{"bytes": picture_bytes(i), "path": None} for i in range(len(values))]
        table = Dataset.from_dict(
            {"image": images, "label": values}, features=Features({"image": Image(), "label": own})
        )
        table.to_parquet(folder / f"{split}.parquet")
    return LabelData("parquet", data_dir=str(folder))


@pytest.mark.parametrize(
    ("feature", "train", "validation", "names", "codes"),
    [
        (Value("int64"), [10, 3, 5], [10, 7], ["3", "5", "7", "10"], [[3, 0, 1], [3, 2]]),
        (Value("string"), ["dog", "cat", "dog"], ["cat", "cow"], ["cat", "cow", "dog"], [[2, 0, 2], [0, 1]]),
        (Value("bool"), [True, False], [False], ["False", "True"], [[1, 0], [0]]),
    ],
    ids=["integers", "strings", "booleans"],
)
def test_plain_labels_are_found(
    tmp_path: Path, feature: Value, train: list, validation: list, names: list[str], codes: list[list[int]]
) -> None:
    """All splits share the numbers, which follow the order of the labels: 3 before 10."""
    splits, found = load_labels(write_labels(tmp_path / "data", feature, train=train, validation=validation))
    assert found == names and [rows["label"][:] for rows in splits.values()] == codes


def test_labels_of_no_use_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="'label' must be .* integers, strings or booleans, got Value\\('float64'\\)"):
        load_labels(write_labels(tmp_path / "float", Value("float64"), train=[0.5, 1.0], validation=[1.0]))
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        splits, names = load_labels(
            write_labels(tmp_path / "none", Value("string"), train=["a", None, "b"], validation=["a"])
        )
    assert names == ["a", "b"] and splits["train"]["label"][:] == [0, 1]
    assert "1 of 3 examples of 'train' are bad: row 1: the label must be in a ... b, got None" in caplog.text


@pytest.mark.parametrize("other", [["dog", "cat"], ["cat", "dog", "cow"], None], ids=["order", "names", "plain"])
def test_splits_with_other_labels_are_refused(tmp_path: Path, other: list[str] | None) -> None:
    """`datasets` reads the files of all splits by the features of the first, and so takes dogs for cats."""
    features = {"train": ClassLabel(names=["cat", "dog"])}
    features["validation"] = Value("int64") if other is None else ClassLabel(names=other)
    data = write_labels(tmp_path / "data", features, train=[0, 1], validation=[0, 1])
    with pytest.raises(ValueError, match="'validation' must have the labels of 'train' in their order, .*cat.*, got "):
        load_labels(data)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("broken", ["not UTF-8", "no picture", "no first picture", "no sidecar"])
def test_one_bad_member_is_one_bad_example_of_a_webdataset(tmp_path: Path, broken: str, streaming: bool) -> None:
    for split in ("train", "validation"):
        for shard in range(2):
            members = {}
            for i in range(4 * shard, 4 * shard + 4):
                members |= {f"{i}.jpg": picture_bytes(i), f"{i}.txt": f"picture {i}".encode(), f"{i}.json": b"{}"}
            if broken == "not UTF-8":
                members[f"{4 * shard + 1}.txt"] = "café".encode("latin-1")
            else:
                place = 4 * shard + (broken != "no first picture")
                del members[f"{place}.{'json' if broken == 'no sidecar' else 'jpg'}"]
            write_tar(tmp_path / f"{split}-{shard}.tar", members)
    fields = {"data_dir": str(tmp_path), "image_column": "jpg", "caption_column": "txt", "streaming": streaming}
    splits = load_captions(CaptionData("webdataset", **fields, num_examples=12))
    missing = {"no sidecar": set(), "no first picture": {0, 4}}.get(broken, {1, 5})
    for rows in splits.values():
        assert {grey(example["image"]) for example in rows} == set(range(8)) - missing


def test_missing_splits_and_columns_are_named(tmp_path: Path) -> None:
    write_imagenet_parquet(tmp_path)
    for streaming in (False, True):
        fields = {"path": "parquet", "data_dir": str(tmp_path), "streaming": streaming, "num_examples": 12}
        with pytest.raises(ValueError, match="`parquet` has no split 'test'; it has train, validation"):
            load_labels(LabelData(**fields, eval_splits=["test"]))
        for column in ("class", "label.name"):
            with pytest.raises(ValueError, match=f"no column '{column}' in 'train'; it has image, label"):
                load_labels(LabelData(**fields, label_column=column))
        with pytest.raises(ValueError, match="'label' must hold strings or lists of strings, got ClassLabel"):
            load_captions(CaptionData(**fields, caption_column="label"))


def test_bad_images_of_class_folders_are_skipped_and_reported(tmp_path: Path, caplog) -> None:
    write_class_folders(tmp_path)
    short = tmp_path / "train" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG"
    short.write_bytes(noise_bytes())
    halve(short)
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        splits, _ = load_labels(LabelData("imagefolder", data_dir=str(tmp_path)))
    assert len(splits["train"]) == 11 and len(splits["validation"]) == 12
    assert (
        "1 of 12 examples of 'train' are bad: row" in caplog.text and f"{CLASSES[0]}_0.JPEG (OSError)" in caplog.text
    )


def test_a_broken_first_shard_of_a_webdataset_does_not_hide_the_others(tmp_path: Path) -> None:
    write_webdataset(tmp_path)
    halve(tmp_path / "train-000000.tar")
    shutil.copy(tmp_path / "train-000000.tar", tmp_path / "validation-000000.tar")
    fields = {"data_dir": str(tmp_path), "image_column": "jpg", "label_column": "cls", "num_labels": 3}
    splits, _ = load_labels(LabelData("webdataset", **fields, streaming=True, num_examples=12))
    assert sorted(grey(image) for image in splits["validation"]["image"]) == [0, 1, *range(4, 12)]
    assert len(splits["train"].names) == 3


def test_rejected_rows_of_a_stream(tmp_path: Path) -> None:
    members = {"0.jpg": b"no image", "0.txt": b"a cat", "1.jpg": noise_bytes(), "1.txt": b" ", "2.txt": b"a dog"}
    # The first rows determine the columns
    good = {f"{i}.{end}": {"jpg": noise_bytes(), "txt": b"good"}[end] for i in "abcde" for end in ("jpg", "txt")}
    for split in ("train", "validation"):
        write_tar(tmp_path / f"{split}-0.tar", good)
        write_tar(tmp_path / f"{split}-1.tar", members)
    fields = {"data_dir": str(tmp_path), "image_column": "jpg", "caption_column": "txt"}
    stream = load_captions(CaptionData("webdataset", **fields, streaming=True, num_examples=8))["train"]
    problems = [stream.read(row)[1] for _, row in stream._read(stream.rows, [1], pytest.fail)]
    assert problems == ["unreadable image 0.jpg (UnidentifiedImageError)", "no caption in UTF-8", "no image"]


def test_a_caption_of_a_table_that_is_not_utf_8_is_skipped_and_named(tmp_path: Path, caplog) -> None:
    picture = io.BytesIO()
    PILImage.new("RGB", (4, 4)).save(picture, "PNG")
    captions = pa.array([b"a cat", b"\xff\xfe", b"a dog"], pa.binary()).cast(pa.string(), safe=False)
    images = pa.array([{"bytes": picture.getvalue(), "path": None}] * 3)
    pq.write_table(pa.table({"image": images, "caption": captions}), tmp_path / "train.parquet")
    files = {split: str(tmp_path / "train.parquet") for split in ("train", "validation")}
    splits = load_captions(CaptionData(path="parquet", data_files=files))
    assert [row["captions"] for row in splits["train"]] == [["a cat"], ["a dog"]]
    assert "1 of 3 examples of 'train' are bad: row 1: no caption in UTF-8" in caplog.text


# ---- Images that data name by a path


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A picture that is not in the folder of the data, `tmp_path / "data"`."""
    (tmp_path / "data").mkdir()
    (tmp_path / "private.png").write_bytes(picture_bytes(3))
    return tmp_path / "private.png"


def make_paths(folder: Path, outside: Path) -> dict[str, str]:
    """Names of pictures in `folder` and why they are bad; `folder` gets a link, a pipe and a folder."""
    (folder / "link.png").symlink_to(outside)
    (folder / "linked").symlink_to(outside.parent)
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    (folder / "good.png").write_bytes(picture_bytes(1))
    up = "../" * (len(folder.parts) - len(outside.parent.parts))
    leaving = (f"{up}{outside.name}", str(outside), "link.png", f"linked/{outside.name}")
    absent = ("pipe.png", "folder.png", "missing.png")
    return dict.fromkeys(leaving, "is not in the data's folder") | dict.fromkeys(absent, "no such image")


def test_images_of_coco_outside_of_its_folder_are_skipped_and_named(tmp_path: Path, outside: Path, caplog) -> None:
    write_coco(tmp_path / "data", num_images=8, splits=("val2017",))
    problems = make_paths(tmp_path / "data/val2017", outside)
    file = tmp_path / "data/annotations/captions_val2017.json"
    content = json.loads(file.read_text())
    for image, name in zip(content["images"], [*problems, "good.png"]):
        image["file_name"] = name
    file.write_text(json.dumps(content))
    data = CaptionData("coco", data_dir=str(tmp_path / "data"), train_split="val2017", eval_splits=[])
    assert [grey(row["image"]) for row in load_captions(data)["val2017"]] == [1]
    for index, problem in enumerate(problems.values()):
        assert re.search(rf"row {index}: [^;]*{problem}", caplog.text), caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_images_of_a_table_outside_of_its_folder_are_skipped_and_named(
    tmp_path: Path, outside: Path, caplog, streaming: bool
) -> None:
    folder = tmp_path / "data"
    problems = make_paths(folder, outside)
    cells = [{"bytes": None, "path": str(folder / name)} for name in [*problems, "good.png"]]
    cells += [{"bytes": None, "path": None}, None, {"bytes": picture_bytes(2), "path": "/etc/name only.png"}]
    for split in ("train", "validation"):
        pq.write_table(pa.table({"image": cells, "caption": ["a"] * len(cells)}), folder / f"{split}.parquet")
    size = {"streaming": True, "num_examples": 2} if streaming else {}
    rows = load_captions(CaptionData("parquet", data_dir=str(folder), **size))["validation"]
    assert [grey(row["image"]) for row in rows] == [1, 2]
    for index, problem in enumerate([*problems.values(), None, "no image", "no image"]):
        assert problem is None or re.search(rf"row {index}: [^;]*{problem}", caplog.text), caplog.text


def test_a_table_names_no_url(tmp_path: Path) -> None:
    image, problem = read_image({"bytes": None, "path": "http://127.0.0.1:9/a.png"}, roots=[str(tmp_path)])
    assert image is None and problem == "no such image http://127.0.0.1:9/a.png"


def test_a_decompression_bomb_is_skipped_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PILImage.new("L", (101, 100)).save(tmp_path / "bomb.png")
    content = (tmp_path / "bomb.png").read_bytes()
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 10_000)
    monkeypatch.setattr(PILImage.Image, "load", lambda self: pytest.fail("it was decoded"))
    for cell in ({"bytes": content, "path": None}, {"bytes": None, "path": str(tmp_path / "bomb.png")}):
        image, problem = read_image(cell)
        assert image is None and "101 x 100 pixels are more than `PIL.Image.MAX_IMAGE_PIXELS`, 10000" in problem
