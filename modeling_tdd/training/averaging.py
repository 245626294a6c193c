# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""AdamW that also keeps the moving average of the weights."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class AveragedAdamW(torch.optim.AdamW):
    r"""
    AdamW whose state holds the moving average of the weights (the paper's appendix A.3).

    So whatever saves, loads, shards (FSDP2) or skips the optimiser does the same with the average. `eval()` exchanges
    it with the model's weights, and `train()` exchanges them back: `Trainer` and Accelerate call both, as they do for
    schedule-free optimisers.

    Args:
        params (`Iterable`): Parameters or parameter groups, in float32.
        average_decay (`float`): Decay of the average, in [0, 1).
        average_warmup (`bool`): Whether the decay after n steps is at most `1 - n ** (-2 / 3)`, so that the average
            follows a short run too (ours, as in timm). `False` keeps it constant, as in the paper (equation 2).
        kwargs: Arguments of `torch.optim.AdamW`.

    Raises:
        `ValueError`: for a decay out of [0, 1), or for weights in half precision, which would round small steps away.
    """

    def __init__(
        self, params: Iterable[Any], average_decay: float = 0.9999, average_warmup: bool = True, **kwargs: Any
    ):
        if not 0 <= average_decay < 1:
            raise ValueError(f"`average_decay` must be in [0, 1), got {average_decay!r}.")
        super().__init__(params, **kwargs)
        half = {str(p.dtype) for group in self.param_groups for p in group["params"] if p.dtype.itemsize < 4}
        if half:
            raise ValueError(
                f"The weights must be float32 to be averaged, got {', '.join(sorted(half))}. Load the model with "
                "`dtype=torch.float32` and train with `bf16=True`."
            )
        self.average_decay, self.average_warmup = average_decay, average_warmup
        for group in self.param_groups:
            group["steps"], group["holds_average"] = 0, False

    def decay_at(self, step: int) -> float:
        """The decay of the average at a step, counted from 1."""
        return min(self.average_decay, 1 - step ** (-2 / 3)) if self.average_warmup else self.average_decay

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Updates the weights that have a gradient, and then their average. Without any gradient nothing changes."""
        self.train()
        trained = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        # The average starts at the weights before the first step. AdamW wants to fill an empty state itself.
        initial = {
            p: p.clone() for weights in trained for p in weights if "other_weights" not in self.state.get(p, {})
        }
        loss = super().step(closure)
        for p, weights in initial.items():
            self.state[p]["other_weights"] = weights
        for group, weights in zip(self.param_groups, trained):
            if weights:
                group["steps"] += 1
                update = get_ema_multi_avg_fn(self.decay_at(group["steps"]))
                update([self.state[p]["other_weights"] for p in weights], weights, None)
        return loss

    @torch.no_grad()
    def train(self, mode: bool = True) -> None:
        """Gives the model the weights that train or, with `mode=False`, the average, to be evaluated or saved."""
        for group in self.param_groups:
            if group["holds_average"] == mode:
                group["holds_average"] = not mode
                for p in group["params"]:
                    # The average while the model trains, and the weights that train while it holds the average
                    other = self.state.get(p, {}).get("other_weights")
                    if other is not None:
                        kept = p.clone()
                        p.copy_(other)
                        other.copy_(kept)

    def eval(self) -> None:
        self.train(False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises a `ValueError` for the state of an optimiser without an average."""
        if not all("holds_average" in group for group in state_dict["param_groups"]):
            raise ValueError("The state holds no average of the weights, as with `ema_decay=0`. Resume with that.")
        super().load_state_dict(state_dict)
