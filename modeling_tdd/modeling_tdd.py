# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""TDD models: an image encoder, its prefix, a denoiser of noisy one-hot tokens, and the heads.

Data flows one way: pixel values -> encoder -> prefix -> denoiser <-> diffusion step -> tokens.
"""

import inspect
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_tdd import TDDConfig, check_steps
from .denoiser_tdd import TDDMLP, DenoiserCache, TDDDenoiser
from .diffusion_tdd import add_noise, one_hot
from .encoder_tdd import as_tokens, build_encoder, freeze_unread, pool_tokens, run_encoder
from .generation_tdd import TDDGenerationMixin
from .likelihood_tdd import TDDLikelihoodMixin
from .loss_tdd import diffusion_loss
from .samplers_tdd import (
    KnownTokens,
    NoisyTokens,
    RenoiseSampler,
    UniformSampler,
)
from .sampling_tdd import (
    DenoisingFunction,
    RandomNumbers,
    apply_guidance,
    clone_all,
    compile_denoising_step,
    denoise,
    denoising_step,
    guidance_scales,
)
from .settings_tdd import (
    check,
    check_given,
    check_names,
    check_scores,
    check_shape,
    check_value_range,
    refuse_given,
    shorten,
)


# Where a checkpoint's own code has the classes that importing this package registers, in Transformers' format.
AUTO_MAP = {
    "AutoConfig": "configuration_tdd.TDDConfig",
    "AutoModel": "modeling_tdd.TDDModel",
    "AutoModelForImageClassification": "modeling_tdd.TDDForImageClassification",
    "AutoModelForImageTextToText": "modeling_tdd.TDDForCaptioning",
}

# What `forward` takes besides its named arguments: what the models can return, and what Trainer passes
RECORDS = ("output_attentions", "output_hidden_states")
FORWARD_KWARGS = (*RECORDS, "return_dict", "num_items_in_batch")


@dataclass
class TDDModelOutput(ModelOutput):
    r"""
    Output of [`TDDModel`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, num_tokens, hidden_size)`):
            The denoiser's output for the noisy tokens.
        cache ([`DenoiserCache`], *optional*, with `use_cache=True`):
            The keys and values of the images' prefix. Pass it back in place of `pixel_values` to denoise again without
            encoding the images again.
        hidden_states (`tuple[torch.FloatTensor, ...]`, *optional*, with `output_hidden_states=True`):
            The noisy tokens before the denoiser's first layer and after each layer.
        attentions (`tuple[torch.FloatTensor, ...]`, *optional*, with `output_attentions=True`):
            Attention weights of the noisy tokens over prefix and noisy tokens, one tensor per denoiser layer, each
            of shape `(batch_size, num_attention_heads, num_tokens, prefix_length + num_tokens)`.
        encoder_last_hidden_state (`torch.FloatTensor`, *optional*, with `pixel_values`):
            The encoder's features: of shape `(batch_size, num_patches, encoder_hidden_size)`, or
            `(batch_size, 1, encoder_hidden_size)` where they are pooled.
    """

    last_hidden_state: Tensor | None = None
    cache: tuple | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None


@dataclass
class TDDImageClassifierOutput(ModelOutput):
    r"""
    Output of [`TDDForImageClassification`].

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, with `labels`):
            In training mode the weighted diffusion loss; in eval mode the cross-entropy of `logits`.
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`):
            In eval mode the logits of the last denoising step. In training mode their mean over the timesteps.
        trajectory (`torch.FloatTensor` of shape `(batch_size, num_inference_steps, num_labels)`, *optional*):
            With `output_trajectory=True`, the predicted probabilities at each denoising step (Fig. 6), float32.
        hidden_states, attentions:
            As in [`TDDModelOutput`], of the last denoising step; in training one row for each timestep of an image.
        loss_by_timestep (`torch.FloatTensor` of shape `(10, 2)`, *optional*, in training mode with `labels`):
            For each tenth of the timesteps the sum of the tokens' weighted losses and the sum of their weights.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    trajectory: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    loss_by_timestep: Tensor | None = None


@dataclass
class TDDCaptioningOutput(ModelOutput):
    r"""
    Output of [`TDDForCaptioning`].

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, with `labels`):
            The weighted diffusion loss.
        logits (`torch.FloatTensor` of shape `(batch_size, num_tokens, vocab_size)`):
            Logits of the clean tokens; with `labels`, their mean over the timesteps.
        cache ([`DenoiserCache`], *optional*, with `use_cache=True`, without `labels`):
            As in [`TDDModelOutput`].
        hidden_states, attentions:
            As in [`TDDModelOutput`]; with `labels` one row for each timestep of an image.
        encoder_last_hidden_state (`torch.FloatTensor`, *optional*, in eval mode with `labels`):
            As in [`TDDModelOutput`]. `generate` takes it as `image_features`: loss and captions of a batch from one
            encoding of its images.
        loss_by_timestep (`torch.FloatTensor` of shape `(10, 2)`, *optional*, in training mode with `labels`):
            As in [`TDDImageClassifierOutput`].
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: tuple | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    loss_by_timestep: Tensor | None = None


# ---- Models


class TDDPreTrainedModel(PreTrainedModel):
    """Weights, loading and saving of all TDD models."""

    config: TDDConfig
    config_class = TDDConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _input_embed_layer = "token_embedding"
    # Our losses are means over images: Trainer must average them over accumulation steps itself.
    accepts_loss_kwargs = False
    _compiled_step: DenoisingFunction | None = None

    if TYPE_CHECKING:  # Transformers' decorator hides the signature from type checkers

        def to(self, *args: Any, **kwargs: Any) -> Self: ...  # type: ignore[override]

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in Transformers, for captions.

        Raises:
            `ValueError`: for a classifier, whose tokens are its labels.
        """
        if self.config.vocab_size is None:
            raise ValueError(
                "The tokens of a classifier are its labels. To change their number, load it with "
                "`from_pretrained(..., num_labels=..., ignore_mismatched_sizes=True)`."
            )
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, TDDDenoiser):
                module.reset_schedule()
        return embeddings

    @property
    def denoising_step(self) -> DenoisingFunction:
        """One step of the denoising loops, as it is or compiled."""
        return self._compiled_step or denoising_step

    def compile_denoising(self, **kwargs: Any) -> None:
        r"""
        Compiles a step of the denoising loop: denoiser, guidance, choice and re-noising become one graph, which on a
        GPU is recorded as a CUDA graph. The classifier's `forward` in eval mode and the captioner's `generate` use it
        from then on. Each batch size is compiled anew, at its first call. Logits processors run as they are.

        Args:
            kwargs: Arguments of `torch.compile`, such as `backend` or `mode`.
        """
        self._compiled_step = compile_denoising_step(**kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """As in Transformers, which makes all weights that it loads require a gradient: the encoder's that need none
        do not."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with `output_loading_info=True`
        for module in model.modules():
            if isinstance(module, TDDModel):
                module.freeze()
        return loaded

    @classmethod
    def from_encoder_pretrained(
        cls, encoder_name_or_path: str, *, encoder_kwargs: dict[str, Any] | None = None, **config_kwargs: Any
    ) -> Self:
        r"""
        A new model around a pretrained image encoder.

        Args:
            encoder_name_or_path (`str`):
                A model id or folder of any vision model of Transformers. Of a two-tower model (CLIP, SigLIP) the
                vision tower is taken.
            encoder_kwargs (`dict`, *optional*):
                Arguments of the encoder's `from_pretrained`, such as `revision`. With a `dtype` the whole model has
                it; without, it is in float32, in which weights are trained, whatever the encoder was saved in.
            config_kwargs:
                Fields of [`TDDConfig`], such as `num_labels=10` or `pooling="mean"`.

        Raises:
            `ValueError`: if the pretrained encoder lacks weights that the model needs.

        Example:

        ```python
        >>> model = TDDForImageClassification.from_encoder_pretrained("facebook/dinov2-base", num_labels=10)
        ```"""
        encoder_kwargs = encoder_kwargs or {}
        pretrained_config = AutoConfig.from_pretrained(encoder_name_or_path, **encoder_kwargs)
        vision_config = getattr(pretrained_config, "vision_config", pretrained_config)
        if not {"dtype", "torch_dtype"} & encoder_kwargs.keys():
            vision_config.dtype = torch.float32
        if getattr(vision_config, "model_args", None):  # timm writes a head's size there, which Transformers sets too
            vision_config.model_args.pop("num_classes", None)
        model = cls(cls.config_class(vision_config=vision_config, **config_kwargs))
        encoder: Any = getattr(model, cls.base_model_prefix, model).encoder
        pretrained, info = type(encoder).from_pretrained(
            encoder_name_or_path, config=vision_config, output_loading_info=True, **encoder_kwargs
        )
        missing = set(encoder.load_state_dict(pretrained.state_dict(), strict=False).missing_keys)
        missing |= info["missing_keys"] & encoder.state_dict().keys()  # what `from_pretrained` drew at random
        if missing:
            raise ValueError(f"`{encoder_name_or_path}` lacks weights of {type(encoder).__name__}: {sorted(missing)}.")
        return model.to(pretrained.dtype)

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, save_original_format: bool = False, **kwargs: Any
    ) -> None:
        """As in Transformers. Weights keep the names that they have here: Trainer's resume maps no names, and would
        silently skip an encoder saved under its original ones. The checkpoint names all Auto classes, not only that of
        the saved one: `AutoModel` reads a classifier's checkpoint too.

        Raises:
            `ValueError`: for whole weights into a folder of a LoRA adapter, which loading would apply to them.
        """
        if Path(save_directory, "adapter_config.json").exists() and not getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"{save_directory} holds a LoRA adapter (`adapter_config.json`), which `from_pretrained` would apply "
                "to the weights that are saved beside it. Save them to another folder."
            )
        self.config.auto_map = dict(AUTO_MAP)
        kwargs["save_original_format"] = save_original_format
        super().save_pretrained(save_directory, *args, **kwargs)


class TDDConnector(nn.Module):
    """From the encoder's features to the denoiser's prefix. The norm is for encoders that end without one."""

    def __init__(self, config: TDDConfig, encoder_hidden_size: int):
        super().__init__()
        self.layernorm = nn.LayerNorm(encoder_hidden_size, eps=config.layer_norm_eps)
        self.mlp = TDDMLP(encoder_hidden_size, config.hidden_size, config.hidden_size, config.hidden_act)

    def forward(self, features: Tensor) -> Tensor:
        return self.mlp(self.layernorm(features))


class TDDModel(TDDPreTrainedModel):
    r"""
    The image encoder, the connector that makes its features the denoiser's prefix, and the denoiser, without a head.

    Args:
        config ([`TDDConfig`]): The configuration.
        add_denoiser (`bool`, *optional*, defaults to `True`):
            Whether there is a connector and a denoiser; the one-token MDD classifier has none.

    Raises:
        `ValueError`: for an encoder that [`~encoder_tdd.build_encoder`] refuses.
    """

    def __init__(self, config: TDDConfig, add_denoiser: bool = True):
        super().__init__(config)
        config.validate()
        vision_config = cast(PreTrainedConfig, config.vision_config)
        try:
            self.encoder, self.encoder_layout = build_encoder(vision_config, config.pooling)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, AssertionError) as error:
            raise ValueError(
                f"`vision_config` makes no encoder: `{vision_config.model_type}` failed with "
                f"{type(error).__name__}: {error}"
            ) from error
        self.encoder_hidden_size = self.encoder_layout.hidden_size
        self.freeze()
        self.connector = TDDConnector(config, self.encoder_hidden_size) if add_denoiser else None
        self.denoiser = TDDDenoiser(config) if add_denoiser else None
        self.post_init()

    def freeze(self) -> None:
        """Lets some of the encoder's weights require no gradient: all of them with `config.freeze_encoder`, otherwise
        those that nothing reads, which would stop distributed training."""
        freeze_unread(self.encoder, cast(PreTrainedConfig, self.config.vision_config))
        if self.config.freeze_encoder:
            self.encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "TDDModel":
        super().train(mode)
        if self.config.freeze_encoder or not _trains(self.encoder):
            self.encoder.eval()  # batch statistics and dropout would change frozen features
        for module in self.encoder.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not _trains(module):
                module.eval()  # adapters elsewhere, which are saved without these statistics
        return self

    def get_input_embeddings(self) -> nn.Module | None:
        return None if self.denoiser is None else self.denoiser.token_embedding

    def set_input_embeddings(self, value: Any) -> None:
        self.denoiser.token_embedding = value

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        r"""
        Encodes images.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
                Images, as the image processor returns them.

        Returns:
            [`~modeling_outputs.BaseModelOutputWithPooling`]: the encoder's tokens as `last_hidden_state`, of shape
            `(batch_size, num_tokens, encoder_hidden_size)`, its hidden states and attentions where asked for, and the
            condition c of Section 3.3 as `pooler_output`, of shape
            `(batch_size, prefix_length, encoder_hidden_size)`; `prefix_length` is 1 where `config.pooling` pools.

        Raises:
            `ValueError`: for a wrong number of dimensions or channels and, in training mode, for pixels on the CPU
                that are not finite. An encoder with a fixed image size raises for another size.
        """
        self._check_pixels(pixel_values)
        pixel_values = pixel_values.to(self.encoder.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_encoder):
            outputs = run_encoder(self.encoder, self.encoder_layout, pixel_values, **kwargs)
        tokens = as_tokens(outputs.last_hidden_state, self.encoder_layout)
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens,
            pooler_output=pool_tokens(tokens, self.config.pooling, self.encoder_layout),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )

    def _check_pixels(self, pixel_values: Tensor) -> None:
        if pixel_values is None:
            raise ValueError("`pixel_values` must be given.")
        check("pixel_values", pixel_values)
        channels = self.encoder_layout.num_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels or pixel_values.numel() == 0:
            raise ValueError(
                f"`pixel_values` must have shape (batch_size, {channels}, height, width), got "
                f"{tuple(pixel_values.shape)}."
            )
        on_host = pixel_values.device.type == "cpu"  # a GPU would make the host wait in each step
        if self.training and on_host and not torch.compiler.is_compiling() and not pixel_values.isfinite().all():
            bad = (~pixel_values.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
            raise ValueError(f"`pixel_values` must be finite, got NaN or infinity in the images {bad} of the batch.")

    def get_prefix(self, pixel_values: Tensor | None = None, image_features: Tensor | None = None) -> Tensor:
        """The denoiser's prefix of shape `(batch_size, prefix_length, hidden_size)`, from images or from the
        `pooler_output` of [`~TDDModel.get_image_features`]."""
        if (pixel_values is None) == (image_features is None):
            raise ValueError("Give either `pixel_values` or `image_features`, and not both.")
        if image_features is None:
            image_features = self.get_image_features(pixel_values, return_dict=True).pooler_output
        check("image_features", image_features)
        if image_features.shape[-1] != self.encoder_hidden_size:
            raise ValueError(
                f"`image_features` must have shape (batch_size, prefix_length, {self.encoder_hidden_size}), got "
                f"{tuple(image_features.shape)}."
            )
        return self.connector(image_features.to(self.connector.layernorm.weight.dtype))

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        tokens: Tensor | None = None,
        timesteps: Tensor | None = None,
        noise: Tensor | None = None,
        image_features: Tensor | None = None,
        cache: DenoiserCache | None = None,
        use_cache: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TDDModelOutput:
        r"""
        One pass of the denoiser.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`, *optional*):
                Images. Needed unless `image_features` or `cache` is given.
            tokens (`torch.LongTensor` of shape `(batch_size, num_tokens)`, *optional*):
                Tokens to add noise to. With `config.corruption="mask"`, K stands for a mask. By default there are
                none: the input is noise, or masks, alone.
            timesteps (`torch.LongTensor` of shape `(batch_size, num_tokens)` or `(batch_size,)`, *optional*):
                Timesteps, 1 ... T. T by default, which is noise alone.
            noise (`torch.FloatTensor` of shape `(batch_size, num_tokens, config.noise_width)`, *optional*):
                Standard normal noise. By default always the same, for each image.
            image_features (`torch.FloatTensor`, *optional*):
                In place of `pixel_values`: the `pooler_output` of [`~TDDModel.get_image_features`].
            cache ([`DenoiserCache`], *optional*):
                In place of `pixel_values`: that of an earlier output for the same images.
            use_cache (`bool`, *optional*, defaults to `False`):
                Whether to return `cache`, to denoise the same images again.

        Raises:
            `ValueError`: unless one of `pixel_values`, `image_features` and `cache` is given, for unknown arguments,
                for tensors of a wrong shape or out of range, or as in [`~TDDModel.get_image_features`].
        """
        check_forward_kwargs(self, kwargs)
        check_given(cache=cache, use_cache=use_cache)
        if self.denoiser is None:
            raise ValueError("This model was made with `add_denoiser=False`: call `get_image_features`.")
        if sum(given is not None for given in (pixel_values, image_features, cache)) != 1:
            raise ValueError("Give one of `pixel_values`, `image_features` and `cache`.")
        if pixel_values is not None:
            image_features = self.get_image_features(pixel_values, return_dict=True).pooler_output
        prefix = None if image_features is None else self.get_prefix(image_features=image_features)
        given = prefix if cache is None else cache.key_values[0][0]
        inputs = self._noisy_tokens(len(given), tokens, timesteps, noise, given.device)
        outputs = self.denoiser(*inputs, prefix, cache=cache, use_cache=use_cache, **kwargs)
        return TDDModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            encoder_last_hidden_state=image_features,
        )

    def _noisy_tokens(
        self,
        batch_size: int,
        tokens: Tensor | None,
        timesteps: Tensor | None,
        noise: Tensor | None,
        device: torch.device,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The tokens, timesteps and noise that the denoiser reads, with defaults for what is not given."""
        config = self.config
        check_given(tokens=tokens, timesteps=timesteps, noise=noise)
        if tokens is not None:
            highest = config.num_categories - (config.corruption != "mask")  # K stands for a mask
            check_shape("tokens", tokens, [(batch_size, n + 1) for n in range(config.max_position_embeddings)])
            check_value_range("tokens", tokens, 0, highest)
        if tokens is None:
            shape = (config.max_position_embeddings,)
            tokens = torch.full(shape, config.num_categories if config.corruption == "mask" else 0)
            if config.corruption == "uniform":
                tokens = torch.randint(config.num_categories, shape, generator=torch.Generator().manual_seed(0))
            tokens = tokens.to(device).repeat(batch_size, 1)
        if timesteps is not None:
            check_shape("timesteps", timesteps, [tuple(tokens.shape), (batch_size,)])
            check_value_range("timesteps", timesteps, 1, config.num_timesteps)
        if config.corruption != "gaussian":
            refuse_given(f"with `corruption={config.corruption!r}` the tokens are the noisy ones", noise=noise)
        if noise is not None:
            check_noise(config, noise, tuple(tokens.shape))
        if timesteps is None:
            timesteps = torch.full_like(tokens, config.num_timesteps)
        elif timesteps.ndim == 1:
            timesteps = timesteps[:, None].expand_as(tokens)
        if noise is None and config.corruption == "gaussian":
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(tokens.shape[1], config.noise_width, generator=generator)
            noise = noise.to(device).expand(batch_size, -1, -1)
        return tokens, timesteps, noise


# ---- Checks of what `forward` is given


def check_forward_kwargs(model: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Raises a `ValueError` for arguments that `forward` does not have."""
    unknown = [name for name, value in kwargs.items() if name not in FORWARD_KWARGS and value is not None]
    if unknown:
        named = [name for name in inspect.signature(type(model).forward).parameters if name not in ("self", "kwargs")]
        check_names(unknown, [*named, *FORWARD_KWARGS], f"`{type(model).__name__}.forward`")


def check_noise(config: TDDConfig, noise: Tensor, shape: tuple[int, ...]) -> None:
    """Raises a `ValueError` unless noise has a shape without its width, and one of the two widths."""
    widths = {config.noise_width, config.num_categories if config.corruption == "gaussian" else config.noise_width}
    check_shape("noise", noise, [(*shape, width) for width in sorted(widths)])


def check_draws(config: TDDConfig, batch_size: int, timesteps: Tensor | None, noise: Tensor | None) -> None:
    """Checks the timesteps and noise of a loss."""
    check_given(timesteps=timesteps, noise=noise)
    rows, places = (batch_size, config.timesteps_per_image), config.max_position_embeddings
    if timesteps is not None:
        check_shape("timesteps", timesteps, [rows, (*rows, places)])
        check_value_range("timesteps", timesteps, 1, config.num_timesteps)
    if noise is not None:
        check_noise(config, noise, (*rows, places))


def refuse_training_without_labels(model: nn.Module) -> None:
    """Raises a `ValueError` in training mode with gradients: a loss of something else would be optimised."""
    if model.training and torch.is_grad_enabled():
        raise ValueError(
            f"`{type(model).__name__}` needs `labels` in training mode: its loss compares noisy labels with their "
            "clean ones, and cannot be made of the logits. Trainer takes the labels out of the batch with "
            "`label_smoothing_factor` (set `label_smoothing` of the model's configuration instead) and with "
            "`compute_loss_func`. For logits call `model.eval()`, or compute them under `torch.no_grad()`."
        )


class TDDForImageClassification(TDDPreTrainedModel):
    r"""
    Image classification as the denoising of one label (Section 3.4).

    In training mode with `labels`, `forward` returns the weighted loss over several timesteps of each image. In eval
    mode it runs the whole denoising loop and returns `logits`, so `pipeline("image-classification")` and `Trainer`
    work unchanged. The result of an image depends neither on the other images of its batch nor on global random state.

    With `config.corruption="mask"` it is the baseline MDD, for one token a linear head on the encoder's features.
    """

    _tied_weights_keys = {"classifier.weight": "model.denoiser.token_embedding.weight"}

    def __init__(self, config: TDDConfig):
        super().__init__(config)
        if config.vocab_size is not None or config.max_position_embeddings != 1 or config.pooling is None:
            raise ValueError(
                "A classifier diffuses one label from one pooled feature: it needs `vocab_size=None`, "
                f"`max_position_embeddings=1` and `pooling` 'cls' or 'mean', got {config.vocab_size}, "
                f"{config.max_position_embeddings} and {config.pooling!r}."
            )
        if config.corruption == "mask" and config.tie_word_embeddings:
            raise ValueError(
                "A classifier by masked diffusion has no token embedding: set `tie_word_embeddings=False`."
            )
        self.num_labels = config.num_labels
        self.model = TDDModel(config, add_denoiser=config.corruption != "mask")
        width = self.model.encoder_hidden_size if self.model.denoiser is None else config.hidden_size
        self.classifier = nn.Linear(width, config.num_labels)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.classifier

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: torch.Tensor | None = None,
        timesteps: Tensor | None = None,
        noise: Tensor | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        sampling_strategy: str | None = None,
        num_noise_samples: int | None = None,
        stability_threshold: int | None = None,
        confidence_threshold: float | None = None,
        generator: torch.Generator | None = None,
        output_trajectory: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TDDImageClassifierOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
                Images, as the image processor returns them.
            labels (`torch.Tensor`, *optional*):
                Class indices, int64 of shape `(batch_size,)`, or class probabilities such as Mixup's, float of shape
                `(batch_size, num_labels)`.
            timesteps (`torch.LongTensor` of shape `(batch_size, timesteps_per_image)`, *optional*):
                Training mode: timesteps in 1 ... T. Drawn if not given.
            noise (`torch.FloatTensor` of shape `(batch_size, timesteps_per_image, 1, noise_width)`, *optional*):
                Training mode: the standard normal noise of each timestep. Drawn if not given.
            num_inference_steps, guidance_scale, guidance_schedule, sampling_strategy, num_noise_samples,
            stability_threshold, confidence_threshold (*optional*):
                Eval mode: as in [`TDDConfig`], from which the defaults come.
            generator (`torch.Generator`, *optional*):
                Eval mode: source of the loop's noise. By default a fresh one with seed 0, so that calls agree.
            output_trajectory (`bool`, *optional*, defaults to `False`):
                Eval mode: whether to return the probabilities of each step.

        Raises:
            `ValueError`: for unknown arguments, for those of the other mode, for labels out of range or of a wrong
                shape, steps below 1 or above T, guidance below 1, pixels as in [`TDDModel.get_image_features`], scores
                that are not finite, and in training mode with gradients but without `labels`.

        Example:

        ```python
        >>> outputs = model(**image_processor(image, return_tensors="pt"), num_inference_steps=20)
        >>> model.config.id2label[outputs.logits.argmax(-1).item()]
        ```"""
        check_forward_kwargs(self, kwargs)
        settings: dict[str, Any] = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "guidance_schedule": guidance_schedule,
            "sampling_strategy": sampling_strategy,
            "num_noise_samples": num_noise_samples,
            "stability_threshold": stability_threshold,
            "confidence_threshold": confidence_threshold,
        }
        is_loss_only = self.training and labels is not None
        if is_loss_only:
            refuse_given(
                "the loss of training mode runs no denoising loop",
                **settings,
                generator=generator,
                output_trajectory=output_trajectory,
            )
        else:
            refuse_training_without_labels(self)
            refuse_given("they are those of the loss in training mode", timesteps=timesteps, noise=noise)
            check_given(generator=generator, output_trajectory=output_trajectory)
            settings = self._resolve_settings(**settings)
        features = self.model.get_image_features(pixel_values, return_dict=True).pooler_output
        if labels is not None:
            self._check_labels(labels, features.shape[0])
        if self.model.denoiser is None:
            reason = "masked diffusion of one token draws nothing"
            refuse_given(reason, timesteps=timesteps, noise=noise, generator=generator)
            recorded = {name: kwargs.get(name) for name in RECORDS}
            refuse_given("masked diffusion of one token has no denoiser", **recorded)
            return self._classify_directly(features, labels, output_trajectory)
        prefix = self.model.connector(features)
        if is_loss_only:
            check_draws(self.config, len(labels), timesteps, noise)
            losses = diffusion_loss(
                self.model.denoiser, self.classifier, prefix, labels[:, None], timesteps, noise, **kwargs
            )
            return TDDImageClassifierOutput(
                loss=losses.loss,
                logits=losses.logits[:, :, 0].mean(1),
                hidden_states=losses.hidden_states,
                attentions=losses.attentions,
                loss_by_timestep=losses.loss_by_timestep,
            )
        outputs = self._denoise(prefix, **settings, generator=generator, output_trajectory=output_trajectory, **kwargs)
        check_scores(outputs.logits, settings["guidance_scale"])
        if labels is not None:
            # A new output: a field that was None when an output was made is missing from its keys, which Trainer reads
            loss = nn.functional.cross_entropy(outputs.logits.float(), labels)
            outputs = TDDImageClassifierOutput(loss=loss, **outputs)
        return outputs

    def _resolve_settings(self, **settings: Any) -> dict[str, Any]:
        """Takes what is not given from the configuration, and checks it before anything is computed."""
        settings = {name: getattr(self.config, name) if value is None else value for name, value in settings.items()}
        settings = {name: value if value is None else check(name, value) for name, value in settings.items()}
        check_steps(self.config.num_timesteps, settings["num_inference_steps"])
        return settings

    def _check_labels(self, labels: Tensor, batch_size: int) -> None:
        check("labels", labels)
        soft = labels.is_floating_point()
        if soft and self.training and self.config.corruption == "uniform":
            raise ValueError("`labels` must be class indices with `corruption='uniform'`, which replaces them.")
        expected = (batch_size, self.num_labels) if soft else (batch_size,)
        if tuple(labels.shape) != expected:
            raise ValueError(
                f"`labels` must have shape ({batch_size},) with integers or ({batch_size}, {self.num_labels}) with "
                f"probabilities, got {tuple(labels.shape)} of {labels.dtype}."
            )
        if not soft:
            check_value_range("labels", labels, 0, self.num_labels - 1)

    def _classify_directly(
        self, features: Tensor, labels: Tensor | None, output_trajectory: bool
    ) -> TDDImageClassifierOutput:
        """MDD for one token: whatever the number of steps, there is one mask to replace."""
        logits = self.classifier(features[:, 0])
        if not self.training:
            check_scores(logits, 1.0)
        loss = None
        if labels is not None:
            smoothing = self.config.label_smoothing if self.training else 0.0
            loss = nn.functional.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
        trajectory = logits.float().softmax(-1)[:, None] if output_trajectory else None
        return TDDImageClassifierOutput(loss=loss, logits=logits, trajectory=trajectory)

    def _denoise(
        self,
        prefix: Tensor,
        num_inference_steps: int,
        guidance_scale: float,
        guidance_schedule: str,
        sampling_strategy: str,
        num_noise_samples: int,
        stability_threshold: int | None,
        confidence_threshold: float | None,
        generator: torch.Generator | None,
        output_trajectory: bool,
        **kwargs: Any,
    ) -> TDDImageClassifierOutput:
        """The argmax-and-re-noise loop of Section 3.2 with the guidance of Algorithm 1."""
        # 1. One row for each image and noise sample
        config, num_rows, device = self.config, len(prefix) * num_noise_samples, prefix.device
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        numbers = RandomNumbers([generator], len(prefix), num_noise_samples, 1, config.noise_width, device)
        network = ConditionedDenoiser(self.model.denoiser, self.classifier, prefix, **kwargs)
        sampler = RenoiseSampler(config.num_timesteps, confidence_threshold)
        if config.corruption == "uniform":
            alpha_bar = self.model.denoiser.schedule_on(device).alpha_bar
            sampler = UniformSampler(alpha_bar, config.num_categories, confidence_threshold)
        # 2. The loop. A row that is finished keeps its logits
        steps = denoise(
            network,
            sampler,
            numbers,
            KnownTokens.none(num_rows, 1, device),
            guidance_scales(guidance_schedule, guidance_scale, num_inference_steps),
            sampling_strategy,
            stability_threshold=stability_threshold,
            keep_rows=any(kwargs.get(name) or getattr(config, name) for name in RECORDS),  # those of all rows
            step=self.denoising_step,
        )
        trajectory: list[Tensor] = []
        logits: Tensor | None = None
        for step in steps:
            latest = step.logits[:, 0]
            logits = latest if len(step.rows) == num_rows else logits.index_copy(0, step.rows, latest)
            if output_trajectory:
                trajectory.append(average_samples(logits, num_noise_samples).softmax(-1))
        # 3. The last step's logits are the answer. Copies, since a compiled step returns memory that it uses again
        last = (average_samples(logits, num_noise_samples), network.hidden_states, network.attentions)
        logits, hidden_states, attentions = clone_all(last)
        return TDDImageClassifierOutput(
            logits=logits,
            trajectory=torch.stack(trajectory, dim=1) if output_trajectory else None,
            hidden_states=hidden_states,
            attentions=attentions,
        )


class TDDForCaptioning(TDDGenerationMixin, TDDLikelihoodMixin, TDDPreTrainedModel):  # type: ignore[misc]
    r"""
    Image captioning as the denoising of N tokens together (Section 3.4); `generate` runs the loop, and `score` ranks
    given captions.

    A caption is its tokens, one `eos_token_id`, and `pad_token_id` up to N = `config.max_position_embeddings` places.
    Padding is a token like any other, of less weight in the loss, so a caption's length is part of what is denoised.

    With `config.corruption="mask"` it is the baseline MDD on the same network.
    """

    _tied_weights_keys = {"lm_head.weight": "model.denoiser.token_embedding.weight"}

    def __init__(self, config: TDDConfig):
        super().__init__(config)
        if config.vocab_size is None or config.pad_token_id is None or config.eos_token_id is None:
            raise ValueError(
                "A captioner needs `vocab_size`, `pad_token_id` and `eos_token_id`, got "
                f"{config.vocab_size}, {config.pad_token_id} and {config.eos_token_id}."
            )
        self.model = TDDModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in Transformers; the checkpoint brings its own pipeline, for the task that Transformers 5 dropped."""
        from .pipeline_tdd import CUSTOM_PIPELINES  # here, so that a model does not need Transformers' pipelines

        self.config.custom_pipelines = CUSTOM_PIPELINES
        super().save_pretrained(save_directory, *args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        image_features: Tensor | None = None,
        tokens: Tensor | None = None,
        timesteps: Tensor | None = None,
        noise: Tensor | None = None,
        cache: DenoiserCache | None = None,
        use_cache: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TDDCaptioningOutput:
        r"""
        The loss of captions, or one denoising step. To caption images call `generate`.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`, *optional*):
                Images, as the image processor returns them.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Captions with their `eos_token_id`, of at most N tokens. `pad_token_id` or -100 fills short ones.
            image_features (`torch.FloatTensor`, *optional*):
                In place of `pixel_values`: the `pooler_output` of `model.get_image_features`, such as one from disc.
            tokens (`torch.LongTensor` of shape `(batch_size, num_tokens)`, *optional*):
                Without `labels`: as in [`TDDModel`].
            timesteps (`torch.LongTensor`, *optional*):
                In 1 ... T. With `labels` of shape `(batch_size, timesteps_per_image)`, drawn if not given, and then
                with the `mistaken_share` of the configuration. Without, as in [`TDDModel`].
            noise (`torch.FloatTensor` of shape `(batch_size, timesteps_per_image, N, noise_width)`, *optional*):
                With `labels`: the noise of each timestep, drawn if not given. Without, as in [`TDDModel`].
            cache ([`DenoiserCache`], *optional*):
                Without `labels`: in place of `pixel_values`, that of an earlier output for the same images.
            use_cache (`bool`, *optional*, defaults to `False`):
                Without `labels`: whether to return `cache`.

        In eval mode the loss draws its timesteps and noise from a fixed seed, the same for each image, so that
        `eval_loss` can choose a checkpoint.

        Raises:
            `ValueError`: for unknown arguments, for those that have no effect with `labels`, for token ids out of
                range, captions longer than N or not one for each image, pixels as in
                [`TDDModel.get_image_features`], and in training mode with gradients but without `labels`.
        """
        check_forward_kwargs(self, kwargs)
        if labels is None:
            refuse_training_without_labels(self)
            outputs = self.model(pixel_values, tokens, timesteps, noise, image_features, cache, use_cache, **kwargs)
            return TDDCaptioningOutput(
                logits=self.lm_head(outputs.last_hidden_state),
                cache=outputs.cache,
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
            )
        refuse_given("with `labels` the loss is computed", tokens=tokens, cache=cache, use_cache=use_cache)
        targets = self._fill_labels(labels)
        check_draws(self.config, len(labels), timesteps, noise)
        is_padding = targets == self.config.pad_token_id
        if pixel_values is not None and image_features is None:
            image_features = self.model.get_image_features(pixel_values, return_dict=True).pooler_output
            pixel_values = None
        prefix = self.model.get_prefix(pixel_values, image_features)
        if len(prefix) != len(targets):
            raise ValueError(f"`labels` must have a caption for each of the {len(prefix)} images, got {len(targets)}.")
        outputs = diffusion_loss(
            self.model.denoiser,
            self.lm_head,
            prefix,
            targets,
            timesteps,
            noise,
            token_weight=torch.where(is_padding, float(self.config.pad_loss_weight), 1.0),
            **kwargs,
        )
        return TDDCaptioningOutput(
            loss=outputs.loss,
            logits=outputs.logits.mean(1),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            # Trainer gathers all that an evaluation returns, row by row
            encoder_last_hidden_state=None if self.training else image_features,
            loss_by_timestep=outputs.loss_by_timestep if self.training else None,
        )

    def _fill_labels(self, labels: Tensor) -> Tensor:
        """Labels of N places, without -100, checked."""
        length = self.config.max_position_embeddings
        check("labels", labels)
        if labels.is_floating_point():
            raise ValueError(f"`labels` must be token ids, got {shorten(labels)}.")
        if labels.ndim != 2 or labels.shape[1] > length:
            raise ValueError(
                f"`labels` must have shape (batch_size, at most {length}), got {tuple(labels.shape)}. Truncate "
                "captions, or make `max_position_embeddings` larger."
            )
        labels = labels.masked_fill(labels == -100, self.config.pad_token_id)
        check_value_range("labels", labels, 0, self.config.vocab_size - 1)
        return nn.functional.pad(labels, (0, length - labels.shape[1]), value=self.config.pad_token_id)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raises a `ValueError` for a tokenizer that is not this model's: with more tokens, or other special ones.

        Args:
            tokenizer (`PreTrainedTokenizerBase`): The tokenizer, or the one of a processor.
        """
        if len(tokenizer) > self.config.vocab_size:
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} tokens, and the model's `vocab_size` is {self.config.vocab_size}."
            )
        for name in ("pad_token_id", "eos_token_id"):
            theirs, ours = getattr(tokenizer, name), getattr(self.config, name)
            if theirs != ours:
                raise ValueError(f"The tokenizer's `{name}` is {theirs}, and the model's is {ours}.")

    def make_network(self, prefix: Tensor) -> "ConditionedDenoiser":
        """What `generate` denoises with, on the condition of the images in `prefix`."""
        return ConditionedDenoiser(self.model.denoiser, self.lm_head, prefix)


class ConditionedDenoiser:
    """The network of one denoising loop, see [`~sampling_tdd.Network`]: the denoiser with its head, on the condition
    of the images in `prefix`."""

    def __init__(self, denoiser: TDDDenoiser, head: nn.Module, prefix: Tensor, **denoiser_kwargs: Any):
        self.denoiser, self.head, self.prefix = denoiser, head, prefix
        self.denoiser_kwargs = denoiser_kwargs
        # A prediction of the noise needs its K numbers, and not `epsilon W`; and of numbers random tokens are made
        is_embedded = denoiser.config.prediction_type == "sample" and denoiser.config.corruption == "gaussian"
        self.noise_name = "noise_embeds" if is_embedded else "noise"
        self.cache: DenoiserCache | None = None
        self.hidden_states: tuple[Tensor, ...] | None = None
        self.attentions: tuple[Tensor, ...] | None = None

    def prepare(self, rows: int, timesteps: Tensor, noise: Tensor | None, is_guided: bool) -> Tensor | None:
        """Encodes the prefix, the timesteps and the noise, once for all steps; see [`~sampling_tdd.Network`]."""
        is_embedded = self.noise_name == "noise_embeds"
        outputs = self.denoiser(
            timesteps=timesteps,
            noise=noise if is_embedded else None,
            prefix=self.prefix,
            add_null_condition=is_guided,
        )
        self.cache = outputs.cache.repeat(rows // len(self.prefix))
        return self.cache.noise_embeds if is_embedded else noise

    def __call__(self, state: NoisyTokens, guidance_scale: Tensor | None, places: Tensor | None = None) -> Tensor:
        """Logits of all places, or of some; see [`~sampling_tdd.Network`]."""
        noise = {} if state.noise is None else {self.noise_name: state.noise}
        outputs = self.denoiser(state.tokens, state.timesteps, cache=self.cache, **noise, **self.denoiser_kwargs)
        rows = len(state.tokens)  # with guidance there are as many again, without the condition
        self.hidden_states, self.attentions = (
            None if recorded is None else tuple(states[:rows] for states in recorded)
            for recorded in (outputs.hidden_states, outputs.attentions)
        )
        hidden_states = outputs.last_hidden_state
        if guidance_scale is not None:
            # Equation 1 is about predictions. They are linear in the hidden states, which are fewer numbers.
            conditional, unconditional = hidden_states.chunk(2)
            hidden_states = apply_guidance(conditional, unconditional, guidance_scale)
        if places is not None:
            hidden_states = hidden_states[places]
        prediction = self.head(hidden_states).float()
        is_noise = self.denoiser.config.prediction_type == "epsilon"
        return self._subtract_noise(state, prediction, places) if is_noise else prediction

    def _subtract_noise(self, state: NoisyTokens, prediction: Tensor, places: Tensor | None) -> Tensor:
        """Logits from a prediction of the noise, `y_t - sigma_t epsilon`: that is y_0 up to a positive factor, which
        no argmax sees (at t = T the factor is infinite)."""
        values = (state.tokens, state.noise, state.timesteps)
        tokens, noise, timesteps = values if places is None else (tensor[places] for tensor in values)
        schedule = self.denoiser.schedule_on(prediction.device)
        noisy = add_noise(one_hot(tokens, self.denoiser.config.num_categories), noise, schedule, timesteps)
        return noisy - schedule.sigma[timesteps][..., None] * prediction

    def select(self, keep: Tensor) -> None:
        """From now on only the rows of a boolean mask are denoised."""
        self.cache = self.cache.select(keep)


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def average_samples(logits: Tensor, num_noise_samples: int) -> Tensor:
    """Log of the mean probabilities over an image's noise samples: (images * samples, K) -> (images, K)."""
    if num_noise_samples == 1:
        return logits
    log_probs = logits.log_softmax(-1).view(-1, num_noise_samples, logits.shape[-1])
    return log_probs.logsumexp(1) - math.log(num_noise_samples)


__all__ = [
    "TDDCaptioningOutput",
    "TDDForCaptioning",
    "TDDForImageClassification",
    "TDDImageClassifierOutput",
    "TDDModel",
    "TDDModelOutput",
    "TDDPreTrainedModel",
]
