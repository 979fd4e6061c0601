// Schemas, dispatcher entries and argument checks of masked_sgd_ and masked_adamw_. The contract is
// in masked_optim.h.

#include "ops/masked_optim.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "ops/checks.h"

namespace neusemslice::ops {
namespace {

std::string item(const char* list, size_t index) {
  return std::string(list) + "[" + std::to_string(index) + "]";
}

void check_length(size_t length, size_t expected, const char* op, const char* list) {
  TORCH_CHECK_VALUE(length == expected, op, ": ", list, " must hold ", expected,
                    " items, one for each parameter that needs one, got ", length);
}

at::ScalarType state_dtype(const at::Tensor& param) {
  return param.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_one_float(const at::Tensor& t, const char* op, const char* argument) {
  check_dtype(t, at::kFloat, op, argument);
  TORCH_CHECK_VALUE(t.numel() == 1, op, ": ", argument, " must have one element, got ",
                    describe(t));
}

TunedRows locate(const char* op, const std::string& name, const TunedTensor& t, int64_t dim) {
  TunedRows where;
  where.rows = t.rows.const_data_ptr<int64_t>();
  where.dimension = t.dimension;
  where.compact_grad = t.grad.size(dim) != where.dimension;
  bool fits = true;
  for (int64_t d = 0; d < t.param.dim(); ++d) {
    const int64_t p = t.param.stride(d);
    const int64_t g = t.grad.stride(d);
    fits = fits && (d == dim ? where.append_neurons(t.rows.numel(), p, g)
                             : where.append(t.param.size(d), p, g));
  }
  TORCH_CHECK_VALUE(fits, op, ": ", name, " must have strides that reduce to at most ",
                    TunedRows::kMaxAxes, " dimensions, got ", describe(t.param), " with strides ",
                    t.param.strides());
  where.finish();
  return where;
}

}  // namespace

void masked_sgd_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                 at::TensorList steps, at::TensorList rows, at::IntArrayRef neuron_dims,
                 const at::Tensor& lr, double momentum, double dampening, double weight_decay,
                 bool nesterov, bool maximize, const std::optional<at::Tensor>& grad_scale,
                 const std::optional<at::Tensor>& found_inf) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("neusemslice::masked_sgd_", "")
                       .typed<decltype(masked_sgd_)>();
  op.call(params, grads, momentum_buffers, steps, rows, neuron_dims, lr, momentum, dampening,
          weight_decay, nesterov, maximize, grad_scale, found_inf);
}

void masked_adamw_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                   at::TensorList exp_avg_sqs, at::TensorList max_exp_avg_sqs, at::TensorList steps,
                   at::TensorList rows, at::IntArrayRef neuron_dims, const at::Tensor& lr,
                   double beta1, double beta2, double eps, double weight_decay, bool amsgrad,
                   bool maximize, const std::optional<at::Tensor>& grad_scale,
                   const std::optional<at::Tensor>& found_inf) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("neusemslice::masked_adamw_", "")
                       .typed<decltype(masked_adamw_)>();
  op.call(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, rows, neuron_dims, lr,
          beta1, beta2, eps, weight_decay, amsgrad, maximize, grad_scale, found_inf);
}

std::vector<TunedTensor> checked_tensors(const char* op, at::TensorList params,
                                         at::TensorList grads, const std::vector<StateList>& states,
                                         at::TensorList steps, bool steps_wanted,
                                         at::TensorList rows, at::IntArrayRef neuron_dims) {
  check_length(grads.size(), params.size(), op, "grads");
  for (const StateList& kind : states) {
    check_length(kind.tensors.size(), kind.wanted ? params.size() : 0, op, kind.name);
  }
  check_length(steps.size(), steps_wanted ? params.size() : 0, op, "steps");
  check_length(rows.size(), params.size(), op, "rows");
  check_length(neuron_dims.size(), params.size(), op, "neuron_dims");

  std::vector<TunedTensor> tensors(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    TunedTensor& t = tensors[i];
    t.param = params[i];
    const std::string param_name = item("params", i);
    check_floating(t.param, op, param_name.c_str());
    const at::Device device = params[0].device();
    check_device(t.param, device, op, param_name.c_str());
    TORCH_CHECK_VALUE(t.param.dim() >= 1, op, ": ", param_name,
                      " must have at least one dimension, got ", describe(t.param));
    TORCH_CHECK_VALUE(at::has_internal_overlap(t.param) != at::MemOverlap::Yes, op, ": ",
                      param_name, " must not have two elements in one place, got ",
                      describe(t.param), " with strides ", t.param.strides());
    const int64_t dim = neuron_dims[i] < 0 ? neuron_dims[i] + t.param.dim() : neuron_dims[i];
    TORCH_CHECK_VALUE(dim >= 0 && dim < t.param.dim(), op, ": ", item("neuron_dims", i),
                      " must name a dimension of ", param_name, ", got ", neuron_dims[i], " for ",
                      describe(t.param));
    t.dimension = t.param.size(dim);

    const std::string rows_name = item("rows", i);
    check_dtype(rows[i], at::kLong, op, rows_name.c_str());
    check_device(rows[i], device, op, rows_name.c_str());
    TORCH_CHECK_VALUE(rows[i].dim() == 1, op, ": ", rows_name, " must be int64 [R], got ",
                      describe(rows[i]));
    t.rows = rows[i].contiguous();  // copies only a strided selection of a longer list
    std::vector<int64_t> compact = t.param.sizes().vec();
    compact[dim] = t.rows.numel();

    const std::string grad_name = item("grads", i);
    t.grad = grads[i];
    check_dtype(t.grad, t.param.scalar_type(), op, grad_name.c_str());
    check_device(t.grad, device, op, grad_name.c_str());
    TORCH_CHECK_VALUE(t.grad.sizes() == t.param.sizes() || t.grad.sizes() == compact, op, ": ",
                      grad_name, " must have shape ", t.param.sizes(), " or, of the rows alone, ",
                      at::IntArrayRef(compact), ", got ", describe(t.grad));

    for (size_t kind = 0; kind < states.size(); ++kind) {
      if (!states[kind].wanted) continue;
      const std::string name = item(states[kind].name, i);
      t.states[kind] = states[kind].tensors[i];
      check_dtype(t.states[kind], state_dtype(t.param), op, name.c_str());
      check_shape(t.states[kind], compact, op, name.c_str());
      check_device(t.states[kind], device, op, name.c_str());
      check_contiguous(t.states[kind], op, name.c_str());
    }
    if (steps_wanted) {
      const std::string name = item("steps", i);
      t.steps = steps[i];
      check_dtype(t.steps, at::kFloat, op, name.c_str());
      check_shape(t.steps, {t.rows.numel()}, op, name.c_str());
      check_device(t.steps, device, op, name.c_str());
      check_contiguous(t.steps, op, name.c_str());
    }
    t.elements = 1;
    for (const int64_t size : compact) t.elements *= size;
    if (t.elements > 0) t.where = locate(op, param_name, t, dim);
  }
  return tensors;
}

StepScalars checked_scalars(const char* op, const std::vector<TunedTensor>& tensors,
                            const at::Tensor& lr, const std::optional<at::Tensor>& grad_scale,
                            const std::optional<at::Tensor>& found_inf) {
  TORCH_CHECK_TYPE(lr.scalar_type() == at::kDouble || lr.scalar_type() == at::kFloat, op,
                   ": lr must be float64 or float32, got ", describe(lr));
  check_shape(lr, {}, op, "lr");
  StepScalars scalars;
  const bool is_double = lr.scalar_type() == at::kDouble;
  if (lr.is_cpu()) {
    scalars.lr_value = is_double ? *lr.const_data_ptr<double>() : *lr.const_data_ptr<float>();
  } else {
    if (!tensors.empty()) check_device(lr, tensors[0].param.device(), op, "lr");
    if (is_double) scalars.lr_double = lr.const_data_ptr<double>();
    if (!is_double) scalars.lr_float = lr.const_data_ptr<float>();
  }
  if (grad_scale.has_value()) {
    check_one_float(*grad_scale, op, "grad_scale");
    if (!tensors.empty()) check_device(*grad_scale, tensors[0].param.device(), op, "grad_scale");
    scalars.grad_scale = grad_scale->const_data_ptr<float>();
  }
  if (found_inf.has_value()) {
    check_one_float(*found_inf, op, "found_inf");
    if (!tensors.empty()) check_device(*found_inf, tensors[0].param.device(), op, "found_inf");
    scalars.found_inf = found_inf->const_data_ptr<float>();
  }
  return scalars;
}

void check_sgd_options(double momentum, double dampening, bool nesterov) {
  TORCH_CHECK_VALUE(
      !nesterov || (momentum > 0 && dampening == 0),
      "masked_sgd_: nesterov needs a momentum above 0 and no dampening, got momentum ", momentum,
      " and dampening ", dampening);
}

void check_adamw_options(double beta1, double beta2) {
  TORCH_CHECK_VALUE(beta1 >= 0 && beta1 < 1, "masked_adamw_: beta1 must lie in [0, 1), got ",
                    beta1);
  TORCH_CHECK_VALUE(beta2 >= 0 && beta2 < 1, "masked_adamw_: beta2 must lie in [0, 1), got ",
                    beta2);
}

void bump_tensors(const std::vector<TunedTensor>& tensors) {
  for (const TunedTensor& t : tensors) {
    bump_version(t.param);
    if (t.steps.defined()) bump_version(t.steps);
    for (const at::Tensor& state : t.states) {
      if (state.defined()) bump_version(state);
    }
  }
}

}  // namespace neusemslice::ops

TORCH_LIBRARY_FRAGMENT(neusemslice, m) {
  m.def(
      "masked_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
      "Tensor(c!)[] steps, Tensor[] rows, int[] neuron_dims, Tensor lr, *, float momentum=0, "
      "float dampening=0, float weight_decay=0, bool nesterov=False, bool maximize=False, "
      "Tensor? grad_scale=None, Tensor? found_inf=None) -> ()");
  m.def(
      "masked_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, "
      "Tensor[] rows, int[] neuron_dims, Tensor lr, *, float beta1=0.9, float beta2=0.999, "
      "float eps=1e-8, float weight_decay=0.01, bool amsgrad=False, bool maximize=False, "
      "Tensor? grad_scale=None, Tensor? found_inf=None) -> ()");
}
