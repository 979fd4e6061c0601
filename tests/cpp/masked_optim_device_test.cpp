// The CUDA kernels of masked_sgd_ and masked_adamw_ on the simulated device, against the formulas
// in float64; rows that are not tuned keep their bits.

#include "ops/cuda/masked_optim.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace neusemslice::cuda {
namespace {

template <typename T>
constexpr double kRounding = std::numeric_limits<T>::epsilon();
template <>
constexpr double kRounding<Float16> = 0x1p-10;
template <>
constexpr double kRounding<BFloat16> = 0x1p-7;

template <typename T>
constexpr Element kElement = Element::kFloat64;
template <>
constexpr Element kElement<float> = Element::kFloat32;
template <>
constexpr Element kElement<Float16> = Element::kFloat16;
template <>
constexpr Element kElement<BFloat16> = Element::kBFloat16;

template <typename T>
double number(T x) {
  return static_cast<double>(to_value(x));
}
template <typename T>
T element(double x) {
  return from_value<T>(static_cast<ValueOf<T>>(x));
}

struct Shape {
  int64_t outer, neurons, inner;
  std::vector<int64_t> tuned;
  bool compact = false;
  bool shifted = false;  // one element off the alignment that 16-byte accesses need
  bool master = false;
};

// What the rule is told of each element; it changes value and state.
using Formula = void (*)(double& p, double g, double* state, int updates);

class Tensor {
 public:
  virtual ~Tensor() = default;
  virtual TensorUpdate update() = 0;
  // Compares with the formula after so many updates of the rows that exist.
  virtual void expect_updated(Formula formula, int updates) const = 0;
};

// A parameter [outer, neurons, inner] that is tuned at some of its neurons.
template <typename T>
class TypedTensor : public Tensor {
  using V = ValueOf<T>;

 public:
  TypedTensor(const Shape& shape, int kinds, unsigned seed) : shape_(shape), kinds_(kinds) {
    std::mt19937 random(seed);
    std::normal_distribution<double> value(0, 1);
    const auto fill = [&](std::vector<T>& values, int64_t size) {
      for (int64_t i = 0; i < size + shape.shifted; ++i) {
        values.push_back(element<T>(value(random)));
      }
    };
    fill(param_, shape.outer * shape.neurons * shape.inner);
    fill(grad_, shape.outer * held() * shape.inner);
    for (int k = 0; k < kinds; ++k) states_.emplace_back(elements(), V(0));
    steps_.assign(shape.tuned.size(), 0);
    if (shape.master) {
      each([&](int64_t param_at, int64_t, int64_t) {
        // What T cannot hold of it is lost in the parameter only.
        master_.push_back(static_cast<float>(number(param_[param_at]) * (1 + 1e-4)));
      });
    }
    before_ = param_;
    master_before_ = master_;
  }

  TensorUpdate update() override {
    TensorUpdate t;
    t.param = param_.data() + shape_.shifted;
    t.grad = grad_.data() + shape_.shifted;
    for (int k = 0; k < kinds_; ++k) t.states[k] = states_[k].data();
    t.master = shape_.master ? master_.data() : nullptr;
    t.steps = steps_.data();
    t.row_count = static_cast<int64_t>(shape_.tuned.size());
    t.elements = elements();
    t.element = kElement<T>;
    t.where.rows = shape_.tuned.data();
    t.where.dimension = shape_.neurons;
    t.where.compact_grad = shape_.compact;
    if (t.elements == 0) return t;
    t.where.append(shape_.outer, shape_.neurons * shape_.inner, held() * shape_.inner);
    t.where.append_neurons(t.row_count, shape_.inner, shape_.inner);
    t.where.append(shape_.inner, 1, 1);
    t.where.finish();
    return t;
  }

  void expect_updated(Formula formula, int updates) const override {
    std::vector<bool> touched(param_.size());
    each([&](int64_t param_at, int64_t grad_at, int64_t state_at) {
      double p = shape_.master ? master_before_[state_at] : number(before_[param_at]);
      double state[TensorUpdate::kMaxStates] = {};
      for (int u = 0; u < updates; ++u) formula(p, number(grad_[grad_at]), state, u + 1);
      touched[param_at] = true;
      const double tolerance = 8 * updates * (1 + std::abs(p));
      ASSERT_NEAR(number(param_[param_at]), p, tolerance * kRounding<T>);
      if (shape_.master) {
        ASSERT_NEAR(master_[state_at], p, tolerance * kRounding<float>);
        ASSERT_EQ(number(param_[param_at]), number(element<T>(master_[state_at])));
      }
      // A decayed gradient contains the parameter as it was rounded.
      const double rounding = shape_.master ? kRounding<float> : kRounding<T>;
      for (int k = 0; k < kinds_; ++k) {
        ASSERT_NEAR(states_[k][state_at], state[k],
                    8 * updates * (1 + std::abs(state[k])) * rounding);
      }
    });
    for (size_t i = 0; i < param_.size(); ++i) {
      if (touched[i]) continue;
      ASSERT_EQ(std::memcmp(&param_[i], &before_[i], sizeof(T)), 0) << "a frozen element changed";
    }
    for (size_t r = 0; r < steps_.size(); ++r) {
      const bool exists = shape_.tuned[r] >= 0 && shape_.tuned[r] < shape_.neurons;
      EXPECT_EQ(steps_[r], exists ? updates : 0);
    }
  }

 private:
  int64_t held() const {
    return shape_.compact ? static_cast<int64_t>(shape_.tuned.size()) : shape_.neurons;
  }
  int64_t elements() const {
    return shape_.outer * static_cast<int64_t>(shape_.tuned.size()) * shape_.inner;
  }
  // Calls f with the places of each tuned element that exists.
  template <typename F>
  void each(const F& f) const {
    const auto count = static_cast<int64_t>(shape_.tuned.size());
    for (int64_t o = 0; o < shape_.outer; ++o) {
      for (int64_t r = 0; r < count; ++r) {
        const int64_t n = shape_.tuned[r];
        if (n < 0 || n >= shape_.neurons) continue;
        for (int64_t i = 0; i < shape_.inner; ++i) {
          const int64_t grad_row = o * held() + (shape_.compact ? r : n);
          f((o * shape_.neurons + n) * shape_.inner + i + shape_.shifted,
            grad_row * shape_.inner + i + shape_.shifted, (o * count + r) * shape_.inner + i);
        }
      }
    }
  }

  Shape shape_;
  int kinds_;
  std::vector<T> param_, grad_, before_;
  std::vector<std::vector<V>> states_;
  std::vector<float> steps_, master_, master_before_;
};

class Problem {
 public:
  // Tensors of every type in each of the shapes.
  Problem(const std::vector<Shape>& shapes, int kinds) {
    unsigned seed = 7;
    for (const Shape& shape : shapes) {
      if (!shape.master) {
        tensors_.push_back(std::make_unique<TypedTensor<double>>(shape, kinds, seed++));
        tensors_.push_back(std::make_unique<TypedTensor<float>>(shape, kinds, seed++));
      }
      tensors_.push_back(std::make_unique<TypedTensor<Float16>>(shape, kinds, seed++));
      tensors_.push_back(std::make_unique<TypedTensor<BFloat16>>(shape, kinds, seed++));
    }
  }

  template <int kStates, template <typename> class Rule, typename... Options>
  void step(const StepScalars& scalars, Options... options) {
    std::vector<TensorUpdate> updates;
    for (const auto& tensor : tensors_) updates.push_back(tensor->update());
    // Allocations of their own, so that AddressSanitizer knows their bounds.
    std::vector<std::unique_ptr<std::byte[]>> rooms;
    launch_step<kStates, Rule>(Rule<float>(options...), Rule<double>(options...), scalars, updates,
                               [&](int64_t bytes) -> void* {
                                 rooms.push_back(std::make_unique<std::byte[]>(bytes));
                                 return rooms.back().get();
                               });
  }

  void expect_updated(Formula formula, int updates) const {
    for (const auto& tensor : tensors_) tensor->expect_updated(formula, updates);
  }

 private:
  std::vector<std::unique_ptr<Tensor>> tensors_;
};

std::vector<int64_t> every(int64_t count) {
  std::vector<int64_t> rows(count);
  std::iota(rows.begin(), rows.end(), 0);
  return rows;
}

// Lines that are a multiple of 16 bytes and others, in one block and in several; rows that are
// elements; nothing at all; rows that the parameter does not have.
std::vector<Shape> shapes() {
  std::vector<Shape> all;
  for (const bool compact : {false, true}) {
    all.push_back({3, 50, 7, {0, 3, 4, 17, 49}, compact});
    all.push_back({1, 9, 64, {1, 2, 8}, compact});
    all.push_back({1, 9, 64, {1, 2, 8}, compact, true});
    all.push_back({1, 40, 1, {0, 5, 6, 39}, compact});
    all.push_back({5, 12, 1, {2, 11}, compact});
    all.push_back({2, 3, 1100, {0, 2}, compact});
    all.push_back({1, 4, 16, {}, compact});
    all.push_back({1, 3, 0, {0, 2}, compact});
    all.push_back({1, 9, 64, {-1, 3, 9, int64_t{1} << 40}, compact});
    all.push_back({1, 12, 33, every(12), compact});
  }
  return all;
}

std::vector<Shape> master_shapes() {
  std::vector<Shape> all;
  for (Shape shape : shapes()) {
    const bool exist = std::all_of(shape.tuned.begin(), shape.tuned.end(),
                                   [&](int64_t n) { return n >= 0 && n < shape.neurons; });
    shape.master = true;
    if (exist) all.push_back(shape);
  }
  return all;
}

void nesterov(double& p, double g, double* state, int updates) {
  const double decayed = g / 4 + 0.01 * p;
  state[0] = updates == 1 ? decayed : 0.9 * state[0] + decayed;
  p -= 0.1 * (decayed + 0.9 * state[0]);
}

void adamw(double& p, double g, double* state, int updates) {
  state[0] = 0.9 * state[0] + 0.1 * g;
  state[1] = 0.99 * state[1] + 0.01 * g * g;
  p *= 1 - 0.05 * 0.1;
  p -= 0.05 * (state[0] / (1 - std::pow(0.9, updates))) /
       (std::sqrt(state[1] / (1 - std::pow(0.99, updates))) + 1e-8);
}

// Large, as small gradients would show the rounding of the decayed parameter many times over.
constexpr double kEps = 0.1;

void amsgrad(double& p, double g, double* state, int updates) {
  const double decayed = -g + 0.1 * p;
  state[0] = 0.9 * state[0] + 0.1 * decayed;
  state[1] = 0.99 * state[1] + 0.01 * decayed * decayed;
  state[2] = std::max(state[2], state[1]);
  p -= 0.0625 * (state[0] / (1 - std::pow(0.9, updates))) /
       (std::sqrt(state[2] / (1 - std::pow(0.99, updates))) + kEps);
}

TEST(MaskedOptimDevice, SgdEqualsItsFormula) {
  for (const auto& given : {shapes(), master_shapes()}) {
    for (const unsigned seed : {0u, 3u}) {
      host::set_seed(seed);
      Problem problem(given, 1);
      const float scale = 4;
      StepScalars scalars;
      scalars.lr_value = 0.1;
      scalars.grad_scale = &scale;
      for (int i = 0; i < 2; ++i) problem.step<1, Sgd>(scalars, 0.9, 0.0, 0.01, true, false);
      problem.expect_updated(nesterov, 2);
    }
  }
}

TEST(MaskedOptimDevice, SgdWithoutMomentumEqualsItsFormula) {
  Problem problem(shapes(), 0);
  StepScalars scalars;
  scalars.lr_value = 0.5;
  problem.step<0, Sgd>(scalars, 0.0, 0.0, 0.0, false, false);
  problem.expect_updated([](double& p, double g, double*, int) { p -= 0.5 * g; }, 1);
}

TEST(MaskedOptimDevice, AdamwEqualsItsFormula) {
  for (const auto& given : {shapes(), master_shapes()}) {
    host::set_seed(5);
    Problem problem(given, 2);
    const double lr = 0.05;
    StepScalars scalars;
    scalars.lr_double = &lr;
    for (int i = 0; i < 3; ++i) {
      problem.step<2, Adamw>(scalars, 0.9, 0.99, 1e-8, 0.1, true, false, false);
    }
    problem.expect_updated(adamw, 3);
  }
}

TEST(MaskedOptimDevice, CoupledAmsgradEqualsItsFormula) {
  Problem problem(shapes(), 3);
  const float lr = 0.0625f;  // exact
  StepScalars scalars;
  scalars.lr_float = &lr;
  for (int i = 0; i < 3; ++i) {
    problem.step<3, Adamw>(scalars, 0.9, 0.99, kEps, 0.1, false, true, true);
  }
  problem.expect_updated(amsgrad, 3);
}

TEST(MaskedOptimDevice, AnInfiniteGradientSkipsTheStep) {
  Problem problem(shapes(), 2);
  const float found = 1;
  StepScalars scalars;
  scalars.lr_value = 0.1;
  scalars.found_inf = &found;
  problem.step<1, Sgd>(scalars, 0.9, 0.0, 0.0, false, false);
  problem.step<2, Adamw>(scalars, 0.9, 0.99, 1e-8, 0.0, true, false, false);
  problem.expect_updated(adamw, 0);
}

TEST(MaskedOptimDevice, AnEmptyListIsNoWork) {
  Problem problem({}, 2);
  problem.step<2, Adamw>(StepScalars{}, 0.9, 0.99, 1e-8, 0.0, true, false, false);
  Problem without_rows({{1, 4, 16, {}}}, 2);
  without_rows.step<2, Adamw>(StepScalars{}, 0.9, 0.99, 1e-8, 0.0, true, false, false);
}

// More tensors than one piece of the table carries, with different numbers of axes.
TEST(MaskedOptimDevice, ManyTensors) {
  std::vector<Shape> many;
  for (int64_t i = 0; i < 40; ++i) many.push_back({1 + i % 3, 5, 1 + i, {0, 1 + i % 4}});
  Problem problem(many, 2);
  StepScalars scalars;
  scalars.lr_value = 0.05;
  for (int i = 0; i < 2; ++i) {
    problem.step<2, Adamw>(scalars, 0.9, 0.99, 1e-8, 0.1, true, false, false);
  }
  problem.expect_updated(adamw, 2);
}

}  // namespace
}  // namespace neusemslice::cuda
