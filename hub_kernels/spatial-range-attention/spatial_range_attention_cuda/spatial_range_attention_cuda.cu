// Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
//
// The operators on a GPU. Everything runs on PyTorch's current stream, nothing waits for it, and the only memory is
// PyTorch's, so that CUDA graphs can capture it. The kernels and their grids are in launch.cuh.

#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <limits>
#include <tuple>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "checks.h"
#include "launch.cuh"
#include "torch_binding.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace spatial_range_attention::device;

void check(cudaError_t error, const char* action) {
  if (error != cudaSuccess) cudaGetLastError();  // reported here, not by whoever asks next
  STD_TORCH_CHECK(error == cudaSuccess, "spatial-range-attention could not ", action, ": ", cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), "read a device attribute");
  return value;
}

Hardware read_hardware(int device) {
  Hardware hardware;
  hardware.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
#if !defined(USE_ROCM)
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
  STD_TORCH_CHECK(major >= 8, "spatial-range-attention needs a GPU of compute capability 8.0 or higher, but device ",
                  device, " has ", major, ".", minor, "; use the PyTorch functions of the same names there.");
  hardware.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  hardware.shared_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
#endif
  return hardware;
}

const Hardware& hardware_of(int device) {
  constexpr int kMaxDevices = 256;
  struct Entry {
    bool known = false;
    Hardware hardware;
  };
  static thread_local std::array<Entry, kMaxDevices> entries;
  STD_TORCH_CHECK(device >= 0 && device < kMaxDevices, "spatial-range-attention got device index ", device);
  Entry& entry = entries[device];
  if (!entry.known) entry = {true, read_hardware(device)};
  return entry.hardware;
}

// Makes the device of a tensor current, and starts kernels on its current stream.
class Launcher {
 public:
  explicit Launcher(const Tensor& tensor) : device_(tensor.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  const Hardware& hardware() const { return hardware_of(device_); }

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int shared_bytes, Arguments... arguments) const {
    constexpr int kSharedWithoutRequest = 48 * 1024;
    STD_TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "spatial-range-attention would need ", blocks,
                    " blocks for this map; use smaller batches.");
    if (shared_bytes > kSharedWithoutRequest) {
      check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 shared_bytes),
            "reserve shared memory");
    }
    kernel<<<static_cast<unsigned>(blocks), kThreads, shared_bytes, stream_>>>(arguments...);
    check(cudaGetLastError(), "start a kernel (was it built for this GPU?)");
  }

 private:
  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

Element element_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return Element::float64;
    case ScalarType::Float: return Element::float32;
    case ScalarType::BFloat16: return Element::bfloat16;
    case ScalarType::Half: return Element::float16;
    default: STD_TORCH_CHECK(false, "unsupported dtype ", torch::headeronly::toString(tensor.scalar_type()), ".");
  }
}

Map map_of(const Tensor& features, int64_t radius) {
  constexpr int64_t kLargest = std::numeric_limits<int>::max() / 2;
  const int64_t height = features.size(1), width = features.size(2), channels = features.size(3);
  STD_TORCH_CHECK(height <= kLargest / width && channels <= kLargest, "a map of ", height, " x ", width, " x ", channels,
                  " is too large for spatial-range-attention.");
  return {features.size(0), static_cast<int>(height), static_cast<int>(width), static_cast<int>(channels),
          static_cast<int>(radius)};
}

Tensor make_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return spatial_range_attention::allocated([&] {
    return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
  });
}

void check_cuda(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda(), "`", name, "` must be on a GPU.");
}

ScalarType accumulator_of(const Tensor& features) {
  return features.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace

std::tuple<Tensor, Tensor> spatial_range_weights_cuda(const Tensor& guidance_, const Tensor& sigma, int64_t radius,
                                                      bool allow_tf32) {
  check_features(guidance_, "guidance", radius);
  check_sigma(sigma, guidance_);
  check_cuda(guidance_, "guidance");
  const Map map = map_of(guidance_, radius);
  const ScalarType dtype = accumulator_of(guidance_);
  Tensor weights = empty(guidance_, {map.batch, map.height, map.width, map.neighbors()}, dtype);
  Tensor range_kernel =
      spatial_range_attention::allocated([&] { return torch::stable::empty_like(weights); });
  if (map.batch == 0) return {weights, range_kernel};

  const Launcher launch(guidance_);
  const Tensor guidance = make_contiguous(guidance_);
  const Element element = element_of(guidance);
  const Plan plan = plan_dot(map, element, true, launch.hardware());
  Tensor dots = empty(guidance, {dots_size(map, plan)}, dtype);
  weights_forward(launch, map, element, guidance.data_ptr(), sigma.data_ptr(), dots.data_ptr(), weights.data_ptr(),
                  range_kernel.data_ptr(), plan, allow_tf32);
  return {weights, range_kernel};
}

std::tuple<Tensor, Tensor> spatial_range_weights_backward_cuda(const Tensor& grad_, const Tensor& guidance_,
                                                               const Tensor& sigma, const Tensor& range_kernel_,
                                                               int64_t radius, bool allow_tf32) {
  check_features(guidance_, "guidance", radius);
  check_sigma(sigma, guidance_);
  check_weights(range_kernel_, guidance_, radius, "range_kernel");
  check_like(grad_, range_kernel_, "grad");
  check_cuda(guidance_, "guidance");
  const ScalarType dtype = accumulator_of(guidance_);
  STD_TORCH_CHECK(range_kernel_.scalar_type() == dtype, "`range_kernel` must be ", torch::headeronly::toString(dtype),
                  ", got ", torch::headeronly::toString(range_kernel_.scalar_type()), ".");
  const Map map = map_of(guidance_, radius);
  Tensor grad_guidance = empty(guidance_, {map.batch, map.height, map.width, map.channels}, guidance_.scalar_type());
  Tensor grad_sigma = torch::stable::empty_like(sigma);

  const Launcher launch(guidance_);
  if (map.batch == 0) {
    torch::stable::zero_(grad_sigma);
    return {grad_guidance, grad_sigma};
  }
  const Tensor grad = make_contiguous(grad_), guidance = make_contiguous(guidance_);
  const Tensor range_kernel = make_contiguous(range_kernel_);
  const Element element = element_of(guidance);
  const Element weights_element = element == Element::float64 ? Element::float64 : Element::float32;
  const Plan plan = plan_sum(map, element, weights_element, launch.hardware());
  Tensor similarity = empty(guidance, {map.positions() * map.neighbors()}, dtype);
  Tensor partial = empty(guidance, {gradient_blocks(map)}, dtype);
  weights_backward(launch, map, element, grad.data_ptr(), guidance.data_ptr(), sigma.data_ptr(),
                   range_kernel.data_ptr(), similarity.data_ptr(), partial.data_ptr(), grad_guidance.data_ptr(),
                   grad_sigma.data_ptr(), plan, allow_tf32);
  return {grad_guidance, grad_sigma};
}

Tensor neighborhood_aggregate_cuda(const Tensor& source_, const Tensor& weights_, int64_t radius, bool allow_tf32) {
  check_features(source_, "source", radius);
  check_weights(weights_, source_, radius, "weights");
  check_cuda(source_, "source");
  const Map map = map_of(source_, radius);
  Tensor out = empty(source_, {map.batch, map.height, map.width, map.channels}, source_.scalar_type());
  if (map.batch == 0) return out;

  const Launcher launch(source_);
  const Tensor source = make_contiguous(source_), weights = make_contiguous(weights_);
  const Element element = element_of(source), weights_element = element_of(weights);
  launch_sum(launch, map, element, weights_element, source.data_ptr(), weights.data_ptr(), out.data_ptr(),
             Fold::forward, 1.0, plan_sum(map, element, weights_element, launch.hardware()), allow_tf32);
  return out;
}

std::tuple<Tensor, Tensor> neighborhood_aggregate_backward_cuda(const Tensor& grad_, const Tensor& source_,
                                                                const Tensor& weights_, int64_t radius,
                                                                bool needs_source, bool needs_weights,
                                                                bool allow_tf32) {
  check_features(source_, "source", radius);
  check_weights(weights_, source_, radius, "weights");
  check_like(grad_, source_, "grad");
  check_cuda(source_, "source");
  const Map map = map_of(source_, radius);
  Tensor grad_source = needs_source ? empty(source_, {map.batch, map.height, map.width, map.channels},
                                            source_.scalar_type())
                                    : empty(source_, {0}, source_.scalar_type());
  Tensor grad_weights = needs_weights ? empty(source_, {map.batch, map.height, map.width, map.neighbors()},
                                              weights_.scalar_type())
                                      : empty(source_, {0}, weights_.scalar_type());
  if (map.batch == 0) return {grad_source, grad_weights};

  const Launcher launch(source_);
  const Tensor grad = make_contiguous(grad_);
  const Element element = element_of(source_), weights_element = element_of(weights_);
  if (needs_source) {
    const Tensor weights = make_contiguous(weights_);
    launch_sum(launch, map, element, weights_element, grad.data_ptr(), weights.data_ptr(), grad_source.data_ptr(),
               Fold::adjoint, 1.0, plan_sum(map, element, weights_element, launch.hardware()), allow_tf32);
  }
  if (needs_weights) {
    const Tensor source = make_contiguous(source_);
    const bool same = grad.data_ptr() == source.data_ptr();
    const Plan plan = plan_dot(map, element, same, launch.hardware());
    Tensor dots = empty(source, {dots_size(map, plan)}, accumulator_of(source));
    aggregate_grad_weights(launch, map, element, weights_element, grad.data_ptr(), source.data_ptr(), dots.data_ptr(),
                           grad_weights.data_ptr(), plan, allow_tf32);
  }
  return {grad_source, grad_weights};
}
