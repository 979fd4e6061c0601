#pragma once

// From an operator's checked batch to what its CPU loops are given.

#include <cstdint>
#include <vector>

#include "ops/class_stats.h"
#include "ops/cpu/class_job.h"

namespace neusemslice::ops {

// The samples that count, grouped by class, with each class's sums of weights.
struct ClassSamples {
  std::vector<cpu::Sample> list;
  std::vector<int64_t> offsets;
  std::vector<double> weight;
  std::vector<double> positions;
  std::vector<int64_t> kept;  // with a mask: the positions that it keeps, sample after sample
};

// Refuses an order that would read outside the batch, and weights and shares that are negative or
// not finite.
ClassSamples gather_samples(const char* op, const ClassState& state, const ClassBatch& batch,
                            const at::Tensor& order, const at::Tensor& offsets);

cpu::Strided strided(const ClassOperand& operand);

// Points into all three.
cpu::ClassJob class_job(const ClassState& state, const ClassBatch& batch,
                        const ClassSamples& samples);

}  // namespace neusemslice::ops
