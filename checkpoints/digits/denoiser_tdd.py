# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The denoiser: from noisy tokens, their timesteps and an image's prefix to hidden states of the clean tokens.

The prefix attends to itself alone, so its keys and values are computed once per image, and every diffusion step, every
timestep of the K-fold feature reuse and every noise sample reads them. The notation is that of `diffusion_tdd.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_tdd import TDDConfig
from .diffusion_tdd import NoiseSchedule, add_noise, noise_factor
from .sampling_tdd import select_rows


KeyValue = tuple[Tensor, ...]  # of these two


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Plain attention, the one that returns its weights. Shapes: (batch, heads, length, head_dim)."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def in_groups(states: Tensor, number: int) -> tuple[Tensor, ...]:
    """Successive groups of rows."""
    return states.chunk(number) if number > 1 else (states,)


class TDDAttention(nn.Module):
    """Self-attention whose keys and values may start with those of a prefix."""

    is_causal = False

    def __init__(self, config: TDDConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        # A bias would add the same to all scores of a query, which softmax takes away again
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def _split_heads(self, states: Tensor) -> Tensor:
        return states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def key_value(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return self._split_heads(self.k_proj(hidden_states)), self._split_heads(self.v_proj(hidden_states))

    def forward(
        self,
        hidden_states: Tensor,
        keys_and_values: Sequence[KeyValue],
        attention_mask: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        """Each of several successive groups of rows, of the same size, attends to keys and values of its own. The
        attention weights are those of the first group."""
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        queries = in_groups(self._split_heads(self.q_proj(hidden_states)), len(keys_and_values))
        groups = [
            attention(self, query, *pair, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs)
            for query, pair in zip(queries, keys_and_values)
        ]
        output = groups[0][0] if len(groups) == 1 else torch.cat([output for output, _ in groups])
        return self.o_proj(output.reshape(hidden_states.shape)), groups[0][1]


class TDDMLP(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, in_size: int, inner_size: int, out_size: int, hidden_act: str):
        super().__init__()
        self.fc1 = nn.Linear(in_size, inner_size)
        self.activation_fn = ACT2FN[hidden_act]
        self.fc2 = nn.Linear(inner_size, out_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class TDDLayer(GradientCheckpointingLayer):
    """A pre-norm Transformer layer for the noisy tokens and, where it is not cached yet, the prefix that they read.

    Tensors go in and out one by one: reentrant gradient checkpointing finds none within a tuple, and would silently
    cut the gradient of prefix and encoder.
    """

    def __init__(self, config: TDDConfig, is_last: bool):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = TDDAttention(config)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = TDDMLP(config.hidden_size, config.intermediate_size, config.hidden_size, config.hidden_act)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.is_last = is_last

    def forward(
        self,
        hidden_states: Tensor | None,
        prefix: Tensor | None = None,
        prefix_key: Tensor | None = None,
        prefix_value: Tensor | None = None,
        attention_mask: Tensor | None = None,
        prefix_attention_mask: Tensor | None = None,
        null_prefix: KeyValue | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        """From noisy tokens and a prefix, or its keys and values, to both after this layer, and the keys and values.
        `hidden_states` has one or several successive rows for each row of `prefix`; without it the prefix alone is
        encoded. With the keys and values of a null prefix, the second half of the rows attends to that."""
        if prefix_key is None:
            prefix, prefix_key, prefix_value = self._encode_prefix(prefix, prefix_attention_mask)
            if hidden_states is None:
                return None, prefix, prefix_key, prefix_value
            repeats = hidden_states.shape[0] // prefix_key.shape[0]
            prefix_key, prefix_value = (
                states.repeat_interleave(repeats, dim=0) for states in (prefix_key, prefix_value)
            )
        normed = self.layernorm_before(hidden_states)
        keys_and_values = self._keys_and_values(normed, (prefix_key, prefix_value), null_prefix)
        attended, _ = self.attention(normed, keys_and_values, attention_mask, **kwargs)
        return self._add(hidden_states, attended), prefix, prefix_key, prefix_value

    def _keys_and_values(self, normed: Tensor, prefix: KeyValue, null_prefix: KeyValue | None) -> list[KeyValue]:
        """Those of its prefix and of the tokens themselves, for each group of rows that has a prefix of one length."""
        prefixes = [prefix]
        if null_prefix is not None:
            null_prefix = tuple(states.expand(len(prefix[0]), -1, -1, -1) for states in null_prefix)
            if null_prefix[0].shape == prefix[0].shape:
                prefixes = [tuple(torch.cat(pair) for pair in zip(prefix, null_prefix))]
            else:
                prefixes.append(null_prefix)
        own = zip(*(in_groups(states, len(prefixes)) for states in self.attention.key_value(normed)))
        return [tuple(torch.cat(pair, dim=2) for pair in zip(*group)) for group in zip(prefixes, own)]

    def _encode_prefix(self, prefix: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The prefix, which attends to itself alone, after this layer, and its keys and values in it."""
        normed = self.layernorm_before(prefix)
        key, value = self.attention.key_value(normed)
        if not self.is_last:  # nothing reads the prefix after the last layer
            # `forward`, and not a call: recorded attention weights are those of the noisy tokens
            attended, _ = self.attention.forward(normed, [(key, value)], attention_mask)
            prefix = self._add(prefix, attended)
        return prefix, key, value

    def _add(self, hidden_states: Tensor, attended: Tensor) -> Tensor:
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.layernorm_after(hidden_states)))


class TDDTokenEmbedding(nn.Embedding):
    r"""
    The matrix W that reads noisy one-hot vectors. Its `forward` is the only reader of its weight: FSDP2 and offloading
    bring a module's weights for its `forward` alone.
    """

    def __init__(self, num_categories: int, width: int):
        super().__init__(num_categories, width)
        self._kept_factor: tuple[Tensor, Tensor] | None = None  # with a checksum of the weights that it belongs to

    def forward(self, tokens: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        r"""
        Args:
            tokens (`torch.Tensor`, *optional*):
                int64 of shape `(rows, N)`, or probabilities of shape `(rows, N, K)`.
            noise (`torch.Tensor` of shape `(..., K)` or `(..., d)`, *optional*):
                In place of tokens: standard normal noise. With width d it stands for noise of width K of the same
                distribution after W, see [`~diffusion_tdd.noise_factor`].

        Returns:
            `torch.Tensor`: `y_0 W` or `epsilon W`, of width d.
        """
        if noise is not None:
            factor = self.weight if noise.shape[-1] == self.num_embeddings else self._noise_factor()
            return noise.to(factor.dtype) @ factor
        if tokens.is_floating_point():
            return tokens.to(self.weight.dtype) @ self.weight
        return super().forward(tokens)

    def _noise_factor(self) -> Tensor:
        """The factor, of O(K d^2) operations. Without gradients it is kept, for as long as the weights are the same:
        their checksum, of O(K d) operations, sees changes that `Tensor._version` does not."""
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and self.weight.requires_grad):
            return noise_factor(self.weight)
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(self.embedding_dim, generator=generator).to(self.weight)
        with torch.autocast(self.weight.device.type, enabled=False):  # which would round small changes away
            checksum = self.weight @ probe
        kept = self._kept_factor
        if kept is None or kept[0].device != checksum.device or not torch.equal(kept[0], checksum):
            self._kept_factor = kept = (checksum, noise_factor(self.weight))
        return kept[1]


class TDDTimestepEmbedding(nn.Module):
    """Sinusoids of the timestep through a small network, as in DiT. `timesteps` (...) -> (..., hidden_size).

    `dtype` is the network's; its weights do not say, where they are quantised.
    """

    frequency_size = 256
    max_period = 10_000

    def __init__(self, config: TDDConfig):
        super().__init__()
        # The sinusoids span the same range whatever T, so that a model's T does not change its features.
        self.scale = 1000 / config.num_timesteps
        self.mlp = TDDMLP(self.frequency_size, config.hidden_size, config.hidden_size, "silu")

    def forward(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        half = self.frequency_size // 2
        exponent = torch.arange(half, device=timesteps.device, dtype=torch.float32) / half
        angles = self.scale * timesteps[..., None].float() * torch.exp(-math.log(self.max_period) * exponent)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(sinusoids.to(dtype))


class DenoiserCache(NamedTuple):
    r"""
    What the steps of a loop share, computed once and read in all of them.

    Args:
        key_values (`tuple`): Keys and values of the prefix, a pair for each layer, each of shape
            `(rows, num_attention_heads, prefix_length, head_dim)`.
        null_key_values (`tuple`, *optional*):
            The same of the null condition, of one token. With it the denoiser has two results for each noisy token:
            first all under the images' condition, then all under none.
        time_embeds (`torch.Tensor` of shape `(T + 1, d)`, *optional*): Those of the loop's timesteps, zero elsewhere.
        noise_embeds (`torch.Tensor` of shape `(..., d)`, *optional*): The loop's noise times W.
    """

    key_values: tuple[KeyValue, ...]
    null_key_values: tuple[KeyValue, ...] | None = None
    time_embeds: Tensor | None = None
    noise_embeds: Tensor | None = None

    def repeat(self, repeats: int) -> "DenoiserCache":
        """Each row `repeats` times in succession."""
        if repeats == 1:
            return self
        repeated = tree_map(lambda states: states.repeat_interleave(repeats, dim=0), self.key_values)
        return self._replace(key_values=repeated)

    def select(self, keep: Tensor) -> "DenoiserCache":
        """The rows of a boolean mask, or of indices."""
        return self._replace(key_values=select_rows(self.key_values, keep))


@dataclass
class TDDDenoiserOutput(BaseModelOutput):
    r"""
    Output of [`TDDDenoiser`]: as `BaseModelOutput`, and with `use_cache=True` its `cache`, a [`DenoiserCache`].
    """

    cache: DenoiserCache | None = None


class TDDDenoiser(PreTrainedModel):
    r"""
    Predicts clean tokens from noisy ones, timesteps and an image's prefix: f(y_t, t, c) of Section 3.2, without its
    head.

    Only `forward` reads the weights, the token embedding and the null prefix included. So the denoiser can be sharded
    (FSDP2), offloaded and compiled, and nothing that is derived from the weights outlives a loop.
    """

    config: TDDConfig
    config_class = TDDConfig
    base_model_prefix = "denoiser"
    main_input_name = "tokens"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _input_embed_layer = "token_embedding"
    _can_record_outputs = {"hidden_states": TDDLayer, "attentions": TDDAttention}

    def __init__(self, config: TDDConfig):
        super().__init__(config)
        width = config.hidden_size
        self.token_embedding = TDDTokenEmbedding(config.num_categories, width)
        self.input_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.position_embeddings = nn.Parameter(torch.zeros(config.max_position_embeddings, width))
        self.time_embedding = TDDTimestepEmbedding(config)
        self.null_prefix = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_embedding = nn.Parameter(torch.zeros(width)) if config.corruption == "mask" else None
        self.layers = nn.ModuleList(
            [TDDLayer(config, index == config.num_hidden_layers - 1) for index in range(config.num_hidden_layers)]
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        # What stays on one device (`device_map`), and what FSDP2 shards as one unit. An embedding is a unit by itself,
        # and a tied one is a unit with the head, which no other unit may hold.
        self._no_split_modules = ["TDDLayer"] if config.tie_word_embeddings else ["TDDTokenEmbedding", "TDDDenoiser"]
        # No buffers: the schedule must stay float32 in a half-precision model
        self.reset_schedule()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            for parameter in (self.position_embeddings, self.null_prefix, self.mask_embedding):
                if parameter is not None:
                    init.normal_(parameter, std=self.config.initializer_range)

    def reset_schedule(self) -> None:
        """Makes the schedule anew from the configuration, for a vocabulary of another size."""
        self._schedule = NoiseSchedule.from_config(self.config)

    def schedule_on(self, device: torch.device) -> NoiseSchedule:
        """The noise schedule on a device. It stays where it was asked for last: one copy serves all steps."""
        schedule = self._schedule.to(device)
        if schedule is not self._schedule and not torch.compiler.is_compiling():
            self._schedule = schedule
        return schedule

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        tokens: Tensor | None = None,
        timesteps: Tensor | None = None,
        noise: Tensor | None = None,
        prefix: Tensor | None = None,
        drop_condition: Tensor | None = None,
        cache: DenoiserCache | None = None,
        use_cache: bool | None = None,
        noise_embeds: Tensor | None = None,
        add_null_condition: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TDDDenoiserOutput:
        r"""
        Args:
            tokens (`torch.Tensor`, *optional*):
                Tokens to add noise to, int64 of shape `(rows, num_tokens)` with K for a mask, or probabilities of
                shape `(rows, num_tokens, K)`. Several successive rows may belong to one image. Without tokens the
                cache of a loop is returned, and nothing is denoised.
            timesteps (`torch.LongTensor` of shape `(rows, num_tokens)`):
                The timestep of each token, 1 ... T. Without tokens: the timesteps of the loop, of shape `(any,)`.
            noise (`torch.Tensor` of shape `(rows, num_tokens, min(K, d))` or `(rows, num_tokens, K)`, *optional*):
                Standard normal noise. Both widths give the same distribution, see [`~diffusion_tdd.noise_factor`]; K
                numbers are those of the one-hot vector. Not for masks. Without tokens: all that the loop needs.
            prefix (`torch.Tensor` of shape `(batch_size, prefix_length, hidden_size)`, *optional*):
                The images' connected features, each for `rows / batch_size` rows. `None`, without `cache`, stands for
                the null condition.
            drop_condition (`torch.BoolTensor` of shape `(batch_size,)`, *optional*):
                Images whose prefix gives way to the null condition (appendix A.3).
            cache ([`DenoiserCache`], *optional*):
                In place of `prefix`: that of an earlier call with the same images.
            use_cache (`bool`, *optional*):
                Whether to return the keys and values of the prefix as a cache.
            noise_embeds (`torch.Tensor` of shape `(rows, num_tokens, d)`, *optional*):
                In place of `noise`: that of the cache.
            add_null_condition (`bool`, *optional*, defaults to `False`):
                Without tokens: whether the cache has the null condition too.
        """
        if tokens is None:
            return TDDDenoiserOutput(cache=self._prepare(prefix, timesteps, noise, add_null_condition))
        # 1. The prefix: from the cache, or the images', of which some may be dropped, or that of no image
        prefix_mask = prefix_attention_mask = attention_mask = None
        if cache is None:
            prefix, prefix_mask = self._drop_condition(prefix, drop_condition)
            if prefix_mask is not None:
                prefix_attention_mask = create_bidirectional_mask(
                    self.config, prefix, prefix_mask, allow_is_bidirectional_skip=False
                )
            cache = DenoiserCache(((None, None),) * len(self.layers))
        # 2. The noisy tokens, with their places and times
        noise_embeds = self.token_embedding(noise=noise) if noise is not None else noise_embeds
        hidden_states = self._embed(tokens, timesteps, noise_embeds)
        hidden_states = hidden_states + self.position_embeddings[: tokens.shape[1]]
        hidden_states = hidden_states + self._embed_times(timesteps, hidden_states.dtype, cache)
        null_key_values = cache.null_key_values
        if null_key_values is not None:
            hidden_states = hidden_states.repeat(2, 1, 1)
        # 3. They attend to the prefix and to each other; the prefix attends to itself
        if prefix_mask is not None:
            prefix_mask = prefix_mask.repeat_interleave(tokens.shape[0] // prefix.shape[0], dim=0)
            key_mask = torch.cat([prefix_mask, prefix_mask.new_ones(hidden_states.shape[:2])], dim=1)
            keys = hidden_states.new_empty(*key_mask.shape, 0)  # only its shape is read
            # Whether anything is masked is not asked: the host would wait for the answer
            attention_mask = create_bidirectional_mask(
                self.config, hidden_states, key_mask, keys, allow_is_bidirectional_skip=False
            )
        key_values = []
        for index, (layer, (key, value)) in enumerate(zip(self.layers, cache.key_values)):
            null_prefix = None if null_key_values is None else null_key_values[index]
            hidden_states, prefix, key, value = layer(
                hidden_states, prefix, key, value, attention_mask, prefix_attention_mask, null_prefix, **kwargs
            )
            key_values.append((key, value))
        return TDDDenoiserOutput(
            last_hidden_state=self.norm(hidden_states),
            cache=DenoiserCache(tuple(key_values)) if use_cache else None,
        )

    def _prepare(
        self, prefix: Tensor | None, timesteps: Tensor, noise: Tensor | None, add_null_condition: bool
    ) -> DenoiserCache:
        """What the steps of a loop share."""
        prefix = self.null_prefix if prefix is None else prefix
        time_embeds = self.time_embedding(timesteps, prefix.dtype)
        all_time_embeds = time_embeds.new_zeros(self.config.num_timesteps + 1, time_embeds.shape[-1])
        if add_null_condition and prefix.shape[1] == 1:  # as long as the null prefix: one reading of the weights
            both = self._encode_prefix(torch.cat([prefix, self.null_prefix]))
            key_values = tree_map(lambda states: states[:-1], both)
            null_key_values = tree_map(lambda states: states[-1:], both)
        else:
            key_values = self._encode_prefix(prefix)
            null_key_values = self._encode_prefix(self.null_prefix) if add_null_condition else None
        return DenoiserCache(
            key_values=key_values,
            null_key_values=null_key_values,
            time_embeds=all_time_embeds.index_copy(0, timesteps, time_embeds),
            noise_embeds=None if noise is None else self.token_embedding(noise=noise),
        )

    def _encode_prefix(self, prefix: Tensor) -> tuple[KeyValue, ...]:
        """The keys and values of a prefix in each layer."""
        key_values = []
        for layer in self.layers:
            _, prefix, key, value = layer(None, prefix)
            key_values.append((key, value))
        return tuple(key_values)

    def _embed_times(self, timesteps: Tensor, dtype: torch.dtype, cache: DenoiserCache) -> Tensor:
        if cache.time_embeds is None:
            return self.time_embedding(timesteps, dtype)
        return cache.time_embeds[timesteps]

    def _drop_condition(self, prefix: Tensor | None, drop_condition: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The prefix, of some images the null condition, and a mask of shape (batch_size, prefix_length) of what may
        be seen: the null condition is one token, so of a dropped prefix the first token alone. For a prefix of one
        token, and without `drop_condition`, the mask is `None`."""
        if prefix is None:
            return self.null_prefix, None
        if drop_condition is None:
            return prefix, None
        prefix = torch.where(drop_condition[:, None, None], self.null_prefix.to(prefix.dtype), prefix)
        if prefix.shape[1] == 1:
            return prefix, None
        is_first = torch.arange(prefix.shape[1], device=prefix.device) == 0
        return prefix, (~drop_condition[:, None] | is_first).long()

    def _embed(self, tokens: Tensor, timesteps: Tensor, noise_embeds: Tensor | None) -> Tensor:
        """`y_t W`, normalised and scaled as configured, of shape (rows, N, d)."""
        config = self.config
        if config.corruption == "mask":
            is_mask = (tokens == config.num_categories)[..., None]
            embeds = self.token_embedding(tokens.clamp(max=config.num_categories - 1))
            return self.input_norm(torch.where(is_mask, self.mask_embedding, embeds))
        if config.corruption == "uniform":
            return self.input_norm(self.token_embedding(tokens))
        schedule = self.schedule_on(tokens.device)
        clean = self.token_embedding(tokens)
        embeds = self.input_norm(add_noise(clean, noise_embeds, schedule, timesteps).to(clean.dtype))
        if config.input_weighting == "visibility":
            # Without it pure noise is as large as a token, and drowns position and condition (decision 11)
            embeds = embeds * schedule.visibility[timesteps][..., None].to(embeds.dtype)
        return embeds


__all__ = ["DenoiserCache", "TDDDenoiser", "TDDDenoiserOutput", "TDDTokenEmbedding"]
