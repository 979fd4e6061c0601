#pragma once

// The loops of the similarity operators, free of torch. They lie in similarity_body.h, which is
// compiled once per instruction set.

#include <cstdint>

#include "common/elements.h"
#include "common/similarity.h"

namespace neusemslice::cpu {

// Rows and columns of a tile of pairs: large enough for products of rows to be efficient, small
// enough for the second-level cache. Results of one tile lie kTile apart from row to row.
constexpr int64_t kTile = 384;

// Sets are counted in steps of 16 elements, at most so many at a time: counts of a piece, and the
// sum of two, then fit into 16 bits.
constexpr int64_t kPieceSteps = 2047;

// Counts a piece of the elements that the sets of a tile have in common. The step s of row i is
// a[i * a_stride + s]; that of column j is b[s * kTile + j], for all kTile columns.
struct CommonJob {
  const uint16_t* a;
  int64_t a_stride;
  const uint16_t* b;
  int64_t rows;
  int64_t steps;     // 1 to kPieceSteps
  uint16_t* common;  // [rows, kTile]
};

// One row of a tile: what the row's set has in common with those of the columns, and how large they
// are. Arrays of a row have kTile places, whatever the number of columns.
template <typename Count>
struct CommonRow {
  const Count* common;
  int64_t row_size;
  const Count* col_sizes;
  int64_t cols;
};

// Which columns to look at, in ascending order; the return value is their number. A list of a row
// has kFound places, because its end is written 32 at a time.
using Found = uint16_t;
constexpr int64_t kFound = kTile + 32;

// Rows of `size` adjacent elements, to be made unit vectors (see UnitMap) of float64 for float64
// elements, else of float32.
struct UnitJob {
  const void* x;
  Element element;
  int64_t size;
  bool centre;
  void* unit;
};

struct SimilarityLoops {
  void (*count_common)(const CommonJob& job);

  // Values of similarity, of row and column, and with `mirrored` of column and row.
  void (*set_values_16)(SetMetric metric, bool mirrored, const CommonRow<uint16_t>& row,
                        float* values);
  void (*set_values_32)(SetMetric metric, bool mirrored, const CommonRow<uint32_t>& row,
                        float* values);

  // Columns from `first` on whose common size is above key * ratio / 65536, rounded down, each plus
  // `base`. The key is the sum of the two sizes, or with `smaller` the smaller of them.
  int64_t (*find_common)(const CommonRow<uint16_t>& row, bool smaller, uint16_t ratio,
                         int64_t first, int64_t base, Found* found);

  // Columns from `first` on with values[j] >= bound, or mirror[j] >= bounds[j].
  int64_t (*find_floats)(const float* values, float bound, const float* mirror, const float* bounds,
                         int64_t first, int64_t cols, Found* found);
  int64_t (*find_doubles)(const double* values, double bound, const double* mirror,
                          const double* bounds, int64_t first, int64_t cols, Found* found);

  void (*unit_rows)(const UnitJob& job, int64_t first, int64_t last);

  // Brings the values of a tile's first rows and columns into [-1, 1].
  void (*clamp_floats)(float* values, int64_t rows, int64_t cols);
  void (*clamp_doubles)(double* values, int64_t rows, int64_t cols);
};

extern const SimilarityLoops kSimilarityPortable;
extern const SimilarityLoops kSimilarityAvx2;
extern const SimilarityLoops kSimilarityAvx512;
extern const SimilarityLoops kSimilarityAvx512Bitalg;

}  // namespace neusemslice::cpu
