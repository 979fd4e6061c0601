// Schemas, dispatcher entries and argument checks of masked_sgd_ and masked_adamw_. The contract is
// in masked_optim.h.

#include "ops/masked_optim.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "ops/checks.h"

namespace neusemslice::ops {
namespace {

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

TunedRows locate(const char* op, const ListItem& name, const at::Tensor& param,
                 const at::Tensor& grad, const at::Tensor& rows, int64_t dim) {
  TunedRows where;
  where.rows = rows.const_data_ptr<int64_t>();
  where.dimension = param.size(dim);
  where.compact_grad = grad.size(dim) != where.dimension;
  bool fits = true;
  for (int64_t d = 0; d < param.dim(); ++d) {
    const int64_t p = param.stride(d);
    const int64_t g = grad.stride(d);
    fits = fits && (d == dim ? where.append_neurons(rows.numel(), p, g)
                             : where.append(param.size(d), p, g));
  }
  TORCH_CHECK_VALUE(fits, op, ": ", name, " must have strides that reduce to at most ",
                    TunedRows::kMaxAxes, " dimensions, got ", describe(param), " with strides ",
                    param.strides());
  where.finish();
  return where;
}

// Checks one item of a list that is as the parameter with the tuned rows only.
void check_compact(const at::Tensor& t, at::ScalarType dtype, at::IntArrayRef shape,
                   at::Device device, const char* op, const ListItem& name) {
  check_dtype(t, dtype, op, name);
  check_shape(t, shape, op, name);
  check_device(t, device, op, name);
  check_contiguous(t, op, name);
}

void check_param(const at::Tensor& param, at::Device device, const char* op, const ListItem& name) {
  check_floating(param, op, name);
  check_device(param, device, op, name);
  TORCH_CHECK_VALUE(param.dim() >= 1, op, ": ", name, " must have at least one dimension, got ",
                    describe(param));
  TORCH_CHECK_VALUE(at::has_internal_overlap(param) != at::MemOverlap::Yes, op, ": ", name,
                    " must not have two elements in one place, got ", describe(param),
                    " with strides ", param.strides());
}

}  // namespace

void masked_sgd_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                 at::TensorList masters, at::TensorList steps, at::TensorList rows,
                 at::IntArrayRef neuron_dims, const at::Tensor& lr, double momentum,
                 double dampening, double weight_decay, bool nesterov, bool maximize,
                 const std::optional<at::Tensor>& grad_scale,
                 const std::optional<at::Tensor>& found_inf) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("neusemslice::masked_sgd_", "")
                       .typed<decltype(masked_sgd_)>();
  op.call(params, grads, momentum_buffers, masters, steps, rows, neuron_dims, lr, momentum,
          dampening, weight_decay, nesterov, maximize, grad_scale, found_inf);
}

void masked_adamw_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                   at::TensorList exp_avg_sqs, at::TensorList max_exp_avg_sqs,
                   at::TensorList masters, at::TensorList steps, at::TensorList rows,
                   at::IntArrayRef neuron_dims, const at::Tensor& lr, double beta1, double beta2,
                   double eps, double weight_decay, bool decoupled_weight_decay, bool amsgrad,
                   bool maximize, const std::optional<at::Tensor>& grad_scale,
                   const std::optional<at::Tensor>& found_inf) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("neusemslice::masked_adamw_", "")
                       .typed<decltype(masked_adamw_)>();
  op.call(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, steps, rows, neuron_dims,
          lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay, amsgrad, maximize,
          grad_scale, found_inf);
}

OptimizerTensors checked_tensors(const OptimizerLists& lists) {
  const char* op = lists.op;
  const size_t count = lists.params.size();
  check_length(lists.grads.size(), count, op, "grads");
  for (const StateList& kind : lists.states) {
    check_length(kind.tensors.size(), kind.wanted ? count : 0, op, kind.name);
  }
  if (!lists.masters.empty()) check_length(lists.masters.size(), count, op, "masters");
  check_length(lists.steps.size(), lists.steps_wanted ? count : 0, op, "steps");
  check_length(lists.rows.size(), count, op, "rows");
  check_length(lists.neuron_dims.size(), count, op, "neuron_dims");

  OptimizerTensors tensors;
  tensors.updates.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const at::Tensor& param = lists.params[i];
    const at::Device device = lists.params[0].device();
    const ListItem param_name{"params", i};
    check_param(param, device, op, param_name);
    const int64_t given = lists.neuron_dims[i];
    const int64_t dim = given < 0 ? given + param.dim() : given;
    TORCH_CHECK_VALUE(dim >= 0 && dim < param.dim(), op, ": ", ListItem{"neuron_dims", i},
                      " must name a dimension of ", param_name, ", got ", given, " for ",
                      describe(param));

    const ListItem rows_name{"rows", i};
    check_dtype(lists.rows[i], at::kLong, op, rows_name);
    check_device(lists.rows[i], device, op, rows_name);
    TORCH_CHECK_VALUE(lists.rows[i].dim() == 1, op, ": ", rows_name, " must be int64 [R], got ",
                      describe(lists.rows[i]));
    // Copies only a strided selection of a longer list.
    const at::Tensor rows = lists.rows[i].contiguous();
    std::vector<int64_t> compact = param.sizes().vec();
    compact[dim] = rows.numel();

    const at::Tensor& grad = lists.grads[i];
    const ListItem grad_name{"grads", i};
    check_dtype(grad, param.scalar_type(), op, grad_name);
    check_device(grad, device, op, grad_name);
    TORCH_CHECK_VALUE(grad.sizes() == param.sizes() || grad.sizes() == compact, op, ": ", grad_name,
                      " must have shape ", param.sizes(), " or, of the rows alone, ",
                      at::IntArrayRef(compact), ", got ", describe(grad));

    TensorUpdate update;
    for (size_t kind = 0; kind < lists.states.size(); ++kind) {
      if (!lists.states[kind].wanted) continue;
      const at::Tensor& state = lists.states[kind].tensors[i];
      check_compact(state, state_dtype(param), compact, device, op,
                    ListItem{lists.states[kind].name, i});
      update.states[kind] = state.mutable_data_ptr();
    }
    if (!lists.masters.empty()) {
      const at::Tensor& master = lists.masters[i];
      const at::ScalarType dtype = param.scalar_type();
      TORCH_CHECK_TYPE(dtype == at::kHalf || dtype == at::kBFloat16, op, ": ", param_name,
                       " must be float16 or bfloat16 to have a master, got ", describe(param));
      check_compact(master, at::kFloat, compact, device, op, ListItem{"masters", i});
      update.master = master.mutable_data_ptr<float>();
    }
    if (lists.steps_wanted) {
      const at::Tensor& steps = lists.steps[i];
      check_compact(steps, at::kFloat, {rows.numel()}, device, op, ListItem{"steps", i});
      update.steps = steps.mutable_data_ptr<float>();
    }
    update.row_count = rows.numel();
    update.elements = 1;
    for (const int64_t size : compact) update.elements *= size;
    // Rows of no elements are counted like others.
    update.where.rows = rows.const_data_ptr<int64_t>();
    update.where.dimension = param.size(dim);
    if (update.elements > 0) {
      update.param = param.mutable_data_ptr();
      update.grad = grad.const_data_ptr();
      update.element = element_of(param);
      update.where = locate(op, param_name, param, grad, rows, dim);
    }
    tensors.updates.push_back(update);
    tensors.contiguous_rows.push_back(rows);
  }
  return tensors;
}

StepScalars checked_scalars(const OptimizerLists& lists, const at::Tensor& lr,
                            const std::optional<at::Tensor>& grad_scale,
                            const std::optional<at::Tensor>& found_inf) {
  const char* op = lists.op;
  const auto check_beside = [&](const at::Tensor& t, const char* argument) {
    if (!lists.params.empty()) check_device(t, lists.params[0].device(), op, argument);
  };
  TORCH_CHECK_TYPE(lr.scalar_type() == at::kDouble || lr.scalar_type() == at::kFloat, op,
                   ": lr must be float64 or float32, got ", describe(lr));
  check_shape(lr, {}, op, "lr");
  StepScalars scalars;
  const bool is_double = lr.scalar_type() == at::kDouble;
  if (lr.is_cpu()) {
    scalars.lr_value = is_double ? *lr.const_data_ptr<double>() : *lr.const_data_ptr<float>();
  } else {
    check_beside(lr, "lr");
    if (is_double) scalars.lr_double = lr.const_data_ptr<double>();
    if (!is_double) scalars.lr_float = lr.const_data_ptr<float>();
  }
  if (grad_scale.has_value()) {
    check_one_float(*grad_scale, op, "grad_scale");
    check_beside(*grad_scale, "grad_scale");
    scalars.grad_scale = grad_scale->const_data_ptr<float>();
  }
  if (found_inf.has_value()) {
    check_one_float(*found_inf, op, "found_inf");
    check_beside(*found_inf, "found_inf");
    scalars.found_inf = found_inf->const_data_ptr<float>();
  }
  return scalars;
}

OptimizerLists sgd_lists(at::TensorList params, at::TensorList grads,
                         at::TensorList momentum_buffers, at::TensorList masters,
                         at::TensorList steps, at::TensorList rows, at::IntArrayRef neuron_dims,
                         double momentum, double dampening, bool nesterov) {
  TORCH_CHECK_VALUE(
      !nesterov || (momentum > 0 && dampening == 0),
      "masked_sgd_: nesterov needs a momentum above 0 and no dampening, got momentum ", momentum,
      " and dampening ", dampening);
  const bool stateful = momentum != 0;
  return {"masked_sgd_", params, grads,    {{"momentum_buffers", momentum_buffers, stateful}},
          masters,       steps,  stateful, rows,
          neuron_dims};
}

OptimizerLists adamw_lists(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                           at::TensorList exp_avg_sqs, at::TensorList max_exp_avg_sqs,
                           at::TensorList masters, at::TensorList steps, at::TensorList rows,
                           at::IntArrayRef neuron_dims, double beta1, double beta2, bool amsgrad) {
  TORCH_CHECK_VALUE(beta1 >= 0 && beta1 < 1, "masked_adamw_: beta1 must lie in [0, 1), got ",
                    beta1);
  TORCH_CHECK_VALUE(beta2 >= 0 && beta2 < 1, "masked_adamw_: beta2 must lie in [0, 1), got ",
                    beta2);
  return {"masked_adamw_",
          params,
          grads,
          {{"exp_avgs", exp_avgs, true},
           {"exp_avg_sqs", exp_avg_sqs, true},
           {"max_exp_avg_sqs", max_exp_avg_sqs, amsgrad}},
          masters,
          steps,
          true,
          rows,
          neuron_dims};
}

void bump_tensors(const OptimizerLists& lists) {
  const auto bump = [](at::TensorList list) {
    for (const at::Tensor& t : list) bump_version(t);
  };
  bump(lists.params);
  bump(lists.masters);
  bump(lists.steps);
  for (const StateList& kind : lists.states) bump(kind.tensors);
}

}  // namespace neusemslice::ops

TORCH_LIBRARY_FRAGMENT(neusemslice, m) {
  m.def(
      "masked_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
      "Tensor(c!)[] masters, Tensor(d!)[] steps, Tensor[] rows, int[] neuron_dims, Tensor lr, *, "
      "float momentum=0, float dampening=0, float weight_decay=0, bool nesterov=False, bool "
      "maximize=False, "
      "Tensor? grad_scale=None, Tensor? found_inf=None) -> ()");
  m.def(
      "masked_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] masters, "
      "Tensor(f!)[] steps, Tensor[] rows, int[] neuron_dims, Tensor lr, *, float beta1=0.9, "
      "float beta2=0.999, float eps=1e-8, float weight_decay=0.01, "
      "bool decoupled_weight_decay=True, bool amsgrad=False, bool maximize=False, "
      "Tensor? grad_scale=None, Tensor? found_inf=None) -> ()");
}
