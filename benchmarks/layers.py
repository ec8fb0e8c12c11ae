# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Whole layers and the fusion stack: against the published ones, and against their linear layers alone."""

import copy
import math
from functools import partial

import baselines
import torch
from measuring import fastest, relative_error, set_precision
from torch import nn
from trials import BASE, RADIUS, SEED, Trial, new_row

from transformers_aurea import AureaConfig
from transformers_aurea.fusion_aurea import AureaSpatialRangeAttention, AureaSpatialRangeFusion
from transformers_aurea.spatial_range_attention_aurea import neighborhood_aggregate, spatial_range_weights


class Function(nn.Module):
    """A function as the layer that a model calls."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def twin(module, weights, aggregate):
    """A copy that shares the parameters and computes its attention with the given functions."""
    module = copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})
    for layer in module.modules():
        if isinstance(layer, AureaSpatialRangeAttention):
            layer.spatial_range_weights = Function(weights)
            layer.neighborhood_aggregate = Function(aggregate)
    return module


def convert(module, dtype):
    """σ stays float32, as the model keeps it."""
    module.to(dtype)
    for layer in module.modules():
        if isinstance(layer, AureaSpatialRangeAttention) and dtype != torch.float64:
            layer.sigma_spatial.data = layer.sigma_spatial.data.float()


def apply_each(modules_and_inputs):
    for module, features in modules_and_inputs:
        module(features)


def linear_layers_of(module, features):
    """The matrix products of a module's linear layers, one after the other, on inputs of their shapes."""
    linears = [part for part in module.modules() if isinstance(part, nn.Linear)]
    shape = features.shape[:-1]
    inputs = {linear.in_features: torch.randn(*shape, linear.in_features).to(features) for linear in linears}
    return lambda: apply_each((linear, inputs[linear.in_features]) for linear in linears)


def benchmark_module(bench, what, module, published, layout, features, precisions):
    """A layer or the stack, forward. Errors are relative to float64 with unrounded weights and features.

    `layout` brings the features into that of the published formulation.
    """
    reference = twin(module, baselines.reference_weights, baselines.reference_aggregate)
    convert(module, torch.float64)
    expected = reference(*(tensor.double() for tensor in features))

    def prepare(name, function, inputs):
        inputs = [layout(tensor) for tensor in inputs] if name == "published" else inputs
        return lambda: function(*inputs)

    def check(result):
        return {"error": relative_error(result.view_as(expected), expected)} if torch.is_tensor(result) else {}

    for precision in precisions:
        set_precision(bench.device, precision)
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        convert(module, dtype)
        inputs = [tensor.to(dtype) for tensor in features]
        functions = {"published": lambda *inputs: published(module, *inputs), "pytorch": module}
        if bench.compiled:
            torch.compiler.reset()
            functions["compiled"] = torch.compile(module, dynamic=False)
        if bench.kernel:
            kernel = bench.kernel
            functions["kernel"] = twin(module, kernel.spatial_range_weights, kernel.neighborhood_aggregate)
        linear_layers = linear_layers_of(module, inputs[0])
        functions["linear_layers"] = lambda *inputs, linear_layers=linear_layers: linear_layers()
        not_run = {name: reason for name, reason in bench.missing.items() if name in ("compiled", "kernel")}
        row = new_row(what, (*features[0].shape[:-1], expected.shape[-1]), precision, not_run)

        # One sample of the published stack is of 16 layers, and takes half a minute.
        bench.measure(
            Trial(
                row,
                name,
                partial(prepare, name, function, inputs),
                check,
                compiles=name == "compiled",
                least=1 if name == "published" else 3 if dtype == torch.bfloat16 else 9,
            )
            for name, function in functions.items()
        )


def random_maps(bench, batch, widths):
    generator = torch.Generator().manual_seed(SEED)
    grid = BASE[1]
    return [torch.randn(batch, grid, grid, width, generator=generator).to(bench.device.type) for width in widths]


def benchmark_layer(bench, channels, precisions):
    torch.manual_seed(SEED)
    layer = AureaSpatialRangeAttention(channels, RADIUS).requires_grad_(False).to(bench.device.type)

    def published(layer, *maps):
        return baselines.to_tokens(baselines.published_layer(layer, *maps))

    features = random_maps(bench, 1, (channels, channels))
    benchmark_module(bench, "layer", layer, published, baselines.to_maps, features, precisions)


def benchmark_fusion(bench, depth, batch, precisions):
    """The stack at its published width."""
    torch.manual_seed(SEED)
    fusion = AureaSpatialRangeFusion(AureaConfig(feature_fusion_config={"depth": depth, "radius": RADIUS}))
    fusion = fusion.requires_grad_(False).to(bench.device.type)
    features = random_maps(bench, batch, (1152, 1536))
    what = f"fusion of {4 * depth} layers"
    benchmark_module(bench, what, fusion, baselines.published_fusion, lambda tensor: tensor, features, precisions)


def layer_parts(layer, source, guidance, weights_op, aggregate_op):
    """The steps of a layer, each with its inputs at hand, and the layer itself."""
    range_proj, fixup_proj, output_proj = layer.range_proj, layer.fixup_proj, layer.output_proj
    linears = (range_proj.fc1, range_proj.fc2, output_proj.fc1, output_proj.fc2)
    hidden = range_proj.fc1(guidance)
    weights = weights_op(guidance, layer.sigma_spatial.squeeze(0), layer.radius)
    fixup_input = torch.cat([weights, guidance], dim=-1)
    fixup_hidden = fixup_proj.fc1(fixup_input)

    def norms():
        range_proj.activation(range_proj.norm(hidden))
        output_proj.activation(output_proj.norm(hidden))

    def fixup_pointwise():
        torch.cat([weights, guidance], dim=-1)
        fixup_proj.activation(fixup_proj.norm(fixup_hidden))
        corrected = weights + weights * fixup_hidden.sigmoid()
        return corrected / (corrected.sum(dim=-1, keepdim=True) + 1e-7)

    return {
        "layer": lambda: layer(source, guidance),
        "linear_layers": lambda: apply_each((linear, guidance) for linear in linears),
        "norms": norms,
        "range_weights": lambda: weights_op(guidance, layer.sigma_spatial.squeeze(0), layer.radius),
        "fixup_linear_layers": lambda: apply_each(((fixup_proj.fc1, fixup_input), (fixup_proj.fc2, fixup_hidden))),
        "fixup_pointwise": fixup_pointwise,
        "aggregate": lambda: aggregate_op(source, weights, layer.radius),
    }


def benchmark_layer_parts(bench, channels):
    """What fusing the fix-up network's pointwise steps could save: no more than they and the calls' overheads take."""
    source, guidance = random_maps(bench, 1, (channels, channels))
    guidance *= (2 / math.sqrt(channels)) ** 0.5
    layer = AureaSpatialRangeAttention(channels, RADIUS).requires_grad_(False).to(bench.device.type)
    functions = (spatial_range_weights, neighborhood_aggregate)
    if bench.kernel:
        functions = (bench.kernel.spatial_range_weights, bench.kernel.neighborhood_aggregate)
        layer = twin(layer, *functions)
    parts = layer_parts(layer, source, guidance, *functions)
    for part in parts.values():
        part()
    milliseconds = {name: 1e3 * time for name, (time, _) in fastest(parts, bench.device, 3 * bench.budget).items()}
    total = milliseconds["layer"]
    rest = total - sum(time for name, time in milliseconds.items() if name != "layer")
    row = {
        "what": "layer breakdown",
        "shape": list(guidance.shape),
        "dtype": "float32",
        "implementation": "kernel" if bench.kernel else "pytorch",
        "ms": milliseconds | {"calls_and_rest": rest},
        "shares": {name: time / total for name, time in milliseconds.items()} | {"calls_and_rest": rest / total},
        "most_that_fusing_the_fixup_could_save": (milliseconds["fixup_pointwise"] + max(rest, 0)) / total,
    }
    bench.rows.append(row)
    shares = "  ".join(f"{name} {share:.1%}" for name, share in row["shares"].items())
    bound = row["most_that_fusing_the_fixup_could_save"]
    print(f"layer breakdown, C {channels}: {shares}; fusing the fix-up saves at most {bound:.1%}", flush=True)
