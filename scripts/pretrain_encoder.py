"""Train an image encoder to predict the words of captions. It is a start for captioners with few training pictures.

    python scripts/pretrain_encoder.py scripts/recipes/emoji_encoder.yaml

The words of an image's captions are its labels. The encoder is saved in Transformers' format:
`TDDForCaptioning.from_encoder_pretrained("outputs/emoji_encoder")`.
"""

import argparse
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor, ViTImageProcessor
from transformers.modeling_outputs import ImageClassifierOutput

from modeling_tdd import TDDConfig, TDDModel
from modeling_tdd.training.caption_data import load_caption_data
from modeling_tdd.training.cli import add_resume_argument
from modeling_tdd.training.data import Batch, Example, build_train_transform
from modeling_tdd.training.loop import make_accelerator, make_loader, train
from modeling_tdd.training.recipe import EncoderRecipe, load_recipe
from modeling_tdd.training.results import markdown_table, save_checkpoint, training_folder, write_json


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="YAML file, such as scripts/recipes/emoji_encoder.yaml")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, help="default: outputs/<name of the recipe>")
    add_resume_argument(parser)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="such as training.epochs=5")
    return parser.parse_args()


def words_of(caption: str) -> set[str]:
    """The words of a caption without punctuation. A hyphenated word such as "medium-light" is one word."""
    return set(re.findall(r"\w+(?:[-'’]\w+)*", caption.lower()))


def count_words(data: Dataset, min_count: int) -> dict[str, int]:
    """For each word that is not rare: the number of images in whose captions it occurs. Frequent words are first."""
    counts = Counter(word for captions in data["captions"] for word in set().union(*map(words_of, captions)))
    return {word: count for word, count in counts.most_common() if count >= min_count}


class WordClassifier(nn.Module):
    """An encoder with a linear head on its mean token. Each word is an independent binary decision."""

    def __init__(self, config: TDDConfig, frequencies: Tensor):
        super().__init__()
        self.model = TDDModel(config, add_denoiser=False)
        self.head = nn.Linear(self.model.encoder_hidden_size, len(frequencies))
        nn.init.zeros_(self.head.weight)
        # Most words are rare. With another bias the first epochs would only learn the frequencies.
        self.head.bias.data.copy_(torch.logit(frequencies))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        logits = self.head(self.model.get_image_features(pixel_values).pooler_output[:, 0])
        loss = None
        if labels is not None:  # a sum over the words, since a mean would be dominated by absent ones
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(-1).mean()
        return ImageClassifierOutput(loss=loss, logits=logits)


def augment(transform: Callable[[Image.Image], Tensor], images: list[Image.Image]) -> Tensor:
    return torch.stack([transform(image) for image in images])


def process(image_processor: BaseImageProcessor, images: list[Image.Image]) -> Tensor:
    return image_processor(images, return_tensors="pt")["pixel_values"]


class WordCollator:
    """Makes batches of `pixel_values` and multi-hot `labels`."""

    def __init__(self, encode: Callable[[list[Image.Image]], Tensor], words: list[str]):
        self.encode = encode
        self.index = {word: index for index, word in enumerate(words)}

    def __call__(self, examples: list[Example]) -> Batch:
        labels = torch.zeros(len(examples), len(self.index))
        for row, example in zip(labels, examples):
            present = set().union(*map(words_of, example["captions"]))
            row[[self.index[word] for word in present if word in self.index]] = 1
        images = [example["image"].convert("RGB") for example in examples]
        return {"pixel_values": self.encode(images), "labels": labels}


@dataclass
class WordScores:
    """Mean average precision and micro F1 of the words of a split. The mean is over the words that occur in it."""

    mean_average_precision: float
    f1: float


@torch.inference_mode()
def score_words(accelerator: Accelerator, model: WordClassifier, loader: DataLoader, threshold: float) -> WordScores:
    model.eval()
    logits, labels = [], []
    for batch in loader:
        with accelerator.autocast():
            output = accelerator.gather_for_metrics((model(batch["pixel_values"]).logits, batch["labels"]))
        logits.append(output[0].float().cpu())
        labels.append(output[1].cpu())
    probabilities, labels = torch.cat(logits).sigmoid(), torch.cat(labels)
    present = labels.any(0)
    return WordScores(
        mean_average_precision=float(average_precision_score(labels[:, present], probabilities[:, present])),
        f1=float(f1_score(labels, probabilities >= threshold, average="micro")),
    )


def run(recipe: EncoderRecipe, seed: int, folder: Path, resume: str) -> None:
    """Trains one encoder and saves it with its image processor to `folder`. At the end it writes the scores to
    `folder/result.json`."""
    set_seed(seed)
    accelerator = make_accelerator(recipe.training, training_folder(folder))
    data = load_caption_data(recipe.data)
    train_data = data[recipe.data.train_split]
    counts = count_words(train_data, recipe.evaluation.min_count)
    words = list(counts)
    image_processor = ViTImageProcessor(**recipe.image_processor, do_convert_rgb=True)
    model = WordClassifier(TDDConfig(**recipe.model), torch.tensor(list(counts.values())) / len(train_data))
    model.to(memory_format=torch.channels_last)  # convolutions are a tenth faster
    size = sum(p.numel() for p in model.model.parameters()) / 1e6
    accelerator.print(f"{size:.2f} M parameters, {len(words)} words, {len(train_data)} images")

    transform = build_train_transform(recipe.augmentation, image_processor)
    collate = WordCollator(partial(augment, transform), words)
    train_loader = make_loader(accelerator, recipe.training, train_data, collate, shuffle=True, seed=seed)
    eval_collate = WordCollator(partial(process, image_processor), words)
    loaders = {
        split: make_loader(accelerator, recipe.training, data[split], eval_collate, shuffle=False)
        for split in recipe.data.eval_splits
    }

    def score(model: WordClassifier, split: str) -> WordScores:
        return score_words(accelerator, model, loaders[split], recipe.evaluation.threshold)

    model = train(
        accelerator,
        recipe.training,
        model,
        train_loader,
        evaluate=lambda model: score(model, recipe.data.eval_splits[0]).mean_average_precision,
        description=recipe.name,
        seed=seed,
        resume=resume,
    )
    scores = {split: score(model, split) for split in loaders}
    if accelerator.is_main_process:
        save_checkpoint(folder, model.model.encoder, image_processor)
        splits = {split: asdict(split_scores) for split, split_scores in scores.items()}
        write_json(
            folder / "result.json", {"seed": seed, "recipe": recipe.to_dict(), "words": words, "scores": splits}
        )
        rows = [[split, f"{s.mean_average_precision:.1%}", f"{s.f1:.1%}"] for split, s in scores.items()]
        print("\n" + markdown_table(["split", "mAP of words", "F1 of words"], rows))
    accelerator.wait_for_everyone()


def main() -> None:
    args = parse_args()
    recipe = load_recipe(args.recipe, args.set, task="encoder")
    run(recipe, args.seed, args.output_dir or Path("outputs") / recipe.name, args.resume)


if __name__ == "__main__":
    main()
