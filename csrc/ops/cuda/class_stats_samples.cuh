#pragma once

// Pools samples whose neurons lie side by side (channels_last images, tokens): a block adds the
// positions of one sample and a tile of neurons, as class_stats_rows.cuh does with a chunk's rows.

#include "ops/cuda/class_stats_rows.cuh"

namespace neusemslice::cuda {

__device__ inline void store_pooled(const Site& site, int64_t n, int64_t c, double mean,
                                    const NeuronSums& sums) {
  const int64_t at = n * site.state.neurons + c;
  site.pooled.mean[at] = mean;
  if (site.pooled.abs) site.pooled.abs[at] = sums.abs;
  if (site.pooled.active) site.pooled.active[at] = static_cast<float>(sums.active);
  if (site.pooled.max) site.pooled.max[at] = sums.max;
}

// One neuron's sums over the positions of sample n in float64, from the first-th on in steps,
// without values that are not finite; those are counted.
template <typename T>
__device__ NeuronSums pool_again(const Site& site, int64_t n, int64_t c, int64_t first,
                                 int64_t step) {
  NeuronSums sums;
  int64_t nonfinite = 0;
  const int64_t count = site.real_positions(n);
  for (int64_t i = first; i < count; i += step) {
    const double found = to_value(*site.at<T>(n, site.position(n, i), c));
    const bool finite = is_finite(found);
    const double value = finite ? found : 0;
    sums.sum += value;
    sums.abs += magnitude(value);
    sums.active += value > 0 ? 1 : 0;
    if (finite) sums.max = larger(static_cast<float>(value), sums.max);
    nonfinite += finite ? 0 : 1;
  }
  count_nonfinite(site.state, c, nonfinite * site.uses[n]);
  return sums;
}

template <typename T, unsigned M>
__global__ void __launch_bounds__(kThreads) samples_kernel(const __grid_constant__ Sites sites) {
  using V = ValueOf<T>;
  constexpr int kSize = kVector<T>;
  const Site& site = sites.of_block();
  const int64_t tiles = blocks_for(site.state.neurons, kSize * kWarp);
  const int64_t n = (blockIdx.x - site.first_block) / tiles;
  const int64_t tile = (blockIdx.x - site.first_block) % tiles;
  if (site.uses[n] == 0) return;
  const int64_t count = site.real_positions(n);
  const Columns columns = columns_of<T>(site, tile, site.stride_p);
  // Rows are added as deviations from the first of them.
  const auto first_row = [&](int64_t c) {
    return zero_unless_finite(to_value(*site.at<T>(n, site.position(n, 0), c)));
  };
  V shift[kSize] = {};
#pragma unroll
  for (int v = 0; v < kSize; ++v) {
    if (v < columns.width) shift[v] = first_row(columns.c + v);
  }
  VectorSums<T> sums;
  const auto row = [&](int64_t i) { return site.at<T>(n, site.position(n, i), columns.c); };
  add_rows<T, M>(count, row, columns, shift, sums);
  NeuronSums total = sums.template across<M>();
  const int64_t mine = tile * kSize * kWarp + threadIdx.x;
  if (threadIdx.x >= kSize * kWarp || mine >= site.state.neurons) return;
  const double share = 1 / static_cast<double>(count);
  double mean = first_row(mine) + total.sum * share;
  if (!is_exact<T, M>(total)) {
    total = pool_again<T>(site, n, mine, 0, 1);
    mean = total.sum * share;
  }
  store_pooled(site, n, mine, mean, total);
}

}  // namespace neusemslice::cuda
