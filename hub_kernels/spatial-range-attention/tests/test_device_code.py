# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The CUDA sources without a GPU: compiled as host C++ under an emulation of blocks and threads (tests/emulation) and
compared with autograd in float64, run under ThreadSanitizer, run with barriers left out; and compiled for the GPU,
where no kernel may spill registers."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).resolve().parents[1]
EMULATION = ROOT / "tests" / "emulation"
DEVICE_CODE = ROOT / "spatial_range_attention_cuda"
KERNELS = DEVICE_CODE / "spatial_range_attention.cuh"

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGE_SHARED, SMALL_SHARED = 227 * 1024, 99 * 1024  # per block, of data-centre and of other GPUs

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


# ---- Reference: the definition, neighbour by neighbour, in float64 ----


def neighbors_of(features: torch.Tensor, radius: int) -> torch.Tensor:
    """(B, H, W, C) -> (B, H, W, K, C), reflected at the borders."""
    _, height, width, _ = features.shape
    padded = torch.nn.functional.pad(features.permute(0, 3, 1, 2), (radius,) * 4, mode="reflect").permute(0, 2, 3, 1)
    extent = 2 * radius + 1
    shifted = [padded[:, i : i + height, j : j + width] for i in range(extent) for j in range(extent)]
    return torch.stack(shifted, dim=3)


def reference_weights(guidance: torch.Tensor, sigma: torch.Tensor, radius: int) -> tuple[torch.Tensor, torch.Tensor]:
    similarities = (guidance[:, :, :, None] * neighbors_of(guidance, radius)).sum(-1) / guidance.shape[3] ** 0.5
    range_kernel = similarities.softmax(-1)
    u = torch.linspace(-1, 1, 2 * radius + 1, dtype=torch.float64)
    squared_distances = (u[:, None] ** 2 + u**2).flatten()
    return range_kernel * torch.exp(-squared_distances / (2 * sigma**2)), range_kernel


def reference_aggregate(source: torch.Tensor, weights: torch.Tensor, radius: int) -> torch.Tensor:
    return (weights[..., None] * neighbors_of(source, radius)).sum(3)


# ---- Emulation ----


def compile_emulation(folder: Path, *flags: str) -> Path:
    program = folder / "emulation"
    command = ["g++", "-std=c++20", "-O1", "-pthread", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", *flags]
    command += [f"-I{EMULATION}", f"-I{DEVICE_CODE}", "-o", str(program), str(EMULATION / "main.cpp")]
    subprocess.run(command, check=True, timeout=300)
    return program


@pytest.fixture(scope="session")
def emulation(tmp_path_factory) -> Path:
    return compile_emulation(tmp_path_factory.mktemp("emulation"))


@pytest.fixture(scope="session")
def sanitized_emulation(tmp_path_factory) -> Path:
    return compile_emulation(tmp_path_factory.mktemp("sanitized"), "-fsanitize=thread", "-g1", "-DEMULATION_THREADS")


def write(tensor: torch.Tensor, path: Path) -> None:
    path.write_bytes(
        tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        if tensor.ndim
        else tensor.detach().reshape(1).view(torch.uint8).numpy().tobytes()
    )


def read(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=dtype).reshape(shape).double()


def run(
    program: Path, folder: Path, operator: str, inputs: dict[str, torch.Tensor], features: torch.Tensor, radius: int,
    *, weights_dtype: str = "float32", tf32: bool = False, multiprocessors: int = 1, shared: int = LARGE_SHARED,
    misaligned: bool = False, dropped: int = 0, last_first: bool = False, batch: int | None = None,
) -> subprocess.CompletedProcess:  # fmt: skip
    """With `batch`, the inputs are the last image of a batch of that size, and so are the outputs."""
    for name, tensor in inputs.items():
        write(tensor, folder / f"{name}.bin")
    shape = (batch or features.shape[0], *features.shape[1:])
    arguments = [
        operator,
        str(features.dtype).removeprefix("torch."),
        weights_dtype,
        *shape,
        radius,
        int(tf32),
    ]
    arguments += [multiprocessors, shared, int(misaligned), dropped, int(last_first), int(batch is not None)]
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
    return subprocess.run(
        [str(program), str(folder), *map(str, arguments)],
        capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value expected; NaN where the kernel left or made one."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


class Case:
    """Random inputs of one shape and dtype, and the float64 results for exactly these inputs."""

    def __init__(self, dtype: str, shape: tuple[int, ...], radius: int, weights_dtype: str | None = None):
        torch.manual_seed(0)
        batch, height, width, channels = shape
        self.dtype, self.radius, self.shape = DTYPES[dtype], radius, shape
        self.sums = torch.float64 if dtype == "float64" else torch.float32
        self.weights_dtype = weights_dtype or str(self.sums).removeprefix("torch.")
        self.weights_shape = (batch, height, width, (2 * radius + 1) ** 2)
        # Scaled so that the softmax spreads.
        self.guidance = (torch.randn(shape) * (2 / channels**0.5) ** 0.5).to(self.dtype)
        self.sigma = torch.tensor(0.7, dtype=self.sums)
        self.source, self.grad_out = torch.randn(shape).to(self.dtype), torch.randn(shape).to(self.dtype)
        self.weights = torch.rand(self.weights_shape).to(DTYPES[self.weights_dtype])
        self.grad_weights = torch.randn(self.weights_shape).to(self.sums)

    def errors(self, program: Path, folder: Path, **options) -> dict[str, float]:
        """Relative error of every output of the four operators."""

        def outputs(operator, inputs, features, **names):
            result = run(
                program, folder, operator, inputs, features, self.radius, weights_dtype=self.weights_dtype, **options
            )
            assert result.returncode == 0, result.stderr[-2000:]
            assert result.stdout.split()[4:] == ["recomputed", "0"], "finite sums were not finite on tensor cores"
            return [read(folder / f"{name}.bin", shape, dtype) for name, (shape, dtype) in names.items()]

        guidance = self.guidance.double().requires_grad_()
        sigma = self.sigma.double().requires_grad_()
        weights, range_kernel = reference_weights(guidance, sigma, self.radius)
        grad_guidance, grad_sigma = torch.autograd.grad(weights, (guidance, sigma), self.grad_weights.double())
        source, given = self.source.double().requires_grad_(), self.weights.double().requires_grad_()
        out = reference_aggregate(source, given, self.radius)
        grad_source, grad_given = torch.autograd.grad(out, (source, given), self.grad_out.double())

        neighbors = (self.weights_shape, self.sums)
        actual = outputs(
            "weights_forward", {"guidance": self.guidance, "sigma": self.sigma}, self.guidance,
            weights=neighbors, range_kernel=neighbors,
        )  # fmt: skip
        actual += outputs(
            "weights_backward",
            {
                "grad": self.grad_weights, "guidance": self.guidance, "sigma": self.sigma,
                "range_kernel": range_kernel.to(self.sums),
            },
            self.guidance, grad_guidance=(self.shape, self.dtype), grad_sigma=((), self.sums),
        )  # fmt: skip
        actual += outputs(
            "aggregate", {"source": self.source, "weights": self.weights}, self.source, out=(self.shape, self.dtype)
        )
        actual += outputs(
            "aggregate_backward", {"grad": self.grad_out, "source": self.source, "weights": self.weights}, self.source,
            grad_source=(self.shape, self.dtype), grad_weights=(self.weights_shape, DTYPES[self.weights_dtype]),
        )  # fmt: skip
        names = ("weights", "range_kernel", "grad_guidance", "grad_sigma", "out", "grad_source", "grad_given")
        expected = (weights, range_kernel, grad_guidance, grad_sigma, out, grad_source, grad_given)
        errors = {name: relative_error(a, e.detach()) for name, a, e in zip(names, actual, expected, strict=True)}
        # A sum of terms of both signs: relative to the sum of their magnitudes.
        magnitude = torch.autograd.grad(
            reference_weights(guidance, sigma, self.radius)[0], sigma, self.grad_weights.double().abs()
        )[0]
        errors["grad_sigma"] = (abs(actual[3] - grad_sigma) / magnitude).item()
        return errors


# float32: 22 of 24 bits in each product. Half precisions: exact products, and one rounding where the output is one.
TOLERANCE = {"float64": 2e-14, "float32": 3e-6, "tf32": 2e-3, "bfloat16": 2**-8, "float16": 2**-11}


def check_errors(case: Case, errors: dict[str, float], tf32: bool = False) -> None:
    dtype = str(case.dtype).removeprefix("torch.")
    for name, error in errors.items():
        rounded = name in ("grad_guidance", "out", "grad_source") or (
            name == "grad_given" and case.weights_dtype == dtype
        )
        limit = TOLERANCE["tf32" if tf32 else dtype if rounded or dtype == "float64" else "float32"]
        if name in ("out", "grad_source") and case.weights_dtype == dtype and case.sums != case.dtype:
            limit *= 1.5  # weights that reflection adds up are rounded to that dtype, too
        assert error <= limit, f"{name}: relative error {error:.1e} exceeds {limit:.1e}"


@needs_compiler
@pytest.mark.parametrize("radius", range(1, 7))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_smallest_map_of_each_radius(emulation, tmp_path, dtype, radius):
    """Reflection at all four borders at once."""
    case = Case(dtype, (1, radius + 1, radius + 3, 8), radius)
    check_errors(case, case.errors(emulation, tmp_path))


CASES = {
    "float64": (("float64", (2, 5, 9, 5), 2), {}),
    "float64_largest_radius": (("float64", (1, 7, 8, 3), 6), {}),
    "partial_tiles": (("float32", (2, 9, 13, 36), 3), {}),
    "tf32": (("float32", (1, 9, 13, 40), 3), {"tf32": True}),
    "square_bfloat16": (("bfloat16", (1, 16, 16, 72), 3), {}),
    "split_channels": (("bfloat16", (2, 5, 7, 264), 2), {"multiprocessors": 8}),
    "uneven_splits_float32": (("float32", (1, 9, 9, 140), 1), {"multiprocessors": 12}),
    "weights_in_bfloat16": (("bfloat16", (1, 9, 10, 136), 3, "bfloat16"), {}),
    "weights_in_float16": (("float16", (1, 9, 10, 136), 3, "float16"), {}),
    "unaligned_channels": (("bfloat16", (1, 5, 9, 33), 2), {}),
    "one_channel": (("float32", (1, 5, 9, 1), 2), {}),
    "unaligned_memory": (("float16", (1, 9, 9, 24), 2), {"misaligned": True}),
    "one_stage": (("bfloat16", (1, 10, 6, 200), 5), {"shared": SMALL_SHARED}),
    "plain_kernels": (("bfloat16", (1, 7, 9, 10), 3), {"shared": 0}),
    "radius_six_with_little_shared_memory": (("float16", (1, 7, 9, 72), 6), {"shared": SMALL_SHARED}),
    "last_thread_first": (("bfloat16", (1, 9, 9, 200), 2), {"last_first": True}),
}


@needs_compiler
@pytest.mark.parametrize("arguments, options", CASES.values(), ids=CASES)
def test_agrees_with_float64(emulation, tmp_path, arguments, options):
    case = Case(*arguments)
    check_errors(case, case.errors(emulation, tmp_path, **options), tf32=options.get("tf32", False))


@needs_compiler
def test_plain_kernels_are_the_ones_of_rocm(tmp_path):
    case = Case("float32", (1, 4, 5, 10), 2)
    check_errors(case, case.errors(compile_emulation(tmp_path, "-DUSE_ROCM", "-Wno-unused-parameter"), tmp_path))


@needs_compiler
def test_indices_beyond_two_to_the_31(emulation, tmp_path):
    """The last of four million images: 4·10⁹ channels in all, 2.4·10⁹ weights. The memory is not touched elsewhere."""
    batch = 2**22
    case = Case("bfloat16", (1, 8, 8, 16), 1)
    assert batch * case.weights.numel() > 2**31 and batch * case.source.numel() > 2**31

    def last_image(operator, inputs, name, shape, dtype):
        result = run(emulation, tmp_path, operator, inputs, case.source, 1, batch=batch)
        assert result.returncode == 0, result.stderr
        return read(tmp_path / f"{name}.bin", shape, dtype)

    inputs = {"guidance": case.guidance, "sigma": case.sigma}
    weights = last_image("weights_forward", inputs, "weights", case.weights_shape, case.sums)
    expected, _ = reference_weights(case.guidance.double(), case.sigma.double(), 1)
    assert relative_error(weights, expected) < TOLERANCE["float32"]

    inputs = {"source": case.source, "weights": case.weights}
    out = last_image("aggregate", inputs, "out", case.shape, case.dtype)
    assert relative_error(out, reference_aggregate(case.source.double(), case.weights.double(), 1)) < 2**-8

    given = case.weights.double().requires_grad_()
    reference_aggregate(case.source.double(), given, 1).backward(case.grad_out.double())
    inputs["grad"] = case.grad_out
    grad = last_image("aggregate_backward", inputs, "grad_weights", case.weights_shape, case.sums)
    assert relative_error(grad, given.grad) < TOLERANCE["float32"]


@needs_compiler
def test_plan_follows_the_hardware(emulation, tmp_path):
    case = Case("bfloat16", (1, 10, 6, 264), 5)
    inputs = {"guidance": case.guidance, "sigma": case.sigma}

    def plan(**options):
        return run(emulation, tmp_path, "weights_forward", inputs, case.guidance, 5, **options).stdout.split()[1:4:2]

    assert plan(multiprocessors=132, shared=LARGE_SHARED) == ["5", "3"]  # five chunks of channels
    assert plan(multiprocessors=4, shared=2 * 18**2 * 132) == ["2", "2"]
    assert plan(multiprocessors=1, shared=18**2 * 132) == ["1", "1"]
    assert plan(multiprocessors=132, shared=18**2 * 132 - 1) == ["1", "0"]


@needs_compiler
@pytest.mark.parametrize("scale", [1e-7, 1e6])
def test_float16_sums_take_weights_of_any_magnitude(emulation, tmp_path, scale):
    """As gradients of weights are; the result itself is in the range of float16."""
    case = Case("float16", (1, 9, 9, 24), 2)
    case.source = (torch.randn(case.shape) * min(1 / scale, 1e3)).half()
    case.weights = torch.rand(case.weights_shape) * scale
    case.weights[0, 0] *= 1e-3
    inputs = {"source": case.source, "weights": case.weights}
    result = run(emulation, tmp_path, "aggregate", inputs, case.source, 2)
    assert result.returncode == 0, result.stderr
    actual = read(tmp_path / "out.bin", case.shape, case.dtype)
    expected = reference_aggregate(case.source.double(), case.weights.double(), 2)
    normal = expected.abs() > 2**-13  # above the subnormal numbers of float16
    assert normal.float().mean() > 0.25
    torch.testing.assert_close(actual[normal], expected[normal], rtol=2**-10, atol=0)


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_non_finite_numbers_stay_in_their_neighborhood(emulation, tmp_path, dtype):
    case = Case(dtype, (1, 9, 17, 16), 2)
    case.source[0, 4, 3, 5], case.source[0, 7, 9, 0] = float("nan"), float("inf")
    case.guidance[0, 4, 9, 1] = float("nan")
    case.weights[0, 1, 14, 3] = float("nan")
    inputs = {"source": case.source, "weights": case.weights}
    result = run(emulation, tmp_path, "aggregate", inputs, case.source, 2)
    assert result.returncode == 0 and int(result.stdout.split()[5]) > 0
    out = read(tmp_path / "out.bin", case.shape, case.dtype)
    expected = reference_aggregate(case.source.double(), case.weights.double(), 2)
    assert 0 < expected.isnan().float().mean() < 0.1 and expected.isinf().any()
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2, equal_nan=True)

    inputs = {"guidance": case.guidance, "sigma": case.sigma}
    assert run(emulation, tmp_path, "weights_forward", inputs, case.guidance, 2).returncode == 0
    weights = read(tmp_path / "weights.bin", case.weights_shape, case.sums)
    expected, _ = reference_weights(case.guidance.double(), case.sigma.double(), 2)
    assert 0 < expected.isnan().float().mean() < 0.5
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("sigma", [0.0, 1e-8, -0.7, float("inf"), float("nan")])
def test_limits_of_sigma(emulation, tmp_path, sigma):
    case = Case("float32", (1, 4, 5, 8), 2)
    case.sigma = torch.tensor(sigma)
    inputs = {"guidance": case.guidance, "sigma": case.sigma}
    assert run(emulation, tmp_path, "weights_forward", inputs, case.guidance, 2).returncode == 0
    weights = read(tmp_path / "weights.bin", case.weights_shape, case.sums)
    range_kernel = read(tmp_path / "range_kernel.bin", case.weights_shape, case.sums)
    inputs |= {"grad": case.grad_weights, "range_kernel": range_kernel.float()}
    assert run(emulation, tmp_path, "weights_backward", inputs, case.guidance, 2).returncode == 0
    grad_sigma = read(tmp_path / "grad_sigma.bin", (), case.sums)
    if abs(sigma) < 1e-6:
        centre = torch.zeros(25).double()
        centre[12] = 1
        assert torch.equal(weights, range_kernel * centre) and grad_sigma == 0
    elif sigma == float("inf"):
        assert torch.equal(weights, range_kernel) and grad_sigma == 0
    elif sigma < 0:
        width = torch.tensor(-sigma).double().requires_grad_()
        expected, _ = reference_weights(case.guidance.double(), width, 2)
        (grad,) = torch.autograd.grad(expected, width, case.grad_weights.double())
        torch.testing.assert_close(weights, expected.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(grad_sigma, -grad, rtol=1e-4, atol=1e-6)
    else:
        assert weights.isnan().all() and grad_sigma.isnan()


# ---- Barriers ----

BARRIERS = [
    n for n, line in enumerate(KERNELS.read_text().splitlines(), 1) if re.search(r"__sync(threads|warp)\(\)", line)
]
OUTPUTS = {
    "weights_forward": ("weights", "range_kernel"),
    "weights_backward": ("grad_guidance", "grad_sigma"),
    "aggregate_backward": ("grad_source", "grad_weights"),
}
# Shared memory per block that leaves three stages or one, for radius 1.
SHARED = {
    "three_stages": dict.fromkeys(OUTPUTS, LARGE_SHARED),
    "one_stage": {"weights_forward": 24 * 1024, "weights_backward": 44 * 1024, "aggregate_backward": 24 * 1024},
}


def run_all(program: Path, folder: Path, stages: str, **options) -> tuple[list[subprocess.CompletedProcess], list]:
    """Runs the operators that between them start every kernel, up to the first failure; processes and output bytes."""
    case = Case("float16", (1, 4, 8, 200), 1)  # four chunks: with one stage and with three, the last goes to stage 0
    _, range_kernel = reference_weights(case.guidance.double(), case.sigma.double(), 1)
    inputs = {"guidance": case.guidance, "sigma": case.sigma}
    every_input = {
        "weights_forward": inputs,
        "weights_backward": {**inputs, "grad": case.grad_weights, "range_kernel": range_kernel.float()},
        "aggregate_backward": {"grad": case.grad_out, "source": case.source, "weights": case.weights},
    }
    processes, outputs = [], []
    for operator, names in OUTPUTS.items():
        shared = SHARED[stages][operator]
        process = run(program, folder, operator, every_input[operator], case.source, 1, shared=shared, **options)
        processes.append(process)
        if process.returncode != 0:
            break
        outputs.append([(folder / f"{name}.bin").read_bytes() for name in names])
    return processes, outputs


@pytest.fixture(scope="session")
def undisturbed(emulation, tmp_path_factory) -> dict[str, list]:
    outputs = {}
    for stages in SHARED:
        processes, outputs[stages] = run_all(emulation, tmp_path_factory.mktemp("undisturbed"), stages)
        used = [process.stdout.split()[3] for process in processes]
        assert used == (["3", "3", "3"] if stages == "three_stages" else ["1", "1", "1"])
    return outputs


@needs_compiler
@pytest.mark.parametrize("stages", SHARED)
def test_no_data_race(sanitized_emulation, undisturbed, tmp_path, stages):
    """Also: the results do not depend on the order in which threads run."""
    processes, outputs = run_all(sanitized_emulation, tmp_path, stages)
    assert processes[-1].returncode == 0, processes[-1].stderr[-3000:]
    assert outputs == undisturbed[stages]


@needs_compiler
@pytest.mark.parametrize("line", [*BARRIERS, -1], ids=lambda line: f"line_{line}" if line > 0 else "copy_waits")
def test_a_missing_barrier_is_caught(request, emulation, undisturbed, tmp_path, line):
    """By wrong results under one of two orders of threads, or else by ThreadSanitizer."""
    for stages in SHARED:
        for last_first in (False, True):
            _, outputs = run_all(emulation, tmp_path, stages, dropped=line, last_first=last_first)
            if outputs != undisturbed[stages]:
                return
    sanitized = request.getfixturevalue("sanitized_emulation")
    for stages in SHARED:
        processes, _ = run_all(sanitized, tmp_path, stages, dropped=line)
        if "data race" in processes[-1].stderr:
            return
    pytest.fail(f"{KERNELS.name}:{line} can be left out without anyone noticing")


# ---- Compilation for the GPU ----


def check_compiler_report(report: str, at_least: int) -> None:
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(frames) >= at_least, report[-2000:]
    entries = re.findall(r"Function properties for (\S+)", report)
    spilling = [name for name, frame in zip(entries, frames, strict=True) if frame != ("0", "0", "0")]
    assert not spilling, f"kernels with a stack frame or spilled registers: {spilling}"


@needs_nvcc
def test_kernels_do_not_spill(tmp_path):
    """For compute capability 9.0: the kernels of the usual radius, one of the largest, and those without a radius."""
    dots = [("float", 3, 6), ("float", 3, 3), ("float", 1, 3), ("__half", 1, 3), ("__nv_bfloat16", 1, 3)]
    sums = [("float", "float", 1), ("float", "float", 3), ("__half", "float", 1), ("__half", "__half", 1)]
    sums += [("__nv_bfloat16", "float", 1), ("__nv_bfloat16", "__nv_bfloat16", 1)]
    lines = ['#include "spatial_range_attention.cuh"', "namespace spatial_range_attention::device {"]
    for t, passes, radius in dots:
        lines.append(
            f"template __global__ void neighbor_dot<{t}, {passes}, {radius}>"
            f"(const {t}*, const {t}*, float*, Map, int, int, bool);"
        )
    for t, w, passes in sums:
        lines.append(
            f"template __global__ void neighbor_sum<{t}, {w}, {passes}>"
            f"(const {t}*, const {w}*, {t}*, Map, Fold, float, int, int, bool);"
        )
    lines.append(
        "template __global__ void finish_weights<float>(const float*, const float*, float*, float*, Map, int, float);"
    )
    lines.append(
        "template __global__ void weights_gradient<float>"
        "(const float*, const float*, const float*, float*, float*, Map);"
    )
    (tmp_path / "kernels.cu").write_text("\n".join([*lines, "}", ""]))
    command = ["nvcc", "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", f"-I{DEVICE_CODE}", "-cubin"]
    command += [
        "-gencode",
        "arch=compute_90,code=sm_90",
        "-o",
        str(tmp_path / "kernels.cubin"),
        str(tmp_path / "kernels.cu"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    check_compiler_report(result.stderr, at_least=len(dots) + len(sums) + 2)


@needs_nvcc
@pytest.mark.slow
def test_all_kernels_compile_for_all_architectures(tmp_path):
    include = Path(torch.__file__).parent / "include"
    command = ["nvcc", "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", "--threads", "2", "-c"]
    for number in ("80", "90", "100", "120"):
        command += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA=1", "-Xcompiler", "-fPIC"]
    command += [f"-I{include}", f"-I{include}/torch/csrc/api/include", f"-I{ROOT / 'torch-ext'}"]
    command += ["-o", str(tmp_path / "kernels.o"), str(DEVICE_CODE / "spatial_range_attention_cuda.cu")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr[-3000:]
    check_compiler_report(result.stderr, at_least=4 * 40)
