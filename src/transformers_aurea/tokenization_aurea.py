# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The published tokenizer as a `GPT2Tokenizer` that transformers loads, saves and loads again with the same ids.

The original reads `vocab.json` and `merges.txt` with the slow GPT-2 tokenizer, so texts are split by GPT-2's rule. The
published `tokenizer.json` may carry another rule (that of o200k, which keeps "-language" together) and is not read.
"""

import json
from pathlib import Path

from tokenizers.models import BPE
from transformers import AddedToken, GPT2Tokenizer
from transformers.utils import logging

from .processing_aurea import IMAGE_TOKEN


logger = logging.get_logger(__name__)

NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def build_tokenizer(folder: str | Path) -> GPT2Tokenizer:
    """The tokenizer of a published folder, with every id as recorded there, and `<|image|>` as its `image_token`.

    Reads `vocab.json`, `merges.txt`, `tokenizer_config.json` and, where they exist, `added_tokens.json` and
    `special_tokens_map.json`. If `<|image|>` is no token there, it is added under the first free id, with a warning.

    Raises:
        FileNotFoundError: a required file is missing; the message names all that are.
        ValueError: two files give one token different ids.
    """
    folder = Path(folder)
    missing = [name for name in ("vocab.json", "merges.txt", "tokenizer_config.json") if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} has no {', '.join(missing)}: it is no complete published tokenizer")
    config = _read_json(folder / "tokenizer_config.json")
    named = {**config, **_read_json(folder / "special_tokens_map.json")}
    vocab, merges = BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    added_tokens = _read_added_tokens(folder, config)
    if IMAGE_TOKEN not in vocab and IMAGE_TOKEN not in map(str, added_tokens.values()):
        free_id = max([*vocab.values(), *added_tokens]) + 1
        logger.warning(
            f"{IMAGE_TOKEN} is no token of {folder}. It gets the id {free_id}, with which nothing was trained"
        )
        added_tokens[free_id] = AddedToken(IMAGE_TOKEN, special=True)
    for token_id, token in added_tokens.items():
        if vocab.setdefault(str(token), token_id) != token_id:  # in the vocabulary a token keeps its id, gaps or not
            raise ValueError(f"The token {token} of {folder} has two ids: {vocab[str(token)]} and {token_id}")
    return GPT2Tokenizer(
        vocab=vocab,
        merges=merges,
        added_tokens_decoder=added_tokens,
        **{name: _token_text(named[name]) for name in NAMED_TOKENS if named.get(name) is not None},
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        add_prefix_space=config.get("add_prefix_space", False),
        clean_up_tokenization_spaces=False,
        model_max_length=config.get("model_max_length"),
        padding_side="left",  # the side on which a batch can be continued
    )


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _read_added_tokens(folder: Path, config: dict) -> dict[int, AddedToken]:
    """Added tokens by id. `tokenizer_config.json` knows how white space around them is treated; it comes first."""
    tokens = {}
    for token_id, settings in config.get("added_tokens_decoder", {}).items():
        settings = {name: value for name, value in settings.items() if name != "__type"}
        tokens[int(token_id)] = AddedToken(**settings)
    for text, token_id in _read_json(folder / "added_tokens.json").items():
        if tokens.setdefault(token_id, AddedToken(text, special=True)).content != text:
            raise ValueError(f"The id {token_id} of {folder} has two tokens: {tokens[token_id]} and {text}")
    return dict(sorted(tokens.items()))


def _token_text(token: str | dict) -> str:
    return token["content"] if isinstance(token, dict) else token
