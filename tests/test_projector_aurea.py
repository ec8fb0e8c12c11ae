# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from conftest import random_pixels, tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F

from transformers_aurea import AureaForConditionalGeneration
from transformers_aurea.projector_aurea import AureaMultiModalProjector
from transformers_aurea.versions_aurea import CACHE_NAME


def test_by_default_it_is_two_layers_without_bias_and_silu_between():
    projector = AureaMultiModalProjector(tiny_config(), 24)
    features = torch.randn(2, 5, 24)
    inner = F.silu(features @ projector.linear_1.weight.T)
    torch.testing.assert_close(projector(features), inner @ projector.linear_2.weight.T)
    assert {name for name, _ in projector.named_parameters()} == {"linear_1.weight", "linear_2.weight"}


def test_depth_activation_and_bias_are_the_configurations():
    features = torch.randn(2, 5, 24)
    one = AureaMultiModalProjector(tiny_config(projector_num_layers=1, projector_bias=True), 24)
    assert {name for name, _ in one.named_parameters()} == {"linear_1.weight", "linear_1.bias"}
    torch.testing.assert_close(one(features), F.linear(features, one.linear_1.weight, one.linear_1.bias))
    two = AureaMultiModalProjector(tiny_config(projector_hidden_act="gelu", projector_bias=True), 24)
    inner = F.gelu(F.linear(features, two.linear_1.weight, two.linear_1.bias))
    torch.testing.assert_close(two(features), F.linear(inner, two.linear_2.weight, two.linear_2.bias))
    three = AureaMultiModalProjector(tiny_config(projector_hidden_act="gelu", projector_num_layers=3), 24)
    assert [three.get_submodule(f"linear_{number}").out_features for number in (1, 2, 3)] == [96, 32, 32]
    inner = F.gelu(features @ three.linear_1.weight.T)
    inner = F.gelu(inner @ three.linear_2.weight.T)
    torch.testing.assert_close(three(features), inner @ three.linear_3.weight.T)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"projector_num_layers": 4}, "projector_num_layers"),
        ({"projector_hidden_act": "glu"}, "`projector_hidden_act` is 'glu'"),
        ({"first_position_id": -1}, "`first_position_id` must be 0 or greater, got -1"),
        ({"lm_head_type": "none"}, "lm_head_type"),
    ],
    ids=str,
)
def test_what_makes_no_model_is_refused_by_name(settings, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_config(**settings)


@torch.no_grad()
def test_settings_of_relatives_survive_saving(tmp_path):
    settings = {"projector_num_layers": 1, "projector_bias": True, "first_position_id": 1, "lm_head_type": "linear"}
    model = tiny_model(**settings)
    model.save_pretrained(tmp_path)
    loaded = AureaForConditionalGeneration.from_pretrained(tmp_path).eval()
    inputs = {"input_ids": torch.tensor([[98, 5, 6]]), "pixel_values": random_pixels(1, model.config)}
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
def test_positions_begin_where_the_configuration_says():
    text = {"model_type": "gpt2", "n_positions": 64}  # which learns a vector for each
    model, shifted = tiny_model(text), tiny_model(text, first_position_id=3)
    ids = torch.arange(3, 9)[None]
    positions = torch.arange(3, 9)[None]
    assert torch.equal(shifted(ids).logits, model(ids, position_ids=positions).logits)
    assert not torch.allclose(shifted(ids).logits, model(ids).logits, atol=1e-3)
    first = shifted(ids[:, :4], use_cache=True)
    cache = {CACHE_NAME: first[CACHE_NAME]}
    torch.testing.assert_close(shifted(ids[:, 4:], **cache).logits, shifted(ids).logits[:, 4:], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_linear_head_is_one_whatever_the_language_models_own_does():
    text = {"model_type": "cohere", "logit_scale": 0.25, "num_hidden_layers": 1}
    own, linear = tiny_model(text), tiny_model(text, lm_head_type="linear")
    linear.load_state_dict(own.state_dict())
    ids = torch.arange(3, 9)[None]
    torch.testing.assert_close(0.25 * linear(ids).logits, own(ids).logits)
    assert linear(ids, logits_to_keep=2).logits.shape[1] == 2


@torch.no_grad()
def test_all_tokens_but_the_first_are_features():
    encoder = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
    settings = {
        "vision_config": {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 7, **encoder},
        "feature_fusion_config": {"fusion_type": "none"},
    }
    every, rest = (tiny_model(**settings, vision_feature_select_strategy=how) for how in ("full", "drop_first"))
    assert (every.config.tokens_per_image, rest.config.tokens_per_image) == (16, 15)
    pixels = random_pixels(1, every.config)[:, 0]  # of one view
    features, expected = (model.get_image_features(pixels).pooler_output for model in (rest, every))
    torch.testing.assert_close(features, expected[:, 1:])


@torch.no_grad()
def test_generation_begins_there_too():
    model = tiny_model({"model_type": "gpt2", "n_positions": 64}, first_position_id=3)
    settings = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    generated = model.generate(torch.arange(3, 9)[None], **settings)
    for step, logits in enumerate(generated.logits):
        expected = model(generated.sequences[:, : 6 + step]).logits[:, -1]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
