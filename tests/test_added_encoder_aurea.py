# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""A second encoder for models that have one: relatives as they come from the converter, and Aureas of one encoder."""

import numpy as np
import pytest
import torch
from conftest import random_pixels, run_without_package, tiny_model
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from test_convert_relatives import IMAGE_TOKEN, make_llava, make_paligemma, picture, randomised
from transformers import Dinov2Config, Dinov2Model

from transformers_aurea import AureaForConditionalGeneration, AureaImageProcessor, AureaProcessor, set_trainable
from transformers_aurea.convert_relatives import main
from transformers_aurea.training_aurea import LORA_TARGETS, lora_targets


COMPOSITION = {"num_composition_layers": 2, "num_attention_heads": 2}
STARTS = {
    "concat": {},
    "residual": {"feature_fusion_config": {"fusion_type": "residual"}},
    "cross_attention": {"feature_fusion_config": {"fusion_type": "cross_attention", "depth": 2}},
    "composition": {"composition_config": COMPOSITION},
    "composition and concat": {
        "composition_config": COMPOSITION,
        "feature_fusion_config": {"fusion_type": "concat"},
    },
}
RELATIVES = {
    "paligemma2": (make_paligemma, {"text_type": "gemma2", "sliding_window": 8}),
    "llava of two layers": (make_llava, {"vision_feature_layer": [-2, 1]}),
}
TEXTS = [f"{IMAGE_TOKEN}what is it?", f"{IMAGE_TOKEN}and {IMAGE_TOKEN} here"]
PICTURES = [picture(0), picture(1, (28, 61)), picture(2, (31, 28))]


def make_encoder(**settings) -> Dinov2Model:
    sizes = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "patch_size": 5, "image_size": 30}
    return randomised(Dinov2Model(Dinov2Config(**sizes | settings)))


@pytest.fixture(scope="module", params=RELATIVES)
def relative(request, tmp_path_factory):
    """The folder of an Aurea that was another model."""
    make, settings = RELATIVES[request.param]
    folder = tmp_path_factory.mktemp("relative")
    make(folder / "original", **settings)
    assert main(["--input_dir", str(folder / "original"), "--output_dir", str(folder / "aurea")]) == 0
    return folder / "aurea"


def load(folder):
    return AureaForConditionalGeneration.from_pretrained(folder).eval()


def two_views(inputs, model, pixels: torch.Tensor):
    """Inputs with the first view as it is, and noise for the second."""
    generator = torch.Generator().manual_seed(1)
    canvas = torch.randn(len(pixels), 2, 3, *model.config.canvas, generator=generator)
    canvas[:, 0, :, : pixels.shape[-2], : pixels.shape[-1]] = pixels[:, 0]
    return {**inputs, "pixel_values": canvas}


@pytest.mark.parametrize("start", STARTS)
def test_a_relative_stays_itself_until_it_is_trained(relative, start, tmp_path):
    model, processor = load(relative), AureaProcessor.from_pretrained(relative)
    inputs = dict(processor(text=TEXTS, images=PICTURES, padding=True, return_tensors="pt"))
    settings = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    before, tokens = model(**inputs).logits, model.generate(**inputs, **settings)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    model.add_encoder(make_encoder(), **STARTS[start])
    inputs = two_views(inputs, model, inputs["pixel_values"])
    assert torch.equal(model(**inputs).logits, before)
    assert torch.equal(model.generate(**inputs, **settings), tokens)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())

    model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)(**inputs).logits, before)

    optimizer = torch.optim.SGD(model.train().parameters(), 1e-2)
    for _ in range(2):  # zeros let no gradient past them
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    joint = [model.model.fusion, model.model.composition]
    gradients = {name: one.grad for part in joint if part for name, one in part.named_parameters()}
    assert [name for name, gradient in gradients.items() if not gradient.any()] == []
    assert model.model.spatial_vision_model.embeddings.cls_token.grad.any()
    other = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    other["pixel_values"][:, 1] = 0
    assert not torch.equal(model.eval()(**inputs).logits, model(**other).logits)


def test_it_loads_without_the_package(tmp_path):
    model = tiny_model(feature_fusion_config={"fusion_type": "none"})
    model.add_encoder(make_encoder(), **STARTS["residual"])
    model.save_pretrained(tmp_path / "model")
    script = """
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained("model", trust_remote_code=True)
assert type(model.model.fusion).__name__ == "AureaResidualFusion" and model.model.spatial_vision_model is not None
"""
    run_without_package(script, tmp_path)


@pytest.mark.parametrize("preset", LORA_TARGETS)
def test_adapters_find_what_is_new(relative, preset):
    from peft import LoraConfig, get_peft_model

    model, processor = load(relative), AureaProcessor.from_pretrained(relative)
    model.add_encoder(
        make_encoder(), composition_config=COMPOSITION, feature_fusion_config={"fusion_type": "residual"}
    )
    inputs = dict(processor(text=TEXTS, images=PICTURES, padding=True, return_tensors="pt"))
    inputs = two_views(inputs, model, inputs["pixel_values"])
    before = model(**inputs).logits
    try:
        targets = lora_targets(model, preset)
    except ValueError:  # of blocks that a prefix does without
        assert preset == "cross_attention"
        return
    peft_model = get_peft_model(model, LoraConfig(target_modules=targets, r=2))
    assert torch.equal(peft_model(**inputs).logits, before)
    optimizer = torch.optim.SGD([one for one in peft_model.parameters() if one.requires_grad], 1.0)
    for _ in range(2):
        optimizer.zero_grad()
        peft_model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    assert not torch.equal(peft_model(**inputs).logits, before)


@pytest.mark.parametrize("output_dim", [None, 40])
@pytest.mark.parametrize("fusion_type", ["concat", "residual", "cross_attention"])
@pytest.mark.parametrize(("encoder", "other"), [("vision", "spatial_vision"), ("spatial_vision", "vision")])
def test_an_aurea_of_either_encoder(encoder, other, fusion_type, output_dim):
    single = {"fusion_type": "none", "encoder": encoder, "output_dim": output_dim}
    model, donor = tiny_model(feature_fusion_config=single), tiny_model()
    for norm in (module for module in model.model.fusion.modules() if isinstance(module, torch.nn.LayerNorm)):
        torch.nn.init.normal_(norm.weight)
    inputs = {"input_ids": torch.tensor([[98, 5, 6], [7, 98, 8]]), "pixel_values": random_pixels(2, donor.config)}
    inputs["pixel_values"][:, 1 - model.config.views[f"{encoder}_config"].index] = 0
    before = model(**inputs).logits
    added = {
        "encoder": donor.get_submodule(f"model.{other}_model"),
        "feature_fusion_config": {"fusion_type": fusion_type},
    }
    if fusion_type == "cross_attention" and encoder == "spatial_vision":
        with pytest.raises(ValueError, match="spatial encoder answers in 'cross_attention'"):
            model.add_encoder(**added)
        return
    model.add_encoder(**added)
    assert torch.equal(model(**inputs).logits, before)
    assert model.config.feature_fusion_config.norm_features is (output_dim is not None)
    given, taken = (one.get_submodule(f"model.{other}_model").state_dict() for one in (donor, model))
    assert all(torch.equal(given[name], tensor) for name, tensor in taken.items())


@pytest.mark.parametrize("fusion_type", ["spatial_range", "sva", "interleave"])
class TestOutputsThatMayChange:
    def test_are_refused_by_name_unless_allowed(self, fusion_type):
        model = tiny_model(feature_fusion_config={"fusion_type": "none"})
        with pytest.raises(ValueError, match=f"'{fusion_type}' cannot begin as one encoder alone.*'residual'"):
            model.add_encoder(make_encoder(), feature_fusion_config={"fusion_type": fusion_type})
        assert model.model.spatial_vision_model is None and len(model.config.encoder_configs) == 1

    @pytest.mark.parametrize("connector_type", ["cross_attention", "prefix"])
    def test_the_projector_and_placeholders_follow(self, fusion_type, connector_type, tmp_path):
        settings = {"fusion_type": fusion_type, "radius": 1}
        model = tiny_model(feature_fusion_config={"fusion_type": "none"}, connector_type=connector_type)
        model.add_encoder(make_encoder(), feature_fusion_config=settings, keep_outputs=False)
        number = model.config.placeholders_per_image
        assert number == (1 if connector_type == "cross_attention" else model.model.fusion.num_tokens)
        inputs = {"input_ids": torch.tensor([[98] * number + [5, 6]]), "pixel_values": random_pixels(1, model.config)}
        logits = model(**inputs).logits
        model.save_pretrained(tmp_path)
        assert torch.equal(load(tmp_path)(**inputs).logits, logits)


@pytest.mark.parametrize(
    ("single", "arguments", "message"),
    [
        ({}, {}, "has two encoders already"),
        ({"fusion_type": "none"}, {"feature_fusion_config": {"fusion_type": "none"}}, "would not be there"),
        ({"fusion_type": "none"}, {"radius": 2}, r"no argument \['radius'\]"),
        ({"fusion_type": "none"}, {"image_size": 35}, r"'concat' needs one grid.*\(7, 7\)"),
        (
            {"fusion_type": "none"},
            {"feature_fusion_config": {"fusion_type": "concat", "norm_features": True}},
            "norm_features` must be False",
        ),
        (
            {"fusion_type": "none"},
            {"feature_fusion_config": {"fusion_type": "residual", "encoder": "spatial_vision"}},
            "must name the encoder that was there before",
        ),
        (
            {"fusion_type": "none", "encoder": "spatial_vision"},
            {"composition_config": COMPOSITION},
            "'none' reads the spatial encoder alone",
        ),
    ],
)
def test_what_does_not_fit_leaves_the_model_as_it_was(single, arguments, message):
    model = tiny_model(feature_fusion_config=single)
    inputs = {"input_ids": torch.tensor([[98, 5, 6]]), "pixel_values": random_pixels(1, tiny_model().config)}
    before, config = model(**inputs).logits, model.config.to_dict()
    with pytest.raises((TypeError, ValueError, StrictDataclassError), match=message):
        model.add_encoder(make_encoder(), **arguments)
    assert model.config.to_dict() == config
    assert torch.equal(model(**inputs).logits, before)


def test_it_takes_the_models_place_and_precision():
    model = tiny_model(feature_fusion_config={"fusion_type": "none"}).to(torch.bfloat16)
    model.model.vision_model.float()
    model.train().add_encoder(make_encoder(), feature_fusion_config={"fusion_type": "residual"})
    assert {one.dtype for one in model.model.spatial_vision_model.parameters()} == {torch.float32}
    assert {one.dtype for one in model.model.fusion.parameters()} == {torch.bfloat16}
    assert model.model.spatial_vision_model.training and model.model.fusion.training
    evaluated = tiny_model(feature_fusion_config={"fusion_type": "none"})
    evaluated.add_encoder(make_encoder())
    assert not evaluated.model.spatial_vision_model.training and not evaluated.model.fusion.training
    assert "Dinov2Layer" in model._no_split_modules
    report = set_trainable(model, ["fusion"])
    assert report.trainable == sum(one.numel() for one in model.model.fusion.parameters())


class TestProcessor:
    def test_a_relatives_processor_makes_the_second_view(self, relative, tmp_path):
        model, processor = load(relative), AureaProcessor.from_pretrained(relative)
        before = processor(text=TEXTS, images=PICTURES, padding=True, return_tensors="pt")
        model.add_encoder(encoder := make_encoder())
        with pytest.raises(ValueError, match=r"1 views for a model of 1"):
            processor.add_encoder(encoder, load(relative).config)
        processor.add_encoder(encoder, model.config)
        processor.save_pretrained(tmp_path)
        after = AureaProcessor.from_pretrained(tmp_path)(
            text=TEXTS, images=PICTURES, padding=True, return_tensors="pt"
        )
        assert before["input_ids"].tolist() == after["input_ids"].tolist()
        assert after["pixel_values"].shape == (3, 2, 3, 28, 28)
        first, second = after["pixel_values"].unbind(1)
        assert isinstance(processor.image_processor, AureaImageProcessor)
        assert torch.equal(first, before["pixel_values"][:, 0])
        assert second[:, :, :20, :20].abs().mean() > 0.1 and not second[:, :, 20:].any()
        with pytest.raises(ValueError, match="2 views"):
            processor.add_encoder(encoder, model.config)

    def test_both_views_show_the_same_part(self, tmp_path):
        """Of a wide picture the first view crops the dark sides, and so does the second."""
        make_llava(tmp_path / "original")
        assert main(["--input_dir", str(tmp_path / "original"), "--output_dir", str(tmp_path / "aurea")]) == 0
        model, processor = load(tmp_path / "aurea"), AureaProcessor.from_pretrained(tmp_path / "aurea")
        model.add_encoder(encoder := make_encoder())
        processor.add_encoder(encoder, model.config)
        wide = np.zeros((84, 168, 3), dtype=np.uint8)
        wide[:, 42:126] = 255
        pixels = processor(images=Image.fromarray(wide), return_tensors="pt")["pixel_values"]
        white = [float(pixels[0, view, 0, 10, 10]) for view in range(2)]
        assert (pixels[0, 0, 0] == white[0]).float().mean() > 0.9
        assert (pixels[0, 1, 0, :20, :20] == white[1]).float().mean() > 0.85
