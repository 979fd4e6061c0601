// The similarity operators for AVX-512: similarity_body.h in registers of 64 bytes.

#if defined(__x86_64__)

#include "ops/cpu/similarity_job.h"
// The code of one instruction set begins here.
#include "ops/cpu/begin_avx512.h"

namespace neusemslice::cpu {
namespace {
// Each in terms of the one before.
#include "ops/cpu/lanes.h"

#include "ops/cpu/similarity_body.h"
}  // namespace

extern const SimilarityLoops kSimilarityAvx512 = kLoops;
}  // namespace neusemslice::cpu

#include "ops/cpu/end_isa.h"

#endif
