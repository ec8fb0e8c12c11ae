# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from transformers_aurea import spatial_range_attention_aurea as op
from transformers_aurea.spatial_range_attention_aurea import (
    AureaNeighborhoodAggregate,
    AureaSpatialRangeWeights,
    neighborhood_aggregate,
    spatial_range_weights,
)


# Square, rectangular, odd, one above the radius, and more than one tile in each direction.
GRIDS = [(16, 16, 3), (5, 7, 2), (7, 5, 3), (4, 9, 3), (3, 2, 1), (11, 30, 3), (33, 26, 4)]
TILE_SHAPES = [(3, 2), (4, 100), (100, 5), (100, 100)]


def neighborhoods(features, radius):
    """Reflect-padded windows, (B, H, W, C) → (B, H, W, K, C)."""
    height, width = features.shape[1:3]
    padded = F.pad(features.permute(0, 3, 1, 2), [radius] * 4, mode="reflect")
    windows = F.unfold(padded, 2 * radius + 1)  # (B, C·K, H·W)
    return windows.view(*padded.shape[:2], -1, height, width).permute(0, 3, 4, 2, 1)


def reference_weights(guidance, sigma, radius):
    similarities = torch.einsum("bhwc,bhwkc->bhwk", guidance, neighborhoods(guidance, radius))
    range_kernel = (similarities / math.sqrt(guidance.shape[-1])).softmax(-1)
    u = torch.linspace(-1, 1, 2 * radius + 1, dtype=guidance.dtype)
    spatial_kernel = torch.exp(-(u[:, None] ** 2 + u[None, :] ** 2) / (2 * sigma**2))
    return range_kernel * spatial_kernel.flatten()


def reference_aggregate(source, weights, radius):
    return torch.einsum("bhwk,bhwkc->bhwc", weights, neighborhoods(source, radius))


def random_inputs(batch, height, width, channels, radius, dtype=torch.float32, seed=0):
    """Guidance, σ, source, weights. Scaled so that the softmax spreads: at unit variance it would be one-hot."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, height, width)
    guidance = torch.randn(*shape, channels, generator=generator) * (2 / math.sqrt(channels)) ** 0.5
    source = torch.randn(*shape, channels, generator=generator)
    weights = torch.rand(*shape, (2 * radius + 1) ** 2, generator=generator)
    weights = weights / weights.sum(-1, keepdim=True)
    return [tensor.to(dtype) for tensor in (guidance, torch.tensor(0.8), source, weights)]


def outputs_and_gradients(weights_function, aggregate_function, guidance, sigma, source, weights, radius):
    """Every output of the two functions, then every gradient of a fixed random projection of them."""
    inputs = [tensor.clone().requires_grad_() for tensor in (guidance, sigma, source, weights)]
    outputs = [weights_function(*inputs[:2], radius), aggregate_function(*inputs[2:], radius)]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(output.shape, generator=generator).to(output.dtype) for output in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, upstream)]


def relative_error(actual, expected):
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def to_tokens(maps):
    return maps.permute(0, 2, 3, 1).contiguous()  # (B, C, H, W) → (B, H, W, C)


@pytest.mark.parametrize("case, radius", [("rect", 3), ("tight", 3), ("r1", 1)])
def test_matches_the_original(goldens, case, radius):
    golden = {key.split("/")[-1]: value for key, value in goldens.items() if key.startswith(f"core/{case}/")}
    maps = {key: to_tokens(value) if value.ndim == 4 else value for key, value in golden.items()}
    guidance, sigma, source, kernel = (
        maps[key].clone().requires_grad_() for key in ("proj", "sigma", "values", "kernel")
    )
    combined = spatial_range_weights(guidance, sigma, radius)
    aggregated = neighborhood_aggregate(source, kernel, radius)
    torch.autograd.backward([combined, aggregated], [maps["grad_combined"], maps["grad_aggregated"]])
    actual = {
        "combined": combined,
        "aggregated": aggregated,
        "grad_proj": guidance.grad,
        "grad_sigma": sigma.grad,
        "grad_values": source.grad,
        "grad_kernel": kernel.grad,
    }
    for key, value in actual.items():
        assert relative_error(value, maps[key].double()) < 2e-6, key


@pytest.mark.parametrize("height, width, radius", GRIDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_outputs_and_gradients_match_unfold(batch, height, width, radius):
    inputs = random_inputs(batch, height, width, 12, radius)
    expected = outputs_and_gradients(
        reference_weights, reference_aggregate, *(tensor.double() for tensor in inputs), radius
    )
    actual = outputs_and_gradients(spatial_range_weights, neighborhood_aggregate, *inputs, radius)
    for value, reference in zip(actual, expected):
        assert value.dtype == torch.float32
        # The gradient of σ is one sum over everything, of either sign: what is left of it is small.
        assert relative_error(value, reference) < (2e-6 if value.numel() > 1 else 1e-5)


@pytest.mark.parametrize("tile_shape", TILE_SHAPES, ids=str)
@pytest.mark.parametrize("height, width, radius", [(16, 16, 3), (9, 5, 4), (4, 11, 3)])
def test_every_tiling_gives_the_same(monkeypatch, tile_shape, height, width, radius):
    inputs = random_inputs(2, height, width, 6, radius, torch.float64)
    expected = outputs_and_gradients(reference_weights, reference_aggregate, *inputs, radius)
    monkeypatch.setattr(op, "_tile_shape", lambda *_: tile_shape)
    actual = outputs_and_gradients(spatial_range_weights, neighborhood_aggregate, *inputs, radius)
    for value, reference in zip(actual, expected):
        assert relative_error(value, reference) < 1e-13


def test_error_at_the_published_width():
    inputs = random_inputs(1, 7, 9, 1536, 3)
    expected = outputs_and_gradients(
        reference_weights, reference_aggregate, *(tensor.double() for tensor in inputs), 3
    )
    assert expected[0].amax(-1).mean() < 0.5  # the softmax spreads
    actual = outputs_and_gradients(spatial_range_weights, neighborhood_aggregate, *inputs, 3)
    for value, reference in zip(actual, expected):
        assert relative_error(value, reference) < 3e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs(dtype):
    """Products of half-precision numbers are exact in float32, so only what is returned in `dtype` is rounded."""
    inputs = random_inputs(2, 9, 6, 64, 2, dtype)
    inputs[1] = inputs[1].float()  # σ stays float32 beside half-precision weights
    expected = outputs_and_gradients(
        reference_weights, reference_aggregate, *(tensor.double() for tensor in inputs), 2
    )
    actual = outputs_and_gradients(spatial_range_weights, neighborhood_aggregate, *inputs, 2)
    assert [value.dtype for value in actual] == [torch.float32, dtype, dtype, torch.float32, dtype, dtype]
    # The last two gradients start from an upstream gradient, and folded border weights, rounded to `dtype`.
    for value, reference, factor in zip(actual, expected, (0, 2, 1, 0, 4, 4)):
        assert relative_error(value, reference) < max(3e-6, factor * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_full_precision_weights_of_a_half_precision_source_get_gradients_in_full_precision(dtype):
    _, _, source, _ = random_inputs(2, 9, 6, 64, 2, dtype)
    weights = random_inputs(2, 9, 6, 64, 2)[3].requires_grad_()
    upstream = torch.randn(source.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    sums = neighborhood_aggregate(source, weights, 2)
    actual = torch.autograd.grad(sums, weights, upstream)[0]
    expected = reference_aggregate(source.double(), weights.double(), 2)
    exact = torch.autograd.grad(expected, weights, upstream.double())[0]
    assert relative_error(actual, exact) < 3e-6


@pytest.mark.parametrize("tile_shape", [(3, 2), (100, 100)], ids=str)
def test_gradcheck(monkeypatch, tile_shape):
    monkeypatch.setattr(op, "_tile_shape", lambda *_: tile_shape)
    guidance, sigma, source, _ = random_inputs(2, 4, 5, 2, 2, torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (guidance, sigma, source)]

    def attention(guidance, sigma, source):
        return neighborhood_aggregate(source, spatial_range_weights(guidance, sigma, 2), 2)

    assert torch.autograd.gradcheck(attention, inputs)
    assert torch.autograd.gradgradcheck(attention, inputs, fast_mode=True)


def test_only_the_gradients_asked_for():
    guidance, sigma, source, _ = random_inputs(1, 5, 6, 4, 2)
    source.requires_grad_()
    weights = spatial_range_weights(guidance, sigma, 2)
    assert not weights.requires_grad
    neighborhood_aggregate(source, weights, 2).sum().backward()
    assert source.grad is not None


def test_non_contiguous_and_empty_inputs():
    guidance, sigma, source, weights = random_inputs(2, 6, 5, 8, 2)
    expected = outputs_and_gradients(
        spatial_range_weights, neighborhood_aggregate, guidance, sigma, source, weights, 2
    )
    strided = [tensor.transpose(0, 3).contiguous().transpose(0, 3) for tensor in (guidance, source, weights)]
    guidance, source, weights = strided
    actual = outputs_and_gradients(spatial_range_weights, neighborhood_aggregate, guidance, sigma, source, weights, 2)
    for value, reference in zip(actual, expected):
        torch.testing.assert_close(value, reference)
    assert spatial_range_weights(guidance[:0], sigma, 2).shape == (0, 6, 5, 25)
    assert neighborhood_aggregate(source[:0], weights[:0], 2).shape == (0, 6, 5, 8)


@pytest.fixture
def uninitialized_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("height, width", [(9, 6), (9, 40)])
def test_every_value_is_written(uninitialized_memory_is_nan, dtype, height, width):
    assert torch.empty(3, dtype=dtype).isnan().all()
    inputs = random_inputs(2, height, width, 8, 2, dtype)
    for value in outputs_and_gradients(spatial_range_weights, neighborhood_aggregate, *inputs, 2):
        assert value.isfinite().all()


def test_large_grids_need_linear_memory():
    """128 × 128 positions: all their products at once would be 1 GB."""
    guidance, sigma, source, _ = random_inputs(1, 128, 128, 4, 3)
    with torch.profiler.profile(profile_memory=True) as profile:
        weights = spatial_range_weights(guidance, sigma, 3)
        neighborhood_aggregate(source, weights, 3)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 8 * weights.nbytes
    torch.testing.assert_close(weights, reference_weights(guidance, sigma, 3))


def test_autocast_leaves_the_op_alone():
    guidance, sigma, source, _ = random_inputs(1, 6, 30, 8, 2)
    expected = neighborhood_aggregate(source, spatial_range_weights(guidance, sigma, 2), 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = neighborhood_aggregate(source, spatial_range_weights(guidance, sigma, 2), 2)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_traced_and_inference_calls_leave_the_cache_usable():
    guidance, sigma, source, weights = random_inputs(1, 6, 7, 4, 2)
    op._cached.cache_clear()
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in (guidance, sigma, source, weights)]
        assert spatial_range_weights(fakes[0], fakes[1], 2).shape == weights.shape
        assert neighborhood_aggregate(fakes[2], fakes[3], 2).shape == source.shape
    assert op._cached.cache_info().currsize == 0
    meta = neighborhood_aggregate(source.to("meta"), weights.to("meta"), 2)
    assert meta.shape == source.shape
    with torch.inference_mode():
        spatial_range_weights(guidance, sigma, 2)
    assert not any(tile.entries.is_inference() for tile in op._tiles(guidance, 2))
    values = outputs_and_gradients(spatial_range_weights, neighborhood_aggregate, guidance, sigma, source, weights, 2)
    expected = outputs_and_gradients(reference_weights, reference_aggregate, guidance, sigma, source, weights, 2)
    for value, reference in zip(values, expected):
        torch.testing.assert_close(value, reference)


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = AureaSpatialRangeWeights()
        self.aggregate = AureaNeighborhoodAggregate()

    def forward(self, guidance, sigma, source):
        return self.aggregate(source, self.weights(guidance, sigma, 1), 1)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    guidance, sigma, source, _ = random_inputs(2, 4, 5, 3, 1)
    exported = torch.export.export(Attention(), (guidance, sigma, source), strict=strict)
    torch.testing.assert_close(exported.module()(guidance, sigma, source), Attention()(guidance, sigma, source))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_to_one_graph(backend):
    inputs = random_inputs(2, 6, 5, 4, 1)[:3]  # two tiles
    attention = Attention()
    compiled = torch.compile(attention, fullgraph=True, backend=backend)

    def output_and_gradients(function):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = function(*leaves)
        return [output, *torch.autograd.grad(output.square().sum(), leaves)]

    for value, reference in zip(output_and_gradients(compiled), output_and_gradients(attention)):
        assert relative_error(value, reference) < 1e-5


def weights_and_gradients(sigma: float, dtype: torch.dtype):
    guidance = random_inputs(1, 5, 6, 4, 2, dtype)[0].requires_grad_()
    sigma = torch.tensor(sigma, dtype=dtype, requires_grad=True)
    weights = spatial_range_weights(guidance, sigma, 2)
    factors = torch.linspace(-1, 2, weights.numel(), dtype=dtype).view_as(weights)
    return weights, *torch.autograd.grad((weights * factors).sum(), (guidance, sigma))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
class TestExtremeSigma:
    @pytest.mark.parametrize("sigma", [0.0, 1e-30, -1e-8])
    def test_without_width_the_centre_alone_counts(self, sigma, dtype):
        weights, grad_guidance, grad_sigma = weights_and_gradients(sigma, dtype)
        range_kernel, _, _ = weights_and_gradients(float("inf"), dtype)
        centre = torch.arange(25) == 12
        assert torch.equal(weights, range_kernel * centre)
        assert grad_sigma == 0 and grad_guidance.isfinite().all() and grad_guidance.any()

    @pytest.mark.parametrize("sigma", [float("inf"), -float("inf"), 1e30])
    def test_of_infinite_width_all_positions_count_alike(self, sigma, dtype):
        weights, grad_guidance, grad_sigma = weights_and_gradients(sigma, dtype)
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 5, 6, dtype=dtype))
        assert grad_sigma == 0 and grad_guidance.isfinite().all() and grad_guidance.any()

    def test_the_sign_does_not_count(self, dtype):
        weights, grad_guidance, grad_sigma = weights_and_gradients(0.7, dtype)
        mirrored = weights_and_gradients(-0.7, dtype)
        assert all(map(torch.equal, mirrored, (weights, grad_guidance, -grad_sigma)))

    def test_not_a_number_stays_one(self, dtype):
        assert weights_and_gradients(float("nan"), dtype)[0].isnan().all()


FEATURES = torch.zeros(1, 4, 6, 2)
SIGMA = torch.tensor(1.0)


@pytest.mark.parametrize(
    "function, arguments, message",
    [
        (spatial_range_weights, (FEATURES[0], SIGMA, 1), r"`guidance`.*\(4, 6, 2\)"),
        (spatial_range_weights, (FEATURES.int(), SIGMA, 1), r"`guidance`.*int32"),
        (spatial_range_weights, (FEATURES, SIGMA, 0), r"`radius`.*got 0"),
        (spatial_range_weights, (FEATURES, SIGMA, 1.5), r"`radius`.*got 1.5"),
        (spatial_range_weights, (FEATURES, SIGMA, True), r"`radius`.*got True"),
        (spatial_range_weights, (FEATURES, SIGMA, 4), r"4 x 6.*radius 4.*smaller radius"),
        (spatial_range_weights, (FEATURES, SIGMA[None], 1), r"`sigma`.*\(1,\)"),
        (neighborhood_aggregate, (FEATURES[0], torch.zeros(4, 6, 9), 1), r"`source`.*\(4, 6, 2\)"),
        (neighborhood_aggregate, (FEATURES.long(), torch.zeros(1, 4, 6, 9), 1), r"`source`.*int64"),
        (
            neighborhood_aggregate,
            (FEATURES, torch.zeros(1, 4, 6, 25), 1),
            r"`weights`.*\(1, 4, 6, 9\).*\(1, 4, 6, 25\)",
        ),
        (neighborhood_aggregate, (FEATURES, torch.zeros(1, 6, 4, 9), 1), r"`weights`.*\(1, 6, 4, 9\)"),
        (neighborhood_aggregate, (FEATURES, torch.zeros(1, 4, 6, 9).int(), 1), r"`weights`.*int32"),
        (neighborhood_aggregate, (FEATURES, torch.zeros(1, 4, 6, 81), 4), r"4 x 6.*radius 4"),
    ],
)
def test_mistakes_are_named(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda map_, window: spatial_range_weights(map_, torch.ones((), device="meta"), 1), "`sigma` is on meta"),
        (lambda map_, window: spatial_range_weights(map_, 1.0, 1), "`sigma` must be a tensor, got 1.0"),
        (lambda map_, window: spatial_range_weights(map_, torch.tensor(1j), 1), "`sigma` must be a real number"),
        (lambda map_, window: spatial_range_weights(None, torch.ones(()), 1), "`guidance` must be a tensor, got None"),
        (lambda map_, window: neighborhood_aggregate(map_, window.to("meta"), 1), "`weights` is on meta"),
        (lambda map_, window: neighborhood_aggregate(map_, window.numpy(), 1), "`weights` must be a tensor"),
    ],
)
def test_what_is_no_tensor_or_elsewhere_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(1, 4, 4, 2), torch.ones(1, 4, 4, 9))
