# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Benchmarks for the `kernels` command line, from this folder's parent:  kernels benchmark .

Each workload is checked before it is timed, against a plain PyTorch version that gathers every neighbourhood and whose
time is the reference time shown. Grid 16 × 16, radius 3, float32, one image.
"""

import math

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark


RADIUS = 3


def gather_neighbors(maps: torch.Tensor) -> torch.Tensor:
    """(B, H, W, C) → (B, H, W, K, C): the neighbours of each position, reflected at the borders."""
    padded = F.pad(maps.permute(0, 3, 1, 2), [RADIUS] * 4, mode="reflect")
    windows = padded.unfold(2, 2 * RADIUS + 1, 1).unfold(3, 2 * RADIUS + 1, 1)  # (B, C, H, W, d, d)
    return windows.flatten(4).permute(0, 2, 3, 4, 1)


def plain_weights(guidance: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    similarities = torch.einsum("bhwc,bhwnc->bhwn", guidance, gather_neighbors(guidance))
    u = torch.linspace(-1, 1, 2 * RADIUS + 1, device=guidance.device)
    spatial_kernel = torch.exp(-(u[:, None] ** 2 + u**2) / (2 * sigma**2)).flatten()
    return (similarities / math.sqrt(guidance.shape[-1])).softmax(dim=-1) * spatial_kernel


def plain_aggregate(source: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bhwn,bhwnc->bhwc", weights, gather_neighbors(source))


def checked(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> torch.Tensor:
    """The runner alone would allow 1e-2, half of what a weight is."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    return expected


class Inputs:
    """Guidance scaled so that the softmax spreads over the neighbours."""

    seed = 0
    channels: int

    def setup(self):
        shape = 1, 16, 16, self.channels
        self.guidance = torch.randn(shape, device=self.device) * (2 / math.sqrt(self.channels)) ** 0.5
        self.source, self.upstream = (torch.randn(shape, device=self.device) for _ in range(2))
        self.sigma = torch.tensor(1.0, device=self.device)
        self.weights = plain_weights(self.guidance, self.sigma)


class Weights(Inputs):
    def benchmark_weights(self):
        self.out = self.kernel.spatial_range_weights(self.guidance, self.sigma, RADIUS)

    def verify_weights(self) -> torch.Tensor:
        return checked(self.out, plain_weights(self.guidance, self.sigma))


class Aggregate(Inputs):
    def benchmark_aggregate(self):
        self.out = self.kernel.neighborhood_aggregate(self.source, self.weights, RADIUS)

    def verify_aggregate(self) -> torch.Tensor:
        return checked(self.out, plain_aggregate(self.source, self.weights))


class ForwardBackward(Inputs):
    """Both functions, and the gradients of guidance, σ and source."""

    def setup(self):
        super().setup()
        self.leaves = [tensor.requires_grad_() for tensor in (self.guidance, self.sigma, self.source)]

    def benchmark_forward_backward(self):
        weights = self.kernel.spatial_range_weights(self.guidance, self.sigma, RADIUS)
        self.out = self.kernel.neighborhood_aggregate(self.source, weights, RADIUS)
        self.gradients = torch.autograd.grad(self.out, self.leaves, self.upstream)

    def verify_forward_backward(self) -> torch.Tensor:
        expected = plain_aggregate(self.source, plain_weights(self.guidance, self.sigma))
        gradients = torch.autograd.grad(expected, self.leaves, self.upstream)
        # The terms of σ's gradient nearly cancel: in float32 the plain version itself is off by more than 1e-4.
        for actual, gradient, tolerance in zip(self.gradients, gradients, (1e-4, 1e-3, 1e-4)):
            checked(actual, gradient, tolerance)
        return checked(self.out, expected)


class WeightsC1536(Weights, Benchmark):
    channels = 1536


class WeightsC3072(Weights, Benchmark):
    channels = 3072


class AggregateC1536(Aggregate, Benchmark):
    channels = 1536


class AggregateC3072(Aggregate, Benchmark):
    channels = 3072


class ForwardBackwardC1536(ForwardBackward, Benchmark):
    channels = 1536


class ForwardBackwardC3072(ForwardBackward, Benchmark):
    channels = 3072
