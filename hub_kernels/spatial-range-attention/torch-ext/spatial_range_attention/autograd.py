# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Shapes for tracing and derivatives of the operators that the library registers."""

import torch

from ._ops import add_op_namespace_prefix, ops


@torch.library.register_fake(add_op_namespace_prefix("spatial_range_weights"))
def _spatial_range_weights_fake(guidance, sigma, radius, allow_tf32):
    shape = (*guidance.shape[:3], (2 * radius + 1) ** 2)
    return guidance.new_empty(shape, dtype=sigma.dtype), guidance.new_empty(shape, dtype=sigma.dtype)


@torch.library.register_fake(add_op_namespace_prefix("spatial_range_weights_backward"))
def _spatial_range_weights_backward_fake(grad, guidance, sigma, range_kernel, radius, allow_tf32):
    return guidance.new_empty(guidance.shape), sigma.new_empty(())


@torch.library.register_fake(add_op_namespace_prefix("neighborhood_aggregate"))
def _neighborhood_aggregate_fake(source, weights, radius, allow_tf32):
    return source.new_empty(source.shape)


@torch.library.register_fake(add_op_namespace_prefix("neighborhood_aggregate_backward"))
def _neighborhood_aggregate_backward_fake(grad, source, weights, radius, needs_source, needs_weights, allow_tf32):
    return (
        source.new_empty(source.shape if needs_source else (0,)),
        weights.new_empty(weights.shape if needs_weights else (0,)),
    )


def _setup_weights(ctx, inputs, output):
    guidance, sigma, ctx.radius, ctx.allow_tf32 = inputs
    _, range_kernel = output
    ctx.save_for_backward(guidance, sigma, range_kernel)
    ctx.mark_non_differentiable(range_kernel)


def _backward_weights(ctx, grad, _):
    guidance, sigma, range_kernel = ctx.saved_tensors
    grad_guidance, grad_sigma = ops.spatial_range_weights_backward(
        grad, guidance, sigma, range_kernel, ctx.radius, ctx.allow_tf32
    )
    needs_guidance, needs_sigma = ctx.needs_input_grad[:2]
    return grad_guidance if needs_guidance else None, grad_sigma if needs_sigma else None, None, None


torch.library.register_autograd(
    add_op_namespace_prefix("spatial_range_weights"), _backward_weights, setup_context=_setup_weights
)


def _setup_aggregate(ctx, inputs, output):
    source, weights, ctx.radius, ctx.allow_tf32 = inputs
    ctx.save_for_backward(source, weights)


def _backward_aggregate(ctx, grad):
    source, weights = ctx.saved_tensors
    needs_source, needs_weights = ctx.needs_input_grad[:2]
    grad_source, grad_weights = ops.neighborhood_aggregate_backward(
        grad, source, weights, ctx.radius, needs_source, needs_weights, ctx.allow_tf32
    )
    return grad_source if needs_source else None, grad_weights if needs_weights else None, None, None


torch.library.register_autograd(
    add_op_namespace_prefix("neighborhood_aggregate"), _backward_aggregate, setup_context=_setup_aggregate
)


FIRST_DERIVATIVES_ONLY = (
    "The spatial-range attention kernel has first derivatives, in reverse mode, only. For a derivative of a gradient "
    "(`create_graph=True`) or forward mode, use the PyTorch implementation: load the model with `use_kernels=False`, "
    "or set DISABLE_KERNEL_MAPPING=1."
)


def _backward_twice(ctx, *grads):
    raise NotImplementedError(FIRST_DERIVATIVES_ONLY)


torch.library.register_autograd(add_op_namespace_prefix("spatial_range_weights_backward"), _backward_twice)
torch.library.register_autograd(add_op_namespace_prefix("neighborhood_aggregate_backward"), _backward_twice)
