# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""How well a CLIP retrieves pictures by captions, and captions by pictures."""

from collections.abc import Sequence

import torch
from torch import Tensor


def retrieval(images: Tensor, texts: Tensor, captions: Sequence[str]) -> dict[str, float]:
    r"""
    Recall of pairs. All pictures with the same caption are right for it.

    Args:
        images, texts (`torch.Tensor` of shape `(num_pairs, projection_dim)`): Features of pairs, of unit length.
        captions (`Sequence[str]`): The captions.

    Returns:
        `dict`: for k of 1, 5 and 10, `image_to_text_k` and `text_to_image_k`: how often a right one is among the k
        most similar, over all pictures and over the different captions; and `num_images`, `num_captions`.
    """
    different = list(dict.fromkeys(captions))
    first = torch.tensor([captions.index(caption) for caption in different])
    right = torch.tensor([[one == other for other in different] for one in captions])
    similarities = images @ texts[first].T
    scores: dict[str, float] = {"num_images": len(captions), "num_captions": len(different)}
    for name, matrix, truth in (("image_to_text", similarities, right), ("text_to_image", similarities.T, right.T)):
        order = matrix.argsort(dim=1, descending=True)
        for k in (1, 5, 10):
            scores[f"{name}_{k}"] = truth.gather(1, order[:, :k]).any(1).float().mean().item()
    return scores
