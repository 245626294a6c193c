# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Agreement of captions with their references, and their fluency, in the format of the package `evaluate`.

The tokens of the metrics are words and punctuation marks, independent of the model's tokenizer. So the scores of
models with different tokenizers are comparable.
"""

import re
from collections import Counter
from collections.abc import Iterable

import datasets
import evaluate


Bigram = tuple[str, str]

START, END = "<start>", "<end>"  # `split_tokens` never returns these
DESCRIPTION = """
Agreement of captions with their references, and their fluency. All values are in [0, 1]. Tokens are words and
punctuation marks: "medium-light tone" has the tokens "medium", "-", "light" and "tone".
"""
INPUTS = """
Args:
    predictions (`list[str]`): The caption of each image.
    references (`list[list[str]]`): The reference captions of each image.
    seen (`set[tuple[str, str]]`, *optional*): `seen_bigrams(captions)`, a method of this metric, for the captions that
        the model was trained on.

Returns:
    `dict`:
    - `exact_match`: share of captions with the same sequence of tokens as one of their references.
    - `token_f1`: mean over images of the F1 score of tokens, regardless of their order, with the best of the
      references.
    - `stutter`: share of captions with the same token twice in succession, such as "man : : light light skin tone".
      Repeated phrases of several tokens do not count, since "family: man, man, boy" is correct.
    - `fluent`, where `seen` is given: share of captions whose pairs of neighbouring tokens all occur in the training
      captions. Start and end of a caption count as tokens. The other captions are mixtures such as "light - skin
      tone", or end too early. New combinations of known parts are fluent. A caption with a word that the training
      captions lack is never fluent, so compare a score with that of the references.
"""


class CaptionMatch(evaluate.Metric):
    """Exact match, token F1, stutter and fluency of captions."""

    def _info(self) -> evaluate.MetricInfo:
        caption = datasets.Value("string")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": caption, "references": datasets.Sequence(caption)}),
        )

    @staticmethod
    def seen_bigrams(captions: Iterable[str]) -> set[Bigram]:
        """All pairs of neighbouring tokens in the captions. Start and end of a caption count as tokens."""
        return {bigram for caption in captions for bigram in bigrams(split_tokens(caption))}

    def _compute(
        self, predictions: list[str], references: list[list[str]], seen: set[Bigram] | None = None
    ) -> dict[str, float]:
        if not predictions or not all(references):
            raise ValueError("`references` must have at least one image, and at least one caption of each, got none.")
        if seen is not None and any(isinstance(bigram, str) for bigram in seen):
            raise ValueError("`seen` must be the pairs of `seen_bigrams(captions)`, got strings.")
        tokens = [split_tokens(caption) for caption in predictions]
        expected = [[split_tokens(caption) for caption in captions] for captions in references]
        scores = {
            "exact_match": mean(caption in captions for caption, captions in zip(tokens, expected)),
            "token_f1": mean(
                max(bag_f1(caption, other) for other in captions) for caption, captions in zip(tokens, expected)
            ),
            "stutter": mean(any(first == second for first, second in bigrams(caption)) for caption in tokens),
        }
        if seen is not None:
            scores["fluent"] = mean(seen.issuperset(bigrams(caption)) for caption in tokens)
        return scores


def split_tokens(caption: str) -> list[str]:
    """Splits a caption into words and punctuation marks."""
    return re.findall(r"\w+|[^\w\s]", caption)


def bigrams(tokens: list[str]) -> list[Bigram]:
    tokens = [START, *tokens, END]
    return list(zip(tokens, tokens[1:]))


def bag_f1(prediction: list[str], reference: list[str]) -> float:
    common = (Counter(prediction) & Counter(reference)).total()
    return 2 * common / max(1, len(prediction) + len(reference))


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
