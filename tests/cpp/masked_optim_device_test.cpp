// The CUDA kernels of masked_sgd_ and masked_adamw_ on the simulated device, against the formulas
// in float64; rows that are not tuned keep their bits.

#include "ops/cuda/masked_optim.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "half_types.h"

namespace neusemslice::cuda {
namespace {

constexpr int kBlock = 256;

template <typename T>
constexpr double kRounding = std::numeric_limits<T>::epsilon();
template <>
constexpr double kRounding<Half16> = 0x1p-10;
template <>
constexpr double kRounding<Brain16> = 0x1p-7;

template <typename T>
using Arithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A parameter [kOuter, kNeurons, kInner] that is tuned at some of its neurons, the middle
// dimension.
template <typename T>
struct Problem {
  static constexpr int64_t kOuter = 3, kNeurons = 50, kInner = 7;
  std::vector<int64_t> tuned{0, 3, 4, 17, 49};
  bool compact;
  std::vector<T> param, grad;
  std::vector<Arithmetic<T>> first, second, largest;
  std::vector<float> steps;
  TunedRows where;

  explicit Problem(bool compact_) : compact(compact_) {
    const int64_t count = static_cast<int64_t>(tuned.size());
    const int64_t held = compact ? count : kNeurons;
    std::mt19937 random(7);
    std::normal_distribution<double> value(0, 1);
    const auto fill = [&](std::vector<T>& values, int64_t size) {
      for (int64_t i = 0; i < size; ++i) values.push_back(static_cast<T>(value(random)));
    };
    fill(param, kOuter * kNeurons * kInner);
    fill(grad, kOuter * held * kInner);
    first.assign(elements(), 0);
    second.assign(elements(), 0);
    largest.assign(elements(), 0);
    steps.assign(count, 0);
    where.rows = tuned.data();
    where.dimension = kNeurons;
    where.compact_grad = compact;
    where.append(kOuter, kNeurons * kInner, held * kInner);
    where.append_neurons(count, kInner, kInner);
    where.append(kInner, 1, 1);
    where.finish();
  }
  int64_t elements() const { return kOuter * static_cast<int64_t>(tuned.size()) * kInner; }
  int64_t state_at(int64_t o, int64_t r, int64_t i) const {
    return (o * static_cast<int64_t>(tuned.size()) + r) * kInner + i;
  }
  int64_t param_at(int64_t o, int64_t n, int64_t i) const {
    return (o * kNeurons + n) * kInner + i;
  }
  double gradient(int64_t o, int64_t r, int64_t i) const {
    const int64_t held = compact ? static_cast<int64_t>(tuned.size()) : kNeurons;
    return static_cast<double>(grad[(o * held + (compact ? r : tuned[r])) * kInner + i]);
  }

  template <typename Rule>
  std::vector<typename Rule::Row> begin(const Rule& rule, const StepScalars& scalars) {
    const int64_t count = static_cast<int64_t>(tuned.size());
    std::vector<typename Rule::Row> rows(count);
    launch("begin_rows_kernel", &begin_rows_kernel<Rule>, {1}, kBlock, rule, scalars, where.rows,
           count, where.dimension, steps.data(), rows.data());
    return rows;
  }
  void sgd(const Sgd<Arithmetic<T>>& rule, const StepScalars& scalars) {
    const auto rows = begin(rule, scalars);
    launch("sgd_kernel", &sgd_kernel<T, Arithmetic<T>>, {blocks_for(elements(), kBlock)}, kBlock,
           rule, scalars, where, elements(), rows.data(), param.data(), grad.data(), first.data());
  }
  void adamw(const Adamw<Arithmetic<T>>& rule, const StepScalars& scalars) {
    const auto rows = begin(rule, scalars);
    launch("adamw_kernel", &adamw_kernel<T, Arithmetic<T>>, {blocks_for(elements(), kBlock)},
           kBlock, rule, scalars, where, elements(), rows.data(), param.data(), grad.data(),
           first.data(), second.data(), largest.data());
  }

  // Compares with `before`, to whose tuned elements update(value, gradient, state index) was done.
  template <typename Update>
  void expect_updated(const Problem& before, int updates, const Update& update) const {
    for (int64_t o = 0; o < kOuter; ++o) {
      for (int64_t n = 0; n < kNeurons; ++n) {
        const auto row = std::find(tuned.begin(), tuned.end(), n);
        for (int64_t i = 0; i < kInner; ++i) {
          const T& got = param[param_at(o, n, i)];
          const T& old = before.param[param_at(o, n, i)];
          if (row == tuned.end()) {
            ASSERT_EQ(std::memcmp(&got, &old, sizeof(T)), 0) << "a frozen element changed";
            continue;
          }
          const int64_t r = row - tuned.begin();
          const double expected = update(static_cast<double>(old), before.gradient(o, r, i));
          ASSERT_NEAR(static_cast<double>(got), expected,
                      8 * updates * kRounding<T> * (1 + std::abs(expected)));
        }
      }
    }
  }
};

template <typename T>
class MaskedOptimDevice : public testing::Test {};
using Elements = testing::Types<double, float, Half16, Brain16>;
TYPED_TEST_SUITE(MaskedOptimDevice, Elements);

TYPED_TEST(MaskedOptimDevice, SgdEqualsItsFormula) {
  for (const bool compact : {false, true}) {
    host::set_seed(3);
    Problem<TypeParam> problem(compact);
    const Problem<TypeParam> before = problem;
    const float scale = 4;
    StepScalars scalars;
    scalars.lr_value = 0.1;
    scalars.grad_scale = &scale;
    problem.where.rows = problem.tuned.data();
    const Sgd<Arithmetic<TypeParam>> rule(0.9, 0, 0.01, true, false);
    for (int step = 0; step < 2; ++step) problem.sgd(rule, scalars);
    problem.expect_updated(before, 2, [](double p, double g) {
      double buffer = 0;
      for (int step = 0; step < 2; ++step) {
        const double decayed = g / 4 + 0.01 * p;
        buffer = step == 0 ? decayed : 0.9 * buffer + decayed;
        p -= 0.1 * (decayed + 0.9 * buffer);
      }
      return p;
    });
    for (const float steps : problem.steps) EXPECT_EQ(steps, 2);
  }
}

TYPED_TEST(MaskedOptimDevice, AdamwEqualsItsFormula) {
  for (const bool compact : {false, true}) {
    host::set_seed(5);
    Problem<TypeParam> problem(compact);
    const Problem<TypeParam> before = problem;
    const double lr = 0.05;
    StepScalars scalars;
    scalars.lr_double = &lr;
    problem.where.rows = problem.tuned.data();
    const Adamw<Arithmetic<TypeParam>> rule(0.9, 0.99, 1e-8, 0.1, false);
    for (int step = 0; step < 3; ++step) problem.adamw(rule, scalars);
    problem.expect_updated(before, 3, [](double p, double g) {
      double m = 0, v = 0;
      for (int step = 1; step <= 3; ++step) {
        m = 0.9 * m + 0.1 * g;
        v = 0.99 * v + 0.01 * g * g;
        p *= 1 - 0.05 * 0.1;
        p -= 0.05 * (m / (1 - std::pow(0.9, step))) /
             (std::sqrt(v / (1 - std::pow(0.99, step))) + 1e-8);
      }
      return p;
    });
  }
}

TYPED_TEST(MaskedOptimDevice, AnInfiniteGradientSkipsTheStep) {
  Problem<TypeParam> problem(false);
  const Problem<TypeParam> before = problem;
  const float found = 1;
  StepScalars scalars;
  scalars.lr_value = 0.1;
  scalars.found_inf = &found;
  problem.where.rows = problem.tuned.data();
  problem.sgd({0.9, 0, 0, false, false}, scalars);
  problem.adamw({0.9, 0.99, 1e-8, 0, false}, scalars);
  EXPECT_EQ(std::memcmp(problem.param.data(), before.param.data(),
                        problem.param.size() * sizeof(TypeParam)),
            0);
  for (const float steps : problem.steps) EXPECT_EQ(steps, 0);
}

TYPED_TEST(MaskedOptimDevice, RowsOutsideAreSkipped) {
  Problem<TypeParam> problem(false);
  problem.tuned = {-1, 3, 4, 17, 50};
  problem.where.rows = problem.tuned.data();
  Problem<TypeParam> before = problem;
  before.tuned = {3, 4, 17};
  StepScalars scalars;
  scalars.lr_value = 0.5;
  problem.sgd({0, 0, 0, false, false}, scalars);
  problem.tuned = before.tuned;
  problem.expect_updated(before, 1, [](double p, double g) { return p - 0.5 * g; });
  EXPECT_EQ(problem.steps, (std::vector<float>{0, 1, 1, 1, 0}));
}

}  // namespace
}  // namespace neusemslice::cuda
