#pragma once

#include <cstdint>

#include "common/moments.h"

namespace neusemslice {

// The state of one site as raw pointers; null where a statistic is absent. Sizes and neutral
// elements are those of ops/class_stats.h.
struct ClassState {
  double* count;
  double* positions;
  int64_t* nonfinite;
  double* mean;
  double* m2;
  float* mean_abs;
  float* max;
  float* active;
  int64_t num_classes;
  int64_t neurons;
};

enum Statistic : unsigned { kMean = 1, kM2 = 2, kMeanAbs = 4, kMax = 8, kActive = 16 };

// The selections of statistics that have code of their own, narrowest first; any other takes the
// first that holds it. The mean is in all of them: its sum shows whether a value was not finite.
constexpr unsigned kSelections[] = {kMean, kMean | kM2, kMean | kMeanAbs,
                                    kMean | kMeanAbs | kMax | kActive,
                                    kMean | kM2 | kMeanAbs | kMax | kActive};

constexpr int selection_for(unsigned mask) {
  int i = 0;
  while (mask & ~kSelections[i]) ++i;
  return i;
}

inline unsigned selected_statistics(const ClassState& s) {
  const auto bit = [](const void* plane, unsigned statistic) { return plane ? statistic : 0u; };
  return bit(s.mean, kMean) | bit(s.m2, kM2) | bit(s.mean_abs, kMeanAbs) | bit(s.max, kMax) |
         bit(s.active, kActive);
}

// What one class's samples say of one neuron.
struct ClassCell {
  Moments moments;       // of the pooled activations
  double positions = 0;  // weight of the positions that the next three are over
  double mean_abs = 0;
  double active = 0;
  float max = 0;
};

NSS_HOST_DEVICE ClassCell load_cell(const ClassState& s, int64_t k, int64_t c) {
  const int64_t at = k * s.neurons + c;
  ClassCell cell;
  cell.moments = {s.count[k], s.mean ? s.mean[at] : 0, s.m2 ? s.m2[at] : 0};
  cell.positions = s.positions[k];
  if (s.mean_abs) cell.mean_abs = s.mean_abs[at];
  if (s.active) cell.active = s.active[at];
  if (s.max) cell.max = s.max[at];
  return cell;
}

// Merges `other`, which must not be empty, into class k of neuron c. The class's count and
// positions stay as they are: they are shared by its neurons and are raised once all have merged.
NSS_HOST_DEVICE void merge_cell(const ClassState& s, int64_t k, int64_t c, const ClassCell& other) {
  const int64_t at = k * s.neurons + c;
  ClassCell cell = load_cell(s, k, c);
  cell.moments.merge(other.moments);
  if (s.mean) s.mean[at] = cell.moments.mean;
  if (s.m2) s.m2[at] = cell.moments.m2;
  if (s.mean_abs) {
    s.mean_abs[at] = static_cast<float>(
        merge_means(cell.mean_abs, cell.positions, other.mean_abs, other.positions));
  }
  if (s.active) {
    s.active[at] =
        static_cast<float>(merge_means(cell.active, cell.positions, other.active, other.positions));
  }
  if (s.max && other.max > cell.max) s.max[at] = other.max;
}

}  // namespace neusemslice
