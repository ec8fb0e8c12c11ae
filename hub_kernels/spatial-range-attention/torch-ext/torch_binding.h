// Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
#pragma once

#include <cstdint>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

// The four operators, once per device. All of them take any strides, check their arguments (checks.h) and return
// contiguous tensors. Shapes: B batch, H W map, C channels, K = (2 * radius + 1)^2 neighbours.

#define SPATIAL_RANGE_ATTENTION_OPS(device)                                                                           \
  /* (B, H, W, C) guidance -> (B, H, W, K) weights and range kernel */                                                \
  std::tuple<torch::stable::Tensor, torch::stable::Tensor> spatial_range_weights_##device(                            \
      const torch::stable::Tensor& guidance, const torch::stable::Tensor& sigma, int64_t radius, bool allow_tf32);    \
  /* (B, H, W, K) grad -> (B, H, W, C) grad of guidance and 0-dim grad of sigma */                                    \
  std::tuple<torch::stable::Tensor, torch::stable::Tensor> spatial_range_weights_backward_##device(                   \
      const torch::stable::Tensor& grad, const torch::stable::Tensor& guidance, const torch::stable::Tensor& sigma,   \
      const torch::stable::Tensor& range_kernel, int64_t radius, bool allow_tf32);                                    \
  /* (B, H, W, C) source, (B, H, W, K) weights -> (B, H, W, C) */                                                     \
  torch::stable::Tensor neighborhood_aggregate_##device(                                                              \
      const torch::stable::Tensor& source, const torch::stable::Tensor& weights, int64_t radius, bool allow_tf32);    \
  /* (B, H, W, C) grad -> grad of source and grad of weights, each of shape (0,) where it is not needed */            \
  std::tuple<torch::stable::Tensor, torch::stable::Tensor> neighborhood_aggregate_backward_##device(                  \
      const torch::stable::Tensor& grad, const torch::stable::Tensor& source, const torch::stable::Tensor& weights,   \
      int64_t radius, bool needs_source, bool needs_weights, bool allow_tf32);

SPATIAL_RANGE_ATTENTION_OPS(cpu)
SPATIAL_RANGE_ATTENTION_OPS(cuda)

#undef SPATIAL_RANGE_ATTENTION_OPS
