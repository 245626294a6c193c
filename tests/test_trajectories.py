# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The view of a denoising loop: the caption of each step, the candidates of a token, and the script for both."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import ViTImageProcessor

from modeling_tdd import TDDForCaptioning, TDDProcessor
from modeling_tdd.evaluation.trajectories import (
    candidate_entropy,
    confidence_color,
    denoising_frames,
    plot_token_trajectories,
    save_animation,
    token_trajectory,
)
from modeling_tdd.generation_tdd import TDDGenerationOutput, TDDTrajectory
from modeling_tdd.training.tokenization import train_tokenizer


SCRIPT = Path(__file__).parents[1] / "scripts" / "show_denoising.py"


def make_outputs() -> TDDGenerationOutput:
    """Two steps of two captions of three places."""
    tokens = torch.tensor([[[5, 2, 9], [5, 6, 2]], [[7, 7, 7], [8, 2, 0]]])
    candidates = torch.stack([tokens, (tokens + 1) % 20], dim=-1)
    log_probs = torch.tensor([0.75, 0.25]).log().expand(candidates.shape).clone()
    trajectory = TDDTrajectory(torch.tensor([20, 10]), tokens, log_probs[..., 0], candidates, log_probs)
    return TDDGenerationOutput(sequences=tokens[:, -1], trajectory=trajectory)


def decode(tokens: Tensor) -> str:
    return " ".join(f"w{token}" for token in tokens.tolist() if token != 0)


def test_denoising_frames(make_captioner: Callable[..., TDDForCaptioning]) -> None:
    """What stands behind the end is no part of a caption. 0.75 and 0.25 have an entropy of 0.811 bits."""
    config, outputs = make_captioner().config, make_outputs()
    first, second = denoising_frames(outputs, config, decode)
    assert (first.timestep, second.timestep) == (20, 10)
    assert (first.caption, second.caption) == ("w5", "w5 w6")
    assert second.tokens == [("w5", 0.75), (" w6", 0.75)]
    assert first.entropy == pytest.approx(0.811, abs=1e-3)
    assert [frame.caption for frame in denoising_frames(outputs, config, decode, row=1)] == ["w7 w7 w7", "w8"]


def test_entropy_is_of_the_caption_and_its_end(make_captioner: Callable[..., TDDForCaptioning]) -> None:
    outputs = make_outputs()
    certain = torch.tensor([1.0, 0.0]).log()
    outputs.trajectory.candidate_log_probs[0, 0, 1:] = certain  # the end, and padding behind it
    first, second = denoising_frames(outputs, make_captioner().config, decode)
    assert first.entropy == pytest.approx(0.811 / 2, abs=1e-3)
    assert second.entropy == pytest.approx(0.811, abs=1e-3)


def test_candidate_entropy_counts_the_others_as_one() -> None:
    log_probs = torch.tensor([[0.5, 0.25], [1.0, 0.0], [0.5, 0.5]]).log()
    torch.testing.assert_close(candidate_entropy(log_probs), torch.tensor([1.5, 0.0, 1.0]))


def test_colors_of_confidence_are_legible_under_black() -> None:
    colors = [confidence_color(probability / 100) for probability in range(101)]
    assert (colors[0], colors[80], colors[100]) == ("#F5A623", "#FFFFFF", "#8CCBF2")
    channels = torch.tensor([[int(color[place : place + 2], 16) for place in (1, 3, 5)] for color in colors]) / 255
    linear = torch.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    contrast = (linear @ torch.tensor([0.2126, 0.7152, 0.0722]) + 0.05) / 0.05
    assert contrast.min() > 7  # AAA of the Web Content Accessibility Guidelines


def test_token_trajectory_by_hand() -> None:
    candidates = torch.tensor([[5, 6], [5, 7], [6, 5]])
    probabilities = torch.tensor([[0.8, 0.1], [0.6, 0.3], [0.5, 0.2]])
    tokens, rows = token_trajectory(candidates, probabilities.log())
    nan = float("nan")
    expected = torch.tensor([[0.1, nan, 0.5], [0.8, 0.6, 0.2], [nan, 0.3, nan]])
    assert tokens == [6, 5, 7]  # 6 is the last step's, 5 sums to 1.6, 7 to 0.3
    torch.testing.assert_close(rows, expected, equal_nan=True)
    tokens, rows = token_trajectory(candidates, probabilities.log(), num_candidates=2)
    assert tokens == [6, 5] and rows.shape == (2, 3)


def test_a_heatmap_a_token() -> None:
    figure = plot_token_trajectories(make_outputs(), decode, places=range(3))
    heatmaps = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in heatmaps] == ["1: w5", "2: w6", "3: w2"]
    chosen = plot_token_trajectories(make_outputs(), decode, places=[1])
    assert [axes.get_title() for axes in chosen.axes if axes.images] == ["2: w6"]
    assert [label.get_text() for label in heatmaps[1].get_yticklabels()] == ["w6", "w2", "w3", "w7"]
    assert [label.get_text() for label in heatmaps[1].get_xticklabels()] == ["20", "10"]
    shown = heatmaps[1].images[0].get_array().filled(-1)
    assert shown[0].tolist() == [-1, 0.75] and shown[1].tolist() == [0.75, -1]


def test_animation_shows_every_step(tmp_path: Path, make_captioner: Callable[..., TDDForCaptioning]) -> None:
    """The two steps differ, and the picture is on each."""
    frames = denoising_frames(make_outputs(), make_captioner().config, decode)
    save_animation(frames, Image.new("RGB", (20, 20), "#009E73"), tmp_path / "steps.gif")
    with Image.open(tmp_path / "steps.gif") as animation:
        assert animation.n_frames == 2 and animation.info["loop"] == 0
        pages = []
        for step in range(2):
            animation.seek(step)
            pages.append(animation.convert("RGB"))
    assert pages[0].tobytes() != pages[1].tobytes()
    for page in pages:
        red, green, blue = page.getpixel((100, 165))
        assert abs(red - 0) < 12 and abs(green - 0x9E) < 12 and abs(blue - 0x73) < 12


def run_script(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_script(
    make_captioner: Callable[..., TDDForCaptioning],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = train_tokenizer(["a red cat on the sofa", "a dog"], kind="word")
    processor = TDDProcessor(ViTImageProcessor(size={"height": 16, "width": 16}), tokenizer)
    model = make_captioner(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    image = tmp_path / "picture.png"
    Image.new("RGB", (20, 20), "teal").save(image)
    monkeypatch.chdir(tmp_path)

    run_script(monkeypatch, str(image), "--model", "model", "--steps", "4", "--text", "a red")
    lines = capsys.readouterr().out.splitlines()
    assert [line[:10] for line in lines[:4]] == ["t =   20  ", "t =   15  ", "t =   10  ", "t =    5  "]
    assert all(line[10:].startswith("a red") for line in lines[:4])
    sequences = model.generate(**processor(images=image, text="a red", return_tensors="pt"), num_inference_steps=4)
    assert lines[3][10:] == processor.decode(sequences[0], skip_special_tokens=True)
    assert lines[4] == "saved picture-denoising.png"
    assert Image.open("picture-denoising.png").size[0] > 500

    run_script(
        monkeypatch,
        str(image),
        "--model",
        "model",
        "--infill",
        "a [MASK] cat",
        "--guidance",
        "2",
        "--output",
        "x.png",
        "--gif",
        "x.gif",
        "--sampler",
        "renoise",
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[10:] == ["saved x.png", "saved x.gif"] and Path("x.png").exists()
    assert Image.open("x.gif").n_frames == 10
    assert all(line[10:].startswith("a ") and line.endswith(" cat") for line in lines[:10])
