# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
import os
import shutil
import subprocess
import sys
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network; one that tries fails at once

import pytest
import torch


ROOT = Path(__file__).resolve().parents[1]
# A machine with a GPU but no CUDA compiler still tests the CPU kernels.
HAS_NVCC = bool(os.environ.get("CUDA_HOME") or shutil.which("nvcc"))
BACKEND = "cuda" if torch.version.cuda and torch.cuda.is_available() and HAS_NVCC else "cpu"


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes or many gigabytes; run with `pytest -m slow`")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "kernels_ci: what kernel-builder runs after a build")


@pytest.fixture(scope="session")
def build_folder(request, tmp_path_factory) -> Path:
    """The folder of variants, built from these sources: again only where they changed since the last run."""
    pytest.importorskip("kernels")
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler")
    cache = getattr(request.config, "cache", None)
    folder = cache.mkdir("spatial-range-attention") if cache else tmp_path_factory.mktemp("build")
    command = [sys.executable, ROOT / "build_local.py", BACKEND, "--out", folder / f"torch-{torch.__version__}"]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
    return command[-1]


@pytest.fixture(scope="session")
def kernel(build_folder):
    """The package as a user of `kernels` gets it."""
    import kernels

    return kernels.get_local_kernel(build_folder, backend=BACKEND)


@pytest.fixture(scope="session")
def ops(kernel):
    """The operators under the functions."""
    return sys.modules[f"{kernel.__name__}._ops"].ops


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    if request.param == "cuda" and BACKEND != "cuda":
        pytest.skip("no CUDA device, or no CUDA compiler")
    return torch.device(request.param)
