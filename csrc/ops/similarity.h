#pragma once

// Similarity of sets and of rows of numbers: every pair, the pairs above a threshold, or the best
// of each row.
//
// bitset_pack: bool [..., M] -> int64 [..., ceil(M / 64)]. Bit j of word w is element 64 * w + j;
//   the spare bits are zero.
//
// bitset_similarity: float32 [R, S] of the packed sets a [R, W] and b [S, W]; b absent stands for
//   a, and each pair is then counted once. |i & j| over |i | j| (jaccard), over half of |i| + |j|
//   (dice), over the smaller of the two (overlap), over |i| (containment of row i in row j, the
//   only one that is not symmetric). Counts are exact; one division, in float64. An empty set has
//   similarity 0 with every set, itself and other empty sets included: nothing is NaN. Every bit of
//   a word counts, so spare bits must be zero.
//
// pairwise_similarity: [R, S] of the rows of a [R, D] and b [S, D]; b absent stands for a, the
//   result is then exactly symmetric, and its work is done once. cosine: product of the rows' unit
//   vectors. pearson: the same of the rows less their means. dot: product of the rows themselves.
//   Products are accumulated in the type of the result: float64 for float64 input, else float32.
//   Norms and means are in float64. Cosine and pearson lie in [-1, 1], with b absent with 1 on the
//   diagonal; a row without a direction (zero; for pearson, constant) has similarity 0 with every
//   row and with itself; one with a NaN or an infinity gives NaN with every row. For dot, NaN and
//   infinities are what the products make of them.
//
// *_edges: the pairs whose similarity is at least `threshold`, sorted by (row, col): rows and cols
//   int64 [E], values [E] as the dense result has them. With b absent only row < col, or row != col
//   for containment. For sets the float64 quotient counts, before it is rounded to float32 (what is
//   compared are integers); for rows, the value itself. NaN is no edge. Memory is that of the
//   input, one tile per thread and the edges. E is data, so on CUDA these wait for the device.
//
// *_topk: for each row of a the k columns of greatest similarity, the best first and of equal ones
//   the lower column: cols int64 [R, k], and values [R, k] as the dense result has them. With b
//   absent a row is no neighbour of itself. NaN is no neighbour; where a row has fewer than k, -1
//   and NaN follow. Memory is that of the input, one tile per thread and O(R * k).
//
// The same call gives the same bits each time, on the CPU at any number of threads and with any
// instruction set, and edges and neighbours have the bits of the dense result. Products are ATen's:
// float32 ones follow torch.set_float32_matmul_precision on processors that have bf16 units (on
// CUDA, TF32 is never used), and in deterministic mode cuBLAS wants CUBLAS_WORKSPACE_CONFIG set.
// None of these is differentiable.

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <tuple>

#include "common/similarity.h"

namespace neusemslice::ops {

using OptionalTensor = std::optional<at::Tensor>;
using EdgeTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // rows, cols, values
using NeighbourTensors = std::tuple<at::Tensor, at::Tensor>;         // cols, values

at::Tensor bitset_pack(const at::Tensor& bits);

at::Tensor bitset_similarity(const at::Tensor& a, const OptionalTensor& b, std::string_view metric);

EdgeTensors bitset_similarity_edges(const at::Tensor& a, const OptionalTensor& b,
                                    std::string_view metric, double threshold);

NeighbourTensors bitset_similarity_topk(const at::Tensor& a, const OptionalTensor& b,
                                        std::string_view metric, int64_t k);

at::Tensor pairwise_similarity(const at::Tensor& a, const OptionalTensor& b,
                               std::string_view metric);

EdgeTensors pairwise_similarity_edges(const at::Tensor& a, const OptionalTensor& b,
                                      std::string_view metric, double threshold);

NeighbourTensors pairwise_similarity_topk(const at::Tensor& a, const OptionalTensor& b,
                                          std::string_view metric, int64_t k);

// What the CPU and the CUDA kernels share: checked arguments and the order of tiles.

// bool [outer, size] contiguous and the words to fill, [outer, words].
struct PackWork {
  at::Tensor bits;
  at::Tensor words;
  int64_t size;
  int64_t words_per_row;
};

PackWork checked_bits(const at::Tensor& bits);

// a [rows, words] and b [cols, words], contiguous; b is a where `self`.
struct Sets {
  at::Tensor a;
  at::Tensor b;
  bool self;
  SetMetric metric;
  int64_t rows;
  int64_t cols;
  int64_t words;

  Pairs pairs() const {
    if (!self) return Pairs::all;
    return is_symmetric(metric) ? Pairs::upper : Pairs::distinct;
  }
};

Sets checked_sets(const char* op, const at::Tensor& a, const OptionalTensor& b,
                  std::string_view metric);

// a [rows, D] and b [cols, D] of one dtype, any strides; b is a where `self`.
struct Vectors {
  at::Tensor a;
  at::Tensor b;
  bool self;
  RowMetric metric;
  int64_t rows;
  int64_t cols;

  at::ScalarType value_type() const {
    return a.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  }
  Pairs pairs() const { return self ? Pairs::upper : Pairs::all; }
  bool centre() const { return metric == RowMetric::pearson; }
  // Whether rows are made unit vectors, whose products lie in [-1, 1].
  bool unit() const { return metric != RowMetric::dot; }
};

Vectors checked_vectors(const char* op, const at::Tensor& a, const OptionalTensor& b,
                        std::string_view metric);

void check_threshold(const char* op, double threshold);
void check_k(const char* op, int64_t k);

// A rectangle of the matrix of pairs.
struct Tile {
  int64_t row;
  int64_t col;
  int64_t rows;
  int64_t cols;
};

// Calls visit(tile) for the tiles of height x width that cover a rows x cols matrix, row after row;
// with `upper`, for those that cover its upper triangle, beginning at the diagonal.
template <typename Visit>
void for_each_tile(int64_t rows, int64_t cols, int64_t height, int64_t width, bool upper,
                   Visit visit) {
  for (int64_t row = 0; row < rows; row += height) {
    for (int64_t col = upper ? row : 0; col < cols; col += width) {
      visit(Tile{row, col, std::min(height, rows - row), std::min(width, cols - col)});
    }
  }
}

// While it lives, operators called from this thread compute and do nothing else: autocast would
// round unit vectors to 16 bits, and autograd and inference mode look at who writes where.
class PlainDispatch {
  c10::impl::ExcludeDispatchKeyGuard guard_{c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                                            c10::autocast_dispatch_keyset};
};

}  // namespace neusemslice::ops
