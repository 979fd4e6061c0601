// Schemas, dispatcher entries and argument checks of the similarity operators. The contract is in
// similarity.h.

#include "ops/similarity.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "ops/checks.h"

namespace neusemslice::ops {

at::Tensor bitset_pack(const at::Tensor& bits) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("neusemslice::bitset_pack", "")
                       .typed<decltype(bitset_pack)>();
  return op.call(bits);
}

at::Tensor bitset_similarity(const at::Tensor& a, const OptionalTensor& b,
                             std::string_view metric) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("neusemslice::bitset_similarity", "")
                       .typed<decltype(bitset_similarity)>();
  return op.call(a, b, metric);
}

EdgeTensors bitset_similarity_edges(const at::Tensor& a, const OptionalTensor& b,
                                    std::string_view metric, double threshold) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("neusemslice::bitset_similarity_edges", "")
                       .typed<decltype(bitset_similarity_edges)>();
  return op.call(a, b, metric, threshold);
}

NeighbourTensors bitset_similarity_topk(const at::Tensor& a, const OptionalTensor& b,
                                        std::string_view metric, int64_t k) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("neusemslice::bitset_similarity_topk", "")
                       .typed<decltype(bitset_similarity_topk)>();
  return op.call(a, b, metric, k);
}

at::Tensor pairwise_similarity(const at::Tensor& a, const OptionalTensor& b,
                               std::string_view metric) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("neusemslice::pairwise_similarity", "")
                       .typed<decltype(pairwise_similarity)>();
  return op.call(a, b, metric);
}

EdgeTensors pairwise_similarity_edges(const at::Tensor& a, const OptionalTensor& b,
                                      std::string_view metric, double threshold) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("neusemslice::pairwise_similarity_edges", "")
                       .typed<decltype(pairwise_similarity_edges)>();
  return op.call(a, b, metric, threshold);
}

NeighbourTensors pairwise_similarity_topk(const at::Tensor& a, const OptionalTensor& b,
                                          std::string_view metric, int64_t k) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("neusemslice::pairwise_similarity_topk", "")
                       .typed<decltype(pairwise_similarity_topk)>();
  return op.call(a, b, metric, k);
}

PackWork checked_bits(const at::Tensor& bits) {
  const char* op = "bitset_pack";
  check_dtype(bits, at::kBool, op, "bits");
  TORCH_CHECK_VALUE(bits.dim() >= 1, op, ": bits must have a dimension to pack, got ",
                    describe(bits));
  const int64_t size = bits.size(-1);
  const int64_t words = words_for(size);
  std::vector<int64_t> shape = bits.sizes().vec();
  shape.back() = words;
  // Words are read from adjacent bytes; other strides are copied once.
  return {bits.contiguous(), at::empty(shape, bits.options().dtype(at::kLong)), size, words};
}

Sets checked_sets(const char* op, const at::Tensor& a, const OptionalTensor& b,
                  std::string_view metric) {
  check_dtype(a, at::kLong, op, "a");
  TORCH_CHECK_VALUE(a.dim() == 2, op, ": a must be int64 [R, W], got ", describe(a));
  const int64_t words = a.size(1);
  if (b.has_value()) {
    check_dtype(*b, at::kLong, op, "b");
    check_device(*b, a.device(), op, "b");
    TORCH_CHECK_VALUE(b->dim() == 2 && b->size(1) == words, op, ": b must be int64 [S, ", words,
                      "] as a is ", describe(a), ", got ", describe(*b));
  }
  Sets sets;
  if (metric == "jaccard") {
    sets.metric = SetMetric::jaccard;
  } else if (metric == "dice") {
    sets.metric = SetMetric::dice;
  } else if (metric == "overlap") {
    sets.metric = SetMetric::overlap;
  } else if (metric == "containment") {
    sets.metric = SetMetric::containment;
  } else {
    TORCH_CHECK_VALUE(false, op, ": metric must be jaccard, dice, overlap or containment, got '",
                      metric, "'");
  }
  // Rows are read word by word; other strides are copied once.
  sets.a = a.contiguous();
  sets.b = b.has_value() ? b->contiguous() : sets.a;
  sets.self = !b.has_value();
  sets.rows = sets.a.size(0);
  sets.cols = sets.b.size(0);
  sets.words = words;
  return sets;
}

Vectors checked_vectors(const char* op, const at::Tensor& a, const OptionalTensor& b,
                        std::string_view metric) {
  check_floating(a, op, "a");
  TORCH_CHECK_VALUE(a.dim() == 2, op, ": a must be floating point [R, D], got ", describe(a));
  if (b.has_value()) {
    check_dtype(*b, a.scalar_type(), op, "b");
    check_device(*b, a.device(), op, "b");
    TORCH_CHECK_VALUE(b->dim() == 2 && b->size(1) == a.size(1), op, ": b must be ",
                      dtype_name(a.scalar_type()), " [S, ", a.size(1), "] as a is ", describe(a),
                      ", got ", describe(*b));
  }
  const at::Tensor& other = b.has_value() ? *b : a;
  Vectors v{a, other, !b.has_value(), RowMetric::cosine, a.size(0), other.size(0)};
  if (metric == "pearson") {
    v.metric = RowMetric::pearson;
  } else if (metric == "dot") {
    v.metric = RowMetric::dot;
  } else {
    TORCH_CHECK_VALUE(metric == "cosine", op, ": metric must be cosine, pearson or dot, got '",
                      metric, "'");
  }
  return v;
}

void check_threshold(const char* op, double threshold) {
  TORCH_CHECK_VALUE(!std::isnan(threshold), op, ": threshold must be a number, got nan");
}

void check_k(const char* op, int64_t k) {
  TORCH_CHECK_VALUE(k >= 1, op, ": k must be at least 1, got ", k);
}

}  // namespace neusemslice::ops

TORCH_LIBRARY_FRAGMENT(neusemslice, m) {
  m.def("bitset_pack(Tensor bits) -> Tensor");
  m.def("bitset_similarity(Tensor a, Tensor? b, str metric) -> Tensor");
  m.def(
      "bitset_similarity_edges(Tensor a, Tensor? b, str metric, float threshold) "
      "-> (Tensor rows, Tensor cols, Tensor values)");
  m.def(
      "bitset_similarity_topk(Tensor a, Tensor? b, str metric, int k) "
      "-> (Tensor cols, Tensor values)");
  m.def("pairwise_similarity(Tensor a, Tensor? b, str metric) -> Tensor");
  m.def(
      "pairwise_similarity_edges(Tensor a, Tensor? b, str metric, float threshold) "
      "-> (Tensor rows, Tensor cols, Tensor values)");
  m.def(
      "pairwise_similarity_topk(Tensor a, Tensor? b, str metric, int k) "
      "-> (Tensor cols, Tensor values)");
}
