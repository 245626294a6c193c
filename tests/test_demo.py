# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The demo: what it shows, a Space's folder that runs as it is, and the answers of that to clients on loopback."""

import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from transformers import PreTrainedConfig, ViTConfig, ViTImageProcessor, pipeline

from modeling_tdd import TDDConfig, TDDForCaptioning, TDDProcessor
from modeling_tdd.training.tokenization import train_tokenizer


ROOT = Path(__file__).parent.parent
CAPTIONER, DIGITS = ROOT / "checkpoints/emoji-captions", ROOT / "checkpoints/digits"
WEIGHTLIFTER, CLIMBER = CAPTIONER / "weightlifter.png", CAPTIONER / "example.png"
SETTINGS = {"num_inference_steps": 10, "seed": 0}
START_LIMIT = 300


@pytest.fixture(scope="module")
def rival(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny masked captioner with random weights, and a mask token in its vocabulary."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "masked"
    tokenizer = train_tokenizer(["woman climbing: dark skin tone", "man climbing: light skin tone"], kind="word")
    vision: PreTrainedConfig = ViTConfig(
        image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    config = TDDConfig(
        vision_config=vision,
        corruption="mask",
        pooling=None,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=12,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
    )
    TDDForCaptioning(config).save_pretrained(folder)
    TDDProcessor(ViTImageProcessor(size={"height": 16, "width": 16}), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def modules() -> Iterator[tuple[Any, Any]]:
    """The demo's two modules."""
    sys.path.insert(0, str(ROOT / "demo"))
    import app
    import denoising

    yield app, denoising
    sys.path.remove(str(ROOT / "demo"))


@pytest.fixture(scope="module")
def demo(modules: tuple[Any, Any], rival: Path) -> Any:
    app, denoising = modules
    captioners = [denoising.Captioner(str(folder)) for folder in (CAPTIONER, rival)]
    return app.Demo(captioners, pipeline("image-classification", model=str(DIGITS)))


@pytest.fixture(scope="module")
def address(rival: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Space's folder as docs/demo.md lays it out, running with the variables of a Space."""
    space = tmp_path_factory.mktemp("space")
    shutil.copytree(ROOT / "demo", space, dirs_exist_ok=True)
    for name in ("modeling_tdd", "checkpoints"):
        shutil.copytree(ROOT / name, space / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "TDD_RIVAL": str(rival)}
    environment = {**os.environ, **variables, "GRADIO_TEMP_DIR": str(space / "uploads"), "PYTHONPATH": ""}
    log = space / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "app.py"], cwd=space, env=environment, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + START_LIMIT
        while "Running on local URL" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def ask(address: str, picture: Path, text: str = "", choices: str = "", steps: int = 10) -> tuple[Any, ...]:
    """Both captions, the digit, and the table of choices."""
    client = Client(address, verbose=False)
    return client.predict(handle_file(picture), text, choices, steps, 1.0, "", 0, api_name="/caption")


# ---- What is shown


def denoise(captioner: Any, picture: Path, text: str = "", choices: Any = None, **settings: Any) -> list[Any]:
    return list(captioner.denoise(Image.open(picture), text, choices, {**SETTINGS, **settings}))


def test_drafts_come_step_by_step(demo: Any) -> None:
    *drafts, denoised = denoise(demo.captioners[0], WEIGHTLIFTER)
    assert drafts == [frame.caption for frame in denoised.frames]
    assert len(drafts) == 10 and len(set(drafts)) > 2
    expected = pipeline("image-captioning", model=str(CAPTIONER))(WEIGHTLIFTER)
    assert drafts[-1] == expected[0]["generated_text"]


def test_drafts_come_while_others_are_computed(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first draft is there before the last step has been taken."""
    taken = []
    denoising_step = type(demo.captioners[0].model).denoising_step.fget

    def slow(model: TDDForCaptioning) -> Any:
        def step(*args: Any) -> Any:
            taken.append(time.sleep(0.1))
            return denoising_step(model)(*args)

        return step

    monkeypatch.setattr(type(demo.captioners[0].model), "denoising_step", property(slow))
    progress = demo.captioners[0].denoise(Image.open(WEIGHTLIFTER), "", None, SETTINGS)
    assert isinstance(next(progress), str) and len(taken) < 5
    list(progress)
    assert len(taken) == 10


def test_threads_do_not_disturb_each_other(demo: Any) -> None:
    pictures = [WEIGHTLIFTER, CLIMBER, DIGITS / "example.png"] * 4
    alone = [denoise(demo.captioners[0], picture)[-1].frames for picture in pictures[:3]] * 4
    assert len({frames[-1].caption for frames in alone}) == 3
    with ThreadPoolExecutor(8) as threads:
        together = threads.map(lambda picture: denoise(demo.captioners[0], picture)[-1].frames, pictures)
        assert [[f.caption for f in frames] for frames in together] == [
            [f.caption for f in frames] for frames in alone
        ]


def test_settings_reach_the_loop(demo: Any) -> None:
    captioner = demo.captioners[0]
    settings = {"num_inference_steps": 4, "sampler": "renoise", "guidance_scale": 1.5, "seed": 3}
    frames = denoise(captioner, WEIGHTLIFTER, **settings)[-1].frames
    inputs = captioner.processor(images=WEIGHTLIFTER, return_tensors="pt")
    outputs = captioner.model.generate(**inputs, **settings, return_dict_in_generate=True, output_trajectory=True)
    length = len(frames[-1].tokens)
    expected = outputs.trajectory.log_probs[0, -1, :length].exp()
    torch.testing.assert_close(torch.tensor([p for _, p in frames[-1].tokens]), expected)
    with pytest.raises(ValueError, match="guidance_scale"):  # also out of the thread
        denoise(captioner, WEIGHTLIFTER, guidance_scale=-1.0)


def test_highlighted_tokens_make_up_the_draft(demo: Any, modules: tuple[Any, Any]) -> None:
    _, denoising = modules
    frame = denoise(demo.captioners[0], WEIGHTLIFTER)[-1].frames[2]
    tokens = denoising.highlight(frame)
    assert "".join(piece for piece, _ in tokens) == frame.caption
    assert {label for _, label in tokens} <= set(denoising.COLOR_MAP)
    sure, *unsure = sorted({label for _, label in tokens}, key=lambda label: -int(label.split()[0]))
    assert sure == "100 %" and unsure and denoising.COLOR_MAP[sure] != denoising.COLOR_MAP[unsure[-1]]


def test_entropy_of_both_models(demo: Any, modules: tuple[Any, Any]) -> None:
    results = [denoise(captioner, WEIGHTLIFTER)[-1] for captioner in demo.captioners]
    axes = modules[1].plot_entropies(["one", "two"], results).axes[0]
    shown = [line.get_ydata().tolist() for line in axes.get_lines()]
    assert shown == [[frame.entropy for frame in denoised.frames] for denoised in results]


def test_choices_of_gaps_and_of_captions(demo: Any, modules: tuple[Any, Any]) -> None:
    _, denoising = modules
    parse = denoising.parse_choices
    assert parse(" \n", "a cat") is None
    assert parse("a cat\n\n a dog: black ", "") == ["a cat", "a dog: black"]
    choices = parse("A: man, woman\nB:light,dark", "[A] climbing: [B] skin tone")
    assert choices == {"A": ["man", "woman"], "B": ["light", "dark"]}
    results = [
        denoise(captioner, CLIMBER, "[A] climbing: [B] skin tone", choices)[-1] for captioner in demo.captioners
    ]
    assert results[0].frames[-1].caption == "woman climbing: dark skin tone"
    rows = denoising.tabulate_choices(["one", "two"], results)
    assert [row[:3] for row in rows[:4]] == [["one", gap, word] for gap in choices for word in choices[gap]]
    assert {row[0] for row in rows} == {"one", "two"} and float(rows[1][3].rstrip("%")) > 90
    captions = ["man running", "woman climbing: dark skin tone"]
    denoised = denoise(demo.captioners[0], CLIMBER, "", captions)[-1]
    assert [row[1:3] for row in denoising.tabulate_choices(["one"], [denoised])] == [["caption", c] for c in captions]


# ---- The page


def test_every_control_has_a_name(demo: Any) -> None:
    """Screen readers read it. Plots have a title in the picture, and buttons their text."""
    kinds = {"plot", "state", "button", "markdown", "row", "column", "form"}
    blocks = [block for block in demo.page.blocks.values() if block.get_block_name() not in kinds]
    assert len(blocks) >= 15
    assert [block for block in blocks if not getattr(block, "label", None)] == []


def test_steps_and_tokens_are_shown(demo: Any, modules: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    app, denoising = modules
    *_, last = demo.caption(str(WEIGHTLIFTER), "", "", 10, 1.0, "", 0)
    results, first, second = last[demo.results], *demo.views
    assert last[first.caption] == results[0].frames[-1].caption
    updates = demo.describe(results)
    assert updates[demo.step].maximum == 10 and updates[first.token].maximum == len(results[0].frames[-1].tokens) + 1
    assert demo.show_step(results, 3) == {
        view.draft: denoising.highlight(denoised.frames[2]) for view, denoised in zip((first, second), results)
    }
    assert demo.plot(0, results, 5).axes[0].get_title() == "5: medium"
    assert demo.plot(0, None, 5) is None and demo.show_step(None, 1) == {}
    monkeypatch.setattr(app, "SECONDS_PER_STEP", 0)
    played = list(demo.play(results))
    assert [step[demo.step] for step in played] == list(range(1, 11)) and list(demo.play(None)) == []
    assert played[2][first.draft] == demo.show_step(results, 3)[first.draft]


def test_one_step_is_enough(demo: Any) -> None:
    *_, last = demo.caption(str(CLIMBER), "woman", "", 1, 1.0, "", 0)
    assert last[demo.views[0].caption].startswith("woman")
    results = last[demo.results]
    demo.describe(results)
    assert demo.show_step(results, 2) == demo.show_step(results, 1)


def test_options_are_variables_too(modules: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    app, _ = modules
    monkeypatch.setattr(sys, "argv", ["app.py"])
    assert app.parse_args().rival is None and Path(app.parse_args().model) == CAPTIONER
    monkeypatch.setenv("TDD_RIVAL", "someone/mdd")
    assert app.parse_args().rival == "someone/mdd"
    monkeypatch.setattr(sys, "argv", ["app.py", "--rival", "other/mdd"])
    assert app.parse_args().rival == "other/mdd"


# ---- A Space that runs


def test_a_visitor_gets_captions_and_a_digit(address: str) -> None:
    caption, of_rival, digit, table = ask(address, CLIMBER)
    assert caption == "woman climbing: dark skin tone" and of_rival != caption
    assert ask(address, DIGITS / "example.png")[2]["label"] == "7"
    assert len(digit["confidences"]) == 3


def test_a_visitor_sees_drafts(address: str) -> None:
    job = Client(address, verbose=False).submit(handle_file(WEIGHTLIFTER), "", "", 10, 1.0, "", 0, api_name="/caption")
    drafts = list(dict.fromkeys(output[0] for output in job))
    assert len(drafts) > 2 and drafts[0].endswith("skindark skin tone")
    assert job.result()[0].endswith(" medium-dark skin tone")


def test_a_visitor_fills_blanks_and_chooses(address: str) -> None:
    assert ask(address, CLIMBER, "man [MASK]: [MASK] skin tone")[0] == "man climbing: dark skin tone"
    choices = "A: man, woman\nB: light, dark"
    caption, _, _, table = ask(address, CLIMBER, "[A] climbing: [B] skin tone", choices)
    assert caption == "woman climbing: dark skin tone"
    table = table.get("value", table)
    assert [row[2] for row in table["data"][:4]] == ["man", "woman", "light", "dark"]


def test_users_at_once_get_their_own_captions(address: str) -> None:
    pictures = [WEIGHTLIFTER, CLIMBER, DIGITS / "example.png"] * 2
    alone = [ask(address, picture)[0] for picture in pictures[:3]] * 2
    with ThreadPoolExecutor(len(pictures)) as users:
        assert [answer[0] for answer in users.map(lambda picture: ask(address, picture), pictures)] == alone
    assert len(set(alone)) == 3


def test_what_is_wrong_is_said(address: str, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no pixels")
    (tmp_path / "cut.png").write_bytes(WEIGHTLIFTER.read_bytes()[:2000])
    Image.new("L", (10_000, 9_000)).save(tmp_path / "huge.png")
    for name, reason in {
        "notes": "it has no known image format",
        "cut": "image file is truncated",
        "huge": "10000 x 9000 pixels are more than",
    }.items():
        with pytest.raises(AppError, match=rf"{name}\.png \([\d,]+ bytes\) cannot be read as a picture: {reason}"):
            ask(address, tmp_path / f"{name}.png")
    with pytest.raises(AppError, match="no picture yet"):
        Client(address, verbose=False).predict(None, "", "", 10, 1.0, "", 0, api_name="/caption")
    with pytest.raises(AppError, match=r"must stand once"):
        ask(address, CLIMBER, "woman [MASK]", "A: man")
    (tmp_path / "heavy.png").write_bytes(bytes(11 << 20))
    with pytest.raises(ValueError, match="exceeds the maximum file size"):
        ask(address, tmp_path / "heavy.png")


def test_only_captions_are_an_endpoint(address: str) -> None:
    endpoints = Client(address, verbose=False).view_api(return_format="dict", print_info=False)
    assert list(endpoints["named_endpoints"]) == ["/caption"] and endpoints["unnamed_endpoints"] == {}


# ---- What a Space needs


def test_the_space_says_what_the_package_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its libraries are those of setup.py with the same bounds, and its header names a file that is there."""
    given: dict[str, Any] = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", given.update)
    runpy.run_path("setup.py")
    extras = given["extras_require"]
    wanted = {
        re.split("[><=]", line)[0]: line for line in [*given["install_requires"], *extras["demo"], *extras["train"]]
    }
    lines = (ROOT / "demo/requirements.txt").read_text().split()
    assert [line for line in lines if wanted.get(re.split("[><=]", line)[0]) != line] == []
    assert set(given["install_requires"]) <= set(lines)
    header = yaml.safe_load((ROOT / "demo/README.md").read_text().split("---")[1])
    assert header["sdk"] == "gradio" and (ROOT / "demo" / header["app_file"]).exists()
    lowest = wanted["gradio"].split(">=")[1]
    assert [int(part) for part in header["sdk_version"].split(".")] >= [int(part) for part in lowest.split(".")]


def test_the_animation_in_the_documents() -> None:
    file = ROOT / "docs/images/denoising.gif"
    with Image.open(file) as animation:
        assert animation.n_frames == 10
    assert file.stat().st_size < 600_000


def test_the_documented_load_is_the_measured_one() -> None:
    figures = json.loads((ROOT / "docs/results/demo/load.json").read_text())
    text = (ROOT / "docs/demo.md").read_text()
    for name in ("requests", "median_latency_s", "p95_latency_s", "rss_start_mib", "rss_end_mib", "load_average"):
        assert re.search(rf"\b{figures[name]}\b", text), name
    assert figures["users"] == 20 and figures["seconds"] == 60 and figures["wrong_answers"] == 0
