// CPU kernels of rows of numbers (contract: ops/similarity.h).
//
// A tile is one at::mm of unit vectors into a buffer that stays in the cache, run on one thread:
// given several, BLAS may divide the sum over D among them, and the bits then change with their
// number. Inside the parallel region BLAS stays on the caller's thread.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "common/similarity.h"
#include "ops/checks.h"
#include "ops/cpu/capability.h"
#include "ops/cpu/similarity_job.h"
#include "ops/cpu/similarity_tiles.h"
#include "ops/similarity.h"

namespace neusemslice::ops {

const cpu::SimilarityLoops& similarity_loops() {
#if defined(__x86_64__)
  switch (cpu::capability()) {
    case cpu::Capability::kAvx512Bitalg:
      return cpu::kSimilarityAvx512Bitalg;
    case cpu::Capability::kAvx512:
      return cpu::kSimilarityAvx512;
    case cpu::Capability::kAvx2:
      return cpu::kSimilarityAvx2;
    case cpu::Capability::kPortable:
      break;
  }
#endif
  return cpu::kSimilarityPortable;
}

namespace {

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
  const Vectors& vectors;
  at::Tensor a;
  at::Tensor b;

  explicit UnitVectors(const Vectors& v)
      : vectors(v),
        a(unit_rows(v.a, v.centre, v.value_type())),
        b(v.self ? a : unit_rows(v.b, v.centre, v.value_type())) {}

  TileGrid grid() const { return {vectors.rows, vectors.cols, vectors.self}; }
};

// What one thread needs for a tile.
template <typename value_t>
class RowTile {
 public:
  explicit RowTile(const UnitVectors& unit)
      : unit_(unit), buffer_(at::empty({kTile, kTile}, unit.a.options())) {}

  TileValues<value_t> values(const Tile& tile) {
    at::Tensor product = buffer_.narrow(0, 0, tile.rows).narrow(1, 0, tile.cols);
    at::mm_out(product, unit_.a.narrow(0, tile.row, tile.rows),
               unit_.b.narrow(0, tile.col, tile.cols).t());
    value_t* values = buffer_.mutable_data_ptr<value_t>();
    for (int64_t i = 0; i < tile.rows; ++i) {
      for (int64_t j = 0; j < tile.cols; ++j) {
        values[i * kTile + j] = clamp_similarity(values[i * kTile + j]);
      }
    }
    if (unit_.vectors.self && tile.row == tile.col) {
      for (int64_t i = 0; i < tile.rows; ++i) {
        values[i * kTile + i] = self_similarity(values[i * kTile + i]);
      }
    }
    return {values, values};
  }

 private:
  const UnitVectors& unit_;
  at::Tensor buffer_;
};

at::Tensor pairwise_similarity_cpu(const at::Tensor& a, const OptionalTensor& b,
                                   std::string_view metric) {
  const Vectors v = checked_vectors("pairwise_similarity", a, b, metric);
  const UnitVectors unit(v);
  at::Tensor out = at::empty({v.rows, v.cols}, unit.a.options());
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "pairwise_similarity", [&] {
    scalar_t* result = out.mutable_data_ptr<scalar_t>();
    visit_tiles(unit.grid(), [&] {
      return [&, source = RowTile<scalar_t>(unit)](const Tile& tile) mutable {
        write_tile(tile, source.values(tile), v.self, v.cols, result);
      };
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
  return AT_DISPATCH_FLOATING_TYPES(unit.a.scalar_type(), "pairwise_similarity_edges", [&] {
    EdgeParts<scalar_t> parts;
    visit_tiles(unit.grid(), [&] {
      return [&, source = RowTile<scalar_t>(unit)](const Tile& tile) mutable {
        parts.add(tile.row, tile.col, tile_edges(tile, source.values(tile), v.self, threshold));
      };
    });
    return parts.sorted(v.rows, unit.a.options());
  });
}

NeighbourTensors pairwise_similarity_topk_cpu(const at::Tensor& a, const OptionalTensor& b,
                                              std::string_view metric, int64_t k) {
  const char* op = "pairwise_similarity_topk";
  const Vectors v = checked_vectors(op, a, b, metric);
  check_k(op, k);
  const UnitVectors unit(v);
  return AT_DISPATCH_FLOATING_TYPES(unit.a.scalar_type(), "pairwise_similarity_topk", [&] {
    return find_nearest<scalar_t>(unit.grid(), v.rows, v.cols, k, v.self, unit.a.options(), [&] {
      return [source = RowTile<scalar_t>(unit)](const Tile& tile) mutable {
        return source.values(tile);
      };
    });
  });
}

}  // namespace
}  // namespace neusemslice::ops

TORCH_LIBRARY_IMPL(neusemslice, CPU, m) {
  m.impl("pairwise_similarity", &neusemslice::ops::pairwise_similarity_cpu);
  m.impl("pairwise_similarity_edges", &neusemslice::ops::pairwise_similarity_edges_cpu);
  m.impl("pairwise_similarity_topk", &neusemslice::ops::pairwise_similarity_topk_cpu);
}
