# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Which of an encoder's features an Aurea takes, and in which precision."""

import pytest
import torch
from conftest import TINY_TEXT, TINY_VISION, random_pixels, tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig, PreTrainedModel

from transformers_aurea import AureaConfig, AureaForConditionalGeneration


SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
# Encoders that give 4×4 patches, with their further settings and the class and register tokens before them.
ENCODERS = {
    "siglip_vision_model": ({"intermediate_size": 24}, 0),
    "clip_vision_model": ({"intermediate_size": 24}, 1),
    "vit": ({"intermediate_size": 24}, 1),
    "dinov2_with_registers": ({"mlp_ratio": 2, "num_register_tokens": 3}, 4),
    "radio": ({"mlp_ratio": 2.0, "max_img_size": 56}, 10),
}
FULL = {"vision_feature_select_strategy": "full"}
NO_FUSION = {"feature_fusion_config": {"fusion_type": "none"}}


def encoder_config(model_type: str) -> dict:
    return {"model_type": model_type, **SIZES, **ENCODERS[model_type][0]}


def model_of(model_type: str, **settings) -> AureaForConditionalGeneration:
    """An Aurea of a single encoder, that sees 28×28 pixels."""
    return tiny_model(vision_config=encoder_config(model_type), **{**NO_FUSION, **settings})


def bare(model: AureaForConditionalGeneration, name: str = "vision") -> PreTrainedModel:
    """An encoder's own class with its weights and precision, outside of an Aurea."""
    encoder = model.model.get_submodule(f"{name}_model")
    settings = {"add_pooling_layer": False} if encoder.config.model_type == "vit" else {}
    copy = AutoModel.from_config(getattr(model.config, f"{name}_config"), **settings).to(encoder.dtype).eval()
    copy.load_state_dict(encoder.state_dict())
    return copy


@torch.no_grad()
def hidden_states(model: AureaForConditionalGeneration, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Those that a single encoder gives by itself."""
    return bare(model)(pixels[:, 0], output_hidden_states=True).hidden_states


class TestLayers:
    @pytest.mark.parametrize("layer", [-2, -1, 0, 3, [1, -1, 1]], ids=str)
    @pytest.mark.parametrize("model_type", ENCODERS)
    def test_features_are_the_encoders_own_hidden_states(self, model_type, layer):
        model = model_of(model_type, vision_feature_layer=layer)
        pixels = random_pixels(2, model.config)
        layers = [layer] if isinstance(layer, int) else layer
        states = hidden_states(model, pixels)
        expected = torch.cat([states[number][:, -16:] for number in layers], dim=-1)
        with torch.no_grad():
            _, features = model.model.vision_model.encode(pixels)
        assert features.shape == (2, 4, 4, 16 * len(layers))
        assert torch.equal(features.flatten(1, 2), expected)
        assert model.config.feature_sizes == (16 * len(layers),)

    @pytest.mark.parametrize("model_type", ENCODERS)
    def test_by_default_they_are_the_last_after_its_norm(self, model_type):
        model = model_of(model_type)
        pixels = random_pixels(2, model.config)
        with torch.no_grad():
            _, features = model.model.vision_model.encode(pixels)
            expected = bare(model)(pixels[:, 0]).last_hidden_state[:, -16:]
        assert torch.equal(features.flatten(1, 2), expected)

    def test_each_encoder_has_its_own(self):
        model = tiny_model(vision_feature_layer=[0, 1], spatial_vision_feature_layer=-2)
        assert model.config.feature_sizes == (32, 12)
        pixels = random_pixels(1, model.config)
        with torch.no_grad():
            semantic = model.model.vision_model.encode(pixels)[1]
            spatial = model.model.spatial_vision_model.encode(pixels)[1]
            states = bare(model, "spatial_vision")(pixels[:, 1], output_hidden_states=True).hidden_states
        assert semantic.shape == (1, 4, 4, 32)
        assert torch.equal(spatial.flatten(1, 2), states[-2][:, -16:])
        assert model.get_image_features(pixels).pooler_output.isfinite().all()

    def test_hidden_states_are_given_to_who_asks(self):
        model = tiny_model(vision_feature_layer=-2)
        pixels = random_pixels(1, model.config)
        with torch.no_grad():
            plain = model.get_image_features(pixels)
            asked = model.get_image_features(pixels, output_hidden_states=True)
            model.model.vision_model.config.output_hidden_states = True
            configured = model.get_image_features(pixels)
        assert plain.hidden_states is None and plain.spatial_hidden_states is None
        assert len(asked.hidden_states) == len(asked.spatial_hidden_states) == len(configured.hidden_states) == 3
        assert torch.equal(asked.pooler_output, plain.pooler_output)
        assert torch.equal(asked.last_hidden_state, plain.last_hidden_state)

    @pytest.mark.parametrize("model_type", ENCODERS)
    def test_a_frozen_encoder_keeps_no_graph(self, model_type):
        model = model_of(model_type, vision_feature_layer=[-2, 1])
        pixels, encoder = random_pixels(1, model.config), model.model.vision_model.requires_grad_(False)
        norm = next(module for module in encoder.modules() if isinstance(module, torch.nn.LayerNorm))
        norm.register_forward_hook(lambda module, args, output: output.requires_grad_())  # as adapters of others do
        outputs, features = encoder.encode(pixels)
        assert not features.requires_grad and not outputs.last_hidden_state.requires_grad

    @pytest.mark.parametrize("checkpointing", [None, True, False], ids=["", "reentrant", "not-reentrant"])
    @pytest.mark.parametrize("model_type", ENCODERS)
    def test_one_that_trains_learns_below_its_layer_and_all_of_it_takes_part(self, model_type, checkpointing):
        model = model_of(model_type, vision_feature_layer=[1, -2])
        pixels, encoder = random_pixels(2, model.config), model.model.vision_model
        alone = bare(model)
        states = alone(pixels[:, 0], output_hidden_states=True).hidden_states
        torch.cat([states[1], states[-2]], dim=-1)[:, -16:].square().sum().backward()
        if checkpointing is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.train()
        encoder.encode(pixels)[1].square().sum().backward()
        for (name, parameter), expected in zip(encoder.named_parameters(), alone.parameters(), strict=True):
            expected = torch.zeros_like(parameter) if expected.grad is None else expected.grad
            torch.testing.assert_close(
                parameter.grad, expected, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


class TestAllTokens:
    @pytest.mark.parametrize("size", [28, [14, 42]], ids=str)
    @pytest.mark.parametrize("model_type", ENCODERS)
    def test_class_and_register_tokens_come_first(self, model_type, size):
        model = model_of(model_type, vision_feature_layer=-2, vision_image_size=size, **FULL)
        num_patches, prefix = (16 if size == 28 else 12), ENCODERS[model_type][1]
        assert model.config.feature_shapes == ((prefix + num_patches,),)
        assert model.config.tokens_per_image == prefix + num_patches
        pixels = random_pixels(2, model.config)
        with torch.no_grad():
            _, features = model.model.vision_model.encode(pixels)
            assert model.get_image_features(pixels).pooler_output.shape == (2, prefix + num_patches, 32)
        assert features.shape == (2, prefix + num_patches, 16)
        if size == 28:
            assert torch.equal(features, hidden_states(model, pixels)[-2])

    @pytest.mark.parametrize("connector", ["cross_attention", "prefix"])
    @pytest.mark.parametrize(("fusion_type", "num_tokens"), [("interleave", 16 + 21), ("cross_attention", 16)])
    def test_fusions_that_need_no_map_take_them(self, fusion_type, num_tokens, connector):
        fusion = {"fusion_type": fusion_type, "depth": 1}
        settings = {"feature_fusion_config": fusion, "connector_type": connector}
        model = tiny_model(spatial_vision_feature_select_strategy="full", **settings)
        assert model.config.feature_shapes == ((4, 4), (21,))
        assert model.config.tokens_per_image == num_tokens
        pixels = random_pixels(1, model.config)
        tokens = model.get_image_features(pixels).pooler_output
        assert tokens.shape == (1, num_tokens, 32)
        features = [
            encoder.encode(pixels)[1] for encoder in (model.model.vision_model, model.model.spatial_vision_model)
        ]
        tokens_alone = model.model.fusion(features[0].flatten(1, 2), features[1])
        assert torch.equal(model.model.multi_modal_projector(tokens_alone), tokens)
        changed = features[1].clone()
        changed[:, 0] += torch.arange(12)  # the class token
        assert not torch.equal(model.model.fusion(features[0], changed), tokens_alone)
        placeholders = [model.config.image_token_id] * (num_tokens if connector == "prefix" else 1)
        input_ids = torch.tensor([[1, *placeholders, 5, 6]])
        assert model(input_ids=input_ids, pixel_values=pixels, labels=input_ids).loss.isfinite()

    def test_the_diversity_loss_takes_them(self):
        model = model_of("vit", feature_diversity_coef=0.1, **FULL).train()
        outputs = model.get_image_features(random_pixels(2, model.config))
        assert outputs.auxiliary_losses["feature_diversity"].shape == (2,)

    def test_a_model_of_parts_has_them(self):
        vision = AutoModel.from_config(tiny_config(vision_config=encoder_config("vit"), **NO_FUSION).vision_config)
        text = AutoModelForCausalLM.from_config(LlamaConfig(**TINY_TEXT))
        model = AureaForConditionalGeneration.from_pretrained_parts(
            vision, None, text, image_token_id=98, vision_feature_layer=[1, -2], **FULL
        )
        pixels = random_pixels(1, model.config)
        _, features = model.model.vision_model.encode(pixels)
        states = vision.eval()(pixels[:, 0], output_hidden_states=True).hidden_states
        assert torch.equal(features, torch.cat([states[1], states[-2]], dim=-1))


def test_saving_and_loading_keeps_the_choice(tmp_path):
    settings = {"vision_feature_layer": [1, -2], "spatial_vision_feature_layer": 0, "encoder_dtype": "auto"}
    fusion = {"feature_fusion_config": {"fusion_type": "interleave"}}
    model = tiny_model(**settings, **FULL, **fusion)
    model.save_pretrained(tmp_path)
    loaded = AureaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert {name: getattr(loaded.config, name) for name in settings} == settings
    assert loaded.config.vision_feature_select_strategy == "full"
    pixels = random_pixels(1, model.config)
    with torch.no_grad():
        expected, found = (one.get_image_features(pixels).pooler_output for one in (model, loaded))
    assert torch.equal(found, expected)


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("origin", ["loaded", "new", "cast"])
    def test_auto_is_that_of_the_model(self, origin, dtype, tmp_path):
        config = tiny_config(encoder_dtype="auto")
        if origin == "loaded":
            tiny_model(encoder_dtype="auto").save_pretrained(tmp_path)
            model = AureaForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
        elif origin == "new":
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        else:
            model = AureaForConditionalGeneration(config).to(dtype)
        for encoder in (model.model.vision_model, model.model.spatial_vision_model):
            assert {parameter.dtype for parameter in encoder.parameters()} == {dtype}
        model, pixels = model.eval(), random_pixels(1, config)
        with torch.no_grad():
            found = model.get_image_features(pixels)
            expected = bare(model)(pixels[:, 0].to(dtype)).last_hidden_state
        assert found.last_hidden_state.dtype == dtype and torch.equal(found.last_hidden_state, expected)
        assert found.pooler_output.isfinite().all()

    @pytest.mark.parametrize("encoder_dtype, expected", [("auto", torch.bfloat16), ("float32", torch.float32)])
    def test_of_parts_it_is_the_language_models(self, encoder_dtype, expected):
        config = tiny_config()
        parts = [AutoModel.from_config(part) for part in config.encoder_configs.values()]
        text = AutoModelForCausalLM.from_config(LlamaConfig(**TINY_TEXT)).to(torch.bfloat16)
        model = AureaForConditionalGeneration.from_pretrained_parts(
            *parts, text, image_token_id=98, encoder_dtype=encoder_dtype, feature_fusion_config={"radius": 1}
        )
        assert model.dtype == torch.bfloat16
        for encoder in (model.model.vision_model, model.model.spatial_vision_model):
            assert {parameter.dtype for parameter in encoder.parameters()} == {expected}


BAD = {
    "too-deep": (
        {"vision_feature_layer": 3},
        r"`vision_feature_layer` is \[3\], but `vision_config` has 3 hidden states: .* from -3 to 2",
    ),
    "too-deep-from-the-end": (
        {"spatial_vision_feature_layer": [0, -4]},
        r"`spatial_vision_feature_layer` is \[0, -4\]",
    ),
    "none": ({"vision_feature_layer": []}, r"`vision_feature_layer` is \[\], .* one or more"),
    "unknown": ({"vision_feature_select_strategy": "patch"}, "vision_feature_select_strategy"),
    "dtype": ({"encoder_dtype": "bfloat16"}, "encoder_dtype"),
    "stages": (
        {"vision_config": {"model_type": "resnet"}, "vision_image_size": 128, "vision_feature_layer": -2},
        r"`vision_feature_layer` is \[-2\], but `vision_config` is of type 'resnet', whose stages differ",
    ),
    "stages-full": (
        {"vision_config": {"model_type": "swin"}, "vision_image_size": 128, **FULL, **NO_FUSION},
        "`vision_feature_select_strategy=\"full\"` keeps class tokens, but `vision_config` is of type 'swin'",
    ),
    "consistency": (
        {**FULL, **NO_FUSION, "feature_consistency_coef": 0.5},
        r'"full"` gives tokens without a grid, but the feature consistency loss .* `feature_consistency_coef` \(0.5\)',
    ),
    **{
        fusion_type: (
            {**FULL, "feature_fusion_config": {"fusion_type": fusion_type, "radius": 1}},
            rf"the fusion '{fusion_type}' needs a map.*'interleave', 'cross_attention', 'none'",
        )
        for fusion_type in ("spatial_range", "concat", "sva")
    },
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD)
def test_what_an_encoder_cannot_give_is_refused_with_the_reason(settings, message):
    with pytest.raises(StrictDataclassError, match=message):
        AureaConfig(text_config={"model_type": "phi3", **TINY_TEXT}, **{**TINY_VISION, **settings})
