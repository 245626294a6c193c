"""Train a small CLIP from scratch on pictures and captions, for the metric `clip_score`, and measure its retrieval.

    python scripts/train_clip.py scripts/data/emoji --output-dir outputs/emoji_clip

The folder holds `train.parquet` and held-out splits, with the columns `image` and `caption`. The retrieval quality is
that among the pictures of each held-out split, of which each caption counts once: the pictures with that very caption
are right.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torchvision.transforms import v2
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    ViTImageProcessor,
)

from modeling_tdd.evaluation import load_metric
from modeling_tdd.evaluation.clip import retrieval
from modeling_tdd.images_tdd import to_rgb
from modeling_tdd.training.folders import write_json
from modeling_tdd.training.tokenization import train_tokenizer


END = "<|endoftext|>"
LENGTH, SIZE = 32, 40  # tokens of a caption at most, and height and width of the images in pixels
TOWER = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 128, "intermediate_size": 256}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of parquet files")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of the model")
    parser.add_argument("--epochs", type=float, default=12, help="default: %(default)s")
    return parser.parse_args()


def make_tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of words that ends each text. The end is the last token: CLIP takes id 2 for something else."""
    tokenizer = train_tokenizer(captions)
    tokenizer.add_special_tokens({"eos_token": END})
    post_processor = TemplateProcessing(single=f"$A {END}", special_tokens=[(END, tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = post_processor
    tokenizer.model_max_length = LENGTH
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    text = CLIPTextConfig(**TOWER, vocab_size=len(tokenizer), max_position_embeddings=LENGTH, **tokens)
    vision = CLIPVisionConfig(**TOWER, image_size=SIZE, patch_size=8)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128))


class Collator:
    """Makes batches of tokens and of randomly cropped pictures, which were read once."""

    def __init__(self, rows: Dataset, processor: ViTImageProcessor, tokenizer: PreTrainedTokenizerFast):
        self.pixels = [torch.from_numpy(v2.functional.pil_to_tensor(to_rgb(image)).numpy()) for image in rows["image"]]
        self.tokens = tokenizer(list(rows["caption"]), truncation=True)["input_ids"]
        self.tokenizer = tokenizer
        normalize = v2.Normalize(processor.image_mean, processor.image_std)
        crop = v2.RandomResizedCrop((SIZE, SIZE), scale=(0.6, 1.0), ratio=(0.85, 1.18), antialias=True)
        self.transform = v2.Compose([crop, v2.ToDtype(torch.float32, scale=True), normalize])

    def __call__(self, indices: list[int]) -> dict[str, Any]:
        tokens = self.tokenizer.pad({"input_ids": [self.tokens[index] for index in indices]}, return_tensors="pt")
        pixel_values: Tensor = torch.stack([self.transform(self.pixels[index]) for index in indices])
        return {**tokens, "pixel_values": pixel_values, "return_loss": True}


def main() -> None:
    args = parse_args()
    files = args.data.glob("*.parquet")
    splits = {file.stem: load_dataset("parquet", data_files=str(file))["train"] for file in files}
    train = splits.pop("train")
    torch.manual_seed(0)
    tokenizer = make_tokenizer(list(train["caption"]))
    processor = ViTImageProcessor(size={"height": SIZE, "width": SIZE}, resample=3, do_convert_rgb=True)
    model = make_model(tokenizer)
    training = TrainingArguments(
        output_dir=f"{args.output_dir}-training",
        num_train_epochs=args.epochs,
        per_device_train_batch_size=256,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.1,
        seed=0,
        save_strategy="no",
        logging_steps=50,
        report_to="none",
        remove_unused_columns=False,
        dataloader_drop_last=True,
        use_cpu=not torch.accelerator.is_available(),
    )
    collator = Collator(train, processor, tokenizer)
    Trainer(model, training, train_dataset=range(len(train)), data_collator=collator).train()
    for part in (model, tokenizer, processor):
        part.save_pretrained(args.output_dir)
    scores, metric = {}, load_metric("clip_score")
    for name, rows in splits.items():
        images, captions = [to_rgb(image) for image in rows["image"]], list(rows["caption"])
        scores[name] = retrieval(*metric.embed(str(args.output_dir), images, captions), captions)
    write_json(args.output_dir / "retrieval.json", scores)
    print(scores)


if __name__ == "__main__":
    main()
