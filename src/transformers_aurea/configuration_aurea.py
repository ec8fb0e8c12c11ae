# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Configuration of Aurea: two vision encoders, their fusion, and the decoder that reads it.

The defaults are the published model: SigLIP2 so400m/14 at 224 px (`vision_config`), DINOv2 giant with registers
(`spatial_vision_config`), four stages of spatial-range attention (`feature_fusion_config`) and Phi-4-mini
(`text_config`). Any decoder LM and any vision encoder that transformers knows may take a part's place.
"""

import copy
import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import logging

from .fusion_aurea import FORMER_FUSIONS, FUSIONS, AureaFusion
from .fusion_promises_aurea import make_fusion
from .name_tables_aurea import enter_name_tables
from .own_fusion_aurea import check_own_fusion, is_own_fusion, is_remote_code, load_own_fusion, save_own_fusion


logger = logging.get_logger(__name__)

# `long_factor` of microsoft/Phi-4-mini-instruct. Aurea was trained with it at every length, hence it stands for the
# short one as well.
_LONG_FACTOR = [
    *[1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898],
    *[2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424],
    *[6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252],
    *[16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23],
    *[32.6, 32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77],
]

_SIGLIP2_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "vision_use_head": False,
}

_DINOV2_GIANT = {
    "hidden_size": 1536,
    "num_hidden_layers": 40,
    "num_attention_heads": 24,
    "image_size": 518,
    "patch_size": 14,
    "use_swiglu_ffn": True,
}

_PHI4_MINI = {
    "vocab_size": 200064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 4096,
        "factor": 32.0,
        "short_factor": _LONG_FACTOR,
        "long_factor": _LONG_FACTOR,
    },
    "bos_token_id": 199999,
    "eos_token_id": 199999,
    "pad_token_id": 199999,
    "tie_word_embeddings": True,
}

# The feature consistency loss of training, see `feature_consistency_loss` in losses_aurea.py.
_CONSISTENCY_KERNEL = {"alpha": 0.5, "beta": 0.5, "gamma": 1.0, "w1": 1.0, "w2": 1.0, "shift": 0.1}

# Every folder that holds an Aurea is loadable by each of these with `trust_remote_code=True`.
_AUTO_MAP = {
    "AutoConfig": "configuration_aurea.AureaConfig",
    "AutoModel": "modeling_aurea.AureaModel",
    "AutoModelForImageTextToText": "modeling_aurea.AureaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_aurea.AureaForConditionalGeneration",
    "AutoProcessor": "processing_aurea.AureaProcessor",
    "AutoImageProcessor": "image_processing_aurea.AureaImageProcessor",
}

# Here, because `transformers serve` looks the model type up as soon as it has the configuration.
enter_name_tables()


class AureaUnfitLanguageModelError(ValueError):
    """A language model that cannot read pictures in the way that is asked for, and why."""

    def __init__(self, text_config: PreTrainedConfig, reason: str):
        self.reason = reason
        super().__init__(
            f"`text_config` is of type '{text_config.model_type}', {reason}. Choose another language model (Phi-3, "
            "Llama, Qwen2, Qwen3, Gemma, Mistral, SmolLM3, GPT-2, Mixtral, … fit)."
        )


class AureaView(NamedTuple):
    """What one encoder sees of a picture, and what it is to give.

    Args:
        index: number of its view in `pixel_values`.
        size: height and width of the view in pixels.
        grid: rows and columns of patches.
        feature_shape: the grid, or the number of tokens alone where class and register tokens are among them.
        feature_layers: indices into its `hidden_states`, whose channels are laid side by side; None for
            `last_hidden_state`.
    """

    index: int
    size: tuple[int, int]
    grid: tuple[int, int]
    feature_shape: tuple[int, ...]
    feature_layers: list[int] | None


@strict
class AureaFusionConfig(PreTrainedConfig):
    r"""
    Settings of the fusion of the two feature maps. A fusion of your own may have others beside these; of those of the
    package, others are refused.

    Args:
        fusion_type (`str`, *optional*, defaults to `"spatial_range"`):
            `"spatial_range"`, the published stack of spatial-range attention layers; `"concat"`, the encoders'
            channels side by side; `"residual"`, one added to the other; `"interleave"`, their tokens in turn;
            `"cross_attention"`, the semantic encoder asks the spatial one; `"sva"`, queries that look at windows of
            both; `"none"`, one encoder alone; or what `register_fusion` has made known. See `docs/fusions.md`.
        depth (`int`, *optional*, defaults to 4):
            Stages in each of the two stacks of `"spatial_range"` (a stage is two attention layers); attention layers
            of `"cross_attention"` and `"sva"`.
        radius (`int`, *optional*, defaults to 3):
            Radius, in patches, of the neighbourhood a patch attends to in `"spatial_range"`: `(2 * radius + 1)²`
            neighbours. The patch grid must be larger than it.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the fusion's layer norms.
        output_dim (`int`, *optional*):
            Channels of the fused tokens. By default twice the spatial encoder's; of `"none"` its encoder's, whose
            features then stay as they are.
        num_attention_heads (`int`, *optional*):
            Heads of the attention of `"cross_attention"` and `"sva"`; by default one for each 64 channels.
        query_grid (`int` or `list[int]`, *optional*):
            Side, or rows and columns, of the grid of queries of `"sva"`; by default half the semantic encoder's.
        encoder (`str`, *optional*, defaults to `"vision"`):
            The encoder of `"none"`, and the one that `"residual"` adds the other to: `"vision"` or
            `"spatial_vision"`.
        norm_features (`bool`, *optional*, defaults to `True`):
            Whether features pass a layer norm first, in `"concat"`; those of the encoder that leads, in `"residual"`
            and `"cross_attention"`.
        project_output (`bool`, *optional*, defaults to `True`):
            Whether `"concat"` ends in a linear layer; without it its tokens have the channels of both encoders.
    """

    model_type = "aurea_fusion"
    base_config_key = "feature_fusion_config"

    fusion_type: str = "spatial_range"
    depth: int = 4
    radius: int = 3
    layer_norm_eps: float = 1e-5
    output_dim: int | None = None
    num_attention_heads: int | None = None
    query_grid: int | list[int] | tuple[int, int] | None = None
    encoder: Literal["vision", "spatial_vision"] = "vision"
    norm_features: bool = True
    project_output: bool = True

    def __post_init__(self, **kwargs):
        if not _may_have_others(self.fusion_type):
            check_names(kwargs, type(self))
        super().__post_init__(**kwargs)

    @property
    def fusion_class(self) -> type[AureaFusion]:
        """The class of the fusion; ValueError if none of that name is known."""
        if self.fusion_type not in FUSIONS:
            raise ValueError(
                f"`feature_fusion_config.fusion_type` is {self.fusion_type!r}, but there are "
                f"{', '.join(map(repr, FUSIONS))}. Of your own, import the file that calls `register_fusion` first."
            )
        return FUSIONS[self.fusion_type]

    def num_heads_for(self, dim: int) -> int:
        """Attention heads over so many channels."""
        if self.num_attention_heads is not None:
            return self.num_attention_heads
        return next(heads for heads in range(max(dim // 64, 1), 0, -1) if dim % heads == 0)

    def query_grid_for(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of queries over a map of this grid."""
        if self.query_grid is None:
            return grid[0] // 2, grid[1] // 2
        return _pair(self.query_grid, "`feature_fusion_config.query_grid`")

    def validate_architecture(self):
        super().validate_architecture()
        if self.fusion_type not in FORMER_FUSIONS:
            self.fusion_class  # noqa: B018 - raises
        sizes = {
            "depth": self.depth,
            "radius": self.radius,
            "output_dim": self.output_dim,
            "num_attention_heads": self.num_attention_heads,
        }
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise ValueError(f"`feature_fusion_config.{name}` must be at least 1, got {value}.")


@strict
class AureaCompositionConfig(PreTrainedConfig):
    r"""
    Settings of the composition, by which the semantic encoder reads the spatial one layer by layer. See
    `docs/relatives.md`.

    Args:
        composition_type (`str`, *optional*, defaults to `"cross_attention"`):
            `"cross_attention"`, the semantic encoder's tokens ask, the spatial encoder's answer;
            `"gated_attention"`, likewise, each channel of the answer behind a gate; `"simple_add"`, patches are added
            to patches, for which both encoders must give one grid.
        mapping_type (`str`, *optional*, defaults to `"linear"`):
            How the spatial encoder's hidden states get the semantic encoder's width: `"linear"`; `"mlp"`, two linear
            layers; or `"attention"`, a linear layer and self-attention.
        num_composition_layers (`int`, *optional*, defaults to 4):
            Compositions, evenly over the layers of both encoders, the last after their last.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Heads of their attention, which divide the semantic encoder's width.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of their layer norms.
    """

    model_type = "aurea_composition"
    base_config_key = "composition_config"

    composition_type: Literal["cross_attention", "gated_attention", "simple_add"] = "cross_attention"
    mapping_type: Literal["linear", "mlp", "attention"] = "linear"
    num_composition_layers: int = 4
    num_attention_heads: int = 8
    layer_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs):
        check_names(kwargs, type(self))
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        super().validate_architecture()
        for name in ("num_composition_layers", "num_attention_heads"):
            if (number := vars(self)[name]) < 1:
                raise ValueError(f"`composition_config.{name}` must be at least 1, got {number}.")


@strict
class AureaConfig(PreTrainedConfig):
    r"""
    Configuration of [`AureaModel`] and [`AureaForConditionalGeneration`].

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*, defaults to SigLIP2 so400m/14 at 224 px):
            The semantic encoder, which sees view 0 of `pixel_values`.
        spatial_vision_config (`dict` or `PreTrainedConfig`, *optional*, defaults to DINOv2 giant with registers):
            The spatial encoder, which sees view 1.
        text_config (`dict` or `PreTrainedConfig`, *optional*, defaults to Phi-4-mini):
            The language model, any decoder of transformers. Whether it can read pictures is seen when it is built.
        feature_fusion_config (`dict` or [`AureaFusionConfig`], *optional*):
            How the two feature maps become one.
        composition_config (`dict` or [`AureaCompositionConfig`], *optional*):
            How the semantic encoder reads the spatial one before that, layer by layer; by default it does not.
        connector_type (`str`, *optional*, defaults to `"cross_attention"`):
            How visual tokens reach the decoder: `"cross_attention"`, through blocks woven into its layers, beside one
            placeholder per picture; `"prefix"`, in the place of the placeholders, one for each visual token; or
            `"both"`. See `docs/fusions.md`.
        prefix_mask (`str`, *optional*, defaults to `"causal"`):
            What visual tokens in the text see: `"causal"`, what stands before them; `"pictures"`, all of their own
            picture too; `"prompt"`, the whole prompt sees itself: in training what stands before the first label, in
            generation all that is given at first.
        first_position_id (`int`, *optional*, defaults to 0):
            Position of a text's first token, where `position_ids` are not given and when `generate` makes them. Of
            those that are given to `generate` it is added to each, as to those that it makes.
        vision_image_size (`int` or `list[int]`, *optional*, defaults to `vision_config.image_size`):
            Side, or height and width, in pixels of view 0.
        spatial_vision_image_size (`int` or `list[int]`, *optional*):
            Side, or height and width, in pixels of view 1; by default the size that gives both encoders the same grid
            of patches.
        vision_feature_layer (`int` or `list[int]`, *optional*):
            Which of the semantic encoder's `hidden_states` are its features, as in LLaVA: 0 is the embeddings, -1 the
            last layer before the final norm. The channels of several are laid side by side. By default
            `last_hidden_state`, after the final norm. Encoders of stages (Swin, ConvNeXt, ResNet) leave no choice.
        spatial_vision_feature_layer (`int` or `list[int]`, *optional*):
            Likewise, of the spatial encoder.
        vision_feature_select_strategy (`str`, *optional*, defaults to `"default"`):
            `"default"`, the semantic encoder's features of patches alone, as a map; `"full"`, its class and register
            tokens too, which come first, for a fusion that takes tokens without a grid: `"interleave"`,
            `"cross_attention"` or `"none"`; `"drop_first"`, all of these but the first, whatever that is.
        spatial_vision_feature_select_strategy (`str`, *optional*, defaults to `"default"`):
            Likewise, of the spatial encoder.
        encoder_dtype (`str`, *optional*, defaults to `"float32"`):
            `"float32"`, as published, whatever the model's dtype is; or `"auto"`, that of the model: encoders then
            follow `dtype` when it is loaded, and are quantised as it is.
        cross_attention_layers (`list[int]`, *optional*):
            The decoder layers before which a cross-attention block stands; the number of layers itself means a closing
            block after the last one. By default every second layer from 0 on, and the closing block (published rule).
        cross_attention_num_heads (`int`, *optional*, defaults to the text model's):
            Attention heads of a cross-attention block. Where the text model has none, or not the same in all layers,
            one for each 64 channels.
        cross_attention_num_key_value_heads (`int`, *optional*, defaults to the text model's):
            Key/value heads of a cross-attention block.
        cross_attention_head_dim (`int`, *optional*, defaults to the text model's):
            Width of a head.
        cross_attention_intermediate_size (`int`, *optional*, defaults to `int(8 / 3 * hidden_size)`):
            Width of the gated MLP of a cross-attention block.
        cross_attention_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the RMS norms of a cross-attention block.
        num_image_positions (`int`, *optional*, defaults to 0):
            How many pictures of a row cross-attention blocks can tell apart, by a learned embedding of a picture's
            number that is added to its visual tokens; those beyond share the last one. 0, as published: to the blocks,
            the pictures that a word sees are one set, and no word can tell the first from the second. Not for a
            prefix, whose places in the text tell pictures apart.
        projector_hidden_size (`int`, *optional*):
            Inner width of the projector; by default eight times the channels of the spatial encoder, or of the only
            one, which is four times the published fusion's output.
        projector_num_layers (`int`, *optional*, defaults to 2):
            Linear layers of the projector, 1 to 3: the first of two or three gives `projector_hidden_size` channels,
            the others the language model's; a single one has neither inner width nor activation.
        projector_hidden_act (`str`, *optional*, defaults to `"silu"`):
            Activation between them, a name of `transformers.activations.ACT2FN`.
        projector_bias (`bool`, *optional*, defaults to `False`):
            Whether they have a bias.
        lm_head_type (`str`, *optional*, defaults to `"own"`):
            `"own"`, the language model's head, with all that it does to the logits (scales, caps, biases, several
            layers) and its own loss; or `"linear"`, one linear layer on the decoder's output, as in LLaVA.
        image_token_id (`int`, *optional*, defaults to 200010):
            Id of the placeholder of which the text holds one per picture. A converted checkpoint has its tokenizer's.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the initial weights of everything that is not an encoder or the language model.
        tie_word_embeddings (`bool`, *optional*, defaults to the text model's):
            Whether the language modelling head shares the input embeddings' weight.
        feature_consistency_coef (`float`, *optional*, defaults to 0.0):
            Weight, in training, of the feature consistency loss: the fused map should point alike where the encoders'
            features (both, as they come out) say that neighbours belong together. With 0 it is not computed.
        feature_diversity_coef (`float`, *optional*, defaults to 0.0):
            Weight, in training, of the feature diversity loss: the fused tokens of a picture should not all point one
            way. With 0 it is not computed.
        feature_consistency_kernel (`dict`, *optional*):
            `alpha`, `beta`, `gamma`, `w1`, `w2` and `shift` of the feature consistency loss; those not given are 0.5,
            0.5, 1, 1, 1 and 0.1. Its radius is the fusion's.
        update_batch_norms (`bool`, *optional*, defaults to `False`):
            Whether batch norms of an encoder that trains (of a ResNet, say) follow the statistics of its batches. It
            takes that to train such an encoder from scratch. By default they keep the statistics they have.

    Raises:
        ValueError: if the parts do not fit: heads that do not divide, two different grids for a fusion that needs one,
            a grid not larger than the radius, positions of blocks outside the decoder; or an auxiliary loss has a
            negative weight or no such kernel. Whether the language model can read pictures is seen when it is built.
    """

    model_type = "aurea"
    keys_to_ignore_at_inference = [
        "past_key_values",
        "cache",
        "fusion_attentions",
        "image_hidden_states",
        "image_outputs",
        "auxiliary_losses",
    ]
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(AutoConfig, model_type="siglip_vision_model", init_kwargs=_SIGLIP2_SO400M),
        "spatial_vision_config": SubConfigSpec(
            AutoConfig, model_type="dinov2_with_registers", init_kwargs=_DINOV2_GIANT
        ),
        "text_config": SubConfigSpec(AutoConfig, model_type="phi3", init_kwargs=_PHI4_MINI),
        "feature_fusion_config": SubConfigSpec(AureaFusionConfig),
        "composition_config": SubConfigSpec(AureaCompositionConfig, optional=True),
    }

    vision_config: dict | PreTrainedConfig | None = None
    spatial_vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    feature_fusion_config: dict | PreTrainedConfig | None = None
    composition_config: dict | PreTrainedConfig | None = None
    connector_type: Literal["cross_attention", "prefix", "both"] = "cross_attention"
    prefix_mask: Literal["causal", "pictures", "prompt"] = "causal"
    first_position_id: int = 0
    vision_image_size: int | list[int] | tuple[int, int] | None = None
    spatial_vision_image_size: int | list[int] | tuple[int, int] | None = None
    vision_feature_layer: int | list[int] | None = None
    spatial_vision_feature_layer: int | list[int] | None = None
    vision_feature_select_strategy: Literal["default", "full", "drop_first"] = "default"
    spatial_vision_feature_select_strategy: Literal["default", "full", "drop_first"] = "default"
    encoder_dtype: Literal["float32", "auto"] = "float32"
    cross_attention_layers: list[int] | None = None
    cross_attention_num_heads: int | None = None
    cross_attention_num_key_value_heads: int | None = None
    cross_attention_head_dim: int | None = None
    cross_attention_intermediate_size: int | None = None
    cross_attention_norm_eps: float = 1e-5
    num_image_positions: int = 0
    projector_hidden_size: int | None = None
    projector_num_layers: Literal[1, 2, 3] = 2
    projector_hidden_act: str = "silu"
    projector_bias: bool = False
    lm_head_type: Literal["own", "linear"] = "own"
    image_token_id: int = 200010
    initializer_range: float = 0.02
    tie_word_embeddings: bool | None = None
    feature_consistency_coef: float | int = 0.0
    feature_diversity_coef: float | int = 0.0
    feature_consistency_kernel: dict | None = None
    update_batch_norms: bool = False

    def __post_init__(self, **kwargs):
        kwargs.setdefault("auto_map", dict(_AUTO_MAP))
        kwargs = _rename_fusion({"feature_fusion_config": self.feature_fusion_config, **kwargs})
        self.feature_fusion_config = kwargs.pop("feature_fusion_config")
        for name in kwargs:  # transformers keeps them all, which saved folders may hold
            if close := get_close_matches(name, _arguments(type(self)), n=1, cutoff=0.85):
                logger.warning_once(f"Nothing reads '{name}' of this configuration: did you mean '{close[0]}'?")
        super().__post_init__(**kwargs)
        text_config = self.text_config
        if text_config.get_text_config() is not text_config:
            raise AureaUnfitLanguageModelError(
                text_config, "a language model with more around it. Give its `text_config`"
            )
        if text_config.is_encoder_decoder:
            raise AureaUnfitLanguageModelError(text_config, "which is not a decoder language model")
        for name in ("hidden_size", "num_hidden_layers"):
            if not isinstance(optional_field(text_config, name), int):
                raise AureaUnfitLanguageModelError(text_config, f"whose configuration has no `{name}`")
        self._take_encoders()
        is_tied = bool(optional_field(text_config, "tie_word_embeddings"))
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = is_tied
        if self.tie_word_embeddings != is_tied:
            text_config = self.text_config = copy.deepcopy(text_config)  # the caller's may be a model's
            text_config.tie_word_embeddings = self.tie_word_embeddings  # the language model ties as the whole says
        if self.cross_attention_num_heads is None:
            heads = optional_field(text_config, "num_attention_heads")
            self.cross_attention_num_heads = heads if isinstance(heads, int) else max(text_config.hidden_size // 64, 1)
        heads = self.cross_attention_num_heads
        if self.cross_attention_num_key_value_heads is None:
            self.cross_attention_num_key_value_heads = optional_field(text_config, "num_key_value_heads") or heads
        if self.cross_attention_head_dim is None:
            self.cross_attention_head_dim = optional_field(text_config, "head_dim")
        if self.cross_attention_head_dim is None:
            if heads < 1 or text_config.hidden_size % heads:
                raise ValueError(
                    f"`text_config.hidden_size` ({text_config.hidden_size}) must be divisible by "
                    f"`cross_attention_num_heads` ({heads}), unless `cross_attention_head_dim` is given."
                )
            self.cross_attention_head_dim = text_config.hidden_size // heads
        if self.cross_attention_intermediate_size is None:
            self.cross_attention_intermediate_size = int(text_config.hidden_size * 4 * 2 / 3)
        if self.projector_hidden_size is None:
            self.projector_hidden_size = 8 * self.feature_sizes[-1]
        self.feature_consistency_kernel = _CONSISTENCY_KERNEL | (self.feature_consistency_kernel or {})

    def _take_encoders(self):
        """Those that the fusion needs, or the composition, which needs both; a configuration for which there is no use
        becomes None."""
        fusion = self.feature_fusion_config
        if fusion.fusion_type in FORMER_FUSIONS:
            fusion.encoder, fusion.output_dim = FORMER_FUSIONS[fusion.fusion_type], 2 * self.feature_sizes[1]
            fusion.fusion_type = "none"
            self.spatial_vision_image_size = list(self.view_sizes[1])  # which the other encoder has a say in
        named, known = self.fusion_class.encoders(self), self.encoder_configs.keys()
        needed = {*named} if isinstance(named, (tuple, list)) else set()
        if not needed or needed - known:
            raise ValueError(
                f"The fusion '{fusion.fusion_type}' ({self.fusion_class.__name__}) must name one or more of "
                f"{', '.join(known)} as its `encoders`, and names {named!r}."
            )
        if self.composition_config is None:
            for name in known - needed:
                setattr(self, name, None)
        for config in self.encoder_configs.values():
            if config.model_type == "siglip_vision_model":
                config.vision_use_head = False

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> tuple[dict, dict]:
        """Runs the code of a fusion that is not ours, if the folder is trusted: by an Auto class, of which this class
        then is remote code, or by `trust_remote_code=True` here."""
        is_trusted = kwargs.pop("trust_remote_code", None) or (is_remote_code(cls) and kwargs.get("_from_auto"))
        config_dict, unused_kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if is_trusted:
            load_own_fusion(config_dict, pretrained_model_name_or_path, **kwargs)
        return config_dict, unused_kwargs

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True):
        """The file of a fusion that is not ours is written beside the configuration, which names it."""
        self.auto_map.pop("AureaFusion", None)
        if is_own_fusion(self.fusion_class):
            self.auto_map["AureaFusion"] = save_own_fusion(self.fusion_class, Path(json_file_path).parent)
        super().to_json_file(json_file_path, use_diff)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """Of another model's dictionary transformers would make an Aurea of the published size, with a warning.

        A dictionary of version 0.1, with `fusion_config`, is read as if it said `feature_fusion_config`.
        """
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"This is the configuration of a model of type '{model_type}', not of an Aurea. To build one of "
                "it, see `AureaForConditionalGeneration.from_pretrained_parts`."
            )
        check_own_fusion(config_dict)
        config_dict, kwargs = _rename_fusion(config_dict, quietly=True), _rename_fusion(kwargs)
        # What others hang on is changed before they are made of it.
        for config_class in (AureaFusionConfig, AureaCompositionConfig):
            name = config_class.base_config_key
            saved, is_given, settings = config_dict.get(name), name in kwargs, kwargs.pop(name, {})
            if isinstance(settings, dict):
                settings = _merge(saved or {}, settings, config_class)
            if is_given or isinstance(saved, dict):
                config_dict = {**config_dict, name: settings}
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        for name in config.encoder_configs:
            if config_dict.get(name, name) is None:
                raise ValueError(
                    f"The fusion '{config.feature_fusion_config.fusion_type}' needs `{name}`, which this "
                    f"configuration is without. Give `{name}` too, or choose the fusion 'none'."
                )
        config.validate_architecture()  # as transformers does too, but before it sets what `kwargs` change
        return loaded

    @property
    def fusion_class(self) -> type[AureaFusion]:
        return self.feature_fusion_config.fusion_class

    @property
    def encoder_configs(self) -> dict[str, PreTrainedConfig]:
        """The vision encoders' configurations by their names, in the order of the views."""
        configs = {"vision_config": self.vision_config, "spatial_vision_config": self.spatial_vision_config}
        return {name: config for name, config in configs.items() if config is not None}

    @property
    def auxiliary_loss_coefs(self) -> dict[str, float]:
        """Weights of the auxiliary losses that are not 0, by the losses' names."""
        coefs = {
            "feature_consistency": self.feature_consistency_coef,
            "feature_diversity": self.feature_diversity_coef,
        }
        return {name: coef for name, coef in coefs.items() if coef}

    @property
    def feature_sizes(self) -> tuple[int, ...]:
        """Channels of each encoder's features."""
        parts = zip(self.encoder_configs.values(), self.feature_layers)
        return tuple(_feature_size(config) * (1 if layers is None else len(layers)) for config, layers in parts)

    @property
    def feature_layers(self) -> tuple[list[int] | None, ...]:
        """Indices into each encoder's `hidden_states`; None for `last_hidden_state`."""
        return tuple([layers] if isinstance(layers, int) else layers for layers in self._of_encoders("feature_layer"))

    @property
    def feature_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Rows and columns of each encoder's features, or the number of tokens alone where class tokens are kept."""
        parts = zip(self.encoder_configs.values(), self.view_sizes, self._of_encoders("feature_select_strategy"))
        return tuple(
            _grid(size, config)
            if strategy == "default"
            else (_num_tokens(config, size) - (1 if strategy == "drop_first" else 0),)
            for config, size, strategy in parts
        )

    def _of_encoders(self, setting: str) -> list:
        """The value of a setting such as `image_size` for each of `encoder_configs`."""
        return [vars(self)[name.replace("config", setting)] for name in self.encoder_configs]

    @property
    def view_sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width in pixels of each encoder's view."""
        configs = self.encoder_configs
        sizes = []
        for (name, config), given in zip(configs.items(), self._of_encoders("image_size")):
            if given is not None:
                sizes.append(_pair(given))
            elif sizes:  # the spatial encoder's grid is the semantic one's
                grid, stride = _grid(sizes[0], configs["vision_config"]), _stride(config)
                sizes.append((grid[0] * stride[0], grid[1] * stride[1]))
            elif (size := optional_field(config, "image_size")) is not None:
                sizes.append(_pair(size))
            else:
                raise ValueError(
                    f"`{name}` ({config.model_type}) has no `image_size`: give "
                    f"`{name.replace('config', 'image_size')}`."
                )
        return tuple(sizes)

    @property
    def grid_sizes(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of patches of each encoder's view."""
        return tuple(_grid(size, config) for size, config in zip(self.view_sizes, self.encoder_configs.values()))

    @property
    def views(self) -> dict[str, AureaView]:
        """What each encoder sees of a picture, by the names of `encoder_configs`."""
        index = {"vision_config": 0, "spatial_vision_config": 1}
        views = zip(self.encoder_configs, self.view_sizes, self.grid_sizes, self.feature_shapes, self.feature_layers)
        return {name: AureaView(index[name], *view) for name, *view in views}

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width in pixels that all views fit in."""
        height, width = (max(sides) for sides in zip(*self.view_sizes))
        return height, width

    @property
    def tokens_per_image(self) -> int:
        """Visual tokens of one picture, of which the fusion has the say."""
        with torch.device("meta"):
            return make_fusion(self).num_tokens

    @property
    def fills_placeholders(self) -> bool:
        """Whether visual tokens take the place of placeholders in the text."""
        return self.connector_type in ("prefix", "both")

    @property
    def placeholders_per_image(self) -> int:
        """Tokens of the id `image_token_id` for one picture in the text: the processor's `image_seq_length`."""
        return self.tokens_per_image if self.fills_placeholders else 1

    @property
    def cross_attention_positions(self) -> list[int]:
        """`cross_attention_layers`, or the published rule: before layers 0, 2, 4, … and after the last."""
        num_layers = self.text_config.num_hidden_layers
        if self.cross_attention_layers is not None:
            return sorted(self.cross_attention_layers)
        return [*range(0, num_layers, 2), num_layers]

    def validate_architecture(self):
        super().validate_architecture()
        self._validate_encoders()
        sizes = {
            "cross_attention_head_dim": self.cross_attention_head_dim,
            "cross_attention_intermediate_size": self.cross_attention_intermediate_size,
            "projector_hidden_size": self.projector_hidden_size,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")
        for name in ("image_token_id", "first_position_id", "num_image_positions"):
            if (number := vars(self)[name]) < 0:
                raise ValueError(f"`{name}` must be 0 or greater, got {number}.")
        if self.projector_hidden_act not in ACT2FN:
            raise ValueError(
                f"`projector_hidden_act` is {self.projector_hidden_act!r}, but transformers knows {', '.join(ACT2FN)}."
            )
        self._validate_heads()
        self._validate_views()
        self._validate_composition()
        self._validate_connector()
        self._validate_cross_attention_layers()
        self._validate_auxiliary_losses()

    @property
    def composition_positions(self) -> list[tuple[int, int]]:
        """After which layer of the semantic encoder each composition stands, and of the spatial one it reads: evenly,
        the last after the last layer whose features the fusion gets."""
        depths = [config.num_hidden_layers for config in self.encoder_configs.values()]
        layers, number = self.feature_layers[0], self.composition_config.num_composition_layers
        if layers is not None:
            depths[0] = max(layer % (depths[0] + 1) for layer in layers)
        return [tuple(idx * depth // number for depth in depths) for idx in range(1, number + 1)]

    def _validate_encoders(self):
        fusion, known = self.feature_fusion_config.fusion_type, [*self.encoder_configs]
        needed = {*self.fusion_class.encoders(self)}
        if self.composition_config is not None:
            needed |= {"vision_config", "spatial_vision_config"}
        if needed != {*known}:
            raise ValueError(
                f"The fusion '{fusion}' takes {sorted(needed)}, but the configuration has {known}. Make a new one of "
                "these settings: encoders come and go when it is made."
            )
        for name, config in self.encoder_configs.items():
            if config.model_type == "siglip2_vision_model":
                raise ValueError(
                    f"`{name}` is siglip2_vision_model, the variant that takes flattened patches (NaFlex). Use "
                    "siglip_vision_model, which carries SigLIP2 at a fixed resolution."
                )
        for name, config, layers in zip(self.encoder_configs, self.encoder_configs.values(), self.feature_layers):
            if layers is not None:
                _validate_layers(name, config, layers)
        for name, strategy in zip(self.encoder_configs, self._of_encoders("feature_select_strategy")):
            if strategy != "default":
                self._validate_keeps_all_tokens(name, strategy)

    def _validate_keeps_all_tokens(self, name: str, strategy: str):
        setting = f'`{name.replace("config", "feature_select_strategy")}="{strategy}"`'
        config, fusion = self.encoder_configs[name], self.feature_fusion_config.fusion_type
        if _is_hierarchical(config):
            raise ValueError(
                f"{setting} keeps class tokens, but `{name}` is of type '{config.model_type}', an encoder of stages, "
                "which has none. Leave it out."
            )
        if self.fusion_class.needs_map:
            able = [repr(name) for name, fusion_class in FUSIONS.items() if not fusion_class.needs_map]
            raise ValueError(
                f"{setting} gives tokens without a grid, but the fusion '{fusion}' needs a map. Leave it out, or "
                f"choose one of the fusions {', '.join(able)}."
            )
        if self.feature_consistency_coef:
            raise ValueError(
                f"{setting} gives tokens without a grid, but the feature consistency loss needs a map. Set "
                f"`feature_consistency_coef` ({self.feature_consistency_coef}) to 0, or leave it out."
            )

    def _validate_heads(self):
        for name, config in {"text_config": self.text_config, **self.encoder_configs}.items():
            heads, key_value_heads = (
                optional_field(config, key) for key in ("num_attention_heads", "num_key_value_heads")
            )
            if not isinstance(heads, int):
                continue  # stages of their own, or layers that differ
            if heads < 1 or (optional_field(config, "head_dim") is None and config.hidden_size % heads):
                raise ValueError(
                    f"`{name}.hidden_size` ({config.hidden_size}) must be divisible by its `num_attention_heads` "
                    f"({heads})."
                )
            if key_value_heads is not None and (key_value_heads < 1 or heads % key_value_heads):
                raise ValueError(
                    f"`{name}.num_attention_heads` ({heads}) must be a multiple of its `num_key_value_heads` "
                    f"({key_value_heads})."
                )
        heads, key_value_heads = self.cross_attention_num_heads, self.cross_attention_num_key_value_heads
        if heads < 1 or key_value_heads < 1 or heads % key_value_heads:
            raise ValueError(
                f"`cross_attention_num_heads` ({heads}) must be a multiple of `cross_attention_num_key_value_heads` "
                f"({key_value_heads})."
            )

    def _validate_views(self):
        for view, (name, config) in zip(self.view_sizes, self.encoder_configs.items()):
            stride = _stride(config)
            if any(side < step or side % step for side, step in zip(view, stride)):
                raise ValueError(f"The view of `{name}` is {view} pixels, not a multiple of its patches of {stride}.")
        self.fusion_class.validate_config(self)

    def _validate_composition(self):
        settings = self.composition_config
        if settings is None:
            return
        settings.validate_architecture()
        fusion = self.feature_fusion_config.fusion_type
        if "vision_config" not in self.fusion_class.encoders(self):
            raise ValueError(
                f"`composition_config` changes what the semantic encoder sees, but the fusion '{fusion}' reads the "
                "spatial encoder alone. Choose another fusion, or leave `composition_config` out."
            )
        for name, config in self.encoder_configs.items():
            depth = optional_field(config, "num_hidden_layers")
            if _is_hierarchical(config) or depth is None:
                raise ValueError(
                    f"`composition_config` composes layers of one width, but `{name}` is of type "
                    f"'{config.model_type}', an encoder of stages. Choose another, or leave `composition_config` out."
                )
        for name, depth in zip(self.encoder_configs, self.composition_positions[-1]):
            if settings.num_composition_layers > depth:
                remedy = f"Set it to {depth} or less" if depth else "Let `vision_feature_layer` name a later one"
                raise ValueError(
                    f"`composition_config.num_composition_layers` ({settings.num_composition_layers}) must not be "
                    f"more than the layers of `{name}` whose features are read ({depth}). {remedy}."
                )
        dim, heads = self.vision_config.hidden_size, settings.num_attention_heads
        if dim % heads:
            raise ValueError(
                f"`composition_config.num_attention_heads` ({heads}) must divide `vision_config.hidden_size` ({dim})."
            )
        if settings.composition_type == "simple_add" and len({*self.grid_sizes}) > 1:
            raise ValueError(
                f"The composition 'simple_add' needs one grid, but the semantic encoder gives {self.grid_sizes[0]} "
                f"patches and the spatial encoder {self.grid_sizes[1]}. Choose `vision_image_size` and "
                "`spatial_vision_image_size` so that they agree, or another `composition_type`."
            )

    def _validate_connector(self):
        if self.prefix_mask != "causal" and self.connector_type == "cross_attention":
            raise ValueError(
                f"`prefix_mask` is {self.prefix_mask!r}, but with `connector_type={self.connector_type!r}` no visual "
                'tokens stand in the text. Leave it out, or choose the connector "prefix" or "both".'
            )

    def _validate_cross_attention_layers(self):
        positions, num_layers = self.cross_attention_positions, self.text_config.num_hidden_layers
        outside = [position for position in positions if not 0 <= position <= num_layers]
        if outside or not positions or len(set(positions)) != len(positions):
            raise ValueError(
                f"`cross_attention_layers` must hold distinct positions from 0 to {num_layers} (the number of decoder "
                f"layers, meaning after the last one), got {self.cross_attention_layers}."
            )

    def _validate_auxiliary_losses(self):
        radius, grid = self.feature_fusion_config.radius, self.grid_sizes[0]
        if self.feature_consistency_coef and min(grid) <= radius:
            raise ValueError(
                f"For the feature consistency loss, the grid of {grid} patches must be larger than "
                f"`feature_fusion_config.radius` ({radius}) on both sides. Use larger pictures or a smaller radius."
            )
        if self.feature_consistency_coef and not self.fusion_class.gives_map:
            raise ValueError(
                f"The feature consistency loss needs a fused map, but the fusion "
                f"'{self.feature_fusion_config.fusion_type}' gives tokens alone. Set `feature_consistency_coef` to 0, "
                "or choose a fusion that declares `gives_map`."
            )
        for name, coef in self.auxiliary_loss_coefs.items():
            if not 0 <= coef < float("inf"):
                raise ValueError(f"`{name}_coef` must be a number from 0 on, got {coef}.")
        kernel = self.feature_consistency_kernel
        unknown = sorted(kernel.keys() - _CONSISTENCY_KERNEL.keys())
        if unknown:
            raise ValueError(
                f"`feature_consistency_kernel` has {', '.join(_CONSISTENCY_KERNEL)}; it knows nothing of {unknown}."
            )
        for name in ("alpha", "beta", "gamma"):
            if not kernel[name] > 0:
                raise ValueError(f"`feature_consistency_kernel.{name}` must be positive, got {kernel[name]}.")


def _rename_fusion(settings: dict, quietly: bool = False) -> dict:
    """Settings that may call the fusion `fusion_config`, as version 0.1 did, under the name it has now.

    transformers has a `fusion_config` of its own, which `from_pretrained` keeps in the configuration: kinds of modules
    to fuse, each with a `bool` or a `dict`. Such a one stays what it is.
    """
    fusion = settings.get("fusion_config")
    is_of_transformers = isinstance(fusion, dict) and all(isinstance(value, (bool, dict)) for value in fusion.values())
    if "fusion_config" not in settings or is_of_transformers:
        return settings
    if settings.get("feature_fusion_config") is not None:
        raise ValueError("`fusion_config` is the former name of `feature_fusion_config`: give one of the two.")
    if not quietly:
        message = "`fusion_config` is deprecated and will be removed: the argument is `feature_fusion_config` now."
        warnings.warn(message, FutureWarning, stacklevel=2)
    settings = {**settings, "feature_fusion_config": fusion}
    del settings["fusion_config"]
    return settings


def _arguments(config_class: type[PreTrainedConfig]) -> set[str]:
    """Those of its own, which transformers has not for every configuration."""
    return {field.name for field in fields(config_class)} - {field.name for field in fields(PreTrainedConfig)}


def unknown_names(names: Iterable[str], config_class: type[PreTrainedConfig]) -> list[str]:
    """Names among the settings of a configuration that neither it nor transformers reads."""
    known = dir(config_class)  # fields, and what else every configuration has
    return [name for name in names if name not in known and not name.startswith("_")]


def check_names(names: Iterable[str], config_class: type[PreTrainedConfig]) -> None:
    """ValueError if one of the names is no argument of a configuration, which transformers would keep unread."""
    arguments = sorted(_arguments(config_class))
    for name in unknown_names(names, config_class):
        close = get_close_matches(name, arguments, n=1)
        raise ValueError(
            f"'{name}' is no argument of {config_class.__name__}"
            + (f"; did you mean '{close[0]}'?" if close else f"; there are {', '.join(arguments)}.")
        )


def _may_have_others(fusion_type: str) -> bool:
    """Whether a fusion's settings are its own affair: it is none of ours, or none that is known."""
    return fusion_type not in FUSIONS or is_own_fusion(FUSIONS[fusion_type])


def _merge(saved: dict, given: dict, config_class: type[PreTrainedConfig]) -> dict:
    """Settings of a folder, and what the caller changes of them.

    Names that nothing reads are left out of the folder's, lest it cannot be loaded: earlier versions took any, and
    a fusion of one's own may have others than the one that takes its place.
    """
    settings = saved | given
    if config_class is AureaFusionConfig and _may_have_others(settings.get("fusion_type", config_class.fusion_type)):
        return settings
    strays = [name for name in unknown_names(saved, config_class) if name not in given]
    if strays:
        logger.warning_once(f"Nothing reads {strays} of `{config_class.base_config_key}`: left out.")
    return {name: value for name, value in settings.items() if name not in strays}


def optional_field(config: PreTrainedConfig, name: str):
    """A field that a part may lack, or have only per layer: then None."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers' answer where layers differ
        return None


def _pair(size: int | list[int] | tuple[int, int], name: str = "An image size") -> tuple[int, int]:
    if not isinstance(size, int) and len(size) != 2:
        raise ValueError(f"{name} is one side, or height and width; got {size}.")
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _is_hierarchical(config: PreTrainedConfig) -> bool:
    """Encoders of stages (Swin, ConvNeXt, ResNet) halve the resolution from each stage to the next."""
    return optional_field(config, "depths") is not None


def _stride(config: PreTrainedConfig) -> tuple[int, int]:
    """Pixels per patch, vertically and horizontally, of an encoder's last feature map."""
    rows, columns = _pair(optional_field(config, "patch_size") or 4)
    shrink = 2 ** (len(config.depths) - 1) if _is_hierarchical(config) else 1
    return rows * shrink, columns * shrink


def _grid(size: tuple[int, int], config: PreTrainedConfig) -> tuple[int, int]:
    stride = _stride(config)
    return size[0] // stride[0], size[1] // stride[1]


def _num_tokens(config: PreTrainedConfig, size: tuple[int, int]) -> int:
    """Tokens that an encoder makes of a view of this size, class and register tokens among them.

    Nothing that encoders declare in common says how many those are: one of a single layer, without weights, is asked,
    at the size that it was trained with, where it interpolates nothing.
    """
    trained_size = _pair(optional_field(config, "image_size") or size)
    config = copy.deepcopy(config)
    config.num_hidden_layers = 1
    with torch.device("meta"):
        encoder = AutoModel.from_config(config, attn_implementation="eager")
        tokens = encoder(torch.empty(1, 3, *trained_size, dtype=encoder.dtype)).last_hidden_state
    return tokens.shape[1] - math.prod(_grid(trained_size, config)) + math.prod(_grid(size, config))


def _validate_layers(name: str, config: PreTrainedConfig, layers: list[int]):
    setting = f"`{name.replace('config', 'feature_layer')}`"
    num_layers = optional_field(config, "num_hidden_layers")
    if _is_hierarchical(config) or num_layers is None:
        raise ValueError(
            f"{setting} is {layers}, but `{name}` is of type '{config.model_type}', whose stages differ in resolution "
            "and channels: its last is its features. Leave it out."
        )
    if not layers or not all(-num_layers - 1 <= layer <= num_layers for layer in layers):
        raise ValueError(
            f"{setting} is {layers}, but `{name}` has {num_layers + 1} hidden states: give one or more from "
            f"{-num_layers - 1} to {num_layers}, or None for the output of its final norm."
        )


def _feature_size(config: PreTrainedConfig) -> int:
    sizes = optional_field(config, "hidden_sizes")  # of stages
    size = sizes[-1] if sizes else optional_field(config, "hidden_size")
    if size is None:
        raise ValueError(
            f"An encoder of type '{config.model_type}' says neither by `hidden_size` nor by `hidden_sizes` how wide "
            "its features are. Choose another (SigLIP, CLIP, DINOv2, DINOv3, ViT, Swin, ConvNeXt, ResNet, … do)."
        )
    return size


__all__ = ["AureaCompositionConfig", "AureaConfig", "AureaFusionConfig"]
