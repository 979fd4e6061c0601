#pragma once

// contribution_: adds what each neuron contributed to each class's loss to the state of one site,
// in place.
//
//   x, the activations, and g, their gradients, have one shape, laid out as class_stats_ reads its
//   x: samples in dimension 0, neurons in `neuron_dim`, positions in the others. q[n, c], the mean
//   of x * g over the positions of sample n that the mask keeps, enters `mean`, and |q[n, c]|
//   `mean_abs`. Each sample counts as one position: mean_abs has the weight that mean has.
//
//   Order, share, weight and mask are those of class_stats_. A product that is not finite (0 times
//   infinity is none) is counted in `nonfinite` (once per class of its sample) and enters the sums
//   as 0. The state is that of class_stats_, with or without `mean` and `mean_abs` and with nothing
//   else, so class_stats_merge_ merges it. Its version rises with every call, even if no sample
//   counts.
//
//   Strides and dtypes of x and g may differ: under autocast a gradient can be wider than what it
//   belongs to, and a copy in another dtype would cost another pass. Products and sums are taken in
//   float64, where products of narrower values are exact, in a fixed order: the same bits each
//   time, at any number of threads and on any CPU.

#include <ATen/core/Tensor.h>

#include "ops/class_stats.h"

namespace neusemslice::ops {

void contribution_(const at::Tensor& count, const at::Tensor& positions,
                   const at::Tensor& nonfinite, const OptionalTensor& mean,
                   const OptionalTensor& mean_abs, const at::Tensor& x, const at::Tensor& g,
                   const at::Tensor& order, const at::Tensor& offsets, const OptionalTensor& share,
                   const OptionalTensor& weight, const OptionalTensor& mask, int64_t neuron_dim);

// What the kernels are given: the batch of x, and g beside it.
struct ContributionBatch {
  ClassBatch classes;
  ClassOperand g;
};

ContributionBatch checked_contribution(const ClassState& state, at::Device device,
                                       const at::Tensor& x, const at::Tensor& g,
                                       const at::Tensor& order, const at::Tensor& offsets,
                                       const OptionalTensor& share, const OptionalTensor& weight,
                                       const OptionalTensor& mask, int64_t neuron_dim);

}  // namespace neusemslice::ops
