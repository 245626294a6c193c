"""Plot the quality of captions or classifications against denoising steps, and write the same figures as a table.

    python scripts/plot_steps.py outputs/emoji_full/*-seed* outputs/emoji_full_cosine/tdd-seed* --output steps.png
    python scripts/plot_steps.py outputs/input_*_coefficient/tdd-seed* --output fig5.png

The second command is for the runs of `scripts/recipes/fig5`. Runs that differ in how the input or the loss is weighted
have lines of their own, and the legend names the difference. Needs matplotlib: pip install -e ".[demo]"
"""

import argparse
from pathlib import Path

from modeling_tdd.evaluation.step_curves import plot_scores, read_results, score_table, splits_of


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of runs, all seeds and methods")
    parser.add_argument("--output", type=Path, default=Path("steps.png"), help="the plot; the table is beside it, .md")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    # A pattern such as `*-seed*` also names the folders of checkpoints and logs beside those of the runs.
    results = read_results(folder for folder in args.folders if not folder.name.endswith("-training"))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    plot_scores(results).savefig(args.output, dpi=150)
    tables = "\n\n".join(f"### {split}\n\n{score_table(results, split)}" for split in splits_of(results))
    table_file = args.output.with_suffix(".md")
    table_file.write_text(tables + "\n")
    print(f"{tables}\n\nsaved {args.output} and {table_file}")


if __name__ == "__main__":
    main()
