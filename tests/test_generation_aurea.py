# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from transformers_aurea.generation_aurea import NEUTRAL_SAMPLING, DynamicTopKLogitsWarper, published_sampling


FIXTURES = Path(__file__).parent / "fixtures"
FACTS = json.loads((FIXTURES / "goldens.json").read_text())


@pytest.fixture(scope="module")
def goldens():
    return load_file(FIXTURES / "goldens.safetensors")


def gumbel_noise(uniform: torch.Tensor) -> torch.Tensor:
    return -torch.log(-torch.log(uniform + 1e-20) + 1e-20)


@pytest.mark.parametrize(
    "name, processors",
    [
        ("penalty_0.8", [RepetitionPenaltyLogitsProcessor(0.8)]),
        ("penalty_1.1", [RepetitionPenaltyLogitsProcessor(1.1)]),
        ("penalty_1.5", [RepetitionPenaltyLogitsProcessor(1.5)]),
        ("top_k_1", [TopKLogitsWarper(1)]),
        ("top_k_5", [TopKLogitsWarper(5)]),
        ("top_k_50", [TopKLogitsWarper(50)]),
        ("top_k_default_frac0.1", [TopKLogitsWarper(32)]),
        ("top_p_0.5", [TopPLogitsWarper(0.5)]),
        ("top_p_0.9", [TopPLogitsWarper(0.9)]),
        ("top_p_0.99", [TopPLogitsWarper(0.99)]),
        ("top_p_tiny_thres_1e-4", [TopPLogitsWarper(1e-4)]),
        ("top_k50_then_top_p0.9", published_sampling(0, temperature=1.0, repetition_penalty=1.0)),
    ],
)
def test_filters_equal_the_recorded_ones(goldens, name, processors):
    scores = goldens["filter/logits"].clone()
    for processor in processors:
        scores = processor(goldens["filter/penalty_tokens"], scores)
    assert torch.equal(scores, goldens[f"filter/{name}"])


def test_temperature_comes_before_the_gumbel_noise(goldens):
    scores = TemperatureLogitsWarper(0.7)(None, goldens["filter/logits"])
    tokens = (scores + gumbel_noise(goldens["filter/uniform_seed99"])).argmax(-1, keepdim=True)
    assert torch.equal(tokens, goldens["filter/gumbel_t0.7_seed99"])


@pytest.mark.parametrize(
    "name, settings",
    [
        ("t0.1", {}),
        ("t0.7", {"temperature": 0.7}),
        ("t1.3", {"temperature": 1.3}),
        (
            "t1.3_dynamic",
            {"temperature": 1.3, "dynamic_top_k": True, "min_top_k": 5, "max_top_k": 40, "max_new_tokens": 12},
        ),
        ("t1.3_top_k", {"temperature": 1.3, "top_k": 32, "top_p": 1.0}),
        ("t1.3_top_p", {"temperature": 1.3, "top_k": 320, "top_p": 0.9}),
    ],
)
def test_recorded_tokens_are_drawn_from_the_recorded_logits(goldens, name, settings):
    """Replays the original's own draws: one uniform tensor per step, the argmax of scores and Gumbel noise."""
    prompt_length = 5
    sampling = published_sampling(prompt_length, **settings)
    # the prompt consists of the very tokens that are to be drawn: it must not be penalised
    expected = goldens[f"gen/sampled_{name}/tokens"]
    input_ids = expected[:, :prompt_length]
    torch.manual_seed(1234)
    for logits in goldens[f"gen/sampled_{name}/step_logits"]:
        scores = sampling(input_ids, logits[None].clone())
        noise = gumbel_noise(torch.zeros_like(scores).uniform_(0, 1))
        input_ids = torch.cat([input_ids, (scores + noise).argmax(-1, keepdim=True)], dim=1)
    assert input_ids[:, prompt_length:].tolist() == expected.tolist() == [FACTS[f"gen/sampled_{name}"]["tokens"]]


@pytest.mark.parametrize("max_new_tokens, min_top_k, max_top_k", [(10, 50, 90), (12, 5, 40), (7, 50, 90)])
def test_dynamic_k_equals_the_recorded_one_at_every_step(max_new_tokens, min_top_k, max_top_k):
    warper = DynamicTopKLogitsWarper(3, max_new_tokens, min_top_k, max_top_k)
    expected = FACTS["dynamic_top_k"][f"n{max_new_tokens}_min{min_top_k}_max{max_top_k}"]
    logits = torch.randn(2, 120, generator=torch.Generator().manual_seed(0))
    kept = [
        warper(torch.zeros(2, 3 + step, dtype=torch.long), logits).isfinite().sum(-1).tolist()
        for step in range(max_new_tokens)
    ]
    assert kept == [[k, k] for k in expected]


def test_dynamic_k_has_the_published_bounds_by_default():
    for warper in (published_sampling(3, dynamic_top_k=True, max_new_tokens=10)[1], DynamicTopKLogitsWarper(3, 10)):
        assert [warper.top_k_at(step) for step in range(10)] == FACTS["dynamic_top_k"]["n10_min50_max90"]


def test_dynamic_k_stays_at_its_minimum_after_the_last_step():
    warper = DynamicTopKLogitsWarper(0, 4, 2, 10)
    assert [warper.top_k_at(step) for step in (3, 4, 5, 1000)] == [4, 2, 2, 2]


def test_dynamic_k_larger_than_the_vocabulary_keeps_everything():
    warper = DynamicTopKLogitsWarper(0, 4, 20, 30)
    assert warper(torch.zeros(1, 0, dtype=torch.long), torch.randn(1, 7)).isfinite().all()


def test_order_is_penalty_filters_temperature():
    names = [type(processor).__name__ for processor in published_sampling(4)]
    assert names == [
        "RepetitionPenaltyLogitsProcessor",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TemperatureLogitsWarper",
    ]
    dynamic = published_sampling(4, repetition_penalty=1.0, temperature=1.0, dynamic_top_k=True, max_new_tokens=5)
    assert [type(processor) for processor in dynamic] == [DynamicTopKLogitsWarper]


@pytest.mark.parametrize("settings", [{}, {"dynamic_top_k": True, "max_new_tokens": 6, "max_top_k": 60}])
def test_generate_applies_these_processors_and_no_others(settings):
    """Even where the model's own generation configuration asks for other sampling."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_positions=64, n_embd=32, n_layer=1, n_head=2, eos_token_id=98))
    model.generation_config.update(temperature=0.3, top_k=3, top_p=0.2, repetition_penalty=2.0, do_sample=False)
    prompt = torch.randint(0, 98, (2, 7))
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        **NEUTRAL_SAMPLING,
        logits_processor=published_sampling(prompt.shape[1], **settings),
        max_new_tokens=6,
        pad_token_id=98,
        output_logits=True,
        output_scores=True,
        return_dict_in_generate=True,
    )
    for step, (logits, scores) in enumerate(zip(output.logits, output.scores)):
        expected = published_sampling(7, **settings)(output.sequences[:, : 7 + step], logits.clone())
        assert torch.equal(scores, expected)


BAD_ARGUMENTS = {
    "negative prompt": ({"prompt_length": -1}, "`prompt_length` must be an integer of at least 0, got -1"),
    "prompt as tensor": ({"prompt_length": torch.tensor(3)}, "`prompt_length`"),
    "temperature zero": ({"temperature": 0}, "`temperature` must be a positive number, got 0"),
    "temperature infinite": ({"temperature": float("inf")}, "`temperature` must be a positive number, got inf"),
    "temperature text": ({"temperature": "0.1"}, "`temperature`.*'0.1'"),
    "penalty negative": ({"repetition_penalty": -1.0}, "`repetition_penalty`.*-1.0"),
    "penalty not a number": ({"repetition_penalty": float("nan")}, "`repetition_penalty`.*nan"),
    "k zero": ({"top_k": 0}, "`top_k` must be an integer of at least 1, got 0"),
    "k fraction": ({"top_k": 0.1}, "`top_k`.*0.1"),
    "p zero": ({"top_p": 0}, "`top_p`.*got 0"),
    "p above one": ({"top_p": 1.1}, "`top_p`.*1.1"),
    "dynamic without length": ({"dynamic_top_k": True}, "`max_new_tokens`"),
    "dynamic with no length": ({"dynamic_top_k": True, "max_new_tokens": 0}, "`max_new_tokens`.*got 0"),
    "dynamic k zero": ({"dynamic_top_k": True, "max_new_tokens": 5, "min_top_k": 0}, "`min_top_k`.*got 0"),
    "bounds swapped": (
        {"dynamic_top_k": True, "max_new_tokens": 5, "min_top_k": 9, "max_top_k": 8},
        "`max_top_k` must be an integer of at least 9, got 8",
    ),
}


@pytest.mark.parametrize("arguments, message", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        published_sampling(**{"prompt_length": 4, **arguments})


def test_prompt_length_beyond_the_ids_is_refused():
    with pytest.raises(ValueError, match="`prompt_length` is 9, but `input_ids` have only 4 tokens"):
        DynamicTopKLogitsWarper(9, 5)(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 99))
