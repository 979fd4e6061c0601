// CPU kernels of class_order, class_stats_ and class_stats_merge_ (contract: ops/class_stats.h).
//
// A thread owns a block of neurons and walks through all classes and samples for it, so no two
// threads write to one address and the order of every sum is that of the samples. The accumulators
// of a block fit in the first-level cache.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "common/class_state.h"
#include "ops/checks.h"
#include "ops/class_stats.h"

namespace neusemslice::ops {
namespace {

constexpr int64_t kBlock = 64;  // neurons per block
constexpr float kNoMaximum = -std::numeric_limits<float>::infinity();

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

// Refuses an order that would read outside the batch.
void check_order(const int64_t* order, const int64_t* offsets, int64_t samples,
                 int64_t num_classes) {
  bool ordered = offsets[0] == 0 && offsets[num_classes] <= samples;
  for (int64_t k = 0; k < num_classes; ++k) ordered &= offsets[k] <= offsets[k + 1];
  TORCH_CHECK_VALUE(ordered, "class_stats_: offsets must rise from 0 to at most ", samples);
  for (int64_t i = 0; i < offsets[num_classes]; ++i) {
    TORCH_CHECK_VALUE(order[i] >= 0 && order[i] < samples, "class_stats_: order must lie in [0, ",
                      samples, "), got ", order[i], " at index ", i);
  }
}

// A sample as the inner loop needs it: where it lies, its weight and its number of real positions.
struct Sample {
  int64_t index;
  double weight;
  double positions;
};

// The samples that count, grouped by class, with each class's sums of weights.
struct Samples {
  std::vector<Sample> list;
  std::vector<int64_t> offsets;
  std::vector<double> weight;
  std::vector<double> positions;
};

Samples gather(const ClassState& state, const ClassBatch& batch, const int64_t* order,
               const int64_t* offsets) {
  const bool* mask = batch.mask.defined() ? batch.mask.const_data_ptr<bool>() : nullptr;
  const double* weight = batch.weight.defined() ? batch.weight.const_data_ptr<double>() : nullptr;
  const int64_t k_total = state.num_classes;
  Samples s{{},
            std::vector<int64_t>(k_total + 1, 0),
            std::vector<double>(k_total, 0),
            std::vector<double>(k_total, 0)};
  s.list.reserve(offsets[k_total]);
  for (int64_t k = 0; k < k_total; ++k) {
    for (int64_t i = offsets[k]; i < offsets[k + 1]; ++i) {
      const int64_t n = order[i];
      const double w = weight ? weight[n] : 1.0;
      TORCH_CHECK_VALUE(w >= 0 && is_finite(w),
                        "class_stats_: weight must be finite and not negative, got ", w,
                        " at index ", n);
      const int64_t real =
          mask ? std::count(mask + n * batch.positions, mask + (n + 1) * batch.positions, true)
               : batch.positions;
      if (w == 0 || real == 0) continue;
      s.list.push_back({n, w, static_cast<double>(real)});
      s.weight[k] += w;
      s.positions[k] += w * static_cast<double>(real);
    }
    s.offsets[k + 1] = static_cast<int64_t>(s.list.size());
  }
  return s;
}

// Sums of one sample over its positions, and of one class over its samples, for a block of neurons.
struct Block {
  double pooled[kBlock];
  double sample_abs[kBlock];
  double sample_active[kBlock];
  ShiftedSums sums[kBlock];
  double abs[kBlock];
  double active[kBlock];
  float max[kBlock];
  int64_t nonfinite[kBlock];
};

template <typename scalar_t>
inline void add_value(Block& b, int64_t c, scalar_t raw) {
  const double value = static_cast<double>(raw);
  const bool finite = is_finite(value);
  const double used = finite ? value : 0.0;
  b.pooled[c] += used;
  b.sample_abs[c] += std::abs(used);
  b.sample_active[c] += used > 0 ? 1.0 : 0.0;
  b.max[c] = finite ? std::max(b.max[c], static_cast<float>(value)) : b.max[c];
  b.nonfinite[c] += finite ? 0 : 1;
}

// Adds the positions of one sample. Neurons run in the inner loop where they are adjacent in
// memory, positions otherwise.
template <typename scalar_t>
void add_sample(Block& b, const scalar_t* x, const bool* mask, const ClassBatch& batch,
                int64_t width) {
  std::fill_n(b.pooled, width, 0.0);
  std::fill_n(b.sample_abs, width, 0.0);
  std::fill_n(b.sample_active, width, 0.0);
  if (batch.stride_c == 1) {
    for (int64_t p = 0; p < batch.positions; ++p) {
      if (mask && !mask[p]) continue;
      const scalar_t* row = x + p * batch.stride_p;
      for (int64_t c = 0; c < width; ++c) add_value(b, c, row[c]);
    }
  } else {
    for (int64_t c = 0; c < width; ++c) {
      const scalar_t* plane = x + c * batch.stride_c;
      for (int64_t p = 0; p < batch.positions; ++p) {
        if (!mask || mask[p]) add_value(b, c, plane[p * batch.stride_p]);
      }
    }
  }
}

template <typename scalar_t>
void accumulate_block(const ClassState& state, const ClassBatch& batch, const Samples& samples,
                      const scalar_t* x, int64_t first, int64_t width) {
  const bool* mask = batch.mask.defined() ? batch.mask.const_data_ptr<bool>() : nullptr;
  Block b;
  std::fill_n(b.nonfinite, width, int64_t{0});
  for (int64_t k = 0; k < state.num_classes; ++k) {
    if (samples.offsets[k] == samples.offsets[k + 1]) continue;
    const int64_t row = k * state.neurons + first;
    const double old_weight = state.count[k];
    for (int64_t i = samples.offsets[k]; i < samples.offsets[k + 1]; ++i) {
      const Sample& s = samples.list[i];
      const bool begins = i == samples.offsets[k];
      if (begins) {
        std::fill_n(b.max, width, kNoMaximum);
        std::fill_n(b.abs, width, 0.0);
        std::fill_n(b.active, width, 0.0);
      }
      add_sample(b, x + s.index * batch.stride_n + first * batch.stride_c,
                 mask ? mask + s.index * batch.positions : nullptr, batch, width);
      for (int64_t c = 0; c < width; ++c) {
        const double pooled = b.pooled[c] / s.positions;
        if (begins) {
          const bool known = old_weight > 0 && state.mean != nullptr;
          b.sums[c] = {known ? state.mean[row + c] : pooled, 0, 0};
        }
        b.sums[c].add(pooled, s.weight);
        b.abs[c] += s.weight * b.sample_abs[c];
        b.active[c] += s.weight * b.sample_active[c];
      }
    }
    for (int64_t c = 0; c < width; ++c) {
      merge_cell(state, k, first + c,
                 {b.sums[c].moments(samples.weight[k]), samples.positions[k],
                  b.abs[c] / samples.positions[k], b.active[c] / samples.positions[k], b.max[c]});
    }
  }
  for (int64_t c = 0; c < width; ++c) state.nonfinite[first + c] += b.nonfinite[c];
}

void class_stats_cpu(const at::Tensor& count, const at::Tensor& positions,
                     const at::Tensor& nonfinite, const OptionalTensor& mean,
                     const OptionalTensor& m2, const OptionalTensor& mean_abs,
                     const OptionalTensor& max, const OptionalTensor& active, const at::Tensor& x,
                     const at::Tensor& order, const at::Tensor& offsets,
                     const OptionalTensor& weight, const OptionalTensor& mask, int64_t neuron_dim) {
  const ClassState state = checked_state("class_stats_", "", count, positions, nonfinite, mean, m2,
                                         mean_abs, max, active);
  const ClassBatch batch =
      checked_batch(state, count.device(), x, order, offsets, weight, mask, neuron_dim);
  const int64_t* start = offsets.const_data_ptr<int64_t>();
  const int64_t* sorted = order.const_data_ptr<int64_t>();
  check_order(sorted, start, batch.samples, state.num_classes);
  const Samples samples = gather(state, batch, sorted, start);
  if (samples.list.empty()) return;

  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, batch.x.scalar_type(), "class_stats_",
                                  [&] {
                                    const scalar_t* data = batch.x.const_data_ptr<scalar_t>();
                                    const int64_t blocks = (state.neurons + kBlock - 1) / kBlock;
                                    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
                                      for (int64_t i = begin; i < end; ++i) {
                                        const int64_t first = i * kBlock;
                                        accumulate_block(state, batch, samples, data, first,
                                                         std::min(kBlock, state.neurons - first));
                                      }
                                    });
                                  });
  for (int64_t k = 0; k < state.num_classes; ++k) {
    state.count[k] += samples.weight[k];
    state.positions[k] += samples.positions[k];
  }
  bump_state(count, positions, nonfinite, mean, m2, mean_abs, max, active);
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
  m.impl("class_stats_merge_", &neusemslice::ops::class_stats_merge_cpu);
}
