#pragma once

// class_stats_ where each sample is one row that counts once: a block adds one chunk of rows of a
// tile of neurons. A thread owns the neurons of one 16-byte load; the block's warps take rows in
// turn, so that the order of all sums is that of the rows, whatever the layout.

#include "ops/cuda/class_stats_site.cuh"

namespace neusemslice::cuda {

constexpr int kInFlight = 4;  // loads between their begin and their use
constexpr int kRowGroup = 8;  // rows of a thread that are added in the type of the values

template <typename T>
constexpr int kVector = 16 / sizeof(T);

template <typename T>
struct Vector {
  T v[kVector<T>];
};

// `width` elements, `stride` apart; as one load where they are `whole`: adjacent, aligned and all
// there.
template <typename T>
__device__ inline Vector<T> load_vector(const T* p, int64_t stride, int width, bool whole) {
  Vector<T> x;
  if (whole) {
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(p));
    memcpy(&x, &raw, sizeof(raw));
  } else {
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) x.v[v] = v < width ? p[v * stride] : T{};
  }
  return x;
}

template <typename T>
__device__ inline bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// Blocks that a multiprocessor is to hold at least, which bounds the registers of a thread: 128,
// where they are enough for its sums.
template <typename T, unsigned M>
constexpr int kResident = kVector<T> > 4 && (M & kM2) && (M & kActive) ? 1 : 2;

// A thread's sums over its rows.
template <typename T>
struct VectorSums {
  static constexpr int kSize = kVector<T>;
  double sum[kSize] = {};
  double squares[kSize] = {};
  double abs[kSize] = {};
  int active[kSize] = {};
  ValueOf<T> max[kSize];

  __device__ VectorSums() {
#pragma unroll
    for (int v = 0; v < kSize; ++v) max[v] = -INFINITY;
  }

  template <unsigned M>
  __device__ NeuronSums across() const {
    double counts[kSize], largest[kSize];
#pragma unroll
    for (int v = 0; v < kSize; ++v) {
      counts[v] = active[v];
      largest[v] = max[v];
    }
    return across_rows<M>(sum, squares, abs, counts, largest);
  }
};

// Where a thread's neurons lie in each row.
struct Columns {
  int64_t c;
  int64_t stride;
  int width;
  bool aligned;  // rows that are aligned are read whole
};

template <typename T>
__device__ inline Columns columns_of(const Site& site, int64_t tile, int64_t row_stride) {
  constexpr int kSize = kVector<T>;
  const int64_t c = tile * kSize * kWarp + warp_lane() * kSize;
  const int64_t left = site.state.neurons - c;
  const int width = static_cast<int>(left < 0 ? 0 : left < kSize ? left : kSize);
  const bool aligned = width == kSize && site.stride_c == 1 && row_stride % kSize == 0 &&
                       site.stride_n % kSize == 0 && is_aligned(static_cast<const T*>(site.x));
  return {c, site.stride_c, width, aligned};
}

// Adds the thread's share of `count` rows; row(i) is where the thread's neurons of row i lie, null
// for a row to skip.
template <typename T, unsigned M, typename Row>
__device__ inline void add_rows(int64_t count, const Row& row, const Columns& columns,
                                const ValueOf<T> (&shift)[kVector<T>], VectorSums<T>& sums) {
  using V = ValueOf<T>;
  constexpr int kSize = kVector<T>;
  if (columns.width == 0) return;
  for (int64_t i = row_lane(); i < count; i += kRowGroup * kRowLanes) {
    V sum[kSize] = {}, squares[kSize] = {}, abs[kSize] = {};
    for (int g = 0; g < kRowGroup; g += kInFlight) {
      Vector<T> x[kInFlight];
      const T* p[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        const int64_t at = i + (g + j) * kRowLanes;
        p[j] = at < count ? row(at) : nullptr;
        if (p[j]) x[j] = load_vector(p[j], columns.stride, columns.width, columns.aligned);
      }
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (!p[j]) continue;
#pragma unroll
        for (int v = 0; v < kSize; ++v) {
          const V value = to_value(x[j].v[v]);
          if constexpr (M & kMax) sums.max[v] = larger(value, sums.max[v]);
          if constexpr (M & kActive) sums.active[v] += value > 0 ? 1 : 0;
          if constexpr (M & kMeanAbs) abs[v] += magnitude(value);
          const V deviation = value - shift[v];
          sum[v] += deviation;
          if constexpr (M & kM2) squares[v] += deviation * deviation;
        }
      }
    }
#pragma unroll
    for (int v = 0; v < kSize; ++v) {
      sums.sum[v] += static_cast<double>(sum[v]);
      if constexpr (M & kM2) sums.squares[v] += static_cast<double>(squares[v]);
      if constexpr (M & kMeanAbs) sums.abs[v] += static_cast<double>(abs[v]);
    }
  }
}

struct ChunkRows {
  int64_t sample[kChunkRows];
};

// Any shift near the mean will do, as long as it is a finite value: the mean so far, or the row of
// the class's first entry.
template <typename T>
__device__ inline ValueOf<T> row_shift(const SortedBatch& batch, const Site& site, int64_t k,
                                       int64_t c) {
  using V = ValueOf<T>;
  if (site.known(k)) {
    return zero_unless_finite(static_cast<V>(site.state.mean[k * site.state.neurons + c]));
  }
  const int64_t n = batch.sample(site.class_first[k]);
  return n < 0 ? V(0) : zero_unless_finite(to_value(*site.at<T>(n, 0, c)));
}

// Whether float32 lost nothing but roundings on the way. Small squares may have vanished and large
// ones overflowed; the square of the sum, at most n times the sum of squares, tells squares that
// vanished from zeros.
template <typename T, unsigned M>
__device__ inline bool is_exact(const NeuronSums& sums) {
  if (!is_finite(sums.sum) || !is_finite(sums.abs)) return false;
  if constexpr (std::is_same_v<ValueOf<T>, double> || !(M & kM2)) {
    return true;
  } else {
    return (sums.squares >= 0x1p-80 && sums.squares <= FLT_MAX) ||
           (sums.squares == 0 && sums.sum == 0);
  }
}

// A chunk's sums of one neuron in float64, without values that are not finite; those are counted.
template <typename T>
__device__ NeuronSums sum_again(const Site& site, const ChunkRows& rows, int count, int64_t c,
                                double shift) {
  NeuronSums sums;
  int64_t nonfinite = 0;
  for (int i = 0; i < count; ++i) {
    if (rows.sample[i] < 0) continue;
    const double found = to_value(*site.at<T>(rows.sample[i], 0, c));
    const bool finite = is_finite(found);
    const double value = finite ? found : 0, deviation = value - shift;
    sums.sum += deviation;
    sums.squares += deviation * deviation;
    sums.abs += magnitude(value);
    sums.active += value > 0 ? 1 : 0;
    if (finite) sums.max = larger(static_cast<float>(value), sums.max);
    nonfinite += finite ? 0 : 1;
  }
  count_nonfinite(site.state, c, nonfinite);
  return sums;
}

template <typename T, unsigned M>
__global__ void __launch_bounds__(kThreads, (kResident<T, M>))
    rows_kernel(const __grid_constant__ SortedBatch batch, const __grid_constant__ Sites sites) {
  using V = ValueOf<T>;
  constexpr int kSize = kVector<T>;
  const Site& site = sites.of_block();
  const int64_t tile = blockIdx.x - site.first_block;
  const Columns columns = columns_of<T>(site, tile, 0);
  const int64_t mine = tile * kSize * kWarp + threadIdx.x;  // the neuron that is this thread's
  ChunkRows& rows = shared<ChunkRows>();
  for (int64_t j = blockIdx.y; j < batch.totals[0]; j += gridDim.y) {
    const Chunk chunk = batch.chunks[j];
    if (chunk.count == 0) continue;
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < chunk.count) {
      rows.sample[threadIdx.x] = batch.sample(chunk.begin + threadIdx.x);
    }
    __syncthreads();
    V shift[kSize] = {};
#pragma unroll
    for (int v = 0; v < kSize; ++v) {
      if (v < columns.width) shift[v] = row_shift<T>(batch, site, chunk.k, columns.c + v);
    }
    VectorSums<T> sums;
    const auto row = [&](int64_t i) -> const T* {
      const int64_t n = rows.sample[i];
      return n < 0 ? nullptr : site.at<T>(n, 0, columns.c);
    };
    add_rows<T, M>(chunk.count, row, columns, shift, sums);
    NeuronSums total = sums.template across<M>();
    if (threadIdx.x < kSize * kWarp && mine < site.state.neurons) {
      const double about = row_shift<T>(batch, site, chunk.k, mine);
      if (!is_exact<T, M>(total)) total = sum_again<T>(site, rows, chunk.count, mine, about);
      deliver(site, chunk, mine, about, total);
    }
  }
}

}  // namespace neusemslice::cuda
