# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""In-Situ Tweedie Discrete Diffusion (TDD) for Transformers."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
)

from .configuration_tdd import TDDConfig
from .generation_tdd import TDDGenerationConfig
from .modeling_tdd import TDDForCaptioning, TDDForImageClassification, TDDModel, TDDPreTrainedModel


__version__ = "0.1.0"

AutoConfig.register("tdd", TDDConfig)
AutoModel.register(TDDConfig, TDDModel)
AutoModelForImageClassification.register(TDDConfig, TDDForImageClassification)
AutoModelForImageTextToText.register(TDDConfig, TDDForCaptioning)

__all__ = [
    "TDDConfig",
    "TDDForCaptioning",
    "TDDForImageClassification",
    "TDDGenerationConfig",
    "TDDModel",
    "TDDPreTrainedModel",
]
