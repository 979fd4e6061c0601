// CUDA kernels of class_order, class_stats_ and class_stats_merge_ (contract: ops/class_stats.h).
//
// A thread owns one neuron of one class and walks through that class's samples in their order, so
// nothing is atomic and the bits do not depend on the schedule. The class's count is raised by a
// second, tiny kernel, because every thread of the first still reads the old one.

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/where.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "common/class_state.h"
#include "ops/checks.h"
#include "ops/class_stats.h"
#include "ops/cuda/class_batch_host.cuh"
#include "ops/cuda/launch.cuh"

namespace neusemslice::ops {
namespace {

constexpr int kThreads = 128;

// A batch as the device sees it.
template <typename scalar_t>
struct DeviceBatch {
  cuda::DeviceSamples samples;
  cuda::DeviceOperand<scalar_t> x;
};

template <typename scalar_t>
__global__ void class_stats_kernel(ClassState state, DeviceBatch<scalar_t> batch) {
  const int64_t c = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (c >= state.neurons) return;
  const cuda::DeviceSamples& samples = batch.samples;
  for (int64_t k = blockIdx.y; k < state.num_classes; k += gridDim.y) {
    ShiftedSums sums;
    ClassCell cell;
    cell.max = -INFINITY;
    double total_weight = 0;
    int64_t nonfinite = 0;
    for (int64_t i = samples.offsets[k]; i < samples.offsets[k + 1]; ++i) {
      const int64_t n = samples.order[i];
      const double w = samples.weight_of(i);
      if (w == 0) continue;
      double pooled = 0;
      double sample_abs = 0;
      double sample_active = 0;
      int64_t real = 0;
      for (int64_t p = 0; p < samples.positions; ++p) {
        if (!samples.real(n, p)) continue;
        ++real;
        const double value = batch.x.at(n, p, c);
        if (!is_finite(value)) {
          ++nonfinite;
          continue;
        }
        pooled += value;
        sample_abs += fabs(value);
        sample_active += value > 0 ? 1 : 0;
        cell.max = fmaxf(cell.max, static_cast<float>(value));
      }
      if (real == 0) continue;
      pooled /= static_cast<double>(real);
      if (total_weight == 0) {
        const bool known = state.count[k] > 0 && state.mean;
        sums.shift = known ? state.mean[k * state.neurons + c] : pooled;
      }
      sums.add(pooled, w);
      total_weight += w;
      cell.positions += w * static_cast<double>(real);
      cell.mean_abs += w * sample_abs;
      cell.active += w * sample_active;
    }
    if (total_weight == 0) continue;
    cell.moments = sums.moments(total_weight);
    cell.mean_abs /= cell.positions;
    cell.active /= cell.positions;
    merge_cell(state, k, c, cell);
    cuda::count_nonfinite(state, c, nonfinite);
  }
}

__global__ void raise_counts_kernel(ClassState state, cuda::DeviceSamples samples) {
  const int64_t k = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (k < state.num_classes) samples.raise_counts(state, k, /*pooled=*/false);
}

__global__ void merge_kernel(ClassState state, ClassState other) {
  const int64_t c = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (c >= state.neurons) return;
  for (int64_t k = blockIdx.y; k < state.num_classes; k += gridDim.y) {
    if (other.count[k] != 0) merge_cell(state, k, c, load_cell(other, k, c));
  }
  if (blockIdx.y == 0) state.nonfinite[c] += other.nonfinite[c];
}

__global__ void merge_counts_kernel(ClassState state, ClassState other) {
  const int64_t k = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (k >= state.num_classes) return;
  state.count[k] += other.count[k];
  state.positions[k] += other.positions[k];
}

cuda::Grid neuron_grid(const ClassState& state) {
  return {cuda::blocks_for(state.neurons, kThreads),
          std::clamp<int64_t>(state.num_classes, 1, cuda::kMaxGridY)};
}

// Sorting and searching are ATen's (a radix sort; no wait for the device).
std::tuple<at::Tensor, at::Tensor> class_order_cuda(const at::Tensor& labels, int64_t num_classes) {
  const char* op = "class_order";
  check_dtype(labels, at::kLong, op, "labels");
  TORCH_CHECK_VALUE(labels.dim() == 1, op, ": labels must be int64 [N], got ", describe(labels));
  TORCH_CHECK_VALUE(num_classes >= 0, op, ": num_classes must not be negative, got ", num_classes);
  const c10::cuda::CUDAGuard guard(labels.device());
  const at::Tensor outside = labels.lt(0).logical_or(labels.ge(num_classes));
  const at::Tensor bins = labels.masked_fill(outside, num_classes);
  auto [sorted, order] = at::sort(bins, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const at::Tensor classes = at::arange(num_classes + 1, labels.options());
  return {order, at::searchsorted(sorted, classes)};
}

void class_stats_cuda(const at::Tensor& count, const at::Tensor& positions,
                      const at::Tensor& nonfinite, const OptionalTensor& mean,
                      const OptionalTensor& m2, const OptionalTensor& mean_abs,
                      const OptionalTensor& max, const OptionalTensor& active, const at::Tensor& x,
                      const at::Tensor& order, const at::Tensor& offsets,
                      const OptionalTensor& share, const OptionalTensor& weight,
                      const OptionalTensor& mask, int64_t neuron_dim) {
  const ClassState state = checked_state("class_stats_", "", count, positions, nonfinite, mean, m2,
                                         mean_abs, max, active);
  const c10::cuda::CUDAGuard guard(count.device());
  const ClassBatch batch = checked_batch("class_stats_", state, count.device(), x, order, offsets,
                                         share, weight, mask, neuron_dim);
  if (batch.samples == 0 || state.num_classes == 0) return;

  const cuda::DeviceSamples samples = cuda::device_samples(batch, order, offsets);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, batch.x.scalar_type(), "class_stats_", [&] {
        const DeviceBatch<scalar_t> device{samples, cuda::device_operand<scalar_t>(batch)};
        cuda::launch("class_stats_kernel", &class_stats_kernel<scalar_t>, neuron_grid(state),
                     kThreads, state, device);
      });
  cuda::launch("raise_counts_kernel", &raise_counts_kernel,
               {cuda::blocks_for(state.num_classes, kThreads)}, kThreads, state, samples);
  bump_state(count, positions, nonfinite, mean, m2, mean_abs, max, active);
}

void class_stats_merge_cuda(const at::Tensor& count, const at::Tensor& positions,
                            const at::Tensor& nonfinite, const OptionalTensor& mean,
                            const OptionalTensor& m2, const OptionalTensor& mean_abs,
                            const OptionalTensor& max, const OptionalTensor& active,
                            const at::Tensor& other_count, const at::Tensor& other_positions,
                            const at::Tensor& other_nonfinite, const OptionalTensor& other_mean,
                            const OptionalTensor& other_m2, const OptionalTensor& other_mean_abs,
                            const OptionalTensor& other_max, const OptionalTensor& other_active) {
  const char* op = "class_stats_merge_";
  const ClassState state =
      checked_state(op, "", count, positions, nonfinite, mean, m2, mean_abs, max, active);
  const ClassState other =
      checked_state(op, "other_", other_count, other_positions, other_nonfinite, other_mean,
                    other_m2, other_mean_abs, other_max, other_active);
  check_device(other_count, count.device(), op, "other_count");
  check_mergeable(state, other);
  const c10::cuda::CUDAGuard guard(count.device());
  cuda::launch("merge_kernel", &merge_kernel, neuron_grid(state), kThreads, state, other);
  cuda::launch("merge_counts_kernel", &merge_counts_kernel,
               {cuda::blocks_for(state.num_classes, kThreads)}, kThreads, state, other);
  bump_state(count, positions, nonfinite, mean, m2, mean_abs, max, active);
}

}  // namespace
}  // namespace neusemslice::ops

TORCH_LIBRARY_IMPL(neusemslice, CUDA, m) {
  m.impl("class_order", &neusemslice::ops::class_order_cuda);
  m.impl("class_stats_", &neusemslice::ops::class_stats_cuda);
  m.impl("class_stats_merge_", &neusemslice::ops::class_stats_merge_cuda);
}
