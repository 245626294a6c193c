# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Captioning under constraints: gaps to fill, choices to choose from, and how far a captioner's confidence is right.

The same gaps and choices serve all methods: they are drawn from the captions of a split by a fixed seed.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..processing_tdd import TDDProcessor
from .captioners import Captioner, caption_with, encode_images, fill_gaps
from .statistics import calibration, expected_calibration_error, selective_accuracy


if TYPE_CHECKING:
    from datasets import Dataset

LONGEST_GAP, LONGEST_CHOICE = 5, 3  # tokens
NUM_CHOICES, CHOICE_SETS = 5, 2  # strings, of which one is right; and sets for each picture
NUM_CANDIDATES = 8
COVERAGES = tuple(percent / 100 for percent in range(5, 101, 5))
TEMPERATURES = np.exp(np.linspace(-1.5, 2.5, 161))
Span = tuple[int, ...]


class Example(NamedTuple):
    """The picture's number, the tokens of its caption without their end, and a part of them."""

    image: int
    tokens: Span
    start: int
    end: int


def draw_examples(captions: Sequence[Span], longest: int, number: int, max_tokens: int, seed: int) -> list[Example]:
    """`number` random parts of each caption that has at most `max_tokens`, of 1 to `longest` tokens."""
    random, examples = np.random.default_rng(seed), []
    for image, tokens in enumerate(captions):
        for _ in range(number if len(tokens) <= max_tokens else 0):
            length = int(random.integers(1, min(longest, len(tokens)) + 1))
            start = int(random.integers(0, len(tokens) - length + 1))
            examples.append(Example(image, tokens, start, start + length))
    return examples


class Distractors:
    r"""
    Wrong strings that a writer might choose too: of the training captions, what stands between the same two tokens,
    then what stands behind the same one, then anything.

    Args:
        captions (`Sequence[tuple[int, ...]]`): Tokens of the training captions.
    """

    def __init__(self, captions: Sequence[Span]):
        self.spans: dict[tuple, Counter[Span]] = defaultdict(Counter)
        for tokens in sorted(set(captions)):
            for start in range(len(tokens)):
                for end in range(start + 1, min(start + LONGEST_CHOICE, len(tokens)) + 1):
                    for context in self._contexts(tokens, start, end):
                        self.spans[context][tokens[start:end]] += 1

    @staticmethod
    def _contexts(tokens: Span, start: int, end: int) -> list[tuple]:
        before = tokens[start - 1] if start else None
        after = tokens[end] if end < len(tokens) else None
        return [(before, after), (before,), ()]

    def draw(self, example: Example, random: np.random.Generator) -> list[Span]:
        """The right string and wrong ones, which all differ."""
        chosen = [example.tokens[example.start : example.end]]
        for context in self._contexts(*example[1:]):
            others = [span for span in self.spans[context] if span not in chosen]
            order = random.permutation(len(others))[: NUM_CHOICES - len(chosen)]
            chosen += [others[index] for index in order]
        return chosen


def measure_captioner(
    model: Captioner, processor: TDDProcessor, splits: dict[str, "Dataset"], train_captions: Sequence[str]
) -> dict[str, Any]:
    r"""
    Measures everything on each split. Two temperatures are chosen on the first one by likelihood: that of the
    probabilities of choices, and that of the confidence in a caption, which is the caption's own probability.

    Args:
        model, processor: Of [`load_captioner`].
        splits (`dict[str, Dataset]`): Columns `image` and `caption`.
        train_captions (`Sequence[str]`): Where wrong choices come from.

    Returns:
        `dict`: `temperature` and `confidence_temperature`, and for each split the scores of [`fill`], [`choose`] and
        [`caption`].
    """
    distractors = Distractors(_encode(processor, train_captions))
    results: dict[str, Any] = {}
    for split, data in splits.items():
        features = encode_images(model, processor, data)
        captions = _encode(processor, data["caption"])
        scores = choice_scores(model, features, captions, distractors)
        temperature = results.setdefault("temperature", _best_temperature(scores))
        made = caption(model, features, captions, results.get("confidence_temperature"))
        results.setdefault("confidence_temperature", made["temperature"])
        results[split] = {
            "images": len(data),
            "infilling": fill(model, features, captions),
            "choices": choose(scores, temperature),
            "captions": made,
        }
    return results


def fill(model: Captioner, features: Tensor, captions: Sequence[Span]) -> dict[str, Any]:
    """The share of random gaps that are filled exactly, with one filling and with the best of several, also by the
    number of tokens."""
    length = model.config.max_position_embeddings
    examples = draw_examples(captions, LONGEST_GAP, 1, length - 1, seed=0)
    tokens = torch.stack([_row(model, example.tokens) for example in examples])
    places = torch.arange(length)
    starts, ends = (torch.tensor([getattr(example, name) for example in examples]) for name in ("start", "end"))
    is_gap = (places >= starts[:, None]) & (places < ends[:, None])
    features = features[[example.image for example in examples]]
    hidden = tokens.masked_fill(is_gap, model.config.pad_token_id)  # so that nothing of them can be read
    result: dict[str, Any] = {"gaps": len(examples)}
    for name, number in (("exact_match", 1), (f"exact_match_of_{NUM_CANDIDATES}", NUM_CANDIDATES)):
        right = (fill_gaps(model, features, hidden, is_gap, number) == tokens).all(1)
        by_length = {count: right[is_gap.sum(1) == count] for count in range(1, LONGEST_GAP + 1)}
        result[name] = right.double().mean().item()
        result[f"{name}_by_length"] = {count: part.double().mean().item() for count, part in by_length.items()}
    return result


def choice_scores(
    model: Captioner, features: Tensor, captions: Sequence[Span], distractors: Distractors
) -> np.ndarray:
    """The scores of each set of choices, of shape (sets, choices), the right one first."""
    random = np.random.default_rng(1)
    room = model.config.max_position_embeddings - 1 - LONGEST_CHOICE
    examples = draw_examples(captions, LONGEST_CHOICE, CHOICE_SETS, room, seed=1)
    labels = torch.stack(
        [
            torch.stack(
                [
                    _row(model, example.tokens[: example.start] + span + example.tokens[example.end :])
                    for span in distractors.draw(example, random)
                ]
            )
            for example in examples
        ]
    )
    scores = model.score(labels=labels, image_features=features[[example.image for example in examples]])
    return scores.double().numpy()


def choose(scores: np.ndarray, temperature: float) -> dict[str, float]:
    """Accuracy and calibration of choices, the first of which are right, with the temperature and without it."""
    rights = np.zeros(len(scores), dtype=int)
    found = calibration(_softmax(scores / temperature), rights)
    return {"sets": len(rights), **found, "ece_without_temperature": calibration(_softmax(scores), rights)["ece"]}


def caption(
    model: Captioner, features: Tensor, captions: Sequence[Span], temperature: float | None = None
) -> dict[str, Any]:
    """Exact match of captions, of one and of the best of several; and by the share of the surest, by their scores. The
    confidence in a caption is `exp(score / temperature)`, by default with the temperature that is best here."""
    rows = torch.stack([_row(model, tokens[: model.config.max_position_embeddings - 1]) for tokens in captions])
    made = caption_with(model, features)
    right = (made == rows).all(1).numpy()
    score = model.score(labels=made, image_features=features)
    temperature = temperature or _best_confidence_temperature(score.numpy(), right)
    confidence = (score / temperature).exp().double().numpy()
    ranked = (caption_with(model, features, NUM_CANDIDATES) == rows).all(1).numpy()
    return {
        "exact_match": float(right.mean()),
        f"exact_match_of_{NUM_CANDIDATES}": float(ranked.mean()),
        "repaired": int((ranked & ~right).sum()),
        "spoiled": int((right & ~ranked).sum()),
        "coverage": dict(zip(COVERAGES, selective_accuracy(score.numpy(), right, COVERAGES))),
        "confidence_ece": expected_calibration_error(confidence, right),
        "temperature": temperature,
    }


def _encode(processor: TDDProcessor, captions: Sequence[str]) -> list[Span]:
    return [tuple(row) for row in processor.tokenizer(list(captions), add_special_tokens=False)["input_ids"]]


def _row(model: Captioner, tokens: Span) -> Tensor:
    """Tokens with their end and padding, of shape (N,)."""
    config = model.config
    row = [*tokens, config.eos_token_id]
    return torch.tensor(row + [config.pad_token_id] * (config.max_position_embeddings - len(row)))


def _softmax(scores: np.ndarray) -> np.ndarray:
    return torch.from_numpy(scores).softmax(-1).numpy()


def _best_temperature(scores: np.ndarray) -> float:
    """The temperature with which the right choices, the first ones, are likeliest."""
    return _likeliest(lambda temperature: _softmax(scores / temperature)[:, 0])


def _best_confidence_temperature(scores: np.ndarray, right: np.ndarray) -> float:
    """The temperature with which it is likeliest that the right captions are right, and the others wrong."""

    def likelihoods(temperature: float) -> np.ndarray:
        confidence = np.exp(scores.astype(np.float64) / temperature).clip(1e-6, 1 - 1e-6)
        return np.where(right, confidence, 1 - confidence)

    return _likeliest(likelihoods)


def _likeliest(likelihoods: Callable[[float], np.ndarray]) -> float:
    """The temperature with the highest mean log-likelihood."""
    losses = [-np.log(np.maximum(likelihoods(value), 1e-12)).mean() for value in TEMPERATURES]
    return float(TEMPERATURES[int(np.argmin(losses))])
