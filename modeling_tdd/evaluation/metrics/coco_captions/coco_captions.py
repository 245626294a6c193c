# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""BLEU-4 and CIDEr-D by the code of COCO's evaluation, in the format of the package `evaluate`."""

import re

import datasets
import evaluate
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider


DESCRIPTION = """
BLEU-4, in [0, 1], and CIDEr-D, in [0, 10], computed by the code of COCO's evaluation (pycocoevalcap). Tokens are
lower-cased words without punctuation. COCO's own tokenizer is a Java program (PTBTokenizer), which splits some words
such as "don't" differently. Expect differences of a few tenths of a point from its figures.
"""
INPUTS = """
Args:
    predictions (`list[str]`): The caption of each image.
    references (`list[list[str]]`): The reference captions of each image.

Returns:
    `dict`: `bleu_4` and `cider` (CIDEr-D).
"""
CITATION = """
@inproceedings{papineni2002bleu,
  title     = {{BLEU}: a Method for Automatic Evaluation of Machine Translation},
  author    = {Papineni, Kishore and Roukos, Salim and Ward, Todd and Zhu, Wei-Jing},
  booktitle = {ACL},
  year      = {2002}
}
@inproceedings{vedantam2015cider,
  title     = {{CIDEr}: Consensus-based Image Description Evaluation},
  author    = {Vedantam, Ramakrishna and Zitnick, C. Lawrence and Parikh, Devi},
  booktitle = {CVPR},
  year      = {2015}
}
@article{chen2015coco,
  title   = {Microsoft {COCO} Captions: Data Collection and Evaluation Server},
  author  = {Chen, Xinlei and Fang, Hao and Lin, Tsung-Yi and Vedantam, Ramakrishna and Gupta, Saurabh and
             Doll{\\'a}r, Piotr and Zitnick, C. Lawrence},
  journal = {arXiv preprint arXiv:1504.00325},
  year    = {2015}
}
"""


class CocoCaptions(evaluate.Metric):
    """BLEU-4 and CIDEr-D of captions."""

    def _info(self) -> evaluate.MetricInfo:
        caption = datasets.Value("string")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": caption, "references": datasets.Sequence(caption)}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        if not predictions or not all(references):
            raise ValueError("`references` must have at least one image, and at least one caption of each, got none.")
        predicted = {index: [tokenize(caption)] for index, caption in enumerate(predictions)}
        expected = {index: [tokenize(caption) for caption in captions] for index, captions in enumerate(references)}
        bleu, _ = Bleu(4).compute_score(expected, predicted, verbose=0)
        cider, _ = Cider().compute_score(expected, predicted)
        return {"bleu_4": float(bleu[3]), "cider": float(cider)}


def tokenize(caption: str) -> str:
    return " ".join(re.findall(r"[\w'’-]*\w[\w'’-]*", caption.lower()))
