// masked_sgd_ and masked_adamw_ for AVX2: masked_optim_body.h in registers of 32 bytes.

#if defined(__x86_64__)

#include "ops/cpu/masked_optim_job.h"
// The code of one instruction set begins here.
#include "ops/cpu/begin_avx2.h"

namespace neusemslice::cpu {
namespace {
// Each in terms of the one before.
#include "ops/cpu/lanes.h"

#include "ops/cpu/masked_optim_body.h"
}  // namespace

extern const MaskedOptimLoops kMaskedOptimAvx2 = kLoops;
}  // namespace neusemslice::cpu

#include "ops/cpu/end_isa.h"

#endif
