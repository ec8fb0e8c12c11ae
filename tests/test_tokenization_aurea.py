# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
import json
import random
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from transformers_aurea.tokenization_aurea import build_tokenizer


FIXTURES = Path(__file__).parent / "fixtures"
PUBLISHED = FIXTURES / "published"
FACTS = json.loads((FIXTURES / "goldens.json").read_text())
FILES = ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json")
# GPT-2's splitting rule, restricted to ASCII:
# https://github.com/openai/gpt-2/blob/9b63575ef42771a015060c964af2c3da4cf7c8ab/src/encoder.py#L53
ASCII_SPLIT = re.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", flags=re.ASCII
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(PUBLISHED)


@pytest.fixture
def folder(tmp_path):
    for name in FILES:
        shutil.copy(PUBLISHED / name, tmp_path / name)
        (tmp_path / name).chmod(0o644)
    return tmp_path


def edit_json(path: Path, **changes):
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def reference_ids(text: str) -> list[int]:
    """Byte-level BPE as a few lines of Python, for printable ASCII without added tokens."""
    vocab = json.loads((PUBLISHED / "vocab.json").read_text())
    lines = (PUBLISHED / "merges.txt").read_text().splitlines()[1:]
    ranks = {tuple(line.split()): rank for rank, line in enumerate(lines)}
    ids = []
    for word in ASCII_SPLIT.findall(text):
        symbols = list(word.replace(" ", "Ġ").replace("\n", "Ċ"))
        while pairs := [pair for pair in pairwise(symbols) if pair in ranks]:
            best, merged = min(pairs, key=ranks.get), []
            for symbol in symbols:
                if merged and (merged[-1], symbol) == best:
                    merged[-1] += symbol
                else:
                    merged.append(symbol)
            symbols = merged
        ids += [vocab[symbol] for symbol in symbols]
    return ids


@pytest.mark.parametrize("case", FACTS["tokenizer"], ids=lambda case: case["text"])
def test_ids_equal_those_of_the_original(tokenizer, case):
    assert tokenizer(case["text"])["input_ids"] == case["slow_gpt2"]


def test_ids_equal_a_plain_implementation_on_random_texts(tokenizer):
    generator = random.Random(0)
    pieces = [
        *"abc XYZ 0123 \n\n  .,-()'!/_",
        "-language",
        " (of",
        "the",
        "ing",
        "'s",
        "'LL",
        "123456",
        " image",
        "  ",
    ]
    for _ in range(300):
        text = "".join(generator.choices(pieces, k=generator.randrange(1, 30)))
        assert tokenizer(text)["input_ids"] == reference_ids(text), repr(text)


def test_ids_survive_saving_and_loading_twice(tokenizer, tmp_path):
    for round_ in range(2):
        folder = tmp_path / str(round_)
        tokenizer.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert isinstance(tokenizer, GPT2Tokenizer)
        for loaded in (tokenizer, PreTrainedTokenizerFast.from_pretrained(folder)):  # the file itself, not the class
            for case in FACTS["tokenizer"]:
                assert loaded(case["text"])["input_ids"] == case["slow_gpt2"]
        assert (tokenizer.image_token, tokenizer.image_token_id) == ("<|image|>", 305)
        assert tokenizer.padding_side == "left" and tokenizer.pad_token_id == tokenizer.eos_token_id == 300


def test_decoding_adds_no_spaces_around_special_tokens(tokenizer):
    text = "<|user|>a<|image|>b?<|end|><|assistant|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == "ab?"


def test_nothing_is_put_in_front_or_behind(tokenizer):
    assert tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"] == [64]


def test_ids_with_gaps_between_them_are_kept(folder, tmp_path):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["400"] = config["added_tokens_decoder"].pop("305")
    edit_json(folder / "tokenizer_config.json", **config)
    edit_json(folder / "added_tokens.json", **{"<|image|>": 400, "<|spare|>": 350})
    tokenizer = build_tokenizer(folder)
    tokenizer.save_pretrained(tmp_path / "saved")
    for loaded in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert loaded.image_token_id == 400
        assert loaded("a<|image|>b<|spare|><|end|>")["input_ids"] == [64, 400, 65, 350, 302]


def test_without_the_optional_files_the_configuration_suffices(folder):
    (folder / "added_tokens.json").unlink()
    (folder / "special_tokens_map.json").unlink()
    tokenizer = build_tokenizer(folder)
    assert all(tokenizer(case["text"])["input_ids"] == case["slow_gpt2"] for case in FACTS["tokenizer"])


def test_the_map_of_special_tokens_comes_before_the_configuration(folder):
    edit_json(folder / "tokenizer_config.json", eos_token="<|user|>", bos_token="<|user|>")
    edit_json(folder / "special_tokens_map.json", eos_token={"content": "<|end|>"}, bos_token=None)
    tokenizer = build_tokenizer(folder)
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|end|>", "<|user|>")


def test_settings_of_the_configuration_are_kept_and_no_space_is_put_in_front_without_one(folder):
    edit_json(folder / "tokenizer_config.json", model_max_length=77, add_prefix_space=None)
    tokenizer = build_tokenizer(folder)
    assert tokenizer.model_max_length == 77
    assert tokenizer("a")["input_ids"] == [64]
    edit_json(folder / "tokenizer_config.json", add_prefix_space=True)
    assert build_tokenizer(folder)("a")["input_ids"] == tokenizer(" a")["input_ids"]


def test_tokens_only_in_added_tokens_are_special(folder):
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder={})
    tokenizer = build_tokenizer(folder)
    assert tokenizer("a<|end|>b")["input_ids"] == [64, 302, 65]
    assert tokenizer.decode([64, 302, 65], skip_special_tokens=True) == "ab"


def test_missing_image_token_gets_the_first_free_id(folder, caplog):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]["305"]
    edit_json(folder / "tokenizer_config.json", **config)
    edit_json(folder / "added_tokens.json", **{"<|image|>": None})
    tokenizer = build_tokenizer(folder)
    assert tokenizer.image_token_id == 305 and tokenizer("a<|image|>b")["input_ids"] == [64, 305, 65]


def test_incomplete_folder_is_refused_with_all_that_is_missing(folder):
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"vocab\.json, merges\.txt"):
        build_tokenizer(folder)


def test_contradicting_ids_are_refused(folder):
    edit_json(folder / "added_tokens.json", **{"<|end|>": 307})
    with pytest.raises(ValueError, match=r"<\|end\|>.*two ids: 302 and 307"):
        build_tokenizer(folder)
    edit_json(folder / "added_tokens.json", **{"<|end|>": 302, "<|other|>": 302})
    with pytest.raises(ValueError, match=r"id 302 .*two tokens"):
        build_tokenizer(folder)
