#pragma once

// gram_: adds rows to the Gram matrix of features about their mean, in place.
//
//   x is [N, F]: N rows of F features, any strides. The state is that of all rows so far:
//     count     float64 []: how many
//     mean      float64 [F]: of each feature
//     products  float64 [F, F], contiguous: sum over the rows of (x_i - mean_i)(x_j - mean_j)
//   Zeros are the neutral element. NaN and infinity spread to the features that have them and to
//   nothing that has not met them.
//
//   Rows are taken relative to their own mean, so that a mean far from zero costs no digits, and
//   the two means are brought together by Chan's formula. Products are sums of at most kGramRows
//   terms in float32 (float64 for float64 rows), added up in float64; each pair of features is
//   computed once, and the matrix is exactly symmetric. The order of the sums is fixed: equal calls
//   give equal bits, on the CPU at any number of threads.

#include <ATen/core/Tensor.h>

namespace neusemslice::ops {

constexpr int64_t kGramRows = 512;

void gram_(const at::Tensor& count, const at::Tensor& mean, const at::Tensor& products,
           const at::Tensor& x);

void check_gram(const at::Tensor& count, const at::Tensor& mean, const at::Tensor& products,
                const at::Tensor& x);

}  // namespace neusemslice::ops
