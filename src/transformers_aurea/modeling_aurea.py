# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Aurea: two vision encoders, one fusion, and a decoder that reads the result through cross-attention.

    pixel_values (images, 2, 3, H, W)
      ├─ view 0 ─ vision_model          (images, N, C₀)  semantics, SigLIP2 ─────┐
      └─ view 1 ─ spatial_vision_model  (images, N, C₁)  spatial detail, DINOv2 ─┴─ fusion  (images, N, 2·C₁)
                                                                                      │
    input_ids (batch, T)                                          multi_modal_projector  (images, N, C)
      └─ language_model, cross-attention blocks between its layers ───────────────────┘
           └─ causal_lm, the language model's own head  (batch, T, vocabulary)

What is special: the language model is any decoder of transformers. Its layers get a subclass of their own class that
runs a cross-attention block first (see `cross_attention_aurea`). The blocks' keys and values live once, un-repeated,
inside the cache, whatever cache that is. Without a picture the blocks are not run at all: text alone gives the
language model's own logits, bit for bit, for what it does besides its decoder is done by its own code (see
`language_model_aurea`).
"""

import copy
import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    MODEL_MAPPING,
    AutoModel,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    ModelOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_tracing, logging, torch_compilable_check

from .configuration_aurea import AureaConfig, optional_field
from .cross_attention_aurea import (
    AureaCrossAttentionBlock,
    AureaVisualStatesCacheMixin,
    AureaWovenDecoderLayerMixin,
    decoder_layers,
    holds_visual_states,
    move_visual_states,
    weave_cache,
    woven_class,
)
from .fusion_aurea import FUSIONS, AureaSpatialRangeAttention
from .hub_kernels_aurea import AureaHubKernelsMixin
from .language_model_aurea import (
    carries_cross_attention,
    decoder_of,
    give_causal_lm,
    hand_over_head,
    make_causal_lm,
    watched_layers,
)
from .losses_aurea import feature_consistency_loss, feature_diversity_loss, share_of_batch
from .parts_aurea import Part, model_from_parts, pooling_settings
from .versions_aurea import CACHE_NAME, names_untested_version, one_cache


if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    FSDP_CLASSES = (FSDPModule, FullyShardedDataParallel)
else:
    FSDP_CLASSES = ()

logger = logging.get_logger(__name__)


@dataclass
class AureaImageFeaturesOutput(BaseModelOutputWithPooling):
    r"""
    Features of pictures, one row per picture.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(num_images, sequence_length, hidden_size)`):
            Output of the semantic encoder.
        pooler_output (`torch.FloatTensor` of shape `(num_images, num_patches, text_hidden_size)`):
            Fused and projected features, what the cross-attention blocks read.
        spatial_last_hidden_state (`torch.FloatTensor` of shape `(num_images, sequence_length, spatial_hidden_size)`):
            Output of the spatial encoder.
        spatial_hidden_states, spatial_attentions (`tuple(torch.FloatTensor)`, *optional*):
            Those of the spatial encoder, on request, as `hidden_states` and `attentions` are the semantic encoder's.
        auxiliary_losses (`dict[str, torch.FloatTensor]`, *optional*, in training if the configuration has them):
            `(num_images,)` each, by name: `"feature_consistency"` and `"feature_diversity"`, not weighted.
    """

    spatial_last_hidden_state: torch.FloatTensor | None = None
    spatial_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    spatial_attentions: tuple[torch.FloatTensor, ...] | None = None
    auxiliary_losses: dict[str, torch.FloatTensor] | None = None


@dataclass
class AureaModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    The cache is called as in the installed transformers: `past_key_values`, or `cache` from 5.24 on.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
            Hidden states at the output of the decoder.
        past_key_values or cache (`Cache`, *optional*):
            The decoder's keys and values and, once a picture was seen, those of the cross-attention blocks.
        hidden_states, attentions (`tuple(torch.FloatTensor)`, *optional*):
            The decoder's, one per layer; a layer's hidden state is the one after its cross-attention block and itself.
        cross_attentions (`tuple(torch.FloatTensor)`, *optional*):
            One `(batch_size, num_heads, sequence_length, num_visual_tokens)` per cross-attention block.
        image_hidden_states (`torch.FloatTensor` of shape `(num_images, num_patches, hidden_size)`, *optional*):
            The projected features of the pictures given in this call.
        image_outputs ([`AureaImageFeaturesOutput`], *optional*):
            All that the encoders, fusion and projector made of these pictures.
        auxiliary_losses (`dict[str, torch.FloatTensor]`, *optional*):
            See [`AureaImageFeaturesOutput`].
        decoder_output (`ModelOutput`, *optional*, with `return_decoder_output=True`):
            The decoder's own output, with all that it has in it; the language model's head reads it.
    """

    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: torch.FloatTensor | None = None
    image_outputs: AureaImageFeaturesOutput | None = None
    auxiliary_losses: dict[str, torch.FloatTensor] | None = None
    decoder_output: ModelOutput | None = None


@dataclass
class AureaCausalLMOutputWithPast(CausalLMOutputWithPast):
    r"""
    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `labels` is given):
            The language model's own loss of the next token and, in training, the weighted auxiliary losses.
        logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`):
            Scores of the language modelling head before the softmax.
        past_key_values or cache, hidden_states, attentions, cross_attentions, image_hidden_states, image_outputs:
            See [`AureaModelOutputWithPast`].
        auxiliary_losses (`dict[str, torch.FloatTensor]`, *optional*, in training if the configuration has them):
            Means over the pictures of this call, not weighted and without gradient, to be logged.
        aux_loss, router_logits (*optional*):
            As the language model gives them, if its layers route tokens to experts.
    """

    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: torch.FloatTensor | None = None
    image_outputs: AureaImageFeaturesOutput | None = None
    auxiliary_losses: dict[str, torch.FloatTensor] | None = None
    aux_loss: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None


class AureaMultiModalProjector(nn.Module):
    """From the fusion's channels to the language model's."""

    def __init__(self, config: AureaConfig, fused_size: int):
        super().__init__()
        self.linear_1 = nn.Linear(fused_size, config.projector_hidden_size, bias=False)
        self.act = nn.SiLU()
        self.linear_2 = nn.Linear(config.projector_hidden_size, config.text_config.hidden_size, bias=False)

    def forward(self, fused_features: torch.Tensor) -> torch.Tensor:
        # As a matrix: of a batch of tokens an 8-bit layer of bitsandbytes gives a view that autograd lets nobody write
        # to, and the 8-bit layers that read it, here the blocks' `k_proj` and `v_proj`, do so on a CPU.
        projected = self.linear_2(self.act(self.linear_1(fused_features.flatten(0, 1))))
        return projected.unflatten(0, fused_features.shape[:2])


def _image_counts(
    image_tokens: torch.Tensor, num_images: int, images_seen: torch.Tensor | None = None
) -> torch.Tensor:
    """Pictures of each row (batch,), from its placeholders (batch, T) and those in the cached text before them."""
    counts = image_tokens.sum(dim=1)
    if images_seen is not None:
        counts = counts + images_seen.to(counts.device)
    torch_compilable_check(
        counts.sum() == num_images,
        lambda: (
            f"Image features and image tokens do not match: {num_images} pictures for {int(counts.sum())} "
            f"placeholders ({counts.tolist()} per row). Give one placeholder per picture, and the pictures in the "
            "order of the rows. Where a placeholder's token is a word of the text, say so by a 0 at its place in "
            "`mm_token_type_ids`, with a 1 at those of pictures."
        ),
    )
    return counts


def _has_text_that_should_have_seen(cache: Cache, counts: torch.Tensor) -> bool:
    """Whether rows that now have pictures were cached before their first: that text sees it when nothing is cached."""
    if is_tracing(counts) or cache.get_seq_length() == 0:
        return False
    if not holds_visual_states(cache):
        return bool(counts.any())
    return cache.num_images is not None and bool(((counts > 0) & (cache.num_images == 0)).any())


def _group_by_row(image_features: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Features of single pictures (images, N, C) → those of rows (batch, most images · N, C) and pictures per row.

    The second is None where each row has exactly one picture, which all its tokens see. In a graph that is traced, no
    shape may hang on what the text says: there each row has room for all pictures.
    """
    counts = counts.to(image_features.device)
    if is_tracing(counts):
        most = image_features.shape[0]
    elif (counts == 1).all():
        return image_features, None
    else:
        most = int(counts.max())
    slots = torch.arange(most, device=counts.device)
    is_taken = slots < counts[:, None]  # (batch, most images)
    image_idx = ((counts.cumsum(dim=0) - counts)[:, None] + slots).where(is_taken, 0)
    rows = image_features[image_idx].masked_fill(~is_taken[..., None, None], 0)
    return rows.flatten(1, 2), counts


def _repeat_for_text(num_images: torch.Tensor | None, num_rows: int, num_text_rows: int) -> torch.Tensor | None:
    """Pictures of each row of visual states → of each row of the text, of which several may share one of those."""
    if num_text_rows % num_rows != 0:
        raise ValueError(
            f"`cross_attention_states` has {num_rows} rows, which do not divide the {num_text_rows} rows of the text: "
            "give one for each, or for as many that follow each other."
        )
    if num_images is None:
        return None
    if num_images.shape[0] != num_rows:
        raise ValueError(
            f"`num_images` counts the pictures of {num_images.shape[0]} rows, but `cross_attention_states` has "
            f"{num_rows}: give one number for each of these."
        )
    return num_images.repeat_interleave(num_text_rows // num_rows)


def _check_are_trained(auxiliary_losses: dict[str, torch.Tensor] | None, are_in_loss: bool) -> None:
    if auxiliary_losses and not are_in_loss:
        coefs = " and ".join(f"`{name}_coef`" for name in auxiliary_losses)
        raise ValueError(
            f"The configuration sets {coefs}, but these losses would not be trained: they are part of the loss "
            "that `AureaForConditionalGeneration` makes of `labels`, and here the loss is made by others, from its "
            "logits or from the base model's output (TRL's trainers, label smoothing, a `compute_loss_func`). Train "
            f"with `transformers.Trainer`, or set {coefs} of the model's configuration to 0."
        )


def _is_sharded(model: nn.Module) -> bool:
    """Whether FSDP or ZeRO-3 gathers weights for each forward pass, in which all processes take part."""
    if any(isinstance(module, FSDP_CLASSES) for module in model.modules()):
        return True
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _encoder_attention(config: PreTrainedConfig, implementation: str | None) -> str | None:
    """The attention implementation asked for, or `"eager"` for an encoder that lacks it, as convolutional ones do."""
    encoder_class = MODEL_MAPPING.get(type(config), None)  # none for remote code
    if encoder_class is None or implementation is None:
        return implementation
    is_supported = {
        "sdpa": encoder_class._supports_sdpa,
        "flex": encoder_class._supports_flex_attn,
        "flash": encoder_class._supports_flash_attn,
    }
    return (
        "eager" if any(name in implementation and not is_supported[name] for name in is_supported) else implementation
    )


def _make_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    settings = {"attn_implementation": _encoder_attention(config, config._attn_implementation), "dtype": torch.float32}
    return AutoModel.from_config(config, **settings, **pooling_settings(config))


def _batch_norms(*encoders: PreTrainedModel) -> list[nn.Module]:
    modules = (module for encoder in encoders for module in encoder.modules())
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return [module for module in modules if isinstance(module, kinds)]


@contextmanager
def _in_evaluation_mode(modules: list[nn.Module]):
    training = [module for module in modules if module.training]
    for module in training:
        module.eval()
    try:
        yield
    finally:
        for module in training:
            module.train()


class AureaPreTrainedModel(AureaHubKernelsMixin, PreTrainedModel):
    config: AureaConfig
    config_class = AureaConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["AureaSpatialRangeAttention"]
    _skip_keys_device_placement = ["past_key_values", "cache", "visual_cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # The published precision: both encoders and the width of every Gaussian stay in float32. The strict list is for
    # loading in any half precision; quantisers read the other one, from the start of a module's full name, and need
    # to know of small networks whose widths no group of weights divides.
    _keep_in_fp32_modules_strict = ["vision_model", "spatial_vision_model", "sigma_spatial"]
    _keep_in_fp32_modules = [r"(?:model\.)?(?:spatial_)?vision_model", r".*\.fixup_proj"]

    def __init__(self, config: AureaConfig, *args, **kwargs):
        config.validate_architecture()  # fields may have changed since, and a radius of any size would be built
        super().__init__(config, *args, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """That of the language model; the first parameters, by which it is told otherwise, are an encoder's."""
        return self.get_decoder().dtype

    @classmethod
    def is_custom_code(cls) -> bool:
        # Custom code that fills tensors in place is kept from modules whose parameters are loaded, and with them from
        # modules that have none of their own, SigLIP's attention among them. This code uses
        # `transformers.initialization`, which knows what is loaded.
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, AureaSpatialRangeAttention):
            init.ones_(module.sigma_spatial)

    def post_init(self):
        super().post_init()
        # accelerate's FSDP refuses names of layers that the model does not have, such as SigLIP's of its text half.
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs):
        if isinstance(attn_implementation, str):  # an encoder that lacks it would refuse
            encoders = {
                name: _encoder_attention(config, attn_implementation)
                for name, config in self.config.encoder_configs.items()
            }
            everything = dict.fromkeys(["", *self.config.sub_configs], attn_implementation)
            attn_implementation = everything | encoders
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def save_pretrained(self, *args, **kwargs):
        # Under the model's own names, not those that an older transformers had: by these alone `Trainer` resumes, and
        # would leave all other weights as they were.
        kwargs.setdefault("save_original_format", False)
        # `fully_shard` puts a class of its own before the model's, and that would be saved as the code to load.
        full_class = type(self)
        if isinstance(self, FSDP_CLASSES):
            self.__class__ = full_class.__mro__[2]
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.__class__ = full_class

    def initialize_weights(self):
        # The blocks first: they stand inside the language model, whose own rules would be applied to them (Gemma
        # starts norms at zero, which would silence queries and keys).
        for block in self.modules():
            if isinstance(block, AureaCrossAttentionBlock):
                with torch.no_grad(), init.guard_torch_init_functions():
                    block.apply(self._initialize_weights)
        super().initialize_weights()


class AureaModel(AureaPreTrainedModel):
    """Encoders, fusion, projector and the decoder with its cross-attention blocks; no language modelling head.

    Args:
        config ([`AureaConfig`]): sizes and parts.
        language_model (`PreTrainedModel`, *optional*):
            The decoder, which is woven in place; by default a new one of `config.text_config`.

    Raises:
        ValueError: the language model cannot carry visual states to its layers.
    """

    @names_untested_version
    def __init__(self, config: AureaConfig, language_model: PreTrainedModel | None = None):
        super().__init__(config)
        fusion = config.feature_fusion_config
        semantic_size, spatial_size = config.feature_sizes
        self.vision_model = _make_encoder(config.vision_config)
        self.spatial_vision_model = _make_encoder(config.spatial_vision_config)
        self.fusion = FUSIONS[fusion.fusion_type](
            semantic_size, spatial_size, fusion.depth, fusion.radius, fusion.layer_norm_eps
        )
        self.multi_modal_projector = AureaMultiModalProjector(config, self.fusion.output_dim)
        self.language_model = decoder_of(make_causal_lm(config))[1] if language_model is None else language_model
        self._weave_cross_attention()
        self._carries_pictures = carries_cross_attention(self.language_model)
        self.post_init()
        self._tp_plan.update(self._cross_attention_tp_plan())

    def get_decoder(self) -> PreTrainedModel:
        return self.language_model

    def train(self, mode: bool = True) -> "AureaModel":
        """As usual, but that an encoder's batch norms keep the statistics they were pretrained with.

        Otherwise a picture's features would hang on the others of its batch: processes, and a reference model that is
        in evaluation mode, would differ. `config.update_batch_norms` lets those follow their batches that train.
        """
        super().train(mode)
        for module in _batch_norms(self.vision_model, self.spatial_vision_model):
            trains = any(parameter.requires_grad for parameter in module.parameters())
            module.train(mode and self.config.update_batch_norms and trains)
        return self

    def _weave_cross_attention(self):
        _, layers = decoder_layers(self.language_model)
        block_idx = {position: idx for idx, position in enumerate(self.config.cross_attention_positions)}

        def block(position: int) -> AureaCrossAttentionBlock | None:
            if position not in block_idx:
                return None
            return AureaCrossAttentionBlock(self.config, self.language_model.config, block_idx[position])

        # Every layer, also those without a block, so that no keyword of ours reaches the decoder's attention.
        for position, layer in enumerate(layers):
            layer.__class__ = woven_class(AureaWovenDecoderLayerMixin, type(layer))
            layer.cross_attention_block = block(position)
            layer.closing_cross_attention_block = block(len(layers)) if position + 1 == len(layers) else None

    def _cross_attention_tp_plan(self) -> dict[str, str]:
        plan = {
            **dict.fromkeys(("cross_attn.q_proj", "cross_attn.k_proj", "cross_attn.v_proj"), "colwise"),
            **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), "colwise"),
            **dict.fromkeys(("cross_attn.o_proj", "mlp.down_proj"), "rowwise"),
            # Each process has some of the heads, and with them a part of these norms' gradients.
            **dict.fromkeys(("cross_attn.q_norm", "cross_attn.k_norm"), "replicated_with_grad_allreduce"),
        }
        prefix = f"language_model.{decoder_layers(self.language_model)[0]}.*"
        blocks = ("cross_attention_block", "closing_cross_attention_block")
        return {f"{prefix}.{block}.{name}": style for block in blocks for name, style in plan.items()}

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.FloatTensor, **kwargs: Unpack[TransformersKwargs]
    ) -> AureaImageFeaturesOutput:
        r"""
        Encode, fuse and project pictures.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, 2, 3, height, width)`):
                View 0 for the semantic encoder, view 1 for the spatial one; a view smaller than the common canvas lies
                in its top left corner.

        Returns:
            [`AureaImageFeaturesOutput`], `pooler_output` being the projected features.

        Raises:
            ValueError: if the shape of `pixel_values` is not the configured one, or an encoder gives another grid.
        """
        self._check_pixel_values(pixel_values)
        semantic, semantic_features = self._encode_view(self.vision_model, pixel_values, 0, **kwargs)
        spatial, spatial_features = self._encode_view(self.spatial_vision_model, pixel_values, 1, **kwargs)
        fused_features, auxiliary_losses = self._fuse(semantic_features, spatial_features)  # (images, N, C_fused)
        return AureaImageFeaturesOutput(
            last_hidden_state=semantic.last_hidden_state,
            pooler_output=self.multi_modal_projector(fused_features),  # (images, N, C)
            hidden_states=semantic.hidden_states,
            attentions=semantic.get("attentions"),  # convolutional encoders have none
            spatial_last_hidden_state=spatial.last_hidden_state,
            spatial_hidden_states=spatial.hidden_states,
            spatial_attentions=spatial.get("attentions"),
            auxiliary_losses=auxiliary_losses,
        )

    def _fuse(
        self, semantic_features: torch.Tensor, spatial_features: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
        """Fused tokens, and the auxiliary losses (images,) of a fusion that trains, on the tensors of the original."""
        wanted = self.config.auxiliary_loss_coefs
        if not self.training or not wanted:
            return self.fusion(semantic_features, spatial_features), None
        tokens, fused_map = self.fusion(semantic_features, spatial_features, return_map=True)
        if not tokens.requires_grad:
            return tokens, None
        losses = {}
        if "feature_consistency" in wanted:
            settings = {"radius": self.config.feature_fusion_config.radius, **self.config.feature_consistency_kernel}
            # The guidance says what belongs together; an encoder that trains is not to learn to say what pays.
            losses["feature_consistency"] = sum(
                feature_consistency_loss(guidance.detach(), fused_map, **settings, reduction="none")
                for guidance in (spatial_features, semantic_features)
            )
        if "feature_diversity" in wanted:
            losses["feature_diversity"] = feature_diversity_loss(tokens, reduction="none")
        return tokens, losses

    def _check_pixel_values(self, pixel_values: torch.Tensor):
        canvas = tuple(max(sides) for sides in zip(*self.config.view_sizes))
        if pixel_values.ndim != 5 or tuple(pixel_values.shape[1:]) != (2, 3, *canvas):
            raise ValueError(
                f"`pixel_values` must have the shape (num_images, 2, 3, {canvas[0]}, {canvas[1]}): two views of each "
                f"picture, got {tuple(pixel_values.shape)}. `AureaImageProcessor` makes them."
            )

    def _encode_view(self, encoder: PreTrainedModel, pixel_values: torch.Tensor, view: int, **kwargs):
        """An encoder's outputs for its view and its patch features as a grid (images, rows, columns, channels)."""
        height, width = self.config.view_sizes[view]
        rows, columns = self.config.grid_sizes[view]
        pixels = pixel_values[:, view, :, :height, :width].to(encoder.dtype)
        trained_size = optional_field(encoder.config, "image_size") or (height, width)
        trained_size = (trained_size, trained_size) if isinstance(trained_size, int) else tuple(trained_size)
        if trained_size != (height, width) and "interpolate_pos_encoding" in signature(encoder.forward).parameters:
            kwargs["interpolate_pos_encoding"] = True  # others, as DINOv2, do so by themselves
        # A frozen encoder keeps no activations.
        needs_grad = pixels.requires_grad or any(parameter.requires_grad for parameter in encoder.parameters())
        needs_grad = needs_grad and torch.is_grad_enabled()
        if needs_grad and any(name.endswith("mask_token") for name, _ in encoder.named_parameters()):
            # Nothing is masked, but the mask token takes part: DistributedDataParallel waits for every gradient.
            kwargs["bool_masked_pos"] = pixels.new_zeros((pixels.shape[0], rows * columns), dtype=torch.bool)
        with (
            torch.set_grad_enabled(needs_grad),
            torch.autocast(pixels.device.type, enabled=False),
        ):
            outputs = encoder(pixels, **kwargs)
        features = outputs.last_hidden_state
        if needs_grad and outputs.get("pooler_output") is not None:
            # A pooled output has no use either, but takes part for the same reason.
            features = features + 0 * outputs.pooler_output.sum()
        is_map = features.ndim == 4
        if is_map:
            features = features.flatten(2).transpose(1, 2)  # (images, C, rows, columns) → tokens
        if features.shape[1] < rows * columns or (is_map and features.shape[1] > rows * columns):
            raise ValueError(
                f"{type(encoder).__name__} gives {features.shape[1]} patch features for a view of {height}×{width} "
                f"pixels, which are not the grid of {rows}×{columns} that its configuration promises."
            )
        features = features[:, -rows * columns :]  # class and register tokens come first
        return outputs, features.unflatten(1, (rows, columns)).to(self.dtype)

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor | None,
        mm_token_type_ids: torch.LongTensor | None = None,
    ) -> torch.BoolTensor:
        """Where the text, as ids or as embeddings, has a picture's placeholder: `(batch_size, sequence_length)`.

        `mm_token_type_ids`, if given, alone say so. Of those of a longer text the last count; what stands before those
        of a shorter one, such as the virtual tokens of a prompt that was tuned, are words.
        """
        image_token_id = self.config.image_token_id
        if mm_token_type_ids is not None:
            length = (inputs_embeds if input_ids is None else input_ids).shape[1]
            missing = max(length - mm_token_type_ids.shape[1], 0)
            return F.pad(mm_token_type_ids[:, -length:] == 1, (missing, 0))
        if input_ids is not None:
            return input_ids == image_token_id
        if image_token_id >= self.config.text_config.vocab_size:
            return inputs_embeds.new_zeros(inputs_embeds.shape[:2], dtype=torch.bool)
        placeholder = self.get_input_embeddings()(torch.tensor([[image_token_id]], device=inputs_embeds.device))
        # Not bit for bit: the products of an adapter are rounded differently in texts of other lengths.
        tolerance = 16 * torch.finfo(inputs_embeds.dtype).eps * placeholder.abs().max()
        return ((inputs_embeds - placeholder).abs() <= tolerance).all(-1)

    @names_untested_version
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        cross_attention_states: torch.FloatTensor | None = None,
        num_images: torch.LongTensor | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        return_decoder_output: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AureaModelOutputWithPast:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, 2, 3, height, width)`, *optional*):
                All pictures of the batch in the order of their placeholders, row by row. With a kept cache these are
                the pictures of the whole conversation, and replace the cached ones.
            cross_attention_states (`torch.FloatTensor`, *optional*):
                `(batch_size, num_visual_tokens, hidden_size)`: visual tokens made ready before, row for row,
                instead of `pixel_values`; no placeholders are needed. Fewer rows, which divide the batch, are each
                seen by as many rows of the text that follow each other, as the beams of a search do.
            num_images (`torch.LongTensor`, *optional*):
                With `cross_attention_states`, whose rows it has: how many pictures stand at the front of each. Each
                token then sees the pictures whose placeholder is at or before it. Without it every token sees every
                visual token.
            mm_token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 at each picture's placeholder, 0 elsewhere, as the processor gives it. By default each token of the
                id `config.image_token_id` is one; a text may have it as a word, where it was generated.
            past_key_values or cache (`Cache`, *optional*):
                One argument under its two names. The pictures' keys are kept in it as well.
            return_decoder_output (`bool`, *optional*, defaults to `False`):
                Whether to give back the decoder's own output too, as its head wants it.
        """
        cache = one_cache(cache, past_key_values)
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of `input_ids` or `inputs_embeds`.")
        if pixel_values is not None and cross_attention_states is not None:
            raise ValueError("Give the pictures as `pixel_values` or as `cross_attention_states`, not both.")

        image_tokens = self.get_placeholder_mask(input_ids, inputs_embeds, mm_token_type_ids)  # (batch, T)
        image_outputs = image_features = auxiliary_losses = None
        if pixel_values is not None and pixel_values.shape[0] > 0:
            seen = cache.images_seen if isinstance(cache, AureaVisualStatesCacheMixin) else None
            counts = _image_counts(image_tokens, pixel_values.shape[0], seen)
            if cache is not None and _has_text_that_should_have_seen(cache, counts):
                logger.warning_once(
                    f"`{CACHE_NAME}` holds text that was read before its row's first picture. Without a cache it "
                    "would see that picture. Give the whole text again and an empty cache to have it so."
                )
            wanted = {name: kwargs[name] for name in ("output_attentions", "output_hidden_states") if name in kwargs}
            image_outputs = self.get_image_features(pixel_values, **wanted)
            image_features, auxiliary_losses = image_outputs.pooler_output, image_outputs.auxiliary_losses
            cross_attention_states, num_images = _group_by_row(image_features, counts)  # (batch, M·N, C)
        elif cross_attention_states is None and cache is None and self._needs_image_branch():
            cross_attention_states, num_images, auxiliary_losses = self._unseen_picture(image_tokens)

        _check_are_trained(auxiliary_losses, are_in_loss=return_decoder_output)
        if cross_attention_states is not None:
            num_images = _repeat_for_text(num_images, cross_attention_states.shape[0], image_tokens.shape[0])
        if use_cache is None:  # Trainer turns it off in the configuration of the whole
            use_cache = optional_field(self.config, "use_cache")
        if use_cache is None:
            use_cache = bool(optional_field(self.config.text_config, "use_cache"))
        visual_inputs = self._visual_inputs(image_tokens, cross_attention_states, num_images, cache)
        if visual_inputs and use_cache and cache is None:
            visual_inputs["visual_cache"] = DynamicCache()  # until the decoder has made a cache
        cross_attentions = None
        if visual_inputs and kwargs.get("output_attentions", self.config.output_attentions):
            cross_attentions = visual_inputs["cross_attentions"] = []

        is_watched = bool(visual_inputs) and not self._carries_pictures and not torch.compiler.is_compiling()
        with watched_layers(self.language_model) if is_watched else nullcontext():
            outputs = self.language_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **{CACHE_NAME: cache},
                **visual_inputs,
                **kwargs,
            )
        if is_watched:
            self._carries_pictures = True
        kept = outputs.get(CACHE_NAME)
        if visual_inputs and kept is not None and kept is not cache:
            counts = image_tokens.long().cumsum(dim=1) if cache is None else cache.image_counts
            num_images = num_images if cache is None else cache.num_images
            move_visual_states(visual_inputs["visual_cache"], num_images, counts, kept)
        return AureaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,  # (batch, T, C)
            **{CACHE_NAME: kept},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=tuple(cross_attentions) if cross_attentions else None,  # none from sdpa and flash
            image_hidden_states=image_features,
            image_outputs=image_outputs,
            auxiliary_losses=auxiliary_losses,
            decoder_output=outputs if return_decoder_output else None,
        )

    def _unseen_picture(self, image_tokens: torch.Tensor):
        """Visual states, pictures per row and auxiliary losses for a step of text alone.

        Its rows look at nothing, and every parameter that trains gets a gradient, of zero: without one,
        DistributedDataParallel would wait for it, and if only these parameters train, the loss would have no gradient
        at all.
        """
        canvas = (max(sides) for sides in zip(*self.config.view_sizes))
        picture = torch.zeros(1, 2, 3, *canvas, device=image_tokens.device)
        with _in_evaluation_mode(_batch_norms(self.vision_model, self.spatial_vision_model)):
            outputs = self.get_image_features(picture)  # which is no example of what pictures look like
        return outputs.pooler_output, image_tokens.new_zeros(1, dtype=torch.long), outputs.auxiliary_losses

    def _needs_image_branch(self) -> bool:
        """Whether text alone must pass through what only pictures reach: a gradient is wanted of it, or its weights
        are sharded, and processes whose batch has pictures wait for all others to take part in gathering them."""
        if torch.distributed.is_available() and torch.distributed.is_initialized() and _is_sharded(self):
            return True
        if not self.training or not torch.is_grad_enabled():
            return False
        return any(
            parameter.requires_grad
            for name, parameter in self.named_parameters()
            if not name.startswith("language_model.") or "cross_attention_block." in name
        )

    def _visual_inputs(
        self,
        image_tokens: torch.Tensor,
        cross_attention_states: torch.Tensor | None,
        num_images: torch.Tensor | None,
        cache: Cache | None,
    ) -> dict[str, torch.Tensor | DynamicCache | None]:
        """The keywords that the decoder hands to its layers; none where there is no picture, new or cached."""
        is_new = cross_attention_states is not None
        if not is_new and not holds_visual_states(cache):
            self._warn_of_placeholders_without_pictures(image_tokens, cache)
            return {}
        if is_new and cache is not None:
            weave_cache(cache)
            cache.forget_visual_states()
            cache.num_images = num_images
        elif not is_new:
            num_images = cache.num_images

        visual_cache = cache.visual if cache is not None else None
        visual_inputs = {"cross_attention_states": cross_attention_states, "visual_cache": visual_cache}
        if cache is None:
            visible_images = image_tokens.long().cumsum(dim=1)
        elif is_new or num_images is not None:
            visible_images = cache.count_images(image_tokens)
        if num_images is not None:
            # Tokens before the first placeholder see the first picture. A row without one is given an empty picture to
            # look at, so that no softmax runs over nothing, and its result is discarded.
            visible_images = torch.minimum(visible_images, num_images[:, None]).clamp(min=1)
            states = cross_attention_states if is_new else visual_cache.layers[0].keys[:, 0]  # (rows, N, …)
            visible_images = visible_images.reshape(states.shape[0], -1)  # as the blocks see the text
            visual_inputs["cross_attention_mask"] = self._cross_attention_mask(visible_images, states)
            visual_inputs["rows_with_image"] = (num_images > 0)[:, None, None]
        return visual_inputs

    def _cross_attention_mask(self, visible_images: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Which visual tokens each text token sees, from the number of pictures (rows, T) that it sees."""
        config = self.language_model.config
        if "flash" in config._attn_implementation:
            config = copy.copy(config)
            config._attn_implementation = "sdpa"
        tokens_per_image = self.config.tokens_per_image

        def is_visible(batch_idx, head_idx, q_idx, kv_idx):
            return kv_idx < visible_images[batch_idx, q_idx] * tokens_per_image

        return create_bidirectional_mask(
            config=config,
            inputs_embeds=states.new_empty((*visible_images.shape, 0)),
            attention_mask=None,
            encoder_hidden_states=states,
            and_mask_function=is_visible,
        )

    def _warn_of_placeholders_without_pictures(self, image_tokens: torch.Tensor, cache: Cache | None):
        if torch.compiler.is_compiling() or image_tokens.is_meta:
            return
        is_first_call = cache is None or cache.get_seq_length() == 0
        if is_first_call and image_tokens.any():
            logger.warning_once(
                "The text has placeholders of pictures (`image_token_id`), but no `pixel_values` were given: the "
                "model reads them as ordinary tokens and sees no picture."
            )


class AureaForConditionalGeneration(AureaPreTrainedModel, GenerationMixin):
    """[`AureaModel`] with a language modelling head: from pictures and text to text."""

    output_modalities = ("text",)
    _tp_plan = {"lm_head": "colwise_gather_output"}

    @names_untested_version
    def __init__(self, config: AureaConfig):
        super().__init__(config)
        causal_lm = make_causal_lm(config)
        self.model = AureaModel(config, decoder_of(causal_lm)[1])
        hand_over_head(causal_lm, self, "model.language_model")
        self.post_init()

    def get_decoder(self) -> PreTrainedModel:
        return self.model.get_decoder()

    def get_output_embeddings(self) -> nn.Module:
        return self.causal_lm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.causal_lm.set_output_embeddings(new_embeddings)

    @property
    def loss_function(self):
        return self.causal_lm.loss_function

    @loss_function.setter
    def loss_function(self, value):
        self.causal_lm.loss_function = value

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        give_causal_lm(copy.copy(self.causal_lm), self.causal_lm.decoder_name, replica)
        return replica

    @classmethod
    def from_pretrained_parts(
        cls,
        vision: Part,
        spatial_vision: Part,
        text: Part,
        *,
        tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
        dtype: torch.dtype | str | None = None,
        **config_overrides,
    ) -> "AureaForConditionalGeneration":
        r"""
        Two pretrained vision encoders and a pretrained language model as one Aurea, on the CPU, in evaluation mode.

        The parts' weights are kept bit for bit, but for pooling layers and heads, which have no place; fusion,
        projector and cross-attention blocks are new. What the blocks add starts at zero: until they are trained, the
        logits are those of the language model alone, with or without pictures.
        [`AureaProcessor.from_pretrained_parts`] makes the processor that goes with it. The model has no name before it
        is saved and loaded, and TRL's DPO and GRPO look for their reference model by that.

        Args:
            vision (`str`, `os.PathLike` or `PreTrainedModel`):
                The semantic encoder: a hub id, a folder, or a model, which is copied. Of a model with more than a
                vision encoder (SigLIP, CLIP, a classifier) the encoder is taken.
            spatial_vision (`str`, `os.PathLike` or `PreTrainedModel`):
                The spatial encoder, likewise.
            text (`str`, `os.PathLike` or `PreTrainedModel`):
                A decoder language model, likewise. Its generation settings are kept.
            tokenizer (`str`, `os.PathLike` or `PreTrainedTokenizerBase`, *optional*):
                By default the one where `text` comes from. It tells the id of the image token, its `image_token` or
                else `<|image|>`; if it has none, that of the next free token. The embeddings grow only if that id
                is beyond them, by rows that are the mean of the others.
            dtype (`torch.dtype` or `str`, *optional*):
                Of everything but the encoders, which are in float32. By default that of the language model.
            config_overrides:
                Arguments of [`AureaConfig`], such as `feature_fusion_config` and `cross_attention_layers`; others are
                refused. With `image_token_id` no tokenizer is needed.

        Raises:
            OSError: a part cannot be found.
            TypeError: a part is none.
            ValueError: a part does not fit its place or another part, lacks weights, or gives no features of patches;
                an override is unknown; or there is no tokenizer.
        """
        return model_from_parts(
            cls, vision, spatial_vision, text, tokenizer=tokenizer, dtype=dtype, **config_overrides
        )

    def get_image_features(
        self, pixel_values: torch.FloatTensor, **kwargs: Unpack[TransformersKwargs]
    ) -> AureaImageFeaturesOutput:
        """See [`AureaModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @names_untested_version
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        cross_attention_states: torch.FloatTensor | None = None,
        num_images: torch.LongTensor | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AureaCausalLMOutputWithPast:
        r"""
        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids to predict, those of `input_ids` at the same place; -100 is ignored.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Compute logits for the last so many positions only (0: for all), or for the positions given.

        The other arguments are those of [`AureaModel.forward`].
        """
        text_inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
        }
        outputs = self.model(
            **text_inputs,
            **{CACHE_NAME: one_cache(cache, past_key_values)},
            pixel_values=pixel_values,
            cross_attention_states=cross_attention_states,
            num_images=num_images,
            mm_token_type_ids=mm_token_type_ids,
            return_decoder_output=True,
            **kwargs,
        )
        _check_are_trained(outputs.auxiliary_losses, are_in_loss=labels is not None)
        if labels is not None:
            # With nothing to predict the loss is zero, not the mean of nothing.
            num_targets = kwargs.get("num_items_in_batch")
            if num_targets is None:
                targets = kwargs["shift_labels"] if kwargs.get("shift_labels") is not None else labels[:, 1:]
                num_targets = (targets != -100).sum()
            kwargs["num_items_in_batch"] = torch.as_tensor(num_targets).clamp(min=1)
        lm_outputs = self.causal_lm(
            **text_inputs,
            labels=labels,
            logits_to_keep=logits_to_keep,
            decoder_output=outputs.decoder_output,
            return_dict=True,
            **kwargs,
        )
        loss = lm_outputs.loss
        auxiliary_losses = outputs.auxiliary_losses
        if loss is not None and auxiliary_losses:
            # Those of the blank picture too, with weight zero: ZeRO-3 wants the same backward pass in all processes.
            coefs = self.config.auxiliary_loss_coefs
            weighted = sum(coefs[name] * values for name, values in auxiliary_losses.items())
            image_tokens = self.model.get_placeholder_mask(input_ids, inputs_embeds, mm_token_type_ids)
            share = share_of_batch(weighted, image_tokens, labels, kwargs["num_items_in_batch"])
            loss = loss + share.to(loss.device)
        return AureaCausalLMOutputWithPast(
            loss=loss,
            logits=lm_outputs.logits,  # (batch, T, vocabulary)
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            image_hidden_states=outputs.image_hidden_states,
            image_outputs=outputs.image_outputs,
            auxiliary_losses={name: losses.detach().mean() for name, losses in auxiliary_losses.items()}
            if auxiliary_losses and outputs.image_hidden_states is not None
            else None,
            aux_loss=lm_outputs.get("aux_loss"),
            router_logits=lm_outputs.get("router_logits"),
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        cross_attention_states: torch.FloatTensor | None = None,
        num_images: torch.LongTensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ):
        cache = one_cache(cache, past_key_values)
        model_inputs = self.causal_lm.prepare_inputs_for_generation(
            input_ids, **{CACHE_NAME: cache}, inputs_embeds=inputs_embeds, **kwargs
        )
        if cache is not None and model_inputs.get(CACHE_NAME) is None:
            # The language model reads all its text anew (Phi-3, where its rotary frequencies change): into the same
            # cache, which may be the caller's, and which keeps the pictures.
            cache.forget_text() if isinstance(cache, AureaVisualStatesCacheMixin) else cache.reset()
            model_inputs[CACHE_NAME] = cache
        # Until the cache holds the visual keys, not until the first iteration is over: to an assistant no iteration is
        # the first, and it would draft blind.
        is_cached = holds_visual_states(model_inputs.get(CACHE_NAME))
        if cross_attention_states is not None and not is_cached:
            model_inputs |= {"cross_attention_states": cross_attention_states, "num_images": num_images}
        elif cross_attention_states is None and pixel_values is not None and not is_cached:
            model_inputs["pixel_values"] = pixel_values
        return model_inputs

    def _supports_default_dynamic_cache(self) -> bool:
        return self.causal_lm._supports_default_dynamic_cache()

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        if generation_config.prefill_chunk_size is not None:  # the pictures are encoded already
            model_kwargs = {name: value for name, value in model_kwargs.items() if name != "pixel_values"}
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **kwargs,
    ):
        # Before rows are repeated for beams: pictures are encoded once, and from here on belong to rows.
        kwargs = self._encode_images_for_generation(input_ids, kwargs)
        if expand_size > 1:
            kwargs.pop("pixel_values", None)
        # Not repeated: the beams of a row see the same pictures.
        visual_inputs = {name: kwargs.pop(name) for name in ("cross_attention_states", "num_images") if name in kwargs}
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, kwargs | visual_inputs

    def _get_candidate_generator(self, *args, model_kwargs, assistant_model=None, **kwargs):
        if assistant_model is not None:  # one that drafts from the text alone takes none of these
            names = {"pixel_values", "cross_attention_states", "num_images", "mm_token_type_ids"}
            names -= set(signature(assistant_model.forward).parameters)
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in names}
        return super()._get_candidate_generator(
            *args, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )

    def _encode_images_for_generation(self, input_ids: torch.LongTensor | None, model_kwargs: dict) -> dict:
        """Replace `pixel_values` by `cross_attention_states` and `num_images`, and have them replace cached ones."""
        pixel_values, states = model_kwargs.get("pixel_values"), model_kwargs.get("cross_attention_states")
        cache = model_kwargs.get(CACHE_NAME)
        has_cached_states = holds_visual_states(cache)
        if pixel_values is not None and pixel_values.shape[0] > 0:
            # Pixels beside states are what an assistant gets from the model it drafts for. Its own encoders look once,
            # in the first round; after that its cache knows.
            if states is not None and has_cached_states:
                return model_kwargs
            inputs_embeds = model_kwargs.get("inputs_embeds")
            image_tokens = self.model.get_placeholder_mask(
                input_ids if inputs_embeds is None else None, inputs_embeds, model_kwargs.get("mm_token_type_ids")
            )
            # Only the new text was given if the positions go back further than it.
            position_ids = model_kwargs.get("position_ids")
            is_continued = position_ids is not None and position_ids.shape[-1] > image_tokens.shape[1]
            seen = cache.images_seen if is_continued and isinstance(cache, AureaVisualStatesCacheMixin) else None
            counts = _image_counts(image_tokens, pixel_values.shape[0], seen)
            if cache is not None and not is_continued and _has_text_that_should_have_seen(cache, counts):
                cache.reset()  # the whole text was given, and is read again
            image_features = self.get_image_features(pixel_values).pooler_output
            states, num_images = _group_by_row(image_features, counts)
            model_kwargs |= {"cross_attention_states": states, "num_images": num_images}
        if states is not None and has_cached_states:
            cache.forget_visual_states()
        return model_kwargs


__all__ = ["AureaForConditionalGeneration", "AureaModel", "AureaPreTrainedModel"]
