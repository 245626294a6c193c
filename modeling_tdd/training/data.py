# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Data sets of images with labels or captions: any that `datasets` reads, scikit-learn's digits, and COCO 2017."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from PIL import Image as PILImage
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..images_tdd import check_size
from ..settings_tdd import check, integer
from .batches import Example
from .streaming import MAX_NAMED, ImageStream, ReadExample, Row


logger = logging.get_logger(__name__)
Rows = TypeVar("Rows", Dataset, datasets.IterableDataset)
PLAIN_IMAGE = {"bytes": Value("binary"), "path": Value("string")}  # an undecoded `Image`
NUM_SAMPLED_CAPTIONS = 100_000  # number of streamed examples whose captions are read to train a tokenizer on


@dataclass
class ImageData:
    """What data sets of labels and of captions share. Bad examples are left out, see [`drop_bad_examples`]."""

    path: str  # the first argument of `load_dataset`: "parquet", "imagefolder", "webdataset" or an id
    data_files: dict[str, str] | None = None  # files of each split; relative paths start at the recipe's folder
    data_dir: str | None = None  # folder of the data, likewise
    train_split: str = "train"
    eval_splits: list[str] = field(default_factory=lambda: ["validation"])  # the first is watched during training
    eval_share: float = 0.0  # share of the training split to hold out as the only evaluation split, "validation"
    image_column: str = "image"
    num_proc: int | None = None  # number of processes that look for bad examples in data that are not streamed
    streaming: bool = False  # whether the training split is read shard by shard during training
    num_examples: int | None = None  # of the training split, for streaming and `scripts/estimate.py`

    @property
    def roots(self) -> list[str] | None:
        """`list[str]`, *optional*: the folders in which an image must lie that the data name by its path. `None`: any,
        for data of the Hub, and for image folders, which name no paths themselves."""
        if self.path == "coco":
            return [str(folder.resolve()) for folder in Path(self.data_dir or "").iterdir() if folder.is_dir()]
        given = [self.data_dir] if self.data_dir else [str(Path(f).parent) for f in (self.data_files or {}).values()]
        given = given or [folder for folder in [self.path] if Path(folder).is_dir()]
        is_local = self.path != "imagefolder" and not any("://" in place for place in given)
        return [str(Path(place).resolve()) for place in given] if given and is_local else None

    def __post_init__(self):
        if self.streaming and (self.path in ("digits", "imagefolder", "coco") or self.num_examples is None):
            needed = "parquet, webdataset or a data set of the Hub, and `data.num_examples`"
            raise ValueError(f"`data.streaming` needs {needed}, got {self.path!r} and {self.num_examples}.")
        for name in ("num_proc", "num_examples"):
            if getattr(self, name) is not None:
                check(f"data.{name}", getattr(self, name), integer(1))
        if self.eval_share and (self.streaming or self.train_split == "validation" or not 0 < self.eval_share < 1):
            needed = "0, or in (0, 1) without `data.streaming` and `data.train_split=validation`"
            raise ValueError(f"`data.eval_share` must be {needed}, got {self.eval_share}.")


@dataclass
class LabelData(ImageData):
    """Images and labels. `path` may also be `"digits"`: those of scikit-learn."""

    label_column: str = "label"  # `json.label` is the key `label` of a column `json`
    num_labels: int | None = None  # for plain integers and `scripts/estimate.py`


@dataclass
class CaptionData(ImageData):
    """Images and captions. `path` may also be `"coco"`: COCO 2017 as published, `annotations/` being in `data_dir`."""

    caption_column: str = "caption"  # a string or a list of strings; `json.caption` is a key of a column `json`
    lower_case: bool = False  # whether to lower-case the captions


def load_labels(data: LabelData) -> tuple[dict[str, Dataset | ImageStream], list[str]]:
    """Loads the training split, which is first, and the evaluation splits, with the columns `image` and `label`, and
    the names of the labels. Labels that are plain integers, strings or booleans are sorted, and their names are as
    they are written. With `data.streaming` the training split is an [`ImageStream`]. Raises a `ValueError` if a split,
    a column, a valid example or the number of labels is missing, or if splits have different labels."""
    splits, builder = _open_splits(data, data.label_column, "label")
    values, names = _find_labels(data, splits)
    codes = {value: index for index, value in enumerate(values)}
    return _read_splits(data, splits, builder, partial(read_labelled, codes=codes, roots=data.roots)), names


def _find_labels(data: LabelData, splits: dict[str, Rows]) -> tuple[list[Any], list[str]]:
    """The labels as the data hold them, and their names. Both are the same for all splits."""
    feature = splits[data.train_split].features["label"]
    names, dtype = getattr(feature, "names", None), getattr(feature, "dtype", "")
    written = {split: getattr(_feature_of_files(data, split), "names", None) for split in splits}
    for split, others in written.items():
        if others != written[data.train_split]:
            needed = f"the labels of {data.train_split!r} in their order, {written[data.train_split]}"
            raise ValueError(f"{split!r} must have {needed}, got {others}.")
    if "int" in dtype and data.num_labels and names is None:
        names = list(map(str, range(data.num_labels)))
    if names is not None:
        values = list(range(len(names)))
    elif data.streaming or not any(kind in dtype for kind in ("int", "string", "bool")):
        needed = "a `datasets.ClassLabel`, integers with `data.num_labels` given or, in data that are not streamed,"
        raise ValueError(f"{data.label_column!r} must be {needed} integers, strings or booleans, got {feature}.")
    else:
        values = sorted(set().union(*(rows.unique("label") for rows in splits.values())) - {None})
        names = list(map(str, values))
    if data.num_labels not in (None, len(names)):
        raise ValueError(f"`data.num_labels` must be {len(names)}, as in the data, got {data.num_labels}.")
    return values, names


def _feature_of_files(data: LabelData, split: str) -> Any:
    """What the files of a split say of its labels: `datasets` reads all parquet files by the features of the first."""
    if data.path == "digits":
        return None
    builder = _open_builder(data)
    if builder.name != "parquet":
        return None
    own = datasets.load_dataset_builder("parquet", data_files={split: builder.config.data_files[split]})
    return own.as_streaming_dataset(split).features.flatten(max_depth=2).get(data.label_column)


def load_captions(data: CaptionData) -> dict[str, Dataset | ImageStream]:
    """As [`load_labels`], with the columns `image` and `captions`, a list of at least one string."""
    splits, builder = _open_splits(data, data.caption_column, "captions")
    for split, rows in splits.items():
        feature = rows.features["captions"]
        if getattr(feature, "feature", feature) not in (Value("string"), Value("large_string"), Value("null")):
            raise ValueError(f"Column {data.caption_column!r} must hold strings or lists of strings, got {feature}.")
        if isinstance(rows, Dataset):  # as bytes: a table with a string that is not UTF-8 could not be read at all
            kind = List(Value("binary")) if hasattr(feature, "feature") else Value("binary")
            splits[split] = rows.cast_column("captions", kind)
    read = partial(read_captioned, lower_case=data.lower_case, roots=data.roots)
    return _read_splits(data, splits, builder, read)


def caption_texts(rows: Dataset | ImageStream) -> list[str]:
    """All captions of a split of [`load_captions`]. Of a stream: those of the first examples, which are cached."""
    if isinstance(rows, Dataset):
        return [caption for captions in rows["captions"] for caption in captions]
    table = rows.to_table(["captions"], NUM_SAMPLED_CAPTIONS)
    lower_case = rows.read.keywords["lower_case"]
    return [caption for captions in table["captions"] for caption in clean_captions(captions, lower_case)]


def _open_splits(data: ImageData, source: str, column: str) -> tuple[dict[str, Rows], datasets.DatasetBuilder | None]:
    """Opens the splits with the columns `image`, not decoded, and `column`, which is called `source` in the data."""
    builder = _open_builder(data) if data.streaming else None
    if builder is not None:
        found = builder.as_streaming_dataset()
    elif data.path == "digits":
        found = load_digits_dataset()
    elif data.path == "coco":
        found = _load_coco(data.data_dir)
    else:
        found = datasets.load_dataset(data.path, data_files=data.data_files, data_dir=data.data_dir)
    splits = {}
    for split in [data.train_split] if data.eval_share else [data.train_split, *data.eval_splits]:
        if split not in found:
            raise ValueError(f"`{data.path}` has no split {split!r}; it has {', '.join(found) or 'none'}.")
        features = found[split].features
        if missing := {data.image_column, source} - {*features, *features.flatten(max_depth=2)}:
            found_columns = ", ".join(features)
            raise ValueError(f"`{data.path}` has no column {min(missing)!r} in {split!r}; it has {found_columns}.")
        splits[split] = _two_columns(found[split], data.image_column, source, column)
    return splits, builder


def _open_builder(data: ImageData) -> datasets.DatasetBuilder:
    arguments = {"path": data.path, "data_files": data.data_files, "data_dir": data.data_dir}
    builder = datasets.load_dataset_builder(**arguments)
    if data.path == "webdataset":  # which takes the columns from the first shard, even if that is broken
        for file in chain.from_iterable(builder.config.data_files.values()):
            with suppress(Exception):  # broken archives raise errors of many types
                one = datasets.load_dataset_builder("webdataset", data_files={"train": [file]})
                features = one.as_streaming_dataset("train").features
                return datasets.load_dataset_builder(**arguments, features=features)
    return builder


def _decode_member(content: bytes, decode: Callable[[bytes], Any]) -> Any:
    """A text that is not UTF-8, or a broken JSON, is one missing value, and not the end of its archive."""
    with suppress(Exception):
        return decode(content)


def _read_archive(path: str, members: Iterator[Any], read: Callable[..., Iterator[Row]]) -> Iterator[Row]:
    """The examples of an archive with the fields of the first ones: pictures or sidecars may be missing."""
    examples, first, problem = read(path, members), [], None
    try:
        first.extend(islice(examples, WebDataset.NUM_EXAMPLES_FOR_FEATURES_INFERENCE))
    except Exception as error:  # what comes before the break is read
        problem = error
    names = dict.fromkeys(chain.from_iterable(first))
    yield from ({name: example.get(name) for name in names} for example in chain(first, examples))
    if problem is not None:
        raise problem


WebDataset.DECODERS = {name: partial(_decode_member, decode=decode) for name, decode in WebDataset.DECODERS.items()}
WebDataset._get_pipeline_from_tar = partial(_read_archive, read=WebDataset._get_pipeline_from_tar)


def _two_columns(rows: Rows, image: str, source: str, column: str) -> Rows:
    # A stream of `Image` ends at a cell of two missing values
    is_plain = isinstance(rows.features[image], (Image, dict)) and not isinstance(rows, Dataset)
    rows = rows.cast_column(image, PLAIN_IMAGE if is_plain else Image(decode=False))
    if source not in rows.features:  # `json.caption` is the key `caption` of the column `json`
        features = Features({**rows.features, source: rows.features.flatten(max_depth=2)[source]})
        rows = rows.map(_copy_key, fn_kwargs={"source": source}, features=features)
    rows = rows.select_columns([image, source])
    for name, new_name in ((image, "image"), (source, column)):
        rows = rows if name == new_name else rows.rename_column(name, new_name)
    return rows


def _copy_key(row: Row, source: str) -> Row:
    parent, _, key = source.partition(".")
    return {source: (row[parent] or {}).get(key)}


def _read_splits(
    data: ImageData, splits: dict[str, Rows], builder: datasets.DatasetBuilder | None, read: ReadExample
) -> dict[str, Dataset | ImageStream]:
    """Makes a stream of the training split, if it is to be one, and checks the rows of the others."""
    results = {}
    for split, rows in splits.items():
        if builder is not None:
            files = list((builder.config.data_files or {}).get(split, []))
            # Formats with one file per shard give shards the names of files. Others split files, or have no files.
            names = files if len(files) == rows.num_shards else [f"shard {index}" for index in range(rows.num_shards)]
            fingerprint = Hasher.hash([builder.cache_dir, split, rows.features])
            stream = ImageStream(rows, names, fingerprint, read, data.num_examples)
            rows = stream if split == data.train_split else stream.to_table(list(rows.features))
        results[split] = rows if isinstance(rows, ImageStream) else drop_bad_examples(rows, read, split, data.num_proc)
    if data.eval_share:
        parts = results[data.train_split].train_test_split(test_size=data.eval_share, seed=0)
        return {data.train_split: parts["train"], "validation": parts["test"]}
    return results


def drop_bad_examples(data: Dataset, read: ReadExample, split: str, num_proc: int | None = None) -> Dataset:
    """Leaves out and reports bad rows, and replaces `label` or `captions` by what `read` returns. All rows are checked
    once, before training. So row numbers are stable, as cached features need, all processes see the same rows, and
    `datasets` caches the result. Raises a `ValueError` if no row is left."""
    (column,) = set(data.column_names) - {"image"}
    feature = List(Value("string")) if column == "captions" else Value("int64")
    features = Features({column: feature, "problem": Value("string")})
    check = partial(_check_row, read=read, column=column)
    checked = data.map(
        check, with_indices=True, remove_columns=data.column_names, num_proc=num_proc, features=features, desc=split
    )
    data = concatenate_datasets([data.select_columns("image"), checked.select_columns(column)], axis=1)
    good = [index for index, problem in enumerate(checked["problem"]) if not problem]
    if len(good) < len(data):
        named = "; ".join(list(filter(None, checked["problem"]))[:MAX_NAMED])
        message = f"{len(data) - len(good)} of {len(data)} examples of {split!r} are bad: {named}."
        if not good:
            raise ValueError(message)
        logger.warning(f"{message} They are skipped.")
        data = data.select(good)
    return data.cast_column("image", Image())


def _check_row(row: Row, index: int, read: ReadExample, column: str) -> Row:
    example, problem = read(row)
    return {column: None if problem else example[column], "problem": problem and f"row {index}: {problem}"}


def read_labelled(row: Row, codes: dict[Any, int], roots: list[str] | None = None) -> tuple[Example, str]:
    """Makes an example of a row with a `label`, whose number is in `codes`, and says why it is bad, if it is."""
    image, problem = read_image(row["image"], roots)
    if row["label"] not in codes:
        values = list(codes)
        problem = f"the label must be in {values[0]} ... {values[-1]}, got {row['label']}"
    return {"image": image, "label": codes.get(row["label"])}, problem


def read_captioned(row: Row, lower_case: bool, roots: list[str] | None = None) -> tuple[Example, str]:
    """Likewise of a row with `captions`, a string or a list of strings."""
    image, problem = read_image(row["image"], roots)
    captions = clean_captions(row["captions"], lower_case)
    return {"image": image, "captions": captions}, problem if captions else "no caption in UTF-8"


def read_image(image: Row | None, roots: list[str] | None = None) -> tuple[PILImage.Image | None, str]:
    """Decodes the whole image of an undecoded cell of `datasets.Image`, whose file must be in one of the folders
    `roots`, links resolved."""
    if not image or not any(image.values()):
        return None, "no image"
    content, path = image["bytes"], image["path"]
    if content is None and (roots is not None or "://" not in path):
        if not Path(path).is_file():  # a pipe would be waited for
            return None, f"no such image {path}"
        if roots is not None and not any(Path(path).resolve().is_relative_to(root) for root in roots):
            return None, f"image {path} is not in the data's folder"
    try:
        if content is not None or "://" not in path:
            with PILImage.open(path if content is None else BytesIO(content)) as opened:
                check_size(opened)  # before it is decoded
        picture = Image().decode_example(image)
        picture.load()  # opening reads only the header: decoding shows whether the file is truncated
        return picture, ""
    except Exception as error:  # Pillow's decoders raise errors of many types
        reason = error if isinstance(error, ValueError) and "MAX_IMAGE" in str(error) else type(error).__name__
        return None, f"unreadable image {path or ''} ({reason})"


def clean_captions(captions: str | bytes | list[str | bytes | None] | None, lower_case: bool) -> list[str]:
    """The captions in UTF-8 that are not empty, with single spaces."""
    captions = [captions] if isinstance(captions, (str, bytes)) else captions or []
    captions = [caption.decode(errors="replace") if isinstance(caption, bytes) else caption for caption in captions]
    captions = [" ".join((caption or "").split()) for caption in captions]
    return [text.lower() if lower_case else text for text in captions if text and "\ufffd" not in text]


def leave_out_unknown(
    rows: Dataset | ImageStream, tokenizer: PreTrainedTokenizerBase, split: str
) -> Dataset | ImageStream:
    """Leaves out captions of which the tokenizer knows no word, or in which it finds a special token, such as a
    written `[EOS]`. An example without another caption is bad."""
    if isinstance(rows, Dataset):  # whose images have been decoded once to find the bad ones
        rows = rows.cast_column("image", Image(decode=False))
        return drop_bad_examples(rows, partial(_read_known, tokenizer=tokenizer), split)
    rows.read = partial(_read_known, tokenizer=tokenizer, read=rows.read)
    return rows


def _read_known(row: Row, tokenizer: PreTrainedTokenizerBase, read: ReadExample | None = None) -> tuple[Example, str]:
    example, problem = (row, "") if read is None else read(row)
    if not problem:
        captions, unknown = example["captions"], {tokenizer.unk_token_id}
        specials = {*tokenizer.all_special_ids} - unknown | {tokenizer.eos_token_id}
        tokens = map(set, tokenizer(captions, add_special_tokens=False, verbose=False)["input_ids"])
        example["captions"] = [text for text, ids in zip(captions, tokens) if ids - unknown and not ids & specials]
        problem = "" if example["captions"] else f"no known word, or a special token, in {captions}"
    return example, problem


def load_digits_dataset() -> DatasetDict:
    """scikit-learn's digits: 1,797 images of 8 x 8 pixels. A fifth of each class is the split `validation`."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    arrays = (digits.images * (255 / 16)).round().astype("uint8")
    images = [PILImage.fromarray(array).convert("RGB") for array in arrays]
    features = Features({"image": Image(), "label": ClassLabel(num_classes=10)})
    data = Dataset.from_dict({"image": images, "label": digits.target}, features=features)
    train, validation = train_test_split(range(len(data)), test_size=0.2, random_state=0, stratify=digits.target)
    return DatasetDict(train=data.select(train), validation=data.select(validation))


def _load_coco(folder: str | None) -> dict[str, Dataset]:
    """The splits of COCO that `folder` holds, with the columns `image` and `caption`, a list."""
    if folder is None:
        raise ValueError("`data.path: coco` needs `data.data_dir`, the folder that holds `annotations/`.")
    features = Features({"image": Image(decode=False), "caption": List(Value("string"))})
    splits = {}
    for file in sorted(Path(folder).glob("annotations/captions_*.json")):
        images = Path(folder, file.stem.removeprefix("captions_"))

        def rows(file: Path = file, images: Path = images) -> Iterator[Row]:
            content, captions = json.loads(file.read_text()), defaultdict(list)
            for annotation in content["annotations"]:
                captions[annotation["image_id"]].append(annotation["caption"])
            for image in content["images"]:
                yield {"image": str(images / image["file_name"]), "caption": captions[image["id"]]}

        if images.is_dir():  # `datasets` caches the rows; the times are there so that changed files are read again
            fingerprint = Hasher.hash([(str(path), path.stat().st_mtime_ns) for path in (file, images)])
            splits[images.name] = Dataset.from_generator(rows, features=features, fingerprint=fingerprint)
    return splits
