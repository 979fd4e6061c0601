#pragma once

// One parameter of an optimizer step as the kernels see it, free of torch.

#include <cstdint>

#include "common/elements.h"
#include "common/tuned_rows.h"

namespace neusemslice {

struct TensorUpdate {
  static constexpr int kMaxStates = 3;

  void* param = nullptr;
  const void* grad = nullptr;
  void* states[kMaxStates] = {};  // null where there are fewer
  float* master = nullptr;        // null without one
  float* steps = nullptr;         // null where the rule needs no count
  void* row_shares = nullptr;     // each tuned row's Row of the rule, once they are found
  int64_t row_count = 0;
  int64_t elements = 0;
  int64_t first_row = 0;    // rows are numbered over all tensors of a call,
  int64_t first_block = 0;  // and so are the blocks that the work is cut into
  Element element = Element::kFloat32;
  bool same_shares = false;  // of all rows; only the CPU looks at it
  TunedRows where;           // last, as its axes are
};

}  // namespace neusemslice
