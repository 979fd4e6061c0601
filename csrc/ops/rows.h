#pragma once

// Weight gradients of tuned rows only. A row is what one output neuron owns of a weight.
//
// rows: int64 [R], rising, each in [0, O) with O the number of output neurons. On the CPU they are
//   checked; on CUDA, where the host cannot look without waiting, they are taken as they are, and a
//   row out of range is an assertion on the device. What belongs to other rows is not read.
// grad: the gradient of the layer's output, float64, float32, float16 or bfloat16, any strides.
// x: the layer's input, of grad's dtype, any strides.
//
// rows_linear_backward: grad [..., O], x [..., I] -> [R, I], the sum over all positions of
//   grad[..., rows[r]] * x[..., i].
// rows_conv_backward: grad [N, O, spatial of the output], x [N, I, spatial of the input], one to
//   three spatial dimensions -> [R, I / groups, kernel_size]. stride, padding and dilation have one
//   entry per spatial dimension; padding is by zeros.
// rows_bias_backward: grad, the neurons in its dimension neuron_dim -> [R], the sum of all else.
// rows_norm_backward: of a batch norm with given statistics. grad and x [N, C, ...], mean and var
//   [C] of one floating dtype; rows are of its weight, bias_rows of its bias -> [R] and [R'], the
//   sums over all but C of grad times the normalised x, and of grad. All channels are read.
//
// Results are contiguous, of grad's dtype, those of rows_norm_backward of mean's; sums are in
// float64 for float64 and in float32 for all others, rounded once at the end. On the CPU they are
// taken in an order that depends on shapes and memory formats alone, so the bits are the same each
// time, at any number of threads; those of rows_conv_backward and rows_bias_backward also with any
// instruction set. On CUDA they are as deterministic as the ATen operators that they are made of,
// and factors of float32 are rounded to TF32 where torch allows that. A value of x that is not
// finite may spoil all taps of its channel. All are differentiable in grad and x by formulas that
// stand beside their Python wrappers.

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>
#include <vector>

namespace neusemslice::ops {

at::Tensor rows_linear_backward(const at::Tensor& grad, const at::Tensor& x,
                                const at::Tensor& rows);

at::Tensor rows_conv_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& rows,
                              at::IntArrayRef kernel_size, at::IntArrayRef stride,
                              at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups);

at::Tensor rows_bias_backward(const at::Tensor& grad, const at::Tensor& rows, int64_t neuron_dim);

std::tuple<at::Tensor, at::Tensor> rows_norm_backward(const at::Tensor& grad, const at::Tensor& x,
                                                      const at::Tensor& mean, const at::Tensor& var,
                                                      double eps, const at::Tensor& rows,
                                                      const at::Tensor& bias_rows);

// What the CPU and the CUDA kernels share: checked arguments.

// grad [M, O] and x [M, I].
struct LinearRows {
  at::Tensor grad;
  at::Tensor x;
};

LinearRows checked_linear(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& rows);

// The sizes of a convolution with three spatial dimensions, of which those that it lacks come first
// and have one place.
struct ConvShape {
  using Sizes = std::array<int64_t, 3>;
  int64_t samples;
  int64_t inputs;   // channels of each group
  int64_t outputs;  // of all groups
  int64_t groups;
  Sizes input;
  Sizes output;
  Sizes kernel;
  Sizes stride;
  Sizes padding;
  Sizes dilation;

  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
};

ConvShape checked_conv(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& rows,
                       at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                       at::IntArrayRef dilation, int64_t groups);

// The shape of the result: [R, I / groups, kernel_size].
std::vector<int64_t> conv_rows_sizes(const ConvShape& shape, const at::Tensor& rows,
                                     at::IntArrayRef kernel_size);

// neuron_dim, counted from the front.
int64_t checked_bias(const at::Tensor& grad, const at::Tensor& rows, int64_t neuron_dim);

// grad and x in one memory format; mean, var and a weight of ones in the dtype of the sums.
struct NormRows {
  at::Tensor grad;
  at::Tensor x;
  at::Tensor mean;
  at::Tensor var;
  at::Tensor weight;
};

NormRows checked_norm(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean,
                      const at::Tensor& var, const at::Tensor& rows, const at::Tensor& bias_rows);

// The sums over no places, by whose number ATen would divide.
std::tuple<at::Tensor, at::Tensor> norm_of_nothing(const at::Tensor& mean, const at::Tensor& rows,
                                                   const at::Tensor& bias_rows);

}  // namespace neusemslice::ops
