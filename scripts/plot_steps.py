"""Plot caption quality against denoising steps, and write the same figures as a table.

    python scripts/plot_steps.py outputs/emoji_full/*-seed* outputs/emoji_full_cosine/tdd-seed* --output steps.png

Needs matplotlib: pip install -e ".[demo]"
"""

import argparse
from pathlib import Path

from modeling_tdd.evaluation.step_curves import plot_scores, read_results, score_table, splits_of


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="of runs of train_captioning.py, all seeds and methods")
    parser.add_argument("--output", type=Path, default=Path("steps.png"), help="the plot; the table is beside it, .md")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    results = read_results(args.folders)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    plot_scores(results).savefig(args.output, dpi=150)
    tables = "\n\n".join(f"### {split}\n\n{score_table(results, split)}" for split in splits_of(results))
    table_file = args.output.with_suffix(".md")
    table_file.write_text(tables + "\n")
    print(f"{tables}\n\nsaved {args.output} and {table_file}")


if __name__ == "__main__":
    main()
