// CUDA host side of class_order, class_stats_ and class_stats_merge_ (contract: ops/class_stats.h).
//
// The kernels are in class_stats_*.cuh: chunks of at most 256 sorted rows of one class times tiles
// of neurons; a class of one chunk goes straight into the state, others through partial sums that
// a second kernel adds in their order. The chunks are found on the device, and nothing is read
// back: a weight that is negative or not finite, which the CPU refuses, makes its sample one to
// skip here.

#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/where.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "common/class_state.h"
#include "ops/checks.h"
#include "ops/class_stats.h"
#include "ops/cuda/class_stats_device.cuh"
#include "ops/cuda/class_stats_host.cuh"
#include "ops/cuda/class_stats_merge.cuh"

namespace neusemslice::ops {
namespace {

void accumulate(const cuda::BatchInput& batch, const cuda::SiteInput* sites, int count,
                const at::TensorOptions& options) {
  with_workspace(options, [&](DeviceWorkspace& workspace) {
    return cuda::ClassStatsLaunch(batch, sites, count, workspace);
  });
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
  if (order.size(0) == 0 || state.num_classes == 0) return;
  const cuda::SiteInput site = site_input(state, batch);
  accumulate(batch_input(batch, order, offsets), &site, 1, count.options());
  bump_state(count, positions, nonfinite, mean, m2, mean_abs, max, active);
}

void class_stats_many_cuda(at::TensorList counts, at::TensorList positions,
                           at::TensorList nonfinites, at::TensorList means, at::TensorList m2s,
                           at::TensorList mean_abs, at::TensorList maxs, at::TensorList actives,
                           at::TensorList xs, const at::Tensor& order, const at::Tensor& offsets,
                           const OptionalTensor& share, const OptionalTensor& weight,
                           const OptionalTensors& masks, at::IntArrayRef neuron_dims) {
  const std::vector<ClassSite> sites =
      checked_sites(counts, positions, nonfinites, means, m2s, mean_abs, maxs, actives, xs, order,
                    offsets, share, weight, masks, neuron_dims);
  if (sites.empty()) return;
  const c10::cuda::CUDAGuard guard(counts[0].device());
  if (order.size(0) > 0 && offsets.size(0) > 1) {
    std::vector<cuda::SiteInput> inputs;
    for (const ClassSite& site : sites) inputs.push_back(site_input(site.state, site.batch));
    const cuda::BatchInput batch = batch_input(sites[0].batch, order, offsets);
    for (size_t first = 0; first < inputs.size(); first += cuda::kMaxSites) {
      const size_t count = std::min<size_t>(cuda::kMaxSites, inputs.size() - first);
      accumulate(batch, inputs.data() + first, static_cast<int>(count), counts[0].options());
    }
  }
  for (const at::TensorList list :
       {counts, positions, nonfinites, means, m2s, mean_abs, maxs, actives}) {
    for (const at::Tensor& t : list) bump_version(t);
  }
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
  cuda::merge_states(state, other);
  bump_state(count, positions, nonfinite, mean, m2, mean_abs, max, active);
}

}  // namespace
}  // namespace neusemslice::ops

TORCH_LIBRARY_IMPL(neusemslice, CUDA, m) {
  m.impl("class_order", &neusemslice::ops::class_order_cuda);
  m.impl("class_stats_", &neusemslice::ops::class_stats_cuda);
  m.impl("class_stats_many_", &neusemslice::ops::class_stats_many_cuda);
  m.impl("class_stats_merge_", &neusemslice::ops::class_stats_merge_cuda);
}
