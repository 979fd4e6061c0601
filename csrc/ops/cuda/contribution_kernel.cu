// CUDA kernel of contribution_ (contract: ops/contribution.h).
//
// The kernels are in contribution.cuh and class_stats_*.cuh: the batch is divided into chunks as
// class_stats_ does it. Nothing is atomic but the rare counts of products that are not finite, and
// the bits do not depend on the schedule.

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/contribution.h"
#include "ops/cuda/class_stats_host.cuh"
#include "ops/cuda/contribution.cuh"

namespace neusemslice::ops {
namespace {

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
  if (order.size(0) == 0 || state.num_classes == 0) return;
  const cuda::OtherInput other{batch.g.x.const_data_ptr(), element_of(batch.g.x), batch.g.stride_n,
                               batch.g.stride_p, batch.g.stride_c};
  with_workspace(count.options(), [&](DeviceWorkspace& workspace) {
    return cuda::ContributionLaunch(batch_input(batch.classes, order, offsets),
                                    site_input(state, batch.classes), other, workspace);
  });
}

}  // namespace
}  // namespace neusemslice::ops

TORCH_LIBRARY_IMPL(neusemslice, CUDA, m) {
  m.impl("contribution_", &neusemslice::ops::contribution_cuda);
}
