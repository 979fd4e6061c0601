#pragma once

// What the CPU kernels of sets and of rows share: the walk over the tiles of the matrix of pairs,
// and what is done with a tile's values.
//
// A tile is computed in one way whatever is asked for, so edges and neighbours have the bits of the
// dense result. Of one tensor, only tiles on and above the diagonal are computed; each then serves
// its rows and its columns. Threads take tiles one after the other. No result depends on the order:
// dense values have one place each, edges are sorted by tile, and the best neighbours are the best
// in whatever order they come.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

#include "ops/cpu/similarity_job.h"
#include "ops/similarity.h"

namespace neusemslice::ops {

// The loops for the instruction set in use.
const cpu::SimilarityLoops& similarity_loops();

using cpu::kTile;

// The tiles of a rows x cols matrix, or of its upper triangle, in an order in which neighbours
// share neither rows nor columns, as far as there are others.
class TileGrid {
 public:
  TileGrid(int64_t rows, int64_t cols, bool upper)
      : rows_(rows),
        cols_(cols),
        high_((rows + kTile - 1) / kTile),
        wide_((cols + kTile - 1) / kTile),
        upper_(upper) {}

  int64_t count() const { return upper_ ? high_ * (high_ + 1) / 2 : high_ * wide_; }

  // In the upper triangle, the block I meets (I + d) % n for d up to n / 2: each pair of blocks
  // once, because the last d of an even n ends half way.
  Tile operator[](int64_t i) const {
    int64_t high = i % high_;
    int64_t wide = (high + i / high_) % wide_;
    if (upper_ && wide < high) std::swap(high, wide);
    const int64_t row = high * kTile, col = wide * kTile;
    return {row, col, std::min(kTile, rows_ - row), std::min(kTile, cols_ - col)};
  }

 private:
  int64_t rows_;
  int64_t cols_;
  int64_t high_;
  int64_t wide_;
  bool upper_;
};

// Calls visit(tile) for each tile, where each thread has its own visit = make().
template <typename Make>
void visit_tiles(const TileGrid& grid, Make make) {
  std::atomic<int64_t> next{0};
  // parallel_for runs a lone item outside of a parallel region, where BLAS would take all threads;
  // a second item prevents that.
  const int64_t workers = std::max(at::get_num_threads(), 2);
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    const PlainDispatch plain;
    auto visit = make();
    for (int64_t i = next++; i < grid.count(); i = next++) visit(grid[i]);
  });
}

// The values of a tile, kTile apart from row to row. For the pair of row i and column j,
// values[i * kTile + j] is the similarity of row to column, and mirror the same place of column to
// row; the two may be the same array.
template <typename value_t>
struct TileValues {
  const value_t* values;
  const value_t* mirror;
};

// The first column of a tile that row i pairs with: in the upper triangle the one after itself.
inline int64_t first_partner(const Tile& tile, int64_t i, bool upper) {
  return upper ? std::max<int64_t>(0, tile.row + i + 1 - tile.col) : 0;
}

template <typename value_t>
int64_t find_values(const value_t* values, value_t bound, const value_t* mirror,
                    const value_t* bounds, int64_t first, int64_t cols, cpu::Found* found) {
  if constexpr (std::is_same_v<value_t, double>) {
    return similarity_loops().find_doubles(values, bound, mirror, bounds, first, cols, found);
  } else {
    return similarity_loops().find_floats(values, bound, mirror, bounds, first, cols, found);
  }
}

// ---- Dense ----

// Writes a tile, and with `upper` its reflection too. Tiles on the diagonal are taken from their
// upper triangle.
template <typename value_t>
void write_tile(const Tile& tile, const TileValues<value_t>& in, bool upper, int64_t cols,
                value_t* out) {
  constexpr int64_t kLine = 16;  // values that are written side by side
  for (int64_t i = 0; i < tile.rows; ++i) {
    const int64_t first = std::max<int64_t>(0, first_partner(tile, i, upper) - (upper ? 1 : 0));
    std::copy(in.values + i * kTile + first, in.values + i * kTile + tile.cols,
              out + (tile.row + i) * cols + tile.col + first);
  }
  if (!upper) return;
  for (int64_t begin = 0; begin < tile.rows; begin += kLine) {
    const int64_t end = std::min(begin + kLine, tile.rows);
    for (int64_t j = 0; j < tile.cols; ++j) {
      // Rows above the diagonal.
      const int64_t last = std::min(end, tile.col + j - tile.row);
      value_t* const target = out + (tile.col + j) * cols + tile.row;
      for (int64_t i = begin; i < last; ++i) target[i] = in.mirror[i * kTile + j];
    }
  }
}

// ---- Edges ----

template <typename value_t>
struct TileEdge {
  uint16_t row;
  uint16_t col;
  value_t value;
};

// Edges of tiles that come in any order, made into tensors sorted by (row, col).
template <typename value_t>
class EdgeParts {
 public:
  using Edges = std::vector<TileEdge<value_t>>;

  // The edges of a tile, in the order of their columns for each row. Those of a tile and those of
  // its reflection are two parts.
  void add(int64_t row, int64_t col, const Edges& edges) {
    if (edges.empty()) return;
    Edges exact(edges.begin(), edges.end());
    const std::lock_guard<std::mutex> lock(mutex_);
    parts_.push_back({row, col, std::move(exact)});
  }

  EdgeTensors sorted(const at::TensorOptions& options) {
    // A part on the diagonal and its reflection have one place; the latter's columns come first.
    std::sort(parts_.begin(), parts_.end(), [](const Part& a, const Part& b) {
      if (a.row != b.row) return a.row < b.row;
      if (a.col != b.col) return a.col < b.col;
      return a.edges[0].col < a.edges[0].row && b.edges[0].col > b.edges[0].row;
    });
    // Where the parts of a block of rows begin, and their edges.
    std::vector<std::pair<size_t, int64_t>> blocks;
    int64_t count = 0;
    for (size_t p = 0; p < parts_.size(); ++p) {
      if (p == 0 || parts_[p].row != parts_[p - 1].row) blocks.emplace_back(p, count);
      count += static_cast<int64_t>(parts_[p].edges.size());
    }
    blocks.emplace_back(parts_.size(), count);
    at::Tensor row = at::empty({count}, options.dtype(at::kLong));
    at::Tensor col = at::empty({count}, options.dtype(at::kLong));
    at::Tensor value = at::empty({count}, options);
    int64_t* row_out = row.mutable_data_ptr<int64_t>();
    int64_t* col_out = col.mutable_data_ptr<int64_t>();
    value_t* value_out = value.mutable_data_ptr<value_t>();
    const auto write = [&](size_t block) {
      const auto begin = parts_.begin() + static_cast<int64_t>(blocks[block].first);
      const auto end = parts_.begin() + static_cast<int64_t>(blocks[block + 1].first);
      int64_t next[kTile + 1] = {blocks[block].second};
      for (auto part = begin; part != end; ++part) {
        for (const auto& edge : part->edges) ++next[edge.row + 1];
      }
      for (int64_t r = 0; r < kTile; ++r) next[r + 1] += next[r];
      for (auto part = begin; part != end; ++part) {
        for (const auto& edge : part->edges) {
          const int64_t i = next[edge.row]++;
          row_out[i] = part->row + edge.row;
          col_out[i] = part->col + edge.col;
          value_out[i] = edge.value;
        }
        Edges().swap(part->edges);
      }
    };
    at::parallel_for(0, static_cast<int64_t>(blocks.size()) - 1, 1,
                     [&](int64_t first, int64_t last) {
                       for (int64_t b = first; b < last; ++b) write(static_cast<size_t>(b));
                     });
    return {row, col, value};
  }

 private:
  struct Part {
    int64_t row;
    int64_t col;
    Edges edges;
  };

  std::mutex mutex_;
  std::vector<Part> parts_;
};

// The edges of a tile of values.
template <typename value_t>
std::vector<TileEdge<value_t>> tile_edges(const Tile& tile, const TileValues<value_t>& in,
                                          bool upper, double threshold) {
  // No value lies between the threshold and the next of its type.
  value_t bound = static_cast<value_t>(threshold);
  if (bound < threshold) bound = std::nextafter(bound, std::numeric_limits<value_t>::infinity());
  value_t bounds[kTile];
  std::fill_n(bounds, kTile, std::numeric_limits<value_t>::quiet_NaN());
  cpu::Found found[cpu::kFound];
  std::vector<TileEdge<value_t>> edges;
  for (int64_t i = 0; i < tile.rows; ++i) {
    const value_t* values = in.values + i * kTile;
    const int64_t count =
        find_values(values, bound, values, bounds, first_partner(tile, i, upper), tile.cols, found);
    for (int64_t f = 0; f < count; ++f) {
      edges.push_back(
          {static_cast<uint16_t>(i), static_cast<uint16_t>(found[f]), values[found[f]]});
    }
  }
  return edges;
}

// ---- Nearest neighbours ----

// The k best of those that each row has met: greater values first, of equal ones the lower index.
// NaN is never met. A thread that works on a block of kTile rows holds its lock.
template <typename value_t>
class Nearest {
 public:
  // No row has more than `cols` to meet.
  Nearest(int64_t rows, int64_t cols, int64_t k)
      : asked_(k),
        k_(std::clamp<int64_t>(k, 1, std::max<int64_t>(1, cols))),
        best_(rows * k_),
        counts_(rows, 0),
        locks_((rows + kTile - 1) / kTile) {}

  std::mutex& lock_of(int64_t row) { return locks_[row / kTile]; }

  // What a value must reach to be among the best, if its index is at least `index`.
  value_t bound(int64_t row, int64_t index) const {
    if (counts_[row] < k_) return -std::numeric_limits<value_t>::infinity();
    const Neighbour& worst = best_[row * k_];
    if (worst.index > index) return worst.value;
    return std::nextafter(worst.value, std::numeric_limits<value_t>::infinity());
  }

  void add(int64_t row, int64_t index, value_t value) {
    const Neighbour candidate{value, index};
    Neighbour* const heap = best_.data() + row * k_;
    int64_t& count = counts_[row];
    if (count < k_) {
      heap[count++] = candidate;
      if (count == k_) std::make_heap(heap, heap + k_, is_better);
    } else if (is_better(candidate, heap[0])) {
      replace_worst(heap, candidate);
    }
  }

  // Adds the pairs of a tile to its rows, and with `upper` to its columns. Both blocks are locked.
  void add_tile(const Tile& tile, const TileValues<value_t>& in, bool upper) {
    value_t bounds[kTile];
    const value_t never = std::numeric_limits<value_t>::quiet_NaN();
    for (int64_t j = 0; j < tile.cols; ++j) {
      bounds[j] = upper ? bound(tile.col + j, tile.row) : never;
    }
    cpu::Found found[cpu::kFound];
    for (int64_t i = 0; i < tile.rows; ++i) {
      const int64_t r = tile.row + i;
      const value_t* values = in.values + i * kTile;
      const value_t* mirror = in.mirror + i * kTile;
      const int64_t count = find_values(values, bound(r, tile.col), mirror, bounds,
                                        first_partner(tile, i, upper), tile.cols, found);
      for (int64_t f = 0; f < count; ++f) {
        const int64_t j = found[f];
        if (!std::isnan(values[j])) add(r, tile.col + j, values[j]);
        if (mirror[j] >= bounds[j]) {
          add(tile.col + j, r, mirror[j]);
          bounds[j] = bound(tile.col + j, r);
        }
      }
    }
  }

  // [rows, k] columns and values, the best first. Where a row has met fewer, -1 and NaN follow.
  NeighbourTensors sorted(const at::TensorOptions& options) {
    const int64_t rows = static_cast<int64_t>(counts_.size());
    at::Tensor col = at::empty({rows, asked_}, options.dtype(at::kLong));
    at::Tensor value = at::empty({rows, asked_}, options);
    int64_t* col_out = col.mutable_data_ptr<int64_t>();
    value_t* value_out = value.mutable_data_ptr<value_t>();
    at::parallel_for(0, rows, 256, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        Neighbour* const best = best_.data() + r * k_;
        std::sort(best, best + counts_[r], is_better);
        for (int64_t i = 0; i < asked_; ++i) {
          const bool met = i < counts_[r];
          col_out[r * asked_ + i] = met ? best[i].index : -1;
          value_out[r * asked_ + i] =
              met ? best[i].value : std::numeric_limits<value_t>::quiet_NaN();
        }
      }
    });
    return {col, value};
  }

 private:
  struct Neighbour {
    value_t value;
    int64_t index;
  };

  // A heap in this order has the worst in front.
  static bool is_better(const Neighbour& a, const Neighbour& b) {
    return a.value != b.value ? a.value > b.value : a.index < b.index;
  }

  // Half the work of std::pop_heap and std::push_heap.
  void replace_worst(Neighbour* heap, const Neighbour& candidate) const {
    int64_t place = 0;
    for (int64_t child = 1; child < k_; child = 2 * place + 1) {
      if (child + 1 < k_ && is_better(heap[child], heap[child + 1])) ++child;
      if (is_better(heap[child], candidate)) break;
      heap[place] = heap[child];
      place = child;
    }
    heap[place] = candidate;
  }

  int64_t asked_;
  int64_t k_;
  std::vector<Neighbour> best_;
  std::vector<int64_t> counts_;
  std::vector<std::mutex> locks_;
};

// The neighbours among the values that each thread's values(tile) gives.
template <typename value_t, typename Make>
NeighbourTensors find_nearest(const TileGrid& grid, int64_t rows, int64_t cols, int64_t k,
                              bool upper, const at::TensorOptions& options, Make make) {
  Nearest<value_t> nearest(rows, cols, k);
  visit_tiles(grid, [&] {
    return [&, values = make()](const Tile& tile) mutable {
      const TileValues<value_t> in = values(tile);
      std::unique_lock<std::mutex> rows_lock(nearest.lock_of(tile.row));
      std::unique_lock<std::mutex> cols_lock;
      if (upper && tile.col != tile.row) {
        cols_lock = std::unique_lock<std::mutex>(nearest.lock_of(tile.col));
      }
      nearest.add_tile(tile, in, upper);
    };
  });
  return nearest.sorted(options);
}

}  // namespace neusemslice::ops
