// CUDA host side of masked_sgd_ and masked_adamw_ (contract: ops/masked_optim.h).
//
// The kernels are in masked_optim.cuh. Scalars on the device are read by them, so that a captured
// graph follows learning rate, gradient scale and found_inf. What the graph does not follow are the
// addresses of parameters, gradients, state and rows: as with torch's own optimizers these tensors
// must stay where they are, and after set_rows() the graph must be captured again.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <vector>

#include "ops/checks.h"
#include "ops/cuda/masked_optim.cuh"
#include "ops/masked_optim.h"

namespace neusemslice::ops {
namespace {

// Memory of the caching allocator lives until the kernels on this stream have read it; during a
// capture it comes from the graph's own pool.
class Rooms {
 public:
  explicit Rooms(at::TensorOptions options) : options_(options.dtype(at::kByte)) {}

  void* operator()(int64_t bytes) const {
    rooms_.push_back(at::empty({bytes}, options_));
    return rooms_.back().mutable_data_ptr();
  }

 private:
  at::TensorOptions options_;
  mutable std::vector<at::Tensor> rooms_;
};

void masked_sgd_cuda(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                     at::TensorList masters, at::TensorList steps, at::TensorList rows,
                     at::IntArrayRef neuron_dims, const at::Tensor& lr, double momentum,
                     double dampening, double weight_decay, bool nesterov, bool maximize,
                     const std::optional<at::Tensor>& grad_scale,
                     const std::optional<at::Tensor>& found_inf) {
  const OptimizerLists lists = sgd_lists(params, grads, momentum_buffers, masters, steps, rows,
                                         neuron_dims, momentum, dampening, nesterov);
  OptimizerTensors tensors = checked_tensors(lists);
  const StepScalars scalars = checked_scalars(lists, lr, grad_scale, found_inf);
  if (params.empty()) return;
  const c10::cuda::CUDAGuard guard(params[0].device());
  const Sgd<float> narrow(momentum, dampening, weight_decay, nesterov, maximize);
  const Sgd<double> wide(momentum, dampening, weight_decay, nesterov, maximize);
  const Rooms rooms(params[0].options());
  if (momentum != 0) {
    cuda::launch_step<1>(narrow, wide, scalars, tensors.updates, rooms);
  } else {
    cuda::launch_step<0>(narrow, wide, scalars, tensors.updates, rooms);
  }
  bump_tensors(lists);
}

void masked_adamw_cuda(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                       at::TensorList exp_avg_sqs, at::TensorList max_exp_avg_sqs,
                       at::TensorList masters, at::TensorList steps, at::TensorList rows,
                       at::IntArrayRef neuron_dims, const at::Tensor& lr, double beta1,
                       double beta2, double eps, double weight_decay, bool decoupled_weight_decay,
                       bool amsgrad, bool maximize, const std::optional<at::Tensor>& grad_scale,
                       const std::optional<at::Tensor>& found_inf) {
  const OptimizerLists lists =
      adamw_lists(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, steps, rows,
                  neuron_dims, beta1, beta2, amsgrad);
  OptimizerTensors tensors = checked_tensors(lists);
  const StepScalars scalars = checked_scalars(lists, lr, grad_scale, found_inf);
  if (params.empty()) return;
  const c10::cuda::CUDAGuard guard(params[0].device());
  const Adamw<float> narrow(beta1, beta2, eps, weight_decay, decoupled_weight_decay, amsgrad,
                            maximize);
  const Adamw<double> wide(beta1, beta2, eps, weight_decay, decoupled_weight_decay, amsgrad,
                           maximize);
  const Rooms rooms(params[0].options());
  if (amsgrad) {
    cuda::launch_step<3>(narrow, wide, scalars, tensors.updates, rooms);
  } else {
    cuda::launch_step<2>(narrow, wide, scalars, tensors.updates, rooms);
  }
  bump_tensors(lists);
}

}  // namespace
}  // namespace neusemslice::ops

TORCH_LIBRARY_IMPL(neusemslice, CUDA, m) {
  m.impl("masked_sgd_", &neusemslice::ops::masked_sgd_cuda);
  m.impl("masked_adamw_", &neusemslice::ops::masked_adamw_cuda);
}
