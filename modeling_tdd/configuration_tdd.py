# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""TDD model configuration."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


NOISE_SCHEDULES = ("linear", "cosine", "calibrated", "projected")
CORRUPTIONS = ("gaussian", "mask")
PREDICTION_TYPES = ("sample", "epsilon")
LOSS_WEIGHTINGS = ("alpha_bar", "none")
INPUT_WEIGHTINGS = ("none", "visibility")
TIMESTEP_SAMPLINGS = ("shared", "per_token")
POOLINGS = ("cls", "mean", None)
GUIDANCE_SCHEDULES = ("constant", "linear", "cosine")
SAMPLING_STRATEGIES = ("argmax", "multinomial")


def check_choice(name: str, value: Any, allowed: tuple) -> None:
    """Raises a `ValueError` that names the argument, what was given and what is allowed."""
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def check_range(name: str, value: float, low: float, high: float = float("inf"), include_high: bool = True) -> None:
    """Raises a `ValueError` unless `low <= value <= high` (`< high` without `include_high`)."""
    inside = low <= value and (value <= high if include_high else value < high)
    if not inside:
        allowed = f"at least {low}" if high == float("inf") else f"in [{low}, {high}{']' if include_high else ')'}"
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}.")


@strict
class TDDConfig(PreTrainedConfig):
    r"""
    Configuration of [`TDDModel`], [`TDDForImageClassification`] and their kin: in-situ Tweedie Discrete Diffusion
    (arXiv 2510.01047). With the defaults and 1,000 labels it is the paper's 111 M-parameter ViT-B/16 classifier.

    Where the paper gives no number the default is our choice, marked (ours).

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*, defaults to a ViT-B/16 `ViTConfig`):
            The image encoder: any vision model of Transformers (ViT, DINOv2, SigLIP, ...) or a `TimmWrapperConfig`.
        vocab_size (`int`, *optional*):
            Number of categories K of a token. `None` stands for `num_labels`: the token is a class label.
        max_position_embeddings (`int`, *optional*, defaults to 1):
            Number of tokens N that are diffused together: 1 for classification.
        hidden_size (`int`, *optional*, defaults to 768):
            Width d of the denoiser.
        num_hidden_layers (`int`, *optional*, defaults to 3):
            Number of the denoiser's Transformer layers; with 3 it has the paper's 24 M parameters (ours).
        num_attention_heads (`int`, *optional*, defaults to 12):
            Number of attention heads of each denoiser layer.
        intermediate_size (`int`, *optional*, defaults to 3072):
            Width of each denoiser layer's feed-forward network.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the feed-forward networks and of the connector.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout after each attention and feed-forward block of the denoiser.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout on the denoiser's attention weights.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of the denoiser's layer norms.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the initial weights.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the projection of the noisy one-hot vectors and the output projection share one matrix.
        pooling (`str`, *optional*, defaults to `"cls"`):
            How the encoder's tokens become the condition c (Section 3.3): `"cls"`, `"mean"` (of the patch tokens), or
            `None` for all tokens.
        num_timesteps (`int`, *optional*, defaults to 1000):
            Number of diffusion timesteps T (ours).
        noise_schedule (`str`, *optional*, defaults to `"projected"`):
            `"linear"`, `"cosine"`, `"calibrated"` or `"projected"`; see [`~diffusion_tdd.alpha_bar_schedule`] (ours).
        corruption (`str`, *optional*, defaults to `"gaussian"`):
            `"gaussian"` is TDD; `"mask"` is the paper's rival MDD, masked discrete diffusion. For one token MDD is
            a linear head on the encoder's features (Section 4.1), and the model has no denoiser.
        prediction_type (`str`, *optional*, defaults to `"sample"`):
            `"sample"`: cross-entropy on y_0 (Section 3.2). `"epsilon"`: mean squared error on the noise, the ablation
            of Table 2 ("w/ regression loss").
        loss_weighting (`str`, *optional*, defaults to `"alpha_bar"`):
            `"alpha_bar"` weights the loss by the timestep-conditioned coefficient of Section 3.2, `"none"` does not.
            With many categories `alpha_bar` of the `"projected"` schedule is near 1 but for the last timesteps.
        input_weighting (`str`, *optional*, defaults to `"visibility"`):
            `"none"`, as in the paper: the denoiser reads y_t W as it is. `"visibility"` scales each noisy token by its
            share of the variance of y_t W, see [`~diffusion_tdd.visibility`] (ours; docs/decisions.md, 11).
        one_hot_scale (`float`, *optional*, defaults to 1.0):
            Lambda of the paper's lambda-hot labels (Section 3.2), in (0, 1].
        condition_dropout (`float`, *optional*, defaults to 0.1):
            Probability that an image's condition is replaced by the learned null condition in training, for
            classifier-free guidance (ours).
        timesteps_per_image (`int`, *optional*, defaults to 4):
            K of the K-fold feature reuse of Section 3.3: noisy labels drawn for each encoded image (ours).
        timestep_sampling (`str`, *optional*, defaults to `"per_token"`):
            Timesteps of a sequence's tokens in training, with Gaussian noise: `"shared"` by all, as in the paper, or
            `"per_token"`, see [`~diffusion_tdd.token_timesteps`]. For one token there is no difference.
        mistaken_share (`float`, *optional*):
            Share of a sequence's tokens that training shows wrong, see [`~diffusion_tdd.with_mistakes`]. `None` stands
            for 0.1 with Gaussian noise and timesteps `"per_token"`, and for 0 otherwise, as in the literature (ours).
        label_smoothing (`float`, *optional*, defaults to 0.0):
            Label smoothing of the training loss; the paper's recipe uses 0.1.
        freeze_encoder (`bool`, *optional*, defaults to `False`):
            Whether the encoder stays as it is: without gradients, and in eval mode always.
        pad_token_id (`int`, *optional*):
            Captioning: the token that fills a caption's places after its end. It is predicted like any other.
        eos_token_id (`int`, *optional*):
            Captioning: the token that ends a caption.
        pad_loss_weight (`float`, *optional*, defaults to 0.1):
            Captioning: weight of padding in the loss, against 1 for the caption's tokens and its end (ours).
        num_inference_steps (`int`, *optional*, defaults to 10):
            Denoising steps of a classification in eval mode.
        guidance_scale (`float`, *optional*, defaults to 1.0):
            Classifier-free guidance (equation 1) of a classification in eval mode; 1.0 is none and costs nothing.
        guidance_schedule (`str`, *optional*, defaults to `"constant"`):
            s(t) of Algorithm 1: `"constant"`, or a `"linear"` or `"cosine"` rise from 1 to `guidance_scale` (ours).
        sampling_strategy (`str`, *optional*, defaults to `"argmax"`):
            The "to one" operation of a classification's loop (appendix A.2): `"argmax"` or `"multinomial"`.
        num_noise_samples (`int`, *optional*, defaults to 1):
            Draws of the noise whose predicted probabilities a classification averages.

    Raises:
        `ValueError` or `huggingface_hub.errors.StrictDataclassFieldValidationError`: for a value out of its range.
            The message names the field, the value and what is allowed.

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

    # Image encoder
    vision_config: dict[str, Any] | PreTrainedConfig | None = None

    # Denoiser
    vocab_size: int | None = None
    max_position_embeddings: int = 1
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
    pooling: str | None = "cls"

    # Diffusion
    num_timesteps: int = 1000
    noise_schedule: str = "projected"
    corruption: str = "gaussian"
    prediction_type: str = "sample"
    loss_weighting: str = "alpha_bar"
    input_weighting: str = "visibility"
    one_hot_scale: float | int = 1.0
    condition_dropout: float | int = 0.1
    timesteps_per_image: int = 4
    timestep_sampling: str = "per_token"
    mistaken_share: float | int | None = None
    label_smoothing: float | int = 0.0
    freeze_encoder: bool = False

    # Captions
    pad_token_id: int | None = None
    eos_token_id: int | None = None
    pad_loss_weight: float | int = 0.1

    # Classification in eval mode
    num_inference_steps: int = 10
    guidance_scale: float | int = 1.0
    guidance_schedule: str = "constant"
    sampling_strategy: str = "argmax"
    num_noise_samples: int = 1

    @property
    def num_categories(self) -> int:
        """`int`: K, the number of categories of a token."""
        return self.vocab_size if self.vocab_size is not None else self.num_labels

    @property
    def has_token_timesteps(self) -> bool:
        """`bool`: whether training gives each token of a sequence a timestep of its own."""
        return self.corruption == "gaussian" and self.timestep_sampling == "per_token"

    @property
    def training_mistakes(self) -> float:
        """`float`: `mistaken_share`, or what its `None` stands for (docs/decisions.md, 23)."""
        if self.mistaken_share is not None:
            return self.mistaken_share
        return 0.1 if self.has_token_timesteps else 0.0

    def validate_architecture(self):
        """Part of `@strict`: checks the denoiser's size whenever a configuration is made or saved."""
        if self.vocab_size is not None:
            check_range("vocab_size", self.vocab_size, 1)
        check_range("num_labels", self.num_labels, 1)
        for name in (
            "max_position_embeddings",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
        ):
            check_range(name, getattr(self, name), 1)
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"`hidden_size` must be a multiple of `num_attention_heads`, got {self.hidden_size} and "
                f"{self.num_attention_heads}."
            )
        check_range("hidden_dropout_prob", self.hidden_dropout_prob, 0, 1, include_high=False)
        check_range("attention_probs_dropout_prob", self.attention_probs_dropout_prob, 0, 1, include_high=False)
        check_choice("pooling", self.pooling, POOLINGS)

    def validate_diffusion(self):
        """Part of `@strict`: checks the diffusion process and its training."""
        check_range("num_timesteps", self.num_timesteps, 1)
        # A label is one token: there is no regression, and no set of labels
        check_choice("problem_type", self.problem_type, (None, "single_label_classification"))
        check_choice("noise_schedule", self.noise_schedule, NOISE_SCHEDULES)
        check_choice("corruption", self.corruption, CORRUPTIONS)
        check_choice("prediction_type", self.prediction_type, PREDICTION_TYPES)
        check_choice("loss_weighting", self.loss_weighting, LOSS_WEIGHTINGS)
        check_choice("input_weighting", self.input_weighting, INPUT_WEIGHTINGS)
        check_choice("timestep_sampling", self.timestep_sampling, TIMESTEP_SAMPLINGS)
        if self.mistaken_share is not None:
            check_range("mistaken_share", self.mistaken_share, 0, 1, include_high=False)
        if not 0 < self.one_hot_scale <= 1:
            raise ValueError(f"`one_hot_scale` must be in (0, 1], got {self.one_hot_scale!r}.")
        check_range("condition_dropout", self.condition_dropout, 0, 1)
        if self.corruption == "gaussian" and self.num_categories < 2:
            raise ValueError(f"`corruption='gaussian'` needs at least 2 categories, got {self.num_categories}.")
        check_range("timesteps_per_image", self.timesteps_per_image, 1, self.num_timesteps)
        check_range("label_smoothing", self.label_smoothing, 0, 1, include_high=False)
        check_range("pad_loss_weight", self.pad_loss_weight, 0, 1)
        if self.corruption == "mask" and self.prediction_type == "epsilon":
            raise ValueError(
                "`prediction_type='epsilon'` needs `corruption='gaussian'`: masks are no noise to regress."
            )

    def validate_inference(self):
        """Part of `@strict`: checks the defaults of the classifier's loop."""
        check_range("num_inference_steps", self.num_inference_steps, 1, self.num_timesteps)
        check_range("guidance_scale", self.guidance_scale, 1)
        check_choice("guidance_schedule", self.guidance_schedule, GUIDANCE_SCHEDULES)
        check_choice("sampling_strategy", self.sampling_strategy, SAMPLING_STRATEGIES)
        check_range("num_noise_samples", self.num_noise_samples, 1)


__all__ = ["TDDConfig"]
