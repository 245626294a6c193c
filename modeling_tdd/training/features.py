# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Features of a frozen encoder, computed once per image and cached on disk."""

import hashlib
import json
import os
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image
from PIL import Image as PILImage
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BaseImageProcessor

from ..modeling_tdd import TDDModel
from .data import Example, build_train_transform
from .recipe import AugmentationRecipe


# Names of the dtypes in a safetensors header
STORED_DTYPES = {torch.float16: "F16", torch.float32: "F32"}


class AugmentedViews:
    r"""
    Takes the place of the image processor in [`cache_features`], to cache features of random training views.

    An encoder knows the pictures on which it was trained better than others. A decoder that is trained on several
    views of them sees features that are more like those of new pictures.

    Args:
        recipe ([`AugmentationRecipe`]): The augmentation.
        image_processor (`BaseImageProcessor`): The encoder's image processor.
        view (`int`, *optional*, defaults to 0): Number of this view of the pictures. Each view has its own file.
    """

    def __init__(self, recipe: AugmentationRecipe, image_processor: BaseImageProcessor, view: int = 0):
        self.transform = build_train_transform(recipe, image_processor)
        self.settings = {"augmentation": asdict(recipe), "view": view, "image_processor": image_processor.to_dict()}

    def __call__(self, images: list[PILImage.Image], return_tensors: str = "pt") -> dict[str, Tensor]:
        return {"pixel_values": torch.stack([self.transform(image) for image in images])}

    def to_dict(self) -> dict[str, Any]:
        return self.settings


@torch.inference_mode()
def cache_features(
    model: TDDModel,
    image_processor: BaseImageProcessor | AugmentedViews,
    dataset: Dataset,
    path: str | Path,
    batch_size: int = 64,
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    r"""
    The `pooler_output` of [`TDDModel.get_image_features`] for each image of a data set. The features are read from
    `path`. If the file is missing, or was made with another encoder, image processor or data set, they are computed
    and written to it.

    The file is written batch by batch and moved into place when it is complete. The returned tensor is mapped from the
    file. So neither has to fit into memory. If there are several processes, let the first one write the file
    (`accelerator.main_process_first()`).

    Args:
        model ([`TDDModel`]): The model whose encoder is used, on any device.
        image_processor (`BaseImageProcessor` or [`AugmentedViews`]): The encoder's image processor.
        dataset (`Dataset`): A data set with a column `image`.
        path (`str` or `Path`): A safetensors file.
        batch_size (`int`, *optional*, defaults to 64): Number of images that are encoded at once.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float16`):
            Type of the features, `torch.float16` or `torch.float32`.

    Returns:
        `torch.Tensor` of shape `(num_images, num_tokens, width)`, on the CPU.

    Raises:
        `ValueError`: for another dtype or an empty data set.
    """
    if dtype not in STORED_DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(map(str, STORED_DTYPES))}, got {dtype}.")
    if len(dataset) == 0:
        raise ValueError("`dataset` must hold at least one image.")
    path = Path(path)
    fingerprint = features_fingerprint(model, image_processor, dataset, dtype)
    cached = _read(path, fingerprint)
    if cached is None:
        _write(path, fingerprint, model, image_processor, dataset, batch_size, dtype)
        cached = _read(path, fingerprint)
    return cached


def features_fingerprint(
    model: TDDModel, image_processor: BaseImageProcessor | AugmentedViews, dataset: Dataset, dtype: torch.dtype
) -> str:
    """A hash of everything that determines the features: weights, settings, and the bytes of all images in order."""
    vision_config = model.config.vision_config.to_dict()
    for key in ("_name_or_path", "transformers_version"):  # they may differ for the same encoder
        vision_config.pop(key, None)
    settings = [vision_config, model.config.pooling, image_processor.to_dict(), str(dtype)]
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    for name, weight in model.encoder.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for example in dataset.select_columns("image").cast_column("image", Image(decode=False)):
        image = example["image"]
        content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _read(path: Path, fingerprint: str) -> Tensor | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("features") if (file.metadata() or {}).get("fingerprint") == fingerprint else None
    except SafetensorError:  # not a safetensors file: it is replaced
        return None


def _write(
    path: Path,
    fingerprint: str,
    model: TDDModel,
    image_processor: BaseImageProcessor | AugmentedViews,
    dataset: Dataset,
    batch_size: int,
    dtype: torch.dtype,
) -> None:
    def collate(examples: list[Example]) -> Tensor:
        images = [example["image"].convert("RGB") for example in examples]
        return image_processor(images, return_tensors="pt")["pixel_values"]

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    was_training = model.training
    model.eval()
    try:
        with open(temporary, "wb") as file:
            loader = DataLoader(dataset.select_columns("image"), batch_size=batch_size, collate_fn=collate)
            for index, pixel_values in enumerate(tqdm(loader, desc=f"features for {path.name}")):
                features = model.get_image_features(pixel_values.to(model.device, model.dtype)).pooler_output
                features = features.to("cpu", dtype)
                if index == 0:
                    file.write(_header(fingerprint, (len(dataset), *features.shape[1:]), dtype))
                file.write(features.contiguous().numpy().tobytes())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        model.train(was_training)


def _header(fingerprint: str, shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    """The header of a safetensors file with one tensor, `features`. The library can only write whole tensors."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    entry = {"dtype": STORED_DTYPES[dtype], "shape": shape, "data_offsets": [0, num_bytes]}
    header = json.dumps({"__metadata__": {"fingerprint": fingerprint}, "features": entry}).encode()
    header += b" " * (-len(header) % 8)  # tensors start at a multiple of 8 bytes
    return struct.pack("<Q", len(header)) + header
