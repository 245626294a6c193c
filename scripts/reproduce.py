"""Reproduce the paper's tables and figures: train what is missing, evaluate it, and write the report.

    python scripts/reproduce.py table1 fig3 --data cifar10
    python scripts/reproduce.py all --data emoji
    python scripts/reproduce.py table1 --data imagenet --budget gpu --plan

It first says what it will train and how long that takes. Stopped, the same command goes on. The reports are in
docs/results/reproduce/<data>: JSON, Markdown, PNG and SVG. The pictures of CIFAR-10 and Fashion-MNIST are read from
scripts/data/<data> (see `prepare_splits`), or loaded from the Hub. The classifiers of CIFAR-10 need the encoder that
`scripts/import_encoder.py` makes.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from train import run

from modeling_tdd.evaluation.claims import CAPTION_ELEMENTS, CLASSIFIER_ELEMENTS, SETTINGS, VARIANTS, Setting
from modeling_tdd.evaluation.classifiers import describe_classifier
from modeling_tdd.evaluation.public_data import HUB_NAMES, prepare_splits
from modeling_tdd.evaluation.reports import write_classifier_report
from modeling_tdd.modeling_tdd import TDDForImageClassification
from modeling_tdd.training.callbacks import last_complete_checkpoint
from modeling_tdd.training.features import read_features
from modeling_tdd.training.recipe import Recipe, load_recipe
from modeling_tdd.training.results import write_json
from modeling_tdd.training.tasks import Task, is_cached, make_task


RECIPES, DATA = Path(__file__).parent / "recipes", Path(__file__).parent / "data"
ELEMENTS = (*CLASSIFIER_ELEMENTS, *CAPTION_ELEMENTS)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("elements", nargs="+", choices=[*ELEMENTS, "all"], help="tables and figures of the paper")
    parser.add_argument("--data", choices=[*SETTINGS], default="cifar10", help="data set; default: cifar10")
    parser.add_argument("--budget", choices=["cpu", "gpu"], default="cpu", help="size of the trainings; default: cpu")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side, each in a process of its own")
    parser.add_argument("--plan", action="store_true", help="only say what would be trained, and how long it takes")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/reproduce"), help="folder of the trainings")
    parser.add_argument("--report-dir", type=Path, default=Path("docs/results/reproduce"), help="folder of reports")
    return parser.parse_args()


@dataclass(frozen=True)
class Training:
    """One run of `scripts/train.py`: a variant of a setting with a seed."""

    setting: Setting
    variant: str
    seed: int
    folder: Path

    def recipe(self) -> Recipe:
        variant = VARIANTS[self.variant]
        if self.setting.uses_variant_recipes:
            return load_recipe(RECIPES / variant.recipe)
        return load_recipe(RECIPES / self.setting.recipe, list(variant.overrides))

    def run(self) -> None:
        if not (self.folder / "result.json").exists():
            run(self.recipe(), VARIANTS[self.variant].method, self.seed, self.folder, restart=False)


def plan(elements: list[str], data: str, budget: str, output_dir: Path) -> list[Training]:
    """All trainings that classifiers' tables and figures need, setting by setting, in the order of the seeds."""
    wanted = {variant for element in elements for variant in CLASSIFIER_ELEMENTS.get(element, ())}
    return [
        Training(setting, variant, seed, output_dir / data / f"{name}-{variant}-seed{seed}")
        for name, setting in SETTINGS[data].items()
        if setting.budget == budget
        for seed in range(setting.num_seeds)
        for variant in setting.variants
        if variant in wanted
    ]


def say_plan(trainings: list[Training], jobs: int) -> list[Training]:
    """Prints what is missing and how long it takes, and returns it."""
    missing = [training for training in trainings if not (training.folder / "result.json").exists()]
    minutes = sum(training.setting.minutes for training in missing) / jobs
    print(f"{len(trainings)} trainings, of which {len(missing)} are missing: about {minutes:.0f} minutes.")
    for training in missing:
        print(f"  {training.folder.name}: about {training.setting.minutes:g} minutes")
    return missing


def evaluate(trainings: list[Training]) -> None:
    """Writes the evaluation of each training that lacks one, on the test split. The data are read once per setting."""
    tasks: dict[str, tuple[Task, list]] = {}
    for training in trainings:
        file = training.folder / "evaluation.json"
        if file.exists() or not (training.folder / "result.json").exists():
            continue
        recipe = training.recipe()
        key = json.dumps(recipe.to_dict()["data"])
        if key not in tasks:
            task = make_task(recipe, VARIANTS[training.variant].method, training.folder.parent / "features")
            rows = task.eval_data[recipe.data.eval_splits[-1]]
            size = recipe.training.get("per_device_eval_batch_size", 64)
            batches = [rows[start : start + size] for start in range(0, len(rows), size)]
            examples = [[dict(zip(b, values)) for values in zip(*b.values())] for b in batches]
            tasks = {key: (task, [task.eval_collator(batch) for batch in examples])}
        report, training_folder = {}, training.folder.with_name(f"{training.folder.name}-training")
        for name, checkpoint in (("best", training.folder), ("last", last_complete_checkpoint(training_folder))):
            model = TDDForImageClassification.from_pretrained(checkpoint)
            if is_cached(recipe):
                read_features(model)
            report[name], correct = describe_classifier(model, tasks[key][1])
            report[name]["correct"] = "".join(map(str, correct.astype(int)))
        state = json.loads((training_folder / "trainer_state.json").read_text())
        logs = [log for log in state["log_history"] if "eval_top1" in log]
        report["epochs"] = {name: [log[name] for log in logs] for name in ("epoch", "eval_top1", "eval_loss")}
        write_json(file, report)
        print(f"{training.folder.name}: test top-1 {100 * report['best']['top1']:.2f} %")


def main() -> None:
    args = parse_args()
    elements = [*ELEMENTS] if "all" in args.elements else args.elements
    trainings = plan(elements, args.data, args.budget, args.output_dir)
    missing = say_plan(trainings, args.jobs)
    if args.plan:
        return
    if args.data in HUB_NAMES:
        prepare_splits(args.data, DATA / args.data, DATA / "splits" / args.data)
    if args.jobs > 1:
        with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
            list(pool.map(Training.run, missing))
    for training in missing:
        training.run()
    evaluate(trainings)
    for element in (element for element in elements if element in CLASSIFIER_ELEMENTS):
        print(write_classifier_report(element, args.data, trainings, args.report_dir / args.data))


if __name__ == "__main__":
    main()
