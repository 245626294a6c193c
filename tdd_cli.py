# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The command `tdd`: captions and labels of images, and the denoising of a caption step by step.

It stands beside the package `modeling_tdd`, which loads PyTorch when it is imported: so `tdd --help` answers at once.
"""

import argparse
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from PIL.Image import Image

    # From an image to what is printed of it: an object for JSON, and lines of text
    Describe = Callable[[Image], tuple[dict[str, Any], list[str]]]

EXAMPLES = """examples:
  tdd caption *.png --model checkpoints/emoji-captions
  tdd caption a.png --model checkpoints/emoji-captions --infill "woman [MASK]: [MASK] skin tone"
  tdd caption a.png --model checkpoints/emoji-captions --choices "man running" "woman climbing: dark skin tone"
  tdd caption a.png --model checkpoints/emoji-captions --infill "[A] climbing: [B] skin tone" \\
      --choices A man woman person --choices B light medium-dark dark
  tdd classify digit.png --model checkpoints/digits --top-k 3 --json
  tdd show a.png --model checkpoints/emoji-captions

With several images each line begins with the image's name. An image that cannot be read is named on the standard error
stream, and the others are served.
exit status: 0 if all went well, 1 if an image or the model could not be read, 2 if an argument is wrong.
"""


class PrintVersion(argparse.Action):
    """Looks the version up when it is asked for: a checkout that is not installed has none."""

    def __call__(self, parser: argparse.ArgumentParser, *unused: Any) -> None:
        print("tdd", importlib.metadata.version("modeling_tdd"))
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    layout: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": EXAMPLES}
    parser = argparse.ArgumentParser(prog="tdd", description="Captions and labels of images by TDD.", **layout)
    parser.add_argument("--version", action=PrintVersion, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    caption = commands.add_parser("caption", help="write captions of images", **layout)
    classify = commands.add_parser("classify", help="name the likeliest labels of images", **layout)
    show = commands.add_parser("show", help="show how a caption is denoised, step by step", **layout)
    for command, load in ((caption, load_captioner), (classify, load_classifier), (show, load_denoising)):
        command.set_defaults(load=load)
        command.add_argument("images", nargs="+", metavar="IMAGE", help="an image file or a URL")
        command.add_argument("--model", required=True, help="a model's folder, or its id on the Hub")
        command.add_argument("--device", help="where to compute, such as cpu or cuda:1; default: a GPU if any")
        command.add_argument("--num-inference-steps", type=int, metavar="N", help="denoising steps")
        command.add_argument("--guidance-scale", type=float, metavar="S", help="scale of the guidance by the image")
        command.add_argument("--json", action="store_true", help="print a line of JSON for each image")
    for command in (caption, show):
        texts = command.add_mutually_exclusive_group()
        texts.add_argument("--text", help="the fixed beginning of the caption")
        texts.add_argument("--infill", help="a caption with gaps to fill, such as 'woman [MASK]: [MASK] skin tone'")
        command.add_argument("--seed", type=int, help="seed of the noise")
    caption.add_argument(
        "--choices",
        nargs="+",
        action="append",
        metavar="TEXT",
        help="behind the images: captions to choose from; with --infill a gap's name and its texts, once a gap",
    )
    caption.add_argument("--num-return-sequences", type=int, metavar="N", help="captions of each image")
    caption.add_argument("--num-candidates", type=int, metavar="N", help="draw so many captions and rank them")
    caption.add_argument("--do-sample", action="store_true", default=None, help="draw captions at random")
    classify.add_argument("--top-k", type=positive, default=5, metavar="K", help="number of labels; default: 5")
    return parser


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """The arguments, with `choices` as the pipeline takes them: captions, or the texts of each gap by its name."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if getattr(args, "choices", None) is None:
        return args
    if args.infill is None:
        args.choices = [text for texts in args.choices for text in texts]
        return args
    names = [name for name, *_ in args.choices]
    if len(set(names)) < len(names):
        parser.error(f"argument --choices: each gap of --infill takes one list of texts, got those of {names}")
    args.choices = {name: texts for name, *texts in args.choices}
    return args


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The arguments among `names` that were given: the model has defaults for the others."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def make_captioner(args: argparse.Namespace) -> Any:
    from transformers import pipeline

    from modeling_tdd import TDDForCaptioning, TDDProcessor

    model, processor = TDDForCaptioning.from_pretrained(args.model), TDDProcessor.from_pretrained(args.model)
    # Transformers' types know its own tasks alone
    return pipeline("image-captioning", model=model, processor=processor, device=args.device)  # type: ignore[call-overload]


def load_captioner(args: argparse.Namespace) -> "Describe":
    captioner = make_captioner(args)
    arguments = given(args, "text", "infill", "choices", "num_inference_steps", "guidance_scale", "seed")
    arguments |= given(args, "num_return_sequences", "num_candidates", "do_sample")

    def describe(image: "Image") -> tuple[dict[str, Any], list[str]]:
        captions = captioner(image, **arguments)
        return {"captions": captions}, [line for caption in captions for line in caption_lines(caption)]

    return describe


def caption_lines(caption: dict[str, Any]) -> list[str]:
    """A caption, with its score where captions were ranked, and a line for each gap with choices."""
    score = f" ({caption['score']:.3f})" if "score" in caption else ""
    gaps = {name: texts for name, texts in caption.get("choices", {}).items() if isinstance(texts, dict)}
    return [caption["generated_text"] + score, *(f"  {name}: {with_scores(texts)}" for name, texts in gaps.items())]


def with_scores(scores: dict[str, float]) -> str:
    """Texts with their scores, the likeliest first."""
    ranked = sorted(scores.items(), key=lambda item: -item[1])
    return ", ".join(f"{text} ({score:.3f})" for text, score in ranked)


def load_classifier(args: argparse.Namespace) -> "Describe":
    from transformers import AutoImageProcessor, pipeline

    from modeling_tdd import TDDForImageClassification

    model = TDDForImageClassification.from_pretrained(args.model)
    processor = AutoImageProcessor.from_pretrained(args.model)
    classifier = pipeline("image-classification", model=model, image_processor=processor, device=args.device)

    def describe(image: "Image") -> tuple[dict[str, Any], list[str]]:
        for name, value in given(args, "num_inference_steps", "guidance_scale").items():
            setattr(model.config, name, value)  # the pipeline takes none
        labels = classifier(image, top_k=args.top_k)
        return {"labels": labels}, [with_scores({label["label"]: label["score"] for label in labels})]

    return describe


def load_denoising(args: argparse.Namespace) -> "Describe":
    captioner = make_captioner(args)
    model, processor = captioner.model, captioner.processor

    from modeling_tdd.evaluation.trajectories import denoising_frames

    def describe(image: "Image") -> tuple[dict[str, Any], list[str]]:
        inputs = processor(images=image, **given(args, "text", "infill"), return_tensors="pt").to(model.device)
        arguments = given(args, "num_inference_steps", "guidance_scale", "seed")
        outputs = model.generate(**inputs, **arguments, return_dict_in_generate=True, output_trajectory=True)
        frames = denoising_frames(outputs, model.config, partial(processor.decode, skip_special_tokens=True))
        steps = [{"timestep": frame.timestep, "caption": frame.caption, "entropy": frame.entropy} for frame in frames]
        return {"steps": steps}, [f"t = {frame.timestep:4d}  {frame.caption}" for frame in frames]

    return describe


def complain(error: Exception | str) -> None:
    print(f"tdd: {error}", file=sys.stderr)


def run(args: argparse.Namespace) -> int:
    """Serves the images one after the other. Returns the exit status."""
    from transformers.utils import logging

    import modeling_tdd

    logging.disable_progress_bar()
    try:
        describe = args.load(args)
    except (OSError, RuntimeError, ValueError) as error:  # no such model, no such device, no model of that kind
        complain(f"The model {args.model!r} cannot be loaded: {error}")
        return 1
    status = 0
    for name in args.images:
        try:
            image = modeling_tdd.open_image(name if name.startswith(("http://", "https://")) else Path(name))
        except ValueError as error:
            complain(error)
            status = 1
            continue
        try:
            record, lines = describe(image)
        except ValueError as error:  # of an argument
            complain(error)
            return 2
        if args.json:
            lines = [json.dumps({"image": name, **record}, ensure_ascii=False)]
        elif len(args.images) > 1:
            lines = [f"{name}: {line}" for line in lines]
        print(*lines, sep="\n", flush=True)
    return status


def main(arguments: list[str] | None = None) -> int:
    """Runs the command with `arguments`, by default those of the process. Returns the exit status."""
    args = parse_args(arguments)
    try:
        return run(args)
    except BrokenPipeError:  # as in `tdd ... | head -1`; Python would complain once more when it closes the stream
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
