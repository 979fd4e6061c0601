// CPU kernels of rows of numbers (contract: ops/similarity.h).
//
// A tile is one at::mm of rows into a buffer that stays in the cache, run on one thread:
// given several, BLAS may divide the sum over D among them, and the bits then change with their
// number. Inside the parallel region BLAS stays on the caller's thread.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <type_traits>

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

// The rows of x in the result's type, and for all but dot made unit vectors.
at::Tensor prepared_rows(const at::Tensor& x, const Vectors& v) {
  if (!v.unit()) return x.to(v.value_type());
  // A row is read from adjacent elements; other strides are copied once.
  const at::Tensor given = x.contiguous();
  at::Tensor out = at::empty(given.sizes(), given.options().dtype(v.value_type()));
  const cpu::UnitJob job{given.const_data_ptr(), element_of(given), given.size(1), v.centre(),
                         out.mutable_data_ptr()};
  at::parallel_for(0, given.size(0), 16, [&](int64_t begin, int64_t end) {
    similarity_loops().unit_rows(job, begin, end);
  });
  return out;
}

struct PreparedRows {
  const Vectors& vectors;
  at::Tensor a;
  at::Tensor b;

  explicit PreparedRows(const Vectors& v)
      : vectors(v), a(prepared_rows(v.a, v)), b(v.self ? a : prepared_rows(v.b, v)) {}

  TileGrid grid() const { return {vectors.rows, vectors.cols, vectors.self}; }
};

// What one thread needs for a tile.
template <typename value_t>
class RowTile {
 public:
  explicit RowTile(const PreparedRows& prepared)
      : prepared_(prepared), buffer_(at::empty({kTile, kTile}, prepared.a.options())) {}

  TileValues<value_t> values(const Tile& tile) {
    at::Tensor product = buffer_.narrow(0, 0, tile.rows).narrow(1, 0, tile.cols);
    at::mm_out(product, prepared_.a.narrow(0, tile.row, tile.rows),
               prepared_.b.narrow(0, tile.col, tile.cols).t());
    value_t* values = buffer_.mutable_data_ptr<value_t>();
    if (!prepared_.vectors.unit()) return {values, values};
    if constexpr (std::is_same_v<value_t, double>) {
      similarity_loops().clamp_doubles(values, tile.rows, tile.cols);
    } else {
      similarity_loops().clamp_floats(values, tile.rows, tile.cols);
    }
    if (prepared_.vectors.self && tile.row == tile.col) {
      for (int64_t i = 0; i < tile.rows; ++i) {
        values[i * kTile + i] = self_similarity(values[i * kTile + i]);
      }
    }
    return {values, values};
  }

 private:
  const PreparedRows& prepared_;
  at::Tensor buffer_;
};

at::Tensor pairwise_similarity_cpu(const at::Tensor& a, const OptionalTensor& b,
                                   std::string_view metric) {
  const Vectors v = checked_vectors("pairwise_similarity", a, b, metric);
  const PreparedRows prepared(v);
  at::Tensor out = at::empty({v.rows, v.cols}, prepared.a.options());
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "pairwise_similarity", [&] {
    scalar_t* result = out.mutable_data_ptr<scalar_t>();
    visit_tiles(prepared.grid(), [&] {
      return [&, source = RowTile<scalar_t>(prepared)](const Tile& tile) mutable {
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
  const PreparedRows prepared(v);
  return AT_DISPATCH_FLOATING_TYPES(prepared.a.scalar_type(), "pairwise_similarity_edges", [&] {
    EdgeParts<scalar_t> parts;
    visit_tiles(prepared.grid(), [&] {
      return [&, source = RowTile<scalar_t>(prepared)](const Tile& tile) mutable {
        parts.add(tile.row, tile.col, tile_edges(tile, source.values(tile), v.self, threshold));
      };
    });
    return parts.sorted(prepared.a.options());
  });
}

NeighbourTensors pairwise_similarity_topk_cpu(const at::Tensor& a, const OptionalTensor& b,
                                              std::string_view metric, int64_t k) {
  const char* op = "pairwise_similarity_topk";
  const Vectors v = checked_vectors(op, a, b, metric);
  check_k(op, k);
  const PreparedRows prepared(v);
  return AT_DISPATCH_FLOATING_TYPES(prepared.a.scalar_type(), "pairwise_similarity_topk", [&] {
    return find_nearest<scalar_t>(
        prepared.grid(), v.rows, v.cols, k, v.self, prepared.a.options(), [&] {
          return [source = RowTile<scalar_t>(prepared)](const Tile& tile) mutable {
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
