# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
import copy
import json

import pytest
import torch
from conftest import FIXTURES, TINY_TEXT, TINY_VISION, random_pixels, tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, LlamaConfig

from transformers_aurea import AureaConfig, AureaForConditionalGeneration, AureaFusionConfig


def test_defaults_are_the_published_sizes():
    config = AureaConfig()
    assert config.feature_sizes == (1152, 1536)
    assert config.view_sizes == ((224, 224), (224, 224))
    assert config.grid_sizes == ((16, 16), (16, 16))
    assert config.tokens_per_image == 256
    assert config.projector_hidden_size == 12288
    assert (config.cross_attention_num_heads, config.cross_attention_num_key_value_heads) == (24, 8)
    assert (config.cross_attention_head_dim, config.cross_attention_intermediate_size) == (128, 8192)
    assert (config.feature_fusion_config.depth, config.feature_fusion_config.radius) == (4, 3)
    assert config.tie_word_embeddings
    assert config.cross_attention_norm_eps == 1e-5


def test_a_models_own_configuration_stays_as_it_is():
    text_config = LlamaConfig(**TINY_TEXT, tie_word_embeddings=False)
    before = copy.deepcopy(vars(text_config))
    config = tiny_config(tie_word_embeddings=True)
    config = AureaConfig(**{**config.to_dict(), "text_config": text_config, "tie_word_embeddings": True})
    assert config.text_config.tie_word_embeddings and config.text_config.model_type == "llama"
    assert vars(text_config) == before


def test_default_rotary_frequencies_are_the_recorded_ones_at_every_length():
    parameters = AureaConfig().text_config.rope_parameters
    assert parameters["short_factor"] == parameters["long_factor"]
    exponents = torch.arange(0, 96, 2).float() / 96
    frequencies = 1 / (torch.tensor(parameters["long_factor"]) * 10000**exponents)
    recorded = load_file(FIXTURES / "rope_full.safetensors")["inv_freq"].flatten()
    torch.testing.assert_close(frequencies, recorded, atol=0, rtol=1e-6)


@pytest.mark.parametrize(
    ("num_layers", "positions"),
    [(1, [0, 1]), (4, [0, 2, 4]), (5, [0, 2, 4, 5]), (32, [*range(0, 32, 2), 32])],
)
def test_published_rule_of_block_positions(num_layers, positions):
    assert tiny_config({"num_hidden_layers": num_layers}).cross_attention_positions == positions


@pytest.mark.parametrize(("hidden_size", "heads"), [(32, 1), (128, 2), (192, 3)])
def test_heads_of_a_language_model_without_any_have_64_channels(hidden_size, heads):
    text_config = {"model_type": "mamba", "hidden_size": hidden_size, "num_hidden_layers": 2}
    config = AureaConfig(text_config=text_config, **TINY_VISION)
    assert (config.cross_attention_num_heads, config.cross_attention_num_key_value_heads) == (heads, heads)
    assert config.cross_attention_head_dim == min(hidden_size, 64)


def test_block_positions_can_be_chosen():
    assert tiny_config(cross_attention_layers=[3, 1]).cross_attention_positions == [1, 3]


@pytest.mark.parametrize("config", [AureaConfig, tiny_config], ids=["published", "tiny"])
def test_saving_and_loading_changes_nothing(config, tmp_path):
    config = config()
    config.save_pretrained(tmp_path)
    assert AureaConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert type(AutoConfig.from_pretrained(tmp_path)) is AureaConfig
    written = json.loads((tmp_path / "config.json").read_text())
    assert len(written["auto_map"]) == 6
    assert written["feature_fusion_config"]["model_type"] == "aurea_fusion"


def test_folder_of_another_model_is_refused(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    for aurea_class in (AureaConfig, AureaForConditionalGeneration):
        with pytest.raises(ValueError, match=r"type 'llama', not of an Aurea.*from_pretrained_parts"):
            aurea_class.from_pretrained(tmp_path)


def test_parts_may_be_dictionaries_or_configurations():
    text = LlamaConfig(**TINY_TEXT)
    config = tiny_config()
    mixed = AureaConfig(
        text_config=text,
        vision_config=config.vision_config.to_dict(),
        spatial_vision_config=config.spatial_vision_config,
        feature_fusion_config=AureaFusionConfig(radius=1, depth=1),
    )
    assert mixed.text_config is text
    assert mixed.vision_config.to_dict() == config.vision_config.to_dict()


class TestFormerNameOfTheFusion:
    @pytest.mark.parametrize("fusion", [{"radius": 2}, AureaFusionConfig(radius=2)], ids=["dict", "config"])
    def test_it_is_taken_with_one_warning(self, fusion):
        with pytest.warns(FutureWarning, match="the argument is `feature_fusion_config` now") as warnings:
            config = AureaConfig(fusion_config=fusion)
        assert len(warnings) == 1
        assert config.to_dict() == AureaConfig(feature_fusion_config={"radius": 2}).to_dict()
        assert "fusion_config" not in config.to_dict()

    def test_it_overrides_what_a_folder_says_with_one_warning(self, tmp_path):
        tiny_config().save_pretrained(tmp_path)
        with pytest.warns(FutureWarning, match="`feature_fusion_config` now") as warnings:
            config = AureaConfig.from_pretrained(tmp_path, fusion_config={"radius": 2})
        assert len(warnings) == 1
        assert (config.feature_fusion_config.radius, config.feature_fusion_config.depth) == (2, 1)

    def test_both_names_at_once_are_refused(self):
        for former in ({"radius": 2}, AureaFusionConfig(radius=2)):
            with pytest.raises(ValueError, match="give one of the two"):
                AureaConfig(feature_fusion_config={"radius": 2}, fusion_config=former)

    def test_nothing_answers_to_it(self):
        """transformers takes what a configuration has under this name for its own."""
        assert not hasattr(AureaConfig(), "fusion_config")


class TestFormerNamesOfOneEncoderAlone:
    @pytest.fixture(params=[("semantic", "vision", 16), ("spatial", "spatial_vision", 12)], ids=lambda each: each[0])
    def former(self, request, tmp_path):
        """A folder as version 0.1 wrote it, which had both encoders, and what there is to find of the one it uses."""
        fusion_type, encoder, feature_size = request.param
        name = f"{fusion_type}_norm"
        fusion = {
            f"{name}.weight": torch.randn(feature_size),
            f"{name}.bias": torch.randn(feature_size),
            "output_proj.weight": torch.randn(24, feature_size),
        }
        spatial = {**TINY_VISION["spatial_vision_config"], "image_size": 42}  # its view is of 28, for one grid
        other = tiny_model(feature_fusion_config={"fusion_type": "concat"}, spatial_vision_config=spatial)
        state_dict = {key: value for key, value in other.state_dict().items() if not key.startswith("model.fusion.")}
        state_dict |= {f"model.fusion.{key}": value for key, value in fusion.items()}
        other.save_pretrained(tmp_path, state_dict=state_dict)
        written = json.loads((tmp_path / "config.json").read_text())
        written["feature_fusion_config"] = {"fusion_type": fusion_type, "depth": 1, "radius": 1}
        (tmp_path / "config.json").write_text(json.dumps(written))
        return tmp_path, encoder, fusion, other

    def test_their_folders_load_with_every_tensor(self, former):
        folder, encoder, fusion, other = former
        model, report = AureaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["mismatched_keys"]
        absent = {"vision": "spatial_vision", "spatial_vision": "vision"}[encoder]
        assert all(key.startswith(f"model.{absent}_model.") for key in report["unexpected_keys"])
        found = model.model.fusion.state_dict()
        assert found.keys() == fusion.keys() and model.config.view_sizes == ((28, 28),)
        assert all(torch.equal(found[name], tensor) for name, tensor in fusion.items())
        pixels, encoder = random_pixels(1, other.config), f"{encoder}_model"
        with torch.no_grad():
            _, features = other.model.get_submodule(encoder).encode(pixels)
            [norm_weight, norm_bias, weight] = fusion.values()
            normed = torch.nn.functional.layer_norm(features, features.shape[-1:], norm_weight, norm_bias)
            expected = other.model.multi_modal_projector((normed @ weight.T).flatten(1, 2))
            torch.testing.assert_close(model.get_image_features(pixels).pooler_output, expected)

    def test_they_are_saved_under_their_names_of_now(self, former, tmp_path):
        folder, encoder, *_ = former
        AureaConfig.from_pretrained(folder).save_pretrained(tmp_path / "again")
        written = json.loads((tmp_path / "again" / "config.json").read_text())["feature_fusion_config"]
        assert (written["fusion_type"], written["encoder"], written["output_dim"]) == ("none", encoder, 24)
        again = AureaConfig.from_pretrained(tmp_path / "again")
        assert again.feature_sizes == ({"vision": 16, "spatial_vision": 12}[encoder],)


class TestOverridesOfFromPretrained:
    @pytest.fixture
    def folder(self, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        return tmp_path

    @pytest.mark.parametrize("auto_class", [AureaForConditionalGeneration, AutoModelForImageTextToText])
    def test_settings_of_the_fusion_are_merged_into_the_folders(self, folder, auto_class):
        model = auto_class.from_pretrained(folder, feature_fusion_config={"layer_norm_eps": 1e-3})
        fusion = model.config.feature_fusion_config
        assert (fusion.radius, fusion.depth, fusion.layer_norm_eps) == (1, 1, 1e-3)
        assert model.model.fusion.semantic_norm.eps == 1e-3

    def test_another_radius_makes_new_weights_of_the_fusion(self, folder):
        model, report = AureaForConditionalGeneration.from_pretrained(
            folder, feature_fusion_config={"radius": 2}, ignore_mismatched_sizes=True, output_loading_info=True
        )
        assert (model.config.feature_fusion_config.radius, model.config.feature_fusion_config.depth) == (2, 1)
        assert report["mismatched_keys"]
        assert all(name.startswith("model.fusion.") for name, *_ in report["mismatched_keys"])

    @pytest.mark.parametrize("auto_class", [AutoConfig, AureaForConditionalGeneration, AutoModelForImageTextToText])
    def test_a_radius_that_the_grid_does_not_allow_is_refused(self, folder, auto_class):
        with pytest.raises(StrictDataclassError, match=r"grid of \(4, 4\).*radius` \(4\).*smaller radius"):
            auto_class.from_pretrained(folder, feature_fusion_config={"radius": 4}, ignore_mismatched_sizes=True)

    def test_fusion_config_is_transformers_own(self, folder, tmp_path):
        """Kinds of modules to fuse, of which an Aurea has none; they stay in the configuration."""
        own = {"patch_embeddings": True}
        for auto_class in (AureaForConditionalGeneration, AutoModelForImageTextToText):
            model = auto_class.from_pretrained(folder, fusion_config=own)
            assert model.config.fusion_config == own
            assert model.config.feature_fusion_config.radius == 1
        model.save_pretrained(tmp_path / "again")
        again = AureaForConditionalGeneration.from_pretrained(tmp_path / "again")
        assert again.config.fusion_config == own
        assert again.config.feature_fusion_config.to_dict() == model.config.feature_fusion_config.to_dict()
        with pytest.raises(ValueError, match="Unknown fusion type: radius"):
            AureaForConditionalGeneration.from_pretrained(folder, fusion_config={"radius": 2})


class TestUnknownNames:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"feature_fusion_config": {"radus": 2}},
                "'radus' is no argument of AureaFusionConfig; did you .*'radius'",
            ),
            (
                {"feature_fusion_config": {"fusion_type": "concat", "wholly_unlike": 2}},
                "'wholly_unlike' is no argument of AureaFusionConfig; there are depth, encoder, fusion_type,",
            ),
            (
                {"composition_config": {"mapping_typ": "mlp"}},
                "'mapping_typ' is no argument of AureaCompositionConfig; did you mean 'mapping_type'",
            ),
        ],
    )
    def test_of_fusion_and_composition_are_refused_with_what_is_near(self, tmp_path, settings, message):
        with pytest.raises(ValueError, match=message):
            AureaConfig(**settings)
        tiny_config().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            AureaConfig.from_pretrained(tmp_path, **settings)

    def test_what_a_folder_has_of_them_is_left_out_when_it_is_loaded(self, tmp_path, caplog):
        tiny_config(composition_config={"num_composition_layers": 1, "num_attention_heads": 2}).save_pretrained(
            tmp_path
        )
        written = json.loads((tmp_path / "config.json").read_text())
        written["feature_fusion_config"]["radus"] = 2
        written["composition_config"]["num_layers"] = 2
        (tmp_path / "config.json").write_text(json.dumps(written))
        for config in (AutoConfig.from_pretrained(tmp_path), AureaConfig.from_pretrained(tmp_path, image_token_id=3)):
            assert "radus" not in vars(config.feature_fusion_config)
            assert "num_layers" not in vars(config.composition_config)
            assert config.feature_fusion_config.radius == 1 and config.composition_config.num_composition_layers == 1
        assert "Nothing reads ['radus'] of `feature_fusion_config`" in caplog.text
        changed = AureaConfig.from_pretrained(tmp_path, composition_config=None, feature_fusion_config={"radius": 2})
        assert changed.composition_config is None and changed.feature_fusion_config.radius == 2

    def test_of_the_whole_stay_and_are_warned_about_if_they_are_near_to_one(self, tmp_path, caplog):
        """transformers keeps what it does not know, and so do folders."""
        extra = {
            "conector_type": "prefix",
            "use_cache": True,
            "notes": "mine",
            "image_size": 4,
            "torch_dtype": "float32",
        }
        tiny_config(**extra).save_pretrained(tmp_path)
        messages = [record.getMessage() for record in caplog.records if "Nothing reads" in record.getMessage()]
        assert messages == ["Nothing reads 'conector_type' of this configuration: did you mean 'connector_type'?"]
        again = AutoConfig.from_pretrained(tmp_path)
        assert (again.conector_type, again.notes, again.connector_type) == ("prefix", "mine", "cross_attention")


def test_a_model_is_not_built_of_a_configuration_that_was_changed_for_the_worse():
    config = tiny_config()
    config.feature_fusion_config.radius = 4
    with pytest.raises(ValueError, match=r"grid of \(4, 4\).*radius` \(4\)"):
        AureaForConditionalGeneration(config)


def test_the_spatial_view_defaults_to_the_size_that_gives_one_grid():
    vision = {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 16}
    config = AureaConfig(vision_config=vision)
    assert config.view_sizes == ((384, 384), (336, 336))
    assert config.grid_sizes == ((24, 24), (24, 24))


def test_views_may_be_rectangular():
    config = AureaConfig(vision_image_size=[224, 112], spatial_vision_image_size=[224, 112])
    assert config.grid_sizes == ((16, 8), (16, 8))
    assert config.tokens_per_image == 128

    assert AureaConfig(vision_image_size=[224, 112]).view_sizes == ((224, 112), (224, 112))


@pytest.mark.parametrize("encoder", ["swin", "convnext", "resnet"])
def test_encoders_of_stages_shrink_the_grid(encoder):
    config = AureaConfig(vision_config={"model_type": encoder, "image_size": 224}, vision_image_size=224)
    assert config.grid_sizes == ((7, 7), (7, 7))
    assert config.view_sizes == ((224, 224), (98, 98))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vision_image_size": 0}, r"\(0, 0\) pixels, not a multiple of its patches"),
        ({"vision_image_size": -28}, r"\(-28, -28\) pixels, not a multiple of its patches"),
        ({"spatial_vision_image_size": [28, 14]}, r"semantic encoder gives \(4, 4\) .* spatial encoder \(4, 2\)"),
        ({"cross_attention_num_key_value_heads": 0}, r"multiple of `cross_attention_num_key_value_heads` \(0\)"),
        ({"image_token_id": -1}, "`image_token_id` must be 0 or greater, got -1"),
        ({"feature_consistency_coef": float("inf")}, "`feature_consistency_coef` must be a number from 0 on, got inf"),
        ({"feature_diversity_coef": float("nan")}, "`feature_diversity_coef` must be a number from 0 on, got nan"),
    ],
    ids=str,
)
def test_what_no_fusion_could_use_is_refused(settings, message):
    with pytest.raises(StrictDataclassError, match=message):
        AureaConfig(**{**tiny_config().to_dict(), "feature_fusion_config": {"fusion_type": "concat"}, **settings})


def test_the_image_token_may_be_the_first():
    assert AureaConfig(image_token_id=0).image_token_id == 0
