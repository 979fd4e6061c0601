// CUDA kernels of masked_sgd_ and masked_adamw_ (contract: ops/masked_optim.h).
//
// Two launches per parameter. The first, one thread per row, finds what depends on the row's number
// of updates (a power in double, too dear to repeat for each element) and raises that number. The
// second, one thread per element of the state, updates the parameter; it reads neither steps nor
// learning rate. Scalars on the device are read by the kernels, so that a captured graph follows
// them.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <vector>

#include "common/optimizer_math.h"
#include "ops/checks.h"
#include "ops/cuda/launch.cuh"
#include "ops/cuda/masked_optim.cuh"
#include "ops/masked_optim.h"

namespace neusemslice::ops {
namespace {

constexpr int kThreads = 256;

// Room for the rows' shares of the arithmetic, as bytes; it comes from the caching allocator, so
// that it lives until the kernels on this stream have read it.
template <typename Rule>
at::Tensor begin_rows(const Rule& rule, const TunedTensor& t, const StepScalars& scalars) {
  const int64_t count = t.rows.numel();
  at::Tensor begun = at::empty({count * static_cast<int64_t>(sizeof(typename Rule::Row))},
                               t.rows.options().dtype(at::kByte));
  cuda::launch("begin_rows_kernel", &cuda::begin_rows_kernel<Rule>,
               {cuda::blocks_for(count, kThreads)}, kThreads, rule, scalars,
               t.rows.const_data_ptr<int64_t>(), count, t.dimension, t.step_counts(),
               reinterpret_cast<typename Rule::Row*>(begun.mutable_data_ptr()));
  return begun;
}

template <typename scalar_t>
void sgd_tensor(const TunedTensor& t, const StepScalars& scalars,
                const Sgd<at::opmath_type<scalar_t>>& rule) {
  using T = at::opmath_type<scalar_t>;
  const at::Tensor begun = begin_rows(rule, t, scalars);
  cuda::launch("sgd_kernel", &cuda::sgd_kernel<scalar_t, T>,
               {cuda::blocks_for(t.elements, kThreads)}, kThreads, rule, scalars, t.where,
               t.elements, static_cast<const typename Sgd<T>::Row*>(begun.const_data_ptr()),
               t.param.mutable_data_ptr<scalar_t>(), t.grad.const_data_ptr<scalar_t>(),
               t.state<T>(0));
}

template <typename scalar_t>
void adamw_tensor(const TunedTensor& t, const StepScalars& scalars,
                  const Adamw<at::opmath_type<scalar_t>>& rule) {
  using T = at::opmath_type<scalar_t>;
  const at::Tensor begun = begin_rows(rule, t, scalars);
  cuda::launch("adamw_kernel", &cuda::adamw_kernel<scalar_t, T>,
               {cuda::blocks_for(t.elements, kThreads)}, kThreads, rule, scalars, t.where,
               t.elements, static_cast<const typename Adamw<T>::Row*>(begun.const_data_ptr()),
               t.param.mutable_data_ptr<scalar_t>(), t.grad.const_data_ptr<scalar_t>(),
               t.state<T>(0), t.state<T>(1), t.state<T>(2));
}

void masked_sgd_cuda(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
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
  if (tensors.empty()) return;

  const c10::cuda::CUDAGuard guard(tensors[0].param.device());
  for (const TunedTensor& t : tensors) {
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, t.param.scalar_type(), "masked_sgd_", [&] {
          sgd_tensor<scalar_t>(t, scalars, {momentum, dampening, weight_decay, nesterov, maximize});
        });
  }
  bump_tensors(tensors);
}

void masked_adamw_cuda(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
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
  if (tensors.empty()) return;

  const c10::cuda::CUDAGuard guard(tensors[0].param.device());
  for (const TunedTensor& t : tensors) {
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, t.param.scalar_type(), "masked_adamw_",
        [&] { adamw_tensor<scalar_t>(t, scalars, {beta1, beta2, eps, weight_decay, maximize}); });
  }
  bump_tensors(tensors);
}

}  // namespace
}  // namespace neusemslice::ops

TORCH_LIBRARY_IMPL(neusemslice, CUDA, m) {
  m.impl("masked_sgd_", &neusemslice::ops::masked_sgd_cuda);
  m.impl("masked_adamw_", &neusemslice::ops::masked_adamw_cuda);
}
