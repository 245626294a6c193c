"""Data of classification, and batches: order and seeds, augmentation, collation."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image as PILImage
from samples import grey, write_class_folders, write_coco
from torch.utils.data import DataLoader, SequentialSampler
from transformers import ViTImageProcessor

from modeling_tdd import TDDProcessor
from modeling_tdd.training.batches import (
    Augmentation,
    CaptionCollator,
    ImageCollator,
    TrainingRows,
    WordCollator,
    build_mixup,
    build_train_transform,
    count_words,
    seed_for,
    words_of,
)
from modeling_tdd.training.data import CaptionData, LabelData, load_captions, load_labels
from modeling_tdd.training.tokenization import train_tokenizer


EMOJI = Path(__file__).parent.parent / "scripts/data/emoji_mini"


# ---- Data


def test_digits_are_split_evenly_by_class():
    splits, names = load_labels(LabelData("digits"))
    assert ({split: len(rows) for split, rows in splits.items()}) == {"train": 1437, "validation": 360}
    assert names == [str(digit) for digit in range(10)]
    counts = torch.bincount(torch.tensor(splits["validation"]["label"][:]))
    assert counts.min() >= 34 and counts.max() <= 37
    assert splits["train"][0]["image"].size == (8, 8)


def test_embedded_emoji_have_labels():
    files = {split: str(EMOJI / f"{split}.parquet") for split in ("train", "validation")}
    splits, names = load_labels(LabelData("parquet", data_files=files, label_column="subgroup_id"))
    assert (len(splits["train"]), len(splits["validation"]), len(names)) == (2000, 256, 98)
    assert set(splits["train"].column_names) == {"image", "label"}


def test_missing_split_or_column_is_named():
    with pytest.raises(ValueError, match="no split 'test'; it has train, validation"):
        load_labels(LabelData("digits", eval_splits=["test"]))
    with pytest.raises(ValueError, match="no column 'digit' in 'train'; it has image, label"):
        load_labels(LabelData("digits", label_column="digit"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eval_share": 1.0}, r"`data.eval_share` must be 0, or in \(0, 1\) .*, got 1.0"),
        (
            {"eval_share": 0.1, "streaming": True, "num_examples": 9},
            "`data.eval_share` must be .* without `data.streaming`",
        ),
        ({"path": "coco", "streaming": True, "num_examples": 9}, "needs parquet, webdataset or .*, got 'coco' and 9"),
        ({"streaming": True}, "`data.streaming` needs .*, and `data.num_examples`, got 'parquet' and None"),
    ],
)
def test_bad_settings_are_named(fields, message):
    for data_class in (LabelData, CaptionData):
        with pytest.raises(ValueError, match=message):
            data_class(**{"path": "parquet", **fields})


def test_a_share_of_the_training_split_is_held_out(tmp_path):
    write_class_folders(tmp_path / "folders")
    write_coco(tmp_path / "coco", splits=("train2017",))
    folders = LabelData("imagefolder", data_dir=str(tmp_path / "folders"), eval_share=0.25)
    coco = CaptionData("coco", data_dir=str(tmp_path / "coco"), train_split="train2017", eval_share=0.25)
    for load in (lambda: load_labels(folders)[0], lambda: load_captions(coco)):
        splits = {split: [grey(image) for image in rows["image"]] for split, rows in load().items()}
        train, held_out = splits.values()
        assert list(splits)[1] == "validation" and len(held_out) == 3
        assert sorted(train + held_out) == list(range(12))
        assert [[grey(image) for image in rows["image"]] for rows in load().values()] == [train, held_out]


# ---- Order and seeds


def test_an_epoch_has_each_row_once_in_an_order_of_its_own():
    def order(rows: TrainingRows, epoch: int = 0) -> list[int]:
        rows.set_epoch(epoch)
        return rows.__getitems__(range(len(rows)))

    rows = TrainingRows(list(range(35)), seed=3, multiple_of=8)
    first = order(rows)
    assert len(rows) == len(set(first)) == 32 and first != sorted(first)
    assert order(rows, 1) != first == order(rows, 0)
    # The first epoch of seed 4 differs from the second epoch of seed 3. A sum of seed and epoch would make them equal.
    assert order(TrainingRows(list(range(35)), seed=4, multiple_of=8)) != order(rows, 1)
    with pytest.raises(ValueError, match="The batch size is 36, but there are only 35 images"):
        TrainingRows(list(range(35)), seed=3, multiple_of=36)


def test_what_a_batch_draws_depends_only_on_its_place():
    def collate(rows: list[dict]) -> tuple:
        draws = (random.random(), np.random.rand(), torch.rand(1).item())
        return [row["number"] for row in rows], draws

    def batches(num_workers: int, skip: int = 0) -> list[tuple]:
        rows = TrainingRows(Dataset.from_dict({"number": range(35)}), seed=0, multiple_of=8)
        sampler = range(4 * skip, 32) if skip else SequentialSampler(rows)
        loader = DataLoader(
            rows, 4, sampler=sampler, collate_fn=collate, num_workers=num_workers, persistent_workers=num_workers > 0
        )
        list(loader)
        rows.set_epoch(1)  # workers that are running see it
        return list(loader)

    expected = batches(num_workers=0)
    assert len(set().union(*(draws for _, draws in expected))) == 3 * 8
    assert batches(num_workers=2) == expected
    assert batches(num_workers=0, skip=5) == expected[5:]


def test_seeds_depend_on_each_number():
    assert len({seed_for(*key) for key in [(0, 1, 2), (1, 0, 2), (0, 2, 1), (0, 1, 3)]}) == 4
    assert seed_for(1, 2, 3) == seed_for(1, 2, 3)


# ---- Images and labels


@pytest.fixture
def processor():
    return ViTImageProcessor(size={"height": 8, "width": 8}, do_convert_rgb=True)


@pytest.fixture
def examples():
    return [{"image": PILImage.new("L", (12, 10), color=20 * i), "label": i % 3} for i in range(8)]


def test_evaluation_batches_are_what_the_saved_processor_makes(processor, examples):
    batch = ImageCollator(processor)(examples)
    expected = processor([example["image"].convert("RGB") for example in examples], return_tensors="pt").pixel_values
    assert batch["pixel_values"].equal(expected) and batch["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    "settings",
    [{}, {"size": {"shortest_edge": 12}, "do_center_crop": True, "crop_size": {"height": 8, "width": 8}}],
    ids=["resize", "resize and crop"],
)
def test_without_augmentation_training_views_are_the_image_processors(settings):
    processor = ViTImageProcessor(**{"size": {"height": 8, "width": 8}, "do_convert_rgb": True, **settings})
    rng = np.random.default_rng(0)
    images = [PILImage.fromarray(rng.integers(256, size=(20, 14 + i, 3), dtype=np.uint8)) for i in range(4)]
    examples = [{"image": image, "label": 0} for image in images]
    transform = build_train_transform(Augmentation(), processor)
    train, held_out = ImageCollator(processor, transform)(examples), ImageCollator(processor)(examples)
    assert train["pixel_values"].shape == (4, 3, 8, 8)
    torch.testing.assert_close(train["pixel_values"], held_out["pixel_values"])


def test_augmented_views_have_the_size_and_the_normalisation_of_the_image_processor(processor, examples):
    def views(**settings) -> torch.Tensor:
        return ImageCollator(processor, build_train_transform(Augmentation(**settings), processor))(examples)[
            "pixel_values"
        ]

    same = ImageCollator(processor)(examples)["pixel_values"]  # of pictures of one colour, crops and flips change none
    torch.testing.assert_close(views(scale=(0.3, 0.5), hflip=0.5), same, atol=0.01, rtol=0)
    assert views(size=6, hflip=0.5).shape == (8, 3, 6, 6)
    assert not torch.isclose(views(re_prob=1.0), same).all()


def test_mixup_gives_probabilities(processor, examples):
    augmentation = Augmentation(mixup_alpha=0.8, cutmix_alpha=1.0)
    transform, mixup = build_train_transform(augmentation, processor), build_mixup(augmentation, num_labels=3)
    labels = ImageCollator(processor, transform, mixup)(examples)["labels"]
    assert labels.shape == (8, 3)
    torch.testing.assert_close(labels.sum(-1), torch.ones(8))
    assert (labels.max(-1).values < 1).any()
    assert build_mixup(Augmentation(), num_labels=3) is None


# ---- Captions and words


@pytest.fixture
def caption_processor(processor):
    tokenizer = train_tokenizer(["a cat", "a dog", "the dog"])
    tokenizer.model_max_length = 5
    return TDDProcessor(processor, tokenizer)


def test_captions_are_drawn_in_training_and_the_first_in_evaluation(caption_processor, examples):
    rows = [{"image": example["image"], "captions": ["a cat", "the dog"]} for example in examples]
    transform = build_train_transform(Augmentation(), caption_processor.image_processor)
    train, held_out = CaptionCollator(caption_processor, transform)(rows), CaptionCollator(caption_processor)(rows)
    assert train["pixel_values"].shape == held_out["pixel_values"].shape == (8, 3, 8, 8)

    def decode(batch):
        return caption_processor.batch_decode(batch["labels"], skip_special_tokens=True)

    assert set(decode(train)) == {"a cat", "the dog"} and set(decode(held_out)) == {"a cat"}
    pad = caption_processor.tokenizer.pad_token_id
    assert held_out["labels"].shape == (8, 5) and (held_out["labels"][:, -1] == pad).all()


def test_one_view_of_cached_features_is_drawn(caption_processor):
    views = np.arange(3, dtype=np.float16)[:, None, None] * np.ones((3, 4, 2), np.float16)
    rows = [{"image_features": views, "captions": ["a cat"]}] * 20
    transform = build_train_transform(Augmentation(), caption_processor.image_processor)
    train = CaptionCollator(caption_processor, transform)(rows)["image_features"]
    assert train.shape == (20, 4, 2) and train.dtype == torch.float16
    assert set(train.flatten(1).mean(1).tolist()) == {0, 1, 2}
    assert not CaptionCollator(caption_processor)(rows)["image_features"].any()
    rows = [{"image_features": views[1], "captions": ["a cat"]}] * 2
    assert CaptionCollator(caption_processor, transform)(rows)["image_features"].equal(torch.ones(2, 4, 2).half())


def test_words_are_labels(processor, examples):
    assert words_of(["Man: medium-light", "skin, l’été"]) == {"man", "medium-light", "skin", "l’été"}
    captions = [["a cat", "a cat sits"], ["a dog"], ["the cat"]]
    assert count_words(captions, min_count=2) == {"a": 2, "cat": 2}
    rows = [{"image": example["image"], "captions": texts} for example, texts in zip(examples, captions)]
    batch = WordCollator(processor, ["cat", "dog"])(rows)
    assert batch["labels"].tolist() == [[1, 0], [0, 1], [1, 0]] and batch["pixel_values"].shape == (3, 3, 8, 8)
