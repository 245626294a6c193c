# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""What the demo shows: a picture's drafts as they come, the steps with their tokens' probabilities, the entropies."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import pipeline
from transformers.generation.streamers import BaseStreamer

import modeling_tdd  # noqa: F401 - registers TDD with the pipelines
from modeling_tdd.evaluation.figures import Panel, plot_panels
from modeling_tdd.evaluation.trajectories import (
    DenoisingFrame,
    confidence_color,
    denoising_frames,
    plot_token_trajectories,
)
from modeling_tdd.generation_tdd import TDDGenerationOutput
from modeling_tdd.images_tdd import open_image
from modeling_tdd.processing_tdd import Choices


COLOR_MAP = {f"{percent} %": confidence_color(percent / 100) for percent in range(101)}


class Denoised(NamedTuple):
    """What a model did with a picture: the steps, the output of `generate`, and the probabilities of choices."""

    frames: list[DenoisingFrame]
    outputs: TDDGenerationOutput
    choices: dict[str, Any]


class DraftStreamer(BaseStreamer):
    """Hands each step's draft to another thread."""

    def __init__(self) -> None:
        self.drafts: SimpleQueue[Tensor | None] = SimpleQueue()

    def put(self, value: Tensor) -> None:
        """The prompt and the caption, which the output of `generate` has too."""

    def put_draft(self, draft: Tensor) -> None:
        self.drafts.put(draft[0])

    def end(self) -> None:
        """`generate` may also end by an error, so its end is not read here."""


class Captioner:
    """A captioner, of which kind it is, and where it came from."""

    def __init__(self, path: str):
        self.pipeline = pipeline("image-captioning", model=path)
        self.model, self.processor = self.pipeline.model, self.pipeline.processor
        self.is_masked = self.model.config.corruption == "mask"
        self.kind = "MDD" if self.is_masked else "TDD"
        self.source = "/".join(Path(path).parts[-2:])

    def decode(self, tokens: Tensor) -> str:
        return self.processor.decode(tokens, skip_special_tokens=True)

    def denoise(
        self, image: Image.Image, text: str, choices: Choices | None, settings: dict[str, Any]
    ) -> Iterator[str | Denoised]:
        """Yields each step's draft as soon as it is there, and at last what to show of all steps."""
        has_blanks = choices is not None or self.processor.tokenizer.mask_token in text
        texts = {"infill": text or None, "choices": choices} if has_blanks else {"text": text}
        inputs = self.processor(images=image, **texts, return_tensors="pt")
        if self.is_masked:  # there is no choice of a sampler
            settings = {**settings, "sampler": None}
        streamer = DraftStreamer()
        with ThreadPoolExecutor(1) as thread:
            task = thread.submit(
                self.model.generate,
                **inputs,
                **settings,
                streamer=streamer,
                return_dict_in_generate=True,
                output_trajectory=True,
            )
            task.add_done_callback(lambda _: streamer.drafts.put(None))
            for draft in iter(streamer.drafts.get, None):
                if choices is None:  # else it is the first choice, and not the most probable one
                    yield self.decode(draft)
            outputs = task.result()
        frames = denoising_frames(outputs, self.model.config, self.decode)
        ranked = {}
        if choices is not None:
            ranked = self.processor.post_process_choices(outputs.candidate_probs, choices)[0]
        yield Denoised(frames, outputs, ranked)

    def plot(self, denoised: Denoised, place: int) -> Figure:
        return plot_token_trajectories(denoised.outputs, self.processor.decode, [place])


def read_picture(path: str | None) -> Image.Image:
    """The picture in an uploaded file. Raises a `gr.Error` that says what is wrong with it."""
    if path is None:
        raise gr.Error("There is no picture yet: drop one, choose a file, or take an example.")
    try:
        return open_image(Path(path).read_bytes())
    except ValueError as error:
        is_other = isinstance(error.__cause__, UnidentifiedImageError)
        reason = "it has no known image format" if is_other else error.__cause__
        name, size = Path(path).name, Path(path).stat().st_size
        message = f"{name} ({size:,} bytes) cannot be read as a picture: {reason}"
        raise gr.Error(message, print_exception=False) from error


def highlight(frame: DenoisingFrame) -> list[tuple[str, str]]:
    """The tokens of a step, each with its probability as a label of `COLOR_MAP`."""
    return [(piece, f"{100 * probability:.0f} %") for piece, probability in frame.tokens]


def plot_entropies(names: Sequence[str], results: Sequence[Denoised]) -> Figure:
    """The entropy of each model's drafts by step."""
    lines = {
        name: (range(1, 1 + len(denoised.frames)), np.array([[frame.entropy for frame in denoised.frames]]))
        for name, denoised in zip(names, results)
    }
    steps = max(len(denoised.frames) for denoised in results)
    ticks = range(1, 1 + steps, -(-steps // 10))
    panel = Panel("Mean entropy of the tokens' predictions", "denoising step", "bits", lines, ticks=ticks)
    figure = plot_panels([panel], names)
    figure.axes[0].set_ylim(bottom=0)
    return figure


def parse_choices(text: str, caption: str) -> Choices | None:
    """What a caption may be. Beside one with gaps, such as `[A] running`, each line has the choices of a gap, such as
    `A: man, woman`. Beside an empty one each line is a whole caption. `None` for no lines."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not caption.strip():
        return lines or None
    pairs = [line.partition(":") for line in lines]
    return {name.strip(): [word.strip() for word in words.split(",")] for name, _, words in pairs} or None


def tabulate_choices(names: Sequence[str], results: Sequence[Denoised]) -> list[list[str]]:
    """Rows of a model, a gap, a choice and its probability."""
    rows = []
    for name, denoised in zip(names, results):
        for key, value in denoised.choices.items():
            scores = value if isinstance(value, dict) else {key: value}
            gap = key if isinstance(value, dict) else "caption"
            rows += [[name, gap, choice, f"{probability:.1%}"] for choice, probability in scores.items()]
    return rows
