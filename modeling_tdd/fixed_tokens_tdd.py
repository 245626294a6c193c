# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""What is known of captions before they are denoised: prompts, the words around gaps, choices, and alternatives."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from .generation_configuration_tdd import TDDGenerationConfig
from .samplers_tdd import KnownTokens, follows_end


def end_tokens(config: GenerationConfig | PreTrainedConfig) -> tuple[int, int]:
    """The tokens behind which a caption is padding: its end, and padding itself."""
    return config.eos_token_id, config.pad_token_id


def pad_after_end(tokens: Tensor, config: GenerationConfig | PreTrainedConfig) -> Tensor:
    """Replaces by padding what stands behind the end."""
    return tokens.masked_fill(follows_end(tokens, end_tokens(config)), config.pad_token_id)


@dataclass
class FixedTokens:
    """
    What is known of captions beforehand.

    Args:
        tokens (`torch.LongTensor` of shape `(rows, N)`): Tokens.
        mask (`torch.BoolTensor` of the same shape): Where they are fixed.
        pad_token_id (`int`): The token of padding.
        prompt_length (`int`): Tokens that every row's prompt has.
        length (`int`): Places of the longest row.
    """

    tokens: Tensor
    mask: Tensor
    pad_token_id: int
    prompt_length: int
    length: int

    @property
    def known(self) -> KnownTokens:
        """What the sampler must know."""
        return KnownTokens(self.tokens, self.mask)

    @property
    def before_content(self) -> Tensor:
        """Places before a fixed token that is not padding: no caption may end there. Bool of shape (rows, N)."""
        is_content = self.mask & (self.tokens != self.pad_token_id)
        # Counted from the right, without the place's own
        return is_content.flip(1).cumsum(1).flip(1) - is_content.long() > 0

    def to(self, device: torch.device) -> "FixedTokens":
        """The same on a device."""
        return replace(self, tokens=self.tokens.to(device), mask=self.mask.to(device))

    def repeat(self, repeats: int) -> "FixedTokens":
        """Each row `repeats` times in succession."""
        tokens, mask = (tensor.repeat_interleave(repeats, dim=0) for tensor in (self.tokens, self.mask))
        return replace(self, tokens=tokens, mask=mask)


def check_mask(name: str, mask: Tensor, name_of_tokens: str, tokens: Tensor) -> None:
    """Raises a `ValueError` unless a mask has the shape of its tokens, and holds 0 and 1 alone."""
    if mask.shape != tokens.shape:
        raise ValueError(
            f"`{name}` must have the shape of `{name_of_tokens}`, {tuple(tokens.shape)}, got {tuple(mask.shape)}."
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"`{name}` must hold 0 and 1 alone, got {mask.unique().tolist()[:5]}.")


def infilling_tokens(
    decoder_input_ids: Tensor, decoder_attention_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the mask of those that are fixed, and the number of each row's places."""
    if decoder_attention_mask is None:
        raise ValueError("`decoder_input_ids` needs a `decoder_attention_mask` of its shape, 1 for fixed tokens.")
    check_mask("decoder_attention_mask", decoder_attention_mask, "decoder_input_ids", decoder_input_ids)
    rows, length = decoder_input_ids.shape
    return (
        decoder_input_ids.long(),
        decoder_attention_mask.bool(),
        torch.full((rows,), length, device=decoder_input_ids.device),
    )


def choice_tokens(
    choices: Tensor, choices_mask: Tensor | None, batch_size: int, config: TDDGenerationConfig
) -> tuple[Tensor, Tensor]:
    r"""
    Choices as infillings, one row for each.

    Args:
        choices (`torch.LongTensor` of shape `(batch_size, num_choices, length)`): The allowed captions.
        choices_mask (`torch.Tensor` of the same shape, *optional*): 1 for fixed tokens; all are by default.
        batch_size (`int`): How many images there are.
        config ([`TDDGenerationConfig`]): For how many are to be returned.

    Returns:
        `tuple`: tokens and their mask, both of shape `(batch_size * num_choices, length)`.

    Raises:
        `ValueError`: for another shape, fewer choices than are to be returned, or a wrong mask.
    """
    if choices.shape[0] != batch_size or 0 in choices.shape:
        raise ValueError(
            f"`choices` must have the shape ({batch_size}, num_choices, length), with at least one choice, got "
            f"{tuple(choices.shape)}."
        )
    if config.num_return_sequences > choices.shape[1]:
        raise ValueError(
            f"`num_return_sequences` is {config.num_return_sequences}, and there are {choices.shape[1]} `choices`."
        )
    choices_mask = torch.ones_like(choices) if choices_mask is None else choices_mask
    check_mask("choices_mask", choices_mask, "choices", choices)
    return choices.flatten(0, 1), choices_mask.flatten(0, 1)


def prompt_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """As [`infilling_tokens`], of prompts, whose padding may be on either side."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    check_mask("attention_mask", mask, "input_ids", input_ids)
    # Padding on the left moves to the right: a prompt begins at the first place.
    order = mask.bool().logical_not().long().argsort(dim=1, stable=True)
    tokens, mask = input_ids.long().gather(1, order), mask.bool().gather(1, order)
    length = mask.sum(dim=1)
    return tokens[:, : length.max()], mask[:, : length.max()], length


def completes_sequence(sequence: list[int], index: int, tokens: Tensor, is_known: Tensor) -> Tensor:
    """Where `sequence[index]` would complete the sequence among known tokens: bool of the shape (rows, N)."""
    length, num_places = len(sequence), tokens.shape[1]
    completes = torch.zeros_like(is_known)
    if length > num_places:
        return completes
    matches = is_known.unfold(1, length, 1) & (tokens.unfold(1, length, 1) == tokens.new_tensor(sequence))
    matches[..., index] = True
    completes[:, index : num_places - length + 1 + index] = matches.all(-1)
    return completes


def likeliest_alternatives(
    log_probs: Tensor, captions: Tensor, fixed: FixedTokens, number: int, config: TDDGenerationConfig
) -> FixedTokens:
    r"""
    What to fix so that denoising again gives other captions of the same images, each different from all others.

    Of all tokens at all free places that the captions do not have there, the likeliest by the image alone are taken,
    measured against the caption's own token. Each alternative fixes one of them. Where it changes another place than
    an earlier alternative did, it also fixes the caption's own token at that one's place, so that the two differ.

    Args:
        log_probs (`torch.Tensor` of shape `(rows, N, K)`): Of the first step, which sees no token.
        captions (`torch.LongTensor` of shape `(rows, N)`): The captions.
        fixed ([`FixedTokens`]): What was known before.
        number (`int`): How many alternatives of each caption.
        config ([`TDDGenerationConfig`]): For the special tokens.

    Returns:
        [`FixedTokens`]: of `rows * number` rows, those of a caption in succession.

    Raises:
        `ValueError`: if a caption has fewer alternatives.
    """
    num_places, num_tokens = log_probs.shape[1:]
    # 1. How much less likely a token is than the caption's own. One that a processor forbade in the first step alone
    # counts as the likeliest
    own, likeliest = log_probs.gather(-1, captions[..., None]), log_probs.amax(-1, keepdim=True)
    advantage = log_probs - torch.where(own.isneginf(), likeliest, own)
    advantage.scatter_(-1, captions[..., None], float("-inf"))
    advantage[..., config.pad_token_id] = float("-inf")  # a caption that pads here reads as one that ends here
    is_closed = fixed.mask | follows_end(captions, end_tokens(config))
    advantage = advantage.masked_fill(is_closed[..., None], float("-inf"))
    is_known = torch.ones_like(captions, dtype=torch.bool)
    for banned in config.bad_words_ids or []:  # which the caption's own tokens beside it may complete
        for index, token in enumerate(banned):
            completes = completes_sequence(banned, index, captions, is_known)
            advantage[..., token] = advantage[..., token].masked_fill(completes, float("-inf"))
    best = advantage.flatten(1).topk(min(number, num_places * num_tokens), dim=-1)
    if len(best.values[0]) < number or best.values.isneginf().any():
        name = "num_return_sequences" if config.num_candidates is None else "num_candidates"
        raise ValueError(f"`{name}` is {number + 1}, but some image has fewer captions than that.")
    places, tokens = best.indices // num_tokens, best.indices % num_tokens
    # 2. Fix it, and the caption's own tokens where earlier alternatives have another
    row = torch.arange(len(captions), device=captions.device)
    known = [(fixed.tokens.clone(), fixed.mask.clone()) for _ in range(number)]
    for index, (known_tokens, known_mask) in enumerate(known):
        ends_here = tokens[:, index] == config.eos_token_id
        for earlier in range(index):
            place = places[:, earlier]
            # What stands behind an end is no longer part of the caption
            matters = (place != places[:, index]) & ~(ends_here & (place > places[:, index]))
            known_tokens[row, place] = torch.where(matters, captions[row, place], known_tokens[row, place])
            known_mask[row, place] |= matters
        known_tokens[row, places[:, index]] = tokens[:, index]
        known_mask[row, places[:, index]] = True
    all_tokens, all_masks = (torch.stack(kind, dim=1).flatten(0, 1) for kind in zip(*known))
    return replace(fixed, tokens=all_tokens, mask=all_masks)


__all__ = [
    "FixedTokens",
    "choice_tokens",
    "completes_sequence",
    "end_tokens",
    "infilling_tokens",
    "likeliest_alternatives",
    "pad_after_end",
    "prompt_tokens",
]
