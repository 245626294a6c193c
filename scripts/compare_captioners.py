"""Measure what captioners can do beside captions: infilling, choices, confidence, best of several.

    python scripts/compare_captioners.py outputs/emoji_full/*-seed? --data scripts/data/emoji
    python scripts/compare_captioners.py checkpoints/emoji-captions --data scripts/data/emoji_mini --num-images 100

The folders are runs of `train.py`, of any method and seed; --data has `train.parquet` and the splits. Each folder's
figures go into a JSON file as soon as they are there, and a repeated command measures what is missing. Then it prints
the tables of all, means and standard deviations over the seeds, and draws the plot.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import load_dataset
from tqdm.auto import tqdm

from modeling_tdd.evaluation.captioners import load_captioner
from modeling_tdd.evaluation.constraint_reports import write_reports
from modeling_tdd.evaluation.constraints import measure_captioner
from modeling_tdd.training.folders import write_json


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of captioners")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and the splits")
    parser.add_argument("--splits", nargs="+", default=["validation", "test_combo", "test_vendor"])
    parser.add_argument("--num-images", type=int, default=200, help="the first of each split; default: 200")
    parser.add_argument("--output-dir", type=Path, default=Path("docs/results/constraints"), help="folder of reports")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    data = load_dataset(
        "parquet", data_files={name: f"{args.data}/{name}.parquet" for name in ["train", *args.splits]}
    )
    splits = {name: data[name].select(range(min(len(data[name]), args.num_images))) for name in args.splits}
    files = []
    for folder in tqdm(args.folders, desc="captioners"):
        files.append(args.output_dir / f"{folder.name}.json")
        if not files[-1].exists():
            model, processor = load_captioner(folder)
            write_json(files[-1], measure_captioner(model, processor, splits, data["train"]["caption"]))
    results = {file.stem: json.loads(file.read_text()) for file in files}
    print(write_reports(results, args.output_dir))


if __name__ == "__main__":
    main()
