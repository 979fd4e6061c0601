#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#if !defined(__CUDA_ARCH__)
#include <bit>
#endif

#include "common/host_device.h"

namespace neusemslice {

// ---- Sets packed into words: bit j of word w is element 64 * w + j. ----

constexpr int64_t kWordBits = 64;

NSS_HOST_DEVICE int64_t words_for(int64_t elements) {
  return elements / kWordBits + (elements % kWordBits != 0 ? 1 : 0);
}

// The word of the first `count` <= 64 elements; the other bits are zero.
NSS_HOST_DEVICE int64_t pack_word(const bool* elements, int64_t count) {
  uint64_t word = 0;
  for (int64_t j = 0; j < count; ++j) word |= static_cast<uint64_t>(elements[j] ? 1 : 0) << j;
  return static_cast<int64_t>(word);
}

NSS_HOST_DEVICE int64_t popcount(int64_t word) {
#if defined(__CUDA_ARCH__)
  return __popcll(static_cast<unsigned long long>(word));
#else
  return std::popcount(static_cast<uint64_t>(word));
#endif
}

NSS_HOST_DEVICE int64_t set_size(const int64_t* set, int64_t words) {
  int64_t size = 0;
  for (int64_t w = 0; w < words; ++w) size += popcount(set[w]);
  return size;
}

NSS_HOST_DEVICE int64_t common_size(const int64_t* a, const int64_t* b, int64_t words) {
  int64_t size = 0;
  for (int64_t w = 0; w < words; ++w) size += popcount(a[w] & b[w]);
  return size;
}

enum class SetMetric { jaccard, dice, overlap, containment };

NSS_HOST_DEVICE bool is_symmetric(SetMetric metric) { return metric != SetMetric::containment; }

// Similarity of two sets from their sizes and the size of their intersection. Integers up to the
// one division; 0 where the denominator is, so that an empty set is similar to nothing.
NSS_HOST_DEVICE double set_similarity(SetMetric metric, int64_t common, int64_t size_a,
                                      int64_t size_b) {
  int64_t numerator = common;
  int64_t denominator = 0;
  switch (metric) {
    case SetMetric::jaccard:
      denominator = size_a + size_b - common;
      break;
    case SetMetric::dice:
      numerator = 2 * common;
      denominator = size_a + size_b;
      break;
    case SetMetric::overlap:
      denominator = size_a < size_b ? size_a : size_b;
      break;
    case SetMetric::containment:
      denominator = size_a;
      break;
  }
  if (denominator == 0) return 0.0;
  return static_cast<double>(numerator) / static_cast<double>(denominator);
}

// The similarity of two sets follows from the size of their intersection and from one number, the
// key of their sizes.
NSS_HOST_DEVICE int64_t size_key(SetMetric metric, int64_t size_a, int64_t size_b) {
  if (metric == SetMetric::containment) return size_a;
  if (metric == SetMetric::overlap) return size_a < size_b ? size_a : size_b;
  return size_a + size_b;
}

// In exact arithmetic, a pair reaches the threshold if its common size is at least this share of
// the key of its sizes.
NSS_HOST_DEVICE double common_ratio(SetMetric metric, double threshold) {
  if (metric == SetMetric::jaccard) return threshold / (1 + threshold);
  return metric == SetMetric::dice ? threshold / 2 : threshold;
}

// The least common size with which sets of that key have a similarity (the float64 quotient) of at
// least `threshold` <= 1; more than any can have in common where none is enough.
NSS_HOST_DEVICE int64_t least_common(SetMetric metric, int64_t key, double threshold) {
  if (threshold <= 0) return 0;
  if (key == 0) return 1;
  const bool sum = metric == SetMetric::jaccard || metric == SetMetric::dice;
  const int64_t most = sum ? key / 2 : key;
  const auto reaches = [&](int64_t common) {
    return set_similarity(metric, common, key, sum ? 0 : key) >= threshold;
  };
  int64_t common = static_cast<int64_t>(common_ratio(metric, threshold) * static_cast<double>(key));
  if (common > most) common = most;
  while (common > 0 && reaches(common - 1)) --common;
  while (common <= most && !reaches(common)) ++common;
  return common;
}

// ---- Rows of numbers: their cosine is the product of their unit vectors. ----

enum class RowMetric { cosine, pearson, dot };

// Maps the values of one row to those of a unit vector. `norm` is 0 for a row without a direction,
// whose vector is zero, and NaN for a row with a value that is not finite, whose vector is NaN.
struct UnitMap {
  double scale = 1;
  double shift = 0;
  double mean = 0;
  double norm = 0;

  NSS_HOST_DEVICE double centred(double value) const { return (value * scale - shift) - mean; }
  NSS_HOST_DEVICE double operator()(double value) const {
    return norm == 0 ? 0.0 : centred(value) / norm;
  }
};

// The power of two that brings the largest magnitude of a row, not 0, near to 1.
NSS_HOST_DEVICE double unit_scale(double largest) {
  // Below -1022 the power would overflow; a subnormal row is brought near enough to 1 by it.
  const int exponent = std::ilogb(largest);
  return std::ldexp(1.0, exponent < -1022 ? 1022 : -exponent);
}

// The map of a row of `size` values, `stride` apart; with `centre`, of the row less its mean.
// The row is first scaled by a power of two, so that no square overflows or vanishes and no digit
// changes, and shifted by its first value, so that a row that hardly varies keeps its digits and a
// constant row gives exactly zero.
template <typename scalar_t>
NSS_HOST_DEVICE UnitMap unit_map(const scalar_t* row, int64_t stride, int64_t size, bool centre) {
  UnitMap map;
  double largest = 0;
  for (int64_t d = 0; d < size; ++d) {
    const double magnitude = std::fabs(static_cast<double>(row[d * stride]));
    if (!std::isfinite(magnitude)) {
      map.norm = std::numeric_limits<double>::quiet_NaN();
      return map;
    }
    largest = magnitude > largest ? magnitude : largest;
  }
  if (largest == 0) return map;
  map.scale = unit_scale(largest);
  if (centre) {
    map.shift = static_cast<double>(row[0]) * map.scale;
    double sum = 0;
    for (int64_t d = 0; d < size; ++d) sum += map.centred(static_cast<double>(row[d * stride]));
    map.mean = sum / static_cast<double>(size);
  }
  double squares = 0;
  for (int64_t d = 0; d < size; ++d) {
    const double value = map.centred(static_cast<double>(row[d * stride]));
    squares += value * value;
  }
  map.norm = std::sqrt(squares);
  return map;
}

// A product of unit vectors as a similarity: rounding may have carried it past 1. NaN stays NaN.
template <typename value_t>
NSS_HOST_DEVICE value_t clamp_similarity(value_t product) {
  if (product > value_t(1)) return value_t(1);
  if (product < value_t(-1)) return value_t(-1);
  return product;
}

// A row with itself: 1, 0 for a row without a direction, or NaN.
template <typename value_t>
NSS_HOST_DEVICE value_t self_similarity(value_t product) {
  return product > value_t(0) ? value_t(1) : product;
}

// ---- Edges ----

// The pairs of rows that may become edges: all of two tensors; of one tensor, those of two
// different rows, or where the similarity is symmetric each such pair once.
enum class Pairs { all, distinct, upper };

NSS_HOST_DEVICE bool is_included(Pairs pairs, int64_t row, int64_t col) {
  return pairs == Pairs::all || (pairs == Pairs::upper ? row < col : row != col);
}

}  // namespace neusemslice
