# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Configuration, model and training."""

import unittest

import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from tests.test_training_mixin import TrainingTesterMixin
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from transformers_aurea import AureaConfig, AureaForConditionalGeneration, AureaModel


# By this table the tests tell a model without a head, which has no loss.
MODEL_MAPPING_NAMES["aurea"] = "AureaModel"

IMAGE_TOKEN_ID = 3
TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 2,
}


class Tester:
    """A tiny configuration and a batch of texts, each with a picture at its front."""

    batch_size = 3
    num_text_tokens = 7
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    is_training = True
    has_pictures = True

    config_class: type
    base_model_class: type
    causal_lm_class: type
    num_image_tokens: int
    image_shape: tuple[int, ...]

    @property
    def seq_length(self) -> int:
        return self.num_image_tokens + self.num_text_tokens

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.seq_length], TEXT["vocab_size"] - 4) + 4
        input_ids[:, : self.num_image_tokens] = IMAGE_TOKEN_ID
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if self.has_pictures:
            inputs["pixel_values"] = floats_tensor([self.batch_size, *self.image_shape])
        return self.get_config(), inputs


class AureaTester(Tester):
    config_class = AureaConfig
    base_model_class = AureaModel
    causal_lm_class = AureaForConditionalGeneration
    num_image_tokens = 1
    image_shape = (2, 3, 8, 8)

    def get_config(self) -> AureaConfig:
        return AureaConfig(
            text_config={"model_type": "phi3", **TEXT},
            vision_config={"model_type": "siglip_vision_model", **VISION},
            spatial_vision_config={"model_type": "dinov2_with_registers", **VISION},
            feature_fusion_config={"radius": 1, "depth": 1},
            image_token_id=IMAGE_TOKEN_ID,
            vocab_size=TEXT["vocab_size"],  # the training mixin reads it here
        )


class LlavaTester(Tester):
    config_class = LlavaConfig
    base_model_class = LlavaModel
    causal_lm_class = LlavaForConditionalGeneration
    num_image_tokens = 16
    image_shape = (3, 8, 8)

    def get_config(self) -> LlavaConfig:
        return LlavaConfig(
            text_config={"model_type": "llama", **TEXT},
            vision_config={"model_type": "clip_vision_model", "projection_dim": 32, **VISION},
            image_token_index=IMAGE_TOKEN_ID,
            image_seq_length=self.num_image_tokens,
            vision_feature_layer=-1,
            vocab_size=TEXT["vocab_size"],
        )


class CommonTests(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    model_tester_class: type[Tester]
    model_tester = None  # abstract in the training mixin
    _is_composite = True

    def setUp(self):
        self.model_tester = self.model_tester_class()
        self.all_model_classes = (self.model_tester.base_model_class, self.model_tester.causal_lm_class)

    def test_config(self):
        ConfigTester(self, self.model_tester.config_class, has_text_modality=False).run_common_tests()


class AureaCommonTest(CommonTests, unittest.TestCase):
    model_tester_class = AureaTester

    def setUp(self):
        super().setUp()
        if self._testMethodName == "test_bc_cache_name_forward":  # it knows no cache that keeps pictures as well
            self.model_tester.has_pictures = False

    def test_reverse_loading_mapping(self):
        # Weights are saved under the model's own names, by which alone `Trainer` resumes.
        super().test_reverse_loading_mapping(check_keys_were_modified=False)


class LlavaCommonTest(CommonTests, unittest.TestCase):
    model_tester_class = LlavaTester
    test_all_params_have_gradient = False  # CLIP's last norm is for the pooled output
