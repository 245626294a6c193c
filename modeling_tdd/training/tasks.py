# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""What differs between the tasks: the model, its processor, the data, their batches, and the metrics."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoImageProcessor, BaseImageProcessor, EvalPrediction, PreTrainedModel, ViTImageProcessor
from transformers.utils import logging

from ..configuration_tdd import TDDConfig
from ..evaluation.baselines import AutoregressiveCaptioner, WordClassifier, nearest_captions
from ..evaluation.compute_metrics import CaptionMetrics, top1, word_scores
from ..modeling_tdd import TDDForCaptioning, TDDForImageClassification, TDDModel, TDDPreTrainedModel
from ..processing_tdd import TDDProcessor, saveable_image_processor
from .batches import (
    Augmentation,
    CaptionCollator,
    ImageCollator,
    WordCollator,
    build_mixup,
    build_train_transform,
    count_words,
)
from .data import caption_texts, leave_out_unknown, load_captions, load_labels
from .features import AugmentedViews, cache_features, read_features
from .recipe import Recipe
from .tokenization import train_tokenizer


logger = logging.get_logger(__name__)

CORRUPTIONS = {"tdd": "gaussian", "mdd": "mask", "uniform": "uniform"}
MIN_WORD_COUNT = 2  # an encoder learns the words that occur in so many training captions

Metrics = Callable[[EvalPrediction], dict[str, float]]
Collator = Callable[[list[Any]], dict[str, Tensor]]
Start = tuple[TDDPreTrainedModel, list[str]]  # a model, and its modules that are new: others are pretrained


@dataclass
class Task:
    """What [`TDDTrainer`] needs: the model, and the part of it that is saved, with its processor; the training data;
    data and metrics of each evaluation split; collators; and the modules that are new in a pretrained model."""

    model: nn.Module
    saved: PreTrainedModel
    processor: BaseImageProcessor | TDDProcessor
    train_data: Any
    eval_data: dict[str, Any]
    metrics: dict[str, Metrics]
    collator: Collator
    eval_collator: Collator
    new_modules: list[str] = field(default_factory=list)


def make_task(recipe: Recipe, method: str, feature_folder: Path) -> Task:
    """Makes the task of a recipe for one of [`methods_of`]. Features of a frozen encoder are cached in a folder."""
    makers = {"classification": make_classification, "captioning": make_captioning, "encoder": make_encoder}
    return makers[recipe.task](recipe, method, feature_folder)


def methods_of(recipe: Recipe) -> list[str]:
    """The methods that a recipe can train or score; the first is its own. Its model's fields are checked."""
    config = TDDConfig(**recipe.model)
    if recipe.task == "encoder":
        return ["encoder"]
    if recipe.checkpoint is not None:
        config = TDDConfig.from_pretrained(recipe.checkpoint, **recipe.model)
    methods = sorted(CORRUPTIONS, key=lambda method: CORRUPTIONS[method] != config.corruption)
    if recipe.checkpoint is not None:
        return methods[:1]
    if recipe.task == "captioning":
        methods.append("ar")
        if recipe.encoder is not None and is_cached(recipe):
            methods.append("nearest")
    return methods


def has_steps(recipe: Recipe, method: str) -> bool:
    """Whether the method denoises step by step. For one token MDD is a linear head."""
    return method in ("tdd", "uniform") or (method == "mdd" and recipe.task == "captioning")


def make_classification(recipe: Recipe, method: str, feature_folder: Path) -> Task:
    splits, names = load_labels(recipe.data)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    new_modules = ["connector", "denoiser", "classifier"]
    fields = model_fields(recipe, method) | labels
    model, new_modules = start_model(TDDForImageClassification, recipe, fields, new_modules)
    processor = load_image_processor(recipe)
    if classifies_features(recipe):
        splits = cache_splits(recipe, model.model, processor, splits, feature_folder)
        read_features(model)
    train_data = splits.pop(recipe.data.train_split)
    transform = build_train_transform(recipe.augmentation, processor)
    mixup = build_mixup(recipe.augmentation, len(names))
    collators = (ImageCollator(processor, transform, mixup), ImageCollator(processor))
    return Task(model, model, processor, train_data, splits, dict.fromkeys(splits, top1), *collators, new_modules)


def make_captioning(recipe: Recipe, method: str, feature_folder: Path) -> Task:
    splits = load_captions(recipe.data)
    texts = caption_texts(splits[recipe.data.train_split])
    processor = load_processor(recipe, texts)
    splits = {split: leave_out_unknown(rows, processor.tokenizer, split) for split, rows in splits.items()}
    tokens = {name: getattr(processor.tokenizer, name) for name in ("pad_token_id", "eos_token_id")}
    fields = {"vocab_size": len(processor.tokenizer), **tokens, **model_fields(recipe, method)}
    model_class = AutoregressiveCaptioner if method == "ar" else TDDForCaptioning
    model, new_modules = start_model(model_class, recipe, fields, ["connector", "denoiser", "lm_head"])
    if is_cached(recipe):
        splits = cache_splits(recipe, model.model, processor.image_processor, splits, feature_folder)
    train_data = splits.pop(recipe.data.train_split)
    metrics = {split: CaptionMetrics(processor, rows["captions"], texts) for split, rows in splits.items()}
    transform = build_train_transform(recipe.augmentation, processor.image_processor)
    collators = (CaptionCollator(processor, transform), CaptionCollator(processor))
    return Task(model, model, processor, train_data, splits, metrics, *collators, new_modules)


def is_cached(recipe: Recipe) -> bool:
    """Whether the features of the encoder are computed once, before training."""
    return recipe.model.get("freeze_encoder", False) and not recipe.data.streaming


def classifies_features(recipe: Recipe) -> bool:
    """Whether a classifier is trained on cached features: nothing may change the images or the encoder."""
    return is_cached(recipe) and recipe.augmentation == Augmentation() and recipe.lora is None


def load_processor(recipe: Recipe, texts: list[str]) -> TDDProcessor:
    """The processor of the checkpoint; or the image processor, and a tokenizer that is trained on the captions."""
    if recipe.checkpoint is not None:
        return TDDProcessor.from_pretrained(recipe.checkpoint)
    if "max_position_embeddings" not in recipe.model:
        raise ValueError("The recipe of a new captioner needs `model.max_position_embeddings`, the longest caption.")
    tokenizer = train_tokenizer(texts, **recipe.tokenizer)
    tokenizer.model_max_length = recipe.model["max_position_embeddings"]
    return TDDProcessor(load_image_processor(recipe), tokenizer)


def cache_splits(
    recipe: Recipe, model: TDDModel, image_processor: BaseImageProcessor, splits: dict[str, Dataset], folder: Path
) -> dict[str, Dataset]:
    """The splits with the features of a frozen encoder in place of images. With several views the training features
    are those of augmented ones."""
    augmented = AugmentedViews(recipe.augmentation, image_processor, recipe.feature_views)
    views = {recipe.data.train_split: augmented} if recipe.feature_views > 1 else {}
    return {
        split: cache_features(model, views.get(split, image_processor), rows, folder) for split, rows in splits.items()
    }


def score_nearest(recipe: Recipe, feature_folder: Path) -> list[dict[str, Any]]:
    """The scores of the nearest-neighbour baseline: the caption of the training picture with the most similar
    features, without augmentation."""
    task = make_captioning(replace(recipe, feature_views=1), "tdd", feature_folder)
    train = task.train_data
    captions = [texts[0] for texts in train["captions"]]
    train_features = torch.from_numpy(np.stack(train["image_features"][:]))
    scores = []
    for split, rows in task.eval_data.items():
        features = torch.from_numpy(np.stack(rows["image_features"][:]))
        predictions = nearest_captions(features, train_features, captions)
        scores.append({"split": split, **task.metrics[split].score(predictions)})
    return scores


def make_encoder(recipe: Recipe, method: str, feature_folder: Path) -> Task:
    splits = load_captions(recipe.data)
    train_data = splits.pop(recipe.data.train_split)
    counts = count_words(train_data["captions"], MIN_WORD_COUNT)
    config = TDDConfig(**recipe.model, id2label=dict(enumerate(counts)))
    model = WordClassifier(config, torch.tensor(list(counts.values())) / len(train_data))
    model.to(memory_format=torch.channels_last)  # convolutions are a tenth faster
    processor, words = load_image_processor(recipe), list(counts)
    transform = build_train_transform(recipe.augmentation, processor)
    collators = (WordCollator(processor, words, transform), WordCollator(processor, words))
    metrics = dict.fromkeys(splits, word_scores)
    return Task(model, model.model.encoder, processor, train_data, splits, metrics, *collators)


def model_fields(recipe: Recipe, method: str) -> dict[str, Any]:
    """The configuration's fields. They choose between TDD and MDD on the same network."""
    return {**recipe.model, "corruption": CORRUPTIONS[method]} if method in CORRUPTIONS else recipe.model


def start_model(
    model_class: type[TDDPreTrainedModel], recipe: Recipe, fields: dict[str, Any], new_modules: list[str]
) -> Start:
    """The model of a checkpoint, on a pretrained encoder, whose `new_modules` are new, or with random weights."""
    if recipe.checkpoint is not None:
        return load_checkpoint(model_class, recipe.checkpoint, fields)
    if recipe.encoder is not None:
        return model_class.from_encoder_pretrained(recipe.encoder, **fields), new_modules
    if not recipe.model:
        raise ValueError("The recipe has nothing to start from: give `checkpoint`, `encoder` or `model`.")
    return model_class(model_class.config_class(**fields)), []


def load_checkpoint(model_class: type[TDDPreTrainedModel], checkpoint: str, fields: dict[str, Any]) -> Start:
    """A classifier keeps label embedding and head where the data have its labels, and gets rows in their order."""
    config = TDDConfig.from_pretrained(checkpoint)
    old = [config.id2label[index] for index in range(config.num_labels)]
    labels = list(fields.get("id2label", dict(enumerate(old))).values())
    if labels == old:
        return model_class.from_pretrained(checkpoint, **fields), []
    own = {**fields, "id2label": config.id2label, "label2id": config.label2id}
    weights = model_class.from_pretrained(checkpoint, **own).state_dict()
    is_kept = sorted(labels) == sorted(old)
    heads = [name for name in weights if name.startswith("classifier.") or "token_embedding." in name]
    rows = {name: weights.pop(name) for name in heads}
    weights |= {name: rows[name][[old.index(label) for label in labels]] for name in heads if is_kept}
    theirs, ours = (f"{len(names)} labels ({', '.join(names[:5])} ...)" for names in (old, labels))
    what = "put in the order of the data" if is_kept else "initialised anew"
    logger.warning(f"{checkpoint} has {theirs}, the data {ours}: label embedding and classifier are {what}.")
    model = model_class(TDDConfig.from_pretrained(checkpoint, **fields))
    model.load_state_dict(weights, strict=False)
    return model, [] if is_kept else ["token_embedding", "classifier"]


def load_image_processor(recipe: Recipe) -> BaseImageProcessor:
    if source := recipe.checkpoint or recipe.encoder:
        return saveable_image_processor(AutoImageProcessor.from_pretrained(source))
    return ViTImageProcessor(**recipe.image_processor, do_convert_rgb=True)
