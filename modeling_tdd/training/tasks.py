# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""What differs between the tasks: the model, its processor, the data, their batches, and the metrics."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    BaseImageProcessor,
    EvalPrediction,
    PreTrainedModel,
    ProcessorMixin,
    ViTImageProcessor,
)
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import logging

from ..configuration_tdd import TDDConfig
from ..evaluation import load_metric
from ..evaluation.baselines import AutoregressiveCaptioner, nearest_captions
from ..modeling_tdd import TDDForCaptioning, TDDForImageClassification, TDDModel, TDDPreTrainedModel
from ..processing_tdd import TDDProcessor
from .batches import (
    CaptionCollator,
    ImageCollator,
    WordCollator,
    build_mixup,
    build_train_transform,
    count_words,
)
from .data import caption_texts, load_captions, load_labels
from .features import AugmentedViews, cache_features
from .recipe import Recipe
from .tokenization import train_tokenizer


logger = logging.get_logger(__name__)

CORRUPTIONS = {"tdd": "gaussian", "mdd": "mask"}
MIN_WORD_COUNT = 2  # an encoder learns the words that occur in so many training captions

Metrics = Callable[[EvalPrediction], dict[str, float]]


@dataclass
class Task:
    r"""
    What [`TDDTrainer`] needs of a task.

    Args:
        model (`nn.Module`): The model to train.
        saved (`PreTrainedModel`): The part of it that is saved.
        processor: What is saved beside it.
        train_data (`Dataset` or [`ImageStream`]): The training examples.
        eval_data (`dict`): The examples of each evaluation split.
        collator, eval_collator (`Callable`): Make batches for training and evaluation.
        metrics (`dict`): `compute_metrics` of each split.
        main_metric (`str`): The metric to watch and to choose settings by.
        new_modules (`list[str]`): Names of modules that are initialised anew in a pretrained model.
    """

    model: nn.Module
    saved: PreTrainedModel
    processor: BaseImageProcessor | ProcessorMixin
    train_data: Any
    eval_data: dict[str, Any]
    collator: Callable[[list[Any]], dict[str, Tensor]]
    eval_collator: Callable[[list[Any]], dict[str, Tensor]]
    metrics: dict[str, Metrics]
    main_metric: str
    new_modules: list[str] = field(default_factory=list)


def make_task(recipe: Recipe, method: str, feature_folder: Path) -> Task:
    r"""
    Makes the task of a recipe.

    Args:
        recipe ([`Recipe`]): The recipe.
        method (`str`): One of [`methods_of`].
        feature_folder (`Path`): Where features of a frozen encoder are cached.
    """
    if recipe.task == "classification":
        return make_classification(recipe, method)
    if recipe.task == "captioning":
        return make_captioning(recipe, method, feature_folder)
    return make_encoder(recipe)


def methods_of(recipe: Recipe) -> list[str]:
    """The methods that a recipe can train or score. The first one is the recipe's own."""
    if recipe.task == "encoder":
        return ["encoder"]
    corruption = recipe.model.get("corruption", CORRUPTIONS["tdd"])
    if recipe.checkpoint is not None:
        corruption = TDDConfig.from_pretrained(recipe.checkpoint).corruption
    if corruption not in CORRUPTIONS.values():
        raise ValueError(f"`model.corruption` must be one of {', '.join(CORRUPTIONS.values())}, got {corruption!r}.")
    methods = sorted(CORRUPTIONS, key=lambda method: CORRUPTIONS[method] != corruption)
    if recipe.checkpoint is not None:
        return methods[:1]
    if recipe.task == "captioning":
        methods.append("ar")
        if recipe.encoder is not None and recipe.model.get("freeze_encoder", False) and not recipe.data.streaming:
            methods.append("nearest")
    return methods


# ---- Classification


def make_classification(recipe: Recipe, method: str) -> Task:
    splits, names = load_labels(recipe.data)
    fields = {
        **model_fields(recipe, method),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }
    model, new_modules = start_model(
        TDDForImageClassification, recipe, fields, ["connector", "denoiser", "classifier"]
    )
    image_processor = load_image_processor(recipe)
    # Without augmentation the image processor makes the training views too.
    transform = build_train_transform(recipe.augmentation, image_processor)
    eval_data = {split: rows for split, rows in splits.items() if split != recipe.data.train_split}
    return Task(
        model,
        model,
        image_processor,
        splits[recipe.data.train_split],
        eval_data,
        ImageCollator(image_processor, transform, build_mixup(recipe.augmentation, len(names))),
        ImageCollator(image_processor),
        dict.fromkeys(eval_data, top1),
        "top1",
        new_modules,
    )


def top1(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` of a classifier: the share of images whose likeliest label is right."""
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    return load_metric("top1").compute(predictions=logits.argmax(-1), references=prediction.label_ids)


# ---- Captioning


def make_captioning(recipe: Recipe, method: str, feature_folder: Path) -> Task:
    splits = load_captions(recipe.data)
    train_split = recipe.data.train_split
    texts = caption_texts(splits[train_split])
    processor = load_processor(recipe, texts)
    fields = {
        "vocab_size": len(processor.tokenizer),
        "pad_token_id": processor.tokenizer.pad_token_id,
        "eos_token_id": processor.tokenizer.eos_token_id,
        **model_fields(recipe, method),
    }
    model_class = AutoregressiveCaptioner if method == "ar" else TDDForCaptioning
    model, new_modules = start_model(model_class, recipe, fields, ["connector", "denoiser", "lm_head"])
    references = {split: rows["captions"] for split, rows in splits.items() if split != train_split}
    if recipe.model.get("freeze_encoder", False) and not recipe.data.streaming:
        splits = cache_splits(recipe, model.model, processor.image_processor, splits, feature_folder)
    return Task(
        model,
        model,
        processor,
        splits[train_split],
        {split: splits[split] for split in references},
        CaptionCollator(processor, build_train_transform(recipe.augmentation, processor.image_processor)),
        CaptionCollator(processor),
        {split: CaptionMetrics(processor, captions, texts) for split, captions in references.items()},
        "token_f1",
        new_modules,
    )


def load_processor(recipe: Recipe, texts: list[str]) -> TDDProcessor:
    """The processor of the checkpoint; or the image processor, and a tokenizer that is trained on the captions."""
    if recipe.checkpoint is not None:
        return TDDProcessor.from_pretrained(recipe.checkpoint)
    tokenizer = train_tokenizer(texts, **recipe.tokenizer)
    tokenizer.model_max_length = recipe.model["max_position_embeddings"]
    return TDDProcessor(load_image_processor(recipe), tokenizer)


def cache_splits(
    recipe: Recipe, model: TDDModel, image_processor: BaseImageProcessor, splits: dict[str, Dataset], folder: Path
) -> dict[str, Dataset]:
    """The splits with the features of a frozen encoder in place of images. With several views the training features
    are those of augmented ones."""
    cached = {}
    for split, rows in splits.items():
        views: Any = image_processor
        if split == recipe.data.train_split and recipe.feature_views > 1:
            views = AugmentedViews(recipe.augmentation, image_processor, recipe.feature_views)
        cached[split] = cache_features(model, views, rows, folder)
    return cached


@torch.inference_mode()
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


class CaptionMetrics:
    """`compute_metrics` of a captioner, of whose generated tokens it makes captions. The references are all captions
    of an image: the `labels` are one of them, without the words that the tokenizer does not know."""

    def __init__(self, processor: TDDProcessor, references: Sequence[Sequence[str]], train_captions: list[str]):
        self.processor = processor
        self.references = list(references)
        self.metric = load_metric("caption_match")
        self.seen = self.metric.seen_bigrams(train_captions)

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        pad = self.processor.tokenizer.pad_token_id
        sequences = np.where(prediction.predictions < 0, pad, prediction.predictions)  # Trainer pads with -100
        captions = self.processor.batch_decode(sequences, skip_special_tokens=True)
        return self.score(captions)

    def score(self, captions: list[str]) -> dict[str, float]:
        return self.metric.compute(predictions=captions, references=self.references, seen=self.seen)


# ---- Encoder


class WordClassifier(TDDPreTrainedModel):
    """An encoder with a linear head on its mean token. Each word is an independent binary decision.

    Args:
        config ([`TDDConfig`]): A configuration whose labels are words.
        frequencies (`torch.Tensor` of shape `(num_words,)`): The share of images that have each word.
    """

    def __init__(self, config: TDDConfig, frequencies: Tensor):
        super().__init__(config)
        self.model = TDDModel(config, add_denoiser=False)
        self.head = nn.Linear(self.model.encoder_hidden_size, config.num_labels)
        self.post_init()
        nn.init.zeros_(self.head.weight)
        # Most words are rare. With another bias the first epochs would only learn the frequencies.
        self.head.bias.data.copy_(torch.logit(frequencies))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        logits = self.head(self.model.get_image_features(pixel_values).pooler_output[:, 0])
        loss = None
        if labels is not None:  # a sum over the words, since a mean would be dominated by absent ones
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(-1).mean()
        return ImageClassifierOutput(loss=loss, logits=logits)


def make_encoder(recipe: Recipe) -> Task:
    splits = load_captions(recipe.data)
    train = splits[recipe.data.train_split]
    counts = count_words(train["captions"], MIN_WORD_COUNT)
    config = TDDConfig(**recipe.model, id2label=dict(enumerate(counts)))
    model = WordClassifier(config, torch.tensor(list(counts.values())) / len(train))
    model.to(memory_format=torch.channels_last)  # convolutions are a tenth faster
    image_processor = load_image_processor(recipe)
    transform = build_train_transform(recipe.augmentation, image_processor)
    eval_data = {split: rows for split, rows in splits.items() if split != recipe.data.train_split}
    return Task(
        model,
        model.model.encoder,
        image_processor,
        train,
        eval_data,
        WordCollator(image_processor, list(counts), transform),
        WordCollator(image_processor, list(counts)),
        dict.fromkeys(eval_data, word_scores),
        "word_map",
    )


def word_scores(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` of a [`WordClassifier`]."""
    probabilities = 1 / (1 + np.exp(-prediction.predictions))
    return load_metric("word_scores").compute(predictions=probabilities, references=prediction.label_ids)


# ---- What the tasks share


def model_fields(recipe: Recipe, method: str) -> dict[str, Any]:
    """The configuration's fields. They choose between TDD and MDD on the same network."""
    return {**recipe.model, "corruption": CORRUPTIONS[method]} if method in CORRUPTIONS else recipe.model


def start_model(
    model_class: type[TDDPreTrainedModel], recipe: Recipe, fields: dict[str, Any], new_modules: list[str]
) -> tuple[TDDPreTrainedModel, list[str]]:
    """The model of a checkpoint, on a pretrained encoder, or with random weights; and the names of its modules that
    are new in a pretrained model."""
    if recipe.checkpoint is not None:
        config = TDDConfig.from_pretrained(recipe.checkpoint)
        labels = fields.get("id2label")
        if labels is None or len(labels) == config.num_labels:
            return model_class.from_pretrained(recipe.checkpoint, **fields), []
        logger.warning(
            f"{recipe.checkpoint} has {config.num_labels} labels, but the data have {len(labels)}: the label "
            "embedding and the classifier are initialised anew."
        )
        model = model_class.from_pretrained(recipe.checkpoint, ignore_mismatched_sizes=True, **fields)
        return model, ["token_embedding", "classifier"]
    if recipe.encoder is not None:
        return model_class.from_encoder_pretrained(recipe.encoder, **fields), new_modules
    return model_class(model_class.config_class(**fields)), []


def load_image_processor(recipe: Recipe) -> BaseImageProcessor:
    source = recipe.checkpoint or recipe.encoder
    if source is not None:
        return AutoImageProcessor.from_pretrained(source)
    return ViTImageProcessor(**recipe.image_processor, do_convert_rgb=True)
