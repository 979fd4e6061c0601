#pragma once

// Device code of masked_sgd_ and masked_adamw_, free of torch.

#include <cstdint>

#include "common/optimizer_math.h"
#include "common/step_scalars.h"
#include "common/tuned_rows.h"
#include "ops/cuda/device.cuh"

namespace neusemslice::cuda {

template <typename Rule>
__global__ void begin_rows_kernel(Rule rule, StepScalars scalars, const int64_t* __restrict__ rows,
                                  int64_t count, int64_t dimension, float* __restrict__ steps,
                                  typename Rule::Row* __restrict__ begun) {
  const int64_t r = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (r >= count || rows[r] < 0 || rows[r] >= dimension || scalars.skipped()) return;
  begun[r] = rule.row(scalars.lr(), steps ? steps[r] : 0);
  if (steps) steps[r] += 1;
}

template <typename scalar_t, typename T>
__global__ void sgd_kernel(Sgd<T> rule, StepScalars scalars, TunedRows where, int64_t elements,
                           const typename Sgd<T>::Row* __restrict__ rows,
                           scalar_t* __restrict__ param, const scalar_t* __restrict__ grad,
                           T* __restrict__ buffer) {
  const int64_t s = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (s >= elements || scalars.skipped()) return;
  const TunedRows::Place at = where.along(where.line(s / where.width), s % where.width);
  if (at.row < 0) return;
  param[at.param] = static_cast<scalar_t>(
      rule.step(rows[at.row], static_cast<T>(param[at.param]), static_cast<T>(grad[at.grad]),
                static_cast<T>(scalars.scale()), buffer ? buffer + s : nullptr));
}

template <typename scalar_t, typename T>
__global__ void adamw_kernel(Adamw<T> rule, StepScalars scalars, TunedRows where, int64_t elements,
                             const typename Adamw<T>::Row* __restrict__ rows,
                             scalar_t* __restrict__ param, const scalar_t* __restrict__ grad,
                             T* __restrict__ exp_avg, T* __restrict__ exp_avg_sq,
                             T* __restrict__ max_exp_avg_sq) {
  const int64_t s = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (s >= elements || scalars.skipped()) return;
  const TunedRows::Place at = where.along(where.line(s / where.width), s % where.width);
  if (at.row < 0) return;
  param[at.param] = static_cast<scalar_t>(
      rule.step(rows[at.row], static_cast<T>(param[at.param]), static_cast<T>(grad[at.grad]),
                static_cast<T>(scalars.scale()), exp_avg + s, exp_avg_sq + s,
                max_exp_avg_sq ? max_exp_avg_sq + s : nullptr));
}

}  // namespace neusemslice::cuda
