// CPU kernel of contribution_ (contract: ops/contribution.h).
//
// Work is cut along the neurons, sixteen at a time, and where there are few of them also along the
// classes, so that every thread has its share. No two threads write to one address but to the
// counts of products that are not finite, and the order of every sum is that of the samples. The
// loops themselves are in contribution_body.h and contribution_sums.h.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>

#include "ops/checks.h"
#include "ops/contribution.h"
#include "ops/cpu/capability.h"
#include "ops/cpu/class_samples.h"
#include "ops/cpu/contribution_job.h"

namespace neusemslice::ops {
namespace {

cpu::AccumulateContributions* accumulate_contributions() {
#if defined(__x86_64__)
  if (cpu::capability() >= cpu::Capability::kAvx512) return &cpu::accumulate_contributions_avx512;
  if (cpu::capability() == cpu::Capability::kAvx2) return &cpu::accumulate_contributions_avx2;
#endif
  return &cpu::accumulate_contributions_portable;
}

void contribution_cpu(const at::Tensor& count, const at::Tensor& positions,
                      const at::Tensor& nonfinite, const OptionalTensor& mean,
                      const OptionalTensor& mean_abs, const at::Tensor& x, const at::Tensor& g,
                      const at::Tensor& order, const at::Tensor& offsets,
                      const OptionalTensor& share, const OptionalTensor& weight,
                      const OptionalTensor& mask, int64_t neuron_dim) {
  const char* op = "contribution_";
  const ClassState state =
      checked_state(op, "", count, positions, nonfinite, mean, {}, mean_abs, {}, {});
  const ContributionBatch batch = checked_contribution(state, count.device(), x, g, order, offsets,
                                                       share, weight, mask, neuron_dim);
  const ClassSamples samples = gather_samples(op, state, batch.classes, order, offsets);
  bump_state(count, positions, nonfinite, mean, {}, mean_abs, {}, {});
  if (samples.list.empty()) return;

  const cpu::ContributionJob job{class_job(state, batch.classes, samples), strided(batch.g)};
  cpu::AccumulateContributions* const accumulate = accumulate_contributions();
  const int64_t classes = state.num_classes;
  const int64_t steps = (state.neurons + cpu::kStep - 1) / cpu::kStep;
  // Pairs of a step and a class, step by step: whole steps in the middle of a thread's range, and
  // some of the classes of those at its ends.
  at::parallel_for(0, steps * classes, 1, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t step = begin / classes, first_class = begin % classes;
      const int64_t whole = first_class == 0 ? (end - begin) / classes : 0;
      const int64_t last_step = step + std::max<int64_t>(whole, 1);
      const int64_t last_class = whole ? classes : std::min(classes, first_class + end - begin);
      accumulate(job, {first_class, last_class, step * cpu::kStep,
                       std::min(last_step * cpu::kStep, state.neurons)});
      begin += whole ? whole * classes : last_class - first_class;
    }
  });
  for (int64_t k = 0; k < classes; ++k) {
    state.count[k] += samples.weight[k];
    state.positions[k] += samples.weight[k];
  }
}

}  // namespace
}  // namespace neusemslice::ops

TORCH_LIBRARY_IMPL(neusemslice, CPU, m) {
  m.impl("contribution_", &neusemslice::ops::contribution_cpu);
}
