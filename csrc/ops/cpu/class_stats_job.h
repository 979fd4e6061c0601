#pragma once

// The loops of class_stats_, one entry per instruction set.

#include "ops/cpu/class_job.h"

namespace neusemslice::cpu {

// Adds the batch to the neurons [first, last) of the state, except to count and positions. `first`
// is a multiple of kStep, and so is `last` unless it is the number of neurons.
using AccumulateClasses = void(const ClassJob& job, int64_t first, int64_t last);
AccumulateClasses accumulate_classes_portable;
AccumulateClasses accumulate_classes_avx2;
AccumulateClasses accumulate_classes_avx512;

}  // namespace neusemslice::cpu
