"""What TDD is compared with: the autoregressive captioner and the nearest picture; and the plot that compares."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, ViTConfig, ViTImageProcessor

from modeling_tdd import TDDConfig, TDDForCaptioning, TDDProcessor
from modeling_tdd.evaluation import load_metric
from modeling_tdd.evaluation.baselines import AutoregressiveCaptioner, AutoregressiveConfig, nearest_captions
from modeling_tdd.evaluation.step_curves import collect_scores, plot_scores, read_results, score_table
from modeling_tdd.training.data import load_captions
from modeling_tdd.training.recipe import load_recipe
from modeling_tdd.training.tokenization import train_tokenizer


ROOT = Path(__file__).parent.parent
PAD, EOS = 0, 2


@pytest.fixture
def make_autoregressive(make_captioner: Callable[..., TDDForCaptioning]) -> Callable[..., AutoregressiveCaptioner]:
    """A function from fields of the configuration to a tiny autoregressive captioner, like `make_captioner`'s TDD."""

    def make(**fields: Any) -> AutoregressiveCaptioner:
        config = make_captioner(**fields).config.to_dict()
        config.pop("model_type")
        return AutoregressiveCaptioner(AutoregressiveConfig(**config)).eval()

    return make


# ---- The autoregressive captioner


def trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
@pytest.mark.parametrize("width, layers", [(128, 2), (192, 3)])
def test_size_is_close_to_that_of_tdd(width: int, layers: int, tie_word_embeddings: bool) -> None:
    """At the sizes of the emoji comparisons it has between nine tenths and all of TDD's number of parameters."""
    fields = {
        "vision_config": ViTConfig(image_size=16, patch_size=8, hidden_size=256, num_attention_heads=4),
        "vocab_size": 1748,
        "max_position_embeddings": 20,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * width,
        "pooling": None,
        "freeze_encoder": True,
        "tie_word_embeddings": tie_word_embeddings,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
    }
    tdd = trainable(TDDForCaptioning(TDDConfig(**fields)))
    autoregressive = trainable(AutoregressiveCaptioner(AutoregressiveConfig(**fields)))
    assert 0.9 * tdd <= autoregressive <= tdd


def test_loss_by_hand(make_autoregressive: Callable[..., AutoregressiveCaptioner], pixel_values: Tensor) -> None:
    """Each token is predicted from the image and the tokens before it, and padding is not predicted."""
    model = make_autoregressive()
    captions = [[5, 6, 7, EOS], [8, EOS], [9, 10, 11, 12, 13, 14, 15, EOS], [5, 5, EOS]]
    losses = []
    for row, caption in enumerate(captions):
        prefix = model.model.get_prefix(pixel_values[row : row + 1])
        for place, token in enumerate(caption):
            before = model.decoder.get_input_embeddings()(torch.tensor([caption[:place]], dtype=torch.long))
            logits = model.decoder(inputs_embeds=torch.cat([prefix, before], dim=1)).logits[0, -1]
            losses.append(-logits.log_softmax(-1)[token])
    expected = torch.stack(losses).mean()
    for fill in (PAD, -100):
        labels = torch.tensor([caption + [fill] * (8 - len(caption)) for caption in captions])
        torch.testing.assert_close(model(labels, pixel_values).loss, expected)
        features = model.model.get_image_features(pixel_values).pooler_output
        torch.testing.assert_close(model(labels, image_features=features).loss, expected)
    with pytest.raises(ValueError, match="Give either `pixel_values` or `image_features`"):
        model(labels)
    with pytest.raises(ValueError, match=r"`labels` must be in \[0, 19\], got 20 to 20"):
        model(torch.full((4, 3), 20), pixel_values)


def test_trainer_averages_its_losses_over_accumulation_steps(
    make_autoregressive: Callable[..., AutoregressiveCaptioner], tmp_path: Path
) -> None:
    """Its loss is a mean over the tokens of its own batch, as Trainer must know: it takes no `num_items_in_batch`."""
    arguments = TrainingArguments(str(tmp_path), gradient_accumulation_steps=2, use_cpu=True)
    assert not Trainer(make_autoregressive(), arguments).model_accepts_loss_kwargs


def test_generate_is_greedy_and_padded(
    make_autoregressive: Callable[..., AutoregressiveCaptioner], pixel_values: Tensor
) -> None:
    model = make_autoregressive()
    sequences = model.generate(pixel_values)
    assert sequences.shape == (4, 8)
    prefix = model.model.get_prefix(pixel_values[:1])
    tokens: list[int] = []
    while len(tokens) < 8 and EOS not in tokens:
        before = model.decoder.get_input_embeddings()(torch.tensor([tokens], dtype=torch.long))
        tokens.append(int(model.decoder(inputs_embeds=torch.cat([prefix, before], dim=1)).logits[0, -1].argmax()))
    assert sequences[0].tolist() == tokens + [PAD] * (8 - len(tokens))
    features = model.model.get_image_features(pixel_values).pooler_output
    torch.testing.assert_close(model.generate(image_features=features), sequences)
    torch.testing.assert_close(
        model.generate(pixel_values[2:3])[0], sequences[2]
    )  # independent of the rest of the batch
    # Where every caption ends at once, the rest of the places is padding.
    with torch.no_grad():
        model.decoder.lm_head.weight.zero_()
        model.decoder.lm_head.weight[EOS] = 1.0
        model.decoder.gpt_neox.final_layer_norm.bias.fill_(1.0)
    assert model.generate(pixel_values).tolist() == [[EOS] + [PAD] * 7] * 4


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
def test_save_and_load(
    make_autoregressive: Callable[..., AutoregressiveCaptioner],
    pixel_values: Tensor,
    tmp_path: Path,
    tie_word_embeddings: bool,
) -> None:
    model = make_autoregressive(tie_word_embeddings=tie_word_embeddings)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    loaded = AutoregressiveCaptioner.from_pretrained(tmp_path)
    labels = torch.tensor([[5, 6, EOS]] * 4)
    torch.testing.assert_close(loaded(labels, pixel_values).loss, model(labels, pixel_values).loss)
    tied = loaded.decoder.lm_head.weight is loaded.decoder.gpt_neox.embed_in.weight
    assert tied == tie_word_embeddings


def test_learns_eight_emoji_by_heart() -> None:
    """Real pictures and captions, features of a random frozen encoder: exact match 100 % after 100 steps."""
    recipe = load_recipe(ROOT / "scripts/recipes/emoji.yaml")
    rows = load_captions(recipe.data)["train"][:400:50]
    captions = [captions[0] for captions in rows["captions"]]
    tokenizer = train_tokenizer(captions)
    torch.manual_seed(0)
    model = AutoregressiveCaptioner(
        AutoregressiveConfig(
            vision_config=ViTConfig(
                image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
            ),
            vocab_size=len(tokenizer),
            max_position_embeddings=20,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            initializer_range=0.1,
            pooling=None,
            freeze_encoder=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    processor = TDDProcessor(ViTImageProcessor(size={"height": 32, "width": 32}, do_convert_rgb=True), tokenizer)
    batch = processor(images=rows["image"], captions=captions, return_tensors="pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(100):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    sequences = model.eval().generate(batch["pixel_values"])
    predictions = processor.batch_decode(sequences, skip_special_tokens=True)
    scores = load_metric("caption_match").compute(
        predictions=predictions, references=[[caption] for caption in captions]
    )
    assert len(set(captions)) == 8 and scores["exact_match"] == 1


# ---- The nearest picture


def test_nearest_captions() -> None:
    train = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 3.0], [0.0, 1.0]], [[-1.0, 0.0], [-1.0, 0.0]]]).half()
    queries = torch.tensor([[[0.2, 9.0], [0.0, 9.0]], [[5.0, 1.0], [5.0, -1.0]], [[-2.0, 0.5], [-2.0, 0.5]]])
    assert nearest_captions(queries, train, ["east", "north", "west"], batch_size=2) == ["north", "east", "west"]
    with pytest.raises(ValueError, match="must have the same length, got 3 and 1"):
        nearest_captions(queries, train, ["east"])


# ---- The plot and its table

SPLITS = ("validation", "test_combo")


def run_script(name: str, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / name), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=1200)


def write_result(folder: Path, result: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Folders of captioning runs with made-up scores."""
    made = []
    for method, schedule in (("tdd", "calibrated"), ("tdd", "cosine"), ("mdd", "cosine"), ("ar", ""), ("nearest", "")):
        for seed in (0,) if method == "nearest" else (0, 1, 2):
            folder = tmp_path / f"emoji_{schedule}/{method}-seed{seed}"
            base = {"calibrated": 0.5, "cosine": 0.3, "": 0.2}[schedule] + 0.01 * seed + 0.05 * (method == "mdd")
            grid = [{"num_inference_steps": n, "guidance_scale": 1.0} for n in (1, 10, 50)] if schedule else [{}]
            scores = []
            for split in SPLITS:
                for settings in grid:
                    value = base + 0.002 * settings.get("num_inference_steps", 0) + 0.1 * (split == "test_combo")
                    metrics = {"exact_match": value, "token_f1": value + 0.1, "stutter": 0.0, "fluent": 1.0}
                    scores.append({"split": split, **settings, **metrics})
            result = {"method": method, "seed": seed, "recipe": {"model": {}}, "scores": scores}
            write_result(folder, result)
            if schedule:
                TDDConfig(noise_schedule=schedule, num_labels=5).to_json_file(folder / "config.json", use_diff=False)
            made.append(folder)
    return made


def test_scores_are_gathered_over_seeds(folders: list[Path]) -> None:
    results = read_results(folders)
    scores = {line.label: scores for line, scores in collect_scores(results, "test_combo", "token_f1").items()}
    assert list(scores) == ["tdd, calibrated", "tdd, cosine", "mdd, cosine", "ar", "nearest"]
    assert scores["tdd, cosine"][10] == pytest.approx([0.52, 0.53, 0.54])
    assert scores["ar"] == {None: pytest.approx([0.4, 0.41, 0.42])}
    table = [
        [cell.strip() for cell in row.strip("|").split("|")] for row in score_table(results, "validation").split("\n")
    ]
    steps = ["1 step", "10 steps", "50 steps", "50 less 1", "without steps"]
    assert table[0] == ["method", "schedule", "guidance", "metric", *steps]
    cells = ["51.20 ± 1.00", "53.00 ± 1.00", "61.00 ± 1.00", "9.80 ± 0.00", ""]
    assert table[2] == ["tdd", "calibrated", "1", "exact_match", *cells]
    assert table[-4] == ["nearest", "", "", "exact_match", "", "", "", "", "20.00"]
    assert len(table) == 2 + 5 * 4


def test_runs_with_the_same_seed_and_settings_are_refused(folders: list[Path], tmp_path: Path) -> None:
    longer = tmp_path / "longer/tdd-seed0"
    longer.parent.mkdir()
    folders[0].rename(longer)
    longer.parent.joinpath("other").mkdir()
    with pytest.raises(ValueError, match="other has no result.json: give folders of finished runs"):
        read_results([longer.parent / "other"])
    write_result(longer.parent / "old", {"method": "tdd", "seed": 0, "accuracy": []})
    with pytest.raises(ValueError, match="result.json has no `scores`; it has method, seed, accuracy"):
        read_results([longer.parent / "old"])
    with pytest.raises(ValueError, match="longer/tdd-seed0 and .* the same method, schedule, weightings and seed"):
        read_results([longer, folders[1], longer])


def test_encoders_have_a_table_and_no_plot(folders: list[Path], tmp_path: Path) -> None:
    scores = [{"split": split, "word_map": 0.25, "word_f1": 0.5} for split in SPLITS]
    write_result(tmp_path / "encoder-seed0", {"method": "encoder", "seed": 0, "recipe": {}, "scores": scores})
    results = read_results([tmp_path / "encoder-seed0"])
    header, _, first, second = score_table(results, "test_combo").split("\n")
    assert header.split(" | ")[-2:] == ["metric  ", "without steps |"]
    assert "word_map | 25.00" in first and "word_f1  | 50.00" in second
    with pytest.raises(ValueError, match="needs results with one of top1, exact_match, token_f1 in common"):
        plot_scores(results)
    with pytest.raises(ValueError, match="no metric in common"):
        score_table(read_results([tmp_path / "encoder-seed0", folders[0]]), "test_combo")


def test_plot_script(folders: list[Path], tmp_path: Path) -> None:
    plot = tmp_path / "plots/steps.png"
    training = folders[0].with_name("tdd-seed0-training")  # of checkpoints, which `*-seed*` names too
    training.mkdir()
    done = run_script("score.py", tmp_path, *map(str, [*folders, training]), "--plot", str(plot))
    assert done.returncode == 0, done.stdout + done.stderr
    table = plot.with_suffix(".md").read_text()
    assert table.count("### ") == 2 and "51.20 ± 1.00" in table and table.strip() in done.stdout
    with Image.open(plot) as image:
        assert min(image.size) > 500
        colors = {f"#{r:02X}{g:02X}{b:02X}" for _, (r, g, b) in image.convert("RGB").getcolors(1 << 24)}
    assert {"#0072B2", "#D55E00", "#009E73"} <= colors  # the three lines with steps
    assert "#CC79A7" not in colors  # no fourth


def test_plot_script_names_the_weightings_that_differ(tmp_path: Path) -> None:
    """Classification runs by the recipes of Fig. 5."""
    folders = []
    for input_weighting in ("none", "visibility"):
        for loss_weighting in ("alpha_bar", "none"):
            for seed in (0, 1):
                folder = tmp_path / f"input_{input_weighting}_{loss_weighting}/tdd-seed{seed}"
                grid = [{"num_inference_steps": n, "guidance_scale": 1.0, "top1": 0.01 * n} for n in (1, 50)]
                scores = [{"split": "validation", **entry} for entry in grid]
                write_result(folder, {"method": "tdd", "seed": seed, "recipe": {}, "scores": scores})
                fields = {"input_weighting": input_weighting, "loss_weighting": loss_weighting, "num_labels": 5}
                TDDConfig(noise_schedule="cosine", **fields).to_json_file(folder / "config.json", use_diff=False)
                folders.append(folder)
    labels = [line.label for line in collect_scores(read_results(folders), "validation", "top1")]
    assert labels == [
        f"tdd, cosine, input {weighting}, {word} coefficient"
        for weighting in ("none", "visibility")
        for word in ("with", "without")
    ]
    with_coefficient = [line.label for line in collect_scores(read_results(folders[:2]), "validation", "top1")]
    assert with_coefficient == ["tdd, cosine"]
    done = run_script("score.py", tmp_path, *map(str, folders), "--plot", "fig5.png")
    assert done.returncode == 0, done.stdout + done.stderr
    header, _, first, *_ = [line for line in done.stdout.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, first)]
    assert cells[0][:6] == ["method", "schedule", "input weighting", "loss weighting", "guidance", "metric"]
    assert cells[1][:7] == ["tdd", "cosine", "none", "alpha_bar", "1", "top1", "1.00 ± 0.00"]
    with Image.open(tmp_path / "fig5.png") as image:
        colors = {f"#{r:02X}{g:02X}{b:02X}" for _, (r, g, b) in image.convert("RGB").getcolors(1 << 24)}
    assert {"#0072B2", "#D55E00", "#009E73", "#CC79A7"} <= colors
