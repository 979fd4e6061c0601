// class_stats_ for AVX2: class_stats_body.h in registers of 32 bytes.

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "ops/cpu/class_stats_job.h"
#include "ops/cpu/elements.h"

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
// Each in terms of the one before.
#include "ops/cpu/class_stats_sums.h"

#include "ops/cpu/class_stats_body.h"
}  // namespace

void accumulate_classes_avx2(const ClassJob& job, int64_t first, int64_t last) {
  accumulate(job, first, last);
}
}  // namespace neusemslice::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
