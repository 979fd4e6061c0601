#pragma once

// Marks a function that both the host compiler and the CUDA compiler must build, so that a
// kernel's arithmetic is written once.
#if defined(__CUDACC__)
#define NSS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define NSS_HOST_DEVICE inline
#endif
