#pragma once

// A batch by class as the loops of class_stats_ and contribution_ see it, free of torch. The loops
// lie in class_stats_body.h and contribution_body.h, which are compiled once per instruction set.

#include <cstdint>

#include "common/class_state.h"
#include "common/elements.h"

namespace neusemslice::cpu {

// Sample n's value of neuron c at position p lies at element
// n * stride_n + p * stride_p + c * stride_c.
struct Strided {
  const void* data;
  Element element;
  int64_t stride_n;
  int64_t stride_p;
  int64_t stride_c;

  int64_t at(int64_t n, int64_t p, int64_t c) const {
    return n * stride_n + p * stride_p + c * stride_c;
  }
};

// A sample that counts: where it lies, its weight, and its positions: all of the batch's, or those
// listed in ClassJob::kept from `kept` on.
struct Sample {
  int64_t index;
  int64_t kept;
  int64_t positions;
  double weight;
};

struct ClassJob {
  ClassState state;
  Strided x;
  int64_t positions;  // of an unmasked sample
  bool weighted;
  const Sample* samples;          // grouped by class
  const int64_t* offsets;         // [K + 1] into samples
  const double* class_weight;     // [K] sum over the class's samples
  const double* class_positions;  // [K] weighted
  const int64_t* kept;            // positions that the mask keeps, or null without a mask

  int64_t position(const Sample& s, int64_t p) const { return kept ? kept[s.kept + p] : p; }

  // The first class from k on that has samples.
  int64_t next_class(int64_t k) const {
    while (k < state.num_classes && offsets[k] == offsets[k + 1]) ++k;
    return k;
  }
};

// Neurons are handled in steps of this many; a thread owns whole steps.
constexpr int64_t kStep = 16;

}  // namespace neusemslice::cpu
