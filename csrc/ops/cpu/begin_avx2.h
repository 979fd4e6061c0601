// What follows, up to end_isa.h, is compiled for AVX2; as begin_avx512.h.

#include <immintrin.h>

#include "ops/cpu/lanes_headers.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define NSS_LANE_BYTES 32
