# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network; one that tries fails at once
os.environ.setdefault("OMP_NUM_THREADS", "1")  # these models are too small to be worth sharing out

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from transformers_aurea import AureaConfig, AureaForConditionalGeneration, AureaProcessor
from transformers_aurea.convert_aurea_weights_to_hf import main as convert


FIXTURES = Path(__file__).parent / "fixtures"
collect_ignore = ["common"]  # needs a network: `make common`

# Sizes small enough for seconds on a CPU, and no two of them equal by accident.
TINY_TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IMAGE_TOKEN_ID = 98


_SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
TINY_VISION = {
    "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 24, **_SMALL},
    "spatial_vision_config": {"model_type": "dinov2_with_registers", "hidden_size": 12, "mlp_ratio": 2, **_SMALL},
    "feature_fusion_config": {"radius": 1, "depth": 1},
}


def tiny_config(text_config: dict | None = None, **kwargs) -> AureaConfig:
    """Two encoders with a grid of 4×4, fused at radius 1, and a decoder of three layers."""
    return AureaConfig(
        text_config={"model_type": "phi3", **TINY_TEXT, **(text_config or {})},
        **{**TINY_VISION, "image_token_id": IMAGE_TOKEN_ID, **kwargs},
    )


def fusion_config(semantic_dim: int, spatial_dim: int, grid=(8, 8), spatial_grid=None, **settings) -> AureaConfig:
    """Encoders of these widths and grids, and a fusion of these settings."""
    spatial_grid = grid if spatial_grid is None else spatial_grid
    vision, spatial = TINY_VISION["vision_config"], TINY_VISION["spatial_vision_config"]
    return tiny_config(
        vision_config={**vision, "hidden_size": semantic_dim},
        spatial_vision_config={**spatial, "hidden_size": spatial_dim},
        vision_image_size=[7 * side for side in grid],
        spatial_vision_image_size=[7 * side for side in spatial_grid],
        feature_fusion_config={"depth": 1, "radius": 1, **settings},
    )


def tiny_model(text_config: dict | None = None, seed: int = 0, **kwargs) -> AureaForConditionalGeneration:
    torch.manual_seed(seed)
    model = AureaForConditionalGeneration(tiny_config(text_config, **kwargs)).eval()
    # The default initialisation is so small that a picture hardly shows in the logits.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "vision_model" not in name:
                parameter.mul_(5)
    return model


def random_pixels(num_images: int, config: AureaConfig, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    height, width = (max(sides) for sides in zip(*config.view_sizes))
    return torch.randn(num_images, 2, 3, height, width, generator=generator)


# Stands for a machine on which this package was never installed, also where it is (CI installs it as editable).
WITHOUT_PACKAGE = """
import importlib.abc, json, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers_aurea":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Blocker())
try:
    import transformers_aurea
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("the package can be imported")
"""


def run_without_package(script: str, folder: Path, *arguments) -> None:
    """Runs a script in a fresh process, offline, in `folder`, where this package cannot be imported."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "home"),
        "HF_MODULES_CACHE": str(folder / "modules"),
    }
    command = [sys.executable, "-c", WITHOUT_PACKAGE + script, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def some(cases, are_enough) -> list:
    """Cases for `parametrize`, of which those that tell nothing that others do not are left to `pytest -m slow`."""
    return [pytest.param(*case, marks=() if are_enough(*case) else pytest.mark.slow) for case in cases]


# Forks of a process that has done nothing but import what takes ten seconds: as good as new ones.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "transformers.trainer", "transformers_aurea.convert_aurea_weights_to_hf"])


def become(environment: dict[str, str], output: list[Path], folder: Path, function, *arguments) -> None:
    """In a process of `FORKS`: calls a function in a folder; standard output and error are added to two files.

    An error ends the process as it would a script.
    """
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    os.chdir(folder)
    for number, file in enumerate(output, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    try:
        function(*arguments)
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def run_script(path: str | Path, arguments: list[str]) -> None:
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(str(path), run_name="__main__")


@pytest.fixture(scope="session")
def goldens() -> dict[str, torch.Tensor]:
    """Tensors recorded from the original code on the tiny published checkpoint, in fp32."""
    return load_file(FIXTURES / "goldens.safetensors")


@pytest.fixture(scope="session")
def facts() -> dict:
    """Strings, token ids and settings recorded with them."""
    return json.loads((FIXTURES / "goldens.json").read_text())


@pytest.fixture(scope="session")
def converted(tmp_path_factory) -> Path:
    """The tiny published checkpoint, converted in fp32."""
    folder = tmp_path_factory.mktemp("converted") / "aurea"
    arguments = ["--input_dir", str(FIXTURES / "published"), "--config", str(FIXTURES / "tiny_config.json")]
    assert convert([*arguments, "--output_dir", str(folder), "--dtype", "float32"]) == 0
    return folder


@pytest.fixture(scope="session")
def golden_model(converted) -> AureaForConditionalGeneration:
    return AureaForConditionalGeneration.from_pretrained(converted, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def golden_processor(converted) -> AureaProcessor:
    return AureaProcessor.from_pretrained(converted)


@pytest.fixture(scope="session")
def pictures() -> dict[str, Image.Image]:
    return {name: Image.open(FIXTURES / f"image_{name}.png") for name in ("rgb", "rgba", "wide")}


@pytest.fixture
def uploads(monkeypatch):
    """What would be uploaded, by path in the repository."""
    import huggingface_hub

    files = {}

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            files[operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()

    def create_repo(self, repo_id, **kwargs):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "file_exists", lambda self, repo_id, filename, **_: filename in files)

    load_from_disk = huggingface_hub.ModelCard.load

    def load(source, **kwargs):
        if Path(source).is_file():
            return load_from_disk(source)
        if "README.md" not in files:
            raise huggingface_hub.errors.EntryNotFoundError(source)
        return huggingface_hub.ModelCard(files["README.md"].decode())

    monkeypatch.setattr(huggingface_hub.ModelCard, "load", staticmethod(load))
    return files
