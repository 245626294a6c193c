# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The training loss: what is drawn for it (timesteps, noise, wrong tokens), and the weighted cross-entropy.

The notation is that of `diffusion_tdd.py`.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .diffusion_tdd import replace_by_random_tokens


if TYPE_CHECKING:
    from .denoiser_tdd import TDDDenoiser

# The highest timestep, as a share of T, of a token that is not pure noise (docs/decisions.md, 12 to 14).
HIGHEST_VISIBLE_TIMESTEP = 0.8

# The seed of what an evaluation draws: its loss is the same in each epoch, and can choose a checkpoint.
EVALUATION_SEED = 0


# ---- Draws


def draw_timesteps(
    batch_size: int,
    timesteps_per_image: int,
    num_timesteps: int,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""
    The distinct timesteps of each image (Section 3.3), each of them uniform over 1 ... T.

    One random start and even spacing around the circle of timesteps (systematic sampling): every timestep is equally
    likely, as in the paper, and those of an image never crowd together, which lowers the loss's variance.

    Returns:
        `torch.Tensor`: int64 of shape `(batch_size, timesteps_per_image)`.
    """
    start = torch.randint(num_timesteps, (batch_size, 1), device=device, generator=generator)
    spacing = torch.arange(timesteps_per_image, device=device) * num_timesteps // timesteps_per_image
    return (start + spacing) % num_timesteps + 1


def draw_token_timesteps(
    timesteps: Tensor, num_tokens: int, num_timesteps: int, generator: torch.Generator | None = None
) -> Tensor:
    r"""
    Gives the tokens of a sequence timesteps of their own, around the sequence's t: with chance t / T a token is at T,
    pure noise; otherwise its timestep is uniform over 1 ... 0.8 T (ours; the paper: one timestep for all tokens).

    Where all tokens share t, each can be read off its own noisy vector about as well as off its neighbours', and the
    loss is lowest for a network that reads just that. A token at T can only be learned from the image and from what
    is visible of the other tokens, as in masked diffusion; but what is visible is noisy here, so it can be doubted.

    Args:
        timesteps (`torch.LongTensor` of shape `(rows, 1)`): One timestep for each sequence, 1 ... T.
        num_tokens (`int`): N.
        num_timesteps (`int`): T.

    Returns:
        `torch.LongTensor` of shape `(rows, num_tokens)`.
    """
    shape, device = (len(timesteps), num_tokens), timesteps.device
    is_hidden = torch.rand(shape, device=device, generator=generator) * num_timesteps < timesteps
    highest_visible = max(1, round(HIGHEST_VISIBLE_TIMESTEP * num_timesteps))
    visible = torch.randint(1, highest_visible + 1, shape, device=device, generator=generator)
    return torch.where(is_hidden, num_timesteps, visible)


def replace_by_wrong_tokens(targets: Tensor, share: float) -> Tensor:
    r"""
    Sequences in which a share of the tokens is that of another sequence of the batch, at the same place.

    In the denoising loop a visible token is the network's own, and may be wrong. A network that has only seen right
    ones has no reason to doubt it.

    Args:
        targets (`torch.LongTensor` of shape `(rows, N)`): Clean tokens.
        share (`float`): The chance of each token to be replaced, in [0, 1).

    Returns:
        `torch.LongTensor` of shape `(rows, N)`: the tokens to add noise to; `targets` remain what is to be predicted.
    """
    others = targets[torch.randperm(len(targets), device=targets.device)]
    is_wrong = torch.rand(targets.shape, device=targets.device) < share
    return torch.where(is_wrong, others, targets)


class NoisyTargets(NamedTuple):
    r"""
    What the denoiser reads in training, a row for each image and timestep.

    Args:
        tokens (`torch.Tensor`): Tokens to add noise to, int64 `(rows, N)` or probabilities `(rows, N, K)`. With masks,
            K stands in the place of a masked token, and random tokens in that of others.
        timesteps (`torch.LongTensor` of shape `(rows, N)`): Timesteps, 1 ... T.
        noise (`torch.Tensor` of shape `(rows, N, noise_width)`, *optional*): Standard normal noise, or `None`.
        loss_weight (`torch.Tensor` of shape `(rows, N)`): The timestep-conditioned coefficient of Section 3.2, or 1.
            With masks, 0 for visible tokens.
    """

    tokens: Tensor
    timesteps: Tensor
    noise: Tensor | None
    loss_weight: Tensor


def draw_noisy_targets(
    denoiser: "TDDDenoiser",
    targets: Tensor,
    timesteps: Tensor | None = None,
    noise: Tensor | None = None,
    repeats: int | None = None,
) -> NoisyTargets:
    r"""
    Draws the noisy versions of each image's tokens, and what is not given of their timesteps and noise.

    In training everything comes from the global random state. In eval mode it comes from a fixed seed, the same for
    each image, so that an image's loss depends neither on its batch nor on when it is computed.

    Args:
        denoiser ([`TDDDenoiser`]): Its configuration, schedule and mode.
        targets (`torch.Tensor`): `(batch_size, N)` or `(batch_size, N, K)`, as of [`diffusion_loss`].
        timesteps (`torch.LongTensor`, *optional*): `(batch_size, timesteps_per_image)`, or with an axis N behind it.
        noise (`torch.Tensor` of shape `(batch_size, timesteps_per_image, N, noise_width)`, *optional*): The noise.
        repeats (`int`, *optional*): In place of the configuration's `timesteps_per_image`.
    """
    config, training, device = denoiser.config, denoiser.training, targets.device
    batch_size, num_tokens = targets.shape[:2]
    repeats = config.timesteps_per_image if repeats is None else repeats
    generator = None if training else torch.Generator(device).manual_seed(EVALUATION_SEED)
    drawn_images = batch_size if training else 1
    tokens = targets.repeat_interleave(repeats, dim=0)
    # 1. Timesteps
    if timesteps is None:
        drawn = draw_timesteps(drawn_images, repeats, config.num_timesteps, device, generator).flatten()[:, None]
        if config.timestep_sampling == "per_token":
            drawn = draw_token_timesteps(drawn, num_tokens, config.num_timesteps, generator)
        if training and config.mistaken_share > 0:
            tokens = replace_by_wrong_tokens(tokens, config.mistaken_share)
        timesteps = drawn.expand(-1, num_tokens).repeat(batch_size // drawn_images, 1)
    else:
        timesteps = timesteps.flatten(0, 1).view(batch_size * repeats, -1).expand(-1, num_tokens)
    # 2. Noise
    draw = torch.randn if config.corruption == "gaussian" else torch.rand
    if noise is None:
        shape = (drawn_images * repeats, num_tokens, config.noise_width)
        noise = draw(shape, generator=generator, device=device).repeat(batch_size // drawn_images, 1, 1)
    else:
        noise = noise.flatten(0, 1)
    # 3. The weight of each token
    alpha_bar = denoiser.schedule_on(device).alpha_bar[timesteps]
    loss_weight = alpha_bar if config.loss_weighting == "alpha_bar" else torch.ones_like(alpha_bar)
    if config.corruption == "uniform":
        tokens = replace_by_random_tokens(tokens, noise, alpha_bar, config.num_categories)
        return NoisyTargets(tokens, timesteps, None, loss_weight)
    if config.corruption == "mask":
        is_mask = noise[..., 0] >= alpha_bar
        tokens = tokens.masked_fill(is_mask, config.num_categories)
        return NoisyTargets(tokens, timesteps, None, loss_weight * is_mask)
    return NoisyTargets(tokens, timesteps, noise, loss_weight)


# ---- The loss


class DiffusionLoss(NamedTuple):
    """Result of [`diffusion_loss`]; the logits have the shape (batch_size, timesteps_per_image, N, K categories)."""

    loss: Tensor
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None
    loss_by_timestep: Tensor


def diffusion_loss(
    denoiser: "TDDDenoiser",
    head: nn.Module,
    prefix: Tensor,
    targets: Tensor,
    timesteps: Tensor | None = None,
    noise: Tensor | None = None,
    token_weight: Tensor | None = None,
    **kwargs: Unpack[TransformersKwargs],
) -> DiffusionLoss:
    r"""
    The training loss of Sections 3.2 and 3.4, with the K-fold feature reuse of Section 3.3: the mean of the tokens'
    weighted losses over images, timesteps and the N places. The paper sums over the N places; the constant 1 / N
    makes the scale of the loss independent of N. A mean over images is the same however a batch is cut.

    Args:
        denoiser, head (`nn.Module`): From noisy tokens to hidden states, and on to logits.
        prefix (`torch.Tensor` of shape `(batch_size, prefix_length, hidden_size)`): The images' conditions.
        targets (`torch.Tensor`):
            Clean tokens, int64 of shape `(batch_size, N)`, or their probabilities, `(batch_size, N, K categories)`.
        timesteps (`torch.LongTensor`, *optional*):
            Of shape `(batch_size, timesteps_per_image)` or `(batch_size, timesteps_per_image, N)`. Drawn if not given.
        noise (`torch.Tensor` of shape `(batch_size, timesteps_per_image, N, noise_width)`, *optional*): Likewise.
        token_weight (`torch.Tensor` of shape `(batch_size, N)`, *optional*): Weights of the tokens, 1 by default.
    """
    config = denoiser.config
    batch_size, num_tokens = targets.shape[:2]
    repeats = config.timesteps_per_image
    # 1. Noisy versions of each image's tokens; in training some images give way to the null condition
    noisy = draw_noisy_targets(denoiser, targets, timesteps, noise)
    drop_condition = None
    if denoiser.training:
        drop_condition = torch.rand(batch_size, device=prefix.device) < config.condition_dropout
    # 2. Denoise them
    outputs = denoiser(noisy.tokens, noisy.timesteps, noisy.noise, prefix, drop_condition=drop_condition, **kwargs)
    logits = head(outputs.last_hidden_state).float()
    # 3. Compare with what they were
    if config.prediction_type == "epsilon":
        losses = (logits - noisy.noise).square().mean(-1)
    else:
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1),
            targets.repeat_interleave(repeats, dim=0).flatten(0, 1),
            reduction="none",
            label_smoothing=config.label_smoothing,
        ).view(-1, num_tokens)
    # 4. Weight and average
    weight = noisy.loss_weight
    if token_weight is not None:
        weight = weight * token_weight.repeat_interleave(repeats, dim=0)
    return DiffusionLoss(
        (weight * losses).mean(),
        logits.unflatten(0, (batch_size, repeats)),
        outputs.hidden_states,
        outputs.attentions,
        sum_by_timestep(losses, weight, noisy.timesteps, config.num_timesteps),
    )


def sum_by_timestep(losses: Tensor, weight: Tensor, timesteps: Tensor, num_timesteps: int) -> Tensor:
    r"""
    Args:
        losses, weight (`torch.Tensor` of shape `(rows, N)`): Of the tokens.
        timesteps (`torch.LongTensor` of shape `(rows, N)`): In 1 ... T.
        num_timesteps (`int`): T.

    Returns:
        `torch.Tensor` of shape `(10, 2)`: sums of the weighted losses and of the weights in each tenth of 1 ... T.
    """
    tenths = (timesteps - 1) * 10 // num_timesteps
    values = torch.stack([weight * losses, weight], dim=-1).detach()
    return values.new_zeros(10, 2).index_add(0, tenths.flatten(), values.flatten(0, 1))


__all__ = [
    "DiffusionLoss",
    "NoisyTargets",
    "diffusion_loss",
    "draw_noisy_targets",
    "draw_timesteps",
    "draw_token_timesteps",
    "replace_by_wrong_tokens",
    "sum_by_timestep",
]
