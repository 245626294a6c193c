"""Captions: their data, tokenizer and cached features, and the training of their encoder as users run it."""

import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from samples import VL_ENRICHED_FEATURES
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, ViTImageProcessor

from modeling_tdd import TDDModel
from modeling_tdd.evaluation.baselines import WordClassifier
from modeling_tdd.training.batches import Augmentation
from modeling_tdd.training.data import CaptionData, leave_out_unknown, load_captions
from modeling_tdd.training.features import AugmentedViews, cache_features, features_fingerprint
from modeling_tdd.training.recipe import load_recipe
from modeling_tdd.training.tokenization import train_tokenizer


ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts/train.py"
RECIPE = ROOT / "scripts/recipes/emoji_encoder.yaml"
CAPTIONS = ["woman firefighter: medium-light skin tone", "woman firefighter", "“free” button", "flag: Côte d’Ivoire"]


def picture(shade: int = 0) -> PILImage.Image:
    return PILImage.new("RGB", (16, 16), color=(shade, 100, 200))


# ---- Recipes


def test_a_recipe_says_its_task():
    with pytest.raises(ValueError, match="`task` of .* must be one of classification, captioning, encoder, got 'cap'"):
        load_recipe(RECIPE, ["task=cap"])
    with pytest.raises(ValueError, match="Unknown keys in `recipe`: evaluation"):
        load_recipe(RECIPE, ["evaluation.steps=5"])
    with pytest.raises(ValueError, match="Unknown keys in `data`: label_column. Allowed: path, .* caption_column"):
        load_recipe(RECIPE, ["data.label_column=word"])


def test_a_stream_has_neither_counted_words_nor_cached_views():
    stream = ["data.streaming=true", "data.num_examples=9"]
    with pytest.raises(ValueError, match="`data.streaming` must be false for an encoder"):
        load_recipe(RECIPE, stream)
    with pytest.raises(ValueError, match="`feature_views` above 1 needs .* no `data.streaming`, got 4"):
        load_recipe(RECIPE.with_name("emoji.yaml"), stream)
    assert load_recipe(RECIPE.with_name("emoji.yaml"), [*stream, "feature_views=1"]).data.streaming


def test_a_word_of_all_captions_has_a_finite_loss(make_config):
    model = WordClassifier(make_config(num_labels=3), torch.tensor([1.0, 0.5, 0.0]))
    assert model.head.bias.isfinite().all() and model.head.bias[1] == 0
    assert model(torch.randn(2, 3, 16, 16), torch.tensor([[1.0, 0.0, 0.0]] * 2)).loss.isfinite()


# ---- Data


def test_embedded_emoji_load_by_the_recipe():
    data = load_captions(CaptionData(**vars(load_recipe(RECIPE).data)))
    assert {split: len(rows) for split, rows in data.items()} == {
        "train": 2000,
        "validation": 256,
        "test_combo": 300,
        "test_vendor": 300,
    }
    assert set(data["train"].column_names) == {"image", "captions"}
    example = data["validation"][0]
    assert example["image"].size == (32, 32) and len(example["captions"]) == 1


def test_coco_layout(tmp_path):
    for split in ("train2017", "val2017"):
        (tmp_path / split).mkdir()
        for index in (7, 8):
            picture(index).save(tmp_path / split / f"{index:012d}.jpg")
        content = {
            "images": [{"id": index, "file_name": f"{index:012d}.jpg", "height": 16, "width": 16} for index in (7, 8)],
            "annotations": [
                {"id": 1, "image_id": 8, "caption": "A dog  runs.\n"},
                {"id": 2, "image_id": 7, "caption": "A cat."},
                {"id": 3, "image_id": 8, "caption": "The dog."},
            ],
        }
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"annotations/captions_{split}.json").write_text(json.dumps(content))
    recipe = CaptionData("coco", data_dir=str(tmp_path), train_split="train2017", eval_splits=["val2017"])
    data = load_captions(recipe)
    assert data["train2017"]["captions"][:] == [["A cat."], ["A dog runs.", "The dog."]]
    assert data["val2017"][1]["image"].size == (16, 16)
    undecoded = data["val2017"].cast_column("image", Image(decode=False))[0]["image"]
    assert undecoded == {"bytes": None, "path": str(tmp_path / "val2017/000000000007.jpg")}  # the images stay files
    recipe.eval_splits = ["test2017"]
    with pytest.raises(ValueError, match="`coco` has no split 'test2017'; it has train2017, val2017"):
        load_captions(recipe)
    with pytest.raises(ValueError, match="`data.path: coco` needs `data.data_dir`"):
        load_captions(CaptionData("coco"))


def test_vl_enriched_columns(tmp_path):
    """visual-layer/imagenet-1k-vl-enriched: a parquet data set among whose columns are an image and its caption."""
    row = {
        "image_id": "n01440764_10026",
        "image": picture(),
        "label": 0,
        "label_bbox_enriched": [{"bbox": [0.0, 1.0, 2.0, 3.0], "label": "Fish"}],
        "caption_enriched": "a man holding a Fish",
        "issues": [],
    }
    Dataset.from_list([row, row], features=VL_ENRICHED_FEATURES).to_parquet(tmp_path / "data.parquet")
    files = {"train": str(tmp_path / "data.parquet"), "validation": str(tmp_path / "data.parquet")}
    recipe = CaptionData("parquet", data_files=files, caption_column="caption_enriched", lower_case=True)
    assert load_captions(recipe)["validation"][1]["captions"] == ["a man holding a fish"]
    recipe.caption_column = "label"
    with pytest.raises(ValueError, match="Column 'label' must hold strings or lists of strings, got .*int32"):
        load_captions(recipe)
    recipe.caption_column = "caption"
    with pytest.raises(ValueError, match="no column 'caption' in 'train'; it has image_id, image"):
        load_captions(recipe)


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """An `imagefolder` with a good image, one cut short, one that is no image, and captions that are empty."""
    folder = tmp_path / "pictures"
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True)
        lines = []
        for name, caption in [
            ("good", "a cat"),
            ("short", "a dog"),
            ("text", "a cow"),
            ("blank", " "),
            ("none", None),
        ]:
            file = folder / split / f"{name}.png"
            # Noise fills more than the decoder's first buffer, so that half a file is truly half an image
            PILImage.effect_noise((64, 64), 50).convert("RGB").save(file)
            lines.append(json.dumps({"file_name": file.name, "caption": caption}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    short = folder / "train/short.png"
    short.write_bytes(short.read_bytes()[: short.stat().st_size // 2])
    (folder / "train/text.png").write_text("not an image")
    return folder


def test_bad_examples_are_skipped_counted_and_named(image_folder, caplog):
    recipe = CaptionData("imagefolder", data_dir=str(image_folder))
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        data = load_captions(recipe)
    assert data["train"]["captions"][:] == [["a cat"]] and data["train"][0]["image"].size == (64, 64)
    assert data["validation"]["captions"][:] == [["a cat"], ["a dog"], ["a cow"]]
    message = next(record.getMessage() for record in caplog.records if "'train'" in record.getMessage())
    assert message.startswith("4 of 5 examples of 'train' are bad") and message.endswith("They are skipped.")
    assert "short.png (OSError)" in message and "text.png (UnidentifiedImageError)" in message
    assert message.count("no caption") == 2


def test_a_split_without_a_valid_example_is_an_error(image_folder):
    (image_folder / "train/good.png").write_bytes(b"")
    with pytest.raises(ValueError, match="5 of 5 examples of 'train' are bad"):
        load_captions(CaptionData("imagefolder", data_dir=str(image_folder)))


@pytest.mark.parametrize("streaming", [False, True])
def test_captions_that_teach_nothing_are_left_out_and_named(tmp_path, caplog, streaming):
    captions = ["a cat", "zzz qqq", "a cat [EOS] and", "[PAD]", "a dog", "a zzz"]
    table = {"image": [picture(index) for index in range(6)], "caption": captions}
    for split in ("train", "validation"):
        features = Features({"image": Image(), "caption": Value("string")})
        Dataset.from_dict(table, features=features).to_parquet(tmp_path / f"{split}.parquet")
    tokenizer = train_tokenizer(["a cat and a dog"])
    rows = load_captions(CaptionData("parquet", data_dir=str(tmp_path), streaming=streaming, num_examples=3))["train"]
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        rows = leave_out_unknown(rows, tokenizer, "train")
        assert {example["captions"][0] for example in rows} == {"a cat", "a dog", "a zzz"}
    assert caplog.text.count("no known word, or a special token, in") == 3
    if not streaming:
        assert rows[0]["image"].size == (16, 16)
        assert "3 of 6 examples of 'train' are bad: row 1: no known word" in caplog.text


def test_of_several_captions_the_good_ones_stay():
    rows = Dataset.from_dict({"image": [picture()], "captions": [["zzz", "a cat", "[EOS]"]]})
    rows = rows.cast_column("image", Image())
    assert leave_out_unknown(rows, train_tokenizer(["a cat"]), "train")["captions"][:] == [["a cat"]]


# ---- Tokenizer


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_captions_come_back_exactly(kind, tmp_path):
    train_tokenizer(CAPTIONS, kind).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for caption in CAPTIONS:
        assert tokenizer.decode(tokenizer(caption)["input_ids"], skip_special_tokens=True) == caption
    batch = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    assert batch["input_ids"][1, -1] == tokenizer.pad_token_id and batch["attention_mask"][1, -1] == 0
    assert tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == CAPTIONS


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_special_tokens(kind):
    tokenizer = train_tokenizer(CAPTIONS, kind)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("[PAD]", 0)
    specials = [tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id]
    assert specials == tokenizer.convert_tokens_to_ids(["[UNK]", "[EOS]", "[MASK]"]) == [1, 2, 3]
    masked = tokenizer("woman [MASK]: [MASK]-light skin tone")["input_ids"]
    whole = tokenizer("woman firefighter: medium-light skin tone")["input_ids"]
    assert len(masked) == len(whole)
    assert [a for a, b in zip(masked, whole) if a != b] == [3, 3]


def test_vocabulary_and_case():
    assert train_tokenizer(CAPTIONS).tokenize("woman astronaut: tone") == ["▁woman", "[UNK]", ":", "▁tone"]
    assert train_tokenizer(CAPTIONS, "bpe", 60).vocab_size == 60
    assert train_tokenizer(CAPTIONS, "word", 7).vocab_size == 7
    assert train_tokenizer(CAPTIONS[:2]).tokenize("Woman") == ["▁woman"]  # all of these are lower case
    assert train_tokenizer(CAPTIONS).tokenize("Woman") == ["[UNK]"]
    with pytest.raises(ValueError, match="`kind` must be 'word' or 'bpe', got 'char'"):
        train_tokenizer(CAPTIONS, "char")
    with pytest.raises(ValueError, match="at least one caption"):
        train_tokenizer([])
    with pytest.raises(ValueError, match="`vocab_size` must be above 4, the special tokens, got 4"):
        train_tokenizer(CAPTIONS, "word", 4)


# ---- Cached features


@pytest.fixture
def encoder(make_config) -> TDDModel:
    return TDDModel(make_config(pooling=None, vocab_size=20, max_position_embeddings=4))


@pytest.fixture
def processor() -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": 16, "width": 16})


@pytest.fixture
def pictures() -> Dataset:
    """Pictures of noise, and their numbers as captions."""
    rng = np.random.default_rng(0)
    images = [PILImage.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)) for _ in range(5)]
    columns = {"image": images, "captions": [[str(number)] for number in range(5)]}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "captions": List(Value("string"))}))


def stack(rows: Dataset) -> torch.Tensor:
    return torch.from_numpy(np.stack([row["image_features"] for row in rows]))


def test_cached_features_are_the_encoders(encoder, processor, pictures, tmp_path):
    pixel_values = processor([row["image"] for row in pictures], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = encoder.eval().get_image_features(pixel_values).pooler_output
    encoder.train()
    for _ in range(2):  # made, then read
        rows = cache_features(encoder, processor, pictures, tmp_path / "deep", batch_size=2)
        features = stack(rows)
        assert features.shape == (5, 17, 32) and features.dtype == torch.float16 and encoder.training
        torch.testing.assert_close(features.float(), expected, atol=5e-3, rtol=0)
        assert [row["captions"] for row in rows.__getitems__([4, 2])] == [["4"], ["2"]] == rows["captions"][4:1:-2]
    assert len(list((tmp_path / "deep").iterdir())) == 1


def test_a_cache_is_read_only_where_nothing_changed(encoder, processor, pictures, tmp_path, monkeypatch):
    first = stack(cache_features(encoder, processor, pictures, tmp_path))
    encode = TDDModel.get_image_features
    monkeypatch.setattr(TDDModel, "get_image_features", lambda *_: pytest.fail("read from disc, not encoded"))
    assert stack(cache_features(encoder, processor, pictures, tmp_path)).equal(first)

    bright = ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.4] * 3)
    views = [AugmentedViews(Augmentation(hflip=p), processor, n) for p, n in [(0.1, 1), (0.1, 2), (0.2, 2)]]
    plain = AugmentedViews(Augmentation(), processor, 1)
    others = [AugmentedViews(Augmentation(), bright, 1), *views]
    fingerprints = {features_fingerprint(encoder, each, pictures) for each in [plain, *others]}
    fingerprints.add(features_fingerprint(encoder, plain, pictures.select([1, 0, 2, 3, 4])))
    with torch.no_grad():
        next(encoder.encoder.parameters()).add_(0.5)
    fingerprints.add(features_fingerprint(encoder, plain, pictures))
    assert len(fingerprints) == 7

    monkeypatch.setattr(TDDModel, "get_image_features", encode)
    assert not stack(cache_features(encoder, processor, pictures, tmp_path)).equal(first)


def test_a_cache_is_read_by_the_same_encoder_from_another_folder(encoder, processor, pictures, tmp_path):
    fingerprints = set()
    for name in ("one", "other"):
        encoder.encoder.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        again = TDDModel.from_encoder_pretrained(
            tmp_path / name, pooling=None, vocab_size=9, hidden_size=32, num_attention_heads=2
        )
        views = AugmentedViews(Augmentation(), AutoImageProcessor.from_pretrained(tmp_path / name), 1)
        fingerprints.add(features_fingerprint(again, views, pictures))
    assert len(fingerprints) == 1


def test_views_are_augmented_and_depend_on_their_row_alone(encoder, processor, pictures, tmp_path):
    views = AugmentedViews(Augmentation(scale=(0.3, 0.6)), processor, num_views=2)
    plain = stack(cache_features(encoder, processor, pictures, tmp_path))
    features = stack(cache_features(encoder, views, pictures, tmp_path / "views"))
    assert features.shape == (5, 2, 17, 32)
    assert not features[:, 0].equal(features[:, 1]) and not features[:, 0].equal(plain)
    assert (tmp_path / "views").exists()
    torch.manual_seed(9)
    again = stack(cache_features(encoder, views, pictures.select(range(3)), tmp_path / "again", batch_size=2))
    torch.testing.assert_close(again, features[:3], atol=5e-3, rtol=0)


def test_an_interrupted_encoding_leaves_no_cache(encoder, processor, pictures, tmp_path, monkeypatch):
    encode, calls = TDDModel.get_image_features, []

    def interrupted(model, pixel_values):
        calls.append(len(pixel_values))
        if len(calls) == 3:
            raise RuntimeError("power cut")
        return encode(model, pixel_values)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(TDDModel, "get_image_features", interrupted)
        cache_features(encoder, processor, pictures, tmp_path, batch_size=2)
    assert calls == [2, 2, 1] and list(tmp_path.iterdir()) == []
    assert len(stack(cache_features(encoder, processor, pictures, tmp_path))) == 5


# ---- The script, as users run it


def test_script_trains_an_encoder_that_transformers_and_tdd_load(tmp_path):
    data = load_captions(load_recipe(RECIPE).data)
    few = tmp_path / "few.parquet"
    data["train"].select(range(64)).to_parquet(few)
    files = [f"data.data_files.{split}={few}" for split in ("train", "validation", "test_combo", "test_vendor")]
    settings = [
        "training.num_train_epochs=1",
        "training.dataloader_num_workers=0",
        "data.caption_column=captions",
        "augmentation.size=32",
    ]
    narrow = ["model.vision_config.model_args.channels=[8, 8, 16, 16]", "training.batch_size=32"]
    command = [sys.executable, str(SCRIPT), str(RECIPE), "--set", *settings, *narrow, *files]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "validation" in done.stdout

    folder = tmp_path / "outputs/emoji_encoder/encoder-seed0"
    scores = json.loads((folder / "result.json").read_text())["scores"]
    assert [entry["split"] for entry in scores] == ["validation", "test_combo", "test_vendor"]
    assert all(0 <= entry[metric] <= 1 for entry in scores for metric in ("word_map", "word_f1"))

    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    pixel_values = AutoImageProcessor.from_pretrained(folder)(picture(), return_tensors="pt")["pixel_values"]
    expected = AutoModel.from_pretrained(folder).eval()(pixel_values).last_hidden_state
    assert expected.shape == (1, 16, 8, 8)
    model = TDDModel.from_encoder_pretrained(folder, pooling=None, hidden_size=32, num_attention_heads=2).eval()
    torch.testing.assert_close(
        model.get_image_features(pixel_values).pooler_output, expected.flatten(2).transpose(1, 2)
    )
