#pragma once

// class_stats_merge_: a thread owns one neuron of one class. The counts are raised by a second,
// tiny kernel, because every thread of the first still reads the old ones.

#include <algorithm>

#include "ops/cuda/class_stats_site.cuh"

namespace neusemslice::cuda {

static __global__ void merge_cells_kernel(ClassState state, ClassState other) {
  const int64_t c = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (c >= state.neurons) return;
  for (int64_t k = blockIdx.y; k < state.num_classes; k += gridDim.y) {
    if (other.count[k] != 0) merge_cell(state, k, c, load_cell(other, k, c));
  }
  if (blockIdx.y == 0) state.nonfinite[c] += other.nonfinite[c];
}

static __global__ void merge_counts_kernel(ClassState state, ClassState other) {
  const int64_t k = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (k >= state.num_classes) return;
  state.count[k] += other.count[k];
  state.positions[k] += other.positions[k];
}

inline void merge_states(const ClassState& state, const ClassState& other) {
  launch(
      "merge_cells_kernel", &merge_cells_kernel,
      {blocks_for(state.neurons, kThreads), std::clamp<int64_t>(state.num_classes, 1, kMaxGridY)},
      kThreads, state, other);
  launch("merge_counts_kernel", &merge_counts_kernel, {blocks_for(state.num_classes, kThreads)},
         kThreads, state, other);
}

}  // namespace neusemslice::cuda
