// Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
//
// Spatial-range attention on CPUs: which tiles there are, who computes them, and with which instruction set.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "checks.h"
#include "torch_binding.h"

using spatial_range_attention::allocated;
using torch::stable::Tensor;

namespace {

using torch::headeronly::ScalarType;

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

struct Shape {
  int64_t batch, height, width, channels;
  int radius;

  int extent() const { return 2 * radius + 1; }
  int neighbors() const { return extent() * extent(); }
  int64_t positions() const { return height * width; }
};

struct Tile {
  int64_t row_begin, row_end, column_begin, column_end;

  int64_t columns() const { return column_end - column_begin; }
};

constexpr int kMaxRadius = 6;
constexpr int kMaxQueries = 4;
constexpr int kMaxNeighbors = (2 * kMaxRadius + 1) * (2 * kMaxRadius + 1);
constexpr int kDotChannels = 512;  // packed at a time: a row of queries and one of keys fit the first cache
constexpr int kMaxSumBytes = 384;  // of one key's channels in a register block
constexpr int kSumParts = 4;       // such blocks of channels packed at a time, so that reads are long
constexpr int kTileSide = 32;
constexpr int kAlignment = 64;
constexpr int kCacheLine = 64;

// The loops of one instruction set (kernels.h).
template <typename T, typename S>
struct Kernels {
  void (*dot_tile)(S* dots, const T* queries, const T* keys, const Shape& shape, const Tile& tile, S* scratch);
  void (*sum_tile)(T* sums, const T* keys, const S* weights, int64_t weight_columns, const Shape& shape,
                   const Tile& tile, int64_t channel_begin, int64_t channel_end, S* scratch);
  void (*softmax)(S* values, int count, S scale);
};

#define INLINE static inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("prfchw,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace avx512 {
#define VECTOR_BYTES 64
#define NUM_REGISTERS 32
#include "kernels.h"
#undef VECTOR_BYTES
#undef NUM_REGISTERS
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("prfchw,avx2,fma,f16c")
namespace avx2 {
#define VECTOR_BYTES 32
#define NUM_REGISTERS 16
#include "kernels.h"
#undef VECTOR_BYTES
#undef NUM_REGISTERS
}  // namespace avx2
#pragma GCC pop_options
#endif

namespace generic {
#define VECTOR_BYTES 16
#define NUM_REGISTERS 16
#include "kernels.h"
#undef VECTOR_BYTES
#undef NUM_REGISTERS
}  // namespace generic

enum class InstructionSet { generic, avx2, avx512 };

// The best this processor has, or less where the user asks PyTorch for less.
InstructionSet instruction_set() {
  static const InstructionSet chosen = [] {
    InstructionSet best = InstructionSet::generic;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      best = InstructionSet::avx2;
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        best = InstructionSet::avx512;
      }
    }
    if (const char* asked = std::getenv("ATEN_CPU_CAPABILITY")) {
      if (!std::strcmp(asked, "default")) best = InstructionSet::generic;
      if (!std::strcmp(asked, "avx2") && best == InstructionSet::avx512) best = InstructionSet::avx2;
    }
#endif
    return best;
  }();
  return chosen;
}

template <typename T, typename S>
const Kernels<T, S>& kernels() {
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::avx512) return avx512::kKernels<T, S>;
  if (instruction_set() == InstructionSet::avx2) return avx2::kKernels<T, S>;
#endif
  return generic::kKernels<T, S>;
}

template <typename S>
struct Free {
  void operator()(S* pointer) const { std::free(pointer); }
};

// Scratch memory, aligned for any vector.
template <typename S>
std::unique_ptr<S[], Free<S>> allocate(int64_t count) {
  void* const pointer = std::aligned_alloc(kAlignment, round_up(count * sizeof(S), kAlignment));
  STD_TORCH_CHECK(pointer != nullptr, "Spatial-range attention is out of memory. It asked for ", count * sizeof(S),
                  " bytes of scratch memory.");
  return std::unique_ptr<S[], Free<S>>(static_cast<S*>(pointer));
}

Shape shape_of(const Tensor& features, int64_t radius) {
  return {features.size(0), features.size(1), features.size(2), features.size(3), static_cast<int>(radius)};
}

// A map cut into tiles: as large as they may be, but enough of them for all threads if there is work in them.
struct Tiling {
  int64_t rows, columns, tile_rows, tile_columns;

  Tiling(const Shape& shape, int64_t tasks) {
    tile_columns = balanced(shape.width, kTileSide);
    columns = (shape.width + tile_columns - 1) / tile_columns;
    tile_rows = balanced(shape.height, kTileSide);
    const int64_t strips = max(shape.batch * columns, 1);
    const int64_t missing = (tasks + strips - 1) / strips;
    tile_rows = min(tile_rows, max((shape.height + missing - 1) / missing, 2));
    rows = (shape.height + tile_rows - 1) / tile_rows;
  }

  static int64_t balanced(int64_t length, int64_t most) {
    const int64_t parts = (length + most - 1) / most;
    return (length + parts - 1) / parts;
  }

  int64_t count() const { return rows * columns; }

  Tile operator()(int64_t index, const Shape& shape) const {
    const int64_t row = index / columns * tile_rows, column = index % columns * tile_columns;
    return {row, min(row + tile_rows, shape.height), column, min(column + tile_columns, shape.width)};
  }
};

// Coordinate of a neighbour, reflected at the borders without repeating them.
int64_t reflect(int64_t coordinate, int64_t length) {
  return (length - 1) - std::abs((length - 1) - std::abs(coordinate));
}

// Rows and columns within the window of a query at which its neighbours really lie.
struct Reflection {
  int rows[2 * kMaxRadius + 1], columns[2 * kMaxRadius + 1];

  Reflection(int64_t y, int64_t x, const Shape& shape) {
    for (int i = 0; i < shape.extent(); ++i) {
      rows[i] = static_cast<int>(reflect(y + i - shape.radius, shape.height) - y) + shape.radius;
      columns[i] = static_cast<int>(reflect(x + i - shape.radius, shape.width) - x) + shape.radius;
    }
  }
};

// dots[query][offset] = <query, key at offset>, for the offsets that stay in the map; without queries, those of the
// keys among themselves, the first half left out (see dot_tile).
template <typename T, typename S>
void neighbor_dot(S* dots, const T* queries, const T* keys, const Shape& shape) {
  const Tiling tiling(shape, torch::stable::get_num_threads());
  const int64_t columns = round_up(tiling.tile_columns, kMaxQueries);
  const int64_t scratch_size = (shape.extent() * (columns + 2 * shape.radius) + columns) * kDotChannels;
  torch::stable::parallel_for(0, shape.batch * tiling.count(), 1, [&](int64_t begin, int64_t end) {
    const auto scratch = allocate<S>(scratch_size);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / tiling.count();
      const int64_t map = image * shape.positions() * shape.channels;
      kernels<T, S>().dot_tile(dots + image * shape.positions() * shape.neighbors(),
                               queries ? queries + map : nullptr, keys + map, shape,
                               tiling(task % tiling.count(), shape), scratch.get());
    }
  });
}

enum class Direction { gather, scatter, both };

// The weights of a tile's queries by offset within the map: those of reflected neighbours added where these lie.
// Scattered weights are seen from the neighbours: offset -e of k holds what the query at k - e gives to k.
template <typename S, typename W>
void fold(S* folded, int64_t folded_columns, const W* weights, const Shape& shape, const Tile& tile,
          Direction direction) {
  const int radius = shape.radius, extent = shape.extent(), neighbors = shape.neighbors();
  std::memset(folded, 0, (tile.row_end - tile.row_begin) * folded_columns * neighbors * sizeof(S));
  const auto inside = [&](int64_t y, int64_t x) {
    return tile.row_begin <= y && y < tile.row_end && tile.column_begin <= x && x < tile.column_end;
  };
  const auto row_of = [&](int64_t y, int64_t x) {
    return folded + ((y - tile.row_begin) * folded_columns + x - tile.column_begin) * neighbors;
  };
  const int64_t halo = direction == Direction::gather ? 0 : radius;
  for (int64_t y = max(tile.row_begin - halo, 0); y < min(tile.row_end + halo, shape.height); ++y) {
    for (int64_t x = max(tile.column_begin - halo, 0); x < min(tile.column_end + halo, shape.width); ++x) {
      const Reflection reflection(y, x, shape);
      const W* weight = weights + (y * shape.width + x) * neighbors;
      for (int i = 0; i < extent; ++i, weight += extent) {
        const int row = reflection.rows[i] * extent;
        const int64_t key_y = y + reflection.rows[i] - radius;
        if (direction != Direction::scatter && inside(y, x)) {
          S* const target = row_of(y, x) + row;
          for (int j = 0; j < extent; ++j) target[reflection.columns[j]] += static_cast<S>(weight[j]);
        }
        if (direction != Direction::gather && tile.row_begin <= key_y && key_y < tile.row_end) {
          for (int j = 0; j < extent; ++j) {
            const int column = reflection.columns[j];
            const int64_t key_x = x + column - radius;
            if (tile.column_begin <= key_x && key_x < tile.column_end) {
              row_of(key_y, key_x)[neighbors - 1 - row - column] += static_cast<S>(weight[j]);
            }
          }
        }
      }
    }
  }
}

// sums[query] = Σ weights · keys around it, or the adjoint (Direction::scatter), or both added.
template <typename T, typename S, typename W>
void neighbor_sum(T* sums, const T* keys, const W* weights, const Shape& shape, Direction direction) {
  const int64_t threads = torch::stable::get_num_threads();
  const Tiling tiling(shape, 1);
  const int64_t block = kMaxSumBytes / sizeof(S);
  const int64_t tiles = shape.batch * tiling.count(), blocks = (shape.channels + block - 1) / block;
  // Channels are shared out only as far as threads need it: each share folds the weights anew.
  const int64_t shares = tiles == 0 ? 1 : max(1, min(blocks, tiles % threads == 0 ? 1 : (4 * threads + tiles - 1) / tiles));
  const int64_t columns = round_up(tiling.tile_columns, kMaxQueries);
  const int64_t scratch_size = (shape.extent() * (columns + 2 * shape.radius) * kSumParts + kMaxQueries) * block;
  const int64_t folded_size = tiling.tile_rows * columns * shape.neighbors();
  torch::stable::parallel_for(0, tiles * shares, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = allocate<S>(scratch_size);
    const auto folded = allocate<S>(folded_size);
    int64_t folded_tile = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / shares / tiling.count(), share = task % shares;
      const int64_t map = image * shape.positions() * shape.channels;
      const Tile tile = tiling(task / shares % tiling.count(), shape);
      if (folded_tile != task / shares) {
        fold(folded.get(), columns, weights + image * shape.positions() * shape.neighbors(), shape, tile, direction);
        folded_tile = task / shares;
      }
      kernels<T, S>().sum_tile(sums + map, keys + map, folded.get(), columns, shape, tile,
                               min(blocks * share / shares * block, shape.channels),
                               min(blocks * (share + 1) / shares * block, shape.channels), scratch.get());
    }
  });
}

// Calls `body` with every position of every image, in parallel by rows.
template <typename Body>
void for_each_row(const Shape& shape, const Body& body) {
  torch::stable::parallel_for(0, shape.batch * shape.height, 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row / shape.height, row % shape.height);
  });
}

// exp(-(u_dy² + u_dx²) / (2σ²)) with u from -1 to 1 over the window, and the squared distances themselves.
template <typename S>
struct SpatialKernel {
  S values[kMaxNeighbors], distances[kMaxNeighbors];
  bool limit;  // σ so small that only the centre counts, as at 0

  SpatialKernel(S sigma, const Shape& shape) {
    const S variance = 2 * sigma * sigma, least = S(1e-12);
    limit = variance < least;
    const int extent = shape.extent();
    const auto u = [&](int i) { return S(2) * i / (extent - 1) - 1; };
    for (int n = 0; n < shape.neighbors(); ++n) {
      distances[n] = u(n / extent) * u(n / extent) + u(n % extent) * u(n % extent);
      values[n] = std::exp(-distances[n] / (limit ? least : variance));
    }
  }
};

// `dots`, of which the second half is known, becomes the range kernel times the spatial kernel.
template <typename T, typename S>
void weights_forward(S* weights, S* range_kernel, const T* guidance, S sigma, const Shape& shape) {
  S* const dots = weights;
  neighbor_dot<T, S>(dots, nullptr, guidance, shape);
  const int radius = shape.radius, extent = shape.extent(), neighbors = shape.neighbors(), middle = neighbors / 2;
  const S scale = S(1) / std::sqrt(static_cast<S>(shape.channels));
  for_each_row(shape, [&](int64_t image, int64_t y) {
    alignas(kAlignment) S values[kMaxNeighbors + kAlignment];
    const int64_t first = image * shape.positions();
    for (int64_t x = 0; x < shape.width; ++x) {
      const Reflection reflection(y, x, shape);
      const int64_t position = first + y * shape.width + x;
      for (int i = 0, n = 0; i < extent; ++i) {
        const int row = reflection.rows[i];
        for (int j = 0; j < extent; ++j, ++n) {
          const int column = reflection.columns[j], offset = row * extent + column;
          const int64_t key = position + (row - radius) * shape.width + column - radius;
          values[n] = offset >= middle ? dots[position * neighbors + offset]
                                       : dots[key * neighbors + neighbors - 1 - offset];
        }
      }
      kernels<T, S>().softmax(values, neighbors, scale);
      std::memcpy(range_kernel + position * neighbors, values, neighbors * sizeof(S));
    }
  });
  const SpatialKernel<S> spatial(sigma, shape);
  for_each_row(shape, [&](int64_t image, int64_t y) {
    for (int64_t x = 0; x < shape.width; ++x) {
      const int64_t start = ((image * shape.height + y) * shape.width + x) * neighbors;
      for (int n = 0; n < neighbors; ++n) weights[start + n] = range_kernel[start + n] * spatial.values[n];
    }
  });
}

// Gradient of the similarities (scaled by 1/√C) and of σ.
template <typename S>
S similarities_backward(S* grad_similarities, const S* grad, const S* range_kernel, S sigma, const Shape& shape) {
  const int neighbors = shape.neighbors();
  const SpatialKernel<S> spatial(sigma, shape);
  const S scale = S(1) / std::sqrt(static_cast<S>(shape.channels));
  std::vector<double> row_sums(shape.batch * shape.height);
  for_each_row(shape, [&](int64_t image, int64_t y) {
    double row_sum = 0;
    for (int64_t x = 0; x < shape.width; ++x) {
      const int64_t start = ((image * shape.height + y) * shape.width + x) * neighbors;
      S product[kMaxNeighbors];
      S sum = 0;
      double moment = 0;
      for (int n = 0; n < neighbors; ++n) {
        product[n] = grad[start + n] * spatial.values[n] * range_kernel[start + n];
        sum += product[n];
        moment += static_cast<double>(product[n]) * spatial.distances[n];
      }
      for (int n = 0; n < neighbors; ++n) {
        grad_similarities[start + n] = (product[n] - range_kernel[start + n] * sum) * scale;
      }
      row_sum += moment;
    }
    row_sums[image * shape.height + y] = row_sum;
  });
  double sum = 0;
  for (const double row_sum : row_sums) sum += row_sum;
  return spatial.limit ? S(0) : static_cast<S>(sum / (static_cast<double>(sigma) * sigma * sigma));
}

// Calls `body` with a value of the tensor's element type and one of the arithmetic's.
template <typename Body>
void dispatch(const Tensor& features, const Body& body) {
  switch (features.scalar_type()) {
    case ScalarType::Float:
      return body(float(), float());
    case ScalarType::Double:
      return body(double(), double());
    case ScalarType::BFloat16:
      return body(c10::BFloat16(), float());
    default:
      return body(c10::Half(), float());
  }
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

ScalarType arithmetic_type(const Tensor& features) {
  return features.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A new map like another. Where it is large, the first touch of each of its pages would cost more than the sums that
// go there: large pages, where the system has them, make these few.
Tensor empty_map(const Tensor& features) {
  Tensor map = allocated([&] { return torch::stable::empty_like(features); });
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(2) << 20;
  const auto start = reinterpret_cast<uintptr_t>(map.data_ptr());
  const uintptr_t begin = (start + page - 1) / page * page;
  const uintptr_t end = (start + map.numel() * map.element_size()) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: may fail
#endif
  return map;
}

Tensor empty_window(const Tensor& features, int64_t radius, ScalarType dtype) {
  const int64_t extent = 2 * radius + 1;
  return allocated([&] {
    return torch::stable::new_empty(
        features, {features.size(0), features.size(1), features.size(2), extent * extent}, dtype);
  });
}

// Weights come in the arithmetic's type or in that of the features.
template <typename T, typename S>
void neighbor_sum(const Tensor& sums, const Tensor& keys, const Tensor& weights, const Shape& shape,
                  Direction direction) {
  if (weights.scalar_type() == arithmetic_type(keys)) {
    neighbor_sum<T, S, S>(data<T>(sums), data<T>(keys), data<S>(weights), shape, direction);
  } else {
    neighbor_sum<T, S, T>(data<T>(sums), data<T>(keys), data<T>(weights), shape, direction);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> spatial_range_weights_cpu(const Tensor& guidance, const Tensor& sigma, int64_t radius,
                                                     bool /*allow_tf32*/) {
  check_features(guidance, "guidance", radius);
  check_sigma(sigma, guidance);
  const Tensor map = torch::stable::contiguous(guidance);
  Tensor weights = empty_window(map, radius, arithmetic_type(map));
  Tensor range_kernel = empty_window(map, radius, arithmetic_type(map));
  dispatch(map, [&](auto element, auto arithmetic) {
    using T = decltype(element);
    using S = decltype(arithmetic);
    weights_forward(data<S>(weights), data<S>(range_kernel), data<T>(map), *data<S>(sigma), shape_of(map, radius));
  });
  return {weights, range_kernel};
}

std::tuple<Tensor, Tensor> spatial_range_weights_backward_cpu(const Tensor& grad, const Tensor& guidance,
                                                              const Tensor& sigma, const Tensor& range_kernel,
                                                              int64_t radius, bool /*allow_tf32*/) {
  check_features(guidance, "guidance", radius);
  check_sigma(sigma, guidance);
  const Tensor map = torch::stable::contiguous(guidance);
  const Tensor kernel = torch::stable::contiguous(range_kernel);
  const Tensor output_grad = torch::stable::contiguous(grad);
  Tensor grad_similarities = empty_window(map, radius, arithmetic_type(map));
  check_like(kernel, grad_similarities, "range_kernel");
  check_like(output_grad, grad_similarities, "grad");
  Tensor grad_guidance = empty_map(map);
  Tensor grad_sigma = torch::stable::empty_like(sigma);
  dispatch(map, [&](auto element, auto arithmetic) {
    using T = decltype(element);
    using S = decltype(arithmetic);
    const Shape shape = shape_of(map, radius);
    *data<S>(grad_sigma) = similarities_backward(data<S>(grad_similarities), data<S>(output_grad), data<S>(kernel),
                                                 *data<S>(sigma), shape);
    neighbor_sum<T, S>(grad_guidance, map, grad_similarities, shape, Direction::both);
  });
  return {grad_guidance, grad_sigma};
}

Tensor neighborhood_aggregate_cpu(const Tensor& source, const Tensor& weights, int64_t radius, bool /*allow_tf32*/) {
  check_features(source, "source", radius);
  check_weights(weights, source, radius, "weights");
  const Tensor map = torch::stable::contiguous(source);
  const Tensor window = torch::stable::contiguous(weights);
  Tensor sums = empty_map(map);
  dispatch(map, [&](auto element, auto arithmetic) {
    neighbor_sum<decltype(element), decltype(arithmetic)>(sums, map, window, shape_of(map, radius),
                                                          Direction::gather);
  });
  return sums;
}

std::tuple<Tensor, Tensor> neighborhood_aggregate_backward_cpu(const Tensor& grad, const Tensor& source,
                                                               const Tensor& weights, int64_t radius,
                                                               bool needs_source, bool needs_weights,
                                                               bool /*allow_tf32*/) {
  check_features(source, "source", radius);
  check_weights(weights, source, radius, "weights");
  check_like(grad, source, "grad");
  const Tensor map = torch::stable::contiguous(source);
  const Tensor window = torch::stable::contiguous(weights);
  const Tensor output_grad = torch::stable::contiguous(grad);
  Tensor grad_source = needs_source ? empty_map(map) : torch::stable::new_empty(map, {0});
  Tensor grad_weights = needs_weights ? allocated([&] { return torch::stable::empty_like(window); })
                                      : torch::stable::new_empty(window, {0});
  dispatch(map, [&](auto element, auto arithmetic) {
    using T = decltype(element);
    using S = decltype(arithmetic);
    const Shape shape = shape_of(map, radius);
    if (needs_source) neighbor_sum<T, S>(grad_source, output_grad, window, shape, Direction::scatter);
    if (!needs_weights) return;
    const bool in_place = window.scalar_type() == arithmetic_type(map);
    const Tensor dots = in_place ? grad_weights : empty_window(map, radius, arithmetic_type(map));
    neighbor_dot(data<S>(dots), data<T>(output_grad), data<T>(map), shape);
    const int extent = shape.extent(), neighbors = shape.neighbors();
    for_each_row(shape, [&](int64_t image, int64_t y) {
      for (int64_t x = 0; x < shape.width; ++x) {
        const int64_t start = ((image * shape.height + y) * shape.width + x) * neighbors;
        const Reflection reflection(y, x, shape);
        S values[kMaxNeighbors];
        for (int i = 0, n = 0; i < extent; ++i) {
          const S* const row = data<S>(dots) + start + reflection.rows[i] * extent;
          for (int j = 0; j < extent; ++j, ++n) values[n] = row[reflection.columns[j]];
        }
        for (int n = 0; n < neighbors; ++n) {
          if (in_place) {
            data<S>(grad_weights)[start + n] = values[n];
          } else {
            data<T>(grad_weights)[start + n] = static_cast<T>(values[n]);
          }
        }
      }
    });
  });
  return {grad_source, grad_weights};
}
