#pragma once

// The one way a kernel is launched: on the current stream, with the grid checked against the
// hardware's limits, the launch checked for errors, and the kernel's name in the message.

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>

#include <cstdint>

#include "ops/cuda/grid.h"

namespace neusemslice::cuda {

// The block's shared memory of type T: the same for each call with that type.
template <typename T>
__device__ __forceinline__ T& shared() {
  __shared__ T storage;
  return storage;
}

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, int threads,
            Arguments... arguments) {
  static_assert(kParametersFit<Parameters...>);
  if (grid.x == 0 || grid.y == 0) return;
  TORCH_CHECK(grid.x > 0 && grid.x <= kMaxGridX && grid.y > 0 && grid.y <= kMaxGridY, name,
              ": grid of ", grid.x, " x ", grid.y, " blocks is out of range");
  TORCH_CHECK(threads > 0 && threads <= kMaxThreads, name, ": block of ", threads,
              " threads is out of range");
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  kernel<<<blocks, threads, 0, stream>>>(static_cast<Parameters>(arguments)...);
  const cudaError_t error = cudaGetLastError();
  TORCH_CHECK(error == cudaSuccess, name, ": launch failed: ", cudaGetErrorString(error));
}

}  // namespace neusemslice::cuda
