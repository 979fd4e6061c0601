// masked_sgd_ and masked_adamw_ for any processor: masked_optim_body.h in registers of 16 bytes.

#include "ops/cpu/lanes_headers.h"
#include "ops/cpu/masked_optim_job.h"

#define NSS_LANE_BYTES 16
namespace neusemslice::cpu {
namespace {
// Each in terms of the one before.
#include "ops/cpu/lanes.h"

#include "ops/cpu/masked_optim_body.h"
}  // namespace

extern const MaskedOptimLoops kMaskedOptimPortable = kLoops;
}  // namespace neusemslice::cpu
