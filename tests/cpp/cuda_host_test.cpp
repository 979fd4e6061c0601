// The simulated device itself: indices, barriers, shared memory, warp operations, atomics.

#include "cuda_host.h"

#include <gtest/gtest.h>

#include <numeric>
#include <vector>

namespace neusemslice::cuda {
namespace {

void index_kernel(int* seen) {
  const unsigned block = blockIdx.y * gridDim.x + blockIdx.x;
  seen[block * blockDim.x + threadIdx.x] += static_cast<int>(block * 1000 + threadIdx.x);
}

struct Reversed {
  int values[70];
};

void reverse_kernel(const int* in, int* out) {
  Reversed& tile = shared<Reversed>();
  const unsigned i = threadIdx.x;
  for (int round = 0; round < 3; ++round) {
    tile.values[i] = in[blockIdx.x * blockDim.x + i] + round;
    __syncthreads();
    out[blockIdx.x * blockDim.x + i] = tile.values[blockDim.x - 1 - i];
    __syncthreads();
  }
}

void warp_kernel(int* sums, unsigned* votes, double* neighbours) {
  const unsigned i = threadIdx.x;
  int sum = static_cast<int>(i);
  for (int d = 4; d > 0; d /= 2) sum += __shfl_xor_sync(kAllLanes, sum, d);
  sums[i] = sum;
  votes[i] = __ballot_sync(kAllLanes, i % 3 == 0);
  if (i % 32 < 16) {
    neighbours[i] = __shfl_down_sync(0xffffu, i + 0.5, 1, 16);
  } else {
    neighbours[i] = __shfl_up_sync(0xffff0000u, i + 0.5, 1, 16);
  }
}

struct WarpTile {
  int values[64];
};

void warp_barrier_kernel(int* out) {
  WarpTile& tile = shared<WarpTile>();
  const unsigned i = threadIdx.x;
  for (int round = 0; round < 4; ++round) {
    tile.values[i] = static_cast<int>(i) + round;
    __syncwarp();
    out[i] = tile.values[i ^ 1u];
    __syncwarp();
  }
}

void count_kernel(int64_t* total) { atomicAdd(total, int64_t{2}); }

TEST(CudaHost, RunsEveryThreadOfEveryBlockOnceInAnyOrder) {
  for (unsigned seed : {0u, 1u, 2u}) {
    host::set_seed(seed);
    std::vector<int> seen(6 * 33, 0);
    launch("index_kernel", &index_kernel, {3, 2}, 33, seen.data());
    for (int i = 0; i < 6 * 33; ++i) EXPECT_EQ(seen[i], i / 33 * 1000 + i % 33);
  }
}

TEST(CudaHost, BarriersOrderSharedMemory) {
  for (unsigned seed : {0u, 3u}) {
    host::set_seed(seed);
    std::vector<int> in(140), out(140);
    std::iota(in.begin(), in.end(), 0);
    launch("reverse_kernel", &reverse_kernel, {2}, 70, in.data(), out.data());
    for (int i = 0; i < 140; ++i) EXPECT_EQ(out[i], i / 70 * 70 + 69 - i % 70 + 2);
  }
}

TEST(CudaHost, ShufflesAndVotes) {
  host::set_seed(5);
  std::vector<int> sums(64);
  std::vector<unsigned> votes(64);
  std::vector<double> neighbours(64);
  launch("warp_kernel", &warp_kernel, {1}, 64, sums.data(), votes.data(), neighbours.data());
  for (int i = 0; i < 64; ++i) {
    EXPECT_EQ(sums[i], i / 8 * 64 + 28);
    EXPECT_EQ(votes[i], i < 32 ? 0x49249249u : 0x92492492u);
    const int lane = i % 16;
    const int from = i % 32 < 16 ? (lane == 15 ? i : i + 1) : (lane == 0 ? i : i - 1);
    EXPECT_EQ(neighbours[i], from + 0.5);
  }
}

TEST(CudaHost, WarpBarriersOrderSharedMemory) {
  std::vector<int> out(64);
  for (unsigned seed : {0u, 7u}) {
    host::set_seed(seed);
    launch("warp_barrier_kernel", &warp_barrier_kernel, {1}, 64, out.data());
    for (int i = 0; i < 64; ++i) EXPECT_EQ(out[i], (i ^ 1) + 3);
  }
}

TEST(CudaHost, DynamicSharedMemoryBelongsToTheBlock) {
  std::vector<int> out(8);
  launch_dynamic("dynamic", {2}, 4, 4 * sizeof(int), [&] {
    int* tile = static_cast<int*>(host::dynamic_bytes());
    tile[threadIdx.x] = static_cast<int>(blockIdx.x * 10 + threadIdx.x);
    __syncthreads();
    out[blockIdx.x * 4 + threadIdx.x] = tile[3 - threadIdx.x];
  });
  EXPECT_EQ(out, (std::vector<int>{3, 2, 1, 0, 13, 12, 11, 10}));
}

TEST(CudaHost, AtomicsAddUp) {
  int64_t total = 0;
  launch("count_kernel", &count_kernel, {5, 7}, 40, &total);
  EXPECT_EQ(total, 2 * 5 * 7 * 40);
}

TEST(CudaHost, AnEmptyGridRunsNothing) {
  int64_t total = 0;
  launch("count_kernel", &count_kernel, {0, 7}, 40, &total);
  EXPECT_EQ(total, 0);
}

}  // namespace
}  // namespace neusemslice::cuda
