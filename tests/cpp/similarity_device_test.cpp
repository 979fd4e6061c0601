// The CUDA kernels of the similarity operators on the simulated device, against counting by hand
// and against float64.

#include "ops/cuda/similarity.cuh"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "half_types.h"

namespace neusemslice::cuda {
namespace {

constexpr int kBlock = 128;

struct BitSets {
  int64_t rows, size, words;
  std::unique_ptr<bool[]> bits;
  std::vector<int64_t> packed, sizes;

  BitSets(int64_t rows_, int64_t size_, unsigned seed)
      : rows(rows_),
        size(size_),
        words(words_for(size_)),
        bits(std::make_unique<bool[]>(rows_ * size_)),
        packed(rows_ * words_for(size_)),
        sizes(rows_) {
    std::mt19937 random(seed);
    for (int64_t i = 0; i < rows * size; ++i) bits[i] = random() % 3 == 0;
    const int64_t total = rows * words;
    launch("pack_kernel", &pack_kernel, {blocks_for(total, kBlock)}, kBlock, bits.get(), size,
           words, total, packed.data());
    launch("set_sizes_kernel", &set_sizes_kernel, {blocks_for(rows, kBlock)}, kBlock, packed.data(),
           rows, words, sizes.data());
  }
  bool has(int64_t r, int64_t j) const { return bits[r * size + j]; }
};

double by_hand(const BitSets& a, int64_t r, const BitSets& b, int64_t c, SetMetric metric) {
  double common = 0, in_a = 0, in_b = 0;
  for (int64_t j = 0; j < a.size; ++j) {
    common += a.has(r, j) && b.has(c, j);
    in_a += a.has(r, j);
    in_b += b.has(c, j);
  }
  double of = in_a;
  if (metric == SetMetric::jaccard) of = in_a + in_b - common;
  if (metric == SetMetric::dice) of = (in_a + in_b) / 2;
  if (metric == SetMetric::overlap) of = std::min(in_a, in_b);
  return of == 0 ? 0 : common / of;
}

DeviceSets device_sets(const BitSets& a, const BitSets& b, SetMetric metric, bool self) {
  return {a.packed.data(), b.packed.data(), a.sizes.data(), b.sizes.data(),
          a.words,         b.rows,          metric,         self};
}

class SetSimilarityDevice : public testing::TestWithParam<SetMetric> {};

TEST_P(SetSimilarityDevice, DenseEqualsCountingByHand) {
  for (const int64_t size : {1, 130, 1100}) {
    if (size != 130 && GetParam() != SetMetric::jaccard) continue;
    host::set_seed(static_cast<unsigned>(size));
    const BitSets a(70, size, 1), b(size == 130 ? 131 : 9, size, 2);
    for (const bool self : {false, true}) {
      const BitSets& other = self ? a : b;
      std::vector<float> out(a.rows * other.rows, -1);
      // Two tiles, of which the second is not square.
      for (const PairTile& tile :
           {PairTile{0, 0, 65, other.rows}, PairTile{65, 0, 5, other.rows}}) {
        launch("set_similarity_kernel", &set_similarity_kernel,
               {blocks_for(tile.cols, kSetSide), blocks_for(tile.rows, kSetSide)}, kSetThreads,
               device_sets(a, other, GetParam(), self), tile, out.data());
      }
      for (int64_t r = 0; r < a.rows; ++r) {
        for (int64_t c = 0; c < other.rows; ++c) {
          ASSERT_EQ(out[r * other.rows + c],
                    static_cast<float>(by_hand(a, r, other, c, GetParam())));
        }
      }
    }
  }
}

TEST_P(SetSimilarityDevice, EdgesAreThePairsAtTheThreshold) {
  const BitSets a(7, 70, 3);
  const Pairs pairs = is_symmetric(GetParam()) ? Pairs::upper : Pairs::distinct;
  const PairTile tile{0, 0, 7, 7};
  std::vector<float> values(49, -1);
  auto is_edge = std::make_unique<bool[]>(49);
  launch("set_edges_kernel", &set_edges_kernel, {1, 1}, kSetThreads,
         device_sets(a, a, GetParam(), true), tile, pairs, 0.25, values.data(), is_edge.get());
  for (int64_t r = 0; r < 7; ++r) {
    for (int64_t c = 0; c < 7; ++c) {
      const bool included = is_symmetric(GetParam()) ? r < c : r != c;
      const double value = included ? by_hand(a, r, a, c, GetParam()) : 0;
      ASSERT_EQ(values[r * 7 + c], static_cast<float>(value));
      ASSERT_EQ(is_edge[r * 7 + c], included && value >= 0.25);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Metrics, SetSimilarityDevice,
                         testing::Values(SetMetric::jaccard, SetMetric::dice, SetMetric::overlap,
                                         SetMetric::containment));

template <typename T>
class UnitRowsDevice : public testing::Test {};
using Elements = testing::Types<double, float, Half16, Brain16>;
TYPED_TEST_SUITE(UnitRowsDevice, Elements);

TYPED_TEST(UnitRowsDevice, EqualsFloat64) {
  using Value = std::conditional_t<std::is_same_v<TypeParam, double>, double, float>;
  std::mt19937 random(4);
  std::normal_distribution<double> value(0.5, 1);
  for (const int64_t size : {1, 33}) {
    for (const bool centre : {false, true}) {
      constexpr int64_t kRows = 33;
      // Rows lie one value apart, and a row's values a row of rows apart.
      std::vector<TypeParam> x(kRows * size);
      for (TypeParam& v : x) v = static_cast<TypeParam>(value(random));
      for (int64_t d = 0; d < size; ++d) x[d * kRows + 3] = TypeParam(0.0f);
      std::vector<Value> unit(kRows * size, Value(9));
      launch("unit_rows_kernel", &unit_rows_kernel<TypeParam, Value>,
             {blocks_for(kRows * kWarp, kBlock)}, kBlock, x.data(), kRows, size, int64_t{1}, kRows,
             centre, unit.data());
      for (int64_t r = 0; r < kRows; ++r) {
        double mean = 0, squares = 0;
        for (int64_t d = 0; d < size; ++d) mean += static_cast<double>(x[d * kRows + r]);
        mean = centre ? mean / static_cast<double>(size) : 0;
        for (int64_t d = 0; d < size; ++d) {
          squares += std::pow(static_cast<double>(x[d * kRows + r]) - mean, 2);
        }
        for (int64_t d = 0; d < size; ++d) {
          const double centred = static_cast<double>(x[d * kRows + r]) - mean;
          const bool nothing = squares == 0 || (centre && size == 1);
          ASSERT_NEAR(unit[r * size + d], nothing ? 0 : centred / std::sqrt(squares), 1e-6);
        }
      }
    }
  }
}

TEST(PairwiseSimilarityDevice, ClampsMirrorsAndFindsEdges) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  // Products of three rows: the second has no direction, the third is not a number.
  const std::vector<float> product{1.0000001f, 0, nan, 0, 0, nan, nan, nan, nan};
  const PairTile tile{0, 0, 3, 3};
  std::vector<float> out(9, -2);
  launch("similarity_kernel", &similarity_kernel<float>, {1, 2}, kBlock, product.data(), tile, true,
         true, int64_t{3}, out.data());
  EXPECT_EQ(out[0], 1);
  EXPECT_EQ(out[1], 0);
  EXPECT_EQ(out[3], 0);
  EXPECT_EQ(out[4], 0);
  for (const int i : {2, 5, 6, 7, 8}) EXPECT_TRUE(std::isnan(out[i])) << i;

  std::vector<double> values{1.5, -3, 0.5, 0.5, 0.4, 0.2};
  auto is_edge = std::make_unique<bool[]>(6);
  launch("edges_kernel", &edges_kernel<double>, {1, 1}, kBlock, values.data(), PairTile{4, 5, 2, 3},
         Pairs::upper, true, 0.5, is_edge.get());
  EXPECT_EQ(values, (std::vector<double>{1, -1, 0.5, 0.5, 0.4, 0.2}));
  const bool expected[] = {true, false, true, false, false, false};
  for (int i = 0; i < 6; ++i) EXPECT_EQ(is_edge[i], expected[i]) << i;
}

TEST(PairwiseSimilarityDevice, LeavesDotProductsAsTheyAre) {
  const std::vector<float> product{9, -4, -4, 0};
  std::vector<float> out(4, -2);
  launch("similarity_kernel", &similarity_kernel<float>, {1, 2}, kBlock, product.data(),
         PairTile{0, 0, 2, 2}, true, false, int64_t{2}, out.data());
  EXPECT_EQ(out, product);

  std::vector<double> values{7, -3, 2};
  const std::vector<double> before = values;
  auto is_edge = std::make_unique<bool[]>(3);
  launch("edges_kernel", &edges_kernel<double>, {1, 1}, kBlock, values.data(), PairTile{0, 1, 1, 3},
         Pairs::upper, false, 2.0, is_edge.get());
  EXPECT_EQ(values, before);
  const bool expected[] = {true, false, true};
  for (int i = 0; i < 3; ++i) EXPECT_EQ(is_edge[i], expected[i]) << i;
}

}  // namespace
}  // namespace neusemslice::cuda
