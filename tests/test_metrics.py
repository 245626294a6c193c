"""The metrics: loaded by path without a network, by several processes at once, and equal to what a hand computes."""

import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_tdd.evaluation import load_metric
from modeling_tdd.evaluation.tables import mean_and_spread


ROOT = Path(__file__).parent.parent
METRICS = ROOT / "modeling_tdd/evaluation/metrics"

# A user's Python in an empty folder, with a copy of the modules, without this package and without a network
LOAD_ALONE = """
import socket, sys
import evaluate

def refuse(*_):
    raise RuntimeError("no network")

socket.socket.connect = refuse
sys.modules["modeling_tdd"] = None  # importing it raises an ImportError
for name in ("top1", "caption_match", "word_scores", "coco_captions", "clip_score"):
    metric = evaluate.load(f"{sys.argv[1]}/{name}")
    assert isinstance(metric, evaluate.Metric) and metric.description and metric.inputs_description, name
    assert bool(metric.citation) == (name in ("coco_captions", "clip_score"))
captions = evaluate.load(f"{sys.argv[1]}/caption_match", keep_in_memory=True)  # as `load_metric` does
for _ in range(20):
    print(captions.compute(predictions=["a cat", "cat cat"], references=[["a cat"], ["a dog"]])["token_f1"])
"""


def test_modules_load_by_path_without_the_package_or_a_network(tmp_path: Path) -> None:
    """Two processes at once, which find no cache."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD_ALONE, str(METRICS)]
    options = {"cwd": tmp_path, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **options) for _ in range(2)]
    for process in processes:
        output, errors = process.communicate(timeout=1200)
        assert process.returncode == 0, errors
        assert output.split() == ["0.5"] * 20


def test_unknown_metrics_are_refused() -> None:
    with pytest.raises(
        ValueError, match="one of caption_match, clip_score, coco_captions, top1, word_scores, got 'bleu'"
    ):
        load_metric("bleu")


def test_no_script_hides_a_package() -> None:
    """A script's folder comes first where it is run: with a script evaluate.py, `import evaluate` would import it."""
    assert Path(find_spec("evaluate").origin).name == "__init__.py"
    scripts = ROOT / "scripts"
    found = {path.stem: find_spec(path.stem) for path in scripts.glob("*.py")}
    assert found and {name for name, spec in found.items() if spec and Path(spec.origin).parent != scripts} == set()


def test_top1() -> None:
    metric = load_metric("top1")
    for make in (list, np.array, torch.tensor):
        assert metric.compute(predictions=make([3, 1, 2, 0]), references=make([3, 1, 2, 1])) == {"top1": 0.75}
    with pytest.raises(ValueError, match=r"Mismatch in the number of predictions \(2\) and references \(1\)"):
        metric.compute(predictions=[1, 2], references=[1])
    with pytest.raises(ValueError, match="at least one label"):
        load_metric("top1").compute(predictions=[], references=[])


def test_a_metric_leaves_the_random_state_of_a_training_alone() -> None:
    before = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()
    load_metric("top1").compute(predictions=[1, 2], references=[1, 1])
    assert np.array_equal(before[0], np.random.get_state()[1]) and before[1] == random.getstate()
    assert before[2].equal(torch.get_rng_state())


def caption_match(predictions: list[str], references: list[list[str]], **kwargs: object) -> dict[str, float]:
    return load_metric("caption_match").compute(predictions=predictions, references=references, **kwargs)


def test_exact_match_and_token_f1() -> None:
    references = [["man: dark skin tone"], ["a cat", "the black cat"], ["red heart"]]
    scores = caption_match(["man : dark  skin tone", "the black cat", "blue heart"], references)
    assert scores["exact_match"] == pytest.approx(2 / 3)
    # A hyphenated word is three tokens: "dark-x" and "dark x" differ
    assert caption_match(["dark-x", "dark - x"], [["dark x"], ["dark-x"]])["exact_match"] == 0.5
    # 4 of 5 tokens against 5: 2 * 4 / 10; the better of two references: 2 * 2 / 5; an empty caption: 0
    predictions = ["man: light skin tone", "black cat", ""]
    assert caption_match(predictions, references)["token_f1"] == pytest.approx((0.8 + 0.8 + 0) / 3)
    # A token counts no more often than the reference has it: 2 * 1 / (2 + 2)
    assert caption_match(["cat cat"], [["a cat"]])["token_f1"] == 0.5


def test_stutter_and_fluency() -> None:
    stuttering = ["man : : light", "light light skin", "family: man, man, boy", "a cat"]
    assert caption_match(stuttering, [["x"]] * 4)["stutter"] == 0.5
    seen = load_metric("caption_match").seen_bigrams(["man: medium-light skin tone", "woman: dark skin tone"])
    captions = {
        "woman: medium-light skin tone": True,  # new, of known parts
        "man: light skin tone": False,  # ": light" is not known
        "man: medium-light skin": False,  # ends too soon
        "skin tone": False,  # starts too late
        "": False,
    }
    for caption, is_fluent in captions.items():
        assert caption_match([caption], [["x"]], seen=seen)["fluent"] == is_fluent


def test_caption_scores_together() -> None:
    metric = load_metric("caption_match")
    inputs = {"predictions": ["a cat", "cat cat"], "references": [["a cat"], ["a dog"]]}
    seen = metric.seen_bigrams(["a cat"])
    expected = {"exact_match": 0.5, "token_f1": 0.5, "stutter": 0.5}
    assert metric.compute(**inputs, seen=seen) == {**expected, "fluent": 0.5}
    assert metric.compute(**inputs) == expected  # and again, of another kind
    with pytest.raises(ValueError, match="Got a string but expected a list instead: 'a cat'"):
        caption_match(["a cat"], ["a cat"])
    with pytest.raises(ValueError, match=r"Mismatch in the number of predictions \(2\) and references \(1\)"):
        caption_match(["a cat", "a dog"], [["a cat"]])
    for references in ([["a cat"], []], []):
        with pytest.raises(ValueError, match="at least one image, and at least one caption of each"):
            caption_match(["a cat"] * len(references), references)
    with pytest.raises(ValueError, match="`seen` must be the pairs of `seen_bigrams"):
        caption_match(["a cat"], [["a cat"]], seen=["a cat"])


def test_word_scores() -> None:
    """Two words, and a third that no picture has, which the mean of average precisions leaves out."""
    probabilities = np.array([[0.9, 0.8, 0.1], [0.7, 0.2, 0.9], [0.6, 0.4, 0.2]], dtype=np.float32)
    labels = np.array([[1, 0, 0], [0, 0, 0], [1, 1, 0]])
    # First word: right at ranks 1 and 3, (1 + 2/3) / 2. Second word: right at rank 2, 1/2.
    # From 0.6: found (9, 8, 7, 9, 6), right 2 of 5; 2 of 3 words found.
    scores = load_metric("word_scores").compute(predictions=probabilities, references=labels, threshold=0.55)
    assert scores == {"word_map": pytest.approx((5 / 6 + 1 / 2) / 2), "word_f1": pytest.approx(2 * 2 / (5 + 3))}


def coco_captions(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    return load_metric("coco_captions").compute(predictions=predictions, references=references)


def test_coco_captions() -> None:
    references = [["A man rides a horse.", "Man riding a brown horse"], ["Two dogs play on grass"], ["A red bus"]]
    perfect = coco_captions(["a man rides a horse", "two dogs play on grass!", "a red bus"], references)
    assert perfect["bleu_4"] == pytest.approx(1, abs=1e-6) and perfect["cider"] > 5
    # 4 words of 5 right, in order, but for the last: precisions 4/5, 3/4, 2/3, 1/2, lengths equal
    score = coco_captions(["two dogs play on sand"], [["two dogs play on grass"]])["bleu_4"]
    assert score == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25, abs=1e-6)
    assert coco_captions(["a", "b", "c"], references)["cider"] < 0.1 * perfect["cider"]


def test_mean_and_spread_over_seeds() -> None:
    assert mean_and_spread([0.97, 0.98, 0.99]) == "98.00 ± 1.00"
    assert mean_and_spread([0.97]) == "97.00" and mean_and_spread([]) == ""
