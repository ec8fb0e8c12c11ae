# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Answers about pictures that are encoded once are those that `generate` gives of the pixels."""

import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image
from transformers import BatchFeature, GenerationConfig, LlavaConfig

from transformers_aurea import AureaForConditionalGeneration, AureaProcessor, embedded_model_path
from transformers_aurea.answering import AnsweringModel, answer_all, batches, picture_key, user_message
from transformers_aurea.scenes import make_scene, test_seeds


@pytest.fixture(scope="module")
def embedded():
    folder = embedded_model_path()
    return AureaForConditionalGeneration.from_pretrained(folder).eval(), AureaProcessor.from_pretrained(folder)


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many pictures were encoded in each call."""
    counts = []
    encode = AureaForConditionalGeneration.get_image_features

    def count(self, pixel_values, **kwargs):
        counts.append(len(pixel_values))
        return encode(self, pixel_values, **kwargs)

    monkeypatch.setattr(AureaForConditionalGeneration, "get_image_features", count)
    return counts


@pytest.fixture
def given(monkeypatch) -> list[dict]:
    """Arguments of `generate`."""
    calls = []
    generate = AureaForConditionalGeneration.generate

    def record(self, **kwargs):
        calls.append(kwargs)
        return generate(self, **kwargs)

    monkeypatch.setattr(AureaForConditionalGeneration, "generate", record)
    return calls


def by_pixels(model, processor, chats, **generation) -> list[list[int]]:
    """Tokens that `generate` makes of each conversation by itself and the pixels of its pictures."""
    found = []
    for chat in chats:
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        found.append(
            model.generate(**inputs, do_sample=False, **generation)[0, inputs["input_ids"].shape[1] :].tolist()
        )
    return found


def scene_chats(num_scenes: int = 3) -> list[list[dict]]:
    return [
        [user_message([picture], question)]
        for picture, asked in map(make_scene, test_seeds(num_scenes))
        for _, question, _ in asked
    ]


class TestEncodingOnce:
    def test_answers_are_those_to_the_pixels(self, embedded, encoded):
        model, processor = embedded
        chats = scene_chats()
        said = answer_all(AnsweringModel(model, processor, do_sample=False, max_new_tokens=48), chats, batch_size=4)
        assert sum(encoded) == 3
        tokens = by_pixels(model, processor, chats, max_new_tokens=48)
        assert [answer.text for answer in said] == [
            text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)
        ]
        assert all(answer.ended for answer in said)
        [cut] = AnsweringModel(model, processor, do_sample=False, max_new_tokens=1)(chats[-1:])
        assert not cut.ended

    @pytest.mark.parametrize("connector_type", ["cross_attention", "prefix", "both"])
    def test_so_for_each_connector_and_any_number_of_pictures(self, connector_type, embedded, encoded, given):
        _, published = embedded
        torch.manual_seed(0)
        tokenizer = published.tokenizer
        config = tiny_config(
            {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0},
            image_token_id=published.image_token_id,
            connector_type=connector_type,
        )
        model = AureaForConditionalGeneration(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and "vision_model" not in name:
                    parameter.mul_(5)  # as `tiny_model` has it, that pictures show
        views = {"size": {"height": 28, "width": 28}, "spatial_size": {"height": 28, "width": 28}}
        image_processor = type(published.image_processor)(**published.image_processor.to_dict() | views)
        processor = AureaProcessor(
            image_processor,
            tokenizer,
            chat_template=published.chat_template,
            image_seq_length=config.placeholders_per_image,
        )
        pictures = [make_scene(seed)[0] for seed in test_seeds(3)]
        chats = [
            [user_message(shown, question)]
            for shown, question in (
                (pictures[:1], "one?"),
                ([], "none?"),
                (pictures[:2], "two?"),
                (pictures[1:], "two others?"),
                (pictures[1:2], "<|image|> in words?"),
            )
        ]
        answering = AnsweringModel(model, processor, do_sample=False, max_new_tokens=6)
        said = answering(chats)
        assert encoded == [3] and "pixel_values" not in given[0]
        expected = by_pixels(model, processor, chats, max_new_tokens=6)
        texts = processor.batch_decode(expected, skip_special_tokens=True)
        assert [answer.text for answer in said] == [text.strip() for text in texts]
        assert len({*texts}) > 1
        black = [[user_message([Image.new("RGB", (9, 9))] * len(chat[0]["content"][:-1]), "one?")] for chat in chats]
        assert answering(black[:1])[0].text != said[0].text

    def test_features_are_kept_as_long_as_somebody_will_ask(self, embedded, encoded):
        answering = AnsweringModel(*embedded, do_sample=False, max_new_tokens=1)
        picture, other = (make_scene(seed)[0] for seed in test_seeds(2))
        first, second = [user_message([picture], "One?")], [user_message([picture, other], "Two?")]
        answering([first])
        answering([first])
        assert encoded == [1, 1] and not answering._features
        answering.expect([picture, picture])
        answering([first])
        assert len(answering._features) == 1
        answering([second])
        assert encoded == [1, 1, 1, 1] and not answering._features and not answering._asked_later

    def test_pixels_can_be_changed_first(self, embedded):
        chats = scene_chats(2)
        plain = answer_all(AnsweringModel(*embedded, do_sample=False, max_new_tokens=9), chats, 8)
        blind = AnsweringModel(*embedded, change_pixels=torch.zeros_like, do_sample=False, max_new_tokens=9)
        assert answer_all(blind, chats, 8) != plain

    def test_a_model_of_another_kind_is_shown_the_pixels(self):
        picture = Image.new("RGB", (3, 3))
        pixels = torch.ones(1, 3, 3, 3)

        class Processor:
            def apply_chat_template(self, conversations, **kwargs):
                assert conversations == [[user_message([picture], "What?")]]
                return BatchFeature({"input_ids": torch.ones(1, 2).long(), "pixel_values": pixels})

            def batch_decode(self, tokens, **kwargs):
                return [f" {tokens.tolist()} "]

        class Model:
            config = LlavaConfig()
            generation_config = GenerationConfig()  # no token ends an answer
            device = torch.device("cpu")

            def generate(self, input_ids, pixel_values):
                assert pixel_values is pixels
                return torch.cat([input_ids, 2 * input_ids], dim=1)

        assert AnsweringModel(Model(), Processor())([[user_message([picture], "What?")]]) == [("[[2, 2]]", False)]


class TestOrder:
    def test_batches_are_alike_and_each_conversation_is_in_one(self):
        keys = [["a"], ["b"], [], ["a"], ["b", "a"], ["c"], ["a"], []]
        lengths = [3, 2, 5, 9, 1, 4, 1, 2]
        found = list(batches(keys, lengths, 2))
        assert sorted(index for batch in found for index in batch) == list(range(8))
        assert all(len({len(keys[index]) for index in batch}) == 1 and len(batch) <= 2 for batch in found)
        assert found[:2] == [[7, 2], [6, 1]]  # the shorter ones first

    def test_conversations_about_a_picture_are_near_to_each_other(self):
        keys = [[index % 100] for index in range(1000)]
        when = {}
        for number, batch in enumerate(batches(keys, [index // 100 for index in range(1000)], 4)):
            for index in batch:
                when.setdefault(index % 100, []).append(number)
        assert max(numbers[-1] - numbers[0] for numbers in when.values()) < 16

    def test_pictures_are_the_same_by_path_by_bytes_or_by_pixels(self, tmp_path):
        picture = Image.new("RGB", (3, 4))
        picture.save(tmp_path / "a.png")
        data = (tmp_path / "a.png").read_bytes()
        assert picture_key(picture) == picture_key(picture.copy()) == picture_key(Image.open(tmp_path / "a.png"))
        others = [Image.new("RGB", (4, 3)), Image.new("HSV", (3, 4)), Image.new("RGB", (3, 4), "#000001")]
        palettes = [Image.new("P", (3, 4)) for _ in range(2)]
        palettes[1].putpalette([255, 0, 0])
        arrays = [np.zeros((3, 4, 3), dtype=np.uint8), np.zeros((4, 3, 3), dtype=np.uint8), torch.zeros(3, 3, 4)]
        assert len({*map(picture_key, [picture, *others, *palettes, *arrays, data, data[:-1]])}) == 11
        assert picture_key(data) == picture_key({"bytes": data, "path": "b"}) == picture_key(bytearray(data))
        assert picture_key(tmp_path / "a.png") == picture_key({"bytes": None, "path": str(tmp_path / "a.png")})

    def test_paths_and_bytes_are_read_and_what_is_no_picture_is_named(self, embedded, tmp_path):
        picture, [(_, question, _), *_] = make_scene(1)
        picture.save(tmp_path / "a.png")
        (tmp_path / "b.png").write_text("no picture")
        answering = AnsweringModel(*embedded, do_sample=False, max_new_tokens=9)
        forms = [picture, str(tmp_path / "a.png"), {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}]
        assert len({answer.text for form in forms for answer in answering([[user_message([form], question)]])}) == 1
        with pytest.raises(ValueError, match=r"b\.png' cannot be read"):
            answering([[user_message([str(tmp_path / "b.png")], question)]])
