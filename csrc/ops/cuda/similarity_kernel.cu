// CUDA kernels of the similarity operators (contract: ops/similarity.h).
//
// Nothing is atomic. The matrix of pairs is walked through in large fixed tiles: those of
// pairwise_similarity are one at::mm each, the same for the dense result, for edges and for
// neighbours, which keeps their bits equal. Tiles are low and wide, so that of a symmetric matrix
// little more than half is computed, and few enough bytes to be read from the L2 cache in part.
// Edges are what at::nonzero finds in a tile, ordered at the end by one stable sort on their row;
// both wait for the device, because the number of edges is data. Neighbours go into the lists of
// nearest.cuh; only lists too long for it are sorted.

#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isnan.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/where.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/similarity.h"
#include "ops/checks.h"
#include "ops/cuda/launch.cuh"
#include "ops/cuda/nearest.cuh"
#include "ops/cuda/similarity.cuh"
#include "ops/similarity.h"

namespace neusemslice::ops {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kTileRows = 1024;
constexpr int64_t kTileCols = 16384;

cuda::Grid tile_grid(const Tile& tile) {
  return {cuda::blocks_for(tile.cols, kThreads), std::min(tile.rows, cuda::kMaxGridY)};
}

cuda::Grid square_grid(const Tile& tile) {
  return {cuda::blocks_for(tile.cols, cuda::kSetSide), cuda::blocks_for(tile.rows, cuda::kSetSide)};
}

// Edges of one tile after the other, made into tensors sorted by (row, col). Tiles come row after
// row and at::nonzero goes through each row after row, so that the edges of one row come in the
// order of their columns: the stable sort on rows does the rest.
class EdgeCollector {
 public:
  explicit EdgeCollector(const at::TensorOptions& values)
      : rows_{at::empty({0}, values.dtype(at::kLong))},
        cols_{at::empty({0}, values.dtype(at::kLong))},
        values_{at::empty({0}, values)} {}

  void add(const Tile& tile, const at::Tensor& values, const at::Tensor& is_edge) {
    const at::Tensor index = at::nonzero(is_edge);
    if (index.size(0) == 0) return;
    rows_.push_back(index.select(1, 0).add(tile.row));
    cols_.push_back(index.select(1, 1).add(tile.col));
    values_.push_back(values.masked_select(is_edge));
  }

  EdgeTensors sorted() const {
    const auto [rows, order] =
        at::sort(at::cat(rows_), /*stable=*/true, /*dim=*/0, /*descending=*/false);
    return {rows, at::cat(cols_).index_select(0, order), at::cat(values_).index_select(0, order)};
  }

 private:
  std::vector<at::Tensor> rows_;
  std::vector<at::Tensor> cols_;
  std::vector<at::Tensor> values_;
};

// The lists of all rows, as long as wanted: what a tile brings joins the best so far, of which the
// stable sorts keep the lower columns in front and NaN at the end.
void sort_in(NeighbourTensors& best, int64_t first, at::Tensor values, int64_t first_col) {
  const auto& [best_cols, best_values] = best;
  const int64_t rows = values.size(0), k = best_cols.size(1);
  at::Tensor index = at::arange(first_col, first_col + values.size(1), best_cols.options());
  index = at::where(at::isnan(values), -1, index.expand({rows, values.size(1)}));
  at::Tensor to_cols = best_cols.narrow(0, first, rows);
  at::Tensor to_values = best_values.narrow(0, first, rows);
  values = at::cat({to_values, values}, 1);
  index = at::cat({to_cols, index}, 1);
  const auto reorder = [&](const at::Tensor& key, bool descending) {
    const auto order =
        std::get<1>(at::sort(key, /*stable=*/true, /*dim=*/1, /*descending=*/descending));
    values = values.gather(1, order);
    index = index.gather(1, order);
  };
  reorder(values, true);
  reorder(at::isnan(values), false);
  to_cols.copy_(index.narrow(1, 0, k));
  to_values.copy_(values.narrow(1, 0, k));
}

void sort_tile_in(NeighbourTensors& best, const Tile& tile, at::Tensor values, Pairs pairs,
                  bool unit) {
  if (unit) values = values.clamp(-1, 1);
  if (pairs != Pairs::all) {
    const at::TensorOptions index = std::get<0>(best).options();
    const at::Tensor rows = at::arange(tile.row, tile.row + tile.rows, index).unsqueeze(1);
    const at::Tensor cols = at::arange(tile.col, tile.col + tile.cols, index);
    const at::Tensor left_out = pairs == Pairs::upper ? cols.le(rows) : cols.eq(rows);
    values = values.masked_fill(left_out, std::numeric_limits<double>::quiet_NaN());
  }
  // Columns first: of a row of the tile they are what lies left of the diagonal.
  if (pairs == Pairs::upper) sort_in(best, tile.col, values.t(), tile.row);
  sort_in(best, tile.row, values, tile.col);
}

// The best neighbours of all rows; `tile_values` gives the values of a tile, contiguous.
template <typename Values>
NeighbourTensors find_nearest(int64_t rows, int64_t cols, int64_t k, Pairs pairs, bool unit,
                              const at::TensorOptions& options, Values tile_values) {
  NeighbourTensors best{at::full({rows, k}, -1, options.dtype(at::kLong)),
                        at::full({rows, k}, std::numeric_limits<double>::quiet_NaN(), options)};
  for_each_tile(rows, cols, kTileRows, kTileCols, pairs == Pairs::upper, [&](const Tile& tile) {
    const at::Tensor values = tile_values(tile);
    if (k > cuda::kMostNearest) return sort_tile_in(best, tile, values, pairs, unit);
    AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "nearest", [&] {
      cuda::add_nearest<scalar_t>({values.const_data_ptr<scalar_t>(), tile.row, tile.col, tile.rows,
                                   tile.cols, pairs, unit},
                                  {std::get<1>(best).mutable_data_ptr<scalar_t>(),
                                   std::get<0>(best).mutable_data_ptr<int64_t>(), k});
    });
  });
  return best;
}

at::Tensor bitset_pack_cuda(const at::Tensor& bits) {
  const c10::cuda::CUDAGuard guard(bits.device());
  const PackWork work = checked_bits(bits);
  const int64_t total = work.words.numel();
  if (total == 0) return work.words;
  cuda::launch("pack_kernel", &cuda::pack_kernel, {cuda::blocks_for(total, kThreads)}, kThreads,
               work.bits.const_data_ptr<bool>(), work.size, work.words_per_row, total,
               work.words.mutable_data_ptr<int64_t>());
  return work.words;
}

at::Tensor set_sizes(const at::Tensor& sets) {
  // Sizes of intersections are counted in 32 bits.
  TORCH_CHECK_VALUE(sets.size(1) < (int64_t{1} << 31) / kWordBits,
                    "bitset similarity on CUDA: sets must have less than 2^31 elements, got ",
                    sets.size(1), " words");
  at::Tensor sizes = at::empty({sets.size(0)}, sets.options());
  cuda::launch("set_sizes_kernel", &cuda::set_sizes_kernel,
               {cuda::blocks_for(sets.size(0), kThreads)}, kThreads, sets.const_data_ptr<int64_t>(),
               sets.size(0), sets.size(1), sizes.mutable_data_ptr<int64_t>());
  return sizes;
}

cuda::PairTile on_device(const Tile& tile) { return {tile.row, tile.col, tile.rows, tile.cols}; }

cuda::DeviceSets on_device(const Sets& sets, const at::Tensor& a_sizes, const at::Tensor& b_sizes) {
  return {
      sets.a.const_data_ptr<int64_t>(),
      sets.b.const_data_ptr<int64_t>(),
      a_sizes.const_data_ptr<int64_t>(),
      b_sizes.const_data_ptr<int64_t>(),
      sets.words,
      sets.cols,
      sets.metric,
      sets.self,
  };
}

at::Tensor bitset_similarity_cuda(const at::Tensor& a, const OptionalTensor& b,
                                  std::string_view metric) {
  const c10::cuda::CUDAGuard guard(a.device());
  const Sets sets = checked_sets("bitset_similarity", a, b, metric);
  at::Tensor out = at::empty({sets.rows, sets.cols}, sets.a.options().dtype(at::kFloat));
  const at::Tensor a_sizes = set_sizes(sets.a);
  const at::Tensor b_sizes = sets.self ? a_sizes : set_sizes(sets.b);
  const cuda::DeviceSets device = on_device(sets, a_sizes, b_sizes);
  float* result = out.mutable_data_ptr<float>();
  for_each_tile(sets.rows, sets.cols, kTileRows, kTileCols, sets.self, [&](const Tile& tile) {
    cuda::launch("set_similarity_kernel", &cuda::set_similarity_kernel, square_grid(tile),
                 cuda::kSetThreads, device, on_device(tile), result);
  });
  return out;
}

EdgeTensors bitset_similarity_edges_cuda(const at::Tensor& a, const OptionalTensor& b,
                                         std::string_view metric, double threshold) {
  const char* op = "bitset_similarity_edges";
  const c10::cuda::CUDAGuard guard(a.device());
  const Sets sets = checked_sets(op, a, b, metric);
  check_threshold(op, threshold);
  const at::Tensor a_sizes = set_sizes(sets.a);
  const at::Tensor b_sizes = sets.self ? a_sizes : set_sizes(sets.b);
  const cuda::DeviceSets device = on_device(sets, a_sizes, b_sizes);
  const Pairs pairs = sets.pairs();
  const at::TensorOptions options = sets.a.options().dtype(at::kFloat);
  EdgeCollector edges(options);
  for_each_tile(sets.rows, sets.cols, kTileRows, kTileCols, pairs == Pairs::upper,
                [&](const Tile& tile) {
                  at::Tensor values = at::empty({tile.rows, tile.cols}, options);
                  at::Tensor is_edge = at::empty({tile.rows, tile.cols}, options.dtype(at::kBool));
                  cuda::launch("set_edges_kernel", &cuda::set_edges_kernel, tile_grid(tile),
                               kThreads, device, on_device(tile), pairs, threshold,
                               values.mutable_data_ptr<float>(), is_edge.mutable_data_ptr<bool>());
                  edges.add(tile, values, is_edge);
                });
  return edges.sorted();
}

NeighbourTensors bitset_similarity_topk_cuda(const at::Tensor& a, const OptionalTensor& b,
                                             std::string_view metric, int64_t k) {
  const char* op = "bitset_similarity_topk";
  const c10::cuda::CUDAGuard guard(a.device());
  const Sets sets = checked_sets(op, a, b, metric);
  check_k(op, k);
  const at::Tensor a_sizes = set_sizes(sets.a);
  const at::Tensor b_sizes = sets.self ? a_sizes : set_sizes(sets.b);
  const cuda::DeviceSets device = on_device(sets, a_sizes, b_sizes);
  const at::TensorOptions options = sets.a.options().dtype(at::kFloat);
  return find_nearest(sets.rows, sets.cols, k, sets.pairs(), false, options, [&](const Tile& tile) {
    at::Tensor values = at::empty({tile.rows, tile.cols}, options);
    cuda::launch("set_edges_kernel", &cuda::set_edges_kernel, square_grid(tile), cuda::kSetThreads,
                 device, on_device(tile), sets.pairs(), 0.0, values.mutable_data_ptr<float>(),
                 nullptr);
    return values;
  });
}

// The rows of x in the result's type, and for all but dot made unit vectors.
at::Tensor prepared_rows(const at::Tensor& x, const Vectors& v) {
  if (!v.unit()) return x.to(v.value_type());
  at::Tensor out = at::empty({x.size(0), x.size(1)}, x.options().dtype(v.value_type()));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "unit_rows", [&] {
    using value_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    cuda::launch("unit_rows_kernel", &cuda::unit_rows_kernel<scalar_t, value_t>,
                 {cuda::blocks_for(x.size(0) * cuda::kWarp, kThreads)}, kThreads,
                 x.const_data_ptr<scalar_t>(), x.size(0), x.size(1), x.stride(0), x.stride(1),
                 v.centre(), out.mutable_data_ptr<value_t>());
  });
  return out;
}

struct PreparedRows {
  at::Tensor a;
  at::Tensor b;

  explicit PreparedRows(const Vectors& v)
      : a(prepared_rows(v.a, v)), b(v.self ? a : prepared_rows(v.b, v)) {}

  // Products of the tile's pairs, [tile.rows, tile.cols] contiguous.
  at::Tensor product(const Tile& tile) const {
    const PlainDispatch plain;
    const at::NoTF32Guard no_tf32;
    return at::mm(a.narrow(0, tile.row, tile.rows), b.narrow(0, tile.col, tile.cols).t());
  }
};

at::Tensor pairwise_similarity_cuda(const at::Tensor& a, const OptionalTensor& b,
                                    std::string_view metric) {
  const c10::cuda::CUDAGuard guard(a.device());
  const Vectors v = checked_vectors("pairwise_similarity", a, b, metric);
  const PreparedRows prepared(v);
  at::Tensor out = at::empty({v.rows, v.cols}, prepared.a.options());
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "pairwise_similarity", [&] {
    for_each_tile(v.rows, v.cols, kTileRows, kTileCols, v.self, [&](const Tile& tile) {
      const at::Tensor product = prepared.product(tile);
      cuda::launch("similarity_kernel", &cuda::similarity_kernel<scalar_t>, tile_grid(tile),
                   kThreads, product.const_data_ptr<scalar_t>(), on_device(tile), v.self, v.unit(),
                   v.cols, out.mutable_data_ptr<scalar_t>());
    });
  });
  return out;
}

EdgeTensors pairwise_similarity_edges_cuda(const at::Tensor& a, const OptionalTensor& b,
                                           std::string_view metric, double threshold) {
  const char* op = "pairwise_similarity_edges";
  const c10::cuda::CUDAGuard guard(a.device());
  const Vectors v = checked_vectors(op, a, b, metric);
  check_threshold(op, threshold);
  const PreparedRows prepared(v);
  EdgeCollector edges(prepared.a.options());
  AT_DISPATCH_FLOATING_TYPES(prepared.a.scalar_type(), "pairwise_similarity_edges", [&] {
    for_each_tile(v.rows, v.cols, kTileRows, kTileCols, v.self, [&](const Tile& tile) {
      const at::Tensor values = prepared.product(tile);
      at::Tensor is_edge = at::empty({tile.rows, tile.cols}, values.options().dtype(at::kBool));
      cuda::launch("edges_kernel", &cuda::edges_kernel<scalar_t>, tile_grid(tile), kThreads,
                   values.mutable_data_ptr<scalar_t>(), on_device(tile), v.pairs(), v.unit(),
                   threshold, is_edge.mutable_data_ptr<bool>());
      edges.add(tile, values, is_edge);
    });
  });
  return edges.sorted();
}

NeighbourTensors pairwise_similarity_topk_cuda(const at::Tensor& a, const OptionalTensor& b,
                                               std::string_view metric, int64_t k) {
  const char* op = "pairwise_similarity_topk";
  const c10::cuda::CUDAGuard guard(a.device());
  const Vectors v = checked_vectors(op, a, b, metric);
  check_k(op, k);
  const PreparedRows prepared(v);
  return find_nearest(v.rows, v.cols, k, v.pairs(), v.unit(), prepared.a.options(),
                      [&](const Tile& tile) { return prepared.product(tile); });
}

}  // namespace
}  // namespace neusemslice::ops

TORCH_LIBRARY_IMPL(neusemslice, CUDA, m) {
  m.impl("bitset_pack", &neusemslice::ops::bitset_pack_cuda);
  m.impl("bitset_similarity", &neusemslice::ops::bitset_similarity_cuda);
  m.impl("bitset_similarity_edges", &neusemslice::ops::bitset_similarity_edges_cuda);
  m.impl("bitset_similarity_topk", &neusemslice::ops::bitset_similarity_topk_cuda);
  m.impl("pairwise_similarity", &neusemslice::ops::pairwise_similarity_cuda);
  m.impl("pairwise_similarity_edges", &neusemslice::ops::pairwise_similarity_edges_cuda);
  m.impl("pairwise_similarity_topk", &neusemslice::ops::pairwise_similarity_topk_cuda);
}
