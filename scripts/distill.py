"""Distil a captioner into one that needs fewer steps, saved as an ordinary checkpoint that knows its steps.

    python scripts/distill.py scripts/recipes/emoji_distill.yaml --steps 1
    python scripts/distill.py scripts/recipes/emoji_distill.yaml --steps 2 --set checkpoint=my_teacher

The recipe's `checkpoint` is the teacher, whose own loop, of --teacher-steps and --teacher-guidance, makes the captions
to learn. It prints and saves the scores of the student beside those of its teacher.
"""

import argparse
from pathlib import Path

from accelerate.utils import set_seed
from train import make_trainer

from modeling_tdd import TDDForCaptioning
from modeling_tdd.evaluation.tables import markdown_table
from modeling_tdd.training.arguments import TDDTrainingArguments
from modeling_tdd.training.distillation import DistillationTrainer, make_student
from modeling_tdd.training.folders import write_json
from modeling_tdd.training.recipe import load_recipe
from modeling_tdd.training.results import check_same_run, save_checkpoint
from modeling_tdd.training.tasks import make_task


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="YAML file, such as scripts/recipes/emoji_distill.yaml")
    parser.add_argument("--steps", type=int, default=1, help="of the student; default: 1")
    parser.add_argument("--teacher-steps", type=int, default=10, help="default: 10")
    parser.add_argument("--teacher-guidance", type=float, default=1.0, help="guidance scale; default: 1, none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, help="default: outputs/<name of the recipe>/student-seed<seed>")
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="recipe settings")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    recipe = load_recipe(args.recipe, args.set)
    if recipe.task != "captioning" or recipe.checkpoint is None or recipe.lora is not None:
        raise SystemExit(f"{args.recipe} must have the task captioning, a `checkpoint`, the teacher, and no `lora`.")
    folder = args.output_dir or Path("outputs") / recipe.name / f"student-seed{args.seed}"
    training_folder = folder.with_name(f"{folder.name}-training")
    arguments = TDDTrainingArguments(**{"output_dir": str(training_folder), "seed": args.seed, **recipe.training})
    teacher_settings = {"num_inference_steps": args.teacher_steps, "guidance_scale": args.teacher_guidance}
    run = {"steps": args.steps, "teacher": teacher_settings, "seed": args.seed, "recipe": recipe.to_dict()}
    if (folder / "result.json").exists():
        check_same_run(folder / "result.json", run)
        raise SystemExit(f"{folder} is done already.")
    check_same_run(training_folder / "run.json", run)
    set_seed(args.seed)
    task = make_task(recipe, "tdd", folder.parent / "features")
    task.model = make_student(task.model, args.steps)
    trainer = make_trainer(
        recipe,
        task,
        arguments,
        DistillationTrainer,
        teacher=TDDForCaptioning.from_pretrained(recipe.checkpoint, **recipe.model),
        teacher_settings=teacher_settings,
        num_inference_steps=args.steps,
    )
    trainer.train(resume_from_checkpoint=True)
    if trainer.stop.signal:
        raise SystemExit(128 + trainer.stop.signal)
    trainer.compute_metrics = None  # that of the first split
    scores = []
    for name, model, settings in (("teacher", trainer.teacher, teacher_settings), ("student", trainer.model, {})):
        trainer.model = trainer.model_wrapped = model
        trainer.settings = settings
        for split, rows in task.eval_data.items():
            scores.append({"model": name, "split": split, **task.metrics[split](trainer.predict(rows))})
    save_checkpoint(folder, task.model, task.processor)
    write_json(folder / "result.json", {**run, "scores": scores})
    metrics = ("exact_match", "token_f1")
    rows = [[row["model"], row["split"], *(f"{100 * row[name]:.1f}" for name in metrics)] for row in scores]
    print(markdown_table(["model", "split", *(f"{name}, %" for name in metrics)], rows))


if __name__ == "__main__":
    main()
