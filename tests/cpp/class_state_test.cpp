// Loading and merging one neuron of one class, with statistics present and absent.

#include "common/class_state.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace neusemslice {
namespace {

// A state of two classes and three neurons that owns its planes.
struct Owned {
  std::vector<double> count{0, 0}, positions{0, 0};
  std::vector<int64_t> nonfinite = std::vector<int64_t>(3, 0);
  std::vector<double> mean = std::vector<double>(6, 0), m2 = std::vector<double>(6, 0);
  std::vector<float> mean_abs = std::vector<float>(6, 0), active = std::vector<float>(6, 0);
  std::vector<float> max = std::vector<float>(6, -INFINITY);

  ClassState state() {
    return {count.data(),    positions.data(), nonfinite.data(), mean.data(), m2.data(),
            mean_abs.data(), max.data(),       active.data(),    2,           3};
  }
};

ClassCell cell(double weight, double mean, double mean_abs, double active, float max) {
  ClassCell c;
  c.moments = {weight, mean, 0.5};
  c.positions = 2 * weight;
  c.mean_abs = mean_abs;
  c.active = active;
  c.max = max;
  return c;
}

TEST(MergeCell, IntoAnEmptyClassStoresTheCell) {
  Owned owned;
  merge_cell(owned.state(), 1, 2, cell(4, 3, 3.5, 0.25, 9));
  EXPECT_EQ(owned.mean[5], 3);
  EXPECT_EQ(owned.m2[5], 0.5);
  EXPECT_EQ(owned.mean_abs[5], 3.5f);
  EXPECT_EQ(owned.active[5], 0.25f);
  EXPECT_EQ(owned.max[5], 9.0f);
  EXPECT_EQ(owned.count[1], 0) << "the class's count is raised by the caller";
  for (int i = 0; i < 5; ++i) EXPECT_EQ(owned.mean[i], 0) << "another cell changed";
}

TEST(MergeCell, WeighsOldAgainstNew) {
  Owned owned;
  merge_cell(owned.state(), 0, 1, cell(1, 2, 2, 1, 5));
  owned.count[0] = 1;
  owned.positions[0] = 2;
  merge_cell(owned.state(), 0, 1, cell(3, 6, 4, 0, 1));
  EXPECT_DOUBLE_EQ(owned.mean[1], 5);
  EXPECT_DOUBLE_EQ(owned.m2[1], 0.5 + 0.5 + 16.0 * 1 * 3 / 4);
  EXPECT_FLOAT_EQ(owned.mean_abs[1], 3.5f);
  EXPECT_FLOAT_EQ(owned.active[1], 0.25f);
  EXPECT_EQ(owned.max[1], 5.0f);
}

TEST(MergeCell, LeavesAbsentStatisticsAlone) {
  Owned owned;
  ClassState state = owned.state();
  state.mean = state.m2 = nullptr;
  state.mean_abs = state.active = nullptr;
  merge_cell(state, 0, 0, cell(1, 2, 3, 1, 4));
  EXPECT_EQ(owned.mean[0], 0);
  EXPECT_EQ(owned.mean_abs[0], 0.0f);
  EXPECT_EQ(owned.max[0], 4.0f);
  EXPECT_EQ(load_cell(state, 0, 0).mean_abs, 0);
}

}  // namespace
}  // namespace neusemslice
