// The similarity operators for AVX2: similarity_body.h in registers of 32 bytes.

#if defined(__x86_64__)

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
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif

#define NSS_LANE_BYTES 32
namespace neusemslice::cpu {
namespace {
#include "ops/cpu/lanes.h"
// In terms of the one before.
#include "ops/cpu/similarity_body.h"
}  // namespace

extern const SimilarityLoops kSimilarityAvx2 = kLoops;
}  // namespace neusemslice::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
