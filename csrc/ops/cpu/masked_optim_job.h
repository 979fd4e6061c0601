#pragma once

// The loops of masked_sgd_ and masked_adamw_, free of torch. They lie in masked_optim_body.h, which
// is compiled once per instruction set.

#include <cstdint>

#include "common/optimizer_math.h"
#include "common/tensor_update.h"

namespace neusemslice::cpu {

// Elements of a block; threads own whole blocks.
constexpr int64_t kBlockElements = 4096;

// A step over `count` tensors. Those of float64 elements follow `wide`, all others `narrow`.
template <template <typename> class Rule>
struct UpdateJob {
  Rule<float> narrow;
  Rule<double> wide;
  float scale;
  const TensorUpdate* tensors = nullptr;
  int64_t count = 0;
};

struct MaskedOptimLoops {
  // Update the elements of the blocks [first, last), which may be done side by side.
  void (*sgd)(const UpdateJob<Sgd>& job, int64_t first, int64_t last);
  void (*adamw)(const UpdateJob<Adamw>& job, int64_t first, int64_t last);
};

extern const MaskedOptimLoops kMaskedOptimPortable;
extern const MaskedOptimLoops kMaskedOptimAvx2;
extern const MaskedOptimLoops kMaskedOptimAvx512;

}  // namespace neusemslice::cpu
