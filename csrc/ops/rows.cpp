// Schemas, dispatcher entries and argument checks of the gradients of tuned rows. The contract is
// in rows.h.

#include "ops/rows.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <utility>

#include "ops/checks.h"

namespace neusemslice::ops {

at::Tensor rows_linear_backward(const at::Tensor& grad, const at::Tensor& x,
                                const at::Tensor& rows) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("neusemslice::rows_linear_backward", "")
                       .typed<decltype(rows_linear_backward)>();
  return op.call(grad, x, rows);
}

at::Tensor rows_conv_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& rows,
                              at::IntArrayRef kernel_size, at::IntArrayRef stride,
                              at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("neusemslice::rows_conv_backward", "")
                       .typed<decltype(rows_conv_backward)>();
  return op.call(grad, x, rows, kernel_size, stride, padding, dilation, groups);
}

at::Tensor rows_bias_backward(const at::Tensor& grad, const at::Tensor& rows, int64_t neuron_dim) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("neusemslice::rows_bias_backward", "")
                       .typed<decltype(rows_bias_backward)>();
  return op.call(grad, rows, neuron_dim);
}

std::tuple<at::Tensor, at::Tensor> rows_norm_backward(const at::Tensor& grad, const at::Tensor& x,
                                                      const at::Tensor& mean, const at::Tensor& var,
                                                      double eps, const at::Tensor& rows,
                                                      const at::Tensor& bias_rows) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("neusemslice::rows_norm_backward", "")
                       .typed<decltype(rows_norm_backward)>();
  return op.call(grad, x, mean, var, eps, rows, bias_rows);
}

namespace {

void check_list(const char* op, const at::Tensor& grad, const at::Tensor& rows,
                const char* name = "rows") {
  check_dtype(rows, at::kLong, op, name);
  check_device(rows, grad.device(), op, name);
  TORCH_CHECK_VALUE(rows.dim() == 1, op, ": ", name, " must be int64 [R], got ", describe(rows));
}

void check_common(const char* op, const at::Tensor& grad, const at::Tensor& rows) {
  check_floating(grad, op, "grad");
  check_list(op, grad, rows);
}

void check_input(const char* op, const at::Tensor& grad, const at::Tensor& x) {
  check_dtype(x, grad.scalar_type(), op, "x");
  check_device(x, grad.device(), op, "x");
}

// On the CPU, where looking costs nothing.
void check_rows(const char* op, const at::Tensor& rows, int64_t size, const char* name = "rows") {
  if (!rows.is_cpu()) return;
  int64_t last = -1;
  for (int64_t r = 0; r < rows.numel(); ++r) {
    const int64_t row = rows.const_data_ptr<int64_t>()[r * rows.stride(0)];
    TORCH_CHECK_VALUE(row >= 0 && row < size, op, ": ", name, " must lie in [0, ", size, "), got ",
                      row, " at index ", r);
    TORCH_CHECK_VALUE(last < row, op, ": ", name, " must rise without repeats, got ", row,
                      " after ", last, " at index ", r);
    last = row;
  }
}

// One entry per spatial dimension, each at least `least`.
ConvShape::Sizes spatial_sizes(const char* op, const char* name, at::IntArrayRef given,
                               int64_t dimensions, int64_t least, int64_t neutral) {
  TORCH_CHECK_VALUE(static_cast<int64_t>(given.size()) == dimensions, op, ": ", name, " must have ",
                    dimensions, " entries, one per spatial dimension, got ", given);
  ConvShape::Sizes sizes{neutral, neutral, neutral};
  for (int64_t d = 0; d < dimensions; ++d) {
    TORCH_CHECK_VALUE(given[d] >= least, op, ": ", name, " must be at least ", least, ", got ",
                      given);
    sizes[3 - dimensions + d] = given[d];
  }
  return sizes;
}

}  // namespace

LinearRows checked_linear(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& rows) {
  const char* op = "rows_linear_backward";
  check_common(op, grad, rows);
  check_input(op, grad, x);
  TORCH_CHECK_VALUE(grad.dim() >= 1, op, ": grad must be [..., O], got ", describe(grad));
  TORCH_CHECK_VALUE(x.dim() == grad.dim() &&
                        x.sizes().slice(0, x.dim() - 1) == grad.sizes().slice(0, x.dim() - 1),
                    op, ": x must be [..., I] for grad ", grad.sizes(), ", got ", describe(x));
  check_rows(op, rows, grad.size(-1));
  int64_t positions = 1;
  for (const int64_t size : grad.sizes().slice(0, grad.dim() - 1)) positions *= size;
  return {grad.reshape({positions, grad.size(-1)}), x.reshape({positions, x.size(-1)})};
}

ConvShape checked_conv(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& rows,
                       at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                       at::IntArrayRef dilation, int64_t groups) {
  const char* op = "rows_conv_backward";
  check_common(op, grad, rows);
  check_input(op, grad, x);
  const int64_t dimensions = x.dim() - 2;
  TORCH_CHECK_VALUE(dimensions >= 1 && dimensions <= 3, op,
                    ": x must be [N, I, ...] with one to three spatial dimensions, got ",
                    describe(x));
  TORCH_CHECK_VALUE(grad.dim() == x.dim() && grad.size(0) == x.size(0), op,
                    ": grad must be [N, O, ...] as x is ", describe(x), ", got ", describe(grad));
  TORCH_CHECK_VALUE(groups >= 1 && x.size(1) % groups == 0 && grad.size(1) % groups == 0, op,
                    ": groups must divide the channels of x and grad, ", x.size(1), " and ",
                    grad.size(1), ", got ", groups);
  ConvShape shape{};
  shape.samples = x.size(0);
  shape.inputs = x.size(1) / groups;
  shape.outputs = grad.size(1);
  shape.groups = groups;
  shape.input = shape.output = {1, 1, 1};
  shape.kernel = spatial_sizes(op, "kernel_size", kernel_size, dimensions, 1, 1);
  shape.stride = spatial_sizes(op, "stride", stride, dimensions, 1, 1);
  shape.padding = spatial_sizes(op, "padding", padding, dimensions, 0, 0);
  shape.dilation = spatial_sizes(op, "dilation", dilation, dimensions, 1, 1);
  for (int64_t d = 0; d < dimensions; ++d) {
    const int64_t s = 3 - dimensions + d;
    shape.input[s] = x.size(2 + d);
    shape.output[s] = grad.size(2 + d);
    const int64_t room =
        shape.input[s] + 2 * shape.padding[s] - shape.dilation[s] * (shape.kernel[s] - 1) - 1;
    const int64_t expected = room < 0 ? 0 : room / shape.stride[s] + 1;
    TORCH_CHECK_VALUE(grad.size(2 + d) == expected, op, ": grad must have ", expected,
                      " places in dimension ", 2 + d, " for x ", x.sizes(), ", got ",
                      describe(grad));
  }
  check_rows(op, rows, grad.size(1));
  return shape;
}

std::vector<int64_t> conv_rows_sizes(const ConvShape& shape, const at::Tensor& rows,
                                     at::IntArrayRef kernel_size) {
  std::vector<int64_t> sizes{rows.numel(), shape.inputs};
  sizes.insert(sizes.end(), kernel_size.begin(), kernel_size.end());
  return sizes;
}

int64_t checked_bias(const at::Tensor& grad, const at::Tensor& rows, int64_t neuron_dim) {
  const char* op = "rows_bias_backward";
  check_common(op, grad, rows);
  TORCH_CHECK_VALUE(neuron_dim >= -grad.dim() && neuron_dim < grad.dim(), op,
                    ": neuron_dim must name a dimension of grad ", grad.sizes(), ", got ",
                    neuron_dim);
  const int64_t dim = neuron_dim < 0 ? neuron_dim + grad.dim() : neuron_dim;
  check_rows(op, rows, grad.size(dim));
  return dim;
}

NormRows checked_norm(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean,
                      const at::Tensor& var, const at::Tensor& rows, const at::Tensor& bias_rows) {
  const char* op = "rows_norm_backward";
  check_common(op, grad, rows);
  check_list(op, grad, bias_rows, "bias_rows");
  check_input(op, grad, x);
  TORCH_CHECK_VALUE(grad.dim() >= 2, op, ": grad must be [N, C, ...], got ", describe(grad));
  check_shape(x, grad.sizes(), op, "x");
  check_floating(mean, op, "mean");
  check_dtype(var, mean.scalar_type(), op, "var");
  for (const auto& [name, t] : {std::pair("mean", mean), std::pair("var", var)}) {
    check_device(t, grad.device(), op, name);
    check_shape(t, {grad.size(1)}, op, name);
  }
  check_rows(op, rows, grad.size(1));
  check_rows(op, bias_rows, grad.size(1), "bias_rows");
  const at::ScalarType value = grad.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::MemoryFormat format = x.suggest_memory_format();
  const at::Tensor center = mean.to(value);
  return {grad.contiguous(format), x.contiguous(format), center, var.to(value),
          at::ones_like(center)};
}

std::tuple<at::Tensor, at::Tensor> norm_of_nothing(const at::Tensor& mean, const at::Tensor& rows,
                                                   const at::Tensor& bias_rows) {
  return {at::zeros({rows.numel()}, mean.options()),
          at::zeros({bias_rows.numel()}, mean.options())};
}

}  // namespace neusemslice::ops

TORCH_LIBRARY_FRAGMENT(neusemslice, m) {
  m.def("rows_linear_backward(Tensor grad, Tensor x, Tensor rows) -> Tensor");
  m.def(
      "rows_conv_backward(Tensor grad, Tensor x, Tensor rows, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation, int groups) -> Tensor");
  m.def("rows_bias_backward(Tensor grad, Tensor rows, int neuron_dim) -> Tensor");
  m.def(
      "rows_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor var, float eps, Tensor rows, "
      "Tensor bias_rows) -> (Tensor, Tensor)");
}
