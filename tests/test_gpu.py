# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Each fusion and connector on a GPU, compared with the same model on a CPU."""

import copy

import pytest
import torch
from conftest import IMAGE_TOKEN_ID, random_pixels, tiny_model

from transformers_aurea.fusion_aurea import FUSIONS


pytestmark = pytest.mark.gpu
CONNECTORS = [("cross_attention", "causal"), *(("prefix", mask) for mask in ("causal", "pictures", "prompt"))]
CONNECTORS += [("both", "causal"), ("both", "prompt")]
GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}


@pytest.fixture(autouse=True)
def full_precision():
    """Convolutions in TF32, which cuDNN would choose, are off by 1e-2."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(params=FUSIONS)
def fusion(request) -> dict:
    return {"fusion_type": request.param, "radius": 1, "depth": 1}


def connected_model(fusion: dict, connector_type: str, prefix_mask: str = "causal"):
    return tiny_model(feature_fusion_config=fusion, connector_type=connector_type, prefix_mask=prefix_mask)


def mixed_batch(model) -> dict[str, torch.Tensor]:
    """Rows of two pictures, of one and of none, padded on the left."""
    run = [IMAGE_TOKEN_ID] * model.config.placeholders_per_image
    rows = [[5, 6, *run, 7, 8, *run, 9, 10], [11, 12, 13, *run, 14], [20, 21, 22]]
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": random_pixels(3, model.config),
    }


def on_gpu(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in inputs.items()}


@pytest.mark.parametrize("connector", CONNECTORS, ids="-".join)
def test_logits_and_gradients_are_those_of_a_cpu(fusion, connector):
    model = connected_model(fusion, *connector)
    inputs = mixed_batch(model)
    is_word = (inputs["input_ids"] != IMAGE_TOKEN_ID) & (inputs["attention_mask"] == 1)
    inputs["labels"] = torch.where(is_word, inputs["input_ids"], -100)
    inputs["labels"][:, :-2] = -100
    other = copy.deepcopy(model).cuda()
    expected, given = model(**inputs), other(**on_gpu(inputs))
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(given.logits.cpu()[seen], expected.logits[seen], atol=2e-4, rtol=1e-4)
    expected.loss.backward()
    given.loss.backward()
    gradients = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = parameter.grad.abs().max().item()
            gradient = gradients[name].grad.cpu()
            torch.testing.assert_close(gradient, parameter.grad, atol=1e-3 * scale + 1e-7, rtol=1e-3, msg=name)


@pytest.mark.parametrize("connector", CONNECTORS, ids="-".join)
@torch.no_grad()
def test_it_generates_the_same_with_each_cache_and_on_a_cpu(fusion, connector):
    model = connected_model(fusion, *connector)
    inputs = mixed_batch(model)
    expected = model.generate(**inputs, **GREEDY)
    model, inputs = model.cuda(), on_gpu(inputs)
    settings = [{}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}]
    for setting in settings:
        assert model.generate(**inputs, **GREEDY, **setting).tolist() == expected.tolist(), setting


@pytest.mark.parametrize("composition_type", ["cross_attention", "gated_attention", "simple_add"])
def test_a_composition_is_that_of_a_cpu(composition_type):
    settings = {"composition_type": composition_type, "num_composition_layers": 2, "num_attention_heads": 4}
    model = tiny_model(composition_config=settings)
    model.requires_grad_(False)
    model.model.composition.requires_grad_(True)
    other = copy.deepcopy(model).cuda()
    pixel_values = random_pixels(3, model.config)
    expected = model.get_image_features(pixel_values).pooler_output
    given = other.get_image_features(pixel_values.cuda()).pooler_output
    torch.testing.assert_close(given.cpu(), expected, atol=1e-4, rtol=1e-4)
    expected.square().sum().backward()
    given.square().sum().backward()
    gradients = dict(other.model.composition.named_parameters())
    for name, parameter in model.model.composition.named_parameters():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(gradients[name].grad.cpu(), parameter.grad, atol=1e-3 * scale, rtol=1e-3, msg=name)


@pytest.mark.parametrize("connector_type", ["cross_attention", "prefix", "both"])
@torch.no_grad()
def test_a_compiled_static_cache_generates_the_same(connector_type):
    model = connected_model({"fusion_type": "sva", "depth": 1}, connector_type).cuda()
    inputs = on_gpu(mixed_batch(model))
    expected = model.generate(**inputs, **GREEDY)
    assert model.generate(**inputs, **GREEDY, cache_implementation="static").tolist() == expected.tolist()


@pytest.mark.parametrize("connector_type", ["cross_attention", "prefix", "both"])
@torch.no_grad()
def test_bfloat16_with_flash_or_memory_efficient_kernels_is_near(fusion, connector_type):
    model = connected_model(fusion, connector_type)
    inputs = mixed_batch(model)
    expected = model(**inputs).logits
    given = model.to("cuda", torch.bfloat16)(**on_gpu(inputs)).logits.float().cpu()
    seen = inputs["attention_mask"].bool()
    assert (given - expected)[seen].abs().max() <= 0.1 * expected[seen].abs().max()
