# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""What users of Transformers expect of any model, beyond tests/test_modeling.py and tests/test_captioning.py.

Feed-forward chunking does not apply: it saves memory on long sequences, and here at most a caption's tokens and an
image's are denoised; Transformers 5 has no such setting for its vision models either.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, infer_auto_device_map
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modeling_tdd import TDDForCaptioning, TDDForImageClassification
from modeling_tdd.diffusion_tdd import NoiseSchedule


MakeModel = Callable[..., nn.Module]


@pytest.fixture
def captions() -> Tensor:
    """Captions of `pixel_values`: 20 tokens, of which 0 pads and 2 ends."""
    return torch.tensor(
        [[5, 6, 7, 2, 0, 0, 0, 0], [8, 9, 2, 0, 0, 0, 0, 0], [3, 4, 5, 6, 7, 8, 9, 2], [11, 2] + [0] * 6]
    )


@pytest.fixture(params=["classifier", "captioner", "mask captioner", "tied captioner"])
def model(request: pytest.FixtureRequest, make_model: MakeModel, make_captioner: MakeModel) -> nn.Module:
    """Every kind of model that has a denoiser."""
    if request.param == "classifier":
        return make_model(condition_dropout=0.0)
    fields = {"mask captioner": {"corruption": "mask"}, "tied captioner": {"tie_word_embeddings": True}}
    return make_captioner(condition_dropout=0.0, **fields.get(request.param, {}))


@torch.no_grad()
def first_logits(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Of the classes, or of the tokens at the first denoising step."""
    return model(pixel_values).logits


def training_loss(model: nn.Module, pixel_values: Tensor, labels: Tensor, captions: Tensor) -> Tensor:
    """Of the same timesteps and noise at each call."""
    torch.manual_seed(0)
    return model(pixel_values, labels=captions if isinstance(model, TDDForCaptioning) else labels).loss


# ---- Weights


def test_weights_that_a_checkpoint_lacks_are_drawn_as_in_a_new_model(model: nn.Module, tmp_path: Path) -> None:
    """They are made on the meta device: what `_init_weights` forgot would be whatever memory held."""
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    kept = "model.encoder.layernorm.bias"
    save_file({kept: load_file(path)[kept]}, path, {"format": "pt"})
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] | {"lm_head.weight", kept} >= model.state_dict().keys()
    for name, parameter in loaded.named_parameters():
        spread, expected = parameter.std(correction=0), model.get_parameter(name).std(correction=0)
        torch.testing.assert_close(spread, expected, rtol=0.5, atol=1e-6, msg=name)
        torch.testing.assert_close(parameter.mean(), model.get_parameter(name).mean(), rtol=0, atol=0.2, msg=name)


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_captioners_round_trip_is_bit_equal(
    make_captioner: MakeModel, pixel_values: Tensor, tmp_path: Path, max_shard_size: str
) -> None:
    model = make_captioner(tie_word_embeddings=True)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "20KB")
    loaded, info = TDDForCaptioning.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.lm_head.weight is loaded.model.denoiser.token_embedding.weight
    assert torch.equal(first_logits(loaded, pixel_values), first_logits(model, pixel_values))


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, torch.float32], ids=str)
def test_dtype_of_a_loaded_model(model: nn.Module, pixel_values: Tensor, tmp_path: Path, dtype: Any) -> None:
    model.bfloat16().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    expected = torch.bfloat16 if dtype == "auto" else dtype
    assert loaded.dtype == loaded.config.dtype == expected
    assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
    assert loaded.model.denoiser.schedule_on(loaded.device).alpha_bar.dtype == torch.float32
    logits = first_logits(loaded, pixel_values.to(expected))
    torch.testing.assert_close(logits.float(), first_logits(model.float(), pixel_values), atol=0.1, rtol=0.1)


# ---- Devices


def test_device_map(model: nn.Module, pixel_values: Tensor, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    for device_map in ("auto", "cpu", {"": "cpu"}):
        loaded = type(model).from_pretrained(tmp_path, device_map=device_map)
        assert loaded.device.type == "cpu"
        assert torch.equal(first_logits(loaded, pixel_values), first_logits(model, pixel_values))


def offload(model: nn.Module, part: str) -> dict[str, str]:
    """A device map with one part of the base model on disc."""
    parts = [name for name, _ in model.named_children() if name != "model"]
    parts += [f"model.{name}" for name, _ in model.model.named_children()]
    on_disc = {f"model.{part}"}
    if model.config.tie_word_embeddings and part == "denoiser":
        on_disc.add("lm_head")  # a tied weight lies in one place
    return {name: "disk" if name in on_disc else "cpu" for name in parts}


@torch.no_grad()
def answer(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Of the whole loop, guided, so that the null condition is read too: logits, or captions with their
    log-probabilities."""
    if not isinstance(model, TDDForCaptioning):
        return model(pixel_values, guidance_scale=2.0).logits
    outputs = model.generate(pixel_values, guidance_scale=2.0, return_dict_in_generate=True)
    return torch.stack([outputs.sequences.float(), outputs.log_probs])


@pytest.mark.parametrize("part", ["encoder", "denoiser"])
def test_a_part_on_disc(model: nn.Module, pixel_values: Tensor, tmp_path: Path, part: str) -> None:
    model.save_pretrained(tmp_path)
    device_map = offload(model, part)
    loaded = type(model).from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")
    assert getattr(loaded.model, part).layers[0].mlp.fc1.weight.device.type == "meta"
    # Not bit for bit: products differ in their last bit with the alignment of the weights in memory
    torch.testing.assert_close(answer(loaded, pixel_values), answer(model, pixel_values), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("offload_all", [cpu_offload, disk_offload])
def test_a_model_whose_every_weight_is_elsewhere(
    model: nn.Module, pixel_values: Tensor, tmp_path: Path, offload_all: Callable[..., nn.Module]
) -> None:
    """Accelerate brings the weights of a module to the device while its forward runs, and takes them away again."""
    expected = answer(model, pixel_values)
    folder = {"offload_dir": tmp_path} if offload_all is disk_offload else {}
    offloaded = offload_all(copy.deepcopy(model), execution_device=torch.device("cpu"), **folder)
    assert {parameter.device.type for parameter in offloaded.parameters()} == {"meta"}
    torch.testing.assert_close(answer(offloaded, pixel_values), expected, rtol=1e-4, atol=1e-4)


def keep_weights_for_forward_alone(denoiser: nn.Module) -> None:
    """As FSDP and offloading do: outside of the denoiser's forward its parameters have no values."""
    places = [(module, name) for module in denoiser.modules() for name in module._parameters]
    weights = [module._parameters[name] for module, name in places]

    def take_away(*_: Any) -> None:
        for (module, name), weight in zip(places, weights):
            module._parameters[name] = None if weight is None else nn.Parameter(weight.detach().to("meta"))

    def bring_back(*_: Any) -> None:
        for (module, name), weight in zip(places, weights):
            module._parameters[name] = weight

    denoiser.register_forward_pre_hook(bring_back)
    denoiser.register_forward_hook(take_away)
    take_away()


def test_the_denoisers_forward_alone_reads_its_weights(
    model: nn.Module, pixel_values: Tensor, labels: Tensor, captions: Tensor
) -> None:
    expected, expected_first = answer(model, pixel_values), first_logits(model, pixel_values)
    model.config.condition_dropout = 0.5  # the null condition is read in training too
    expected_loss = training_loss(model.train(), pixel_values, labels, captions)
    expected_loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    parameters = dict(model.named_parameters())
    model.zero_grad()
    keep_weights_for_forward_alone(model.model.denoiser)
    with pytest.raises((NotImplementedError, RuntimeError)):  # there are none to be read
        model.model.denoiser.token_embedding.weight.sum().item()
    loss = training_loss(model, pixel_values, labels, captions)
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=0)
    loss.backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=0, msg=name)
    model.eval()
    assert torch.equal(answer(model, pixel_values), expected)
    assert torch.equal(first_logits(model, pixel_values), expected_first)


def test_a_denoiser_is_not_split(model: nn.Module) -> None:
    """Between devices: every step would carry its state across."""
    size = sum(parameter.nbytes for parameter in model.model.denoiser.parameters())
    device_map = infer_auto_device_map(
        model, {0: size // 2, 1: 2 * size, "cpu": 100 * size}, no_split_module_classes=list(model._no_split_modules)
    )
    parts = {name: device for name, device in device_map.items() if name.startswith("model.denoiser")}
    assert list(parts) in (["model.denoiser"], [])


# ---- Training


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_trains_all_that_trains_without(
    model: nn.Module, pixel_values: Tensor, labels: Tensor, captions: Tensor, use_reentrant: bool
) -> None:
    checkpointed = copy.deepcopy(model)
    checkpointed.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    for each in (model, checkpointed):
        training_loss(each.train(), pixel_values, labels, captions).backward()
    for name, parameter in model.named_parameters():
        gradient = checkpointed.get_parameter(name).grad
        torch.testing.assert_close(gradient, parameter.grad, msg=lambda text, name=name: f"{name}: {text}")
    assert checkpointed.model.encoder.layers[0].mlp.fc1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("frozen", ["encoder", "connector", "denoiser"])
def test_training_with_a_frozen_part(
    model: nn.Module, pixel_values: Tensor, labels: Tensor, captions: Tensor, frozen: str
) -> None:
    getattr(model.model, frozen).requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    training_loss(model, pixel_values, labels, captions).backward()
    optimizer.step()
    for part in ("encoder", "connector", "denoiser"):
        names = [name for name, _ in getattr(model.model, part).named_parameters(prefix=f"model.{part}")]
        changed = [name for name in names if not torch.equal(model.get_parameter(name), before[name])]
        assert bool(changed) == (part != frozen)


# ---- Attention and hidden states


@torch.no_grad()
def test_attention_is_chosen_for_encoder_and_denoiser_apart(
    model: nn.Module, pixel_values: Tensor, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    expected = first_logits(model, pixel_values)
    for own, encoders in (("eager", "sdpa"), ("sdpa", "eager")):
        loaded = type(model).from_pretrained(tmp_path, attn_implementation={"": own, "vision_config": encoders})
        assert loaded.model.denoiser.layers[0].attention.config._attn_implementation == own
        assert loaded.model.encoder.config._attn_implementation == encoders
        torch.testing.assert_close(first_logits(loaded, pixel_values), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_hidden_states_and_attentions_of_the_encoder(model: nn.Module, pixel_values: Tensor) -> None:
    model.set_attn_implementation("eager")
    outputs = model.model.get_image_features(pixel_values, output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(4, 17, 32)] * 3
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(4, 2, 17, 17)] * 2
    prefix_length = 1 if model.config.pooling else 17
    assert outputs.last_hidden_state.shape == (4, 17, 32) and outputs.pooler_output.shape == (4, prefix_length, 32)
    assert torch.equal(outputs.pooler_output, outputs.last_hidden_state[:, :prefix_length])
    plain = model.model.get_image_features(pixel_values)
    assert plain.hidden_states is None and plain.attentions is None


# ---- Vocabulary and problem type


@pytest.mark.parametrize("corruption", ["gaussian", "mask"])
@pytest.mark.parametrize("tied", [False, True])
def test_resized_vocabulary(
    make_captioner: MakeModel, pixel_values: Tensor, captions: Tensor, tmp_path: Path, corruption: str, tied: bool
) -> None:
    model = make_captioner(corruption=corruption, tie_word_embeddings=tied)
    old = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    embedding = model.resize_token_embeddings(26, mean_resizing=False)
    assert model.config.vocab_size == embedding.num_embeddings == 26
    assert model.lm_head.weight.shape == (26, 32) and model.lm_head.bias.shape == (26,)
    assert (model.lm_head.weight is embedding.weight) == tied
    assert torch.equal(embedding.weight[:20], old["model.denoiser.token_embedding.weight"])
    assert torch.equal(model.lm_head.bias[:20], old["lm_head.bias"])
    assert model.model.denoiser.token_embedding.weight.shape == (26, 32)
    # A schedule may depend on the number of categories
    assert torch.equal(
        model.model.denoiser.schedule_on(torch.device("cpu")).alpha_bar,
        NoiseSchedule.from_config(model.config).alpha_bar,
    )
    captions[0, 0] = 25
    assert training_loss(model.train(), pixel_values, captions, captions).isfinite()
    model.eval().save_pretrained(tmp_path)
    loaded = TDDForCaptioning.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(pixel_values), model.generate(pixel_values))


def test_a_classifiers_vocabulary_is_its_labels(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="tokens of a classifier are its labels"):
        model.resize_token_embeddings(9)
    model.save_pretrained(tmp_path)
    loaded = TDDForImageClassification.from_pretrained(tmp_path, num_labels=9, ignore_mismatched_sizes=True)
    assert loaded.classifier.out_features == loaded.model.denoiser.token_embedding.num_embeddings == 9


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_other_problems_than_one_label_are_refused(make_model: MakeModel, problem_type: str) -> None:
    with pytest.raises(ValueError, match="`problem_type` must be one of None, 'single_label"):
        make_model(problem_type=problem_type)
    assert make_model(problem_type="single_label_classification").num_labels == 5
