# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Transformers' PipelineTesterMixin on classifier and captioner.

It loads a tiny checkpoint of each, which is written here as its own tools lay them out, and hands pipeline and images
to a class a task, whose original reads images from the network.
"""

import json
import tempfile
import unittest
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Pipeline, PreTrainedTokenizerFast, ViTImageProcessor, pipeline
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers_source import load_pipeline_mixin, require_source

from modeling_tdd import TDDConfig, TDDForCaptioning, TDDForImageClassification, TDDProcessor


require_source()

SIZES = {
    "vision_config": {
        "model_type": "vit",
        "image_size": 16,
        "patch_size": 4,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 37,
    },
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "num_timesteps": 20,
}
WORDS = ["[PAD]", "[UNK]", "[EOS]", "a", "cat", "dog", "on", "sofa", "photo", "of"]


def write_tiny_models(folder: Path) -> None:
    """The checkpoints and the summary of them that the mixin reads."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=8
    )
    # The mixin loads one for every model of a type
    processor = TDDProcessor(ViTImageProcessor(size={"height": 16, "width": 16}), fast_tokenizer)
    captions = {
        "vocab_size": len(WORDS),
        "max_position_embeddings": 8,
        "pooling": None,
        "pad_token_id": 0,
        "eos_token_id": 2,
    }
    summary = {}
    for model in (
        TDDForImageClassification(TDDConfig(num_labels=5, **SIZES)),
        TDDForCaptioning(TDDConfig(**SIZES, **captions)),
    ):
        name = type(model).__name__
        summary[name] = {"tokenizer_classes": [], "processor_classes": ["ViTImageProcessor"]}
        if name == "TDDForCaptioning":
            summary[name]["tokenizer_classes"] = ["PreTrainedTokenizerFast"]
        model.save_pretrained(folder / "tdd" / name)
        processor.save_pretrained(folder / "tdd" / name)
    (folder / "reports").mkdir()
    (folder / "reports" / "tiny_model_summary.json").write_text(json.dumps(summary))


def random_images() -> list[Image.Image]:
    """Of several sizes and modes: the pipelines convert them."""
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    return [image, image.resize((16, 16)), image.convert("L"), image.convert("RGBA")]


class ImageClassificationPipelineTests(unittest.TestCase):
    """Called by the mixin."""

    def get_test_pipeline(
        self, model: Any, *unused: Any, image_processor: Any, dtype: str, **others: Any
    ) -> tuple[Pipeline, list]:
        made = pipeline("image-classification", model=model, image_processor=image_processor, dtype=dtype, top_k=2)
        return made, random_images()

    def run_pipeline_test(self, classifier: Pipeline, examples: list[Image.Image]) -> None:
        for batch_size in (1, 3):
            for best in classifier(examples, batch_size=batch_size):
                self.assertEqual([sorted(entry) for entry in best], [["label", "score"]] * 2)
                self.assertTrue(1 >= best[0]["score"] >= best[1]["score"] > 0)


class ImageTextToTextPipelineTests(unittest.TestCase):
    """Called by the mixin."""

    def get_test_pipeline(
        self, model: Any, *unused: Any, processor: Any, dtype: str, **others: Any
    ) -> tuple[Pipeline, list]:
        made = pipeline("image-text-to-text", model=model, processor=processor, dtype=dtype, max_new_tokens=4)
        return made, [{"images": image, "text": "a photo of"} for image in random_images()]

    def run_pipeline_test(self, captioner: Pipeline, examples: list[dict[str, Any]]) -> None:
        (result,) = captioner(**examples[0])
        self.assertEqual(result["input_text"], "a photo of")
        self.assertTrue(result["generated_text"].startswith("a photo of"))


TINY_MODELS = tempfile.TemporaryDirectory()
write_tiny_models(Path(TINY_MODELS.name))
# The mixin looks classes up by their names, there
PROCESSOR_MAPPING_NAMES["tdd"] = "TDDProcessor"
transformers.TDDProcessor = TDDProcessor
PipelineTesterMixin = load_pipeline_mixin(
    Path(TINY_MODELS.name),
    image_classification=ImageClassificationPipelineTests,
    image_text_to_text=ImageTextToTextPipelineTests,
)


class TDDPipelineTest(PipelineTesterMixin, unittest.TestCase):
    """TDDModel has no task: what it returns is one pass of the denoiser, and features are the encoder's."""

    pipeline_model_mapping = {
        "image-classification": TDDForImageClassification,
        "image-text-to-text": TDDForCaptioning,
    }
