# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The image-to-text pipeline, which Transformers 5 dropped."""

from collections.abc import Iterator
from typing import Any

import PIL.Image
from transformers import ImageTextToTextPipeline


# The entry for a captioner's config.json, in Transformers' format
CUSTOM_PIPELINES = {
    "image-to-text": {"impl": "pipeline_tdd.TDDImageToTextPipeline", "pt": ["AutoModelForImageTextToText"]}
}


class TDDImageToTextPipeline(ImageTextToTextPipeline):
    r"""
    Captions images, with or without a prompt.

    Importing `modeling_tdd` registers it as `"image-captioning"`. A checkpoint brings it as `"image-to-text"`, for
    `pipeline("image-to-text", model=..., trust_remote_code=True)`.

    Example:

    ```python
    >>> captioner = pipeline("image-captioning", model=folder)
    >>> captioner("cat.png")
    [{'generated_text': 'a cat on a sofa'}]
    >>> captioner(["cat.png", "dog.png"], batch_size=2, generate_kwargs={"num_return_sequences": 2})
    [[{'generated_text': 'a cat on a sofa'}, {'generated_text': 'a cat'}], [{'generated_text': 'a dog'}, ...]]
    ```"""

    def __call__(self, images: Any, text: str | list[str] = "", **kwargs: Any) -> Any:
        r"""
        Args:
            images:
                An image (a PIL image, a file name or a URL), or a list, generator or data set of images, or of
                dictionaries with the keys `"images"` and, optionally, `"text"`.
            text (`str` or `list[str]`, *optional*, defaults to `""`):
                The fixed beginning of the captions: one string for all images, or a list with one for each.
            kwargs:
                `batch_size`, `max_new_tokens`, `generate_kwargs` (parameters of `generate`), and others of
                [`ImageTextToTextPipeline`].

        Returns:
            For one image a list of `{"generated_text": str}`, one for each caption. For several images a list, or an
            iterator, of such lists.
        """
        # Not the parent's `__call__`, which takes a list of images as one input, and a list of dictionaries as a chat
        run = super(ImageTextToTextPipeline, self).__call__
        if isinstance(images, (str, dict, PIL.Image.Image)):
            return run(self._with_text(images, text), **kwargs)
        if isinstance(images, (list, tuple)):
            texts = [text] * len(images) if isinstance(text, str) else text
            if len(texts) != len(images):
                raise ValueError(f"There are {len(images)} images and {len(texts)} of `text`.")
            return run([self._with_text(image, text) for image, text in zip(images, texts)], **kwargs)
        if not isinstance(text, str):
            raise ValueError("For a generator or data set `text` must be one string.")
        return run(self._stream(images, text), **kwargs)

    @staticmethod
    def _with_text(image: Any, text: str) -> dict[str, Any]:
        return {"text": text, **image} if isinstance(image, dict) else {"images": image, "text": text}

    def _stream(self, images: Any, text: str) -> Iterator[dict[str, Any]]:
        for image in images:
            yield self._with_text(image, text)

    def postprocess(self, model_outputs: dict[str, Any], **kwargs: Any) -> list[dict[str, Any]]:
        """As in the parent class, without the prompt beside each caption."""
        return [
            {name: value for name, value in record.items() if name != "input_text"}
            for record in super().postprocess(model_outputs, **kwargs)
        ]


__all__ = ["CUSTOM_PIPELINES", "TDDImageToTextPipeline"]
