#include "ops/cpu/stream.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "ops/checks.h"

namespace neusemslice::cpu {
namespace {

constexpr int64_t kLine = 16;  // words per iteration: two lines, in eight registers of 16 bytes

int64_t checked_size(const at::Tensor& t, const char* op, const char* name) {
  check_dtype(t, at::kLong, op, name);
  check_device(t, at::kCPU, op, name);
  check_contiguous(t, op, name);
  return t.numel() / kLine;
}

// A matrix of which some rows are streamed.
struct Matrix {
  const int64_t* read;
  int64_t* update;
  const int64_t* rows;
  int64_t* state;
  int64_t count, width, states;  // of rows, words of a row, rows of state for each

  void stream(int64_t r) const {
    constexpr int64_t kAhead = 4 * kLine;
    const int64_t here = rows[r] * width, there = rows[std::min(r + 1, count - 1)] * width;
    int64_t* own = state + r * states * width;
    for (int64_t i = 0; i < width; i += kLine) {
      const int64_t ahead = i + kAhead < width ? here + i + kAhead : there + i + kAhead - width;
      for (int64_t j = 0; j < kLine; j += kLine / 2) {
        __builtin_prefetch(read + ahead + j);
        __builtin_prefetch(update + ahead + j);
      }
      for (int64_t j = 0; j < kLine; ++j) update[here + i + j] ^= read[here + i + j];
      for (int64_t s = 0; s < states; ++s) {
        for (int64_t j = 0; j < kLine; ++j) own[s * kLine + j] ^= 1;
      }
      own += states * kLine;
    }
  }
};

Matrix checked_matrix(const at::Tensor& read, const at::Tensor& update, const at::Tensor& rows,
                      const at::Tensor& state) {
  constexpr const char* kOp = "stream_rows";
  checked_size(read, kOp, "read");
  checked_size(update, kOp, "update");
  checked_size(rows, kOp, "rows");
  checked_size(state, kOp, "state");
  const int64_t count = rows.numel();
  TORCH_CHECK_VALUE(update.dim() == 2 && update.size(1) % kLine == 0, kOp,
                    ": update must be a matrix with a multiple of ", kLine, " columns, got ",
                    update.sizes());
  const int64_t width = update.size(1), words = count * width;
  TORCH_CHECK_VALUE(read.sizes() == update.sizes() && words > 0 && state.numel() % words == 0, kOp,
                    ": read or state does not fit update of ", update.sizes());
  const int64_t* row = rows.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < count; ++r) {
    TORCH_CHECK_VALUE(row[r] >= 0 && row[r] < update.size(0), kOp, ": there is no row ", row[r]);
  }
  return {read.const_data_ptr<int64_t>(),
          update.mutable_data_ptr<int64_t>(),
          row,
          state.mutable_data_ptr<int64_t>(),
          count,
          width,
          state.numel() / words};
}

}  // namespace

int64_t stream_memory(const at::Tensor& read, const at::Tensor& update) {
  const int64_t reads = checked_size(read, "stream_memory", "read");
  const int64_t updates = checked_size(update, "stream_memory", "update");
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

void stream_rows(const std::vector<at::Tensor>& read, const std::vector<at::Tensor>& update,
                 const std::vector<at::Tensor>& rows, const std::vector<at::Tensor>& state) {
  TORCH_CHECK_VALUE(
      read.size() == update.size() && rows.size() == update.size() && state.size() == update.size(),
      "stream_rows: needs as many of each");
  std::vector<Matrix> matrices;
  int64_t total = 0;
  for (size_t k = 0; k < update.size(); ++k) {
    matrices.push_back(checked_matrix(read[k], update[k], rows[k], state[k]));
    total += matrices[k].count;
  }
  const int64_t parts = at::get_num_threads();
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    int64_t first = total * begin / parts, last = total * end / parts;
    for (const Matrix& m : matrices) {
      for (int64_t r = std::max<int64_t>(first, 0); r < std::min(last, m.count); ++r) m.stream(r);
      first -= m.count;
      last -= m.count;
    }
  });
}

}  // namespace neusemslice::cpu
