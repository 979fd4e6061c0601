// The lists of nearest rows on the simulated device, against sorting.

#include "ops/cuda/nearest.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

namespace neusemslice::cuda {
namespace {

struct Case {
  int64_t rows, cols, k, height, width;
  bool self;
};

template <typename T>
struct Lists {
  std::vector<T> values;
  std::vector<int64_t> cols;

  Lists(int64_t rows, int64_t k)
      : values(rows * k, std::numeric_limits<T>::quiet_NaN()), cols(rows * k, -1) {}
};

// Few different values, so that columns often decide; some NaN and infinities.
template <typename T>
std::vector<T> make_matrix(const Case& c) {
  std::mt19937 random(7);
  std::vector<T> matrix(c.rows * c.cols);
  for (int64_t i = 0; i < c.rows; ++i) {
    for (int64_t j = 0; j < c.cols; ++j) {
      T value = static_cast<T>(static_cast<int>(random() % 41) - 20) / T(16);
      if (random() % 50 == 0) value = std::numeric_limits<T>::quiet_NaN();
      if (random() % 90 == 0) value = -std::numeric_limits<T>::infinity();
      matrix[i * c.cols + j] = c.self && j < i ? matrix[j * c.cols + i] : value;
    }
  }
  return matrix;
}

template <typename T>
Lists<T> sorted(const Case& c, const std::vector<T>& matrix, bool unit) {
  Lists<T> lists(c.rows, c.k);
  for (int64_t i = 0; i < c.rows; ++i) {
    std::vector<int64_t> order;
    std::vector<T> row(matrix.begin() + i * c.cols, matrix.begin() + (i + 1) * c.cols);
    for (T& value : row) value = unit ? std::clamp(value, T(-1), T(1)) : value;
    for (int64_t j = 0; j < c.cols; ++j) {
      if (!std::isnan(row[j]) && !(c.self && i == j)) order.push_back(j);
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return row[a] > row[b]; });
    for (int64_t n = 0; n < std::min<int64_t>(c.k, static_cast<int64_t>(order.size())); ++n) {
      lists.cols[i * c.k + n] = order[n];
      lists.values[i * c.k + n] = row[order[n]];
    }
  }
  return lists;
}

template <typename T>
Lists<T> in_tiles(const Case& c, const std::vector<T>& matrix, bool unit) {
  Lists<T> lists(c.rows, c.k);
  for (int64_t row = 0; row < c.rows; row += c.height) {
    for (int64_t col = c.self ? row : 0; col < c.cols; col += c.width) {
      const int64_t rows = std::min(c.height, c.rows - row), cols = std::min(c.width, c.cols - col);
      // What the lower triangle holds must not matter.
      std::vector<T> tile(rows * cols, T(99));
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < cols; ++j) {
          if (c.self && col + j < row + i) continue;
          tile[i * cols + j] = matrix[(row + i) * c.cols + col + j];
        }
      }
      add_nearest<T>({tile.data(), row, col, rows, cols, c.self ? Pairs::upper : Pairs::all, unit},
                     {lists.values.data(), lists.cols.data(), c.k});
    }
  }
  return lists;
}

template <typename T>
class NearestDevice : public testing::Test {};
using Elements = testing::Types<float, double>;
TYPED_TEST_SUITE(NearestDevice, Elements);

TYPED_TEST(NearestDevice, EqualsSorting) {
  const Case cases[] = {
      {5, 1, 3, 4, 16, false},       {9, 150, 1, 8, 64, false},   {3, 300, 32, 8, 200, false},
      {3, 260, 33, 4, 128, false},   {1, 200, 128, 2, 70, false}, {40, 40, 5, 16, 48, true},
      {130, 130, 3, 130, 130, true}, {36, 36, 40, 16, 40, true},  {1, 1, 2, 8, 8, true},
  };
  bool unit = false;
  unsigned seed = 0;
  for (const Case& c : cases) {
    SCOPED_TRACE(testing::Message() << c.rows << " x " << c.cols << ", k " << c.k);
    unit = !unit;
    host::set_seed(seed++);
    const std::vector<TypeParam> matrix = make_matrix<TypeParam>(c);
    const Lists<TypeParam> expected = sorted(c, matrix, unit);
    const Lists<TypeParam> found = in_tiles(c, matrix, unit);
    ASSERT_EQ(found.cols, expected.cols);
    for (size_t i = 0; i < expected.values.size(); ++i) {
      if (expected.cols[i] < 0) {
        ASSERT_TRUE(std::isnan(found.values[i]));
      } else {
        ASSERT_EQ(found.values[i], expected.values[i]);
      }
    }
  }
}

TEST(NearestDevice, AnEmptyTileChangesNothing) {
  Lists<float> lists(3, 2);
  add_nearest<float>({nullptr, 0, 0, 3, 0, Pairs::all, true},
                     {lists.values.data(), lists.cols.data(), 2});
  add_nearest<float>({nullptr, 0, 0, 0, 3, Pairs::upper, true},
                     {lists.values.data(), lists.cols.data(), 2});
  EXPECT_EQ(lists.cols, std::vector<int64_t>(6, -1));
}

}  // namespace
}  // namespace neusemslice::cuda
