// CUDA implementation of the gradients of tuned rows (contract: ops/rows.h), by ATen's operators on
// what the tuned rows own. They guard their tensors' device themselves, and run on the CPU's as
// well, where tests find this right without a GPU. Nothing waits for the device.
//
// Linear: one GEMM over the gathered columns of grad. Convolution: cuDNN's weight gradient on the
// gathered channels of grad; unlike oneDNN's, its work follows their number. Which group a row is
// of the host does not know, so with groups it takes, by the number of rows R, of outputs O and of
// groups G alone, the least of
//   few rows, R * G <= O      each row against all channels of x, of which it keeps its group's
//   R <= G, R < O             each row a group of its own, its group's channels of x gathered
//   more                      the whole weight's gradient, of which the rows are kept
// Norm: ATen's gradient of all channels.

#include <ATen/core/Tensor.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/floor_divide.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/native_batch_norm_backward.h>
#include <ATen/ops/zeros.h>
#include <c10/util/accumulate.h>
#include <torch/library.h>

#include <array>
#include <vector>

#include "ops/checks.h"
#include "ops/rows.h"
#include "ops/similarity.h"

namespace neusemslice::ops {
namespace {

at::Tensor rows_linear_backward_cuda(const at::Tensor& grad, const at::Tensor& x,
                                     const at::Tensor& rows) {
  const PlainDispatch plain;
  const LinearRows linear = checked_linear(grad, x, rows);
  return at::mm(linear.grad.index_select(1, rows).t(), linear.x);
}

// The places of a convolution's weight in its input.
struct Places {
  at::IntArrayRef kernel_size;
  at::IntArrayRef stride;
  at::IntArrayRef padding;
  at::IntArrayRef dilation;
};

at::Tensor conv_weight_gradient(const at::Tensor& grad, const at::Tensor& x, const Places& places,
                                int64_t groups) {
  std::vector<int64_t> sizes{grad.size(1), x.size(1) / groups};
  sizes.insert(sizes.end(), places.kernel_size.begin(), places.kernel_size.end());
  const std::vector<int64_t> none(places.stride.size(), 0);
  // Only its shape is looked at.
  const at::Tensor weight = at::empty(sizes, grad.options());
  return std::get<1>(at::convolution_backward(
      grad, x, weight, at::OptionalIntArrayRef{}, places.stride, places.padding, places.dilation,
      false, none, groups, std::array<bool, 3>{false, true, false}));
}

at::Tensor of_all_inputs(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& rows,
                         const Places& places, const ConvShape& shape) {
  const at::Tensor all = conv_weight_gradient(grad.index_select(1, rows), x, places, 1);
  if (shape.groups == 1) return all;
  const at::Tensor by_group = all.unflatten(1, {shape.groups, shape.inputs});
  std::vector<int64_t> one(by_group.dim(), 1), sizes = by_group.sizes().vec();
  one[0] = rows.numel();
  sizes[1] = 1;
  const at::Tensor group = rows.floor_divide(shape.outputs / shape.groups);
  return by_group.gather(1, group.view(one).expand(sizes)).squeeze(1);
}

at::Tensor of_own_inputs(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& rows,
                         const Places& places, const ConvShape& shape) {
  const at::Tensor group = rows.floor_divide(shape.outputs / shape.groups);
  const at::Tensor read =
      x.unflatten(1, {shape.groups, shape.inputs}).index_select(1, group).flatten(1, 2);
  return conv_weight_gradient(grad.index_select(1, rows), read, places, rows.numel());
}

at::Tensor rows_conv_backward_cuda(const at::Tensor& grad, const at::Tensor& x,
                                   const at::Tensor& rows, at::IntArrayRef kernel_size,
                                   at::IntArrayRef stride, at::IntArrayRef padding,
                                   at::IntArrayRef dilation, int64_t groups) {
  const PlainDispatch plain;
  const ConvShape shape =
      checked_conv(grad, x, rows, kernel_size, stride, padding, dilation, groups);
  const std::vector<int64_t> sizes = conv_rows_sizes(shape, rows, kernel_size);
  if (c10::multiply_integers(sizes) == 0 || grad.numel() == 0) {
    return at::zeros(sizes, grad.options());
  }
  const Places places{kernel_size, stride, padding, dilation};
  if (rows.numel() * groups <= shape.outputs) {
    return of_all_inputs(grad, x, rows, places, shape).contiguous();
  }
  if (rows.numel() <= groups && rows.numel() < shape.outputs) {
    return of_own_inputs(grad, x, rows, places, shape).contiguous();
  }
  return conv_weight_gradient(grad, x, places, groups).index_select(0, rows);
}

at::Tensor rows_bias_backward_cuda(const at::Tensor& grad, const at::Tensor& rows,
                                   int64_t neuron_dim) {
  const PlainDispatch plain;
  const int64_t dim = checked_bias(grad, rows, neuron_dim);
  return grad.index_select(dim, rows).movedim(dim, 0).flatten(1).sum(1);
}

std::tuple<at::Tensor, at::Tensor> rows_norm_backward_cuda(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean, const at::Tensor& var,
    double eps, const at::Tensor& rows, const at::Tensor& bias_rows) {
  const PlainDispatch plain;
  const NormRows norm = checked_norm(grad, x, mean, var, rows, bias_rows);
  if (x.numel() == 0) return norm_of_nothing(mean, rows, bias_rows);
  const auto [of_input, of_weight, of_bias] = at::native_batch_norm_backward(
      norm.grad, norm.x, norm.weight, norm.mean, norm.var, {}, {}, false, eps, {false, true, true});
  return {of_weight.index_select(0, rows).to(mean.scalar_type()),
          of_bias.index_select(0, bias_rows).to(mean.scalar_type())};
}

}  // namespace
}  // namespace neusemslice::ops

TORCH_LIBRARY_IMPL(neusemslice, CUDA, m) {
  m.impl("rows_linear_backward", &neusemslice::ops::rows_linear_backward_cuda);
  m.impl("rows_conv_backward", &neusemslice::ops::rows_conv_backward_cuda);
  m.impl("rows_bias_backward", &neusemslice::ops::rows_bias_backward_cuda);
  m.impl("rows_norm_backward", &neusemslice::ops::rows_norm_backward_cuda);
}
