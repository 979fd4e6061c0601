// Schema, dispatcher entry and argument checks of gram_. The contract is in gram.h.

#include "ops/gram.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "ops/checks.h"

namespace neusemslice::ops {

void gram_(const at::Tensor& count, const at::Tensor& mean, const at::Tensor& products,
           const at::Tensor& x) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("neusemslice::gram_", "")
                       .typed<decltype(gram_)>();
  op.call(count, mean, products, x);
}

void check_gram(const at::Tensor& count, const at::Tensor& mean, const at::Tensor& products,
                const at::Tensor& x) {
  const char* op = "gram_";
  check_floating(x, op, "x");
  TORCH_CHECK_VALUE(x.dim() == 2, op, ": x must have shape [N, F], got ", describe(x));
  const int64_t features = x.size(1);
  const auto check = [&](const at::Tensor& state, at::IntArrayRef shape, const char* name) {
    check_dtype(state, at::kDouble, op, name);
    check_shape(state, shape, op, name);
    check_contiguous(state, op, name);
    check_device(state, x.device(), op, name);
  };
  check(count, {}, "count");
  check(mean, {features}, "mean");
  check(products, {features, features}, "products");
}

}  // namespace neusemslice::ops

TORCH_LIBRARY_FRAGMENT(neusemslice, m) {
  m.def("gram_(Tensor(a!) count, Tensor(b!) mean, Tensor(c!) products, Tensor x) -> ()");
}
