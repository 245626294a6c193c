# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Tests of the models: sizes, losses, determinism, saving, encoders, and what they refuse."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    Dinov2Config,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    TimmWrapperConfig,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
    pipeline,
)

from modeling_tdd import TDDConfig, TDDForImageClassification, TDDModel
from modeling_tdd.diffusion_tdd import _make_schedule, gaussian_schedule, noise_factor


MakeConfig = Callable[..., TDDConfig]
MakeModel = Callable[..., TDDForImageClassification]

VISION_SIZES = {"image_size": 16, "patch_size": 4}
WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}

# (vision_config, pooling, image size). The last two are timm's: a ViT, and a network without a class token.
ENCODERS = {
    "vit": (ViTConfig(**VISION_SIZES, **WIDTHS, intermediate_size=64), "cls", 16),
    "vit-mean": (ViTConfig(**VISION_SIZES, **WIDTHS, intermediate_size=64), "mean", 16),
    "dinov2": (Dinov2Config(**VISION_SIZES, **WIDTHS, mlp_ratio=2), "cls", 16),
    "siglip": (SiglipVisionConfig(**VISION_SIZES, **WIDTHS, intermediate_size=64), "mean", 16),
    "timm-vit": (TimmWrapperConfig(architecture="test_vit", model_args={"img_size": 32}), "cls", 32),
    "timm-resnet": (TimmWrapperConfig(architecture="test_resnet"), "mean", 64),
    "timm-convnext": (TimmWrapperConfig(architecture="test_convnext"), "mean", 64),
}


def num_parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def alpha_bar_of(model: nn.Module) -> Tensor:
    return model.model.denoiser.schedule_on(torch.device("cpu")).alpha_bar


def count_calls(module: nn.Module) -> list[int]:
    """A list of one number: how often `module` has run since."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    module.register_forward_hook(count)
    return calls


# ---- Sizes


def test_parameter_counts_are_the_papers() -> None:
    """Section 4.1: 87 M and 24 M, together 111 M, for ViT-B/16 at 224 with 1,000 classes."""
    million = 1e6
    with torch.device("meta"):
        tdd = TDDForImageClassification(TDDConfig(num_labels=1000))
        mdd = TDDForImageClassification(TDDConfig(num_labels=1000, corruption="mask"))
    assert tdd.config.vision_config.image_size == 224 and tdd.config.vision_config.patch_size == 16
    assert num_parameters(tdd.model.encoder, tdd.model.connector) == pytest.approx(87 * million, abs=million)
    assert num_parameters(tdd.model.denoiser, tdd.classifier) == pytest.approx(24 * million, abs=million)
    assert num_parameters(tdd) == pytest.approx(111 * million, abs=million)
    assert num_parameters(mdd) == pytest.approx(87 * million, abs=million)


# ---- Training


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon"])
def test_feature_reuse_equals_repeating_the_image(
    make_model: MakeModel, pixel_values: Tensor, labels: Tensor, prediction_type: str
) -> None:
    reusing = make_model(condition_dropout=0.0, prediction_type=prediction_type).train()
    repeating = copy.deepcopy(reusing)
    repeating.config.timesteps_per_image = 1
    timesteps = torch.tensor([[1, 5, 9], [2, 20, 3], [4, 8, 12], [19, 7, 6]])
    noise = torch.randn(4, 3, 1, 5)
    encoder_calls = count_calls(reusing.model.encoder)

    reused = reusing(pixel_values, labels, timesteps=timesteps, noise=noise)
    repeated = repeating(
        pixel_values.repeat_interleave(3, dim=0),
        labels.repeat_interleave(3),
        timesteps=timesteps.view(12, 1),
        noise=noise.view(12, 1, 1, 5),
    )
    assert encoder_calls == [1]
    torch.testing.assert_close(reused.loss, repeated.loss)
    torch.testing.assert_close(reused.logits, repeated.logits.view(4, 3, 5).mean(1))
    reused.loss.backward()
    repeated.loss.backward()
    torch.testing.assert_close(gradients(reusing), gradients(repeating), rtol=1e-4, atol=1e-6)
    assert reusing.model.encoder.embeddings.cls_token.grad.abs().sum() > 0


def test_loss_by_hand(make_model: MakeModel, pixel_values: Tensor, labels: Tensor) -> None:
    """One timestep an image, so that `logits` are the very ones that the loss compares."""
    model = make_model(condition_dropout=0.0, timesteps_per_image=1, label_smoothing=0.0).train()
    timesteps = torch.tensor([[1], [6], [11], [20]])
    outputs = model(pixel_values, labels, timesteps=timesteps)
    log_probabilities = outputs.logits.log_softmax(-1)
    alpha_bar = alpha_bar_of(model)
    expected = sum(-alpha_bar[timesteps[row, 0]] * log_probabilities[row, labels[row]] for row in range(4))
    torch.testing.assert_close(outputs.loss, expected / 4)
    model.config.loss_weighting = "none"
    torch.manual_seed(0)
    unweighted = model(pixel_values, labels, timesteps=timesteps)
    expected = nn.functional.cross_entropy(unweighted.logits, labels)
    torch.testing.assert_close(unweighted.loss, expected)


def draw_fixed(model: TDDForImageClassification) -> dict[str, Tensor]:
    """Timesteps and noise for four images, so that two losses differ by what the test changes alone."""
    return {"timesteps": torch.arange(1, 13).view(4, 3), "noise": torch.randn(4, 3, 1, model.num_labels)}


@pytest.mark.parametrize("corruption", ["gaussian", "mask"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_one_hot_probabilities_have_the_loss_of_their_labels(
    make_model: MakeModel, pixel_values: Tensor, labels: Tensor, corruption: str, label_smoothing: float
) -> None:
    model = make_model(corruption=corruption, label_smoothing=label_smoothing, condition_dropout=0.0).train()
    fixed = {} if corruption == "mask" else draw_fixed(model)  # with masks nothing is drawn
    hard = model(pixel_values, labels, **fixed).loss
    soft = model(pixel_values, nn.functional.one_hot(labels, 5).float(), **fixed).loss
    torch.testing.assert_close(hard, soft)
    assert not torch.allclose(hard, model(pixel_values, labels.flip(0), **fixed).loss)


def test_mixed_labels_enter_the_loss(make_model: MakeModel, pixel_values: Tensor, labels: Tensor) -> None:
    model = make_model(
        timesteps_per_image=1, condition_dropout=0.0, loss_weighting="none", label_smoothing=0.0
    ).train()
    mixed = 0.3 * nn.functional.one_hot(labels, 5).float() + 0.7 * nn.functional.one_hot(labels.flip(0), 5).float()
    outputs = model(pixel_values, mixed)
    expected = -(mixed * outputs.logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(outputs.loss, expected)


def test_label_smoothing_by_hand(make_model: MakeModel, pixel_values: Tensor, labels: Tensor) -> None:
    model = make_model(
        label_smoothing=0.1, timesteps_per_image=1, condition_dropout=0.0, loss_weighting="none"
    ).train()
    outputs = model(pixel_values, labels)
    smoothed = 0.9 * nn.functional.one_hot(labels, 5) + 0.1 / 5
    expected = -(smoothed * outputs.logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(outputs.loss, expected)
    # An evaluation's loss is not smoothed
    outputs = model.eval()(pixel_values, labels)
    torch.testing.assert_close(outputs.loss, nn.functional.cross_entropy(outputs.logits, labels))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_trains_a_step_and_classifies(make_model: MakeModel, name: str, tied: bool) -> None:
    vision_config, pooling, size = ENCODERS[name]
    model = make_model(
        vision_config=vision_config, pooling=pooling, condition_dropout=0.5, tie_word_embeddings=tied
    ).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    images, labels = torch.randn(8, 3, size, size), torch.arange(8) % 5
    before = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    model(images, labels).loss.backward()
    for parameter_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
    optimizer.step()
    for parameter_name in (
        "model.connector.mlp.fc1.weight",
        "model.denoiser.token_embedding.weight",
        "model.denoiser.null_prefix",
        "classifier.weight",
    ):
        assert not torch.equal(model.get_parameter(parameter_name), before[parameter_name]), parameter_name
    encoder_names = [name for name, _ in model.model.encoder.named_parameters(prefix="model.encoder")]
    assert any(not torch.equal(model.get_parameter(name), before[name]) for name in encoder_names)

    with torch.no_grad():
        logits = model.eval()(images).logits
    assert logits.shape == (8, 5) and logits.isfinite().all()
    assert not torch.allclose(logits[0], logits[1])  # the image is seen


@pytest.mark.parametrize(
    "fields",
    [{}, {"corruption": "mask"}, {"corruption": "uniform"}, {"prediction_type": "epsilon", "loss_weighting": "none"}],
    ids=str,
)
def test_a_small_set_is_learnt_by_heart(
    make_model: MakeModel, pixel_values: Tensor, labels: Tensor, fields: dict[str, Any]
) -> None:
    model = make_model(**fields, initializer_range=0.05).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model(pixel_values, labels).loss.backward()
        optimizer.step()
    with torch.no_grad():
        # Several draws: with "epsilon" a single one still errs now and then
        logits = model.eval()(pixel_values, num_noise_samples=8).logits
    assert logits.argmax(-1).tolist() == labels.tolist()


def test_gradient_checkpointing_changes_no_gradient(
    make_model: MakeModel, pixel_values: Tensor, labels: Tensor
) -> None:
    plain = make_model(condition_dropout=0.0).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable()
    fixed = draw_fixed(plain)
    calls = [count_calls(model.model.denoiser.layers[0].mlp.fc1) for model in (plain, checkpointed)]
    for model in (plain, checkpointed):
        model(pixel_values, labels, **fixed).loss.backward()
    assert calls == [[2], [4]]  # prefix and noisy tokens; each once more where it was not kept
    assert gradients(plain).keys() == gradients(checkpointed).keys()
    torch.testing.assert_close(gradients(checkpointed), gradients(plain))


def test_bfloat16_trains_and_classifies(make_model: MakeModel, pixel_values: Tensor, labels: Tensor) -> None:
    reference = make_model(initializer_range=0.05)
    model = copy.deepcopy(reference).bfloat16().train()
    # Half precision would lose what little noise there is at small t
    assert torch.equal(alpha_bar_of(model), alpha_bar_of(reference)) and alpha_bar_of(model).dtype == torch.float32
    loss = model(pixel_values.bfloat16(), labels).loss
    loss.backward()
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients(model).values())
    with torch.no_grad():
        logits = model.eval()(pixel_values.bfloat16()).logits
        expected = reference(pixel_values).logits
    torch.testing.assert_close(logits.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("context", [torch.device("meta"), torch.inference_mode()], ids=["meta", "inference mode"])
def test_model_made_within_another_context(
    make_config: MakeConfig, pixel_values: Tensor, labels: Tensor, context: Any
) -> None:
    """`from_pretrained` makes models on the meta device. The schedule is made once for all models: it may hold
    neither what the first one's device nor what its inference mode would make of it."""
    _make_schedule.cache_clear()
    with context:
        TDDForImageClassification(make_config())
    model = TDDForImageClassification(make_config())
    assert torch.equal(alpha_bar_of(model), gaussian_schedule("cosine", 20, 5, 32)[0].float())
    assert model.eval()(pixel_values).logits.isfinite().all()
    model.train()(pixel_values, labels).loss.backward()


# ---- What the denoiser reads


def run_denoiser(model: TDDModel, *args: Tensor, **kwargs: Any) -> Tensor:
    return model.denoiser(*args, **kwargs).last_hidden_state


@pytest.mark.parametrize("one_hot_scale", [1.0, 0.5])
@pytest.mark.parametrize("input_weighting", ["none", "visibility"])
@pytest.mark.parametrize("prediction_type", ["sample", "epsilon"])
@pytest.mark.parametrize("task", ["classifier", "captioner"])
@torch.no_grad()
def test_the_denoiser_reads_the_projected_noisy_one_hot_vectors(
    make_config: MakeConfig, task: str, prediction_type: str, input_weighting: str, one_hot_scale: float
) -> None:
    """The hidden states in front of the first layer against y_t W, normalised, from K-wide one-hot vectors and noise:
    as it is with `input_weighting="none"`, as in the paper, and times the token's visibility with "visibility"."""
    num_categories, num_tokens = 50, 1 if task == "classifier" else 6
    fields = {"num_labels": 50} if task == "classifier" else {"vocab_size": 50, "max_position_embeddings": 6}
    config = make_config(
        **fields, prediction_type=prediction_type, input_weighting=input_weighting, one_hot_scale=one_hot_scale
    )
    denoiser = TDDModel(config).eval().denoiser
    nn.init.normal_(denoiser.input_norm.weight)
    tokens = torch.randint(num_categories, (7, num_tokens))
    timesteps = torch.randint(1, 21, (7, num_tokens))
    noise = torch.randn(7, num_tokens, num_categories)
    schedule, weight = denoiser.schedule_on(torch.device("cpu")), denoiser.token_embedding.weight
    noisy = one_hot_scale * schedule.alpha_bar[timesteps].sqrt()[..., None] * nn.functional.one_hot(tokens, 50)
    noisy = noisy + (1 - schedule.alpha_bar[timesteps]).sqrt()[..., None] * noise
    expected = denoiser.input_norm(noisy @ weight)
    if input_weighting == "visibility":
        signal = one_hot_scale**2 * schedule.alpha_bar[timesteps]
        expected = expected * (signal / (signal + 50 * (1 - schedule.alpha_bar[timesteps])))[..., None]
    expected = expected + denoiser.position_embeddings + denoiser.time_embedding(timesteps, torch.float32)
    hidden = denoiser(tokens, timesteps, noise, output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
    # Probabilities are the same where they are one-hot, and mix the rows of W where they are not
    soft = nn.functional.one_hot(tokens, 50).float()
    again = denoiser(soft, timesteps, noise, output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_narrow_noise_is_projected_by_the_factor(make_config: MakeConfig) -> None:
    """d random numbers a token, and not K, see `noise_factor`; its distribution is tested in test_diffusion."""
    denoiser = TDDModel(make_config(num_labels=50)).eval().denoiser
    tokens, timesteps = torch.randint(50, (7, 1)), torch.randint(1, 21, (7, 1))
    noise = torch.randn(7, 1, 32)
    factor = noise_factor(denoiser.token_embedding.weight)
    # K-wide numbers of the same projection
    wide = noise @ factor @ torch.linalg.pinv(denoiser.token_embedding.weight)
    narrow = denoiser(tokens, timesteps, noise).last_hidden_state
    torch.testing.assert_close(narrow, denoiser(tokens, timesteps, wide).last_hidden_state, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_masks_are_read_as_their_embedding(make_config: MakeConfig) -> None:
    config = make_config(vocab_size=20, max_position_embeddings=3, corruption="mask")
    denoiser = TDDModel(config).eval().denoiser
    tokens, timesteps = torch.tensor([[4, 20, 0]]), torch.tensor([[7, 7, 7]])
    rows = torch.stack(
        [denoiser.token_embedding.weight[4], denoiser.mask_embedding, denoiser.token_embedding.weight[0]]
    )
    expected = denoiser.input_norm(rows) + denoiser.position_embeddings
    expected = expected + denoiser.time_embedding(timesteps, torch.float32)
    hidden = denoiser(tokens, timesteps, output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(hidden, expected)


# ---- Guidance and the prefix


def test_dropping_every_condition_leaves_the_unconditional_branch(
    make_model: MakeModel, pixel_values: Tensor, labels: Tensor
) -> None:
    model = make_model(condition_dropout=1.0, timesteps_per_image=1).train()
    fixed = {"timesteps": torch.tensor([[3], [8], [15], [20]]), "noise": torch.randn(4, 1, 1, 5)}
    logits = model(pixel_values, labels, **fixed).logits
    torch.testing.assert_close(logits, model(torch.randn(4, 3, 16, 16), labels, **fixed).logits)
    unconditional = run_denoiser(model.model, labels[:, None], fixed["timesteps"], fixed["noise"][:, 0])
    torch.testing.assert_close(logits, model.classifier(unconditional)[:, 0])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_dropped_prefix_of_many_tokens_equals_the_null_prefix(
    make_config: MakeConfig, pixel_values: Tensor, attention: str
) -> None:
    """Two rows per image. A dropped image must see neither more nor less than the null condition's one token."""
    model = TDDModel(make_config(pooling=None, vocab_size=40, max_position_embeddings=6))
    model.set_attn_implementation(attention)
    model.eval()
    prefix = model.get_prefix(pixel_values)
    assert prefix.shape == (4, 17, 32)
    inputs = (torch.randint(40, (8, 6)), torch.randint(1, 21, (8, 6)), torch.randn(8, 6, 32))
    kept, null = run_denoiser(model, *inputs, prefix), run_denoiser(model, *inputs)
    assert not torch.allclose(kept, null, atol=0.1)
    is_dropped = torch.tensor([True, False, False, True])
    outputs = run_denoiser(model, *inputs, prefix, drop_condition=is_dropped)
    rows = is_dropped.repeat_interleave(2)
    torch.testing.assert_close(outputs[rows], null[rows], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs[~rows], kept[~rows], atol=1e-5, rtol=1e-5)


def test_condition_dropout_is_the_share_that_is_dropped(
    make_model: MakeModel, pixel_values: Tensor, labels: Tensor
) -> None:
    """In training alone, and each image for all its timesteps."""
    model = make_model(condition_dropout=0.25)
    dropped = []
    model.model.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: dropped.append(kwargs["drop_condition"]), with_kwargs=True
    )
    for _ in range(10):
        model.train()(pixel_values.repeat(50, 1, 1, 1), labels.repeat(50))
    assert {drop.shape for drop in dropped} == {(200,)}
    assert torch.cat(dropped).float().mean().item() == pytest.approx(0.25, abs=0.05)


@torch.no_grad()
def test_guidance_by_hand(make_model: MakeModel, pixel_values: Tensor) -> None:
    """One step, from t = T: the conditional and the unconditional logits of the same noise."""
    model = make_model()
    conditional = model(pixel_values, num_inference_steps=1).logits
    noise = torch.randn(1, 1, 5, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([[20]])
    unconditional = model.classifier(run_denoiser(model.model, torch.tensor([[3]]), timesteps, noise))[:, 0]
    expected = unconditional + 3 * (conditional - unconditional)
    for schedule in ("constant", "linear", "cosine"):  # the last step has the whole scale, and here it is the only one
        guided = model(pixel_values, num_inference_steps=1, guidance_scale=3.0, guidance_schedule=schedule).logits
        torch.testing.assert_close(guided, expected, atol=1e-5, rtol=1e-5)
    # A rise begins at 1
    rising = model(pixel_values, guidance_scale=3.0, guidance_schedule="linear", output_trajectory=True).trajectory
    torch.testing.assert_close(rising[:, 0], conditional.softmax(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_labels", [5, 50])
def test_cache_stands_in_for_pixel_values(make_config: MakeConfig, pixel_values: Tensor, num_labels: int) -> None:
    model = TDDModel(make_config(pooling=None, num_labels=num_labels)).eval()
    assert model(pixel_values).cache is None
    first = model(pixel_values, use_cache=True)
    assert len(first.cache.key_values) == 2
    assert first.cache.key_values[0][0].shape == (4, 2, 17, 16)
    assert first.encoder_last_hidden_state.shape == (4, 17, 32)
    encoder_calls = count_calls(model.encoder)
    again = model(cache=first.cache)
    assert encoder_calls == [0] and again.encoder_last_hidden_state is None and again.cache is None
    torch.testing.assert_close(again.last_hidden_state, first.last_hidden_state, rtol=0, atol=0)
    # Other tokens, timesteps and noise with the same images
    other = (torch.ones(4, 1, dtype=torch.long), torch.tensor([[1], [5], [9], [20]]), torch.randn(4, 1, 32))
    other = (*other[:2], other[2][..., : model.config.noise_width])
    cached = model(None, *other, cache=first.cache).last_hidden_state
    torch.testing.assert_close(cached, model(pixel_values, *other).last_hidden_state)
    for arguments in ({"pixel_values": pixel_values, "cache": first.cache}, {}):
        with pytest.raises(ValueError, match="one of `pixel_values`, `image_features` and `cache`"):
            model(**arguments)


def test_keys_and_values_of_rows_can_be_selected(make_config: MakeConfig, pixel_values: Tensor) -> None:
    model = TDDModel(make_config(pooling=None)).eval()
    first = model(pixel_values, use_cache=True)
    selected = model(cache=first.cache.select(torch.tensor([False, True, False, True])))
    torch.testing.assert_close(selected.last_hidden_state, first.last_hidden_state[[1, 3]])


def test_pooling(make_config: MakeConfig, pixel_values: Tensor) -> None:
    model = TDDModel(make_config(pooling=None)).eval()
    tokens = model.get_image_features(pixel_values).pooler_output
    model.config.pooling = "cls"
    torch.testing.assert_close(model.get_image_features(pixel_values).pooler_output, tokens[:, :1])
    model.config.pooling = "mean"
    torch.testing.assert_close(
        model.get_image_features(pixel_values).pooler_output, tokens[:, 1:].mean(1, keepdim=True)
    )


def test_pooling_of_a_convolutional_map(make_config: MakeConfig) -> None:
    model = TDDModel(make_config(vision_config=TimmWrapperConfig(architecture="test_resnet"), pooling="mean")).eval()
    images = torch.randn(2, 3, 64, 64)
    feature_map = model.encoder(images).last_hidden_state
    assert feature_map.ndim == 4
    torch.testing.assert_close(model.get_image_features(images).pooler_output[:, 0], feature_map.mean((2, 3)))


# ---- Classification


def test_mask_corruption_is_a_linear_head(make_model: MakeModel, pixel_values: Tensor, labels: Tensor) -> None:
    model = make_model(corruption="mask", pooling="mean", label_smoothing=0.0)
    features = model.model.encoder(pixel_values).last_hidden_state[:, 1:].mean(1)
    expected = nn.functional.linear(features, model.classifier.weight, model.classifier.bias)
    for steps in (1, 10):
        torch.testing.assert_close(model(pixel_values, num_inference_steps=steps).logits, expected)
    expected_loss = nn.functional.cross_entropy(expected, labels)
    torch.testing.assert_close(model(pixel_values, labels).loss, expected_loss)
    torch.testing.assert_close(model.train()(pixel_values, labels).loss, expected_loss)


def test_what_a_linear_head_does_not_have_is_refused(make_model: MakeModel, pixel_values: Tensor) -> None:
    model = make_model(corruption="mask", pooling="mean")
    for name, value in {
        "generator": torch.Generator(),
        "output_hidden_states": True,
        "output_attentions": True,
    }.items():
        with pytest.raises(ValueError, match=f"`{name}` would have no effect: masked diffusion of one token"):
            model(pixel_values, **{name: value})
    with pytest.raises(ValueError, match="no token embedding: set `tie_word_embeddings=False`"):
        make_model(corruption="mask", tie_word_embeddings=True)


@pytest.mark.parametrize("corruption", ["mask", "uniform"])
def test_noise_that_is_not_gaussian_is_refused(make_config: MakeConfig, pixel_values: Tensor, corruption: str) -> None:
    model = TDDModel(make_config(corruption=corruption, pooling=None, max_position_embeddings=6)).eval()
    with pytest.raises(ValueError, match=f"`noise` would have no effect: with `corruption='{corruption}'`"):
        model(pixel_values, noise=torch.rand(4, 6, model.config.noise_width))


SETTINGS = [
    {},
    {"guidance_scale": 4.0, "guidance_schedule": "cosine"},
    {"num_noise_samples": 3},
    {"num_noise_samples": 3, "guidance_scale": 4.0, "sampling_strategy": "multinomial"},
]


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@torch.no_grad()
def test_an_image_has_the_same_result_alone_and_in_a_batch(
    make_model: MakeModel, settings: dict[str, Any], prediction_type: str
) -> None:
    model = make_model(prediction_type=prediction_type)
    images = torch.randn(32, 3, 16, 16)
    batch = model(images, **settings, output_trajectory=True)
    assert batch.logits.std(0).min() > 1e-2  # the images differ by far more than the tolerance
    for row in (0, 13, 31):
        alone = model(images[row : row + 1], **settings, output_trajectory=True)
        torch.testing.assert_close(alone.logits[0], batch.logits[row], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.trajectory[0], batch.trajectory[row], atol=1e-5, rtol=0)


@torch.no_grad()
def test_result_depends_on_the_generator_alone(make_model: MakeModel, pixel_values: Tensor) -> None:
    model = make_model(sampling_strategy="multinomial")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = model(pixel_values).logits
    assert torch.equal(torch.get_rng_state(), state)  # nor is the global state consumed
    torch.manual_seed(2)
    assert torch.equal(model(pixel_values).logits, first)
    seeded = [model(pixel_values, generator=torch.Generator().manual_seed(seed)).logits for seed in (0, 7, 7)]
    assert torch.equal(seeded[0], first)
    assert torch.equal(seeded[1], seeded[2])
    assert not torch.allclose(seeded[1], first)


@torch.no_grad()
def test_noise_samples_average_probabilities(make_model: MakeModel, pixel_values: Tensor) -> None:
    """With one step the draws are those of one generator in succession."""
    model = make_model()
    generator = torch.Generator().manual_seed(0)
    single = [model(pixel_values, num_inference_steps=1, generator=generator).logits.softmax(-1) for _ in range(3)]
    averaged = model(pixel_values, num_inference_steps=1, num_noise_samples=3).logits
    torch.testing.assert_close(averaged.exp(), sum(single) / 3)
    assert not torch.allclose(single[0], single[1])


@torch.no_grad()
def test_trajectory_has_the_probabilities_of_each_step(make_model: MakeModel, pixel_values: Tensor) -> None:
    model = make_model()
    calls = count_calls(model.model.denoiser)
    outputs = model(pixel_values, num_inference_steps=6, output_trajectory=True)
    assert calls == [1 + 6]  # what all steps share, and the steps
    assert outputs.trajectory.shape == (4, 6, 5)
    torch.testing.assert_close(outputs.trajectory.sum(-1), torch.ones(4, 6))
    torch.testing.assert_close(outputs.trajectory[:, -1], outputs.logits.softmax(-1))
    # The first prediction is that of one step: it starts from the same noise at the same timestep
    one_step = model(pixel_values, num_inference_steps=1).logits
    torch.testing.assert_close(outputs.trajectory[:, 0], one_step.softmax(-1))


@torch.no_grad()
def test_settings_come_from_the_configuration(make_model: MakeModel, pixel_values: Tensor) -> None:
    settings = {
        "num_inference_steps": 3,
        "guidance_scale": 2.0,
        "guidance_schedule": "linear",
        "sampling_strategy": "multinomial",
        "num_noise_samples": 2,
    }
    configured = make_model(**settings)
    plain = make_model()
    plain.load_state_dict(configured.state_dict())
    assert torch.equal(configured(pixel_values).logits, plain(pixel_values, **settings).logits)
    assert not torch.allclose(configured(pixel_values).logits, plain(pixel_values).logits)


def test_labels_in_eval_mode_give_the_cross_entropy_of_the_logits(
    make_model: MakeModel, pixel_values: Tensor, labels: Tensor
) -> None:
    model = make_model()
    outputs = model(pixel_values, labels)
    torch.testing.assert_close(outputs.logits, model(pixel_values).logits)
    torch.testing.assert_close(outputs.loss, nn.functional.cross_entropy(outputs.logits, labels))
    loss, logits = model(pixel_values, labels, return_dict=False)[:2]
    torch.testing.assert_close((loss, logits), (outputs.loss, outputs.logits))


@pytest.mark.parametrize("corruption", ["gaussian", "mask"])
def test_trainer_evaluates(
    make_model: MakeModel, pixel_values: Tensor, labels: Tensor, corruption: str, tmp_path: Path
) -> None:
    model = make_model(corruption=corruption)
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(pixel_values, labels)]
    arguments = TrainingArguments(tmp_path, per_device_eval_batch_size=3, use_cpu=True, report_to="none")
    trainer = Trainer(model, arguments)
    predictions = trainer.predict(rows)
    with torch.no_grad():
        expected = model(pixel_values, labels)
    torch.testing.assert_close(torch.from_numpy(predictions.predictions), expected.logits)
    assert predictions.metrics["test_loss"] == pytest.approx(expected.loss.item(), abs=1e-5)


def test_pipeline_classifies(make_model: MakeModel) -> None:
    model = make_model()
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    image = Image.fromarray(torch.randint(256, (40, 30, 3), dtype=torch.uint8).numpy())
    results = pipeline("image-classification", model=model, image_processor=processor)(image, top_k=5)
    with torch.no_grad():
        expected = model(**processor(image, return_tensors="pt")).logits.softmax(-1)[0]
    scores = {result["label"]: result["score"] for result in results}
    assert [scores[f"LABEL_{index}"] for index in range(5)] == pytest.approx(expected.tolist(), abs=1e-5)


def test_pipeline_extracts_features_in_batches(make_config: MakeConfig) -> None:
    model = TDDModel(make_config()).eval()
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    images = [Image.fromarray(torch.randint(256, (20, 20, 3), dtype=torch.uint8).numpy()) for _ in range(5)]
    extract = pipeline("image-feature-extraction", model=model, image_processor=processor, batch_size=5)
    together = list(extract(images, return_tensors=True))
    with torch.no_grad():
        expected = model(**processor(images, return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(torch.cat(together), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_eager_and_sdpa_agree(make_model: MakeModel, pixel_values: Tensor) -> None:
    model = make_model()
    results = {}
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        assert model.model.denoiser.layers[0].attention.config._attn_implementation == attention
        results[attention] = model(pixel_values, guidance_scale=2.0).logits
    torch.testing.assert_close(results["eager"], results["sdpa"], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_hidden_states_and_attentions(make_config: MakeConfig, make_model: MakeModel, pixel_values: Tensor) -> None:
    model = TDDModel(make_config(pooling=None, max_position_embeddings=6)).eval()
    model.set_attn_implementation("eager")
    outputs = model(pixel_values, output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(4, 6, 32)] * 3
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(4, 2, 6, 17 + 6)] * 2
    torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(4, 2, 6))

    classifier = make_model()
    classifier.set_attn_implementation("eager")
    outputs = classifier(pixel_values, output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(4, 1, 32)] * 3
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(4, 2, 1, 1 + 1)] * 2
    outputs = classifier(pixel_values)
    assert outputs.hidden_states is None and outputs.attentions is None


@torch.no_grad()
def test_hidden_states_are_those_of_all_rows(make_model: MakeModel, pixel_values: Tensor) -> None:
    """Rows that are sure stay, where somebody reads more than their logits."""
    model = make_model()
    call = {"num_noise_samples": 3, "num_inference_steps": 8, "stability_threshold": 2}
    plain = model(pixel_values, **call)
    outputs = model(pixel_values, output_hidden_states=True, output_attentions=True, **call)
    torch.testing.assert_close(outputs.logits, plain.logits)
    assert {len(states) for states in (*outputs.hidden_states, *outputs.attentions)} == {3 * len(pixel_values)}


@pytest.mark.parametrize("change", ["data", "in place", "load_state_dict", "double"])
@torch.no_grad()
def test_nothing_made_of_the_weights_outlives_a_call(make_model: MakeModel, pixel_values: Tensor, change: str) -> None:
    """`param.data.copy_` does not raise the tensor's version, by which a cache could tell that it is stale."""
    # More labels than the width, or the noise's factor would be the weight itself
    model, other = make_model(num_labels=50), make_model(num_labels=50)
    before = model(pixel_values).logits
    weight, new = model.model.denoiser.token_embedding.weight, other.model.denoiser.token_embedding.weight
    if change == "data":
        weight.data.copy_(new)
    elif change == "in place":
        weight.copy_(new)
    elif change == "load_state_dict":
        model.load_state_dict(other.state_dict())
    else:
        model.double()
    fresh = TDDForImageClassification(model.config).to(model.dtype).eval()
    fresh.load_state_dict(model.state_dict())
    logits = model(pixel_values.to(model.dtype)).logits
    assert torch.equal(logits, fresh(pixel_values.to(model.dtype)).logits)
    if change != "double":
        assert not torch.allclose(logits, before)


@torch.no_grad()
def test_a_small_change_of_the_weights_is_seen_under_autocast(make_model: MakeModel) -> None:
    embedding = make_model(num_labels=50).model.denoiser.token_embedding
    noise = torch.randn(3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        before = embedding(noise=noise)
        embedding.weight.mul_(1.001)
        after, kept = embedding(noise=noise), embedding._kept_factor[1]
    assert before.shape == after.shape
    torch.testing.assert_close(kept, noise_factor(embedding.weight))


def test_the_noise_has_a_gradient_where_one_is_wanted(make_model: MakeModel, pixel_values: Tensor) -> None:
    """In eval mode too, and after a call without gradients: at t = T the noise alone reads the embedding."""
    model = make_model(num_labels=50)
    with torch.no_grad():
        model(pixel_values)
    model(pixel_values, num_inference_steps=1).logits.sum().backward()
    assert model.model.denoiser.token_embedding.weight.grad.abs().sum() > 0


# ---- Saving and loading


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("fields", [{}, {"corruption": "mask"}, {"tie_word_embeddings": True}], ids=str)
@torch.no_grad()
def test_round_trip_is_bit_equal(
    make_model: MakeModel, pixel_values: Tensor, tmp_path: Path, fields: dict[str, Any], max_shard_size: str
) -> None:
    model = make_model(**fields)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "20KB")
    loaded, info = TDDForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not loaded.training
    assert torch.equal(loaded(pixel_values).logits, model(pixel_values).logits)
    state, loaded_state = model.state_dict(), loaded.state_dict()
    assert state.keys() == loaded_state.keys()
    assert all(torch.equal(state[name], loaded_state[name]) for name in state)


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_saved_weights_have_the_names_of_the_model(make_model: MakeModel, tmp_path: Path, name: str) -> None:
    """Trainer's resume loads them as they are, and would skip an encoder saved under its original names."""
    vision_config, pooling, _ = ENCODERS[name]
    model = make_model(vision_config=vision_config, pooling=pooling)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", ["dinov2", "siglip", "timm-vit", "timm-resnet"])
@torch.no_grad()
def test_round_trip_of_every_encoder_is_bit_equal(make_model: MakeModel, tmp_path: Path, name: str) -> None:
    vision_config, pooling, size = ENCODERS[name]
    model = make_model(vision_config=vision_config, pooling=pooling)
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, size, size)
    loaded = TDDForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(images).logits, model(images).logits)


@torch.no_grad()
def test_auto_classes(make_model: MakeModel, pixel_values: Tensor, tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(classifier) is TDDForImageClassification
    assert torch.equal(classifier(pixel_values).logits, model(pixel_values).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is TDDModel
    assert torch.equal(base(pixel_values).last_hidden_state, model.model(pixel_values).last_hidden_state)


@torch.no_grad()
def test_another_process_gives_identical_logits(make_model: MakeModel, pixel_values: Tensor, tmp_path: Path) -> None:
    """Both load the same file: products of one row differ in their last bit with the alignment of the weights in
    memory, and weights that were loaded lie otherwise than those that were drawn."""
    fields = {"guidance_scale": 2.0, "sampling_strategy": "multinomial", "num_noise_samples": 2}
    make_model(num_labels=50, **fields).save_pretrained(tmp_path)
    model = TDDForImageClassification.from_pretrained(tmp_path)
    save_file({"pixel_values": pixel_values}, tmp_path / "inputs.st")
    program = """
import sys, torch
from safetensors.torch import load_file, save_file
from modeling_tdd import TDDForImageClassification
folder = sys.argv[1]
torch.set_num_threads(1)
torch.manual_seed(99)
model = TDDForImageClassification.from_pretrained(folder)
with torch.no_grad():
    save_file({"logits": model(load_file(folder + "/inputs.st")["pixel_values"]).logits}, folder + "/outputs.st")
"""
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], check=True, env={**os.environ, "PYTHONHASHSEED": "7"}
    )
    assert torch.equal(load_file(tmp_path / "outputs.st")["logits"], model(pixel_values).logits)


def test_tied_weights_stay_tied(make_model: MakeModel, pixel_values: Tensor, labels: Tensor, tmp_path: Path) -> None:
    tied, untied = make_model(tie_word_embeddings=True), make_model()
    assert tied.classifier.weight is tied.model.denoiser.token_embedding.weight
    assert untied.classifier.weight is not untied.model.denoiser.token_embedding.weight
    assert num_parameters(untied) - num_parameters(tied) == 5 * 32
    tied.save_pretrained(tmp_path)
    loaded = TDDForImageClassification.from_pretrained(tmp_path)
    assert loaded.classifier.weight is loaded.model.denoiser.token_embedding.weight
    assert torch.equal(loaded.classifier.weight, tied.classifier.weight)


@pytest.mark.parametrize("with_head", [False, True])
def test_from_encoder_pretrained_of_a_vit(
    vision_config: ViTConfig, pixel_values: Tensor, tmp_path: Path, with_head: bool
) -> None:
    pretrained = (ViTForImageClassification if with_head else ViTModel)(vision_config).eval()
    pretrained.save_pretrained(tmp_path)
    model = TDDForImageClassification.from_encoder_pretrained(
        str(tmp_path), num_labels=3, hidden_size=32, num_attention_heads=2, num_hidden_layers=1, pooling="mean"
    ).eval()
    encoder = pretrained.vit if with_head else pretrained
    expected = encoder(pixel_values).last_hidden_state
    torch.testing.assert_close(model.model.encoder(pixel_values).last_hidden_state, expected, rtol=0, atol=0)
    assert model.config.num_labels == 3 and model.config.pooling == "mean"
    assert model(pixel_values).logits.shape == (4, 3)
    assert TDDModel.from_encoder_pretrained(str(tmp_path)).encoder.config.hidden_size == 32


def test_from_encoder_pretrained_of_a_two_tower_model(pixel_values: Tensor, tmp_path: Path) -> None:
    vision_config, _, _ = ENCODERS["siglip"]
    text_config = {**WIDTHS, "intermediate_size": 64, "vocab_size": 50, "max_position_embeddings": 8}
    pretrained = SiglipModel(SiglipConfig(text_config=text_config, vision_config=vision_config.to_dict())).eval()
    pretrained.save_pretrained(tmp_path)
    model = TDDForImageClassification.from_encoder_pretrained(
        str(tmp_path), num_labels=3, hidden_size=32, num_attention_heads=2, num_hidden_layers=1, pooling="mean"
    ).eval()
    expected = pretrained.vision_model(pixel_values).last_hidden_state
    torch.testing.assert_close(model.model.encoder(pixel_values).last_hidden_state, expected, rtol=0, atol=0)
    assert model(pixel_values).logits.shape == (4, 3)


def test_from_encoder_pretrained_refuses_an_encoder_that_lacks_weights(
    vision_config: ViTConfig, tmp_path: Path
) -> None:
    ViTModel(vision_config).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="lacks weights of ViTModel"):
        TDDForImageClassification.from_encoder_pretrained(str(tmp_path), num_labels=3)


# ---- Bad input


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 16, 16), r"shape \(batch_size, 3, height, width\), got \(3, 16, 16\)"),
        ((2, 1, 16, 16), r"shape \(batch_size, 3, height, width\), got \(2, 1, 16, 16\)"),
        ((2, 16, 16, 3), r"shape \(batch_size, 3, height, width\), got \(2, 16, 16, 3\)"),
        ((2, 3, 20, 20), r"size \(20\*20\) doesn't match model \(16\*16\)"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_bad_images_are_refused(make_model: MakeModel, shape: tuple[int, ...], message: str, training: bool) -> None:
    with pytest.raises(ValueError, match=message):
        make_model().train(training)(torch.zeros(shape), torch.tensor([0, 1]) if training else None)


def test_missing_images_are_refused(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="`pixel_values` must be given"):
        make_model()()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("corruption", ["gaussian", "mask"])
def test_pixels_that_are_not_finite_are_refused_in_training(
    make_model: MakeModel, pixel_values: Tensor, labels: Tensor, value: float, corruption: str
) -> None:
    pixel_values[2, 1, 5, 7] = value
    with pytest.raises(ValueError, match=r"`pixel_values` must be finite, got .* images \[2\] of the batch"):
        make_model(corruption=corruption).train()(pixel_values, labels)


@pytest.mark.parametrize(
    ("bad_labels", "message"),
    [
        (torch.tensor([0, 1, 2, 5]), r"`labels` must be in \[0, 4\], got 0 to 5"),
        (torch.tensor([0, 1, 2, -1]), r"`labels` must be in \[0, 4\], got -1 to 2"),
        (torch.tensor([0, 1, 2]), r"must have shape \(4,\) .* got \(3,\)"),
        (torch.tensor([[0], [1], [2], [3]]), r"must have shape \(4,\) .* got \(4, 1\)"),
        (torch.zeros(4, 4), r"or \(4, 5\) with probabilities, got \(4, 4\)"),
        (torch.zeros(4), r"or \(4, 5\) with probabilities, got \(4,\)"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("corruption", ["gaussian", "mask"])
def test_bad_labels_are_refused(
    make_model: MakeModel, pixel_values: Tensor, bad_labels: Tensor, message: str, training: bool, corruption: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(corruption=corruption).train(training)(pixel_values, bad_labels)


BAD_SETTINGS = [
    ({"num_inference_steps": 0}, "`num_inference_steps` must be an integer of at least 1, got 0"),
    ({"num_inference_steps": 21}, r"`num_inference_steps` must be an integer in \[1, 20\], got 21"),
    ({"guidance_scale": 0.5}, r"`guidance_scale` must be a number in \[1, 1000000\], got 0.5"),
    ({"guidance_schedule": "sine"}, "`guidance_schedule` must be one of .* got 'sine'"),
    ({"sampling_strategy": "beam"}, "`sampling_strategy` must be one of .* got 'beam'"),
    ({"num_noise_samples": 0}, r"`num_noise_samples` must be an integer in \[1, 65536\], got 0"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS)
@pytest.mark.parametrize("corruption", ["gaussian", "mask"])
def test_bad_settings_are_refused_before_anything_is_computed(
    make_model: MakeModel, pixel_values: Tensor, settings: dict[str, Any], message: str, corruption: str
) -> None:
    model = make_model(corruption=corruption)
    calls = count_calls(model.model.encoder)
    with pytest.raises(ValueError, match=message):
        model(pixel_values, **settings)
    assert calls == [0]


def test_class_token_of_an_encoder_without_one_is_refused(make_config: MakeConfig) -> None:
    for name in ("siglip", "timm-resnet"):
        with pytest.raises(ValueError, match="`pooling='cls'` needs an encoder with a class token"):
            TDDModel(make_config(vision_config=ENCODERS[name][0], pooling="cls"))


@pytest.mark.parametrize("fields", [{"vocab_size": 9}, {"max_position_embeddings": 2}, {"pooling": None}], ids=str)
def test_a_classifier_of_several_tokens_is_refused(make_config: MakeConfig, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="A classifier diffuses one label from one pooled feature"):
        TDDForImageClassification(make_config(**fields))


def test_a_single_label_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match="needs at least 2 categories, got 1"):
        make_config(num_labels=1)


def edit(config: dict[str, Any], key: str, value: Any) -> None:
    """Sets `config["a"]["b"]` for the key `"a.b"`."""
    *folders, last = key.split(".")
    for folder in folders:
        config = config[folder]
    config[last] = value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 64),
        ("intermediate_size", 96),
        ("id2label", {str(index): f"LABEL_{index}" for index in range(7)}),
        ("vision_config.hidden_size", 64),
        ("vision_config.patch_size", 8),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_refused(
    make_model: MakeModel, tmp_path: Path, key: str, value: Any
) -> None:
    make_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    edit(config, key, value)
    path.write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="(?i)mismatch"):
        TDDForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_hidden_layers", 3), ("vision_config.num_hidden_layers", 3), ("num_hidden_layers", 1)],
)
def test_missing_and_surplus_weights_are_reported(make_model: MakeModel, tmp_path: Path, key: str, value: int) -> None:
    make_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    edit(config, key, value)
    path.write_text(json.dumps(config))
    _, info = TDDForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys" if value == 3 else "unexpected_keys"]
