#pragma once

// The one way a kernel is launched: on the current stream, with the grid checked against the
// hardware's limits, the launch checked for errors, and the kernel's name in the message.

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>

#include <cstdint>

namespace neusemslice::cuda {

struct Grid {
  int64_t x = 1;
  int64_t y = 1;
};

// Blocks that cover `total` items at `per_block` each.
inline int64_t blocks_for(int64_t total, int64_t per_block) {
  return (total + per_block - 1) / per_block;
}

// The largest grid dimension y; kernels stride over it when there is more work.
constexpr int64_t kMaxGridY = 65535;

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, int threads,
            Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0) return;
  TORCH_CHECK(grid.x > 0 && grid.x <= 2147483647 && grid.y > 0 && grid.y <= kMaxGridY, name,
              ": grid of ", grid.x, " x ", grid.y, " blocks is out of range");
  TORCH_CHECK(threads > 0 && threads <= 1024, name, ": block of ", threads,
              " threads is out of range");
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  kernel<<<blocks, threads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      static_cast<Parameters>(arguments)...);
  const cudaError_t error = cudaGetLastError();
  TORCH_CHECK(error == cudaSuccess, name, ": launch failed: ", cudaGetErrorString(error));
}

}  // namespace neusemslice::cuda
