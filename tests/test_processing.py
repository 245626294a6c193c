# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Tests of the processor: prompts, captions, infilling, images, saving, and what it refuses."""

import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoProcessor, BatchFeature, CLIPImageProcessor, PreTrainedTokenizerFast, ViTImageProcessor

from modeling_tdd import TDDForCaptioning, TDDProcessor
from modeling_tdd.processing_tdd import logger


SHIPPED = Path(__file__).parent.parent / "checkpoints/emoji-captions"
PAD, UNK, EOS, MASK = range(4)
WORDS = ["[PAD]", "[UNK]", "[EOS]", "[MASK]", "a", "cat", "on", "sofa", "dog", "[CLS]"]
IDS = {word: index for index, word in enumerate(WORDS)}


def make_tokenizer(**kwargs: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of words that adds `[CLS]` where special tokens are asked for, as BERT's does."""
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 9)])
    defaults = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "eos_token": "[EOS]",
        "mask_token": "[MASK]",
        "model_max_length": 5,
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**defaults, **kwargs})


@pytest.fixture
def processor() -> TDDProcessor:
    return TDDProcessor(ViTImageProcessor(size={"height": 16, "width": 16}), make_tokenizer())


@pytest.fixture
def images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(3)]


# ---- Images


def test_images_alone(processor: TDDProcessor, images: list[Image.Image]) -> None:
    inputs = processor(images=images, return_tensors="pt")
    assert isinstance(inputs, BatchFeature) and list(inputs) == ["pixel_values"]
    expected = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    assert expected.shape == (3, 3, 16, 16)
    assert torch.equal(inputs["pixel_values"], expected)
    assert torch.equal(processor(images=images[1], return_tensors="pt")["pixel_values"], expected[1:2])


def test_kinds_of_images(processor: TDDProcessor, images: list[Image.Image], tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    images[0].save(path)
    expected = processor(images=images[0], return_tensors="pt")["pixel_values"]
    transparent = images[0].convert("RGBA")
    for image in (path, str(path), Image.open(path), np.array(images[0]), transparent, [path]):
        assert torch.equal(processor(images=image, return_tensors="pt")["pixel_values"], expected)
    gray = processor(images=images[0].convert("L"), return_tensors="pt")["pixel_values"]
    assert gray.shape == (1, 3, 16, 16)


def test_arguments_reach_the_image_processor(processor: TDDProcessor, images: list[Image.Image]) -> None:
    inputs = processor(images=images, size={"height": 8, "width": 8}, return_tensors="pt")
    assert inputs["pixel_values"].shape == (3, 3, 8, 8)


def test_any_image_processor(images: list[Image.Image]) -> None:
    image_processor = CLIPImageProcessor(size={"shortest_edge": 18}, crop_size={"height": 16, "width": 16})
    processor = TDDProcessor(image_processor, make_tokenizer())
    assert processor(images=images, text="a", return_tensors="pt")["pixel_values"].shape == (3, 3, 16, 16)


@pytest.mark.parametrize("content", [b"not an image", "cut short", None], ids=["text", "cut short", "missing"])
def test_unreadable_image(
    processor: TDDProcessor, images: list[Image.Image], tmp_path: Path, content: bytes | str | None
) -> None:
    path = tmp_path / "bad.png"
    if content == "cut short":
        images[0].save(path)
        content = path.read_bytes()[:300]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"Unreadable image 1 \(.*bad\.png\)"):
        processor(images=[images[0], str(path)])
    if content is not None and content.startswith(b"\x89PNG"):
        with pytest.raises(ValueError, match=r"Unreadable image 0 \(.*bad\.png\)"):
            processor(images=Image.open(path))


# ---- Prompts


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_prompts(images: list[Image.Image], padding_side: str) -> None:
    processor = TDDProcessor(ViTImageProcessor(), make_tokenizer(padding_side=padding_side))
    inputs = processor(images=images, text=["a cat", "", "dog"], return_tensors="pt")
    assert set(inputs) == {"pixel_values", "input_ids", "attention_mask"}
    a, cat, dog = IDS["a"], IDS["cat"], IDS["dog"]
    third = [PAD, dog] if padding_side == "left" else [dog, PAD]
    assert inputs["input_ids"].tolist() == [[a, cat], [PAD, PAD], third]
    assert inputs["attention_mask"].tolist() == [[1, 1], [0, 0], [int(token != PAD) for token in third]]


def test_empty_prompts(processor: TDDProcessor, images: list[Image.Image]) -> None:
    for text, rows in [("", 3), (["", "", ""], 3)]:
        inputs = processor(images=images, text=text, return_tensors="pt")
        assert inputs["input_ids"].tolist() == [[PAD]] * rows and inputs["input_ids"].dtype == torch.int64
        assert inputs["attention_mask"].tolist() == [[0]] * rows


def test_one_prompt_serves_all_images(processor: TDDProcessor, images: list[Image.Image]) -> None:
    assert processor(images=images, text="a cat")["input_ids"] == [[IDS["a"], IDS["cat"]]] * 3
    assert processor(text="a cat")["input_ids"] == [[IDS["a"], IDS["cat"]]]


# ---- Captions


def test_captions(processor: TDDProcessor, images: list[Image.Image]) -> None:
    batch = processor(images=images, captions=["a cat", "dog", "a bird"], return_tensors="pt")
    assert set(batch) == {"pixel_values", "labels"}
    a, cat, dog = IDS["a"], IDS["cat"], IDS["dog"]
    assert batch["labels"].tolist() == [[a, cat, EOS], [dog, EOS, PAD], [a, UNK, EOS]]
    assert processor.batch_decode(batch["labels"], skip_special_tokens=True) == ["a cat", "dog", "a"]
    assert processor.decode(batch["labels"][0], skip_special_tokens=True) == "a cat"


def test_a_long_caption_is_truncated_with_one_warning(
    processor: TDDProcessor, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    type(logger).warning_once.cache_clear()
    monkeypatch.setattr(logger, "propagate", True)
    a, cat, on, sofa = (IDS[word] for word in ("a", "cat", "on", "sofa"))
    with caplog.at_level(logging.WARNING):
        assert processor(captions=["a cat on sofa"])["labels"] == [[a, cat, on, sofa, EOS]]
        assert not caplog.records
        long = processor(captions=["a cat on a sofa", "dog"])["labels"]
        processor(captions=["a dog on a dog on a sofa"])
    assert long == [[a, cat, on, a, EOS], [IDS["dog"], EOS, PAD, PAD, PAD]]
    assert len(caplog.records) == 1
    assert "longer than 4 tokens and an end are truncated" in caplog.text


def test_captions_are_padded_and_truncated_as_wanted(processor: TDDProcessor) -> None:
    captions, end, pad = ["a red dog", "a cat"], processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    plain = processor(captions=captions)["labels"]
    assert len(plain[0]) == len(plain[1]) == 4 and plain[0][-1] == end
    wide = processor(captions=captions, padding="max_length", max_length=6)["labels"]
    assert wide == [[*row, pad, pad] for row in plain]
    assert processor(text="a", captions=captions, padding="max_length", max_length=6)["labels"] == wide
    assert processor(captions=captions, max_length=3, truncation=True)["labels"] == [
        [*plain[0][:2], end],
        plain[1][:3],
    ]
    assert (
        processor(captions=captions, padding=True, padding_side="left", return_tensors="pt").labels.tolist() == plain
    )
    for call in ({"infill": "a [MASK]"}, {"infill": "a [A]", "choices": {"A": ["cat", "dog"]}}):
        with pytest.raises(ValueError, match="`max_length` is for `text` and `captions`"):
            processor(**call, max_length=5)


@pytest.mark.parametrize("empty", ["", "   "])
def test_empty_caption(processor: TDDProcessor, empty: str) -> None:
    with pytest.raises(ValueError, match=r"Empty captions: \[1\] of 2. Leave"):
        processor(captions=["a cat", empty])


# ---- Infilling


def test_infilling(processor: TDDProcessor, images: list[Image.Image]) -> None:
    inputs = processor(images=images[:2], infill=["a [MASK] on", "[MASK]"], return_tensors="pt")
    assert set(inputs) == {"pixel_values", "decoder_input_ids", "decoder_attention_mask"}
    assert inputs["decoder_input_ids"].tolist() == [[IDS["a"], MASK, IDS["on"], EOS], [MASK, EOS, PAD, PAD]]
    assert inputs["decoder_attention_mask"].tolist() == [[1, 0, 1, 1], [0, 1, 1, 1]]
    assert processor(images=images, infill="a [MASK]")["decoder_input_ids"] == [[IDS["a"], MASK, EOS]] * 3


@pytest.mark.parametrize("corruption", ["gaussian", "mask"])
def test_infilled_captions(
    processor: TDDProcessor, images: list[Image.Image], make_captioner: Any, corruption: str
) -> None:
    model = make_captioner(corruption=corruption, vocab_size=len(WORDS))
    inputs = processor(
        images=images, infill=["a [MASK] on [MASK] sofa", "[MASK] cat", "dog [MASK]"], return_tensors="pt"
    )
    texts = [text.split() for text in processor.batch_decode(model.generate(**inputs))]
    assert [texts[0][0], texts[0][2], texts[0][4:6]] == ["a", "on", ["sofa", "[EOS]"]]
    assert texts[1][1:3] == ["cat", "[EOS]"] and [texts[2][0], texts[2][2]] == ["dog", "[EOS]"]
    free = [texts[0][1], texts[0][3], texts[1][0], texts[2][1]]
    assert not {"[EOS]", "[PAD]"} & set(free)
    assert all(set(text[6 if row == 0 else 3 :]) <= {"[PAD]"} for row, text in enumerate(texts))


def test_prompted_captions(processor: TDDProcessor, images: list[Image.Image], make_captioner: Any) -> None:
    model = make_captioner(vocab_size=len(WORDS))
    sequences = model.generate(**processor(images=images, text=["a cat", "", "dog"], return_tensors="pt"))
    assert sequences[0, :2].tolist() == [IDS["a"], IDS["cat"]] and sequences[2, 0].item() == IDS["dog"]
    unprompted = model.generate(**processor(images=images, return_tensors="pt"))
    assert torch.equal(sequences[1], unprompted[1])


def test_captions_train(processor: TDDProcessor, images: list[Image.Image], make_captioner: Any) -> None:
    model: TDDForCaptioning = make_captioner(vocab_size=len(WORDS)).train()
    batch = processor(images=images, captions=["a cat", "dog", "a dog on sofa"], return_tensors="pt")
    assert model(**batch).loss > 0


# ---- Words


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """The processor's warnings, as if none had been shown before."""
    type(logger).warning_once.cache_clear()
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.mark.parametrize("argument", ["text", "infill"])
def test_an_unknown_word_is_named(processor: TDDProcessor, warnings: pytest.LogCaptureFixture, argument: str) -> None:
    processor(**{argument: ["a cat [MASK]", "dog on [MASK] sofa"]})
    assert not warnings.records
    inputs = processor(**{argument: ["a zebra on [MASK]", "[MASK] cat", "yak [MASK]"]})
    assert [record.getMessage() for record in warnings.records] == [
        f"The tokenizer does not know {word!r}: the model does not see it." for word in ("zebra", "yak")
    ]
    ids = inputs["input_ids" if argument == "text" else "decoder_input_ids"]
    assert ids[0][:3] == [IDS["a"], UNK, IDS["on"]]


def test_outer_white_space_is_stripped(warnings: pytest.LogCaptureFixture) -> None:
    tokenizer = TDDProcessor.from_pretrained(SHIPPED).tokenizer  # a space is a part of its tokens
    processor = TDDProcessor(ViTImageProcessor(), tokenizer)
    for argument, text in (("text", "woman"), ("infill", "woman [MASK]"), ("captions", "woman climbing")):
        assert processor(**{argument: f" \n{text} \t"}) == processor(**{argument: text})
    assert not warnings.records


def test_a_colon_in_an_infilling_is_kept(warnings: pytest.LogCaptureFixture) -> None:
    processor = TDDProcessor.from_pretrained(SHIPPED)
    expected = processor(infill="woman climbing: [MASK] skin tone")
    for text in ("woman climbing : [MASK] skin tone", "woman climbing :[MASK] skin tone"):
        assert processor(infill=text) == expected
    assert ":" in processor.tokenizer.decode(processor(infill="[MASK] : dark skin tone")["decoder_input_ids"][0])
    assert not warnings.records
    ids = processor(infill="woman xyzzy : [MASK]")["decoder_input_ids"][0]
    assert ids[1:3] == [UNK, expected["decoder_input_ids"][0][2]]
    assert [record.getMessage()[:35] for record in warnings.records] == ["The tokenizer does not know 'xyzzy'"]


def test_an_unknown_argument_is_refused_with_the_nearest(processor: TDDProcessor, images: list[Image.Image]) -> None:
    with pytest.raises(ValueError, match="`do_resiz` is no argument of the processor.* Did you mean `do_resize`"):
        processor(images=images, do_resiz=False)
    with pytest.raises(ValueError, match="`videos` is no argument"):
        processor(images=images, videos=images)


# ---- Saving, and what is refused


def test_save_and_load(
    processor: TDDProcessor, images: list[Image.Image], make_captioner: Any, tmp_path: Path
) -> None:
    make_captioner(vocab_size=len(WORDS)).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for cls in (AutoProcessor, TDDProcessor):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is TDDProcessor and isinstance(loaded.image_processor, ViTImageProcessor)
        assert loaded.tokenizer.model_max_length == 5
        for arguments in ({"text": "a cat"}, {"captions": ["a cat", "dog", "on"]}, {"infill": "[MASK] cat"}):
            expected = processor(images=images, **arguments, return_tensors="pt")
            actual = loaded(images=images, **arguments, return_tensors="pt")
            assert expected.keys() == actual.keys()
            assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_model_input_names(processor: TDDProcessor) -> None:
    assert processor.model_input_names == ["pixel_values", "input_ids", "attention_mask"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "at least one of `images`, `text`, `captions`, `infill` and `choices`"),
        ({"text": "a", "infill": "[MASK]"}, "not both"),
        ({"text": ["a", "cat"], "images": 3}, "3 images and 2 of `text`"),
        ({"captions": "a cat", "images": 3}, "3 images and 1 of `captions`"),
        ({"text": [1]}, r"`text` must be a string or a list of strings, got \[1\]"),
        ({"infill": "a cat"}, r"Nothing to fill: 'a cat' has no \[MASK\]"),
    ],
    ids=str,
)
def test_bad_arguments(
    processor: TDDProcessor, images: list[Image.Image], arguments: dict[str, Any], message: str
) -> None:
    if "images" in arguments:
        arguments = {**arguments, "images": images}
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


@pytest.mark.parametrize("name", ["pad_token", "eos_token"])
def test_a_tokenizer_needs_padding_and_an_end(name: str) -> None:
    with pytest.raises(ValueError, match="needs a padding and an end token, got .*None"):
        TDDProcessor(ViTImageProcessor(), make_tokenizer(**{name: None}))


def test_infilling_needs_a_mask_token() -> None:
    processor = TDDProcessor(ViTImageProcessor(), make_tokenizer(mask_token=None))
    with pytest.raises(ValueError, match="needs a tokenizer with a mask token"):
        processor(infill="a cat")


# ---- Threads


def test_threads_share_a_processor(processor: TDDProcessor) -> None:
    """Padding and truncation of a fast tokenizer are switches on the one object that all threads have."""
    texts = ["a", "a cat", "a cat on a sofa", "dog"]
    calls = [{"text": [texts[i % 4], texts[i // 4]]} for i in range(16)] + [{"captions": texts[:2]}]
    calls += [{"text": texts, "truncation": True, "max_length": n, "padding": "max_length"} for n in (1, 3)]
    expected = [dict(processor(**call)) for call in calls]
    assert expected[-1]["input_ids"][1:3] == [[IDS["a"], IDS["cat"], PAD], [IDS["a"], IDS["cat"], IDS["on"]]]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(16) as pool:
            results = list(pool.map(lambda index: (index, dict(processor(**calls[index]))), [*range(19)] * 50))
    finally:
        sys.setswitchinterval(interval)
    assert [index for index, result in results if result != expected[index]] == []
