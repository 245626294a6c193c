"""Train by a recipe: classifiers, captioners and image encoders, from scratch or from a checkpoint.

    python scripts/train.py scripts/recipes/digits.yaml --methods tdd mdd --seeds 0 1 2
    python scripts/train.py scripts/recipes/emoji.yaml --methods tdd mdd ar nearest
    python scripts/train.py scripts/recipes/finetune.yaml --set checkpoint=checkpoints/digits data.path=digits
    accelerate launch --config_file scripts/accelerate/ddp_8gpu_bf16.yaml scripts/train.py RECIPE

Each pair of a method and a seed is a run with its own folder. A repeated command does what is missing: it resumes a
run from its last checkpoint, and leaves finished runs alone. `ar` is an autoregressive captioner of the same size, and
`nearest` takes the caption of the most similar training picture.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed

from modeling_tdd.evaluation.step_curves import read_results, score_tables
from modeling_tdd.training.arguments import TDDTrainingArguments
from modeling_tdd.training.folders import locked, remove, write_json, write_text
from modeling_tdd.training.lora import add_lora
from modeling_tdd.training.recipe import Recipe, load_recipe
from modeling_tdd.training.results import check_same_run, save_checkpoint
from modeling_tdd.training.tasks import Task, has_steps, make_task, methods_of, score_nearest
from modeling_tdd.training.trainer import TDDTrainer


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="YAML file, such as scripts/recipes/digits.yaml")
    parser.add_argument("--methods", nargs="+", help="tdd, mdd, uniform, ar, nearest; default: the recipe's")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="one run per method and seed")
    parser.add_argument("--output-dir", type=Path, help="default: outputs/<name of the recipe>")
    parser.add_argument("--restart", action="store_true", help="start unfinished runs anew, without their checkpoints")
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="recipe settings")
    return parser.parse_args()


def run(recipe: Recipe, method: str, seed: int, folder: Path, restart: bool) -> None:
    """Trains a model, and saves it with its scores to `folder`. Checkpoints and log are in `<folder>-training`."""
    training_folder = folder.with_name(f"{folder.name}-training")
    args = TDDTrainingArguments(**{"output_dir": str(training_folder), "seed": seed, **recipe.training})
    result = {"method": method, "seed": seed, "recipe": recipe.to_dict()}
    with args.main_process_first(desc="preparing the run"):
        if restart and args.process_index == 0:
            for name in ("checkpoint-*", "runs", "trainer_state.json", "run.json"):  # which says whose the others are
                for path in training_folder.glob(name):
                    remove(path)
        check_same_run(training_folder / "run.json", result)
        set_seed(seed)
        task = make_task(recipe, method, folder.parent / "features")
    grids = [recipe.evaluation.grid(is_first) for is_first in (True, False)] if has_steps(recipe, method) else []
    steps = max((settings["num_inference_steps"] for grid in grids for settings in grid), default=1)
    if steps > task.model.config.num_timesteps:  # and not after hours of training
        raise ValueError(f"`evaluation.num_inference_steps` must be at most `num_timesteps`, got {steps}.")
    trainer = make_trainer(recipe, task, args)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or True)
    if trainer.stop.signal:
        raise SystemExit(128 + trainer.stop.signal)
    if recipe.lora is not None:
        if args.process_index == 0:
            save_checkpoint(folder.with_name(f"{folder.name}-adapter"), trainer.model, task.processor)
        trainer.model = trainer.model_wrapped = trainer.model.merge_and_unload()
    scores = score(trainer, task, recipe, method)
    weights = trainer.accelerator.get_state_dict(trainer.model)  # gathered, where they are sharded
    if args.process_index == 0:
        prefix = next(f"{name}." for name, module in task.model.named_modules() if module is task.saved).lstrip(".")
        weights = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        save_checkpoint(folder, task.saved, task.processor, weights)
        trainer.save_state()
        write_json(folder / "result.json", {**result, "scores": scores})
    trainer.accelerator.wait_for_everyone()


def make_trainer(
    recipe: Recipe,
    task: Task,
    args: TDDTrainingArguments,
    trainer_class: type[TDDTrainer] = TDDTrainer,
    **kwargs: Any,
) -> TDDTrainer:
    """The trainer of a task. `kwargs` are what `trainer_class` takes beside the arguments of [`TDDTrainer`]."""
    task.model.float()  # a checkpoint may be in half precision, in which small steps are rounded away
    model = task.model if recipe.lora is None else add_lora(task.model, recipe.lora, task.new_modules)
    if args.process_index == 0:
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
        print(f"{type(task.model).__name__}: {trainable:.2f} M trainable parameters")
    split = next(iter(task.eval_data))
    return trainer_class(
        model,
        args,
        train_dataset=task.train_data,
        eval_dataset=task.eval_data[split],
        data_collator=task.collator,
        eval_collator=task.eval_collator,
        compute_metrics=task.metrics[split],
        processing_class=task.processor,
        **kwargs,
    )


def score(trainer: TDDTrainer, task: Task, recipe: Recipe, method: str) -> list[dict[str, Any]]:
    """The scores of each evaluation split: at all settings of the recipe, if the method has steps."""
    trainer.compute_metrics = None  # that of the first split
    scores = []
    for index, (split, rows) in enumerate(task.eval_data.items()):
        for settings in recipe.evaluation.grid(index == 0) if has_steps(recipe, method) else [{}]:
            trainer.settings = settings
            scores.append({"split": split, **settings, **task.metrics[split](trainer.predict(rows))})
    return scores


def main() -> None:
    args = parse_args()
    state = PartialState(cpu=not torch.accelerator.is_available())
    recipe = load_recipe(args.recipe, args.set)
    allowed = methods_of(recipe)
    methods = args.methods or allowed[:1]
    if unknown := set(methods) - set(allowed):
        raise SystemExit(f"--methods {' '.join(sorted(unknown))}: {args.recipe} can train {', '.join(allowed)}.")
    output_dir = args.output_dir or Path("outputs") / recipe.name
    # The nearest-neighbour baseline is not random and needs no second seed.
    runs = [(m, seed) for m in methods for seed in (args.seeds[:1] if m == "nearest" else args.seeds)]
    folders = {(method, seed): output_dir / f"{method}-seed{seed}" for method, seed in runs}
    for (method, seed), folder in folders.items():
        result = {"method": method, "seed": seed, "recipe": recipe.to_dict()}
        if (folder / "result.json").exists():
            check_same_run(folder / "result.json", result)
            state.print(f"{folder} is done already.")
        elif method != "nearest":
            with locked(folder) if state.is_main_process else nullcontext():
                run(recipe, method, seed, folder, args.restart)
        elif state.is_main_process:
            write_json(folder / "result.json", {**result, "scores": score_nearest(recipe, output_dir / "features")})
    if state.is_main_process:
        tables = score_tables(read_results(folders.values()))
        write_text(output_dir / "results.md", tables + "\n")
        print(f"\nScores in %, {len(args.seeds)} seed(s):\n\n{tables}")


if __name__ == "__main__":
    main()
