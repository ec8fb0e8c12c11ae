// Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
//
// What the kernels rely on. The Python functions refuse the same arguments with longer explanations; these checks
// keep a direct call of an operator from reading or writing outside its tensors.
#pragma once

#include <cstdint>
#include <exception>
#include <sstream>
#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace spatial_range_attention {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxRadius = 6;

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ")";
  return text.str();
}

inline std::string device_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return "a device that is neither cpu nor cuda";
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return (a.is_cpu() && b.is_cpu()) || a.device() == b.device();
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

// The dtype of sums, softmax and sigma.
inline ScalarType compute_type(const Tensor& features) {
  return features.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The new tensor of `make`. What PyTorch says of memory does not cross the stable ABI, but these are the words by which
// tools that try again with a smaller batch know it.
template <typename Make>
Tensor allocated(const Make& make) {
  try {
    return make();
  } catch (const std::exception& error) {
    STD_TORCH_CHECK(false, "Spatial-range attention is out of memory. ", error.what());
    throw;
  }
}

}  // namespace spatial_range_attention

// `features`: (B, H, W, C) of one of the four floating dtypes, on a map whose sides exceed the radius.
inline void check_features(const torch::stable::Tensor& features, const char* name, int64_t radius) {
  using namespace spatial_range_attention;
  STD_TORCH_CHECK(radius >= 1 && radius <= kMaxRadius, "`radius` must lie in 1..", kMaxRadius, ", got ", radius, ".");
  STD_TORCH_CHECK(features.dim() == 4, "`", name, "` must have shape (batch, height, width, channels), got ",
                  shape_of(features), ".");
  const ScalarType dtype = features.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
                      dtype == ScalarType::Double,
                  "`", name, "` must be float32, bfloat16, float16 or float64, got ",
                  torch::headeronly::toString(dtype), ".");
  STD_TORCH_CHECK(features.size(1) > radius && features.size(2) > radius, "`", name, "` of shape ", shape_of(features),
                  " has a grid too small for radius ", radius, ".");
  STD_TORCH_CHECK(features.size(3) >= 1, "`", name, "` of shape ", shape_of(features), " has no channels.");
}

// `sigma`: 0-dimensional, in the dtype of the sums, on the device of the guidance.
inline void check_sigma(const torch::stable::Tensor& sigma, const torch::stable::Tensor& guidance) {
  using namespace spatial_range_attention;
  STD_TORCH_CHECK(sigma.dim() == 0, "`sigma` must be a 0-dimensional tensor, got shape ", shape_of(sigma), ".");
  STD_TORCH_CHECK(sigma.scalar_type() == compute_type(guidance), "`sigma` must be ",
                  torch::headeronly::toString(compute_type(guidance)), ", got ",
                  torch::headeronly::toString(sigma.scalar_type()), ".");
  STD_TORCH_CHECK(same_device(sigma, guidance), "`sigma` is on ", device_of(sigma), ", but `guidance` is on ",
                  device_of(guidance), ".");
}

// `weights`: (B, H, W, K) for the source, in the dtype of the sums or of the source, on the device of the source.
inline void check_weights(const torch::stable::Tensor& weights, const torch::stable::Tensor& source, int64_t radius,
                          const char* name) {
  using namespace spatial_range_attention;
  const int64_t extent = 2 * radius + 1;
  const bool fits = weights.dim() == 4 && source.dim() == 4 && weights.size(0) == source.size(0) &&
                    weights.size(1) == source.size(1) && weights.size(2) == source.size(2) &&
                    weights.size(3) == extent * extent;
  STD_TORCH_CHECK(fits, "`", name, "` of shape ", shape_of(weights), " does not fit radius ", radius,
                  " and features of shape ", shape_of(source), ".");
  STD_TORCH_CHECK(weights.scalar_type() == compute_type(source) || weights.scalar_type() == source.scalar_type(), "`",
                  name, "` must be ", torch::headeronly::toString(compute_type(source)), " for features of dtype ",
                  torch::headeronly::toString(source.scalar_type()), ", got ",
                  torch::headeronly::toString(weights.scalar_type()), ".");
  STD_TORCH_CHECK(same_device(weights, source), "`", name, "` is on ", device_of(weights), ", but the features are on ",
                  device_of(source), ".");
}

// `grad`: the shape, dtype and device of `reference`.
inline void check_like(const torch::stable::Tensor& grad, const torch::stable::Tensor& reference, const char* name) {
  using namespace spatial_range_attention;
  STD_TORCH_CHECK(same_shape(grad, reference), "`", name, "` must have shape ", shape_of(reference), ", got ",
                  shape_of(grad), ".");
  STD_TORCH_CHECK(grad.scalar_type() == reference.scalar_type(), "`", name, "` must be ",
                  torch::headeronly::toString(reference.scalar_type()), ", got ",
                  torch::headeronly::toString(grad.scalar_type()), ".");
  STD_TORCH_CHECK(same_device(grad, reference), "`", name, "` is on ", device_of(grad), ", expected ",
                  device_of(reference), ".");
}
