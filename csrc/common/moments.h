#pragma once

#include <cmath>

#include "common/host_device.h"

namespace neusemslice {

// Weight, mean and sum of squared deviations of a stream of values: a commutative monoid (up to
// rounding) whose neutral element is {0, 0, 0}.
// Chan, Golub, LeVeque: Updating Formulae and a Pairwise Algorithm for Computing Sample
// Variances, 1979.
struct Moments {
  double weight = 0;
  double mean = 0;
  double m2 = 0;

  NSS_HOST_DEVICE void merge(const Moments& other) {
    if (other.weight == 0) return;
    if (weight == 0) {
      *this = other;
      return;
    }
    const double total = weight + other.weight;
    const double delta = other.mean - mean;
    const double share = other.weight / total;
    mean += delta * share;
    m2 += other.m2 + delta * delta * weight * share;
    weight = total;
  }
};

// Sums of a stream relative to a fixed shift near its mean. The inner loop has no division, and
// no digits cancel however far the mean lies from zero.
struct ShiftedSums {
  double shift = 0;
  double sum = 0;
  double sum_squares = 0;

  NSS_HOST_DEVICE void add(double value, double weight) {
    const double deviation = value - shift;
    sum += weight * deviation;
    sum_squares += weight * deviation * deviation;
  }

  // `weight` is the sum of the weights added; it must be positive.
  NSS_HOST_DEVICE Moments moments(double weight) const {
    const double deviation = sum / weight;
    const double m2 = sum_squares - sum * deviation;
    return {weight, shift + deviation, m2 > 0 ? m2 : 0};
  }
};

// Mean of two groups of positive total weight, given each group's mean and weight.
NSS_HOST_DEVICE double merge_means(double mean, double weight, double other, double other_weight) {
  return mean + (other - mean) * (other_weight / (weight + other_weight));
}

NSS_HOST_DEVICE bool is_finite(double value) { return std::isfinite(value); }

}  // namespace neusemslice
