# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The trainings that the paper's tables and figures need, and their evaluation on the test split."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..evaluation.claims import CLASSIFIER_ELEMENTS, SETTINGS, VARIANTS, Setting
from ..evaluation.classifiers import NUM_STEPS, collect_probabilities, describe_draws, describe_steps
from ..evaluation.corruptions import NUM_SEVERITIES, STRENGTHS, corrupt
from ..images_tdd import to_rgb
from ..modeling_tdd import TDDForImageClassification
from .checkpoints import last_complete_checkpoint
from .data import load_labels
from .features import read_features
from .folders import write_json
from .recipe import Recipe, load_recipe
from .tasks import classifies_features, load_image_processor, make_task


NUM_CORRUPTED = 1_000  # the first images of the test split
Batches = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Training:
    """One run of `scripts/train.py`: a variant of a setting with a seed. `folder` holds its result."""

    setting: Setting
    variant: str
    seed: int
    folder: Path

    @property
    def method(self) -> str:
        return VARIANTS[self.variant].method

    @property
    def is_done(self) -> bool:
        return (self.folder / "result.json").exists()

    def recipe(self, recipes: Path) -> Recipe:
        """The recipe, of the folder of all recipes."""
        variant = VARIANTS[self.variant]
        if self.setting.uses_variant_recipes:
            return load_recipe(recipes / variant.recipe)
        tuned = self.setting.mdd if self.method == "mdd" else ()
        return load_recipe(recipes / self.setting.recipe, [*variant.overrides, *tuned])


def plan_trainings(elements: Sequence[str], data: str, settings: Sequence[str], output_dir: Path) -> list[Training]:
    r"""
    All trainings that classifiers' tables and figures need, setting by setting, and within one seed by seed.

    Args:
        elements (`Sequence[str]`): Tables and figures.
        data (`str`): One of `claims.SETTINGS`.
        settings (`Sequence[str]`): Names of the data's settings.
        output_dir (`Path`): The folder of a training is `output_dir/<data>/<setting>-<variant>-seed<n>`.
    """
    wanted = {variant for element in elements for variant in CLASSIFIER_ELEMENTS.get(element, ())}
    return [
        Training(setting, variant, seed, output_dir / data / f"{name}-{variant}-seed{seed}")
        for name, setting in SETTINGS[data].items()
        if name in settings
        for seed in range(setting.num_seeds)
        for variant in setting.variants
        if variant in wanted
    ]


def evaluate_trainings(trainings: Iterable[Training], recipes: Path) -> None:
    """Writes `evaluation.json` of each finished training that lacks it, of its last and of its best epoch."""
    for training in trainings:
        file = training.folder / "evaluation.json"
        if file.exists() or not training.is_done:
            continue
        recipe = training.recipe(recipes)
        batches = _test_batches(training, recipe)
        training_folder = training.folder.with_name(f"{training.folder.name}-training")
        report: dict[str, Any] = {}
        for name, folder in (("best", training.folder), ("last", last_complete_checkpoint(training_folder))):
            model = _load(folder, classifies_features(recipe))
            report[name], correct = describe_steps(model, batches)
            report[name]["correct"] = "".join(map(str, correct.astype(int)))
            if name == "best":
                report[name] |= describe_draws(model, batches)
        state = json.loads((training_folder / "trainer_state.json").read_text())
        logs = [log for log in state["log_history"] if "eval_top1" in log]
        report["epochs"] = {name: [log[name] for log in logs] for name in ("epoch", "eval_top1", "eval_loss")}
        write_json(file, report)
        print(f"{training.folder.name}: test top-1 {100 * report['best']['top1']:.2f} %", flush=True)


def evaluate_corrupted(trainings: Iterable[Training], recipes: Path) -> None:
    """Writes `corrupted.json` of each finished training that lacks it: top-1 on the first 1,000 test images, by kind
    and severity of the corruption. The features of a frozen encoder are computed once for all."""
    last_key, batches = None, {}
    for training in trainings:
        file = training.folder / "corrupted.json"
        if file.exists() or not training.is_done:
            continue
        recipe = training.recipe(recipes)
        model = _load(training.folder, has_features=False)
        images = (recipe.data.data_files or {}).get(recipe.data.eval_splits[-1])
        if (key := json.dumps([images, recipe.encoder, recipe.image_processor])) != last_key:
            last_key, batches = key, _corrupted_batches(recipe, model if classifies_features(recipe) else None)
        if classifies_features(recipe):
            read_features(model)
        settings = {"num_inference_steps": NUM_STEPS} if training.method != "mdd" else {}
        report: dict[str, list[float]] = {name: [] for name, _ in batches}
        for (name, _), batch in batches.items():
            probabilities, labels = collect_probabilities(model, batch, **settings)
            report[name].append(float((probabilities[:, -1].argmax(-1) == labels).mean()))
        write_json(file, report)
        print(f"{training.folder.name}: {report}", flush=True)


def _load(folder: str | Path, has_features: bool) -> TDDForImageClassification:
    model = TDDForImageClassification.from_pretrained(folder).eval()
    model = model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if has_features:
        read_features(model)
    return model


def _test_batches(training: Training, recipe: Recipe) -> DataLoader:
    """Batches of the test split, which are read anew each time: those of ImageNet do not fit into the memory."""
    task = make_task(recipe, training.method, training.folder.parent / "features")
    rows, size = task.eval_data[recipe.data.eval_splits[-1]], recipe.training.get("per_device_eval_batch_size", 64)
    return DataLoader(rows, size, collate_fn=task.eval_collator, generator=torch.Generator())  # not that of the noise


@torch.inference_mode()
def _corrupted_batches(recipe: Recipe, encoder: TDDForImageClassification | None) -> dict[tuple[str, int], Batches]:
    """Batches by corruption and severity, which is 0 for the images as they are; of the features, given an encoder."""
    splits, _ = load_labels(recipe.data)
    rows = splits[recipe.data.eval_splits[-1]]
    rows = rows.select(range(min(NUM_CORRUPTED, len(rows))))
    images, labels = [to_rgb(image) for image in rows["image"]], torch.tensor(list(rows["label"]))
    processor, batches = load_image_processor(recipe), {}
    for name in STRENGTHS:
        for severity in range(NUM_SEVERITIES + 1):
            seen = [corrupt(x, name, severity, seed) for seed, x in enumerate(images)] if severity else images
            pixels = [
                processor(images=seen[i : i + 100], return_tensors="pt")["pixel_values"]
                for i in range(0, len(seen), 100)
            ]
            if encoder is not None:
                pixels = [encoder.model.get_image_features(x.to(encoder.device)).pooler_output.cpu() for x in pixels]
            batches[name, severity] = [{"pixel_values": x, "labels": y} for x, y in zip(pixels, labels.split(100))]
    return batches
