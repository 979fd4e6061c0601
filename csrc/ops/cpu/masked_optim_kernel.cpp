// CPU kernels of masked_sgd_ and masked_adamw_ (contract: ops/masked_optim.h).
//
// All tensors of a call are one list of blocks, of which each thread takes a stretch, so that many
// small tensors cost no more than a large one; within a block, elements follow the order of the
// state, which is read and written front to back. What depends on a row's number of updates is
// found once per row beforehand. The loops themselves are in masked_optim_body.h. All of the
// arguments are checked before anything is written.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "ops/checks.h"
#include "ops/cpu/capability.h"
#include "ops/cpu/masked_optim_job.h"
#include "ops/masked_optim.h"

namespace neusemslice::ops {
namespace {

constexpr int64_t kGrain = 4;  // blocks below which another thread does not pay

const cpu::MaskedOptimLoops& loops() {
#if defined(__x86_64__)
  if (cpu::capability() >= cpu::Capability::kAvx512) return cpu::kMaskedOptimAvx512;
  if (cpu::capability() == cpu::Capability::kAvx2) return cpu::kMaskedOptimAvx2;
#endif
  return cpu::kMaskedOptimPortable;
}

void check_rows(const char* op, const std::vector<TensorUpdate>& updates) {
  for (size_t i = 0; i < updates.size(); ++i) {
    const int64_t size = updates[i].where.dimension;
    const int64_t* row = updates[i].where.rows;
    for (int64_t r = 0; r < updates[i].row_count; ++r) {
      TORCH_CHECK_VALUE(row[r] >= 0 && row[r] < size, op, ": rows[", i, "] must lie in [0, ", size,
                        "), got ", row[r], " at index ", r);
      TORCH_CHECK_VALUE(r == 0 || row[r - 1] < row[r], op, ": rows[", i,
                        "] must rise without repeats, got ", row[r], " after ", row[r - 1],
                        " at index ", r);
    }
  }
}

// Finds the rows' shares of a tensor, raises their steps, and says whether the shares are all the
// same, as they are unless rows joined one after another.
template <typename Rule>
bool begin_rows(const Rule& rule, double lr, const TensorUpdate& t, typename Rule::Row* shares) {
  bool same = true;
  float last = 0;
  for (int64_t r = 0; r < t.row_count; ++r) {
    const float updates = t.steps ? t.steps[r] : 0;
    if (r > 0 && updates == last) {
      shares[r] = shares[r - 1];
    } else {
      same = r == 0;
      shares[r] = rule.row(lr, updates);
      last = updates;
    }
    if (t.steps) t.steps[r] += 1;
  }
  return same;
}

template <template <typename> class Rule>
void update(cpu::UpdateJob<Rule> job, void (*loop)(const cpu::UpdateJob<Rule>&, int64_t, int64_t),
            std::vector<TensorUpdate>& updates, double lr) {
  int64_t rows = 0;
  for (TensorUpdate& t : updates) {
    t.first_row = rows;
    rows += t.row_count;
  }
  // Room for rows of either width.
  const auto room = std::make_unique_for_overwrite<typename Rule<double>::Row[]>(rows);
  int64_t blocks = 0;
  for (TensorUpdate& t : updates) {
    t.row_shares = room.get() + t.first_row;
    t.same_shares =
        t.element == Element::kFloat64
            ? begin_rows(job.wide, lr, t, static_cast<typename Rule<double>::Row*>(t.row_shares))
            : begin_rows(job.narrow, lr, t, static_cast<typename Rule<float>::Row*>(t.row_shares));
    if (t.elements > 0 && t.same_shares && t.row_count == t.where.dimension) t.where.join_rows();
    t.first_block = blocks;
    blocks += (t.elements + cpu::kBlockElements - 1) / cpu::kBlockElements;
  }
  job.tensors = updates.data();
  job.count = static_cast<int64_t>(updates.size());
  at::parallel_for(0, blocks, kGrain, [&](int64_t begin, int64_t end) { loop(job, begin, end); });
}

void masked_sgd_cpu(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                    at::TensorList masters, at::TensorList steps, at::TensorList rows,
                    at::IntArrayRef neuron_dims, const at::Tensor& lr, double momentum,
                    double dampening, double weight_decay, bool nesterov, bool maximize,
                    const std::optional<at::Tensor>& grad_scale,
                    const std::optional<at::Tensor>& found_inf) {
  const OptimizerLists lists = sgd_lists(params, grads, momentum_buffers, masters, steps, rows,
                                         neuron_dims, momentum, dampening, nesterov);
  OptimizerTensors tensors = checked_tensors(lists);
  const StepScalars scalars = checked_scalars(lists, lr, grad_scale, found_inf);
  check_rows(lists.op, tensors.updates);
  if (scalars.skipped()) return;
  update<Sgd>({{momentum, dampening, weight_decay, nesterov, maximize},
               {momentum, dampening, weight_decay, nesterov, maximize},
               scalars.scale()},
              loops().sgd, tensors.updates, scalars.lr());
  bump_tensors(lists);
}

void masked_adamw_cpu(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                      at::TensorList exp_avg_sqs, at::TensorList max_exp_avg_sqs,
                      at::TensorList masters, at::TensorList steps, at::TensorList rows,
                      at::IntArrayRef neuron_dims, const at::Tensor& lr, double beta1, double beta2,
                      double eps, double weight_decay, bool decoupled_weight_decay, bool amsgrad,
                      bool maximize, const std::optional<at::Tensor>& grad_scale,
                      const std::optional<at::Tensor>& found_inf) {
  const OptimizerLists lists =
      adamw_lists(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, steps, rows,
                  neuron_dims, beta1, beta2, amsgrad);
  OptimizerTensors tensors = checked_tensors(lists);
  const StepScalars scalars = checked_scalars(lists, lr, grad_scale, found_inf);
  check_rows(lists.op, tensors.updates);
  if (scalars.skipped()) return;
  update<Adamw>({{beta1, beta2, eps, weight_decay, decoupled_weight_decay, amsgrad, maximize},
                 {beta1, beta2, eps, weight_decay, decoupled_weight_decay, amsgrad, maximize},
                 scalars.scale()},
                loops().adamw, tensors.updates, scalars.lr());
  bump_tensors(lists);
}

}  // namespace
}  // namespace neusemslice::ops

TORCH_LIBRARY_IMPL(neusemslice, CPU, m) {
  m.impl("masked_sgd_", &neusemslice::ops::masked_sgd_cpu);
  m.impl("masked_adamw_", &neusemslice::ops::masked_adamw_cpu);
}
