# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Processor of the captioner: images to pixels, texts to tokens, tokens to captions."""

import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import BatchFeature, CLIPImageProcessor, ProcessorMixin
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessingKwargs
from transformers.utils import logging

from .images_tdd import list_images, open_image
from .settings_tdd import suggest


logger = logging.get_logger(__name__)

INTERPOLATIONS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # Pillow's numbers
MAX_CHOICES = 4096  # combinations, each of which is scored
Choices = dict[Any, list[str]] | list[str]
PADDING = ("padding", "max_length", "pad_to_multiple_of", "padding_side")  # arguments of a tokenizer


def combine(infill: str | None, choices: Choices, mask_token: str | None) -> list[str]:
    r"""
    All captions that choices allow.

    Args:
        infill (`str`, *optional*): A caption with gaps, for a dictionary.
        choices: As in [`TDDProcessor`].
        mask_token (`str`, *optional*): What stands in the place of a gap that has a number.

    Raises:
        `ValueError`: for choices that are empty or too many, and for gaps that are not there, or there twice.
    """
    if isinstance(choices, (list, tuple)):
        if infill is not None:
            raise ValueError("`infill` has gaps: give `choices` as a dictionary with the strings for each of them.")
        return _check_strings("", choices)
    if not isinstance(choices, dict) or not choices or infill is None:
        raise ValueError(f"`choices` must be a list of captions, or a dictionary beside `infill`, got {choices!r}.")
    marks = [f"[{gap}]" for gap in choices if isinstance(gap, str)] + ([mask_token] if mask_token else [])
    parts = re.split(f"({'|'.join(map(re.escape, marks))})", infill) if marks else [infill]
    masks = itertools.count()  # text and gaps alternate; a mask token that is no name has a number
    gaps = [mark[1:-1] if mark[1:-1] in choices else next(masks) for mark in parts[1::2]]
    for gap in choices:
        if gaps.count(gap) != 1:
            shown = f"[{gap}]" if isinstance(gap, str) else f"{mask_token} number {gap}"
            raise ValueError(f"`choices`: {shown} must stand once in {infill!r}, and stands {gaps.count(gap)} times.")
    checked = {gap: _check_strings(f" for {gap!r}", strings) for gap, strings in choices.items()}
    number = math.prod(map(len, checked.values()))
    if number > MAX_CHOICES:
        raise ValueError(f"`choices` may have {MAX_CHOICES} combinations at most, got {number}.")
    captions = []
    for strings in itertools.product(*checked.values()):
        filled = dict(zip(choices, strings))
        parts[1::2] = [filled.get(gap, mask_token) for gap in gaps]
        captions.append("".join(parts).strip())
    return captions


def _check_strings(where: str, strings: Any) -> list[str]:
    """The strings without white space around them."""
    is_list = isinstance(strings, (list, tuple)) and len(strings) > 0
    if not is_list or not all(isinstance(string, str) and string.strip() for string in strings):
        raise ValueError(f"`choices`{where} must be a list of strings, at least one, none empty, got {strings!r}.")
    return [string.strip() for string in strings]


def saveable_image_processor(image_processor: Any) -> Any:
    r"""
    The image processor that a model of TDD is saved with. That of a timm repository, [`TimmWrapperImageProcessor`],
    cannot be saved beside another model: a [`CLIPImageProcessor`] with the same settings takes its place, whose crop
    may lie one pixel further up and left. Any other one is returned as it is.

    Raises:
        `ValueError`: for a transform of timm that does something else than scale, crop the centre and normalise.

    Example:

    ```python
    >>> image_processor = saveable_image_processor(AutoImageProcessor.from_pretrained("timm/resnet18.a1_in1k"))
    >>> image_processor.save_pretrained(folder)  # of a classifier
    ```"""
    if not hasattr(image_processor, "val_transforms"):
        return image_processor
    settings = image_processor.data_config
    channels, height, width = settings["input_size"]
    scaled = [math.floor(side / settings["crop_pct"]) for side in (height, width)]
    mode, interpolation = settings["crop_mode"], settings["interpolation"]
    is_plain = mode == "squash" or (mode == "center" and height == width)
    if channels != 3 or not is_plain or interpolation not in INTERPOLATIONS:
        raise ValueError(
            "An image processor of timm must make RGB images, by `crop_mode='squash'` or, for square ones, 'center', "
            f"got `crop_mode={mode!r}`, `interpolation={interpolation!r}`, images of {channels} x {height} x {width}."
        )
    return CLIPImageProcessor(
        size={"shortest_edge": scaled[0]} if mode == "center" else {"height": scaled[0], "width": scaled[1]},
        crop_size={"height": height, "width": width},
        resample=INTERPOLATIONS[interpolation],
        image_mean=list(settings["mean"]),
        image_std=list(settings["std"]),
    )


class TDDProcessor(ProcessorMixin):
    r"""
    Any image processor with any tokenizer that has a padding and an end token.

    The longest caption is the tokenizer's `model_max_length`: set it to the model's `max_position_embeddings`.

    Args:
        image_processor (`BaseImageProcessor`): The encoder's image processor. That of a timm repository is replaced as
            in [`saveable_image_processor`].
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer. Infilling needs its mask token.
        chat_template (`str`, *optional*): A Jinja template, to use the model with chats.

    Raises:
        `ValueError`: if the tokenizer has no padding or no end token.

    Example:

    ```python
    >>> processor = TDDProcessor(ViTImageProcessor(), tokenizer)
    >>> batch = processor(images=images, captions=captions, return_tensors="pt")  # to train
    >>> inputs = processor(images=image, return_tensors="pt")  # to caption
    >>> inputs = processor(images=image, text="a photo of", return_tensors="pt")  # ... from a fixed beginning
    >>> inputs = processor(images=image, infill="a [MASK] on a [MASK]", return_tensors="pt")  # ... around gaps
    >>> captions = processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)
    >>> choices = {"A": ["red", "green"], "B": ["apple", "pear"]}  # ... with one of these in each gap
    >>> inputs = processor(images=image, infill="a [A] [B]", choices=choices, return_tensors="pt")
    >>> outputs = model.generate(**inputs, return_dict_in_generate=True)
    >>> processor.post_process_choices(outputs.candidate_probs, choices)
    [{'A': {'red': 0.9, 'green': 0.1}, 'B': {'apple': 0.8, 'pear': 0.2}}]
    ```"""

    text_kwargs = {"add_special_tokens": False, "padding": True, "return_token_type_ids": False}

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None):
        image_processor = saveable_image_processor(image_processor)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
            raise ValueError(
                f"The tokenizer needs a padding and an end token, got {tokenizer.pad_token!r} and "
                f"{tokenizer.eos_token!r}. Set them, such as `tokenizer.eos_token = tokenizer.sep_token`."
            )

    @property
    def unused_input_names(self) -> list[str]:
        return ["token_type_ids"]

    def __call__(
        self,
        images: ImageInput | str | Path | bytes | list[str] | list[Path] | list[bytes] | None = None,
        text: str | list[str] | None = None,
        captions: str | list[str] | None = None,
        infill: str | list[str] | None = None,
        choices: Choices | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        r"""
        Args:
            images (*optional*):
                What [`~images_tdd.open_image`] takes, a list of it, or an array of several images. With
                `do_rescale=False` arrays go to the image processor as they are.
            text (`str` or `list[str]`, *optional*):
                The fixed beginnings of the captions. One string serves all images; an empty string is no prompt.
                White space around this and other texts is removed. A word that the tokenizer does not know is named
                in a warning.
            captions (`str` or `list[str]`, *optional*):
                Captions to learn.
            infill (`str` or `list[str]`, *optional*):
                Captions with gaps: each mask token stands for one token to fill, and everything else stays. One string
                serves all images.
            choices (`dict[str | int, list[str]]` or `list[str]`, *optional*):
                What the captions may be. A list has whole captions, in which each mask token stands for one token to
                fill. A dictionary has the strings that may stand in each gap of `infill`: in that of a name, `[A]`,
                or in the place of the mask token with a number, 0 for the first. One may be longer than another.
            kwargs:
                `return_tensors`, and arguments of the image processor and the tokenizer. Its padding and truncation
                are of `text` and `captions`: nothing of `infill` and `choices` can be left out.

        Returns:
            [`BatchFeature`]: of
            - `pixel_values`, with `images`;
            - `input_ids` and `attention_mask`, with `text`; an empty prompt is one token of padding;
            - `labels`, with `captions`: their tokens and the end token, padded;
            - `decoder_input_ids` and `decoder_attention_mask` (1 for fixed tokens), with `infill`;
            - `choices` and `choices_mask` instead, of shape `(batch_size, num_choices, length)`, with `choices`: all
              combinations, the last gap of the dictionary varying fastest.

        Raises:
            `TypeError`: for an image of another kind.
            `ValueError`: for an unreadable image, an empty caption, an infilling without a gap, different numbers of
                images and texts, an unknown argument, or no input at all; and for choices that are empty, equal,
                too long, too many, of words that the tokenizer does not know, or for a gap that is not there.
        """
        self._check_names(kwargs)
        if images is None and text is None and captions is None and infill is None and choices is None:
            raise ValueError("Give at least one of `images`, `text`, `captions`, `infill` and `choices`.")
        if text is not None and (infill is not None or choices is not None):
            raise ValueError("Give a prompt (`text`), or an infilling (`infill`) or `choices`, not both.")
        merged: dict[str, Any] = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        return_tensors = merged["text_kwargs"].pop("return_tensors", None)
        if text is None and captions is None:
            for name in ("truncation", "max_length", "pad_to_multiple_of"):
                if merged["text_kwargs"].get(name):
                    raise ValueError(f"`{name}` is for `text` and `captions`, which are not given.")
        data: dict[str, Any] = {}
        num_images = None
        if images is not None:
            merged["images_kwargs"].pop("return_tensors", None)
            images = self._read_images(images, merged["images_kwargs"])
            data.update(self.image_processor(images, return_tensors="np", **merged["images_kwargs"]))
            num_images = len(data["pixel_values"])
        if text is not None:
            data.update(self._encode_prompts(self._to_list("text", text, num_images), merged["text_kwargs"]))
        if infill is not None:
            infill = self._to_list("infill", infill, num_images)
        if choices is not None:
            rows = [combine(text, choices, self.tokenizer.mask_token) for text in infill or [None] * (num_images or 1)]
            data.update(self._encode_choices(rows))
        elif infill is not None:
            data.update(self._encode_infilling(infill))
        if captions is not None:
            captions = self._to_list("captions", captions, num_images)
            data["labels"] = self._encode_captions(captions, merged["text_kwargs"])
        return BatchFeature(data, tensor_type=return_tensors)

    @property
    def argument_names(self) -> set[str]:
        """`set[str]`: the names of what a call takes beside images and texts."""
        names = set(ProcessingKwargs.__annotations__) | {"common_kwargs", "return_tensors"}
        for group in ("text_kwargs", "images_kwargs"):
            names |= set(ProcessingKwargs.__annotations__[group].__annotations__)
        return names | set(getattr(self.image_processor.valid_kwargs, "__annotations__", ()))

    def _check_names(self, kwargs: dict[str, Any]) -> None:
        """Transformers ignores an unknown argument with a warning."""
        known = self.argument_names
        for name, value in kwargs.items():
            if name not in known and not (name in ("audio", "videos") and value is None):
                hint = suggest([name], known)
                raise ValueError(f"`{name}` is no argument of the processor, image processor or tokenizer.{hint}")

    @staticmethod
    def _read_images(images: Any, images_kwargs: dict[str, Any]) -> list[Any]:
        """Images as RGB. Arrays that need no rescaling are not ours to scale."""
        layout = images_kwargs.get("input_data_format")
        is_scaled = images_kwargs.get("do_rescale") is False
        return [
            image
            if is_scaled and isinstance(image, (np.ndarray, Tensor))
            else open_image(image, input_data_format=layout, index=index)
            for index, image in enumerate(list_images(images))
        ]

    @staticmethod
    def _to_list(name: str, texts: Any, num_images: int | None) -> list[str]:
        if isinstance(texts, str):
            texts = [texts] * (num_images if num_images is not None and name != "captions" else 1)
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"`{name}` must be a string or a list of strings, got {texts!r}.")
        if num_images is not None and len(texts) != num_images:
            raise ValueError(f"There are {num_images} images and {len(texts)} of `{name}`.")
        return [text.strip() for text in texts]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Tokens of each text, without special ones, and without the tokenizer's own warning of long texts."""
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _check_words(self, text: str) -> str:
        """Names the words of a text that the tokenizer does not know. To some tokenizers a punctuation mark is unknown
        only where a space is before it; it loses the space."""
        unknown = self.tokenizer.unk_token_id
        if unknown is None or unknown not in self._encode([text])[0]:
            return text
        checked = ""
        for word in text.split():
            spaced, joined = f"{checked} {word}".strip(), checked + word
            counts = [tokens.count(unknown) for tokens in self._encode([checked, spaced, joined])]
            if counts[1] > counts[0]:
                if checked and counts[2] == counts[0] and not word[0].isalnum():
                    spaced = joined
                else:
                    logger.warning_once(f"The tokenizer does not know {word!r}: the model does not see it.")
            checked = spaced
        return checked

    def _encode_prompts(self, prompts: list[str], text_kwargs: dict[str, Any]) -> dict[str, list[list[int]]]:
        prompts = [self._check_words(prompt) for prompt in prompts]
        # Padding and truncation of a fast tokenizer are switches on the one object, which threads may share
        layout, max_length = self._layout(text_kwargs)
        others = {name: value for name, value in text_kwargs.items() if name not in (*PADDING, "truncation")}
        encoded = self.tokenizer(prompts, verbose=False, **others)
        if not any(prompts):
            # Transformers' pipelines collate `input_ids`: a column of padding that nothing attends to.
            columns = {"input_ids": [[self.tokenizer.pad_token_id]], "attention_mask": [[0]]}
            return {name: column * len(prompts) for name, column in columns.items()}
        rows = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        if max_length is not None:
            kept = slice(-max_length, None) if self.tokenizer.truncation_side == "left" else slice(max_length)
            rows = {name: [row[kept] for row in values] for name, values in rows.items()}
        return dict(self.tokenizer.pad(rows, verbose=False, **layout))

    def _layout(self, text_kwargs: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
        """The arguments of `tokenizer.pad`, and the length to truncate to, or `None`."""
        layout = {name: text_kwargs[name] for name in PADDING if name in text_kwargs}
        if text_kwargs.get("truncation") in (None, False, "do_not_truncate"):
            return layout, None
        return layout, layout.get("max_length") or self.tokenizer.model_max_length

    def _encode_captions(self, captions: list[str], text_kwargs: dict[str, Any]) -> list[list[int]]:
        """Tokens with their end, which truncation leaves, and padding on the right: a caption begins at place 0."""
        rows = self._encode(captions)
        empty = [index for index, row in enumerate(rows) if not row]
        if empty:
            raise ValueError(f"Empty captions: {empty} of {len(captions)}. Leave these examples out.")
        room = self.tokenizer.model_max_length - 1  # for the end token
        if max(map(len, rows)) > room:
            logger.warning_once(
                f"Captions longer than {room} tokens and an end are truncated (`tokenizer.model_max_length`). "
                "This warning is shown once."
            )
        layout, max_length = self._layout(text_kwargs)
        if max_length is not None:
            room = min(room, max_length - 1)
        encoded = {"input_ids": [[*row[:room], self.tokenizer.eos_token_id] for row in rows]}
        return self.tokenizer.pad(encoded, verbose=False, **{**layout, "padding_side": "right"})["input_ids"]

    def _encode_infilling(self, texts: list[str]) -> dict[str, list[list[int]]]:
        mask_token = self.tokenizer.mask_token_id
        if mask_token is None:
            raise ValueError("Infilling needs a tokenizer with a mask token: set `tokenizer.mask_token`.")
        rows = self._encode([self._check_words(text) for text in texts])
        for text, row in zip(texts, rows):
            if mask_token not in row:
                raise ValueError(f"Nothing to fill: {text!r} has no {self.tokenizer.mask_token}.")
        rows, fixed = self._fix(rows)
        return {"decoder_input_ids": rows, "decoder_attention_mask": fixed}

    def _encode_choices(self, captions: list[list[str]]) -> dict[str, list[list[list[int]]]]:
        """Tokens of the same number of choices for each image."""
        texts = [text for choices in captions for text in choices]
        rows, longest, unknown = self._encode(texts), self.tokenizer.model_max_length - 1, self.tokenizer.unk_token_id
        for text, row in zip(texts, rows):
            if not row or len(row) > longest:
                raise ValueError(f"`choices`: {text!r} has {len(row)} tokens, and may have 1 to {longest}.")
            if unknown is not None and unknown in row:
                raise ValueError(f"`choices`: {text!r} has words that the tokenizer does not know.")
        number = len(captions[0])
        for first in range(0, len(rows), number):
            own = list(map(tuple, rows[first : first + number]))
            if repeated := {texts[first + place] for place, row in enumerate(own) if own.count(row) > 1}:
                raise ValueError(f"`choices` must differ to the tokenizer, got {sorted(repeated)}.")
        rows, fixed = self._fix(rows)
        starts = range(0, len(rows), number)
        grouped = ([part[start : start + number] for start in starts] for part in (rows, fixed))
        return dict(zip(("choices", "choices_mask"), grouped))

    def _fix(self, rows: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
        """Rows with their end, and what is fixed of them: all but mask tokens. The end is fixed, and so is the padding
        behind it: the caption has the words around the gaps and no others."""
        rows = self._pad([[*row, self.tokenizer.eos_token_id] for row in rows])
        return rows, [[int(token != self.tokenizer.mask_token_id) for token in row] for row in rows]

    def post_process_choices(self, candidate_probs: Tensor, choices: Choices) -> list[dict[Any, Any]]:
        r"""
        The probability of each choice.

        Args:
            candidate_probs (`torch.Tensor` of shape `(batch_size, num_choices)`): Of the output of `generate`.
            choices: As the processor was given them.

        Returns:
            `list[dict]`: for each image, of a list of captions the probability of each, and of a dictionary for each
            gap those of its strings, summed over the strings in the other gaps.
        """
        if not isinstance(choices, dict):
            return [dict(zip(choices, probs)) for probs in candidate_probs.tolist()]
        shape = [len(strings) for strings in choices.values()]
        results = []
        for probs in candidate_probs.view(-1, *shape):
            others = [[axis for axis in range(len(shape)) if axis != own] for own in range(len(shape))]
            sums = [probs.sum(axes) if axes else probs for axes in others]
            results.append({gap: dict(zip(choices[gap], own.tolist())) for gap, own in zip(choices, sums)})
        return results

    def _pad(self, rows: list[list[int]]) -> list[list[int]]:
        length = max(map(len, rows))
        return [row + [self.tokenizer.pad_token_id] * (length - len(row)) for row in rows]


__all__ = ["TDDProcessor", "saveable_image_processor"]
