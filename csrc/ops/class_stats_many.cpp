// Entry, schema and argument checks of class_stats_many_. The contract is in class_stats.h.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <string>
#include <unordered_set>
#include <vector>

#include "ops/checks.h"
#include "ops/class_stats.h"

namespace neusemslice::ops {

void class_stats_many_(at::TensorList counts, at::TensorList positions, at::TensorList nonfinites,
                       at::TensorList means, at::TensorList m2s, at::TensorList mean_abs,
                       at::TensorList maxs, at::TensorList actives, at::TensorList xs,
                       const at::Tensor& order, const at::Tensor& offsets,
                       const OptionalTensor& share, const OptionalTensor& weight,
                       const OptionalTensors& masks, at::IntArrayRef neuron_dims) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("neusemslice::class_stats_many_", "")
                       .typed<decltype(class_stats_many_)>();
  op.call(counts, positions, nonfinites, means, m2s, mean_abs, maxs, actives, xs, order, offsets,
          share, weight, masks, neuron_dims);
}

std::string site_name(size_t i) { return "class_stats_many_: site " + std::to_string(i); }

std::vector<ClassSite> checked_sites(at::TensorList counts, at::TensorList positions,
                                     at::TensorList nonfinites, at::TensorList means,
                                     at::TensorList m2s, at::TensorList mean_abs,
                                     at::TensorList maxs, at::TensorList actives, at::TensorList xs,
                                     const at::Tensor& order, const at::Tensor& offsets,
                                     const OptionalTensor& share, const OptionalTensor& weight,
                                     const OptionalTensors& masks, at::IntArrayRef neuron_dims) {
  const auto check_length = [&](size_t length, const char* name, bool may_be_empty) {
    TORCH_CHECK_VALUE(length == xs.size() || (may_be_empty && length == 0),
                      "class_stats_many_: ", name, " must have ", xs.size(), " entries",
                      may_be_empty ? " or none" : "", ", one for each of xs, got ", length);
  };
  check_length(counts.size(), "counts", false);
  check_length(positions.size(), "positions", false);
  check_length(nonfinites.size(), "nonfinites", false);
  check_length(means.size(), "means", true);
  check_length(m2s.size(), "m2s", true);
  check_length(mean_abs.size(), "mean_abs", true);
  check_length(maxs.size(), "maxs", true);
  check_length(actives.size(), "actives", true);
  check_length(masks.size(), "masks", false);
  check_length(neuron_dims.size(), "neuron_dims", false);

  const auto entry = [](at::TensorList list, size_t i) {
    return list.empty() ? OptionalTensor() : OptionalTensor(list[i]);
  };
  std::vector<ClassSite> sites;
  std::unordered_set<const void*> seen;
  for (size_t i = 0; i < xs.size(); ++i) {
    const std::string op = site_name(i);
    const ClassState state =
        checked_state(op.c_str(), "", counts[i], positions[i], nonfinites[i], entry(means, i),
                      entry(m2s, i), entry(mean_abs, i), entry(maxs, i), entry(actives, i));
    check_device(counts[i], counts[0].device(), op.c_str(), "count");
    for (const void* begin :
         {static_cast<const void*>(state.count), static_cast<const void*>(state.nonfinite)}) {
      TORCH_CHECK_VALUE(!begin || seen.insert(begin).second, op,
                        ": the state must not be another site's as well");
    }
    sites.push_back({state, checked_batch(op.c_str(), state, counts[0].device(), xs[i], order,
                                          offsets, share, weight, masks.get(i), neuron_dims[i])});
  }
  return sites;
}

}  // namespace neusemslice::ops

TORCH_LIBRARY_FRAGMENT(neusemslice, m) {
  m.def(
      "class_stats_many_(Tensor(a!)[] counts, Tensor(b!)[] positions, Tensor(c!)[] nonfinites, "
      "Tensor(d!)[] means, Tensor(e!)[] m2s, Tensor(f!)[] mean_abs, Tensor(g!)[] maxs, "
      "Tensor(h!)[] actives, Tensor[] xs, Tensor order, Tensor offsets, Tensor? share, "
      "Tensor? weight, Tensor?[] masks, int[] neuron_dims) -> ()");
}
