# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""How visual tokens reach the decoder, compared with the same done by hand."""

import copy
import json
import re
from itertools import product

import pytest
import torch
from causal_families import tiny_text_config
from conftest import IMAGE_TOKEN_ID, TINY_VISION, random_pixels, some, tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from transformers_aurea import (
    AureaConfig,
    AureaDataCollator,
    AureaForConditionalGeneration,
    AureaProcessor,
    set_trainable,
)
from transformers_aurea.configuration_aurea import AureaUnfitLanguageModelError
from transformers_aurea.fusion_aurea import FUSIONS
from transformers_aurea.prefix_trial_aurea import reads_prefix, reads_prefix_here


CONNECTORS = ["cross_attention", "prefix", "both"]
MASKS = ["causal", "pictures", "prompt"]
GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
SVA = {"fusion_type": "sva", "depth": 1}  # four tokens a picture


def fusion_settings(fusion_type):
    return {"fusion_type": fusion_type, "radius": 1, "depth": 1}


def connected_model(connector_type="prefix", prefix_mask="causal", family="phi3", fusion=SVA):
    settings = {"connector_type": connector_type, "prefix_mask": prefix_mask, "feature_fusion_config": fusion}
    return tiny_model({"model_type": family, **({"head_dim": 8} if family == "gemma2" else {})}, **settings)


def run_of(model):
    """The placeholders of one picture."""
    return [IMAGE_TOKEN_ID] * model.model.connector.placeholders_per_image


def rows_of(model):
    """Two pictures, one, none; padded on the left."""
    run = run_of(model)
    rows = [[5, 6, *run, 7, 8, *run, 9, 10], [11, 12, 13, *run, 14], [20, 21, 22]]
    length = max(map(len, rows))
    input_ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    attention_mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return rows, {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "pixel_values": random_pixels(3, model.config),
    }


def bare_language_model(model):
    """The language model alone, with a copy of the weights."""
    bare = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    state = {name.replace("model.language_model.", "model."): value for name, value in model.state_dict().items()}
    bare.load_state_dict({name: state[name] for name in bare.state_dict()})
    return bare


def seen_by_hand(row, num_per_image, prefix_mask, num_prompt):
    """(T, T): what each token sees, token by token."""
    picture, count = [], 0
    for token in row:
        picture.append(count // num_per_image if token == IMAGE_TOKEN_ID else None)
        count += token == IMAGE_TOKEN_ID
    seen = torch.zeros(len(row), len(row), dtype=torch.bool)
    for query in range(len(row)):
        for key in range(len(row)):
            alike = prefix_mask == "pictures" and picture[query] is not None and picture[query] == picture[key]
            prompt = prefix_mask == "prompt" and query < num_prompt and key < num_prompt
            seen[query, key] = key <= query or alike or prompt
    return seen


class TestPrefix:
    @pytest.mark.parametrize("fusion_type", FUSIONS)
    @torch.no_grad()
    def test_it_is_the_language_model_over_features_in_the_place_of_placeholders(self, fusion_type):
        model = connected_model(fusion=fusion_settings(fusion_type))
        bare, (rows, inputs) = bare_language_model(model), rows_of(model)
        features = iter(model.get_image_features(inputs["pixel_values"]).pooler_output.flatten(0, 1))
        logits = model(**inputs).logits
        for row, ours in zip(rows, logits):
            embeds = [
                next(features) if token == IMAGE_TOKEN_ID else bare.get_input_embeddings().weight[token]
                for token in row
            ]
            expected = bare(inputs_embeds=torch.stack(embeds)[None]).logits[0]
            torch.testing.assert_close(ours[-len(row) :], expected, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("family", ["phi3", "gemma2"])  # the latter's layers slide in turn
    @pytest.mark.parametrize("prefix_mask", MASKS)
    @torch.no_grad()
    def test_the_mask_is_the_one_asked_for(self, prefix_mask, family):
        model = connected_model("prefix", prefix_mask, family)
        bare, (rows, inputs) = bare_language_model(model), rows_of(model)
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
        num_prompt = len(rows[0]) - 2
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -2:] = inputs["input_ids"][:, -2:]
        ours = model(**inputs, labels=labels).logits[0]
        row = torch.tensor(rows[0])
        embeds = bare.get_input_embeddings()(row)
        embeds[row == IMAGE_TOKEN_ID] = features[:2].flatten(0, 1)
        seen = seen_by_hand(rows[0], len(run_of(model)), prefix_mask, num_prompt)
        mask = torch.zeros(1, 1, *seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        masks = {"full_attention": mask, "sliding_attention": mask} if family == "gemma2" else mask
        expected = bare(inputs_embeds=embeds[None], attention_mask=masks).logits[0]
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
        causal = bare(inputs_embeds=embeds[None]).logits[0]
        assert (prefix_mask == "causal") == torch.allclose(ours, causal, atol=1e-3)

    def test_prompts_of_rows_of_several_texts_see_their_own(self):
        model = connected_model("prefix", "prompt")
        labels = torch.tensor([[-100, -100, 3, 4, -100, -100, -100, 5, -100]])
        position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
        blocks = model.model.connector.prompt_blocks(labels, position_ids)
        assert blocks.tolist() == [[1, 1, -1, -1, 2, 2, 2, -1, -1]]
        assert model.model.connector.prompt_blocks(labels, None).tolist() == [[0, 0, -1, -1, -1, -1, -1, -1, -1]]

    @torch.no_grad()
    def test_a_placeholder_beyond_the_vocabulary(self):
        model = connected_model()
        _, inputs = rows_of(model)
        expected = model(**inputs).logits
        model.config.image_token_id = 1000
        inputs["input_ids"][inputs["input_ids"] == IMAGE_TOKEN_ID] = 1000
        assert torch.equal(model(**inputs).logits, expected)


@torch.no_grad()
def test_both_is_the_two_at_once():
    model = connected_model("both")
    settings = {"connector_type": "cross_attention", "feature_fusion_config": SVA}
    blocks_alone = AureaForConditionalGeneration(tiny_config(**settings)).eval()
    blocks_alone.load_state_dict(model.state_dict())
    rows, inputs = rows_of(model)
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    row = torch.tensor([rows[0]])
    embeds = model.get_input_embeddings()(row)
    embeds[row == IMAGE_TOKEN_ID] = features[:2].flatten(0, 1)
    first_of_run = torch.tensor([[0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]])
    expected = blocks_alone(
        inputs_embeds=embeds,
        cross_attention_states=features[:2].flatten(0, 1)[None],
        num_images=torch.tensor([2]),
        mm_token_type_ids=first_of_run,
    ).logits[0]
    torch.testing.assert_close(model(**inputs).logits[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("connector_type", "prefix_mask", "family"),
    some(
        [
            (*one, family)
            for one in [*((name, "causal") for name in CONNECTORS), ("prefix", "pictures"), ("both", "prompt")]
            for family in ("phi3", "gemma2")
        ],
        lambda connector, mask, family: family == "phi3" or mask != "causal" or connector == "cross_attention",
    ),
)
class TestGeneration:
    def test_however_it_is_cached_the_answers_are_the_same(self, connector_type, prefix_mask, family):
        model = connected_model(connector_type, prefix_mask, family)
        rows, inputs = rows_of(model)
        expected = model.generate(**inputs, **GREEDY)
        ways = {"uncached": {"use_cache": False}, "static": {"cache_implementation": "static"}}
        if prefix_mask == "causal":
            ways["in chunks"] = {"prefill_chunk_size": 5}
        for name, settings in ways.items():
            assert torch.equal(model.generate(**inputs, **GREEDY, **settings), expected), name
        beams = [
            model.generate(**inputs, **GREEDY, num_beams=3, num_return_sequences=2, use_cache=use_cache)
            for use_cache in (True, False)
        ]
        assert torch.equal(*beams)
        pictures = inputs["pixel_values"].split([2, 1, 0])
        for row, pixels, answer in zip(rows, pictures, expected):
            alone = model.generate(torch.tensor([row]), pixel_values=pixels, **GREEDY)
            assert torch.equal(alone[0, -6:], answer[-6:])

    def test_each_picture_shows_and_no_word_sees_a_later_one(self, connector_type, prefix_mask, family):
        model = connected_model(connector_type, prefix_mask, family)
        rows, inputs = rows_of(model)
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -1] = 3
        with torch.no_grad():
            before = model(**inputs, labels=labels).logits[0]
            inputs["pixel_values"][1] += 1
            after = model(**inputs, labels=labels).logits[0]
        changed = ((before - after).abs() > 1e-6).any(dim=-1)
        second = [place for place, token in enumerate(rows[0]) if token == IMAGE_TOKEN_ID][len(run_of(model))]
        assert changed[second:].all()
        assert changed[:second].any() == (prefix_mask == "prompt")  # there, that is what is asked for

    def test_a_kept_cache_goes_on(self, connector_type, prefix_mask, family):
        if prefix_mask == "prompt":
            pytest.skip("a second prompt is one of its own")
        model = connected_model(connector_type, prefix_mask, family)
        rows, inputs = rows_of(model)
        turn = {"input_ids": torch.tensor(rows[:1]), "pixel_values": inputs["pixel_values"][:2]}
        first = model.generate(**turn, **GREEDY, return_dict_in_generate=True)
        cache = first.cache if "cache" in first else first.past_key_values
        longer = torch.cat([first.sequences, torch.tensor([[30, 31, *run_of(model), 32]])], dim=1)
        mm_token_type_ids = (longer == IMAGE_TOKEN_ID).long()
        mm_token_type_ids[:, len(rows[0]) : first.sequences.shape[1]] = 0  # what was generated is a word
        turn = {
            "input_ids": longer,
            "pixel_values": inputs["pixel_values"],
            "mm_token_type_ids": mm_token_type_ids,
            "attention_mask": torch.ones_like(longer),
        }
        expected = model.generate(**turn, **GREEDY)
        assert torch.equal(model.generate(**turn, **GREEDY, past_key_values=cache), expected)


@pytest.mark.parametrize(
    ("connector_type", "fusion_type"),
    some(product(CONNECTORS, FUSIONS), lambda connector, fusion: connector == "both" or fusion == "sva"),
)
class TestEveryPair:
    def test_every_parameter_gets_a_gradient_with_pictures_and_without(self, fusion_type, connector_type):
        fusion = fusion_settings(fusion_type)
        model = connected_model(connector_type, fusion=fusion).train()
        _, inputs = rows_of(model)
        text = {name: inputs[name][2:] for name in ("input_ids", "attention_mask")}
        for batch in (inputs, text):
            model.zero_grad()
            model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss.backward()
            assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
        visual = [parameter.grad for name, parameter in model.named_parameters() if "vision_model" in name]
        assert not any(gradient.any() for gradient in visual)  # of text alone

    def test_saved_and_loaded_it_is_the_same(self, fusion_type, connector_type, tmp_path):
        model = connected_model(connector_type, fusion=fusion_settings(fusion_type))
        _, inputs = rows_of(model)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


class TestOneEncoder:
    @pytest.mark.parametrize(("encoder", "other"), [("vision", "spatial_vision"), ("spatial_vision", "vision")])
    def test_the_other_is_not_there(self, encoder, other):
        model = connected_model(fusion={"fusion_type": "none", "encoder": encoder})
        names = {name.split(".")[1] for name, _ in model.named_parameters() if name.startswith("model.")}
        assert f"{encoder}_model" in names and f"{other}_model" not in names
        assert model.get_submodule("model") and getattr(model.model, f"{other}_model") is None
        assert getattr(model.config, f"{other}_config") is None

    @pytest.mark.parametrize("encoder", ["vision", "spatial_vision"])
    @torch.no_grad()
    def test_pictures_may_have_the_others_view_too(self, encoder):
        model = connected_model("cross_attention", fusion={"fusion_type": "none", "encoder": encoder})
        pixels = torch.randn(2, 2, 3, 28, 28)
        own = pixels[:, :1] if encoder == "vision" else pixels[:, 1:]
        expected = model.get_image_features(own).pooler_output
        assert torch.equal(model.get_image_features(pixels).pooler_output, expected)


class TestBadInput:
    def test_visual_tokens_for_another_connector(self):
        states = torch.zeros(1, 4, 32)
        for connector_type, given, wanted in (
            ("prefix", "cross_attention_states", "image_embeds"),
            ("cross_attention", "image_embeds", "cross_attention_states"),
        ):
            model = connected_model(connector_type)
            with pytest.raises(ValueError, match=rf"`{given}` were given.*'{connector_type}'.*Give `{wanted}`"):
                model(torch.tensor([[5, 6]]), **{given: states})

    def test_one_of_two_that_go_together(self):
        with pytest.raises(ValueError, match=r'without `image_embeds`.*"both"'):
            connected_model("both")(torch.tensor([[5, 6]]), cross_attention_states=torch.zeros(1, 4, 32))

    def test_visual_tokens_that_no_placeholder_shows(self):
        model, run = connected_model("prefix"), [IMAGE_TOKEN_ID] * 4
        embeds = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
        for row in ([5, 6], [5, *run], [5, *run[1:], 6]):
            with pytest.raises((ValueError, RuntimeError), match=r"placeholders per row for 8 visual tokens"):
                model(torch.tensor([row]), image_embeds=embeds, use_cache=False)
        row = torch.tensor([[5, *run, 7, *run, 6]])
        with torch.no_grad():
            expected = model(row, image_embeds=embeds, num_images=torch.tensor([2])).logits
            assert torch.equal(model(row, image_embeds=embeds).logits, expected)

    @pytest.mark.parametrize("prefix_mask", ["pictures", "prompt"])
    def test_an_attention_that_takes_no_such_mask(self, prefix_mask):
        model = connected_model("prefix", prefix_mask)
        _, inputs = rows_of(model)
        AttentionInterface.register("maskless", sdpa_attention_forward)
        AttentionMaskInterface.register("maskless", lambda *args, **kwargs: None)  # as FlashAttention's is
        model.model.language_model.config._attn_implementation = "maskless"
        with pytest.raises(ValueError, match=rf"'phi3', whose attention 'maskless' takes no mask.*'{prefix_mask}'"):
            model(**inputs)

    def test_placeholders_of_a_processor_for_another_connector(self):
        pixels = random_pixels(1, tiny_config())
        with pytest.raises((ValueError, RuntimeError), match=r"Give 4 per picture.*`image_seq_length=4`"):
            connected_model("prefix")(torch.tensor([[5, IMAGE_TOKEN_ID, 6]]), pixel_values=pixels)
        with pytest.raises((ValueError, RuntimeError), match=r"Give 1 per picture.*`image_seq_length=1`"):
            connected_model("cross_attention")(torch.tensor([[5, *[IMAGE_TOKEN_ID] * 4, 6]]), pixel_values=pixels)
        with pytest.raises((ValueError, RuntimeError), match=r"8 placeholders \(\[5, 3\] per row\)"):
            ids = torch.tensor([[IMAGE_TOKEN_ID] * 5 + [7], [IMAGE_TOKEN_ID] * 3 + [5, 6, 7]])
            connected_model("prefix")(ids, pixel_values=random_pixels(2, tiny_config()))

    def test_a_mask_of_a_prefix_that_is_none(self):
        with pytest.raises(Exception, match=r"`prefix_mask` is 'pictures'.*'cross_attention'"):
            tiny_config(prefix_mask="pictures")

    def test_unknown_names_list_what_there_is(self):
        with pytest.raises(Exception, match=r"connector_type.*cross_attention.*prefix.*both"):
            tiny_config(connector_type="adapter")

    def test_training_that_does_not_tell_what_is_prompt(self):
        model = connected_model("prefix", "prompt").train()
        with pytest.raises(ValueError, match='With `prefix_mask="prompt"`, what is prompt is told by `labels`'):
            model(torch.tensor([[5, 6]]))

    @pytest.mark.parametrize("prefix_mask", ["pictures", "prompt"])
    def test_a_prompt_read_in_chunks_that_should_see_all_of_itself(self, prefix_mask):
        model = connected_model("prefix", prefix_mask)
        with pytest.raises(ValueError, match=rf"`prefill_chunk_size` is 2.*'{prefix_mask}'"):
            model.generate(torch.tensor([[5, 6, 7, 8]]), prefill_chunk_size=2, **GREEDY)


@pytest.mark.parametrize(("ours", "theirs"), [("prefix", "prefix"), ("both", "prefix"), ("prefix", "both")])
def test_an_assistant_of_another_connector_looks_once_with_its_own_eyes(ours, theirs):
    model, assistant = connected_model(ours), connected_model(theirs, family="llama")
    rows, inputs = rows_of(model)
    turn = {"input_ids": torch.tensor(rows[:1]), "pixel_values": inputs["pixel_values"][:2]}
    looks = []
    assistant.model.vision_model.register_forward_hook(lambda *_: looks.append(1))
    settings = {**GREEDY, "max_new_tokens": 10, "suppress_tokens": [IMAGE_TOKEN_ID]}
    assert torch.equal(
        model.generate(**turn, **settings, assistant_model=assistant), model.generate(**turn, **settings)
    )
    assert len(looks) == 1


def family_config(family, prefix_mask="causal", connector_type="prefix", **text_settings):
    """A configuration with a tiny language model of the family."""
    return AureaConfig(
        text_config=tiny_text_config(family).to_dict() | text_settings,
        **{**TINY_VISION, "feature_fusion_config": SVA},
        image_token_id=IMAGE_TOKEN_ID,
        connector_type=connector_type,
        prefix_mask=prefix_mask,
    )


class TestLanguageModels:
    @pytest.mark.parametrize("device", ["cpu", "meta"])
    @pytest.mark.parametrize(
        ("family", "prefix_mask", "settings", "reason"),
        [
            ("gemma4_text", "causal", {}, "reads ids, but not embeddings in their place"),
            ("deepseek_v4", "causal", {}, "reads ids, but not embeddings in their place"),
            ("falcon_h1", "causal", {}, "makes more of ids than their embeddings"),
            ("gemma3n_text", "causal", {}, "makes more of ids than their embeddings"),
            ("roberta", "causal", {}, "makes more of ids than their embeddings"),
            ("opt", "causal", {"word_embed_proj_dim": 16}, r"embeddings have 16 channels.*\(32\)"),
            ("opt", "pictures", {}, "does not run with a mask of single tokens"),
            ("nemotron_h", "prompt", {}, "attention 'sdpa' takes no mask of single tokens.*'prompt'"),
        ],
    )
    def test_one_that_a_prefix_does_not_suit_is_refused_when_it_is_built(
        self, family, prefix_mask, settings, reason, device
    ):
        with torch.device(device), pytest.raises(AureaUnfitLanguageModelError, match=f"'{family}', whose .*{reason}"):
            AureaForConditionalGeneration(family_config(family, prefix_mask, **settings))

    def test_one_that_knows_the_ids_of_embeddings_of_words_is_refused(self):
        if "qwen4_exp_text" not in CONFIG_MAPPING:
            pytest.skip("this transformers has no qwen4_exp_text")
        with pytest.raises(AureaUnfitLanguageModelError, match="reads ids, but not embeddings in their place"):
            AureaForConditionalGeneration(family_config("qwen4_exp_text"))

    def test_one_that_does_not_obey_the_mask_is_refused_as_soon_as_it_has_weights(self, tmp_path):
        with pytest.raises(
            AureaUnfitLanguageModelError, match=r"'gpt_neo'.*lets no token see a later one.*'pictures'"
        ):
            AureaForConditionalGeneration(family_config("gpt_neo", "pictures"))
        AureaForConditionalGeneration(family_config("gpt_neo")).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text()) | {"prefix_mask": "pictures"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        model = AutoModelForImageTextToText.from_pretrained(tmp_path)  # which is built without them
        with pytest.raises(
            AureaUnfitLanguageModelError, match=r"'gpt_neo'.*lets no token see a later one.*'pictures'"
        ):
            model(torch.tensor([[5, 6]]))

    def test_where_no_token_shows_in_another_yet_nothing_is_said(self):
        decoder = AutoModelForCausalLM.from_config(family_config("gpt_neo").text_config).base_model
        connector = connected_model("prefix", "pictures").model.connector
        for layer in decoder.h:
            torch.nn.init.zeros_(layer.attn.attention.out_proj.weight)
            torch.nn.init.zeros_(layer.attn.attention.out_proj.bias)
        assert not reads_prefix(decoder, connector)

    @pytest.mark.parametrize("prefix_mask", ["causal", "pictures"])
    @pytest.mark.parametrize("family", ["phi3", "gemma2", "phi4_multimodal"])
    def test_one_that_it_suits_is_seen_to_read_it(self, family, prefix_mask):
        with torch.device("meta"):
            model = AureaForConditionalGeneration(family_config(family, prefix_mask))
        assert model.model._reads_prefix == (prefix_mask == "causal")  # of the mask nothing is seen without data
        assert AureaForConditionalGeneration(family_config(family, prefix_mask)).model._reads_prefix

    def test_what_a_run_without_data_cannot_tell_is_looked_at_once(self, monkeypatch):
        with torch.device("meta"):
            assert not AureaForConditionalGeneration(family_config("gpt2")).model._reads_prefix
        model = AureaForConditionalGeneration(family_config("gpt2"))
        assert model.model._reads_prefix
        model.model._reads_prefix = False
        looks = []
        monkeypatch.setattr(
            "transformers_aurea.modeling_aurea.reads_prefix_here",
            lambda *arguments: looks.append(reads_prefix_here(*arguments)),
        )
        for _ in range(2):
            model(torch.tensor([[5, 6]]))
        assert looks == [True]

    @pytest.mark.parametrize("family", ["qwen3_next", "lfm2"])
    @pytest.mark.parametrize("num_padding", [0, 2])
    @torch.no_grad()
    def test_layers_that_are_no_attention_stand_in_no_mask_s_way(self, family, num_padding):
        model = AureaForConditionalGeneration(family_config(family, "pictures")).eval()
        row = torch.tensor([[0] * num_padding + [5, 6, *run_of(model), 7, 8]])
        embeds = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
        embeds[1, :3] = embeds[0, :3]  # all but the last visual token
        text = {"input_ids": row.repeat(2, 1), "attention_mask": (row != 0).long().repeat(2, 1)}
        logits = model(**text, image_embeds=embeds, use_cache=False).logits[:, num_padding:]
        assert torch.equal(logits[0, :2], logits[1, :2])
        assert ((logits[0, 2:] - logits[1, 2:]).abs().amax(-1) > 0).all()

    @pytest.mark.parametrize("prefix_mask", ["causal", "pictures"])
    def test_the_trial_changes_no_mode_of_training(self, prefix_mask):
        model = connected_model("both", prefix_mask)
        decoder = model.model.language_model.train()
        decoder.layers[1].eval()
        modes = [module.training for module in decoder.modules()]
        assert reads_prefix_here(decoder, model.model.connector, decoder.device)
        assert [module.training for module in decoder.modules()] == modes and len(set(modes)) == 2


@pytest.fixture
def expanding(golden_processor):
    """A processor for a model with four visual tokens per picture in its text."""
    processor = copy.deepcopy(golden_processor)
    processor.image_seq_length = 4
    return processor


CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "One."}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A plain answer."}]},
    {"role": "user", "content": [{"type": "text", "text": "And <|image|> two?"}, {"type": "image"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Another one."}]},
]


class TestProcessor:
    def test_each_placeholder_becomes_as_many_tokens(self, expanding, golden_processor, pictures):
        text = "a <|image|> b <|image|> c"
        images = [pictures["rgb"], pictures["wide"]]
        inputs = expanding(images=images, text=text, return_text_replacement_offsets=True)
        ids = golden_processor(images=images, text=text)["input_ids"][0]
        run = [golden_processor.image_token_id] * 4
        expected = [token for one in ids for token in (run if one == run[0] else [one])]
        assert inputs["input_ids"][0] == expected
        assert inputs["mm_token_type_ids"][0] == [int(token == run[0]) for token in expected]
        offsets = inputs["text_replacement_offsets"][0]
        assert [entry["replacement"] for entry in offsets] == ["<|image|>" * 4] * 2
        assert expanding._get_num_multimodal_tokens([(100, 50), (7, 7)])["num_image_tokens"] == [4, 4]

    def test_words_that_read_like_one_stay_words(self, expanding, pictures):
        inputs = expanding.apply_chat_template(
            [CHAT[2] | {"content": [*CHAT[2]["content"][:1], {"type": "image", "image": pictures["rgb"]}]}],
            tokenize=True,
            return_dict=True,
        )
        assert inputs["input_ids"][0].count(expanding.image_token_id) == 4

    def test_a_run_is_not_cut(self, expanding, pictures):
        with pytest.raises(ValueError, match=r"[Tt]runcation"):
            expanding(images=pictures["rgb"], text="a b <|image|> c", truncation=True, max_length=4)

    def test_saved_and_loaded_it_is_the_same(self, expanding, tmp_path):
        expanding.save_pretrained(tmp_path)
        assert AureaProcessor.from_pretrained(tmp_path).image_seq_length == 4

    def test_a_length_that_is_none(self, golden_processor):
        with pytest.raises(ValueError, match="`image_seq_length` must be at least 1, got 0"):
            AureaProcessor(golden_processor.image_processor, golden_processor.tokenizer, image_seq_length=0)

    @pytest.mark.parametrize("marks_answers", [True, False])
    def test_the_same_words_are_trained_on(self, expanding, golden_processor, pictures, marks_answers):
        row = {"id": "a", "messages": CHAT, "images": [pictures["rgb"], pictures["wide"]]}
        batches = []
        for processor in (golden_processor, expanding):
            processor = copy.deepcopy(processor)
            if not marks_answers:
                template = re.sub(r"{%-? (end)?generation -?%}", "", processor.chat_template)
                processor.chat_template = processor.tokenizer.chat_template = template
            batches.append(AureaDataCollator(processor)([row]))
        (short, long), image_token_id = batches, expanding.image_token_id
        assert len(long["input_ids"][0]) == len(short["input_ids"][0]) + 2 * 3
        assert (long["labels"] != image_token_id).all()
        trained = [batch["labels"][batch["labels"] != -100].tolist() for batch in batches]
        assert trained[0] == trained[1] and trained[0]

    def test_independent_turns_of_which_all_but_the_first_would_see_nothing(self, expanding, pictures):
        answers = [CHAT[0], CHAT[1], {"role": "user", "content": [{"type": "text", "text": "Two?"}]}, CHAT[3]]
        row = {"id": "a", "messages": answers, "images": [pictures["rgb"]]}
        with pytest.raises(ValueError, match=r"pictures and 2 answers.*`image_seq_length`"):
            AureaDataCollator(expanding, independent_turns=True)([row])

    def test_a_row_is_refused_where_a_run_would_be_cut(self, expanding, pictures):
        row = {"id": "a", "messages": CHAT[:2], "images": [pictures["rgb"]]}
        ids = AureaDataCollator(expanding)([row])["input_ids"][0].tolist()
        end = len(ids) - ids[::-1].index(expanding.image_token_id)
        with pytest.raises(ValueError, match=f"max_length={end - 1}` would cut off the placeholders of 1 of its 1"):
            AureaDataCollator(expanding, max_length=end - 1)([row])


def test_what_servers_of_transformers_models_ask_of_one_whose_pictures_stand_in_the_text(expanding):
    """vLLM's back end for any model of transformers, as of 0.33 (https://docs.vllm.ai/en/latest/models).

    It embeds pictures itself, by `get_image_features`, one placeholder token for each embedding, runs `AutoModel`, and
    replaces attention by a function of its own, which finds its settings among the keyword arguments.
    """
    model = connected_model("prefix", fusion={"fusion_type": "sva"})
    assert model.config.auto_map["AutoModel"] == "modeling_aurea.AureaModel"
    assert model.get_encoder(modality="image") is model.model.vision_model
    assert model.get_decoder() is model.model.language_model
    features = model.get_image_features(random_pixels(2, model.config)).pooler_output
    assert [len(one) for one in features] == expanding._get_num_multimodal_tokens([(9, 9)] * 2)["num_image_tokens"]
    received = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        received.append(kwargs.get("attention_instances"))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("served", attention)
    AttentionMaskInterface.register("served", sdpa_mask)
    model.model.language_model.config._attn_implementation = "served"
    settings = {"attention_instances": {0: "first"}, "use_cache": False}
    embeds = model.get_input_embeddings()(torch.tensor([[5, 6, 7]]))
    with torch.no_grad():
        model.model(inputs_embeds=embeds, position_ids=torch.arange(3)[None], **settings)
    assert received == [{0: "first"}] * 3


class TestImagePositions:
    """`num_image_positions`: what tells the pictures of a row apart."""

    def model_and_rows(self, num_image_positions=2, **settings):
        settings = {"feature_fusion_config": SVA, "num_image_positions": num_image_positions} | settings
        model = tiny_model({"model_type": "phi3"}, **settings)
        rows = [[IMAGE_TOKEN_ID] * 3 + [7, 8, 9], [5, IMAGE_TOKEN_ID, 6, 7, 8, 9]]
        return model, {"input_ids": torch.tensor(rows), "pixel_values": random_pixels(4, model.config)}

    @pytest.mark.parametrize("connector_type", ["cross_attention", "both"])
    @torch.no_grad()
    def test_each_pictures_embedding_is_added_to_its_tokens_and_the_last_serves_those_beyond(self, connector_type):
        model, inputs = self.model_and_rows(connector_type=connector_type)
        if connector_type == "both":
            run = run_of(model)
            inputs["input_ids"] = torch.tensor([[*run * 3, 7, 8, 9], [0] * 2 * len(run) + [*run, 7, 8, 9]])
            inputs["attention_mask"] = (inputs["input_ids"] != 0).long()
        plain = AureaForConditionalGeneration(copy.deepcopy(model.config)).eval()
        plain.load_state_dict(model.state_dict())
        plain.model.image_position_embedding = None
        embeds = plain.get_image_features(inputs.pop("pixel_values")).pooler_output
        rows = torch.stack(
            [embeds[:3].flatten(0, 1), torch.cat([embeds[3], torch.zeros_like(embeds[:2].flatten(0, 1))])]
        )
        first, second = model.model.image_position_embedding.weight
        numbers = torch.stack([first, second, second]).repeat_interleave(embeds.shape[1], dim=0)
        given = {"num_images": torch.tensor([3, 1])} | ({"image_embeds": rows} if connector_type == "both" else {})
        logits = model(**inputs, cross_attention_states=rows, **given).logits
        expected = plain(**inputs, cross_attention_states=rows + numbers, **given).logits
        torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)
        assert (logits - plain(**inputs, cross_attention_states=rows, **given).logits).abs().max() > 1e-3

    @torch.no_grad()
    def test_without_it_a_word_after_two_pictures_cannot_tell_the_first_from_the_second(self):
        for num_image_positions, tells in ((0, False), (1, False), (2, True)):
            model, inputs = self.model_and_rows(num_image_positions)
            states = model.get_image_features(inputs["pixel_values"][:2]).pooler_output
            one, other = (
                model(
                    input_ids=torch.tensor([[IMAGE_TOKEN_ID, 8]]), cross_attention_states=pictures.flatten(0, 1)[None]
                ).logits  # without `num_images` both words see both
                for pictures in (states, states.flip(0))
            )
            assert ((one - other).abs().max() > 1e-3) == tells, num_image_positions

    def test_cached_and_beams_equal_the_run_without_a_cache(self):
        model, inputs = self.model_and_rows()
        for settings in (GREEDY, GREEDY | {"num_beams": 3}):
            cached, uncached = (model.generate(**inputs, **settings, use_cache=use) for use in (True, False))
            assert torch.equal(cached, uncached)

    def test_it_trains_with_the_projector_and_is_saved(self, tmp_path):
        model, inputs = self.model_and_rows()
        set_trainable(model, "align")
        model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
        embedding = model.model.image_position_embedding
        new = AureaForConditionalGeneration(model.config).model.image_position_embedding
        assert 0.7 < new.weight.std() < 1.3  # not the 0.02 of words
        assert (embedding.weight.grad.abs().amax(dim=1) > 0).all()
        model.save_pretrained(tmp_path)
        again = AureaForConditionalGeneration.from_pretrained(tmp_path).model.image_position_embedding
        assert torch.equal(again.weight, embedding.weight)
        assert again.weight.std() > 0

    def test_a_negative_number_is_refused(self):
        with pytest.raises(StrictDataclassError, match="`num_image_positions` must be 0 or greater, got -1"):
            tiny_config({"model_type": "phi3"}, feature_fusion_config=SVA, num_image_positions=-1)

    def test_a_prefix_needs_none(self):
        model, _ = self.model_and_rows(connector_type="prefix")
        assert model.model.image_position_embedding is None
