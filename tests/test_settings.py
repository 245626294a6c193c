# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Tests of the settings: nothing is silently ignored, whatever is given is a value or an error that names it, and what
saves loads."""

import inspect
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    ViTConfig,
)

from modeling_tdd import TDDConfig, TDDForCaptioning, TDDForImageClassification, TDDGenerationConfig, TDDModel
from modeling_tdd.settings_tdd import SETTINGS


MakeModel = Callable[..., nn.Module]
PAD, EOS = 0, 2
DOCUMENT = Path(__file__).parent.parent / "docs/settings.md"
EVERYWHERE = settings(derandomize=True, deadline=None, database=None)


def images(rows: int) -> Tensor:
    return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(7))


# ---- The table in the documents


def arguments(*functions: Callable) -> set[str]:
    names = {name for function in functions for name in inspect.signature(function).parameters}
    return names - {"self", "args", "kwargs"}


def places_and_default(name: str) -> tuple[str, str]:
    """Where a setting may be given, and its default, as the code has them."""
    own = {key for key, kind in TDDConfig.__annotations__.items() if "ClassVar" not in str(kind)}
    in_config = name in own | {"num_labels", "id2label", "problem_type", "dtype"}
    in_generation = name in TDDGenerationConfig._DEFAULTS
    in_call = in_generation or name in arguments(
        TDDModel.forward,
        TDDForImageClassification.forward,
        TDDForCaptioning.forward,
        TDDForCaptioning.generate,
        TDDForCaptioning.score,
    )
    places = {"config": in_config, "generation config": in_generation, "call": in_call, "pipeline": in_generation}
    if in_generation:
        default = TDDGenerationConfig._DEFAULTS[name]
    else:
        default = {"num_labels": 2, "num_draws": 16, "max_rows": 256}.get(name, getattr(TDDConfig, name, None))
    return ", ".join(place for place, is_one in places.items() if is_one), f"`{default!r}`"


def test_the_documents_table_has_every_setting_with_its_places_default_and_error() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \|$", DOCUMENT.read_text(), re.MULTILINE)
    assert {name: (places, default, error) for name, places, default, error in rows} == {
        name: (*places_and_default(name), f"must be {setting.allowed}") for name, setting in SETTINGS.items()
    }
    forwards = arguments(TDDForImageClassification.forward, TDDForCaptioning.forward, TDDForCaptioning.generate)
    own = {name for name, kind in TDDConfig.__annotations__.items() if "ClassVar" not in str(kind)}
    assert SETTINGS.keys() >= forwards | own | TDDGenerationConfig._DEFAULTS.keys()


# ---- Any value of any setting: a result, or an error that names it


numbers = st.one_of(
    st.integers(-3, 30),
    st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**400, 1e308, -0.0, 1e-320]),
    st.floats(allow_nan=True, allow_infinity=True),
)
words = st.text(max_size=6) | st.sampled_from(["cosine", "mask", "relu"])
scalars = st.one_of(st.none(), st.booleans(), numbers, words)
anything = st.one_of(
    scalars,
    numbers.map(lambda value: np.float64(value) if isinstance(value, float) else value),
    st.sampled_from([np.int64(3), np.float32(1.5), np.zeros(2), b"3", object(), int, 3 + 0j, float]),
    st.lists(scalars, max_size=3),
    st.lists(st.lists(st.integers(-2, 25), max_size=2), max_size=2),
    st.dictionaries(st.one_of(st.text(max_size=4), st.integers(0, 3)), scalars, max_size=3),
)
shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
tensors = st.builds(
    lambda shape, dtype, value: torch.full(shape, value).to(getattr(torch, dtype)),
    st.lists(st.integers(0, 9), max_size=4).map(tuple)
    | st.sampled_from([(2, 3, 16, 16), (2, 4), (2, 8), (2, 3, 8, 20)]),
    st.sampled_from(["float32", "float64", "bfloat16", "int64", "bool", "uint8", "complex64"]),
    st.sampled_from([-1.0, 0.0, 1.0, 3.0, 19.0, 200.0, float("nan"), float("inf")]),
)


def outcome(function: Callable[[], Any], *names: str) -> None:
    """Runs a function, which must return within a second, or raise an error that names one of the settings."""
    start = time.process_time()
    try:
        function()
    except (ValueError, TypeError) as error:
        assert any(name in str(error) for name in names), f"{names}: {type(error).__name__}: {error}"
    assert time.process_time() - start < 1


CONFIG_FIELDS = [name for name in SETTINGS if "config" in places_and_default(name)[0].split(", ")]
OF_TRANSFORMERS = ["architectures", "label2id", "output_hidden_states", "return_dict", "chunk_size_feed_forward"]


@EVERYWHERE
@given(st.sampled_from([{}, {"vocab_size": 20, "max_position_embeddings": 8}]), st.data())
def test_any_value_of_a_field_of_the_configuration(task: dict[str, Any], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*CONFIG_FIELDS, *OF_TRANSFORMERS]))
    value = data.draw(anything)
    outcome(lambda: TDDConfig(**{**task, name: value}), name)
    outcome(lambda: setattr(TDDConfig(**task), name, value), name)


@EVERYWHERE
@given(st.sampled_from(list(TDDGenerationConfig._DEFAULTS)), anything)
def test_any_value_of_a_generation_parameter(name: str, value: Any) -> None:
    outcome(lambda: TDDGenerationConfig(**{name: value}), name)


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    vision_config = ViTConfig(image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    fields = {"vision_config": vision_config, "num_timesteps": 20, "timesteps_per_image": 3, **sizes}
    tokens = {"vocab_size": 20, "max_position_embeddings": 8, "pad_token_id": PAD, "eos_token_id": EOS}
    return {
        "classifier": TDDForImageClassification(TDDConfig(num_labels=5, **fields)).eval(),
        "mask classifier": TDDForImageClassification(TDDConfig(num_labels=5, corruption="mask", **fields)).eval(),
        "captioner": TDDForCaptioning(TDDConfig(pooling=None, **tokens, **fields)).eval(),
        "mask captioner": TDDForCaptioning(TDDConfig(pooling=None, corruption="mask", **tokens, **fields)).eval(),
    }


@settings(EVERYWHERE, max_examples=400)
@given(st.data())
@torch.no_grad()
def test_any_value_of_an_argument(models: dict[str, nn.Module], data: st.DataObject) -> None:
    """Of `forward` and `generate`, in both modes, with and without labels."""
    kind = data.draw(st.sampled_from(list(models)))
    model = models[kind]
    is_captioner, generates = "captioner" in kind, "captioner" in kind and data.draw(st.booleans())
    function = model.generate if generates else model.forward
    names = arguments(function) | (TDDGenerationConfig._DEFAULTS.keys() if generates else set())
    name = data.draw(st.sampled_from(sorted(names)))
    call = {"pixel_values": images(2), name: data.draw(st.one_of(anything, tensors))}
    if not generates and name != "labels" and data.draw(st.booleans()):
        call["labels"] = torch.full((2, 4), 3) if is_captioner else torch.tensor([0, 3])
    if generates and name.startswith(("decoder_", "attention")):
        call |= {"decoder_input_ids": torch.full((2, 4), 3), **call}
    if generates and data.draw(st.booleans()) and name in ("temperature", "top_k", "top_p"):
        call["do_sample"] = True
    model.train(data.draw(st.booleans()))
    # The encoder has an error of its own for images of another size; features are refused beside pixels
    others = {"image_features": ["pixel_values"], "pixel_values": ["Input image size"]}
    outcome(lambda: function(**call), name, *others.get(name, []))


@EVERYWHERE
@given(
    st.text("abcdefghijklmnopqrstuvwxyz_", min_size=3, max_size=12),
    scalars.filter(lambda value: value not in (None, False)),
)
@torch.no_grad()
def test_any_unknown_name(models: dict[str, nn.Module], name: str, value: Any) -> None:
    for call in (
        lambda: TDDConfig(**{f"x{name}": value}),
        lambda: TDDGenerationConfig(**{f"x{name}": value}),
        lambda: models["classifier"].eval()(images(1), **{f"x{name}": value}),
        lambda: models["captioner"].eval()(images(1), **{f"x{name}": value}),
        lambda: models["captioner"].model(images(1), **{f"x{name}": value}),
        lambda: models["captioner"].generate(images(1), **{f"x{name}": value}),
    ):
        with pytest.raises(ValueError, match=f"has no `x{name}`"):
            call()


# ---- Names


@torch.no_grad()
def test_a_typo_is_refused_with_the_nearest_name(models: dict[str, nn.Module]) -> None:
    """`model(x, num_inference_step=1)` had no effect on a classifier."""
    for name, call in {
        "num_inference_steps": lambda: models["classifier"].eval()(images(1), num_inference_step=1),
        "timesteps": lambda: models["captioner"](images(1), timestep=torch.ones(1)),
        "hidden_size": lambda: TDDConfig(hiden_size=32),
        "pooling": lambda: TDDConfig.from_dict({"poling": "mean"}),
        "seed": lambda: TDDGenerationConfig(sed=3),
    }.items():
        with pytest.raises(ValueError, match=rf"has no `\w+`. Did you mean `{name}`\?"):
            call()
    with pytest.raises(ValueError, match="`TDDConfig` has no `temperature`"):  # Transformers drops it without a word
        TDDConfig(temperature=0.5)


def test_what_is_set_later_is_checked_too_so_that_what_saves_loads(make_captioner: MakeModel, tmp_path: Path) -> None:
    model = make_captioner()
    for config, name, value in (
        (model.config, "num_timestep", 5),
        (model.config, "num_timesteps", 0),
        (model.generation_config, "num_inference_step", 5),
        (model.generation_config, "seed", "x"),
        (model.generation_config, "num_beams", 1),
    ):
        with pytest.raises(ValueError, match=name):
            setattr(config, name, value)
    model.config.of_another_tool = 3  # is no slip, and not saved, or it could not be loaded
    # What Transformers' Trainer sets: the first token is that of the tokenizer, and has no effect here
    model.config.use_cache, model.config.bos_token_id, model.generation_config.bos_token_id = False, 3, 3
    model.generation_config.num_inference_steps = np.int64(3)
    model.generation_config.guidance_scale = np.float32(1.5)
    model.config.pad_loss_weight = np.float32(0.5)
    model.save_pretrained(tmp_path)
    loaded = TDDForCaptioning.from_pretrained(tmp_path)
    assert not hasattr(loaded.config, "of_another_tool")
    assert loaded.config.pad_loss_weight == 0.5 and loaded.config.bos_token_id == 3
    assert (loaded.generation_config.num_inference_steps, loaded.generation_config.guidance_scale) == (3, 1.5)
    assert torch.equal(loaded.generate(images(2)), model.generate(images(2)))


def test_fields_that_exclude_each_other_are_refused_when_a_model_is_made(make_config: Callable) -> None:
    config = make_config()
    config.timesteps_per_image = 50  # allowed by itself; there are 20 timesteps
    with pytest.raises(ValueError, match="`timesteps_per_image` must be at most `num_timesteps`, got 50 and 20"):
        TDDForImageClassification(config)


# ---- Values


@torch.no_grad()
def test_inert_values_of_transformers_and_numpys_numbers(make_captioner: MakeModel, make_model: MakeModel) -> None:
    model = make_captioner()
    expected = model.generate(images(2), num_inference_steps=4)
    inert = {"num_beams": 1, "use_cache": True, "min_length": 0, "length_penalty": 1.0, "early_stopping": False}
    inert |= {"synced_gpus": False, "output_scores": False, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    inert |= {"stopping_criteria": None, "renormalize_logits": False, "assistant_model": None}
    assert torch.equal(model.generate(images(2), num_inference_steps=np.int32(4), **inert), expected)
    drawn = model.generate(images(2), do_sample=True, num_inference_steps=4)
    assert torch.equal(model.generate(images(2), do_sample=True, num_inference_steps=4, top_k=0), drawn)
    classifier = make_model()
    logits = classifier(images(2), num_inference_steps=np.int64(3), guidance_scale=np.float64(2.0)).logits
    assert torch.equal(logits, classifier(images(2), num_inference_steps=3, guidance_scale=2.0).logits)
    for call in (
        lambda: model.generate(images(2), num_inference_steps=True),
        lambda: classifier(images(2), num_noise_samples=True),
    ):
        with pytest.raises(ValueError, match="must be an integer .* got True"):
            call()
    for name, value in {"num_beams": True, "use_cache": 1.5, "synced_gpus": 1, "min_length": 1, "labels_": 1}.items():
        with pytest.raises(ValueError, match=name):
            model.generate(images(2), **{name: value})
    assert torch.equal(model.generate(images(2), num_inference_steps=4, synced_gpus=True), expected)
    with pytest.raises(ValueError, match="`synced_gpus=True` needs `stability_threshold=None`"):
        model.generate(images(2), synced_gpus=True, stability_threshold=2)


HUGE = {"max_new_tokens": 2**63, "max_length": 2**70, "stability_threshold": 2**64, "top_k": 2**63, "seed": 2**64 - 1}


@pytest.mark.parametrize("name", HUGE)
def test_a_large_number_is_as_good_as_none(make_captioner: MakeModel, name: str) -> None:
    """`max_new_tokens=2**63` gave empty captions."""
    call = {"do_sample": True} if name == "top_k" else {}
    model = make_captioner()
    sequences = model.generate(images(2), **call, **{name: HUGE[name]})
    assert sequences.shape == (2, 8) and (sequences != PAD).any()
    assert name == "seed" or torch.equal(sequences, model.generate(images(2), **call))


@pytest.mark.parametrize("name", ["pad_token_id", "eos_token_id", "bad_words_ids"])
def test_tokens_beyond_the_vocabulary_are_refused(make_captioner: MakeModel, name: str) -> None:
    model = make_captioner()
    for token in (20, 2**63, -1):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            model.generate(images(1), **{name: [[token]] if name == "bad_words_ids" else token})
    if name != "bad_words_ids":
        with pytest.raises(ValueError, match=rf"`{name}` must be an integer in \[0, 19\], got 20"):
            make_captioner(**{name: 20})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"input_ids": torch.full((2, 3), 5), "attention_mask": torch.ones(2, 2)},
            r"`attention_mask` must have the shape of `input_ids`, \(2, 3\), got \(2, 2\)",
        ),
        (
            {"input_ids": torch.full((2, 3), 5), "attention_mask": torch.full((2, 3), -1e9)},
            "`attention_mask` must hold 0 and 1 alone",
        ),
        ({"attention_mask": torch.ones(2, 2)}, "`attention_mask` would have no effect: there are no `input_ids`"),
        ({"decoder_attention_mask": torch.ones(2, 2)}, "`decoder_attention_mask` would have no effect"),
    ],
)
def test_masks_that_do_not_fit_are_refused(make_captioner: MakeModel, given: dict[str, Tensor], message: str) -> None:
    """A narrow mask dropped tokens."""
    with pytest.raises(ValueError, match=message):
        make_captioner().generate(images(2), **given)


ENCODERS = [
    ({"hidden_size": 0}, "vision_config.hidden_size` must be an integer in"),
    ({"patch_size": -4}, "vision_config.patch_size` must be an integer in"),
    ({"num_hidden_layers": -1}, "vision_config.num_hidden_layers` must be an integer in"),
    ({"hidden_size": "x"}, "`vision_config` is refused by its own class: .*hidden_size"),
    ({"model_type": "no such model"}, "`vision_config` is refused by its own class: Unrecognized model type"),
    ({"model_type": ["vit"]}, "`vision_config` is refused by its own class"),
    ({"hidden_act": "no such activation"}, "`vision_config` makes no encoder: `vit` failed with KeyError"),
    ({"image_size": 2, "patch_size": 16}, "`vision_config`"),
]


@pytest.mark.parametrize(("fields", "message"), ENCODERS, ids=str)
def test_encoders_that_cannot_be_are_refused(make_config: Callable, fields: dict[str, Any], message: str) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with pytest.raises(ValueError, match=message):
        TDDForImageClassification(make_config(vision_config={"model_type": "vit", **sizes, **fields}))


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "3", "null", b"\xff\xfe\x00"], ids=repr)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_damaged_file_is_named(make_captioner: MakeModel, tmp_path: Path, name: str, content: str | bytes) -> None:
    """A damaged generation_config.json was passed over for the defaults."""
    make_captioner().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(
        ValueError, match=f"{re.escape(str(tmp_path / name))}` (is not valid JSON|must hold a JSON object)"
    ):
        TDDForCaptioning.from_pretrained(tmp_path)


def test_a_bad_value_or_name_in_a_file_is_refused(make_captioner: MakeModel, tmp_path: Path) -> None:
    make_captioner().save_pretrained(tmp_path)
    for file, name, value in (
        ("config.json", "layer_norm_eps", -1.0),
        ("config.json", "hidden_sise", 3),
        ("generation_config.json", "seed", "x"),
        ("generation_config.json", "sampel", 3),
    ):
        content = json.loads((tmp_path / file).read_text())
        (tmp_path / file).write_text(json.dumps({**content, name: value}))
        with pytest.raises(ValueError, match=name):
            (TDDForCaptioning if file.startswith("gen") else AutoConfig).from_pretrained(tmp_path)
        (tmp_path / file).write_text(json.dumps(content))
    assert TDDForCaptioning.from_pretrained(tmp_path).config.hidden_size == 32


# ---- Scores that are not finite


@pytest.mark.parametrize("fault", ["weights", "pixels", "infinity", "processor"])
@torch.no_grad()
def test_scores_that_are_not_finite_are_said_once(
    make_captioner: MakeModel, make_model: MakeModel, fault: str
) -> None:
    """They gave empty captions, and classes of no meaning."""
    captioner, classifier, mask_classifier = make_captioner(), make_model(), make_model(corruption="mask")
    pixels, call = images(2), {}
    if fault == "weights":
        for model in (captioner, classifier, mask_classifier):
            model.model.encoder.layernorm.bias.fill_(float("nan"))
    elif fault == "processor":
        call["logits_processor"] = LogitsProcessorList([lambda ids, scores: scores.fill_(float("-inf"))])
    else:
        pixels[1, 0, 3, 3] = float("nan" if fault == "pixels" else "inf")
    with pytest.raises(ValueError, match="scores of the last step are not finite. `pixel_values` or weights may hold"):
        captioner.generate(pixels, **call)
    if fault != "processor":
        for model in (classifier, mask_classifier):
            with pytest.raises(ValueError, match="scores of the last step are not finite"):
                model(pixels)


def test_a_given_token_that_is_forbidden_is_no_fault(make_captioner: MakeModel) -> None:
    sequences = make_captioner().generate(images(1), input_ids=torch.tensor([[5]]), bad_words_ids=[[5]])
    assert sequences[0, 0] == 5 and not (sequences[0, 1:] == 5).any()


# ---- Logits processors


class OneWordForEachRow(LogitsProcessor):
    """A constraint of its own for each row of the batch: row i has the words 5 + i alone."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(tuple(input_ids.shape))
        assert (input_ids[:, 0] == PAD).all()
        kept = scores[torch.arange(len(scores)), 5 + torch.arange(len(scores))]
        return torch.full_like(scores, -30.0).scatter(1, 5 + torch.arange(len(scores))[:, None], kept[:, None])


@pytest.mark.parametrize("corruption", ["gaussian", "mask"])
def test_processors_see_the_whole_batch_at_every_call(make_captioner: MakeModel, corruption: str) -> None:
    """With `stability_threshold` rows left, and a row's constraint hit another row."""
    model, processor = make_captioner(corruption=corruption), OneWordForEachRow()
    call = {"num_inference_steps": 12, "stability_threshold": 1, "return_dict_in_generate": True}
    outputs = model.generate(images(6), logits_processor=[processor], **call)
    assert outputs.sequences.tolist() == [[5 + row] * 8 for row in range(6)]
    steps = int(outputs.num_steps.max())
    assert processor.seen == [(6, place + 1) for place in range(8)] * steps  # steps * N calls


class NothingChanges(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + 0 * input_ids[:, -1:]


@pytest.mark.parametrize("corruption", ["gaussian", "mask"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_rows_that_stay_for_a_processor_have_stopped_all_the_same(
    make_captioner: MakeModel, corruption: str, do_sample: bool
) -> None:
    model = make_captioner(corruption=corruption)
    call = {"num_inference_steps": 12, "stability_threshold": 1, "return_dict_in_generate": True}
    call |= {"output_trajectory": True, "do_sample": do_sample, "guidance_scale": 1.5, "num_return_sequences": 2}
    expected = model.generate(images(6), **call)
    outputs = model.generate(images(6), logits_processor=LogitsProcessorList([NothingChanges()]), **call)
    assert do_sample or len(set(expected.num_steps.tolist())) > 1
    for name in ("sequences", "num_steps"):
        assert torch.equal(outputs[name], expected[name]), name
    assert torch.equal(outputs.trajectory.tokens, expected.trajectory.tokens)


# ---- Training and evaluation


@pytest.mark.parametrize("kind", ["classifier", "mask classifier", "captioner", "mask captioner"])
def test_training_without_labels_is_refused(models: dict[str, nn.Module], kind: str) -> None:
    model = models[kind].train()
    with pytest.raises(ValueError, match="needs `labels` in training mode: .*`label_smoothing_factor`"):
        model(images(2))
    with torch.no_grad():
        assert model(images(2)).logits.isfinite().all()
    assert model.eval()(images(2)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("training", "labelled", "given"),
    [
        (True, True, {"num_inference_steps": 2}),
        (True, True, {"output_trajectory": True}),
        (False, False, {"timesteps": torch.ones(2, 3, dtype=torch.long)}),
        (False, True, {"noise": torch.zeros(2, 3, 1, 5)}),
    ],
)
def test_arguments_of_the_other_mode_are_refused(
    models: dict[str, nn.Module], training: bool, labelled: bool, given: dict[str, Any]
) -> None:
    labels = torch.tensor([0, 3]) if labelled else None
    with pytest.raises(ValueError, match=f"`{next(iter(given))}` would have no effect"):
        models["classifier"].train(training)(images(2), labels, **given)
    with pytest.raises(ValueError, match="`tokens` would have no effect"):
        models["captioner"](images(2), torch.full((2, 4), 3), tokens=torch.full((2, 8), 3))


def rows_of_captions() -> list[dict[str, Tensor]]:
    return [{"pixel_values": images(4)[row], "labels": torch.tensor([5 + row, EOS, PAD])} for row in range(4)]


ARGUMENTS = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 1, "save_strategy": "no"}


def test_plain_trainer_with_label_smoothing_is_refused(make_captioner: MakeModel, tmp_path: Path) -> None:
    """It takes the labels out of the batch, and optimised the wrong thing."""
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, **ARGUMENTS)
    with pytest.raises(ValueError, match="needs `labels` in training mode"):
        Trainer(make_captioner(), arguments, train_dataset=rows_of_captions()).train()


@pytest.mark.parametrize("config", [None, GenerationConfig(max_new_tokens=3), TDDGenerationConfig(seed=3)], ids=str)
def test_seq2seq_trainer_predicts_with_generate(
    make_captioner: MakeModel, tmp_path: Path, config: GenerationConfig | None
) -> None:
    """It passes `labels`, `synced_gpus` and `num_beams`, fills in Transformers' defaults, and reads `max_length`."""
    model = make_captioner()
    seen = {}

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen["predictions"] = prediction.predictions
        return {"right": 1.0}

    arguments = Seq2SeqTrainingArguments(
        tmp_path, predict_with_generate=True, generation_config=config, generation_num_beams=1, **ARGUMENTS
    )
    trainer = Seq2SeqTrainer(
        model,
        arguments,
        train_dataset=rows_of_captions(),
        eval_dataset=rows_of_captions(),
        compute_metrics=compute_metrics,
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_right"] == 1.0 and metrics["eval_loss"] > 0
    expected = model.eval().generate(images(4))
    assert np.array_equal(seen["predictions"][:, : expected.shape[1]], expected.numpy())
    assert seen["predictions"].shape == (4, 8) and (seen["predictions"][:, expected.shape[1] :] == PAD).all()
    trainer.save_model(tmp_path)
    assert torch.equal(TDDForCaptioning.from_pretrained(tmp_path).generate(images(4)), expected)


def make_tokenizer(size: int, **special_tokens: str) -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *map(str, range(size - 3))])}
    tokens = {"pad_token": "[PAD]", "eos_token": "[EOS]", "unk_token": "[UNK]", **special_tokens}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")), **tokens)


def test_a_tokenizer_of_another_model_is_refused(make_captioner: MakeModel) -> None:
    model = make_captioner()
    model.check_tokenizer(make_tokenizer(20))
    model.check_tokenizer(make_tokenizer(17))  # a vocabulary may be padded
    with pytest.raises(ValueError, match="tokenizer has 21 tokens, and the model's `vocab_size` is 20"):
        model.check_tokenizer(make_tokenizer(21))
    with pytest.raises(ValueError, match="tokenizer's `eos_token_id` is 3, and the model's is 2"):
        model.check_tokenizer(make_tokenizer(20, eos_token="0"))
