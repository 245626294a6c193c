# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Metrics of captions. All are shares or means over images in [0, 1], except CIDEr, which is in [0, 10].

The tokens of the metrics are words and punctuation marks, independent of the model's tokenizer. So the scores of
models with different tokenizers are comparable.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence


References = Sequence[Sequence[str]]  # the reference captions of each image
Bigram = tuple[str, str]

START, END = "<start>", "<end>"  # `split_tokens` never returns these


def split_tokens(caption: str) -> list[str]:
    """Splits a caption into words and punctuation marks: "medium-light tone" gives "medium", "-", "light", "tone"."""
    return re.findall(r"\w+|[^\w\s]", caption)


def exact_match(predictions: Sequence[str], references: References) -> float:
    """Share of captions with the same sequence of tokens as one of their references."""
    return _mean(
        any(split_tokens(prediction) == split_tokens(reference) for reference in captions)
        for prediction, captions in _pairs(predictions, references)
    )


def token_f1(predictions: Sequence[str], references: References) -> float:
    """Mean over images of the F1 score of tokens, regardless of their order, with the best of the references."""
    return _mean(
        max(_bag_f1(Counter(split_tokens(prediction)), Counter(split_tokens(reference))) for reference in captions)
        for prediction, captions in _pairs(predictions, references)
    )


def _bag_f1(prediction: Counter[str], reference: Counter[str]) -> float:
    return 2 * (prediction & reference).total() / max(1, prediction.total() + reference.total())


def stutter_share(captions: Sequence[str]) -> float:
    """Share of captions with the same token twice in succession, such as "man : : light light skin tone".

    Repeated phrases of several tokens do not count, since "family: man, man, boy" is correct.
    """
    return _mean(any(first == second for first, second in _bigrams(caption)) for caption in captions)


def seen_bigrams(captions: Iterable[str]) -> set[Bigram]:
    """All pairs of neighbouring tokens in the captions. Start and end of a caption count as tokens."""
    return {bigram for caption in captions for bigram in _bigrams(caption)}


def fluent_share(captions: Sequence[str], seen: set[Bigram]) -> float:
    r"""
    Share of captions whose pairs of neighbouring tokens all occur in training captions.

    The other captions are mixtures such as "light - skin tone", or end too early. New combinations of known parts are
    fluent. A caption with a word that the training captions lack is never fluent, so compare a score with that of the
    references.

    Args:
        captions (`Sequence[str]`): The captions to score.
        seen (`set`): [`seen_bigrams`] of the training captions.
    """
    return _mean(seen.issuperset(_bigrams(caption)) for caption in captions)


def _bigrams(caption: str) -> list[Bigram]:
    tokens = [START, *split_tokens(caption), END]
    return list(zip(tokens, tokens[1:]))


def caption_metrics(
    predictions: Sequence[str], references: References, seen: set[Bigram] | None = None
) -> dict[str, float]:
    """`exact_match`, `token_f1`, `stutter` and, with the training captions' [`seen_bigrams`], `fluent`."""
    metrics = {
        "exact_match": exact_match(predictions, references),
        "token_f1": token_f1(predictions, references),
        "stutter": stutter_share(predictions),
    }
    return metrics if seen is None else {**metrics, "fluent": fluent_share(predictions, seen)}


def coco_metrics(predictions: Sequence[str], references: References) -> dict[str, float]:
    r"""
    `bleu_4` and `cider` (CIDEr-D), computed by the code of COCO's evaluation. Needs `pip install modeling_tdd[eval]`.

    Tokens are lower-cased words without punctuation. COCO's own tokenizer is a Java program (PTBTokenizer), which
    splits some words such as "don't" differently. Expect differences of a few tenths of a point from its figures.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    def tokenize(caption: str) -> str:
        return " ".join(re.findall(r"[\w'’-]*\w[\w'’-]*", caption.lower()))

    pairs = _pairs(predictions, references)
    predicted = {index: [tokenize(prediction)] for index, (prediction, _) in enumerate(pairs)}
    expected = {index: [tokenize(caption) for caption in captions] for index, (_, captions) in enumerate(pairs)}
    bleu, _ = Bleu(4).compute_score(expected, predicted, verbose=0)
    cider, _ = Cider().compute_score(expected, predicted)
    return {"bleu_4": float(bleu[3]), "cider": float(cider)}


def _pairs(predictions: Sequence[str], references: References) -> list[tuple[str, Sequence[str]]]:
    if isinstance(references, str) or any(isinstance(captions, str) for captions in references):
        raise ValueError("`references` must hold a list of captions for each image, got a string.")
    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            "`predictions` and `references` must have the same length, at least 1, got "
            f"{len(predictions)} and {len(references)}."
        )
    return list(zip(predictions, references))


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
