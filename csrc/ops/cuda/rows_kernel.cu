// CUDA kernels of the gradients of tuned rows (contract: ops/rows.h).
//
// All are made of ATen's operators on what the tuned rows own. Linear: one GEMM over the gathered
// columns of grad. Convolution: cuDNN's weight gradient on the gathered channels of grad, per group
// as many as the group with the most tuned rows has; unlike oneDNN's, its work follows their
// number. Nothing waits for the device but, where a convolution has groups, the rows' own values.

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <vector>

#include "ops/checks.h"
#include "ops/rows.h"
#include "ops/similarity.h"

namespace neusemslice::ops {
namespace {

at::Tensor rows_linear_backward_cuda(const at::Tensor& grad, const at::Tensor& x,
                                     const at::Tensor& rows) {
  const c10::cuda::CUDAGuard guard(grad.device());
  const PlainDispatch plain;
  const LinearRows linear = checked_linear(grad, x, rows);
  return at::mm(linear.grad.index_select(1, rows).t(), linear.x);
}

at::Tensor conv_weight_gradient(const at::Tensor& grad, const at::Tensor& x,
                                at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                at::IntArrayRef padding, at::IntArrayRef dilation) {
  std::vector<int64_t> sizes{grad.size(1), x.size(1)};
  sizes.insert(sizes.end(), kernel_size.begin(), kernel_size.end());
  const std::vector<int64_t> none(stride.size(), 0);
  // Only its shape is looked at.
  const at::Tensor weight = at::empty(sizes, grad.options());
  return std::get<1>(at::convolution_backward(grad, x, weight, at::OptionalIntArrayRef{}, stride,
                                              padding, dilation, false, none, 1,
                                              std::array<bool, 3>{false, true, false}));
}

at::Tensor rows_conv_backward_cuda(const at::Tensor& grad, const at::Tensor& x,
                                   const at::Tensor& rows, at::IntArrayRef kernel_size,
                                   at::IntArrayRef stride, at::IntArrayRef padding,
                                   at::IntArrayRef dilation, int64_t groups) {
  const c10::cuda::CUDAGuard guard(grad.device());
  const PlainDispatch plain;
  const ConvShape shape =
      checked_conv(grad, x, rows, kernel_size, stride, padding, dilation, groups);
  const std::vector<int64_t> sizes = conv_rows_sizes(shape, rows, kernel_size);
  at::Tensor out = at::zeros(sizes, grad.options());
  if (out.numel() == 0 || grad.numel() == 0) return out;
  if (groups == 1) {
    return conv_weight_gradient(grad.index_select(1, rows), x, kernel_size, stride, padding,
                                dilation)
        .contiguous();
  }
  const at::Tensor listed = rows.cpu().contiguous();
  const int64_t* row = listed.const_data_ptr<int64_t>();
  const int64_t count = rows.numel(), outputs = shape.outputs / groups;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = std::lower_bound(row, row + count, group * outputs) - row;
    const int64_t last = std::lower_bound(row, row + count, (group + 1) * outputs) - row;
    if (first == last) continue;
    const at::Tensor chosen = grad.index_select(1, rows.narrow(0, first, last - first));
    const at::Tensor read = x.narrow(1, group * shape.inputs, shape.inputs);
    out.narrow(0, first, last - first)
        .copy_(conv_weight_gradient(chosen, read, kernel_size, stride, padding, dilation));
  }
  return out;
}

at::Tensor rows_bias_backward_cuda(const at::Tensor& grad, const at::Tensor& rows,
                                   int64_t neuron_dim) {
  const c10::cuda::CUDAGuard guard(grad.device());
  const PlainDispatch plain;
  const int64_t dim = checked_bias(grad, rows, neuron_dim);
  return grad.index_select(dim, rows).movedim(dim, 0).flatten(1).sum(1);
}

}  // namespace
}  // namespace neusemslice::ops

TORCH_LIBRARY_IMPL(neusemslice, CUDA, m) {
  m.impl("rows_linear_backward", &neusemslice::ops::rows_linear_backward_cuda);
  m.impl("rows_conv_backward", &neusemslice::ops::rows_conv_backward_cuda);
  m.impl("rows_bias_backward", &neusemslice::ops::rows_bias_backward_cuda);
}
