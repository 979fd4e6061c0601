#pragma once

// What class_stats_ finds out before it reads any x: the chunks of the batch, and for sites whose
// entries do not all count once, the weights of entries, chunks and classes. Counts are raised
// here, once their old values are kept, so that no kernel has to come last for it.

#include "ops/cuda/class_stats_site.cuh"

namespace neusemslice::cuda {

// What comes before a thread's first class.
struct ChunkCounts {
  int64_t chunks;
  int64_t slots;
  int64_t splits;

  __device__ void add(int64_t rows) {
    const int64_t n = blocks_for(rows, kChunkRows);
    chunks += n;
    slots += n > 1 ? n : 0;
    splits += n > 1 ? 1 : 0;
  }
};

struct ChunkScan {
  ChunkCounts counts[kThreads];
};

// Keeps the old count of class k and raises it.
__device__ inline void raise_class(const Site& site, int64_t k, double weight, double positions,
                                   int64_t first) {
  site.class_weight[k] = weight;
  site.class_positions[k] = positions;
  site.class_first[k] = first;
  site.state.count[k] = site.count[k];
  site.state.positions[k] = site.counted_positions[k];
  site.count[k] += weight;
  site.counted_positions[k] += positions;
}

// Block 0 makes the table of chunks. Block 1 + i raises the counts of site i, if all its entries
// count once; if not, it clears what weigh_kernel will count.
static __global__ void __launch_bounds__(kThreads)
    chunks_kernel(const __grid_constant__ SortedBatch batch, const __grid_constant__ Sites sites) {
  const int t = static_cast<int>(threadIdx.x);
  if (blockIdx.x > 0) {
    const Site& site = sites.sites[blockIdx.x - 1];
    if (site.entry_weight) {
      for (int64_t n = t; site.uses && n < batch.samples; n += kThreads) site.uses[n] = 0;
      return;
    }
    for (int64_t k = t; k < batch.classes; k += kThreads) {
      const int64_t begin = batch.begin(k);
      const double rows = static_cast<double>(batch.end(k) - begin);
      raise_class(site, k, rows, rows, begin);
    }
    return;
  }
  const int64_t per_thread = blocks_for(batch.classes, kThreads);
  const int64_t first = t * per_thread;
  const int64_t last = first + per_thread < batch.classes ? first + per_thread : batch.classes;
  ChunkCounts mine{0, 0, 0};
  for (int64_t k = first; k < last; ++k) mine.add(batch.end(k) - batch.begin(k));
  // Hillis and Steele's scan, inclusive.
  ChunkScan& scan = shared<ChunkScan>();
  ChunkCounts sum = mine;
  scan.counts[t] = sum;
  __syncthreads();
  for (int d = 1; d < kThreads; d *= 2) {
    if (t >= d) {
      const ChunkCounts& before = scan.counts[t - d];
      sum = {sum.chunks + before.chunks, sum.slots + before.slots, sum.splits + before.splits};
    }
    __syncthreads();
    scan.counts[t] = sum;
    __syncthreads();
  }
  const auto within = [](int64_t value, int64_t room) { return value < room ? value : room; };
  if (t == kThreads - 1) {
    batch.totals[0] = within(sum.chunks, batch.chunk_room);
    batch.totals[1] = within(sum.splits, batch.split_room);
    batch.first_chunk[batch.classes] = within(sum.chunks, batch.chunk_room);
  }
  ChunkCounts next{sum.chunks - mine.chunks, sum.slots - mine.slots, sum.splits - mine.splits};
  for (int64_t k = first; k < last; ++k) {
    const ChunkCounts at = next;
    const int64_t begin = batch.begin(k), rows = batch.end(k) - begin;
    next.add(rows);
    const int64_t chunks = next.chunks - at.chunks;
    batch.first_chunk[k] = within(at.chunks, batch.chunk_room);
    const bool split = chunks > 1;
    const bool fits = !split || (next.slots <= batch.slot_room && next.splits <= batch.split_room);
    for (int64_t j = 0; j < chunks && at.chunks + j < batch.chunk_room; ++j) {
      const int64_t left = rows - j * kChunkRows;
      const int count = static_cast<int>(left < kChunkRows ? left : kChunkRows);
      batch.chunks[at.chunks + j] = {k, begin + j * kChunkRows, split ? at.slots + j : -1,
                                     fits ? count : 0, j == 0};
    }
    if (split && at.splits < batch.split_room) {
      batch.splits[at.splits] = {k, at.slots, fits ? chunks : 0};
    }
  }
}

struct KeptCounts {
  int count[kRowLanes];
};

// One block for each sample of a masked site: lists the positions that the mask keeps.
static __global__ void __launch_bounds__(kThreads)
    kept_kernel(const __grid_constant__ Sites sites) {
  const Site& site = sites.of_block();
  const int64_t n = blockIdx.x - site.first_block;
  const bool* mask = site.mask + n * site.positions;
  int64_t* kept = site.kept + n * site.positions;
  KeptCounts& counts = shared<KeptCounts>();
  int64_t found = 0;
  for (int64_t base = 0; base < site.positions; base += kThreads) {
    const int64_t p = base + threadIdx.x;
    const bool keep = p < site.positions && mask[p];
    const unsigned votes = __ballot_sync(kAllLanes, keep);
    if (warp_lane() == 0) counts.count[row_lane()] = __popc(votes);
    __syncthreads();
    int64_t rank = found + __popc(votes & ((1u << warp_lane()) - 1));
    for (int w = 0; w < kRowLanes; ++w) {
      if (w < row_lane()) rank += counts.count[w];
      found += counts.count[w];
    }
    if (keep) kept[rank] = p;
    __syncthreads();
  }
  if (threadIdx.x == 0) site.real[n] = found;
}

// A batch's samples have not as many entries.
constexpr int64_t kNoEntry = INT64_MAX;

struct WeightTree {
  double weight[kThreads];
  double positions[kThreads];
  int64_t first[kThreads];
};

// Block (i, j) finds the weights of chunk j's entries at site i; a weight that is not positive and
// finite, which the CPU refuses or skips, makes its entry one to skip.
static __global__ void __launch_bounds__(kThreads)
    weigh_kernel(const __grid_constant__ SortedBatch batch, const __grid_constant__ Sites sites) {
  const Site& site = sites.sites[blockIdx.x];
  const int t = static_cast<int>(threadIdx.x);
  WeightTree& tree = shared<WeightTree>();
  for (int64_t j = blockIdx.y; j < batch.totals[0]; j += gridDim.y) {
    const Chunk chunk = batch.chunks[j];
    const int64_t i = chunk.begin + t;
    double weight = 0;
    int64_t real = 0;
    if (t < chunk.count) {
      const int64_t n = batch.sample(i);
      if (n >= 0) {
        const double s = batch.share ? batch.share[i] : 1, w = batch.weight ? batch.weight[n] : 1;
        real = site.real_positions(n);
        if (real > 0 && s > 0 && w > 0 && is_finite(s) && is_finite(w)) weight = s * w;
      }
      site.entry_weight[i] = weight;
      if (weight > 0 && site.uses) atomicAdd(&site.uses[n], 1);
    }
    tree.weight[t] = weight;
    tree.positions[t] = site.by_sample ? weight : weight * static_cast<double>(real);
    tree.first[t] = weight > 0 ? i : kNoEntry;
    for (int half = kThreads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (t >= half) continue;
      tree.weight[t] += tree.weight[t + half];
      tree.positions[t] += tree.positions[t + half];
      if (tree.first[t + half] < tree.first[t]) tree.first[t] = tree.first[t + half];
    }
    if (t == 0) {
      site.chunk_weight[j] = tree.weight[0];
      site.chunk_positions[j] = tree.positions[0];
      site.chunk_first[j] = tree.first[0];
    }
    __syncthreads();
  }
}

// One warp for each class: adds up its chunks' weights, and raises its count.
static __global__ void __launch_bounds__(kThreads)
    class_weights_kernel(const __grid_constant__ SortedBatch batch,
                         const __grid_constant__ Sites sites) {
  const Site& site = sites.of_block();
  const int64_t k = (blockIdx.x - site.first_block) * kRowLanes + row_lane();
  if (k >= batch.classes) return;
  double weight = 0, positions = 0;
  int64_t first = kNoEntry;
  for (int64_t j = batch.first_chunk[k] + warp_lane(); j < batch.first_chunk[k + 1]; j += kWarp) {
    weight += site.chunk_weight[j];
    positions += site.chunk_positions[j];
    if (site.chunk_first[j] < first) first = site.chunk_first[j];
  }
  for (int d = kWarp / 2; d > 0; d /= 2) {
    weight += __shfl_xor_sync(kAllLanes, weight, d);
    positions += __shfl_xor_sync(kAllLanes, positions, d);
    const int64_t other = __shfl_xor_sync(kAllLanes, first, d);
    first = other < first ? other : first;
  }
  if (warp_lane() == 0) raise_class(site, k, weight, positions, first);
}

// Adds up the partial sums of classes of several chunks, and merges them into the state. A block
// has 32 neurons; its warps take chunks in turn.
static __global__ void __launch_bounds__(kThreads)
    merge_chunks_kernel(const __grid_constant__ SortedBatch batch,
                        const __grid_constant__ Sites sites) {
  const Site& site = sites.of_block();
  const PartialPlanes& partial = site.partial;
  const int64_t tile = (blockIdx.x - site.first_block) * kWarp;
  const int64_t neurons = site.state.neurons;
  const int64_t c = tile + warp_lane();
  for (int64_t j = blockIdx.y; j < batch.totals[1]; j += gridDim.y) {
    const Split split = batch.splits[j];
    if (split.chunks == 0 || site.class_weight[split.k] == 0) continue;
    double sum[1] = {0}, squares[1] = {0}, abs[1] = {0}, active[1] = {0}, max[1] = {-INFINITY};
    if (c < neurons) {
#pragma unroll 4
      for (int64_t i = row_lane(); i < split.chunks; i += kRowLanes) {
        const int64_t at = (split.slot + i) * neurons + c;
        sum[0] += partial.sum[at];
        if (partial.squares) squares[0] += partial.squares[at];
        if (partial.abs) abs[0] += partial.abs[at];
        if (partial.active) active[0] += partial.active[at];
        if (partial.max) max[0] = larger(max[0], static_cast<double>(partial.max[at]));
      }
    }
    const NeuronSums sums = across_rows<kAll>(sum, squares, abs, active, max);
    if (row_lane() == 0 && c < neurons) {
      finish(site, split.k, c, partial.shift[split.slot * neurons + c], sums);
    }
  }
}

}  // namespace neusemslice::cuda
