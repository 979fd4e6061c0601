// CPU kernels of the similarity operators (contract: ops/similarity.h).
//
// The matrix of pairs is cut into fixed tiles, and a thread owns a tile: no two write to one
// address, and the tiles do not depend on the number of threads. A tile of pairwise_similarity is
// one at::mm, run on one thread: given several, BLAS may divide the sum over D among them, and the
// bits then change with their number. Inside the parallel region BLAS stays on the caller's
// thread. Edges are gathered tile by tile and ordered by a counting sort on their row, so no full
// matrix ever exists.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/similarity.h"
#include "ops/checks.h"
#include "ops/similarity.h"

namespace neusemslice::ops {
namespace {

constexpr int64_t kTile = 256;   // rows and columns of a tile
constexpr int64_t kBatch = 256;  // tiles whose edges are held apart at a time

template <typename value_t>
struct Edge {
  int64_t row;
  int64_t col;
  value_t value;
};

template <typename value_t>
using Edges = std::vector<Edge<value_t>>;

// Calls visit(tile, slot) for each tile, slot being its place in `tiles`.
template <typename Visit>
void visit_tiles(const std::vector<Tile>& tiles, Visit visit) {
  const int64_t count = static_cast<int64_t>(tiles.size());
  // parallel_for runs a lone item outside of a parallel region, where BLAS would take all threads;
  // the idle second item prevents that.
  at::parallel_for(0, std::max<int64_t>(count, 2), 1, [&](int64_t begin, int64_t end) {
    const PlainDispatch plain;
    for (int64_t i = begin; i < std::min(end, count); ++i) visit(tiles[i], i);
  });
}

// Calls visit(tile) for all tiles of a rows x cols matrix.
template <typename Visit>
void visit_matrix(int64_t rows, int64_t cols, bool upper, Visit visit) {
  std::vector<Tile> tiles;
  for_each_tile(rows, cols, kTile, upper, [&](const Tile& tile) { tiles.push_back(tile); });
  visit_tiles(tiles, [&](const Tile& tile, int64_t) { visit(tile); });
}

// Edges that come tile after tile, each tile's row after row, as tensors sorted by (row, col).
template <typename value_t>
EdgeTensors sorted_edges(const Edges<value_t>& edges, int64_t rows,
                         const at::TensorOptions& values) {
  const int64_t count = static_cast<int64_t>(edges.size());
  std::vector<int64_t> next(rows + 1, 0);
  for (const auto& edge : edges) ++next[edge.row + 1];
  for (int64_t r = 0; r < rows; ++r) next[r + 1] += next[r];
  at::Tensor row = at::empty({count}, values.dtype(at::kLong));
  at::Tensor col = at::empty({count}, values.dtype(at::kLong));
  at::Tensor value = at::empty({count}, values);
  int64_t* row_out = row.mutable_data_ptr<int64_t>();
  int64_t* col_out = col.mutable_data_ptr<int64_t>();
  value_t* value_out = value.mutable_data_ptr<value_t>();
  for (const auto& edge : edges) {
    const int64_t i = next[edge.row]++;
    row_out[i] = edge.row;
    col_out[i] = edge.col;
    value_out[i] = edge.value;
  }
  return {row, col, value};
}

// The edges that find(tile, edges) appends for each tile of a rows x cols matrix.
template <typename value_t, typename Find>
EdgeTensors find_edges(int64_t rows, int64_t cols, bool upper, const at::TensorOptions& values,
                       Find find) {
  Edges<value_t> edges;
  std::vector<Tile> tiles;
  const auto find_in_tiles = [&] {
    std::vector<Edges<value_t>> found(tiles.size());
    visit_tiles(tiles, [&](const Tile& tile, int64_t slot) { find(tile, found[slot]); });
    for (const auto& part : found) edges.insert(edges.end(), part.begin(), part.end());
    tiles.clear();
  };
  for_each_tile(rows, cols, kTile, upper, [&](const Tile& tile) {
    tiles.push_back(tile);
    if (static_cast<int64_t>(tiles.size()) == kBatch) find_in_tiles();
  });
  find_in_tiles();
  return sorted_edges(edges, rows, values);
}

at::Tensor bitset_pack_cpu(const at::Tensor& bits) {
  const PackWork work = checked_bits(bits);
  if (work.words.numel() == 0) return work.words;
  const bool* in = work.bits.const_data_ptr<bool>();
  int64_t* out = work.words.mutable_data_ptr<int64_t>();
  at::parallel_for(0, work.words.numel(), 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % work.words_per_row * kWordBits;
      out[i] = pack_word(in + i / work.words_per_row * work.size + first,
                         std::min(kWordBits, work.size - first));
    }
  });
  return work.words;
}

std::vector<int64_t> set_sizes(const at::Tensor& sets) {
  const int64_t* data = sets.const_data_ptr<int64_t>();
  const int64_t words = sets.size(1);
  std::vector<int64_t> sizes(sets.size(0));
  for (int64_t r = 0; r < sets.size(0); ++r) sizes[r] = set_size(data + r * words, words);
  return sizes;
}

at::Tensor bitset_similarity_cpu(const at::Tensor& a, const OptionalTensor& b,
                                 std::string_view metric) {
  const Sets sets = checked_sets("bitset_similarity", a, b, metric);
  at::Tensor out = at::empty({sets.rows, sets.cols}, sets.a.options().dtype(at::kFloat));
  const int64_t* left = sets.a.const_data_ptr<int64_t>();
  const int64_t* right = sets.b.const_data_ptr<int64_t>();
  float* result = out.mutable_data_ptr<float>();
  const std::vector<int64_t> left_sizes = set_sizes(sets.a);
  const std::vector<int64_t> right_sizes = set_sizes(sets.b);
  visit_matrix(sets.rows, sets.cols, sets.self, [&](const Tile& tile) {
    for (int64_t r = tile.row; r < tile.row + tile.rows; ++r) {
      for (int64_t c = sets.self ? std::max(r, tile.col) : tile.col; c < tile.col + tile.cols;
           ++c) {
        const int64_t common =
            common_size(left + r * sets.words, right + c * sets.words, sets.words);
        const auto value = [&](int64_t i, int64_t j) {
          return static_cast<float>(set_similarity(sets.metric, common, i, j));
        };
        result[r * sets.cols + c] = value(left_sizes[r], right_sizes[c]);
        if (sets.self) result[c * sets.cols + r] = value(right_sizes[c], left_sizes[r]);
      }
    }
  });
  return out;
}

EdgeTensors bitset_similarity_edges_cpu(const at::Tensor& a, const OptionalTensor& b,
                                        std::string_view metric, double threshold) {
  const char* op = "bitset_similarity_edges";
  const Sets sets = checked_sets(op, a, b, metric);
  check_threshold(op, threshold);
  const int64_t* left = sets.a.const_data_ptr<int64_t>();
  const int64_t* right = sets.b.const_data_ptr<int64_t>();
  const std::vector<int64_t> left_sizes = set_sizes(sets.a);
  const std::vector<int64_t> right_sizes = set_sizes(sets.b);
  const Pairs pairs = sets.pairs();
  return find_edges<float>(
      sets.rows, sets.cols, pairs == Pairs::upper, sets.a.options().dtype(at::kFloat),
      [&](const Tile& tile, Edges<float>& edges) {
        for (int64_t r = tile.row; r < tile.row + tile.rows; ++r) {
          for (int64_t c = tile.col; c < tile.col + tile.cols; ++c) {
            if (!is_included(pairs, r, c)) continue;
            const int64_t common =
                common_size(left + r * sets.words, right + c * sets.words, sets.words);
            const double value = set_similarity(sets.metric, common, left_sizes[r], right_sizes[c]);
            if (value >= threshold) edges.push_back({r, c, static_cast<float>(value)});
          }
        }
      });
}

// The unit vectors of the rows of x, of the result's type.
at::Tensor unit_rows(const at::Tensor& x, bool centre, at::ScalarType type) {
  const int64_t rows = x.size(0);
  const int64_t size = x.size(1);
  at::Tensor out = at::empty({rows, size}, x.options().dtype(type));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "unit_rows", [&] {
    using value_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    const scalar_t* in = x.const_data_ptr<scalar_t>();
    value_t* unit = out.mutable_data_ptr<value_t>();
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const scalar_t* row = in + r * x.stride(0);
        const UnitMap map = unit_map(row, x.stride(1), size, centre);
        for (int64_t d = 0; d < size; ++d) {
          unit[r * size + d] = static_cast<value_t>(map(static_cast<double>(row[d * x.stride(1)])));
        }
      }
    });
  });
  return out;
}

struct UnitVectors {
  at::Tensor a;
  at::Tensor b;

  explicit UnitVectors(const Vectors& v)
      : a(unit_rows(v.a, v.centre, v.value_type())),
        b(v.self ? a : unit_rows(v.b, v.centre, v.value_type())) {}

  // Products of the tile's pairs, [tile.rows, tile.cols] contiguous.
  at::Tensor product(const Tile& tile) const {
    return at::mm(a.narrow(0, tile.row, tile.rows), b.narrow(0, tile.col, tile.cols).t());
  }
};

at::Tensor pairwise_similarity_cpu(const at::Tensor& a, const OptionalTensor& b,
                                   std::string_view metric) {
  const Vectors v = checked_vectors("pairwise_similarity", a, b, metric);
  const UnitVectors unit(v);
  at::Tensor out = at::empty({v.rows, v.cols}, unit.a.options());
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "pairwise_similarity", [&] {
    scalar_t* result = out.mutable_data_ptr<scalar_t>();
    visit_matrix(v.rows, v.cols, v.self, [&](const Tile& tile) {
      const at::Tensor product = unit.product(tile);
      const scalar_t* in = product.const_data_ptr<scalar_t>();
      for (int64_t i = 0; i < tile.rows; ++i) {
        const int64_t r = tile.row + i;
        for (int64_t j = 0; j < tile.cols; ++j) {
          const int64_t c = tile.col + j;
          if (v.self && c < r) continue;
          scalar_t value = clamp_similarity(in[i * tile.cols + j]);
          if (v.self) {
            if (c == r) value = self_similarity(value);
            result[c * v.cols + r] = value;
          }
          result[r * v.cols + c] = value;
        }
      }
    });
  });
  return out;
}

EdgeTensors pairwise_similarity_edges_cpu(const at::Tensor& a, const OptionalTensor& b,
                                          std::string_view metric, double threshold) {
  const char* op = "pairwise_similarity_edges";
  const Vectors v = checked_vectors(op, a, b, metric);
  check_threshold(op, threshold);
  const UnitVectors unit(v);
  const Pairs pairs = v.pairs();
  return AT_DISPATCH_FLOATING_TYPES(unit.a.scalar_type(), "pairwise_similarity_edges", [&] {
    return find_edges<scalar_t>(
        v.rows, v.cols, v.self, unit.a.options(), [&](const Tile& tile, Edges<scalar_t>& edges) {
          const at::Tensor product = unit.product(tile);
          const scalar_t* in = product.const_data_ptr<scalar_t>();
          for (int64_t i = 0; i < tile.rows; ++i) {
            for (int64_t j = 0; j < tile.cols; ++j) {
              const int64_t r = tile.row + i;
              const int64_t c = tile.col + j;
              const scalar_t value = clamp_similarity(in[i * tile.cols + j]);
              if (is_included(pairs, r, c) && value >= threshold) edges.push_back({r, c, value});
            }
          }
        });
  });
}

}  // namespace
}  // namespace neusemslice::ops

TORCH_LIBRARY_IMPL(neusemslice, CPU, m) {
  m.impl("bitset_pack", &neusemslice::ops::bitset_pack_cpu);
  m.impl("bitset_similarity", &neusemslice::ops::bitset_similarity_cpu);
  m.impl("bitset_similarity_edges", &neusemslice::ops::bitset_similarity_edges_cpu);
  m.impl("pairwise_similarity", &neusemslice::ops::pairwise_similarity_cpu);
  m.impl("pairwise_similarity_edges", &neusemslice::ops::pairwise_similarity_edges_cpu);
}
