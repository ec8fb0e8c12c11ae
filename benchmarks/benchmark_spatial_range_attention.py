# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Compare spatial-range attention with the published formulation, on one CPU core.

    python benchmarks/benchmark_spatial_range_attention.py [--quick] [--output results.json]

The published formulation pads by reflection, unfolds every neighbourhood into (B, C, K, H, W), once for the guidance
and once for the values, and sums with einsum; it is written out below. Variants take turns in one process, one thread,
and each figure is a median of processor time, which other programs on the machine disturb least: compare ratios within
one run, not milliseconds of two. Errors are the largest difference from a float64 reference, relative to its largest
value. Memory is the peak of what torch's allocator holds above the inputs, added up from the profiler's record of each
allocation and release; scratch space inside the BLAS is not seen.
"""

import argparse
import gc
import json
import math
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from transformers_aurea.fusion_aurea import SpatialRangeAttention, SpatialRangeFusion
from transformers_aurea.spatial_range_attention_aurea import neighborhood_aggregate, spatial_range_weights


RADIUS = 3
GRID = 16


# ---- the published formulation, maps of (B, C, H, W) ----


def published_unfold(maps, radius):
    batch, channels, height, width = maps.shape
    padded = F.pad(maps, [radius] * 4, mode="reflect")
    return F.unfold(padded, 2 * radius + 1).view(batch, channels, -1, height, width)


def published_weights(proj, sigma, radius):
    similarities = torch.einsum("bchw,bcnhw->bnhw", proj, published_unfold(proj, radius)) / math.sqrt(proj.shape[1])
    u = torch.linspace(-1, 1, 2 * radius + 1, dtype=proj.dtype)
    gaussian = torch.exp(-(u[:, None] ** 2 + u[None, :] ** 2) / (2 * sigma**2))
    return similarities.softmax(1) * gaussian.view(1, -1, 1, 1)


def published_aggregate(values, weights, radius):
    return torch.einsum("bnhw,bcnhw->bchw", weights, published_unfold(values, radius))


def published_projection(projection, maps):
    """1×1 convolution, LayerNorm over channels in the dtype of the maps, activation, 1×1 convolution."""
    maps = F.conv2d(maps, projection.fc1.weight[:, :, None, None], projection.fc1.bias)
    mean = maps.mean(1, keepdim=True)
    variance = (maps - mean).pow(2).mean(1, keepdim=True)
    maps = (maps - mean) / torch.sqrt(variance + projection.norm.eps)
    maps = projection.norm.weight[:, None, None] * maps + projection.norm.bias[:, None, None]
    return F.conv2d(projection.activation(maps), projection.fc2.weight[:, :, None, None], projection.fc2.bias)


def published_layer(layer, values, semantic):
    proj = published_projection(layer.range_proj, semantic)
    proj = proj.to(torch.promote_types(proj.dtype, torch.float32))
    weights = published_weights(proj, layer.sigma_spatial, layer.radius).to(semantic.dtype)
    fixup = published_projection(layer.fixup_proj, torch.cat([weights, semantic], 1))
    weights = weights + weights * fixup.sigmoid()
    weights = weights / (weights.sum(1, keepdim=True) + 1e-7)
    return published_projection(layer.output_proj, published_aggregate(values, weights, layer.radius))


def published_fusion(fusion, semantic_features, spatial_features):
    semantic = fusion.semantic_proj(fusion.semantic_norm(semantic_features)).permute(0, 3, 1, 2)
    spatial = fusion.spatial_norm(spatial_features).permute(0, 3, 1, 2)
    semantic, spatial = semantic.contiguous(), spatial.contiguous()
    joint_values = torch.cat([spatial, semantic], 1)
    for layer in fusion.semantic_layers:
        semantic = published_layer(layer, spatial, semantic) + semantic
    joint = torch.cat([spatial, semantic], 1)
    for layer in fusion.joint_layers:
        joint = published_layer(layer, joint_values, joint) + joint
    return fusion.output_proj(joint.flatten(2).transpose(1, 2))


# ---- references in float64, by a loop over the neighbours ----


def reference_op(guidance, sigma, source, radius):
    """Weights and their sum in float64, token layout; needs no more memory than a few maps."""
    guidance, source, sigma = guidance.double(), source.double(), sigma.double()
    height, width = guidance.shape[1:3]

    def neighbors(maps):
        padded = F.pad(maps.permute(0, 3, 1, 2), [radius] * 4, mode="reflect").permute(0, 2, 3, 1)
        for dy in range(2 * radius + 1):
            for dx in range(2 * radius + 1):
                yield padded[:, dy : dy + height, dx : dx + width]

    similarities = torch.stack([(guidance * neighbor).sum(-1) for neighbor in neighbors(guidance)], -1)
    u = torch.linspace(-1, 1, 2 * radius + 1, dtype=torch.float64)
    gaussian = torch.exp(-(u[:, None] ** 2 + u[None, :] ** 2) / (2 * sigma**2)).flatten()
    weights = (similarities / math.sqrt(guidance.shape[-1])).softmax(-1) * gaussian
    return sum(weights[..., n, None] * neighbor for n, neighbor in enumerate(neighbors(source)))


# ---- measuring ----


def interleaved_medians(functions, rounds, repeats):
    """Median processor seconds of each function. Every round runs each of them, `repeats[name]` times, in turn."""
    times = {name: [] for name in functions}
    for function in functions.values():
        function()  # warm up
    for _ in range(rounds):
        for name, function in functions.items():
            for _ in range(repeats[name]):
                start = time.process_time()
                function()
                times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(function):
    """Bytes that torch's allocator holds at most during the call, above what it held before."""
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profile:
        result = function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return peak


def relative_error(actual, expected):
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def op_inputs(batch, grid, channels, dtype=torch.float32):
    """Guidance scaled so that the softmax spreads over the neighbours."""
    generator = torch.Generator().manual_seed(0)
    guidance = torch.randn(batch, grid, grid, channels, generator=generator) * (2 / math.sqrt(channels)) ** 0.5
    source = torch.randn(batch, grid, grid, channels, generator=generator)
    return guidance.to(dtype), torch.tensor(1.0), source.to(dtype)


def ours(guidance, sigma, source):
    return neighborhood_aggregate(source, spatial_range_weights(guidance, sigma, RADIUS), RADIUS)


def published(guidance, sigma, source):
    return published_aggregate(source, published_weights(guidance, sigma, RADIUS), RADIUS)


def with_backward(function, inputs):
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    upstream = torch.ones_like(inputs[2])

    @torch.enable_grad()
    def run():
        output = function(*leaves)
        return output, torch.autograd.grad(output, leaves, upstream)

    return run


# ---- the tables ----


def benchmark_op(batch, channels, rounds):
    """Forward, and forward with backward, of the two functions together."""
    inputs = op_inputs(batch, GRID, channels)
    maps = [tensor.permute(0, 3, 1, 2).contiguous() if tensor.ndim == 4 else tensor for tensor in inputs]
    error = relative_error(ours(*inputs), reference_op(*inputs, RADIUS))
    passes = {
        "forward": (lambda: published(*maps), lambda: ours(*inputs)),
        "forward+backward": (with_backward(published, maps), with_backward(ours, inputs)),
    }
    for name, (baseline, candidate) in passes.items():
        seconds = interleaved_medians({"published": baseline, "ours": candidate}, rounds, {"published": 1, "ours": 5})
        memory = {"published": peak_memory(baseline), "ours": peak_memory(candidate)}
        yield {
            "what": f"op {name}",
            "shape": [batch, GRID, GRID, channels],
            "dtype": "float32",
            "published_ms": seconds["published"] * 1e3,
            "ours_ms": seconds["ours"] * 1e3,
            "speedup": seconds["published"] / seconds["ours"],
            "published_mb": memory["published"] / 2**20,
            "ours_mb": memory["ours"] / 2**20,
            "memory_ratio": memory["published"] / memory["ours"],
            "error": error,
        }


def benchmark_grid(grid, channels, rounds):
    inputs = op_inputs(1, grid, channels)
    seconds = interleaved_medians({"ours": lambda: ours(*inputs)}, rounds, {"ours": 1})["ours"]
    return {
        "what": "op forward, grid",
        "shape": [1, grid, grid, channels],
        "dtype": "float32",
        "ours_ms": seconds * 1e3,
        "us_per_position": seconds / grid**2 * 1e6,
        "ours_mb": peak_memory(lambda: ours(*inputs)) / 2**20,
        "error": relative_error(ours(*inputs), reference_op(*inputs, RADIUS)),
    }


def linear_layers_only(fusion, features):
    """The matrix products of the fusion's linear layers, one after the other, on inputs of their shapes."""
    linears = [module for module in fusion.modules() if isinstance(module, nn.Linear)]
    widths = {linear.in_features for linear in linears}
    inputs = {width: torch.randn(1, GRID * GRID, width).to(features.dtype) for width in widths}

    def run():
        for linear in linears:
            linear(inputs[linear.in_features])

    return run


def benchmark_fusion(dtype, depth, rounds, fusion, features, expected):
    """The stack at its published width. σ stays float32, as the model keeps it."""
    fusion.to(dtype)
    for module in fusion.modules():
        if isinstance(module, SpatialRangeAttention):
            module.sigma_spatial.data = module.sigma_spatial.data.float()
    features = [tensor.to(dtype) for tensor in features]
    functions = {
        "published": lambda: published_fusion(fusion, *features),
        "ours": lambda: fusion(*features),
        "linear layers": linear_layers_only(fusion, features[0]),
    }
    seconds = interleaved_medians(functions, rounds, {"published": 1, "ours": 5, "linear layers": 5})
    return {
        "what": f"fusion of {4 * depth} layers",
        "shape": [1, GRID, GRID, fusion.output_dim],
        "dtype": str(dtype).removeprefix("torch."),
        "published_ms": seconds["published"] * 1e3,
        "ours_ms": seconds["ours"] * 1e3,
        "linear_layers_ms": seconds["linear layers"] * 1e3,
        "speedup": seconds["published"] / seconds["ours"],
        "fraction_of_linear_layers_speed": seconds["linear layers"] / seconds["ours"],
        "error": relative_error(functions["ours"](), expected),
        "published_error": relative_error(functions["published"](), expected),
    }


def benchmark_fusions(depth, rounds):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    fusion = SpatialRangeFusion(semantic_dim=1152, spatial_dim=1536, depth=depth, radius=RADIUS).requires_grad_(False)
    features = [torch.randn(1, GRID, GRID, channels, generator=generator) for channels in (1152, 1536)]
    expected = published_fusion(fusion.double(), *(tensor.double() for tensor in features))
    for dtype in (torch.float32, torch.bfloat16):
        yield benchmark_fusion(dtype, depth, rounds, fusion, features, expected)


def hardware():
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = {flag for line in lines if line.startswith("flags") for flag in line.split(":", 1)[1].split()}
    return {
        "processor": models[0] if models else platform.processor(),
        "bfloat16_instructions": sorted(flags & {"avx512_bf16", "amx_bf16"}),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
    }


def format_row(row):
    figures = (f"{key} {value:.3g}" for key, value in row.items() if isinstance(value, float))
    return f"{row['what']:24} {'×'.join(map(str, row['shape'])):>15} {row['dtype']:9} " + "  ".join(figures)


def rows(quick):
    for batch in (1,) if quick else (1, 4):
        for channels in (1536, 3072):
            yield from benchmark_op(batch, channels, rounds=2 if quick or batch > 1 else 5)
    for grid in (16, 32, 64) if quick else (16, 32, 64, 128):
        yield benchmark_grid(grid, 1536, rounds=3)
    yield from benchmark_fusions(depth=1 if quick else 4, rounds=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, batch 1, one stage of the fusion")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    results = {"hardware": hardware(), "radius": RADIUS, "rows": []}
    with torch.no_grad():
        for row in rows(arguments.quick):
            print(format_row(row), flush=True)
            results["rows"].append(row)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
