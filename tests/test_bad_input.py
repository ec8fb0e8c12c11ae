# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""One table of what can be given wrongly, to whom, and of the words by which it is refused."""

import re

import numpy as np
import pytest
import torch
from conftest import FIXTURES, IMAGE_TOKEN_ID, random_pixels, tiny_config, tiny_model
from PIL import Image

from transformers_aurea import (
    AureaConfig,
    AureaForConditionalGeneration,
    AureaFusionConfig,
    AureaImageProcessor,
    neighborhood_aggregate,
    published_sampling,
    spatial_range_weights,
)


def picture(value):
    return lambda request: AureaImageProcessor()(value, return_tensors="pt")


def setting(**settings):
    return lambda request: AureaImageProcessor()(Image.new("RGB", (9, 9)), **settings)


def prompt(**arguments):
    return lambda request: request.getfixturevalue("golden_processor")(**arguments)


def chat(*messages):
    return lambda request: request.getfixturevalue("golden_processor").apply_chat_template(list(messages))


def config(**arguments):
    return lambda request: tiny_config(**arguments)


def parts(**arguments):
    return lambda request: AureaConfig(**arguments)


def built(**arguments):
    """A model of these parts, of whatever size: without weights."""

    def call(request):
        with torch.device("meta"):
            return AureaForConditionalGeneration(AureaConfig(**arguments))

    return call


def forward(**change):
    def call(request):
        model = tiny_model()
        input_ids = torch.tensor([[5, IMAGE_TOKEN_ID, 6], [7, 8, 9]])
        inputs = {"input_ids": input_ids, "pixel_values": random_pixels(1, model.config)}
        inputs |= {name: make(inputs) for name, make in change.items()}
        return model(**inputs)

    return call


def generate(**arguments):
    def call(request):
        return tiny_model().generate(input_ids=torch.tensor([[5, IMAGE_TOKEN_ID, 6]]), max_new_tokens=2, **arguments)

    return call


def load(name):
    def call(request):
        folder = request.getfixturevalue("tmp_path")
        (folder / name).write_text("{" if name == "config.json" else "")
        return AureaForConditionalGeneration.from_pretrained(folder)

    return call


def op(function, *arguments):
    return lambda request: function(*arguments)


PICTURE = Image.new("RGB", (9, 9))
VISION = {"model_type": "siglip_vision_model", "image_size": 224, "patch_size": 14}
NO_MATCH = "Image features and image tokens do not match"
WEIGHTS = torch.zeros(1, 5, 6, 9)
SIGMA = torch.tensor(1.0)

BAD_INPUT = {
    # pictures
    "picture is None": (picture(None), "NoneType"),
    "picture is a number": (picture(7), "int: 7"),
    "file does not exist": (picture("no/such.png"), "'no/such.png' cannot be read"),
    "file is no picture": (picture(FIXTURES / "goldens.json"), "goldens.json.* cannot be read"),
    "picture without pixels": (picture(Image.new("RGB", (0, 5))), "width 0, height 5"),
    "five channels": (picture(np.zeros((9, 8, 5), np.uint8)), r"1, 3 or 4 channels.*\(9, 8, 5\)"),
    "one dimension": (picture([np.zeros(5, np.uint8)]), r"\(5,\)"),
    "NaN": (picture(np.full((9, 8, 3), np.nan, np.float32)), "NaN"),
    "values above 255": (picture(np.full((9, 8, 3), 300)), "300"),
    "sides that differ too much": (picture(Image.new("RGB", (60000, 1))), "Crop it first"),
    "size without a width": (setting(size={"height": 5}), "size"),
    "unknown resampling": (setting(spatial_resample=1), "`spatial_resample` must be one of"),
    "mean of two channels": (setting(image_mean=[0.1, 0.2]), "`image_mean`.*got 2"),
    "deviation of zero": (setting(spatial_image_std=[1.0, 0.0, 1.0]), "`spatial_image_std` must not contain 0"),
    # prompts
    "nothing to process": (prompt(), "at least one input"),
    "placeholder without a picture": (prompt(text="<|image|>a"), f"{NO_MATCH}: 0 images for 1"),
    "picture without a placeholder": (prompt(text="a", images=PICTURE), f"{NO_MATCH}: 1 images for 0"),
    "picture in the wrong row": (
        prompt(text=["a", "<|image|>"], images=[[PICTURE], []]),
        "row 0 has 1 images and 0 placeholders",
    ),
    "text is a number": (prompt(text=7), "must be a string, got int: 7"),
    "video": (prompt(text="a", videos=[PICTURE]), "no videos"),
    "unknown role": (chat({"role": "tool", "content": "a"}), "got 'tool'"),
    "video in a conversation": (
        chat({"role": "user", "content": [{"type": "video", "path": "x.mp4"}]}),
        "got 'video'",
    ),
    # configurations
    "Falcon": (built(text_config={"model_type": "falcon"}), "'falcon'.*does not hand keyword arguments on"),
    "Bloom": (built(text_config={"model_type": "bloom"}), "'bloom'.*does not hand keyword arguments on"),
    "Mamba": (
        built(text_config={"model_type": "mamba"}),
        "'mamba'.*does not hand keyword arguments on",
    ),
    "encoder-decoder": (parts(text_config={"model_type": "t5"}), "'t5'.*not a decoder"),
    "masked language model": (built(text_config={"model_type": "bert"}), "'bert'.*not a decoder"),
    "encoder and decoder": (parts(text_config={"model_type": "bart"}), "'bart'.*not a decoder"),
    "unknown language model": (parts(text_config={"model_type": "no_such_model"}), "no_such_model"),
    "configuration is a number": (parts(text_config=3), "text_config"),
    "NaFlex encoder": (parts(vision_config={"model_type": "siglip2_vision_model"}), "NaFlex"),
    "two grids": (
        parts(vision_config=VISION, spatial_vision_image_size=280),
        r"needs one grid.*\(16, 16\).*\(20, 20\)",
    ),
    "view that is no multiple of the patches": (parts(vision_image_size=225), r"\(225, 225\).*\(14, 14\)"),
    "encoder without a size": (parts(vision_config={"model_type": "resnet"}), "resnet.*`vision_image_size`"),
    "grid not larger than the radius": (
        parts(feature_fusion_config={"radius": 16}),
        r"grid of \(16, 16\).*radius.*\(16\)",
    ),
    "radius of zero": (op(lambda: AureaFusionConfig(radius=0)), "radius.*at least 1, got 0"),
    "depth of zero": (op(lambda: AureaFusionConfig(depth=0)), "depth.*at least 1, got 0"),
    "unknown fusion": (op(lambda: AureaFusionConfig(fusion_type="sum")), "fusion_type"),
    "text heads that do not divide": (
        parts(text_config={"model_type": "phi3", "hidden_size": 100, "num_attention_heads": 24}),
        r"(100|24)",
    ),
    "encoder heads that do not divide": (
        parts(vision_config={**VISION, "hidden_size": 50, "num_attention_heads": 4}),
        r"`vision_config.hidden_size` \(50\).*\(4\)",
    ),
    "key/value heads that do not divide": (
        config(cross_attention_num_key_value_heads=3),
        r"`cross_attention_num_heads` \(4\).*\(3\)",
    ),
    "text key/value heads that do not divide": (
        config(text_config={"num_key_value_heads": 3}, cross_attention_num_key_value_heads=2),
        r"`text_config.num_attention_heads` \(4\).*\(3\)",
    ),
    "own heads that do not divide": (
        config(cross_attention_num_heads=3),
        r"\(32\).*`cross_attention_num_heads` \(3\)",
    ),
    "no heads": (config(cross_attention_num_heads=0), r"`cross_attention_num_heads` \(0\)"),
    "width of zero": (config(projector_hidden_size=0), "`projector_hidden_size` must be at least 1, got 0"),
    "picture of size zero": (config(vision_image_size=0), r"\(0, 0\)"),
    "picture of three sides": (config(vision_image_size=[28, 28, 99]), r"\[28, 28, 99\]"),
    "language model with more around it": (parts(text_config={"model_type": "gemma3"}), "Give its `text_config`"),
    "block outside the decoder": (config(cross_attention_layers=[0, 7]), r"from 0 to 3.*\[0, 7\]"),
    "block twice in a place": (config(cross_attention_layers=[1, 1]), r"distinct.*\[1, 1\]"),
    "no block at all": (config(cross_attention_layers=[]), r"got \[\]"),
    "radius is a text": (op(lambda: AureaFusionConfig(radius="wide")), "radius"),
    # the model
    "more pictures than placeholders": (
        forward(pixel_values=lambda inputs: inputs["pixel_values"].repeat(2, 1, 1, 1, 1)),
        f"{NO_MATCH}: 2 pictures for 1 placeholders",
    ),
    "one view only": (forward(pixel_values=lambda inputs: inputs["pixel_values"][:, :1]), r"\(1, 1, 3, 28, 28\)"),
    "pictures of another size": (forward(pixel_values=lambda inputs: inputs["pixel_values"][..., :14]), "28, 14"),
    "pictures without views": (forward(pixel_values=lambda inputs: inputs["pixel_values"][:, 0]), "shape"),
    "pixels and ready-made states": (forward(cross_attention_states=lambda _: torch.zeros(2, 16, 32)), "not both"),
    "no text": (forward(input_ids=lambda _: None), "exactly one of"),
    "ids and embeddings": (forward(inputs_embeds=lambda _: torch.zeros(2, 3, 32)), "exactly one of"),
    "generation with too many pictures": (
        generate(pixel_values=random_pixels(2, tiny_config())),
        f"{NO_MATCH}: 2 pictures for 1 placeholders",
    ),
    "argument that does not exist": (generate(pixel_value=torch.zeros(1)), "pixel_value"),
    # checkpoints (the published ones: see the converter's tests)
    "configuration is no JSON": (load("config.json"), "config.json|JSON"),
    "folder without a model": (load("readme.txt"), "model.safetensors"),
    # the op and sampling
    "map of three dimensions": (op(spatial_range_weights, torch.zeros(5, 6, 4), SIGMA, 1), "guidance"),
    "map as small as the radius": (op(spatial_range_weights, torch.zeros(1, 3, 6, 4), SIGMA, 3), "radius"),
    "radius of zero in the op": (op(spatial_range_weights, torch.zeros(1, 5, 6, 4), SIGMA, 0), "radius"),
    "integers": (op(spatial_range_weights, torch.zeros(1, 5, 6, 4, dtype=torch.long), SIGMA, 1), "int64"),
    "weights of another grid": (
        op(neighborhood_aggregate, torch.zeros(1, 6, 6, 4), WEIGHTS, 1),
        r"\(1, 5, 6, 9\)|\(1, 6, 6",
    ),
    "weights of another radius": (op(neighborhood_aggregate, torch.zeros(1, 5, 6, 4), WEIGHTS, 2), "25|radius"),
    "temperature of zero": (op(lambda: published_sampling(prompt_length=3, temperature=0.0)), "temperature"),
    "prompt of negative length": (op(lambda: published_sampling(prompt_length=-1)), "prompt_length"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_is_refused_by_name(name, request):
    call, message = BAD_INPUT[name]
    with pytest.raises(Exception) as refusal:
        call(request)
    text = str(refusal.value)
    assert re.search(message, text, re.DOTALL), text
    # A named error of ours or of the library, no accident on the way.
    assert not isinstance(refusal.value, (AttributeError, IndexError, KeyError, AssertionError, RuntimeError)), text
