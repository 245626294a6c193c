# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The denoising loop of Section 3.2: predict, guide, choose, re-noise. Tensors only; the network is a function.

The notation is that of `diffusion_tdd.py`, and rows are those of `samplers_tdd.py`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .samplers_tdd import KnownTokens, NoisyTokens, Prediction, Sampler, inference_timesteps


def select_rows(values: tuple, keep: Tensor) -> tuple:
    """The rows of a boolean mask, of each tensor in a tuple or in tuples within it; `None` stays."""
    return tree_map(lambda tensor: None if tensor is None else tensor[keep], values)


def clone_all(values: tuple) -> tuple:
    """Copies of each tensor in a tuple or in tuples within it; `None` stays."""
    return tree_map(lambda tensor: None if tensor is None else tensor.clone(), values)


# ---- What a loop draws and passes on


class DenoisingStep(NamedTuple):
    """One step of a loop: its timestep, the indices of the rows that it denoised, their logits of shape (rows, N, K)
    after guidance and processing (`None` where nothing needs those of all places), and what they predict."""

    timestep: int
    rows: Tensor
    logits: Tensor | None
    prediction: Prediction


class RandomNumbers:
    r"""
    The random numbers of a loop's rows, which depend neither on the other rows nor on the global random state.

    Args:
        generators (`Sequence[torch.Generator]`):
            One for all images, which then all have the same numbers, or one for each image.
        num_images, num_samples (`int`): There are `num_samples` rows for each image, in succession.
        num_tokens (`int`): N.
        width (`int`, *optional*): The width of the noise; `None` for masks, which need none.
        device (`torch.device`): Where the numbers are needed. A generator on the CPU serves any device.
    """

    def __init__(
        self,
        generators: Sequence[torch.Generator],
        num_images: int,
        num_samples: int,
        num_tokens: int,
        width: int | None,
        device: torch.device,
    ):
        self.generators, self.device = generators, device
        self.shape, self.width = (num_samples, num_tokens), width
        self.rows = torch.arange(num_images * num_samples, device=device) % (len(generators) * num_samples)

    def draw(self, num_steps: int, is_multinomial: bool = False) -> tuple[Tensor | None, Tensor | None]:
        r"""
        Draws the numbers of all steps at once, so that a loop waits for them once. `rows` says which of the
        `len(generators) * num_samples` distinct rows are a row's own.

        Returns:
            `tuple`: standard normal numbers of shape `(num_steps, distinct rows, N, width)`, and with
                `is_multinomial` numbers in [0, 1) of shape `(num_steps, distinct rows, N)`; otherwise `None`.
        """
        normal, uniform = [], []
        for _ in range(num_steps):
            for generator in self.generators:
                if self.width is not None:
                    shape = (*self.shape, self.width)
                    normal.append(torch.randn(shape, generator=generator, device=generator.device))
            for generator in self.generators:
                if is_multinomial:
                    uniform.append(torch.rand(self.shape, generator=generator, device=generator.device))
        return tuple(
            torch.cat(drawn).to(self.device).unflatten(0, (num_steps, -1)) if drawn else None
            for drawn in (normal, uniform)
        )

    def of_rows(self, numbers: Tensor | None, step: int) -> Tensor | None:
        """Each row's numbers in a step, from those of the distinct rows in all steps."""
        return None if numbers is None else numbers[step][self.rows]

    def select(self, keep: Tensor) -> None:
        """From now on only the rows of a boolean mask are denoised."""
        self.rows = self.rows[keep]


# ---- Guidance and choice


def guidance_scales(guidance_schedule: str, guidance_scale: float, num_inference_steps: int) -> list[float]:
    r"""
    s(t) of Algorithm 1 for each step of a loop.

    Args:
        guidance_schedule (`str`):
            `"constant"`, or a `"linear"` or `"cosine"` rise from 1 at the first step to `guidance_scale` at the last.
        guidance_scale (`float`):
            The scale of the last step, at least 1. A loop of one step has this one alone.
        num_inference_steps (`int`):
            Number of steps.
    """
    shares = [step / (num_inference_steps - 1) for step in range(num_inference_steps - 1)] + [1.0]
    if guidance_schedule == "cosine":
        shares = [0.5 * (1 - math.cos(math.pi * share)) for share in shares]
    elif guidance_schedule == "constant":
        shares = [1.0] * num_inference_steps
    return [1 + (guidance_scale - 1) * share for share in shares]


def apply_guidance(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance, equation 1: `uncond + scale * (cond - uncond)`."""
    return unconditional + scale * (conditional - unconditional)


def to_one(logits: Tensor, uniform: Tensor | None = None) -> Tensor:
    r"""
    The "to one" operation of appendix A.2: from logits over K categories to one token.

    Args:
        logits (`torch.Tensor` of shape `(..., K)`):
            Unnormalised log-probabilities.
        uniform (`torch.Tensor` of shape `(...)`, *optional*):
            By default the argmax is taken. With one number in [0, 1) for each token, a draw from the softmax, by the
            inverse of the cumulative distribution: a row's draw depends on its own numbers alone.

    Returns:
        `torch.Tensor`: int64 tokens of shape `(...)`.
    """
    if uniform is None:
        return logits.argmax(-1)
    cumulative = logits.float().softmax(-1).cumsum(-1)
    # Scaled by the last entry, so that rounding never leaves a draw beyond the last category.
    return (cumulative <= uniform[..., None] * cumulative[..., -1:]).sum(-1).clamp(max=logits.shape[-1] - 1)


class TokenChoice(NamedTuple):
    """From the logits of a step to its tokens: [`to_one`], except where the state's tokens are final."""

    state: NoisyTokens
    uniform: Tensor | None

    def __call__(self, logits: Tensor, place: int | None = None) -> Tensor:
        """Tokens of shape (rows,) of one place from logits (rows, K), or of all, (rows, N) from (rows, N, K)."""
        given: Any = (self.state.is_final, self.state.tokens, self.uniform)
        if place is not None:
            given = (None if values is None else values[:, place] for values in given)
        is_final, tokens, uniform = given
        return torch.where(is_final, tokens, to_one(logits, uniform))


def log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of tokens of shape (...) by logits of shape (..., K), without those of all K."""
    return logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)


# ---- The loop


class Network(Protocol):
    """What the loop asks of a network."""

    def prepare(self, rows: int, timesteps: Tensor, noise: Tensor | None, is_guided: bool) -> Tensor | None:
        """Computes what all steps share: of `rows` rows, whose tokens have some of the `timesteps`, with `noise` of
        shape (steps, distinct rows, N, width). Returns the noise in the form in which the states carry it."""

    def __call__(self, state: NoisyTokens, guidance_scale: Tensor | None, places: Tensor | None = None) -> Tensor:
        """Logits of the clean tokens, float32 of shape (rows, N, K), or (chosen places, K) with a boolean mask of
        places. With a guidance scale, of shape (), they are guided (equation 1)."""

    def select(self, keep: Tensor) -> None:
        """From now on only the rows of a boolean mask are denoised."""


class StepInputs(NamedTuple):
    r"""
    What a step needs besides the state. It is made for all steps before the first one, so that on a GPU no step waits
    for the host, and each step has the same shapes.

    Args:
        guidance_scale (`torch.Tensor` of shape `()`, *optional*): s(t); `None` without guidance.
        next_timestep (`torch.LongTensor` of shape `()`): The timestep to re-noise to.
        next_noise (`torch.Tensor` of shape `(rows, N, width)`, *optional*): The noise to do it with.
        uniform (`torch.Tensor` of shape `(rows, N)`, *optional*): Numbers in [0, 1), for draws of tokens.
    """

    guidance_scale: Tensor | None
    next_timestep: Tensor
    next_noise: Tensor | None
    uniform: Tensor | None


def denoising_step(
    network: Network,
    sampler: Sampler,
    state: NoisyTokens,
    inputs: StepInputs,
    process_logits: Callable[[Tensor, TokenChoice], Tensor] | None = None,
    is_partial: bool = False,
) -> tuple[Tensor, Prediction, NoisyTokens]:
    r"""
    One step of [`denoise`] (2a, 2b, 2c and 2e): tensors in, tensors out, so that it compiles to one graph.

    Args:
        network, sampler: As in [`denoise`].
        state ([`NoisyTokens`]): The noisy tokens.
        inputs ([`StepInputs`]): What the step needs besides.
        process_logits (`Callable`, *optional*): From logits and the step's [`TokenChoice`] to other logits.
        is_partial (`bool`, *optional*, defaults to `False`):
            Whether to compute no logits of final tokens, whose log-probability is then 0. How many they are is known
            only then, which a GPU would have to wait for; on a CPU most of a step's work is there.

    Returns:
        `tuple`: the logits, the prediction and the next state.
    """
    # 2a. Predict, and 2b. guide
    places = ~state.is_final if is_partial else None
    logits = network(state, inputs.guidance_scale, places)
    # 2c. Choose
    choose = TokenChoice(state, inputs.uniform)
    if process_logits is not None:
        logits = process_logits(logits, choose)
    if places is None:
        tokens = choose(logits)
        prediction = Prediction(tokens, log_probability(logits, tokens))
    else:
        chosen = to_one(logits, None if inputs.uniform is None else inputs.uniform[places])
        log_probs = torch.zeros_like(places, dtype=logits.dtype)
        log_probs = log_probs.masked_scatter(places, log_probability(logits, chosen))
        prediction = Prediction(state.tokens.masked_scatter(places, chosen), log_probs)
    # 2e. Re-noise
    return logits, prediction, sampler.step(state, prediction, inputs.next_timestep, inputs.next_noise)


DenoisingFunction = Callable[..., tuple[Tensor, Prediction, NoisyTokens]]


def compile_denoising_step(**kwargs: Any) -> DenoisingFunction:
    r"""
    [`denoising_step`] by `torch.compile`, as one graph for each batch size.

    Args:
        kwargs: Arguments of `torch.compile`. By default `mode="reduce-overhead"`, which on a GPU records CUDA graphs.
    """
    compiled = torch.compile(denoising_step, fullgraph=True, dynamic=False, **{"mode": "reduce-overhead"} | kwargs)

    def step(
        network: Network,
        sampler: Sampler,
        state: NoisyTokens,
        inputs: StepInputs,
        process_logits: Callable[[Tensor, TokenChoice], Tensor] | None = None,
        is_partial: bool = False,
    ) -> tuple[Tensor, Prediction, NoisyTokens]:
        if process_logits is not None:  # code of others
            return denoising_step(network, sampler, state, inputs, process_logits, is_partial)
        torch.compiler.cudagraph_mark_step_begin()
        logits, prediction, state = compiled(network, sampler, state, inputs)
        # The next run of a CUDA graph overwrites what this one returned. Logits are many: who keeps them copies them
        return logits, *clone_all((prediction, state))

    return step


def denoise(
    network: Network,
    sampler: Sampler,
    numbers: RandomNumbers,
    known: KnownTokens,
    guidance_scales: Sequence[float],
    sampling_strategy: str = "argmax",
    process_logits: Callable[[Tensor, Tensor, TokenChoice], Tensor] | None = None,
    stability_threshold: int | None = None,
    given_rows: Tensor | None = None,
    keep_rows: bool = False,
    all_logits: bool = True,
    step: DenoisingFunction = denoising_step,
) -> Iterator[DenoisingStep]:
    r"""
    The inference loop of Section 3.2 with the guidance of Algorithm 1, a step at a time:
    ```
    1. Prepare what all steps need, and start from pure noise
    2. For each timestep t, from T down:
        a. Predict the clean tokens from the noisy ones
        b. Guide: move away from the prediction without an image
        c. Choose one token for each place; given ones stay
        d. Rows that are finished leave the loop
        e. Re-noise the tokens, less than before
    ```
    A row is finished when its tokens have not changed for `stability_threshold` steps, when the sampler has a
    `confidence_threshold` and all its tokens are final, and after the first step if all its tokens are given.

    Args:
        network ([`Network`]): The denoiser under its conditions.
        sampler: One of the samplers above.
        numbers ([`RandomNumbers`]): The noise, and the draws of `"multinomial"`.
        known ([`KnownTokens`]): Given tokens, which stay.
        guidance_scales (`Sequence[float]`): s(t), one for each step; see [`guidance_scales`].
        sampling_strategy (`str`, *optional*, defaults to `"argmax"`): `"argmax"` or `"multinomial"`.
        process_logits (`Callable`, *optional*):
            From the indices of the rows, their logits, and the step's [`TokenChoice`], to other logits of that shape.
        stability_threshold (`int`, *optional*):
            After how many steps without a change a row is finished.
        given_rows (`torch.BoolTensor` of shape `(rows,)`, *optional*):
            The rows that have nothing to predict, if there are any.
        keep_rows (`bool`, *optional*, defaults to `False`):
            Whether finished rows are computed on, for a `process_logits` that must see all rows at each step.
        all_logits (`bool`, *optional*, defaults to `True`):
            Whether the caller reads the logits, those of final tokens too.
        step (`Callable`, *optional*, defaults to [`denoising_step`]):
            The same by [`compile_denoising_step`]. Finished rows are computed on then: a graph has static shapes.

    Yields:
        [`DenoisingStep`]: after each prediction, of the rows that were not finished.
    """
    num_steps, device = len(guidance_scales), known.tokens.device
    timesteps = inference_timesteps(sampler.num_timesteps, num_steps)
    rows = torch.arange(len(known.tokens), device=device)
    # 1. Prepare, and start. What comes from the host comes here, and no step waits for it
    is_guided = any(scale != 1 for scale in guidance_scales)
    scales = torch.tensor(guidance_scales, device=device).unbind() if is_guided else [None] * num_steps
    next_timesteps = torch.tensor(timesteps[1:], device=device).unbind()
    normal, uniform = numbers.draw(num_steps, sampling_strategy == "multinomial")
    timesteps_of_tokens = torch.tensor(sampler.timesteps_of_tokens(num_steps), device=device)
    noise = network.prepare(len(rows), timesteps_of_tokens, normal, is_guided)
    # Copies, since tensors that are the same in the first step alone would make a compiled step compile again
    state = clone_all(sampler.start(known, numbers.of_rows(noise, 0)))
    previous, unchanged, is_open = None, torch.zeros_like(rows), torch.ones_like(rows, dtype=torch.bool)
    may_end = any(x is not None for x in (stability_threshold, sampler.confidence_threshold, given_rows))
    keep_rows = keep_rows or step is not denoising_step
    is_partial = not all_logits and process_logits is None and step is denoising_step and device.type == "cpu"
    for index, timestep in enumerate(timesteps[:-1]):
        # 2a to 2c. Predict, guide and choose, and 2e. re-noise (the last step's noise is read by nobody)
        next_noise = numbers.of_rows(noise, min(index + 1, num_steps - 1))
        inputs = StepInputs(scales[index], next_timesteps[index], next_noise, numbers.of_rows(uniform, index))
        process = None if process_logits is None else partial(process_logits, rows)
        logits, prediction, state = step(network, sampler, state, inputs, process, is_partial)
        result = (rows, None if is_partial else logits, prediction)
        yield DenoisingStep(timestep, *(select_rows(result, is_open) if keep_rows and may_end else result))
        # 2d. Leave
        if not may_end:
            continue
        if index == 0 and given_rows is not None:
            is_open = is_open & ~given_rows
        if sampler.confidence_threshold is not None:
            is_open = is_open & ~state.is_final.all(1)
        if stability_threshold is not None and previous is not None:
            unchanged = torch.where((prediction.tokens == previous).all(1), unchanged + 1, 0)
            is_open = is_open & (unchanged < min(stability_threshold, num_steps))
        if not is_open.any():
            return
        previous = prediction.tokens
        if not keep_rows and not is_open.all():
            for part in (network, numbers):
                part.select(is_open)
            rows, state, previous, unchanged, is_open = select_rows(
                (rows, state, previous, unchanged, is_open), is_open
            )


__all__ = [
    "DenoisingFunction",
    "DenoisingStep",
    "Network",
    "RandomNumbers",
    "StepInputs",
    "TokenChoice",
    "apply_guidance",
    "compile_denoising_step",
    "denoise",
    "denoising_step",
    "guidance_scales",
    "log_probability",
    "select_rows",
    "to_one",
]
