// The similarity operators for any processor: similarity_body.h in registers of 16 bytes.

#include "ops/cpu/lanes_headers.h"
#include "ops/cpu/similarity_job.h"

#define NSS_LANE_BYTES 16
namespace neusemslice::cpu {
namespace {
// Each in terms of the one before.
#include "ops/cpu/lanes.h"

#include "ops/cpu/similarity_body.h"
}  // namespace

extern const SimilarityLoops kSimilarityPortable = kLoops;
}  // namespace neusemslice::cpu
