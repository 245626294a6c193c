# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""TDD model configuration."""

import re
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, cast

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import logging

from .settings_tdd import SETTINGS, check, check_names, integer, read_object, refuse_locations


logger = logging.get_logger(__name__)

# How a classifier denoises unless it is told otherwise
CLASSIFIER_INFERENCE = {
    "num_inference_steps": 10,
    "guidance_scale": 1.0,
    "guidance_schedule": "constant",
    "sampling_strategy": "argmax",
    "num_noise_samples": 1,
    "stability_threshold": None,
    "confidence_threshold": None,
}
# What Transformers and its Trainer write into any configuration, besides the fields of `PreTrainedConfig`
OF_TRANSFORMERS = (
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "custom_pipelines",
    "experts_implementation",
    "model_type",
    "quantization_config",
    "tokenizer_class",
    "torch_dtype",
    "transformers_weights",
    "use_cache",
)
# Sizes that most image encoders have
ENCODER_SIZES = (
    "hidden_size",
    "image_size",
    "intermediate_size",
    "num_attention_heads",
    "num_channels",
    "num_hidden_layers",
    "patch_size",
)


def check_steps(num_timesteps: int, num_inference_steps: int) -> int:
    """The number of denoising steps, of which there are at most T."""
    return check("num_inference_steps", num_inference_steps, integer(1, num_timesteps))


# Names of an encoder's numbers of layers, also in timm's arguments
LAYERS = re.compile(r"(^|_)(layers|depths?|blocks|stages)$")
MAX_LAYERS, MAX_IMAGE_SIZE, MAX_PATCHES = 1000, 2**13, 2**16


def check_encoder_sizes(name: str, values: dict[str, Any]) -> None:
    """Raises a `ValueError` for an encoder that would be built for minutes, whatever its other sizes are: with more
    layers or larger images than any in use, or with more than 256 x 256 patches."""
    for key, value in values.items():
        if isinstance(value, dict):
            check_encoder_sizes(f"{name}.{key}", value)
        elif LAYERS.search(str(key)) and (number := sum(_numbers(value))) > MAX_LAYERS:
            raise ValueError(f"`{name}.{key}` must have at most {MAX_LAYERS} layers, got {number}.")
    image = max((n for key in ("image_size", "img_size") for n in _numbers(values.get(key))), default=0)
    if image > MAX_IMAGE_SIZE:
        raise ValueError(f"`{name}` must have images of at most {MAX_IMAGE_SIZE} pixels a side, got {image}.")
    patch = min(_numbers(values.get("patch_size")), default=image or 1)
    if (image / max(patch, 1)) ** 2 > MAX_PATCHES:
        raise ValueError(f"`{name}` must have at most {MAX_PATCHES} patches, got images of {image} by {patch} pixels.")


def _numbers(value: Any) -> list[int | float]:
    """The numbers in nested lists."""
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def _without_origin(value: Any) -> Any:
    """An encoder's configuration without where it came from, which may be a folder of its author's machine."""
    if not isinstance(value, dict):
        return value
    return {name: _without_origin(item) for name, item in value.items() if name != "_name_or_path"}


class TDDConfig(PreTrainedConfig):
    r"""
    Configuration of [`TDDModel`], [`TDDForImageClassification`] and [`TDDForCaptioning`]: in-situ Tweedie Discrete
    Diffusion (arXiv 2510.01047).

    `TDDConfig()` is the paper's classifier in every field that the paper states; with `num_labels=1000` it has the
    paper's 111 M parameters. "(ours)" marks a value about which the paper is silent, and "(ours; the paper: ...)" a
    value that departs from it. A number after "decision" is that of the entry in `docs/decisions.md`.

    Some defaults differ between one token (`max_position_embeddings=1`, classification) and sequences (captioning).
    Their default is `None`, which is replaced by the task's value when the configuration is made, so that a saved
    configuration always holds the value itself.

    Args:
        > Image encoder

        vision_config (`PreTrainedConfig` or `dict`, *optional*, defaults to a ViT-B/16 `ViTConfig`):
            The image encoder: any vision model of Transformers (ViT, DINOv2, SigLIP, ...) or a `TimmWrapperConfig`.
        pooling (`str`, *optional*, defaults to `"cls"`):
            How the encoder's tokens become the condition c (Section 3.3): `"cls"`, `"mean"` (of the patch tokens), or
            `None` for all tokens.
        freeze_encoder (`bool`, *optional*, defaults to `False`):
            Whether the encoder stays as it is: without gradients, and always in eval mode.

        > Tokens

        vocab_size (`int`, *optional*):
            Number of categories K of a token. `None` stands for `num_labels`: the token is a class label.
        max_position_embeddings (`int`, *optional*, defaults to 1):
            Number of tokens N that are diffused together: 1 for classification.
        pad_token_id (`int`, *optional*):
            Captioning: the token that fills a caption's places after its end. It is predicted like any other token.
        eos_token_id (`int`, *optional*):
            Captioning: the token that ends a caption.

        > Denoiser

        hidden_size (`int`, *optional*, defaults to 768):
            Width d of the denoiser (ours).
        num_hidden_layers (`int`, *optional*, defaults to 3):
            Number of the denoiser's Transformer layers (ours); with 3 it has the paper's 24 M parameters.
        num_attention_heads (`int`, *optional*, defaults to 12):
            Number of attention heads of each denoiser layer (ours).
        intermediate_size (`int`, *optional*, defaults to 3072):
            Width of each denoiser layer's feed-forward network (ours).
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the feed-forward networks and of the connector (ours).
        hidden_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout after each attention and feed-forward block of the denoiser (ours).
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout on the denoiser's attention weights (ours).
        layer_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of the denoiser's layer norms (ours).
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the initial weights (ours). Narrow networks need more, see decision 3.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the projection of the noisy one-hot vectors and the output projection share one matrix (ours).

        > Diffusion process

        num_timesteps (`int`, *optional*, defaults to 1000):
            Number of diffusion timesteps T (ours).
        noise_schedule (`str`, *optional*):
            `"linear"`, `"cosine"`, `"calibrated"` or `"projected"`; see [`~diffusion_tdd.gaussian_schedule`] (ours).
            The default is `"cosine"` for one token, which the paper's figures fit, and `"projected"` for sequences,
            see decision 24.
        input_weighting (`str`, *optional*):
            `"none"`: the denoiser reads y_t W as it is, as in the paper. `"visibility"`: each noisy token is scaled by
            its signal share, see [`~diffusion_tdd.NoiseSchedule`]. The default is `"none"` for one token and
            `"visibility"` for sequences (ours; the paper: `"none"`), see decisions 11 and 26.

        > Training

        timesteps_per_image (`int`, *optional*, defaults to 4):
            The number of noisy labels for each encoded image, the K of the K-fold feature reuse of Section 3.3 (ours).
        timestep_sampling (`str`, *optional*):
            `"shared"`: one timestep for all tokens of a sequence, as in the paper. `"per_token"`: one for each token,
            see [`~loss_tdd.draw_token_timesteps`]. The default is `"shared"` for one token and with masks, and
            `"per_token"` for sequences with Gaussian noise (ours; the paper: `"shared"`), see decision 12.
        mistaken_share (`float`, *optional*):
            The share of a sequence's tokens that training replaces by wrong ones before the noise is added, see
            [`~loss_tdd.replace_by_wrong_tokens`]. The default is 0.1 with `timestep_sampling="per_token"` (ours; the
            paper: 0), see decision 23, and 0 otherwise.
        condition_dropout (`float`, *optional*, defaults to 0.1):
            Probability that an image's condition is replaced by the learned null condition in training, for
            classifier-free guidance (appendix A.3; the value is ours).
        label_smoothing (`float`, *optional*):
            Label smoothing of the training loss. The default is 0.1 for one token (appendix A.1), and 0 for sequences
            and for `prediction_type="epsilon"`.
        pad_loss_weight (`float`, *optional*, defaults to 0.1):
            Captioning: weight of padding in the loss, against 1 for the caption's tokens and its end (ours).

        > Baseline and ablations of the paper

        corruption (`str`, *optional*, defaults to `"gaussian"`):
            `"gaussian"` is TDD. `"mask"` is the baseline MDD, masked discrete diffusion. For one token MDD is a linear
            head on the encoder's features (Section 4.1), and the model has no denoiser. `"uniform"` puts random tokens
            in place of the clean ones, as D3PM does (not of the paper; here with the loss and the loop of TDD).
        prediction_type (`str`, *optional*, defaults to `"sample"`):
            `"sample"`: cross-entropy on y_0 (Section 3.2). `"epsilon"`: mean squared error on the noise, the ablation
            of Table 2 ("w/ regression loss").
        loss_weighting (`str`, *optional*):
            `"alpha_bar"` weights the loss by the timestep-conditioned coefficient of Section 3.2, `"none"` does not.
            The default is the paper's: `"alpha_bar"` for one token (Section 3.2), `"none"` for sequences
            (Section 3.4).
        one_hot_scale (`float`, *optional*, defaults to 1.0):
            Lambda of the paper's lambda-hot labels (Section 3.2), in [0.001, 1].

        > Inference of classifiers (for captioners these are fields of [`TDDGenerationConfig`])

        num_inference_steps (`int`, *optional*):
            Denoising steps of a classification in eval mode, 10 by default. The paper: strong at about 10, best at 20
            (Section 4.2.1).
        guidance_scale (`float`, *optional*):
            Classifier-free guidance (equation 1), at least 1. The default, 1.0, is none and costs nothing. (The paper
            uses guidance and gives no scale; on our data TDD did not gain from it, see decisions 12 and 15.)
        guidance_schedule (`str`, *optional*):
            s(t) of Algorithm 1: `"constant"`, the default, or a `"linear"` or `"cosine"` rise from 1 to
            `guidance_scale` (ours).
        sampling_strategy (`str`, *optional*):
            The "to one" operation (appendix A.2): `"argmax"`, the default and the paper's, or `"multinomial"`.
        num_noise_samples (`int`, *optional*):
            Number of noise draws whose predicted probabilities a classification averages, 1 by default (ours).
        stability_threshold (`int`, *optional*):
            A classification ends when its label has not changed for so many steps (ours). By default all steps are
            taken.
        confidence_threshold (`float`, *optional*):
            A classification ends when its label is at least as probable (ours). By default all steps are taken.

    Raises:
        `ValueError`: for an unknown field, or a value of a wrong type or out of its range. The message names the
            field, the value and what is allowed.

    Example:

    ```python
    >>> from transformers import Dinov2Config
    >>> from modeling_tdd import TDDConfig, TDDForImageClassification

    >>> model = TDDForImageClassification(TDDConfig(num_labels=1000))  # the paper's ViT-B/16
    >>> small = TDDForImageClassification(TDDConfig(vision_config=Dinov2Config(num_hidden_layers=4), num_labels=10))
    ```"""

    model_type = "tdd"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="vit"),
    }

    if TYPE_CHECKING:  # takes Transformers' own fields too, such as `num_labels`

        def __init__(self, **fields: Any) -> None: ...

    # Image encoder
    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    pooling: str | None = "cls"
    freeze_encoder: bool = False

    # Tokens
    vocab_size: int | None = None
    max_position_embeddings: int = 1
    pad_token_id: int | None = None
    eos_token_id: int | None = None

    # Denoiser
    hidden_size: int = 768
    num_hidden_layers: int = 3
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    layer_norm_eps: float | int = 1e-6
    initializer_range: float | int = 0.02
    tie_word_embeddings: bool = False

    # Diffusion process
    num_timesteps: int = 1000
    noise_schedule: str | None = None
    input_weighting: str | None = None

    # Training
    timesteps_per_image: int = 4
    timestep_sampling: str | None = None
    mistaken_share: float | int | None = None
    condition_dropout: float | int = 0.1
    label_smoothing: float | int | None = None
    pad_loss_weight: float | int = 0.1

    # Baseline and ablations of the paper
    corruption: str = "gaussian"
    prediction_type: str = "sample"
    loss_weighting: str | None = None
    one_hot_scale: float | int = 1.0

    # Inference of classifiers
    num_inference_steps: int | None = None
    guidance_scale: float | int | None = None
    guidance_schedule: str | None = None
    sampling_strategy: str | None = None
    num_noise_samples: int | None = None
    stability_threshold: int | None = None
    confidence_threshold: float | int | None = None

    def __post_init__(self, **kwargs):
        # Here, since Transformers drops some names without a word
        check_names(kwargs, self._known_names(), "`TDDConfig`")
        if kwargs.get("num_labels") is not None:
            check("num_labels", kwargs["num_labels"])
        refuse_locations("vision_config", self.vision_config)  # before its class sees it, which may look at the Hub
        if isinstance(self.vision_config, dict):
            try:
                self.vision_config, _ = self.sub_configs_defaults["vision_config"].create_subconfig(
                    "vision_config", self.vision_config
                )
            except Exception as error:  # configurations of encoders refuse values in many ways
                raise ValueError(f"`vision_config` is refused by its own class: {error}") from error
        super().__post_init__(**kwargs)
        for name, value in self._task_defaults().items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.validate()

    def __setattr__(self, name: str, value: Any) -> None:
        """Checks a field whenever it is set: when a configuration is made, loaded or changed."""
        is_default = value is None and getattr(type(self), name, None) is None
        if name in SETTINGS and not is_default:
            value = check(name, value)
        else:  # tools set names of their own, which are not saved
            check_names([name], self._known_names(), "`TDDConfig`", cutoff=0.9)
        try:
            super().__setattr__(name, value)
        except StrictDataclassError as error:  # a field of `PreTrainedConfig`
            raise ValueError(f"`{name}` is refused: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """As in Transformers, without the attributes that a tool has set and that could not be loaded again, and
        without the name of the encoder's folder."""
        known = set(self._known_names())
        values = {name: value for name, value in super().to_dict().items() if name in known or name.startswith("_")}
        return {**values, "vision_config": _without_origin(values["vision_config"])}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in Transformers. What [`~TDDConfig.to_dict`] leaves out is named in a warning."""
        unknown = [name for name in vars(self) if name not in self._known_names() and not name.startswith("_")]
        if unknown:
            logger.warning(f"`TDDConfig` has no {', '.join(f'`{name}`' for name in unknown)}: not saved.")
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def _known_names(cls) -> list[str]:
        names = (field.name for field in fields(cls))
        return [*names, "name_or_path", "num_labels", "output_attentions", "per_layer_config", *OF_TRANSFORMERS]

    @classmethod
    def _dict_from_json_file(cls, json_file: Any) -> dict[str, Any]:
        return read_object(super()._dict_from_json_file, json_file)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "TDDConfig":
        """As in Transformers. What a file says may not name a repository with code. `dtype="auto"`, with which
        pipelines load a tokenizer's configuration, stands for the file's own."""
        if kwargs.get("dtype") == "auto":
            kwargs.pop("dtype")
        for name in ("attn_implementation", "experts_implementation"):
            refuse_locations(name, config_dict.get(name))
        return super().from_dict(config_dict, **kwargs)

    def _task_defaults(self) -> dict[str, Any]:
        """What `None` stands for, by task and method."""
        one_token, without_noise = self.max_position_embeddings == 1, self.corruption != "gaussian"
        timestep_sampling = self.timestep_sampling or ("shared" if one_token or without_noise else "per_token")
        defaults: dict[str, Any] = {
            "noise_schedule": "cosine" if one_token else "projected",
            "input_weighting": "none" if one_token or without_noise else "visibility",
            "timestep_sampling": timestep_sampling,
            "mistaken_share": 0.1 if timestep_sampling == "per_token" else 0.0,
            "label_smoothing": 0.1 if one_token and self.prediction_type != "epsilon" else 0.0,
            "loss_weighting": "alpha_bar" if one_token else "none",
        }
        if self.vocab_size is None:
            defaults |= CLASSIFIER_INFERENCE
            defaults["num_inference_steps"] = min(defaults["num_inference_steps"], self.num_timesteps)
        return defaults

    @property
    def num_categories(self) -> int:
        """`int`: K, the number of categories of a token."""
        return self.vocab_size if self.vocab_size is not None else self.num_labels

    @property
    def noise_width(self) -> int:
        """`int`: how many random numbers a noisy token takes: min(K, d) for Gaussian noise, see
        [`~diffusion_tdd.noise_factor`], K where the noise itself is predicted, 1 for masks (whether there is one), and
        2 for random tokens (whether there is one, and which)."""
        if self.corruption != "gaussian":
            return 1 if self.corruption == "mask" else 2
        return self.num_categories if self.prediction_type == "epsilon" else min(self.num_categories, self.hidden_size)

    def validate(self) -> None:
        """Checks the fields against each other, whenever a configuration is made or saved, or a model is made of it.

        Raises:
            `ValueError`: for fields that exclude each other.
        """
        self._validate_architecture()
        self._validate_diffusion()
        self._validate_training()
        self._validate_inference()

    def _validate_architecture(self) -> None:
        from transformers.activations import ACT2FN  # here, since it imports all activations

        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` must be one of {', '.join(ACT2FN)}, got {self.hidden_act!r}.")
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"`hidden_size` must be a multiple of `num_attention_heads`, got {self.hidden_size} and "
                f"{self.num_attention_heads}."
            )
        for name in ("pad_token_id", "eos_token_id"):
            if self.vocab_size is not None and getattr(self, name) is not None:
                check(name, getattr(self, name), integer(0, self.vocab_size - 1))
        for name in ENCODER_SIZES:
            size = getattr(self.vision_config, name, None)
            for side in size if isinstance(size, (list, tuple)) else (size,):
                if isinstance(side, (int, float)):
                    check(f"vision_config.{name}", side, integer(1, 2**20))
        check_encoder_sizes("vision_config", cast(PreTrainedConfig, self.vision_config).to_dict())

    def _validate_diffusion(self) -> None:
        if self.corruption != "mask" and self.num_categories < 2:
            raise ValueError(
                f"`corruption={self.corruption!r}` needs at least 2 categories, got {self.num_categories}."
            )
        if self.corruption != "gaussian":
            # There is no noise: nothing to regress, to scale, or to give each token its own amount of
            without_noise = {
                "prediction_type": "sample",
                "input_weighting": "none",
                "timestep_sampling": "shared",
                "one_hot_scale": 1,
            }
            for name, value in without_noise.items():
                if getattr(self, name) != value:
                    raise ValueError(f"`{name}={getattr(self, name)!r}` needs `corruption='gaussian'`.")

    def _validate_training(self) -> None:
        if self.timesteps_per_image > self.num_timesteps:
            raise ValueError(
                f"`timesteps_per_image` must be at most `num_timesteps`, got {self.timesteps_per_image} and "
                f"{self.num_timesteps}."
            )
        if self.max_position_embeddings == 1:
            if self.timestep_sampling == "per_token":
                raise ValueError("`timestep_sampling='per_token'` needs `max_position_embeddings` above 1, got 1.")
            if self.mistaken_share > 0:
                raise ValueError(
                    f"`mistaken_share={self.mistaken_share!r}` needs `max_position_embeddings` above 1, got 1."
                )
        if self.timestep_sampling == "per_token" and self.loss_weighting == "alpha_bar":
            raise ValueError(
                "`timestep_sampling='per_token'` needs `loss_weighting='none'`: it teaches tokens of pure noise, "
                "from which every sequence starts, and `loss_weighting='alpha_bar'` gives these the weight 0."
            )
        if self.prediction_type == "epsilon" and self.label_smoothing > 0:
            raise ValueError(f"`label_smoothing={self.label_smoothing!r}` needs `prediction_type='sample'`.")

    def _validate_inference(self) -> None:
        """A classifier's loop; a captioner's has its settings in `TDDGenerationConfig`."""
        if self.vocab_size is None:
            check_steps(self.num_timesteps, self.num_inference_steps)
            return
        given = [name for name in CLASSIFIER_INFERENCE if getattr(self, name) is not None]
        if given:
            raise ValueError(
                f"With `vocab_size` the configuration is a captioner's, whose {', '.join(f'`{n}`' for n in given)} "
                "belong in `TDDGenerationConfig` or in the call of `generate`."
            )


__all__ = ["TDDConfig"]
