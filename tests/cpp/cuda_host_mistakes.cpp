// Kernels with one mistake each, to show that the simulated device finds it: the tests of
// CMakeLists.txt run each and wait for the message. "none" is the control.

#include <cstdio>
#include <string>
#include <vector>

#include "cuda_host.h"

namespace neusemslice::cuda {
namespace {

constexpr int kThreads = 64;

struct Tile {
  int values[kThreads];
};

void write_kernel(int* out, int size) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < size) out[i] = i;
}

void shared_kernel(int* out, int reach) {
  Tile& tile = shared<Tile>();
  tile.values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = tile.values[static_cast<int>(threadIdx.x) + reach];
}

void unordered_kernel(int* out) {
  Tile& tile = shared<Tile>();
  tile.values[threadIdx.x] = 1;
  out[threadIdx.x] = tile.values[threadIdx.x ^ 1u];
}

void two_blocks_kernel(int* out) { out[threadIdx.x] += 1; }

void early_end_kernel(int* out) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

void two_barriers_kernel(int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

void lonely_shuffle_kernel(int* out) {
  if (threadIdx.x % 32 != 3) out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1, 1);
}

int run(const std::string& mistake) {
  std::vector<int> out(2 * kThreads);
  if (mistake == "none") {
    launch("write_kernel", &write_kernel, {2}, kThreads, out.data(), 2 * kThreads);
    launch("shared_kernel", &shared_kernel, {1}, kThreads, out.data(), 0);
  } else if (mistake == "out-of-bounds") {
    launch("write_kernel", &write_kernel, {3}, kThreads, out.data(), 3 * kThreads);
  } else if (mistake == "shared-out-of-bounds") {
    launch("shared_kernel", &shared_kernel, {1}, kThreads, out.data(), 1);
  } else if (mistake == "missing-barrier") {
    launch("unordered_kernel", &unordered_kernel, {1}, kThreads, out.data());
  } else if (mistake == "two-blocks") {
    launch("two_blocks_kernel", &two_blocks_kernel, {2}, kThreads, out.data());
  } else if (mistake == "early-end") {
    launch("early_end_kernel", &early_end_kernel, {1}, kThreads, out.data());
  } else if (mistake == "two-barriers") {
    launch("two_barriers_kernel", &two_barriers_kernel, {1}, kThreads, out.data());
  } else if (mistake == "lonely-shuffle") {
    launch("lonely_shuffle_kernel", &lonely_shuffle_kernel, {1}, kThreads, out.data());
  } else if (mistake == "large-block") {
    launch("write_kernel", &write_kernel, {1}, 2048, out.data(), 0);
  } else {
    std::fprintf(stderr, "unknown mistake: %s\n", mistake.c_str());
    return 2;
  }
  std::puts("no mistake was found");
  return 0;
}

}  // namespace
}  // namespace neusemslice::cuda

int main(int count, char** arguments) {
  return neusemslice::cuda::run(count == 2 ? arguments[1] : "");
}
