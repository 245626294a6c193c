# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Sequence-level distillation of the loop: a captioner that does in one step or a few what its teacher does in many.

The student learns the captions that the teacher's loop makes of the training images, from the noise at which its own
few steps begin. The captions of a teacher are Kim and Rush's (2016); the paper has no distillation.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..modeling_tdd import TDDForCaptioning
from ..samplers_tdd import inference_timesteps, settled_timestep
from .trainer import TDDTrainer


class DistillationTrainer(TDDTrainer):
    r"""
    [`TDDTrainer`] with the captions of a teacher in the place of the data's, and the timesteps of a short loop.

    Args:
        teacher ([`TDDForCaptioning`]): The teacher, with the tokenizer of the student.
        teacher_settings (`dict[str, Any]`): Arguments of its `generate`, such as `num_inference_steps`.
        num_inference_steps (`int`): Steps of the student's loop. Only their timesteps are trained.
        args, kwargs: As in [`TDDTrainer`].
    """

    def __init__(
        self,
        *args: Any,
        teacher: TDDForCaptioning,
        teacher_settings: dict[str, Any],
        num_inference_steps: int,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.teacher_settings = teacher_settings
        timesteps = inference_timesteps(teacher.config.num_timesteps, num_inference_steps)[:-1]
        self.timesteps = torch.tensor(timesteps, device=self.args.device)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        if model.training:
            images = {name: value for name, value in inputs.items() if name != "labels"}
            labels = self.teacher.generate(**images, **self.teacher_settings)
            inputs = {**images, "labels": labels, "timesteps": self._draw_timesteps(*labels.shape)}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _draw_timesteps(self, batch_size: int, num_tokens: int) -> Tensor:
        """Those of a random step of the student's loop. In the loop of a network with a timestep for each token, a
        share t / T of the tokens is pure noise at a step t, and the others are settled."""
        config = self.teacher.config
        shape = (batch_size, config.timesteps_per_image)
        timesteps = self.timesteps[torch.randint(len(self.timesteps), shape, device=self.timesteps.device)]
        if config.corruption != "gaussian" or config.timestep_sampling != "per_token":
            return timesteps
        chance = timesteps[..., None] / config.num_timesteps
        is_hidden = torch.rand(*shape, num_tokens, device=timesteps.device) < chance
        return torch.where(is_hidden, config.num_timesteps, settled_timestep(config.num_timesteps))


def make_student(teacher: TDDForCaptioning, num_inference_steps: int) -> TDDForCaptioning:
    """A copy of the teacher, which generates in `num_inference_steps` steps without guidance by its own generation
    configuration."""
    student = TDDForCaptioning(teacher.config)
    student.load_state_dict(teacher.state_dict())
    config = student.generation_config
    config.num_inference_steps, config.guidance_scale, config.confidence_threshold = num_inference_steps, 1.0, None
    return student


__all__ = ["DistillationTrainer", "make_student"]
