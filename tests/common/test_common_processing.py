# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Transformers' ProcessorTesterMixin on the captioner's processor. Its image processor is Transformers' own."""

import unittest
from unittest import mock

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ViTImageProcessor
from transformers_source import require_source

from modeling_tdd import TDDProcessor


require_source()

from tests.test_processing_common import ProcessorTesterMixin  # noqa: E402


WORDS = ["[PAD]", "[UNK]", "[EOS]", "[MASK]", "lower", "newer", "upper", "older", "longer", "string"]


class TDDProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = TDDProcessor

    @classmethod
    def setUpClass(cls) -> None:
        # Within Transformers no code, and so no `auto_map`, is saved with a processor
        cls.enterClassContext(mock.patch.object(TDDProcessor, "_auto_class", None))
        super().setUpClass()

    @unittest.skip("A caption is of one image: a text without one is refused (tests/test_processing.py)")
    def test_processor_text_has_no_visual(self) -> None:
        """Texts of a chat model, some of which have no image."""

    @classmethod
    def _setup_image_processor(cls) -> ViTImageProcessor:
        return ViTImageProcessor(size={"height": 16, "width": 16})

    @classmethod
    def _setup_tokenizer(cls) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="[PAD]",
            unk_token="[UNK]",
            eos_token="[EOS]",
            mask_token="[MASK]",
            model_max_length=8,
        )
