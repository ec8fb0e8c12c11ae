# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Graphs of the whole model: what is traced once serves other texts, other pictures and other numbers of them."""

import pytest
import torch
from conftest import IMAGE_TOKEN_ID, random_pixels, tiny_model
from torch import nn
from torch.export import Dim, export

from transformers_aurea.fusion_aurea import FUSIONS


TEXTS = {
    "one picture each": [[5, 98, 6, 7, 8, 9], [98, 4, 5, 6, 7, 8]],
    "two and none": [[5, 98, 6, 98, 8, 9], [10, 4, 5, 6, 7, 8]],
    "none and two": [[5, 10, 6, 11, 8, 9], [98, 4, 5, 98, 7, 8]],
}


class ImageFeatures(nn.Module):
    """`get_image_features` as a module, as exporters want it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model.get_image_features(pixel_values).pooler_output


class Logits(nn.Module):
    """The model's logits from the named inputs, in their order."""

    def __init__(self, model, *names):
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs):
        return self.model(**dict(zip(self.names, inputs)), use_cache=False).logits


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch.compiler.reset()


@torch.no_grad()
def test_one_full_graph_serves_however_the_pictures_are_spread(model):
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    pixels = random_pixels(2, model.config)
    for name, text in TEXTS.items():
        inputs = {"input_ids": torch.tensor(text), "pixel_values": pixels, "use_cache": False}
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=0, msg=name)
        torch.compiler.set_stance("fail_on_recompile")
    inputs["input_ids"] = torch.tensor([[5, 98, 6, 98, 8, 9], [98, 4, 5, 6, 7, 8]])
    with pytest.raises(RuntimeError, match="assert"):  # three placeholders
        compiled(**inputs)
    torch.compiler.set_stance("default")


@torch.no_grad()
def test_an_exported_forward_serves_other_texts(model):
    module = Logits(model, "input_ids", "pixel_values")
    pixels = random_pixels(2, model.config)
    program = export(module, (torch.tensor(TEXTS["one picture each"]), pixels), strict=False).module()
    for text in TEXTS.values():
        inputs = torch.tensor(text), pixels.flip(0)
        torch.testing.assert_close(program(*inputs), module(*inputs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("fusion_type", FUSIONS)
@torch.no_grad()
def test_exported_image_features_serve_any_number_of_pictures(fusion_type):
    model = tiny_model(feature_fusion_config={"fusion_type": fusion_type, "radius": 1, "depth": 1})
    module = ImageFeatures(model)
    dynamic = ({0: Dim("images", min=1, max=64)},)
    program = export(module, (random_pixels(2, model.config),), dynamic_shapes=dynamic, strict=False).module()
    for num_images in (1, 2, 5):
        pixels = random_pixels(num_images, model.config, seed=num_images)
        torch.testing.assert_close(program(pixels), module(pixels), atol=1e-5, rtol=0)


def run_onnx(module, inputs, dynamic_shapes, others):
    """An ONNX program of the module, made with some inputs, on others, and what the module gives for these."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    program = torch.onnx.export(module, inputs, dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    feeds = {node.name: value.numpy() for node, value in zip(session.get_inputs(), others)}
    return torch.from_numpy(session.run(None, feeds)[0]), module(*others)


@pytest.mark.slow
@torch.no_grad()
def test_the_vision_half_as_onnx_takes_any_number_of_pictures(model):
    pixels = random_pixels(5, model.config)
    actual, expected = run_onnx(ImageFeatures(model), (pixels[:2],), ({0: "images"},), (pixels[2:],))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@torch.no_grad()
def test_the_text_half_as_onnx_reads_visual_tokens(model):
    text = torch.tensor(TEXTS["one picture each"])
    states = model.get_image_features(random_pixels(3, model.config)).pooler_output
    module = Logits(model, "input_ids", "cross_attention_states")
    longer = torch.tensor([[5, IMAGE_TOKEN_ID, 7, 8, 9, 10, 11]])
    shapes = (({0: "batch", 1: "tokens"}, {0: "batch"}),)
    actual, expected = run_onnx(module, (text, states[:2]), shapes, (longer, states[2:]))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
