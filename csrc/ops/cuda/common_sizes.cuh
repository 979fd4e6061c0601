#pragma once

// Sizes of the intersections of packed sets, tile by tile, free of torch. Rows and columns of a
// tile pass through shared memory, 1024 elements at a time, and bit_product() multiplies: the 1-bit
// matrix units from sm_80 on, shuffles and popcounts elsewhere.

#include <cstdint>

#include "ops/cuda/device.cuh"

namespace neusemslice::cuda {

constexpr int kSetThreads = 256;
constexpr int kSetSide = 64;   // rows and columns of a block; a warp has 16 rows and 32 columns
constexpr int kSetWords = 16;  // of 64 bits, in shared memory at once
constexpr int kBitRows = 16;
constexpr int kBitCols = 8;
constexpr int kBitWords = 8;  // of 32 bits

// Adds to `counts` the sizes of the intersections of 16 rows and 8 columns of 256 bits each. With
// g = lane / 4 and t = lane % 4, a lane holds words t and t + 4 of the rows g and g + 8 in `rows`
// (word t of both first) and of the column g in `cols`, and is given the counts of the columns 2t
// and 2t + 1 with the row g and then with the row g + 8. As PTX lays out mma.m16n8k256.
__device__ inline void bit_product(int (&counts)[4], const unsigned (&rows)[4],
                                   const unsigned (&cols)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(counts[0]), "+r"(counts[1]), "+r"(counts[2]), "+r"(counts[3])
      : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(cols[0]), "r"(cols[1]));
#else
  const int lane = static_cast<int>(threadIdx.x % kWarp), g = lane / 4, t = lane % 4;
  for (int from = 0; from < 4; ++from) {
    unsigned row[4], col[2][2];
    for (int i = 0; i < 4; ++i) row[i] = __shfl_sync(kAllLanes, rows[i], 4 * g + from);
    for (int j = 0; j < 2; ++j) {
      for (int i = 0; i < 2; ++i) {
        col[j][i] = __shfl_sync(kAllLanes, cols[i], 4 * (2 * t + j) + from);
      }
    }
    for (int j = 0; j < 2; ++j) {
      counts[j] += __popc(row[0] & col[j][0]) + __popc(row[2] & col[j][1]);
      counts[2 + j] += __popc(row[1] & col[j][0]) + __popc(row[3] & col[j][1]);
    }
  }
#endif
}

// Words of a block's sets, padded so that the lanes of a warp meet no bank twice.
struct SetWords {
  static constexpr int kPitch = 2 * kSetWords + 4;
  unsigned rows[kSetSide][kPitch];
  unsigned cols[kSetSide][kPitch];
};

// Copies words first_word and on of up to kSetSide sets, those that are not there as empty sets.
__device__ inline void load_sets(const int64_t* sets, int64_t count, int64_t words,
                                 int64_t first_word, unsigned (&to)[kSetSide][SetWords::kPitch]) {
  for (int i = static_cast<int>(threadIdx.x); i < kSetSide * kSetWords; i += kSetThreads) {
    const int set = i / kSetWords, w = i % kSetWords;
    const bool inside = set < count && first_word + w < words;
    const uint64_t word = inside ? static_cast<uint64_t>(sets[set * words + first_word + w]) : 0;
    to[set][2 * w] = static_cast<unsigned>(word);
    to[set][2 * w + 1] = static_cast<unsigned>(word >> 32);
  }
}

// Calls visit(i, j, common) for each pair of the block's row i and column j, i < rows and j < cols;
// `a` and `b` are the first of them.
template <typename Visit>
__device__ void visit_common_sizes(const int64_t* a, const int64_t* b, int64_t rows, int64_t cols,
                                   int64_t words, const Visit& visit) {
  constexpr int kTiles = kSetSide / 2 / kBitCols;
  SetWords& part = shared<SetWords>();
  const int lane = static_cast<int>(threadIdx.x % kWarp), g = lane / 4, t = lane % 4;
  const int warp = static_cast<int>(threadIdx.x / kWarp);
  const int row = warp / 2 * kBitRows + g, col = warp % 2 * (kSetSide / 2);
  int counts[kTiles][4] = {};
  for (int64_t first = 0; first < words; first += kSetWords) {
    __syncthreads();
    load_sets(a, rows, words, first, part.rows);
    load_sets(b, cols, words, first, part.cols);
    __syncthreads();
#pragma unroll
    for (int w = t; w < 2 * kSetWords; w += kBitWords) {
      const unsigned of_rows[4] = {part.rows[row][w], part.rows[row + 8][w], part.rows[row][w + 4],
                                   part.rows[row + 8][w + 4]};
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const unsigned (&of)[SetWords::kPitch] = part.cols[col + n * kBitCols + g];
        const unsigned of_cols[2] = {of[w], of[w + 4]};
        bit_product(counts[n], of_rows, of_cols);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t r = row + i / 2 * 8, c = col + n * kBitCols + 2 * t + i % 2;
      if (r < rows && c < cols) visit(r, c, int64_t{counts[n][i]});
    }
  }
}

}  // namespace neusemslice::cuda
