# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The shape of the source: what may import what, and how long things get."""

import ast
from pathlib import Path

import pytest

import transformers_aurea


FILES = sorted(Path(transformers_aurea.__file__).parent.glob("*.py"))
# Each may import those before it alone.
ORDER = [
    *("spatial_range_attention", "name_tables", "versions", "weaving", "pictures", "resizing", "image_processing"),
    "model_card",
    *("fusion", "losses", "hub_kernels", "visual_cache", "modeling_outputs"),
    *("fusion_promises", "own_fusion", "configuration", "visual_context"),
    *("auxiliary_losses", "connectors", "cross_attention", "vision_encoder", "composition", "decoding", "projector"),
    *("language_model", "pretrained_model", "parts", "added_encoder", "prefix_trial"),
    *("modeling", "processing"),
]
OF_THE_PACKAGE_ALONE = {"generation", "tokenization", "training", "data"}


def name_of(file: Path) -> str:
    return file.stem.removesuffix("_aurea")


def imported(file: Path) -> set[str]:
    """Names of the package's own files that a file imports, inside functions too."""
    nodes = ast.walk(ast.parse(file.read_text()))
    modules = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level]
    return {module.split(".")[0].removesuffix("_aurea") for module in modules if module}


def test_imports_go_one_way():
    travelling = {name_of(file): file for file in FILES if file.stem.endswith("_aurea")}
    assert travelling.keys() == {*ORDER} | OF_THE_PACKAGE_ALONE
    for place, name in enumerate(ORDER):
        assert imported(travelling[name]) <= {*ORDER[:place]}, name


def functions():
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield f"{file.name}:{node.name}", node.end_lineno - node.lineno + 1


def test_no_function_is_longer_than_sixty_lines():
    assert {name: length for name, length in functions() if length > 60} == {}


@pytest.mark.parametrize(("name", "limit"), [("modeling", 500), ("fusion", 650), ("connectors", 200)])
def test_a_file_stays_short(name, limit):
    [file] = [file for file in FILES if name_of(file) == name]
    assert len(file.read_text().splitlines()) < limit
