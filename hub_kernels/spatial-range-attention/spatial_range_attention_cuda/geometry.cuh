// Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
//
// Where neighbours are. A map of H×W tokens of C channels; the (2r+1)² neighbours of a position, reflected at the border
// (not repeating it). A reflected neighbour lies within radius r of its position *inside* the map, so both products of
// this package are computed over in-map offsets e: `unfold` reads the neighbours' values from them, `fold` adds the
// weights of all neighbours that reflection sends to the same offset. Fold and unfold are adjoint.

#ifndef SPATIAL_RANGE_ATTENTION_GEOMETRY_CUH
#define SPATIAL_RANGE_ATTENTION_GEOMETRY_CUH

#include <cstdint>

namespace spatial_range_attention::device {

#define HOST_DEVICE __host__ __device__ __forceinline__

constexpr int kTile = 8;             // side of a tile of queries
constexpr int kQueries = kTile * kTile;
constexpr int kThreads = 256;        // of every block
constexpr int kGroup = 32;           // lanes that share a position in the kernels over positions
constexpr int kGroups = kThreads / kGroup;
constexpr int kMaxRadius = 6;
constexpr int kMaxPerLane = ((2 * kMaxRadius + 1) * (2 * kMaxRadius + 1) + kGroup - 1) / kGroup;

struct Map {
  int64_t batch;
  int height, width, channels, radius;

  HOST_DEVICE int extent() const { return 2 * radius + 1; }
  HOST_DEVICE int neighbors() const { return extent() * extent(); }
  HOST_DEVICE int64_t area() const { return static_cast<int64_t>(height) * width; }
  HOST_DEVICE int64_t positions() const { return batch * area(); }
  HOST_DEVICE int tile_rows() const { return (height + kTile - 1) / kTile; }
  HOST_DEVICE int tile_columns() const { return (width + kTile - 1) / kTile; }
  HOST_DEVICE int64_t tiles() const { return batch * tile_rows() * tile_columns(); }
  HOST_DEVICE int side() const { return kTile + 2 * radius; }  // of a tile with its halo
  HOST_DEVICE int halo() const { return side() * side(); }
  // Keys that two rows of queries see together, a multiple of 8: 4·(r + 1)·(r + 4).
  HOST_DEVICE int band() const { return (extent() + 1) * side(); }
  HOST_DEVICE bool contains(int y, int x) const { return y >= 0 && y < height && x >= 0 && x < width; }
};

HOST_DEVICE int reflect(int position, int length) {
  const int last = length - 1;
  const int magnitude = position < 0 ? -position : position;
  return magnitude > last ? 2 * last - magnitude : magnitude;
}

// n / extent for a neighbour n, without a division: exact for extents to 13.
struct NeighborIndex {
  int extent, reciprocal;
  HOST_DEVICE explicit NeighborIndex(int extent) : extent(extent), reciprocal(65536 / extent + 1) {}
  HOST_DEVICE int row(int n) const { return (n * reciprocal) >> 16; }
  HOST_DEVICE int column(int n) const { return n - row(n) * extent; }
};

// In-map offset of neighbour n of (y, x), numbered like the neighbours.
HOST_DEVICE int unfold(const Map& map, const NeighborIndex& index, int n, int y, int x) {
  const int key_y = reflect(y + index.row(n) - map.radius, map.height);
  const int key_x = reflect(x + index.column(n) - map.radius, map.width);
  return (key_y - y + map.radius) * map.extent() + key_x - x + map.radius;
}

// Along one axis, the neighbour of `position` that reaches `key` directly (0), mirrored at the first (1) or at the last
// (2) position; -1 if there is none.
HOST_DEVICE int neighbor_reaching(int key, int position, int length, int radius, int mirror) {
  const int last = length - 1;
  if (mirror == 0) return key - position + radius;
  const int image = (mirror == 1 ? -key : 2 * last - key) - position + radius;
  const bool on_mirror = key == (mirror == 1 ? 0 : last);
  return on_mirror || image < 0 || image > 2 * radius ? -1 : image;
}

// Which matrix of weights, over in-map offsets, a sum applies.
enum class Fold { forward, adjoint, symmetric };  // F, Fᵀ, F + Fᵀ

}  // namespace spatial_range_attention::device

#endif  // SPATIAL_RANGE_ATTENTION_GEOMETRY_CUH
