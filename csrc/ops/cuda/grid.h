#pragma once

// Sizes of a launch, for the host compiler as well.

#include <cstdint>

namespace neusemslice::cuda {

struct Grid {
  int64_t x = 1;
  int64_t y = 1;
};

// The largest grid; kernels stride over dimension y when there is more work.
constexpr int64_t kMaxGridX = 2147483647;
constexpr int64_t kMaxGridY = 65535;
constexpr int kMaxThreads = 1024;

// Kernel parameters that every architecture takes.
constexpr int64_t kMaxParameterBytes = 4096;
template <typename... Parameters>
constexpr bool kParametersFit = (sizeof(Parameters) + ... + 0) <= kMaxParameterBytes;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Blocks that cover `total` items at `per_block` each.
constexpr int64_t blocks_for(int64_t total, int64_t per_block) {
  return (total + per_block - 1) / per_block;
}

}  // namespace neusemslice::cuda
