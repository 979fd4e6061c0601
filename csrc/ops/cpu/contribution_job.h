#pragma once

// The loops of contribution_, one entry per instruction set.

#include "ops/cpu/class_job.h"

namespace neusemslice::cpu {

// A batch's activations, classes.x, and their gradients; positions count of none but the samples.
struct ContributionJob {
  ClassJob classes;
  Strided g;
};

// Classes [first_class, last_class) of neurons [first, last), which begin at a multiple of kStep
// and end at one or at the number of neurons.
struct Block {
  int64_t first_class;
  int64_t last_class;
  int64_t first;
  int64_t last;
};

// Adds the batch to one block of the state, except to count and positions. Blocks may be added side
// by side.
using AccumulateContributions = void(const ContributionJob& job, const Block& block);
AccumulateContributions accumulate_contributions_portable;
AccumulateContributions accumulate_contributions_avx2;
AccumulateContributions accumulate_contributions_avx512;

}  // namespace neusemslice::cpu
