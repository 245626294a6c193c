# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Features of a frozen encoder, computed once per image and cached on disk."""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from datasets import Dataset, Features, Image, Value, concatenate_datasets
from PIL import Image as PILImage
from pyarrow import ArrowInvalid
from torch import Tensor
from transformers import BaseImageProcessor

from ..images_tdd import to_rgb
from ..modeling_tdd import TDDModel
from .batches import DATA, Augmentation, build_train_transform, pixels_of, seed_for
from .examples import Row


@dataclass
class AugmentedViews:
    """Takes the place of the image processor in [`cache_features`], to cache several augmented views of each picture.

    An encoder knows the pictures on which it was trained better than others. A decoder that is trained on several
    views of them sees features that are more like those of new pictures.
    """

    augmentation: Augmentation
    image_processor: BaseImageProcessor
    num_views: int


ImageEncoding = BaseImageProcessor | AugmentedViews


@torch.inference_mode()
def cache_features(
    model: TDDModel,
    image_processor: ImageEncoding,
    dataset: Dataset,
    folder: str | Path,
    batch_size: int = 64,
) -> Dataset:
    r"""
    Puts the encoder's features, the `pooler_output` of [`TDDModel.get_image_features`], in the place of images. They
    are read from a file of `folder`, whose name is a hash of all that determines them: encoder, image processor or
    augmentation, and images. If it is missing or broken, it is made. Files of other encoders stay. Neither images nor
    features have to fit into memory. If there are several processes, let the first one write the file.

    Args:
        model ([`TDDModel`]): The model whose encoder is used, on any device.
        image_processor (`BaseImageProcessor` or [`AugmentedViews`]): The encoder's image processor. The views of a row
            depend only on their number and that of the row: the seeds of Python, NumPy and PyTorch are set.
        dataset (`Dataset`): A data set with columns `image` and `captions`.
        folder (`str` or `Path`): Folder of the files.
        batch_size (`int`): Number of images that are encoded at once.

    Returns:
        `Dataset`: rows with `captions` and `image_features`, an array of `np.float16` of shape `(num_tokens, width)`,
        or `(num_views, num_tokens, width)` with [`AugmentedViews`].
    """
    fingerprint = features_fingerprint(model, image_processor, dataset)
    file = Path(folder) / f"features-{fingerprint}.arrow"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not _is_whole(file, len(dataset)):
        file.unlink(missing_ok=True)
    was_training = model.training
    model.eval()
    features = dataset.select_columns("image").map(  # it writes to a temporary file, which it moves into place
        partial(_encode, model=model, image_processor=image_processor),
        with_indices=True,
        input_columns="image",
        batched=True,
        batch_size=batch_size,
        writer_batch_size=batch_size,
        remove_columns="image",
        features=Features({"image_features": Value("binary")}),  # read ten times as fast as a `datasets.Array2D`
        new_fingerprint=fingerprint,
        cache_file_name=str(file),
        load_from_cache_file=True,
        desc="features",
    )
    model.train(was_training)
    views = (image_processor.num_views,) if isinstance(image_processor, AugmentedViews) else ()
    rows = concatenate_datasets([features, dataset.select_columns("captions")], axis=1)
    return rows.with_transform(partial(_decode, shape=(*views, -1, model.encoder_hidden_size)))


def features_fingerprint(model: TDDModel, image_processor: ImageEncoding, dataset: Dataset) -> str:
    """A hash of everything that determines the features: weights, settings, and the bytes of all images in order."""
    vision_config = model.config.vision_config.to_dict()
    for key in ("_name_or_path", "transformers_version"):  # they may differ for the same encoder
        vision_config.pop(key, None)
    settings = [vision_config, model.config.pooling]
    if isinstance(image_processor, AugmentedViews):
        settings += [asdict(image_processor.augmentation), image_processor.num_views]
        image_processor = image_processor.image_processor
    settings.append(image_processor.to_dict())
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    for name, weight in model.encoder.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for image in dataset.cast_column("image", Image(decode=False))["image"]:
        content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _is_whole(file: Path, num_rows: int) -> bool:
    try:
        return len(Dataset.from_file(str(file))) == num_rows
    except (ArrowInvalid, OSError):
        return False


def _encode(images: list[PILImage.Image], rows: list[int], model: TDDModel, image_processor: ImageEncoding) -> Row:
    if isinstance(image_processor, AugmentedViews):
        views = [_augment(images, rows, image_processor, view) for view in range(image_processor.num_views)]
    else:
        views = [pixels_of(images, image_processor)]
    features = [model.get_image_features(view.to(model.device, model.dtype)).pooler_output for view in views]
    return {"image_features": [array.tobytes() for array in torch.stack(features, dim=1).half().cpu().numpy()]}


def _augment(images: list[PILImage.Image], rows: list[int], views: AugmentedViews, view: int) -> Tensor:
    transform = build_train_transform(views.augmentation, views.image_processor)
    pixel_values = []
    for image, row in zip(images, rows):
        set_seed(seed_for(DATA, row, view))
        pixel_values.append(transform(to_rgb(image)))
    return torch.stack(pixel_values)


def _decode(batch: Row, shape: tuple[int, ...]) -> Row:
    if "image_features" not in batch:  # another column was asked for
        return batch
    arrays = [np.frombuffer(features, np.float16).reshape(shape) for features in batch["image_features"]]
    return {**batch, "image_features": arrays}
