# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Aurea: two vision encoders, one fusion, and a decoder that reads the result through cross-attention.

    pixel_values (images, views, 3, H, W)
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
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .added_encoder_aurea import AureaAddedEncoderMixin
from .auxiliary_losses_aurea import check_are_trained, fusion_losses, share_of_loss
from .composition_aurea import AureaComposition, look_through
from .configuration_aurea import AureaConfig, optional_field
from .connectors_aurea import AureaConnector
from .cross_attention_aurea import AureaCrossAttentionBlock, cross_attention_tp_plan, weave_cross_attention
from .decoding_aurea import AureaGenerationMixin
from .fusion_promises_aurea import fuse, make_fusion
from .language_model_aurea import (
    carries_cross_attention,
    decoder_of,
    give_causal_lm,
    hand_over_head,
    make_causal_lm,
    watched_layers,
)
from .modeling_outputs_aurea import AureaCausalLMOutputWithPast, AureaImageFeaturesOutput, AureaModelOutputWithPast
from .parts_aurea import AureaFromPartsMixin
from .prefix_trial_aurea import reads_prefix, reads_prefix_here
from .pretrained_model_aurea import AureaPreTrainedModel
from .projector_aurea import AureaMultiModalProjector
from .versions_aurea import CACHE_NAME, names_untested_version, one_cache
from .vision_encoder_aurea import batch_norms, in_evaluation_mode, make_encoder
from .visual_cache_aurea import holds_visual_states
from .visual_context_aurea import (
    AureaVisualContext,
    count_images,
    group_by_row,
    has_text_that_should_have_seen,
    images_in_cache,
)


logger = logging.get_logger(__name__)


class AureaModel(AureaPreTrainedModel):
    """Encoders, fusion, projector and the decoder with its cross-attention blocks; no language modelling head.

    Args:
        config ([`AureaConfig`]): sizes and parts.
        language_model (`PreTrainedModel`, *optional*):
            The decoder, which is woven in place; by default a new one of `config.text_config`.

    Args of `forward`:
        pixel_values (`torch.FloatTensor` of shape `(num_images, num_views, 3, height, width)`, *optional*):
            All pictures of the batch in the order of their placeholders, row by row. With a kept cache these are
            the pictures of the whole conversation, and replace the cached ones.
        cross_attention_states (`torch.FloatTensor`, *optional*):
            `(batch_size, num_visual_tokens, hidden_size)`: visual tokens made ready before, row for row,
            instead of `pixel_values`; no placeholders are needed. Fewer rows, which divide the batch, are each
            seen by as many rows of the text that follow each other, as the beams of a search do.
        image_embeds (`torch.FloatTensor`, *optional*):
            Likewise, for the connectors that fill placeholders.
        num_images (`torch.LongTensor`, *optional*):
            With these, whose rows it has: how many pictures stand at the front of each. Each
            token then sees the pictures whose placeholder is at or before it. Without it every token sees every
            visual token.
        mm_token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            1 at each picture's placeholder, 0 elsewhere, as the processor gives it. By default each token of the
            id `config.image_token_id` is one; a text may have it as a word, where it was generated.
        past_key_values or cache (`Cache`, *optional*):
            One argument under its two names. The pictures' keys are kept in it as well.
        prompt_blocks (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            With `prefix_mask="prompt"`: tokens of one number, from 0 on, see each other; -1 is no prompt.
        return_decoder_output (`bool`, *optional*, defaults to `False`):
            Whether to give back the decoder's own output too, as its head wants it.

    Raises:
        ValueError: the language model cannot carry visual states to its layers; pictures and placeholders do not
            match.
    """

    @names_untested_version
    def __init__(self, config: AureaConfig, language_model: PreTrainedModel | None = None):
        super().__init__(config)
        self.vision_model = make_encoder(config, "vision_config")
        self.spatial_vision_model = make_encoder(config, "spatial_vision_config")
        has_composition = config.composition_config is not None
        self.composition = AureaComposition(config, self.vision_model) if has_composition else None
        self.fusion = make_fusion(config)
        self.multi_modal_projector = AureaMultiModalProjector(config, self.fusion.output_dim)
        self.language_model = decoder_of(make_causal_lm(config))[1] if language_model is None else language_model
        self.connector = AureaConnector(config)
        positions = config.num_image_positions if self.connector.weaves else 0
        self.image_position_embedding = nn.Embedding(positions, config.text_config.hidden_size) if positions else None
        if self.connector.weaves:
            weave_cross_attention(self.language_model, config)
        self._carries_pictures = not self.connector.weaves or carries_cross_attention(self.language_model)
        self._reads_prefix = not self.connector.fills or reads_prefix(self.language_model, self.connector)
        self.post_init()
        if self.connector.weaves:
            plan = cross_attention_tp_plan(self.language_model)
            self._tp_plan.update({f"language_model.{name}": style for name, style in plan.items()})

    def get_decoder(self) -> PreTrainedModel:
        return self.language_model

    def get_encoder(self, modality: str | None = None) -> PreTrainedModel:
        if modality == "image" and self.vision_model is None:
            return self.spatial_vision_model
        return super().get_encoder(modality)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.FloatTensor, **kwargs: Unpack[TransformersKwargs]
    ) -> AureaImageFeaturesOutput:
        r"""
        Encode, fuse and project pictures.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, num_views, 3, height, width)`):
                View 0 for the semantic encoder, view 1 for the spatial one; a view smaller than the common canvas lies
                in its top left corner.

        Returns:
            [`AureaImageFeaturesOutput`], `pooler_output` being the projected features.

        Raises:
            ValueError: if the shape of `pixel_values` is not the configured one, or an encoder gives another grid.
        """
        self._check_pixel_values(pixel_values)
        parts = (self.vision_model, self.spatial_vision_model, self.composition)
        (semantic, semantic_map), (spatial, spatial_map) = look_through(*parts, pixel_values, **kwargs)  # (n, h, w, C)
        features = [one if one is None else one.to(self.dtype) for one in (semantic_map, spatial_map)]
        wants_attentions = kwargs.get("output_attentions", self.config.output_attentions)
        fused_features, auxiliary_losses, attentions = self._fuse(features, wants_attentions)  # (images, N, C_fused)
        main, beside = (semantic, spatial) if semantic is not None else (spatial, {})
        beside = {} if beside is None else beside
        return AureaImageFeaturesOutput(
            last_hidden_state=main.last_hidden_state,
            pooler_output=self.multi_modal_projector(fused_features),  # (images, N, C)
            hidden_states=main.hidden_states,
            attentions=main.get("attentions"),  # convolutional encoders have none
            spatial_last_hidden_state=beside.get("last_hidden_state"),
            spatial_hidden_states=beside.get("hidden_states"),
            spatial_attentions=beside.get("attentions"),
            fusion_attentions=attentions,
            auxiliary_losses=auxiliary_losses,
        )

    def _fuse(self, features: list[torch.Tensor | None], wants_attentions: bool = False) -> tuple:
        """Fused tokens (images, N, C) of the encoders' maps, auxiliary losses of training, the fusion's weights."""
        coefs = self.config.auxiliary_loss_coefs if self.training else {}
        wants_map = "feature_consistency" in coefs
        tokens, fused_map, attentions = fuse(self.config, self.fusion, features, wants_map, wants_attentions)
        return tokens, fusion_losses(self.config, tokens, fused_map, features) if coefs else None, attentions

    def _check_pixel_values(self, pixel_values: torch.Tensor):
        shape = (len(self.config.views), 3, *self.config.canvas)
        given = tuple(pixel_values.shape[1:])
        if shape[0] == 1 and len(given) == 3:  # of an image processor that knows of no views
            given = (1, *given)
        if shape[0] == 1 and given[:1] == (2,):  # a processor for two encoders: the other's view may be the larger
            shape = (2, 3, max(shape[2], given[2]), max(shape[3], given[3]))
        if given != shape:
            raise ValueError(
                f"`pixel_values` must have the shape (num_images, {', '.join(map(str, shape))}): a view of each "
                f"picture for each encoder, got {tuple(pixel_values.shape)}. `AureaImageProcessor` makes them."
            )

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
        image_embeds: torch.FloatTensor | None = None,
        num_images: torch.LongTensor | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        prompt_blocks: torch.LongTensor | None = None,
        return_decoder_output: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AureaModelOutputWithPast:
        """Arguments beside those of every decoder are described at the class."""
        cache = one_cache(cache, past_key_values)
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of `input_ids` or `inputs_embeds`.")
        image_tokens = self.get_placeholder_mask(input_ids, inputs_embeds, mm_token_type_ids)  # (batch, T)
        context, image_outputs, auxiliary_losses = self._look(
            image_tokens, pixel_values, (cross_attention_states, image_embeds, num_images), cache, **kwargs
        )
        check_are_trained(auxiliary_losses, are_in_loss=return_decoder_output)
        if self.image_position_embedding is not None and context.states is not None:
            context.number_images(self.image_position_embedding)
        context.enter(cache)
        words = self.connector.fill(context, input_ids, inputs_embeds, self.get_input_embeddings())
        text_config, use_cache = self.language_model.config, self._uses_cache(use_cache)
        position_ids = self.connector.position_ids(position_ids, image_tokens, cache)
        attention_mask = self.connector.mask(
            context, attention_mask, prompt_blocks, text_config, cache, position_ids, self.training
        )
        visual_inputs = context.layer_inputs(cache, use_cache, text_config)
        cross_attentions = None
        if visual_inputs and kwargs.get("output_attentions", self.config.output_attentions):
            cross_attentions = visual_inputs["cross_attentions"] = []
        with self._watched(visual_inputs, image_tokens.device):
            text = words | {"attention_mask": attention_mask, "position_ids": position_ids, CACHE_NAME: cache}
            outputs = self.language_model(**text, use_cache=use_cache, **visual_inputs, **kwargs)
        kept = outputs.get(CACHE_NAME)
        if (visual_inputs or context.is_shown) and kept is not None and kept is not cache:
            context.move_to(kept, cache, visual_inputs.get("visual_cache"))
        return AureaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,  # (batch, T, C)
            **{CACHE_NAME: kept},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=tuple(cross_attentions) if cross_attentions else None,  # none from sdpa and flash
            fusion_attentions=None if image_outputs is None else image_outputs.fusion_attentions,
            image_hidden_states=None if image_outputs is None else image_outputs.pooler_output,
            image_outputs=image_outputs,
            auxiliary_losses=auxiliary_losses,
            decoder_output=outputs if return_decoder_output else None,
        )

    def _uses_cache(self, use_cache: bool | None) -> bool:
        for config in (self.config, self.config.text_config):  # Trainer turns it off in that of the whole
            if use_cache is None:
                use_cache = optional_field(config, "use_cache")
        return bool(use_cache)

    @contextmanager
    def _watched(self, visual_inputs: dict, device: torch.device):
        """The first time that the decoder is run with pictures, unless a trial run has shown it, whether it carries
        them to all its layers. Whether it reads a prefix, the first time that it is run at all: in all processes."""
        is_compiling = torch.compiler.is_compiling()
        if not self._reads_prefix and not is_compiling:
            reads_prefix_here(self.language_model, self.connector, device)
            self._reads_prefix = True
        is_watched = bool(visual_inputs) and not self._carries_pictures and not is_compiling
        with watched_layers(self.language_model) if is_watched else nullcontext():
            yield
        self._carries_pictures |= is_watched

    def _look(
        self,
        image_tokens: torch.Tensor,
        pixel_values: torch.Tensor | None,
        visual_inputs: tuple[torch.Tensor | None, ...],
        cache: Cache | None,
        **kwargs,
    ) -> tuple[AureaVisualContext, AureaImageFeaturesOutput | None, dict[str, torch.Tensor] | None]:
        """What the text is shown; what was made of pictures given as pixels, if any; and auxiliary losses."""
        is_ready = any(tokens is not None for tokens in visual_inputs[:2])
        if pixel_values is not None and is_ready:
            raise ValueError(
                "Give the pictures as `pixel_values` or as `cross_attention_states` and `image_embeds`, not both."
            )
        if pixel_values is not None and pixel_values.shape[0] > 0:
            per_image = self.connector.placeholders_per_image
            counts = count_images(image_tokens, pixel_values.shape[0], images_in_cache(cache), per_image)
            if self.connector.weaves and has_text_that_should_have_seen(cache, counts):
                logger.warning_once(
                    f"`{CACHE_NAME}` holds text that was read before its row's first picture. Without a cache it "
                    "would see that picture. Give the whole text again and an empty cache to have it so."
                )
            wanted = {name: kwargs[name] for name in ("output_attentions", "output_hidden_states") if name in kwargs}
            outputs = self.get_image_features(pixel_values, **wanted)
            visual_inputs = self.connector.inputs(*group_by_row(outputs.pooler_output, counts))
            return self.connector.context(image_tokens, **visual_inputs), outputs, outputs.auxiliary_losses
        if not is_ready and cache is None and self._needs_image_branch():
            return self._look_at_nothing(image_tokens)
        if not is_ready and not holds_visual_states(cache):
            self._warn_of_placeholders_without_pictures(image_tokens, cache)
        return self.connector.context(image_tokens, *visual_inputs), None, None

    def _look_at_nothing(self, image_tokens: torch.Tensor):
        """As `_look`, for a step of text alone.

        Its rows see nothing, and every parameter that trains gets a gradient, of zero: without one,
        DistributedDataParallel would wait for it, and if only these parameters train, the loss would have no gradient
        at all.
        """
        picture = torch.zeros(1, len(self.config.views), 3, *self.config.canvas, device=image_tokens.device)
        encoders = [encoder for encoder in (self.vision_model, self.spatial_vision_model) if encoder is not None]
        with in_evaluation_mode(batch_norms(*encoders)):
            outputs = self.get_image_features(picture)  # which is no example of what pictures look like
        no_images = image_tokens.new_zeros(1, dtype=torch.long)
        visual_inputs = self.connector.inputs(outputs.pooler_output, no_images)
        return self.connector.context(image_tokens, **visual_inputs), None, outputs.auxiliary_losses

    def _needs_image_branch(self) -> bool:
        """Whether text alone must pass through what only pictures reach: a gradient is wanted of it, or its weights
        are sharded, and processes whose batch has pictures wait for all others to take part in gathering them."""
        if self.is_gathered_by_all:
            return True
        if not self.training or not torch.is_grad_enabled():
            return False
        readers = [module for name, module in self.named_children() if name != "language_model"]
        readers += [module for module in self.language_model.modules() if isinstance(module, AureaCrossAttentionBlock)]
        return any(parameter.requires_grad for module in readers for parameter in module.parameters())

    def _warn_of_placeholders_without_pictures(self, image_tokens: torch.Tensor, cache: Cache | None):
        if torch.compiler.is_compiling() or image_tokens.is_meta:
            return
        is_first_call = cache is None or cache.get_seq_length() == 0
        if is_first_call and image_tokens.any():
            logger.warning_once(
                "The text has placeholders of pictures (`image_token_id`), but no `pixel_values` were given: the "
                "model reads them as ordinary tokens and sees no picture."
            )


class AureaForConditionalGeneration(
    AureaFromPartsMixin, AureaAddedEncoderMixin, AureaPreTrainedModel, AureaGenerationMixin
):
    """[`AureaModel`] with the language model's own head: from pictures and text to text.

    Args of `forward`, beside those of [`AureaModel`]:
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Token ids, -100 where nothing is to be predicted.
        logits_to_keep (`int` or `torch.LongTensor`, *optional*, defaults to 0):
            Logits are computed for so many last positions, or those given; 0: for all.
        token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            With `prefix_mask="prompt"`, 0 in the prompt and 1 in the answer, which labels tell otherwise. With other
            masks they are the language model's.
    """

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

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The language model's own class over this model's modules, see `language_model_aurea`."""
        causal_lm = self.__dict__["_causal_lm"]
        if causal_lm.owner is not self:  # in a shallow copy, as each replica of data parallelism is
            causal_lm = copy.copy(causal_lm)
            give_causal_lm(causal_lm, causal_lm.decoder_name, self)
        return causal_lm

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
        image_embeds: torch.FloatTensor | None = None,
        num_images: torch.LongTensor | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        prompt_blocks: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AureaCausalLMOutputWithPast:
        """Arguments beside those of every causal language model are described at the class and at [`AureaModel`]."""
        if token_type_ids is not None and self.config.prefix_mask != "prompt":
            kwargs["token_type_ids"] = token_type_ids
        told_blocks = self.model.connector.prompt_blocks(labels, position_ids, token_type_ids)
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
            image_embeds=image_embeds,
            num_images=num_images,
            mm_token_type_ids=mm_token_type_ids,
            prompt_blocks=prompt_blocks if told_blocks is None else told_blocks,
            return_decoder_output=True,
            **kwargs,
        )
        check_are_trained(auxiliary_losses := outputs.auxiliary_losses, are_in_loss=labels is not None)
        if labels is not None:
            kwargs["num_items_in_batch"] = self._num_targets(labels, **kwargs)
        lm_outputs = self.causal_lm(
            **text_inputs,
            labels=labels,
            logits_to_keep=logits_to_keep,
            decoder_output=outputs.decoder_output,
            return_dict=True,
            **kwargs,
        )
        if (loss := lm_outputs.loss) is not None and auxiliary_losses:
            # Those of the blank picture too, with weight zero: ZeRO-3 wants the same backward pass in all processes.
            image_tokens = self.model.get_placeholder_mask(input_ids, inputs_embeds, mm_token_type_ids)
            batch = image_tokens, labels, kwargs["num_items_in_batch"]
            loss = loss + share_of_loss(self.config, auxiliary_losses, *batch).to(loss.device)
        return AureaCausalLMOutputWithPast.of(loss, lm_outputs, outputs)

    def _num_targets(
        self,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        shift_labels: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Tokens to predict in the batch, at least one: with none the loss is zero, not the mean of nothing."""
        if num_items_in_batch is None:
            num_items_in_batch = ((labels[:, 1:] if shift_labels is None else shift_labels) != -100).sum()
        return torch.as_tensor(num_items_in_batch).clamp(min=1)


__all__ = ["AureaForConditionalGeneration", "AureaModel", "AureaPreTrainedModel"]
