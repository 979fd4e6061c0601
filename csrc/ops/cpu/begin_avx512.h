// What follows, up to end_isa.h, is compiled for AVX-512, with BITALG and VBMI2 where NSS_BITALG is
// defined.
// Without an include guard: each kernel's file of that instruction set begins its own.

#if defined(__GNUC__) && !defined(__clang__)
// gcc warns of the operands that its own header leaves undefined on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include "ops/cpu/lanes_headers.h"

// Only what follows may use the wider registers: an inline function of the headers above that was
// compiled for them could be linked into code that every processor runs.
#if defined(__clang__) && defined(NSS_BITALG)
#pragma clang attribute push(                                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bitalg,avx512vbmi2,f16c"))), \
    apply_to = function)
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#if defined(NSS_BITALG)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bitalg,avx512vbmi2,f16c")
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,f16c")
#endif
#endif

#define NSS_LANE_BYTES 64
