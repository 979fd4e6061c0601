#pragma once

// What device code includes: CUDA and launch(), or for a C++ compiler the simulated device of the
// C++ tests (tests/cpp/cuda_host.h).

#if defined(__CUDACC__)
#include "ops/cuda/launch.cuh"
#else
#include "cuda_host.h"
#endif
