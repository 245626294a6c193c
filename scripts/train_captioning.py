"""Train captioners by a recipe, both TDD and its baselines, and print their scores side by side.

    python scripts/train_captioning.py scripts/recipes/emoji.yaml --methods tdd mdd ar nearest --seeds 0 1 2

`ar` is an autoregressive captioner of the same size. `nearest`, the nearest-neighbour baseline, takes the caption of
the most similar training picture. Each pair of a method and a seed is a run with its own result file. A repeated
command does only the missing runs.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from datasets import DatasetDict
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoImageProcessor, BaseImageProcessor, ViTImageProcessor

from modeling_tdd import TDDForCaptioning
from modeling_tdd.evaluation.baselines import AutoregressiveCaptioner, nearest_captions
from modeling_tdd.evaluation.captions import caption_metrics, seen_bigrams
from modeling_tdd.evaluation.step_curves import read_results, score_table
from modeling_tdd.processing_tdd import TDDProcessor
from modeling_tdd.training.caption_data import (
    CaptionCollator,
    load_caption_data,
    open_caption_shards,
    sample_captions,
)
from modeling_tdd.training.cli import CORRUPTIONS, parse_comparison_args, recipe_method
from modeling_tdd.training.data import build_train_transform
from modeling_tdd.training.examples import Example, ReadCaptioned
from modeling_tdd.training.features import AugmentedViews, cache_features
from modeling_tdd.training.loop import make_accelerator, make_loader, train
from modeling_tdd.training.recipe import CaptionRecipe, load_recipe
from modeling_tdd.training.results import save_checkpoint, training_folder, write_json
from modeling_tdd.training.shards import ShardedRows
from modeling_tdd.training.streaming import make_stream_loader, report_problems
from modeling_tdd.training.tokenization import train_tokenizer


Captioner = TDDForCaptioning | AutoregressiveCaptioner


def make_processor(recipe: CaptionRecipe, captions: list[str]) -> TDDProcessor:
    """Makes the processor: the image processor of the encoder or of the recipe, and a tokenizer that is trained on the
    training captions. A captioner to start from keeps its processor."""
    if recipe.model_checkpoint is not None:
        return TDDProcessor.from_pretrained(recipe.model_checkpoint)
    tokenizer = train_tokenizer(captions, **recipe.tokenizer)
    tokenizer.model_max_length = recipe.model["max_position_embeddings"]
    if recipe.encoder is not None:
        return TDDProcessor(AutoImageProcessor.from_pretrained(recipe.encoder), tokenizer)
    return TDDProcessor(ViTImageProcessor(**recipe.image_processor, do_convert_rgb=True), tokenizer)


def training_captions(
    accelerator: Accelerator, recipe: CaptionRecipe, data: DatasetDict, rows: ShardedRows | None = None
) -> list[str]:
    """All captions of the training split. If it is streamed, those of its first examples."""
    if rows is None:
        return [caption for captions in data[recipe.data.train_split]["captions"] for caption in captions]
    with accelerator.main_process_first():
        return sample_captions(recipe.data, rows)


def make_model(recipe: CaptionRecipe, method: str, processor: TDDProcessor) -> Captioner:
    model_class = AutoregressiveCaptioner if method == "ar" else TDDForCaptioning
    fields = {
        **recipe.model,
        "vocab_size": len(processor.tokenizer),
        "pad_token_id": processor.tokenizer.pad_token_id,
        "eos_token_id": processor.tokenizer.eos_token_id,
    }
    if method in CORRUPTIONS:
        fields["corruption"] = CORRUPTIONS[method]
    if recipe.model_checkpoint is not None:
        return model_class.from_pretrained(recipe.model_checkpoint, **fields)
    if recipe.encoder is not None:
        return model_class.from_encoder_pretrained(recipe.encoder, **fields)
    return model_class(model_class.config_class(**fields))


class CachedExamples(Dataset):
    """Examples with features of a frozen encoder in place of images. If a picture has several views, one is drawn."""

    def __init__(self, views: list[Tensor], captions: list[list[str]]):
        self.views = views
        self.captions = captions

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> Example:
        view = self.views[int(torch.randint(len(self.views), ()))]
        return {"image_features": view[index], "captions": self.captions[index]}


def make_examples(
    recipe: CaptionRecipe,
    model: Captioner,
    image_processor: BaseImageProcessor,
    data: DatasetDict,
    folder: Path,
    accelerator: Accelerator,
) -> dict[str, Dataset]:
    """The examples of each split that is not streamed. If the encoder is frozen, its features are cached and take the
    place of the images. View 0 holds the features of the pictures as they are, other views those of augmented ones."""
    if not recipe.model.get("freeze_encoder", False):
        return dict(data)
    examples = {}
    with accelerator.main_process_first():
        for split in data:
            views: dict[int, Any] = {0: image_processor}
            if split == recipe.data.train_split and recipe.feature_views > 1:
                numbers = range(1, recipe.feature_views + 1)
                views = {view: AugmentedViews(recipe.augmentation, image_processor, view) for view in numbers}
            features = [
                cache_features(model.model, view, data[split], folder / f"{split}-{number}.safetensors")
                for number, view in views.items()
            ]
            examples[split] = CachedExamples(features, data[split]["captions"])
    return examples


@torch.inference_mode()
def caption_split(
    accelerator: Accelerator, model: Captioner, processor: TDDProcessor, loader: DataLoader, **settings: Any
) -> list[str]:
    """The captions of a split in its order, gathered from all processes."""
    model.eval()
    captions: list[str] = []
    for batch in loader:
        batch.pop("labels")
        with accelerator.autocast():
            sequences = model.generate(**batch, **settings)
        sequences = accelerator.gather_for_metrics(sequences)
        captions += processor.batch_decode(sequences, skip_special_tokens=True)
    return captions


def run(recipe: CaptionRecipe, method: str, seed: int, output_dir: Path, resume: str) -> None:
    """Trains one captioner and saves it. At the end it writes the scores to `result.json`."""
    set_seed(seed)
    folder = output_dir / f"{method}-seed{seed}"
    accelerator = make_accelerator(recipe.training, training_folder(folder))
    data = load_caption_data(recipe.data)
    rows = open_caption_shards(recipe.data) if recipe.data.streaming else None
    captions = training_captions(accelerator, recipe, data, rows)
    processor = make_processor(recipe, captions)
    model = make_model(recipe, method, processor)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    accelerator.print(f"{method}, seed {seed}: {trainable:.2f} M trainable parameters")
    examples = make_examples(recipe, model, processor.image_processor, data, output_dir / "features", accelerator)
    transform = build_train_transform(recipe.augmentation, processor.image_processor)
    collate, eval_collate = CaptionCollator(processor, transform), CaptionCollator(processor)
    if rows is None:
        train_data = examples[recipe.data.train_split]
        train_loader = make_loader(accelerator, recipe.training, train_data, collate, shuffle=True, seed=seed)
    else:
        read = ReadCaptioned(recipe.data.lower_case)
        train_loader = make_stream_loader(accelerator, recipe.training, recipe.data, rows, read, collate, seed)
    loaders = {
        split: make_loader(accelerator, recipe.training, examples[split], eval_collate, shuffle=False)
        for split in recipe.data.eval_splits
    }
    seen = seen_bigrams(captions)

    def score(model: Captioner, split: str, **settings: Any) -> dict[str, float]:
        predictions = caption_split(accelerator, model, processor, loaders[split], **settings)
        return caption_metrics(predictions, data[split]["captions"], seen)

    model = train(
        accelerator,
        recipe.training,
        model,
        train_loader,
        evaluate=lambda model: score(model, recipe.data.eval_splits[0])["token_f1"],
        description=f"{method} seed {seed}",
        seed=seed,
        resume=resume,
    )
    if rows is not None:
        report_problems(accelerator, train_loader)
    scores = [
        {"split": split, **settings, **score(model, split, **settings)}
        for index, split in enumerate(loaders)
        for settings in (recipe.evaluation.grid(index == 0) if method in CORRUPTIONS else [{}])
    ]
    if accelerator.is_main_process:
        save_checkpoint(folder, model, processor)
        result = {"method": method, "seed": seed, "recipe": recipe.to_dict(), "scores": scores}
        write_json(folder / "result.json", result)
    accelerator.wait_for_everyone()


def run_nearest(recipe: CaptionRecipe, seed: int, output_dir: Path) -> None:
    """Scores the nearest-neighbour baseline. Nothing is trained or drawn at random, so all seeds give the same."""
    accelerator = make_accelerator(recipe.training)
    data = load_caption_data(recipe.data)
    captions = training_captions(accelerator, recipe, data)
    processor = make_processor(recipe, captions)
    model = make_model(recipe, "nearest", processor)
    plain = replace(recipe, feature_views=1)  # only the pictures as they are, without augmentation
    examples = make_examples(plain, model, processor.image_processor, data, output_dir / "features", accelerator)
    train_features, train_captions = (
        examples[recipe.data.train_split].views[0],
        data[recipe.data.train_split]["captions"],
    )
    seen = seen_bigrams(captions)
    scores = []
    for split in recipe.data.eval_splits:
        features = examples[split].views[0]
        predictions = nearest_captions(features, train_features, [captions[0] for captions in train_captions])
        scores.append({"split": split, **caption_metrics(predictions, data[split]["captions"], seen)})
    if accelerator.is_main_process:
        result = {"method": "nearest", "seed": seed, "recipe": recipe.to_dict(), "scores": scores}
        write_json(output_dir / f"nearest-seed{seed}" / "result.json", result)
    accelerator.wait_for_everyone()


def main() -> None:
    args = parse_comparison_args(__doc__, "scripts/recipes/emoji.yaml", other_methods=["ar", "nearest"])
    state = PartialState(cpu=not torch.accelerator.is_available())
    recipe = load_recipe(args.recipe, args.set, task="captioning")
    frozen = recipe.encoder is not None and recipe.model.get("freeze_encoder", False)
    methods = args.methods or [recipe_method(recipe.model)]
    if "nearest" in methods and (not frozen or recipe.data.streaming):
        raise ValueError(
            "`nearest` needs features of a pretrained encoder for all images: set `encoder` and "
            "`model.freeze_encoder`, and do not set `data.streaming`."
        )
    output_dir = args.output_dir or Path("outputs") / recipe.name
    # The nearest-neighbour baseline is not random and needs no second seed.
    runs = [(m, seed) for m in methods for seed in (args.seeds[:1] if m == "nearest" else args.seeds)]
    folders = {(method, seed): output_dir / f"{method}-seed{seed}" for method, seed in runs}
    for (method, seed), folder in folders.items():
        if (folder / "result.json").exists():
            state.print(f"{folder} is done already.")
        elif method == "nearest":
            run_nearest(recipe, seed, output_dir)
        else:
            run(recipe, method, seed, output_dir, args.resume)
    if state.is_main_process:
        results = read_results(folders.values())
        tables = [f"### {split}\n\n{score_table(results, split)}" for split in recipe.data.eval_splits]
        (output_dir / "results.md").write_text("\n\n".join(tables) + "\n")
        print(f"\nScores in %, {len(args.seeds)} seed(s):\n\n" + "\n\n".join(tables))


if __name__ == "__main__":
    main()
