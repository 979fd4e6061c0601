// Gradients of tuned rows for AVX-512: rows_body.h in registers of 64 bytes.

#if defined(__x86_64__)

#include "ops/cpu/rows_job.h"
// The code of one instruction set begins here.
#include "ops/cpu/begin_avx512.h"

namespace neusemslice::cpu {
namespace {
// Each in terms of the one before.
#include "ops/cpu/lanes.h"

#include "ops/cpu/rows_body.h"
}  // namespace

const RowsLoops kRowsAvx512{&pack_grad, &conv_rows, &row_sums};
}  // namespace neusemslice::cpu

#include "ops/cpu/end_isa.h"

#endif
