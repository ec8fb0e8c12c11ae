# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Every causal language model of the installed transformers inside an Aurea: itself, or refused with a reason.

`python tests/test_causal_families.py` writes the table of `docs/language_models.md`.
"""

import copy
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from causal_families import IMPOSSIBLE, TEXT, causal_families, randomise, tiny_text_config
from conftest import TINY_VISION, random_pixels
from transformers import AutoModelForCausalLM, PreTrainedModel

from transformers_aurea import AureaConfig, AureaForConditionalGeneration
from transformers_aurea.configuration_aurea import AureaUnfitLanguageModelError
from transformers_aurea.language_model_aurea import decoder_of, name_in_owner
from transformers_aurea.versions_aurea import CACHE_NAME


PLACEHOLDER = 95  # not among the tokens of TEXT
MODES = {
    "cached": {},
    "uncached": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}
# Fast enough, and different enough, to be tried on every change.
FEW = (
    *("bert", "falcon", "falcon_h1", "gemma2", "llama", "minimax"),
    *("mixtral", "modernbert-decoder", "opt", "phi3", "qwen3_next"),
)


REFUSED = ("falcon",)

TABLE = Path(__file__).resolve().parent.parent / "docs" / "language_models.md"


@cache
def documented_results() -> dict[str, str] | None:
    """What the documentation says of each family in the installed release, None if it has no column for it."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in TABLE.read_text().splitlines()]
    start = next(idx for idx, row in enumerate(rows) if row[0] == "`model_type`")
    if transformers.__version__ not in rows[start]:
        return None
    column = rows[start].index(transformers.__version__)
    return {row[0].strip("`"): row[column] for row in rows[start + 2 :] if len(row) > column}


class Pair(NamedTuple):
    model: AureaForConditionalGeneration
    bare: PreTrainedModel


@cache
def pair(family: str) -> Pair:
    """An Aurea of the family's language model and that language model itself, with equal random weights.

    Raises:
        AureaUnfitLanguageModelError: the family is refused.
    """
    torch.manual_seed(0)
    text_config = tiny_text_config(family)
    bare = randomise(AutoModelForCausalLM.from_config(copy.deepcopy(text_config)).eval())
    config = AureaConfig(
        text_config=text_config.to_dict(),
        **TINY_VISION,
        cross_attention_num_heads=4,
        cross_attention_num_key_value_heads=2,
        cross_attention_head_dim=8,
        image_token_id=PLACEHOLDER,
    )
    model = AureaForConditionalGeneration(config).eval()
    decoder = decoder_of(bare)[0]
    weights = {name_in_owner(name, decoder, "model.language_model"): it for name, it in bare.state_dict().items()}
    keys = model.load_state_dict(weights, strict=False)
    assert not keys.unexpected_keys
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # so that a picture shows
            if "cross_attention_block" in name and parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return Pair(model, bare)


def generate(model: PreTrainedModel, inputs: dict, **settings) -> torch.Tensor:
    settings = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, **settings}
    return model.generate(**inputs, suppress_tokens=[PLACEHOLDER], **settings)


def rows_of(inputs: dict) -> dict:
    """The row without padding alone: not every language model can do without cache what it does with, if padded."""
    return {name: tensor[1:] for name, tensor in inputs.items()}


def with_pictures(model: AureaForConditionalGeneration) -> dict:
    input_ids = TEXT["input_ids"].clone()
    input_ids[0, 4] = input_ids[1, 1] = PLACEHOLDER
    return {**TEXT, "input_ids": input_ids, "pixel_values": random_pixels(2, model.config)}


def modes_of_the_bare_model(bare: PreTrainedModel, inputs: dict) -> dict[str, torch.Tensor]:
    """What it generates in each mode, of those in which it can generate at all."""
    results = {}
    for mode, settings in MODES.items():
        try:
            results[mode] = generate(bare, inputs, **settings)
        except Exception:  # what is not of our making
            continue
    return results


def caches_exactly(bare: PreTrainedModel) -> bool:
    """Whether the bare model computes the same with its cache as without, and generates the same in all its modes."""
    text = {"input_ids": torch.arange(3, 12)[None], "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    cache = bare(text["input_ids"][:, :-1], use_cache=True).get(CACHE_NAME)
    if cache is not None:
        step = bare(text["input_ids"][:, -1:], **{CACHE_NAME: cache}).logits[:, -1]
        if not torch.allclose(step, bare(text["input_ids"]).logits[:, -1], atol=1e-3):
            return False
    tokens = [generate(bare, text, max_new_tokens=24, **MODES[mode]) for mode in modes_of_the_bare_model(bare, text)]
    return all(torch.equal(tokens[0], other) for other in tokens if len(other) == 1)


@torch.no_grad()
def check(family: str) -> str:
    """What became of a family: "equal" or "refused: …" with the reason; AssertionError if it is neither."""
    try:
        model, bare = pair(family)
    except AureaUnfitLanguageModelError as error:
        return f"refused: {error.reason}"
    expected, logits = bare(**TEXT).logits, model(**TEXT).logits
    assert logits.shape == expected.shape
    assert torch.equal(logits, expected), f"logits differ by {(logits - expected).abs().max()}"
    row = rows_of(TEXT)
    of_bare = modes_of_the_bare_model(bare, row)
    for mode, tokens in of_bare.items():
        assert torch.equal(generate(model, row, **MODES[mode]), tokens), f"{mode}: other tokens"
    padded = modes_of_the_bare_model(bare, TEXT)
    for mode, tokens in padded.items():
        assert torch.equal(generate(model, TEXT, **MODES[mode]), tokens), f"{mode}, padded: other tokens"

    seen = with_pictures(model)
    blank = {**seen, "pixel_values": seen["pixel_values"] * 0}
    shown = (model(**seen).logits - model(**blank).logits)[:, -1].abs().amax(-1)
    assert shown.isfinite().all(), "a picture gives no finite logits"
    assert shown.min() > 1e-4, "a picture does not show"
    row = {**rows_of(seen), "pixel_values": seen["pixel_values"][1:]}
    results = {mode: generate(model, row, **MODES[mode]) for mode in of_bare}
    greedy = [mode for mode in ("cached", "uncached", "static", "prompt lookup") if mode in of_bare]
    if caches_exactly(bare):
        for mode in greedy:
            assert torch.equal(results[mode], results[greedy[0]]), f"with a picture {mode} and {greedy[0]} differ"
    return "equal" + ("" if len(of_bare) == len(MODES) else f" ({', '.join(of_bare) or 'forward'})")


class TestFamilies:
    @pytest.mark.parametrize(
        "family", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in causal_families()]
    )
    def test_a_language_model_is_itself_inside_an_aurea_or_refused(self, family):
        if family in IMPOSSIBLE:
            pytest.skip(IMPOSSIBLE[family])
        result = check(family)
        if (documented := documented_results()) is not None:
            assert result == documented[family]
        else:  # a release without a column
            assert result.startswith("refused" if family in REFUSED else "equal")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    for family in sys.argv[1:] or causal_families():
        try:
            result = f"not tried: {IMPOSSIBLE[family]}" if family in IMPOSSIBLE else check(family)
        except Exception as error:
            result = f"FAILED: {type(error).__name__}: {error}".replace("\n", " ")
        print(f"| `{family}` | {result} |", flush=True)
        pair.cache_clear()
