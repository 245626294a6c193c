# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Transformers' ModelTesterMixin and ConfigTester on all three models."""

import tempfile
import unittest
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers_source import require_source

from modeling_tdd import TDDConfig, TDDForCaptioning, TDDForImageClassification, TDDModel


require_source()

from tests.test_configuration_common import ConfigTester  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor  # noqa: E402


class TDDModelTester:
    """Sizes, configuration and inputs, by the names that the common tests read."""

    batch_size = 3
    is_training = True
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    image_size = 16
    patch_size = 4
    num_channels = 3
    num_labels = 5
    num_timesteps = 20
    timesteps_per_image = 2
    with_tokens = False

    def __init__(self, parent: unittest.TestCase, seq_length: int, prefix_length: int, **fields: Any):
        self.parent = parent
        self.seq_length = seq_length
        self.key_length = prefix_length + seq_length
        self.fields = fields

    def get_config(self) -> TDDConfig:
        return TDDConfig(
            vision_config={
                "model_type": "vit",
                "image_size": self.image_size,
                "patch_size": self.patch_size,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 37,
            },
            num_labels=self.num_labels,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            num_timesteps=self.num_timesteps,
            timesteps_per_image=self.timesteps_per_image,
            condition_dropout=0.0,
            max_position_embeddings=self.seq_length,
            **self.fields,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[TDDConfig, dict[str, Tensor]]:
        pixel_values = floats_tensor([self.batch_size, self.num_channels, self.image_size, self.image_size])
        inputs = {"pixel_values": pixel_values}
        if self.with_tokens:
            inputs["input_ids"] = ids_tensor([self.batch_size, self.seq_length], self.fields["vocab_size"])
        return self.get_config(), inputs

    def prepare_training_inputs(self) -> dict[str, Tensor]:
        """Labels, and the timesteps and noise of a training step: the same at each call."""
        generator = torch.Generator().manual_seed(0)
        config = self.get_config()
        label_shape = (self.batch_size, self.seq_length) if "vocab_size" in self.fields else (self.batch_size,)
        steps_shape = (self.batch_size, self.timesteps_per_image)
        noise_shape = (*steps_shape, self.seq_length, config.noise_width)
        return {
            "labels": torch.randint(config.num_categories, label_shape, generator=generator),
            "timesteps": torch.randint(1, self.num_timesteps + 1, steps_shape, generator=generator),
            "noise": torch.randn(noise_shape, generator=generator),
        }


class CommonTests(ModelTesterMixin):
    """What both pairs of classes share."""

    # A checkpoint of ours is a vision tower and a denoiser, whose configurations are nested
    _is_composite = True

    def _prepare_for_class(
        self, inputs_dict: dict[str, Tensor], model_class: type, return_labels: bool = False
    ) -> dict[str, Tensor]:
        """With labels come timesteps and noise, for the common tests compare one call with another."""
        inputs = super()._prepare_for_class(inputs_dict, model_class)
        inputs.pop("noise", None)  # some tests know an argument of this name from masked autoencoders
        if "input_ids" in inputs:  # tokens of a test that resizes the vocabulary: those of a caption are its labels
            input_ids = inputs.pop("input_ids")
            return inputs if model_class is TDDModel else {**inputs, "labels": input_ids}
        if return_labels and model_class is not TDDModel:
            inputs.update(self.model_tester.prepare_training_inputs())
        return inputs

    @unittest.skip("The denoiser adds the noise to tokens itself: there are no `inputs_embeds`")
    def test_inputs_embeds(self) -> None:
        """See tests/test_modeling.py and tests/test_captioning.py."""

    @unittest.skip("The denoiser adds the noise to tokens itself: there are no `inputs_embeds`")
    def test_inputs_embeds_matches_input_ids(self) -> None:
        """See tests/test_modeling.py and tests/test_captioning.py."""

    def test_reverse_loading_mapping(self) -> None:
        """An encoder keeps the names that it has in the model, or Trainer's resume would skip it."""
        super().test_reverse_loading_mapping(check_keys_were_modified=False)

    def test_config(self) -> None:
        ConfigTester(self, config_class=TDDConfig, has_text_modality=False, **self.config_inputs).run_common_tests()


class TDDClassifierTest(CommonTests, unittest.TestCase):
    all_model_classes = (TDDModel, TDDForImageClassification)
    config_inputs = {"hidden_size": 36}
    # The tokens are the labels; `resize_token_embeddings` refuses, and says what to do (tests/test_contracts.py)
    test_resize_embeddings = False

    def setUp(self) -> None:
        self.model_tester = TDDModelTester(self, seq_length=1, prefix_length=1)

    def test_model_outputs_equivalence(self) -> None:
        """In eval mode a classifier refuses the timesteps and noise of a training step."""
        labels = self.model_tester.prepare_training_inputs()["labels"]
        with mock.patch.object(self.model_tester, "prepare_training_inputs", lambda: {"labels": labels}):
            super().test_model_outputs_equivalence()

    def test_problem_types(self) -> None:
        """One label an image is what diffuses; the common test trains regression and several labels too."""
        config, inputs_dict = self.model_tester.prepare_config_and_inputs_for_common()
        config.problem_type = "single_label_classification"
        model = TDDForImageClassification(config).train()
        loss = model(**self._prepare_for_class(inputs_dict, type(model), return_labels=True)).loss
        loss.backward()
        self.assertTrue(loss.isfinite() and model.classifier.weight.grad.abs().sum() > 0)
        for problem_type in ("multi_label_classification", "regression"):
            with self.assertRaisesRegex(ValueError, "`problem_type` must be one of"):
                TDDConfig(problem_type=problem_type)

    def test_can_load_ignoring_mismatched_shapes(self) -> None:
        """The common test knows of one matrix a label; here the noisy labels' embedding is another."""
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        model = TDDForImageClassification(config)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            with self.assertRaises(RuntimeError):
                TDDForImageClassification.from_pretrained(folder, num_labels=42)
            loaded, info = TDDForImageClassification.from_pretrained(
                folder, num_labels=42, ignore_mismatched_sizes=True, output_loading_info=True
            )
        of_labels = {"classifier.weight", "classifier.bias", "model.denoiser.token_embedding.weight"}
        self.assertEqual({name for name, *_ in info["mismatched_keys"]}, of_labels)
        for name, parameter in loaded.named_parameters():
            if name in of_labels:
                self.assertEqual(len(parameter), 42)
            else:
                torch.testing.assert_close(parameter, model.get_parameter(name), rtol=0, atol=0)


class TDDCaptionerTest(CommonTests, unittest.TestCase):
    all_model_classes = (TDDModel, TDDForCaptioning)
    config_inputs = {"hidden_size": 36, "vocab_size": 99, "pad_token_id": 0, "eos_token_id": 2}
    # Captions are denoised by a `generate` of their own, which GenerationTesterMixin does not know
    # (tests/test_generation.py)
    all_generative_model_classes = ()

    def setUp(self) -> None:
        self.model_tester = TDDModelTester(
            self, seq_length=7, prefix_length=17, vocab_size=99, pooling=None, pad_token_id=0, eos_token_id=2
        )

    @unittest.skip("Tokens are denoised together, and no label is shifted")
    def test_causal_lm_loss_honors_shift_labels(self) -> None:
        """See the loss's tests in tests/test_captioning.py."""

    def test_resize_tokens_embeddings(self) -> None:
        self.model_tester.with_tokens = True
        super().test_resize_tokens_embeddings()

    def test_resize_embeddings_untied(self) -> None:
        self.model_tester.with_tokens = True
        super().test_resize_embeddings_untied()
