# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Tests of the captioner in Transformers' pipelines, with this package and on a machine without it."""

import base64
import json
import logging
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    ImageTextToTextPipeline,
    PreTrainedTokenizerFast,
    TextDiffusionStreamer,
    TextStreamer,
    ViTImageProcessor,
    pipeline,
)
from transformers.pipelines.pt_utils import KeyDataset

import modeling_tdd
from modeling_tdd import TDDForCaptioning, TDDImageToTextPipeline, TDDProcessor


WORDS = [
    "[PAD]",
    "[UNK]",
    "[EOS]",
    "[MASK]",
    *[
        "a",
        "cat",
        "on",
        "sofa",
        "dog",
        "man",
        "and",
        "the",
        "red",
        "blue",
        "sky",
        "tree",
        "house",
        "bird",
        "sea",
        "sun",
    ],
]


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(4)]


def make_tokenizer(padding_side: str = "right") -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="[EOS]",
        mask_token="[MASK]",
        padding_side=padding_side,
        model_max_length=8,
    )


@pytest.fixture
def model(make_captioner: Callable[..., TDDForCaptioning]) -> TDDForCaptioning:
    return make_captioner(vocab_size=len(WORDS))


@pytest.fixture
def processor() -> TDDProcessor:
    return TDDProcessor(ViTImageProcessor(size={"height": 16, "width": 16}), make_tokenizer())


@pytest.fixture
def folder(model: TDDForCaptioning, processor: TDDProcessor, tmp_path: Path) -> str:
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture
def captions(model: TDDForCaptioning, processor: TDDProcessor, images: list[Image.Image]) -> list[str]:
    """What the model says of each image, without any pipeline."""
    sequences = model.generate(**processor(images=images, return_tensors="pt"))
    captions = processor.batch_decode(sequences, skip_special_tokens=True)
    assert len(set(captions)) > 1 and all(captions)
    return captions


def test_image_text_to_text(
    folder: str, model: TDDForCaptioning, processor: TDDProcessor, images: list[Image.Image], captions: list[str]
) -> None:
    pipe = pipeline("image-text-to-text", model=folder)
    assert isinstance(pipe, ImageTextToTextPipeline) and type(pipe.processor) is TDDProcessor
    assert pipe(images[0], text="") == [{"input_text": "", "generated_text": captions[0]}]
    assert pipe(images=images, text="") == [{"input_text": "", "generated_text": caption} for caption in captions]
    # A prompt is the caption's beginning, with a space behind it
    inputs = processor(images=images[:2], text=["the red", "dog"], return_tensors="pt")
    expected = processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)
    prompted = pipe(images[:2], text=["the red", "dog"])
    assert [record["generated_text"] for record in prompted] == expected
    assert expected[0].startswith("the red ") and expected[1].startswith("dog ")
    new_text = pipe(images[1], text="dog", return_full_text=False)[0]["generated_text"]
    assert "dog" + new_text == expected[1]
    # Dictionaries, one at a time and in batches
    rows = [{"images": image, "text": text} for image, text in zip(images, ["", "dog", "", "the red"])]
    batched = list(pipe((row for row in rows), batch_size=3))
    assert batched == [pipe(**row) for row in rows]
    assert batched[0][0]["generated_text"] == captions[0]


def test_arguments_of_generate(folder: str, images: list[Image.Image], model: TDDForCaptioning) -> None:
    pipe = pipeline("image-text-to-text", model=folder)
    several = pipe(images[:2], text="", generate_kwargs={"num_return_sequences": 3, "num_inference_steps": 2})
    assert len(several) == 6
    short = pipe(images[0], text="", max_new_tokens=2)[0]["generated_text"]
    assert len(short.split()) <= 2
    with pytest.raises(ValueError, match="do not apply to diffusion: num_beams"):
        pipe(images[0], text="", generate_kwargs={"num_beams": 3})


def check_captioning(pipe: TDDImageToTextPipeline, images: list[Image.Image], captions: list[str], path: Path) -> None:
    assert pipe(images[0]) == [{"generated_text": captions[0]}]
    images[1].save(path)
    assert pipe(str(path)) == [{"generated_text": captions[1]}]
    expected = [[{"generated_text": caption}] for caption in captions]
    assert pipe(images) == expected
    assert pipe(images, batch_size=3) == expected
    assert list(pipe((image for image in images), batch_size=2)) == expected
    assert pipe([{"images": image} for image in images], batch_size=2) == expected


def test_image_captioning(folder: str, images: list[Image.Image], captions: list[str], tmp_path: Path) -> None:
    pipe = pipeline("image-captioning", model=folder)
    assert type(pipe) is TDDImageToTextPipeline
    check_captioning(pipe, images, captions, tmp_path / "image.png")
    several = pipe(images, batch_size=2, generate_kwargs={"num_return_sequences": 3})
    assert [len(records) for records in several] == [3] * 4
    assert several == pipe(images, generate_kwargs={"num_return_sequences": 3})
    prompted = pipe(images[:3], text=["the red", "", "dog"], batch_size=3)
    assert prompted[0][0]["generated_text"].startswith("the red ")
    assert prompted[1] == [{"generated_text": captions[1]}]
    assert prompted == [pipe(image, text=text) for image, text in zip(images, ["the red", "", "dog"])]
    assert pipe(images[:1], text="dog") == [pipe(images[0], text="dog")]
    with pytest.raises(ValueError, match="4 images and 2 of `text`"):
        pipe(images, text=["a", "dog"])
    with pytest.raises(ValueError, match="`text` must be one string"):
        pipe((image for image in images), text=["a", "dog"])


class Pictures(Dataset):
    """A data set of PyTorch's, with rows or images."""

    def __init__(self, rows: list[Any]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


class PictureStream(IterableDataset):
    def __init__(self, rows: list[Any]):
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


def many_images(images: list[Image.Image], tmp_path: Path) -> dict[str, Any]:
    """The same images in each kind of list, array, stream and data set."""
    files = [tmp_path / f"{index}.png" for index in range(len(images))]
    for image, file in zip(images, files):
        image.save(file)
    arrays = np.stack([np.asarray(image) for image in images])
    table = datasets.Dataset.from_dict({"image": list(map(str, files)), "label": [0] * 4, "text": ["cat"] * 4})
    table = table.cast_column("image", datasets.Image())
    return {
        "list": images,
        "paths": files,
        "names": tuple(map(str, files)),
        "bytes": [file.read_bytes() for file in files],
        "base64": [base64.b64encode(file.read_bytes()).decode() for file in files],
        "arrays": list(arrays),
        "one array": arrays,
        "tensors": list(torch.from_numpy(arrays).permute(0, 3, 1, 2)),
        "rows": [{"image": image, "label": 0} for image in images],
        "generator": (image for image in images),
        "map": map(Image.open, files),
        "table": table,
        "column": table["image"],
        "undecoded table": table.cast_column("image", datasets.Image(decode=False)),
        "streamed table": table.to_iterable_dataset(),
        "key data set": KeyDataset(table, "image"),
        "data set": Pictures(images),
        "data set of rows": Pictures([{"image": file, "label": 0} for file in files]),
        "stream": PictureStream(files),
    }


def test_many_images(folder: str, images: list[Image.Image], captions: list[str], tmp_path: Path) -> None:
    pipe = pipeline("image-captioning", model=folder)
    expected = [[{"generated_text": caption}] for caption in captions]
    for name, several in many_images(images, tmp_path).items():
        outputs = pipe(several, batch_size=3)
        if name in ("table", "column", "undecoded table", "key data set", "data set", "data set of rows"):
            assert len(outputs) == 2, name  # batches, as of Transformers' pipelines
        elif name not in ("generator", "map", "streamed table", "stream"):
            assert isinstance(outputs, list), name
        assert list(outputs) == expected, name


def test_one_image(folder: str, images: list[Image.Image], captions: list[str], tmp_path: Path) -> None:
    pipe = pipeline("image-captioning", model=folder)
    file, array = tmp_path / "image.png", np.asarray(images[0])
    images[0].save(file)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    text = base64.b64encode(file.read_bytes()).decode()
    for image in (images[0], file, str(file), file.read_bytes(), text, array, tensor, array / 255, {"image": file}):
        assert pipe(image) == [{"generated_text": captions[0]}]


def test_nothing_gives_nothing(folder: str) -> None:
    pipe = pipeline("image-captioning", model=folder)
    assert pipe([]) == pipe(()) == pipe(np.zeros((0, 16, 16, 3), np.uint8)) == []
    assert list(pipe(Pictures([]))) == list(pipe(PictureStream([]))) == list(pipe(iter([]))) == []


@pytest.mark.parametrize(
    ("images", "name"),
    [
        (None, "NoneType"),
        (3, "int"),
        (object(), "object"),
        (["image.png", 3], "int"),
        ([{"label": 3}], "a dictionary of 'label'"),
        ({"images": 3}, "int"),
        (Pictures([3]), "int"),
        (range(3), "int"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
)
def test_what_is_no_image_is_refused_at_once(folder: str, images: Any, name: str) -> None:
    pipe = pipeline("image-captioning", model=folder)
    pipe.model = None  # it is not asked
    with pytest.raises(TypeError, match=f"must be a PIL image, a path, a URL.*, got {name}"):
        pipe(images)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_workers(
    folder: str,
    images: list[Image.Image],
    captions: list[str],
    tmp_path: Path,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        multiprocessing.context._default_context, "_actual_context", multiprocessing.get_context(method)
    )
    pipe = pipeline("image-captioning", model=folder)
    table = many_images(images, tmp_path)["table"]
    outputs = pipe(table, num_workers=1, batch_size=2)
    assert len(outputs) == 2
    assert list(outputs) == [[{"generated_text": caption}] for caption in captions]


# ---- Settings


def test_settings_reach_generate(folder: str, images: list[Image.Image], processor: TDDProcessor) -> None:
    for task in ("image-captioning", "image-text-to-text"):
        pipe = pipeline(task, model=folder)
        direct = pipe(images[0], text="", num_inference_steps=1, seed=7, max_new_tokens=2)
        nested = {"num_inference_steps": 1, "seed": 7, "max_new_tokens": 2}
        assert direct == pipe(images[0], text="", generate_kwargs=nested)
        assert len(direct[0]["generated_text"].split()) <= 2
        tokens = torch.ones(1, 3, dtype=torch.long)
        with patch.object(pipe.model, "generate", return_value=tokens) as generate:
            pipe(images[0], text="", num_inference_steps=1, guidance_scale=2.0, max_length=5)
        given = generate.call_args.kwargs
        assert (given["num_inference_steps"], given["guidance_scale"], given["max_length"]) == (1, 2.0, 5)
        made = pipeline(task, model=folder, num_return_sequences=3)
        assert len(made(images[0], text="")) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_step": 1}, "`num_inference_step` is no argument of .*Did you mean `num_inference_steps`"),
        ({"do_resiz": False}, "`do_resiz` is no argument of .*Did you mean `do_resize`"),
        ({"output_trajectory": True}, "`output_trajectory` is no argument of this pipeline"),
        ({"seed": 1, "generate_kwargs": {"seed": 2}}, "`seed` is given twice"),
    ],
    ids=str,
)
def test_wrong_settings(folder: str, images: list[Image.Image], arguments: dict[str, Any], message: str) -> None:
    for task in ("image-captioning", "image-text-to-text"):
        pipe = pipeline(task, model=folder)
        with pytest.raises(ValueError, match=message):
            pipe(images[0], text="", **arguments)


def test_image_text_to_text_without_text(folder: str, images: list[Image.Image], captions: list[str], tmp_path: Path):
    pipe = pipeline("image-text-to-text", model=folder)
    images[1].save(tmp_path / "image.png")
    assert pipe(images[0]) == [{"input_text": "", "generated_text": captions[0]}]
    assert pipe(str(tmp_path / "image.png"))[0]["generated_text"] == captions[1]
    assert [record["generated_text"] for record in pipe(images)] == captions
    assert [records[0]["generated_text"] for records in pipe(image for image in images)] == captions
    assert pipe([]) == []
    with pytest.raises(ValueError, match="Give `images`"):
        pipe(text="a cat")


def test_a_prompt_without_outer_white_space(folder: str, images: list[Image.Image]) -> None:
    for task in ("image-captioning", "image-text-to-text"):
        pipe = pipeline(task, model=folder)
        assert pipe(images[0], text=" the red\n") == pipe(images[0], text="the red")


@pytest.mark.parametrize("task", ["image-to-text", "image-text-to-text", "image-captioning"])
def test_shipped_captioner(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Transformers' warning that it replaces `image-to-text` has an argument that `logging` cannot format
    monkeypatch.setattr(logging.getLogger("transformers.pipelines"), "warning_once", lambda *args: None)
    folder = Path(__file__).parent.parent / "checkpoints/emoji-captions"
    pipe = pipeline(task, model=str(folder), trust_remote_code=True)
    (record,) = pipe(folder / "example.png")
    assert record["generated_text"] == "woman climbing: dark skin tone"
    with Image.open(folder / "example.png") as image:
        colors = np.asarray(image.convert("RGB"))
    is_white = (colors == 255).all(axis=-1, keepdims=True)
    transparent = Image.fromarray(np.concatenate([colors * ~is_white, np.uint8(255) * ~is_white], axis=-1))
    assert pipe(transparent) == [record]


def test_loading_warns_of_nothing(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines load a tokenizer with `dtype="auto"`. A configuration that refuses it is replaced by a plain one."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    folder = Path(__file__).parent.parent / "checkpoints/emoji-captions"
    pipeline("image-captioning", model=str(folder))
    assert [record.getMessage() for record in caplog.records if record.name.startswith("transformers")] == []


def test_left_padding(folder: str, images: list[Image.Image], captions: list[str]) -> None:
    make_tokenizer("left").save_pretrained(folder)
    pipe = pipeline("image-captioning", model=folder)
    assert pipe.tokenizer.padding_side == "left"
    prompted = pipe(images[:3], text=["", "the red", "dog"], batch_size=3)
    assert prompted[0] == [{"generated_text": captions[0]}]
    assert prompted[1:] == [pipe(image, text=text) for image, text in zip(images[1:], ["the red", "dog"])]


def test_image_to_text_comes_with_the_checkpoint(
    folder: str, images: list[Image.Image], captions: list[str], tmp_path: Path
) -> None:
    config = json.loads((Path(folder) / "config.json").read_text())
    assert config["custom_pipelines"].keys() == {"image-to-text"}
    pipe = pipeline("image-to-text", model=folder, trust_remote_code=True)
    assert type(pipe).__name__ == "TDDImageToTextPipeline" and type(pipe.model) is TDDForCaptioning
    check_captioning(pipe, images, captions, tmp_path / "image.png")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        pipeline("image-to-text", model=folder)


def test_without_the_package(folder: str, images: list[Image.Image], captions: list[str], tmp_path: Path) -> None:
    """A checkpoint brings all the code that it needs."""
    images[0].save(tmp_path / "image.png")
    script = f"""
import sys
sys.modules["modeling_tdd"] = None  # importing it raises an ImportError
from transformers import pipeline
for task, text in (("image-to-text", ""), ("image-text-to-text", "")):
    pipe = pipeline(task, model={folder!r}, trust_remote_code=True)
    print(pipe({str(tmp_path / "image.png")!r}, text=text)[0]["generated_text"])
    print(type(pipe.processor).__module__.split(".")[-1])
pipe.model.save_pretrained({str(tmp_path / "again")!r})
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [captions[0], "processing_tdd"] * 2
    modules = {path.name for path in Path(folder).glob("*.py")}
    package = Path(modeling_tdd.__file__).parent
    assert modules == {path.name for path in package.glob("*_tdd.py")}
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == modules


def test_text_streamers(
    model: TDDForCaptioning,
    processor: TDDProcessor,
    images: list[Image.Image],
    captions: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    inputs = processor(images=images[0], return_tensors="pt")
    model.generate(**inputs, streamer=TextStreamer(processor.tokenizer, skip_special_tokens=True))
    assert capsys.readouterr().out == captions[0] + "\n"
    streamer = TextDiffusionStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    inputs = processor(images=images[0], text="the red", return_tensors="pt")
    sequences = model.generate(**inputs, streamer=streamer, num_inference_steps=4)
    printed = capsys.readouterr().out
    new_text = processor.decode(sequences[0, 2:], skip_special_tokens=True)
    assert printed.endswith(new_text + "\n") and printed.count("\033[33m") == 4  # drafts are yellow


@pytest.mark.parametrize("task", ["image-captioning", "image-text-to-text"])
def test_a_tokenizer_of_another_model_is_refused(
    folder: str, processor: TDDProcessor, make_captioner: Callable[..., TDDForCaptioning], task: str
) -> None:
    make_captioner(vocab_size=len(WORDS) - 1).save_pretrained(folder)
    with pytest.raises(ValueError, match=f"The tokenizer has {len(WORDS)} tokens, and the model's `vocab_size` is"):
        pipeline(task, model=folder)
    make_captioner(vocab_size=len(WORDS), eos_token_id=3).save_pretrained(folder)
    with pytest.raises(ValueError, match="The tokenizer's `eos_token_id` is 2, and the model's is 3"):
        pipeline(task, model=folder)


# ---- Bad images


@pytest.mark.parametrize("kind", ["list", "data set", "generator", "workers"])
@pytest.mark.parametrize("task", ["image-captioning", "image-text-to-text", "image-classification"])
def test_the_bad_image_of_several_is_named(
    folder: str, images: list[Image.Image], make_model: Callable, task: str, kind: str
) -> None:
    if task == "image-classification":
        image_processor = ViTImageProcessor(size={"height": 16, "width": 16})
        pipe = pipeline(task, model=make_model(), image_processor=image_processor)
    else:
        pipe = pipeline(task, model=folder)
    several = [images[0], images[1], b"no image", images[0]]
    if kind == "workers":
        run = partial(pipe, num_workers=1)
    else:
        run = pipe
    if task == "image-text-to-text":  # which takes lists of both
        rows = [{"images": image, "text": "a"} for image in several]
        several, run = (several, partial(run, text="a")) if kind == "list" else (Pictures(rows), run)
    elif kind == "data set":
        several = Pictures(several)
    elif kind == "generator":
        several = (image for image in several)
    with pytest.raises(ValueError, match=r"Unreadable image 2 \(in memory\)"):
        list(run(several, batch_size=2))
