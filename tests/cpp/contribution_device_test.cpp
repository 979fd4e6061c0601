// The CUDA kernels of contribution_ on the simulated device, against sums in two passes over
// float64.

#include "ops/cuda/contribution.cuh"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "device_data.h"

namespace neusemslice::cuda {
namespace {

enum class Layout { kNeuronsInside, kPositionsInside };

struct Case {
  int64_t samples, neurons, positions, classes;
  Layout x = Layout::kNeuronsInside;
  Layout g = Layout::kNeuronsInside;
  bool masked = false, weighted = false, soft = false, spoiled = false;
};

template <typename x_t, typename g_t>
class Batch {
 public:
  explicit Batch(const Case& what) : c(what), random_(5) {
    x = values<x_t>();
    g = values<g_t>();
    std::uniform_real_distribution<double> unit(0, 1);
    mask = std::make_unique<bool[]>(c.samples * c.positions);
    for (int64_t i = 0; i < c.samples * c.positions; ++i) {
      mask[i] = !c.masked || (unit(random_) < 0.7 && i / c.positions != 1);
    }
    for (int64_t n = 0; n < c.samples; ++n) {
      weight.push_back(c.weighted ? (unit(random_) < 0.2 ? 0 : unit(random_)) : 1);
    }
    offsets.push_back(0);
    for (int64_t k = 0; k < c.classes; ++k) {
      for (int64_t n = 0; n < c.samples; ++n) {
        if (!c.soft && n % (c.classes + 1) != k) continue;
        order.push_back(n);
        share.push_back(c.soft ? unit(random_) : 1);
      }
      offsets.push_back(static_cast<int64_t>(order.size()));
    }
  }

  int64_t stride_p(Layout layout) const { return layout == Layout::kNeuronsInside ? c.neurons : 1; }
  int64_t stride_c(Layout layout) const {
    return layout == Layout::kNeuronsInside ? 1 : c.positions;
  }
  double product(int64_t n, int64_t p, int64_t i) const {
    const int64_t at = n * c.neurons * c.positions;
    return static_cast<double>(to_value(x[at + p * stride_p(c.x) + i * stride_c(c.x)])) *
           static_cast<double>(to_value(g[at + p * stride_p(c.g) + i * stride_c(c.g)]));
  }

  void add_to(const ClassState& state) const {
    const BatchInput batch{order.data(),
                           offsets.data(),
                           c.soft ? share.data() : nullptr,
                           c.weighted ? weight.data() : nullptr,
                           static_cast<int64_t>(order.size()),
                           c.samples,
                           c.classes};
    const int64_t stride_n = c.neurons * c.positions;
    const SiteInput site{state,       x.data(), kElement<x_t>, c.masked ? mask.get() : nullptr,
                         c.positions, stride_n, stride_p(c.x), stride_c(c.x)};
    const OtherInput other{g.data(), kElement<g_t>, stride_n, stride_p(c.g), stride_c(c.g)};
    HeapWorkspace workspace;
    ContributionLaunch(batch, site, other, workspace).run();
  }

  Case c;
  std::vector<x_t> x;
  std::vector<g_t> g;
  std::unique_ptr<bool[]> mask;
  std::vector<double> weight, share;
  std::vector<int64_t> order, offsets;

 private:
  template <typename T>
  std::vector<T> values() {
    std::normal_distribution<double> value(0, 1);
    std::vector<T> made;
    for (int64_t i = 0; i < c.samples * c.neurons * c.positions; ++i) {
      const bool bad = c.spoiled && i % 91 == 7;
      made.push_back(
          make_element<T>(bad ? std::numeric_limits<double>::quiet_NaN() : value(random_)));
    }
    return made;
  }

  std::mt19937 random_;
};

struct State {
  std::vector<double> count, positions, mean;
  std::vector<float> mean_abs;
  std::vector<int64_t> nonfinite;
  int64_t classes, neurons;

  State(int64_t k, int64_t c)
      : count(k),
        positions(k),
        mean(k * c),
        mean_abs(k * c),
        nonfinite(c),
        classes(k),
        neurons(c) {}
  ClassState view() {
    return {count.data(),    positions.data(), nonfinite.data(), mean.data(), nullptr,
            mean_abs.data(), nullptr,          nullptr,          classes,     neurons};
  }
  bool operator==(const State&) const = default;
};

template <typename x_t, typename g_t>
void check(const Case& c) {
  SCOPED_TRACE(testing::Message() << c.samples << "x" << c.neurons << "x" << c.positions << " K"
                                  << c.classes << " layouts " << static_cast<int>(c.x)
                                  << static_cast<int>(c.g));
  const Batch<x_t, g_t> batch(c);
  State state(c.classes, c.neurons), again(c.classes, c.neurons);
  host::set_seed(0);
  batch.add_to(state.view());
  host::set_seed(8);
  batch.add_to(again.view());
  EXPECT_TRUE(state == again) << "the order of threads and blocks shows";
  for (int64_t i = 0; i < c.neurons; ++i) {
    int64_t bad = 0;
    for (int64_t k = 0; k < c.classes; ++k) {
      double weight = 0, sum = 0, abs = 0;
      for (int64_t at = batch.offsets[k]; at < batch.offsets[k + 1]; ++at) {
        const int64_t n = batch.order[at];
        const double w = batch.share[at] * batch.weight[n];
        double pooled = 0, real = 0;
        for (int64_t p = 0; p < c.positions && w > 0; ++p) {
          if (!batch.mask[n * c.positions + p]) continue;
          const double product = batch.product(n, p, i);
          real += 1;
          bad += std::isfinite(product) ? 0 : 1;
          pooled += std::isfinite(product) ? product : 0;
        }
        if (real == 0) continue;
        weight += w;
        sum += w * pooled / real;
        abs += w * std::abs(pooled / real);
      }
      const int64_t at = k * c.neurons + i;
      ASSERT_NEAR(state.count[k], weight, 1e-12 * weight);
      ASSERT_NEAR(state.positions[k], weight, 1e-12 * weight);
      if (weight == 0) weight = 1;
      ASSERT_NEAR(state.mean[at], sum / weight, 1e-12);
      ASSERT_NEAR(state.mean_abs[at], abs / weight, 1e-6);
    }
    ASSERT_EQ(state.nonfinite[i], bad);
  }
}

template <typename T>
class ContributionDevice : public testing::Test {};
using Elements = testing::Types<double, float, Float16, BFloat16>;
TYPED_TEST_SUITE(ContributionDevice, Elements);

TYPED_TEST(ContributionDevice, Rows) {
  check<TypeParam, TypeParam>({.samples = 41, .neurons = 37, .positions = 1, .classes = 3});
  check<TypeParam, float>({.samples = 30,
                           .neurons = 5,
                           .positions = 1,
                           .classes = 2,
                           .weighted = true,
                           .soft = true,
                           .spoiled = true});
}

TYPED_TEST(ContributionDevice, Positions) {
  check<TypeParam, TypeParam>({.samples = 9, .neurons = 40, .positions = 11, .classes = 2});
  check<TypeParam, float>({.samples = 9,
                           .neurons = 6,
                           .positions = 70,
                           .classes = 2,
                           .x = Layout::kPositionsInside,
                           .g = Layout::kPositionsInside,
                           .spoiled = true});
  check<float, TypeParam>({.samples = 9,
                           .neurons = 35,
                           .positions = 7,
                           .classes = 2,
                           .g = Layout::kPositionsInside,
                           .masked = true,
                           .weighted = true});
}

TEST(ContributionDevice, ManyChunksPerClassAndOneClass) {
  check<float, float>({.samples = 1100, .neurons = 3, .positions = 1, .classes = 1});
  check<float, float>(
      {.samples = 700, .neurons = 2, .positions = 2, .classes = 1, .masked = true, .soft = true});
}

TEST(ContributionDevice, MoreClassesThanSamplesAndNothingAtAll) {
  check<float, float>({.samples = 2, .neurons = 1, .positions = 1, .classes = 9});
  check<float, float>({.samples = 3, .neurons = 4, .positions = 0, .classes = 2});
  check<float, float>({.samples = 0, .neurons = 4, .positions = 3, .classes = 2});
  check<float, float>({.samples = 4, .neurons = 0, .positions = 3, .classes = 2});
}

}  // namespace
}  // namespace neusemslice::cuda
