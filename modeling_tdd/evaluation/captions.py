# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Metrics of captions. All are shares or means in [0, 1] over images, but for CIDEr, whose scale is [0, 10].

Tokens here are words and punctuation marks, whatever the model's tokenizer, so that all models are measured alike.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence


References = Sequence[Sequence[str]]  # of each image, its reference captions
Bigram = tuple[str, str]

START, END = "<start>", "<end>"  # no token of `split_tokens` looks like these


def split_tokens(caption: str) -> list[str]:
    """Words and punctuation marks: "medium-light tone" gives "medium", "-", "light", "tone"."""
    return re.findall(r"\w+|[^\w\s]", caption)


def exact_match(predictions: Sequence[str], references: References) -> float:
    """Share of captions whose tokens are those of one of their references, in their order."""
    return _mean(
        any(split_tokens(prediction) == split_tokens(reference) for reference in captions)
        for prediction, captions in _pairs(predictions, references)
    )


def token_f1(predictions: Sequence[str], references: References) -> float:
    """Mean over images of the best F1 with one of the references: of bags of tokens, in any order."""
    return _mean(
        max(_bag_f1(Counter(split_tokens(prediction)), Counter(split_tokens(reference))) for reference in captions)
        for prediction, captions in _pairs(predictions, references)
    )


def _bag_f1(prediction: Counter[str], reference: Counter[str]) -> float:
    return 2 * (prediction & reference).total() / max(1, prediction.total() + reference.total())


def stutter_share(captions: Sequence[str]) -> float:
    """Share of captions with a token twice in succession, such as "man : : light light skin tone".

    Longer phrases do not count: "family: man, man, boy" repeats one rightly.
    """
    return _mean(any(first == second for first, second in _bigrams(caption)) for caption in captions)


def seen_bigrams(captions: Iterable[str]) -> set[Bigram]:
    """Every pair of neighbouring tokens of the captions, their starts and ends included."""
    return {bigram for caption in captions for bigram in _bigrams(caption)}


def fluent_share(captions: Sequence[str], seen: set[Bigram]) -> float:
    r"""
    Share of captions all of whose pairs of neighbouring tokens stand in training captions.

    The rest are impossible mixtures, such as "light - skin tone", or end too soon; new combinations of known parts are
    fluent. A caption with a word that training lacks never is, so compare with the references' own share.

    Args:
        captions (`Sequence[str]`): Captions to judge.
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
    `bleu_4` and `cider` (CIDEr-D) by the code of COCO's evaluation. Needs `pip install modeling_tdd[eval]`.

    Tokens are lower-cased words, without punctuation. COCO's own tokenizer is a Java program (PTBTokenizer), which
    splits differently in places, as at "don't": expect differences of a few tenths of a point from its figures.
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
            "`predictions` and `references` must be as many, and at least one, got "
            f"{len(predictions)} and {len(references)}."
        )
    return list(zip(predictions, references))


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
