// CPU kernels of class_order, class_stats_ and class_stats_merge_ (contract: ops/class_stats.h).
//
// A thread owns a range of neurons and walks through all classes and samples for it, so no two
// threads write to one address and the order of every sum is that of the samples. The loops
// themselves are in class_stats_body.h and class_stats_sums.h.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "common/class_state.h"
#include "ops/checks.h"
#include "ops/class_stats.h"
#include "ops/cpu/capability.h"
#include "ops/cpu/class_samples.h"
#include "ops/cpu/class_stats_job.h"

namespace neusemslice::ops {
namespace {

std::tuple<at::Tensor, at::Tensor> class_order_cpu(const at::Tensor& labels, int64_t num_classes) {
  const char* op = "class_order";
  check_dtype(labels, at::kLong, op, "labels");
  TORCH_CHECK_VALUE(labels.dim() == 1, op, ": labels must be int64 [N], got ", describe(labels));
  TORCH_CHECK_VALUE(num_classes >= 0, op, ": num_classes must not be negative, got ", num_classes);
  const at::Tensor y = labels.contiguous();
  const int64_t n = y.numel();
  at::Tensor order = at::empty({n}, labels.options());
  at::Tensor offsets = at::empty({num_classes + 1}, labels.options());
  const int64_t* label = y.const_data_ptr<int64_t>();
  int64_t* out = order.mutable_data_ptr<int64_t>();
  int64_t* start = offsets.mutable_data_ptr<int64_t>();

  // The bin after the last class takes the ignored samples.
  std::vector<int64_t> next(num_classes + 2, 0);
  const auto bin = [&](int64_t i) { return label[i] == -100 ? num_classes : label[i]; };
  for (int64_t i = 0; i < n; ++i) {
    TORCH_CHECK_VALUE(label[i] == -100 || (label[i] >= 0 && label[i] < num_classes), op,
                      ": labels must lie in [0, ", num_classes, ") or be -100, got ", label[i],
                      " at index ", i);
    ++next[bin(i) + 1];
  }
  for (int64_t k = 0; k <= num_classes; ++k) next[k + 1] += next[k];
  std::copy(next.begin(), next.begin() + num_classes + 1, start);
  for (int64_t i = 0; i < n; ++i) out[next[bin(i)]++] = i;
  return {order, offsets};
}

cpu::AccumulateClasses* accumulate_classes() {
#if defined(__x86_64__)
  if (cpu::capability() >= cpu::Capability::kAvx512) return &cpu::accumulate_classes_avx512;
  if (cpu::capability() == cpu::Capability::kAvx2) return &cpu::accumulate_classes_avx2;
#endif
  return &cpu::accumulate_classes_portable;
}

// False if no sample counts, and so nothing changes.
bool accumulate(const ClassState& state, const ClassBatch& batch, const ClassSamples& samples) {
  if (samples.list.empty()) return false;
  const cpu::ClassJob job = class_job(state, batch, samples);
  cpu::AccumulateClasses* const accumulate = accumulate_classes();
  const int64_t steps = (state.neurons + cpu::kStep - 1) / cpu::kStep;
  at::parallel_for(0, steps, 1, [&](int64_t begin, int64_t end) {
    accumulate(job, begin * cpu::kStep, std::min(end * cpu::kStep, state.neurons));
  });
  for (int64_t k = 0; k < state.num_classes; ++k) {
    state.count[k] += samples.weight[k];
    state.positions[k] += samples.positions[k];
  }
  return true;
}

void class_stats_cpu(const at::Tensor& count, const at::Tensor& positions,
                     const at::Tensor& nonfinite, const OptionalTensor& mean,
                     const OptionalTensor& m2, const OptionalTensor& mean_abs,
                     const OptionalTensor& max, const OptionalTensor& active, const at::Tensor& x,
                     const at::Tensor& order, const at::Tensor& offsets,
                     const OptionalTensor& share, const OptionalTensor& weight,
                     const OptionalTensor& mask, int64_t neuron_dim) {
  const char* op = "class_stats_";
  const ClassState state =
      checked_state(op, "", count, positions, nonfinite, mean, m2, mean_abs, max, active);
  const ClassBatch batch =
      checked_batch(op, state, count.device(), x, order, offsets, share, weight, mask, neuron_dim);
  const ClassSamples samples = gather_samples(op, state, batch, order, offsets);
  if (!accumulate(state, batch, samples)) return;
  bump_state(count, positions, nonfinite, mean, m2, mean_abs, max, active);
}

void class_stats_many_cpu(at::TensorList counts, at::TensorList positions,
                          at::TensorList nonfinites, at::TensorList means, at::TensorList m2s,
                          at::TensorList mean_abs, at::TensorList maxs, at::TensorList actives,
                          at::TensorList xs, const at::Tensor& order, const at::Tensor& offsets,
                          const OptionalTensor& share, const OptionalTensor& weight,
                          const OptionalTensors& masks, at::IntArrayRef neuron_dims) {
  const std::vector<ClassSite> sites =
      checked_sites(counts, positions, nonfinites, means, m2s, mean_abs, maxs, actives, xs, order,
                    offsets, share, weight, masks, neuron_dims);
  // All of them are looked at before one changes.
  std::vector<ClassSamples> samples;
  samples.reserve(sites.size());
  for (size_t i = 0; i < sites.size(); ++i) {
    samples.push_back(
        gather_samples(site_name(i).c_str(), sites[i].state, sites[i].batch, order, offsets));
  }
  for (size_t i = 0; i < sites.size(); ++i) accumulate(sites[i].state, sites[i].batch, samples[i]);
  for (const at::TensorList list :
       {counts, positions, nonfinites, means, m2s, mean_abs, maxs, actives}) {
    for (const at::Tensor& t : list) bump_version(t);
  }
}

void class_stats_merge_cpu(const at::Tensor& count, const at::Tensor& positions,
                           const at::Tensor& nonfinite, const OptionalTensor& mean,
                           const OptionalTensor& m2, const OptionalTensor& mean_abs,
                           const OptionalTensor& max, const OptionalTensor& active,
                           const at::Tensor& other_count, const at::Tensor& other_positions,
                           const at::Tensor& other_nonfinite, const OptionalTensor& other_mean,
                           const OptionalTensor& other_m2, const OptionalTensor& other_mean_abs,
                           const OptionalTensor& other_max, const OptionalTensor& other_active) {
  const char* op = "class_stats_merge_";
  const ClassState s =
      checked_state(op, "", count, positions, nonfinite, mean, m2, mean_abs, max, active);
  const ClassState o = checked_state(op, "other_", other_count, other_positions, other_nonfinite,
                                     other_mean, other_m2, other_mean_abs, other_max, other_active);
  check_device(other_count, count.device(), op, "other_count");
  check_mergeable(s, o);
  for (int64_t k = 0; k < s.num_classes; ++k) {
    if (o.count[k] == 0) continue;
    for (int64_t c = 0; c < s.neurons; ++c) merge_cell(s, k, c, load_cell(o, k, c));
    s.count[k] += o.count[k];
    s.positions[k] += o.positions[k];
  }
  for (int64_t c = 0; c < s.neurons; ++c) s.nonfinite[c] += o.nonfinite[c];
  bump_state(count, positions, nonfinite, mean, m2, mean_abs, max, active);
}

}  // namespace
}  // namespace neusemslice::ops

TORCH_LIBRARY_IMPL(neusemslice, CPU, m) {
  m.impl("class_order", &neusemslice::ops::class_order_cpu);
  m.impl("class_stats_", &neusemslice::ops::class_stats_cpu);
  m.impl("class_stats_many_", &neusemslice::ops::class_stats_many_cpu);
  m.impl("class_stats_merge_", &neusemslice::ops::class_stats_merge_cpu);
}
