"""Measure what captioners can do beside captions: infilling, choices, confidence, best of several.

    python scripts/compare_captioners.py outputs/emoji_full/*-seed? --data scripts/data/emoji
    python scripts/compare_captioners.py checkpoints/emoji-captions --data scripts/data/emoji_mini --output-dir mini

The folders are runs of `train.py`, of any method and seed; --data has `train.parquet` and the splits. Each folder's
figures go into a JSON file as soon as they are there. A repeated command measures what is missing, and refuses a file
of other data. Then it prints the tables of all, means and standard deviations over the seeds, and draws the plot.
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from tqdm.auto import tqdm

from modeling_tdd.evaluation.captioners import load_captioner
from modeling_tdd.evaluation.constraint_reports import read_measured, write_reports
from modeling_tdd.evaluation.constraints import measure_captioner
from modeling_tdd.training.folders import write_json


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of captioners")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and the splits")
    parser.add_argument("--splits", nargs="+", default=["validation", "test_combo", "test_vendor"])
    parser.add_argument("--num-images", type=int, default=200, help="the first of each split; default: 200")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/constraints"), help="default: %(default)s")
    args = parser.parse_args()
    if len({folder.name for folder in args.folders}) < len(args.folders):
        parser.error(f"the folders need different names, as their files have, got {' '.join(map(str, args.folders))}")
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    files = {name: f"{args.data}/{name}.parquet" for name in ["train", *args.splits]}
    data = load_dataset("parquet", data_files=files)
    splits = {name: data[name].select(range(min(len(data[name]), args.num_images))) for name in args.splits}
    data_arguments = {"data": str(args.data), "splits": args.splits, "num_images": args.num_images}
    results = {}
    for folder in tqdm(args.folders, desc="captioners"):
        file = args.output_dir / f"{folder.name}.json"
        measured = {"folder": str(folder), **data_arguments}
        if not file.exists():
            model, processor = load_captioner(folder)
            result = measure_captioner(model, processor, splits, data["train"]["caption"])
            write_json(file, {"measured": measured, **result})
        try:
            results[folder.name] = read_measured(file, measured, splits)
        except ValueError as error:
            raise SystemExit(str(error)) from error
    print(write_reports(results, args.output_dir))


if __name__ == "__main__":
    main()
