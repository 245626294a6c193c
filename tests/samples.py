# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Small data sets in the formats of the large ones, made on the spot. Picture i has the grey value i everywhere."""

import io
import json
import tarfile
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage


CLASSES = ["n01440764", "n01443537", "n01484850"]


def picture_bytes(index: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (16, 16), color=(index, index, index)).save(buffer, kind)
    return buffer.getvalue()


def grey(picture: PILImage.Image) -> int:
    return picture.convert("RGB").getpixel((0, 0))[0]


def noise_bytes() -> bytes:
    """A picture that fills more than a decoder's first buffer, so that half of it is truly half."""
    buffer = io.BytesIO()
    PILImage.effect_noise((64, 64), 50).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def halve(file: Path) -> None:
    """Cuts a file short, and not where a tar archive has the end of a block."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2 - 200])


def write_imagenet_parquet(folder: Path, num_shards: int = 3, rows: int = 4) -> None:
    """ILSVRC/imagenet-1k on the Hub: `data/<split>-00000-of-00294.parquet` with `image` and `label`."""
    features = Features({"image": Image(), "label": ClassLabel(names=CLASSES)})
    (folder / "data").mkdir(parents=True)
    for split in ("train", "validation"):
        for shard in range(num_shards):
            ids = range(shard * rows, (shard + 1) * rows)
            columns = {
                "image": [{"bytes": picture_bytes(i), "path": f"{CLASSES[i % 3]}_{i}.JPEG"} for i in ids],
                "label": [i % 3 for i in ids],
            }
            file = folder / f"data/{split}-{shard:05d}-of-{num_shards:05d}.parquet"
            Dataset.from_dict(columns, features=features).to_parquet(file)


def write_class_folders(folder: Path, num_images: int = 12) -> None:
    """ImageNet unpacked: `<split>/<class>/<name>.JPEG`."""
    for split in ("train", "validation"):
        for index in range(num_images):
            file = folder / split / CLASSES[index % 3] / f"{CLASSES[index % 3]}_{index}.JPEG"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture_bytes(index))


VL_ENRICHED_FEATURES = Features(
    {
        "image_id": Value("string"),
        "image": Image(),
        "label": Value("int32"),
        "label_bbox_enriched": List({"bbox": List(Value("float64")), "label": Value("string")}),
        "caption_enriched": Value("string"),
        "issues": List({"issue_type": Value("string"), "confidence": Value("float64")}),
    }
)


def write_vl_enriched(folder: Path, num_shards: int = 3, rows: int = 4) -> None:
    """visual-layer/imagenet-1k-vl-enriched on the Hub, with all its columns."""
    (folder / "data").mkdir(parents=True)
    for split in ("train", "validation"):
        for shard in range(num_shards):
            lines = [
                {
                    "image_id": f"n01440764_{i}",
                    "image": {"bytes": picture_bytes(i), "path": None},
                    "label": i % 3,
                    "label_bbox_enriched": [{"bbox": [0.0, 1.0, 2.0, 3.0], "label": "fish"}],
                    "caption_enriched": f"picture {i}",
                    "issues": [{"issue_type": "blur", "confidence": 0.9}] if i % 2 else None,
                }
                for i in range(shard * rows, (shard + 1) * rows)
            ]
            file = folder / f"data/{split}-{shard:05d}-of-{num_shards:05d}.parquet"
            Dataset.from_list(lines, features=VL_ENRICHED_FEATURES).to_parquet(file)


def write_coco(folder: Path, num_images: int = 12, splits: tuple[str, ...] = ("train2017", "val2017")) -> None:
    """COCO 2017 unpacked: `annotations/captions_<split>.json` and `<split>/<id of 12 digits>.jpg`."""
    (folder / "annotations").mkdir(parents=True)
    for split in splits:
        (folder / split).mkdir()
        images, annotations = [], []
        for index in range(num_images):
            images.append({"id": index, "file_name": f"{index:012d}.jpg", "height": 16, "width": 16})
            (folder / split / f"{index:012d}.jpg").write_bytes(picture_bytes(index))
            for number in range(2):
                caption = {
                    "id": 10 * index + number,
                    "image_id": index,
                    "caption": f"picture {index} of kind {number}\n",
                }
                annotations.append(caption)
        content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
        (folder / f"annotations/captions_{split}.json").write_text(json.dumps(content))


def write_tar(file: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def write_webdataset(folder: Path, num_shards: int = 3, rows: int = 4) -> None:
    """WebDataset shards of img2dataset's and webdataset's kinds: .jpg with .txt, .cls and .json."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        for shard in range(num_shards):
            members = {}
            for i in range(shard * rows, (shard + 1) * rows):
                # PNG data, so that grey values are exact: readers go by content
                members[f"{i:09d}.jpg"] = picture_bytes(i)
                members[f"{i:09d}.txt"] = f"picture {i}".encode()
                members[f"{i:09d}.cls"] = str(i % 3).encode()
                members[f"{i:09d}.json"] = json.dumps({"caption": f"json of {i}", "label": i % 3}).encode()
            write_tar(folder / f"{split}-{shard:06d}.tar", members)
