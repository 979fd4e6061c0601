// The similarity operators for any processor: similarity_body.h in registers of 16 bytes.

#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>

#include "common/elements.h"
#include "ops/cpu/similarity_job.h"

#define NSS_LANE_BYTES 16
namespace neusemslice::cpu {
namespace {
#include "ops/cpu/lanes.h"
// In terms of the one before.
#include "ops/cpu/similarity_body.h"
}  // namespace

extern const SimilarityLoops kSimilarityPortable = kLoops;
}  // namespace neusemslice::cpu
