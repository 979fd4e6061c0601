// CUDA kernel of contribution_ (contract: ops/contribution.h).
//
// A thread owns one neuron of one class and walks through that class's samples in their order, so
// nothing is atomic but the rare counts of products that are not finite, and the bits do not depend
// on the schedule. The class's count is raised by a second, tiny kernel, because every thread of
// the first still reads the old one.

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>

#include "ops/checks.h"
#include "ops/contribution.h"
#include "ops/cuda/class_batch_host.cuh"
#include "ops/cuda/contribution.cuh"
#include "ops/cuda/launch.cuh"

namespace neusemslice::ops {
namespace {

constexpr int kThreads = 128;

template <typename x_t, typename g_t>
void launch_contribution(const ClassState& state, const ContributionBatch& batch,
                         const cuda::DeviceSamples& samples) {
  const cuda::DeviceContribution<x_t, g_t> device{samples, cuda::device_operand<x_t>(batch.classes),
                                                  cuda::device_operand<g_t>(batch.g)};
  const cuda::Grid grid{cuda::blocks_for(state.neurons, kThreads),
                        std::clamp<int64_t>(state.num_classes, 1, cuda::kMaxGridY)};
  cuda::launch("contribution_kernel", &cuda::contribution_kernel<x_t, g_t>, grid, kThreads, state,
               device);
}

void contribution_cuda(const at::Tensor& count, const at::Tensor& positions,
                       const at::Tensor& nonfinite, const OptionalTensor& mean,
                       const OptionalTensor& mean_abs, const at::Tensor& x, const at::Tensor& g,
                       const at::Tensor& order, const at::Tensor& offsets,
                       const OptionalTensor& share, const OptionalTensor& weight,
                       const OptionalTensor& mask, int64_t neuron_dim) {
  const ClassState state =
      checked_state("contribution_", "", count, positions, nonfinite, mean, {}, mean_abs, {}, {});
  const c10::cuda::CUDAGuard guard(count.device());
  const ContributionBatch batch = checked_contribution(state, count.device(), x, g, order, offsets,
                                                       share, weight, mask, neuron_dim);
  bump_state(count, positions, nonfinite, mean, {}, mean_abs, {}, {});
  if (batch.classes.samples == 0 || state.num_classes == 0) return;

  const cuda::DeviceSamples samples = cuda::device_samples(batch.classes, order, offsets);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, batch.classes.x.scalar_type(), "contribution_", [&] {
        using x_t = scalar_t;
        AT_DISPATCH_FLOATING_TYPES_AND2(
            at::kHalf, at::kBFloat16, batch.g.x.scalar_type(), "contribution_",
            [&] { launch_contribution<x_t, scalar_t>(state, batch, samples); });
      });
  cuda::launch("raise_sample_counts_kernel", &cuda::raise_sample_counts_kernel,
               {cuda::blocks_for(state.num_classes, kThreads)}, kThreads, state, samples);
}

}  // namespace
}  // namespace neusemslice::ops

TORCH_LIBRARY_IMPL(neusemslice, CUDA, m) {
  m.impl("contribution_", &neusemslice::ops::contribution_cuda);
}
