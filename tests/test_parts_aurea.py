# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""A model and its processor from parts that were pretrained elsewhere: tiny random ones, saved in folders."""

import copy
import shutil

import huggingface_hub
import pytest
import torch
from conftest import FIXTURES, TINY_TEXT, random_pixels
from PIL import Image
from safetensors.torch import load_file, save_file
from test_integrations_aurea import run_without_package
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Gemma3Config,
    GenerationConfig,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from transformers_aurea import AureaForConditionalGeneration, AureaProcessor, embedded_model_path, parts_aurea
from transformers_aurea.processing_aurea import CHAT_TEMPLATE
from transformers_aurea.tokenization_aurea import build_tokenizer


NUM_BYTES = 259  # every byte and three special tokens
LANGUAGE_MODELS = {"phi3": {}, "llama": {"tie_word_embeddings": True}, "qwen3": {"head_dim": 16}, "gpt2": {}}
VIEW = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
FUSION = {"feature_fusion_config": {"radius": 1, "depth": 1}}
CHATML = (
    "\n{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim "
    "+ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<s>", "</s>"]
    vocabulary = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.2)
    return model.eval()


def language_model(family: str = "llama", vocab_size: int = 264, **kwargs):
    settings = {**TINY_TEXT, **LANGUAGE_MODELS[family], "vocab_size": vocab_size, **kwargs}
    return randomised(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)))


def siglip() -> SiglipModel:
    text = {"vocab_size": 9, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    vision = {"hidden_size": 16, "intermediate_size": 24, **VIEW}
    config = SiglipConfig(text_config={**text, "num_attention_heads": 2}, vision_config=vision)
    return randomised(SiglipModel(config))


def dinov2() -> Dinov2WithRegistersForImageClassification:
    config = Dinov2WithRegistersConfig(hidden_size=12, mlp_ratio=2, **VIEW)
    return randomised(Dinov2WithRegistersForImageClassification(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both encoders, one with an image processor, and language models with tokenizers, each in a folder."""
    folder = tmp_path_factory.mktemp("parts")
    siglip().save_pretrained(folder / "siglip")
    SiglipImageProcessorPil(image_mean=[0.1, 0.2, 0.3], resample=3).save_pretrained(folder / "siglip")
    dinov2().save_pretrained(folder / "dinov2")
    for family in LANGUAGE_MODELS:
        model = language_model(family)
        model.generation_config = GenerationConfig(temperature=0.7, do_sample=True, eos_token_id=[2, 9])
        model.save_pretrained(folder / family)
        byte_tokenizer().save_pretrained(folder / family)
    return folder


def from_folders(folder, family="llama", **kwargs) -> AureaForConditionalGeneration:
    torch.manual_seed(0)
    parts = {"vision": folder / "siglip", "spatial_vision": folder / "dinov2", "text": folder / family}
    return AureaForConditionalGeneration.from_pretrained_parts(**{**parts, **FUSION, **kwargs})


def processor_of(folder, family="llama", **kwargs) -> AureaProcessor:
    parts = {"vision": folder / "siglip", "spatial_vision": folder / "dinov2", "text": folder / family}
    return AureaProcessor.from_pretrained_parts(**{**parts, **kwargs})


def batch(model, num_images=2) -> dict[str, torch.Tensor]:
    """Two rows, left-padded; the first has no picture and the second `num_images`."""
    input_ids = torch.randint(3, NUM_BYTES, (2, 9), generator=torch.Generator().manual_seed(1))
    input_ids[1, 2 : 2 + num_images] = model.config.image_token_id
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :3] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


class TestBareLanguageModel:
    @pytest.mark.parametrize("family", LANGUAGE_MODELS)
    def test_before_training_logits_and_answers_are_its_own_with_and_without_pictures(self, folder, family):
        model = from_folders(folder, family)
        bare = AutoModelForCausalLM.from_pretrained(folder / family).eval()
        text, pixels = batch(model), random_pixels(2, model.config)
        settings = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None}
        for implementation in ("eager", "sdpa"):
            for either in (model, bare):
                either.set_attn_implementation(implementation)
            with torch.no_grad():
                expected = bare(**text).logits
                assert torch.equal(model(**text).logits, expected)
                assert torch.equal(model(**text, pixel_values=pixels).logits, expected)
            answer = bare.generate(**text, **settings)
            for use_cache in (True, False):
                assert torch.equal(
                    model.generate(**text, pixel_values=pixels, use_cache=use_cache, **settings), answer
                )

    def test_its_generation_settings_are_kept(self, folder):
        settings = from_folders(folder).generation_config
        assert (settings.temperature, settings.do_sample, settings.eos_token_id) == (0.7, True, [2, 9])

    def test_no_picture_is_generated(self, folder, tmp_path):
        model = from_folders(folder)
        assert model.generation_config.suppress_tokens == [model.config.image_token_id]
        text = language_model()
        text.generation_config.suppress_tokens = [300, 7]
        model = from_modules(text=text, tokenizer=folder / "llama")
        model.save_pretrained(tmp_path)
        expected = sorted([7, model.config.image_token_id, 300])
        assert GenerationConfig.from_pretrained(tmp_path).suppress_tokens == expected
        assert text.generation_config.suppress_tokens == [300, 7]

    def test_decoder_without_head_generates_no_picture_either(self, folder):
        settings = {"tokenizer": folder / "llama", "tie_word_embeddings": True}
        model = from_modules(text=language_model().base_model, **settings)
        assert model.generation_config.suppress_tokens == [model.config.image_token_id]

    def test_a_word_that_was_named_as_the_image_token_is_generated_as_ever(self):
        assert from_modules(text=language_model(), image_token_id=260).generation_config.suppress_tokens is None

    @pytest.mark.parametrize("tied", [True, False])
    def test_its_head_stays_tied_or_not(self, tied):
        text = language_model(tie_word_embeddings=tied)
        model = from_modules(text=text, image_token_id=260)
        head, embeddings = (each().weight for each in (model.get_output_embeddings, model.get_input_embeddings))
        assert (head is embeddings) == tied
        assert torch.equal(head, text.lm_head.weight)

    def test_a_decoder_without_head_is_refused_unless_its_embeddings_serve(self, tmp_path):
        text = language_model(tie_word_embeddings=False).model
        with pytest.raises(ValueError, match=r"LlamaModel\) has no language modelling head.*tie_word_embeddings=True"):
            from_modules(text=text, image_token_id=260)
        model = from_modules(text=text, image_token_id=260, tie_word_embeddings=True)
        assert torch.equal(model.lm_head.weight, text.embed_tokens.weight)
        text.save_pretrained(tmp_path)  # the loader of files would make up a head
        with pytest.raises(ValueError, match=r"lacks weights of a LlamaForCausalLM: \['lm_head.weight'\]"):
            from_modules(text=tmp_path, image_token_id=260)


def from_modules(**kwargs) -> AureaForConditionalGeneration:
    parts = {"vision": siglip(), "spatial_vision": dinov2(), "text": language_model()}
    torch.manual_seed(0)
    return AureaForConditionalGeneration.from_pretrained_parts(**{**parts, **FUSION, **kwargs})


def assert_holds(model, vision, spatial_vision, text):
    """The parts' weights are in the model, bit for bit and in memory of their own."""
    for module, part in [
        (model.model.vision_model, vision.vision_model),
        (model.model.spatial_vision_model, spatial_vision.base_model),
        (model.model.language_model, text.base_model),
    ]:
        theirs = part.state_dict()
        for name, tensor in module.state_dict().items():
            if "cross_attention_block." not in name:
                assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
                assert tensor.data_ptr() != theirs[name].data_ptr(), name


class TestWeights:
    def test_loaded_modules_are_copied_and_stay_as_they_are(self):
        parts = {"vision": siglip(), "spatial_vision": dinov2(), "text": language_model()}
        weights = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
        configs = {name: part.config.to_dict() for name, part in parts.items()}
        model = from_modules(**parts, image_token_id=300)
        assert_holds(from_modules(**parts, image_token_id=260), **parts)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        for name, part in parts.items():
            assert part.config.to_dict() == configs[name]
            for key, tensor in part.state_dict().items():
                assert torch.equal(tensor, weights[name][key]), key

    def test_folders_and_modules_and_hub_ids_give_the_same_model(self, folder, tmp_path, monkeypatch):
        expected = from_folders(folder).state_dict()
        for name in ("siglip", "dinov2", "llama"):  # as a download leaves them
            repository = tmp_path / f"models--someone--{name}"
            shutil.copytree(folder / name, repository / "snapshots" / ("0" * 40))
            (repository / "refs").mkdir()
            (repository / "refs" / "main").write_text("0" * 40)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        hub = from_folders(folder, vision="someone/siglip", spatial_vision="someone/dinov2", text="someone/llama")
        modules = {
            "vision": AutoModel.from_pretrained(folder / "siglip"),
            "spatial_vision": AutoModel.from_pretrained(folder / "dinov2"),
            "text": AutoModelForCausalLM.from_pretrained(folder / "llama"),
        }
        for model in (hub, from_modules(**modules), from_folders(folder, vision=str(folder / "siglip"))):
            assert model.config.image_token_id == NUM_BYTES
            for name, tensor in model.state_dict().items():
                assert torch.equal(tensor, expected[name]), name

    def test_unused_heads_of_the_encoders_are_left_out(self, folder):
        model = from_folders(folder)
        names = [*model.model.vision_model.state_dict(), *model.model.spatial_vision_model.state_dict()]
        assert not [name for name in names if "head." in name or "classifier" in name]

    @pytest.mark.parametrize("dtype, expected", [(None, torch.bfloat16), ("float16", torch.float16)])
    def test_the_language_model_decides_the_dtype_and_encoders_stay_in_float32(self, dtype, expected):
        parts = {"vision": siglip(), "spatial_vision": dinov2(), "text": language_model().to(torch.bfloat16)}
        model = from_modules(**parts, dtype=dtype, image_token_id=260)
        assert model.dtype == model.lm_head.weight.dtype == model.model.fusion.output_proj.weight.dtype == expected
        assert {p.dtype for p in model.model.vision_model.parameters()} == {torch.float32}
        assert model.model.fusion.joint_layers[0].sigma_spatial.dtype == torch.float32
        if dtype is None:
            assert_holds(model, **parts)
            text = batch(model)
            with torch.no_grad():  # its rotary frequencies too are rounded
                expected = parts["text"](**text).logits
                assert torch.equal(model(**text).logits, expected)
                assert torch.equal(model(**text, pixel_values=random_pixels(2, model.config)).logits, expected)

    @pytest.mark.parametrize("of_text, dtype", [(torch.float32, "bfloat16"), (torch.bfloat16, "float32")])
    def test_another_dtype_than_the_language_models_is_no_difference(self, of_text, dtype):
        model = from_modules(text=language_model().to(of_text), dtype=dtype, image_token_id=260)
        assert model.dtype == getattr(torch, dtype)

    def test_experts_and_a_head_with_bias_are_kept(self):
        from transformers import PhimoeConfig, PhimoeForCausalLM

        text = randomised(PhimoeForCausalLM(PhimoeConfig(**TINY_TEXT, num_local_experts=4, lm_head_bias=True)))
        model = from_modules(text=text, image_token_id=98)
        assert torch.equal(model.lm_head.bias, text.lm_head.bias)
        input_ids = torch.arange(3, 12)[None]
        with torch.no_grad():
            assert torch.equal(model(input_ids=input_ids).logits, text(input_ids=input_ids).logits)

    def test_what_is_new_is_initialised_and_what_blocks_add_is_zero(self):
        model = from_modules(image_token_id=260)
        for name, parameter in model.named_parameters():
            if name.endswith(("cross_attn.o_proj.weight", "cross_attention_block.mlp.down_proj.weight")):
                assert not parameter.any(), name
            elif "cross_attention_block." in name or name.startswith(("model.fusion", "model.multi_modal")):
                assert parameter.isfinite().all() and (parameter.any() or name.endswith("bias")), name


class TestImageToken:
    def test_it_takes_the_next_id_and_a_padded_vocabulary_does_not_grow(self, folder):
        model = from_folders(folder)
        assert model.config.image_token_id == NUM_BYTES
        assert model.get_input_embeddings().num_embeddings == model.config.text_config.vocab_size == 264

    @pytest.mark.parametrize("tied", [True, False])
    def test_an_exact_vocabulary_grows_by_a_mean_and_keeps_its_logits(self, tied):
        text, tokenizer = language_model(vocab_size=NUM_BYTES, tie_word_embeddings=tied), byte_tokenizer()
        model = from_modules(text=text, tokenizer=tokenizer)
        assert len(tokenizer) == NUM_BYTES and "<|image|>" not in tokenizer.get_vocab()
        embeddings = model.get_input_embeddings().weight
        assert model.lm_head.weight.shape[0] == len(embeddings) == model.config.text_config.vocab_size == NUM_BYTES + 1
        torch.testing.assert_close(embeddings[-1], text.get_input_embeddings().weight.mean(dim=0))
        torch.testing.assert_close(model.lm_head.weight[-1], text.lm_head.weight.mean(dim=0))
        inputs = batch(model, num_images=0)
        with torch.no_grad():
            logits = model(**inputs, labels=inputs["input_ids"]).logits
            assert torch.equal(logits[..., :NUM_BYTES], text(**inputs).logits)

    def test_further_special_tokens_of_the_tokenizer_stay(self):
        tokenizer = byte_tokenizer()
        tokenizer.add_special_tokens({"extra_special_tokens": ["<tool>"]})
        extended = parts_aurea.load_tokenizer("", tokenizer)
        assert {"<tool>", "<|image|>"} <= set(extended.all_special_tokens)
        assert "<|image|>" not in tokenizer.all_special_tokens

    def test_a_token_that_exists_is_taken(self):
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens(["<|image|>", "more"])
        assert from_modules(tokenizer=tokenizer).config.image_token_id == NUM_BYTES
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=byte_tokenizer()._tokenizer, extra_special_tokens={"image_token": "<picture>"}
        )
        model = from_modules(tokenizer=tokenizer)
        assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<picture>") == NUM_BYTES

    def test_without_a_tokenizer_the_remedies_are_named(self, tmp_path):
        with pytest.raises(ValueError, match=r"`tokenizer`.*`image_token_id`.*not loaded from anywhere"):
            from_modules()
        language_model("gpt2").save_pretrained(tmp_path)  # its loader makes up an empty tokenizer
        with pytest.raises(ValueError, match=r"`tokenizer`.*`image_token_id`.*no vocabulary"):
            from_modules(text=tmp_path)
        assert from_modules(text=tmp_path, image_token_id=7).config.image_token_id == 7

    def test_it_has_no_name_by_which_others_would_look_for_it(self, folder):
        model = from_folders(folder)
        assert model.name_or_path == model.config.name_or_path == ""


BAD_PARTS = {
    "text model as encoder": ({"vision": "llama"}, ValueError, "`vision` is of type 'llama', which is not a vision"),
    "encoder as text model": ({"text": "dinov2"}, ValueError, "'dinov2_with_registers', which is not a decoder"),
    "missing folder": ({"spatial_vision": "nowhere"}, OSError, r"`spatial_vision='.*nowhere'` is no model that can"),
    "something else": (
        {"text": 3},
        TypeError,
        "`text` must be a hub id, a folder or a model of transformers, got int",
    ),
    "other grids": (
        {"spatial_vision_image_size": 35},
        Exception,
        r"\(4, 4\) patches and the spatial encoder \(5, 5\).*so that they agree",
    ),
    "unknown setting of the composition": (
        {"composition_config": {"num_layers": 2}},
        ValueError,
        "'num_layers' is no argument of AureaCompositionConfig",
    ),
    "unknown override": ({"cross_atention_layers": [0]}, ValueError, "did you mean 'cross_attention_layers'"),
    "unknown setting of the fusion": (
        {"feature_fusion_config": {"raduis": 1}},
        ValueError,
        "AureaFusionConfig; did you mean 'radius",
    ),
    "unknown setting of the fusion by its former name": (
        {"feature_fusion_config": None, "fusion_config": {"raduis": 1}},
        ValueError,
        "AureaFusionConfig; did you mean 'radius",
    ),
    "both names of the fusion": ({"fusion_config": {"radius": 1}}, ValueError, "give one of the two"),
    "configuration of a part": ({"text_config": {}}, ValueError, r"\['text_config'\] come from the parts"),
    "negative image token": ({"image_token_id": -1}, Exception, "`image_token_id` must be 0 or greater, got -1"),
    "radius": ({"feature_fusion_config": {"radius": 4}}, Exception, r"\(4, 4\) patches must be larger.*radius` \(4\)"),
}


@pytest.mark.parametrize("arguments, error, message", BAD_PARTS.values(), ids=BAD_PARTS)
def test_bad_parts_are_refused_by_name(folder, arguments, error, message):
    arguments = {name: folder / value if isinstance(value, str) else value for name, value in arguments.items()}
    with pytest.raises(error, match=message):
        from_folders(folder, **arguments)


def test_the_former_name_of_the_fusion_is_taken_with_one_warning(folder):
    expected = from_folders(folder).config
    with pytest.warns(FutureWarning, match="the argument is `feature_fusion_config` now") as warnings:
        model = from_folders(folder, feature_fusion_config=None, fusion_config=FUSION["feature_fusion_config"])
    assert len([warning for warning in warnings if warning.category is FutureWarning]) == 1
    assert model.config.to_dict() == expected.to_dict()


def test_a_language_model_with_a_tower_of_its_own_is_refused(folder, tmp_path):
    Gemma3Config().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    for call in (from_folders, processor_of):
        with pytest.raises(ValueError, match=r"`text` is of type 'gemma3', .* Load its language model alone"):
            call(folder, text=tmp_path)


def test_encoder_folders_that_lack_weights_are_refused(folder, tmp_path):
    shutil.copytree(folder / "dinov2", tmp_path / "dinov2")
    weights = load_file(tmp_path / "dinov2" / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layer.1." not in name}
    save_file(kept, tmp_path / "dinov2" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"The parts lack \d+ of the weights.*spatial_vision_model\..*layer\.1\."):
        from_folders(folder, spatial_vision=tmp_path / "dinov2")


def test_encoders_that_give_no_features_of_patches_are_refused():
    config = AutoConfig.for_model("vit_mae", hidden_size=16, intermediate_size=24, **VIEW)
    with pytest.raises(ValueError, match=r"`vision` \(ViTMAEModel\) cannot serve as an encoder: .* patch features"):
        from_modules(vision=AutoModel.from_config(config), image_token_id=260)


ENCODERS = {
    "vit": {"hidden_size": 16, "intermediate_size": 24, **VIEW},
    "deit": {"hidden_size": 16, "intermediate_size": 24, **VIEW},
    "clip_vision_model": {"hidden_size": 16, "intermediate_size": 24, **VIEW},
    "dinov3_vit": {"hidden_size": 16, "intermediate_size": 24, **VIEW},
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 7, "image_size": 56},
    "resnet": {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic"},
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_serve_as_modules_and_in_folders_and_train_in_full(tmp_path, name):
    encoder = randomised(AutoModel.from_config(AutoConfig.for_model(name, **ENCODERS[name])))
    encoder.save_pretrained(tmp_path / name)
    for part in (encoder, tmp_path / name):
        model = from_modules(spatial_vision=part, image_token_id=260)
        for key, tensor in model.model.spatial_vision_model.state_dict().items():
            assert torch.equal(tensor, encoder.state_dict()[key]), key
    model.train()
    model(
        **batch(model), pixel_values=random_pixels(2, model.config), labels=batch(model)["input_ids"]
    ).loss.backward()
    without = [key for key, p in model.model.spatial_vision_model.named_parameters() if p.grad is None]
    assert not without


def test_an_image_classifier_without_its_pooling_layer_gives_its_encoder(tmp_path):
    classifier = ViTForImageClassification(ViTConfig(**ENCODERS["vit"]))
    classifier.save_pretrained(tmp_path)
    for part in (classifier, tmp_path):
        model = from_modules(vision=part, image_token_id=260)
        assert all(
            torch.equal(tensor, classifier.vit.state_dict()[name])
            for name, tensor in model.model.vision_model.state_dict().items()
        )


def test_a_language_model_that_would_drop_the_picture_is_refused():
    text = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"bloom.*does not hand keyword arguments on"):
        from_modules(text=text, image_token_id=7)


def test_tied_embeddings_are_untied_if_so_asked(tmp_path):
    text = language_model(tie_word_embeddings=True)
    model = from_modules(text=text, image_token_id=7, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    loaded, report = AureaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert torch.equal(loaded.lm_head.weight, text.lm_head.weight)
    assert loaded.lm_head.weight is not loaded.get_input_embeddings().weight


def test_a_language_model_that_is_not_itself_inside_is_refused_with_the_difference(monkeypatch):
    def loses_something(source, target):
        target.norm.weight = torch.nn.Parameter(target.norm.weight * 3)

    monkeypatch.setattr(parts_aurea, "_copy_buffers", loses_something)
    with pytest.raises(
        ValueError, match=r"'llama', which is not itself inside.*differ by \d[\d.e-]*, the largest being"
    ):
        from_modules(image_token_id=7)


class TestTraining:
    def test_only_the_zeros_get_gradients_at_first_and_everything_new_after_one_step(self):
        model = from_modules(image_token_id=260).train()
        inputs = batch(model)
        inputs |= {"pixel_values": random_pixels(2, model.config), "labels": inputs["input_ids"]}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            reached = {name for name, parameter in model.named_parameters() if parameter.grad.any()}
            for block in ("layers.0.cross_attention_block", "layers.2.closing_cross_attention_block"):
                for name in ("cross_attn.o_proj.weight", "mlp.down_proj.weight"):
                    assert f"model.language_model.{block}.{name}" in reached
            assert ("model.fusion.semantic_proj.weight" in reached) == (step == 1)
            assert ("model.multi_modal_projector.linear_1.weight" in reached) == (step == 1)
            optimizer.step()

    def test_it_learns_to_tell_two_pictures_apart_over_a_frozen_language_model(self):
        text = language_model(tie_word_embeddings=False)
        with torch.no_grad():
            text.lm_head.weight.mul_(4)  # a frozen head of small weights could be sure of nothing
        model = from_modules(text=text, image_token_id=260).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("cross_attention_block" in name or "fusion" in name or "projector" in name)
        input_ids = torch.tensor([[1, 260, 70, 80], [1, 260, 70, 90]])
        inputs = {"input_ids": input_ids, "pixel_values": random_pixels(2, model.config)}
        inputs["labels"] = torch.where(input_ids >= 80, input_ids, -100).masked_fill(input_ids == 260, -100)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            losses.append(model(**inputs).loss)
            losses[-1].backward()
            optimizer.step()
        assert losses[0] > 3 and losses[-1] < 0.1  # ln 2 = 0.69 for one that does not look at the picture


def user(*parts) -> dict:
    return {"role": "user", "content": list(parts)}


IMAGE, QUESTION = {"type": "image"}, {"type": "text", "text": "What is it?"}
ANSWER = {"role": "assistant", "content": "A cat."}


class TestProcessor:
    def test_views_are_of_the_configured_sizes_with_each_encoders_own_normalisation(self, folder):
        config = from_folders(folder, vision_image_size=[35, 42]).config
        processor = processor_of(folder, config=config)
        settings = processor.image_processor
        assert (list(settings.image_mean), settings.resample) == ([0.1, 0.2, 0.3], 3)
        assert list(settings.image_std) == [0.5, 0.5, 0.5]
        assert list(settings.spatial_image_mean) == [0.485, 0.456, 0.406]  # the folder has none
        pixels = processor(images=Image.new("RGB", (90, 60)), return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 2, 3, 35, 42)
        assert processor_of(folder, image_processor=settings).image_processor is settings

    def test_an_encoder_that_wants_no_normalisation_gets_none(self, folder, tmp_path):
        SiglipImageProcessorPil(do_normalize=False).save_pretrained(tmp_path)
        shutil.copy(folder / "siglip" / "config.json", tmp_path)
        settings = processor_of(folder, vision=tmp_path).image_processor
        assert (list(settings.image_mean), list(settings.image_std)) == ([0, 0, 0], [1, 1, 1])

    def test_it_fits_the_model_without_being_told(self, folder):
        model, processor = from_folders(folder), processor_of(folder)
        assert processor.image_token_id == model.config.image_token_id
        inputs = processor(images=Image.new("RGB", (30, 40)), text="a<|image|>b", return_tensors="pt")
        assert inputs["input_ids"].tolist()[0][1] == NUM_BYTES
        with torch.no_grad():
            model(**inputs)

    def test_a_tokenizer_that_knows_the_published_prompt_gets_the_published_template(self, folder):
        assert processor_of(folder, tokenizer=build_tokenizer(FIXTURES / "published")).chat_template == CHAT_TEMPLATE

    def test_a_template_of_its_own_is_kept_and_taught_about_pictures(self, folder):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = CHATML
        processor = processor_of(folder, tokenizer=tokenizer)
        chat = [{"role": "system", "content": "Be brief."}, user(IMAGE, QUESTION, IMAGE), ANSWER]
        flat = [*chat]
        flat[1] = {"role": "user", "content": "<|image|>What is it?<|image|>"}
        for given in (chat, flat):
            for settings in ({}, {"add_generation_prompt": True}, {"continue_final_message": True}):
                expected = tokenizer.apply_chat_template(flat, tokenize=False, **settings)
                assert processor.apply_chat_template(given, **settings) == expected

    def test_a_template_that_marks_its_answers_goes_before_the_published_one(self, folder):
        tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
        processor = processor_of(folder, tokenizer=tokenizer)
        chat = [user({"type": "image"}, QUESTION)]
        expected = "<|user|><|image|>What is it?<|end|><|assistant|>"
        assert processor.apply_chat_template(chat, add_generation_prompt=True) == expected

    def test_without_any_template_a_plain_one_marks_the_answers(self, folder):
        processor = processor_of(folder)
        prompt = processor.apply_chat_template([user(IMAGE, QUESTION)], add_generation_prompt=True)
        assert prompt == "User:\n<|image|>What is it?\nAssistant:\n"
        chat = [user({"type": "image", "image": Image.new("RGB", (9, 9))}, QUESTION), ANSWER, user(QUESTION), ANSWER]
        settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template(chat, return_assistant_tokens_mask=True, **settings)
        answers = inputs["input_ids"][inputs["assistant_masks"].bool()]
        assert processor.decode(answers) == "A cat.</s>A cat.</s>"
        assert processor.apply_chat_template(chat[:2]) == prompt + "A cat.</s>"

    def test_the_image_token_of_the_tokenizer_is_what_the_templates_write(self, folder):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=byte_tokenizer()._tokenizer,
            eos_token="</s>",
            extra_special_tokens={"image_token": "<pic>"},
        )
        processor = processor_of(folder, tokenizer=tokenizer)
        assert processor.apply_chat_template([user(IMAGE, QUESTION)]) == "User:\n<pic>What is it?\n"

    def test_what_does_not_fit_is_refused(self, folder):
        config = from_folders(folder, image_token_id=7).config
        with pytest.raises(ValueError, match=r"`config.image_token_id` is 7, but '<\|image\|>' has the id 259"):
            processor_of(folder, config=config)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer()._tokenizer)
        with pytest.raises(ValueError, match=r"neither a chat template nor an `eos_token`.*give `chat_template`"):
            processor_of(folder, tokenizer=tokenizer)
        assert processor_of(folder, tokenizer=tokenizer, chat_template="x").chat_template == "x"


SCRIPT = """
import sys

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = sys.argv[1]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
part = {"type": "image", "image": Image.new("RGB", (40, 30), "red")}
chat = [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}]
template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
inputs = processor.apply_chat_template(chat, **template)
with torch.no_grad():
    logits = model(**inputs).logits
again = model.from_pretrained_parts(*sys.argv[2:5], feature_fusion_config={"radius": 1, "depth": 1})
save_file({**inputs, "logits": logits, "embeddings": again.get_input_embeddings().weight.detach()}, "out.safetensors")
"""


def test_what_is_saved_loads_in_a_fresh_process_without_the_package(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder / "qwen3")
    tokenizer.chat_template = CHATML
    model = from_folders(folder, "qwen3", tokenizer=tokenizer)
    processor = processor_of(folder, "qwen3", tokenizer=tokenizer, config=model.config)
    model.save_pretrained(tmp_path / "aurea")
    processor.save_pretrained(tmp_path / "aurea")
    parts = [folder / name for name in ("siglip", "dinov2", "qwen3")]
    run_without_package(SCRIPT, tmp_path, tmp_path / "aurea", *parts)
    results = load_file(tmp_path / "out.safetensors")
    chat = [user({"type": "image", "image": Image.new("RGB", (40, 30), "red")}, QUESTION)]
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(chat, **settings)
    for name, tensor in inputs.items():
        assert torch.equal(results[name], tensor), name
    with torch.no_grad():
        assert torch.equal(results["logits"], model(**inputs).logits)
    assert torch.equal(results["embeddings"], model.get_input_embeddings().weight)
