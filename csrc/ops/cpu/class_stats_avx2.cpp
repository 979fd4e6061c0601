// class_stats_ for AVX2: class_stats_body.h in registers of 32 bytes.

#if defined(__x86_64__)

#include "ops/cpu/class_stats_job.h"
// The code of one instruction set begins here.
#include "ops/cpu/begin_avx2.h"

namespace neusemslice::cpu {
namespace {
// Each in terms of the one before.
#include "ops/cpu/lanes.h"

#include "ops/cpu/class_sums.h"

#include "ops/cpu/class_stats_sums.h"

#include "ops/cpu/class_stats_body.h"
}  // namespace

void accumulate_classes_avx2(const ClassJob& job, int64_t first, int64_t last) {
  accumulate(job, first, last);
}
}  // namespace neusemslice::cpu

#include "ops/cpu/end_isa.h"

#endif
