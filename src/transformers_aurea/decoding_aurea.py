# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""What `generate` asks of an Aurea: pictures are encoded once, before rows become beams, and kept in the cache."""

from functools import wraps
from inspect import signature

import torch
from torch.nn import functional as F
from transformers import Cache, GenerationMixin, PreTrainedTokenizerBase, ProcessorMixin

from .versions_aurea import CACHE_NAME, one_cache
from .visual_cache_aurea import AureaVisualStatesCacheMixin, holds_visual_states
from .visual_context_aurea import count_images, group_by_row, has_text_that_should_have_seen, images_in_cache


if torch.distributed.is_available():
    from torch.distributed.fsdp import register_fsdp_forward_method

VISUAL_INPUTS = ("cross_attention_states", "image_embeds", "num_images")


class AureaGenerationMixin(GenerationMixin):
    @wraps(GenerationMixin.generate)
    def generate(self, *args, tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None, **kwargs):
        if isinstance(tokenizer, ProcessorMixin):  # `transformers serve` gives it in the tokenizer's place
            tokenizer = tokenizer.tokenizer
        return super().generate(*args, tokenizer=tokenizer, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        cross_attention_states: torch.FloatTensor | None = None,
        image_embeds: torch.FloatTensor | None = None,
        num_images: torch.LongTensor | None = None,
        cache: Cache | None = None,
        prompt_length: int | None = None,
        token_type_ids: torch.LongTensor | None = None,
        **kwargs,
    ):
        if token_type_ids is not None and self.config.prefix_mask != "prompt":
            kwargs["token_type_ids"] = token_type_ids  # the language model's own
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
        if image_embeds is not None:  # in every step: a prompt may be read in parts
            model_inputs |= {"image_embeds": image_embeds, "num_images": num_images}
        if cross_attention_states is not None and not is_cached:
            model_inputs |= {"cross_attention_states": cross_attention_states, "num_images": num_images}
        if cross_attention_states is None and image_embeds is None and pixel_values is not None and not is_cached:
            model_inputs["pixel_values"] = pixel_values
        ids, embeds = (model_inputs.get(name) for name in ("input_ids", "inputs_embeds"))
        text = embeds if ids is None else ids
        if self.config.prefix_mask != "causal" and text.shape[1] > 1:
            model_inputs["attention_mask"] = kwargs.get("attention_mask")  # of which `forward` makes the prefix's
        if self.config.prefix_mask == "prompt":
            given = input_ids.shape[1] if inputs_embeds is None else inputs_embeds.shape[1] + input_ids.shape[1]
            places = torch.arange(given - text.shape[1], given, device=text.device).expand(text.shape[:2])
            is_prompt = places < prompt_length
            if token_type_ids is not None:
                types = F.pad(token_type_ids[:, :prompt_length], (0, given - prompt_length))
                is_prompt = is_prompt & (types[:, -text.shape[1] :] == 0)
            model_inputs["prompt_blocks"] = torch.where(is_prompt, 0, -1)
        if self.config.first_position_id and model_inputs.get("position_ids") is not None:
            model_inputs["position_ids"] = model_inputs["position_ids"] + self.config.first_position_id
        return model_inputs

    def _supports_default_dynamic_cache(self) -> bool:
        return self.causal_lm._supports_default_dynamic_cache()

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        if generation_config.prefill_chunk_size is not None and self.config.prefix_mask != "causal":
            raise ValueError(
                f"`prefill_chunk_size` is {generation_config.prefill_chunk_size}, but with `prefix_mask="
                f"{self.config.prefix_mask!r}` words see what comes later. Leave it out."
            )
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
        if self.config.prefix_mask == "prompt":
            text = kwargs.get("inputs_embeds")
            kwargs["prompt_length"] = (input_ids if text is None else text).shape[1]
        if expand_size > 1:
            kwargs.pop("pixel_values", None)
        # Not repeated: the beams of a row see the same pictures.
        visual_inputs = {name: kwargs.pop(name) for name in VISUAL_INPUTS if name in kwargs}
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, kwargs | visual_inputs

    def _get_candidate_generator(self, *args, model_kwargs, assistant_model=None, **kwargs):
        if assistant_model is not None:  # one that drafts from the text alone takes none of these
            names = {"pixel_values", "mm_token_type_ids", "token_type_ids", "prompt_length", *VISUAL_INPUTS}
            names -= set(signature(assistant_model.forward).parameters)
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in names}
        return super()._get_candidate_generator(
            *args, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )

    def _encode_images_for_generation(self, input_ids: torch.LongTensor | None, model_kwargs: dict) -> dict:
        """Replace `pixel_values` by VISUAL_INPUTS, and have them replace cached ones."""
        pixel_values, connector = model_kwargs.get("pixel_values"), self.model.connector
        states = model_kwargs.get("cross_attention_states")
        states = model_kwargs.get("image_embeds") if states is None else states
        cache = model_kwargs.get(CACHE_NAME)
        has_cached_states = holds_visual_states(cache)
        if pixel_values is not None and pixel_values.shape[0] > 0:
            # Pixels beside states are what an assistant gets from the model it drafts for. Its own encoders look once,
            # in the first round; after that its cache knows.
            if states is not None and (has_cached_states or images_in_cache(cache) is not None):
                names = {"pixel_values", *VISUAL_INPUTS}
                return {name: value for name, value in model_kwargs.items() if name not in names}
            inputs_embeds = model_kwargs.get("inputs_embeds")
            image_tokens = self.model.get_placeholder_mask(
                input_ids if inputs_embeds is None else None, inputs_embeds, model_kwargs.get("mm_token_type_ids")
            )
            # Only the new text was given if the positions go back further than it.
            position_ids = model_kwargs.get("position_ids")
            is_continued = position_ids is not None and position_ids.shape[-1] > image_tokens.shape[1]
            seen = images_in_cache(cache) if is_continued else None
            counts = count_images(image_tokens, pixel_values.shape[0], seen, connector.placeholders_per_image)
            if connector.weaves and not is_continued and has_text_that_should_have_seen(cache, counts):
                cache.reset()  # the whole text was given, and is read again
            image_features = self._features_before_forward(pixel_values)
            states, num_images = group_by_row(image_features, counts)
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in VISUAL_INPUTS}
            model_kwargs |= connector.inputs(states, num_images)
        elif states is None and self.is_gathered_by_all:
            blank = torch.zeros(1, len(self.config.views), 3, *self.config.canvas, device=input_ids.device)
            image_features = self._features_before_forward(blank)
            if not has_cached_states:
                model_kwargs |= connector.inputs(image_features, input_ids.new_zeros(1))  # which no row sees
        if states is not None and has_cached_states:
            cache.forget_visual_states()
        return model_kwargs

    def _features_before_forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if torch.distributed.is_available() and "get_image_features" not in vars(self):
            register_fsdp_forward_method(self, "get_image_features")  # FSDP2 gathers weights for `forward` alone
        return self.get_image_features(pixel_values).pooler_output


__all__ = ["AureaGenerationMixin"]
