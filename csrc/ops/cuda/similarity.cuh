#pragma once

// Device code of the similarity operators, free of torch: a thread owns one word or one pair, a
// warp one row that becomes a unit vector.

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/similarity.h"
#include "ops/cuda/common_sizes.cuh"
#include "ops/cuda/device.cuh"

namespace neusemslice::cuda {

// A rectangle of the matrix of pairs.
struct PairTile {
  int64_t row;
  int64_t col;
  int64_t rows;
  int64_t cols;
};

// Packed sets as the device sees them.
struct DeviceSets {
  const int64_t* a;
  const int64_t* b;
  const int64_t* a_sizes;
  const int64_t* b_sizes;
  int64_t words;
  int64_t cols;
  SetMetric metric;
  bool self;

  // Calls visit(i, j, common) for the pairs (i, j) of the tile that are this block's.
  template <typename Visit>
  __device__ void visit(const PairTile& tile, const Visit& visit_pair) const {
    const int64_t i = blockIdx.y * int64_t{kSetSide}, j = blockIdx.x * int64_t{kSetSide};
    visit_common_sizes(
        a + (tile.row + i) * words, b + (tile.col + j) * words, tile.rows - i, tile.cols - j, words,
        [&](int64_t r, int64_t c, int64_t common) { visit_pair(i + r, j + c, common); });
  }
};

static __global__ void pack_kernel(const bool* __restrict__ bits, int64_t size,
                                   int64_t words_per_row, int64_t total,
                                   int64_t* __restrict__ words) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i >= total) return;
  const int64_t first = i % words_per_row * kWordBits;
  const int64_t left = size - first;
  words[i] =
      pack_word(bits + i / words_per_row * size + first, left < kWordBits ? left : kWordBits);
}

static __global__ void set_sizes_kernel(const int64_t* __restrict__ sets, int64_t rows,
                                        int64_t words, int64_t* __restrict__ sizes) {
  const int64_t r = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (r < rows) sizes[r] = set_size(sets + r * words, words);
}

// A block has a square of the tile's pairs.
static __global__ void __launch_bounds__(kSetThreads)
    set_similarity_kernel(DeviceSets sets, PairTile tile, float* __restrict__ out) {
  sets.visit(tile, [&](int64_t i, int64_t j, int64_t common) {
    const int64_t r = tile.row + i, c = tile.col + j;
    if (sets.self && c < r) return;
    const int64_t size_r = sets.a_sizes[r], size_c = sets.b_sizes[c];
    out[r * sets.cols + c] =
        static_cast<float>(set_similarity(sets.metric, common, size_r, size_c));
    if (sets.self) {
      out[c * sets.cols + r] =
          static_cast<float>(set_similarity(sets.metric, common, size_c, size_r));
    }
  });
}

// The same for edges; without `is_edge`, values alone.
static __global__ void __launch_bounds__(kSetThreads)
    set_edges_kernel(DeviceSets sets, PairTile tile, Pairs pairs, double threshold,
                     float* __restrict__ values, bool* __restrict__ is_edge) {
  sets.visit(tile, [&](int64_t i, int64_t j, int64_t common) {
    const int64_t r = tile.row + i, c = tile.col + j;
    const bool included = is_included(pairs, r, c);
    const double value =
        included ? set_similarity(sets.metric, common, sets.a_sizes[r], sets.b_sizes[c]) : 0;
    values[i * tile.cols + j] = static_cast<float>(value);
    if (is_edge) is_edge[i * tile.cols + j] = included && value >= threshold;
  });
}

template <typename T>
__device__ T across_warp_sum(T value) {
  for (int d = kWarp / 2; d > 0; d /= 2) value += __shfl_xor_sync(kAllLanes, value, d);
  return value;
}

// unit_map() by a warp: each lane has every 32nd value.
template <typename scalar_t>
__device__ UnitMap warp_unit_map(const scalar_t* row, int64_t stride, int64_t size, bool centre) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const auto value = [&](int64_t d) { return static_cast<double>(row[d * stride]); };
  UnitMap map;
  double largest = 0;
  bool finite = true;
  for (int64_t d = lane; d < size; d += kWarp) {
    const double magnitude = fabs(value(d));
    finite = finite && magnitude <= std::numeric_limits<double>::max();
    largest = magnitude > largest ? magnitude : largest;
  }
  for (int d = kWarp / 2; d > 0; d /= 2) {
    const double other = __shfl_xor_sync(kAllLanes, largest, d);
    largest = other > largest ? other : largest;
  }
  if (!__all_sync(kAllLanes, finite)) {
    map.norm = std::numeric_limits<double>::quiet_NaN();
    return map;
  }
  if (largest == 0) return map;
  map.scale = unit_scale(largest);
  if (centre) {
    map.shift = value(0) * map.scale;
    double sum = 0;
    for (int64_t d = lane; d < size; d += kWarp) sum += map.centred(value(d));
    map.mean = across_warp_sum(sum) / static_cast<double>(size);
  }
  double squares = 0;
  for (int64_t d = lane; d < size; d += kWarp) {
    const double centred = map.centred(value(d));
    squares += centred * centred;
  }
  map.norm = sqrt(across_warp_sum(squares));
  return map;
}

template <typename scalar_t, typename value_t>
__global__ void unit_rows_kernel(const scalar_t* __restrict__ x, int64_t rows, int64_t size,
                                 int64_t stride_r, int64_t stride_d, bool centre,
                                 value_t* __restrict__ unit) {
  const int64_t r = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) / kWarp;
  if (r >= rows) return;
  const scalar_t* row = x + r * stride_r;
  const UnitMap map = warp_unit_map(row, stride_d, size, centre);
  for (int64_t d = threadIdx.x % kWarp; d < size; d += kWarp) {
    unit[r * size + d] = static_cast<value_t>(map(static_cast<double>(row[d * stride_d])));
  }
}

template <typename value_t>
__global__ void similarity_kernel(const value_t* __restrict__ product, PairTile tile, bool self,
                                  bool unit, int64_t cols, value_t* __restrict__ out) {
  const int64_t j = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (j >= tile.cols) return;
  const int64_t c = tile.col + j;
  for (int64_t i = blockIdx.y; i < tile.rows; i += gridDim.y) {
    const int64_t r = tile.row + i;
    if (self && c < r) continue;
    value_t value = product[i * tile.cols + j];
    if (unit) value = clamp_similarity(value);
    if (self) {
      if (unit && c == r) value = self_similarity(value);
      out[c * cols + r] = value;
    }
    out[r * cols + c] = value;
  }
}

// Clamps products of unit vectors in place, and marks those that are edges.
template <typename value_t>
__global__ void edges_kernel(value_t* __restrict__ values, PairTile tile, Pairs pairs, bool unit,
                             double threshold, bool* __restrict__ is_edge) {
  const int64_t j = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (j >= tile.cols) return;
  for (int64_t i = blockIdx.y; i < tile.rows; i += gridDim.y) {
    const int64_t at = i * tile.cols + j;
    const value_t value = unit ? clamp_similarity(values[at]) : values[at];
    values[at] = value;
    is_edge[at] =
        is_included(pairs, tile.row + i, tile.col + j) && static_cast<double>(value) >= threshold;
  }
}

}  // namespace neusemslice::cuda
