# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Compare implementations of spatial-range attention on one CPU core or on a CUDA device.

    python benchmarks/benchmark_spatial_range_attention.py [--device cuda] [--kernel FOLDER] [--quick]

`published` is the published formulation, `pytorch` our PyTorch path, `compiled` torch.compile of that, `kernel` the
compiled kernel, a local build; FlexAttention and NATTEN take part in speed only (`baselines.py`). All variants and all
sizes of one table take turns in one process, and each figure is that of the fastest call: compare ratios within one
run, not milliseconds of two. On a CPU one thread computes and processor time counts. On CUDA `ms` is the time of calls
from Python, one after the other, `graph_ms` that of a replayed CUDA graph.

Errors are the largest difference from a float64 reference on the same inputs, relative to its largest value; on grids
beyond 32 × 32 over three squares: two opposite corners and the middle. Memory, `mb`, is the most that torch's
allocator holds above the inputs; `resident_mb` the growth of the resident set, scratch space of libraries and kernel
included. What does not run, or would take too long or too much memory, is listed with the reason under `not_run`.
"""

import argparse
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import baselines
import torch
from layers import benchmark_fusion, benchmark_layer, benchmark_layer_parts
from measuring import DEVICES, MIB, hardware, relative_error, set_precision
from trials import BASE, RADIUS, SEED, Bench, Trial, new_row

from transformers_aurea.spatial_range_attention_aurea import neighborhood_aggregate, spatial_range_weights


ROOT = Path(__file__).resolve().parents[1]
KERNEL = ROOT / "hub_kernels" / "spatial-range-attention" / "build"
SLOWEST = 10  # seconds that a call of the published formulation may take
AT_BASE = "measured at batch 1, 16×16 only"


class Variant(NamedTuple):
    """One way to compute the op, from (guidance, sigma, source) in token layout, or as maps (B, C, H, W)."""

    name: str
    op: Callable
    maps: bool = False
    comparable: bool = True  # with the reference
    only_base: bool = False


# ---- the op ----


def op_of(weights, aggregate):
    return lambda guidance, sigma, source: aggregate(source, weights(guidance, sigma, RADIUS), RADIUS)


def op_variants(bench):
    yield Variant("published", lambda *inputs: baselines.published_op(*inputs, RADIUS), maps=True)
    ours = op_of(spatial_range_weights, neighborhood_aggregate)
    yield Variant("pytorch", ours)
    if bench.compiled:
        yield Variant("compiled", torch.compile(ours, dynamic=False))
    if bench.kernel:
        yield Variant("kernel", op_of(bench.kernel.spatial_range_weights, bench.kernel.neighborhood_aggregate))
    yield Variant("flex_attention", baselines.flex_op(RADIUS), comparable=False, only_base=True)
    if "natten" not in bench.missing:
        on_cpu = bench.device.type == "cpu"
        yield Variant("natten", baselines.natten_op(RADIUS), comparable=False, only_base=on_cpu)


def op_inputs(batch, grid, channels, dtype, device):
    """Guidance scaled so that the softmax spreads over the neighbours."""
    generator = torch.Generator().manual_seed(SEED)
    guidance = torch.randn(batch, grid, grid, channels, generator=generator) * (2 / math.sqrt(channels)) ** 0.5
    source, upstream = (torch.randn(batch, grid, grid, channels, generator=generator) for _ in range(2))
    guidance, source, upstream = (tensor.to(device, dtype) for tensor in (guidance, source, upstream))
    return (guidance, torch.tensor(1.0, device=device), source), upstream


def with_backward(op, inputs, upstream):
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]

    @torch.enable_grad()
    def run():
        output = op(*leaves)
        return output, *torch.autograd.grad(output, leaves, upstream)

    return run


def squares(grid, side=16):
    """Regions of a grid in which errors are measured."""
    if grid <= 32:
        return [(slice(0, grid), slice(0, grid))]
    starts = (0, (grid - side) // 2, grid - side)
    return [(slice(start, start + side), slice(start, start + side)) for start in starts]


def check_against(expected, gradients, variant):
    """A function of a variant's result that gives its errors."""

    def check(result):
        output, *grads = (baselines.to_tokens(tensor) if variant.maps else tensor for tensor in result)
        errors = [relative_error(output[:, rows, columns], square) for (rows, columns), square in expected]
        figures = {"error": max(errors)}
        for name, actual, gradient in zip(("guidance", "sigma", "source"), grads, gradients):
            figures[f"error_of_{name}_gradient"] = relative_error(actual, gradient)
        return figures

    return check if variant.comparable else lambda result: {}


def op_trials(bench, variants, row, base_row, dtype, backward):
    """A trial of each variant at the row's size."""
    batch, grid, _, channels = row["shape"]
    inputs, upstream = op_inputs(batch, grid, channels, dtype, bench.device.type)
    regions = squares(grid)
    expected = [(region, baselines.reference_op(*inputs, RADIUS, region)) for region in regions]
    gradients = ()
    if backward and (batch, grid) == BASE:
        leaves = [tensor.double() for tensor in inputs]
        reference = with_backward(lambda *leaves: baselines.reference_op(*leaves, RADIUS), leaves, upstream.double())
        _, *gradients = reference()
    elif backward:
        row["gradient_errors"] = AT_BASE

    def obstacle(variant):
        if row is base_row:
            return None
        if variant.name not in base_row["variants"]:
            return base_row["not_run"][variant.name]
        if variant.only_base:
            return f"{AT_BASE}: other sizes would have to be compiled, or need the scores of all pairs"
        if variant.name != "published":
            return None
        if dtype != torch.float32 and bench.device.type == "cpu":
            return f"{AT_BASE} in this dtype, to keep the run short"
        base = base_row["variants"]["published"]
        times = math.prod(row["shape"]) / math.prod(base_row["shape"])
        seconds, megabytes = base["first_call_s"] * times, base["mb"] * times
        if seconds > SLOWEST:
            return f"would take about {seconds:.0f} s a call, judging by the smallest size"
        if megabytes > 0.8 * bench.device.free_bytes() / MIB:
            return f"would take about {megabytes / 1024:.0f} GiB, judging by the smallest size"
        return None

    def prepare(variant):
        arguments = [baselines.to_maps(tensor) for tensor in inputs] if variant.maps else inputs
        if backward:
            return with_backward(variant.op, arguments, baselines.to_maps(upstream) if variant.maps else upstream)
        return lambda: (variant.op(*arguments),)

    for variant in variants:
        check = check_against(expected, gradients, variant)
        compiles = variant.name in ("compiled", "flex_attention")
        yield Trial(row, variant.name, partial(prepare, variant), check, partial(obstacle, variant), compiles)


def benchmark_op(bench, channels, precision, places):
    """Forward, and forward with backward, at all places together."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    for what in ("op forward", "op forward+backward"):
        torch.compiler.reset()
        variants = list(op_variants(bench))
        rows = [new_row(what, (batch, grid, grid, channels), precision, bench.missing) for batch, grid in places]
        bench.measure(
            trial
            for row in rows
            for trial in op_trials(bench, variants, row, rows[0], dtype, backward=what.endswith("backward"))
        )


# ---- the run ----


def load_kernel(folder):
    """The kernel and what its build says about itself."""
    from kernels import get_local_kernel

    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    kernel = get_local_kernel(folder)
    metadata = json.loads((Path(kernel.__file__).parent / "metadata.json").read_text())
    return kernel, {key: metadata[key] for key in ("id", "name", "version", "backend")}


def run(bench):
    cuda = bench.device.type == "cuda"
    precisions = ("float32", "tf32", "bfloat16") if cuda else ("float32", "bfloat16")
    places = (BASE, (1, 32)) if bench.quick else (BASE, (4, 16), (8, 16), (1, 32), (1, 64), (1, 128))
    widths = (1536,) if bench.quick else (1536, 3072)
    for precision in precisions:
        set_precision(bench.device, precision)
        for channels in widths:
            benchmark_op(bench, channels, precision, places)
    set_precision(bench.device, "float32")
    for channels in widths:
        benchmark_layer_parts(bench, channels)
        benchmark_layer(bench, channels, precisions)
    for batch in (1, 8) if cuda and not bench.quick else (1,):
        benchmark_fusion(bench, 1 if bench.quick else 4, batch, precisions)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--kernel", type=Path, help="a local build (default: AUREA_KERNEL_PATH, or hub_kernels')")
    parser.add_argument("--no-kernel", action="store_true", help="measure without the kernel")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    parser.add_argument("--quick", action="store_true", help="few samples and sizes; writes only to --output")
    parser.add_argument("--output", type=Path, help="JSON (default: benchmarks/results/…_<device>.json)")
    arguments = parser.parse_args()

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: this PyTorch finds no CUDA device", file=sys.stderr)
        return 2
    kernel, build, missing = None, None, {}
    if arguments.no_kernel:
        missing["kernel"] = "switched off by --no-kernel"
    else:
        folder = arguments.kernel or os.environ.get("AUREA_KERNEL_PATH") or KERNEL
        try:
            kernel, build = load_kernel(Path(folder).expanduser().resolve())
        except Exception as error:
            print(
                f"error: the kernel could not be loaded from {folder}: {error}\nBuild it with `python "
                f"{KERNEL.parent.relative_to(ROOT)}/build_local.py {arguments.device}`, name another build with "
                "--kernel, or measure without it with --no-kernel.",
                file=sys.stderr,
            )
            return 2
    compiled = arguments.device == "cuda" if arguments.compile is None else arguments.compile
    if not compiled:
        missing["compiled"] = "not asked for (--compile)"
    if importlib.util.find_spec("natten") is None:
        missing["natten"] = "not installed"

    for name, reason in missing.items():  # once: the rows say it in the file only
        print(f"{name} is not measured: {reason}", flush=True)

    torch.set_num_threads(1)
    device = DEVICES[arguments.device]()
    bench = Bench(device, kernel, missing, compiled, arguments.quick)
    with torch.no_grad():
        run(bench)
    results = {"hardware": hardware(device), "kernel": build, "radius": RADIUS, "seed": SEED, "rows": bench.rows}
    output = arguments.output
    if output is None and not arguments.quick:
        output = ROOT / "benchmarks" / "results" / f"spatial_range_attention_{arguments.device}.json"
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n")
    failures = [row for row in bench.rows if {"pytorch", "kernel"} & row.get("not_run", {}).keys() - missing.keys()]
    for row in failures:
        print(f"error: {row['what']} {row['shape']} {row['dtype']}: {row['not_run']}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
