// The CUDA kernels of contribution_ on the simulated device, against sums in two passes over
// float64.

#include "ops/cuda/contribution.cuh"

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
constexpr int64_t kSamples = 40, kPositions = 5, kNeurons = 130, kClasses = 3;

struct Batch {
  std::vector<int64_t> order, offsets{0};
  std::vector<double> weight = std::vector<double>(kSamples);
  std::unique_ptr<bool[]> mask = std::make_unique<bool[]>(kSamples * kPositions);

  Batch() {
    std::mt19937 random(2);
    std::uniform_real_distribution<double> unit(0, 1);
    std::vector<int64_t> label(kSamples);
    for (int64_t n = 0; n < kSamples; ++n) {
      label[n] = static_cast<int64_t>(unit(random) * 4) - 1;
      weight[n] = unit(random) < 0.2 ? 0 : unit(random);
      for (int64_t p = 0; p < kPositions; ++p) mask[n * kPositions + p] = unit(random) < 0.7;
    }
    for (int64_t p = 0; p < kPositions; ++p) mask[kPositions + p] = false;
    for (int64_t k = 0; k < kClasses; ++k) {
      for (int64_t n = 0; n < kSamples; ++n) {
        if (label[n] == k) order.push_back(n);
      }
      offsets.push_back(static_cast<int64_t>(order.size()));
    }
  }
  DeviceSamples view() const {
    return {mask.get(), nullptr, weight.data(), order.data(), offsets.data(), kSamples, kPositions};
  }
};

template <typename T>
class ContributionDevice : public testing::Test {};
using Elements = testing::Types<double, float, Half16, Brain16>;
TYPED_TEST_SUITE(ContributionDevice, Elements);

TYPED_TEST(ContributionDevice, EqualsFloat64) {
  const Batch batch;
  std::mt19937 random(3);
  std::normal_distribution<double> value(0, 1);
  std::vector<TypeParam> x(kSamples * kPositions * kNeurons);
  std::vector<float> g(x.size());
  for (TypeParam& v : x) v = static_cast<TypeParam>(value(random));
  for (float& v : g) v = static_cast<float>(value(random));
  for (size_t i = 0; i < g.size(); i += 91) g[i] = std::numeric_limits<float>::quiet_NaN();

  std::vector<double> count(kClasses), positions(kClasses), mean(kClasses * kNeurons);
  std::vector<float> mean_abs(kClasses * kNeurons);
  std::vector<int64_t> nonfinite(kNeurons);
  const ClassState state{count.data(), positions.data(), nonfinite.data(), mean.data(),
                         nullptr,      mean_abs.data(),  nullptr,          nullptr,
                         kClasses,     kNeurons};
  // Neurons innermost in x, positions in g.
  const DeviceContribution<TypeParam, float> device{
      batch.view(),
      {x.data(), kPositions * kNeurons, kNeurons, 1},
      {g.data(), kPositions * kNeurons, 1, kPositions}};
  host::set_seed(4);
  launch("contribution_kernel", &contribution_kernel<TypeParam, float>,
         {blocks_for(kNeurons, kBlock), 2}, kBlock, state, device);
  launch("raise_sample_counts_kernel", &raise_sample_counts_kernel, {1}, kBlock, state,
         batch.view());

  for (int64_t c = 0; c < kNeurons; ++c) {
    int64_t bad = 0;
    for (int64_t k = 0; k < kClasses; ++k) {
      double weight = 0, sum = 0, abs = 0;
      for (int64_t i = batch.offsets[k]; i < batch.offsets[k + 1]; ++i) {
        const int64_t n = batch.order[i];
        double pooled = 0, real = 0;
        for (int64_t p = 0; p < kPositions; ++p) {
          if (!batch.mask[n * kPositions + p] || batch.weight[n] == 0) continue;
          const double product = static_cast<double>(x[(n * kPositions + p) * kNeurons + c]) *
                                 static_cast<double>(g[(n * kNeurons + c) * kPositions + p]);
          real += 1;
          bad += std::isfinite(product) ? 0 : 1;
          pooled += std::isfinite(product) ? product : 0;
        }
        if (real == 0) continue;
        weight += batch.weight[n];
        sum += batch.weight[n] * pooled / real;
        abs += batch.weight[n] * std::abs(pooled / real);
      }
      ASSERT_NEAR(count[k], weight, 1e-12);
      ASSERT_NEAR(positions[k], weight, 1e-12);
      ASSERT_NEAR(mean[k * kNeurons + c], sum / weight, 1e-12);
      ASSERT_NEAR(mean_abs[k * kNeurons + c], abs / weight, 1e-6);
    }
    ASSERT_EQ(nonfinite[c], bad);
  }
}

}  // namespace
}  // namespace neusemslice::cuda
