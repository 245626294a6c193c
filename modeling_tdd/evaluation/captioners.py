# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Captioners of any method under one interface: features, captions with a confidence, scores, and filled gaps."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..fixed_tokens_tdd import pad_after_end
from ..images_tdd import to_rgb
from ..modeling_tdd import TDDForCaptioning
from ..processing_tdd import TDDProcessor
from .baselines import AutoregressiveCaptioner, AutoregressiveConfig


if TYPE_CHECKING:
    from datasets import Dataset

Captioner = TDDForCaptioning | AutoregressiveCaptioner


def load_captioner(folder: Path) -> tuple[Captioner, TDDProcessor]:
    """A captioner of any method in eval mode, and its processor."""
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    is_autoregressive = model_type == AutoregressiveConfig.model_type
    model_class = AutoregressiveCaptioner if is_autoregressive else TDDForCaptioning
    return model_class.from_pretrained(folder).eval(), TDDProcessor.from_pretrained(folder, trust_remote_code=False)


@torch.inference_mode()
def encode_images(model: Captioner, processor: TDDProcessor, data: "Dataset", batch_size: int = 64) -> Tensor:
    """The features of the column `image`, of shape (images, prefix_length, encoder_hidden_size)."""
    features = []
    for batch in data.select_columns("image").iter(batch_size):
        pixels = processor(images=[to_rgb(image) for image in batch["image"]], return_tensors="pt").pixel_values
        features.append(model.model.get_image_features(pixels).pooler_output)
    return torch.cat(features)


def pad_to(tokens: Tensor, length: int, pad_token_id: int) -> Tensor:
    """Tokens with padding up to a length."""
    return nn.functional.pad(tokens, (0, length - tokens.shape[-1]), value=pad_token_id)


@torch.inference_mode()
def caption_with(model: Captioner, features: Tensor, num_candidates: int = 1, batch_size: int = 64) -> Tensor:
    """Captions, of shape (images, N), the best of several candidates: those of `generate` for TDD and MDD, and the
    beams of a search for the autoregressive captioner."""
    is_autoregressive = isinstance(model, AutoregressiveCaptioner)
    name = "num_beams" if is_autoregressive else "num_candidates"
    settings: dict[str, Any] = {name: num_candidates} if num_candidates > 1 else {}
    length, pad = model.config.max_position_embeddings, model.config.pad_token_id
    sequences: list[Any] = [model.generate(image_features=batch, **settings) for batch in features.split(batch_size)]
    # A beam search repeats the end of a beam that has ended earlier
    return pad_after_end(torch.cat([pad_to(rows, length, pad) for rows in sequences]), model.config)


@torch.inference_mode()
def fill_gaps(
    model: Captioner, features: Tensor, tokens: Tensor, is_gap: Tensor, num_candidates: int = 1, batch_size: int = 64
) -> Tensor:
    r"""
    Fills gaps of a known number of tokens.

    Args:
        model: A captioner.
        features (`torch.Tensor` of shape `(images, prefix_length, encoder_hidden_size)`): The images.
        tokens (`torch.LongTensor` of shape `(images, N)`): Captions, of whose gaps nothing is read.
        is_gap (`torch.BoolTensor` of shape `(images, N)`): The gaps, one in each caption.
        num_candidates (`int`, *optional*, defaults to 1):
            So many fillings are ranked by the likelihood of the whole caption.
        batch_size (`int`, *optional*, defaults to 64): Images per batch.

    Returns:
        `torch.LongTensor` of shape `(images, N)`: the captions.
    """
    filled = []
    for batch in zip(features.split(batch_size), tokens.split(batch_size), is_gap.split(batch_size)):
        if isinstance(model, AutoregressiveCaptioner):
            filled.append(_fill_left_to_right(model, *batch, num_candidates))
        else:
            settings: dict[str, Any] = {"num_candidates": num_candidates} if num_candidates > 1 else {}
            given = {"decoder_input_ids": batch[1], "decoder_attention_mask": ~batch[2]}
            sequences: Any = model.generate(image_features=batch[0], **given, **settings)
            filled.append(pad_after_end(sequences, model.config))
    return torch.cat(filled)


def _fill_left_to_right(
    model: AutoregressiveCaptioner, features: Tensor, tokens: Tensor, is_gap: Tensor, num_beams: int
) -> Tensor:
    """A search over the gap's tokens, which sees what stands before it. Its beams are ranked by the likelihood of the
    whole caption, so what stands behind counts too; with one beam it does not."""
    config = model.config
    rows = torch.arange(len(tokens))
    prefix = model.model.get_prefix(None, features)
    beams, totals = tokens[:, None].repeat(1, num_beams, 1), torch.full((len(tokens), num_beams), float("-inf"))
    totals[:, 0] = 0.0  # all beams are equal before the first token
    starts, lengths = is_gap.long().argmax(1), is_gap.sum(1)
    for step in range(int(lengths.max())):
        is_open = step < lengths
        place = (starts + step).clamp(max=tokens.shape[1] - 1)
        own = place.repeat_interleave(num_beams)
        logits = model.next_logits(prefix.repeat_interleave(num_beams, 0), beams.flatten(0, 1))
        log_probs = logits[torch.arange(len(own)), own].float().log_softmax(-1)
        log_probs[:, [config.pad_token_id, config.eos_token_id]] = float("-inf")  # words follow
        best = (totals.flatten()[:, None] + log_probs).view(len(tokens), -1).topk(num_beams, dim=-1)
        origin, chosen = best.indices // config.vocab_size, best.indices % config.vocab_size
        grown = beams.gather(1, origin[..., None].expand_as(beams)).clone()
        grown[rows, :, place] = chosen
        beams = torch.where(is_open[:, None, None], grown, beams)
        totals = torch.where(is_open[:, None], best.values, totals)
    if num_beams == 1:
        return beams[:, 0]
    scores = model.score(labels=beams, image_features=features).masked_fill(totals.isneginf(), float("-inf"))
    return beams[rows, scores.argmax(1)]
