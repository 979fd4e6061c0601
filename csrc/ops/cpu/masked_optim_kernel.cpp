// CPU kernels of masked_sgd_ and masked_adamw_ (contract: ops/masked_optim.h).
//
// Parameters one after another; the elements of one in the order of its state, a line at a time, so
// that state is read and written front to back. What depends on a row's number of updates is found
// once per row beforehand. All of the arguments are checked before anything is written.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "common/optimizer_math.h"
#include "ops/checks.h"
#include "ops/masked_optim.h"

namespace neusemslice::ops {
namespace {

constexpr int64_t kGrain = 16384;  // elements below which another thread does not pay

void check_rows(const char* op, const std::vector<TunedTensor>& tensors) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t size = tensors[i].dimension;
    const int64_t* row = tensors[i].rows.const_data_ptr<int64_t>();
    for (int64_t r = 0; r < tensors[i].rows.numel(); ++r) {
      TORCH_CHECK_VALUE(row[r] >= 0 && row[r] < size, op, ": rows[", i, "] must lie in [0, ", size,
                        "), got ", row[r], " at index ", r);
      TORCH_CHECK_VALUE(r == 0 || row[r - 1] < row[r], op, ": rows[", i,
                        "] must rise without repeats, got ", row[r], " after ", row[r - 1],
                        " at index ", r);
    }
  }
}

// The rows' shares of the arithmetic, with their steps raised.
template <typename Rule>
std::vector<typename Rule::Row> begin_rows(const Rule& rule, const TunedTensor& t, double lr) {
  float* steps = t.step_counts();
  std::vector<typename Rule::Row> rows(t.rows.numel());
  for (size_t r = 0; r < rows.size(); ++r) {
    rows[r] = rule.row(lr, steps ? steps[r] : 0);
    if (steps) steps[r] += 1;
  }
  return rows;
}

// Calls body(place, element of the state) for every element.
template <typename Body>
void for_each_element(const TunedTensor& t, const Body& body) {
  if (t.elements == 0) return;
  const TunedRows& where = t.where;
  at::parallel_for(0, where.lines, std::max<int64_t>(1, kGrain / where.width),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t line = begin; line < end; ++line) {
                       const TunedRows::Place start = where.line(line);
                       for (int64_t i = 0; i < where.width; ++i) {
                         body(where.along(start, i), line * where.width + i);
                       }
                     }
                   });
}

template <typename scalar_t>
void sgd_tensor(const TunedTensor& t, const StepScalars& scalars,
                const Sgd<at::opmath_type<scalar_t>>& rule) {
  using T = at::opmath_type<scalar_t>;
  const auto rows = begin_rows(rule, t, scalars.lr());
  const T scale = scalars.scale();
  auto* param = t.param.mutable_data_ptr<scalar_t>();
  const auto* grad = t.grad.const_data_ptr<scalar_t>();
  T* buffer = t.state<T>(0);
  for_each_element(t, [&](const TunedRows::Place& at, int64_t s) {
    param[at.param] = static_cast<scalar_t>(rule.step(rows[at.row], static_cast<T>(param[at.param]),
                                                      static_cast<T>(grad[at.grad]), scale,
                                                      buffer ? buffer + s : nullptr));
  });
}

template <typename scalar_t>
void adamw_tensor(const TunedTensor& t, const StepScalars& scalars,
                  const Adamw<at::opmath_type<scalar_t>>& rule) {
  using T = at::opmath_type<scalar_t>;
  const auto rows = begin_rows(rule, t, scalars.lr());
  const T scale = scalars.scale();
  auto* param = t.param.mutable_data_ptr<scalar_t>();
  const auto* grad = t.grad.const_data_ptr<scalar_t>();
  T* exp_avg = t.state<T>(0);
  T* exp_avg_sq = t.state<T>(1);
  T* max_exp_avg_sq = t.state<T>(2);
  for_each_element(t, [&](const TunedRows::Place& at, int64_t s) {
    param[at.param] = static_cast<scalar_t>(rule.step(
        rows[at.row], static_cast<T>(param[at.param]), static_cast<T>(grad[at.grad]), scale,
        exp_avg + s, exp_avg_sq + s, max_exp_avg_sq ? max_exp_avg_sq + s : nullptr));
  });
}

void masked_sgd_cpu(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                    at::TensorList steps, at::TensorList rows, at::IntArrayRef neuron_dims,
                    const at::Tensor& lr, double momentum, double dampening, double weight_decay,
                    bool nesterov, bool maximize, const std::optional<at::Tensor>& grad_scale,
                    const std::optional<at::Tensor>& found_inf) {
  const char* op = "masked_sgd_";
  check_sgd_options(momentum, dampening, nesterov);
  const bool stateful = momentum != 0;
  const std::vector<TunedTensor> tensors =
      checked_tensors(op, params, grads, {{"momentum_buffers", momentum_buffers, stateful}}, steps,
                      stateful, rows, neuron_dims);
  const StepScalars scalars = checked_scalars(op, tensors, lr, grad_scale, found_inf);
  check_rows(op, tensors);
  if (scalars.skipped()) return;

  for (const TunedTensor& t : tensors) {
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, t.param.scalar_type(), "masked_sgd_", [&] {
          sgd_tensor<scalar_t>(t, scalars, {momentum, dampening, weight_decay, nesterov, maximize});
        });
  }
  bump_tensors(tensors);
}

void masked_adamw_cpu(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                      at::TensorList exp_avg_sqs, at::TensorList max_exp_avg_sqs,
                      at::TensorList steps, at::TensorList rows, at::IntArrayRef neuron_dims,
                      const at::Tensor& lr, double beta1, double beta2, double eps,
                      double weight_decay, bool amsgrad, bool maximize,
                      const std::optional<at::Tensor>& grad_scale,
                      const std::optional<at::Tensor>& found_inf) {
  const char* op = "masked_adamw_";
  check_adamw_options(beta1, beta2);
  const std::vector<TunedTensor> tensors =
      checked_tensors(op, params, grads,
                      {{"exp_avgs", exp_avgs, true},
                       {"exp_avg_sqs", exp_avg_sqs, true},
                       {"max_exp_avg_sqs", max_exp_avg_sqs, amsgrad}},
                      steps, true, rows, neuron_dims);
  const StepScalars scalars = checked_scalars(op, tensors, lr, grad_scale, found_inf);
  check_rows(op, tensors);
  if (scalars.skipped()) return;

  for (const TunedTensor& t : tensors) {
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, t.param.scalar_type(), "masked_adamw_",
        [&] { adamw_tensor<scalar_t>(t, scalars, {beta1, beta2, eps, weight_decay, maximize}); });
  }
  bump_tensors(tensors);
}

}  // namespace
}  // namespace neusemslice::ops

TORCH_LIBRARY_IMPL(neusemslice, CPU, m) {
  m.impl("masked_sgd_", &neusemslice::ops::masked_sgd_cpu);
  m.impl("masked_adamw_", &neusemslice::ops::masked_adamw_cpu);
}
