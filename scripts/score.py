"""Print the scores of finished runs, or score checkpoints on a data set; and plot quality against denoising steps.

    python scripts/score.py outputs/emoji_full/*-seed* outputs/emoji_full_cosine/tdd-seed* --plot steps.png
    python scripts/score.py checkpoints/emoji-captions --data scripts/data/emoji_mini/validation.parquet --steps 1 10

Without --data the scores are those of each run's result.json: mean and standard deviation over seeds. Runs that differ
in how the input or the loss is weighted, such as those of `scripts/recipes/fig5`, have lines of their own.

With --data, each checkpoint of TDD or MDD classifies or captions the images of a parquet file with the columns `image`
and `label`, `caption` or `captions`, or of what `datasets.load_dataset` finds by a name or a folder. --without-noise
repeats it with every draw of the noise replaced by zeros, and says what share of the predictions that changes.

The plot needs matplotlib: pip install -e ".[train,demo]"; --coco needs ".[train,eval]"
"""

# Not called evaluate.py: beside train.py that name would hide the package `evaluate`.
import argparse
import json
from pathlib import Path
from typing import Any

from modeling_tdd.evaluation.step_curves import plot_scores, read_results, score_tables


ONLY_WITH_DATA = ("split", "num_images", "steps", "guidance", "without_noise", "coco", "output")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", help="folders of runs, all seeds and methods; with --data, checkpoints")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the scores; the table is beside it, .md")
    parser.add_argument("--data", help="a parquet file, or a folder or data set of images, to score checkpoints on")
    parser.add_argument("--split", help="the split of the data; needed unless it is a file")
    parser.add_argument("--num-images", type=int, help="the first images only; default: all")
    parser.add_argument("--steps", nargs="+", type=int, help="numbers of denoising steps; default: 10")
    parser.add_argument("--guidance", nargs="+", type=float, help="guidance scales; default: 1, no guidance")
    parser.add_argument("--without-noise", action="store_true", help="repeat it with the noise replaced by zeros")
    parser.add_argument("--coco", action="store_true", help="BLEU-4 and CIDEr of captions too")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the scores as JSON")
    args = parser.parse_args()
    unused = [f"--{name.replace('_', '-')}" for name in ONLY_WITH_DATA if getattr(args, name)]
    if args.data is None and unused:
        parser.error(f"{', '.join(unused)} need --data")
    if args.data is not None and args.split is None and not Path(args.data).is_file():
        parser.error(f"{args.data} is no file, so it needs --split")
    return args


def score_checkpoints(args: argparse.Namespace) -> list[dict[str, Any]]:
    from datasets import load_dataset

    from modeling_tdd.evaluation.scoring import score_checkpoint

    if Path(args.data).is_file():
        data = load_dataset("parquet", data_files=args.data, split=args.split or "train")
    else:
        data = load_dataset(args.data, split=args.split)
    data = data.select(range(min(len(data), args.num_images or len(data))))
    print(f"{len(data)} images of {args.data}, in %:\n")
    return [
        score_checkpoint(
            checkpoint,
            data,
            split=args.split or Path(args.data).stem,
            grid=[
                {"num_inference_steps": steps, "guidance_scale": scale}
                for scale in args.guidance or [1.0]
                for steps in args.steps or [10]
            ],
            metrics=["coco_captions"] if args.coco else [],
            compare_without_noise=args.without_noise,
        )
        for checkpoint in args.paths
    ]


def main() -> None:
    args = parse_args()
    if args.data is None:
        # A pattern such as `*-seed*` also names the folders of checkpoints and logs beside those of the runs.
        results = read_results(Path(path) for path in args.paths if not Path(path).name.endswith("-training"))
    else:
        results = score_checkpoints(args)
    tables = score_tables(results)
    print(tables)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    if args.plot is not None:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        plot_scores(results).savefig(args.plot, dpi=150)
        table_file = args.plot.with_suffix(".md")
        table_file.write_text(tables + "\n")
        print(f"\nsaved {args.plot} and {table_file}")


if __name__ == "__main__":
    main()
