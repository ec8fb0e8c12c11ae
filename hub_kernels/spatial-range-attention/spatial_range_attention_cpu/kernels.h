// Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
//
// The loops that do the work. This file is included once per instruction set, inside a namespace of its own and under
// that set's target pragma, with VECTOR_BYTES (width of a register) and NUM_REGISTERS defined. It therefore has no
// include guard, includes nothing, and instantiates nothing of the standard library: such an instance would carry the
// instruction set's code into other translation units.
//
// A map is cut into tiles. Of a tile and its halo, a block of channels at a time is packed into a small buffer: converted
// to float, aligned, with zeros outside the map. A block of queries and the keys around it then meet in registers.
// Only pairs within reach are multiplied, so a NaN stays in its neighbourhood. What is summed in which order depends on
// neither the tile nor the number of threads.
//
// T is the type of a tensor's elements, S (float or double) the type of the arithmetic.

template <typename S>
struct VectorOf {
  typedef S type __attribute__((vector_size(VECTOR_BYTES)));
  typedef S unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(alignof(S)), may_alias));
  static constexpr int lanes = VECTOR_BYTES / sizeof(S);
};
template <typename S>
using Vector = typename VectorOf<S>::type;
template <typename S>
constexpr int kLanes = VectorOf<S>::lanes;

// Queries in a register block, and the most offsets (dot) or vectors of channels (sum) beside them.
constexpr int kQueries = NUM_REGISTERS == 32 ? 4 : 2;
constexpr int kOffsets = 4;
constexpr int kChannelVectors = NUM_REGISTERS == 32 ? 6 : 4;
static_assert(kQueries <= kMaxQueries && kChannelVectors * VECTOR_BYTES <= kMaxSumBytes);

template <typename S>
INLINE Vector<S> load(const S* pointer) {
  return *reinterpret_cast<const Vector<S>*>(pointer);
}
template <typename S>
INLINE Vector<S> load_unaligned(const S* pointer) {
  return *reinterpret_cast<const typename VectorOf<S>::unaligned*>(pointer);
}
template <typename S>
INLINE void store(S* pointer, Vector<S> value) {
  *reinterpret_cast<Vector<S>*>(pointer) = value;
}
template <typename S>
INLINE void store_unaligned(S* pointer, Vector<S> value) {
  *reinterpret_cast<typename VectorOf<S>::unaligned*>(pointer) = value;
}

// ---- Conversions ---------------------------------------------------------------------------------------------------

typedef uint16_t HalfBits __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint16_t UnalignedHalfBits __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t FloatBits __attribute__((vector_size(VECTOR_BYTES)));

INLINE Vector<float> load_as(const float* pointer) { return load_unaligned(pointer); }
INLINE Vector<double> load_as(const double* pointer) { return load_unaligned(pointer); }
INLINE Vector<float> load_as(const c10::BFloat16* pointer) {
  const HalfBits bits = *reinterpret_cast<const UnalignedHalfBits*>(pointer);
  return (Vector<float>)(__builtin_convertvector(bits, FloatBits) << 16);
}
INLINE Vector<float> load_as(const c10::Half* pointer) {
#if VECTOR_BYTES == 64
  return (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(pointer)));
#elif VECTOR_BYTES == 32
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(pointer)));
#else
  Vector<float> result;
  for (int i = 0; i < kLanes<float>; ++i) result[i] = static_cast<float>(pointer[i]);
  return result;
#endif
}

INLINE void store_as(float* pointer, Vector<float> value) { store_unaligned(pointer, value); }
INLINE void store_as(double* pointer, Vector<double> value) { store_unaligned(pointer, value); }
INLINE void store_as(c10::BFloat16* pointer, Vector<float> value) {
  const FloatBits bits = (FloatBits)value;
  const FloatBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const FloatBits quiet_nan = (bits >> 16) | 0x40;
  const auto is_nan = value != value;
  const FloatBits result = is_nan ? quiet_nan : rounded;
  *reinterpret_cast<UnalignedHalfBits*>(pointer) = __builtin_convertvector(result, HalfBits);
}
INLINE void store_as(c10::Half* pointer, Vector<float> value) {
#if VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(pointer), _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif VECTOR_BYTES == 32
  _mm_storeu_si128(reinterpret_cast<__m128i*>(pointer), _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) pointer[i] = static_cast<c10::Half>(value[i]);
#endif
}

// Copies `count` elements; those up to the next multiple of the vector length become zero.
template <typename S, typename T>
INLINE void pack(S* target, const T* source, int count) {
  int i = 0;
  for (; i + kLanes<S> <= count; i += kLanes<S>) store(target + i, load_as(source + i));
  if (i < count) {
    store(target + i, Vector<S>{});
    for (; i < count; ++i) target[i] = static_cast<S>(source[i]);
  }
}
template <typename S, typename T>
INLINE void unpack(T* target, const S* source, int count) {
  int i = 0;
  for (; i + kLanes<S> <= count; i += kLanes<S>) store_as(target + i, load(source + i));
  for (; i < count; ++i) target[i] = static_cast<T>(source[i]);
}

// Channels [channel, channel + count) of the positions [begin, end) of a row of the map, `stride` at a time: each such
// part of the row lies `part_size` elements after the one before, its positions `stride` apart.
template <typename S, typename T>
void pack_row(S* target, const T* map, const Shape& shape, int64_t row, int64_t begin, int64_t end, int64_t channel,
              int64_t count, int64_t stride, int64_t part_size) {
  for (int64_t x = begin; x < end; ++x, target += stride) {
    const bool inside = 0 <= x && x < shape.width;
    const T* const source = map + (row * shape.width + x) * shape.channels + channel;
    S* part = target;
    for (int64_t done = 0; done < count; done += stride, part += part_size) {
      if (inside) {
        pack(part, source + done, static_cast<int>(min(stride, count - done)));
      } else {
        for (int64_t i = 0; i < stride; i += kLanes<S>) store(part + i, Vector<S>{});
      }
    }
  }
}

// Asks for the channels of `num_positions` neighbouring positions, needed soon: they lie too far apart to be foreseen.
template <int Write, typename T>
INLINE void prefetch(const T* map, const Shape& shape, int64_t row, int64_t column, int64_t num_positions,
                     int64_t channel, int64_t count) {
  if (row >= shape.height) return;
  for (int64_t x = max(column, 0); x < min(column + num_positions, shape.width); ++x) {
    const char* const start =
        reinterpret_cast<const char*>(map + (row * shape.width + x) * shape.channels + channel);
    for (int64_t i = 0; i < count * int64_t(sizeof(T)); i += kCacheLine) __builtin_prefetch(start + i, Write, 2);
  }
}

// ---- Dot: similarities of queries and the keys around them ---------------------------------------------------------

// Every second block of `Block` lanes of two vectors side by side.
template <int Block, bool Odd, typename V, int... Lane>
INLINE V take_blocks(V left, V right, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(left, right, ((Lane / Block * 2 + Odd) * Block + Lane % Block)...);
}

// The sums over the lanes of as many vectors as a vector has lanes, in order, as one vector.
template <typename S, int Block = kLanes<S> / 2>
INLINE Vector<S> sum_lanes(const Vector<S>* vectors) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<S>>();
  Vector<S> left = vectors[0], right = vectors[1];
  if constexpr (Block > 1) {
    left = sum_lanes<S, Block / 2>(vectors);
    right = sum_lanes<S, Block / 2>(vectors + Block);
  }
  return take_blocks<kLanes<S> / 2 / Block, false>(left, right, lanes) +
         take_blocks<kLanes<S> / 2 / Block, true>(left, right, lanes);
}

// dots[q][m] (+)= <query q, key q + m>, for kQueries neighbouring queries and M neighbouring offsets.
template <typename S, int M>
void dot_block(S* dots, int64_t query_stride, const S* queries, const S* keys, int stride, int num_queries,
               bool accumulate) {
  constexpr int count = kQueries * kOffsets;
  Vector<S> sums[round_up(count, kLanes<S>)] = {};
  for (int c = 0; c < stride; c += kLanes<S>) {
    Vector<S> query[kQueries];
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; ++q) query[q] = load(queries + q * stride + c);
#pragma GCC unroll 16
    for (int j = 0; j < kQueries + M - 1; ++j) {
      const Vector<S> key = load(keys + j * stride + c);
#pragma GCC unroll 8
      for (int q = 0; q < kQueries; ++q) {
        if (q <= j && j < q + M) sums[q * kOffsets + j - q] += query[q] * key;
      }
    }
  }
  alignas(VECTOR_BYTES) S totals[round_up(count, kLanes<S>)];
#pragma GCC unroll 8
  for (int i = 0; i < count; i += kLanes<S>) store(totals + i, sum_lanes<S>(sums + i));
  for (int q = 0; q < num_queries; ++q, dots += query_stride) {
    if (accumulate) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) totals[q * kOffsets + m] += dots[m];
    }
    __builtin_memcpy(dots, totals + q * kOffsets, M * sizeof(S));
  }
}

template <typename S>
INLINE void dot_offsets(int num_offsets, S* dots, int64_t query_stride, const S* queries, const S* keys, int stride,
                        int num_queries, bool accumulate) {
  switch (num_offsets) {
#define CASE(M) \
  case M:       \
    return dot_block<S, M>(dots, query_stride, queries, keys, stride, num_queries, accumulate);
    CASE(1) CASE(2) CASE(3) CASE(4)
#undef CASE
  }
}

// For each query of a tile and each offset within the window that stays in the map: dots[query][offset].
// Without queries, these are the keys themselves, and only the offsets from the middle on are written: the others
// mirror them.
template <typename S, typename T>
void dot_tile(S* dots, const T* queries, const T* keys, const Shape& shape, const Tile& tile, S* scratch) {
  const bool symmetric = queries == nullptr;
  const int radius = shape.radius, extent = 2 * radius + 1;
  const int64_t columns = round_up(tile.columns(), kQueries);
  const int64_t num_keys = columns + 2 * radius;
  S* const query_row = scratch + extent * num_keys * kDotChannels;

  for (int64_t channel = 0; channel < shape.channels; channel += kDotChannels) {
    const int count = static_cast<int>(min(kDotChannels, shape.channels - channel));
    const int stride = static_cast<int>(round_up(count, kLanes<S>));
    int64_t next_row = max(tile.row_begin - (symmetric ? 0 : radius), 0);
    const auto key_row = [&](int64_t row) { return scratch + (row % extent) * num_keys * stride; };

    for (int64_t y = tile.row_begin; y < tile.row_end; ++y) {
      for (; next_row <= min(y + radius, shape.height - 1); ++next_row) {
        pack_row(key_row(next_row), keys, shape, next_row, tile.column_begin - radius,
                 tile.column_begin + columns + radius, channel, count, stride, 0);
      }
      const S* query = key_row(y) + radius * stride;
      if (!symmetric) {
        pack_row(query_row, queries, shape, y, tile.column_begin, tile.column_begin + columns, channel,
                 count, stride, 0);
        query = query_row;
      }
      for (int64_t key_y = max(y - (symmetric ? 0 : radius), 0); key_y <= min(y + radius, shape.height - 1); ++key_y) {
        const bool last = key_y == min(y + radius, shape.height - 1);
        const int first = symmetric && key_y == y ? radius : 0;
        const int num_blocks = (extent - first + kOffsets - 1) / kOffsets;
        for (int64_t x = 0; x < columns; x += kQueries) {
          const int64_t position = y * shape.width + tile.column_begin + x;
          S* const window = dots + position * shape.neighbors() + (key_y - y + radius) * extent;
          if (last) {
            prefetch<0>(keys, shape, next_row, tile.column_begin + x, kQueries, channel, count);
            if (!symmetric) prefetch<0>(queries, shape, y + 1, tile.column_begin + x, kQueries, channel, count);
          }
          for (int block = 0, offset = first; block < num_blocks; ++block) {
            const int num_offsets = (extent - offset + num_blocks - block - 1) / (num_blocks - block);
            dot_offsets(num_offsets, window + offset, shape.neighbors(), query + x * stride,
                        key_row(key_y) + (x + offset) * stride, stride,
                        static_cast<int>(min(tile.columns() - x, kQueries)), channel > 0);
            offset += num_offsets;
          }
        }
      }
    }
  }
}

// ---- Sum: keys around a query, by weights --------------------------------------------------------------------------

// sums[q] = Σ weights[q][offset] · key, for Q neighbouring queries, N vectors of channels and the key rows
// [row_begin, row_end) of the window. Keys are those of the first query's window and on; [begin, end) are in the map.
// `prefetch(q)` is called for each query in between: all at once would take the line buffers from the keys.
template <typename S, int Radius, int Q, int N, typename Prefetch>
INLINE void sum_block(S* sums, const S* ring, int64_t row_stride, int64_t map_row, int row_begin, int row_end,
                      int begin, int end, const S* weights, const Prefetch& prefetch) {
  constexpr int extent = 2 * Radius + 1, neighbors = extent * extent, stride = N * kLanes<S>;
  Vector<S> sum[Q][N] = {};
  for (int row = row_begin; row < row_end; ++row) {
    const S* const keys = ring + ((map_row + row) % extent) * row_stride;
    const S* const weight = weights + row * extent;
    for (int q = row - row_begin; q < Q; q += row_end - row_begin) prefetch(q);
#pragma GCC unroll 20
    for (int j = 0; j < extent + Q - 1; ++j) {
      if (j < begin || j >= end) continue;
      Vector<S> value[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) value[n] = load(keys + j * stride + n * kLanes<S>);
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) {
        if (q <= j && j < q + extent) {
          const S factor = weight[q * neighbors + j - q];
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n) sum[q][n] += factor * value[n];
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(sums + (q * N + n) * kLanes<S>, sum[q][n]);
  }
}

// The channels [channel, channel + count) of a tile's sums, N vectors at a time.
template <typename S, typename T, int Radius, int N>
void sum_channels(T* sums, const T* keys, const S* weights, int64_t weight_columns, const Shape& shape,
                  const Tile& tile, int64_t channel, int64_t count, S* scratch) {
  constexpr int Q = kQueries, radius = Radius, extent = 2 * radius + 1, stride = N * kLanes<S>;
  const int64_t columns = round_up(tile.columns(), Q);
  const int64_t part_size = (columns + 2 * radius) * stride;
  const int64_t row_stride = (count + stride - 1) / stride * part_size;
  S* const block = scratch + extent * row_stride;
  int64_t next_row = max(tile.row_begin - radius, 0);
  for (int64_t y = tile.row_begin; y < tile.row_end; ++y) {
    for (; next_row <= min(y + radius, shape.height - 1); ++next_row) {
      pack_row(scratch + (next_row % extent) * row_stride, keys, shape, next_row, tile.column_begin - radius,
               tile.column_begin + columns + radius, channel, count, stride, part_size);
    }
    const int row_begin = static_cast<int>(max(radius - y, 0));
    const int row_end = static_cast<int>(min(shape.height - y + radius, extent));
    for (int64_t done = 0; done < count; done += stride) {
      const S* const part = scratch + done / stride * part_size;
      const int part_channels = static_cast<int>(min(stride, count - done));
      for (int64_t x = 0; x < columns; x += Q) {
        const int64_t first_key = tile.column_begin + x - radius;
        const int begin = static_cast<int>(max(-first_key, 0));
        const int end = static_cast<int>(min(shape.width - first_key, Q + 2 * radius));
        const int64_t num_queries = min(tile.columns() - x, Q);
        const auto prefetch_query = [&](int q) {
          prefetch<0>(keys, shape, next_row, tile.column_begin + x + q, 1, channel + done, part_channels);
          prefetch<1>(sums, shape, y, tile.column_begin + x + q, q < num_queries, channel + done, part_channels);
        };
        // The ring holds row y - radius + i of the map in slot (y + radius + 1 + i) mod extent, never negative.
        sum_block<S, Radius, Q, N>(block, part + x * stride, row_stride, y + radius + 1, row_begin, row_end, begin, end,
                           weights + ((y - tile.row_begin) * weight_columns + x) * shape.neighbors(),
                           prefetch_query);
        for (int64_t q = 0; q < num_queries; ++q) {
          const int64_t position = y * shape.width + tile.column_begin + x + q;
          unpack(sums + position * shape.channels + channel + done, block + q * stride, part_channels);
        }
      }
    }
  }
}

template <typename S, typename T, int Radius>
void sum_of_radius(T* sums, const T* keys, const S* weights, int64_t weight_columns, const Shape& shape,
                   const Tile& tile, int64_t channel_begin, int64_t channel_end, S* scratch) {
  constexpr int64_t part = kChannelVectors * kLanes<S>;
  int64_t channel = channel_begin;
  for (int64_t count; channel + part <= channel_end; channel += count) {
    count = min((channel_end - channel) / part, kSumParts) * part;
    sum_channels<S, T, Radius, kChannelVectors>(sums, keys, weights, weight_columns, shape, tile, channel, count,
                                                scratch);
  }
  for (; channel < channel_end; channel += kLanes<S>) {
    sum_channels<S, T, Radius, 1>(sums, keys, weights, weight_columns, shape, tile, channel,
                                  min(kLanes<S>, channel_end - channel), scratch);
  }
}

// The channels [channel_begin, channel_end) of a tile's sums. `weights` are the tile's own: of `weight_columns` queries
// per row, by offset within the map (reflected neighbours folded in).
template <typename S, typename T>
void sum_tile(T* sums, const T* keys, const S* weights, int64_t weight_columns, const Shape& shape, const Tile& tile,
              int64_t channel_begin, int64_t channel_end, S* scratch) {
  switch (shape.radius) {
#define CASE(R)                                                                                                   \
  case R:                                                                                                         \
    return sum_of_radius<S, T, R>(sums, keys, weights, weight_columns, shape, tile, channel_begin, channel_end, scratch);
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
  }
}

// ---- Softmax -------------------------------------------------------------------------------------------------------

// e^x for x <= 0, relative error below 2e-7: 2^n times a polynomial on |r| <= ln(2)/2 (Cephes, expf).
INLINE Vector<float> exponential(Vector<float> x) {
  constexpr float lowest = -87.0f;
  x = x < lowest ? (Vector<float>{} + lowest) : x;
  const Vector<float> magic = Vector<float>{} + 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer
  const Vector<float> shifted = x * 1.44269504f + magic;
  const Vector<float> n = shifted - magic;
  const Vector<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector<float> p = Vector<float>{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const FloatBits exponent = ((FloatBits)shifted - (FloatBits)magic + 127) << 23;
  return p * (Vector<float>)exponent;
}
INLINE Vector<double> exponential(Vector<double> x) {
  Vector<double> result;
  for (int i = 0; i < kLanes<double>; ++i) result[i] = __builtin_exp(x[i]);
  return result;
}

// In place, over `count` elements; the buffer is aligned and may be overwritten up to the next vector.
template <typename S>
void softmax(S* values, int count, S scale) {
  S maximum = values[0];
  for (int i = 1; i < count; ++i) maximum = values[i] > maximum ? values[i] : maximum;
  Vector<S> sum = {};
  for (int i = count; i % kLanes<S>; ++i) values[i] = -S(__builtin_inf());
  for (int i = 0; i < count; i += kLanes<S>) {
    const Vector<S> value = exponential((load(values + i) - maximum) * scale);
    store(values + i, value);
    sum += value;
  }
  S total = 0;
  for (int i = 0; i < kLanes<S>; ++i) total += sum[i];
  const S factor = S(1) / total;
  for (int i = 0; i < count; i += kLanes<S>) store(values + i, load(values + i) * factor);
}

// The table through which the dispatcher reaches this instruction set.
template <typename T, typename S>
constexpr Kernels<T, S> kKernels = {dot_tile<S, T>, sum_tile<S, T>, softmax<S>};
