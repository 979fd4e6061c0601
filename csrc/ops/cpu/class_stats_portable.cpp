// class_stats_ for any processor: class_stats_body.h in registers of 16 bytes.

#include "ops/cpu/class_stats_job.h"
#include "ops/cpu/lanes_headers.h"

#define NSS_LANE_BYTES 16
namespace neusemslice::cpu {
namespace {
// Each in terms of the one before.
#include "ops/cpu/lanes.h"

#include "ops/cpu/class_sums.h"

#include "ops/cpu/class_stats_sums.h"

#include "ops/cpu/class_stats_body.h"
}  // namespace

void accumulate_classes_portable(const ClassJob& job, int64_t first, int64_t last) {
  accumulate(job, first, last);
}
}  // namespace neusemslice::cpu
