# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The operators against the formula in float64, written with reflection padding and gathered neighbourhoods.

How close: at most twice as far from the float64 result as the same formula evaluated by PyTorch in the dtype of the
inputs (float32 sums; for `neighborhood_aggregate` with the weights rounded to the dtype of the source, as a matrix
product takes them). Distances are Frobenius norms; no single element may be off by more than four times the worst of
PyTorch's. The inputs are scaled so that the similarities stay moderate and the softmax is not one-hot.
"""

import gc
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode


pytestmark = pytest.mark.kernels_ci

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# batch, height, width, channels, radius
SHAPES = [
    (1, 5, 7, 17, 2),
    (2, 4, 4, 3, 3),
    (1, 2, 2, 1, 1),
    (3, 6, 9, 64, 1),
    (1, 6, 70, 100, 5),
    (1, 70, 6, 3, 4),
    (1, 7, 7, 33, 6),
    (1, 19, 23, 8, 6),
    (2, 33, 35, 5, 3),
    (1, 16, 16, 64, 3),
    (1, 16, 16, 1536, 3),
    (0, 5, 7, 17, 2),
]


def shape_id(shape) -> str:
    return "B{}-{}x{}-C{}-r{}".format(*shape)


# ---- The formula ---------------------------------------------------------------------------------------------------


def gather_neighbors(features: torch.Tensor, radius: int) -> torch.Tensor:
    """(B, H, W, C) → (B, H, W, K, C), rows of the window first, reflected without repeating the border."""
    extent = 2 * radius + 1
    padded = F.pad(features.permute(0, 3, 1, 2), [radius] * 4, mode="reflect")
    windows = padded.unfold(2, extent, 1).unfold(3, extent, 1)  # (B, C, H, W, d, d)
    return windows.permute(0, 2, 3, 4, 5, 1).flatten(3, 4)


def reference_weights(guidance: torch.Tensor, sigma: torch.Tensor, radius: int) -> torch.Tensor:
    dtype = torch.promote_types(guidance.dtype, torch.float32)
    guidance, sigma = guidance.to(dtype), sigma.to(dtype)
    similarities = (gather_neighbors(guidance, radius) @ guidance[..., None])[..., 0] / guidance.shape[3] ** 0.5
    u = torch.linspace(-1, 1, 2 * radius + 1, dtype=dtype, device=guidance.device)
    distances = (u[:, None] ** 2 + u**2).flatten()
    return similarities.softmax(-1) * torch.exp(-distances / (2 * sigma**2))


def reference_aggregate(source: torch.Tensor, weights: torch.Tensor, radius: int) -> torch.Tensor:
    dtype = torch.promote_types(source.dtype, torch.float32)
    weights = weights.to(dtype)
    if dtype != source.dtype:  # rounded, but the gradient passes
        weights = weights + (weights.to(source.dtype).to(dtype) - weights).detach()
    return (weights[..., None, :] @ gather_neighbors(source.to(dtype), radius))[..., 0, :].to(source.dtype)


# ---- Comparison ----------------------------------------------------------------------------------------------------


def make_features(shape, dtype, device, seed=0) -> torch.Tensor:
    batch, height, width, channels, _ = shape
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, height, width, channels, generator=generator, dtype=torch.float64)
    return (features * (2 / channels**0.5) ** 0.5).to(device, dtype)


def make_weights(shape, dtype, device, seed=1) -> torch.Tensor:
    batch, height, width, _, radius = shape
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(batch, height, width, (2 * radius + 1) ** 2, generator=generator, dtype=torch.float64)
    return weights.softmax(-1).to(device, dtype)


def run(function, inputs, radius, grad):
    """The result of a function and its gradients for each input."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*inputs, radius)
    grads = torch.autograd.grad(output, inputs, grad.to(output))
    return [output.detach(), *grads]


def assert_close_enough(actual, yardstick, exact):
    assert actual.dtype == yardstick.dtype
    assert actual.shape == exact.shape
    error, allowed = (actual.double() - exact).abs(), (yardstick.double() - exact).abs()
    # A yardstick may hit the exact value by luck, as on maps of few elements: half a unit in the last place is free.
    slack = exact.abs().double() * torch.finfo(actual.dtype).eps / 2
    if yardstick.dtype == exact.dtype and torch.equal(yardstick, exact):  # all in float64
        torch.testing.assert_close(actual, exact, rtol=1e-11, atol=1e-12)
    elif actual.numel():
        assert error.norm() <= 2 * allowed.norm() + slack.norm()
        assert error.max() <= 4 * allowed.max() + 2 * slack.max()


def compare(function, reference, inputs, radius, grad):
    actual = run(function, inputs, radius, grad)
    yardstick = run(reference, inputs, radius, grad)
    exact = run(reference, [tensor.double() for tensor in inputs], radius, grad)
    for ours, theirs, truth in zip(actual, yardstick, exact):
        assert_close_enough(ours, theirs, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_weights_and_gradients_match_the_formula(kernel, device, shape, dtype):
    guidance = make_features(shape, dtype, device)
    sigma = torch.tensor(0.6, dtype=torch.promote_types(dtype, torch.float32), device=device)
    grad = make_weights(shape, torch.float64, device, seed=2) - 0.5 / (2 * shape[-1] + 1) ** 2
    inputs, radius = (guidance, sigma), shape[-1]
    actual = run(kernel.spatial_range_weights, inputs, radius, grad)
    yardstick = run(reference_weights, inputs, radius, grad)
    exact = run(reference_weights, [tensor.double() for tensor in inputs], radius, grad)
    for ours, theirs, truth in zip(actual[:2], yardstick[:2], exact[:2]):
        assert_close_enough(ours, theirs, truth)
    # σ has one gradient, a sum in which the error of PyTorch is luck: it is held to the size of the terms.
    u = torch.linspace(-1, 1, 2 * radius + 1, dtype=torch.float64, device=device)
    terms = grad.abs() * exact[0] * (u[:, None] ** 2 + u**2).flatten() / sigma.double() ** 3
    assert actual[2].dtype == sigma.dtype
    assert (actual[2].double() - exact[2]).abs() <= 4 * torch.finfo(sigma.dtype).eps * terms.sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_aggregate_and_gradients_match_the_formula(kernel, device, shape, dtype):
    source = make_features(shape, dtype, device)
    weights = make_weights(shape, torch.promote_types(dtype, torch.float32), device)
    grad = make_features(shape, dtype, device, seed=2)
    compare(kernel.neighborhood_aggregate, reference_aggregate, (source, weights), shape[-1], grad)


@pytest.mark.parametrize("weights_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_floating_weights(kernel, device, dtype, weights_dtype):
    shape = (1, 5, 7, 17, 2)
    source = make_features(shape, dtype, device)
    weights = make_weights(shape, weights_dtype, device)
    grad = make_features(shape, dtype, device, seed=2)
    compare(kernel.neighborhood_aggregate, reference_aggregate, (source, weights), 2, grad)


@pytest.mark.parametrize("sigma_dtype", DTYPES, ids=str)
def test_sigma_of_another_dtype_is_cast_with_its_gradient(kernel, device, sigma_dtype):
    shape = (1, 5, 7, 17, 2)
    guidance = make_features(shape, torch.float32, device)
    sigma = torch.tensor(0.5, dtype=sigma_dtype, device=device, requires_grad=True)
    kernel.spatial_range_weights(guidance, sigma, 2).sum().backward()
    expected = torch.tensor(0.5, dtype=torch.float64, device=device, requires_grad=True)
    reference_weights(guidance.double(), expected, 2).sum().backward()
    assert sigma.grad.dtype == sigma_dtype
    torch.testing.assert_close(sigma.grad, expected.grad.to(sigma_dtype))


def test_whole_chain_has_every_gradient(kernel, device):
    shape = (2, 6, 9, 24, 2)
    guidance, source = make_features(shape, torch.float64, device), make_features(shape, torch.float64, device, 1)
    sigma = torch.tensor(0.7, dtype=torch.float64, device=device)
    grad = make_features(shape, torch.float64, device, 2)

    def chain(weights_function, aggregate_function):
        def function(guidance, sigma, source, radius):
            return aggregate_function(source, weights_function(guidance, sigma, radius).pow(2), radius)

        return run(function, (guidance, sigma, source), 2, grad)

    ours = chain(kernel.spatial_range_weights, kernel.neighborhood_aggregate)
    for actual, expected in zip(ours, chain(reference_weights, reference_aggregate)):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


# ---- Inputs as they come -------------------------------------------------------------------------------------------


def strided(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """The same values with other strides."""
    if how == "channels first":
        return tensor.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    if how == "every second":
        spaced = tensor.new_full((*tensor.shape[:3], 2 * tensor.shape[3]), float("nan"))
        spaced[..., ::2] = tensor
        return spaced[..., ::2]
    if how == "offset":
        return torch.cat([tensor.flatten().new_zeros(1), tensor.flatten()])[1:].view_as(tensor)
    return tensor.flip(0).contiguous().flip(0).transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("how", ["channels first", "every second", "offset", "transposed"])
def test_strides_make_no_difference(kernel, device, how):
    shape = (2, 5, 7, 17, 2)
    source, grad = make_features(shape, torch.float32, device), make_features(shape, torch.float32, device, 2)
    weights, sigma = make_weights(shape, torch.float32, device), torch.tensor(0.6, device=device)
    plain = run(kernel.neighborhood_aggregate, (source, weights), 2, grad)
    other = run(kernel.neighborhood_aggregate, (strided(source, how), strided(weights, how)), 2, strided(grad, how))
    plain += run(kernel.spatial_range_weights, (source, sigma), 2, weights)
    other += run(kernel.spatial_range_weights, (strided(source, how), sigma), 2, strided(weights, how))
    for expected, actual in zip(plain, other):
        assert torch.equal(actual, expected)


def test_expanded_inputs_and_gradients(kernel, device):
    shape = (3, 5, 7, 17, 2)
    one = make_features((1, *shape[1:]), torch.float64, device)
    weights = make_weights((1, *shape[1:]), torch.float64, device)
    ours, theirs = [], []
    for aggregate, results in ((kernel.neighborhood_aggregate, ours), (reference_aggregate, theirs)):
        source, factors = one.clone().requires_grad_(), weights.clone().requires_grad_()
        output = aggregate(source.expand(3, -1, -1, -1), factors.expand(3, -1, -1, -1), 2)
        output.sum().backward()  # its gradient is one number, expanded
        results += [output, source.grad, factors.grad]
    for actual, expected in zip(ours, theirs):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


class Calls(TorchDispatchMode):
    """Records the arguments of operators, by name."""

    def __init__(self):
        super().__init__()
        self.arguments = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.arguments[func._schema.name.split("::")[1]] = args
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("needed", [(True, False), (False, True), (True, True)], ids=str)
def test_only_needed_gradients_are_computed(kernel, device, needed):
    shape = (1, 5, 7, 17, 2)
    source = make_features(shape, torch.float32, device).requires_grad_(needed[0])
    weights = make_weights(shape, torch.float32, device).requires_grad_(needed[1])
    full = run(kernel.neighborhood_aggregate, (source, weights), 2, torch.ones_like(source))[1:]
    with Calls() as calls:
        kernel.neighborhood_aggregate(source, weights, 2).sum().backward()
    assert calls.arguments["neighborhood_aggregate_backward"][4:6] == needed
    for tensor, expected, need in zip((source, weights), full, needed):
        assert torch.equal(tensor.grad, expected) if need else tensor.grad is None


@pytest.mark.parametrize("needed", [(True, False), (False, True)], ids=str)
def test_weights_give_the_gradients_asked_for(kernel, device, needed):
    shape = (1, 5, 7, 17, 2)
    guidance = make_features(shape, torch.float32, device).requires_grad_(needed[0])
    sigma = torch.tensor(0.6, device=device, requires_grad=needed[1])
    grad = make_weights(shape, torch.float32, device)
    full = run(kernel.spatial_range_weights, (guidance, sigma), 2, grad)[1:]
    kernel.spatial_range_weights(guidance, sigma, 2).backward(grad)
    for tensor, expected, need in zip((guidance, sigma), full, needed):
        assert torch.equal(tensor.grad, expected) if need else tensor.grad is None


def test_without_gradients_nothing_is_recorded(kernel, device):
    guidance, sigma = make_features((1, 5, 7, 17, 2), torch.float32, device), torch.tensor(0.6, device=device)
    with torch.inference_mode():
        weights = kernel.spatial_range_weights(guidance.requires_grad_(), sigma, 2)
        output = kernel.neighborhood_aggregate(guidance, weights, 2)
    assert weights.grad_fn is None and output.grad_fn is None
    assert not kernel.spatial_range_weights(guidance.detach(), sigma, 2).requires_grad


def test_results_are_contiguous(kernel, ops, device):
    features = strided(make_features((2, 5, 7, 17, 2), torch.float32, device), "channels first")
    weights, kernel_weights = ops.spatial_range_weights(features, torch.tensor(0.6, device=device), 2, False)
    results = [weights, kernel_weights, ops.neighborhood_aggregate(features, weights, 2, False)]
    results += ops.neighborhood_aggregate_backward(features, features, weights, 2, True, True, False)
    assert all(result.is_contiguous() for result in results)


# ---- Values --------------------------------------------------------------------------------------------------------


def test_zero_sigma_is_its_limit(kernel, device):
    guidance = make_features((1, 5, 7, 17, 2), torch.float32, device)
    sigma = torch.zeros((), device=device)
    weights, _, grad_sigma = run(kernel.spatial_range_weights, (guidance, sigma), 2, torch.ones(1, 5, 7, 25))
    limit = reference_weights(guidance, torch.tensor(1e-3, device=device), 2)  # exp(-125000) is already zero
    torch.testing.assert_close(weights, limit)
    assert weights[..., 12].min() > 0 and weights.count_nonzero() == 5 * 7
    assert grad_sigma == 0


@pytest.mark.parametrize("value", [-0.6, 1e-7, 1e-4, 3e4, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_unusual_sigma(kernel, device, value, dtype):
    guidance = make_features((1, 5, 7, 17, 2), dtype, device)
    grad = make_weights((1, 5, 7, 17, 2), dtype, device, seed=2)
    sigma = torch.tensor(value, dtype=dtype, device=device)
    weights, _, grad_sigma = run(kernel.spatial_range_weights, (guidance, sigma), 2, grad)
    if abs(value) < 1e-5:  # clamped: 2σ² counts as at least 1e-12
        expected, expected_grad = reference_weights(guidance, torch.tensor(1e-3, device=device), 2), 0.0
    else:
        expected, _, expected_grad = run(reference_weights, (guidance.double(), sigma.double()), 2, grad)
    torch.testing.assert_close(weights, expected.to(dtype))
    expected_grad = torch.nan_to_num(torch.as_tensor(expected_grad, dtype=dtype, device=device))
    torch.testing.assert_close(grad_sigma, expected_grad, rtol=1e-4, atol=1e-10)


def test_nan_sigma_gives_nan(kernel, device):
    guidance = make_features((1, 5, 7, 17, 2), torch.float32, device)
    sigma = torch.tensor(float("nan"), device=device, requires_grad=True)
    weights = kernel.spatial_range_weights(guidance, sigma, 2)
    centre = torch.arange(25, device=device) == 12
    assert weights[..., ~centre].isnan().all()
    weights.sum().backward()
    assert sigma.grad.isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_stays_in_its_neighborhood(kernel, device, dtype):
    radius, (row, column) = 2, (4, 9)
    features = make_features((1, 11, 20, 37, radius), dtype, device)
    features[0, row, column] = float("nan")
    near = torch.zeros(1, 11, 20, dtype=torch.bool, device=device)
    near[0, row - radius : row + radius + 1, column - radius : column + radius + 1] = True

    weights, grad_guidance, _ = run(
        kernel.spatial_range_weights, (features, torch.tensor(0.6, device=device)), radius, torch.ones(1, 11, 20, 25)
    )
    assert torch.equal(weights.isnan().any(-1), near)
    # A gradient comes from the neighbours' weights, and they from their own neighbours.
    reach = torch.zeros_like(near)
    reach[0, row - 2 * radius : row + 2 * radius + 1, column - 2 * radius : column + 2 * radius + 1] = True
    assert not (grad_guidance.isnan().any(-1) & ~reach).any()

    factors = make_weights((1, 11, 20, 37, radius), torch.float32, device)
    output, _, grad_weights = run(
        kernel.neighborhood_aggregate, (features, factors), radius, torch.ones_like(features)
    )
    assert torch.equal(output.isnan().any(-1), near)
    assert torch.equal(grad_weights.isnan().any(-1), near)
    clean = torch.ones_like(features)
    _, grad_source, _ = run(kernel.neighborhood_aggregate, (clean, factors), radius, features)
    assert torch.equal(grad_source.isnan().any(-1), near)


def test_large_similarities_do_not_overflow(kernel, device):
    guidance = 300 * make_features((1, 5, 7, 16, 2), torch.float32, device)
    sigma = torch.tensor(0.6, device=device)
    weights, *grads = run(kernel.spatial_range_weights, (guidance, sigma), 2, torch.ones(1, 5, 7, 25))
    exact = reference_weights(guidance.double(), sigma.double(), 2)
    torch.testing.assert_close(weights.double(), exact, rtol=1e-2, atol=1e-6)  # similarities of some 1e5, of float32
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(("value", "dtype"), [(1e6, torch.float32), (1e6, torch.bfloat16), (1e12, torch.float64)])
def test_equal_neighbours_count_alike_however_large(kernel, device, value, dtype):
    guidance = torch.full((1, 8, 8, 1), value, dtype=dtype, device=device)
    sigma = torch.tensor(torch.inf, device=device)
    weights = kernel.spatial_range_weights(guidance, sigma, 1)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_element_is_written(kernel, device, dtype):
    """With all new tensors filled with NaN, nothing of it shows."""
    shape = (2, 9, 11, 19, 3)
    source, grad = make_features(shape, dtype, device), make_features(shape, dtype, device, 2)
    wide = torch.promote_types(dtype, torch.float32)
    weights, sigma = make_weights(shape, wide, device), torch.tensor(0.6, dtype=wide, device=device)

    def results():
        aggregate = run(kernel.neighborhood_aggregate, (source, weights), 3, grad)
        return aggregate + run(kernel.spatial_range_weights, (source, sigma), 3, weights)

    expected = results()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(8).isnan().all()
        actual = results()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled
    assert all(torch.equal(a, e) for a, e in zip(actual, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_in_every_run_and_with_any_number_of_threads(kernel, device, dtype):
    shape = (2, 17, 19, 70, 3)
    source, grad = make_features(shape, dtype, device), make_features(shape, dtype, device, 2)
    weights, sigma = make_weights(shape, torch.float32, device), torch.tensor(0.6, device=device)

    def results():
        aggregate = run(kernel.neighborhood_aggregate, (source, weights), 3, grad)
        return aggregate + run(kernel.spatial_range_weights, (source, sigma), 3, weights)

    expected, threads = results(), torch.get_num_threads()
    try:
        for number in (1, 2, 3, 2):
            torch.set_num_threads(number)
            assert all(torch.equal(a, e) for a, e in zip(results(), expected))
    finally:
        torch.set_num_threads(threads)


def test_each_picture_of_a_batch_is_its_own(kernel, device):
    shape = (3, 7, 9, 21, 2)
    source, weights = make_features(shape, torch.float32, device), make_weights(shape, torch.float32, device)
    together = run(kernel.neighborhood_aggregate, (source, weights), 2, source)
    for i in range(3):
        alone = run(kernel.neighborhood_aggregate, (source[i : i + 1], weights[i : i + 1]), 2, source[i : i + 1])
        assert all(torch.equal(a, t[i : i + 1]) for a, t in zip(alone, together))


INSTRUCTION_SETS = """
import json, sys, torch, kernels
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_ops as t
kernel = kernels.get_local_kernel(Path(sys.argv[1]), backend="cpu")
for dtype in t.DTYPES:
    for shape in [(2, 9, 20, 70, 3), (1, 7, 7, 33, 6), (1, 6, 8, 130, 1)]:
        t.test_weights_and_gradients_match_the_formula(kernel, torch.device("cpu"), shape, dtype)
        t.test_aggregate_and_gradients_match_the_formula(kernel, torch.device("cpu"), shape, dtype)
t.test_nan_stays_in_its_neighborhood(kernel, torch.device("cpu"), torch.float32)
t.test_same_bits_in_every_run_and_with_any_number_of_threads(kernel, torch.device("cpu"), torch.bfloat16)
print(json.dumps(torch.backends.cpu.get_cpu_capability()))
"""


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_older_processors(kernel, build_folder, capability):
    """The same checks with the instruction set capped, as PyTorch's own variable caps it."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", INSTRUCTION_SETS, str(build_folder), os.path.dirname(__file__)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]).lower() == capability


# ---- Autograd, tracing, compilation --------------------------------------------------------------------------------


def small_arguments(device, dtype=torch.float32, radius=2):
    shape = (2, 3, 4, 2, radius)
    features, sigma = make_features(shape, dtype, device), torch.tensor(0.6, dtype=dtype, device=device)
    return features, sigma, make_weights(shape, dtype, device), radius


def test_gradcheck_of_both_functions(kernel, device):
    features, sigma, weights, radius = small_arguments(device, torch.float64, radius=1)
    for function, inputs in (
        (kernel.spatial_range_weights, (features, sigma)),
        (kernel.neighborhood_aggregate, (features, weights)),
    ):
        inputs = [tensor.requires_grad_() for tensor in inputs]
        assert torch.autograd.gradcheck(function, (*inputs, radius))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_operators_pass_opcheck(ops, device, dtype):
    features, sigma, weights, radius = small_arguments(device, dtype)
    sigma, weights = sigma.to(torch.promote_types(dtype, torch.float32)), weights.requires_grad_()
    kernel_weights = make_weights((2, 3, 4, 2, radius), sigma.dtype, device)
    grad = make_features((2, 3, 4, 2, radius), dtype, device, 2)
    learned = [tensor.clone().requires_grad_() for tensor in (features, sigma)]
    torch.library.opcheck(ops.spatial_range_weights, (*learned, radius, False))
    torch.library.opcheck(ops.neighborhood_aggregate, (learned[0], weights, radius, False))
    torch.library.opcheck(
        ops.spatial_range_weights_backward, (kernel_weights, features, sigma, kernel_weights, radius, False)
    )
    for needs in ((True, True), (True, False), (False, True)):
        arguments = (grad, features, weights.detach(), radius, *needs, False)
        torch.library.opcheck(ops.neighborhood_aggregate_backward, arguments)


def test_second_derivatives_are_refused(kernel, device):
    features, sigma, weights, radius = small_arguments(device)
    for function, other in ((kernel.spatial_range_weights, sigma), (kernel.neighborhood_aggregate, weights)):
        leaf = features.clone().requires_grad_()
        (grad,) = torch.autograd.grad(function(leaf, other, radius).pow(2).sum(), leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match=r"first derivatives, in reverse mode, only.*use_kernels=False"):
            grad.sum().backward()


def fused(kernel):
    def function(guidance, sigma, source, radius):
        return kernel.neighborhood_aggregate(source, kernel.spatial_range_weights(guidance, sigma, radius), radius)

    return function


def test_forward_mode_is_refused(kernel, device):
    guidance, sigma = make_features((1, 5, 7, 4, 2), torch.float64, device), torch.tensor(0.6, dtype=torch.float64)
    weights = kernel.spatial_range_weights(guidance, sigma.to(device), 2)
    for function, at in (
        (lambda at: kernel.spatial_range_weights(at, sigma.to(device), 2), guidance),
        (lambda at: kernel.neighborhood_aggregate(guidance, at, 2), weights),
    ):
        with pytest.raises(NotImplementedError, match="forward-mode tangent"):
            torch.func.jvp(function, (at,), (at,))


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_without_graph_break(kernel, device, fresh_compiler, dtype):
    shape = (2, 6, 7, 16, 2)
    inputs = (
        make_features(shape, dtype, device),
        torch.tensor(0.6, device=device),
        make_features(shape, dtype, device, 1),
    )
    grad = make_features(shape, dtype, device, 2)
    expected = run(fused(kernel), inputs, 2, grad)
    actual = run(torch.compile(fused(kernel), fullgraph=True), inputs, 2, grad)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected))


def test_compiles_once_for_all_grids(kernel, device, fresh_compiler):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused(kernel), fullgraph=True, backend=counter, dynamic=True)
    for height, width, batch in ((5, 7, 2), (8, 6, 3), (11, 13, 4)):
        shape = (batch, height, width, 16, 2)
        inputs = make_features(shape, torch.float32, device), torch.tensor(0.6, device=device)
        inputs = *inputs, make_features(shape, torch.float32, device, 1)
        grad = make_features(shape, torch.float32, device, 2)
        expected = run(fused(kernel), inputs, 2, grad)
        assert all(torch.equal(a, e) for a, e in zip(run(compiled, inputs, 2, grad), expected))
    assert counter.frame_count == 1


def test_marked_dimensions_stay_dynamic(kernel, device, fresh_compiler):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused(kernel), fullgraph=True, backend=counter)
    for height, width, batch in ((5, 7, 2), (8, 6, 3)):
        shape = (batch, height, width, 16, 2)
        guidance, source = make_features(shape, torch.float32, device), make_features(shape, torch.float32, device, 1)
        for tensor in (guidance, source):
            for dimension in range(3):
                torch._dynamo.mark_dynamic(tensor, dimension)
        sigma = torch.tensor(0.6, device=device)
        assert torch.equal(compiled(guidance, sigma, source, 2), fused(kernel)(guidance, sigma, source, 2))
    assert counter.frame_count == 1


def test_exports(kernel, device):
    class Chain(torch.nn.Module):
        def forward(self, guidance, sigma, source):
            return fused(kernel)(guidance, sigma, source, 2)

    shape = (2, 6, 7, 16, 2)
    inputs = make_features(shape, torch.float32, device), torch.tensor(0.6, device=device)
    inputs = *inputs, make_features(shape, torch.float32, device, 1)
    program = torch.export.export(Chain(), inputs)
    assert torch.equal(program.module()(*inputs), Chain()(*inputs))


def test_meta_tensors_have_shapes_and_dtypes(kernel):
    guidance = torch.empty(2, 6, 7, 16, device="meta", dtype=torch.bfloat16)
    weights = kernel.spatial_range_weights(guidance, torch.empty((), device="meta"), 2)
    assert (weights.shape, weights.dtype, weights.device.type) == ((2, 6, 7, 25), torch.float32, "meta")
    output = kernel.neighborhood_aggregate(guidance, weights, 2)
    assert (output.shape, output.dtype) == (guidance.shape, torch.bfloat16)


def test_compiled_code_follows_the_tf32_setting(kernel, fresh_compiler):
    """The setting is a constant of the compiled code: changing it, in the old way or the new, compiles anew."""
    functional = sys.modules[f"{kernel.__name__}.functional"]
    matmul = torch.backends.cuda.matmul

    @torch.compile(fullgraph=True, backend="eager")
    def in_tf32(x):
        return x + 1 if functional._matmul_in_tf32() else x

    before = matmul.fp32_precision
    try:
        for setting in (False, True, False):
            matmul.allow_tf32 = setting
            assert bool(in_tf32(torch.zeros(()))) is setting
        for setting in ("tf32", "ieee"):
            matmul.fp32_precision = setting
            assert bool(in_tf32(torch.zeros(()))) is (setting == "tf32")
    finally:
        matmul.fp32_precision = before


def test_trains_under_autocast(kernel, device):
    torch.manual_seed(0)
    project = torch.nn.Linear(12, 16, device=device)
    sigma = torch.nn.Parameter(torch.tensor(0.6, device=device))
    features = torch.randn(1, 6, 7, 12, device=device)
    optimizer = torch.optim.SGD([*project.parameters(), sigma], lr=0.5)
    losses = []
    for _ in range(4):
        with torch.autocast(device.type, torch.bfloat16):
            guidance = project(features)
            weights = kernel.spatial_range_weights(guidance, sigma, 2)
            output = kernel.neighborhood_aggregate(guidance, weights, 2)
            loss = (output.float() - 1).pow(2).mean()
        assert (guidance.dtype, weights.dtype, output.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
        optimizer.zero_grad()
        loss.backward()
        assert sigma.grad.dtype == torch.float32 and sigma.grad != 0
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def test_runs_in_several_python_threads(kernel, device):
    from concurrent.futures import ThreadPoolExecutor

    shapes = [(1, 9 + i, 12 - i, 30 + i, 2) for i in range(6)]

    def work(shape):
        source, weights = make_features(shape, torch.float32, device), make_weights(shape, torch.float32, device)
        return run(kernel.neighborhood_aggregate, (source, weights), 2, source)

    expected = [work(shape) for shape in shapes]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for results, references in zip(pool.map(work, shapes), expected):
                assert all(torch.equal(a, e) for a, e in zip(results, references))


@pytest.mark.gpu
def test_runs_in_a_cuda_graph(kernel):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    shape = (2, 16, 16, 128, 3)
    inputs = make_features(shape, torch.bfloat16, device), torch.tensor(0.6, device=device)
    inputs = *inputs, make_features(shape, torch.bfloat16, device, 1)
    expected = fused(kernel)(*inputs, 3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = fused(kernel)(*inputs, 3)
    output.zero_()
    graph.replay()
    assert torch.equal(output, expected)


# ---- Bad input -----------------------------------------------------------------------------------------------------

MAP, SIGMA, WEIGHTS = torch.ones(1, 5, 6, 4), torch.tensor(0.5), torch.ones(1, 5, 6, 25)

BAD_WEIGHTS_ARGUMENTS = {
    "rank": (MAP[0], SIGMA, 2, r"`guidance` must have shape.*got \(5, 6, 4\)"),
    "integers": (MAP.long(), SIGMA, 2, r"`guidance` must be a floating-point tensor, got torch.int64"),
    "float8": (MAP.to(torch.float8_e4m3fn), SIGMA, 2, r"`guidance` must be float32.*got torch.float8_e4m3fn"),
    "complex": (MAP.cfloat(), SIGMA, 2, r"`guidance` must be a floating-point tensor, got torch.complex64"),
    "no tensor": (MAP.numpy(), SIGMA, 2, r"`guidance` must be a tensor, got array"),
    "no channels": (MAP[..., :0], SIGMA, 2, r"`guidance` must have at least one channel, got shape \(1, 5, 6, 0\)"),
    "low": (MAP[:, :2], SIGMA, 2, r"A grid of 2 x 6 positions is too small for radius 2"),
    "narrow": (MAP[:, :, :2], SIGMA, 2, r"A grid of 5 x 2 positions is too small for radius 2"),
    "radius 0": (MAP, SIGMA, 0, r"`radius` must be an integer of at least 1, got 0"),
    "radius -1": (MAP, SIGMA, -1, r"`radius` must be an integer of at least 1, got -1"),
    "radius 7": (torch.ones(1, 9, 9, 4), SIGMA, 7, r"`radius` must be at most 6.*got 7.*use_kernels=False"),
    "radius 2.0": (MAP, SIGMA, 2.0, r"`radius` must be an integer of at least 1, got 2.0"),
    "radius True": (MAP, SIGMA, True, r"`radius` must be an integer of at least 1, got True"),
    "sigma 1-dimensional": (MAP, SIGMA[None], 2, r"`sigma` must be a 0-dimensional tensor, got shape \(1,\)"),
    "sigma a number": (MAP, 0.5, 2, r"`sigma` must be a tensor, got 0.5. Wrap the number"),
    "sigma elsewhere": (MAP, SIGMA.to("meta"), 2, r"`sigma` is on meta, but `guidance` is on cpu"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS_ARGUMENTS)
def test_bad_arguments_of_weights_are_named(kernel, case):
    guidance, sigma, radius, message = BAD_WEIGHTS_ARGUMENTS[case]
    with pytest.raises(ValueError, match=message):
        kernel.spatial_range_weights(guidance, sigma, radius)


BAD_AGGREGATE_ARGUMENTS = {
    "rank": (MAP[0], WEIGHTS, 2, r"`source` must have shape.*got \(5, 6, 4\)"),
    "integers": (MAP.int(), WEIGHTS, 2, r"`source` must be a floating-point tensor, got torch.int32"),
    "low": (MAP[:, :2], WEIGHTS, 2, r"A grid of 2 x 6 positions is too small for radius 2"),
    "radius 7": (torch.ones(1, 9, 9, 4), WEIGHTS, 7, r"`radius` must be at most 6.*got 7"),
    "weights of another radius": (
        MAP,
        WEIGHTS[..., :9],
        2,
        r"`weights` must have shape \(1, 5, 6, 25\).*\(1, 5, 6, 9\)",
    ),
    "weights of another grid": (MAP, WEIGHTS.mT, 2, r"`weights` must have shape \(1, 5, 6, 25\).*\(1, 5, 25, 6\)"),
    "weights of another batch": (MAP, WEIGHTS.expand(2, -1, -1, -1), 2, r"`weights` must have shape.*\(2, 5, 6, 25\)"),
    "integer weights": (MAP, WEIGHTS.long(), 2, r"`weights` must be a floating-point tensor, got torch.int64"),
    "weights no tensor": (MAP, None, 2, r"`weights` must be a tensor, got None"),
    "weights elsewhere": (MAP, WEIGHTS.to("meta"), 2, r"`weights` is on meta, but `source` is on cpu"),
}


@pytest.mark.parametrize("case", BAD_AGGREGATE_ARGUMENTS)
def test_bad_arguments_of_aggregate_are_named(kernel, case):
    source, weights, radius, message = BAD_AGGREGATE_ARGUMENTS[case]
    with pytest.raises(ValueError, match=message):
        kernel.neighborhood_aggregate(source, weights, radius)


@pytest.mark.gpu
def test_devices_must_agree(kernel):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with pytest.raises(ValueError, match=r"`sigma` is on cpu, but `guidance` is on cuda:0"):
        kernel.spatial_range_weights(MAP.cuda(), SIGMA, 2)
    with pytest.raises(ValueError, match=r"`weights` is on cuda:0, but `source` is on cpu"):
        kernel.neighborhood_aggregate(MAP, WEIGHTS.cuda(), 2)


BAD_OPERATOR_ARGUMENTS = {
    "rank": ("spatial_range_weights", (MAP[0], SIGMA, 2, False), r"`guidance` must have shape.*\(5, 6, 4\)"),
    "radius": ("spatial_range_weights", (MAP, SIGMA, 7, False), r"`radius` must lie in 1..6, got 7"),
    "negative radius": ("neighborhood_aggregate", (MAP, WEIGHTS, -2, False), r"`radius` must lie in 1..6, got -2"),
    "grid": ("neighborhood_aggregate", (MAP[:, :2], WEIGHTS[:, :2], 2, False), r"`source` of shape.*grid too small"),
    "dtype": ("neighborhood_aggregate", (MAP.int(), WEIGHTS, 2, False), r"`source` must be float32.*got Int"),
    "channels": ("neighborhood_aggregate", (MAP[..., :0], WEIGHTS, 2, False), r"`source` of shape.*has no channels"),
    "sigma rank": ("spatial_range_weights", (MAP, SIGMA[None], 2, False), r"`sigma` must be a 0-dim.*\(1\)"),
    "sigma dtype": ("spatial_range_weights", (MAP, SIGMA.double(), 2, False), r"`sigma` must be Float, got Double"),
    "weights shape": (
        "neighborhood_aggregate",
        (MAP, WEIGHTS[..., 1:], 2, False),
        r"`weights` of shape \(1, 5, 6, 24\)",
    ),
    "weights rank": ("neighborhood_aggregate", (MAP, WEIGHTS[0], 2, False), r"`weights` of shape \(5, 6, 25\)"),
    "weights dtype": ("neighborhood_aggregate", (MAP, WEIGHTS.half(), 2, False), r"`weights` must be Float.*got Half"),
    "grad": (
        "neighborhood_aggregate_backward",
        (MAP[..., :3], MAP, WEIGHTS, 2, True, True, False),
        r"`grad` must have shape \(1, 5, 6, 4\), got \(1, 5, 6, 3\)",
    ),
    "grad dtype": (
        "neighborhood_aggregate_backward",
        (MAP.double(), MAP, WEIGHTS, 2, True, True, False),
        r"`grad` must be Float, got Double",
    ),
    "grad of weights": (
        "spatial_range_weights_backward",
        (WEIGHTS[:, 1:], MAP, SIGMA, WEIGHTS, 2, False),
        r"`grad` must have shape \(1, 5, 6, 25\), got \(1, 4, 6, 25\)",
    ),
    "range kernel": (
        "spatial_range_weights_backward",
        (WEIGHTS, MAP, SIGMA, WEIGHTS[..., :9], 2, False),
        r"`range_kernel` must have shape \(1, 5, 6, 25\), got \(1, 5, 6, 9\)",
    ),
}


@pytest.mark.parametrize("case", BAD_OPERATOR_ARGUMENTS)
def test_operators_check_what_they_read(ops, case):
    """Called directly, past the checks of the Python functions."""
    name, arguments, message = BAD_OPERATOR_ARGUMENTS[case]
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, name)(*arguments)


# ---- Size ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_more_elements_than_fit_32_bits(kernel, device):
    """The far end of a map of 2³¹ + elements is as a small map of its own rows gives it."""
    height, width, channels, radius = 1032, 1024, 2048, 1
    needed = 7 * height * width * channels  # two bytes each, three and a half times
    available = (
        torch.cuda.mem_get_info()[0]
        if device.type == "cuda"
        else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )
    if available < needed:
        pytest.skip(f"needs {needed >> 30} GiB of memory, has {available >> 30}")
    assert height * width * channels > 2**31
    row = make_features((1, 8, width, channels, radius), torch.bfloat16, device)
    source = row.repeat(1, height // 8, 1, 1).requires_grad_()
    weights = make_weights((1, 8, width, channels, radius), torch.float32, device).repeat(1, height // 8, 1, 1)
    output = kernel.neighborhood_aggregate(source, weights, radius)
    small = run(kernel.neighborhood_aggregate, (source[:, -32:], weights[:, -32:]), radius, source[:, -32:].detach())
    assert torch.equal(output[:, -16:], small[0][:, -16:])
    del output
    gc.collect()
    (grad,) = torch.autograd.grad(kernel.neighborhood_aggregate(source, weights, radius), source, source.detach())
    assert torch.equal(grad[:, -16:], small[1][:, -16:])
    del grad
    gc.collect()
    sigma = torch.tensor(0.6, device=device)
    ranges = kernel.spatial_range_weights(source.detach(), sigma, radius)
    assert torch.equal(ranges[:, -16:], kernel.spatial_range_weights(source[:, -32:].detach(), sigma, radius)[:, -16:])
