"""Measure what the noise contributes to captions: how many change when every draw of the noise is replaced by zeros.

    python scripts/measure_noise.py checkpoints/emoji-captions --data scripts/data/emoji/validation.parquet

Prints a table with a row per checkpoint, and writes it as JSON with --output.
"""

import argparse
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset, load_dataset
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

import modeling_tdd  # noqa: F401 - registers TDD with the Auto classes
from modeling_tdd import TDDForCaptioning, TDDProcessor
from modeling_tdd.evaluation.captions import exact_match
from modeling_tdd.sampling_tdd import RandomNumbers
from modeling_tdd.training.results import markdown_table, write_json


def caption_images(
    model: TDDForCaptioning, processor: TDDProcessor, data: Dataset, batch_size: int, steps: int
) -> list[str]:
    captions = []
    for batch in tqdm(data.iter(batch_size), total=-(-len(data) // batch_size), leave=False):
        inputs = processor(images=[image.convert("RGB") for image in batch["image"]], return_tensors="pt")
        sequences = model.generate(**inputs, num_inference_steps=steps)
        captions += processor.batch_decode(sequences, skip_special_tokens=True)
    return captions


def measure(checkpoint: str, data: Dataset, batch_size: int, steps: int) -> dict[str, Any]:
    """Exact match with noise and with zeros, and the share of captions that differ.

    Raises:
        `ValueError`: for MDD, which has no noise.
    """
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    if model.config.corruption != "gaussian":
        raise ValueError(f"{checkpoint} has masks (MDD) and no noise that could be replaced.")
    processor = AutoProcessor.from_pretrained(checkpoint)
    drawn = caption_images(model, processor, data, batch_size, steps)
    draw = RandomNumbers.normal
    with patch.object(RandomNumbers, "normal", lambda numbers: torch.zeros_like(draw(numbers))):
        zeroed = caption_images(model, processor, data, batch_size, steps)
    references = [[caption] for caption in data["caption"]]
    return {
        "checkpoint": checkpoint,
        "images": len(data),
        "num_inference_steps": steps,
        "exact_match": exact_match(drawn, references),
        "exact_match_without_noise": exact_match(zeroed, references),
        "changed": sum(one != other for one, other in zip(drawn, zeroed)) / len(data),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="folders or model ids of TDD captioners")
    parser.add_argument("--data", required=True, help="a parquet file with the columns `image` and `caption`")
    parser.add_argument("--num-images", type=int, help="the first images only; default: all")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps")
    parser.add_argument("--batch-size", type=int, default=64, help="images per batch")
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    args = parser.parse_args()
    data = load_dataset("parquet", data_files=args.data, split="train")
    data = data.select(range(min(len(data), args.num_images or len(data))))
    results = [measure(checkpoint, data, args.batch_size, args.steps) for checkpoint in args.checkpoints]
    rows = [
        [r["checkpoint"], *(f"{100 * r[key]:.1f}" for key in ("exact_match", "exact_match_without_noise", "changed"))]
        for r in results
    ]
    header = ["checkpoint", "exact match", "exact match, noise zeroed", "captions that change"]
    print(f"{len(data)} images, {args.steps} steps, in %:\n\n" + markdown_table(header, rows))
    if args.output is not None:
        write_json(args.output, results)


if __name__ == "__main__":
    main()
