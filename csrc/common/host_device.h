#pragma once

// Marks a function that both the host compiler and the CUDA compiler must build, so that a
// kernel's arithmetic is written once. On the host it becomes part of its caller.
#if defined(__CUDACC__)
#define NSS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define NSS_HOST_DEVICE inline __attribute__((always_inline))
#endif
