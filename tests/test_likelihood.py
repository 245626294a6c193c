# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Scores of given captions: against a slow reference, and as what they are for."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from modeling_tdd import TDDForCaptioning


MakeCaptioner = Callable[..., TDDForCaptioning]
PAD, EOS = 0, 2
CAPTIONS = torch.tensor([[5, 6, EOS, PAD], [7, EOS, PAD, PAD], [5, 6, 7, EOS], [8, 9, 5, 6]])


@torch.no_grad()
def score_slowly(model: TDDForCaptioning, pixel_values: Tensor, caption: list[int], method: str) -> float:
    """The caption's tokens one by one, each hidden alone or with all that follow, by one step of the model."""
    config, places = model.config, model.config.max_position_embeddings
    tokens = torch.tensor([caption + [PAD] * (places - len(caption))])
    length = caption.index(EOS if EOS in caption else PAD) + 1 if {EOS, PAD} & set(caption) else len(caption) + 1
    noise = torch.randn(1, places, config.noise_width, generator=torch.Generator().manual_seed(0))
    total = 0.0
    for place in range(length):
        hidden = slice(place, None if method == "likelihood" else place + 1)
        inputs, timesteps = tokens.clone(), torch.full_like(tokens, 1)  # 0.02 T, at least 1
        if config.corruption == "mask":
            inputs[0, hidden] = config.num_categories
            shares = model.model.denoiser.schedule_on(tokens.device).alpha_bar[1:]
            num_visible = place if method == "likelihood" else places - 1
            timesteps[:] = 1 + int((shares - num_visible / places).abs().argmin())
        else:
            timesteps[0, hidden] = config.num_timesteps
        noise_or_none = None if config.corruption == "mask" else noise
        outputs = model(pixel_values, tokens=inputs, timesteps=timesteps, noise=noise_or_none)
        total += outputs.logits[0, place].log_softmax(-1)[tokens[0, place]].item()
    return total


@pytest.mark.parametrize("corruption", ["gaussian", "mask"])
@pytest.mark.parametrize("method", ["likelihood", "pseudo_likelihood"])
def test_scores_are_those_of_the_slow_reference(
    make_captioner: MakeCaptioner, pixel_values: Tensor, corruption: str, method: str
) -> None:
    model = make_captioner(corruption=corruption)
    labels = torch.stack([CAPTIONS, CAPTIONS.roll(1, 0), CAPTIONS, CAPTIONS])
    scores = model.score(pixel_values, labels, method=method)
    assert scores.shape == (4, 4) and scores.dtype == torch.float32
    for image in range(4):
        for caption in range(4):
            expected = score_slowly(model, pixel_values[image : image + 1], labels[image, caption].tolist(), method)
            assert scores[image, caption].item() == pytest.approx(expected, abs=1e-4)
    if method == "likelihood":
        assert torch.equal(scores, model.score(pixel_values, labels))


@pytest.mark.parametrize("corruption", ["gaussian", "mask"])
def test_likelihood_is_a_distribution(make_captioner: MakeCaptioner, pixel_values: Tensor, corruption: str) -> None:
    """The probabilities of all captions sum to 1: of one place that ends or pads, and of two places."""
    model = make_captioner(corruption=corruption, vocab_size=6, max_position_embeddings=2)
    words = [token for token in range(6) if token not in (PAD, EOS)]
    captions = [[EOS, PAD], [PAD, PAD], *([first, second] for first in words for second in range(6))]
    scores = model.score(pixel_values[:1], torch.tensor([captions]))[0]
    assert len(scores) == 26 and scores.exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("fields", [{}, {"corruption": "mask"}, {"corruption": "uniform"}], ids=str)
@pytest.mark.parametrize("method", ["likelihood", "pseudo_likelihood", "diffusion_bound"])
def test_scores_do_not_depend_on_the_batch(
    make_captioner: MakeCaptioner, pixel_values: Tensor, fields: dict, method: str
) -> None:
    if method != "diffusion_bound" and fields.get("corruption") == "uniform":
        pytest.skip("This network has none.")
    model = make_captioner(**fields)
    call = {"method": method, "num_draws": 5}
    scores = model.score(pixel_values, CAPTIONS, **call)
    assert scores.shape == (4,) and (scores < 0).all()
    torch.manual_seed(7)
    torch.testing.assert_close(model.score(pixel_values, CAPTIONS, max_rows=2, **call), scores, atol=1e-4, rtol=1e-5)
    for row in range(4):
        alone = model.score(pixel_values[row : row + 1], CAPTIONS[None, row : row + 1], **call)
        torch.testing.assert_close(alone[0, 0], scores[row], atol=1e-4, rtol=1e-5)
    # How short captions are filled does not matter; features stand in for images
    features = model.model.get_image_features(pixel_values).pooler_output
    filled = CAPTIONS.masked_fill(CAPTIONS == PAD, -100)
    torch.testing.assert_close(model.score(labels=filled, image_features=features, **call), scores)


def test_diffusion_bound_is_minus_the_loss_of_eval_mode(make_captioner: MakeCaptioner, pixel_values: Tensor) -> None:
    """With as many draws as the configuration has; the loss is a mean over captions and places."""
    model = make_captioner(timesteps_per_image=3)
    scores = model.score(pixel_values, CAPTIONS, method="diffusion_bound", num_draws=3)
    with torch.no_grad():
        loss = model(pixel_values, CAPTIONS).loss
    torch.testing.assert_close(-scores.mean() / model.config.max_position_embeddings, loss)


def test_only_what_a_network_has_is_scored(make_captioner: MakeCaptioner, pixel_values: Tensor) -> None:
    shared = make_captioner(timestep_sampling="shared")
    bound = shared.score(pixel_values, CAPTIONS)
    assert torch.equal(bound, shared.score(pixel_values, CAPTIONS, method="diffusion_bound"))
    for method in ("likelihood", "pseudo_likelihood"):
        with pytest.raises(ValueError, match=f"`method='{method}'` needs a network"):
            shared.score(pixel_values, CAPTIONS, method=method)
    with pytest.raises(ValueError, match="predicts tokens, got `prediction_type='epsilon'`"):
        make_captioner(prediction_type="epsilon").score(pixel_values, CAPTIONS)
    with pytest.raises(ValueError, match="needs `model.eval\\(\\)`"):
        make_captioner().train().score(pixel_values, CAPTIONS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"labels": CAPTIONS[:3]}, r"`labels` must have the shape \(4, length\) or \(4, num_captions, length\)"),
        ({}, r"`labels` must have the shape .* got None"),
        ({"labels": CAPTIONS + 1000}, "`labels` must be in"),
        (
            {"labels": CAPTIONS, "method": "bound"},
            "`method` must be one of 'likelihood', 'pseudo_likelihood', 'diffusion_bound'",
        ),
        ({"labels": CAPTIONS, "num_draws": 0}, "`num_draws` must be an integer"),
    ],
)
def test_what_is_refused(make_captioner: MakeCaptioner, pixel_values: Tensor, call: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_captioner().score(pixel_values, **call)
