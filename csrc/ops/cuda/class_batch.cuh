#pragma once

// A batch by class as the kernel of contribution_ sees it on the device.

#include <cstdint>

#include "common/class_state.h"
#include "ops/cuda/device.cuh"

namespace neusemslice::cuda {

// The samples of each class. Nothing is read back to the host: a weight or share that is negative
// or not finite, which the CPU refuses, makes its sample one to skip here.
struct DeviceSamples {
  const bool* mask;
  const double* share;
  const double* weight;
  const int64_t* order;
  const int64_t* offsets;
  int64_t samples;
  int64_t positions;

  // Weight of entry i of the order; 0 if it is one to skip.
  __device__ double weight_of(int64_t i) const {
    const int64_t n = order[i];
    if (n < 0 || n >= samples) return 0;
    const double s = share ? share[i] : 1, w = weight ? weight[n] : 1;
    return s > 0 && w > 0 && is_finite(s) && is_finite(w) ? s * w : 0;
  }
  __device__ bool real(int64_t n, int64_t p) const { return !mask || mask[n * positions + p]; }
  __device__ int64_t real_positions(int64_t n) const {
    if (!mask) return positions;
    int64_t total = 0;
    for (int64_t p = 0; p < positions; ++p) total += mask[n * positions + p] ? 1 : 0;
    return total;
  }

  // Raises the counts of class k, once all of its neurons were merged; a sample is one position.
  __device__ void raise_counts(const ClassState& state, int64_t k) const {
    double total = 0;
    for (int64_t i = offsets[k]; i < offsets[k + 1]; ++i) {
      const double w = weight_of(i);
      if (w == 0) continue;
      if (real_positions(order[i]) > 0) total += w;
    }
    state.count[k] += total;
    state.positions[k] += total;
  }
};

// Sample n's value of neuron c at position p lies at
// data + n * stride_n + p * stride_p + c * stride_c.
template <typename scalar_t>
struct DeviceOperand {
  const scalar_t* data;
  int64_t stride_n;
  int64_t stride_p;
  int64_t stride_c;

  __device__ double at(int64_t n, int64_t p, int64_t c) const {
    return static_cast<double>(data[n * stride_n + p * stride_p + c * stride_c]);
  }
};

// Integers, and rare: the order of these additions does not show in the result.
__device__ inline void count_nonfinite(const ClassState& state, int64_t c, int64_t found) {
  if (found == 0) return;
  atomicAdd(reinterpret_cast<unsigned long long*>(state.nonfinite + c),
            static_cast<unsigned long long>(found));
}

}  // namespace neusemslice::cuda
