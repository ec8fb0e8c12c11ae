# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Any decoder as language model and any encoder in either place, in tiny sizes."""

import copy
import itertools
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from causal_families import randomise, tiny_text_config
from conftest import IMAGE_TOKEN_ID, TINY_VISION, random_pixels, tiny_config, tiny_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, Phi3Model, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

import transformers_aurea
from transformers_aurea import AureaConfig, AureaForConditionalGeneration, modeling_aurea
from transformers_aurea.configuration_aurea import AureaUnfitLanguageModelError
from transformers_aurea.cross_attention_aurea import decoder_layers
from transformers_aurea.language_model_aurea import carries_cross_attention, decoder_of, name_in_owner
from transformers_aurea.versions_aurea import CACHE_NAME
from transformers_aurea.weaving_aurea import woven_class


# What a family needs beyond TINY_TEXT. A window shorter than the text must cut the text's keys, not the picture's.
LANGUAGE_MODELS = {
    "phi3": {"sliding_window": 5},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 5},
    "gemma3_text": {"head_dim": 16, "sliding_window": 5, "final_logit_softcapping": 3.0},
    "mistral": {"sliding_window": 5},
    "smollm3": {},
    "gpt2": {},
    "mixtral": {"num_local_experts": 4},
    "cohere": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "stablelm": {},
    "olmo2": {},
    "starcoder2": {},
    "gpt_neox": {},
    "phi": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}

# Layers without attention, a head with a bias or of another width, logits that are multiplied: the logits only.
FURTHER_LANGUAGE_MODELS = {
    "falcon_h1": {
        "lm_head_multiplier": 3.0,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "sliding_window": 5},
    "hyperclovax": {"logits_scaling": 3.0},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "phimoe": {"num_local_experts": 4, "lm_head_bias": True},
    "qwen3_next": {
        "num_hidden_layers": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "head_dim": 16,
    },
}

_TINY = {name: {"model_type": name, "hidden_size": 48} for name in ("bart", "bert")}  # as it is by default

families = pytest.mark.parametrize("family", LANGUAGE_MODELS)


@cache
def family_model(family: str) -> AureaForConditionalGeneration:
    """Built once per family; only for tests that leave it as it is."""
    return tiny_model({"model_type": family, **LANGUAGE_MODELS[family]})


def with_bare_weights(settings: dict) -> tuple[AureaForConditionalGeneration, PreTrainedModel]:
    """An Aurea of the language model given, and that language model on its own, with equal random weights."""
    config = tiny_config(settings)
    model = AureaForConditionalGeneration(config).eval()
    bare = AutoModelForCausalLM.from_config(config.text_config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in bare.parameters():  # biases and norms too, which start at zero or one
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    keys = model.model.language_model.load_state_dict(bare.base_model.state_dict(), strict=False)
    assert not keys.unexpected_keys
    assert all("cross_attention_block" in key for key in keys.missing_keys)
    model.lm_head.load_state_dict(bare.get_output_embeddings().state_dict())
    return model, bare


def left_padded_text() -> dict[str, torch.Tensor]:
    input_ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :3] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def ragged_batch(config):
    """Left-padded rows of different lengths with one, two and no pictures, and the pixels."""
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(3, 90, (3, 10), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :1] = attention_mask[2, :4] = 0
    input_ids[attention_mask == 0] = 0
    input_ids[0, 3] = input_ids[1, 1] = input_ids[1, 6] = IMAGE_TOKEN_ID
    return {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": random_pixels(3, config)}


def generate(model, **kwargs):
    settings = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
    # A random model may well write a placeholder, to which no picture would belong.
    return model.generate(**{**settings, **kwargs}, suppress_tokens=[IMAGE_TOKEN_ID])


class Bypass:
    """In front of a layer's class: the layer does nothing, and no hook is called."""

    def __call__(self, hidden_states, *args, **kwargs):
        return hidden_states


class TestLanguageModels:
    @families
    def test_text_only_is_the_bare_language_model_bit_for_bit(self, family):
        model, bare = with_bare_weights({"model_type": family, **LANGUAGE_MODELS[family]})
        text = left_padded_text()
        with torch.no_grad():
            expected = bare(**text).logits
            assert torch.equal(model(**text).logits, expected)
            assert torch.equal(model(**text, pixel_values=random_pixels(1, model.config)[:0]).logits, expected)
        assert torch.equal(generate(model, **text), generate(bare, **text))

    @pytest.mark.parametrize("family", FURTHER_LANGUAGE_MODELS)
    def test_unusual_heads_give_the_bare_language_models_logits(self, family):
        if family not in CONFIG_MAPPING:
            pytest.skip(f"this transformers has no {family}")
        model, bare = with_bare_weights({"model_type": family, **FURTHER_LANGUAGE_MODELS[family]})
        text = left_padded_text()
        with torch.no_grad():
            assert torch.equal(model(**text).logits, bare(**text).logits)

    @families
    def test_a_mixed_batch_trains(self, family):
        model = tiny_model({"model_type": family, **LANGUAGE_MODELS[family]}).train()
        inputs = ragged_batch(model.config)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] > losses[1] > losses[2]

    @families
    def test_cached_greedy_of_a_ragged_batch_is_that_of_the_rows_alone_without_cache(self, family):
        model = family_model(family)
        inputs = ragged_batch(model.config)
        cached = generate(model, **inputs)
        pixels = inputs["pixel_values"]
        for row, own in enumerate((pixels[:1], pixels[1:], None)):
            real = inputs["attention_mask"][row].bool()
            input_ids = inputs["input_ids"][row : row + 1, real]
            alone = generate(model, input_ids=input_ids, pixel_values=own, use_cache=False)
            assert torch.equal(alone[0], cached[row, (~real).sum() :])

    @families
    def test_beams_of_a_ragged_batch_do_not_depend_on_the_cache(self, family):
        model = family_model(family)
        inputs = ragged_batch(model.config)
        settings = {"num_beams": 3, "num_return_sequences": 2}
        assert torch.equal(
            generate(model, **inputs, **settings), generate(model, **inputs, **settings, use_cache=False)
        )

    @families
    def test_the_picture_shows_at_every_cached_step(self, family):
        model = family_model(family)
        inputs = ragged_batch(model.config)
        row = inputs["input_ids"][1:2]
        logits = []
        for pixels in (inputs["pixel_values"][1:], inputs["pixel_values"][1:] * 0):
            cache = DynamicCache(config=model.config.text_config)
            with torch.no_grad():
                model(input_ids=row[:, :7], pixel_values=pixels, past_key_values=cache)
                steps = [model(input_ids=row[:, at : at + 1], past_key_values=cache).logits for at in (7, 8, 9)]
            logits.append(torch.cat(steps, dim=1))
        assert (logits[0] - logits[1]).abs().amax(-1).min() > 1e-4

    @pytest.mark.parametrize("family", ["falcon", "mamba", "rwkv"])
    def test_decoders_that_would_drop_the_picture_are_refused(self, family):
        with pytest.raises(
            AureaUnfitLanguageModelError, match=f"'{family}'.*does not hand keyword arguments on to its layers"
        ):
            AureaForConditionalGeneration(tiny_config({"model_type": family}, cross_attention_num_heads=4))

    def test_a_decoder_is_refused_whose_layers_it_does_not_call(self):
        model = tiny_model()
        decoder = model.model.language_model
        layer = decoder.layers[1]
        layer.__class__ = woven_class(Bypass, type(layer))
        with pytest.raises(
            AureaUnfitLanguageModelError, match=r"'phi3'.*Phi3Model does not call its layers \[1\] as modules"
        ):
            carries_cross_attention(decoder)

    def test_lists_inside_the_layers_are_none_of_layers(self):
        decoder = AutoModelForCausalLM.from_config(tiny_config().text_config).base_model
        for layer in decoder.layers:
            layer.experts = torch.nn.ModuleList([torch.nn.Identity() for _ in decoder.layers])
        assert decoder_layers(decoder) == ("layers", decoder.layers)

    def test_a_layer_that_is_dropped_in_training_is_no_reason_to_refuse(self):
        settings = {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32, "layerdrop": 0.9}
        model = tiny_model(settings).train()
        model.model._carries_pictures = False  # as where the probe could not run
        inputs = ragged_batch(model.config)
        for _ in range(3):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert model.model.language_model.training

    @pytest.mark.parametrize(
        ("family", "reason"),
        [
            ("bart", "which is not a decoder language model"),
            ("bert", "it reads both ways, unless its `is_decoder` is set"),
            ("gemma3", "a language model with more around it"),
            ("blt", "has no `hidden_size`"),
            ("xlstm", "takes no `logits_to_keep`"),
            ("longcat_flash", "has no list of"),
            ("gemma3n_text", r"layers' hidden states have the shape \(4, 1, 2, 32\)"),
        ],
    )
    def test_a_refusal_says_why(self, family, reason):
        text_config = _TINY[family] if family in _TINY else tiny_text_config(family).to_dict()
        settings = {**TINY_VISION, "cross_attention_num_heads": 4, "cross_attention_head_dim": 8}
        with pytest.raises(AureaUnfitLanguageModelError, match=f"`text_config` is of type '{family}', .*{reason}"):
            AureaForConditionalGeneration(AureaConfig(text_config=text_config, **settings))

    def test_a_decoder_that_does_not_tell_its_embeddings_is_refused(self):
        bart = AutoModelForCausalLM.from_config(tiny_text_config("bart"))
        with pytest.raises(
            AureaUnfitLanguageModelError, match="BartDecoderWrapper does not tell its input embeddings"
        ):
            decoder_of(bart)

    def test_what_the_probe_cannot_run_is_looked_at_with_the_first_picture(self, monkeypatch):
        forward = Phi3Model.forward

        def without_probe(self, input_ids=None, **kwargs):
            if input_ids.shape == (1, 2):
                raise RuntimeError("no kernel for two tokens")
            return forward(self, input_ids, **{name: it for name, it in kwargs.items() if "visual" not in name})

        monkeypatch.setattr(Phi3Model, "forward", without_probe)
        model = tiny_model()  # a probe that fails is no refusal
        inputs = ragged_batch(model.config)
        model(**inputs)
        dropping = {"cross_attention_states": None}
        monkeypatch.setattr(Phi3Model, "forward", lambda self, **kwargs: without_probe(self, **{**kwargs, **dropping}))
        model(**inputs)  # it was seen to work
        with pytest.raises(AureaUnfitLanguageModelError, match="does not hand keyword arguments on"):
            tiny_model()(**inputs)

    @pytest.mark.parametrize("mode", [True, False])
    def test_the_probe_changes_no_mode_of_training(self, mode):
        decoder = tiny_model().model.language_model.train(mode)
        assert carries_cross_attention(decoder)
        assert {module.training for module in decoder.modules()} == {mode}

    def test_a_configuration_imports_no_modelling_code(self):
        folder = Path(transformers_aurea.__file__).parent
        code = (
            f"import sys, importlib; sys.path.insert(0, {str(folder.parent)!r}); "
            f"package = type(sys)('transformers_aurea'); package.__path__ = [{str(folder)!r}]; "
            "sys.modules['transformers_aurea'] = package; "
            "importlib.import_module('transformers_aurea.configuration_aurea').AureaConfig(); "
            "print([name for name in sys.modules if '.modeling_' in name and '.models.' in name"
            " and '.auto.' not in name])"  # that table transformers reads itself
        )
        printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert printed == "[]\n"

    def test_encoders_are_refused_as_language_model(self):
        with pytest.raises(ValueError, match="'siglip_vision_model', which is not a decoder language model"):
            AureaForConditionalGeneration(tiny_config({"model_type": "siglip_vision_model"}))


# Rotary frequencies that change with the sixteenth token: what was cached before is read anew.
LONG_ROPE = {
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 8.0, 16.0, 32.0],
        "original_max_position_embeddings": 16,
        "factor": 4.0,
    },
}


class TestLongRope:
    @pytest.fixture(scope="class")
    def model(self):
        return tiny_model(LONG_ROPE)

    def test_the_frequencies_change(self, model):
        _, bare = with_bare_weights({"model_type": "phi3", **LONG_ROPE})
        text = torch.arange(3, 20)[None]
        with torch.no_grad():
            assert not torch.allclose(bare(text).logits[:, :16], bare(text[:, :16]).logits, atol=1e-3)

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("pictures", [0, 1, 2])
    @pytest.mark.parametrize("mode", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
    def test_generation_past_the_change_is_that_without_cache(self, model, mode, pictures, seed):
        input_ids = torch.randint(3, 90, (1, 10), generator=torch.Generator().manual_seed(seed))
        input_ids[0, 2 : 2 + 3 * pictures : 3] = IMAGE_TOKEN_ID
        inputs = {"input_ids": input_ids, "pixel_values": random_pixels(pictures, model.config, seed)}
        expected = generate(model, **inputs, max_new_tokens=20, use_cache=False)
        assert torch.equal(generate(model, **inputs, max_new_tokens=20, **mode), expected)

    @pytest.mark.parametrize("new_tokens", [2, 12], ids=["before the change", "after it"])
    def test_a_kept_cache_keeps_the_picture_past_the_change(self, model, new_tokens):
        input_ids = torch.tensor([[5, 6, IMAGE_TOKEN_ID, 7, 8, 9, 10, 11]])
        pixel_values = random_pixels(1, model.config)
        cache = DynamicCache(config=model.config.text_config)
        kept = {CACHE_NAME: cache}
        first = generate(model, input_ids=input_ids, pixel_values=pixel_values, max_new_tokens=new_tokens, **kept)
        assert cache.get_seq_length() == first.shape[1] - 1
        conversation = torch.cat([first, torch.tensor([[12, 13, 14]])], dim=1)
        expected = generate(
            model, input_ids=conversation, pixel_values=pixel_values, max_new_tokens=10, use_cache=False
        )
        assert torch.equal(generate(model, input_ids=conversation, max_new_tokens=10, **kept), expected)
        blind = generate(model, input_ids=conversation, max_new_tokens=10)
        assert not torch.equal(blind, expected)


class TestChunkedPrefill:
    @pytest.mark.parametrize("family", ["phi3", "llama", "gemma2"])
    def test_a_prompt_with_pictures_is_read_in_chunks(self, family):
        model = family_model(family)
        row = {name: tensor[1:] for name, tensor in ragged_batch(model.config).items()}  # with two pictures
        expected = generate(model, **row)
        assert torch.equal(generate(model, **row, prefill_chunk_size=4), expected)
        blind = {**row, "pixel_values": row["pixel_values"] * 0}
        assert not torch.equal(generate(model, **blind, prefill_chunk_size=4, max_new_tokens=12), expected)


class TestCacheNames:
    def test_both_names_are_taken_everywhere(self):
        model = tiny_model()
        inputs = ragged_batch(model.config)
        for part in (model, model.model):
            results = []
            for name in ("cache", "past_key_values"):
                cache = DynamicCache(config=model.config.text_config)
                with torch.no_grad():
                    first = part(**inputs, **{name: cache})
                    assert first[CACHE_NAME] is cache and cache.get_seq_length() == 10
                    results.append(part(input_ids=inputs["input_ids"][:, -1:], **{name: cache})[0])
            assert torch.equal(*results)
        prepared = model.prepare_inputs_for_generation(inputs["input_ids"], past_key_values=cache)
        assert prepared[CACHE_NAME] is cache

    def test_two_caches_are_refused(self):
        model = tiny_model()
        caches = {name: DynamicCache(config=model.config.text_config) for name in ("cache", "past_key_values")}
        with pytest.raises(ValueError, match="`cache` and `past_key_values` are two names of one argument"):
            model(input_ids=torch.tensor([[3]]), **caches)

    def test_outputs_have_the_name_of_the_installed_transformers(self):
        fields = AutoModelForCausalLM.from_config(tiny_config().text_config)(
            torch.tensor([[3]]), use_cache=True
        ).keys()
        output = tiny_model()(torch.tensor([[3]]), use_cache=True)
        assert CACHE_NAME in fields and CACHE_NAME in output
        assert isinstance(output, CausalLMOutputWithPast)


class TestWholeness:
    def test_the_loss_is_the_language_models_own_with_that_of_its_routers(self):
        settings = {"model_type": "mixtral", "num_local_experts": 4, "output_router_logits": True}
        model, bare = with_bare_weights({**settings, "router_aux_loss_coef": 0.5})
        text = left_padded_text()
        labels = text["input_ids"].masked_fill(text["attention_mask"] == 0, -100)
        with torch.no_grad():
            ours, theirs = model(**text, labels=labels), bare(**text, labels=labels)
        assert theirs.aux_loss > 0
        torch.testing.assert_close(ours.loss, theirs.loss)
        torch.testing.assert_close(ours.aux_loss, theirs.aux_loss)

    def test_a_loss_function_of_the_users_is_used(self):
        model = tiny_model()
        model.loss_function = lambda logits, labels, **kwargs: logits.sum() * 0 + 7
        assert model(input_ids=torch.tensor([[3, 4]]), labels=torch.tensor([[3, 4]])).loss == 7

    @pytest.mark.parametrize(
        ("family", "tied"),
        # An untied BERT does not survive this on its own: resized, its two biases are one tensor, saved once.
        [("bert", True), *itertools.product(["modernbert-decoder", "llama"], [True, False])],
    )
    def test_heads_of_any_shape_are_tied_resized_saved_and_loaded(self, family, tied, tmp_path):
        text_config = tiny_text_config(family)
        text_config.tie_word_embeddings = tied
        config = AureaConfig(
            text_config=text_config, **TINY_VISION, image_token_id=IMAGE_TOKEN_ID, tie_word_embeddings=tied
        )
        model = randomise(AureaForConditionalGeneration(config)).eval()
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
        model.resize_token_embeddings(120)
        inputs = ragged_batch(config)
        with torch.no_grad():
            expected = model(**inputs, labels=inputs["input_ids"])
        assert expected.logits.shape[-1] == 120
        model.save_pretrained(tmp_path)
        loaded, report = AureaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        with torch.no_grad():
            again = loaded.eval()(**inputs, labels=inputs["input_ids"])
        assert torch.equal(again.logits, expected.logits) and torch.equal(again.loss, expected.loss)

    @pytest.mark.parametrize("of_whole", [True, False])
    @pytest.mark.parametrize("of_text", [True, False])
    def test_the_whole_says_whether_embeddings_are_tied(self, of_text, of_whole, tmp_path):
        text_config = {"model_type": "llama", "tie_word_embeddings": of_text}
        model = tiny_model(text_config, tie_word_embeddings=of_whole)
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == of_whole
        model.save_pretrained(tmp_path)
        loaded, report = AureaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"]
        text = torch.tensor([[3, 4, 5]])
        with torch.no_grad():
            assert torch.equal(loaded.eval()(text).logits, model(text).logits)

    def test_the_head_reads_the_decoder_that_is_there(self):
        model = tiny_model()
        other = tiny_model(seed=1).model.language_model
        model.model.language_model = other
        assert model.causal_lm.model.norm is other.norm

    def test_the_decoders_own_output_is_given_when_asked_for(self):
        model = tiny_model({"model_type": "mixtral", "num_local_experts": 4}).model
        text = torch.tensor([[3, 4, 5]])
        assert "decoder_output" not in model(text)
        output = model(text, output_router_logits=True, return_decoder_output=True).decoder_output
        assert len(output.router_logits) == 3

    def test_a_copied_and_a_pickled_model_use_their_own_head(self):
        # Not one whose layers hold functions of the hub, which pickle refuses.
        model = tiny_model({"model_type": "gpt2", "tie_word_embeddings": False})
        text = torch.tensor([[3, 4, 5]])
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with torch.no_grad():
                expected = model(text).logits
                assert torch.equal(other(text).logits, expected)
                other.lm_head.weight.zero_()
                assert not other(text).logits.any() and torch.equal(model(text).logits, expected)

    def test_a_replica_of_data_parallel_uses_its_own_head(self):
        model = tiny_model()
        replica = model._replicate_for_data_parallel()
        replica.lm_head = torch.nn.Linear(32, 5)
        assert replica(torch.tensor([[3]])).logits.shape[-1] == 5
        assert model(torch.tensor([[3]])).logits.shape[-1] == 99

    def test_buffers_of_a_head_are_saved_if_its_own_class_saves_them(self, monkeypatch):
        make = modeling_aurea.make_causal_lm

        def with_buffers(config):
            causal_lm = make(config)
            for name in ("saved", "made"):
                causal_lm.register_buffer(name, torch.ones(1), persistent=name == "saved")
            return causal_lm

        monkeypatch.setattr(modeling_aurea, "make_causal_lm", with_buffers)
        model = tiny_model()
        assert model.causal_lm.saved is model.saved and model.causal_lm.made is model.made
        assert "saved" in model.state_dict() and "made" not in model.state_dict()

    def test_modules_whose_names_begin_like_the_decoders_stay_the_heads(self):
        names = ("model.norm.weight", "model_norm.weight", "lm_head.weight")
        in_owner = [name_in_owner(name, "model", "model.language_model") for name in names]
        assert in_owner == ["model.language_model.norm.weight", *names[1:]]

    def test_a_state_that_cannot_be_cropped_is_told_of(self):
        model = tiny_model({"model_type": "falcon_h1", **FURTHER_LANGUAGE_MODELS["falcon_h1"]})
        with pytest.raises(ValueError, match="stateful models, such as AureaForConditionalGeneration"):
            generate(model, input_ids=torch.tensor([[3, 4, 3]]), prompt_lookup_num_tokens=2)

    def test_a_head_that_takes_no_decoder_output_is_refused(self):
        with pytest.raises(AureaUnfitLanguageModelError, match=r"'bloom'.*does not hand keyword arguments on"):
            AureaForConditionalGeneration(tiny_config({"model_type": "bloom"}))


# Tiny encoders that all give 4×4 patches, with the pixels of their view.
VISION_MODELS = {
    "siglip_vision_model": ({"hidden_size": 16, "intermediate_size": 24, "image_size": 28, "patch_size": 7}, 28),
    "vit": ({"hidden_size": 16, "intermediate_size": 24, "image_size": 28, "patch_size": 7}, 28),
    "clip_vision_model": ({"hidden_size": 16, "intermediate_size": 24, "image_size": 28, "patch_size": 7}, 28),
    "dinov2": ({"hidden_size": 12, "mlp_ratio": 2, "image_size": 20, "patch_size": 5}, 20),
    "dinov2_with_registers": ({"hidden_size": 12, "mlp_ratio": 2, "image_size": 28, "patch_size": 7}, 28),
    "swin": (
        {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "image_size": 32, "patch_size": 4},
        32,
    ),
    "convnext": ({"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32, "patch_size": 4}, 32),
    "resnet": ({"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}, 32),
}
# Parts of encoders that work on the pooled vector alone, which nobody asks for here.
POOLERS = {"vit": "pooler.", "clip_vision_model": "post_layernorm.", "convnext": "layernorm."}


def vision_settings(model_type: str) -> tuple[dict, int]:
    settings, size = VISION_MODELS[model_type]
    if "hidden_size" in settings:
        settings = {"num_hidden_layers": 2, "num_attention_heads": 2, **settings}
    return {"model_type": model_type, **settings}, size


def model_with_encoders(semantic: str, spatial: str) -> AureaForConditionalGeneration:
    (vision, size), (spatial_vision, spatial_size) = vision_settings(semantic), vision_settings(spatial)
    config = tiny_config().to_dict() | {
        "vision_config": vision,
        "spatial_vision_config": spatial_vision,
        "vision_image_size": size,
        "spatial_vision_image_size": spatial_size,
        "projector_hidden_size": None,
    }
    torch.manual_seed(1)
    return AureaForConditionalGeneration(type(tiny_config())(**config)).eval()


class TestVisionModels:
    @pytest.mark.parametrize("place", ["vision_model", "spatial_vision_model"])
    @pytest.mark.parametrize("model_type", VISION_MODELS)
    def test_an_encoder_works_and_trains_in_either_place(self, model_type, place):
        pair = (model_type, "dinov2") if place == "vision_model" else ("siglip_vision_model", model_type)
        model = model_with_encoders(*pair)
        config = model.config
        assert config.grid_sizes == ((4, 4), (4, 4))
        assert config.feature_sizes[place == "spatial_vision_model"] in (12, 16)
        inputs = ragged_batch(config)
        with torch.no_grad():
            features = model.get_image_features(inputs["pixel_values"]).pooler_output
            other = model.get_image_features(random_pixels(3, config, seed=1)).pooler_output
        assert features.shape == (3, config.tokens_per_image, 32)
        assert not torch.allclose(features, other)
        model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
        encoder = getattr(model.model, place)
        silent = [name for name, parameter in encoder.named_parameters() if parameter.grad is None]
        assert all(name.startswith(POOLERS.get(model_type, "none")) for name in silent), silent

    @pytest.mark.parametrize("model_type", VISION_MODELS)
    def test_patches_keep_their_places(self, model_type):
        # What is in the lower right corner of the picture must show most in the last patch.
        model = model_with_encoders("siglip_vision_model", model_type)
        encoder, size = model.model.spatial_vision_model, VISION_MODELS[model_type][1]
        pixels = torch.zeros(1, 2, 3, *(max(sides) for sides in zip(*model.config.view_sizes)))
        changed = pixels.clone()
        changed[:, 1, :, size * 3 // 4 : size, size * 3 // 4 : size] = 3.0
        with torch.no_grad():
            difference = encoder.encode(changed)[1] - encoder.encode(pixels)[1]
        assert difference.norm(dim=-1).flatten().argmax() == 15

    @pytest.mark.parametrize("model_type", ["clip_vision_model", "swin", "resnet"])
    def test_a_model_of_these_encoders_is_saved_and_loaded(self, model_type, tmp_path):
        model = model_with_encoders(model_type, "dinov2")
        model.save_pretrained(tmp_path)
        loaded = AureaForConditionalGeneration.from_pretrained(tmp_path).eval()
        inputs = ragged_batch(model.config)
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
