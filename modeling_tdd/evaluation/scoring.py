# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Scores of checkpoints on labelled or captioned images, with their noise and without it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import patch

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoImageProcessor, BaseImageProcessor

from ..configuration_tdd import TDDConfig
from ..images_tdd import to_rgb
from ..modeling_tdd import TDDForCaptioning, TDDForImageClassification
from ..processing_tdd import TDDProcessor
from ..sampling_tdd import RandomNumbers
from . import load_metric
from .step_curves import WEIGHTINGS


if TYPE_CHECKING:
    from datasets import Dataset
    from evaluate import Metric

Model = TDDForCaptioning | TDDForImageClassification
Processor = TDDProcessor | BaseImageProcessor


def load_checkpoint(checkpoint: str | Path) -> tuple[Model, Processor]:
    """Loads a captioner or a classifier in eval mode, and its processor or image processor, by folder or model id.

    Raises:
        `ValueError`: for a checkpoint of another model.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    if not isinstance(config, TDDConfig):
        raise ValueError(f"{checkpoint} must be a model of TDD or MDD, got {config.model_type!r}.")
    is_captioner = config.vocab_size is not None
    model_class = TDDForCaptioning if is_captioner else TDDForImageClassification
    processor_class = TDDProcessor if is_captioner else AutoImageProcessor
    return model_class.from_pretrained(checkpoint).eval(), processor_class.from_pretrained(checkpoint)


def references_of(data: "Dataset", model: Model) -> list[int] | list[list[str]]:
    """The labels or the reference captions of images, from the column `label` for a classifier, and from `caption` or
    `captions` for a captioner. Labels are matched with the classifier's by their names, or by how they are written
    where the data have no names, as training names them. Integers that are no name of a label are numbers of labels.

    Raises:
        `ValueError`: if the column is missing, or if the classifier does not know a label.
    """
    names = ("caption", "captions") if model.can_generate() else ("label",)
    column = next((name for name in names if name in data.column_names), None)
    if column is None:
        raise ValueError(f"The data needs a column {' or '.join(names)}; it has {', '.join(data.column_names)}.")
    values = data[column][:]
    if model.can_generate():
        return [[value] if isinstance(value, str) else value for value in values]
    names = getattr(data.features[column], "names", None)
    labels = [str(value) if names is None else names[value] for value in values]
    indices: dict[str, Any] = {name: index for index, name in model.config.id2label.items()}
    if names is None and indices.keys().isdisjoint(labels) and set(values) <= model.config.id2label.keys():
        return values
    if unknown := sorted(set(labels) - indices.keys()):
        raise ValueError(f"The classifier does not know these labels of the data: {', '.join(unknown)}.")
    return [indices[label] for label in labels]


def lower_cases(processor: TDDProcessor) -> bool:
    """Whether its tokenizer lower-cases texts. Then all captions of the model are lower case."""
    normalizer = processor.tokenizer.backend_tokenizer.normalizer
    return normalizer is not None and normalizer.normalize_str("A") == "a"


@torch.inference_mode()
def predict(
    model: Model, processor: Processor, data: "Dataset", batch_size: int, **settings: Any
) -> list[str] | list[int]:
    """The captions or labels of the images in the column `image`. `settings` are those of `generate` or `forward`,
    such as `num_inference_steps`."""
    predictions: list[Any] = []
    batches = data.select_columns("image").iter(batch_size)
    for batch in tqdm(batches, total=-(-len(data) // batch_size), leave=False):
        images = [to_rgb(image) for image in batch["image"]]
        pixel_values = processor(images=images, return_tensors="pt")["pixel_values"].to(model.device)
        if model.can_generate():
            sequences = cast(TDDForCaptioning, model).generate(pixel_values=pixel_values, **settings)
            predictions += cast(TDDProcessor, processor).batch_decode(sequences, skip_special_tokens=True)
        else:
            predictions += model(pixel_values, **settings).logits.argmax(-1).tolist()
    return predictions


@contextmanager
def without_noise() -> Iterator[None]:
    """Within it, every draw of a denoising loop's noise is replaced by zeros."""
    draw = RandomNumbers.draw

    def draw_zeros(numbers: RandomNumbers, *args: Any) -> tuple[Tensor | None, Tensor | None]:
        normal, uniform = draw(numbers, *args)
        return None if normal is None else torch.zeros_like(normal), uniform

    with patch.object(RandomNumbers, "draw", draw_zeros):
        yield


def score_checkpoint(
    checkpoint: str,
    data: "Dataset",
    split: str,
    grid: Sequence[dict[str, Any]],
    metrics: Sequence[str] = (),
    batch_size: int = 64,
    compare_without_noise: bool = False,
) -> dict[str, Any]:
    r"""
    Scores a checkpoint with each of several settings.

    Args:
        checkpoint (`str`): A folder or model id of a TDD or MDD classifier or captioner.
        data (`Dataset`): Images, with labels or captions as in [`references_of`].
        split (`str`): The name of the data in the scores.
        grid (`Sequence[dict]`): Settings of [`predict`]. MDD's classifier has one step and no guidance, whatever they
            are.
        metrics (`Sequence[str]`, *optional*): Names of [`load_metric`], beside `"top1"` or `"caption_match"`.
        batch_size (`int`, *optional*, defaults to 64): Images per batch. Predictions do not depend on it.
        compare_without_noise (`bool`, *optional*, defaults to `False`): Whether to repeat each in [`without_noise`].
            The scores then have `<metric>_without_noise` too, and `changed`, the share of predictions that differ.

    Returns:
        `dict`: a result for [`~step_curves.score_table`] and [`~step_curves.plot_scores`], with the checkpoint as its
        method.

    Raises:
        `ValueError`: for `compare_without_noise` with a model without noise (MDD), and as in [`references_of`].
    """
    model, processor = load_checkpoint(checkpoint)
    if model.config.corruption != "gaussian" and compare_without_noise:
        raise ValueError(
            f"{checkpoint} has `corruption={model.config.corruption!r}`: no noise that could be replaced."
        )
    if model.config.corruption == "mask":
        grid = grid if model.can_generate() else [{"num_inference_steps": 1, "guidance_scale": 1.0}]
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    references = references_of(data, model)
    if isinstance(processor, TDDProcessor) and lower_cases(processor):  # as training does: the metrics see the case
        references = [[text.lower() for text in texts] for texts in cast(list[list[str]], references)]
    loaded = [load_metric(name) for name in ("caption_match" if model.can_generate() else "top1", *metrics)]
    scores = []
    for settings in grid:
        predictions = predict(model, processor, data, batch_size, **settings)
        entry = {"split": split, **settings, **_compute(loaded, predictions, references)}
        if compare_without_noise:
            with without_noise():
                zeroed = predict(model, processor, data, batch_size, **settings)
            entry |= {f"{name}_without_noise": x for name, x in _compute(loaded, zeroed, references).items()}
            entry["changed"] = sum(one != other for one, other in zip(predictions, zeroed)) / len(data)
        scores.append(entry)
    weightings = dict.fromkeys(WEIGHTINGS)  # each checkpoint has a line of its own as it is
    return {"method": checkpoint, "noise_schedule": model.config.noise_schedule, **weightings, "scores": scores}


def _compute(metrics: list["Metric"], predictions: list[Any], references: list[Any]) -> dict[str, float]:
    results = [metric.compute(predictions=predictions, references=references) for metric in metrics]
    return {name: value for result in results for name, value in result.items()}
