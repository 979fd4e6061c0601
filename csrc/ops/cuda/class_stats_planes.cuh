#pragma once

// Pools samples whose positions lie side by side (contiguous images), or that have any other
// strides: a group of lanes, a whole warp or a part of it, adds one neuron's plane of one sample.

#include "ops/cuda/class_stats_samples.cuh"

namespace neusemslice::cuda {

constexpr int kPlaneGroup = 16;  // values of a lane that are added in their own type

// Lanes for a plane: enough for each to have work for about one group.
NSS_HOST_DEVICE int plane_lanes(int64_t positions) {
  int lanes = 1;
  while (lanes < kWarp && lanes * kPlaneGroup < positions) lanes *= 2;
  return lanes;
}

// One lane's sums over its share of a plane. As many lanes have a share as the positions that count
// ask for, so that those that the mask drops do not show in the order of the sums.
template <typename T, unsigned M>
__device__ inline NeuronSums add_plane(const Site& site, int64_t n, int64_t c, int lane) {
  using V = ValueOf<T>;
  constexpr int kSize = kVector<T>;
  constexpr int kLoads = kPlaneGroup / kSize;
  const int64_t count = site.real_positions(n);
  const T* plane = site.at<T>(n, 0, c);
  const bool aligned = !site.kept && site.stride_p == 1 && is_aligned(plane);
  const int lanes = plane_lanes(count);
  const int64_t step = lanes * kSize;
  NeuronSums sums;
  if (lane >= lanes) return sums;
  V max = -INFINITY;
  int64_t active = 0;
  for (int64_t i = lane * kSize; i < count; i += step * kLoads) {
    V sum = 0, abs = 0;
    Vector<T> x[kLoads];
    int width[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int64_t at = i + j * step, left = count - at;
      width[j] = static_cast<int>(left < 0 ? 0 : left < kSize ? left : kSize);
      if (site.kept) {
#pragma unroll
        for (int v = 0; v < kSize; ++v) {
          if (v < width[j]) x[j].v[v] = plane[site.position(n, at + v) * site.stride_p];
        }
      } else if (width[j] > 0) {
        x[j] = load_vector(plane + at * site.stride_p, site.stride_p, width[j],
                           aligned && width[j] == kSize);
      }
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
#pragma unroll
      for (int v = 0; v < kSize; ++v) {
        if (v >= width[j]) continue;
        const V value = to_value(x[j].v[v]);
        sum += value;
        if constexpr (M & kMeanAbs) abs += magnitude(value);
        if constexpr (M & kActive) active += value > 0 ? 1 : 0;
        if constexpr (M & kMax) max = larger(value, max);
      }
    }
    sums.sum += static_cast<double>(sum);
    sums.abs += static_cast<double>(abs);
  }
  sums.active = static_cast<double>(active);
  sums.max = static_cast<float>(max);
  return sums;
}

// The sums of a group's lanes, the same in each of them.
template <unsigned M>
__device__ inline NeuronSums across_lanes(NeuronSums sums, int lanes) {
  const unsigned group =
      lanes == kWarp ? kAllLanes : ((1u << lanes) - 1) << (warp_lane() / lanes * lanes);
  for (int d = lanes / 2; d > 0; d /= 2) {
    sums.sum += __shfl_xor_sync(group, sums.sum, d);
    if constexpr (M & kMeanAbs) sums.abs += __shfl_xor_sync(group, sums.abs, d);
    if constexpr (M & kActive) sums.active += __shfl_xor_sync(group, sums.active, d);
    if constexpr (M & kMax) sums.max = larger(sums.max, __shfl_xor_sync(group, sums.max, d));
  }
  return sums;
}

template <typename T, unsigned M>
__global__ void __launch_bounds__(kThreads, 2)
    planes_kernel(const __grid_constant__ SortedBatch batch, const __grid_constant__ Sites sites) {
  const Site& site = sites.of_block();
  const int lanes = plane_lanes(site.positions);
  const int lane = warp_lane() % lanes;
  const int64_t plane = ((blockIdx.x - site.first_block) * kThreads + threadIdx.x) / lanes;
  const int64_t n = plane / site.state.neurons, c = plane % site.state.neurons;
  if (n >= batch.samples || site.uses[n] == 0) return;
  NeuronSums total = across_lanes<M>(add_plane<T, M>(site, n, c, lane), lanes);
  if (!is_exact<T, M>(total)) {
    total = across_lanes<M>(pool_again<T>(site, n, c, lane, lanes), lanes);
  }
  if (lane == 0) {
    store_pooled(site, n, c, total.sum / static_cast<double>(site.real_positions(n)), total);
  }
}

}  // namespace neusemslice::cuda
