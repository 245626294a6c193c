# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The command-line arguments that the training scripts share."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


CORRUPTIONS = {"tdd": "gaussian", "mdd": "mask"}


def add_resume_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|none|PATH",
        help="resume from the run's last checkpoint if there is one (auto, the default), start anew (none), or resume "
        "from the checkpoint PATH; later checkpoints of the run are removed",
    )


def parse_comparison_args(description: str, example: str, other_methods: Sequence[str] = ()) -> argparse.Namespace:
    r"""
    Parses the arguments of a script that compares methods.

    Args:
        description (`str`): The description of the script, such as its docstring.
        example (`str`): A recipe that the help names as an example.
        other_methods (`Sequence[str]`, *optional*): Methods other than the keys of `CORRUPTIONS`.

    Returns:
        `argparse.Namespace`: `recipe`, `methods` (`None` where not given, see [`recipe_method`]), `seeds`,
        `output_dir`, `resume` and `set`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help=f"YAML file, such as {example}")
    methods = [*CORRUPTIONS, *other_methods]
    parser.add_argument("--methods", nargs="+", choices=methods, help="what to train; the recipe's by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="one run per method and seed")
    parser.add_argument("--output-dir", type=Path, help="default: outputs/<name of the recipe>")
    add_resume_argument(parser)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="such as training.epochs=5")
    args = parser.parse_args()
    if args.resume not in ("auto", "none") and len(args.methods or [None]) * len(args.seeds) > 1:
        parser.error(f"--resume {args.resume} is a checkpoint of one run: give one method and one seed")
    return args


def recipe_method(model: dict[str, Any]) -> str:
    """The method that a recipe's section `model` configures: a key of `CORRUPTIONS`."""
    corruption = model.get("corruption", CORRUPTIONS["tdd"])
    methods = {value: key for key, value in CORRUPTIONS.items()}
    if corruption not in methods:
        raise ValueError(f"`model.corruption` must be one of {', '.join(methods)}, got {corruption!r}.")
    return methods[corruption]
