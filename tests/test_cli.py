# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The command `tdd`: what it prints, its errors and its exit statuses."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import pipeline
from transformers.utils import logging

import tdd_cli
from modeling_tdd import TDDForImageClassification


ROOT = Path(__file__).parent.parent
CAPTIONER, CLASSIFIER = ROOT / "checkpoints/emoji-captions", ROOT / "checkpoints/digits"
WOMAN, WEIGHTLIFTER, DIGIT = CAPTIONER / "example.png", CAPTIONER / "weightlifter.png", CLASSIFIER / "example.png"


@pytest.fixture(autouse=True)
def progress_bars() -> Iterator[None]:
    """The command switches them off for its process, which is that of all tests here."""
    yield
    logging.enable_progress_bar()


def run(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, list[str], str]:
    """Exit status, lines of the standard output, and the standard error stream."""
    capfd.readouterr()
    try:
        status = tdd_cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # of argparse
        status = int(stop.code or 0)
    printed = capfd.readouterr()
    return status, printed.out.splitlines(), printed.err


def test_help_does_not_load_pytorch() -> None:
    """In a process that could not even import it."""
    script = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; import tdd_cli; tdd_cli.main()"
    for arguments in (["--help"], ["caption", "--help"]):
        done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert "tdd caption" in done.stdout and "exit status" in done.stdout


def test_caption(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(capfd, "caption", WOMAN, "--model", CAPTIONER)[:2] == (0, ["woman climbing: dark skin tone"])


def test_several_images_and_options(capfd: pytest.CaptureFixture[str]) -> None:
    options = ("--num-return-sequences", "2", "--text", "woman", "--num-inference-steps", "4", "--seed", "1")
    status, lines, _ = run(capfd, "caption", WOMAN, WEIGHTLIFTER, "--model", CAPTIONER, *options)
    assert status == 0
    captioner = pipeline("image-captioning", model=str(CAPTIONER))
    settings = {"text": "woman", "num_return_sequences": 2, "num_inference_steps": 4, "seed": 1}
    expected = {image: captioner(image, **settings) for image in (WOMAN, WEIGHTLIFTER)}
    assert lines == [f"{image}: {c['generated_text']}" for image, captions in expected.items() for c in captions]
    status, lines, _ = run(capfd, "caption", WOMAN, WEIGHTLIFTER, "--model", CAPTIONER, *options, "--json")
    assert [json.loads(line) for line in lines] == [
        {"image": str(image), "captions": captions} for image, captions in expected.items()
    ]


def test_classify(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ("classify", DIGIT, "--model", CLASSIFIER, "--top-k", "2", "--num-inference-steps", "3")
    status, lines, _ = run(capfd, *arguments, "--json")
    (record,) = map(json.loads, lines)
    model = TDDForImageClassification.from_pretrained(CLASSIFIER)
    model.config.num_inference_steps = 3
    expected = pipeline("image-classification", model=model, image_processor=str(CLASSIFIER))(str(DIGIT), top_k=2)
    assert status == 0 and record == {"image": str(DIGIT), "labels": expected}
    assert run(capfd, *arguments)[1] == [", ".join(f"{row['label']} ({row['score']:.3f})" for row in expected)]


def test_show(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ("show", WEIGHTLIFTER, "--model", CAPTIONER, "--num-inference-steps", "5")
    status, lines, _ = run(capfd, *arguments)
    assert status == 0 and [line[:10] for line in lines] == [f"t = {t:4d}  " for t in (1000, 800, 600, 400, 200)]
    (caption,) = run(capfd, "caption", *arguments[1:])[1]
    assert lines[-1][10:] == caption and lines[0][10:] != caption
    (record,) = map(json.loads, run(capfd, *arguments, "--infill", "woman [MASK]", "--json")[1])
    assert [step["timestep"] for step in record["steps"]] == [1000, 800, 600, 400, 200]
    assert record["steps"][-1]["caption"].startswith("woman ")


def test_an_unreadable_image_is_named_and_the_others_are_served(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(WOMAN.read_bytes()[:100])
    status, lines, errors = run(capfd, "caption", "no_such.png", broken, WOMAN, "--model", CAPTIONER)
    assert status == 1 and lines == [f"{WOMAN}: woman climbing: dark skin tone"]
    assert "tdd: Unreadable image (no_such.png): There is no such file." in errors
    assert f"tdd: Unreadable image ({broken})" in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "arguments are required: COMMAND"),
        (["caption", WOMAN], 2, "arguments are required: --model"),
        (["caption", WOMAN, "--model", CAPTIONER, "--steps", "3"], 2, "unrecognized arguments: --steps 3"),
        (["caption", WOMAN, "--model", CAPTIONER, "--text", "a", "--infill", "b"], 2, "not allowed with argument"),
        (["classify", DIGIT, "--model", CLASSIFIER, "--top-k", "0"], 2, "must be an integer of at least 1, got '0'"),
        (["caption", WOMAN, "--model", CAPTIONER, "--num-inference-steps", "0"], 2, "`num_inference_steps` must be"),
        (["classify", DIGIT, "--model", CLASSIFIER, "--guidance-scale", "0"], 2, "tdd: `guidance_scale` must be"),
        (
            ["caption", WOMAN, "--model", CAPTIONER, "--infill", "[A] running", "--choices", "B", "man"],
            2,
            "tdd: `choices`: [B] must stand once",
        ),
        (["caption", WOMAN, "--model", CLASSIFIER], 1, f"'{CLASSIFIER}' cannot be loaded: A captioner needs"),
        (["classify", DIGIT, "--model", CAPTIONER], 1, f"'{CAPTIONER}' cannot be loaded: A classifier diffuses"),
        (["caption", WOMAN, "--model", "no/such"], 1, "'no/such' cannot be loaded"),
        (["caption", WOMAN, "--model", CAPTIONER, "--device", "abacus"], 1, "device type at start of device string"),
    ],
)
def test_errors(capfd: pytest.CaptureFixture[str], arguments: list[str | Path], status: int, message: str) -> None:
    given, lines, errors = run(capfd, *arguments)
    assert (given, lines) == (status, []) and message in errors and "Traceback" not in errors


def test_choices(capfd: pytest.CaptureFixture[str]) -> None:
    gaps = {"A": ["man", "woman", "person"], "B": ["light", "medium-dark"]}
    options = ["--infill", "[A] climbing: [B] skin tone"]
    options += [word for name, texts in gaps.items() for word in ("--choices", name, *texts)]
    status, lines, _ = run(capfd, "caption", WOMAN, "--model", CAPTIONER, *options, "--json")
    captioner = pipeline("image-captioning", model=str(CAPTIONER))
    expected = captioner(str(WOMAN), infill="[A] climbing: [B] skin tone", choices=gaps)
    assert status == 0 and json.loads(lines[0])["captions"] == expected
    lines = run(capfd, "caption", WOMAN, "--model", CAPTIONER, *options)[1]
    assert re.fullmatch(r"woman climbing: medium-dark skin tone \(0\.\d{3}\)", lines[0])
    assert re.fullmatch(r"  A: woman \(0\.9\d\d\), \w+ \(0\.0\d\d\), \w+ \(0\.0\d\d\)", lines[1])
    assert len(lines) == 3 and lines[2].startswith("  B: medium-dark (0.")

    whole = ("--choices", "man running", "woman climbing: dark skin tone")
    lines = run(capfd, "caption", WOMAN, "--model", CAPTIONER, *whole, "--num-return-sequences", "2")[1]
    assert lines == ["woman climbing: dark skin tone (1.000)", "man running (0.000)"]


def test_choices_are_read_by_gap_or_as_captions() -> None:
    start = ["caption", "a.png", "--model", "m"]
    assert tdd_cli.parse_args([*start, "--choices", "man", "a woman"]).choices == ["man", "a woman"]
    gaps = [*start, "--infill", "[A]: [B]", "--choices", "A", "man", "a woman", "--choices", "B", "dark"]
    assert tdd_cli.parse_args(gaps).choices == {"A": ["man", "a woman"], "B": ["dark"]}
    with pytest.raises(SystemExit):
        tdd_cli.parse_args([*gaps, "--choices", "B", "light"])  # not silently the last one


def test_as_a_module_whose_output_is_closed_early() -> None:
    """`python -m modeling_tdd ... | head -1`."""
    command = [sys.executable, "-m", "modeling_tdd", "caption", *[WOMAN] * 3, "--model", CAPTIONER]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 1 and "Error" not in done.stderr
