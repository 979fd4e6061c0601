#pragma once

// What the memory of this machine can do, for benchmarks to compare kernels with.

#include <ATen/core/Tensor.h>

#include <vector>

namespace neusemslice::cpu {

// Reads every byte of `read` once, and reads and rewrites every byte of `update` in place, with as
// many threads as operators have. Both must be contiguous int64 on the CPU. Returns a value that
// depends on all that was read, so that no read can be left out.
int64_t stream_memory(const at::Tensor& read, const at::Tensor& update);

// Moves what updates of some rows of matrices move, and computes next to nothing: reads these rows
// of `read`, and rewrites the same rows of `update` and all of `state`, which has a word, or some
// words, for each word of those rows. One call over all matrices, rows as they come, with as many
// threads as operators have. All are contiguous int64 on the CPU; rows have a multiple of 16 words.
void stream_rows(const std::vector<at::Tensor>& read, const std::vector<at::Tensor>& update,
                 const std::vector<at::Tensor>& rows, const std::vector<at::Tensor>& state);

}  // namespace neusemslice::cpu
