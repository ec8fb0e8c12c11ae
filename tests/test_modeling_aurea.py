# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
import copy
import pickle

import pytest
import torch
from conftest import FIXTURES, IMAGE_TOKEN_ID, random_pixels, tiny_config, tiny_model
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
)

from transformers_aurea import AureaForConditionalGeneration, AureaModel, modeling_aurea
from transformers_aurea.convert_aurea_weights_to_hf import AUREA_FILE, INDEX_FILE, published_tensors
from transformers_aurea.cross_attention_aurea import AureaWovenDecoderLayerMixin
from transformers_aurea.versions_aurea import CACHE_NAME
from transformers_aurea.visual_cache_aurea import holds_visual_states
from transformers_aurea.weaving_aurea import woven_class


TOLERANCE = 1e-4  # of the recorded tensors, in fp32


def golden_pixels(goldens) -> torch.Tensor:
    semantic = goldens["enc/siglip_pixels_u8"].float() / 128 - 1
    spatial = goldens["enc/dino_pixels_u8"].float() / 64 - 2
    return torch.stack([semantic, spatial], dim=1)


def published_gradient(model, name: str) -> torch.Tensor:
    """The gradient of a parameter under its published name, with the original's numbering of merged layers."""
    config = model.config
    text_layers = {
        layer + sum(position <= layer for position in config.cross_attention_positions): layer
        for layer in range(config.text_config.num_hidden_layers)
    }
    parts = name.split(".")
    if name.startswith("model.layers.") and int(parts[2]) in text_layers:
        parts[2] = str(text_layers[int(parts[2])])
    sources = {
        tensor.name.removeprefix("aurea_phi.lm."): tensor
        for tensor in published_tensors(config)
        if tensor.file in (AUREA_FILE, INDEX_FILE)
    }
    tensor = sources[".".join(parts)]
    parameters = dict(model.named_parameters())
    gradients = [parameters[target].grad for target in tensor.targets]
    return gradients[0] if len(gradients) == 1 else torch.cat(gradients)


class TestGoldens:
    """What the original computed on the tiny published checkpoint."""

    def test_encoders_fusion_and_projector(self, golden_model, goldens):
        with torch.no_grad():
            features = golden_model.get_image_features(golden_pixels(goldens))
        torch.testing.assert_close(features.last_hidden_state, goldens["enc/siglip_features"], atol=1e-5, rtol=0)
        spatial = features.spatial_last_hidden_state
        torch.testing.assert_close(spatial[:, 5:], goldens["enc/dino_features"], atol=1e-5, rtol=0)
        torch.testing.assert_close(spatial[:, 1:5], goldens["enc/dino_registers"], atol=1e-5, rtol=0)
        torch.testing.assert_close(features.pooler_output, goldens["sr/v_features"], atol=TOLERANCE, rtol=0)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padded_batch(self, golden_model, goldens, side):
        prefix = "batch" if side == "left" else "batch_right"
        mask = goldens[f"{prefix}/mask"].long()
        with torch.no_grad():
            logits = golden_model(
                input_ids=goldens["batch/input_ids"],
                attention_mask=mask,
                cross_attention_states=goldens["batch/v_features"],
            ).logits
        real = mask.bool()
        torch.testing.assert_close(logits[real], goldens[f"{prefix}/logits"][real], atol=TOLERANCE, rtol=0)

    def test_hidden_states(self, golden_model, goldens):
        mask = goldens["batch/mask"].long()
        with torch.no_grad():
            hidden_states = golden_model(
                input_ids=goldens["batch/input_ids"],
                attention_mask=mask,
                position_ids=goldens["batch/position_ids"],
                cross_attention_states=goldens["batch/v_features"],
                output_hidden_states=True,
            ).hidden_states
        # Recorded: the input of each of the nine merged layers, and the end. Ours: the input, and after each of five.
        for ours, recorded in zip(hidden_states, (0, 2, 3, 5, 6, 9), strict=True):
            real = mask.bool()
            expected = goldens["batch/hidden"][recorded]
            torch.testing.assert_close(ours[real], expected[real], atol=TOLERANCE, rtol=0)

    def test_text_only_with_a_cached_step(self, golden_model, goldens):
        mask = goldens["batch/mask"].long()
        cache = DynamicCache(config=golden_model.config.text_config)
        positions = goldens["batch/position_ids"]
        with torch.no_grad():
            first = golden_model(
                input_ids=goldens["batch/input_ids"],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
            ).logits
            step = golden_model(
                input_ids=goldens["batch/text_only_step_ids"],
                attention_mask=torch.cat([mask, mask.new_ones(2, 1)], dim=1),
                position_ids=positions[:, -1:] + 1,
                past_key_values=cache,
            ).logits
        real = mask.bool()
        torch.testing.assert_close(first[real], goldens["batch/logits_text_only"][real], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(step, goldens["batch/text_only_step_logits"], atol=TOLERANCE, rtol=0)

    def test_prompts(self, golden_model, golden_processor, goldens, facts, pictures):
        image = golden_processor(images=pictures["rgb"], text=facts["message_image"], return_tensors="pt")
        text = golden_processor(text=facts["message_text"], return_tensors="pt")
        assert torch.equal(image["input_ids"], goldens["text/ids_image_prompt"])
        assert torch.equal(text["input_ids"], goldens["text/ids_text_prompt"])
        with torch.no_grad():
            image_logits, text_logits = golden_model(**image).logits, golden_model(**text).logits
            blind = golden_model(input_ids=image["input_ids"], attention_mask=image["attention_mask"]).logits
        recorded = goldens["text/logits_image_prompt_last48"]
        torch.testing.assert_close(image_logits[:, -48:], recorded, atol=TOLERANCE, rtol=0)
        assert torch.equal(image_logits.argmax(-1), goldens["text/logits_image_prompt_all_argmax"])
        torch.testing.assert_close(text_logits, goldens["text/logits_text_prompt"], atol=TOLERANCE, rtol=0)
        recorded = goldens["text/logits_image_prompt_without_image"]
        torch.testing.assert_close(blind[:, -8:], recorded, atol=TOLERANCE, rtol=0)

    @pytest.mark.parametrize("name", ["image", "image_penalty1.1", "image_penalty1.5", "text", "text_penalty1.5"])
    def test_greedy_tokens_and_logits(self, golden_model, golden_processor, goldens, facts, pictures, name):
        picture = {"images": pictures["rgb"]} if "image" in name else {}
        message = facts["message_image"] if picture else facts["message_text"]
        inputs = golden_processor(**picture, text=message, return_tensors="pt")
        processors = LogitsProcessorList()
        prompt_length = inputs["input_ids"].shape[1]
        if "penalty" in name:
            penalty = float(name.partition("penalty")[2])
            processors.append(RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=prompt_length))
        output = golden_model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=None,
            logits_processor=processors,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert torch.equal(output.sequences[:, prompt_length:], goldens[f"gen/greedy_{name}/tokens"])
        recorded = goldens[f"gen/greedy_{name}/step_logits"]
        torch.testing.assert_close(torch.cat(output.logits), recorded, atol=TOLERANCE, rtol=0)

    def test_the_end_token_stops(self, golden_model, golden_processor, goldens, facts, pictures):
        inputs = golden_processor(images=pictures["rgb"], text=facts["message_image"], return_tensors="pt")
        prompt_length = inputs["input_ids"].shape[1]
        penalty = RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=prompt_length)
        settings = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": facts["gen/eos_used"]}
        tokens = golden_model.generate(**inputs, logits_processor=LogitsProcessorList([penalty]), **settings)
        recorded = goldens["gen/greedy_image_penalty1.5_eos_at_5th/tokens"]
        assert torch.equal(tokens[:, prompt_length:], recorded)

    def test_loss_and_gradients(self, converted, goldens):
        model = AureaForConditionalGeneration.from_pretrained(converted, dtype=torch.float32).train()
        # As published: the encoders are frozen. The norm is that of everything else.
        model.model.vision_model.requires_grad_(False)
        model.model.spatial_vision_model.requires_grad_(False)
        states = model.get_image_features(golden_pixels(goldens)).pooler_output
        loss = model(
            input_ids=goldens["batch/input_ids"],
            attention_mask=goldens["batch/mask"].long(),
            position_ids=goldens["batch/position_ids"],
            cross_attention_states=states,
            labels=goldens["loss/labels"],
        ).loss
        torch.testing.assert_close(loss, goldens["loss/value"], atol=TOLERANCE, rtol=0)
        loss.backward()
        names = [key.removeprefix("loss/grad/") for key in goldens if key.startswith("loss/grad/")]
        assert len(names) == 24
        for name in names:
            recorded = goldens[f"loss/grad/{name}"]
            gradient = published_gradient(model, name).reshape(recorded.shape)
            torch.testing.assert_close(gradient, recorded, atol=TOLERANCE, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], float("inf"))
        torch.testing.assert_close(norm, goldens["loss/total_grad_norm"], atol=0, rtol=1e-4)

    def test_text_only_loss_and_gradients(self, converted, goldens):
        model = AureaForConditionalGeneration.from_pretrained(converted, dtype=torch.float32).train()
        loss = model(
            input_ids=goldens["batch/input_ids"],
            attention_mask=goldens["batch/mask"].long(),
            position_ids=goldens["batch/position_ids"],
            labels=goldens["loss/labels"],
        ).loss
        torch.testing.assert_close(loss, goldens["loss/text_only_value"], atol=TOLERANCE, rtol=0)
        loss.backward()
        rows = model.get_input_embeddings().weight.grad[[0, 11, 300, 301]]
        recorded = goldens["loss/text_only_grad/model.embed_tokens.weight_rows_0_11_300_301"]
        torch.testing.assert_close(rows, recorded, atol=TOLERANCE, rtol=0)

    def test_rotary_tables_are_exact_and_use_the_long_factors_at_every_length(self, golden_model, goldens):
        rotary = golden_model.model.language_model.rotary_emb
        positions = torch.arange(goldens["rope/cos"].shape[1])[None]
        cos, sin = rotary(torch.zeros(1), positions)
        torch.testing.assert_close(cos, goldens["rope/cos"], atol=1e-6, rtol=0)
        torch.testing.assert_close(sin, goldens["rope/sin"], atol=1e-6, rtol=0)

    def test_low_variance_inputs_expose_the_epsilons(self, golden_model, goldens):
        layer = golden_model.model.language_model.layers[0]
        block = layer.cross_attention_block
        states = goldens["sr/v_features"] * 3e-3
        with torch.no_grad():
            output = block(goldens["lowvar/hidden"], states)
        recorded = goldens["lowvar/mm_block0_out_with_v_features_times_3e-3"]
        torch.testing.assert_close(output, recorded, atol=TOLERANCE, rtol=0)

    def test_bf16_errs_no_more_than_the_original(self, converted, goldens):
        recorded = load_file(FIXTURES / "goldens_bf16.safetensors")
        model = AureaForConditionalGeneration.from_pretrained(converted, dtype=torch.bfloat16).eval()
        with torch.no_grad():
            features = model.get_image_features(golden_pixels(goldens)).pooler_output
            logits = model(
                input_ids=goldens["batch/input_ids"],
                attention_mask=goldens["batch/mask"].long(),
                position_ids=goldens["batch/position_ids"],
                cross_attention_states=features,
            ).logits
        real = goldens["batch/mask"].bool()
        for ours, exact, theirs in (
            (features, goldens["sr/v_features"], recorded["sr/v_features"]),
            (logits[real], goldens["batch/logits"][real], recorded["batch/logits"][real]),
        ):
            assert ours.dtype == torch.bfloat16
            error, original_error = (ours.float() - exact).square().mean(), (theirs - exact).square().mean()
            assert error <= original_error


def batch_of_three(config):
    """A row with one picture, one with two, one without, and their pixels."""
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(3, 90, (3, 9), generator=generator)
    input_ids[0, 2] = input_ids[1, 1] = input_ids[1, 5] = IMAGE_TOKEN_ID
    return input_ids, random_pixels(3, config)


class TestWhichImageATokenSees:
    def test_rows_of_a_mixed_batch_equal_the_same_rows_alone(self):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        with torch.no_grad():
            together = model(input_ids=input_ids, pixel_values=pixels).logits
            for row, own in enumerate((pixels[:1], pixels[1:], None)):
                alone = model(input_ids=input_ids[row : row + 1], pixel_values=own).logits
                torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=0)

    def test_a_row_without_image_gets_exactly_nothing(self):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        with torch.no_grad():
            seen = model(input_ids=input_ids, pixel_values=pixels).logits
            other = model(input_ids=input_ids, pixel_values=pixels * 7 + 1).logits
        assert torch.equal(seen[2], other[2])
        assert not torch.equal(seen[0], other[0])

    def test_a_row_without_image_gets_nothing_of_what_is_no_number(self):
        block = tiny_model().model.language_model.layers[0].cross_attention_block
        hidden_states = torch.randn(1, 5, 32)
        states = torch.full((1, 16, 32), torch.nan)
        rows_with_image = torch.tensor([False])[:, None, None]
        assert torch.equal(block(hidden_states, states, rows_with_image=rows_with_image), hidden_states)

    def test_a_row_gets_nothing_of_another_rows_picture_that_is_no_number(self):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        pixels[0] = torch.nan  # of the first row, which has two
        with torch.no_grad():
            logits = model(input_ids=input_ids[[1, 0, 2]], pixel_values=pixels).logits
        assert logits[0].isnan().any() and logits[1:].isfinite().all()

    def test_swapping_two_pictures_changes_the_logits(self):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        with torch.no_grad():
            straight = model(input_ids=input_ids[1:2], pixel_values=pixels[1:]).logits
            swapped = model(input_ids=input_ids[1:2], pixel_values=pixels[1:].flip(0)).logits
        assert (straight - swapped).abs().amax(-1).min() > 1e-3

    def test_tokens_see_the_images_at_or_before_them_and_the_first_ones_the_first(self):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        second_changed = torch.stack([pixels[1], pixels[2] * 3 - 1])
        first_changed = torch.stack([pixels[1] * 3 - 1, pixels[2]])
        with torch.no_grad():
            base, second, first = (
                model(input_ids=input_ids[1:2], pixel_values=p).logits[0]
                for p in (pixels[1:], second_changed, first_changed)
            )
        assert torch.equal(base[:5], second[:5])  # the second placeholder stands at 5
        assert (base[5:] - second[5:]).abs().amax(-1).min() > 1e-3
        assert (base - first).abs().amax(-1).min() > 1e-3  # the first placeholder stands at 1; token 0 sees it too

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_left_padding_changes_no_row(self, implementation):
        model = tiny_model()
        model.set_attn_implementation(implementation)
        input_ids, pixels = batch_of_three(model.config)
        padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), input_ids], dim=1)
        mask = (torch.arange(13) >= 4).long().expand(3, -1)
        with torch.no_grad():
            plain = model(input_ids=input_ids, pixel_values=pixels).logits
            left = model(
                input_ids=padded,
                pixel_values=pixels,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            ).logits
        torch.testing.assert_close(left[:, 4:], plain, atol=1e-5, rtol=0)
        assert left.isfinite().all()

    def test_attention_implementations_agree(self):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        logits = {}
        for implementation in ("eager", "sdpa"):
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                logits[implementation] = model(input_ids=input_ids, pixel_values=pixels).logits
        torch.testing.assert_close(logits["eager"], logits["sdpa"], atol=1e-5, rtol=0)

    def test_pixels_and_ready_made_states_agree(self):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        with torch.no_grad():
            expected = model(input_ids=input_ids[:1], pixel_values=pixels[:1]).logits
            states = model.get_image_features(pixels[:1]).pooler_output
            logits = model(input_ids=input_ids[:1], cross_attention_states=states).logits
        assert torch.equal(logits, expected)

    def test_more_placeholders_than_pictures_show_nothing_of_the_padding(self):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        input_ids[0, 5] = IMAGE_TOKEN_ID  # as if generated
        with torch.no_grad():
            states = model.get_image_features(pixels).pooler_output
            padded = torch.stack([torch.cat([states[0], states[0] * 0]), states[1:].flatten(0, 1)])
            together = model(
                input_ids=input_ids[:2], cross_attention_states=padded, num_images=torch.tensor([1, 2])
            ).logits
            alone = model(
                input_ids=input_ids[:1], cross_attention_states=states[:1], num_images=torch.tensor([1])
            ).logits
        torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=0)

    def test_zero_rows_of_pixels_mean_no_image(self):
        model = tiny_model()
        input_ids = torch.arange(3, 12)[None]
        with torch.no_grad():
            expected = model(input_ids=input_ids).logits
            none = model(input_ids=input_ids, pixel_values=random_pixels(1, model.config)[:0]).logits
        assert torch.equal(none, expected)

    def test_text_only_is_the_bare_language_model_bit_for_bit(self):
        model = tiny_model()
        bare = AutoModelForCausalLM.from_config(model.config.text_config).eval()
        woven = model.model.language_model.state_dict()
        bare.model.load_state_dict({key: woven[key] for key in bare.model.state_dict()})
        bare.lm_head.load_state_dict(model.lm_head.state_dict())
        input_ids = torch.randint(3, 90, (2, 7))
        with torch.no_grad():
            assert torch.equal(model(input_ids=input_ids).logits, bare(input_ids=input_ids).logits)


class TestPlaceholdersThatAreWords:
    """A generated placeholder is a token like any other, and `mm_token_type_ids` tells it from a picture's."""

    def texts(self):
        input_ids = torch.tensor([[5, IMAGE_TOKEN_ID, 6, 7, IMAGE_TOKEN_ID, 8], [4, 5, 6, IMAGE_TOKEN_ID, 7, 8]])
        types = torch.tensor([[0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
        return input_ids, types

    def test_they_are_scored_as_they_were_generated(self):
        model = tiny_model()
        input_ids, types = self.texts()
        pixels = random_pixels(1, model.config)
        with torch.no_grad():
            cache, steps = None, []
            for end in range(3, 7):
                start = 0 if cache is None else end - 1
                prompt = {"pixel_values": pixels, "mm_token_type_ids": types[:, :end]} if cache is None else {}
                output = model(input_ids=input_ids[:, start:end], **{CACHE_NAME: cache}, use_cache=True, **prompt)
                cache = output[CACHE_NAME]
                steps.append(output.logits)
            scored = model(input_ids=input_ids, pixel_values=pixels, mm_token_type_ids=types).logits
            embeds = model.get_input_embeddings()(input_ids)
            embedded = model(inputs_embeds=embeds, pixel_values=pixels, mm_token_type_ids=types).logits
        torch.testing.assert_close(torch.cat(steps, dim=1), scored, atol=1e-5, rtol=0)
        torch.testing.assert_close(embedded, scored, atol=1e-5, rtol=0)

    def test_they_can_be_continued(self):
        model = tiny_model()
        input_ids, types = self.texts()
        inputs = {"input_ids": input_ids, "pixel_values": random_pixels(1, model.config), "mm_token_type_ids": types}
        expected = input_ids
        for length in range(6):
            longer = inputs | {"input_ids": expected, "mm_token_type_ids": F.pad(types, (0, length))}
            with torch.no_grad():
                logits = model(**longer, use_cache=False).logits
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(greedy(model, **inputs), expected)
        assert torch.equal(greedy(model, **inputs, cache_implementation="static"), expected)

    def test_token_types_count_from_the_end(self):
        model = tiny_model().model
        input_ids, types = self.texts()
        mask = model.get_placeholder_mask(input_ids, None, types[:, 1:])
        assert torch.equal(mask, types.bool())
        assert torch.equal(model.get_placeholder_mask(input_ids[:, 1:], None, types), types[:, 1:].bool())

    def test_a_type_that_is_not_a_pictures_is_a_word(self):
        mask = tiny_model().model.get_placeholder_mask(torch.tensor([[3, 4, 5]]), None, torch.tensor([[0, 1, 2]]))
        assert mask.tolist() == [[False, True, False]]

    def test_an_embedding_that_is_like_the_placeholders_in_part_is_a_word(self):
        model = tiny_model().model
        weight = model.get_input_embeddings().weight
        with torch.no_grad():
            weight[5, ::2] = weight[IMAGE_TOKEN_ID, ::2]
        mask = model.get_placeholder_mask(None, model.get_input_embeddings()(torch.tensor([[5, IMAGE_TOKEN_ID, 6]])))
        assert mask.tolist() == [[False, True, False]]

    @pytest.mark.parametrize("image_token_id", [99, 120])
    def test_embeddings_have_no_placeholder_whose_id_is_beyond_the_vocabulary(self, image_token_id):
        model = tiny_model(image_token_id=image_token_id)
        input_ids, pixels = batch_of_three(model.config)
        with torch.no_grad():
            states = model.get_image_features(pixels).pooler_output
            expected = model(input_ids=input_ids, cross_attention_states=states).logits
            embeddings = model.get_input_embeddings()(input_ids)
            logits = model(inputs_embeds=embeddings, cross_attention_states=states).logits
        assert torch.equal(logits, expected)

    def test_without_token_types_the_error_names_them(self):
        model = tiny_model()
        with pytest.raises(ValueError, match=r"1 pictures for 3 placeholders.*`mm_token_type_ids`"):
            model(input_ids=self.texts()[0], pixel_values=random_pixels(1, model.config))


class TestCache:
    @pytest.mark.parametrize("cut", [1, 3, 5, 8])
    def test_cached_equals_uncached_wherever_the_text_is_cut(self, cut):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        with torch.no_grad():
            whole = model(input_ids=input_ids, pixel_values=pixels).logits
            states = model.model.get_image_features(pixels).pooler_output
            states = torch.stack(
                [torch.cat([states[0], states[0] * 0]), states[1:].flatten(0, 1), states[:2].flatten(0, 1) * 0]
            )
            first = model(
                input_ids=input_ids[:, :cut],
                cross_attention_states=states,
                num_images=torch.tensor([1, 2, 0]),
                use_cache=True,
            )
            second = model(input_ids=input_ids[:, cut:], past_key_values=first[CACHE_NAME])
        torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), whole, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("order", [[1, 0, 3, 2], [2, 3, 0, 1], [3, 0, 1, 1]], ids=str)
    @pytest.mark.parametrize("operation", ["reorder_cache", "batch_select_indices"])
    def test_rows_that_share_pictures_take_them_along_wherever_they_go(self, operation, order):
        model = tiny_model()
        texts = torch.randint(3, 90, (4, 5), generator=torch.Generator().manual_seed(0))
        new = torch.tensor([[7], [8], [9], [10]])
        states = (
            model.get_image_features(random_pixels(4, model.config)).pooler_output.unflatten(0, (2, 2)).flatten(1, 2)
        )
        order, num_images = torch.tensor(order), torch.tensor([2, 1])
        with torch.no_grad():
            cache = model(input_ids=texts, cross_attention_states=states, num_images=num_images, use_cache=True)[
                CACHE_NAME
            ]
            assert cache.visual.layers[0].keys.shape[0] == 2
            getattr(cache, operation)(order)
            actual = model(input_ids=new, past_key_values=cache).logits
            expected = model(
                input_ids=torch.cat([texts[order], new], dim=1),
                cross_attention_states=states.repeat_interleave(2, dim=0)[order],
                num_images=num_images.repeat_interleave(2)[order],
            ).logits[:, -1:]
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("order", [[3, 0], [0, 1], [2]], ids=str)
    def test_some_rows_of_those_that_share_pictures_can_be_chosen(self, order):
        model = tiny_model()
        texts = torch.randint(3, 90, (4, 5), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            states = model.get_image_features(random_pixels(2, model.config)).pooler_output
            cache = model(input_ids=texts, cross_attention_states=states, use_cache=True)[CACHE_NAME]
            cache.batch_select_indices(torch.tensor(order))
            new = texts[order, :1]
            actual = model(input_ids=new, **{CACHE_NAME: cache}).logits
            expected = model(
                input_ids=torch.cat([texts[order], new], dim=1),
                cross_attention_states=states.repeat_interleave(2, dim=0)[order],
            ).logits[:, -1:]
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)

    def test_repeated_rows_share_the_pictures_of_the_row_they_come_from(self):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        new = torch.arange(5, 11)[:, None]
        with torch.no_grad():
            cache = model(input_ids=input_ids, pixel_values=pixels, use_cache=True)[CACHE_NAME]
            keys = cache.visual.layers[0].keys
            cache.batch_repeat_interleave(2)
            assert cache.visual.layers[0].keys is keys
            actual = model(input_ids=new, past_key_values=cache).logits
            repeated = torch.cat([input_ids.repeat_interleave(2, dim=0), new], dim=1)
            twice = pixels[[0, 0, 1, 2, 1, 2]]
            expected = model(input_ids=repeated, pixel_values=twice).logits[:, -1:]
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)

    def test_a_users_own_cache_keeps_the_image(self):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        cache = DynamicCache(config=model.config.text_config)
        with torch.no_grad():
            whole = model(input_ids=input_ids[:1], pixel_values=pixels[:1]).logits
            model(input_ids=input_ids[:1, :6], pixel_values=pixels[:1], past_key_values=cache)
            rest = model(input_ids=input_ids[:1, 6:], past_key_values=cache).logits
        assert isinstance(cache, DynamicCache)
        assert len(cache) == model.config.text_config.num_hidden_layers
        torch.testing.assert_close(rest, whole[:, 6:], atol=1e-5, rtol=0)

    def test_visual_keys_are_cached_once_and_unrepeated(self):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        with torch.no_grad():
            cache = model(input_ids=input_ids[:1], pixel_values=pixels[:1], use_cache=True)[CACHE_NAME]
            before = [layer.keys for layer in cache.visual.layers]
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        assert len(before) == len(model.config.cross_attention_positions)
        assert before[0].shape == (1, 2, 16, 8)  # key/value heads, not heads
        assert all(layer.keys is kept for layer, kept in zip(cache.visual.layers, before))

    def test_pixels_of_the_whole_conversation_replace_the_cached_ones(self):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        row = input_ids[1:2]
        with torch.no_grad():
            whole = model(input_ids=row, pixel_values=pixels[1:]).logits
            cache = model(input_ids=row[:, :4], pixel_values=pixels[1:2], use_cache=True)[CACHE_NAME]
            rest = model(input_ids=row[:, 4:], pixel_values=pixels[1:], past_key_values=cache).logits
        torch.testing.assert_close(rest, whole[:, 4:], atol=1e-5, rtol=0)

    def test_a_layer_that_runs_twice_writes_its_keys_once(self):
        model = tiny_model()
        cache, states = DynamicCache(), torch.randn(1, 16, 32)
        for _ in range(2):
            model.model.language_model.layers[0].cross_attention_block(states[:, :5], states, visual_cache=cache)
        assert cache.layers[0].keys.shape == (1, 2, 16, 8)

    @pytest.mark.parametrize("generates", [False, True])
    def test_no_key_of_a_replaced_picture_stays_in_the_cache(self, generates):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        row, old, new = input_ids[:1], pixels[:1], pixels[1:2]
        with torch.no_grad():
            fresh = model(input_ids=row, pixel_values=new, use_cache=True)[CACHE_NAME]
            cache = model(input_ids=row, pixel_values=old, use_cache=True)[CACHE_NAME]
            if generates:
                conversation = torch.cat([row, torch.tensor([[7, 8]])], dim=1)
                greedy(model, input_ids=conversation, pixel_values=new, **{CACHE_NAME: cache})
            else:
                model(input_ids=torch.tensor([[7, 8]]), pixel_values=new, **{CACHE_NAME: cache})
        for layer, expected in zip(cache.visual.layers, fresh.visual.layers, strict=True):
            assert torch.equal(layer.keys, expected.keys) and torch.equal(layer.values, expected.values)

    @pytest.mark.parametrize(
        ("change", "rows"),
        [
            (lambda cache: cache.batch_select_indices(torch.tensor([2, 0, 1])), [2, 0, 1]),
            (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        ],
        ids=["reordered", "chosen", "repeated"],
    )
    def test_rows_of_a_cache_can_be_chosen_and_repeated(self, change, rows):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        step = torch.tensor([[5], [6], [7]])
        with torch.no_grad():
            cache = model(input_ids=input_ids, pixel_values=pixels, use_cache=True)[CACHE_NAME]
            expected = model(input_ids=step, **{CACHE_NAME: copy.deepcopy(cache)}).logits
            change(cache)
            logits = model(input_ids=step[rows], **{CACHE_NAME: cache}).logits
        torch.testing.assert_close(logits, expected[rows], atol=1e-5, rtol=0)

    @pytest.mark.parametrize("rows", [slice(0, 1), slice(1, 2)], ids=["one image", "two images"])
    def test_a_generated_placeholder_is_not_counted_as_a_picture(self, rows):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        own = (input_ids[rows] == IMAGE_TOKEN_ID).sum()
        with torch.no_grad():
            cache = model(input_ids=input_ids[rows], pixel_values=pixels[:own], use_cache=True)[CACHE_NAME]
            model(input_ids=torch.tensor([[IMAGE_TOKEN_ID]]), **{CACHE_NAME: cache})
            assert cache.images_seen == own
            further = torch.tensor([[7, IMAGE_TOKEN_ID]])
            model(input_ids=further, pixel_values=pixels[: own + 1], **{CACHE_NAME: cache})
            assert cache.images_seen == own + 1

    @pytest.mark.parametrize("kept", [2, 4, 7])
    @pytest.mark.parametrize("with_pixels", [True, False])
    def test_a_cropped_cache_goes_on_as_if_never_longer(self, kept, with_pixels):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        row, own = input_ids[1:2], pixels[1:]
        with torch.no_grad():
            whole = model(input_ids=row, pixel_values=own).logits
            cache = model(input_ids=row, pixel_values=own, use_cache=True)[CACHE_NAME]
            for token in ([[5]], [[IMAGE_TOKEN_ID]], [[7]]):  # also a placeholder that was generated
                model(input_ids=torch.tensor(token), past_key_values=cache)
            cache.crop(kept - cache.get_seq_length())
            again = {"pixel_values": own} if with_pixels else {}
            rest = model(input_ids=row[:, kept:], past_key_values=cache, **again).logits
        torch.testing.assert_close(rest, whole[:, kept:], atol=1e-5, rtol=0)

    def test_a_cache_cropped_to_nothing_has_seen_no_picture(self):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        row, own = input_ids[1:2], pixels[1:]
        with torch.no_grad():
            whole = model(input_ids=row, pixel_values=own).logits
            cache = model(input_ids=row, pixel_values=own, use_cache=True)[CACHE_NAME]
            cache.crop(-cache.get_seq_length())
            assert cache.images_seen is None
            again = model(input_ids=row, pixel_values=own, **{CACHE_NAME: cache}).logits
        torch.testing.assert_close(again, whole, atol=1e-5, rtol=0)

    def test_a_crop_into_text_without_placeholders_knows_how_many_came_before(self):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        with torch.no_grad():
            cache = model(input_ids=input_ids[:1], pixel_values=pixels[:1], use_cache=True)[CACHE_NAME]
            model(input_ids=torch.tensor([[5, 6]]), **{CACHE_NAME: cache})
            model(input_ids=torch.tensor([[7, IMAGE_TOKEN_ID]]), pixel_values=pixels[:2], **{CACHE_NAME: cache})
        assert cache.images_seen == 2
        cache.crop(-3)
        assert cache.images_seen == 1

    def test_reset_forgets_the_image(self):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        with torch.no_grad():
            cache = model(input_ids=input_ids[:1], pixel_values=pixels[:1], use_cache=True)[CACHE_NAME]
            cache.reset()
            text = torch.arange(3, 9)[None]
            again = model(input_ids=text, past_key_values=cache).logits
            assert torch.equal(again, model(input_ids=text).logits)

    def test_a_static_cache_serves_again_after_a_reset(self):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        cache = StaticCache(config=model.config.text_config, max_cache_len=24)
        inputs = {"input_ids": input_ids, "pixel_values": pixels, CACHE_NAME: cache}
        with torch.no_grad():
            expected = model(**inputs).logits
            cache.reset()
            assert torch.equal(model(**inputs).logits, expected)

    def test_a_cache_can_be_copied_and_pickled(self):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        with torch.no_grad():
            cache = model(input_ids=input_ids, pixel_values=pixels, use_cache=True)[CACHE_NAME]
            copies = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
            step = torch.tensor([[5], [6], [7]])
            expected = model(input_ids=step, past_key_values=cache).logits
            for duplicate in copies:
                assert torch.equal(model(input_ids=step, past_key_values=duplicate).logits, expected)


def greedy(model, **kwargs):
    settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(**{**settings, **kwargs})


def greedy_without_cache(model, input_ids, pixel_values, num_tokens=6):
    """The definition: the whole text again at each step."""
    for _ in range(num_tokens):
        logits = model(input_ids=input_ids, pixel_values=pixel_values, use_cache=False).logits
        input_ids = torch.cat([input_ids, logits[:, -1:].argmax(-1)], dim=1)
    return input_ids


class CountedCalls:
    def __init__(self, module):
        self.count = 0
        module.register_forward_hook(self.hook)

    def hook(self, *_):
        self.count += 1


class TestGenerate:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"use_cache": False},
            {"cache_implementation": "static"},
            {"cache_implementation": "dynamic"},
            {"prefill_chunk_size": 4},
            {"prefill_chunk_size": 3},
        ],
        ids=str,
    )
    def test_every_mode_equals_greedy_without_cache_and_encodes_once(self, settings):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        with torch.no_grad():
            expected = greedy_without_cache(model, input_ids, pixels)
        calls = [CountedCalls(model.model.vision_model), CountedCalls(model.model.spatial_vision_model)]
        assert torch.equal(greedy(model, input_ids=input_ids, pixel_values=pixels, **settings), expected)
        assert [call.count for call in calls] == [1, 1]

    def test_inputs_embeds(self):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        expected = greedy(model, input_ids=input_ids, pixel_values=pixels)
        embeddings = model.get_input_embeddings()(input_ids)
        tokens = greedy(model, inputs_embeds=embeddings, pixel_values=pixels)
        assert torch.equal(tokens, expected[:, 9:])

    def test_ready_made_states(self):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        expected = greedy(model, input_ids=input_ids[:1], pixel_values=pixels[:1])
        with torch.no_grad():
            states = model.get_image_features(pixels[:1]).pooler_output
        assert torch.equal(greedy(model, input_ids=input_ids[:1], cross_attention_states=states), expected)

    @pytest.mark.parametrize("row", [0, 1, 2], ids=["one image", "two images", "no image"])
    @pytest.mark.parametrize("mode", ["assistant", "self", "prompt_lookup"])
    def test_assisted_decoding_changes_no_token(self, row, mode):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        inputs = {"input_ids": input_ids[row : row + 1], "pixel_values": (pixels[:1], pixels[1:], None)[row]}
        expected = greedy(model, **inputs, max_new_tokens=10)
        assistant = tiny_model({"hidden_size": 16}, seed=1)  # of another width: it must look at the picture itself
        settings = {
            "assistant": {"assistant_model": assistant},
            "self": {"assistant_model": model},
            "prompt_lookup": {"prompt_lookup_num_tokens": 2},
        }[mode]
        assert torch.equal(greedy(model, **inputs, max_new_tokens=10, **settings), expected)

    def test_an_assistant_sees_the_picture_in_every_round_and_encodes_it_once(self):
        model, assistant = tiny_model(), tiny_model({"hidden_size": 16}, seed=1)
        input_ids, pixels = batch_of_three(model.config)
        calls = CountedCalls(assistant.model.vision_model)
        sees = []

        def look(_, args, kwargs):
            is_cached = getattr(kwargs.get(CACHE_NAME), "has_visual_states", False)
            sees.append(is_cached or kwargs.get("cross_attention_states") is not None)

        assistant.register_forward_pre_hook(look, with_kwargs=True)
        logits = []
        assistant.register_forward_hook(lambda _, args, output: logits.append(output.logits[:, -1]))
        greedy(model, input_ids=input_ids[:1], pixel_values=pixels[:1], max_new_tokens=12, assistant_model=assistant)
        assert len(sees) > 1 and all(sees)
        assert calls.count == 1
        with torch.no_grad():
            expected = assistant(input_ids=input_ids[:1], pixel_values=pixels[:1]).logits[:, -1]
        torch.testing.assert_close(logits[0], expected, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("row", [0, 1, 2], ids=["one image", "two images", "no image"])
    def test_beams_of_a_row_do_not_depend_on_the_batch(self, row):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        settings = {"num_beams": 3, "num_return_sequences": 2}
        together = greedy(model, input_ids=input_ids, pixel_values=pixels, **settings)
        own = (pixels[:1], pixels[1:], None)[row]
        alone = greedy(model, input_ids=input_ids[row : row + 1], pixel_values=own, **settings)
        assert torch.equal(together[2 * row : 2 * row + 2], alone)

    def test_a_text_only_model_drafts(self):
        model = tiny_model()
        assistant = AutoModelForCausalLM.from_config(model.config.text_config).eval()
        input_ids, pixels = batch_of_three(model.config)
        inputs = {"input_ids": input_ids[1:2], "pixel_values": pixels[1:], "max_new_tokens": 10}
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN_ID).long()
        calls = CountedCalls(assistant)
        assert torch.equal(greedy(model, **inputs, assistant_model=assistant), greedy(model, **inputs))
        assert calls.count > 0

    def test_beams_share_the_keys_of_their_row_and_do_not_move_them(self):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        settings = {"num_beams": 3, "return_dict_in_generate": True, "output_attentions": True}
        keys = set()

        def look(_, args, kwargs):
            cache = kwargs.get(CACHE_NAME)
            if holds_visual_states(cache):
                keys.add(cache.visual.layers[0].keys.data_ptr())
                assert cache.visual.layers[0].keys.shape[0] == 3  # rows, not beams

        handle = model.register_forward_pre_hook(look, with_kwargs=True)
        model.set_attn_implementation("eager")
        outputs = model.generate(
            input_ids=input_ids, pixel_values=pixels, do_sample=False, max_new_tokens=6, **settings
        )
        handle.remove()
        assert len(keys) == 1
        assert all(weights.shape[:3] == (9, 4, 1) for step in outputs.attentions[1:] for weights in step)

    def test_nothing_of_the_pictures_is_repeated_for_beams(self):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        with torch.no_grad():
            ids, inputs = model._expand_inputs_for_generation(3, input_ids=input_ids, pixel_values=pixels)
        assert len(ids) == 9 and inputs.keys() == {"cross_attention_states", "num_images"}
        assert len(inputs["cross_attention_states"]) == 3 and inputs["num_images"].tolist() == [1, 2, 0]

    def test_beam_search_equals_beam_search_without_cache(self):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        cached, uncached = (
            greedy(model, input_ids=input_ids, pixel_values=pixels, num_beams=4, use_cache=use_cache)
            for use_cache in (True, False)
        )
        assert torch.equal(cached, uncached)

    def test_left_padding_changes_no_token(self):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        expected = greedy(model, input_ids=input_ids, pixel_values=pixels)
        padded = torch.cat([torch.zeros(3, 3, dtype=torch.long), input_ids], dim=1)
        mask = (torch.arange(12) >= 3).long().expand(3, -1)
        tokens = greedy(model, input_ids=padded, attention_mask=mask, pixel_values=pixels)
        assert torch.equal(tokens[:, 3:], expected)

    def test_black_and_noise_differ_at_every_step_of_the_same_tokens(self):
        model = tiny_model()
        input_ids, _ = batch_of_three(model.config)
        forced = torch.randint(3, 90, (1, 8), generator=torch.Generator().manual_seed(0))

        def force(batch, tokens):
            return [int(forced[0, tokens.shape[0] - 9])]

        logits = []
        for pixels in (random_pixels(1, model.config) * 0, random_pixels(1, model.config)):
            output = greedy(
                model,
                input_ids=input_ids[:1],
                pixel_values=pixels,
                max_new_tokens=8,
                prefix_allowed_tokens_fn=force,
                output_logits=True,
                return_dict_in_generate=True,
            )
            assert torch.equal(output.sequences[:, 9:], forced)
            logits.append(torch.stack(output.logits))
        assert (logits[0] - logits[1]).abs().amax((1, 2)).min() > 1e-2

    @pytest.mark.parametrize("with_pixels", [True, False])
    @pytest.mark.parametrize("num_images", [1, 2])
    def test_a_second_turn_on_a_kept_cache_equals_the_run_without(self, with_pixels, num_images):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        row, own = (input_ids[:1], pixels[:1]) if num_images == 1 else (input_ids[1:2], pixels[1:])
        cache = DynamicCache(config=model.config.text_config)
        first = greedy(model, input_ids=row, pixel_values=own, **{CACHE_NAME: cache})
        conversation = torch.cat([first, torch.tensor([[7, 8, 9]])], dim=1)
        expected = greedy(model, input_ids=conversation, pixel_values=own)
        again = {"pixel_values": own} if with_pixels else {}
        assert torch.equal(greedy(model, input_ids=conversation, **{CACHE_NAME: cache}, **again), expected)

    def test_a_second_turn_with_a_further_picture(self):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        for first_picture in (True, False):  # the first turn may also have been text only
            row = input_ids[:1] if first_picture else input_ids[2:]
            own = pixels[:1] if first_picture else pixels[:0]
            cache = DynamicCache(config=model.config.text_config)
            first = greedy(model, input_ids=row, pixel_values=own, **{CACHE_NAME: cache})
            conversation = torch.cat([first, torch.tensor([[7, IMAGE_TOKEN_ID, 9]])], dim=1)
            everything = torch.cat([own, pixels[2:]])
            expected = greedy(model, input_ids=conversation, pixel_values=everything)
            tail, mask = conversation[:, cache.get_seq_length() :], torch.ones_like(conversation)
            part = copy.deepcopy(cache)
            tokens = greedy(model, input_ids=conversation, pixel_values=everything, **{CACHE_NAME: cache})
            assert torch.equal(tokens, expected)
            if first_picture:  # the new part alone, under the mask of the whole
                settings = {"attention_mask": mask, "pixel_values": everything, CACHE_NAME: part}
                tokens = greedy(model, input_ids=tail, **settings)
                assert torch.equal(tokens[:, tail.shape[1] :], expected[:, mask.shape[1] :])

    def test_streaming(self):
        from transformers import TextStreamer

        class Collector(TextStreamer):
            def __init__(self):
                self.tokens = []

            def put(self, value):
                self.tokens.extend(value.flatten().tolist())

            def end(self):
                pass

        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        collector = Collector()
        tokens = greedy(model, input_ids=input_ids[:1], pixel_values=pixels[:1], streamer=collector)
        assert collector.tokens == tokens[0].tolist()

    @pytest.mark.slow
    def test_static_cache_compiles_into_one_graph_without_recompilation(self):
        model = tiny_model({"model_type": "llama"})
        input_ids, pixels = batch_of_three(model.config)
        expected = greedy(model, input_ids=input_ids, pixel_values=pixels, max_new_tokens=8)
        cache = StaticCache(config=model.config.text_config, max_cache_len=24)
        torch._dynamo.reset()
        compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            output = model(input_ids=input_ids, pixel_values=pixels, past_key_values=cache)
            tokens = input_ids
            for step in range(8):
                tokens = torch.cat([tokens, output.logits[:, -1:].argmax(-1)], dim=1)
                position = torch.full((3, 1), 9 + step)
                if step == 2:
                    torch._dynamo.config.error_on_recompile = True
                output = compiled(input_ids=tokens[:, -1:], position_ids=position, past_key_values=cache)
        torch._dynamo.config.error_on_recompile = False
        assert torch.equal(tokens, expected)


class TestTraining:
    def test_every_parameter_of_a_fresh_model_trains(self):
        model = tiny_model().train()
        input_ids, pixels = batch_of_three(model.config)
        model(input_ids=input_ids, pixel_values=pixels, labels=input_ids).loss.backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []

    def test_a_frozen_encoder_keeps_no_activations(self):
        model = tiny_model().train()
        input_ids, pixels = batch_of_three(model.config)
        outputs = {}
        for name in ("vision_model", "spatial_vision_model"):
            encoder = getattr(model.model, name)
            encoder.register_forward_hook(lambda module, _, out, name=name: outputs.update({name: out}))
        model.model.spatial_vision_model.requires_grad_(False)
        model(input_ids=input_ids, pixel_values=pixels, labels=input_ids).loss.backward()
        assert outputs["vision_model"].last_hidden_state.requires_grad
        assert not outputs["spatial_vision_model"].last_hidden_state.requires_grad
        assert all(parameter.grad is None for parameter in model.model.spatial_vision_model.parameters())

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_a_checkpointed_step_keeps_neither_text_nor_pictures_in_a_cache(self, use_reentrant):
        model = tiny_model().train()
        input_ids, pixels = batch_of_three(model.config)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        cache = DynamicCache(config=model.config.text_config)
        inputs = {"input_ids": input_ids, "pixel_values": pixels, "labels": input_ids}
        model(**inputs, use_cache=True, **{CACHE_NAME: cache}).loss.backward()
        assert cache.get_seq_length() == 0 and not cache.has_visual_states

    @pytest.mark.parametrize("use_reentrant", [True, False])
    @pytest.mark.parametrize("text", ["phi3", "gpt2"])
    def test_gradient_checkpointing_gives_the_same_gradients(self, use_reentrant, text):
        overrides = {"model_type": text, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = tiny_model(overrides).train()
        input_ids, pixels = batch_of_three(model.config)

        def gradients():
            model.zero_grad()
            model(input_ids=input_ids, pixel_values=pixels, labels=input_ids).loss.backward()
            return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

        expected = gradients()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        found = gradients()
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


class TestContract:
    @pytest.mark.parametrize("origin", ["loaded", "new"])
    def test_published_dtype_policy(self, converted, origin):
        if origin == "loaded":
            model = AureaForConditionalGeneration.from_pretrained(converted, dtype=torch.bfloat16)
        else:
            model = AutoModelForImageTextToText.from_config(tiny_config(), dtype=torch.bfloat16)
        for name, parameter in model.named_parameters():
            keeps = "vision_model." in name or name.endswith("sigma_spatial")
            assert parameter.dtype == (torch.float32 if keeps else torch.bfloat16), name
        assert model.dtype == model.model.dtype == torch.bfloat16

    def test_encoders_keep_their_precision_under_autocast(self):
        model = tiny_model()
        pixels = random_pixels(2, model.config)
        with torch.no_grad():
            expected = model.get_image_features(pixels)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                features = model.get_image_features(pixels)
        assert torch.equal(features.last_hidden_state, expected.last_hidden_state)
        assert torch.equal(features.spatial_last_hidden_state, expected.spatial_last_hidden_state)
        assert not torch.equal(features.pooler_output, expected.pooler_output)  # the rest is under it

    def test_save_and_load_keep_every_bit(self, tmp_path):
        model = tiny_model()
        model.save_pretrained(tmp_path)
        loaded, info = AureaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        for (name, left), (_, right) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
            assert torch.equal(left, right), name

    def test_base_model_loads_from_the_folder_of_the_generative_one(self, tmp_path):
        model = tiny_model()
        model.save_pretrained(tmp_path)
        base, info = AureaModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        input_ids, pixels = batch_of_three(model.config)
        with torch.no_grad():
            expected = model.model(input_ids=input_ids, pixel_values=pixels).last_hidden_state
            assert torch.equal(base.eval()(input_ids=input_ids, pixel_values=pixels).last_hidden_state, expected)

    def test_language_model_weights_keep_their_names(self):
        model = tiny_model()
        bare = AutoModelForCausalLM.from_config(model.config.text_config)
        names = {name.removeprefix("model.language_model.") for name in model.state_dict()}
        assert {name.removeprefix("model.") for name in bare.state_dict()} <= names

    def test_blocks_are_initialised_as_our_own_in_any_language_model(self):
        model = AureaForConditionalGeneration(tiny_config({"model_type": "gemma"}))
        block = model.model.language_model.layers[0].cross_attention_block
        assert torch.equal(block.cross_attn.q_norm.weight, torch.ones(256))
        assert torch.equal(block.input_layernorm.weight, torch.ones(32))
        assert 0.015 < block.cross_attn.q_proj.weight.std() < 0.025
        assert model.model.fusion.semantic_layers[0].sigma_spatial == 1

    def test_rows_that_share_pictures_have_cross_attentions_of_their_own(self):
        model = tiny_model(attn_implementation="eager")
        texts = torch.randint(3, 90, (4, 5), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            states = model.get_image_features(random_pixels(2, model.config)).pooler_output
            shared, repeated = (
                model(input_ids=texts, cross_attention_states=each, output_attentions=True).cross_attentions
                for each in (states, states.repeat_interleave(2, dim=0))
            )
            model.config.output_attentions = True
            assert len(model(input_ids=texts, cross_attention_states=states).cross_attentions) == 3
        assert len(shared) == 3
        for ours, theirs in zip(shared, repeated):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)

    def test_attentions_and_hidden_states_on_request(self):
        model = tiny_model()
        model.set_attn_implementation("eager")
        input_ids, pixels = batch_of_three(model.config)
        with torch.no_grad():
            output = model(input_ids=input_ids, pixel_values=pixels, output_attentions=True, output_hidden_states=True)
        assert [tuple(a.shape) for a in output.attentions] == [(3, 4, 9, 9)] * 3
        assert [tuple(a.shape) for a in output.cross_attentions] == [(3, 4, 9, 32)] * 3
        assert [tuple(h.shape) for h in output.hidden_states] == [(3, 9, 32)] * 4
        sums = torch.stack(output.cross_attentions).sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums))
        with torch.no_grad():
            features = model.get_image_features(pixels, output_attentions=True, output_hidden_states=True)
            assert model(input_ids=input_ids[:, 1:]).image_outputs is None
        for outputs in (features, output.image_outputs):
            assert torch.equal(outputs.pooler_output, output.image_hidden_states)
            assert len(outputs.hidden_states) == len(outputs.spatial_hidden_states) == 3
            assert len(outputs.attentions) == len(outputs.spatial_attentions) == 2

    @pytest.mark.parametrize("kept", [1, 3, torch.tensor([0, 4, 8])], ids=["1", "3", "positions"])
    def test_logits_to_keep(self, kept):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        with torch.no_grad():
            full = model(input_ids=input_ids, pixel_values=pixels).logits
            part = model(input_ids=input_ids, pixel_values=pixels, logits_to_keep=kept).logits
        expected = full[:, -kept:] if isinstance(kept, int) else full[:, kept]
        torch.testing.assert_close(part, expected, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("text", ["phi3", "gpt2", "gemma"])
    def test_tied_embeddings_stay_tied(self, text, tmp_path):
        model = AureaForConditionalGeneration(tiny_config({"model_type": text, "tie_word_embeddings": True}))
        assert model.lm_head.weight is model.get_input_embeddings().weight
        model.resize_token_embeddings(120)
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert model.config.text_config.vocab_size == 120
        model.save_pretrained(tmp_path)
        loaded = AureaForConditionalGeneration.from_pretrained(tmp_path)
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight

    def test_a_model_can_be_copied(self):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        with torch.no_grad():
            expected = model(input_ids=input_ids, pixel_values=pixels).logits
            assert torch.equal(copy.deepcopy(model)(input_ids=input_ids, pixel_values=pixels).logits, expected)

    def test_a_layers_further_outputs_come_through_the_closing_block(self):
        class Layer(torch.nn.Module):
            def forward(self, hidden_states):
                return hidden_states, "weights"

        layer, states = Layer(), torch.randn(1, 16, 32)
        layer.__class__ = woven_class(AureaWovenDecoderLayerMixin, Layer)
        layer.cross_attention_block = None
        layer.closing_cross_attention_block = tiny_model().model.language_model.layers[0].cross_attention_block
        hidden_states, weights = layer(states[:, :5], cross_attention_states=states)
        assert torch.equal(hidden_states, layer.closing_cross_attention_block(states[:, :5], states))
        assert weights == "weights"

    def test_layers_keep_the_name_of_their_class(self):
        model = tiny_model()
        assert type(model.model.language_model.layers[0]).__name__ in model._no_split_modules

    def test_tensor_parallel_plan_covers_decoder_and_blocks(self):
        model = tiny_model({"model_type": "llama"})
        plan = model._tp_plan
        assert plan["model.language_model.layers.*.self_attn.q_proj"] == "colwise"
        assert plan["model.language_model.layers.*.cross_attention_block.cross_attn.q_proj"] == "colwise"
        assert plan["model.language_model.layers.*.closing_cross_attention_block.mlp.down_proj"] == "rowwise"

    def test_quantisers_leave_the_encoders_alone(self):
        from transformers.quantizers.base import HfQuantizer
        from transformers.quantizers.quantizers_utils import should_convert_module

        model = tiny_model()
        skipped = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
        linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        converted = {name for name in linear if should_convert_module(name, skipped)}
        assert not any("vision_model" in name for name in converted)
        assert "model.language_model.layers.0.self_attn.qkv_proj" in converted
        assert "model.language_model.layers.0.cross_attention_block.cross_attn.q_proj" in converted


class TestViews:
    @pytest.mark.parametrize("size", [[28, 14], [14, 42], 56], ids=str)
    def test_any_size_that_both_encoders_can_patch(self, size):
        model = AureaForConditionalGeneration(tiny_config(vision_image_size=size, spatial_vision_image_size=size))
        input_ids, pixels = batch_of_three(model.config)
        height, width = (size, size) if isinstance(size, int) else size
        assert pixels.shape[-2:] == (height, width)
        assert model.config.tokens_per_image == height * width // 49
        loss = model(input_ids=input_ids, pixel_values=pixels, labels=input_ids).loss
        loss.backward()
        assert loss.isfinite()

    def test_a_smaller_view_is_cut_out_of_the_canvas(self):
        spatial = {"model_type": "dinov2_with_registers", "hidden_size": 12, "num_hidden_layers": 1}
        spatial |= {"num_attention_heads": 2, "image_size": 20, "patch_size": 5}
        config = tiny_config()
        config = type(config)(**{**config.to_dict(), "spatial_vision_config": spatial})
        assert config.view_sizes == ((28, 28), (20, 20)) and config.grid_sizes == ((4, 4), (4, 4))
        model = AureaForConditionalGeneration(config).eval()
        pixels = random_pixels(1, config)
        other = pixels.clone()
        other[:, 1, :, 20:] = 9
        other[:, 1, :, :, 20:] = 9
        with torch.no_grad():
            features = [model.get_image_features(p).pooler_output for p in (pixels, other)]
        assert torch.equal(*features)


class TestBadInput:
    @pytest.fixture
    def warnings(self, monkeypatch) -> list[str]:
        messages = []
        monkeypatch.setattr(modeling_aurea.logger, "warning_once", messages.append)
        return messages

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda ids, px: {"input_ids": ids, "pixel_values": px[:2]},
                r"2 pictures for 3 placeholders \(\[1, 2, 0\]",
            ),
            (lambda ids, px: {"input_ids": ids[2:], "pixel_values": px[:1]}, "1 pictures for 0 placeholders"),
            (
                lambda ids, px: {"input_ids": ids, "pixel_values": px[:, :1]},
                r"\(num_images, 2, 3, 28, 28\).*\(3, 1, 3",
            ),
            (lambda ids, px: {"input_ids": ids, "pixel_values": px[:, 0]}, r"got \(3, 3, 28, 28\)"),
            (lambda ids, px: {"input_ids": ids, "pixel_values": px[..., :21]}, r"got \(3, 2, 3, 28, 21\)"),
            (
                lambda ids, px: {
                    "input_ids": ids,
                    "pixel_values": px,
                    "cross_attention_states": px.new_zeros(3, 16, 32),
                },
                "not both",
            ),
            (lambda ids, px: {"pixel_values": px}, "exactly one of `input_ids` or `inputs_embeds`"),
            (lambda ids, px: {"input_ids": ids, "inputs_embeds": px.new_zeros(3, 9, 32)}, "exactly one of"),
        ],
    )
    def test_is_refused_with_the_reason(self, change, message):
        model = tiny_model()
        with pytest.raises(ValueError, match=message):
            model(**change(*batch_of_three(model.config)))

    def test_states_that_do_not_divide_the_rows_are_refused(self):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        with pytest.raises(ValueError, match="has 2 rows, which do not divide the 3 rows of the text"):
            model(input_ids=input_ids, cross_attention_states=pixels.new_zeros(2, 16, 32))
        states = {"cross_attention_states": pixels.new_zeros(1, 16, 32), "num_images": torch.tensor([1, 1, 1])}
        with pytest.raises(ValueError, match=r"`num_images` counts the pictures of 3 rows.*has 1: give one number"):
            model(input_ids=input_ids, **states)

    def test_generate_refuses_wrong_numbers_of_pictures(self):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        with pytest.raises(ValueError, match="Image features and image tokens do not match: 2 pictures for 3"):
            greedy(model, input_ids=input_ids, pixel_values=pixels[:2])

    @pytest.mark.parametrize("has_cache", [False, True])
    def test_placeholders_without_pictures_warn(self, warnings, has_cache):
        model = tiny_model()
        input_ids, _ = batch_of_three(model.config)
        cache = DynamicCache(config=model.config.text_config) if has_cache else None
        model(input_ids=input_ids, **{CACHE_NAME: cache})
        assert len(warnings) == 1 and "no `pixel_values` were given" in warnings[0]
        if has_cache:
            model(input_ids=input_ids, **{CACHE_NAME: cache})  # of what may have been generated nothing is said
            assert len(warnings) == 1

    def test_only_text_that_was_cached_before_its_rows_first_picture_is_warned_of(self, warnings):
        model = tiny_model()
        input_ids, pixels = batch_of_three(model.config)
        further = torch.tensor([[IMAGE_TOKEN_ID], [7], [8]])
        with torch.no_grad():
            cache = model(input_ids=input_ids, pixel_values=pixels, use_cache=True)[CACHE_NAME]
            # Row 0 gets its second picture.
            model(input_ids=further, pixel_values=pixels[[0, 1, 1, 2]], **{CACHE_NAME: cache})
            assert warnings == []
            # Row 2 gets its first.
            model(input_ids=further.flip(0), pixel_values=pixels[[0, 1, 1, 2, 0]], **{CACHE_NAME: cache})
        assert len(warnings) == 1 and "read before its row's first picture" in warnings[0]
