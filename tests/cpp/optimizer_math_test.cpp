// The arithmetic of one element against formulas worked out by hand, and the places of tuned rows
// against plain indexing.

#include "common/optimizer_math.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "common/tuned_rows.h"

namespace neusemslice {
namespace {

template <typename T>
class OptimizerMath : public ::testing::Test {
 protected:
  static constexpr double kTolerance = sizeof(T) == 8 ? 1e-15 : 1e-7;

  // One step of a row that has had `updates`; the rule's state is `state`.
  template <typename Rule>
  static T step(const Rule& rule, double lr, double updates, double param, double grad,
                T* state = nullptr, double scale = 1) {
    return neusemslice::step(rule, rule.row(lr, updates), static_cast<T>(param),
                             static_cast<T>(grad), static_cast<T>(scale), state);
  }
};

using Types = ::testing::Types<float, double>;
TYPED_TEST_SUITE(OptimizerMath, Types);

TYPED_TEST(OptimizerMath, SgdWithoutMomentum) {
  const Sgd<TypeParam> rule(0, 0, 0, false, false);
  EXPECT_NEAR(this->step(rule, 0.1, 0, 2, 3), 1.7, 4 * this->kTolerance);
}

TYPED_TEST(OptimizerMath, SgdDecaysAfterTheSignIsTurned) {
  const Sgd<TypeParam> rule(0, 0, 0.5, false, true);
  // The gradient is -3 + 0.5 * 2.
  EXPECT_NEAR(this->step(rule, 0.1, 0, 2, 3), 2.2, 4 * this->kTolerance);
}

TYPED_TEST(OptimizerMath, SgdFirstMomentumIsTheGradientUndamped) {
  const Sgd<TypeParam> rule(0.9, 0.5, 0, false, false);
  TypeParam buffer = 100;
  const TypeParam param = this->step(rule, 0.1, 0, 2, 3, &buffer);
  EXPECT_EQ(buffer, TypeParam(3));
  EXPECT_NEAR(param, 1.7, 4 * this->kTolerance);
  EXPECT_NEAR(this->step(rule, 0.1, 1, param, 1, &buffer), 1.7 - 0.1 * 3.2, 4 * this->kTolerance);
  EXPECT_NEAR(buffer, 3.2, 4 * this->kTolerance);
}

TYPED_TEST(OptimizerMath, SgdNesterovLooksAhead) {
  const Sgd<TypeParam> rule(0.9, 0, 0, true, false);
  TypeParam buffer = 2;
  // The buffer becomes 0.9 * 2 + 1, the gradient 1 + 0.9 * 2.8.
  EXPECT_NEAR(this->step(rule, 0.1, 7, 2, 1, &buffer), 2 - 0.352, 4 * this->kTolerance);
  EXPECT_NEAR(buffer, 2.8, 4 * this->kTolerance);
}

TYPED_TEST(OptimizerMath, GradientIsDividedByItsScale) {
  const Sgd<TypeParam> sgd(0, 0, 0, false, false);
  EXPECT_EQ(this->step(sgd, 0.1, 0, 2, 96, nullptr, 32), this->step(sgd, 0.1, 0, 2, 3));
  const Adamw<TypeParam> adamw(0.9, 0.999, 1e-8, 0.01, true, false, false);
  TypeParam scaled[] = {1, 1};
  TypeParam plain[] = {1, 1};
  EXPECT_EQ(this->step(adamw, 0.1, 4, 2, 96, scaled, 32), this->step(adamw, 0.1, 4, 2, 3, plain));
  EXPECT_EQ(scaled[0], plain[0]);
  EXPECT_EQ(scaled[1], plain[1]);
}

TYPED_TEST(OptimizerMath, AdamwFirstStepHasTheLengthOfTheLearningRate) {
  const Adamw<TypeParam> rule(0.9, 0.999, 0, 0, true, false, false);
  for (const double grad : {1e-3, 7.0, -40.0}) {
    TypeParam state[] = {0, 0};
    EXPECT_NEAR(this->step(rule, 0.1, 0, 2, grad, state), grad > 0 ? 1.9 : 2.1,
                10 * this->kTolerance);
  }
}

TYPED_TEST(OptimizerMath, AdamwFollowsItsFormulas) {
  for (const bool decoupled : {true, false}) {
    const Adamw<TypeParam> rule(0.8, 0.95, 1e-3, 0.02, decoupled, false, true);
    TypeParam param = 1.5;
    TypeParam state[] = {0, 0};
    double expected = 1.5;
    double m_expected = 0;
    double v_expected = 0;
    for (int t = 1; t <= 20; ++t) {
      const double grad = -std::cos(t) + (decoupled ? 0 : 0.02 * expected);
      m_expected = 0.8 * m_expected + 0.2 * grad;
      v_expected = 0.95 * v_expected + 0.05 * grad * grad;
      const double m_hat = m_expected / (1 - std::pow(0.8, t));
      const double v_hat = v_expected / (1 - std::pow(0.95, t));
      if (decoupled) expected -= 0.01 * 0.02 * expected;
      expected -= 0.01 * m_hat / (std::sqrt(v_hat) + 1e-3);
      param = this->step(rule, 0.01, t - 1, param, std::cos(t), state);
      EXPECT_NEAR(param, expected, 20 * this->kTolerance);
      EXPECT_NEAR(state[0], m_expected, 20 * this->kTolerance);
      EXPECT_NEAR(state[1], v_expected, 20 * this->kTolerance);
    }
  }
}

TYPED_TEST(OptimizerMath, AmsgradDividesByTheLargestSoFar) {
  const Adamw<TypeParam> rule(0, 0, 0, 0, true, true, false);
  TypeParam state[] = {0, 0, 0};
  this->step(rule, 0.1, 0, 0, 4, state);
  EXPECT_EQ(state[2], TypeParam(16));
  // Without the maximum the step would have the length 0.1.
  EXPECT_NEAR(this->step(rule, 0.1, 1, 0, 1, state), -0.025, this->kTolerance);
  EXPECT_EQ(state[1], TypeParam(1));
  EXPECT_EQ(state[2], TypeParam(16));
  this->step(rule, 0.1, 2, 0, std::numeric_limits<TypeParam>::quiet_NaN(), state);
  EXPECT_TRUE(std::isnan(state[2]));
}

TYPED_TEST(OptimizerMath, AdamwInterpolatesFromTheNearerEnd) {
  const Adamw<TypeParam> rule(0, 0.9, 1e-8, 0, true, false, false);
  TypeParam state[] = {static_cast<TypeParam>(1e10), 0};
  this->step(rule, 0.1, 0, 0, 0.3, state);
  EXPECT_EQ(state[0], static_cast<TypeParam>(0.3));
}

// Offsets of all elements in the order of the state, found through TunedRows.
struct Offsets {
  std::vector<int64_t> row;
  std::vector<int64_t> param;
  std::vector<int64_t> grad;
};

Offsets offsets(const TunedRows& where) {
  Offsets all;
  for (int64_t line = 0; line < where.lines; ++line) {
    for (int64_t i = 0; i < where.width; ++i) {
      const TunedRows::Place at = where.along(where.line(line), i);
      all.row.push_back(at.row);
      all.param.push_back(at.param);
      all.grad.push_back(at.grad);
    }
  }
  return all;
}

TEST(TunedRows, RowsOfAContiguousMatrixAreLines) {
  const int64_t rows[] = {1, 3};
  TunedRows where;
  where.rows = rows;
  where.dimension = 4;
  where.append_neurons(2, 3, 3);
  where.append(3, 1, 1);
  where.finish();
  EXPECT_EQ(where.lines, 2);
  EXPECT_EQ(where.width, 3);
  const Offsets all = offsets(where);
  EXPECT_EQ(all.row, (std::vector<int64_t>{0, 0, 0, 1, 1, 1}));
  EXPECT_EQ(all.param, (std::vector<int64_t>{3, 4, 5, 9, 10, 11}));
  EXPECT_EQ(all.grad, all.param);
}

TEST(TunedRows, ColumnsWithACompactGradient) {
  const int64_t rows[] = {0, 2};
  TunedRows where;
  where.rows = rows;
  where.dimension = 3;
  where.compact_grad = true;
  where.append(2, 3, 2);
  where.append_neurons(2, 1, 1);
  where.finish();
  const Offsets all = offsets(where);
  EXPECT_EQ(all.row, (std::vector<int64_t>{0, 1, 0, 1}));
  EXPECT_EQ(all.param, (std::vector<int64_t>{0, 2, 3, 5}));
  EXPECT_EQ(all.grad, (std::vector<int64_t>{0, 1, 2, 3}));
}

TEST(TunedRows, AxesThatRunTogetherBecomeOneButNotAcrossTheNeurons) {
  const int64_t rows[] = {0, 1, 2};
  TunedRows where;
  where.rows = rows;
  where.dimension = 3;
  // A contiguous [2, 5, 3, 7, 11], whose gradient is contiguous too.
  for (const auto& [size, stride] : {std::pair{2, 1155}, std::pair{5, 231}}) {
    where.append(size, stride, stride);
  }
  where.append_neurons(3, 77, 77);
  where.append(7, 11, 11);
  where.append(11, 1, 1);
  where.finish();
  EXPECT_EQ(where.axis_count, 3);
  const Offsets all = offsets(where);
  for (size_t i = 0; i < all.param.size(); ++i) EXPECT_EQ(all.param[i], static_cast<int64_t>(i));
}

TEST(TunedRows, AxesWithDifferentStridesStayApart) {
  const int64_t rows[] = {1};
  TunedRows where;
  where.rows = rows;
  where.dimension = 2;
  // A [2, 3, 4] with strides of [2, 4, 3] permuted, and a contiguous gradient.
  where.append_neurons(1, 12, 12);
  where.append(3, 1, 4);
  where.append(4, 3, 1);
  where.finish();
  EXPECT_EQ(where.axis_count, 3);
  const Offsets all = offsets(where);
  size_t i = 0;
  for (int64_t a = 0; a < 3; ++a) {
    for (int64_t b = 0; b < 4; ++b, ++i) {
      EXPECT_EQ(all.param[i], 12 + a + 3 * b);
      EXPECT_EQ(all.grad[i], 12 + 4 * a + b);
    }
  }
}

TEST(TunedRows, JoinedRowsAreOneLine) {
  const int64_t rows[] = {0, 1, 2};
  TunedRows where;
  where.rows = rows;
  where.dimension = 3;
  where.append(2, 15, 15);
  where.append_neurons(3, 5, 5);
  where.append(5, 1, 1);
  where.finish();
  const Offsets apart = offsets(where);
  where.join_rows();
  EXPECT_EQ(where.lines, 1);
  EXPECT_EQ(where.width, 30);
  EXPECT_FALSE(where.across_rows());
  EXPECT_EQ(offsets(where).param, apart.param);
  EXPECT_EQ(offsets(where).row, std::vector<int64_t>(30, 0));
  TunedRows single;
  single.append_neurons(1, 1, 1);
  single.join_rows();
  EXPECT_EQ(single.lines * single.width, 1);
}

TEST(TunedRows, RowsThatTheParameterDoesNotHaveAreMarked) {
  const int64_t rows[] = {-1, 1, 2, int64_t{1} << 40};
  TunedRows where;
  where.rows = rows;
  where.dimension = 2;
  where.append_neurons(4, 1, 1);
  where.finish();
  EXPECT_EQ(offsets(where).row, (std::vector<int64_t>{-1, 1, -1, -1}));
}

TEST(TunedRows, RoomForAxesIsLimited) {
  TunedRows where;
  where.append_neurons(1, 1, 1);
  for (int a = 1; a < TunedRows::kMaxAxes; ++a) EXPECT_TRUE(where.append(2, 1, 1));
  EXPECT_FALSE(where.append(2, 1, 1));
  EXPECT_TRUE(where.append(1, 1, 1));
}

}  // namespace
}  // namespace neusemslice
