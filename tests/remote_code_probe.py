# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""What a classifier and a captioner say through the Auto classes and pipelines, with the package or without it.

Run as a program it is a machine without the package: `python -I remote_code_probe.py CLASSIFIER CAPTIONER IMAGE OUT`.
"""

import sys
from pathlib import Path
from typing import Any


if __name__ == "__main__":
    sys.modules["modeling_tdd"] = None  # importing it raises an ImportError, wherever it may be installed

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)


def auto_class_outputs(classifier: str, captioner: str, image: Image.Image) -> dict[str, Tensor]:
    """Tensors from each Auto class, on both checkpoints."""
    trusted = {"trust_remote_code": True}
    outputs = {}
    for name, folder in (("classifier", classifier), ("captioner", captioner)):
        assert AutoConfig.from_pretrained(folder, **trusted).model_type == "tdd"
        pixels = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
        outputs[f"{name} pixels"] = pixels
        base = AutoModel.from_pretrained(folder, **trusted)
        tokens = torch.ones(1, base.config.max_position_embeddings, dtype=torch.long)
        with torch.no_grad():
            outputs[f"{name} hidden"] = base(pixels, tokens, timesteps=torch.tensor([7])).last_hidden_state
    model = AutoModelForImageClassification.from_pretrained(classifier, **trusted)
    with torch.no_grad():
        outputs["logits"] = model(outputs["classifier pixels"]).logits
    assert type(AutoProcessor.from_pretrained(classifier, **trusted)).__name__ == "ViTImageProcessor"
    model = AutoModelForImageTextToText.from_pretrained(captioner, **trusted)
    processor = AutoProcessor.from_pretrained(captioner, **trusted)
    inputs = processor(images=[image], text="the red", return_tensors="pt")
    generated = model.generate(**inputs, return_dict_in_generate=True, num_return_sequences=2)
    outputs |= {"sequences": generated.sequences, "log_probs": generated.log_probs}
    inputs = processor(images=[image], infill="the [A]", choices={"A": ["red", "blue sky"]}, return_tensors="pt")
    chosen = model.generate(**inputs, return_dict_in_generate=True)
    outputs |= {"chosen": chosen.sequences, "candidate_probs": chosen.candidate_probs}
    outputs["scores"] = model.score(inputs["pixel_values"], inputs["choices"])
    outputs["tokens"] = AutoTokenizer.from_pretrained(captioner)("a cat on the sofa", return_tensors="pt")["input_ids"]
    return outputs


def pipeline_outputs(classifier: str, captioner: str, image: Image.Image) -> dict[str, Any]:
    """Labels with their scores, and captions, from each pipeline."""
    classify = pipeline("image-classification", model=classifier, trust_remote_code=True)
    caption = pipeline("image-text-to-text", model=captioner, trust_remote_code=True)
    image_to_text = pipeline("image-to-text", model=captioner, trust_remote_code=True)
    return {
        "image-classification": classify([image], top_k=5),
        "image-text-to-text": caption(image, text="the red"),
        "image-to-text": image_to_text([image], generate_kwargs={"num_return_sequences": 2}),
        "choices": image_to_text([image], choices=["the red", "blue sky"], num_return_sequences=2),
        "candidates": image_to_text([image], num_candidates=3),
    }


def probe(classifier: str, captioner: str, image_file: str) -> dict[str, Any]:
    image = Image.open(image_file)
    return {
        "tensors": auto_class_outputs(classifier, captioner, image),
        "pipelines": pipeline_outputs(classifier, captioner, image),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)  # as the tests: sums in another order differ in the last bit
    torch.save(probe(*sys.argv[1:4]), Path(sys.argv[4]))
    assert "transformers_modules" in {name.split(".")[0] for name in sys.modules}
