#pragma once

// What the memory of this machine can do, for benchmarks to compare kernels with.

#include <ATen/core/Tensor.h>

namespace neusemslice::cpu {

// Reads every byte of `read` once, and reads and rewrites every byte of `update` in place, with as
// many threads as operators have. Both must be contiguous int64 on the CPU. Returns a value that
// depends on all that was read, so that no read can be left out.
int64_t stream_memory(const at::Tensor& read, const at::Tensor& update);

}  // namespace neusemslice::cpu
