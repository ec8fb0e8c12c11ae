# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""What is read of a model's attention is what the model computes; and the model is left as it was."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import FIXTURES, TINY_VISION, tiny_model
from PIL import Image
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from transformers_aurea import AureaForConditionalGeneration as Model
from transformers_aurea import AureaImageProcessor, AureaProcessor, embedded_model_path
from transformers_aurea.attention_reading import blinded, read_attention
from transformers_aurea.scenes import make_scene
from transformers_aurea.scenes import test_seeds as seeds_of_tests


QUESTION = "What is in the picture?"
SIDE = {"height": 28, "width": 28}


def random_picture(height: int, width: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture(scope="module")
def make(golden_processor):
    """A tiny model of some settings and a processor that fits it."""

    def make(text_config: dict | None = None, **kwargs) -> tuple:
        tokenizer = golden_processor.tokenizer
        text_config = {"vocab_size": len(tokenizer), **(text_config or {})}
        model = tiny_model(text_config, image_token_id=golden_processor.image_token_id, **kwargs)
        views = len(model.config.views)
        image_processor = AureaImageProcessor(
            size=SIDE, spatial_size={"shortest_edge": 32}, spatial_crop_size=SIDE, do_spatial_view=views > 1
        )
        return model, AureaProcessor(image_processor, tokenizer, image_seq_length=model.config.placeholders_per_image)

    return make


# by hand, in plain loops


def reflected(place: int, length: int) -> int:
    return -place if place < 0 else 2 * (length - 1) - place if place >= length else place


def window(row: int, column: int, height: int, width: int, radius: int):
    """Number, rows and columns on the grid of the neighbours of a patch, and their distances."""
    extent = 2 * radius + 1
    for number in range(extent**2):
        down, right = number // extent - radius, number % extent - radius
        place = reflected(row + down, height), reflected(column + right, width)
        yield number, place, ((down / radius) ** 2 + (right / radius) ** 2)


def by_hand(layer: nn.Module, source: torch.Tensor, guidance: torch.Tensor):
    """Of maps (H, W, C): weights (H, W, H, W) before and after the correction, and the layer's output."""
    height, width, channels = guidance.shape
    projected = layer.range_proj(guidance[None])[0]
    before, after = (torch.zeros(height, width, height, width) for _ in range(2))
    output = torch.zeros_like(source)
    for row in range(height):
        for column in range(width):
            neighbors = [*window(row, column, height, width, layer.radius)]
            scores = [
                float(projected[row, column] @ projected[place]) / math.sqrt(channels) for _, place, _ in neighbors
            ]
            total = sum(math.exp(score - max(scores)) for score in scores)
            weights = [
                math.exp(score - max(scores)) / total * math.exp(-distance / (2 * float(layer.sigma_spatial) ** 2))
                for score, (_, _, distance) in zip(scores, neighbors)
            ]
            given = torch.cat([torch.tensor(weights), guidance[row, column]])
            gates = layer.fixup_proj(given[None, None, None])[0, 0, 0].sigmoid().tolist()
            corrected = [weight * (1 + gate) for weight, gate in zip(weights, gates)]
            for number, place, _ in neighbors:
                before[row, column][place] += weights[number]
                after[row, column][place] += corrected[number] / sum(corrected)
                output[row, column] += corrected[number] / sum(corrected) * source[place]
    return before, after, layer.output_proj(output[None])[0]


@torch.no_grad()
def fusion_by_hand(model, pixels: torch.Tensor):
    """Weights before and after, of each layer, for one picture (views, 3, H, W)."""
    aurea, found = model.model, []
    fusion = aurea.fusion
    (_, semantic), (_, spatial) = (
        encoder.encode(pixels[None]) for encoder in (aurea.vision_model, aurea.spatial_vision_model)
    )
    semantic = fusion.semantic_proj(fusion.semantic_norm(semantic[0]))
    spatial = fusion.spatial_norm(spatial[0])
    source = torch.cat([spatial, semantic], dim=-1)
    for layer in fusion.semantic_layers:
        before, after, output = by_hand(layer, spatial, semantic)
        semantic = semantic + output
        found.append((before, after))
    joint = torch.cat([spatial, semantic], dim=-1)
    for layer in fusion.joint_layers:
        before, after, output = by_hand(layer, source, joint)
        joint = joint + output
        found.append((before, after))
    return found


class TestSpatialRange:
    @pytest.mark.parametrize(("radius", "depth"), [(1, 2), (3, 1)])
    def test_weights_are_those_computed_by_hand(self, make, radius, depth):
        model, processor = make(feature_fusion_config={"radius": radius, "depth": depth})
        pictures = [random_picture(40, 60), random_picture(30, 30, seed=1)]
        with torch.no_grad():
            for layer in [*model.model.fusion.semantic_layers, *model.model.fusion.joint_layers]:
                layer.sigma_spatial.fill_(0.8)
        reading = read_attention(pictures, None, model, processor)
        names = [f"fusion.{stack}_layers.{n}" for stack in ("semantic", "joint") for n in range(2 * depth)]
        assert [*reading.layers] == names
        pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
        for image in range(2):
            for name, (before, after) in zip(names, fusion_by_hand(model, pixels[image]), strict=True):
                for patch in [(0, 0), (0, 3), (1, 2), (2, 1), (3, 0), (3, 3)]:  # corners too
                    [look] = reading.of_patch(name, patch=patch, image=image, view="vision")
                    torch.testing.assert_close(look.uncorrected, before[patch], atol=1e-6, rtol=1e-4)
                    torch.testing.assert_close(look.weights, after[patch], atol=1e-6, rtol=1e-4)

    @pytest.mark.parametrize("base", [False, True], ids=["with a head", "without"])
    def test_the_model_gives_them_on_request(self, make, base):
        model, processor = make()
        model.set_attn_implementation("eager")
        pictures = [random_picture(40, 60), random_picture(30, 30, seed=1)]
        reading = read_attention(pictures, None, model, processor)
        inputs = processor(images=pictures, text=["<|image|><|image|> what"], return_tensors="pt")
        asked = model.model if base else model
        with torch.no_grad():
            outputs = asked(**inputs, output_attentions=True)
            assert asked(**inputs).fusion_attentions is None
            features = asked.get_image_features(inputs["pixel_values"], output_attentions=True)
            assert outputs.fusion_attentions is outputs.image_outputs.fusion_attentions
            model.config.output_attentions = True
            assert len(asked(**inputs).fusion_attentions) == 4
        assert [weights.shape for weights in outputs.fusion_attentions] == [(2, 4, 4, 9)] * 4
        for given in (outputs.fusion_attentions, features.fusion_attentions):
            for weights, layer in zip(given, reading.layers.values(), strict=True):
                torch.testing.assert_close(weights, layer.weights)
        assert outputs.fusion_attentions[0].sum(dim=-1).allclose(torch.ones(()))
        text = processor(text=["what"], return_tensors="pt")
        assert asked(**text).fusion_attentions is None

    def test_views_that_show_other_parts_are_told_apart(self, make):
        model, processor = make()
        reading = read_attention(random_picture(40, 80), None, model, processor)
        semantic, spatial = reading.of_patch(0, at=(42, 21))
        assert semantic.views == ("vision", "vision") and spatial.views == ("spatial_vision", "spatial_vision")
        assert semantic.patch == (2, 2) and spatial.patch == (2, 2)
        assert semantic.query_grid.patch_width == 20 and spatial.query_grid.patch_width == 8.75
        [at_the_edge] = reading.of_patch(0, at=(3, 21))  # which the crop does not show
        assert at_the_edge.views[0] == "vision" and at_the_edge.patch == (2, 0)
        assert len(read_attention(random_picture(56, 56), None, model, _square(processor)).of_patch(0, at=(3, 3))) == 1

    def test_the_kernel_gives_the_same(self, make, monkeypatch):
        """A forward of another origin in the layers' place, as a kernel's is."""
        model, processor = make()
        expected = read_attention(random_picture(40, 60), None, model, processor)
        for layer in [*model.model.fusion.semantic_layers, *model.model.fusion.joint_layers]:
            for part in (layer.spatial_range_weights, layer.neighborhood_aggregate):
                forward = part.forward
                monkeypatch.setattr(part, "forward", lambda *inputs, forward=forward: forward(*inputs), raising=False)
        found = read_attention(random_picture(40, 60), None, model, processor)
        for name, layer in found.layers.items():
            assert torch.equal(layer.weights, expected.layers[name].weights)


def _square(processor):
    settings = {"size": SIDE, "spatial_size": SIDE, "spatial_crop_size": None}
    return AureaProcessor(AureaImageProcessor(**settings), processor.tokenizer)


class TestOtherAttentionOfPatches:
    def test_cross_attention_fusion_by_hand(self, make):
        model, processor = make(
            feature_fusion_config={"fusion_type": "cross_attention", "depth": 2, "num_attention_heads": 2},
            spatial_vision_image_size=[21, 35],
        )
        processor.image_processor = AureaImageProcessor(
            size=SIDE, spatial_size={"height": 21, "width": 35}, spatial_crop_size=None
        )
        picture = random_picture(30, 50)
        reading = read_attention(picture, None, model, processor)
        assert [*reading.layers] == ["fusion.layers.0", "fusion.layers.1"]
        pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
        aurea, fusion = model.model, model.model.fusion
        with torch.no_grad():
            (_, semantic), (_, spatial) = (e.encode(pixels) for e in (aurea.vision_model, aurea.spatial_vision_model))
            tokens = fusion.semantic_proj(fusion.semantic_norm(semantic[0].flatten(0, 1)))
            source = fusion.spatial_norm(spatial[0].flatten(0, 1))
            for norm, layer, found in zip(fusion.norms, fusion.layers, reading.layers.values(), strict=True):
                assert found.weights.shape == (1, 2, 4, 4, 3, 5)
                query, key = layer.q_proj(norm(tokens)), layer.k_proj(source)
                for head, (q, k) in enumerate(zip(query.chunk(2, dim=1), key.chunk(2, dim=1))):
                    for row, column in [(0, 0), (1, 3), (3, 2)]:
                        scores = [float(q[4 * row + column] @ one) / math.sqrt(q.shape[1]) for one in k]
                        weights = torch.tensor(scores).softmax(dim=0).view(3, 5)
                        torch.testing.assert_close(found.weights[0, head, row, column], weights)
                tokens = tokens + layer(norm(tokens)[None], source[None])[0]
            given = model.get_image_features(pixels, output_attentions=True).fusion_attentions
        assert [weights.shape for weights in given] == [(1, 2, 16, 15)] * 2
        torch.testing.assert_close(given[1].flatten(), reading.layers["fusion.layers.1"].weights.flatten())
        [look] = reading.of_patch(1, at=(26, 1))
        assert look.views == ("vision", "spatial_vision") and look.patch == (0, 2) and look.uncorrected is None
        assert (look.key_grid.rows, look.key_grid.columns) == (3, 5) and look.key_grid.patch_width == 10
        torch.testing.assert_close(look.weights, reading.layer(1).weights[0, :, 0, 2].mean(dim=0))

    @pytest.mark.parametrize("kind", ["cross_attention", "gated_attention"])
    def test_composition(self, make, kind):
        composition = {"composition_type": kind, "num_composition_layers": 2, "num_attention_heads": 2}
        model, processor = make(composition_config=composition, feature_fusion_config={"fusion_type": "none"})
        seen = {}
        for number, layer in enumerate(model.model.composition.layers):
            layer.cross_attn.register_forward_pre_hook(lambda _, inputs, number=number: seen.update({number: inputs}))
        reading = read_attention(random_picture(30, 50), None, model, processor)
        assert [*reading.layers] == ["composition.layers.0", "composition.layers.1"]
        for number, layer in enumerate(reading.layers.values()):
            attention, (tokens, source) = model.model.composition.layers[number].cross_attn, seen[number]
            query, key = attention.q_proj(tokens)[0], attention.k_proj(source)[0]
            others = len(key) - 16  # class and register tokens come first
            assert others > 0
            for head, (q, k) in enumerate(zip(query.chunk(2, dim=1), key.chunk(2, dim=1))):
                weights = (q @ k.T / math.sqrt(q.shape[1])).softmax(dim=-1)
                assert layer.weights[0, head, 1, 2].flatten().allclose(weights[6, others:])

    def test_what_only_adds_or_does_not_attend_has_no_layers(self, make):
        composition = {"composition_type": "simple_add", "num_composition_layers": 1}
        model, processor = make(composition_config=composition, feature_fusion_config={"fusion_type": "concat"})
        reading = read_attention(random_picture(30, 50), None, model, processor)
        assert reading.layers == {}
        with pytest.raises(ValueError, match="Neither fusion nor composition of this model has layers"):
            reading.of_patch(patch=(0, 0))


class TestWords:
    @pytest.fixture(scope="class")
    def reading(self, golden_model, golden_processor):
        return read_attention(
            FIXTURES / "image_wide.png", QUESTION, golden_model, golden_processor, answer="a red cat"
        )

    def test_words_of_an_answer(self, reading, golden_processor):
        assert reading.answer == "a red cat" and reading.words == ("a", "red", "cat")
        assert reading.word_attention.keys() == {"cross_attention"}

    @torch.no_grad()
    def test_weights_are_those_of_the_blocks_where_a_word_is_predicted(self, reading, golden_model, golden_processor):
        tokenizer = golden_processor.tokenizer
        content = [{"type": "image", "path": str(FIXTURES / "image_wide.png")}, {"type": "text", "text": QUESTION}]
        settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = golden_processor.apply_chat_template([{"role": "user", "content": content}], **settings)
        prompt = inputs["input_ids"]
        ids = tokenizer("a red cat", add_special_tokens=False)["input_ids"]
        text = torch.cat([prompt, torch.tensor([ids])], dim=1)
        seen = []
        blocks = [m for n, m in golden_model.named_modules() if n.endswith("cross_attn")]
        handles = [
            b.register_forward_pre_hook(lambda block, inputs: seen.append((block, *inputs[:2]))) for b in blocks
        ]
        golden_model(input_ids=text, pixel_values=inputs["pixel_values"])
        for handle in handles:
            handle.remove()
        ends = np.cumsum(
            [len(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in ("a", " red", " cat")]
        )
        assert ends[-1] == len(ids)
        found = reading.word_attention["cross_attention"]
        assert found.shape == (len(blocks), 4, 3, 1, 64)
        for layer, (block, hidden_states, states) in enumerate(seen):
            query = block.q_norm(block.q_proj(hidden_states)[0].unflatten(-1, (-1, block.head_dim)))
            key = block.k_norm(block.k_proj(states)[0].unflatten(-1, (-1, block.head_dim)))
            for head in range(4):
                for word, (start, end) in enumerate(zip([0, *ends], ends)):
                    places = [prompt.shape[1] + token - 1 for token in range(start, end)]  # one before each token
                    weights = torch.zeros(64)
                    for place in places:
                        scores = query[place, head] @ key[:, head // block.num_key_value_groups].T
                        weights += (scores / math.sqrt(block.head_dim)).softmax(dim=-1) / len(places)
                    torch.testing.assert_close(found[layer, head, word, 0], weights, atol=1e-6, rtol=1e-4)

    def test_maps_are_means_over_heads_and_layers(self, reading):
        weights = reading.word_attention["cross_attention"]
        pooled, second = reading.word_maps(), reading.word_maps(layer=1)
        assert pooled.shape == second.shape == (3, 1, 8, 8)
        assert torch.equal(second[1, 0, 2, 5], weights[1, :, 1, 0, 8 * 2 + 5].mean())
        torch.testing.assert_close(pooled[2, 0, 7, 1], weights[:, :, 2, 0, 57].mean())
        assert pooled.sum(dim=(-1, -2)).allclose(torch.ones(()))
        grid = reading.word_grid(0)
        assert grid == reading.grids[0]["vision"] and (grid.left, grid.top) == (0, 0)
        height, width, _ = reading.pictures[0].shape
        assert (grid.right, grid.bottom) == (width, height)

    def test_what_the_model_says_itself(self):
        model, processor = (part.from_pretrained(embedded_model_path()) for part in (Model, AureaProcessor))
        picture, [(_, question, expected)] = make_scene(seeds_of_tests(1)[0], kinds=["describe"])
        reading = read_attention(picture, question, model, processor)
        assert reading.answer == expected and list(reading.words) == expected.split()
        again = read_attention(picture, question, model, processor, answer=reading.answer)
        torch.testing.assert_close(again.word_maps(), reading.word_maps(), atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("mask", ["causal", "pictures", "prompt"])
    @pytest.mark.parametrize("connector_type", ["prefix", "both"])
    def test_a_prefix(self, make, connector_type, mask):
        model, processor = make(connector_type=connector_type, prefix_mask=mask)
        pictures = [random_picture(30, 50), random_picture(28, 28, seed=1)]
        reading = read_attention(pictures, QUESTION, model, processor, answer="a red cat")
        kinds = ["cross_attention", "prefix"] if connector_type == "both" else ["prefix"]
        assert [*reading.word_attention] == kinds
        ids = processor.tokenizer("a red cat", add_special_tokens=False)["input_ids"]
        content = [*({"type": "image", "image": one} for one in pictures), {"type": "text", "text": QUESTION}]
        settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], **settings)
        eager = copy.deepcopy(model)
        eager.set_attn_implementation("eager")
        prompt_length = inputs["input_ids"].shape[1]
        with torch.no_grad():  # token by token, as it would be generated
            cache, found = None, []
            outputs = eager(**inputs, output_attentions=True, use_cache=True)
            for token in ids:
                found.append(torch.stack(outputs.attentions)[:, 0, :, -1])  # (layers, heads, text so far)
                cache = outputs.get("past_key_values", outputs.get("cache"))
                outputs = eager(torch.tensor([[token]]), past_key_values=cache, output_attentions=True)
        places = inputs["mm_token_type_ids"][0].nonzero()[:, 0]
        assert len(places) == 32 and found[0].shape[-1] == prompt_length
        first = reading.word_attention["prefix"][:, :, 0]  # (layers, heads, images, tokens)
        count = len(processor.tokenizer("a", add_special_tokens=False)["input_ids"])
        expected = torch.stack([weights[..., places] for weights in found[:count]]).mean(dim=0)
        torch.testing.assert_close(first.flatten(2), expected, atol=1e-5, rtol=1e-3)
        count = len(processor.tokenizer(" cat", add_special_tokens=False)["input_ids"])
        expected = torch.stack([weights[..., places] for weights in found[-count:]]).mean(dim=0)
        last = reading.word_attention["prefix"][:, :, 2].flatten(2)
        torch.testing.assert_close(last, expected, atol=1e-5, rtol=1e-3)
        assert reading.word_maps(attention="prefix").shape == (3, 2, 4, 4)
        assert (reading.word_maps(attention="prefix").sum(dim=(1, 2, 3)) < 1).all()

    def test_two_pictures(self, make):
        model, processor = make()
        first, second = random_picture(30, 50), random_picture(60, 20, seed=1)
        both = read_attention([first, second], QUESTION, model, processor, answer="a cat")
        assert both.word_maps().shape == (2, 2, 4, 4)
        assert both.word_maps().sum(dim=(1, 2, 3)).allclose(torch.ones(()))
        assert [picture.shape for picture in both.pictures] == [(30, 50, 3), (60, 20, 3)]
        assert (both.pictures[1] == np.asarray(second)).all()
        for image, picture in enumerate([first, second]):
            alone = read_attention(picture, None, model, processor)
            assert both.grids[image] == alone.grids[0]
            for name, layer in alone.layers.items():
                torch.testing.assert_close(both.layers[name].weights[image], layer.weights[0])
        grid = both.grids[1]["vision"]
        assert (grid.right, grid.bottom) == (20, 60)
        turned = read_attention([second, first], QUESTION, model, processor, answer="a cat")
        assert not torch.allclose(turned.word_maps()[:, 0], both.word_maps()[:, 0], atol=1e-4)

    def test_tokens_on_no_grid_and_on_a_coarse_one(self, make):
        model, processor = make(feature_fusion_config={"fusion_type": "interleave"})
        reading = read_attention(random_picture(30, 50), QUESTION, model, processor, answer="a cat")
        assert reading.word_attention["cross_attention"].shape == (3, 4, 2, 1, 32)
        with pytest.raises(ValueError, match="lie on no grid"):
            reading.word_maps()
        model, processor = make(feature_fusion_config={"fusion_type": "sva", "query_grid": [2, 2]})
        reading = read_attention(random_picture(30, 50), QUESTION, model, processor, answer="a cat")
        assert reading.word_maps().shape == (2, 1, 2, 2)
        assert reading.word_grid(0).rectangle(1, 1) == (25, 15, 50, 30)

    def test_a_class_token_is_no_patch(self, make):
        vision = {**TINY_VISION["spatial_vision_config"]}
        model, processor = make(
            vision_config=None,
            spatial_vision_config=vision,
            spatial_vision_feature_select_strategy="full",
            feature_fusion_config={"fusion_type": "none", "encoder": "spatial_vision"},
        )
        reading = read_attention(random_picture(30, 50), QUESTION, model, processor, answer="a cat")
        weights = reading.word_attention["cross_attention"]
        assert weights.shape[-1] > 16
        torch.testing.assert_close(reading.word_maps(0)[1, 0, 0, 0], weights[0, :, 1, 0, -16].mean())


class TestEyes:
    @torch.no_grad()
    def test_what_an_answer_loses(self, make):
        model, processor = make()
        picture = random_picture(30, 50)
        eyes = read_attention(picture, QUESTION, model, processor, answer="a red cat", eyes=True).eyes
        content = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
        settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], **settings)
        ids = processor.tokenizer("a red cat", add_special_tokens=False)["input_ids"]

        def log_prob(pixel_values):
            text, total = inputs["input_ids"], 0
            for token in ids:
                logits = model(input_ids=text, pixel_values=pixel_values).logits[0, -1]
                total += logits.log_softmax(dim=-1)[token].item()
                text = torch.cat([text, torch.tensor([[token]])], dim=1)
            return total

        pixel_values = inputs["pixel_values"]
        assert eyes.log_prob == pytest.approx(log_prob(pixel_values), abs=1e-4)
        for name, blind in {"vision": [0], "spatial_vision": [1], "both": [0, 1]}.items():
            seen = pixel_values.clone()
            for view in blind:
                seen[0, view] = pixel_values[0, view].mean(dim=(1, 2), keepdim=True)
            assert eyes.blinded[name] == pytest.approx(log_prob(seen), abs=1e-4)
            assert eyes.shares[name] == pytest.approx(eyes.log_prob - eyes.blinded[name])
        assert len({*eyes.shares.values()}) == 3
        mean_picture = torch.rand(2, 3, 28, 28)
        shown = read_attention(picture, QUESTION, model, processor, "a red cat", eyes=True, mean_picture=mean_picture)
        seen = pixel_values.clone()
        seen[0, 1] = mean_picture[1]
        assert shown.eyes.blinded["spatial_vision"] == pytest.approx(log_prob(seen), abs=1e-4)

    def test_one_eye(self, make):
        model, processor = make(spatial_vision_config=None, feature_fusion_config={"fusion_type": "none"})
        reading = read_attention(random_picture(30, 50), QUESTION, model, processor, answer="a cat", eyes=True)
        assert reading.eyes.shares.keys() == {"vision"}

    def test_a_blinded_view_is_a_copy_and_the_mean_that_of_its_own_part(self, make):
        model, _ = make(
            vision_image_size=14, spatial_vision_image_size=28, feature_fusion_config={"fusion_type": "interleave"}
        )
        pixel_values = torch.rand(2, 2, 3, 28, 28)
        before = pixel_values.clone()
        seen = blinded(pixel_values, model.config.views["vision_config"])
        assert torch.equal(pixel_values, before) and torch.equal(seen[:, 1], before[:, 1])
        torch.testing.assert_close(seen[1, 0, 2, 5, 5], before[1, 0, 2, :14, :14].mean())


def state_of(model) -> dict:
    modules = dict(model.named_modules())
    return {
        "modes": {name: module.training for name, module in modules.items()},
        "configs": {name: m.config.to_dict() for name, m in modules.items() if isinstance(m, PreTrainedModel)},
        "attention": {
            name: m.config._attn_implementation for name, m in modules.items() if isinstance(m, PreTrainedModel)
        },
        "hooks": {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for name, m in modules.items()
        },
        "forwards": {name: vars(m).get("forward") for name, m in modules.items()},
        "generation": model.generation_config.to_dict(),
        "random": torch.get_rng_state().tolist(),
        "gradients": {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()},
        "enabled": torch.is_grad_enabled(),
    }


class TestTheCallersModel:
    @pytest.fixture
    def unusual(self, make):
        """A model in parts in training, with dropout, and a hook that draws random numbers."""
        model, processor = make({"attention_dropout": 0.5, "resid_pdrop": 0.5})
        model.model.language_model.train()
        model.model.fusion.train()
        model.model.projector_is = None
        model.model.fusion.register_forward_hook(lambda *_: torch.rand(1) and None)
        model.generation_config.do_sample, model.generation_config.temperature = True, 2.0
        next(model.parameters()).requires_grad_(False)
        return model, processor

    @pytest.mark.parametrize("implementation", ["eager", "sdpa", "mine"])
    def test_any_attention_gives_the_same_weights_and_stays(self, make, implementation):
        AttentionInterface.register("mine", sdpa_attention_forward)
        for settings in ({}, {"connector_type": "prefix"}):
            model, processor = make(**settings)
            expected = read_attention(random_picture(30, 50), QUESTION, model, processor, answer="a cat")
            model.set_attn_implementation(implementation)
            before = state_of(model)
            assert before["attention"]["model.language_model"] == implementation
            found = read_attention(random_picture(30, 50), QUESTION, model, processor, answer="a cat")
            assert state_of(model) == before
            torch.testing.assert_close(found.word_maps(), expected.word_maps(), atol=1e-5, rtol=1e-3)

    def test_nothing_is_changed(self, unusual):
        model, processor = unusual
        before = state_of(model)
        first, second = (
            read_attention(random_picture(30, 50), QUESTION, model, processor, eyes=True, max_new_tokens=5)
            for _ in range(2)
        )
        assert state_of(model) == before
        assert first.eyes == second.eyes and torch.equal(first.word_maps(), second.word_maps())  # without dropout

    @pytest.mark.parametrize("where", ["fusion", "language_model"])
    def test_nothing_is_changed_by_an_error(self, unusual, where, monkeypatch):
        model, processor = unusual
        failing = model.model.get_submodule(where)
        before = state_of(model)

        def fail(*args, **kwargs):
            assert where == "fusion" or model.model.language_model.config._attn_implementation == "eager"
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(failing, "forward", fail, raising=False)
            with pytest.raises(KeyboardInterrupt):
                read_attention(random_picture(30, 50), QUESTION, model, processor, answer="a cat")
        assert state_of(model) == before

    def test_a_model_in_half_precision_gives_float32(self, make):
        model, processor = make()
        reading = read_attention(random_picture(30, 50), QUESTION, model.to(torch.bfloat16), processor, answer="a cat")
        assert reading.layer(0).weights.dtype == reading.word_maps().dtype == torch.float32

    def test_an_adapted_model(self, make):
        peft = pytest.importorskip("peft")
        model, processor = make()
        expected = read_attention(random_picture(30, 50), QUESTION, model, processor, answer="a cat")
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*language_model.*qkv_proj"))
        found = read_attention(random_picture(30, 50), QUESTION, adapted, processor, answer="a cat")
        torch.testing.assert_close(found.word_maps(), expected.word_maps())


class TestErrors:
    @pytest.fixture(scope="class")
    def reading(self, make):
        return read_attention(random_picture(30, 50), QUESTION, *make(), answer="a cat")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"at": (51, 3)}, r"No patch shows the point \(51, 3\): patches cover x from 0 to 50"),
            ({"patch": (0, 4)}, "row 0, column 4: rows go from 0 to 3"),
            ({"patch": (0, 0), "layer": 4}, "no layer 4: give a number from 0 to 3"),
            ({"patch": (0, 0), "layer": "joint"}, "no layer 'joint': .*'fusion.joint_layers.1'"),
            ({"patch": (0, 0), "image": 1}, "no picture 1: give a number from 0 to 0"),
            ({"patch": (0, 0), "image": -1}, "no picture -1"),
            ({"patch": (0, 0), "view": "left"}, "No patches of the view 'left' are in this layer"),
            ({}, "Give `at`, .* or `patch`"),
            ({"at": (1, 1), "patch": (0, 0)}, "Give `at`, .* or `patch`"),
        ],
    )
    def test_of_patches(self, reading, arguments, message):
        with pytest.raises(ValueError, match=message):
            reading.of_patch(**arguments)

    def test_of_words(self, reading, make):
        with pytest.raises(ValueError, match="no layer 3 in 'cross_attention': give a number from 0 to 2"):
            reading.word_maps(3)
        with pytest.raises(ValueError, match="no attention 'prefix' of words in this model"):
            reading.word_maps(attention="prefix")
        with pytest.raises(ValueError, match="There are no words: give a `question`"):
            read_attention(random_picture(30, 50), None, *make()).word_maps()

    def test_of_what_is_asked(self, make):
        model, processor = make()
        with pytest.raises(ValueError, match="The answer '' has no tokens"):
            read_attention(random_picture(30, 50), QUESTION, model, processor, answer="")
        with pytest.raises(ValueError, match="AureaModel has no head that could answer"):
            read_attention(random_picture(30, 50), QUESTION, model.model, processor)
        assert len(read_attention(random_picture(30, 50), None, model.model, processor).layers) == 4
        with pytest.raises(ValueError, match="There is no picture to look at"):
            read_attention([], QUESTION, model, processor)
        with pytest.raises(ValueError, match=r"no_such_file\.png"):
            read_attention("no_such_file.png", QUESTION, model, processor)

    def test_a_language_model_without_weights(self, make, monkeypatch):
        model, processor = make(connector_type="prefix")
        monkeypatch.setattr(type(model.model.language_model), "set_attn_implementation", lambda self, name: None)
        with pytest.raises(ValueError, match="gives no attention weights, so that nothing can be read of 'prefix'"):
            read_attention(random_picture(30, 50), QUESTION, model, processor, answer="a cat")


@pytest.mark.parametrize("kind", ["array", "tensor", "rgba", "path"])
def test_any_picture_that_the_processor_reads(make, kind, tmp_path):
    model, processor = make()
    picture = random_picture(30, 50)
    array = np.asarray(picture)
    picture.save(tmp_path / "picture.png")
    given = {
        "array": array,
        "tensor": torch.from_numpy(array.copy()).permute(2, 0, 1) / 255,
        "rgba": picture.convert("RGBA"),
        "path": str(tmp_path / "picture.png"),
    }[kind]
    if kind == "tensor":
        processor.image_processor.do_rescale = False
    reading = read_attention(given, QUESTION, model, processor, answer="a cat")
    assert (reading.pictures[0] == array).all()
