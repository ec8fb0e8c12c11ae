// Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
//
// Device code of spatial-range attention, without runtime calls (tests/emulation compiles it as host C++).
//
//   neighbor_dot   dots[q, e] = <query_q, key_{q+e}>             tensor cores; fp32 partial sums of channel ranges
//   neighbor_sum   out[q] = Σ_e F[q, e] · value_{q+e}            tensor cores; F folded from the weights while loading
//   finish_*       over positions: add the partial sums, unfold, softmax and Gaussian, forward and backward
//   plain_*        dot and sum for any dtype and device, one thread or group of lanes per result
//
// A block owns an 8×8 tile of queries and a range of channels. Its (8+2r)² keys pass through shared memory in chunks of
// 128 bytes per token, copied asynchronously a stage or two ahead, zeros outside the map. Rows of two queries by eight
// are the 16 rows of a matrix product with the 4(r+1)(r+4) keys they see together. Everything is a gather: no atomics,
// sums in a fixed order, the same result every time.
//
// A non-finite number counts only where it belongs: neighbor_dot keeps pairs apart, and neighbor_sum, whose products
// with zero weights would spread NaN through a tile, recomputes every non-finite result from its own neighbours.

#ifndef SPATIAL_RANGE_ATTENTION_CUH
#define SPATIAL_RANGE_ATTENTION_CUH

#if !defined(USE_ROCM)
#include "mma.cuh"
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "geometry.cuh"

#ifndef SPATIAL_RANGE_ATTENTION_SHARED
#define SPATIAL_RANGE_ATTENTION_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define SPATIAL_RANGE_ATTENTION_RECOMPUTES()  // the tests count
#endif

namespace spatial_range_attention::device {

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T narrow(Accumulator<T> value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16(value);
  } else {
    return value;
  }
}

template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
#if defined(USE_ROCM)
  return __shfl_xor(value, mask, kGroup);
#else
  return __shfl_xor_sync(0xffffffffu, value, mask, kGroup);
#endif
}

template <typename T>
__device__ __forceinline__ T group_sum(T value) {
#pragma unroll
  for (int mask = kGroup / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

template <typename T>
__device__ __forceinline__ T group_max(T value) {
#pragma unroll
  for (int mask = kGroup / 2; mask > 0; mask /= 2) {
    const T other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

// The folded weights of one image.
template <typename W>
struct FoldedWeights {
  using Value = Accumulator<W>;
  const W* weights;
  Map map;
  Fold fold;

  __device__ __forceinline__ Value folded(int y, int x, int key_y, int key_x) const {
    const W* row = weights + (static_cast<int64_t>(y) * map.width + x) * map.neighbors();
    Value sum = 0;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int neighbor_y = neighbor_reaching(key_y, y, map.height, map.radius, i);
      if (neighbor_y < 0) continue;
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        const int neighbor_x = neighbor_reaching(key_x, x, map.width, map.radius, j);
        if (neighbor_x >= 0) sum += widen(row[neighbor_y * map.extent() + neighbor_x]);
      }
    }
    return sum;
  }

  // Weight of the key in the result at (y, x); both lie in the map, at most `radius` apart.
  __device__ __forceinline__ Value operator()(int y, int x, int key_y, int key_x) const {
    Value sum = 0;
    if (fold != Fold::adjoint) sum = folded(y, x, key_y, key_x);
    if (fold != Fold::forward) sum += folded(key_y, key_x, y, x);
    return sum;
  }
};

// One result of a sum, from global memory.
template <typename T, typename W>
__device__ Accumulator<T> sum_at(const T* values, const FoldedWeights<W>& weights, int y, int x, int channel) {
  const Map& map = weights.map;
  Accumulator<T> sum = 0;
#pragma unroll 1
  for (int key_y = y - map.radius; key_y <= y + map.radius; ++key_y) {
#pragma unroll 1
    for (int key_x = x - map.radius; key_x <= x + map.radius; ++key_x) {
      if (!map.contains(key_y, key_x)) continue;
      const int64_t key = static_cast<int64_t>(key_y) * map.width + key_x;
      sum += weights(y, x, key_y, key_x) * widen(values[key * map.channels + channel]);
    }
  }
  return sum;
}

// ---- Any dtype, any device ------------------------------------------------------------------------------------------

// dots (positions, K) over in-map offsets; the others are not written. A group of lanes per dot.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    plain_dot(const T* queries, const T* keys, Accumulator<T>* dots, Map map) {
  const int lane = threadIdx.x % kGroup;
  const int64_t groups = static_cast<int64_t>(gridDim.x) * kGroups;
  const int64_t total = map.positions() * map.neighbors();
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kGroups + threadIdx.x / kGroup; i < total; i += groups) {
    const int64_t position = i / map.neighbors();
    const int offset = static_cast<int>(i - position * map.neighbors());
    const int row_offset = offset / map.extent() - map.radius, column_offset = offset % map.extent() - map.radius;
    const int64_t within = position % map.area();
    const int y = static_cast<int>(within / map.width), x = static_cast<int>(within % map.width);
    if (!map.contains(y + row_offset, x + column_offset)) continue;
    const T* query = queries + position * map.channels;
    const T* key = keys + (position + static_cast<int64_t>(row_offset) * map.width + column_offset) * map.channels;
    Accumulator<T> sum = 0;
    for (int channel = lane; channel < map.channels; channel += kGroup) sum += widen(query[channel]) * widen(key[channel]);
    sum = group_sum(sum);
    if (lane == 0) dots[i] = sum;
  }
}

template <typename T, typename W>
__global__ void __launch_bounds__(kThreads)
    plain_sum(const T* values, const W* weights, T* out, Map map, Fold fold, Accumulator<T> scale) {
  const int64_t total = map.positions() * map.channels;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += threads) {
    const int64_t position = i / map.channels;
    const int channel = static_cast<int>(i - position * map.channels);
    const int64_t image = position / map.area(), within = position - image * map.area();
    const int y = static_cast<int>(within / map.width), x = static_cast<int>(within % map.width);
    const FoldedWeights<W> folded{weights + image * map.area() * map.neighbors(), map, fold};
    out[i] = narrow<T>(scale * sum_at(values + image * map.area() * map.channels, folded, y, x, channel));
  }
}

// ---- Over positions -------------------------------------------------------------------------------------------------

// A position, and the dots of its neighbours: partial sums (splits, positions, K) added in order, then unfolded.
template <typename A>
struct Position {
  int64_t index;
  int y, x;

  __device__ __forceinline__ Position(int64_t index, const Map& map) : index(index) {
    const int64_t within = index % map.area();
    y = static_cast<int>(within / map.width);
    x = static_cast<int>(within % map.width);
  }

  __device__ __forceinline__ A dot(const A* dots, int splits, const Map& map, const NeighborIndex& neighbor, int n) const {
    const A* partial = dots + index * map.neighbors() + unfold(map, neighbor, n, y, x);
    const int64_t stride = map.positions() * map.neighbors();
    A sum = 0;
#pragma unroll 4
    for (int split = 0; split < splits; ++split) sum += partial[split * stride];
    return sum;
  }
};

// exp(-u²/2σ²) and what sums to its derivative by σ; u is measured in half sides of the window.
template <typename A>
struct Gaussian {
  A sigma, denominator;
  bool clamped;

  __device__ __forceinline__ explicit Gaussian(A sigma) : sigma(sigma) {
    const A smallest = static_cast<A>(1e-12);
    denominator = 2 * sigma * sigma;
    clamped = denominator < smallest;  // NaN is not smaller and stays
    if (clamped) denominator = smallest;
  }

  static __device__ __forceinline__ A squared_distance(const Map& map, const NeighborIndex& neighbor, int n) {
    const A vertical = static_cast<A>(neighbor.row(n) - map.radius) / static_cast<A>(map.radius);
    const A horizontal = static_cast<A>(neighbor.column(n) - map.radius) / static_cast<A>(map.radius);
    return vertical * vertical + horizontal * horizontal;
  }

  __device__ __forceinline__ A operator()(A squared_distance) const { return exp(-squared_distance / denominator); }

  __device__ __forceinline__ A derivative(A squared_distance, A value) const {
    if (clamped) return 0;
    return value * squared_distance / (sigma * sigma * sigma);
  }
};

// range_kernel = softmax_n(scale · dot), weights = range_kernel · Gaussian.
template <typename A>
__global__ void __launch_bounds__(kThreads) finish_weights(const A* dots, const A* sigma, A* weights, A* range_kernel,
                                                           Map map, int splits, A scale) {
  const int lane = threadIdx.x % kGroup, neighbors = map.neighbors();
  const NeighborIndex neighbor(map.extent());
  const Gaussian<A> gaussian(*sigma);
  const int64_t groups = static_cast<int64_t>(gridDim.x) * kGroups;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kGroups + threadIdx.x / kGroup; i < map.positions(); i += groups) {
    const Position<A> position(i, map);
    A values[kMaxPerLane];
    A largest = -INFINITY;
#pragma unroll
    for (int j = 0; j < kMaxPerLane; ++j) {
      const int n = lane + j * kGroup;
      values[j] = n < neighbors ? scale * position.dot(dots, splits, map, neighbor, n) : static_cast<A>(-INFINITY);
      largest = values[j] > largest ? values[j] : largest;
    }
    largest = group_max(largest);
    A sum = 0;
#pragma unroll
    for (int j = 0; j < kMaxPerLane; ++j) {
      if (lane + j * kGroup < neighbors) sum += values[j] = exp(values[j] - largest);
    }
    sum = group_sum(sum);
#pragma unroll
    for (int j = 0; j < kMaxPerLane; ++j) {
      const int n = lane + j * kGroup;
      if (n >= neighbors) continue;
      const A probability = values[j] / sum;
      range_kernel[i * neighbors + n] = probability;
      weights[i * neighbors + n] = probability * gaussian(Gaussian<A>::squared_distance(map, neighbor, n));
    }
  }
}

// The neighbours' dots, as they are.
template <typename A, typename W>
__global__ void __launch_bounds__(kThreads) finish_dots(const A* dots, W* out, Map map, int splits) {
  const NeighborIndex neighbor(map.extent());
  const int64_t groups = static_cast<int64_t>(gridDim.x) * kGroups;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kGroups + threadIdx.x / kGroup; i < map.positions(); i += groups) {
    const Position<A> position(i, map);
    for (int n = threadIdx.x % kGroup; n < map.neighbors(); n += kGroup) {
      out[i * map.neighbors() + n] = narrow<W>(position.dot(dots, splits, map, neighbor, n));
    }
  }
}

// Gradients of the similarities (positions, K), and of sigma: one partial sum per block.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    weights_gradient(const A* grad, const A* sigma, const A* range_kernel, A* grad_similarity, A* partial, Map map) {
  SPATIAL_RANGE_ATTENTION_SHARED(memory);
  A* group_partial = reinterpret_cast<A*>(memory);
  const int lane = threadIdx.x % kGroup, group = threadIdx.x / kGroup, neighbors = map.neighbors();
  const NeighborIndex neighbor(map.extent());
  const Gaussian<A> gaussian(*sigma);
  const int64_t groups = static_cast<int64_t>(gridDim.x) * kGroups;
  A grad_sigma = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kGroups + group; i < map.positions(); i += groups) {
    A range[kMaxPerLane], range_gradient[kMaxPerLane];
    A mean = 0;
#pragma unroll
    for (int j = 0; j < kMaxPerLane; ++j) {
      const int n = lane + j * kGroup;
      range[j] = range_gradient[j] = 0;
      if (n >= neighbors) continue;
      const A distance = Gaussian<A>::squared_distance(map, neighbor, n);
      const A spatial = gaussian(distance), upstream = grad[i * neighbors + n];
      range[j] = range_kernel[i * neighbors + n];
      range_gradient[j] = upstream * spatial;
      mean += range_gradient[j] * range[j];
      grad_sigma += upstream * range[j] * gaussian.derivative(distance, spatial);
    }
    mean = group_sum(mean);
#pragma unroll
    for (int j = 0; j < kMaxPerLane; ++j) {
      const int n = lane + j * kGroup;
      if (n < neighbors) grad_similarity[i * neighbors + n] = range[j] * (range_gradient[j] - mean);
    }
  }
  grad_sigma = group_sum(grad_sigma);
  if (lane == 0) group_partial[group] = grad_sigma;
  __syncthreads();
  if (threadIdx.x == 0) {
    A sum = 0;
    for (int i = 0; i < kGroups; ++i) sum += group_partial[i];
    partial[blockIdx.x] = sum;
  }
}

// One block: the sum of `count` numbers, zero for none.
template <typename A>
__global__ void __launch_bounds__(kThreads) finish_sigma(const A* partial, int count, A* out) {
  SPATIAL_RANGE_ATTENTION_SHARED(memory);
  A* group_partial = reinterpret_cast<A*>(memory);
  A sum = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  sum = group_sum(sum);
  if (threadIdx.x % kGroup == 0) group_partial[threadIdx.x / kGroup] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0;
    for (int i = 0; i < kGroups; ++i) sum += group_partial[i];
    *out = sum;
  }
}

#if !defined(USE_ROCM)

// ---- Tensor cores ---------------------------------------------------------------------------------------------------

constexpr int kTokenBytes = 128;     // of a token in a stage
constexpr int kSegments = kTokenBytes / 16;
constexpr int kStripBytes = kTokenBytes / 2;         // channels of one warp in neighbor_sum
constexpr int kStripStride = kStripBytes + 16;       // of a row of results on their way out: no bank conflicts

// Bytes of shared memory, in order: stages, the matrix of weights and outgoing results (sum only), tokens, sums.
struct SharedLayout {
  int stage, matrix_row, matrix, matrices, results, tokens, total;
};

HOST_DEVICE SharedLayout dot_layout(const Map& map, bool same, int stages) {
  const int rows = map.halo() + (same ? 0 : kQueries);
  SharedLayout layout{};
  layout.stage = rows * kTokenBytes;
  layout.tokens = stages * layout.stage;
  layout.total = layout.tokens + rows * 4;
  return layout;
}

HOST_DEVICE SharedLayout sum_layout(const Map& map, int element_bytes, int matrices, int stages) {
  SharedLayout layout{};
  layout.stage = map.halo() * kTokenBytes;
  layout.matrices = stages * layout.stage;
  // Whole 32-byte steps and 16 bytes more: eight rows begin in eight different groups of banks.
  layout.matrix_row = (map.band() * element_bytes + 31) / 32 * 32 + 16;
  layout.matrix = kQueries * layout.matrix_row;
  layout.results = layout.matrices + matrices * layout.matrix;
  layout.tokens = layout.results + kGroups * 16 * kStripStride;
  layout.total = layout.tokens + map.halo() * 4 + kGroups * 4;
  return layout;
}

// Where 16-byte segment `segment` of a token lies in a stage. Any eight tokens in sequence put the same segment into
// eight different groups of banks (load_matrices); any four put two adjacent ones there (32-bit transposed loads).
__device__ __forceinline__ int segment_offset(int token, int segment) {
  const int turn = (token & 3) * 2 + ((token >> 2) & 1);
  return token * kTokenBytes + ((segment ^ turn) << 4);
}

struct Tile {
  int64_t image;
  int row, column, split;

  __device__ __forceinline__ Tile(const Map& map, int splits) {
    const unsigned tile = blockIdx.x / splits;
    const unsigned per_image = static_cast<unsigned>(map.tile_rows()) * map.tile_columns();
    const unsigned within = tile % per_image;
    split = blockIdx.x - tile * splits;
    image = tile / per_image;
    row = within / map.tile_columns() * kTile;
    column = within % map.tile_columns() * kTile;
  }
};

// Keys, and queries after them if rows exceed the halo, to their places within the image; -1 outside the map.
__device__ __forceinline__ void locate_tokens(int* tokens, int rows, const Map& map, const Tile& tile) {
  const int side = map.side(), halo = map.halo();
  for (int i = threadIdx.x; i < rows; i += kThreads) {
    const int y = tile.row + (i < halo ? i / side - map.radius : (i - halo) / kTile);
    const int x = tile.column + (i < halo ? i % side - map.radius : (i - halo) % kTile);
    tokens[i] = map.contains(y, x) ? y * map.width + x : -1;
  }
}

// Starts the copy of 128 bytes per token, from `channel` on, and ends this thread's group of copies.
template <typename T>
__device__ __forceinline__ void fetch(unsigned char* stage, const int* tokens, int rows, int halo, const T* keys,
                                      const T* queries, int channel, int channels, bool vectors) {
  constexpr int kVector = 16 / sizeof(T);
  for (int i = threadIdx.x; i < rows * kSegments; i += kThreads) {
    const int row = i / kSegments, segment = i % kSegments;
    const int token = tokens[row];
    const T* source = row < halo ? keys : queries;
    const int first = channel + segment * kVector;
    const int64_t place = token < 0 ? 0 : static_cast<int64_t>(token) * channels + first;
    unsigned char* target = stage + segment_offset(row, segment);
    if (vectors) {
      const bool inside = token >= 0 && first < channels;
      copy_async(target, inside ? source + place : source, inside);
    } else {
      T* elements = reinterpret_cast<T*>(target);
      for (int j = 0; j < kVector; ++j) {
        elements[j] = token >= 0 && first + j < channels ? source[place + j] : narrow<T>(0);
      }
    }
  }
  copy_async_commit();
}

// Waits for the copy of the stage that is needed next; `stages` - 1 are started ahead.
__device__ __forceinline__ void wait_for_stage(int stages) {
  if (stages == 3) {
    copy_async_wait<1>();
  } else {
    copy_async_wait<0>();
  }
}

// One factor of a matrix product. In three passes a float32 is the sum of two TF32 numbers, of which the product of the
// low parts is left out: 22 of 24 bits.
template <typename T, int PASSES, int N>
struct Factor {
  uint32_t high[N];
  uint32_t low[PASSES == 3 ? N : 1];

  __device__ __forceinline__ explicit Factor(const uint32_t (&raw)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        const float value = __uint_as_float(raw[i]);
        high[i] = round_to_tf32(value);
        if constexpr (PASSES == 3) low[i] = round_to_tf32(value - __uint_as_float(high[i]));
      } else {
        high[i] = raw[i];
      }
    }
  }
};

template <typename T, int PASSES>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const Factor<T, PASSES, 4>& a,
                                             const Factor<T, PASSES, 2>& b) {
  if constexpr (PASSES == 3) {
    multiply_add<T>(sum, a.low, b.high);
    multiply_add<T>(sum, a.high, b.low);
  }
  multiply_add<T>(sum, a.high, b.high);
}

// dots (splits, positions, K) over in-map offsets, zero outside the map. Grid: tiles × splits.
template <typename T, int PASSES, int RADIUS>
__global__ void __launch_bounds__(kThreads, RADIUS + (PASSES == 3) <= 4 ? 2 : 1)
    neighbor_dot(const T* queries, const T* keys, float* dots, Map map, int splits, int stages, bool vectors) {
  constexpr int kSide = kTile + 2 * RADIUS, kHalo = kSide * kSide, kExtent = 2 * RADIUS + 1;
  constexpr int kNeighbors = kExtent * kExtent;
  constexpr int kBlocks = (kExtent + 1) * kSide / 8;  // of eight keys, seen by two rows of queries
  constexpr int kWarpBlocks = (kBlocks + 1) / 2;
  constexpr int kChannels = kTokenBytes / sizeof(T);
  SPATIAL_RANGE_ATTENTION_SHARED(memory);

  const bool same = queries == keys;
  const int rows = same ? kHalo : kHalo + kQueries;
  const SharedLayout layout = dot_layout(map, same, stages);
  int* tokens = reinterpret_cast<int*>(memory + layout.tokens);
  const Tile tile(map, splits);
  locate_tokens(tokens, rows, map, tile);
  __syncthreads();

  const int chunks = (map.channels + kChannels - 1) / kChannels;
  const int begin = static_cast<int>(static_cast<int64_t>(chunks) * tile.split / splits);
  const int count = static_cast<int>(static_cast<int64_t>(chunks) * (tile.split + 1) / splits) - begin;
  const int64_t image = tile.image * map.area() * map.channels;
  const auto fetch_chunk = [&](int chunk) {
    if (chunk >= count) return copy_async_commit();  // an empty group keeps the count
    fetch(memory + chunk % stages * layout.stage, tokens, rows, kHalo, keys + image, queries + image,
          (begin + chunk) * kChannels, map.channels, vectors);
  };

  // Warps: four pairs of query rows, times two halves of the keys they see.
  const int lane = threadIdx.x % 32, pair = threadIdx.x / 32 % 4, half = threadIdx.x / 128;
  const int query = lane % 16;
  const int query_row = same ? (2 * pair + query / 8 + RADIUS) * kSide + query % 8 + RADIUS : kHalo + 16 * pair + query;
  const int key_row = 2 * pair * kSide + half * kWarpBlocks * 8 + lane % 8;
  float sums[kWarpBlocks][4] = {};

  for (int chunk = 0; chunk < stages - 1; ++chunk) fetch_chunk(chunk);
  for (int chunk = 0; chunk < count; ++chunk) {
    if (stages == 1) {
      __syncthreads();  // the only stage has been read
      fetch_chunk(chunk);
    }
    wait_for_stage(stages);
    __syncthreads();  // this chunk has arrived for all, and the previous one has been read by all
    if (stages > 1) fetch_chunk(chunk + stages - 1);

    const unsigned char* stage = memory + chunk % stages * layout.stage;
#pragma unroll 1
    for (int segment = 0; segment < kSegments; segment += 4) {
      uint32_t raw[2][4];
      load_matrices(raw[0], stage + segment_offset(query_row, segment + lane / 16));
      load_matrices(raw[1], stage + segment_offset(query_row, segment + 2 + lane / 16));
      const Factor<T, PASSES, 4> a[2] = {Factor<T, PASSES, 4>(raw[0]), Factor<T, PASSES, 4>(raw[1])};
      const unsigned char* key = stage + segment_offset(key_row, segment + lane / 8);
#pragma unroll
      for (int block = 0; block < kWarpBlocks; ++block) {
        if (kBlocks % 2 == 1 && block == kWarpBlocks - 1 && half == 1) continue;
        uint32_t keys_raw[4];
        load_matrices(keys_raw, key + block * 8 * kTokenBytes);
        const uint32_t first[2] = {keys_raw[0], keys_raw[1]}, second[2] = {keys_raw[2], keys_raw[3]};
        multiply_add<T, PASSES>(sums[block], a[0], Factor<T, PASSES, 2>(first));
        multiply_add<T, PASSES>(sums[block], a[1], Factor<T, PASSES, 2>(second));
      }
    }
  }

  // Collected in shared memory, so that the rows of dots leave in one piece.
  float* results = reinterpret_cast<float*>(memory);
  __syncthreads();
#pragma unroll
  for (int block = 0; block < kWarpBlocks; ++block) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = (half * kWarpBlocks + block) * 8 + lane % 4 * 2 + i % 2;
      const int row = key / kSide - i / 2, column = key % kSide - lane / 4;
      if (row >= 0 && row < kExtent && column >= 0 && column < kExtent) {
        results[(16 * pair + 8 * (i / 2) + lane / 4) * kNeighbors + row * kExtent + column] = sums[block][i];
      }
    }
  }
  __syncthreads();
  const int64_t first_position = tile.split * map.positions() + tile.image * map.area();
  for (int i = threadIdx.x; i < kQueries * kNeighbors; i += kThreads) {
    const int position = i / kNeighbors;
    const int y = tile.row + position / kTile, x = tile.column + position % kTile;
    if (!map.contains(y, x)) continue;
    const int64_t target = first_position + static_cast<int64_t>(y) * map.width + x;
    dots[target * kNeighbors + i % kNeighbors] = results[i];
  }
}

// Whether one of the elements of 16 bytes is infinite or NaN: the exponent's bits are all ones.
template <typename T>
__device__ __forceinline__ bool any_non_finite(const uint4& bits) {
  constexpr bool kFloat = std::is_same_v<T, float>, kHalf = std::is_same_v<T, __half>;
  constexpr uint32_t kExponent = kFloat ? 0x7f800000u : kHalf ? 0x7c007c00u : 0x7f807f80u;
  constexpr uint32_t kUnit = kFloat ? 0x00800000u : kHalf ? 0x04000400u : 0x00800080u;
  constexpr uint32_t kCarry = kFloat ? 0x80000000u : 0x80008000u;
  return (((bits.x & kExponent) + kUnit) | ((bits.y & kExponent) + kUnit) | ((bits.z & kExponent) + kUnit) |
          ((bits.w & kExponent) + kUnit)) & kCarry;
}

__device__ __forceinline__ void store_pair(float* target, float first, float second) {
  *reinterpret_cast<float2*>(target) = make_float2(first, second);
}
__device__ __forceinline__ void store_pair(__half* target, float first, float second) {
  *reinterpret_cast<__half2*>(target) = __floats2half2_rn(first, second);
}
__device__ __forceinline__ void store_pair(__nv_bfloat16* target, float first, float second) {
  *reinterpret_cast<__nv_bfloat162*>(target) = __floats2bfloat162_rn(first, second);
}

// out = scale · Σ_e F · values. Grid: tiles × splits. Weights of another dtype than 16-bit values are split into two
// matrices of theirs. PASSES concerns float32 only.
template <typename T, typename W, int PASSES>
__global__ void __launch_bounds__(kThreads, 2)
    neighbor_sum(const T* values, const W* weights, T* out, Map map, Fold fold, float scale, int splits, int stages,
                 bool vectors) {
  constexpr int kVector = 16 / sizeof(T), kChannels = kTokenBytes / sizeof(T);
  constexpr int kMatrices = std::is_same_v<T, W> ? 1 : 2;
  constexpr int kBlocks = kStripBytes / sizeof(T) / 8;  // of eight channels
  // In float16, weights keep their precision whatever their magnitude: the largest of a tile becomes about 2^13.
  constexpr bool kScaled = std::is_same_v<T, __half> && kMatrices == 2;
  SPATIAL_RANGE_ATTENTION_SHARED(memory);

  const int side = map.side(), halo = map.halo();
  const SharedLayout layout = sum_layout(map, sizeof(T), kMatrices, stages);
  unsigned char* matrix = memory + layout.matrices;
  int* tokens = reinterpret_cast<int*>(memory + layout.tokens);
  const Tile tile(map, splits);
  locate_tokens(tokens, halo, map, tile);
  for (int i = threadIdx.x; i < kMatrices * layout.matrix / 16; i += kThreads) {
    reinterpret_cast<uint4*>(matrix)[i] = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();

  const int chunks = (map.channels + kChannels - 1) / kChannels;
  const int begin = static_cast<int>(static_cast<int64_t>(chunks) * tile.split / splits);
  const int count = static_cast<int>(static_cast<int64_t>(chunks) * (tile.split + 1) / splits) - begin;
  const T* image_values = values + tile.image * map.area() * map.channels;
  const auto fetch_chunk = [&](int chunk) {
    if (chunk >= count) return copy_async_commit();
    fetch(memory + chunk % stages * layout.stage, tokens, halo, halo, image_values, image_values,
          (begin + chunk) * kChannels, map.channels, vectors);
  };
  for (int chunk = 0; chunk < stages - 1; ++chunk) fetch_chunk(chunk);

  // While the first chunks are under way: the matrix of weights, a warp per row of queries.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const FoldedWeights<W> folded{weights + tile.image * map.area() * map.neighbors(), map, fold};
  const NeighborIndex neighbor(map.extent());
  const auto for_each_weight = [&](auto&& use) {
    const int y = tile.row + warp;
#pragma unroll 1
    for (int column = 0; column < kTile; ++column) {
      const int x = tile.column + column;
      if (!map.contains(y, x)) continue;
#pragma unroll 1
      for (int offset = lane; offset < map.neighbors(); offset += 32) {
        const int row_offset = neighbor.row(offset), column_offset = offset - row_offset * map.extent();
        const int key_y = y + row_offset - map.radius, key_x = x + column_offset - map.radius;
        if (!map.contains(key_y, key_x)) continue;
        const int place = (row_offset + warp % 2) * side + column_offset + column;  // in the band of two query rows
        use(kTile * warp + column, place, folded(y, x, key_y, key_x));
      }
    }
  };
  float weight_scale = 1, result_scale = scale;
  if constexpr (kScaled) {
    float largest = 0;
    for_each_weight([&](int, int, float weight) {
      const float magnitude = fabsf(weight);
      if (magnitude > largest && magnitude < INFINITY) largest = magnitude;
    });
    largest = group_max(largest);
    float* group_largest = reinterpret_cast<float*>(tokens + halo);
    if (lane == 0) group_largest[warp] = largest;
    __syncthreads();
    for (int i = 0; i < kGroups; ++i) largest = group_largest[i] > largest ? group_largest[i] : largest;
    if (largest > 0) {
      const int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 127;
      const int shift = exponent < -100 ? 113 : 13 - exponent;
      weight_scale = __uint_as_float(static_cast<uint32_t>(127 + shift) << 23);
      result_scale *= __uint_as_float(static_cast<uint32_t>(127 - shift) << 23);
    }
  }
  for_each_weight([&](int query, int place, float weight) {
    T* target = reinterpret_cast<T*>(matrix + query * layout.matrix_row) + place;
    weight *= weight_scale;
    const T high = narrow<T>(weight);
    *target = high;
    if constexpr (kMatrices == 2) {
      *reinterpret_cast<T*>(reinterpret_cast<unsigned char*>(target) + layout.matrix) = narrow<T>(weight - widen(high));
    }
  });

  // Warps: four pairs of query rows, times two strips of the chunk's channels.
  const int pair = warp % 4, strip = warp / 4;
  const int steps = layout.matrix_row / 32;
  const unsigned char* matrix_row = matrix + (16 * pair + lane % 16) * layout.matrix_row + lane / 16 * 16;
  unsigned char* results = memory + layout.results + warp * 16 * kStripStride;

  for (int chunk = 0; chunk < count; ++chunk) {
    if (stages == 1) {
      __syncthreads();  // the only stage has been read
      fetch_chunk(chunk);
    }
    wait_for_stage(stages);
    __syncthreads();  // weights and this chunk have arrived for all, and the previous chunk has been read by all
    if (stages > 1) fetch_chunk(chunk + stages - 1);

    const unsigned char* stage = memory + chunk % stages * layout.stage;
    float sums[kBlocks][4] = {};
#pragma unroll 2
    for (int step = 0; step < steps; ++step) {
      uint32_t raw[4];
      load_matrices(raw, matrix_row + 32 * step);
      const Factor<T, PASSES, 4> a(raw);
      if constexpr (std::is_same_v<T, float>) {
        const int key = 2 * pair * side + 8 * step + lane % 4;
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
          const int word = (strip * kBlocks + block) * 8 + lane / 4;
          const unsigned char* column = stage + word % 4 * 4;
          const uint32_t b_raw[2] = {
              *reinterpret_cast<const uint32_t*>(column + segment_offset(key, word / 4)),
              *reinterpret_cast<const uint32_t*>(column + segment_offset(key + 4, word / 4))};
          multiply_add<T, PASSES>(sums[block], a, Factor<T, PASSES, 2>(b_raw));
        }
      } else {
        uint32_t low[4];
        if constexpr (kMatrices == 2) load_matrices(low, matrix_row + layout.matrix + 32 * step);
        // The last step may reach past the band, with zero weights: stay within the halo.
        int key = 2 * pair * side + 16 * step + lane % 16;
        key = key < halo ? key : halo - 1;
#pragma unroll
        for (int block = 0; block < kBlocks; block += 2) {
          uint32_t b[4];
          load_matrices_transposed(b, stage + segment_offset(key, strip * kBlocks + block + lane / 16));
          const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
          multiply_add<T>(sums[block], a.high, first);
          multiply_add<T>(sums[block + 1], a.high, second);
          if constexpr (kMatrices == 2) {
            multiply_add<T>(sums[block], low, first);
            multiply_add<T>(sums[block + 1], low, second);
          }
        }
      }
    }

    // Each warp turns its fragments into rows of 64 bytes.
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      T* row = reinterpret_cast<T*>(results + lane / 4 * kStripStride) + block * 8 + lane % 4 * 2;
      store_pair(row, sums[block][0] * result_scale, sums[block][1] * result_scale);
      store_pair(row + 8 * kStripStride / sizeof(T), sums[block][2] * result_scale, sums[block][3] * result_scale);
    }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < 16 * kStripBytes / 16; i += 32) {
      const int query = i / 4;
      const int y = tile.row + 2 * pair + query / 8, x = tile.column + query % 8;
      const int first = (begin + chunk) * kChannels + strip * (kChannels / 2) + i % 4 * kVector;
      if (!map.contains(y, x) || first >= map.channels) continue;
      const unsigned char* segment = results + query * kStripStride + i % 4 * 16;
      const uint4 bits = *reinterpret_cast<const uint4*>(segment);
      T* target = out + (tile.image * map.area() + static_cast<int64_t>(y) * map.width + x) * map.channels + first;
      const bool recompute = any_non_finite<T>(bits);
      if (recompute) {
        SPATIAL_RANGE_ATTENTION_RECOMPUTES();
      } else if (vectors) {
        *reinterpret_cast<uint4*>(target) = bits;
        continue;
      }
#pragma unroll 1
      for (int j = 0; j < kVector && first + j < map.channels; ++j) {
        T value = reinterpret_cast<const T*>(segment)[j];
        if (recompute) value = narrow<T>(scale * sum_at(image_values, folded, y, x, first + j));
        target[j] = value;
      }
    }
  }
}

#endif  // !defined(USE_ROCM)

}  // namespace spatial_range_attention::device

#endif  // SPATIAL_RANGE_ATTENTION_CUH
