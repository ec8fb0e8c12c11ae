# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Composition of the two encoders, compared with the same written down again, layer by layer."""

import itertools
import math
import re

import pytest
import torch
from conftest import (
    IMAGE_TOKEN_ID,
    TINY_VISION,
    random_pixels,
    run_without_package,
    some,
    tiny_config,
    tiny_model,
)
from huggingface_hub.errors import StrictDataclassError
from test_training_aurea import InOrder, collate, figures, row, train
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from transformers_aurea import AureaConfig, AureaForConditionalGeneration, TrainableReport
from transformers_aurea.fusion_aurea import FUSIONS
from transformers_aurea.training_aurea import CompositionEntropy, GroupGradientNorms, lora_targets, set_trainable


TYPES = ["cross_attention", "gated_attention", "simple_add"]
MAPPINGS = ["linear", "mlp", "attention"]
# Unequal in depth, width and number of tokens: one with a class token, one with class and register tokens.
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
DINO = {**TINY_VISION["spatial_vision_config"], "num_hidden_layers": 3}
GREEDY = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None}


def composition(**settings) -> dict:
    return {"num_composition_layers": 2, "num_attention_heads": 4, **settings}


def composed_model(settings: dict | None = None, **kwargs) -> AureaForConditionalGeneration:
    encoders = {"vision_config": CLIP, "spatial_vision_config": DINO}
    return tiny_model(composition_config=composition(**(settings or {})), **{**encoders, **kwargs})


def text_with_picture(model) -> torch.Tensor:
    return torch.tensor([[5, *[IMAGE_TOKEN_ID] * model.config.placeholders_per_image, 7, 8, 9]])


def norm(state, name, states):
    return F.layer_norm(states, states.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)


def linear(state, name, states):
    return F.linear(states, state[f"{name}.weight"], state.get(f"{name}.bias"))


def attention(state, name, tokens, source, num_heads):
    query, key, value = (
        linear(state, f"{name}.{part}_proj", states) for part, states in zip("qkv", (tokens, source, source))
    )
    outputs = []
    for query_head, key_head, value_head in zip(*(states.chunk(num_heads, dim=-1) for states in (query, key, value))):
        scores = torch.einsum("bnc,bmc->bnm", query_head, key_head) / query_head.shape[-1] ** 0.5
        outputs.append(torch.einsum("bnm,bmc->bnc", scores.softmax(-1), value_head))
    return linear(state, f"{name}.o_proj", torch.cat(outputs, dim=-1))


def composed_by_hand(state, settings, hidden_states, source, num_patches):
    """One composition from its state dict, as `docs/relatives.md` has it."""
    source = norm(state, "source_norm", source)
    if settings["mapping_type"] == "linear":
        mapped = linear(state, "mapping", source)
    elif settings["mapping_type"] == "mlp":
        mapped = linear(state, "mapping.2", F.gelu(linear(state, "mapping.0", source)))
    else:
        mapped = linear(state, "mapping.proj", source)
        normed = norm(state, "mapping.norm", mapped)
        mapped = mapped + attention(state, "mapping.self_attn", normed, normed, 4)
    if settings["composition_type"] == "simple_add":
        composed = hidden_states.clone()
        composed[:, -num_patches:] += linear(state, "output_proj", mapped[:, -num_patches:])
        return composed
    normed = norm(state, "norm", hidden_states)
    answer = attention(state, "cross_attn", normed, mapped, 4)
    if settings["composition_type"] == "gated_attention":
        answer = linear(state, "gate_proj", torch.cat([normed, answer], dim=-1)).sigmoid() * answer
    return hidden_states + answer


@torch.no_grad()
def features_by_hand(model, settings, pixel_values):
    """The semantic encoder's features, from the bare layers of both encoders."""
    spatial = AutoModel.from_config(model.config.spatial_vision_config).eval()
    spatial.load_state_dict(
        {name: model.state_dict()[f"model.spatial_vision_model.{name}"] for name in spatial.state_dict()}
    )
    sources = spatial(pixel_values[:, 1], output_hidden_states=True).hidden_states
    semantic = AutoModel.from_config(model.config.vision_config).eval()
    semantic.load_state_dict(
        {name: model.state_dict()[f"model.vision_model.{name}"] for name in semantic.state_dict()}
    )
    inside = getattr(semantic, "vision_model", semantic)
    number = model.config.composition_config.num_composition_layers
    states = inside.pre_layrnorm(inside.embeddings(pixel_values[:, 0]))
    for idx, layer in enumerate(inside.encoder.layers, start=1):
        states = layer(states, attention_mask=None)
        states = states[0] if isinstance(states, tuple) else states
        for place in range(number):
            if idx == (place + 1) * 5 // number:
                prefix = f"model.composition.layers.{place}."
                state = {k.removeprefix(prefix): v for k, v in model.state_dict().items() if k.startswith(prefix)}
                states = composed_by_hand(state, settings, states, sources[(place + 1) * 3 // number], 16)
    return states


@pytest.mark.parametrize(  # each two of the three settings together
    ("composition_type", "mapping_type", "number"),
    some(
        itertools.product(TYPES, MAPPINGS, [1, 2, 3]),
        lambda kind, mapping, number: (TYPES.index(kind) + MAPPINGS.index(mapping) + number) % 3 == 0,
    ),
)
@torch.no_grad()
def test_it_is_the_formula_between_the_bare_layers(composition_type, mapping_type, number):
    settings = {"composition_type": composition_type, "mapping_type": mapping_type}
    model = composed_model({**settings, "num_composition_layers": number})
    for parameter in model.model.composition.parameters():  # norms too
        parameter.add_(0.1 * torch.randn_like(parameter))
    pixel_values = random_pixels(2, model.config)
    expected = features_by_hand(model, settings, pixel_values)
    given = model.get_image_features(pixel_values)
    torch.testing.assert_close(given.last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    plain, _ = model.model.vision_model.encode(pixel_values)
    assert (plain.last_hidden_state - expected).abs().max() > 1e-2
    assert given.hidden_states is None and given.spatial_hidden_states is None


class TestGradients:
    @pytest.mark.parametrize(("composition_type", "mapping_type"), itertools.product(TYPES, MAPPINGS))
    def test_every_parameter_gets_one_and_frozen_encoders_none(self, composition_type, mapping_type):
        self.check(composed_model({"composition_type": composition_type, "mapping_type": mapping_type}))

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_so_with_gradient_checkpointing(self, use_reentrant):
        model = composed_model({"composition_type": "gated_attention"})
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        self.check(model)

    def check(self, model):
        set_trainable(model, "compose")
        input_ids = text_with_picture(model)
        model.train()(input_ids, pixel_values=random_pixels(1, model.config), labels=input_ids).loss.backward()
        for name, parameter in model.named_parameters():
            if ".composition." in name and not name.endswith("k_proj.bias"):
                assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
            elif ".composition." not in name:
                assert parameter.grad is None, name

    def test_text_alone_gives_gradients_of_zero(self):
        model = composed_model()
        set_trainable(model, "compose")
        input_ids = torch.tensor([[5, 6, 7]])
        model.train()(input_ids, labels=input_ids).loss.backward()
        assert all(parameter.grad.abs().max() == 0 for parameter in model.model.composition.parameters())

    def test_encoders_without_composition_keep_no_activations(self):
        model = composed_model()
        set_trainable(model, "projector")
        outputs = model.train().get_image_features(random_pixels(1, model.config))
        assert not outputs.last_hidden_state.requires_grad

    def test_semantic_layers_before_the_first_composition_keep_none(self):
        model = composed_model()
        set_trainable(model, "compose")
        outputs = model.train().get_image_features(random_pixels(1, model.config), output_hidden_states=True)
        assert [states.requires_grad for states in outputs.hidden_states] == [False, False, True, True, True, True]
        assert not any(states.requires_grad for states in outputs.spatial_hidden_states)


@pytest.mark.parametrize(
    ("connector_type", "fusion_type"),
    some(
        itertools.product(["cross_attention", "prefix"], FUSIONS),
        lambda connector, fusion: connector == "prefix" or fusion == "sva",
    ),
)
@torch.no_grad()
def test_it_stands_before_any_fusion_and_connector(fusion_type, connector_type):
    fusion = {"fusion_type": fusion_type, "radius": 1, "depth": 1}
    model = composed_model(feature_fusion_config=fusion, connector_type=connector_type)
    pixel_values = random_pixels(1, model.config)
    inputs = {"input_ids": text_with_picture(model), "pixel_values": pixel_values}
    assert model.generate(**inputs, **GREEDY).tolist() == model.generate(**inputs, **GREEDY, use_cache=False).tolist()
    logits = model(**inputs).logits
    for view in range(2):  # the spatial view is seen also by a fusion that reads the semantic encoder alone
        blinded = pixel_values.clone()
        blinded[:, view] = 0
        assert (model(**inputs | {"pixel_values": blinded}).logits - logits).abs().max() > 1e-4


def test_features_of_inner_layers_are_composed_too():
    model = composed_model(vision_feature_layer=[-2, 3])
    pixel_values = random_pixels(1, model.config)
    outputs, _features = model.model.vision_model.encode(pixel_values, output_hidden_states=True)
    composed = model.get_image_features(pixel_values, output_hidden_states=True)
    for layer in (0, 1):
        assert torch.equal(composed.hidden_states[layer], outputs.hidden_states[layer])
    for layer in (2, 3, 4, 5):
        assert not torch.equal(composed.hidden_states[layer], outputs.hidden_states[layer])


class TestParts:
    def parts(self):
        torch.manual_seed(0)
        siglip = SiglipVisionModel(SiglipVisionConfig(**TINY_VISION["vision_config"]))
        dino = Dinov2Model(Dinov2Config(hidden_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=28))
        return siglip, dino, tiny_model().config.text_config

    @pytest.mark.parametrize("composition_type", TYPES)
    @pytest.mark.parametrize("mapping_type", MAPPINGS)
    @torch.no_grad()
    def test_until_it_is_trained_the_encoder_is_itself(self, composition_type, mapping_type):
        siglip, dino, text_config = self.parts()
        text = AutoModelForCausalLM.from_config(text_config)
        settings = {"feature_fusion_config": {"fusion_type": "none"}, "image_token_id": IMAGE_TOKEN_ID}
        composed = {"composition_type": composition_type, "mapping_type": mapping_type}
        model = AureaForConditionalGeneration.from_pretrained_parts(
            siglip, dino, text, composition_config=composition(**composed), **settings
        )
        pixel_values = random_pixels(2, model.config)
        given = model.get_image_features(pixel_values).last_hidden_state
        expected = siglip(pixel_values[:, 0, :, :28, :28]).last_hidden_state
        assert torch.equal(given, expected)
        for name, parameter in model.model.composition.named_parameters():
            is_last = name.endswith(("cross_attn.o_proj.weight", "output_proj.weight"))
            assert is_last == (parameter.ndim > 1 and parameter.abs().max() == 0), name
            if is_last:
                parameter.normal_()
        assert not torch.equal(model.get_image_features(pixel_values).last_hidden_state, expected)


class TestSaving:
    def test_it_is_kept_and_loads_where_this_package_is_not(self, tmp_path):
        model = composed_model({"composition_type": "gated_attention", "mapping_type": "mlp"})
        inputs = {"input_ids": text_with_picture(model), "pixel_values": random_pixels(1, model.config)}
        with torch.no_grad():
            logits = model(**inputs).logits
        model.save_pretrained(tmp_path / "model")
        loaded = AureaForConditionalGeneration.from_pretrained(tmp_path / "model")
        assert loaded.config.composition_config.composition_type == "gated_attention"
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, logits)
        torch.save({**inputs, "logits": logits}, tmp_path / "inputs.pt")
        script = """
import torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained("model", trust_remote_code=True)
inputs = torch.load("inputs.pt")
expected = inputs.pop("logits")
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, expected)
"""
        run_without_package(script, tmp_path)

    def test_a_model_without_one_has_no_trace_of_it(self):
        model = tiny_model()
        assert model.config.composition_config is None
        assert not any("composition" in name for name in model.state_dict())

    def test_half_precision_stays_near(self):
        model = composed_model()
        pixel_values = random_pixels(1, model.config)
        with torch.no_grad():
            expected = model.get_image_features(pixel_values).last_hidden_state
            half = model.to(torch.bfloat16)
            half.model.vision_model.float(), half.model.spatial_vision_model.float()
            given = half.get_image_features(pixel_values).last_hidden_state
        assert given.dtype == torch.float32  # the encoders'
        assert (given - expected).abs().max() < 0.03 * expected.abs().max()


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            (
                {"num_composition_layers": 4},
                r"\(4\) must not be more than the layers of `spatial_vision_config` .*\(3\)\. Set it to 3 or less",
            ),
            ({"num_attention_heads": 3}, r"\(3\) must divide `vision_config.hidden_size` \(16\)"),
            ({"num_composition_layers": 0}, "must be at least 1, got 0"),
            ({"composition_type": "sum"}, "composition_type"),
            ({"mapping_type": "cubic"}, "mapping_type"),
        ],
    )
    def test_settings_that_cannot_work(self, settings, match):
        with pytest.raises(StrictDataclassError, match=match):
            composed_model(settings)

    def test_two_grids_of_patches_that_are_added(self):
        sizes = {"vision_image_size": 28, "spatial_vision_image_size": 56}
        fusion = {"feature_fusion_config": {"fusion_type": "interleave"}}
        assert composed_model(**sizes, **fusion).config.grid_sizes == ((4, 4), (8, 8))
        with pytest.raises(StrictDataclassError, match=r"needs one grid.*\(4, 4\).*\(8, 8\)"):
            composed_model({"composition_type": "simple_add"}, **sizes, **fusion)

    def test_a_fusion_that_does_not_read_the_semantic_encoder(self):
        fusion = {"fusion_type": "none", "encoder": "spatial_vision"}
        with pytest.raises(StrictDataclassError, match="reads the spatial encoder alone"):
            composed_model(feature_fusion_config=fusion)

    @pytest.mark.parametrize("place", ["vision_config", "spatial_vision_config"])
    def test_encoders_of_stages(self, place):
        resnet = {"model_type": "resnet", "hidden_sizes": [8, 8], "depths": [1, 1], "embedding_size": 8}
        sizes = {"vision_image_size": 56, "spatial_vision_image_size": 56}
        with pytest.raises(StrictDataclassError, match=rf"`{place}` is of type 'resnet', an encoder of stages"):
            composed_model(**{place: resnet}, feature_fusion_config={"fusion_type": "interleave"}, **sizes)

    @pytest.mark.parametrize("takes_keywords", [True, False])
    def test_an_encoder_that_hands_no_keywords_to_its_layers(self, takes_keywords, monkeypatch):
        config, hears = composed_model().config, CLIPVisionModel.forward
        deaf = [lambda self, pixel_values: hears(self, pixel_values), lambda self, pixels, **_: hears(self, pixels)]
        monkeypatch.setattr(CLIPVisionModel, "forward", deaf[takes_keywords])
        with pytest.raises(
            ValueError, match="CLIPVisionModel was not seen to hand keyword arguments on to its 5 layers"
        ):
            AureaForConditionalGeneration(config)


def test_its_share_of_two_large_encoders_is_below_five_percent():
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
    encoders = {
        "vision_config": {"model_type": "clip_vision_model", "intermediate_size": 4096, "image_size": 224, **large},
        "spatial_vision_config": {"model_type": "dinov2", "image_size": 518, **large},
    }
    for composition_type, share in (("cross_attention", 0.0346), ("gated_attention", 0.0484)):
        settings = {"composition_config": {"composition_type": composition_type}}
        settings |= {"feature_fusion_config": {"fusion_type": "none"}, "connector_type": "prefix"}
        with torch.device("meta"):
            report = TrainableReport.of(AureaForConditionalGeneration(tiny_config(**encoders, **settings)))
        towers = report["vision"][1] + report["spatial_vision"][1]
        assert report["composition"][1] / towers == pytest.approx(share, abs=5e-4)


def test_presets_and_stages_find_it():
    model = composed_model({"mapping_type": "attention"})
    report = set_trainable(model, "compose")
    assert report.trainable == report["composition"][0] == report["composition"][1] > 0
    assert set_trainable(model, "instruct")["composition"][0] == 0
    pattern = lora_targets(model, "composition")
    hit = {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)}
    assert hit == {
        f"model.composition.layers.{idx}.{name}"
        for idx in range(2)
        for name in (
            "mapping.proj",
            *(f"{part}.{proj}_proj" for part in ("mapping.self_attn", "cross_attn") for proj in "qkvo"),
        )
    }
    with pytest.raises(ValueError, match="has no parameters"):
        set_trainable(tiny_model(), "composition")


def test_its_entropy_and_gradient_norm_are_logged(tmp_path):
    model = tiny_model(composition_config=composition())
    set_trainable(model, "compose")
    with torch.no_grad():
        model.model.composition.layers[1].cross_attn.q_proj.weight.zero_()  # looks at all tokens alike
    first = model.model.composition.layers[0].cross_attn
    looks = []
    hook = first.register_forward_hook(lambda module, inputs, _: looks.append(module.weights(*inputs)))
    batch = collate([row(0, 1), row(1, 2)])
    with torch.no_grad():
        model(**batch)
    hook.remove()
    [weights] = looks
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 16))
    entropy = -(weights * weights.log()).sum(-1).mean().item()
    settings = {"max_steps": 1, "logging_steps": 1, "gradient_accumulation_steps": 1}
    settings |= {"accelerator_config": {"dispatch_batches": False}}
    recorder = train(
        model, tmp_path, CompositionEntropy(), GroupGradientNorms(), rows=InOrder([row(0, 1), row(1, 2)]), **settings
    )
    [entropies], [norms] = figures(recorder, "composition_entropy"), figures(recorder, "grad_norm/")
    num_tokens = 1 + 4 + 16  # a class token, registers and patches
    assert entropies["composition_entropy/1"] == pytest.approx(math.log(num_tokens), abs=1e-5)
    assert entropies["composition_entropy/1_share"] == pytest.approx(1, abs=1e-5)
    assert entropies["composition_entropy/0"] == pytest.approx(entropy, rel=1e-4)
    assert norms.keys() == {"grad_norm/composition"} and norms["grad_norm/composition"] > 0


def test_a_configuration_may_say_it_as_a_dictionary_or_not_at_all():
    config = AureaConfig(composition_config={"num_composition_layers": 8})
    assert config.composition_config.num_attention_heads == 8
    assert AureaConfig().composition_config is None


def test_it_can_be_put_onto_a_saved_model(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = AureaForConditionalGeneration.from_pretrained(tmp_path, composition_config=composition())
    assert model.config.composition_config.num_composition_layers == 2
    with pytest.raises(StrictDataclassError, match="composition_type"):
        AureaConfig.from_pretrained(tmp_path, composition_config={"composition_type": "x"})


@pytest.mark.parametrize("layer", [None, -1, -2, [1, 3]])
def test_every_parameter_of_both_encoders_takes_part_whatever_is_read(layer):
    fusion = {"feature_fusion_config": {"fusion_type": "none"}, "connector_type": "prefix"}
    model = composed_model(vision_feature_layer=layer, **fusion).train()
    input_ids = text_with_picture(model)
    model(input_ids, pixel_values=random_pixels(1, model.config), labels=input_ids).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    for name, parameter in model.model.composition.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_features_before_all_compositions_are_refused():
    with pytest.raises(
        StrictDataclassError, match=r"\(2\) must not be more than the layers of `vision_config` .*\(0\)\. Let"
    ):
        composed_model(vision_feature_layer=0)
