# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Scores of given captions, to rank captions by an image, or images by a caption (ours; the paper has none).

Three numbers serve, none of which the denoising loop draws from:

- The likelihood: the sum over a caption's tokens, its end among them, of the log-probability of each given the image
  and the tokens before it, while all later places are hidden. By the chain rule it is the caption's log-probability
  under a distribution over all captions, so captions of different lengths can be compared.
- The pseudo-log-likelihood: the same sum, where each token is given all others. It looks at both sides, and is no
  log-probability.
- The diffusion bound: minus the weighted training loss, summed over the N places and averaged over given draws of
  timesteps and noise.

The first two need a network that was trained with a timestep for each token, or with masks. Any network has the third.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .configuration_tdd import TDDConfig
from .loss_tdd import draw_noisy_targets
from .samplers_tdd import follows_end, settled_timestep
from .sampling_tdd import log_probability
from .settings_tdd import check_given


class PlacePrediction(NamedTuple):
    """Logits of shape (rows, K) of one place each, and the captions and places that they belong to."""

    captions: Tensor
    places: Tensor
    logits: Tensor


class TDDLikelihoodMixin:
    """`score` for models that denoise tokens together. It stands beside `PreTrainedModel`."""

    # What the model has
    config: TDDConfig
    model: Any
    lm_head: nn.Module
    training: bool
    _fill_labels: Any

    @torch.no_grad()
    def score(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        image_features: Tensor | None = None,
        method: str | None = None,
        num_draws: int = 16,
        max_rows: int = 256,
    ) -> Tensor:
        r"""
        Scores given captions of images. A score depends neither on the other images and captions nor on global random
        state.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`, *optional*):
                Images.
            labels (`torch.LongTensor` of shape `(batch_size, length)` or `(batch_size, num_captions, length)`):
                A caption, or several, for each image, with their `eos_token_id`. `pad_token_id` or -100 fills short
                ones.
            image_features (`torch.FloatTensor`, *optional*):
                In place of `pixel_values`: the `pooler_output` of `model.get_image_features`.
            method (`str`, *optional*):
                `"likelihood"`, the default where the network has it, `"pseudo_likelihood"` or `"diffusion_bound"`.
            num_draws (`int`, *optional*, defaults to 16):
                Over how many draws of timesteps and noise the diffusion bound is averaged, the same for all captions.
            max_rows (`int`, *optional*, defaults to 256):
                How many sequences a pass of the denoiser has at most: memory against speed. No score depends on it.
                A pass of the diffusion bound has at least the `num_draws` of one caption.

        Returns:
            `torch.FloatTensor` of shape `(batch_size,)` or `(batch_size, num_captions)`: the scores, in nats, the
            higher the likelier. A longer caption has more tokens that may be unlikely.

        Raises:
            `ValueError`: in training mode, for a method that the network does not have, and for labels of a wrong
                shape or out of range.

        Example:

        ```python
        >>> labels = processor(captions=["red apple", "green apple"], return_tensors="pt").labels
        >>> model.score(inputs.pixel_values, labels[None]).argmax(-1)
        ```"""
        check_given(method=method, labels=labels, num_draws=num_draws, max_rows=max_rows)
        method = self._scoring_method(method)
        prefix = self.model.get_prefix(pixel_values, image_features)
        if labels is None or labels.ndim not in (2, 3) or len(labels) != len(prefix):
            given = None if labels is None else tuple(labels.shape)
            allowed = f"({len(prefix)}, length) or ({len(prefix)}, num_captions, length)"
            raise ValueError(f"`labels` must have the shape {allowed}, got {given}.")
        targets = self._fill_labels(labels.flatten(0, -2).to(prefix.device))
        return self._score_tokens(prefix, targets, method, num_draws, max_rows).view(labels.shape[:-1])

    def _scoring_method(self, method: str | None) -> str:
        config = self.config
        if self.training:
            raise ValueError("`score` needs `model.eval()`: in training mode a score would be drawn.")
        if config.prediction_type == "epsilon":
            raise ValueError("`score` needs a network that predicts tokens, got `prediction_type='epsilon'`.")
        has_hidden = config.corruption == "mask" or config.timestep_sampling == "per_token"
        if method in ("likelihood", "pseudo_likelihood") and not has_hidden:
            raise ValueError(
                f"`method={method!r}` needs a network that was trained with masks or with a timestep for each token: "
                "this one has never seen some tokens hidden among others. Use `method='diffusion_bound'`."
            )
        return method or ("likelihood" if has_hidden else "diffusion_bound")

    def _score_tokens(
        self, prefix: Tensor, targets: Tensor, method: str, num_draws: int = 16, max_rows: int = 256
    ) -> Tensor:
        """Scores of shape (captions,) of targets of shape (captions, N), which are as many for each image."""
        images = torch.arange(len(prefix), device=prefix.device).repeat_interleave(len(targets) // len(prefix))
        if method == "diffusion_bound":
            return self._diffusion_bound(prefix, images, targets, num_draws, max_rows)
        scores = torch.zeros(targets.shape, device=targets.device)
        for part in self._predict_places(prefix, images, targets, method, max_rows):
            scores[part.captions, part.places] = log_probability(part.logits, targets[part.captions, part.places])
        return scores.sum(1)

    def _predict_places(
        self, prefix: Tensor, images: Tensor, targets: Tensor, method: str, max_rows: int
    ) -> Iterator["PlacePrediction"]:
        """Predicts each token of each caption in a row of its own, in which it is hidden and the tokens that it is
        given are as settled ones are in the loop. Where a caption has no end token, its first padding is its end."""
        config, denoiser, length = self.config, self.model.denoiser, targets.shape[1]
        all_places = torch.arange(length, device=targets.device)
        captions, places = (~follows_end(targets, (config.eos_token_id, config.pad_token_id))).nonzero(as_tuple=True)
        noise = None
        if config.corruption == "mask":  # the timestep at which as many places are expected to be visible
            shares = torch.arange(length, device=targets.device)[:, None] / length
            timesteps = (denoiser.schedule_on(targets.device).alpha_bar[1:] - shares).abs().argmin(1) + 1
        else:
            timesteps = torch.tensor([settled_timestep(config.num_timesteps), config.num_timesteps])
            timesteps = timesteps.to(targets.device)
            noise = torch.randn(length, config.noise_width, generator=torch.Generator().manual_seed(0))
            noise = noise.to(targets.device)
        cache = denoiser(timesteps=timesteps, noise=noise, prefix=prefix).cache
        for caption, place in zip(captions.split(max_rows), places.split(max_rows)):
            own, tokens = place[:, None], targets[caption]
            is_hidden = all_places >= own if method == "likelihood" else all_places == own
            if config.corruption == "mask":
                num_visible = length - is_hidden.sum(1, keepdim=True)
                inputs, levels = tokens.masked_fill(is_hidden, config.num_categories), timesteps[num_visible]
            else:
                inputs, levels = tokens, timesteps[is_hidden.long()]
            embeds = None if noise is None else cache.noise_embeds.expand(len(caption), -1, -1)
            outputs = denoiser(
                inputs, levels.expand_as(inputs), noise_embeds=embeds, cache=cache.select(images[caption])
            )
            hidden_states = outputs.last_hidden_state[torch.arange(len(place), device=place.device), place]
            yield PlacePrediction(caption, place, self.lm_head(hidden_states).float())

    def _diffusion_bound(
        self, prefix: Tensor, images: Tensor, targets: Tensor, num_draws: int, max_rows: int
    ) -> Tensor:
        """Minus the weighted losses of shape (captions,), summed over the places, a mean over draws."""
        denoiser, scores = self.model.denoiser, []
        cache = denoiser(timesteps=torch.ones(1, dtype=torch.long, device=targets.device), prefix=prefix).cache
        cache = cache._replace(time_embeds=None)  # the timesteps are not known beforehand
        is_padding = targets == self.config.pad_token_id
        token_weight = torch.where(is_padding, float(self.config.pad_loss_weight), 1.0)
        for part in torch.arange(len(targets), device=targets.device).split(max(1, max_rows // num_draws)):
            noisy = draw_noisy_targets(denoiser, targets[part], repeats=num_draws)
            own = cache.select(images[part].repeat_interleave(num_draws))
            outputs = denoiser(noisy.tokens, noisy.timesteps, noisy.noise, cache=own)
            logits = self.lm_head(outputs.last_hidden_state).float()
            repeated, weight = (values[part].repeat_interleave(num_draws, dim=0) for values in (targets, token_weight))
            losses = -log_probability(logits, repeated) * noisy.loss_weight * weight
            scores.append(-losses.sum(1).view(len(part), num_draws).mean(1))
        return torch.cat(scores)


__all__ = ["TDDLikelihoodMixin"]
