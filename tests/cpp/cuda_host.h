#pragma once

// A device to run CUDA kernels on without a GPU: their device code, compiled as C++, with each
// thread of a block a fiber of one OS thread.
//
// Blocks run one after the other, and a block's threads one at a time from one barrier, shuffle or
// vote to the next; set_seed() permutes both orders, in which no result may show. What a GPU would
// answer with a hang or with garbage ends the process with a message: barriers and warp operations
// that not all threads reach or that they reach in different lines, and grids or blocks out of
// range. Under AddressSanitizer, shared memory is a heap block per thread block, so that accesses
// outside of it are found. Under ThreadSanitizer, threads that no barrier orders are unordered, so
// that a missing barrier is a data race; so are blocks that touch the same memory.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#include "ops/cuda/grid.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
// Vectors are read from memory of other types.
struct __attribute__((may_alias, aligned(16))) uint4 {
  unsigned x, y, z, w;
};
struct __attribute__((may_alias, aligned(16))) float4 {
  float x, y, z, w;
};

extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

namespace neusemslice::cuda {
namespace host {

using Where = std::source_location;

// Seed of the order of blocks and threads; 0 is their natural order.
void set_seed(unsigned seed);

void run(const char* name, Grid grid, int threads, int64_t dynamic_bytes, void (*body)(void*),
         void* context);

// The block's shared memory named by `key`, which is made on first use and filled with NaN.
void* shared_bytes(const void* key, int64_t bytes);
void* dynamic_bytes();

void barrier(const Where& where);
void warp_barrier(unsigned mask, const Where& where);

// What each lane of `mask` handed over; all of them must arrive.
const uint64_t* exchange(unsigned mask, uint64_t value, const Where& where);

inline int lane() { return static_cast<int>(threadIdx.x % kWarp); }

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// The value of lane `source`; of the lane itself, if that is outside its group of `width`.
template <typename T>
T shuffle(unsigned mask, T value, int source, int width, const Where& where) {
  const uint64_t* values = exchange(mask, to_bits(value), where);
  const bool inside = source >= 0 && source < kWarp && source / width == lane() / width;
  return inside ? from_bits<T>(values[source]) : value;
}

template <typename T>
inline constexpr char shared_key = 0;

}  // namespace host

template <typename T>
T& shared() {
  return *static_cast<T*>(host::shared_bytes(&host::shared_key<T>, sizeof(T)));
}

// Twin of launch() in ops/cuda/launch.cuh; runs the kernel before it returns.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, int threads,
            Arguments... arguments) {
  static_assert(kParametersFit<Parameters...>);
  auto call = [&] { kernel(static_cast<Parameters>(arguments)...); };
  host::run(
      name, grid, threads, 0, [](void* context) { (*static_cast<decltype(call)*>(context))(); },
      &call);
}

// The same with dynamic shared memory, which kernels find at host::dynamic_bytes().
template <typename Body>
void launch_dynamic(const char* name, Grid grid, int threads, int64_t bytes, Body body) {
  host::run(
      name, grid, threads, bytes, [](void* context) { (*static_cast<Body*>(context))(); }, &body);
}

}  // namespace neusemslice::cuda

inline void __syncthreads(
    neusemslice::cuda::host::Where where = neusemslice::cuda::host::Where::current()) {
  neusemslice::cuda::host::barrier(where);
}

inline void __syncwarp(
    unsigned mask = neusemslice::cuda::kAllLanes,
    neusemslice::cuda::host::Where where = neusemslice::cuda::host::Where::current()) {
  neusemslice::cuda::host::warp_barrier(mask, where);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = neusemslice::cuda::kWarp,
              neusemslice::cuda::host::Where where = neusemslice::cuda::host::Where::current()) {
  using neusemslice::cuda::host::lane;
  return neusemslice::cuda::host::shuffle(mask, value, lane() / width * width + source % width,
                                          width, where);
}

template <typename T>
T __shfl_xor_sync(
    unsigned mask, T value, int bits, int width = neusemslice::cuda::kWarp,
    neusemslice::cuda::host::Where where = neusemslice::cuda::host::Where::current()) {
  return neusemslice::cuda::host::shuffle(mask, value, neusemslice::cuda::host::lane() ^ bits,
                                          width, where);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = neusemslice::cuda::kWarp,
                 neusemslice::cuda::host::Where where = neusemslice::cuda::host::Where::current()) {
  return neusemslice::cuda::host::shuffle(mask, value, neusemslice::cuda::host::lane() - delta,
                                          width, where);
}

template <typename T>
T __shfl_down_sync(
    unsigned mask, T value, int delta, int width = neusemslice::cuda::kWarp,
    neusemslice::cuda::host::Where where = neusemslice::cuda::host::Where::current()) {
  return neusemslice::cuda::host::shuffle(mask, value, neusemslice::cuda::host::lane() + delta,
                                          width, where);
}

inline unsigned __ballot_sync(
    unsigned mask, bool vote,
    neusemslice::cuda::host::Where where = neusemslice::cuda::host::Where::current()) {
  const uint64_t* votes = neusemslice::cuda::host::exchange(mask, vote, where);
  unsigned set = 0;
  for (int i = 0; i < neusemslice::cuda::kWarp; ++i) {
    if ((mask >> i & 1u) && votes[i]) set |= 1u << i;
  }
  return set;
}

inline bool __any_sync(
    unsigned mask, bool vote,
    neusemslice::cuda::host::Where where = neusemslice::cuda::host::Where::current()) {
  return __ballot_sync(mask, vote, where) != 0;
}

inline bool __all_sync(
    unsigned mask, bool vote,
    neusemslice::cuda::host::Where where = neusemslice::cuda::host::Where::current()) {
  return __ballot_sync(mask, vote, where) == mask;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }

template <typename T>
T __ldg(const T* p) {
  return *p;
}

template <typename T>
T atomicAdd(T* p, std::type_identity_t<T> value) {
  return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}
