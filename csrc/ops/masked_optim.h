#pragma once

// Optimizer steps over tuned rows only, one call over many parameters.
//
// Parameter i is tuned at the indices rows[i] of its dimension neuron_dims[i]: int64 [R], rising,
// each in [0, D). Nothing else of the parameter is read or written, so all of it keeps its bits
// whatever the decay, momentum or schedule. On the CPU the rows are checked; on CUDA, where the
// host cannot look without waiting, a row outside [0, D) is skipped and a repeated row is updated
// in an undefined way.
//
// masked_sgd_: torch.optim.SGD's step. momentum_buffers and steps are empty where momentum is 0.
// masked_adamw_: torch.optim.AdamW's step, and Adam's where the decay is not decoupled.
// max_exp_avg_sqs is empty without amsgrad.
//
// Per parameter:
//   params    float64, float32, float16 or bfloat16, at least one dimension, any strides but no two
//             elements in one place
//   grads     dtype of the parameter, any strides; the shape of the parameter (full), or that with
//             D replaced by R (compact); not changed, not even by grad_scale
//   the state float64 for float64 parameters and float32 for all others, which is also what the
//             arithmetic is in; contiguous, the shape of the parameter with D replaced by R
//   masters   empty, or where all parameters are float16 or bfloat16, as their state: the tuned
//   rows
//             in float32. The step is then taken from the master's value, which keeps what the
//             parameter, its rounding, cannot hold.
//   steps     float32 [R], contiguous: how many updates each row has had. Bias correction and the
//             first momentum go by it, so a row that joins later starts as a fresh one.
// For all of them:
//   lr          float64 or float32 [], on the CPU (read by the host at once) or on the parameters'
//               device (read by the kernel, so that a captured graph follows it)
//   grad_scale  float32, one element: the gradients arrive multiplied by it
//   found_inf   float32, one element: unless it is 0, nothing changes, the steps included
//
// Each element belongs to one thread, so the bits depend neither on the number of threads nor on
// the schedule. There is no wait for the device.

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "common/step_scalars.h"
#include "common/tensor_update.h"

namespace neusemslice::ops {

void masked_sgd_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                 at::TensorList masters, at::TensorList steps, at::TensorList rows,
                 at::IntArrayRef neuron_dims, const at::Tensor& lr, double momentum,
                 double dampening, double weight_decay, bool nesterov, bool maximize,
                 const std::optional<at::Tensor>& grad_scale,
                 const std::optional<at::Tensor>& found_inf);

void masked_adamw_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                   at::TensorList exp_avg_sqs, at::TensorList max_exp_avg_sqs,
                   at::TensorList masters, at::TensorList steps, at::TensorList rows,
                   at::IntArrayRef neuron_dims, const at::Tensor& lr, double beta1, double beta2,
                   double eps, double weight_decay, bool decoupled_weight_decay, bool amsgrad,
                   bool maximize, const std::optional<at::Tensor>& grad_scale,
                   const std::optional<at::Tensor>& found_inf);

// What the CPU and the CUDA kernels share: checked arguments, reduced to raw pointers and strides.

// One kind of state of all parameters; empty where the options ask for none.
struct StateList {
  const char* name;
  at::TensorList tensors;
  bool wanted;
};

struct OptimizerLists {
  const char* op;
  at::TensorList params;
  at::TensorList grads;
  std::vector<StateList> states;  // at most TensorUpdate::kMaxStates
  at::TensorList masters;
  at::TensorList steps;
  bool steps_wanted;
  at::TensorList rows;
  at::IntArrayRef neuron_dims;
};

// The parameters that have tuned elements, as the kernels see them, and what keeps them alive.
struct OptimizerTensors {
  std::vector<TensorUpdate> updates;
  std::vector<at::Tensor> contiguous_rows;
};

OptimizerTensors checked_tensors(const OptimizerLists& lists);

StepScalars checked_scalars(const OptimizerLists& lists, const at::Tensor& lr,
                            const std::optional<at::Tensor>& grad_scale,
                            const std::optional<at::Tensor>& found_inf);

// The lists of each operator, with its options checked.
OptimizerLists sgd_lists(at::TensorList params, at::TensorList grads,
                         at::TensorList momentum_buffers, at::TensorList masters,
                         at::TensorList steps, at::TensorList rows, at::IntArrayRef neuron_dims,
                         double momentum, double dampening, bool nesterov);
OptimizerLists adamw_lists(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                           at::TensorList exp_avg_sqs, at::TensorList max_exp_avg_sqs,
                           at::TensorList masters, at::TensorList steps, at::TensorList rows,
                           at::IntArrayRef neuron_dims, double beta1, double beta2, bool amsgrad);

// Marks the parameters and their state as changed.
void bump_tensors(const OptimizerLists& lists);

}  // namespace neusemslice::ops
