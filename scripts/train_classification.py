"""Train image classifiers by a recipe, both TDD and its baseline MDD, and print their accuracies side by side.

    python scripts/train_classification.py scripts/recipes/digits.yaml --methods tdd mdd --seeds 0 1 2

Each pair of a method and a seed is a run with its own result file. A repeated command does only the missing runs.
"""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import ViTImageProcessor, pipeline

from modeling_tdd import TDDConfig, TDDForImageClassification
from modeling_tdd.training.cli import CORRUPTIONS, parse_comparison_args, recipe_method
from modeling_tdd.training.data import (
    EvalCollator,
    TrainCollator,
    build_mixup,
    build_train_transform,
    load_classification_data,
)
from modeling_tdd.training.examples import ReadLabelled
from modeling_tdd.training.loop import make_accelerator, make_loader, train
from modeling_tdd.training.recipe import EvaluationRecipe, Recipe, load_recipe
from modeling_tdd.training.results import (
    markdown_table,
    mean_and_spread,
    save_checkpoint,
    training_folder,
    write_json,
)
from modeling_tdd.training.streaming import make_stream_loader, report_problems


@torch.inference_mode()
def accuracy(accelerator: Accelerator, model: TDDForImageClassification, loader: DataLoader, **settings: Any) -> float:
    """Top-1 accuracy on the data of a loader, over all processes."""
    model.eval()
    correct = total = 0
    for batch in loader:
        with accelerator.autocast():
            logits = model(batch["pixel_values"], **settings).logits
        hits = accelerator.gather_for_metrics(logits.argmax(-1) == batch["labels"])
        correct, total = correct + hits.sum().item(), total + len(hits)
    return correct / total


def accuracy_grid(
    accelerator: Accelerator, model: TDDForImageClassification, loader: DataLoader, grid: EvaluationRecipe
) -> list[dict[str, float]]:
    """Top-1 accuracy for each number of steps and each guidance scale. MDD has one step and no guidance."""
    if model.config.corruption == "mask":
        return [{"num_inference_steps": 1, "guidance_scale": 1.0, "top1": accuracy(accelerator, model, loader)}]
    settings = [
        {"num_inference_steps": steps, "guidance_scale": scale}
        for scale in grid.guidance_scale
        for steps in grid.num_inference_steps
    ]
    return [{**setting, "top1": accuracy(accelerator, model, loader, **setting)} for setting in settings]


def run(recipe: Recipe, method: str, seed: int, folder: Path, resume: str) -> None:
    """Trains one model and saves it to `folder`. At the end it writes the accuracies to `folder/result.json`."""
    set_seed(seed)
    accelerator = make_accelerator(recipe.training, training_folder(folder))
    train_data, eval_data, names = load_classification_data(recipe.data)
    image_processor = ViTImageProcessor(**recipe.image_processor, do_convert_rgb=True)
    config = TDDConfig(
        **{**recipe.model, "corruption": CORRUPTIONS[method]},
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    model = TDDForImageClassification(config)
    accelerator.print(f"{method}, seed {seed}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    collate = TrainCollator(
        build_train_transform(recipe.augmentation, image_processor), build_mixup(recipe.augmentation, len(names))
    )
    if recipe.data.streaming:
        read = ReadLabelled(len(names))
        train_loader = make_stream_loader(accelerator, recipe.training, recipe.data, train_data, read, collate, seed)
    else:
        train_loader = make_loader(accelerator, recipe.training, train_data, collate, shuffle=True, seed=seed)
    eval_loader = make_loader(accelerator, recipe.training, eval_data, EvalCollator(image_processor), shuffle=False)
    model = train(
        accelerator,
        recipe.training,
        model,
        train_loader,
        evaluate=lambda model: accuracy(accelerator, model, eval_loader),
        description=f"{method} seed {seed}",
        seed=seed,
        resume=resume,
    )
    if recipe.data.streaming:
        report_problems(accelerator, train_loader)
    grid = accuracy_grid(accelerator, model, eval_loader, recipe.evaluation)
    if accelerator.is_main_process:
        save_checkpoint(folder, model, image_processor)
        result = {"method": method, "seed": seed, "recipe": recipe.to_dict(), "accuracy": grid}
        write_json(folder / "result.json", result)
    accelerator.wait_for_everyone()


def result_table(results: list[dict[str, Any]]) -> str:
    """Top-1 accuracy in percent, as mean and standard deviation over seeds. The table has one row per method and
    guidance scale, and one column per number of steps."""
    cells: dict[tuple[str, float], dict[int, list[float]]] = {}
    for result in results:
        for entry in result["accuracy"]:
            row = cells.setdefault((result["method"], entry["guidance_scale"]), {})
            row.setdefault(entry["num_inference_steps"], []).append(entry["top1"])
    steps = sorted({steps for row in cells.values() for steps in row})
    header = ["method", "guidance", *(f"{count} step{'s' if count > 1 else ''}" for count in steps)]
    rows = [
        [method, f"{scale:g}", *(mean_and_spread(row[count]) if count in row else "" for count in steps)]
        for (method, scale), row in cells.items()
    ]
    return markdown_table(header, rows)


def show_prediction(folder: Path, eval_data: Dataset) -> None:
    """Classifies a held-out image with the saved checkpoint, as a user would: from a file, by a pipeline."""
    example = eval_data[0]
    file = folder / "example.png"
    example["image"].save(file)
    top = pipeline("image-classification", model=str(folder))(str(file), top_k=1)[0]
    label = eval_data.features["label"].int2str(example["label"])
    print(f'\npipeline("image-classification", model="{folder}")("{file}")\n  -> {top}   (true label: {label})')


def main() -> None:
    args = parse_comparison_args(__doc__, "scripts/recipes/digits.yaml")
    state = PartialState(cpu=not torch.accelerator.is_available())
    recipe = load_recipe(args.recipe, args.set)
    output_dir = args.output_dir or Path("outputs") / recipe.name
    methods = args.methods or [recipe_method(recipe.model)]
    folders = {(m, s): output_dir / f"{m}-seed{s}" for m in methods for s in args.seeds}
    for (method, seed), folder in folders.items():
        if (folder / "result.json").exists():
            state.print(f"{folder} is done already.")
        else:
            run(recipe, method, seed, folder, args.resume)
    if state.is_main_process:
        results = [json.loads((folder / "result.json").read_text()) for folder in folders.values()]
        table = result_table(results)
        (output_dir / "results.md").write_text(table + "\n")
        print(f"\nTop-1 on held-out images in %, {len(args.seeds)} seed(s):\n\n{table}")
        show_prediction(next(iter(folders.values())), load_classification_data(recipe.data)[1])


if __name__ == "__main__":
    main()
