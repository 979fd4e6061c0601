// The moments monoid and the shifted sums against two-pass arithmetic in long double.

#include "common/moments.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace neusemslice {
namespace {

struct Sample {
  double value;
  double weight;
};

std::vector<Sample> random_samples(int count, double mean, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> value(mean, 1.0);
  std::uniform_real_distribution<double> weight(0.1, 2.0);
  std::vector<Sample> samples(count);
  for (Sample& s : samples) s = {value(generator), weight(generator)};
  return samples;
}

Moments two_pass(const std::vector<Sample>& samples) {
  long double weight = 0;
  long double sum = 0;
  long double m2 = 0;
  for (const Sample& s : samples) {
    weight += s.weight;
    sum += static_cast<long double>(s.weight) * s.value;
  }
  const long double mean = sum / weight;
  for (const Sample& s : samples) m2 += s.weight * (s.value - mean) * (s.value - mean);
  return {static_cast<double>(weight), static_cast<double>(mean), static_cast<double>(m2)};
}

Moments shifted(const std::vector<Sample>& samples, double shift) {
  ShiftedSums sums{shift, 0, 0};
  double weight = 0;
  for (const Sample& s : samples) {
    sums.add(s.value, s.weight);
    weight += s.weight;
  }
  return sums.moments(weight);
}

void expect_near(const Moments& got, const Moments& expected, double relative) {
  EXPECT_NEAR(got.weight, expected.weight, relative * expected.weight);
  EXPECT_NEAR(got.mean, expected.mean, relative * (1 + std::abs(expected.mean)));
  EXPECT_NEAR(got.m2, expected.m2, relative * expected.m2);
}

TEST(ShiftedSums, EqualTwoPassFarFromZero) {
  for (double mean : {0.0, 10.0, 1e4, 1e8}) {
    const auto samples = random_samples(1000, mean, 1);
    expect_near(shifted(samples, samples.front().value), two_pass(samples), 1e-9);
  }
}

TEST(ShiftedSums, AConstantHasNoVariance) {
  const std::vector<Sample> samples(17, {0.1, 0.3});
  EXPECT_EQ(shifted(samples, 0.1).m2, 0.0);
  EXPECT_GE(shifted(samples, 1e6).m2, 0.0);
}

TEST(Moments, MergeEqualsOnePass) {
  const auto samples = random_samples(999, 1e4, 2);
  for (size_t cut : {1u, 13u, 500u, 998u}) {
    const std::vector<Sample> left(samples.begin(), samples.begin() + cut);
    const std::vector<Sample> right(samples.begin() + cut, samples.end());
    Moments merged = shifted(left, left.front().value);
    merged.merge(shifted(right, right.front().value));
    expect_near(merged, two_pass(samples), 1e-9);
  }
}

TEST(Moments, TheEmptySideIsNeutral) {
  const Moments some{3, 2, 1};
  Moments left = some;
  left.merge({});
  Moments right;
  right.merge(some);
  for (const Moments& m : {left, right}) {
    EXPECT_EQ(m.weight, some.weight);
    EXPECT_EQ(m.mean, some.mean);
    EXPECT_EQ(m.m2, some.m2);
  }
}

TEST(Moments, MergeIsAssociativeUpToRounding) {
  const Moments a = two_pass(random_samples(10, 5, 3));
  const Moments b = two_pass(random_samples(200, -5, 4));
  const Moments c = two_pass(random_samples(3, 1e3, 5));
  Moments left = a;
  left.merge(b);
  left.merge(c);
  Moments tail = b;
  tail.merge(c);
  Moments right = a;
  right.merge(tail);
  expect_near(left, right, 1e-12);
}

TEST(MergeMeans, WeighsBothSides) {
  EXPECT_DOUBLE_EQ(merge_means(1, 3, 5, 1), 2);
  EXPECT_EQ(merge_means(0, 0, 5, 2), 5);
}

TEST(IsFinite, TellsApart) {
  EXPECT_TRUE(is_finite(-1e308));
  EXPECT_FALSE(is_finite(std::numeric_limits<double>::infinity()));
  EXPECT_FALSE(is_finite(std::numeric_limits<double>::quiet_NaN()));
}

}  // namespace
}  // namespace neusemslice
