#pragma once

// class_stats_ of entries that have weights: a block adds one chunk of pooled samples, or of rows
// of one position, in float64. A thread owns a neuron; the block's warps take entries in turn.

#include "ops/cuda/class_stats_rows.cuh"

namespace neusemslice::cuda {

// A sample at one neuron.
struct Observed {
  double mean;
  double abs;
  double active;
  float max;
  bool finite;
};

// What samples_kernel and planes_kernel have found.
struct PooledSource {
  __device__ Observed at(const Site& site, int64_t n, int64_t c) const {
    const int64_t at = n * site.state.neurons + c;
    const PooledPlanes& pooled = site.pooled;
    Observed seen{pooled.mean[at], 0, 0, -INFINITY, true};
    if (pooled.abs) seen.abs = pooled.abs[at];
    if (pooled.active) seen.active = pooled.active[at];
    if (pooled.max) seen.max = pooled.max[at];
    return seen;
  }
};

// x itself, of one position.
template <typename T>
struct DirectSource {
  __device__ Observed at(const Site& site, int64_t n, int64_t c) const {
    const double value = to_value(*site.at<T>(n, 0, c));
    if (!is_finite(value)) return {0, 0, 0, -INFINITY, false};
    return {value, magnitude(value), value > 0 ? 1.0 : 0.0, static_cast<float>(value), true};
  }
};

struct WeightedRows {
  int64_t sample[kChunkRows];
  double weight[kChunkRows];
};

template <typename Source>
__global__ void __launch_bounds__(kThreads)
    weighted_kernel(const __grid_constant__ SortedBatch batch, const __grid_constant__ Sites sites,
                    Source source) {
  const Site& site = sites.of_block();
  const int64_t c = (blockIdx.x - site.first_block) * kWarp + warp_lane();
  const int64_t neurons = site.state.neurons;
  WeightedRows& rows = shared<WeightedRows>();
  for (int64_t j = blockIdx.y; j < batch.totals[0]; j += gridDim.y) {
    const Chunk chunk = batch.chunks[j];
    if (chunk.count == 0 || site.class_weight[chunk.k] == 0) continue;
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < chunk.count) {
      rows.sample[threadIdx.x] = batch.sample(chunk.begin + threadIdx.x);
      rows.weight[threadIdx.x] = site.entry_weight[chunk.begin + threadIdx.x];
    }
    __syncthreads();
    double shift = 0;
    double sum[1] = {0}, squares[1] = {0}, abs[1] = {0}, active[1] = {0}, max[1] = {-INFINITY};
    int64_t nonfinite = 0;
    if (c < neurons) {
      shift = site.known(chunk.k)
                  ? site.state.mean[chunk.k * neurons + c]
                  : source.at(site, batch.sample(site.class_first[chunk.k]), c).mean;
#pragma unroll 4
      for (int i = row_lane(); i < chunk.count; i += kRowLanes) {
        const double w = rows.weight[i];
        if (w == 0) continue;
        const Observed seen = source.at(site, rows.sample[i], c);
        const double deviation = seen.mean - shift;
        sum[0] += w * deviation;
        squares[0] += w * deviation * deviation;
        abs[0] += w * seen.abs;
        active[0] += w * seen.active;
        max[0] = larger(max[0], static_cast<double>(seen.max));
        nonfinite += seen.finite ? 0 : 1;
      }
      count_nonfinite(site.state, c, nonfinite);
    }
    const NeuronSums total = across_rows<kAll>(sum, squares, abs, active, max);
    if (row_lane() == 0 && c < neurons) deliver(site, chunk, c, shift, total);
  }
}

}  // namespace neusemslice::cuda
