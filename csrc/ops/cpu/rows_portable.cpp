// Gradients of tuned rows for any processor: rows_body.h in registers of 16 bytes.

#include "ops/cpu/lanes_headers.h"
#include "ops/cpu/rows_job.h"

#define NSS_LANE_BYTES 16
namespace neusemslice::cpu {
namespace {
// Each in terms of the one before.
#include "ops/cpu/lanes.h"

#include "ops/cpu/rows_body.h"
}  // namespace

const RowsLoops kRowsPortable{&pack_grad, &conv_rows, &row_sums};
}  // namespace neusemslice::cpu
