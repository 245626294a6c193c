"""Publish a trained run on the Hugging Face Hub: weights, processor, code, and a model card with its results.

    python scripts/publish.py outputs/emoji/tdd-seed0 --repo-id USER/NAME

Everything is uploaded as one commit, so a failed upload leaves the repository as it was. Nothing else that lies in the
folder is uploaded but its README.md: a card that you wrote, or that `--dry-run` made and you changed. The runs beside
the folder, with other seeds or methods, go into the card's tables and plot. The token is that of `hf auth login` or of
the environment. Needs matplotlib: pip install -e ".[train,demo]"
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from transformers import PreTrainedModel

from modeling_tdd.evaluation.scoring import load_checkpoint
from modeling_tdd.evaluation.step_curves import plot_scores
from modeling_tdd.publishing.hub import upload
from modeling_tdd.publishing.model_card import CARD_FILE, PLOT_FILE, make_card, read_runs, without_secrets


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a run folder, such as outputs/emoji/tdd-seed0")
    parser.add_argument("--repo-id", help="USER/NAME on the Hub; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="make the new repository private")
    parser.add_argument("--runs", nargs="+", type=Path, help="other seeds and baselines; default: those beside it")
    parser.add_argument("--data-readme", type=Path, help="a text about the data for the card, such as their licence")
    parser.add_argument("--dry-run", action="store_true", help="only write the card into the folder")
    args = parser.parse_args()
    if args.repo_id is None and not args.dry_run:
        parser.error("--repo-id is needed to upload; --dry-run writes the card alone")
    return args


def write_card(args: argparse.Namespace, model: PreTrainedModel, target: Path) -> None:
    """Writes card and plot, without replacing a card of the user's."""
    results = read_runs(args.folder, args.runs)
    plot_scores(results).savefig(target / PLOT_FILE, dpi=120)
    own = args.folder / CARD_FILE
    if own.exists():
        print(f"The card is {own}, as it is. Without that file a new one is made.")
        if target != args.folder:
            shutil.copyfile(own, target / CARD_FILE)
        return
    defaults = model.generation_config if model.can_generate() else model.config
    repo_id = args.repo_id or without_secrets(args.folder.as_posix())
    about_data = None if args.data_readme is None else args.data_readme.read_text()
    config, size = model.config.to_dict(), model.num_parameters()
    card = make_card(results, config, size, repo_id, defaults.num_inference_steps, about_data)
    card.save(target / CARD_FILE)


def main() -> None:
    args = parse_args()
    model, processor = load_checkpoint(args.folder)
    if args.dry_run:
        write_card(args, model, args.folder)
        print(f"{args.folder} has {CARD_FILE} and {PLOT_FILE}; nothing was uploaded.")
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
