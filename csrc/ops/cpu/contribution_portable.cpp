// contribution_ for any processor: contribution_body.h in registers of 16 bytes.

#include "ops/cpu/contribution_job.h"
#include "ops/cpu/lanes_headers.h"

#define NSS_LANE_BYTES 16
namespace neusemslice::cpu {
namespace {
// Each in terms of the one before.
#include "ops/cpu/lanes.h"

#include "ops/cpu/class_sums.h"

#include "ops/cpu/contribution_sums.h"

#include "ops/cpu/contribution_body.h"
}  // namespace

void accumulate_contributions_portable(const ContributionJob& job, const Block& block) {
  accumulate(job, block);
}
}  // namespace neusemslice::cpu
