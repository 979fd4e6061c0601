#pragma once

// What class_stats_ hands to its loops, free of torch. They lie in class_stats_body.h,
// which is compiled once per instruction set.

#include <cstdint>

#include "common/class_state.h"

namespace neusemslice::cpu {

enum class Element { kFloat64, kFloat32, kFloat16, kBFloat16 };

// A sample that counts: where it lies, its weight, and its positions: all of the batch's, or those
// listed in ClassJob::kept from `kept` on.
struct Sample {
  int64_t index;
  int64_t kept;
  int64_t positions;
  double weight;
};

// x[n, p, c] lies at element n * stride_n + p * stride_p + c * stride_c.
struct ClassJob {
  ClassState state;
  const void* x;
  Element element;
  int64_t stride_n;
  int64_t stride_p;
  int64_t stride_c;
  int64_t positions;  // of an unmasked sample
  bool weighted;
  const Sample* samples;          // grouped by class
  const int64_t* offsets;         // [K + 1] into samples
  const double* class_weight;     // [K] sum over the class's samples
  const double* class_positions;  // [K] weighted
  const int64_t* kept;            // positions that the mask keeps, or null without a mask
};

// Neurons are handled in steps of this many; a thread owns whole steps.
constexpr int64_t kStep = 16;

// Adds the batch to the neurons [first, last) of the state, except to count and positions. `first`
// is a multiple of kStep, and so is `last` unless it is the number of neurons.
using AccumulateClasses = void(const ClassJob& job, int64_t first, int64_t last);
AccumulateClasses accumulate_classes_portable;
AccumulateClasses accumulate_classes_avx2;
AccumulateClasses accumulate_classes_avx512;

}  // namespace neusemslice::cpu
