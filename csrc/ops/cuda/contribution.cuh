#pragma once

// Device code of contribution_, free of torch.

#include <cmath>

#include "ops/cuda/class_batch.cuh"

namespace neusemslice::cuda {

template <typename x_t, typename g_t>
struct DeviceContribution {
  DeviceSamples samples;
  DeviceOperand<x_t> x;
  DeviceOperand<g_t> g;

  // Merges the samples of class k into neuron c.
  __device__ void add(const ClassState& state, int64_t k, int64_t c) const {
    ShiftedSums sums;
    double total_weight = 0;
    double total_abs = 0;
    int64_t nonfinite = 0;
    for (int64_t i = samples.offsets[k]; i < samples.offsets[k + 1]; ++i) {
      const int64_t n = samples.order[i];
      const double w = samples.weight_of(i);
      if (w == 0) continue;
      double pooled = 0;
      int64_t real = 0;
      for (int64_t p = 0; p < samples.positions; ++p) {
        if (!samples.real(n, p)) continue;
        ++real;
        const double product = x.at(n, p, c) * g.at(n, p, c);
        if (is_finite(product)) {
          pooled += product;
        } else {
          ++nonfinite;
        }
      }
      if (real == 0) continue;
      pooled /= static_cast<double>(real);
      sums.add(pooled, w);
      total_weight += w;
      total_abs += w * fabs(pooled);
    }
    if (total_weight == 0) return;
    ClassCell cell;
    cell.moments = sums.moments(total_weight);
    cell.positions = total_weight;
    cell.mean_abs = total_abs / total_weight;
    merge_cell(state, k, c, cell);
    count_nonfinite(state, c, nonfinite);
  }
};

template <typename x_t, typename g_t>
__global__ void contribution_kernel(ClassState state, DeviceContribution<x_t, g_t> batch) {
  const int64_t c = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (c >= state.neurons) return;
  for (int64_t k = blockIdx.y; k < state.num_classes; k += gridDim.y) batch.add(state, k, c);
}

static __global__ void raise_sample_counts_kernel(ClassState state, DeviceSamples samples) {
  const int64_t k = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (k < state.num_classes) samples.raise_counts(state, k);
}

}  // namespace neusemslice::cuda
