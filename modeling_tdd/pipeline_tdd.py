# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Transformers' pipelines for models of TDD, which open images as training does, and the image-to-text pipeline, which
Transformers 5 dropped."""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    ImageClassificationPipeline,
    ImageTextToTextPipeline,
    Pipeline,
    PreTrainedTokenizerBase,
)
from transformers.pipelines.base import pad_collate_fn

from .generation_configuration_tdd import TDDGenerationConfig
from .images_tdd import KINDS, check_image, is_image, list_images, open_image
from .processing_tdd import Choices, TDDProcessor
from .settings_tdd import suggest


# The entry for a captioner's config.json, in Transformers' format
CUSTOM_PIPELINES = {
    "image-to-text": {"impl": "pipeline_tdd.TDDImageToTextPipeline", "pt": ["AutoModelForImageTextToText"]}
}
# A pipeline returns texts
CHOICE_NAMES = ("infill", "choices")  # arguments of the processor, the same for all images
GENERATION_NAMES = set(TDDGenerationConfig._DEFAULTS) - {"return_dict_in_generate", "output_trajectory"}


class Numbered(NamedTuple):
    """One of several inputs, with its number for errors."""

    number: int
    content: Any


def number(inputs: Any) -> Any:
    """Several inputs of a pipeline as [`Numbered`]: with a length if they have one."""
    is_table = hasattr(inputs, "__len__") and hasattr(inputs, "__getitem__")
    return _Numbers(inputs) if is_table else itertools.starmap(Numbered, enumerate(inputs))


class TDDImageClassificationPipeline(ImageClassificationPipeline):
    """Transformers' own with the images of [`~images_tdd.open_image`]: that one has transparency on black."""

    def get_iterator(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().get_iterator(number(inputs), *args, **kwargs)

    def preprocess(self, image: Any, timeout: float | None = None) -> Any:  # type: ignore[override]
        index, image = image if isinstance(image, Numbered) else (None, image)
        return super().preprocess(open_image(image, timeout, index=index))


class TDDImageTextToTextPipeline(ImageTextToTextPipeline):
    """Transformers' own with the images of [`~images_tdd.open_image`]. It needs no `text`, and takes the parameters of
    [`TDDGenerationConfig`] by their names."""

    # Its code travels with every model, since Transformers' own pipelines, which a machine without this package has,
    # save the parts of a processor without it.
    processor: TDDProcessor
    model: Any  # a captioner

    def __init__(self, *args: Any, **kwargs: Any):
        """As in the parent class. Raises a `ValueError` for a tokenizer that does not fit the model."""
        super().__init__(*args, **kwargs)
        self.model.check_tokenizer(self.tokenizer)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As in the parent class. Raises a `ValueError` for a text without an image."""
        if images is None and (isinstance(text, str) or (text and isinstance(text[0], str))):
            raise ValueError("Give `images`: a captioner continues a text only beside an image.")
        if isinstance(images, (list, tuple)) and not images:
            return []
        first = images[0] if isinstance(images, (list, tuple)) else images
        return super().__call__(images, "" if text is None and is_image(first) else text, **kwargs)

    def _sanitize_parameters(  # type: ignore[override]
        self, generate_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> tuple[dict, ...]:
        generate_kwargs = dict(generate_kwargs or {})
        names = set(signature(super()._sanitize_parameters).parameters) | GENERATION_NAMES
        names |= self.processor.argument_names | set(CHOICE_NAMES)
        for name in list(kwargs):
            if name in generate_kwargs:
                raise ValueError(f"`{name}` is given twice, also in `generate_kwargs`.")
            if name in GENERATION_NAMES:
                generate_kwargs[name] = kwargs.pop(name)
            elif name not in names and self.processor.chat_template is None:  # such a template takes any name
                hint = suggest([name], names)
                raise ValueError(f"`{name}` is no argument of this pipeline, of `generate` or of the processor.{hint}")
        preprocess, forward, postprocess = super()._sanitize_parameters(
            generate_kwargs=generate_kwargs or None, **kwargs
        )
        if "choices" in kwargs:
            postprocess["choices"] = kwargs["choices"]
        return preprocess, forward, postprocess

    def get_iterator(self, inputs: Any, num_workers: int, batch_size: int, *params: dict[str, Any]) -> Any:
        iterator = super().get_iterator(number(inputs), num_workers, batch_size, *params)
        if batch_size > 1:
            iterator.loader.loader.collate_fn = _Collate(
                self.tokenizer, self.feature_extractor or self.image_processor
            )
        return iterator

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """As in the parent class, which leaves the processor out and saves its parts alone."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)
        Path(save_directory, "preprocessor_config.json").unlink(missing_ok=True)  # it is in processor_config.json

    def preprocess(self, inputs: Any = None, timeout: float | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        index, inputs = inputs if isinstance(inputs, Numbered) else (None, inputs)
        if isinstance(inputs, dict) or is_image(inputs):  # and not a chat
            row = _to_row(inputs, "")
            text = row["text"].strip() if isinstance(row["text"], str) else row["text"]
            images = list_images(row["images"])
            indices = [index] if len(images) == 1 else range(len(images))
            images = [open_image(image, timeout, index=place) for image, place in zip(images, indices)]
            if not text and any(kwargs.get(name) is not None for name in CHOICE_NAMES):
                text = None  # no prompt
            inputs = {"images": images, "text": text}
        encoded = super().preprocess(inputs, timeout=timeout, **kwargs)
        encoded["text"] = encoded["text"] or ""  # which is put before each caption
        return encoded

    def _forward(self, model_inputs: dict[str, Any], generate_kwargs: Any = None) -> Any:  # type: ignore[override]
        """As in the parent class, with the probabilities of candidates where they are ranked."""
        text = model_inputs.pop("text")
        settings = self._prepare_generate_kwargs(generate_kwargs or {}, return_dict_in_generate=False)
        config = settings.get("generation_config", self.model.generation_config)
        ranked = {}
        if "choices" in model_inputs or settings.get("num_candidates", getattr(config, "num_candidates", None)):
            outputs = self.model.generate(**model_inputs, **{**settings, "return_dict_in_generate": True})
            sequences, ranked["candidate_probs"] = outputs.sequences, outputs.candidate_probs
        else:
            sequences = self.model.generate(**model_inputs, **settings)
        batch_size, input_ids = len(model_inputs["pixel_values"]), model_inputs.get("input_ids")
        if input_ids is None:  # there is no prompt
            input_ids = sequences.new_full((batch_size, 1), self.tokenizer.pad_token_id)
        sequences = sequences.unflatten(0, (batch_size, -1))
        return {"generated_sequence": sequences, "prompt_text": text, "input_ids": input_ids, **ranked}

    def postprocess(  # type: ignore[override]
        self, model_outputs: dict[str, Any], choices: Choices | None = None, **kwargs: Any
    ) -> list[dict[str, Any]]:
        """As in the parent class. Where candidates were ranked, each caption has its probability as `"score"`, and
        with `choices` there are those of all of them."""
        records = super().postprocess(model_outputs, **kwargs)
        probs = model_outputs.get("candidate_probs")
        if probs is None:
            return records
        scores = probs.sort(dim=-1, descending=True).values[:, : len(records) // len(probs)].flatten().tolist()
        records = [{**record, "score": score} for record, score in zip(records, scores)]
        if choices is None:
            return records
        each = self.processor.post_process_choices(probs, choices)
        return [{**record, "choices": each[index * len(each) // len(records)]} for index, record in enumerate(records)]


class TDDImageToTextPipeline(TDDImageTextToTextPipeline):
    r"""
    Captions images, with or without a prompt.

    Importing `modeling_tdd` registers it as `"image-captioning"`. A checkpoint brings it as `"image-to-text"`, for
    `pipeline("image-to-text", model=..., trust_remote_code=True)`.

    Example:

    ```python
    >>> captioner = pipeline("image-captioning", model=folder)
    >>> captioner("cat.png")
    [{'generated_text': 'a cat on a sofa'}]
    >>> captioner(["cat.png", "dog.png"], batch_size=2, num_return_sequences=2)
    [[{'generated_text': 'a cat on a sofa'}, {'generated_text': 'a cat'}], [{'generated_text': 'a dog'}, ...]]
    >>> captioner("cat.png", infill="a [A] cat", choices={"A": ["black", "white"]})
    [{'generated_text': 'a black cat', 'score': 0.9, 'choices': {'A': {'black': 0.9, 'white': 0.1}}}]
    ```"""

    def __call__(self, images: Any, text: str | list[str] = "", **kwargs: Any) -> Any:  # type: ignore[override]
        r"""
        Args:
            images:
                An image, as [`~images_tdd.open_image`] takes it, or a list, array, generator or data set of them. In
                the place of an image, a dictionary may hold it as `"images"`, with its own `"text"`, or be a row of a
                data set with a column `image`, of which nothing else is read.
            text (`str` or `list[str]`, *optional*, defaults to `""`):
                The fixed beginning of the captions: one string for all images, or a list with one for each.
            kwargs:
                `infill` and `choices`, as in [`TDDProcessor`], the same for all images; `batch_size`, `num_workers`,
                `timeout` for URLs, parameters of [`TDDGenerationConfig`], `generate_kwargs` (other arguments of
                `generate`), and others of [`ImageTextToTextPipeline`].

        Returns:
            For one image a list of `{"generated_text": str}`, one for each caption. With `choices` or `num_candidates`
            each has its probability among the candidates, `"score"`, and with `choices` also that of each choice,
            `"choices"`, as [`~TDDProcessor.post_process_choices`] returns it. For a list or an array of several
            a list of such lists, and else an iterator of them, which for a data set with a length has one too.

        Raises:
            `TypeError`: for what is no image.
            `ValueError`: for an unreadable image, another number of texts than of images, or an unknown argument.
        """
        # Not the parent's `__call__`, which takes a list of images as one input, and a list of dictionaries as a chat
        run = super(ImageTextToTextPipeline, self).__call__
        if isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
            images = list(images)
        if isinstance(images, (list, tuple)):
            texts = [text] * len(images) if isinstance(text, str) else text
            if len(texts) != len(images):
                raise ValueError(f"There are {len(images)} images and {len(texts)} of `text`.")
            rows: Any = [_to_row(image, text, index) for index, (image, text) in enumerate(zip(images, texts))]
            return run(rows, **kwargs) if rows else []
        if not isinstance(text, str):
            raise ValueError("`text` must be one string, unless the images are a list.")
        if isinstance(images, dict) or is_image(images):
            return run(_to_row(images, text), **kwargs)
        if hasattr(images, "__getitem__") and hasattr(images, "__len__"):
            rows = _Rows(images, text)
            if len(rows):
                rows[0]  # refuses what is no image at once
            return run(rows, **kwargs)
        if hasattr(images, "__iter__"):
            return run(_Stream(images, text), **kwargs)
        raise TypeError(
            f"`images` must be {KINDS}, a row with such an `image`, or a list, generator or data set of these, got "
            f"{type(images).__name__}."
        )

    def postprocess(  # type: ignore[override]
        self, model_outputs: dict[str, Any], **kwargs: Any
    ) -> list[dict[str, Any]]:
        """As in the parent class, without the prompt beside each caption."""
        return [
            {name: value for name, value in record.items() if name != "input_text"}
            for record in super().postprocess(model_outputs, **kwargs)
        ]


def _to_row(image: Any, text: str, index: int | None = None) -> dict[str, Any]:
    """An image or a row as the input of Transformers' pipeline."""
    if isinstance(image, dict) and "images" in image:
        text, image = image.get("text", text), image["images"]
        list_images(image)  # refuses what is none
    else:
        image = image["image"] if isinstance(image, dict) and "image" in image else image
        check_image(image, index)
    return {"images": image, "text": text}


@dataclass
class _Collate:
    """Transformers' collation of a batch, as an object that a data worker can be given when it is spawned."""

    tokenizer: PreTrainedTokenizerBase | None
    feature_extractor: Any

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        return pad_collate_fn(self.tokenizer, self.feature_extractor)(items)


class _Numbers(Dataset):
    """Several inputs of a pipeline, each with its number."""

    def __init__(self, inputs: Any):
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Numbered:
        return Numbered(index, self.inputs[index])


class _Rows(Dataset):
    """A data set with a length. Unlike a generator, data workers can read it."""

    def __init__(self, images: Any, text: str):
        self.images, self.text = images, text

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _to_row(self.images[index], self.text, index)


class _Stream(IterableDataset):
    """The same without a length."""

    def __init__(self, images: Any, text: str):
        self.images, self.text = images, text

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (_to_row(image, self.text, index) for index, image in enumerate(self.images))


def prefer_for_tdd(ours: type) -> type:
    """A class to register in the place of the parent class of `ours`. For a model of TDD it makes `ours`, and for any
    other one that parent class itself as before."""
    theirs: Any = ours.__base__

    def make(cls: type, *args: Any, model: Any, **kwargs: Any) -> Pipeline:
        return (ours if model.config.model_type == "tdd" else theirs)(*args, model=model, **kwargs)

    return type(theirs.__name__, (theirs,), {"__new__": make, "__doc__": theirs.__doc__})


__all__ = [
    "CUSTOM_PIPELINES",
    "TDDImageClassificationPipeline",
    "TDDImageTextToTextPipeline",
    "TDDImageToTextPipeline",
    "prefer_for_tdd",
]
