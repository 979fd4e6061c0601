#pragma once

// A batch and its sites as the kernels of class_stats_ see them, and what becomes of the sums that
// a block has found. Workspace is the driver's (class_stats_device.cuh).

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/class_state.h"
#include "common/elements.h"
#include "common/moments.h"
#include "ops/cuda/class_batch.cuh"
#include "ops/cuda/device.cuh"

namespace neusemslice::cuda {

constexpr int kThreads = 256;
constexpr int kRowLanes = kThreads / kWarp;  // warps of a block: rows that it reads side by side
constexpr int kChunkRows = 256;
constexpr int kMaxSites = 12;

constexpr unsigned kAll = kMean | kM2 | kMeanAbs | kMax | kActive;

// Up to kChunkRows entries of the order, of one class.
struct Chunk {
  int64_t k;
  int64_t begin;
  int64_t slot;  // of its partial sums; -1 for a class's only chunk, which needs none
  int count;
  bool first;  // of its class
};

// A class of several chunks, whose partial sums lie in slots side by side.
struct Split {
  int64_t k;
  int64_t slot;
  int64_t chunks;
};

// What the sites of a batch share. Each `room` is how many there can be at most; an order that
// class_order did not make may ask for more, and what finds no room is left out.
struct SortedBatch {
  const int64_t* order;
  const int64_t* offsets;
  const double* share;
  const double* weight;
  int64_t entries;
  int64_t samples;
  int64_t classes;
  int64_t* totals;  // numbers of chunks and of splits
  Chunk* chunks;
  Split* splits;
  int64_t* first_chunk;  // [K + 1]
  int64_t chunk_room;
  int64_t slot_room;
  int64_t split_room;

  __device__ int64_t begin(int64_t k) const { return inside(offsets[k], 0); }
  __device__ int64_t end(int64_t k) const { return inside(offsets[k + 1], begin(k)); }
  // The sample of entry i, or -1 if there is none.
  __device__ int64_t sample(int64_t i) const {
    const int64_t n = order[i];
    return n >= 0 && n < samples ? n : -1;
  }

 private:
  __device__ int64_t inside(int64_t at, int64_t low) const {
    return at < low ? low : at > entries ? entries : at;
  }
};

// Samples reduced to one value per neuron: planes of [samples, neurons], null where not asked for.
struct PooledPlanes {
  double* mean;
  double* abs;  // sum over positions
  float* active;
  float* max;
};

// Sums of chunks about their class's shift: planes of [slots, neurons], null where not asked for.
// The shift is kept with a class's first chunk.
struct PartialPlanes {
  double* shift;
  double* sum;
  double* squares;
  double* abs;
  double* active;
  float* max;
};

// One layer. Entries have weights of their own (and samples are pooled first) unless each is one
// row that counts once; the pointers for that are null then.
struct Site {
  ClassState state;  // with count and positions as they were before the batch
  double* count;     // the state's own, raised before its cells are
  double* counted_positions;
  const void* x;
  const bool* mask;
  int64_t positions;
  int64_t stride_n;
  int64_t stride_p;
  int64_t stride_c;
  double* class_weight;     // [K]
  double* class_positions;  // [K]
  int64_t* class_first;     // [K] the first entry that counts
  double* entry_weight;     // [entries]; 0 for one to skip
  int* uses;                // [samples] how many entries count for a sample
  int64_t* kept;            // [samples, positions] with a mask: the positions that it keeps
  int64_t* real;            // [samples] how many that are
  double* chunk_weight;     // [chunks]
  double* chunk_positions;  // [chunks]
  int64_t* chunk_first;     // [chunks]
  PooledPlanes pooled;
  PartialPlanes partial;
  int64_t first_block;  // of the launch's blocks (dimension x)

  __device__ int64_t real_positions(int64_t n) const { return real ? real[n] : positions; }
  // Where the rank-th of the positions lies that count for sample n.
  __device__ int64_t position(int64_t n, int64_t rank) const {
    return kept ? kept[n * positions + rank] : rank;
  }
  template <typename T>
  __device__ const T* at(int64_t n, int64_t p, int64_t c) const {
    return static_cast<const T*>(x) + n * stride_n + p * stride_p + c * stride_c;
  }
  __device__ bool known(int64_t k) const { return state.mean && state.count[k] > 0; }
};

struct Sites {
  Site sites[kMaxSites];
  int count;

  // The site of this block; its blocks follow each other.
  __device__ const Site& of_block() const {
    int i = 0;
    while (i + 1 < count && blockIdx.x >= sites[i + 1].first_block) ++i;
    return sites[i];
  }
};
static_assert(sizeof(Sites) + sizeof(SortedBatch) <= kMaxParameterBytes);

__device__ inline int warp_lane() { return static_cast<int>(threadIdx.x % kWarp); }
__device__ inline int row_lane() { return static_cast<int>(threadIdx.x / kWarp); }

template <typename V>
__device__ inline V larger(V a, V b) {
  return a > b ? a : b;
}
template <typename V>
__device__ inline V magnitude(V a) {
  return a < 0 ? -a : a;
}
// Of a value that would spoil sums.
template <typename V>
__device__ inline V zero_unless_finite(V a) {
  return is_finite(a) ? a : V(0);
}

// Sums of one neuron over a chunk; sum and squares of deviations from a shift.
struct NeuronSums {
  double sum = 0;
  double squares = 0;
  double abs = 0;
  double active = 0;
  float max = -INFINITY;
};

// Merges the sums of a whole class into the state.
__device__ inline void finish(const Site& site, int64_t k, int64_t c, double shift,
                              const NeuronSums& sums) {
  ClassCell cell;
  cell.moments = ShiftedSums{shift, sums.sum, sums.squares}.moments(site.class_weight[k]);
  cell.positions = site.class_positions[k];
  cell.mean_abs = sums.abs / cell.positions;
  cell.active = sums.active / cell.positions;
  cell.max = sums.max;
  merge_cell(site.state, k, c, cell);
}

// Merges the sums of a chunk into the state, or leaves them for merge_kernel.
__device__ inline void deliver(const Site& site, const Chunk& chunk, int64_t c, double shift,
                               const NeuronSums& sums) {
  if (chunk.slot < 0) return finish(site, chunk.k, c, shift, sums);
  const PartialPlanes& partial = site.partial;
  const int64_t at = chunk.slot * site.state.neurons + c;
  if (chunk.first) partial.shift[at] = shift;
  partial.sum[at] = sums.sum;
  if (partial.squares) partial.squares[at] = sums.squares;
  if (partial.abs) partial.abs[at] = sums.abs;
  if (partial.active) partial.active[at] = sums.active;
  if (partial.max) partial.max[at] = sums.max;
}

// Room for one value of each thread for each of V neurons, padded so that neither writing nor
// reading meets a bank twice.
template <int V>
struct RowExchange {
  static constexpr int kPitch = kWarp + 16 / V;
  double value[kRowLanes][V * kPitch];
};

// Combines what the block's warps found, in their order. Lane l of a warp holds the neurons l * V
// to l * V + V - 1 of the block's V * 32; the result for neuron t is thread t's.
template <int V, typename Combine>
__device__ double across_rows(const double (&mine)[V], const Combine& combine) {
  RowExchange<V>& room = shared<RowExchange<V>>();
  constexpr int kPitch = RowExchange<V>::kPitch;
  __syncthreads();
#pragma unroll
  for (int v = 0; v < V; ++v) room.value[row_lane()][v * kPitch + warp_lane()] = mine[v];
  __syncthreads();
  const int t = static_cast<int>(threadIdx.x);
  if (t >= V * kWarp) return 0;
  const int at = t % V * kPitch + t / V;
  double total = room.value[0][at];
#pragma unroll
  for (int r = 1; r < kRowLanes; ++r) total = combine(total, room.value[r][at]);
  return total;
}

struct Add {
  __device__ double operator()(double a, double b) const { return a + b; }
};
struct Larger {
  __device__ double operator()(double a, double b) const { return larger(a, b); }
};

// The same for all statistics of M.
template <unsigned M, int V>
__device__ NeuronSums across_rows(const double (&sum)[V], const double (&squares)[V],
                                  const double (&abs)[V], const double (&active)[V],
                                  const double (&max)[V]) {
  NeuronSums sums;
  sums.sum = across_rows(sum, Add());
  if constexpr (M & kM2) sums.squares = across_rows(squares, Add());
  if constexpr (M & kMeanAbs) sums.abs = across_rows(abs, Add());
  if constexpr (M & kActive) sums.active = across_rows(active, Add());
  if constexpr (M & kMax) sums.max = static_cast<float>(across_rows(max, Larger()));
  return sums;
}

}  // namespace neusemslice::cuda
