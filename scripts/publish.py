"""Publish a trained run on the Hugging Face Hub: weights, processor, code, and a model card with its results.

    python scripts/publish.py outputs/emoji/tdd-seed0 --repo-id USER/NAME

Everything is uploaded as one commit, so a failed upload leaves the repository as it was. The runs beside the folder,
with other seeds or methods, go into the card's tables and plot. Needs matplotlib: pip install -e ".[train,demo]"
"""

import argparse
import sys
import tempfile
from pathlib import Path

from transformers import PreTrainedModel

from modeling_tdd.evaluation.scoring import load_checkpoint
from modeling_tdd.evaluation.step_curves import plot_scores
from modeling_tdd.publishing.hub import upload
from modeling_tdd.publishing.model_card import CARD_FILE, PLOT_FILE, make_card, read_runs, without_machine_paths


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a run folder, such as outputs/emoji/tdd-seed0")
    parser.add_argument("--repo-id", help="USER/NAME on the Hub; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="make the new repository private")
    parser.add_argument("--runs", nargs="+", type=Path, help="other seeds and baselines; default: those beside it")
    parser.add_argument("--dry-run", action="store_true", help="only write the card into the folder")
    args = parser.parse_args()
    if args.repo_id is None and not args.dry_run:
        parser.error("--repo-id is needed to upload; --dry-run writes the card alone")
    return args


def write_card(args: argparse.Namespace, model: PreTrainedModel, target: Path) -> None:
    results = read_runs(args.folder, args.runs)
    defaults = model.generation_config if model.can_generate() else model.config
    repo_id = args.repo_id or without_machine_paths(args.folder.as_posix())
    card = make_card(results, model.config.to_dict(), model.num_parameters(), repo_id, defaults.num_inference_steps)
    plot_scores(results).savefig(target / PLOT_FILE, dpi=120)
    card.save(target / CARD_FILE)


def main() -> None:
    args = parse_args()
    model, processor = load_checkpoint(args.folder)
    if args.dry_run:
        write_card(args, model, args.folder)
        print(f"Wrote {args.folder / CARD_FILE} and {args.folder / PLOT_FILE}; nothing was uploaded.")
        return
    with tempfile.TemporaryDirectory() as target:
        model.save_pretrained(target)  # with the code of this version
        processor.save_pretrained(target)
        write_card(args, model, Path(target))
        print(f"Published {upload(Path(target), args.repo_id, args.private)}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(str(error))
