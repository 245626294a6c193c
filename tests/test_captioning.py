# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Tests of the captioner's loss, training, saving, and of what it refuses. `generate` has tests of its own."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    TimmWrapperConfig,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTModel,
)

from modeling_tdd import TDDConfig, TDDForCaptioning


MakeCaptioner = Callable[..., TDDForCaptioning]
PAD, EOS = 0, 2
CORRUPTIONS = ("gaussian", "mask", "uniform")
NUM_PLACES = 8


@pytest.fixture
def captions() -> Tensor:
    """Captions of the four images of `pixel_values`, of different lengths."""
    rows = [[5, 6, 7, EOS], [8, EOS], [9, 10, 11, 12, 13, 14, 15, EOS], [5, 5, EOS]]
    return torch.tensor([row + [PAD] * (NUM_PLACES - len(row)) for row in rows])


def draw_fixed(model: TDDForCaptioning, rows: int = 4, repeats: int = 3) -> dict[str, Tensor]:
    """Timesteps and noise, so that two losses differ by what a test changes alone."""
    draw = torch.randn if model.config.corruption == "gaussian" else torch.rand
    shape = (rows, repeats, NUM_PLACES, model.config.noise_width)
    timesteps = torch.arange(1, rows * repeats + 1).view(rows, repeats) % 20 + 1
    return {"timesteps": timesteps, "noise": draw(shape, generator=torch.Generator().manual_seed(2))}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# ---- Loss


@pytest.mark.parametrize("fields", [{}, {"corruption": "mask"}, {"prediction_type": "epsilon"}], ids=str)
def test_feature_reuse_equals_repeating_the_image(
    make_captioner: MakeCaptioner, pixel_values: Tensor, captions: Tensor, fields: dict[str, Any]
) -> None:
    reusing = make_captioner(condition_dropout=0.0, **fields).train()
    repeating = copy.deepcopy(reusing)
    repeating.config.timesteps_per_image = 1
    fixed = draw_fixed(reusing)
    reused = reusing(pixel_values, captions, **fixed)
    repeated = repeating(
        pixel_values.repeat_interleave(3, dim=0),
        captions.repeat_interleave(3, dim=0),
        **{name: tensor.flatten(0, 1)[:, None] for name, tensor in fixed.items()},
    )
    torch.testing.assert_close(reused.loss, repeated.loss)
    torch.testing.assert_close(reused.logits, repeated.logits.unflatten(0, (4, 3)).mean(1))
    reused.loss.backward()
    repeated.loss.backward()
    torch.testing.assert_close(gradients(reusing), gradients(repeating), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss_weighting", ["alpha_bar", "none"])
@pytest.mark.parametrize("pad_loss_weight", [0.0, 0.25, 1.0])
def test_loss_by_hand(
    make_captioner: MakeCaptioner, pixel_values: Tensor, captions: Tensor, loss_weighting: str, pad_loss_weight: float
) -> None:
    """One timestep an image, so that `logits` are the very ones that the loss compares. The mean is over all places,
    whatever their weights are: a caption counts the same in any batch."""
    model = make_captioner(
        pad_loss_weight=pad_loss_weight,
        loss_weighting=loss_weighting,
        timestep_sampling="shared",
        timesteps_per_image=1,
        condition_dropout=0.0,
    ).train()
    alpha_bar = model.model.denoiser.schedule_on(torch.device("cpu")).alpha_bar
    timesteps = torch.tensor([[1], [6], [11], [20]])
    outputs = model(pixel_values, captions, timesteps=timesteps)
    log_probabilities = outputs.logits.log_softmax(-1)
    total = torch.tensor(0.0)
    for row in range(4):
        coefficient = 1.0 if loss_weighting == "none" else alpha_bar[timesteps[row, 0]]
        for place, token in enumerate(captions[row].tolist()):
            weight = pad_loss_weight if token == PAD else 1.0
            total = total - coefficient * weight * log_probabilities[row, place, token]
    torch.testing.assert_close(outputs.loss, total / (4 * NUM_PLACES))


def test_mdd_counts_masked_places_alone(make_captioner: MakeCaptioner, pixel_values: Tensor, captions: Tensor) -> None:
    model = make_captioner(
        corruption="mask", timesteps_per_image=1, condition_dropout=0.0, pad_loss_weight=0.5
    ).train()
    timesteps = torch.full((4, 1), 10)  # alpha_bar is 0.5 there: noise of 0.5 and above masks
    noise = torch.zeros(4, 1, NUM_PLACES, 1)
    noise[0, 0, :2] = 0.9  # two words
    noise[1, 0, 3:5] = 0.9  # two places of padding
    outputs = model(pixel_values, captions, timesteps=timesteps, noise=noise)
    losses = nn.functional.cross_entropy(outputs.logits.transpose(1, 2), captions, reduction="none")
    expected = (losses[0, :2].sum() + 0.5 * losses[1, 3:5].sum()) / (4 * NUM_PLACES)
    torch.testing.assert_close(outputs.loss, expected)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_short_labels_and_minus_100_are_padding(
    make_captioner: MakeCaptioner, pixel_values: Tensor, captions: Tensor, corruption: str
) -> None:
    model = make_captioner(corruption=corruption, condition_dropout=0.0).train()
    captions[2, 3:] = PAD
    fixed = draw_fixed(model)
    expected = model(pixel_values, captions, **fixed).loss
    for labels in (captions.masked_fill(captions == PAD, -100), captions[:, :4]):
        torch.testing.assert_close(model(pixel_values, labels, **fixed).loss, expected, rtol=0, atol=0)
    assert not torch.allclose(model(pixel_values, captions.flip(0), **fixed).loss, expected)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_nothing_to_learn_has_the_loss_0(make_captioner: MakeCaptioner, pixel_values: Tensor, corruption: str) -> None:
    model = make_captioner(corruption=corruption, pad_loss_weight=0.0).train()
    loss = model(pixel_values, torch.full((4, 3), -100)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_nothing_masked_has_the_loss_0(make_captioner: MakeCaptioner, pixel_values: Tensor, captions: Tensor) -> None:
    model = make_captioner(corruption="mask").train()
    loss = model(pixel_values, captions, timesteps=torch.full((4, 3), 1), noise=torch.zeros(4, 3, 8, 1)).loss
    loss.backward()
    assert loss.item() == 0 and all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.parametrize("fields", [{}, {"timestep_sampling": "shared"}, {"corruption": "mask"}], ids=str)
@torch.no_grad()
def test_the_loss_in_eval_mode_is_the_same_at_each_call_and_in_each_batch(
    make_captioner: MakeCaptioner, pixel_values: Tensor, captions: Tensor, fields: dict[str, Any]
) -> None:
    """So `eval_loss` can choose a checkpoint, and does not change with the batch size."""
    model = make_captioner(**fields)
    state = torch.get_rng_state()
    loss = model(pixel_values, captions).loss
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    assert torch.equal(model(pixel_values, captions).loss, loss)
    alone = [model(pixel_values[row : row + 1], captions[row : row + 1]).loss for row in range(4)]
    assert len(set(alone)) == 4
    torch.testing.assert_close(torch.stack(alone).mean(), loss, rtol=1e-5, atol=1e-6)
    other_order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model(pixel_values[other_order], captions[other_order]).loss, loss)
    # Training draws anew at each call
    model.train()
    training = {model(pixel_values, captions).loss.item() for _ in range(3)}
    assert len(training) == 3 and loss.item() not in training


@pytest.mark.parametrize("cut", [[16], [8, 8], [1] * 16, [1, 15]], ids=lambda cut: f"{len(cut)} parts, first {cut[0]}")
@pytest.mark.parametrize("fields", [{}, {"corruption": "mask"}, {"prediction_type": "epsilon"}], ids=str)
def test_the_gradient_does_not_depend_on_how_a_batch_is_cut(
    make_captioner: MakeCaptioner, fields: dict[str, Any], cut: list[int]
) -> None:
    """16 captions of 1 to 8 tokens, at once and in parts whose losses are weighted by their share of the images."""
    model = make_captioner(condition_dropout=0.0, **fields).double().train()
    images = torch.randn(16, 3, 16, 16, dtype=torch.float64)
    captions = torch.randint(3, 20, (16, NUM_PLACES))
    for row in range(16):
        captions[row, row // 2 :] = PAD
        captions[row, row // 2] = EOS
    fixed = draw_fixed(model, rows=16)
    model(images, captions, **fixed).loss.backward()
    expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    for part in torch.arange(16).split(cut):
        loss = model(images[part], captions[part], **{name: tensor[part] for name, tensor in fixed.items()}).loss
        (loss * len(part) / 16).backward()
    assert gradients(model).keys() == expected.keys()
    # Noise and logits are float32 in a float64 model: float rounding remains
    torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("batch_size", [8, 2])
def test_trainer_accumulates_the_gradient_of_one_batch(
    make_captioner: MakeCaptioner, tmp_path: Path, batch_size: int
) -> None:
    """One step of plain SGD from 8 captions of very different lengths, at once and in 4 accumulated parts."""
    model = make_captioner(condition_dropout=0.0)
    captions = torch.randint(3, 20, (8, NUM_PLACES))
    for row in range(8):
        captions[row, row:] = PAD
    fixed, images = draw_fixed(model, rows=8), torch.randn(8, 3, 16, 16)
    rows = [
        {"pixel_values": images[i], "labels": captions[i], **{name: fixed[name][i] for name in fixed}}
        for i in range(8)
    ]
    reference = copy.deepcopy(model).train()
    reference(images, captions, **fixed).loss.backward()
    arguments = TrainingArguments(
        tmp_path,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=8 // batch_size,
        max_steps=1,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim="sgd",
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    Trainer(model, arguments, train_dataset=rows).train()
    for name, parameter in reference.named_parameters():
        step = before[name] - model.get_parameter(name).detach()
        torch.testing.assert_close(step, parameter.grad, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_the_loss_in_eval_mode_drops_no_condition(
    make_captioner: MakeCaptioner, pixel_values: Tensor, captions: Tensor
) -> None:
    """With every condition dropped the image has no say; in eval mode none is dropped."""
    model = make_captioner(condition_dropout=1.0)
    fixed, other = draw_fixed(model), pixel_values.flip(0)
    with torch.no_grad():
        evaluated = model(pixel_values, captions, **fixed).loss
        assert not torch.allclose(evaluated, model(other, captions, **fixed).loss)
        model.train()
        dropped = model(pixel_values, captions, **fixed).loss
        torch.testing.assert_close(dropped, model(other, captions, **fixed).loss)
        model.config.condition_dropout = 0.0
        torch.testing.assert_close(model(pixel_values, captions, **fixed).loss, evaluated)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_dropped_row_has_the_loss_of_the_null_prefix(
    make_captioner: MakeCaptioner, pixel_values: Tensor, captions: Tensor, attention: str
) -> None:
    """The image has 17 prefix tokens and the null prefix one: a dropped row must see neither more nor less."""
    model = make_captioner(condition_dropout=1.0, timesteps_per_image=1).train()
    model.set_attn_implementation(attention)
    fixed = draw_fixed(model, repeats=1)
    dropped = model(pixel_values, captions, **fixed).logits
    null = model.model.denoiser(captions, fixed["timesteps"].expand(4, NUM_PLACES), fixed["noise"][:, 0])
    expected = model.lm_head(null.last_hidden_state)
    torch.testing.assert_close(dropped, expected, rtol=1e-4, atol=1e-4)


# ---- Training


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_gradients_reach_every_parameter(
    make_captioner: MakeCaptioner, pixel_values: Tensor, captions: Tensor, corruption: str, tied: bool
) -> None:
    model = make_captioner(corruption=corruption, tie_word_embeddings=tied, condition_dropout=0.5).train()
    model(pixel_values.repeat(4, 1, 1, 1), captions.repeat(4, 1)).loss.backward()  # some keep their condition
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad, name
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    assert (model.lm_head.weight is model.model.denoiser.token_embedding.weight) == tied


def test_a_frozen_encoder_stays_as_it_is(make_captioner: MakeCaptioner, captions: Tensor) -> None:
    """A network with batch norm, whose statistics a training pass would change."""
    model = make_captioner(vision_config=TimmWrapperConfig(architecture="test_resnet"), freeze_encoder=True).train()
    encoder = model.model.encoder
    assert any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())
    before = copy.deepcopy(encoder.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(4, 3, 64, 64), captions).loss.backward()
    optimizer.step()
    assert all(not module.training for module in encoder.modules())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in encoder.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert model.model.denoiser.training and model.model.connector.mlp.fc1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_image_features_stand_in_for_pixel_values(
    make_captioner: MakeCaptioner, pixel_values: Tensor, captions: Tensor, corruption: str
) -> None:
    model = make_captioner(corruption=corruption, condition_dropout=0.0)
    with torch.no_grad():
        features = model.model.get_image_features(pixel_values).pooler_output
        assert features.shape == (4, 17, 32)
        fixed = draw_fixed(model)
        expected = model(pixel_values, captions, **fixed).loss
        torch.testing.assert_close(model(labels=captions, image_features=features, **fixed).loss, expected)
        torch.testing.assert_close(model(image_features=features).logits, model(pixel_values).logits)
    assert torch.equal(model.generate(image_features=features), model.generate(pixel_values))
    with pytest.raises(ValueError, match="either `pixel_values` or `image_features`"):
        model(pixel_values, captions, image_features=features)


def learn_eight_captions(model: TDDForCaptioning, steps: int) -> tuple[int, TDDForCaptioning, Tensor, Tensor]:
    """How many of eight captions `generate` gives right with its default settings, and the model and its data."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(8, 3, 16, 16, generator=generator)
    captions = torch.randint(3, 20, (8, NUM_PLACES), generator=generator)
    for row in range(8):
        captions[row, 2 + row % 6] = EOS
        captions[row, 3 + row % 6 :] = PAD
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model(images, captions).loss.backward()
        optimizer.step()
        schedule.step()
    generated = model.eval().generate(images)
    return int((generated == captions).all(1).sum()), model, images, captions


SMALL_VIT = ViTConfig(
    image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
)
# Sizes and what a captioner cannot do without; everything else has its default
SMALL_CAPTIONER = {
    "vision_config": SMALL_VIT,
    "pooling": None,
    "vocab_size": 20,
    "max_position_embeddings": NUM_PLACES,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.2,  # narrow networks need more than the default, docs/decisions.md, 3
}
PAPERS_PROCESS = {
    "noise_schedule": "cosine",
    "input_weighting": "none",
    "timestep_sampling": "shared",
    "mistaken_share": 0.0,
}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"freeze_encoder": True},
        {"corruption": "mask"},
        {"corruption": "uniform"},
        {"num_timesteps": 20},
        PAPERS_PROCESS,
    ],
    ids=["default", "frozen encoder", "masks", "random tokens", "T=20", "the paper's process"],
)
def test_eight_captions_are_learnt_by_heart(fields: dict[str, Any]) -> None:
    model = TDDForCaptioning(TDDConfig(**SMALL_CAPTIONER, **fields))
    steps = 120 if model.config.timestep_sampling == "per_token" else 250  # of masks, masked places alone teach
    right, model, images, captions = learn_eight_captions(model, steps)
    assert right == 8  # and so is token F1 1
    scores = model.score(images, captions.expand(8, -1, -1))
    assert torch.equal(scores.argmax(1), torch.arange(8))  # of all captions each image's own is the likeliest
    with torch.no_grad():
        assert model(images, captions).loss < 0.3


def test_weights_of_the_loss_decide_whether_captions_are_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above sees the fault that it is there for: weighted by alpha_bar, as for one token, the tokens of pure
    noise, from which every caption starts, would be taught nothing."""
    model = TDDForCaptioning(TDDConfig(**SMALL_CAPTIONER))
    # The configuration refuses it, so it is set where nothing checks it
    monkeypatch.setattr(model.model.denoiser.config, "loss_weighting", "alpha_bar")
    assert learn_eight_captions(model, steps=120)[0] < 4


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_gradient_checkpointing_changes_no_gradient(
    make_captioner: MakeCaptioner, pixel_values: Tensor, captions: Tensor, corruption: str
) -> None:
    plain = make_captioner(corruption=corruption, condition_dropout=0.0).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable()
    calls = [0, 0]
    for index, model in enumerate((plain, checkpointed)):

        def count(*_: Any, index: int = index) -> None:
            calls[index] += 1

        model.model.denoiser.layers[0].mlp.fc1.register_forward_hook(count)
        model(pixel_values, captions, **draw_fixed(plain)).loss.backward()
    assert calls == [2, 4]  # prefix and noisy tokens; each once more where it was not kept
    assert gradients(plain).keys() == gradients(checkpointed).keys()
    torch.testing.assert_close(gradients(checkpointed), gradients(plain))


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_bfloat16_trains_and_captions(
    make_captioner: MakeCaptioner, pixel_values: Tensor, captions: Tensor, corruption: str
) -> None:
    reference = make_captioner(corruption=corruption, initializer_range=0.05, condition_dropout=0.0)
    model, fixed = copy.deepcopy(reference).bfloat16(), draw_fixed(reference)
    loss = model.train()(pixel_values.bfloat16(), captions, **fixed).loss
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference(pixel_values, captions, **fixed).loss, rtol=0.02, atol=0.02)
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    outputs = model.eval().generate(pixel_values.bfloat16(), guidance_scale=2.0, return_dict_in_generate=True)
    assert outputs.sequences.shape == (4, NUM_PLACES) and outputs.log_probs.isfinite().all()


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_eager_and_sdpa_agree(
    make_captioner: MakeCaptioner, pixel_values: Tensor, captions: Tensor, corruption: str
) -> None:
    model = make_captioner(corruption=corruption, condition_dropout=0.5).train()
    fixed, losses, sequences = draw_fixed(model), [], []
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        torch.manual_seed(5)  # the same conditions are dropped
        losses.append(model(pixel_values, captions, **fixed).loss)
        sequences.append(copy.deepcopy(model).eval().generate(pixel_values))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(*sequences)


# ---- One step, saving, encoders


def test_forward_without_labels_is_one_step(make_captioner: MakeCaptioner, pixel_values: Tensor) -> None:
    model = make_captioner()
    with torch.no_grad():
        outputs = model(pixel_values, output_hidden_states=True, use_cache=True)
        assert outputs.loss is None and outputs.logits.shape == (4, NUM_PLACES, 20)
        assert len(outputs.hidden_states) == 3 and outputs.hidden_states[0].shape == (4, NUM_PLACES, 32)
        again = model(cache=outputs.cache)
        torch.testing.assert_close(again.logits, outputs.logits)
        tokens, timesteps = torch.randint(20, (4, NUM_PLACES)), torch.tensor([1, 5, 9, 20])
        noise = torch.randn(4, NUM_PLACES, 20)
        together = model(pixel_values, tokens=tokens, timesteps=timesteps, noise=noise).logits
        alone = model(pixel_values[1:2], tokens=tokens[1:2], timesteps=timesteps[1:2], noise=noise[1:2]).logits
        torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)
        per_token = timesteps[:, None].expand(4, NUM_PLACES)
        again = model(cache=outputs.cache, tokens=tokens, timesteps=per_token, noise=noise).logits
        torch.testing.assert_close(again, together, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(together, outputs.logits, atol=0.1)


@torch.no_grad()
def test_one_step_without_tokens_is_noise_or_masks_alone(make_captioner: MakeCaptioner, pixel_values: Tensor) -> None:
    model = make_captioner()
    state = model(pixel_values).logits
    assert torch.equal(model(pixel_values, tokens=torch.randint(20, (4, NUM_PLACES))).logits, state)  # at t = T
    model = make_captioner(corruption="mask")
    masks = torch.full((4, NUM_PLACES), 20)
    assert torch.equal(model(pixel_values).logits, model(pixel_values, tokens=masks).logits)
    assert not torch.allclose(model(pixel_values).logits, model(pixel_values, tokens=masks - 1).logits, atol=0.1)


@pytest.mark.parametrize("fields", [{}, {"corruption": "mask"}, {"tie_word_embeddings": True}], ids=str)
def test_save_and_load(
    make_captioner: MakeCaptioner, pixel_values: Tensor, captions: Tensor, tmp_path: Path, fields: dict[str, Any]
) -> None:
    model = make_captioner(**fields)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded) is TDDForCaptioning and not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    fixed = draw_fixed(model)
    assert torch.equal(loaded(pixel_values, captions, **fixed).loss, model(pixel_values, captions, **fixed).loss)
    assert torch.equal(loaded.generate(pixel_values), model.generate(pixel_values))


def test_from_a_pretrained_encoder(make_captioner: MakeCaptioner, pixel_values: Tensor, tmp_path: Path) -> None:
    encoder = ViTModel(
        ViTConfig(image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                  intermediate_size=64, initializer_range=0.2),
        add_pooling_layer=False,
    ).eval()  # fmt: skip
    encoder.save_pretrained(tmp_path)
    model = TDDForCaptioning.from_encoder_pretrained(
        str(tmp_path), freeze_encoder=True, pooling=None, vocab_size=20, pad_token_id=PAD, eos_token_id=EOS,
        max_position_embeddings=NUM_PLACES, hidden_size=32, num_attention_heads=2, num_hidden_layers=1,
    ).eval()  # fmt: skip
    with torch.no_grad():
        expected = encoder(pixel_values).last_hidden_state
        torch.testing.assert_close(model.model.get_image_features(pixel_values).pooler_output, expected)
    assert not any(parameter.requires_grad for parameter in model.model.encoder.parameters())


@pytest.mark.parametrize(("labels", "message"), [
    (torch.full((4, 9), 5), r"at most 8\), got \(4, 9\). Truncate captions"),
    (torch.full((4,), 5), r"at most 8\), got \(4,\)"),
    (torch.full((4, 3), 20), r"`labels` must be in \[0, 19\], got 20 to 20"),
    (torch.full((4, 3), -1), r"`labels` must be in \[0, 19\], got -1 to -1"),
])  # fmt: skip
def test_bad_labels(make_captioner: MakeCaptioner, pixel_values: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_captioner()(pixel_values, labels)


@pytest.mark.parametrize("training", [False, True])
def test_another_number_of_captions_than_of_images_is_refused(
    make_captioner: MakeCaptioner, pixel_values: Tensor, captions: Tensor, training: bool
) -> None:
    model = make_captioner().train(training)
    for count in (1, 2, 8):
        labels = captions.repeat(2, 1)[:count]
        with pytest.raises(ValueError, match=f"`labels` must have a caption for each of the 4 images, got {count}"):
            model(pixel_values, labels=labels)


@pytest.mark.parametrize("fields", [{}, {"timestep_sampling": "shared"}])
def test_a_prediction_of_the_noise_captions(make_captioner: MakeCaptioner, pixel_values: Tensor, fields: dict) -> None:
    """Whether logits are computed of all places or, without the output, of those that may change alone."""
    model = make_captioner(prediction_type="epsilon", loss_weighting="none", **fields)
    for call in ({}, {"guidance_scale": 2.0}, {"input_ids": torch.tensor([[5, 6]] * 4)}):
        outputs = model.generate(pixel_values, return_dict_in_generate=True, **call)
        assert torch.equal(model.generate(pixel_values, **call), outputs.sequences)


@pytest.mark.parametrize("name", ["vocab_size", "pad_token_id", "eos_token_id"])
def test_a_captioner_needs_its_tokens(make_captioner: MakeCaptioner, name: str) -> None:
    with pytest.raises(ValueError, match="needs `vocab_size`, `pad_token_id` and `eos_token_id`, got .*None"):
        make_captioner(**{name: None})
