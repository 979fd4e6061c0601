// The similarity operators for AVX-512: similarity_body.h in registers of 64 bytes.

#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
// gcc warns of the operands that its own header leaves undefined on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>

#include "common/elements.h"
#include "ops/cpu/similarity_job.h"

// Only what follows may use the wider registers: an inline function of the headers above that was
// compiled for them could be linked into code that every processor runs.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,f16c")
#endif

#define NSS_LANE_BYTES 64
namespace neusemslice::cpu {
namespace {
#include "ops/cpu/lanes.h"
// In terms of the one before.
#include "ops/cpu/similarity_body.h"
}  // namespace

extern const SimilarityLoops kSimilarityAvx512 = kLoops;
}  // namespace neusemslice::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
