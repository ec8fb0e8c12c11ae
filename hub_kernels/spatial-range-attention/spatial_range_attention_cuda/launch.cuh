// Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
//
// Which kernels make an operator, for raw pointers and without runtime calls: dtypes, grids, shared memory, workspaces.
// `launch(kernel, blocks, shared_bytes, arguments...)` starts a kernel with blocks of kThreads; the operators pass the
// CUDA runtime's way of doing so, the tests their emulation of it.

#ifndef SPATIAL_RANGE_ATTENTION_LAUNCH_CUH
#define SPATIAL_RANGE_ATTENTION_LAUNCH_CUH

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "spatial_range_attention.cuh"

namespace spatial_range_attention::device {

enum class Element { float64, float32, bfloat16, float16 };

inline int bytes_of(Element element) { return element == Element::float64 ? 8 : element == Element::float32 ? 4 : 2; }

// Without shared memory (0 bytes), the plain kernels are used.
struct Hardware {
  int multiprocessors = 1, shared_per_block = 0, shared_per_multiprocessor = 0;
};

// Of a dot or a sum: channel ranges per tile, stages of the copies (0: plain kernel), shared bytes per block.
struct Plan {
  int splits = 1, stages = 0, shared = 0;
};

// Two blocks per multiprocessor where two stages leave room for them, otherwise as many stages as fit. Maps of few tiles
// are split by channels until there is a block for each multiprocessor.
template <class SharedBytes>
Plan make_plan(const Map& map, int element_bytes, const Hardware& hardware, SharedBytes&& shared_bytes) {
  constexpr int kReservedPerBlock = 1024;
  const auto fits = [&](int stages, int blocks) {
    const int shared = shared_bytes(stages);
    return shared <= hardware.shared_per_block &&
           blocks * (shared + kReservedPerBlock) <= hardware.shared_per_multiprocessor;
  };
  Plan plan;
  for (int stages = 3; stages >= 2 && plan.stages == 0; --stages) plan.stages = fits(stages, 2) ? stages : 0;
  for (int stages = 3; stages >= 1 && plan.stages == 0; --stages) plan.stages = fits(stages, 1) ? stages : 0;
  if (plan.stages == 0) return plan;
  const int64_t chunks = (static_cast<int64_t>(map.channels) * element_bytes + 127) / 128;
  const int64_t tiles = std::max<int64_t>(map.tiles(), 1);
  plan.splits = static_cast<int>(std::clamp<int64_t>(hardware.multiprocessors / tiles, 1, chunks));
  plan.shared = shared_bytes(plan.stages);
  return plan;
}

inline Plan plan_dot(const Map& map, Element element, bool same, const Hardware& hardware) {
#if !defined(USE_ROCM)
  if (element != Element::float64) {
    return make_plan(map, bytes_of(element), hardware, [&](int stages) { return dot_layout(map, same, stages).total; });
  }
#endif
  return Plan{};
}

inline Plan plan_sum(const Map& map, Element element, Element weights, const Hardware& hardware) {
#if !defined(USE_ROCM)
  if (element != Element::float64) {
    const int matrices = element == weights ? 1 : 2;
    return make_plan(map, bytes_of(element), hardware,
                     [&](int stages) { return sum_layout(map, bytes_of(element), matrices, stages).total; });
  }
#endif
  return Plan{};
}

inline int64_t dots_size(const Map& map, const Plan& plan) { return plan.splits * map.positions() * map.neighbors(); }

inline int64_t grid_for(int64_t work, int64_t per_block, int64_t limit) {
  return std::clamp<int64_t>((work + per_block - 1) / per_block, 1, limit);
}

constexpr int64_t kMaxGrid = 1 << 30;
constexpr int64_t kMaxPartials = 1024;

inline int64_t gradient_blocks(const Map& map) { return grid_for(map.positions(), kGroups, kMaxPartials); }

// Whether tokens can be copied 16 bytes at a time.
template <class... Pointers>
bool vectorizable(const Map& map, int element_bytes, Pointers... pointers) {
  const bool aligned = ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
  return aligned && static_cast<int64_t>(map.channels) * element_bytes % 16 == 0;
}

template <class Use>
void with_element(Element element, Use&& use) {
  switch (element) {
    case Element::float64: return use(double{});
    case Element::float32: return use(float{});
    case Element::bfloat16: return use(__nv_bfloat16{});
    case Element::float16: return use(__half{});
  }
}

template <class Use>
void with_accumulator(Element element, Use&& use) {
  element == Element::float64 ? use(double{}) : use(float{});
}

// dots: dots_size(map, plan) accumulators.
template <class Launch>
void launch_dot(Launch&& launch, const Map& map, Element element, const void* queries, const void* keys, void* dots,
                const Plan& plan, bool allow_tf32) {
  with_element(element, [&](auto zero) {
    using T = decltype(zero);
    const T* query = static_cast<const T*>(queries);
    const T* key = static_cast<const T*>(keys);
    Accumulator<T>* out = static_cast<Accumulator<T>*>(dots);
#if !defined(USE_ROCM)
    if constexpr (!std::is_same_v<T, double>) {
      if (plan.stages > 0) {
        const bool vectors = vectorizable(map, sizeof(T), queries, keys);
        const auto with_passes = [&](auto passes) {
          [&]<int... I>(std::integer_sequence<int, I...>) {
            ((map.radius == I + 1 ? launch(neighbor_dot<T, decltype(passes)::value, I + 1>, map.tiles() * plan.splits,
                                           plan.shared, query, key, out, map, plan.splits, plan.stages, vectors)
                                  : void()),
             ...);
          }(std::make_integer_sequence<int, kMaxRadius>{});
        };
        if constexpr (std::is_same_v<T, float>) {
          if (!allow_tf32) return with_passes(std::integral_constant<int, 3>{});
        }
        return with_passes(std::integral_constant<int, 1>{});
      }
    }
#endif
    const int64_t work = map.positions() * map.neighbors();
    launch(plain_dot<T>, grid_for(work, kGroups, kMaxGrid), 0, query, key, out, map);
  });
}

template <class Launch>
void launch_sum(Launch&& launch, const Map& map, Element element, Element weights_element, const void* values,
                const void* weights, void* out, Fold fold, double scale, const Plan& plan, bool allow_tf32) {
  with_element(element, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    const auto with_weights = [&](auto weight_zero) {
      using W = decltype(weight_zero);
      const T* value = static_cast<const T*>(values);
      const W* weight = static_cast<const W*>(weights);
      T* target = static_cast<T*>(out);
      const A factor = static_cast<A>(scale);
#if !defined(USE_ROCM)
      if constexpr (!std::is_same_v<T, double>) {
        if (plan.stages > 0) {
          const bool vectors = vectorizable(map, sizeof(T), values, out);
          const auto with_passes = [&](auto passes) {
            launch(neighbor_sum<T, W, decltype(passes)::value>, map.tiles() * plan.splits, plan.shared, value, weight,
                   target, map, fold, factor, plan.splits, plan.stages, vectors);
          };
          if constexpr (std::is_same_v<T, float>) {
            if (!allow_tf32) return with_passes(std::integral_constant<int, 3>{});
          }
          return with_passes(std::integral_constant<int, 1>{});
        }
      }
#endif
      const int64_t work = map.positions() * map.channels;
      launch(plain_sum<T, W>, grid_for(work, kThreads, kMaxGrid), 0, value, weight, target, map, fold, factor);
    };
    if constexpr (!std::is_same_v<T, A>) {
      if (weights_element == element) return with_weights(T{});
    }
    with_weights(A{});
  });
}

// Two kernels. dots: dots_size(map, plan) accumulators.
template <class Launch>
void weights_forward(Launch&& launch, const Map& map, Element element, const void* guidance, const void* sigma,
                     void* dots, void* weights, void* range_kernel, const Plan& plan, bool allow_tf32) {
  launch_dot(launch, map, element, guidance, guidance, dots, plan, allow_tf32);
  with_accumulator(element, [&](auto zero) {
    using A = decltype(zero);
    launch(finish_weights<A>, grid_for(map.positions(), kGroups, kMaxGrid), 0, static_cast<const A*>(dots),
           static_cast<const A*>(sigma), static_cast<A*>(weights), static_cast<A*>(range_kernel), map, plan.splits,
           static_cast<A>(1 / std::sqrt(static_cast<double>(map.channels))));
  });
}

// Three kernels. similarity: positions · K accumulators; partial: gradient_blocks(map) of them.
template <class Launch>
void weights_backward(Launch&& launch, const Map& map, Element element, const void* grad, const void* guidance,
                      const void* sigma, const void* range_kernel, void* similarity, void* partial, void* grad_guidance,
                      void* grad_sigma, const Plan& plan, bool allow_tf32) {
  const int64_t blocks = gradient_blocks(map);
  with_accumulator(element, [&](auto zero) {
    using A = decltype(zero);
    const int shared = kGroups * sizeof(A);
    launch(weights_gradient<A>, blocks, shared, static_cast<const A*>(grad), static_cast<const A*>(sigma),
           static_cast<const A*>(range_kernel), static_cast<A*>(similarity), static_cast<A*>(partial), map);
    launch(finish_sigma<A>, 1, shared, static_cast<const A*>(partial), static_cast<int>(blocks),
           static_cast<A*>(grad_sigma));
  });
  const Element weights_element = element == Element::float64 ? Element::float64 : Element::float32;
  launch_sum(launch, map, element, weights_element, guidance, similarity, grad_guidance, Fold::symmetric,
             1 / std::sqrt(static_cast<double>(map.channels)), plan, allow_tf32);
}

// Two kernels. dots: dots_size(map, plan) accumulators.
template <class Launch>
void aggregate_grad_weights(Launch&& launch, const Map& map, Element element, Element weights_element, const void* grad,
                            const void* source, void* dots, void* grad_weights, const Plan& plan, bool allow_tf32) {
  launch_dot(launch, map, element, grad, source, dots, plan, allow_tf32);
  with_element(weights_element, [&](auto zero) {
    using W = decltype(zero);
    using A = Accumulator<W>;
    launch(finish_dots<A, W>, grid_for(map.positions(), kGroups, kMaxGrid), 0, static_cast<const A*>(dots),
           static_cast<W*>(grad_weights), map, plan.splits);
  });
}

}  // namespace spatial_range_attention::device

#endif  // SPATIAL_RANGE_ATTENTION_LAUNCH_CUH
