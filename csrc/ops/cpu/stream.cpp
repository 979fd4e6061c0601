#include "ops/cpu/stream.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "ops/checks.h"

namespace neusemslice::cpu {
namespace {

constexpr int64_t kLine = 16;  // words per iteration: two lines, in eight registers of 16 bytes

int64_t checked_size(const at::Tensor& t, const char* name) {
  check_dtype(t, at::kLong, "stream_memory", name);
  check_device(t, at::kCPU, "stream_memory", name);
  check_contiguous(t, "stream_memory", name);
  return t.numel() / kLine;
}

}  // namespace

int64_t stream_memory(const at::Tensor& read, const at::Tensor& update) {
  const int64_t reads = checked_size(read, "read");
  const int64_t updates = checked_size(update, "update");
  const int64_t* from = read.const_data_ptr<int64_t>();
  int64_t* both = update.mutable_data_ptr<int64_t>();
  const int64_t parts = at::get_num_threads();
  std::atomic<int64_t> result{0};
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    int64_t sums[kLine] = {};
    for (int64_t i = reads * begin / parts; i < reads * end / parts; ++i) {
      for (int64_t j = 0; j < kLine; ++j) sums[j] ^= from[i * kLine + j];
    }
    for (int64_t i = updates * begin / parts; i < updates * end / parts; ++i) {
      for (int64_t j = 0; j < kLine; ++j) both[i * kLine + j] ^= 1;
    }
    int64_t all = 0;
    for (const int64_t s : sums) all ^= s;
    result ^= all;
  });
  return result;
}

}  // namespace neusemslice::cpu
