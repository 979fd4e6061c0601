#pragma once

// The best k of each row of a matrix that comes in tiles, free of torch. A warp owns a row and
// holds its list in registers, the best first, of equal values the lower column: entry i is lane i
// % 32's. What a tile brings is compared with the last entry of the list, and only what comes
// before it is put in, which happens about k * log(columns / k) times. No tile is sorted, and none
// is read twice for one row. A symmetric matrix needs the tiles of its upper triangle alone:
// columns have their lists, too, and read a tile through shared memory.

#include <cstdint>
#include <limits>

#include "common/similarity.h"
#include "ops/cuda/device.cuh"

namespace neusemslice::cuda {

constexpr int kNearestThreads = 256;
constexpr int kNearestWarps = kNearestThreads / kWarp;
constexpr int kRegisterRanks = 4;
constexpr int64_t kMostNearest = kRegisterRanks * kWarp;  // longer lists do not fit
constexpr int kNearestLoads = 4;                          // in flight for a lane
constexpr int kColumnRows = 128;                          // rows of a tile in shared memory at once

// Lists of all rows, [rows, k]: NaN and -1 where a row has fewer.
template <typename value_t>
struct Nearest {
  value_t* values;
  int64_t* cols;
  int64_t k;
};

// The similarities of a tile's pairs, contiguous, where in the matrix they lie, and which of them
// count; `upper` ones count for their columns as well. Unit vectors' are clamped to [-1, 1].
template <typename value_t>
struct NearestTile {
  const value_t* values;
  int64_t row;
  int64_t col;
  int64_t rows;
  int64_t cols;
  Pairs pairs;
  bool unit;

  __device__ value_t at(int64_t i, int64_t j) const {
    const value_t value = values[i * cols + j];
    return unit ? clamp_similarity(value) : value;
  }
};

// A row's list, in the registers of a warp; `there` is false for one that does not exist.
template <typename value_t, int Ranks>
class NearestList {
 public:
  __device__ __forceinline__ NearestList(const Nearest<value_t>& all, int64_t row,
                                         bool there = true)
      : values_(all.values + row * all.k), cols_(all.cols + row * all.k), k_(all.k), there_(there) {
#pragma unroll
    for (int m = 0; m < Ranks; ++m) {
      const int64_t i = m * kWarp + lane();
      col_[m] = there && i < k_ ? cols_[i] : -1;
      value_[m] = col_[m] < 0 ? -std::numeric_limits<value_t>::infinity() : values_[i];
    }
    find_last();
  }

  // Takes what every lane has found; `there` is false where it has found nothing.
  __device__ __forceinline__ void offer(bool there, value_t value, int64_t col) {
    unsigned better = __ballot_sync(kAllLanes, there && is_before(value, col, last_, last_col_));
    while (better != 0) {
      const int source = __ffs(better) - 1;
      better &= better - 1;
      const value_t v = __shfl_sync(kAllLanes, value, source);
      const int64_t c = __shfl_sync(kAllLanes, col, source);
      // The list's end may have risen meanwhile.
      if (is_before(v, c, last_, last_col_)) insert(v, c);
    }
  }

  __device__ void store() const {
#pragma unroll
    for (int m = 0; m < Ranks; ++m) {
      const int64_t i = m * kWarp + lane();
      if (!there_ || i >= k_) continue;
      cols_[i] = col_[m];
      values_[i] = col_[m] < 0 ? std::numeric_limits<value_t>::quiet_NaN() : value_[m];
    }
  }

 private:
  __device__ static int lane() { return static_cast<int>(threadIdx.x % kWarp); }

  // Entries without a column come last; NaN comes before nothing.
  __device__ __forceinline__ static bool is_before(value_t a, int64_t a_col, value_t b,
                                                   int64_t b_col) {
    return a > b || (a == b && static_cast<uint64_t>(a_col) < static_cast<uint64_t>(b_col));
  }

  __device__ __forceinline__ void insert(value_t value, int64_t col) {
    int before = 0;
#pragma unroll
    for (int m = 0; m < Ranks; ++m) {
      before += __popc(__ballot_sync(kAllLanes, is_before(value_[m], col_[m], value, col)));
    }
    value_t carried = value;
    int64_t carried_col = col;
#pragma unroll
    for (int m = 0; m < Ranks; ++m) {
      const int i = m * kWarp + lane();
      value_t v = __shfl_up_sync(kAllLanes, value_[m], 1);
      int64_t c = __shfl_up_sync(kAllLanes, col_[m], 1);
      const value_t pushed = __shfl_sync(kAllLanes, value_[m], kWarp - 1);
      const int64_t pushed_col = __shfl_sync(kAllLanes, col_[m], kWarp - 1);
      if (lane() == 0) v = carried, c = carried_col;
      if (i > before) value_[m] = v, col_[m] = c;
      if (i == before) value_[m] = value, col_[m] = col;
      carried = pushed;
      carried_col = pushed_col;
    }
    find_last();
  }

  __device__ __forceinline__ void find_last() {
    const int source = static_cast<int>((k_ - 1) % kWarp);
#pragma unroll
    for (int m = 0; m < Ranks; ++m) {
      if ((k_ - 1) / kWarp != m) continue;
      last_ = __shfl_sync(kAllLanes, value_[m], source);
      last_col_ = __shfl_sync(kAllLanes, col_[m], source);
    }
  }

  value_t* values_;
  int64_t* cols_;
  int64_t k_;
  bool there_;
  value_t value_[Ranks];
  int64_t col_[Ranks];
  value_t last_;
  int64_t last_col_;
};

// Puts a tile's columns into the lists of its rows: a warp for each row.
template <typename value_t, int Ranks>
__global__ void __launch_bounds__(kNearestThreads)
    nearest_rows_kernel(NearestTile<value_t> tile, Nearest<value_t> all) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int64_t i = blockIdx.x * static_cast<int64_t>(kNearestWarps) + threadIdx.x / kWarp;
  if (i >= tile.rows) return;
  NearestList<value_t, Ranks> list(all, tile.row + i);
  for (int64_t j = 0; j < tile.cols; j += kNearestLoads * kWarp) {
    value_t value[kNearestLoads];
#pragma unroll
    for (int load = 0; load < kNearestLoads; ++load) {
      const int64_t at = j + load * kWarp + lane;
      value[load] = at < tile.cols ? tile.at(i, at) : value_t(0);
    }
#pragma unroll
    for (int load = 0; load < kNearestLoads; ++load) {
      const int64_t at = j + load * kWarp + lane, col = tile.col + at;
      list.offer(at < tile.cols && is_included(tile.pairs, tile.row + i, col), value[load], col);
    }
  }
  list.store();
}

template <typename value_t>
struct NearestColumns {
  value_t values[kColumnRows][kWarp + 1];
};

// Puts a tile's rows into the lists of its columns. A block has 32 columns, and each of its warps
// the lists of four of them.
template <typename value_t, int Ranks>
__global__ void __launch_bounds__(kNearestThreads, 1)
    nearest_columns_kernel(NearestTile<value_t> tile, Nearest<value_t> all) {
  constexpr int kColumns = kWarp / kNearestWarps;
  static_assert(kColumns == 4);
  NearestColumns<value_t>& part = shared<NearestColumns<value_t>>();
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int warp = static_cast<int>(threadIdx.x / kWarp);
  const int64_t first = blockIdx.x * static_cast<int64_t>(kWarp);
  const int64_t mine = first + warp * kColumns, col = tile.col + mine;
  NearestList<value_t, Ranks> lists[kColumns] = {
      {all, col, mine < tile.cols},
      {all, col + 1, mine + 1 < tile.cols},
      {all, col + 2, mine + 2 < tile.cols},
      {all, col + 3, mine + 3 < tile.cols},
  };
  for (int64_t base = 0; base < tile.rows; base += kColumnRows) {
    __syncthreads();
#pragma unroll
    for (int step = 0; step < kColumnRows; step += kNearestWarps) {
      const int i = step + warp;
      const bool inside = base + i < tile.rows && first + lane < tile.cols;
      part.values[i][lane] = inside ? tile.at(base + i, first + lane) : value_t(0);
    }
    __syncthreads();
    for (int i = lane; i < kColumnRows; i += kWarp) {
      const int64_t row = tile.row + base + i;
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const bool counts = base + i < tile.rows && mine + n < tile.cols && row < col + n;
        lists[n].offer(counts, part.values[i][warp * kColumns + n], row);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kColumns; ++n) lists[n].store();
}

// Puts a tile into the lists; 1 <= k <= kMostNearest.
template <typename value_t>
void add_nearest(const NearestTile<value_t>& tile, const Nearest<value_t>& all) {
  const auto launch_with = [&](auto rows_kernel, auto columns_kernel) {
    launch("nearest_rows_kernel", rows_kernel, {blocks_for(tile.rows, kNearestWarps)},
           kNearestThreads, tile, all);
    if (tile.pairs != Pairs::upper) return;
    launch("nearest_columns_kernel", columns_kernel, {blocks_for(tile.cols, kWarp)},
           kNearestThreads, tile, all);
  };
  if (all.k <= kWarp) {
    launch_with(&nearest_rows_kernel<value_t, 1>, &nearest_columns_kernel<value_t, 1>);
  } else {
    launch_with(&nearest_rows_kernel<value_t, kRegisterRanks>,
                &nearest_columns_kernel<value_t, kRegisterRanks>);
  }
}

}  // namespace neusemslice::cuda
