// Schemas, dispatcher entries and argument checks of class_order, class_stats_ and
// class_stats_merge_. The contract is in class_stats.h.

#include "ops/class_stats.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "ops/checks.h"

namespace neusemslice::ops {
namespace {

template <typename T>
T* checked_plane(const char* op, const std::string& name, const OptionalTensor& t,
                 at::IntArrayRef shape, at::ScalarType dtype, at::Device device) {
  if (!t.has_value()) return nullptr;
  check_dtype(*t, dtype, op, name.c_str());
  check_shape(*t, shape, op, name.c_str());
  check_device(*t, device, op, name.c_str());
  check_contiguous(*t, op, name.c_str());
  return t->mutable_data_ptr<T>();
}

// The stride that runs through all of the dimensions `dims` of t in order, or -1 if there is none.
int64_t joint_stride(const at::Tensor& t, const std::vector<int64_t>& dims) {
  int64_t stride = -1;
  int64_t expected = -1;
  for (auto d = dims.rbegin(); d != dims.rend(); ++d) {
    if (t.size(*d) == 1) continue;
    if (stride < 0) {
      stride = t.stride(*d);
    } else if (t.stride(*d) != expected) {
      return -1;
    }
    expected = t.stride(*d) * t.size(*d);
  }
  return stride < 0 ? 0 : stride;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> class_order(const at::Tensor& labels, int64_t num_classes) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("neusemslice::class_order", "")
                       .typed<decltype(class_order)>();
  return op.call(labels, num_classes);
}

void class_stats_(const at::Tensor& count, const at::Tensor& positions, const at::Tensor& nonfinite,
                  const OptionalTensor& mean, const OptionalTensor& m2,
                  const OptionalTensor& mean_abs, const OptionalTensor& max,
                  const OptionalTensor& active, const at::Tensor& x, const at::Tensor& order,
                  const at::Tensor& offsets, const OptionalTensor& share,
                  const OptionalTensor& weight, const OptionalTensor& mask, int64_t neuron_dim) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("neusemslice::class_stats_", "")
                       .typed<decltype(class_stats_)>();
  op.call(count, positions, nonfinite, mean, m2, mean_abs, max, active, x, order, offsets, share,
          weight, mask, neuron_dim);
}

void class_stats_merge_(const at::Tensor& count, const at::Tensor& positions,
                        const at::Tensor& nonfinite, const OptionalTensor& mean,
                        const OptionalTensor& m2, const OptionalTensor& mean_abs,
                        const OptionalTensor& max, const OptionalTensor& active,
                        const at::Tensor& other_count, const at::Tensor& other_positions,
                        const at::Tensor& other_nonfinite, const OptionalTensor& other_mean,
                        const OptionalTensor& other_m2, const OptionalTensor& other_mean_abs,
                        const OptionalTensor& other_max, const OptionalTensor& other_active) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("neusemslice::class_stats_merge_", "")
                       .typed<decltype(class_stats_merge_)>();
  op.call(count, positions, nonfinite, mean, m2, mean_abs, max, active, other_count,
          other_positions, other_nonfinite, other_mean, other_m2, other_mean_abs, other_max,
          other_active);
}

ClassState checked_state(const char* op, const char* prefix, const at::Tensor& count,
                         const at::Tensor& positions, const at::Tensor& nonfinite,
                         const OptionalTensor& mean, const OptionalTensor& m2,
                         const OptionalTensor& mean_abs, const OptionalTensor& max,
                         const OptionalTensor& active) {
  const std::string p(prefix);
  TORCH_CHECK_VALUE(count.dim() == 1, op, ": ", p, "count must be float64 [K], got ",
                    describe(count));
  TORCH_CHECK_VALUE(nonfinite.dim() == 1, op, ": ", p, "nonfinite must be int64 [C], got ",
                    describe(nonfinite));
  TORCH_CHECK_VALUE(!m2.has_value() || mean.has_value(), op, ": ", p, "m2 needs ", p, "mean");
  const int64_t k = count.size(0);
  const int64_t c = nonfinite.size(0);
  const at::Device device = count.device();
  return {
      checked_plane<double>(op, p + "count", count, {k}, at::kDouble, device),
      checked_plane<double>(op, p + "positions", positions, {k}, at::kDouble, device),
      checked_plane<int64_t>(op, p + "nonfinite", nonfinite, {c}, at::kLong, device),
      checked_plane<double>(op, p + "mean", mean, {k, c}, at::kDouble, device),
      checked_plane<double>(op, p + "m2", m2, {k, c}, at::kDouble, device),
      checked_plane<float>(op, p + "mean_abs", mean_abs, {k, c}, at::kFloat, device),
      checked_plane<float>(op, p + "max", max, {k, c}, at::kFloat, device),
      checked_plane<float>(op, p + "active", active, {k, c}, at::kFloat, device),
      k,
      c,
  };
}

ClassOperand class_operand(const at::Tensor& x, int64_t neurons_at) {
  std::vector<int64_t> position_dims;
  int64_t positions = 1;
  for (int64_t d = 1; d < x.dim(); ++d) {
    if (d == neurons_at) continue;
    position_dims.push_back(d);
    positions *= x.size(d);
  }
  const int64_t stride_p = joint_stride(x, position_dims);
  if (stride_p >= 0) return {x, x.stride(0), stride_p, x.stride(neurons_at)};
  // Pixels and tokens are read through one stride. Where they have none (neurons between them, or
  // a permuted tensor), the batch is copied once.
  const at::Tensor copy = x.movedim(neurons_at, 1).contiguous();
  return {copy, copy.stride(0), 1, positions};
}

int64_t checked_neuron_dim(const char* op, const at::Tensor& x, int64_t neuron_dim) {
  TORCH_CHECK_VALUE(x.dim() >= 2, op, ": x must have a sample and a neuron dimension, got ",
                    describe(x));
  const int64_t neurons_at = neuron_dim < 0 ? neuron_dim + x.dim() : neuron_dim;
  TORCH_CHECK_VALUE(neurons_at >= 1 && neurons_at < x.dim(), op,
                    ": neuron_dim must name a dimension of x other than the samples' 0, got ",
                    neuron_dim, " for x ", describe(x));
  return neurons_at;
}

ClassBatch checked_batch(const char* op, const ClassState& state, at::Device device,
                         const at::Tensor& x, const at::Tensor& order, const at::Tensor& offsets,
                         const OptionalTensor& share, const OptionalTensor& weight,
                         const OptionalTensor& mask, int64_t neuron_dim) {
  check_floating(x, op, "x");
  check_device(x, device, op, "x");
  const int64_t neurons_at = checked_neuron_dim(op, x, neuron_dim);
  TORCH_CHECK_VALUE(x.size(neurons_at) == state.neurons, op, ": x must have ", state.neurons,
                    " neurons in dimension ", neurons_at, ", got ", describe(x));
  check_dtype(order, at::kLong, op, "order");
  if (share.has_value()) {
    TORCH_CHECK_VALUE(order.dim() == 1, op, ": order must be int64 [entries], got ",
                      describe(order));
  } else {
    check_shape(order, {x.size(0)}, op, "order");
  }
  check_device(order, device, op, "order");
  check_contiguous(order, op, "order");
  check_dtype(offsets, at::kLong, op, "offsets");
  check_shape(offsets, {state.num_classes + 1}, op, "offsets");
  check_device(offsets, device, op, "offsets");
  check_contiguous(offsets, op, "offsets");

  std::vector<int64_t> mask_shape{x.size(0)};
  ClassBatch batch{class_operand(x, neurons_at), {}, {}, {}, 0, 1};
  batch.samples = x.size(0);
  for (int64_t d = 1; d < x.dim(); ++d) {
    if (d == neurons_at) continue;
    mask_shape.push_back(x.size(d));
    batch.positions *= x.size(d);
  }
  const auto checked_weight = [&](const at::Tensor& t, int64_t size, const char* name) {
    TORCH_CHECK_TYPE(at::isFloatingType(t.scalar_type()), op, ": ", name,
                     " must be floating point, got ", describe(t));
    check_shape(t, {size}, op, name);
    check_device(t, device, op, name);
    return t.to(at::kDouble).contiguous();
  };
  if (share.has_value()) batch.share = checked_weight(*share, order.size(0), "share");
  if (weight.has_value()) batch.weight = checked_weight(*weight, x.size(0), "weight");
  if (mask.has_value()) {
    check_dtype(*mask, at::kBool, op, "mask");
    check_shape(*mask, mask_shape, op, "mask");
    check_device(*mask, device, op, "mask");
    batch.mask = mask->contiguous();
  }
  return batch;
}

void check_mergeable(const ClassState& state, const ClassState& other) {
  TORCH_CHECK_VALUE(state.num_classes == other.num_classes && state.neurons == other.neurons,
                    "class_stats_merge_: other must have ", state.num_classes, " classes and ",
                    state.neurons, " neurons, got ", other.num_classes, " and ", other.neurons);
  TORCH_CHECK_VALUE(!state.mean == !other.mean && !state.m2 == !other.m2 &&
                        !state.mean_abs == !other.mean_abs && !state.max == !other.max &&
                        !state.active == !other.active,
                    "class_stats_merge_: other must hold the same statistics");
}

void bump_state(const at::Tensor& count, const at::Tensor& positions, const at::Tensor& nonfinite,
                const OptionalTensor& mean, const OptionalTensor& m2,
                const OptionalTensor& mean_abs, const OptionalTensor& max,
                const OptionalTensor& active) {
  bump_version(count);
  bump_version(positions);
  bump_version(nonfinite);
  for (const OptionalTensor* t : {&mean, &m2, &mean_abs, &max, &active}) {
    if (t->has_value()) bump_version(**t);
  }
}

}  // namespace neusemslice::ops

TORCH_LIBRARY_FRAGMENT(neusemslice, m) {
  m.def("class_order(Tensor labels, int num_classes) -> (Tensor order, Tensor offsets)");
  m.def(
      "class_stats_(Tensor(a!) count, Tensor(b!) positions, Tensor(c!) nonfinite, "
      "Tensor(d!)? mean, Tensor(e!)? m2, Tensor(f!)? mean_abs, Tensor(g!)? max, "
      "Tensor(h!)? active, Tensor x, Tensor order, Tensor offsets, Tensor? share=None, "
      "Tensor? weight=None, Tensor? mask=None, int neuron_dim=1) -> ()");
  m.def(
      "class_stats_merge_(Tensor(a!) count, Tensor(b!) positions, Tensor(c!) nonfinite, "
      "Tensor(d!)? mean, Tensor(e!)? m2, Tensor(f!)? mean_abs, Tensor(g!)? max, "
      "Tensor(h!)? active, Tensor other_count, Tensor other_positions, Tensor other_nonfinite, "
      "Tensor? other_mean=None, Tensor? other_m2=None, Tensor? other_mean_abs=None, "
      "Tensor? other_max=None, Tensor? other_active=None) -> ()");
}
