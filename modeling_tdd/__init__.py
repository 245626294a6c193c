# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""In-Situ Tweedie Discrete Diffusion (TDD) for Transformers."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_tdd import TDDConfig
from .generation_configuration_tdd import TDDGenerationConfig
from .images_tdd import open_image, to_rgb
from .modeling_tdd import TDDForCaptioning, TDDForImageClassification, TDDModel, TDDPreTrainedModel
from .pipeline_tdd import (
    TDDImageClassificationPipeline,
    TDDImageTextToTextPipeline,
    TDDImageToTextPipeline,
    prefer_for_tdd,
)
from .processing_tdd import TDDProcessor, saveable_image_processor


__version__ = "0.1.0"

AutoConfig.register("tdd", TDDConfig)
AutoModel.register(TDDConfig, TDDModel)
AutoModelForImageClassification.register(TDDConfig, TDDForImageClassification)
AutoModelForImageTextToText.register(TDDConfig, TDDForCaptioning)
# Found by its name in a captioner's processor_config.json. By configuration it would be a classifier's processor too,
# which has no tokenizer: AutoProcessor loads that one's image processor, a class of Transformers' own.
AutoProcessor.register(TDDConfig.model_type, TDDProcessor)
PIPELINE_REGISTRY.register_pipeline("image-captioning", TDDImageToTextPipeline, AutoModelForImageTextToText)
# Transformers' own tasks have our pipelines for models of TDD, and stay as they are for all others
for task, ours in {
    "image-classification": TDDImageClassificationPipeline,
    "image-text-to-text": TDDImageTextToTextPipeline,
}.items():
    PIPELINE_REGISTRY.supported_tasks[task]["impl"] = prefer_for_tdd(ours)

# A checkpoint brings the code of what it holds, for machines without this package.
TDDConfig.register_for_auto_class()
TDDModel.register_for_auto_class("AutoModel")
TDDForImageClassification.register_for_auto_class("AutoModelForImageClassification")
TDDForCaptioning.register_for_auto_class("AutoModelForImageTextToText")
TDDProcessor.register_for_auto_class()

__all__ = [
    "TDDConfig",
    "TDDForCaptioning",
    "TDDForImageClassification",
    "TDDGenerationConfig",
    "TDDImageToTextPipeline",
    "TDDModel",
    "TDDPreTrainedModel",
    "TDDProcessor",
    "open_image",
    "saveable_image_processor",
    "to_rgb",
]
