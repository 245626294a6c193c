"""Reproduce the paper's tables and figures: train what is missing, evaluate it, and write the reports.

    python scripts/reproduce.py table1 fig3 --data cifar10
    python scripts/reproduce.py all --data emoji
    python scripts/reproduce.py table1 --data imagenet --budget gpu --plan

It first says what it will train and how long that takes on one core or one GPU. Stopped, the same command goes on.
Reports are JSON, Markdown, PNG and SVG in docs/results/reproduce/<data>, for `--budget gpu` in <data>_gpu; some are
not of the paper. Pictures of cifar10, fashion_mnist and stamps are read from scripts/data/<data>, see
`prepare_splits`, or, but for stamps, loaded from the Hub. Needed before: for cifar10 and stamps the encoder of
`scripts/import_encoder.py`, for emoji `scripts/train_clip.py` and the recipe `emoji_encoder_full.yaml`.
"""

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

from train import run

from modeling_tdd.evaluation.caption_reports import caption_images, score_captions, write_caption_figures, write_table3
from modeling_tdd.evaluation.claims import CAPTION_ELEMENTS, CAPTION_SETTINGS, CLASSIFIER_ELEMENTS, SETTINGS
from modeling_tdd.evaluation.public_data import HUB_NAMES, prepare_splits, prepare_stamps
from modeling_tdd.evaluation.reports import write_classifier_report
from modeling_tdd.training.data import load_captions
from modeling_tdd.training.recipe import load_recipe
from modeling_tdd.training.reproduction import Training, evaluate_corrupted, evaluate_trainings, plan_trainings


RECIPES, DATA = Path(__file__).parent / "recipes", Path(__file__).parent / "data"
ELEMENTS = (*CLASSIFIER_ELEMENTS, *CAPTION_ELEMENTS)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("elements", nargs="+", choices=[*ELEMENTS, "all"], help="tables and figures")
    parser.add_argument("--data", choices=[*SETTINGS, *CAPTION_SETTINGS], default="cifar10", help="default: cifar10")
    parser.add_argument("--budget", choices=["cpu", "gpu"], default="cpu", help="size of the trainings; default: cpu")
    parser.add_argument("--settings", nargs="+", help="such as frozen and scratch; default: all of data and budget")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side, each in a process of its own")
    parser.add_argument("--plan", action="store_true", help="only say what would be trained, and how long it takes")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/reproduce"), help="folder of the trainings")
    parser.add_argument("--report-dir", type=Path, default=Path("docs/results/reproduce"), help="folder of reports")
    args = parser.parse_args()
    unused = [name for name in ("budget", "settings", "jobs") if getattr(args, name) != parser.get_default(name)]
    if args.data in CAPTION_SETTINGS and unused:
        parser.error(f"the captions of {args.data} do not use {', '.join(f'--{name}' for name in unused)}")
    return args


def train(training: Training, recipes: Path) -> None:
    run(training.recipe(recipes), training.method, training.seed, training.folder, restart=False)
    evaluate_trainings([training], recipes)


def end_with_parent() -> None:
    """Ends this worker as soon as the program is gone: its training would go on, beside that of the next command."""

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def say_plan(trainings: Sequence[Training], jobs: int) -> list[Training]:
    """Prints which trainings are missing and how long they take, and returns them."""
    missing = [training for training in trainings if not training.is_done]
    minutes = sum(training.setting.minutes for training in missing) / jobs
    print(f"{len(trainings)} trainings, of which {len(missing)} are missing: about {minutes:.0f} minutes.")
    for training in missing:
        print(f"  {training.folder.name}: about {training.setting.minutes:g} minutes")
    return missing


def reproduce_classifiers(args: argparse.Namespace, elements: Sequence[str]) -> None:
    names = [name for name, setting in SETTINGS[args.data].items() if setting.budget == args.budget]
    if unknown := set(args.settings or ()) - set(names):
        raise SystemExit(f"--settings {' '.join(sorted(unknown))}: {args.data} has {', '.join(names) or 'none'}.")
    trainings = plan_trainings(elements, args.data, args.settings or names, args.output_dir)
    missing = say_plan(trainings, args.jobs)
    if args.plan:
        return
    if args.data in HUB_NAMES:
        prepare_splits(args.data, DATA / args.data, DATA / "splits" / args.data)
    if args.jobs > 1:
        with ProcessPoolExecutor(args.jobs, get_context("spawn"), end_with_parent) as pool:
            list(pool.map(partial(train, recipes=RECIPES), missing))
    else:
        for training in missing:
            train(training, RECIPES)
    evaluate_trainings(trainings, RECIPES)  # what a stop left without
    if "robustness" in elements:
        evaluate_corrupted(trainings, RECIPES)
    report_dir = args.report_dir / (args.data if args.budget == "cpu" else f"{args.data}_gpu")
    for element in elements:
        print(write_classifier_report(element, args.data, [training.folder for training in trainings], report_dir))


def reproduce_captions(args: argparse.Namespace, elements: Sequence[str]) -> None:
    setting, report_dir = CAPTION_SETTINGS[args.data], args.report_dir / args.data
    runs = {(method, seed): args.output_dir / args.data / f"{method}-seed{seed}" for method, seed in setting.runs}
    missing = [run for run, folder in runs.items() if not (folder / "result.json").exists()]
    print(f"{len(runs)} captioners, {len(missing)} missing: about {setting.minutes * len(missing):.0f} minutes.")
    if args.plan:
        return
    if args.data == "stamps":
        prepare_stamps(DATA / args.data, DATA / "splits" / args.data)
    recipe = load_recipe(RECIPES / setting.recipe)
    for method, seed in missing:
        tuned = load_recipe(RECIPES / setting.recipe, [*setting.mdd]) if method == "mdd" else recipe
        run(tuned, method, seed, runs[method, seed], restart=False)
    folders = {name: [folder for (method, _), folder in runs.items() if method == name] for name in setting.methods}
    folders |= {name: [Path(folder)] for name, folder in setting.others.items()}
    splits = load_captions(recipe.data)
    if "table3" in elements:
        captions = {split: caption_images(splits[split], folders) for split in setting.splits}
        results = {split: score_captions(splits[split], captions[split], setting.clip) for split in captions}
        about: dict[str, Any] = {"recipe": setting.recipe, "tuning of MDD": setting.mdd, "CLIP": setting.clip}
        if (quality := Path(setting.clip or "", "retrieval.json")).exists():
            about["retrieval of held-out pairs"] = json.loads(quality.read_text())
        command = f"python scripts/reproduce.py table3 --data {args.data}"
        print(write_table3(results, about, command, report_dir))
    write_caption_figures(elements, splits[setting.splits[-1]], folders, report_dir)


def main() -> None:
    args = parse_args()
    allowed = CLASSIFIER_ELEMENTS if args.data in SETTINGS else CAPTION_ELEMENTS
    elements = [*allowed] if "all" in args.elements else args.elements
    if unfit := set(elements) - set(allowed):
        raise SystemExit(f"{', '.join(sorted(unfit))}: {args.data} has {', '.join(allowed)}.")
    (reproduce_classifiers if args.data in SETTINGS else reproduce_captions)(args, elements)


if __name__ == "__main__":
    main()
