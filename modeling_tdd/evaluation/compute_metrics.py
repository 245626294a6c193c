# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""`compute_metrics` of Transformers' `Trainer` for each task, by the metric modules in `metrics/`."""

from collections.abc import Sequence

import numpy as np
from transformers import EvalPrediction

from ..processing_tdd import TDDProcessor
from . import load_metric


def top1(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` of a classifier: the share of images whose likeliest label is right."""
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    return load_metric("top1").compute(predictions=logits.argmax(-1), references=prediction.label_ids)


def word_scores(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` of a [`WordClassifier`]."""
    probabilities = 1 / (1 + np.exp(-np.asarray(prediction.predictions)))
    return load_metric("word_scores").compute(predictions=probabilities, references=prediction.label_ids)


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
        sequences = np.asarray(prediction.predictions)
        sequences = np.where(sequences < 0, pad, sequences)  # Trainer pads with -100
        captions = self.processor.batch_decode(sequences, skip_special_tokens=True)
        return self.score(captions)

    def score(self, captions: list[str]) -> dict[str, float]:
        return self.metric.compute(predictions=captions, references=self.references, seen=self.seen)
