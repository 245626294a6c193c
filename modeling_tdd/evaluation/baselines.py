# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Models beside TDD and MDD: an autoregressive captioner, an encoder of words, and captions of the nearest image."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast, ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ..configuration_tdd import TDDConfig
from ..modeling_tdd import TDDConnector, TDDModel, TDDPreTrainedModel
from ..sampling_tdd import log_probability
from ..settings_tdd import check_value_range


class AutoregressiveConfig(TDDConfig):
    """Configuration of [`AutoregressiveCaptioner`]: that of TDD, whose diffusion fields have no effect here."""

    model_type = "autoregressive_captioner"
    _auto_class: ClassVar[None] = None  # its checkpoints contain no code


class AutoregressiveCaptioner(TDDPreTrainedModel):
    r"""
    An autoregressive captioner: Transformers' GPT-NeoX with the image's prefix in front of the caption, as in LLaVA.

    Encoder and connector are those of TDD. The layers have the same form too: GPT-NeoX without parallel residuals is
    pre-norm, with biases and a two-layer feed-forward network. At the same width and depth it only lacks the
    parameters of the diffusion. A decoder with cross-attention would have layers that are half as large again. It
    would have to be narrower or shallower to have the same size.

    Args:
        config ([`AutoregressiveConfig`]): A configuration with `vocab_size`, `pad_token_id` and `eos_token_id`.
    """

    config: AutoregressiveConfig
    config_class = AutoregressiveConfig  # type: ignore[assignment]
    _no_split_modules = ["GPTNeoXLayer"]

    def __init__(self, config: AutoregressiveConfig):
        super().__init__(config)
        self.model = TDDModel(config, add_denoiser=False)
        self.model.connector = TDDConnector(config, self.model.encoder_hidden_size)
        self.decoder = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                intermediate_size=config.intermediate_size,
                hidden_act=config.hidden_act,
                hidden_dropout=config.hidden_dropout_prob,
                attention_dropout=config.attention_probs_dropout_prob,
                layer_norm_eps=config.layer_norm_eps,
                initializer_range=config.initializer_range,
                tie_word_embeddings=config.tie_word_embeddings,
                use_parallel_residual=False,
                pad_token_id=config.pad_token_id,
                eos_token_id=config.eos_token_id,
                bos_token_id=None,  # captions begin after the image
            )
        )
        self.post_init()

    def forward(
        self,
        labels: Tensor,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        Computes the loss of captions: the mean cross-entropy of their tokens, `eos_token_id` included.

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Captions with their `eos_token_id`. `pad_token_id` or -100 fills short ones.
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`, *optional*):
                Images, as the image processor returns them.
            image_features (`torch.FloatTensor`, *optional*):
                In place of `pixel_values`: the `pooler_output` of `model.get_image_features`.

        Raises:
            `ValueError`: for token ids out of range, or unless one of `pixel_values` and `image_features` is given.
        """
        prefix = self.model.get_prefix(pixel_values, image_features)
        tokens = labels.masked_fill(labels == -100, self.config.pad_token_id)
        check_value_range("labels", tokens, 0, self.config.vocab_size - 1)
        inputs_embeds = torch.cat([prefix, self.decoder.get_input_embeddings()(tokens)], dim=1)
        # The prefix is not predicted. Its last place predicts the caption's first token.
        targets = tokens.masked_fill(tokens == self.config.pad_token_id, -100)
        targets = nn.functional.pad(targets, (prefix.shape[1], 0), value=-100)
        return self.decoder(inputs_embeds=inputs_embeds, labels=targets, use_cache=False, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        r"""
        Generates captions by greedy decoding.

        Args:
            pixel_values, image_features: As in [`~AutoregressiveCaptioner.forward`].
            kwargs: Arguments of Transformers' `generate`, such as `num_beams`.

        Returns:
            `torch.LongTensor` of shape `(batch_size, max_position_embeddings)`: token ids, padded after the end.
        """
        prefix = self.model.get_prefix(pixel_values, image_features)
        length = self.config.max_position_embeddings
        sequences = self.decoder.generate(
            inputs_embeds=prefix,
            attention_mask=prefix.new_ones(prefix.shape[:2], dtype=torch.long),
            max_new_tokens=length,
            **kwargs,
        )
        return nn.functional.pad(sequences, (0, length - sequences.shape[1]), value=self.config.pad_token_id)

    @torch.no_grad()
    def score(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        image_features: Tensor | None = None,
        max_rows: int = 256,
    ) -> Tensor:
        """The log-likelihoods of captions, as [`~TDDLikelihoodMixin.score`] returns those of TDD."""
        prefix = self.model.get_prefix(pixel_values, image_features)
        rows = labels.flatten(0, -2).masked_fill(labels.flatten(0, -2) == -100, self.config.pad_token_id)
        images = torch.arange(len(prefix), device=prefix.device).repeat_interleave(len(rows) // len(prefix))
        scores = []
        for own, tokens in zip(images.split(max_rows), rows.split(max_rows)):
            log_probs = log_probability(self.next_logits(prefix[own], tokens)[:, :-1].float(), tokens)
            scores.append(log_probs.masked_fill(tokens == self.config.pad_token_id, 0.0).sum(1))
        return torch.cat(scores).view(labels.shape[:-1])

    def next_logits(self, prefix: Tensor, tokens: Tensor) -> Tensor:
        """The logits of the token at each place and of the one behind, (rows, length + 1, K), given those before."""
        inputs_embeds = torch.cat([prefix, self.decoder.get_input_embeddings()(tokens)], dim=1)
        return self.decoder(inputs_embeds=inputs_embeds, use_cache=False).logits[:, prefix.shape[1] - 1 :]


class WordClassifier(TDDPreTrainedModel):
    """An encoder with a linear head on its mean token. Each word is an independent binary decision.

    Args:
        config ([`TDDConfig`]): A configuration whose labels are words.
        frequencies (`torch.Tensor` of shape `(num_words,)`): The share of images that have each word.
    """

    def __init__(self, config: TDDConfig, frequencies: Tensor):
        super().__init__(config)
        self.model = TDDModel(config, add_denoiser=False)
        self.head = nn.Linear(self.model.encoder_hidden_size, config.num_labels)
        self.post_init()
        nn.init.zeros_(self.head.weight)
        # Most words are rare. With another bias the first epochs would only learn the frequencies. The logit of a word
        # in all captions, or in none, would be infinite.
        self.head.bias.data.copy_(torch.logit(frequencies.clamp(1e-6, 0.999)))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        logits = self.head(self.model.get_image_features(pixel_values).pooler_output[:, 0])
        loss = None
        if labels is not None:  # a sum over the words, since a mean would be dominated by absent ones
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(-1).mean()
        return ImageClassifierOutput(loss=loss, logits=logits)


@torch.inference_mode()
def nearest_captions(
    features: Tensor, train_features: Tensor, train_captions: Sequence[str], batch_size: int = 256
) -> list[str]:
    r"""
    The nearest-neighbour baseline: the caption of an image is that of the most similar training image.

    Args:
        features (`torch.Tensor` of shape `(num_images, num_tokens, width)`): Features of the images to caption.
        train_features (`torch.Tensor` of shape `(num_train_images, num_tokens, width)`):
            Features of the training images.
        train_captions (`Sequence[str]`): One caption of each training image.

    Returns:
        `list[str]`: for each image, the caption of the training image with the highest cosine similarity of mean
        tokens. Of several such images, the first one counts.

    Raises:
        `ValueError`: if `train_features` and `train_captions` differ in length.
    """
    if len(train_features) != len(train_captions):
        raise ValueError(
            f"`train_features` and `train_captions` must have the same length, got {len(train_features)} and "
            f"{len(train_captions)}."
        )

    def direction(batch: Tensor) -> Tensor:
        return torch.nn.functional.normalize(batch.float().mean(1), dim=-1)

    # Features are read in batches, since cached ones may be larger than the memory.
    keys = torch.cat([direction(batch) for batch in train_features.split(batch_size)])
    nearest = torch.cat([(direction(batch) @ keys.T).argmax(-1) for batch in features.split(batch_size)])
    return [train_captions[index] for index in nearest.tolist()]
