# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""A Gradio app that shows how a caption is denoised, and a Space of the Hub as it is (docs/demo.md).

    python demo/app.py --rival outputs/emoji_full/mdd-seed0

Needs pip install -e ".[train,demo]". A Space has no command line: there the options are variables.
"""

import argparse
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from denoising import (
    COLOR_MAP,
    Captioner,
    Denoised,
    highlight,
    parse_choices,
    plot_entropies,
    read_picture,
    tabulate_choices,
)
from matplotlib.figure import Figure
from transformers import pipeline


HERE = Path(__file__).resolve().parent
# In a Space the checkpoints lie beside this file, and in the repository one folder up
SHIPPED = (HERE if (HERE / "checkpoints").exists() else HERE.parent) / "checkpoints"
BLANKS = "woman [MASK]: [MASK] skin tone"
CHOICES = """A: man, woman, person
B: light, medium-dark, dark"""
# By name: picture, beginning or caption with blanks, and choices
EXAMPLES = {
    "A weightlifter": [str(SHIPPED / "emoji-captions/weightlifter.png"), "", ""],
    "A climber": [str(SHIPPED / "emoji-captions/example.png"), "", ""],
    "A climber, with blanks": [str(SHIPPED / "emoji-captions/example.png"), "man [MASK]: [MASK] skin tone", ""],
    "A climber, with choices": [str(SHIPPED / "emoji-captions/example.png"), "[A] climbing: [B] skin tone", CHOICES],
    "A handwritten digit": [str(SHIPPED / "digits/example.png"), "", ""],
}
# Captions computed at once. The models are safe for threads, and the free machine of a Space has two cores
CONCURRENCY = 2
MAX_FILE_SIZE = "10mb"
SECONDS_PER_STEP = 0.4
QUEUE_SIZE = 100
# Gradio's labels are white, for darker colours than ours, and its dark theme would darken ours
CSS = ".token .label { color: black } .textfield { background: white }"
INTRODUCTION = """# Captions by Tweedie discrete diffusion
Drop a picture or take an example, and press **Caption**. All tokens are denoised together, and each step predicts
them anew: blue tokens are sure, orange ones are not. The shipped models know emoji and handwritten digits, no more.
"""


class View(NamedTuple):
    """The components that show one model's denoising."""

    caption: gr.Textbox
    draft: gr.HighlightedText
    token: gr.Slider
    candidates: gr.Plot


class Demo:
    """The page, and what its controls do. All visitors share the models; what is shown is each visitor's own."""

    def __init__(self, captioners: list[Captioner], classifier: Any):
        self.captioners, self.classifier = captioners, classifier
        kinds = [captioner.kind for captioner in captioners]
        numbered = [f"{kind} {number}" for number, kind in enumerate(kinds, start=1)]
        self.names = kinds if len(set(kinds)) == len(kinds) else numbered
        with gr.Blocks(title="Tweedie discrete diffusion", analytics_enabled=False) as self.page:
            gr.Markdown(INTRODUCTION)
            with gr.Row():
                with gr.Column(min_width=300):
                    inputs, button = self._build_inputs()
                with gr.Column(scale=2, min_width=300):
                    self._build_outputs()
            self._connect(inputs, button)

    def _build_inputs(self) -> tuple[list[gr.components.Component], gr.Button]:
        config = self.captioners[0].model.generation_config
        picture = gr.Image(label="Picture", type="filepath", image_mode=None, sources=["upload", "clipboard"])
        # Gradio would open the file, with errors that quote its own code
        picture.preprocess = lambda upload: upload and upload.path
        text = gr.Textbox(label="Beginning, or a caption with blanks", placeholder=BLANKS, render=False)
        choices = gr.Textbox(
            label="Choices: a line for each gap, or whole captions", placeholder=CHOICES, lines=2, render=False
        )
        examples = {name: row for name, row in EXAMPLES.items() if Path(row[0]).exists()}
        inputs = [picture, text, choices]
        gr.Examples(list(examples.values()), inputs, label="Examples", example_labels=list(examples))
        text.render()
        choices.render()
        inputs += [
            gr.Slider(1, 100, value=config.num_inference_steps, step=1, label="Denoising steps"),
            gr.Slider(1, 5, value=config.guidance_scale, step=0.1, label="Guidance scale (1: none)"),
            gr.Radio([("the model's own", ""), "renoise", "confidence"], value="", label="Sampler of TDD"),
            gr.Number(0, label="Seed", precision=0, minimum=0),
        ]
        return inputs, gr.Button("Caption", variant="primary")

    def _build_outputs(self) -> None:
        self.results = gr.State()
        captions, drafts, tokens, candidates = [], [], [], []
        self.table = gr.Dataframe(headers=["model", "gap", "choice", "probability"], label="Choices", visible=False)
        with gr.Row():
            for name, captioner in zip(self.names, self.captioners):
                with gr.Column(min_width=300):
                    captions.append(gr.Textbox(label=f"Caption by {name}", info=captioner.source, lines=2))
                    drafts.append(gr.HighlightedText(label="Draft of the step shown", color_map=COLOR_MAP))
        with gr.Row():
            self.step = gr.Slider(1, 2, value=1, step=1, label="Step shown", interactive=True, scale=3, min_width=300)
            self.replay = gr.Button("Replay the steps", min_width=190)
        with gr.Row():
            for name in self.names:
                with gr.Column(min_width=300):
                    label = f"Token of {name} whose candidates are shown"
                    tokens.append(gr.Slider(1, 2, value=1, step=1, label=label, interactive=True))
                    candidates.append(gr.Plot(show_label=False))
        self.views = [View(*components) for components in zip(captions, drafts, tokens, candidates)]
        with gr.Row():
            self.entropy = gr.Plot(show_label=False)
            self.label = gr.Label(label="Read as a handwritten digit")

    def _connect(self, inputs: list[gr.components.Component], button: gr.Button) -> None:
        """Says which control calls what. Only `caption` computes much, so only its calls wait for one another."""
        drafts = [view.draft for view in self.views]
        captions = [view.caption for view in self.views]
        others = [component for view in self.views for component in view[1:]]
        private = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
        latest = {**private, "trigger_mode": "always_last"}  # a slider that is dragged changes often
        done = button.click(
            self.caption,
            inputs,
            [*captions, self.label, self.table, self.results],
            api_name="caption",
            concurrency_limit=CONCURRENCY,
        )
        replay = [self.results, [self.step, *drafts]]
        plays = [
            done.success(self.describe, self.results, [self.step, self.entropy, *others], **private).success(
                self.play, *replay, **private
            ),
            self.replay.click(self.play, *replay, **private),
        ]
        self.step.input(self.show_step, [self.results, self.step], drafts, cancels=plays, **latest)
        for index, view in enumerate(self.views):
            view.token.input(partial(self.plot, index), [self.results, view.token], view.candidates, **latest)

    def caption(
        self, path: str | None, text: str, choices: str, steps: int, guidance: float, sampler: str, seed: int
    ) -> Iterator[dict[Any, Any]]:
        """Captions and classifies a picture, and shows each draft as soon as it is there."""
        image = read_picture(path)
        settings = {"num_inference_steps": steps, "guidance_scale": guidance, "seed": seed, "sampler": sampler or None}
        results, shown = [], {}
        try:
            for captioner, view in zip(self.captioners, self.views):
                for progress in captioner.denoise(image, text, parse_choices(choices, text), settings):
                    if isinstance(progress, str):
                        shown[view.caption] = progress
                        yield shown
                results.append(progress)
                shown[view.caption] = progress.frames[-1].caption
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        scores = {entry["label"]: entry["score"] for entry in self.classifier(image, top_k=3)}
        table = gr.Dataframe(tabulate_choices(self.names, results), visible=bool(results[0].choices))
        yield {**shown, self.table: table, self.results: results, self.label: scores}

    def describe(self, results: list[Denoised]) -> dict[Any, Any]:
        """Shows the steps once they are all there, and the candidates of the token that was least sure."""
        updates = {
            self.step: gr.Slider(maximum=max(2, len(results[0].frames)), value=1),
            self.entropy: plot_entropies(self.names, results),
        }
        for captioner, view, denoised in zip(self.captioners, self.views, results):
            places = len(denoised.frames[-1].tokens) + 1  # with the end
            sure = denoised.outputs.trajectory.log_probs[0, :, :places].mean(0)
            unsure = int(sure.argmin()) + 1
            updates[view.token] = gr.Slider(maximum=max(2, len(sure)), value=unsure)
            updates[view.candidates] = captioner.plot(denoised, unsure - 1)
            updates[view.draft] = highlight(denoised.frames[0])
        return updates

    def play(self, results: list[Denoised] | None) -> Iterator[dict[Any, Any]]:
        """Shows all steps, at a pace that a reader can follow."""
        for step in range(1, 1 + len(results[0].frames) if results else 1):
            yield {self.step: step, **self.show_step(results, step)}
            time.sleep(SECONDS_PER_STEP)

    def show_step(self, results: list[Denoised] | None, step: int) -> dict[Any, Any]:
        """Shows the drafts of a step."""
        return {view.draft: highlight(denoised.frames[:step][-1]) for view, denoised in zip(self.views, results or [])}

    def plot(self, index: int, results: list[Denoised] | None, place: int) -> Figure | None:
        """Draws the candidates of one token of one model's caption; the first is 1."""
        return self.captioners[index].plot(results[index], place - 1) if results else None


def parse_args() -> argparse.Namespace:
    """A Space has no command line, so each option may also be an environment variable."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, description in (
        ("model", SHIPPED / "emoji-captions", "a captioner"),
        ("rival", None, "a captioner to show beside it, such as MDD"),
        ("classifier", SHIPPED / "digits", "an image classifier"),
    ):
        variable = f"TDD_{name.upper()}"
        text = f"{description}: a folder or model id; default: ${variable} or {default or 'none'}"
        parser.add_argument(f"--{name}", default=os.environ.get(variable) or default, help=text)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    captioners = [Captioner(str(name)) for name in (args.model, args.rival) if name]
    demo = Demo(captioners, pipeline("image-classification", model=str(args.classifier)))
    demo.page.queue(max_size=QUEUE_SIZE).launch(
        theme=gr.themes.Default(font="system-ui", font_mono="monospace"),  # Gradio's own come from another server
        css=CSS,
        max_file_size=MAX_FILE_SIZE,
        show_error=True,
        state_session_capacity=1000,
    )


if __name__ == "__main__":
    main()
