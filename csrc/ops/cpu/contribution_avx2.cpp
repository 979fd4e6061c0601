// contribution_ for AVX2: contribution_body.h in registers of 32 bytes.

#if defined(__x86_64__)

#include "ops/cpu/contribution_job.h"
// The code of one instruction set begins here.
#include "ops/cpu/begin_avx2.h"

namespace neusemslice::cpu {
namespace {
// Each in terms of the one before.
#include "ops/cpu/lanes.h"

#include "ops/cpu/class_sums.h"

#include "ops/cpu/contribution_sums.h"

#include "ops/cpu/contribution_body.h"
}  // namespace

void accumulate_contributions_avx2(const ContributionJob& job, const Block& block) {
  accumulate(job, block);
}
}  // namespace neusemslice::cpu

#include "ops/cpu/end_isa.h"

#endif
