// CPU kernel of gram_ (contract: ops/gram.h).
//
// A tile of the matrix belongs to one thread, which runs through all rows in blocks: one product by
// BLAS into a buffer that stays in the cache, then that buffer's way into float64. Given several
// threads, BLAS might divide a sum among them, and the bits would change with their number.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "ops/checks.h"
#include "ops/cpu/similarity_tiles.h"
#include "ops/gram.h"

namespace neusemslice::ops {
namespace {

constexpr int64_t kColumns = 64;  // features whose means one thread finds at a time

// The mean of each column, and x without it. What the subtraction rounds away of the mean is left
// in `rest`.
template <typename scalar_t, typename value_t>
void centre_columns(const at::Tensor& x, std::vector<double>& mean, std::vector<double>& rest,
                    at::Tensor& centred) {
  const int64_t rows = x.size(0), cols = x.size(1);
  const int64_t row_stride = x.stride(0), col_stride = x.stride(1);
  const auto* from = x.const_data_ptr<scalar_t>();
  auto* to = centred.mutable_data_ptr<value_t>();
  at::parallel_for(0, (cols + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kColumns; first < std::min(cols, end * kColumns);
         first += kColumns) {
      const int64_t last = std::min(cols, first + kColumns);
      double sums[kColumns] = {};
      for (int64_t n = 0; n < rows; ++n) {
        const scalar_t* row = from + n * row_stride;
        for (int64_t c = first; c < last; ++c) {
          sums[c - first] += static_cast<double>(row[c * col_stride]);
        }
      }
      value_t shift[kColumns];
      for (int64_t c = first; c < last; ++c) {
        mean[c] = sums[c - first] / static_cast<double>(rows);
        shift[c - first] = static_cast<value_t>(mean[c]);
        rest[c] = mean[c] - static_cast<double>(shift[c - first]);
      }
      for (int64_t n = 0; n < rows; ++n) {
        const scalar_t* row = from + n * row_stride;
        for (int64_t c = first; c < last; ++c) {
          to[n * cols + c] = static_cast<value_t>(row[c * col_stride]) - shift[c - first];
        }
      }
    }
  });
}

template <typename scalar_t>
void add_rows(const at::Tensor& count, const at::Tensor& mean, const at::Tensor& products,
              const at::Tensor& x) {
  using value_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
  const int64_t rows = x.size(0), features = x.size(1);
  std::vector<double> own(features), rest(features), moved(features);
  at::Tensor centred =
      at::empty({rows, features}, x.options().dtype(c10::CppTypeToScalarType<value_t>::value));
  centre_columns<scalar_t, value_t>(x, own, rest, centred);

  double* total = count.mutable_data_ptr<double>();
  double* means = mean.mutable_data_ptr<double>();
  double* matrix = products.mutable_data_ptr<double>();
  const double before = *total, added = static_cast<double>(rows);
  const double weight = before * added / (before + added);
  for (int64_t c = 0; c < features; ++c) moved[c] = own[c] - means[c];

  visit_tiles(TileGrid(features, features, true), [&] {
    return [&, sums = std::vector<double>(kTile * kTile),
            product = at::empty({0}, centred.options())](const Tile& tile) mutable {
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int64_t first = 0; first < rows; first += kGramRows) {
        const at::Tensor part = centred.narrow(0, first, std::min(kGramRows, rows - first));
        product.resize_({tile.rows, tile.cols});
        at::mm_out(product, part.narrow(1, tile.row, tile.rows).t(),
                   part.narrow(1, tile.col, tile.cols));
        const auto* value = product.const_data_ptr<value_t>();
        for (int64_t i = 0; i < tile.rows * tile.cols; ++i) sums[i] += value[i];
      }
      for (int64_t i = 0; i < tile.rows; ++i) {
        const int64_t row = tile.row + i;
        for (int64_t j = std::max<int64_t>(0, row - tile.col); j < tile.cols; ++j) {
          const int64_t col = tile.col + j;
          const double sum = matrix[row * features + col] + sums[i * tile.cols + j] -
                             added * rest[row] * rest[col] + weight * moved[row] * moved[col];
          matrix[row * features + col] = sum;
          matrix[col * features + row] = sum;
        }
      }
    };
  });
  for (int64_t c = 0; c < features; ++c) means[c] += moved[c] * (added / (before + added));
  *total = before + added;
}

void gram_cpu(const at::Tensor& count, const at::Tensor& mean, const at::Tensor& products,
              const at::Tensor& x) {
  check_gram(count, mean, products, x);
  if (x.size(0) > 0) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "gram_",
                                    [&] { add_rows<scalar_t>(count, mean, products, x); });
  }
  for (const at::Tensor& t : {count, mean, products}) bump_version(t);
}

}  // namespace
}  // namespace neusemslice::ops

TORCH_LIBRARY_IMPL(neusemslice, CPU, m) { m.impl("gram_", &neusemslice::ops::gram_cpu); }
