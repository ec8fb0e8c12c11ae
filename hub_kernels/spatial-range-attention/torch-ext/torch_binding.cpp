// Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
#include "torch_binding.h"

#include <torch/csrc/stable/library.h>

#include "registration.h"  // written by the builder

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def("spatial_range_weights(Tensor guidance, Tensor sigma, int radius, bool allow_tf32) -> (Tensor, Tensor)");
  ops.def(
      "spatial_range_weights_backward(Tensor grad, Tensor guidance, Tensor sigma, Tensor range_kernel, int radius, "
      "bool allow_tf32) -> (Tensor, Tensor)");
  ops.def("neighborhood_aggregate(Tensor source, Tensor weights, int radius, bool allow_tf32) -> Tensor");
  ops.def(
      "neighborhood_aggregate_backward(Tensor grad, Tensor source, Tensor weights, int radius, bool needs_source, "
      "bool needs_weights, bool allow_tf32) -> (Tensor, Tensor)");
}

// In every variant: a torch with CUDA loads the CUDA variant also for models that stay on the CPU.
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CPU, ops) {
  ops.impl("spatial_range_weights", TORCH_BOX(&spatial_range_weights_cpu));
  ops.impl("spatial_range_weights_backward", TORCH_BOX(&spatial_range_weights_backward_cpu));
  ops.impl("neighborhood_aggregate", TORCH_BOX(&neighborhood_aggregate_cpu));
  ops.impl("neighborhood_aggregate_backward", TORCH_BOX(&neighborhood_aggregate_backward_cpu));
}

#if defined(CUDA_KERNEL) || defined(ROCM_KERNEL)
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CUDA, ops) {
  ops.impl("spatial_range_weights", TORCH_BOX(&spatial_range_weights_cuda));
  ops.impl("spatial_range_weights_backward", TORCH_BOX(&spatial_range_weights_backward_cuda));
  ops.impl("neighborhood_aggregate", TORCH_BOX(&neighborhood_aggregate_cuda));
  ops.impl("neighborhood_aggregate_backward", TORCH_BOX(&neighborhood_aggregate_backward_cuda));
}
#endif

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
