#include "ops/cpu/class_samples.h"

#include "ops/checks.h"

namespace neusemslice::ops {
namespace {

// Refuses an order of `entries` samples that would read outside the batch.
void check_order(const char* op, const int64_t* order, int64_t entries, const int64_t* offsets,
                 int64_t samples, int64_t num_classes) {
  bool ordered = offsets[0] == 0 && offsets[num_classes] <= entries;
  for (int64_t k = 0; k < num_classes; ++k) ordered &= offsets[k] <= offsets[k + 1];
  TORCH_CHECK_VALUE(ordered, op, ": offsets must rise from 0 to at most ", entries);
  for (int64_t i = 0; i < offsets[num_classes]; ++i) {
    TORCH_CHECK_VALUE(order[i] >= 0 && order[i] < samples, op, ": order must lie in [0, ", samples,
                      "), got ", order[i], " at index ", i);
  }
}

}  // namespace

ClassSamples gather_samples(const char* op, const ClassState& state, const ClassBatch& batch,
                            const at::Tensor& order_, const at::Tensor& offsets_) {
  const int64_t* order = order_.const_data_ptr<int64_t>();
  const int64_t* offsets = offsets_.const_data_ptr<int64_t>();
  check_order(op, order, order_.size(0), offsets, batch.samples, state.num_classes);
  const bool* mask = batch.mask.defined() ? batch.mask.const_data_ptr<bool>() : nullptr;
  const double* weight = batch.weight.defined() ? batch.weight.const_data_ptr<double>() : nullptr;
  const double* share = batch.share.defined() ? batch.share.const_data_ptr<double>() : nullptr;
  const int64_t k_total = state.num_classes;
  ClassSamples s{{},
                 std::vector<int64_t>(k_total + 1, 0),
                 std::vector<double>(k_total, 0),
                 std::vector<double>(k_total, 0),
                 {}};
  s.list.reserve(batch.samples);
  std::vector<int64_t> first_kept;  // of each sample, and one behind the last
  if (mask) {
    first_kept.reserve(batch.samples + 1);
    for (int64_t n = 0; n < batch.samples; ++n) {
      first_kept.push_back(static_cast<int64_t>(s.kept.size()));
      for (int64_t p = 0; p < batch.positions; ++p) {
        if (mask[n * batch.positions + p]) s.kept.push_back(p);
      }
    }
    first_kept.push_back(static_cast<int64_t>(s.kept.size()));
  }
  const auto checked = [op](const double* weights, int64_t i, const char* name) {
    if (!weights) return 1.0;
    TORCH_CHECK_VALUE(weights[i] >= 0 && is_finite(weights[i]), op, ": ", name,
                      " must be finite and not negative, got ", weights[i], " at index ", i);
    return weights[i];
  };
  for (int64_t k = 0; k < k_total; ++k) {
    for (int64_t i = offsets[k]; i < offsets[k + 1]; ++i) {
      const int64_t n = order[i];
      const double w = checked(weight, n, "weight") * checked(share, i, "share");
      if (w == 0) continue;
      const int64_t first = mask ? first_kept[n] : 0;
      const int64_t real = mask ? first_kept[n + 1] - first : batch.positions;
      if (real == 0) continue;
      s.list.push_back({n, first, real, w});
      s.weight[k] += w;
      s.positions[k] += w * static_cast<double>(real);
    }
    s.offsets[k + 1] = static_cast<int64_t>(s.list.size());
  }
  return s;
}

cpu::Strided strided(const ClassOperand& operand) {
  return {operand.x.const_data_ptr(), element_of(operand.x), operand.stride_n, operand.stride_p,
          operand.stride_c};
}

cpu::ClassJob class_job(const ClassState& state, const ClassBatch& batch,
                        const ClassSamples& samples) {
  return {
      state,
      strided(batch),
      batch.positions,
      batch.weight.defined() || batch.share.defined(),
      samples.list.data(),
      samples.offsets.data(),
      samples.weight.data(),
      samples.positions.data(),
      batch.mask.defined() ? samples.kept.data() : nullptr,
  };
}

}  // namespace neusemslice::ops
