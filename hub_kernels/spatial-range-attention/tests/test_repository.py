# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The repository as kernel-builder and `kernels` see it, and what `build_local.py` makes of it."""

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "spatial_range_attention"


@pytest.fixture(scope="module")
def config() -> dict:
    return tomllib.loads((ROOT / "build.toml").read_text())


@pytest.fixture(scope="module")
def build_local():
    spec = importlib.util.spec_from_file_location("build_local", ROOT / "build_local.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def variant(build_folder) -> Path:
    (folder,) = build_folder.iterdir()
    return folder


@pytest.fixture(scope="module")
def metadata(variant) -> dict:
    return json.loads((variant / "metadata.json").read_text())


def python(program: str, *arguments, **environment) -> str:
    """What a program prints, run by a fresh interpreter outside the repository."""
    command = [sys.executable, "-B", "-c", program, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd="/", env=os.environ | environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def build(root: Path, *arguments, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, root / "build_local.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


# ---- build.toml and CARD.md ----------------------------------------------------------------------------------------


def test_build_toml_is_valid():
    rust = pytest.importorskip("kernels._rust")
    if not hasattr(rust, "Build"):  # private, and may go
        pytest.skip("this release of kernels does not validate build.toml")
    backends = rust.Build.open(ROOT).general.backends
    assert [str(backend).split(".")[-1].lower() for backend in backends] == ["cpu", "cuda", "rocm"]


def test_build_toml_is_of_the_stable_abi_on_every_backend(config):
    assert config["general"]["edition"] == 5
    assert config["torch"]["stable-abi"] == dict.fromkeys(config["general"]["backends"], "2.11")


def test_every_source_is_listed(config, build_local):
    """kernel-builder copies only what is listed, and the fingerprint of a local build covers only that."""
    folders = ("torch-ext", f"{PACKAGE}_cpu", f"{PACKAGE}_cuda")
    suffixes = (".h", ".cpp", ".cu", ".cuh")
    found = {p.relative_to(ROOT) for folder in folders for p in (ROOT / folder).iterdir() if p.suffix in suffixes}
    for backend in ("cuda", "rocm"):
        assert set(build_local.sources(backend, config)) == found


def test_cpu_sources_are_part_of_every_variant(config):
    for path in (ROOT / f"{PACKAGE}_cpu").iterdir():
        assert path.relative_to(ROOT).as_posix() in config["torch"]["src"]


def test_card_renders(config):
    """As kernel-builder fills it in, with and without what it may not know."""
    jinja2 = pytest.importorskip("jinja2")
    environment = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((ROOT / "CARD.md").read_text())
    known = {"repo_id": "someone/name", "version": config["general"]["version"], "license": "apache-2.0"}
    full = {"functions": ["spatial_range_weights"], "layers": ["SpatialRangeWeights"], "has_benchmark": True}
    card = template.render(**known, **full, upstream="https://up", source="https://source")
    assert card.startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\n---\n")
    assert 'get_kernel("someone/name", version=1)' in card
    assert all(
        word in card for word in ("- `SpatialRangeWeights`", "kernels benchmark someone/name", "https://source")
    )
    bare = template.render(**known, functions=None, layers=None, has_benchmark=False, upstream=None, source=None)
    assert "{" not in bare and "Available" not in bare and "Upstream" not in bare


# ---- A build -------------------------------------------------------------------------------------------------------


def test_variant_is_chosen_by_kernels(build_folder, variant):
    variants = pytest.importorskip("kernels.variants")
    backend = json.loads((variant / "metadata.json").read_text())["backend"]["type"]
    chosen, trace = variants.resolve_variant(variants.get_variants_local(build_folder), backend)
    assert chosen is not None, variants.variants_trace_str(trace)
    assert chosen.variant_str == variant.name
    assert variant.name.startswith("torch-stable-abi211-")
    assert variant.name.endswith(f"-{platform.machine()}-linux")


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("compute", ["cpu", "cu130"])
def test_variant_names_are_understood(machine, compute):
    variants = pytest.importorskip("kernels.variants")
    name = f"torch-stable-abi211-{compute}-{machine}-linux"
    parsed = variants.parse_variant(name)
    assert parsed.variant_str == name
    assert str(parsed.framework.version) == "2.11"
    assert (parsed.arch.platform, parsed.arch.os) == (machine, "linux")


def test_metadata(metadata, variant, config):
    rust = pytest.importorskip("kernels._rust")
    parsed = rust.Metadata.read_from_file(variant / "metadata.json")
    assert parsed.name.python_name == PACKAGE
    assert (parsed.version, parsed.license) == (config["general"]["version"], "Apache-2.0")
    assert re.fullmatch(rf"_{PACKAGE}_(cpu|cuda)_[0-9a-f]{{12}}", parsed.id)
    assert (variant / f"{parsed.id}.abi3.so").is_file()
    if metadata["backend"]["type"] == "cuda":
        assert parsed.backend.archs == config["kernel"][f"{PACKAGE}_cuda"]["cuda-capabilities"]


def test_digest_covers_every_file(variant, tmp_path):
    rust = pytest.importorskip("kernels._rust")
    copy = shutil.copytree(variant, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    digest = rust.Metadata.read_from_file(copy / "metadata.json").digest
    digest.validate(rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, copy))
    with open(copy / "layers.py", "a") as file:
        file.write("\n")
    with pytest.raises(rust.DigestValidationError):
        digest.validate(rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, copy))


def test_library_needs_nothing_beyond_torch(variant, metadata):
    if not shutil.which("readelf"):
        pytest.skip("no readelf")
    library = variant / f"{metadata['id']}.abi3.so"
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\.so", dynamic))
    assert {"libtorch", "libtorch_cpu"} <= needed
    assert needed <= {
        "libtorch",
        "libtorch_cpu",
        "libcudart",
        "libstdc++",
        "libgcc_s",
        "libm",
        "libc",
        "libpthread",
    } | {
        "ld-linux-x86-64",
        "ld-linux-aarch64",
    }


def test_library_uses_only_the_stable_interface_of_torch(variant, metadata):
    """No C++ symbol of PyTorch, whose names and layouts change from release to release."""
    if not shutil.which("nm"):
        pytest.skip("no nm")
    command = ["nm", "-D", "--undefined-only", variant / f"{metadata['id']}.abi3.so"]
    symbols = re.findall(r" U (\S+)", subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    assert not [symbol for symbol in symbols if re.match(r"_ZNK?(2at|3c10|5torch|8pybind11)", symbol)]
    exported = subprocess.run([*command[:2], "--defined-only", command[3]], capture_output=True, text=True, check=True)
    assert re.findall(r" T (\S+)", exported.stdout) == [f"PyInit_{metadata['id']}"]


def test_loads_in_a_fresh_process_also_under_the_old_layout(build_folder, variant, metadata):
    program = f"""
import sys, torch, kernels
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import {PACKAGE} as old
new = kernels.get_local_kernel(Path(sys.argv[1]), backend=sys.argv[3])
assert old.spatial_range_weights is new.spatial_range_weights
assert old.layers.SpatialRangeWeights is new.layers.SpatialRangeWeights
assert old.__all__ == new.__all__
print(new.spatial_range_weights(torch.ones(1, 2, 2, 1), torch.tensor(float("inf")), 1).sum().item())
"""
    assert float(python(program, build_folder, variant, metadata["backend"]["type"])) == pytest.approx(4)


def test_two_copies_of_a_build_live_in_one_process(build_folder, tmp_path, metadata):
    """As when one test or library loads its own build and another a copy of it."""
    shutil.copytree(build_folder, tmp_path / "copy")
    program = """
import sys, torch, kernels
from pathlib import Path
first, second = (kernels.get_local_kernel(Path(path), backend=sys.argv[3]) for path in sys.argv[1:3])
assert first is not second
features, weights = torch.ones(1, 2, 2, 3), torch.ones(1, 2, 2, 9)
print([kernel.neighborhood_aggregate(features, weights, 1).sum().item() for kernel in (first, second)])
"""
    assert python(program, build_folder, tmp_path / "copy", metadata["backend"]["type"]) == "[108.0, 108.0]"


def test_local_kernels_variable_needs_no_network(build_folder, metadata):
    program = """
import sys, torch, kernels
kernel = kernels.get_kernel("someone/spatial-range-attention", version=1, backend=sys.argv[1])
print(kernel.neighborhood_aggregate(torch.ones(1, 2, 2, 3), torch.ones(1, 2, 2, 9), 1).sum().item())
"""
    environment = {"LOCAL_KERNELS": f"someone/spatial-range-attention={build_folder}", "HF_HUB_OFFLINE": "1"}
    assert python(program, metadata["backend"]["type"], **environment) == "108.0"


# ---- Layers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_layers_are_accepted_in_every_mode(build_folder, metadata, training):
    kernels = pytest.importorskip("kernels")
    if metadata["backend"]["type"] != "cpu" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if torch.version.cuda and metadata["backend"]["type"] == "cpu":
        pytest.skip("this PyTorch loads CUDA variants, and there is no CUDA compiler to build one")

    @kernels.use_kernel_forward_from_hub("SpatialRangeWeights")
    class Weights(nn.Module):
        def forward(self, guidance: torch.Tensor, sigma: torch.Tensor, radius: int) -> torch.Tensor:
            raise AssertionError("not replaced")

    @kernels.use_kernel_forward_from_hub("NeighborhoodAggregate")
    class Aggregate(nn.Module):
        def forward(self, source: torch.Tensor, weights: torch.Tensor, radius: int) -> torch.Tensor:
            raise AssertionError("not replaced")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights, self.aggregate = Weights(), Aggregate()

        def forward(self, features, sigma):
            return self.aggregate(features, self.weights(features, sigma, 1), 1)

    names = ("SpatialRangeWeights", "NeighborhoodAggregate")
    repositories = {name: kernels.LocalLayerRepository(build_folder, layer_name=name) for name in names}
    mapping = {name: {"cpu": repositories[name]} for name in names}
    mode = (kernels.Mode.TRAINING if training else kernels.Mode.INFERENCE) | kernels.Mode.TORCH_COMPILE
    model = Model().train(training)
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        model = kernels.kernelize(model, mode=mode, device="cpu", use_fallback=kernels.KernelizeFallback.NONE)
    features = torch.ones(1, 3, 4, 2, requires_grad=True)
    output = model(features, torch.tensor(float("inf")))
    torch.testing.assert_close(output, torch.ones_like(features))
    output.sum().backward()
    assert features.grad.isfinite().all()


# ---- build_local.py ------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path) -> Path:
    """The sources alone, free to be broken."""
    ignore = shutil.ignore_patterns("build", "tests", "benchmarks", "__pycache__")
    return Path(shutil.copytree(ROOT, tmp_path / "copy", ignore=ignore))


def test_builds_nothing_twice_and_from_anywhere(build_folder, metadata, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    library = next(build_folder.glob("*/*.so"))
    before = library.stat()
    result = build(ROOT, metadata["backend"]["type"], "--out", os.path.relpath(build_folder))
    assert result.returncode == 0, result.stderr
    assert "up to date" in result.stdout
    assert library.stat() == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["*.so", "layers.py", "metadata.json"])
def test_a_damaged_build_is_not_up_to_date(build_folder, metadata, tmp_path, monkeypatch, name):
    monkeypatch.syspath_prepend(str(ROOT))
    import build_local

    folder = shutil.copytree(next(build_folder.glob("torch-*")), tmp_path / "variant")
    assert build_local.is_intact(folder, metadata["id"]) and not build_local.is_intact(folder, "another")
    (path,) = folder.glob(name)
    path.write_bytes(path.read_bytes()[:-10])
    assert not build_local.is_intact(folder, metadata["id"])


def test_broken_source_fails_and_leaves_what_was_there(copy, tmp_path):
    (copy / "torch-ext" / "torch_binding.h").write_text("#error deliberately broken\n")
    out = tmp_path / "out"
    previous = out / f"torch-stable-abi211-cpu-{platform.machine()}-linux"
    previous.mkdir(parents=True)
    (previous / "kept").touch()
    result = build(copy, "cpu", "--out", out)
    assert result.returncode == 1
    assert "error: this command failed" in result.stderr and "deliberately broken" in result.stderr
    assert [path.relative_to(out).as_posix() for path in out.rglob("*")] == [previous.name, f"{previous.name}/kept"]


def test_missing_source_is_named(copy, tmp_path):
    (copy / "torch-ext" / "checks.h").unlink()
    result = build(copy, "cpu", "--out", tmp_path / "out")
    assert result.returncode == 1
    assert "torch-ext/checks.h is listed in build.toml, but does not exist" in result.stderr


def test_missing_cxx_compiler_is_named(tmp_path):
    result = build(ROOT, "cpu", "--out", tmp_path / "out", CXX="no-such-compiler")
    assert result.returncode == 1
    assert re.search(
        r"error: The C\+\+ compiler `no-such-compiler` was not found.*apt-get install g\+\+", result.stderr
    )
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_missing_cuda_compiler_is_named(tmp_path):
    result = build(ROOT, "cuda", "--out", tmp_path / "out", CUDA_HOME=str(tmp_path))
    assert result.returncode == 1
    assert f"error: The CUDA compiler `nvcc` was not found in {tmp_path}/bin" in result.stderr
    assert "CUDA_HOME" in result.stderr and "Traceback" not in result.stderr


def test_old_torch_is_refused(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text('__version__ = "2.10.1+cpu"\n')
    result = build(ROOT, "cpu", "--out", tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert "PyTorch 2.10.1+cpu is too old, the kernel needs 2.11: pip install 'torch>=2.11'" in result.stderr


def test_unwritable_folder_is_an_error_not_a_traceback(tmp_path):
    (tmp_path / "file").touch()
    result = build(ROOT, "cpu", "--out", tmp_path / "file" / "out")
    assert result.returncode == 1
    assert "error: " in result.stderr and "Traceback" not in result.stderr


def test_identity_follows_the_sources(copy, build_local, monkeypatch, tmp_path):
    """One changed byte in any file that matters makes another operator namespace."""
    seen = set()
    monkeypatch.setattr(build_local, "ROOT", copy)

    def stop(*arguments):
        seen.add(arguments[5])
        raise build_local.BuildError("stop here")

    monkeypatch.setattr(build_local, "compile_library", stop)
    changed = ["build.toml", "torch-ext/checks.h", f"{PACKAGE}_cpu/kernels.h", f"torch-ext/{PACKAGE}/layers.py"]
    for name in [None, *changed]:
        if name:
            with open(copy / name, "a") as file:
                file.write("\n")
        for _ in range(2):
            with pytest.raises(build_local.BuildError, match="stop here"):
                build_local.build("cpu", tmp_path / "out", force=False)
    assert len(seen) == 1 + len(changed)


def test_resource_report(build_local):
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5applyIfLi3EEvPKT_' for 'sm_90'
ptxas info    : Function properties for _Z5applyIfLi3EEvPKT_
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 72 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem, 376 bytes cmem[0]
ptxas info    : Compile time = 1.000 ms
ptxas info    : Compiling entry function 'plain' for 'sm_80'
ptxas info    : Function properties for plain
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 360 bytes cmem[0]
"""
    lines = [" ".join(line.split()) for line in build_local.resource_report(log)]
    assert lines[0] == "sm_80 8 registers 0 B shared 0 B stack 0/0 B spilled/reloaded plain"
    assert lines[1].startswith("sm_90 72 registers 1024 B shared 16 B stack 8/4 B spilled/reloaded ")
    assert build_local.resource_report("nothing of interest") == []


def test_architectures_become_compiler_flags(build_local):
    assert build_local.gencode_flags(["9.0", "12.0+PTX"]) == [
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


@pytest.mark.slow
def test_cuda_build_for_every_architecture(build_local, config, tmp_path):
    """Compiled and linked; nothing is run. Six minutes of two cores, as processor time, which nobody else disturbs."""
    import resource

    try:
        build_local.find_nvcc()
    except build_local.BuildError as error:
        pytest.skip(str(error))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = build(ROOT, "cuda", "--out", tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 2 * 360
    for capability in config["kernel"][f"{PACKAGE}_cuda"]["cuda-capabilities"]:
        architecture = "sm_" + capability.removesuffix("+PTX").replace(".", "")
        report = [line for line in result.stdout.splitlines() if line.startswith(architecture)]
        assert report
        assert not [line for line in report if " 0/0 B spilled" not in " ".join(line.split())]
    (variant,) = tmp_path.iterdir()
    assert re.fullmatch(rf"torch-stable-abi211-cu\d+-{platform.machine()}-linux", variant.name)
