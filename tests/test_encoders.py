# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Every kind of image encoder: one step of training, saving and loading, special tokens, unread weights, refusals."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, TimmWrapperConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

from modeling_tdd import TDDConfig, TDDForImageClassification, TDDModel
from modeling_tdd.encoder_tdd import RemovedModule, _measure_on, build_encoder, flatten_patches, measure_encoder


MakeConfig = Callable[..., TDDConfig]
MakeModel = Callable[..., Any]

PROBE = Path(__file__).parent / "encoder_ddp_probe.py"
IMAGE = {"image_size": 32, "patch_size": 8}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VIT = {**IMAGE, **SIZES}
WIDE = {"initializer_range": 0.2}  # for deep ones, which otherwise make nearly the same of all images
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
MIX = {"hidden_sizes": [8, 8, 16, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
TIMM_VIT = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}


class Encoder(NamedTuple):
    """A tiny encoder: the name of its configuration's class and its fields, its number of special tokens, the shape of
    its tokens for two images of `image_size`, and the modules that are removed."""

    config: str
    fields: dict[str, Any]
    num_special_tokens: int
    num_tokens: int
    hidden_size: int
    removed: tuple[str, ...] = ()
    image_size: int = 32

    def make(self) -> PreTrainedConfig:
        return getattr(transformers, self.config)(**self.fields)


def timm(architecture: str, *args: Any, **model_args: Any) -> Encoder:
    return Encoder("TimmWrapperConfig", {"architecture": architecture, "model_args": model_args}, *args)


ENCODERS = {
    "vit": Encoder("ViTConfig", VIT, 1, 17, 32, ("pooler",)),
    "deit-distilled": Encoder("DeiTConfig", VIT, 2, 18, 32, ("pooler",)),
    "dinov2": Encoder("Dinov2Config", VIT, 1, 17, 32),
    "dinov2-registers": Encoder("Dinov2WithRegistersConfig", {**VIT, "num_register_tokens": 3}, 4, 20, 32),
    "dinov3-vit": Encoder("DINOv3ViTConfig", {**VIT, "num_register_tokens": 2}, 3, 19, 32),
    "dinov3-convnext": Encoder("DINOv3ConvNextConfig", STAGES, 1, 5, 32, (), 64),
    "clip": Encoder("CLIPVisionConfig", VIT, 1, 17, 32, ("post_layernorm",)),
    "siglip": Encoder("SiglipVisionConfig", VIT, 0, 16, 32, ("head",)),
    "siglip2": Encoder("Siglip2VisionConfig", {**SIZES, "num_patches": 16, "patch_size": 8}, 0, 16, 32, ("head",)),
    "aimv2": Encoder("Aimv2VisionConfig", VIT, 0, 16, 32, ("head",)),
    "swin": Encoder("SwinConfig", SWIN, 0, 16, 16),
    "swinv2": Encoder("Swinv2Config", SWIN, 0, 16, 16),
    "beit": Encoder("BeitConfig", VIT, 1, 17, 32, ("pooler",)),
    "vit-msn": Encoder("ViTMSNConfig", VIT, 1, 17, 32),
    "yolos": Encoder(
        "YolosConfig", {**VIT, "image_size": [32, 32], "num_detection_tokens": 5}, 6, 22, 32, ("pooler",)
    ),
    "convnext": Encoder("ConvNextConfig", STAGES, 0, 4, 32, ("layernorm",), 64),
    "convnextv2": Encoder("ConvNextV2Config", STAGES, 0, 4, 32, ("layernorm",), 64),
    "resnet": Encoder("ResNetConfig", {**STAGES, "embedding_size": 8, "layer_type": "basic"}, 0, 4, 32, (), 64),
    "regnet": Encoder("RegNetConfig", {**STAGES, "embedding_size": 8, "groups_width": 4}, 0, 4, 32, (), 64),
    "efficientnet": Encoder(
        "EfficientNetConfig",
        {**WIDE, "width_coefficient": 0.25, "depth_coefficient": 0.1, "image_size": 64, "hidden_dim": 320},
        *(0, 4, 320, (), 64),
    ),
    "mobilenetv2": Encoder("MobileNetV2Config", {"depth_multiplier": 0.1, "image_size": 64}, 0, 4, 1280, (), 64),
    "mobilevit": Encoder(
        "MobileViTConfig",
        {
            **WIDE,
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 8, 16, 16, 16, 24],
            "num_attention_heads": 2,
        },
        *(0, 4, 24, (), 64),
    ),
    "segformer": Encoder("SegformerConfig", MIX, 0, 4, 32, (), 64),
    "pvtv2": Encoder("PvtV2Config", {**MIX, "image_size": 64}, 0, 4, 32, (), 64),
    "focalnet": Encoder(
        "FocalNetConfig",
        {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3]},
        *(0, 16, 16),
    ),
    "levit": Encoder(
        "LevitConfig",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [1, 1, 1],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        *(0, 1, 32, (), 64),
    ),
    "poolformer": Encoder("PoolFormerConfig", STAGES, 0, 4, 32, (), 64),
    "timm-vit": timm("vit_tiny_patch16_224", 1, 5, 32, **TIMM_VIT),
    "timm-deit-distilled": timm("deit_tiny_distilled_patch16_224", 2, 6, 32, **TIMM_VIT),
    "timm-siglip": timm("vit_base_patch16_siglip_224", 0, 4, 32, ("timm_model.attn_pool",), **TIMM_VIT),
    "timm-cait": timm("cait_xxs24_224", 1, 5, 32, **TIMM_VIT, init_values=1.0),
    "timm-resnet": timm("test_resnet", 0, 4, 96, (), 64),
    "timm-convnext": timm("test_convnext", 0, 4, 64, ("timm_model.head",), 64),
    "timm-efficientnet": timm("test_efficientnet", 0, 4, 256, (), 64),
    "timm-mobilenetv3": timm("mobilenetv3_small_050", 0, 4, 288, ("timm_model.conv_head",), 64),
    "timm-swin": timm(
        *("swin_tiny_patch4_window7_224", 0, 16, 16),
        **{"img_size": 32, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4},
    ),
}


@pytest.fixture(params=ENCODERS)
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return ENCODERS[request.param]


def images_for(encoder: Encoder, batch_size: int = 4) -> Tensor:
    size = encoder.image_size
    return torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(1))


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# ---- Training, saving and loading


def train_save_and_reload(model: PreTrainedModel, images: Tensor, labels: Tensor, folder: Path) -> None:
    """One step of training; what is saved and loaded again has the same weights, outputs and gradients."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0  # else one step leaves the initial statistics, with which all images look alike
    outputs = model(images, labels=labels)
    assert outputs.loss.isfinite()
    outputs.loss.backward()
    without = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    assert without == []
    before = {name: parameter.detach().clone() for name, parameter in model.model.encoder.named_parameters()}
    torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3).step()
    assert any(not weight.equal(before[name]) for name, weight in model.model.encoder.named_parameters())

    model.eval().save_pretrained(folder)
    again = type(model).from_pretrained(folder)
    assert trainable(again) == trainable(model)
    weights = again.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(weight.equal(weights[name]) for name, weight in model.state_dict().items())
    with torch.no_grad():
        expected = model(images).logits
        # Weights lie elsewhere in memory, so that a convolution may sum in another order
        torch.testing.assert_close(again(images).logits, expected, atol=1e-5, rtol=1e-5)
        assert expected.std(dim=0).max() > 1e-3  # the images have outputs of their own


def test_a_classifier_learns_and_is_loaded_again(
    make_model: MakeModel, encoder: Encoder, labels: Tensor, tmp_path: Path
) -> None:
    pooling = "cls" if encoder.num_special_tokens else "mean"
    model = make_model(vision_config=encoder.make(), pooling=pooling, num_inference_steps=2)
    train_save_and_reload(model, images_for(encoder), labels, tmp_path)


def test_a_captioner_learns_and_is_loaded_again(make_captioner: MakeModel, encoder: Encoder, tmp_path: Path) -> None:
    captions = torch.tensor([[5, 6, 7, 2, 0, 0, 0, 0], [8, 2, 0, 0, 0, 0, 0, 0]]).repeat(2, 1)
    train_save_and_reload(make_captioner(vision_config=encoder.make()), images_for(encoder), captions, tmp_path)


# ---- Tokens and pooling


def reference_of(model: TDDModel, encoder: Encoder) -> nn.Module:
    """The encoder as Transformers makes it, with the model's weights. The parts that `model` is without are random."""
    reference = AutoModel.from_config(encoder.make()).eval()
    missing, unexpected = reference.load_state_dict(model.encoder.state_dict(), strict=False)
    assert all(name.startswith(encoder.removed) for name in missing) and not unexpected
    for name in missing:
        reference.get_parameter(name).data.fill_(float("nan"))  # it shows if anything reads them
    return reference


def reference_tokens(reference: nn.Module, encoder: Encoder, images: Tensor) -> Tensor:
    """The encoder's tokens, maps flattened row by row, as they were before this project had any code for encoders."""
    if encoder.config == "Siglip2VisionConfig":
        patches = torch.stack([convert_image_to_patches(image, 8) for image in images])
        mask, shapes = torch.ones(patches.shape[:2]), torch.full((len(images), 2), encoder.image_size // 8)
        return reference(patches, mask, shapes).last_hidden_state
    hidden_states = reference(images).last_hidden_state
    if hidden_states.ndim == 3:
        return hidden_states
    is_swin = encoder.fields.get("architecture", "").startswith("swin")  # the one of ours with channels last
    return hidden_states.flatten(1, 2) if is_swin else hidden_states.flatten(2).transpose(1, 2)


@torch.no_grad()
def test_tokens_and_their_mean_are_the_encoders(make_config: MakeConfig, encoder: Encoder) -> None:
    model = TDDModel(make_config(vision_config=encoder.make(), pooling="mean")).eval()
    layout = model.encoder_layout
    assert layout.num_leading_tokens + layout.num_trailing_tokens == encoder.num_special_tokens
    assert model.encoder_hidden_size == encoder.hidden_size
    images = images_for(encoder, 2)
    outputs = model.get_image_features(images)
    assert outputs.last_hidden_state.shape == (2, encoder.num_tokens, encoder.hidden_size)
    expected = reference_tokens(reference_of(model, encoder), encoder, images)
    torch.testing.assert_close(outputs.last_hidden_state, expected)
    first, last = (1, 17) if encoder.config == "YolosConfig" else (encoder.num_special_tokens, None)
    torch.testing.assert_close(outputs.pooler_output, expected[:, first:last].mean(1, keepdim=True))


@torch.no_grad()
def test_class_tokens_are_in_front(make_config: MakeConfig, encoder: Encoder) -> None:
    if encoder.num_special_tokens == 0:
        with pytest.raises(ValueError, match="needs an encoder with a class token.* Use `pooling='mean'`, or `None`"):
            TDDModel(make_config(vision_config=encoder.make(), pooling="cls"))
        return
    model = TDDModel(make_config(vision_config=encoder.make(), pooling="cls")).eval()
    images = images_for(encoder, 2)
    expected = reference_tokens(reference_of(model, encoder), encoder, images)[:, :1]
    torch.testing.assert_close(model.get_image_features(images).pooler_output, expected)


def test_special_tokens_are_counted_where_they_outnumber_the_patches() -> None:
    """Five tokens with a grid of 2 x 2 would be nine, a grid of 3 x 3: only the first convolution tells."""
    config = transformers.Dinov2WithRegistersConfig(**{**VIT, "image_size": 16}, num_register_tokens=4)
    assert measure_encoder(config).layout.num_leading_tokens == 5
    config = transformers.Dinov2WithRegistersConfig(**{**VIT, "image_size": 24}, num_register_tokens=40)
    assert measure_encoder(config).layout.num_leading_tokens == 41


def test_an_image_need_not_be_square(make_config: MakeConfig) -> None:
    config = transformers.YolosConfig(**{**VIT, "image_size": [16, 48]}, num_detection_tokens=3)
    model = TDDModel(make_config(vision_config=config, pooling="mean")).eval()
    assert (model.encoder_layout.num_leading_tokens, model.encoder_layout.num_trailing_tokens) == (1, 3)
    outputs = model.get_image_features(torch.randn(2, 3, 16, 48))
    torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state[:, 1:-3].mean(1, keepdim=True))


def test_a_map_of_a_fixed_size_that_no_convolution_has() -> None:
    """Gemma 3n resizes its maps to 16 x 16, which is no halving of the 112 x 112 that it starts with."""
    layout = measure_encoder(transformers.Gemma3nVisionConfig()).layout
    assert (layout.hidden_size, layout.is_channels_last) == (2048, False)
    assert layout.num_leading_tokens == layout.num_trailing_tokens == 0


class MapConfig(PreTrainedConfig):
    """Of [`MapEncoder`]."""

    model_type = "tdd_test_map"
    is_channels_last: bool = False
    needs_values: bool = False
    channels: int = 4


class MapEncoder(PreTrainedModel):
    """A convolution whose map has four channels, with images of 16 pixels also four rows and four columns."""

    config_class = MapConfig

    def __init__(self, config: MapConfig):
        super().__init__(config)
        self.convolution = nn.Conv2d(3, config.channels, kernel_size=4, stride=4)
        self.unused = nn.Linear(3, 3)
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        hidden_states = self.convolution(pixel_values)
        if self.config.needs_values:
            hidden_states = hidden_states * (1 if hidden_states.abs().max().item() >= 0 else 0)
        if self.config.is_channels_last:
            hidden_states = hidden_states.permute(0, 2, 3, 1)
        return BaseModelOutput(last_hidden_state=hidden_states)


AutoConfig.register(MapConfig.model_type, MapConfig)
AutoModel.register(MapConfig, MapEncoder)


@pytest.mark.parametrize("is_channels_last", [False, True])
@pytest.mark.parametrize("needs_values", [False, True])
def test_a_map_with_as_many_channels_as_rows(
    make_config: MakeConfig, pixel_values: Tensor, is_channels_last: bool, needs_values: bool
) -> None:
    """An encoder whose forward pass reads a value cannot run on the meta device."""
    config = MapConfig(is_channels_last=is_channels_last, needs_values=needs_values, image_size=16)
    torch.manual_seed(0)
    AutoModel.from_config(config)
    expected_draw = torch.rand(1)
    torch.manual_seed(0)
    encoder, layout = build_encoder(config, None)
    assert torch.equal(torch.rand(1), expected_draw)  # measuring draws no random numbers
    assert layout.is_channels_last == is_channels_last and layout.hidden_size == 4
    assert isinstance(encoder.unused, RemovedModule) or encoder.unused is None
    model = TDDModel(make_config(vision_config=config, pooling=None)).eval()
    feature_map = model.encoder.convolution(pixel_values)
    tokens = model.get_image_features(pixel_values).last_hidden_state
    torch.testing.assert_close(tokens, feature_map.flatten(2).transpose(1, 2))


# ---- Unread weights


def test_what_nothing_reads_is_not_saved(encoder: Encoder) -> None:
    built, _ = build_encoder(encoder.make(), "mean")
    removed = measure_encoder(encoder.make()).removed
    assert set(removed) == set(encoder.removed)
    assert not any(name.startswith(tuple(f"{part}." for part in removed)) for name in built.state_dict())
    whole = {name for name, _ in AutoModel.from_config(encoder.make()).named_parameters()}
    kept = {name for name, _ in built.named_parameters()}
    assert whole - kept == {name for name in whole if name.startswith(tuple(f"{part}." for part in removed))}


def test_a_pooler_becomes_none() -> None:
    assert build_encoder(ENCODERS["vit"].make(), "cls")[0].pooler is None


def test_unread_weights_need_no_gradient(make_config: MakeConfig, encoder: Encoder) -> None:
    model = TDDModel(make_config(vision_config=encoder.make(), pooling="mean"))
    frozen = {name for name, weight in model.encoder.named_parameters() if not weight.requires_grad}
    assert all(name.endswith("mask_token") for name in frozen)
    assert bool(frozen) == (encoder.config.lower().startswith("dino") and "convnext" not in encoder.config.lower())


def test_no_encoder_needs_a_real_copy(encoder: Encoder) -> None:
    """The meta device is enough for all of them."""
    assert _measure_on("meta", encoder.make()) == measure_encoder(encoder.make())


def test_building_does_not_change_the_configuration() -> None:
    config = ENCODERS["siglip"].make()
    before = config.to_dict()
    build_encoder(config, "mean")
    assert config.to_dict() == before


def test_a_frozen_encoder_has_no_gradients(make_model: MakeModel, labels: Tensor, tmp_path: Path) -> None:
    make_model(vision_config=ENCODERS["clip"].make(), freeze_encoder=True).save_pretrained(tmp_path)
    model = TDDForImageClassification.from_pretrained(tmp_path).train()
    model(images_for(ENCODERS["clip"]), labels).loss.backward()
    assert not any(weight.requires_grad for weight in model.model.encoder.parameters())
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


def test_hidden_states_and_attentions_pass_through(make_config: MakeConfig) -> None:
    encoder = ENCODERS["clip"]
    config = make_config(vision_config=encoder.make(), attn_implementation="eager")
    outputs = TDDModel(config).get_image_features(
        images_for(encoder, 2), output_hidden_states=True, output_attentions=True
    )
    assert [states.shape for states in outputs.hidden_states] == [(2, 17, 32)] * 3
    assert [weights.shape for weights in outputs.attentions] == [(2, 2, 17, 17)] * 2


def test_two_processes_train_with_clip_and_need_not_look_for_unused_parameters() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(PROBE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"rank {rank}: 3 steps, equal weights" in done.stdout for rank in range(2))


# ---- Flattened patches


def test_flattened_patches_are_those_of_siglip2s_image_processor() -> None:
    images = torch.randn(2, 3, 16, 24)
    inputs = flatten_patches(images, 8)
    expected = torch.stack([convert_image_to_patches(image, 8) for image in images])
    assert torch.equal(inputs["pixel_values"], expected)
    assert inputs["pixel_attention_mask"] is None and inputs["spatial_shapes"].tolist() == [[2, 3], [2, 3]]
    with pytest.raises(ValueError, match="multiples of the encoder's patch size 8, got 16 x 20"):
        flatten_patches(torch.zeros(1, 3, 16, 20), 8)


# ---- Pretrained encoders


@pytest.mark.parametrize(
    ("config_class", "model_class", "name"),
    [("CLIPConfig", "CLIPModel", "clip"), ("Siglip2Config", "Siglip2Model", "siglip2")],
)
def test_the_vision_tower_of_two(config_class: str, model_class: str, name: str, tmp_path: Path) -> None:
    text_config = {**SIZES, "vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    config = getattr(transformers, config_class)(
        text_config=text_config, vision_config=ENCODERS[name].make().to_dict()
    )
    pretrained = getattr(transformers, model_class)(config).eval()
    pretrained.save_pretrained(tmp_path)
    model = TDDModel.from_encoder_pretrained(
        str(tmp_path), num_labels=3, hidden_size=32, num_attention_heads=2, num_hidden_layers=1, pooling="mean"
    ).eval()
    images = images_for(ENCODERS[name], 2)
    with torch.no_grad():
        expected = reference_tokens(pretrained.vision_model, ENCODERS[name], images)
        torch.testing.assert_close(model.get_image_features(images).last_hidden_state, expected)


# ---- Refusals


def test_a_masked_autoencoder_is_refused_and_its_weights_are_not(make_config: MakeConfig, tmp_path: Path) -> None:
    config = transformers.ViTMAEConfig(**VIT)
    with pytest.raises(ValueError, match="`vit_mae` draws random numbers in eval mode.*`ViTModel.from_pretrained`"):
        TDDModel(make_config(vision_config=config))
    masked = transformers.ViTMAEModel(config)
    masked.save_pretrained(tmp_path / "mae")
    transformers.ViTModel.from_pretrained(tmp_path / "mae").save_pretrained(tmp_path / "vit")
    model = TDDModel.from_encoder_pretrained(str(tmp_path / "vit"), hidden_size=32, num_attention_heads=2)
    weights = model.encoder.state_dict()
    assert weights["embeddings.cls_token"].equal(masked.state_dict()["embeddings.cls_token"])
    assert sum(any(a.equal(b) for b in weights.values()) for a in masked.state_dict().values()) == len(weights)


REFUSED = {
    "text model": ("BertConfig", {**SIZES, "vocab_size": 50}, "must be that of an image encoder.*`bert` failed with"),
    "two towers": ("CLIPConfig", {}, "must be that of an image encoder.*`clip` failed with"),
    "no model": ("BlipVisionConfig", VIT, "`AutoModel` has no model for .* a BlipVisionConfig"),
    "a backbone": ("HGNetV2Config", {}, "whose `last_hidden_state` has patch tokens.*`hgnet_v2` returns none"),
    "a detector": ("RfDetrConfig", {}, r"whose `last_hidden_state` has patch tokens.* the shape \(2, 300, 256\)"),
    "joined images": ("PixtralVisionConfig", {**VIT, "head_dim": 16}, r"returns the shape \(1, 32, 32\) for 2 images"),
    "video": ("VideoMAEConfig", {**VIT, "num_frames": 2}, "must be that of an image encoder.*`videomae` failed with"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_image_encoder_is_refused(name: str) -> None:
    config_class, fields, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        build_encoder(getattr(transformers, config_class)(**fields), "mean")


def test_images_of_another_number_of_channels(make_config: MakeConfig) -> None:
    for config in (
        transformers.ViTConfig(**VIT, num_channels=1),
        TimmWrapperConfig(architecture="test_resnet", model_args={"in_chans": 1}),
    ):
        model = TDDModel(make_config(vision_config=config, pooling="mean"))
        assert model.get_image_features(torch.zeros(2, 1, 32, 32)).pooler_output.shape[:2] == (2, 1)
        with pytest.raises(ValueError, match=r"shape \(batch_size, 1, height, width\), got \(2, 3, 32, 32\)"):
            model.get_image_features(torch.zeros(2, 3, 32, 32))


def test_an_encoder_is_measured_in_inference_mode_too() -> None:
    """Measuring takes gradients, whatever mode the model is made in."""
    config = AutoConfig.for_model(
        "vit", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    expected = _measure_on("meta", config)
    with torch.inference_mode():
        assert _measure_on("meta", config).layout == expected.layout
