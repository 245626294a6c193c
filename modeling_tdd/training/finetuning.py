# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Data sets, metrics and the search for a checkpoint, for training either task with Transformers' `Trainer`."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import EvalPrediction, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..evaluation.captions import Bigram, References, caption_metrics
from ..modeling_tdd import TDDForCaptioning
from ..processing_tdd import TDDProcessor
from .data import Batch, Example
from .ema import TRAINING_WEIGHTS_NAME


logger = logging.get_logger(__name__)


# ---- Data


class TrainerDataset(Dataset):
    r"""
    Rows in the form of `forward`'s arguments. `Trainer` then works with its own collator and with
    `remove_unused_columns`, which would drop the images of an ordinary data set.

    Args:
        rows (`Sequence`):
            Rows such as those of a `datasets.Dataset`.
        collate (`Callable`):
            From a list of rows to a batch: [`TrainCollator`] or [`EvalCollator`] for classification,
            [`CaptionCollator`] for captions.
        seed (`int`, *optional*):
            With a seed, as for training data, what `collate` draws at random (crops, one of several captions) depends
            on seed, epoch and row alone. So a run resumed within an epoch sees what the unbroken one would have seen.
            [`EpochCallback`] sets the epoch. Without a seed `collate` draws from the global random state.
    """

    def __init__(self, rows: Sequence[Example], collate: Callable[[list[Example]], Batch], seed: int | None = None):
        self.rows = rows
        self.collate = collate
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # persistent workers see it too

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if self.seed is None:
            return self._encode(index)
        kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            seed = int(np.random.SeedSequence((self.seed, int(self.epoch), index)).generate_state(1)[0])
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)  # only the CPU's: the model draws on its device
            return self._encode(index)
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])
            torch.set_rng_state(kept[2])

    def _encode(self, index: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.collate([self.rows[index]]).items()}


class EpochCallback(TrainerCallback):
    """Sets the epoch of the training data. Accelerate does so only in runs of one process that were not resumed."""

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        train_dataloader.dataset.set_epoch(int(state.epoch))


# ---- Metrics


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` of a classifier: `accuracy`, the share of images whose likeliest label is right (top-1)."""
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


class CaptionMetrics:
    r"""
    Generates captions of the evaluation images and scores them: `exact_match`, `token_f1`, `stutter` and, with `seen`,
    `fluent`, as in [`~modeling_tdd.evaluation.captions.caption_metrics`].

    Both hooks of `Trainer` are needed. `preprocess_logits_for_metrics` replaces the logits of a batch by its captions,
    which are generated from the features that the loss was computed from. Each device does so for its own images.
    `compute_metrics` scores the captions of all devices.

    Args:
        model ([`TDDForCaptioning`]):
            The model that `Trainer` trains, or its PEFT wrapper.
        processor ([`TDDProcessor`]):
            Its processor.
        references (`Sequence[Sequence[str]]`):
            All captions of each evaluation image, in the order of `eval_dataset`. The `labels` would not do: they are
            one caption per image, cut to the model's length and without words that the tokenizer does not know.
        seen (`set`, *optional*):
            [`~modeling_tdd.evaluation.captions.seen_bigrams`] of the training captions.
        generate_kwargs:
            Arguments of `generate`, such as `num_inference_steps=20`.

    Example:

    ```python
    >>> metrics = CaptionMetrics(model, processor, references=data["validation"]["captions"])
    >>> trainer = Trainer(
    ...     model,
    ...     args,
    ...     eval_dataset=eval_dataset,
    ...     compute_metrics=metrics,
    ...     preprocess_logits_for_metrics=metrics.generate,
    ... )
    >>> trainer.evaluate()["eval_token_f1"]
    ```"""

    def __init__(
        self,
        model: TDDForCaptioning,
        processor: TDDProcessor,
        references: References,
        seen: set[Bigram] | None = None,
        **generate_kwargs: Any,
    ):
        self.model = model
        self.processor = processor
        self.references = references
        self.seen = seen
        self.generate_kwargs = generate_kwargs

    def generate(self, outputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """`preprocess_logits_for_metrics`: generates token ids from the image features, the last of the outputs."""
        return self.model.generate(image_features=outputs[-1], **self.generate_kwargs)

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """`compute_metrics`: scores the token ids that [`~CaptionMetrics.generate`] returned."""
        sequences = prediction.predictions
        if isinstance(sequences, tuple) or not np.issubdtype(sequences.dtype, np.integer):
            raise ValueError(
                "`CaptionMetrics` needs `preprocess_logits_for_metrics=metrics.generate` in `Trainer` too."
            )
        # `Trainer` pads with -100
        sequences = np.where(sequences < 0, self.processor.tokenizer.pad_token_id, sequences)
        captions = self.processor.batch_decode(sequences, skip_special_tokens=True)
        return caption_metrics(captions, self.references, self.seen)


# ---- Resuming


def last_complete_checkpoint(output_dir: str | Path, with_ema: bool) -> str | None:
    r"""
    The latest checkpoint that `Trainer` finished writing. Transformers' own `get_last_checkpoint` may return one that
    a killed process was still writing, from which resuming fails.

    Args:
        output_dir (`str` or `Path`): The run's folder.
        with_ema (`bool`): Whether the run has an [`EMACallback`].

    Returns:
        `str`, *optional*: the checkpoint's folder, or `None` if there is no complete checkpoint.
    """
    steps = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdecimal():
            steps[int(step)] = folder
    for _, folder in sorted(steps.items(), reverse=True):
        try:
            json.loads((folder / TRAINER_STATE_NAME).read_text())  # `Trainer` writes this file last
        except (OSError, json.JSONDecodeError):
            logger.warning(f"{folder} is incomplete and is skipped.")
            continue
        if with_ema and not (folder / TRAINING_WEIGHTS_NAME).exists():
            logger.warning(f"{folder} lacks {TRAINING_WEIGHTS_NAME} and is skipped.")
            continue
        return str(folder)
    return None


__all__ = [
    "CaptionMetrics",
    "EpochCallback",
    "TrainerDataset",
    "classification_metrics",
    "last_complete_checkpoint",
]
