# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Features of a frozen encoder, computed once per image and cached on disk."""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from datasets import Dataset, Features, Image, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from PIL import Image as PILImage
from transformers import BaseImageProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..images_tdd import to_rgb
from ..modeling_tdd import TDDForImageClassification, TDDModel
from .batches import DATA, Augmentation, build_train_transform, seed_for
from .streaming import Row


@dataclass
class AugmentedViews:
    """Takes the place of the image processor in [`cache_features`], to cache several augmented views of each picture.
    An encoder knows its training pictures better than others: features of views are more like those of new ones."""

    augmentation: Augmentation
    image_processor: BaseImageProcessor
    num_views: int


ImageEncoding = BaseImageProcessor | AugmentedViews


@torch.random.fork_rng(devices=[])  # what comes next draws the same, whether the features had been cached or not
@torch.inference_mode()
def cache_features(
    model: TDDModel, image_processor: ImageEncoding, dataset: Dataset, folder: str | Path, batch_size: int = 64
) -> Dataset:
    r"""
    Puts the encoder's features, the `pooler_output` of [`TDDModel.get_image_features`], in the place of a data set's
    images. They are read from a file of `folder`, whose name is a hash of all that determines them: encoder, image
    processor or augmentation, and images. If it is missing, it is made. Neither images nor features have to fit into
    memory. If there are several processes, let the first one write the file.

    Returns:
        `Dataset`: rows with the other columns and `image_features`, an array of `np.float16` of shape
        `(num_tokens, width)`, or `(num_views, num_tokens, width)` with [`AugmentedViews`].
    """
    has_views = isinstance(image_processor, AugmentedViews)
    views = image_processor if has_views else AugmentedViews(Augmentation(), image_processor, num_views=1)
    shape = (*([views.num_views] if has_views else []), -1, model.encoder_hidden_size)
    fingerprint = features_fingerprint(model, views, dataset)
    file = Path(folder) / f"features-{fingerprint}.arrow"
    file.parent.mkdir(parents=True, exist_ok=True)
    was_training = model.training
    model.eval()
    model.encoder.to(memory_format=torch.channels_last)  # convolutions are twice as fast on a CPU
    features = dataset.select_columns("image").map(  # it writes to a temporary file, which it moves into place
        partial(_encode, model=model, views=views),
        with_indices=True,
        input_columns="image",
        batched=True,
        batch_size=batch_size,
        remove_columns="image",
        features=Features({"image_features": Value("binary")}),  # read ten times as fast as a `datasets.Array2D`
        new_fingerprint=fingerprint,
        cache_file_name=str(file),
        desc="features",
    )
    model.train(was_training)
    rows = concatenate_datasets([features, dataset.remove_columns("image")], axis=1)
    return rows.with_transform(partial(_decode, shape=shape))


def read_features(model: TDDForImageClassification) -> None:
    """Makes a classifier take cached features of its frozen encoder as its `pixel_values`, in this process alone."""
    model.model.get_image_features = lambda pixel_values, **_: BaseModelOutputWithPooling(pooler_output=pixel_values)


def features_fingerprint(model: TDDModel, views: AugmentedViews, dataset: Dataset) -> str:
    """A hash of everything that determines the features: weights, settings, and the bytes of all images in order."""
    vision_config = model.config.vision_config.to_dict()
    for key in ("_name_or_path", "transformers_version"):  # they may differ for the same encoder
        vision_config.pop(key, None)
    hasher = Hasher()
    hasher.update([vision_config, model.config.pooling, views.image_processor.to_dict()])
    hasher.update([asdict(views.augmentation), views.num_views])
    for name, weight in model.encoder.state_dict().items():
        hasher.update([name, weight])
    for image in dataset.cast_column("image", Image(decode=False))["image"]:
        hasher.update(Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"])
    return hasher.hexdigest()


def _encode(images: list[PILImage.Image], rows: list[int], model: TDDModel, views: AugmentedViews) -> Row:
    transform = build_train_transform(views.augmentation, views.image_processor)
    features = []
    for view in range(views.num_views):
        pixel_values = []
        for image, row in zip(images, rows):
            set_seed(seed_for(DATA, row, view))
            pixel_values.append(transform(to_rgb(image)))
        pixel_values = torch.stack(pixel_values).to(model.device, model.dtype, memory_format=torch.channels_last)
        features.append(model.get_image_features(pixel_values).pooler_output)
    return {"image_features": [array.tobytes() for array in torch.stack(features, dim=1).half().cpu().numpy()]}


def _decode(batch: Row, shape: tuple[int, ...]) -> Row:
    if "image_features" not in batch:  # another column was asked for
        return batch
    arrays = [np.frombuffer(features, np.float16).reshape(shape) for features in batch["image_features"]]
    return {**batch, "image_features": arrays}
