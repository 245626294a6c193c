# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Candidates: several captions of an image, of which the most probable are returned (ours; the paper has none)."""

from typing import NamedTuple

import torch
from torch import Tensor


class RankedCandidates(NamedTuple):
    r"""
    Captions of each image with their probabilities among each other.

    Args:
        tokens (`torch.LongTensor` of shape `(batch_size, num_candidates, N)`): The captions.
        probs (`torch.FloatTensor` of shape `(batch_size, num_candidates)`):
            Their probabilities, which sum to 1. Of equal captions the first has that of all, and the others 0.
        best (`torch.LongTensor` of shape `(batch_size, num_best)`): Which are the most probable, best first.
    """

    tokens: Tensor
    probs: Tensor
    best: Tensor

    @property
    def rows(self) -> Tensor:
        """The rows of the best among all captions of all images, in succession."""
        first = torch.arange(len(self.best), device=self.best.device)[:, None] * self.probs.shape[1]
        return (first + self.best).flatten()


def rank_candidates(tokens: Tensor, scores: Tensor, temperature: float, num_best: int) -> RankedCandidates:
    r"""
    Ranks candidates by the softmax of their scores. A candidate that is listed twice counts once.

    Args:
        tokens (`torch.LongTensor` of shape `(batch_size, num_candidates, N)`): Captions, padded behind their ends.
        scores (`torch.FloatTensor` of shape `(batch_size, num_candidates)`): Their scores in nats.
        temperature (`float`): What the scores are divided by.
        num_best (`int`): How many are wanted.
    """
    is_equal = (tokens[:, :, None] == tokens[:, None]).all(-1)
    is_repeated = is_equal.tril(-1).any(-1)
    probs = (scores / temperature).masked_fill(is_repeated, float("-inf")).softmax(-1)
    # A stable sort: of equally probable ones the first comes first, and repeated ones come last
    best = probs.masked_fill(is_repeated, -1.0).argsort(dim=-1, descending=True, stable=True)[:, :num_best]
    return RankedCandidates(tokens, probs, best)


__all__ = ["RankedCandidates", "rank_candidates"]
