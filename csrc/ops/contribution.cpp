// Schema, dispatcher entry and argument checks of contribution_. The contract is in contribution.h.

#include "ops/contribution.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "ops/checks.h"

namespace neusemslice::ops {

void contribution_(const at::Tensor& count, const at::Tensor& positions,
                   const at::Tensor& nonfinite, const OptionalTensor& mean,
                   const OptionalTensor& mean_abs, const at::Tensor& x, const at::Tensor& g,
                   const at::Tensor& order, const at::Tensor& offsets, const OptionalTensor& share,
                   const OptionalTensor& weight, const OptionalTensor& mask, int64_t neuron_dim) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("neusemslice::contribution_", "")
                       .typed<decltype(contribution_)>();
  op.call(count, positions, nonfinite, mean, mean_abs, x, g, order, offsets, share, weight, mask,
          neuron_dim);
}

ContributionBatch checked_contribution(const ClassState& state, at::Device device,
                                       const at::Tensor& x, const at::Tensor& g,
                                       const at::Tensor& order, const at::Tensor& offsets,
                                       const OptionalTensor& share, const OptionalTensor& weight,
                                       const OptionalTensor& mask, int64_t neuron_dim) {
  const char* op = "contribution_";
  check_floating(g, op, "g");
  check_device(g, device, op, "g");
  check_shape(g, x.sizes(), op, "g");
  return {
      checked_batch(op, state, device, x, order, offsets, share, weight, mask, neuron_dim),
      class_operand(g, checked_neuron_dim(op, x, neuron_dim)),
  };
}

}  // namespace neusemslice::ops

TORCH_LIBRARY_FRAGMENT(neusemslice, m) {
  m.def(
      "contribution_(Tensor(a!) count, Tensor(b!) positions, Tensor(c!) nonfinite, "
      "Tensor(d!)? mean, Tensor(e!)? mean_abs, Tensor x, Tensor g, Tensor order, Tensor offsets, "
      "Tensor? share=None, Tensor? weight=None, Tensor? mask=None, int neuron_dim=1) -> ()");
}
