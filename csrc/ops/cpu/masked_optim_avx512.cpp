// masked_sgd_ and masked_adamw_ for AVX-512: masked_optim_body.h in registers of 64 bytes.

#if defined(__x86_64__)

#include "ops/cpu/masked_optim_job.h"
// The code of one instruction set begins here.
#include "ops/cpu/begin_avx512.h"

namespace neusemslice::cpu {
namespace {
// Each in terms of the one before.
#include "ops/cpu/lanes.h"

#include "ops/cpu/masked_optim_body.h"
}  // namespace

extern const MaskedOptimLoops kMaskedOptimAvx512 = kLoops;
}  // namespace neusemslice::cpu

#include "ops/cpu/end_isa.h"

#endif
