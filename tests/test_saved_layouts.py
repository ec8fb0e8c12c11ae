# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Folders as earlier versions of the package saved them load into today's classes."""

import json
import math
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from transformers_aurea import AureaConfig, AureaForConditionalGeneration, AureaModel


LAYOUT = FIXTURES / "embedded_layout_0.1"
"""The embedded model as version 0.1 saved it: its files, without code, and `layout.safetensors` for the weights.
That holds the names and shapes of all weights (in its header) and the logits that version 0.1 computed with
`random_weights` for `EXAMPLE`."""

EXAMPLE = {
    "input_ids": torch.tensor([[6, 5, 40, 41, 42, 43], [6, 44, 5, 45, 46, 47]]),
    "pixel_values": torch.linspace(-1, 1, 2 * 2 * 3 * 112 * 112).sin().view(2, 2, 3, 112, 112),
}


def random_weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """The same for the same names and shapes, of the size that keeps activations where they were."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in sorted(shapes.items()):
        width = math.prod(shape[1:]) if len(shape) > 1 else 25
        values = torch.randn(shape, generator=generator) / math.sqrt(width)
        weights[name] = values.abs() + 0.5 if name.endswith("running_var") else values
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(1)
    return weights


@pytest.fixture
def folder(tmp_path) -> Path:
    """A complete folder of version 0.1, with random weights."""
    for file in LAYOUT.iterdir():
        if file.name != "layout.safetensors":
            shutil.copy(file, tmp_path)
    with safe_open(LAYOUT / "layout.safetensors", "pt") as file:
        shapes = json.loads(file.metadata()["shapes"])
    save_file(random_weights(shapes), tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.mark.parametrize("model_class", [AureaForConditionalGeneration, AureaModel])
def test_every_weight_of_the_first_layout_finds_its_place(folder, model_class):
    model, report = model_class.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    weights = load_file(folder / "model.safetensors")
    state = model.state_dict()
    prefix = "" if model_class is AureaForConditionalGeneration else "model."
    assert all(torch.equal(state[name.removeprefix(prefix)], tensor) for name, tensor in weights.items())


def test_a_folder_that_says_fusion_config_is_read_in_silence_and_saved_under_the_new_name(folder, tmp_path):
    written = json.loads((folder / "config.json").read_text())
    assert "feature_fusion_config" not in written
    (folder / "config.json").write_text(json.dumps(written | {"fusion_config": {"radius": 2, "depth": 5}}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        config = AureaConfig.from_pretrained(folder)
        overridden = AureaConfig.from_pretrained(folder, feature_fusion_config={"depth": 1})
    assert (config.feature_fusion_config.radius, config.feature_fusion_config.depth) == (2, 5)
    assert (overridden.feature_fusion_config.radius, overridden.feature_fusion_config.depth) == (2, 1)
    config.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "fusion_config" not in written
    assert written["feature_fusion_config"]["radius"] == 2


@torch.no_grad()
def test_the_first_layout_gives_the_logits_that_it_gave(folder):
    expected = load_file(LAYOUT / "layout.safetensors")["logits"]
    logits = AureaForConditionalGeneration.from_pretrained(folder).eval()(**EXAMPLE).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
