// The CUDA kernels of class_stats_ on the simulated device, against sums in two passes over
// float64.

#include "ops/cuda/class_stats_device.cuh"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "device_data.h"
#include "ops/cuda/class_stats_merge.cuh"

namespace neusemslice::cuda {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct OwnedState {
  int64_t classes, neurons;
  unsigned selected;
  std::vector<double> count, positions, mean, m2;
  std::vector<int64_t> nonfinite;
  std::vector<float> mean_abs, max, active;

  OwnedState(int64_t k, int64_t c, unsigned statistics = kAll)
      : classes(k),
        neurons(c),
        selected(statistics),
        count(k),
        positions(k),
        mean(k * c),
        m2(k * c),
        nonfinite(c),
        mean_abs(k * c),
        max(k * c, -INFINITY),
        active(k * c) {}

  ClassState view() {
    const auto plane = [&](auto& values, unsigned statistic) {
      return selected & statistic ? values.data() : nullptr;
    };
    return {count.data(),     positions.data(),
            nonfinite.data(), plane(mean, kMean),
            plane(m2, kM2),   plane(mean_abs, kMeanAbs),
            plane(max, kMax), plane(active, kActive),
            classes,          neurons};
  }
  bool operator==(const OwnedState&) const = default;
};

enum class Layout { kRows, kPlanes, kChannelsLast, kPermuted };

// A batch of one site with the order that class_order gives it.
struct Case {
  int64_t samples = 0, neurons = 0, positions = 1, classes = 1;
  Layout layout = Layout::kRows;
  bool masked = false, weighted = false, soft = false, misaligned = false;
  unsigned selected = kAll;
  double centre = 0;
  double spread = 1;
  bool spoiled = false;  // with values that are not finite
  bool one_class = false;
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << c.samples << "x" << c.neurons << "x" << c.positions << " K" << c.classes
             << " layout " << static_cast<int>(c.layout) << (c.masked ? " mask" : "")
             << (c.weighted ? " weight" : "") << (c.soft ? " soft" : "")
             << (c.misaligned ? " misaligned" : "") << " statistics " << c.selected << " about "
             << c.centre << (c.spoiled ? " spoiled" : "") << (c.one_class ? " one class" : "");
}

template <typename T>
class Data {
 public:
  explicit Data(const Case& what, unsigned seed = 1) : c(what), random_(seed) {
    offset_ = c.misaligned ? 1 : 0;
    stride_n = c.neurons * c.positions + (c.misaligned ? 3 : 0);
    stride_c = c.layout == Layout::kRows || c.layout == Layout::kChannelsLast ? 1 : c.positions;
    stride_p = c.layout == Layout::kChannelsLast ? c.neurons : 1;
    if (c.layout == Layout::kPermuted) {
      // Samples are innermost.
      stride_n = 1;
      stride_p = c.samples;
      stride_c = c.samples * c.positions;
    }
    // On the heap and not a value longer than it has to be.
    size_ = c.samples * c.neurons * c.positions == 0
                ? 0
                : offset_ + (c.samples - 1) * stride_n + (c.neurons - 1) * stride_c +
                      (c.positions - 1) * stride_p + 1;
    x = std::make_unique<T[]>(size_);
    std::normal_distribution<double> value(c.centre, c.spread);
    for (int64_t i = 0; i < size_; ++i) x[i] = make_element<T>(value(random_));
    std::uniform_real_distribution<double> unit(0, 1);
    if (c.spoiled) {
      for (int64_t i = offset_; i < size_; i += 7) {
        const double bad[] = {NAN, kInfinity, -kInfinity};
        if (unit(random_) < 0.3) x[i] = make_element<T>(bad[i % 3]);
      }
    }
    if (c.masked) {
      mask = std::make_unique<bool[]>(c.samples * c.positions);
      for (int64_t i = 0; i < c.samples * c.positions; ++i) mask[i] = unit(random_) < 0.6;
      for (int64_t p = 0; p < c.positions && c.samples > 2; ++p) mask[2 * c.positions + p] = false;
    }
    if (c.weighted) {
      weight.resize(c.samples);
      for (double& w : weight) w = unit(random_) < 0.2 ? 0 : unit(random_);
    }
    offsets.push_back(0);
    if (c.soft) {
      for (int64_t k = 0; k < c.classes; ++k) {
        for (int64_t n = 0; n < c.samples; ++n) {
          order.push_back(n);
          share.push_back(unit(random_) < 0.3 ? 0 : unit(random_));
        }
        offsets.push_back(static_cast<int64_t>(order.size()));
      }
      return;
    }
    std::vector<int64_t> label(c.samples);
    for (int64_t n = 0; n < c.samples; ++n) {
      label[n] = c.one_class ? 0 : static_cast<int64_t>(unit(random_) * (c.classes + 1)) - 1;
    }
    for (int64_t k = 0; k <= c.classes; ++k) {
      for (int64_t n = 0; n < c.samples; ++n) {
        if (label[n] == (k < c.classes ? k : -1)) order.push_back(n);
      }
      if (k < c.classes) offsets.push_back(static_cast<int64_t>(order.size()));
    }
  }

  const T* begin() const { return x.get() + offset_; }
  BatchInput batch() const {
    return {order.data(),
            offsets.data(),
            c.soft ? share.data() : nullptr,
            c.weighted ? weight.data() : nullptr,
            static_cast<int64_t>(order.size()),
            c.samples,
            c.classes};
  }
  SiteInput site(OwnedState& state) const {
    return {state.view(), begin(),  kElement<T>, c.masked ? mask.get() : nullptr,
            c.positions,  stride_n, stride_p,    stride_c};
  }
  double value(int64_t n, int64_t p, int64_t i) const {
    return to_value(begin()[n * stride_n + p * stride_p + i * stride_c]);
  }
  bool kept(int64_t n, int64_t p) const { return !c.masked || mask[n * c.positions + p]; }

  Case c;
  int64_t stride_n, stride_p, stride_c;
  std::unique_ptr<T[]> x;
  std::unique_ptr<bool[]> mask;
  std::vector<double> weight, share;
  std::vector<int64_t> order, offsets;

 private:
  std::mt19937 random_;
  int64_t offset_, size_;
};

template <typename T>
void observe(const Data<T>& data, OwnedState& state, unsigned seed) {
  host::set_seed(seed);
  HeapWorkspace workspace;
  const SiteInput site = data.site(state);
  ClassStatsLaunch(data.batch(), &site, 1, workspace).run();
}

// One neuron of one class, in two passes.
struct Expected {
  double count = 0, positions = 0, mean = 0, m2 = 0, mean_abs = 0, active = 0, max = -kInfinity;
  double typical = 0;  // root mean square distance from the first row or the mean, whichever more
  int64_t nonfinite = 0;
};

template <typename T>
Expected expected(const Data<T>& data, int64_t k, int64_t i) {
  Expected e;
  std::vector<std::pair<double, double>> pooled;
  for (int64_t at = data.offsets[k]; at < data.offsets[k + 1]; ++at) {
    const int64_t n = data.order[at];
    const double w = (data.c.soft ? data.share[at] : 1) * (data.c.weighted ? data.weight[n] : 1);
    double sum = 0, real = 0;
    for (int64_t p = 0; p < data.c.positions; ++p) real += data.kept(n, p) ? 1 : 0;
    if (w == 0 || real == 0) continue;
    for (int64_t p = 0; p < data.c.positions; ++p) {
      if (!data.kept(n, p)) continue;
      const double value = data.value(n, p, i);
      if (!is_finite(value)) {
        ++e.nonfinite;
        continue;
      }
      sum += value;
      e.mean_abs += w * std::abs(value);
      e.active += value > 0 ? w : 0;
      e.max = std::max(e.max, value);
    }
    e.count += w;
    e.positions += w * real;
    pooled.push_back({sum / real, w});
  }
  if (pooled.empty()) return e;
  for (const auto& [value, w] : pooled) e.mean += w * value;
  e.mean /= e.count;
  double about_first = 0;
  for (const auto& [value, w] : pooled) {
    e.m2 += w * (value - e.mean) * (value - e.mean);
    about_first += w * (value - pooled[0].first) * (value - pooled[0].first);
  }
  e.mean_abs /= e.positions;
  e.active /= e.positions;
  e.typical = std::sqrt(std::max(about_first, e.m2) / e.count);
  return e;
}

// The bounds of the contract in ops/class_stats.h, with u the rounding unit of the type that values
// are added in; pooled samples (of float32) have the rounding of their mean besides.
template <typename T>
void expect_matches(const Data<T>& data, OwnedState& state) {
  const double u = std::is_same_v<T, double> ? 0x1p-53 : 0x1p-24;
  const double many = std::is_same_v<T, double> ? 1000 : 1;  // sums in float64 have their own
  for (int64_t i = 0; i < state.neurons; ++i) {
    int64_t nonfinite = 0;
    for (int64_t k = 0; k < state.classes; ++k) {
      const Expected e = expected(data, k, i);
      const int64_t at = k * state.neurons + i;
      SCOPED_TRACE("class " + std::to_string(k) + ", neuron " + std::to_string(i));
      nonfinite += e.nonfinite;
      ASSERT_NEAR(state.count[k], e.count, 1e-12 * e.count);
      ASSERT_NEAR(state.positions[k], e.positions, 1e-12 * e.positions);
      const double pooling = data.c.positions > 1 ? 16 * u * e.mean_abs : 0;
      const double distance = 8 * u * many * e.typical + 1e-15 * std::abs(e.mean) + pooling;
      if (state.selected & kMean) {
        ASSERT_NEAR(state.mean[at], e.mean, distance);
      }
      if (state.selected & kM2) {
        const double about = 10 * u * many * e.count * e.typical * e.typical;
        ASSERT_NEAR(state.m2[at], e.m2,
                    2 * about + 4 * e.count * pooling * (e.typical + pooling) +
                        e.count * distance * distance);
      }
      const double rounding = 18 * 0x1p-24;
      if (state.selected & kMeanAbs) {
        ASSERT_NEAR(state.mean_abs[at], e.mean_abs, rounding * e.mean_abs);
      }
      if (state.selected & kActive) {
        ASSERT_NEAR(state.active[at], e.active, rounding);
      }
      if (state.selected & kMax) {
        ASSERT_EQ(state.max[at], static_cast<float>(e.max));
      }
    }
    ASSERT_EQ(state.nonfinite[i], nonfinite) << "neuron " << i;
  }
}

template <typename T>
void check(const Case& c, std::initializer_list<unsigned> seeds = {0, 11}) {
  std::ostringstream trace;
  trace << c;
  SCOPED_TRACE(trace.str());
  const Data<T> data(c);
  std::vector<OwnedState> results;
  for (const unsigned seed : seeds) {
    OwnedState state(c.classes, c.neurons, c.selected);
    observe(data, state, seed);
    results.push_back(state);
  }
  expect_matches(data, results[0]);
  for (const OwnedState& other : results) {
    EXPECT_TRUE(other == results[0]) << "the order of threads and blocks shows";
  }
}

template <typename T>
class ClassStatsDevice : public testing::Test {};
using Elements = testing::Types<double, float, Float16, BFloat16>;
TYPED_TEST_SUITE(ClassStatsDevice, Elements);

TYPED_TEST(ClassStatsDevice, Rows) {
  check<TypeParam>({.samples = 40, .neurons = 70, .classes = 3});
  check<TypeParam>({.samples = 37, .neurons = 1, .classes = 2});
  check<TypeParam>({.samples = 30, .neurons = 37, .classes = 2, .misaligned = true});
  check<TypeParam>({.samples = 21, .neurons = 40, .classes = 2, .layout = Layout::kPermuted});
}

TYPED_TEST(ClassStatsDevice, ManyChunksPerClass) {
  check<TypeParam>({.samples = 1300, .neurons = 5, .classes = 2}, {0, 3, 4});
  check<TypeParam>({.samples = 600, .neurons = 34, .classes = 1, .one_class = true});
  check<TypeParam>({.samples = 520, .neurons = 3, .classes = 2, .weighted = true});
}

TYPED_TEST(ClassStatsDevice, WeightsMasksAndSoftLabels) {
  check<TypeParam>({.samples = 40, .neurons = 33, .classes = 3, .weighted = true});
  check<TypeParam>({.samples = 20, .neurons = 9, .classes = 4, .soft = true});
  check<TypeParam>(
      {.samples = 20, .neurons = 9, .classes = 4, .masked = true, .weighted = true, .soft = true});
}

TYPED_TEST(ClassStatsDevice, SamplesOfPositionsSideBySide) {
  check<TypeParam>(
      {.samples = 9, .neurons = 6, .positions = 49, .classes = 2, .layout = Layout::kPlanes});
  check<TypeParam>(
      {.samples = 5, .neurons = 3, .positions = 600, .classes = 2, .layout = Layout::kPlanes});
  check<TypeParam>({.samples = 12,
                    .neurons = 5,
                    .positions = 4,
                    .classes = 2,
                    .layout = Layout::kPlanes,
                    .weighted = true,
                    .misaligned = true});
  check<TypeParam>({.samples = 9,
                    .neurons = 6,
                    .positions = 70,
                    .classes = 2,
                    .layout = Layout::kPlanes,
                    .masked = true});
  check<TypeParam>(
      {.samples = 7, .neurons = 6, .positions = 10, .classes = 2, .layout = Layout::kPermuted});
}

TYPED_TEST(ClassStatsDevice, SamplesOfNeuronsSideBySide) {
  check<TypeParam>({.samples = 7,
                    .neurons = 40,
                    .positions = 90,
                    .classes = 2,
                    .layout = Layout::kChannelsLast});
  check<TypeParam>({.samples = 7,
                    .neurons = 67,
                    .positions = 11,
                    .classes = 2,
                    .layout = Layout::kChannelsLast,
                    .misaligned = true});
  check<TypeParam>({.samples = 8,
                    .neurons = 16,
                    .positions = 300,
                    .classes = 2,
                    .layout = Layout::kChannelsLast,
                    .masked = true,
                    .weighted = true});
  check<TypeParam>({.samples = 6,
                    .neurons = 5,
                    .positions = 7,
                    .classes = 3,
                    .layout = Layout::kChannelsLast,
                    .masked = true,
                    .soft = true});
}

TYPED_TEST(ClassStatsDevice, ValuesThatAreNotFinite) {
  for (const Layout layout : {Layout::kPlanes, Layout::kChannelsLast}) {
    check<TypeParam>({.samples = 12,
                      .neurons = 9,
                      .positions = 13,
                      .classes = 2,
                      .layout = layout,
                      .spoiled = true});
    check<TypeParam>({.samples = 12,
                      .neurons = 9,
                      .positions = 13,
                      .classes = 2,
                      .layout = layout,
                      .masked = true,
                      .soft = true,
                      .spoiled = true});
  }
  check<TypeParam>({.samples = 50, .neurons = 9, .classes = 2, .spoiled = true});
  check<TypeParam>({.samples = 50, .neurons = 9, .classes = 2, .weighted = true, .spoiled = true});
}

TYPED_TEST(ClassStatsDevice, EmptyAndTiny) {
  check<TypeParam>({.samples = 0, .neurons = 3, .classes = 2});
  check<TypeParam>({.samples = 4, .neurons = 0, .classes = 2});
  check<TypeParam>(
      {.samples = 4, .neurons = 2, .positions = 0, .classes = 2, .layout = Layout::kPlanes});
  check<TypeParam>({.samples = 1, .neurons = 1, .classes = 1, .one_class = true});
  check<TypeParam>({.samples = 5, .neurons = 3, .classes = 40});
}

TYPED_TEST(ClassStatsDevice, EverySelection) {
  for (const unsigned selected :
       {0u, unsigned{kMean}, kMean | kM2, unsigned{kMax}, kMeanAbs | kActive, kMean | kMeanAbs}) {
    check<TypeParam>(
        {.samples = 300, .neurons = 10, .classes = 1, .selected = selected, .one_class = true},
        {0});
    check<TypeParam>(
        {.samples = 20, .neurons = 10, .classes = 2, .weighted = true, .selected = selected}, {0});
    for (const Layout layout : {Layout::kPlanes, Layout::kChannelsLast}) {
      check<TypeParam>({.samples = 6,
                        .neurons = 10,
                        .positions = 20,
                        .classes = 2,
                        .layout = layout,
                        .selected = selected},
                       {0});
    }
  }
}

TEST(ClassStatsDevice, FarFromZeroNothingCancels) {
  check<float>({.samples = 600, .neurons = 6, .classes = 2, .centre = 10000});
  check<double>({.samples = 600, .neurons = 6, .classes = 2, .centre = 1e8});
  check<float>({.samples = 20,
                .neurons = 6,
                .positions = 50,
                .classes = 2,
                .layout = Layout::kChannelsLast,
                .centre = 10000});
}

TEST(ClassStatsDevice, SquaresBeyondFloat32) {
  check<float>({.samples = 40, .neurons = 6, .classes = 2, .spread = 1e25});
  check<float>({.samples = 40, .neurons = 6, .classes = 2, .spread = 1e-25});
}

TEST(ClassStatsDevice, BatchAfterBatch) {
  for (const Layout layout : {Layout::kRows, Layout::kPlanes, Layout::kChannelsLast}) {
    Case c{.samples = layout == Layout::kRows ? 600 : 50,
           .neurons = 5,
           .positions = layout == Layout::kRows ? 1 : 3,
           .classes = 2,
           .layout = layout,
           .centre = 3};
    Data<double> whole(c);
    OwnedState once(2, 5), twice(2, 5);
    observe(whole, once, 0);
    // The same samples, half of them at a time: each class's entries in two orders of their own.
    std::vector<int64_t> order, offsets{0, 0, 0};
    for (int half = 0; half < 2; ++half) {
      order.clear();
      for (int k = 0; k < 2; ++k) {
        for (int64_t i = whole.offsets[k]; i < whole.offsets[k + 1]; ++i) {
          if ((i % 2 == 0) == (half == 0)) order.push_back(whole.order[i]);
        }
        offsets[k + 1] = static_cast<int64_t>(order.size());
      }
      BatchInput batch = whole.batch();
      batch.order = order.data();
      batch.offsets = offsets.data();
      batch.entries = static_cast<int64_t>(order.size());
      HeapWorkspace workspace;
      const SiteInput site = whole.site(twice);
      ClassStatsLaunch(batch, &site, 1, workspace).run();
    }
    for (int i = 0; i < 10; ++i) {
      EXPECT_NEAR(twice.mean[i], once.mean[i], 1e-12);
      EXPECT_NEAR(twice.m2[i], once.m2[i], 1e-9);
      EXPECT_NEAR(twice.mean_abs[i], once.mean_abs[i], 1e-5);
      EXPECT_EQ(twice.max[i], once.max[i]);
    }
    EXPECT_EQ(twice.count, once.count);
    EXPECT_EQ(twice.positions, once.positions);
  }
}

TEST(ClassStatsDevice, PaddingDoesNotShow) {
  for (const Layout layout : {Layout::kPlanes, Layout::kChannelsLast}) {
    const Case c{.samples = 6, .neurons = 9, .positions = 40, .classes = 2, .layout = layout};
    Case padded_case = c;
    padded_case.positions = 70;
    padded_case.masked = true;
    const Data<float> plain(c);
    Data<float> padded(padded_case);
    padded.order = plain.order;
    padded.offsets = plain.offsets;
    for (int64_t n = 0; n < c.samples; ++n) {
      for (int64_t p = 0; p < 70; ++p) {
        padded.mask[n * 70 + p] = p >= 30;
        for (int64_t i = 0; i < c.neurons; ++i) {
          padded.x[n * padded.stride_n + p * padded.stride_p + i * padded.stride_c] =
              p < 30 ? NAN : static_cast<float>(plain.value(n, p - 30, i));
        }
      }
    }
    OwnedState a(2, 9), b(2, 9);
    observe(plain, a, 0);
    observe(padded, b, 0);
    EXPECT_TRUE(a == b);
  }
}

TEST(ClassStatsDevice, AnOrderOfItsOwnTouchesNothingOutside) {
  // What the CPU refuses: entries outside the batch, offsets that fall or leave the order.
  Data<float> data({.samples = 700, .neurons = 5, .classes = 3});
  data.order[3] = -1;
  data.order[10] = 700;
  for (const std::vector<int64_t>& offsets :
       {data.offsets, {0, 700, 0, 700}, {-5, 100000, 3, 2}, {700, 600, 500, 900}}) {
    for (const bool weighted : {false, true}) {
      data.offsets = offsets;
      data.c.weighted = weighted;
      data.weight.assign(700, 1.0);
      OwnedState state(3, 5);
      observe(data, state, 0);
    }
  }
}

TEST(ClassStatsDevice, BadWeightsSkipTheirSample) {
  const Case c{.samples = 30, .neurons = 5, .classes = 2, .weighted = true};
  Data<float> data(c), cleaned(c);
  OwnedState a(2, 5), b(2, 5);
  data.weight[4] = -1;
  data.weight[5] = NAN;
  data.weight[6] = kInfinity;
  for (int i = 4; i < 7; ++i) cleaned.weight[i] = 0;
  observe(data, a, 0);
  observe(cleaned, b, 0);
  EXPECT_TRUE(a == b);
}

TEST(ClassStatsDevice, MergedHalvesEqualTheWhole) {
  Data<float> data({.samples = 300, .neurons = 70, .classes = 3});
  OwnedState whole(3, 70), first(3, 70), second(3, 70);
  observe(data, whole, 0);
  observe(data, first, 0);
  merge_states(second.view(), first.view());
  EXPECT_TRUE(second == whole) << "the empty state is neutral";
  merge_states(second.view(), first.view());
  for (int k = 0; k < 3; ++k) EXPECT_EQ(second.count[k], 2 * whole.count[k]);
  for (int i = 0; i < 210; ++i) {
    EXPECT_NEAR(second.mean[i], whole.mean[i], 1e-15);
    EXPECT_NEAR(second.m2[i], 2 * whole.m2[i], 1e-12);
  }
}

TEST(ClassStatsDevice, ManySitesEqualEachAlone) {
  std::vector<Case> cases;
  for (int i = 0; i < 2; ++i) {
    cases.push_back({.samples = 24, .neurons = 20 + 30 * i, .classes = 2});
    cases.push_back({.samples = 24,
                     .neurons = 7 + i,
                     .positions = 9,
                     .classes = 2,
                     .layout = i == 0 ? Layout::kPlanes : Layout::kChannelsLast,
                     .masked = i == 1});
    cases.push_back({.samples = 24, .neurons = 5, .classes = 2, .selected = kMean | kM2});
  }
  std::vector<std::unique_ptr<Data<float>>> data;
  std::vector<OwnedState> alone, together;
  for (size_t i = 0; i < cases.size(); ++i) {
    data.push_back(std::make_unique<Data<float>>(cases[i], i + 1));
    data[i]->order = data[0]->order;
    data[i]->offsets = data[0]->offsets;
    alone.emplace_back(2, cases[i].neurons, cases[i].selected);
    together.push_back(alone.back());
    observe(*data[i], alone.back(), 0);
  }
  std::vector<SiteInput> sites;
  for (size_t i = 0; i < cases.size(); ++i) sites.push_back(data[i]->site(together[i]));
  HeapWorkspace workspace;
  host::set_seed(9);
  ClassStatsLaunch(data[0]->batch(), sites.data(), static_cast<int>(sites.size()), workspace).run();
  for (size_t i = 0; i < cases.size(); ++i) EXPECT_TRUE(alone[i] == together[i]) << cases[i];
}

}  // namespace
}  // namespace neusemslice::cuda
