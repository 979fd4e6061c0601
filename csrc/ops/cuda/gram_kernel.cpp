// CUDA implementation of gram_ (contract: ops/gram.h), by ATen's operators: a product of cuBLAS for
// each block of rows. The matrix is made symmetric by taking its upper half. They guard their
// tensors' device themselves, and run on the CPU's as well, where tests find this right without a
// GPU.

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/triu.h>
#include <torch/library.h>

#include <algorithm>

#include "ops/checks.h"
#include "ops/gram.h"
#include "ops/similarity.h"

namespace neusemslice::ops {
namespace {

void gram_cuda(const at::Tensor& count, const at::Tensor& mean, const at::Tensor& products,
               const at::Tensor& x) {
  check_gram(count, mean, products, x);
  const int64_t rows = x.size(0);
  if (rows > 0) {
    const PlainDispatch plain;
    const at::NoTF32Guard no_tf32;
    const at::ScalarType values = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const double added = static_cast<double>(rows);
    const at::Tensor own = x.mean(0, /*keepdim=*/false, at::kDouble);
    const at::Tensor shift = own.to(values);
    const at::Tensor rest = own.sub(shift.to(at::kDouble));
    const at::Tensor moved = own.sub(mean);
    const at::Tensor total = count.add(added);
    at::Tensor sums = at::outer(moved, moved).mul_(count.mul(added).div(total));
    sums.sub_(at::outer(rest, rest), added);
    for (int64_t first = 0; first < rows; first += kGramRows) {
      const int64_t some = std::min(kGramRows, rows - first);
      const at::Tensor part = x.narrow(0, first, some).to(values).sub(shift);
      sums.add_(at::mm(part.t(), part).to(at::kDouble));
    }
    products.add_(at::triu(sums)).add_(at::triu(sums, 1).t());
    mean.add_(moved.mul(total.reciprocal().mul_(added)));
    count.copy_(total);
  }
  for (const at::Tensor& t : {count, mean, products}) bump_version(t);
}

}  // namespace
}  // namespace neusemslice::ops

TORCH_LIBRARY_IMPL(neusemslice, CUDA, m) { m.impl("gram_", &neusemslice::ops::gram_cuda); }
