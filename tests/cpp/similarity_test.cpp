// The arithmetic of common/similarity.h, without torch.

#include "common/similarity.h"

#include <gtest/gtest.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace neusemslice {
namespace {

// The product of the unit vectors of two rows.
template <typename scalar_t>
double similarity(const std::vector<scalar_t>& a, const std::vector<scalar_t>& b, bool centre) {
  const int64_t size = static_cast<int64_t>(a.size());
  const UnitMap map_a = unit_map(a.data(), 1, size, centre);
  const UnitMap map_b = unit_map(b.data(), 1, size, centre);
  double product = 0;
  for (int64_t d = 0; d < size; ++d) product += map_a(a[d]) * map_b(b[d]);
  return product;
}

TEST(Bitset, WordsForRoundsUp) {
  EXPECT_EQ(words_for(0), 0);
  EXPECT_EQ(words_for(1), 1);
  EXPECT_EQ(words_for(64), 1);
  EXPECT_EQ(words_for(65), 2);
  EXPECT_EQ(words_for(std::numeric_limits<int64_t>::max()), int64_t{1} << 57);
}

TEST(Bitset, PackPutsElementJInBitJ) {
  bool elements[64] = {};
  elements[0] = elements[3] = elements[63] = true;
  EXPECT_EQ(static_cast<uint64_t>(pack_word(elements, 64)), 0x8000000000000009u);
  EXPECT_EQ(pack_word(elements, 63), 9);
  EXPECT_EQ(pack_word(elements, 1), 1);
  EXPECT_EQ(pack_word(elements, 0), 0);
}

TEST(Bitset, CountsAllBitsOfAllWords) {
  EXPECT_EQ(popcount(0), 0);
  EXPECT_EQ(popcount(-1), 64);
  EXPECT_EQ(popcount(std::numeric_limits<int64_t>::min()), 1);
  const int64_t a[] = {-1, 5, 0};
  const int64_t b[] = {7, 4, -1};
  EXPECT_EQ(set_size(a, 3), 66);
  EXPECT_EQ(set_size(a, 0), 0);
  EXPECT_EQ(common_size(a, b, 3), 4);
}

TEST(LeastCommon, IsWhereTheQuotientReachesTheThreshold) {
  for (const SetMetric metric :
       {SetMetric::jaccard, SetMetric::dice, SetMetric::overlap, SetMetric::containment}) {
    for (const double threshold : {-1.0, 0.0, 1e-9, 0.1, 0.3, 1.0 / 3.0, 0.5, 0.7, 0.9999, 1.0}) {
      for (int64_t a = 0; a <= 40; ++a) {
        for (int64_t b = 0; b <= 40; ++b) {
          const int64_t least = least_common(metric, size_key(metric, a, b), threshold);
          for (int64_t common = 0; common <= (a < b ? a : b); ++common) {
            EXPECT_EQ(common >= least, set_similarity(metric, common, a, b) >= threshold);
          }
        }
      }
    }
  }
}

TEST(SetSimilarity, FollowsTheDefinitions) {
  EXPECT_EQ(set_similarity(SetMetric::jaccard, 2, 3, 6), 2.0 / 7.0);
  EXPECT_EQ(set_similarity(SetMetric::dice, 2, 3, 6), 4.0 / 9.0);
  EXPECT_EQ(set_similarity(SetMetric::overlap, 2, 3, 6), 2.0 / 3.0);
  EXPECT_EQ(set_similarity(SetMetric::overlap, 2, 6, 3), 2.0 / 3.0);
  EXPECT_EQ(set_similarity(SetMetric::containment, 2, 3, 6), 2.0 / 3.0);
  EXPECT_EQ(set_similarity(SetMetric::containment, 2, 6, 3), 2.0 / 6.0);
  EXPECT_FALSE(is_symmetric(SetMetric::containment));
  EXPECT_TRUE(is_symmetric(SetMetric::jaccard));
}

TEST(SetSimilarity, EmptySetIsSimilarToNothing) {
  for (const SetMetric metric :
       {SetMetric::jaccard, SetMetric::dice, SetMetric::overlap, SetMetric::containment}) {
    EXPECT_EQ(set_similarity(metric, 0, 0, 0), 0.0);
    EXPECT_EQ(set_similarity(metric, 0, 0, 5), 0.0);
    EXPECT_EQ(set_similarity(metric, 0, 5, 0), 0.0);
    EXPECT_EQ(set_similarity(metric, 5, 5, 5), 1.0);
  }
}

TEST(SetSimilarity, SizesBeyond32Bits) {
  const int64_t many = int64_t{1} << 40;
  EXPECT_EQ(set_similarity(SetMetric::jaccard, many, 2 * many, 2 * many), 1.0 / 3.0);
  EXPECT_EQ(set_similarity(SetMetric::dice, many, 2 * many, 2 * many), 0.5);
}

TEST(UnitMap, CosineAndPearson) {
  const std::vector<float> a{3, 4};
  const std::vector<float> b{4, 3};
  EXPECT_DOUBLE_EQ(similarity(a, b, false), 24.0 / 25.0);
  EXPECT_DOUBLE_EQ(similarity(a, b, true), -1.0);
  EXPECT_DOUBLE_EQ(similarity<double>({1, 2, 4}, {10, 20, 40}, true), 1.0);
}

TEST(UnitMap, ReadsStrides) {
  const double rows[] = {3, -9, 4, -9};
  const UnitMap map = unit_map(rows, 2, 2, false);
  EXPECT_DOUBLE_EQ(map(3), 0.6);
  EXPECT_DOUBLE_EQ(map(4), 0.8);
}

TEST(UnitMap, RowWithoutADirectionIsZero) {
  const double zeros[] = {0, -0.0, 0};
  const double constant[] = {0.1, 0.1, 0.1};
  for (const bool centre : {false, true}) {
    EXPECT_EQ(unit_map(zeros, 1, 3, centre)(0), 0);
    EXPECT_EQ(unit_map(zeros, 1, 0, centre).norm, 0);
  }
  EXPECT_EQ(unit_map(constant, 1, 3, true).norm, 0);
  EXPECT_EQ(unit_map(constant, 1, 3, true)(0.1), 0);
  EXPECT_EQ(unit_map(constant, 1, 1, true)(0.1), 0);
}

TEST(UnitMap, NoSquareOverflowsOrVanishes) {
  for (const double size : {DBL_MAX / 4, DBL_MIN, DBL_TRUE_MIN, 1e200, 1e-200}) {
    EXPECT_NEAR(similarity<double>({3 * size, 4 * size}, {4 * size, 3 * size}, false), 0.96, 1e-15);
    EXPECT_NEAR(similarity<double>({3 * size, 4 * size}, {4 * size, 3 * size}, true), -1.0, 1e-15);
  }
  EXPECT_NEAR(similarity<double>({DBL_MAX, -DBL_MAX}, {-1, 1}, true), -1.0, 1e-15);
}

TEST(UnitMap, RowThatHardlyVariesKeepsItsDigits) {
  const double far = 1e9;
  const std::vector<double> a{far + 1, far + 2, far + 4};
  EXPECT_NEAR(similarity<double>(a, {1, 2, 4}, true), 1.0, 1e-15);
}

TEST(UnitMap, NonfiniteRowIsNan) {
  for (const double bad : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
    const double row[] = {1, bad, 0};
    for (const bool centre : {false, true}) {
      const UnitMap map = unit_map(row, 1, 3, centre);
      for (const double value : row) EXPECT_TRUE(std::isnan(map(value)));
    }
  }
}

TEST(Finalize, ClampsAndKeepsNan) {
  EXPECT_EQ(clamp_similarity(1.0000001f), 1.0f);
  EXPECT_EQ(clamp_similarity(-1.0000001f), -1.0f);
  EXPECT_EQ(clamp_similarity(0.25), 0.25);
  EXPECT_TRUE(std::isnan(clamp_similarity(std::nanf(""))));
  EXPECT_EQ(self_similarity(0.9999999f), 1.0f);
  EXPECT_EQ(self_similarity(0.0), 0.0);
  EXPECT_TRUE(std::isnan(self_similarity(std::nan(""))));
}

TEST(Edges, PairsOfOneTensor) {
  EXPECT_TRUE(is_included(Pairs::all, 1, 1));
  EXPECT_FALSE(is_included(Pairs::distinct, 1, 1));
  EXPECT_TRUE(is_included(Pairs::distinct, 2, 1));
  EXPECT_FALSE(is_included(Pairs::upper, 2, 1));
  EXPECT_FALSE(is_included(Pairs::upper, 1, 1));
  EXPECT_TRUE(is_included(Pairs::upper, 1, 2));
}

}  // namespace
}  // namespace neusemslice
