#pragma once

// One step of SGD and of Adam for one element, with every option of torch.optim's. T, float or
// double, is the type of the state and of the arithmetic; what depends on the number of the step
// is found in double, once per row, before it is rounded to T. The steps themselves are in
// optimizer_steps.h.

#include <cmath>

#include "common/host_device.h"

namespace neusemslice {

// a * b + c, rounded once.
NSS_HOST_DEVICE float fused(float a, float b, float c) { return std::fma(a, b, c); }
NSS_HOST_DEVICE double fused(double a, double b, double c) { return std::fma(a, b, c); }

NSS_HOST_DEVICE float root(float x) { return std::sqrt(x); }
NSS_HOST_DEVICE double root(double x) { return std::sqrt(x); }

// The larger of the two; NaN if either is.
NSS_HOST_DEVICE float larger(float a, float b) { return a > b || std::isnan(a) ? a : b; }
NSS_HOST_DEVICE double larger(double a, double b) { return a > b || std::isnan(a) ? a : b; }

// a, or b where `condition` is 0.
NSS_HOST_DEVICE float chosen(float condition, float a, float b) { return condition != 0 ? a : b; }
NSS_HOST_DEVICE double chosen(double condition, double a, double b) {
  return condition != 0 ? a : b;
}

// Stochastic gradient descent. Sutskever, Martens, Dahl, Hinton: On the importance of
// initialization and momentum in deep learning, 2013. Its state is the momentum, if there is any.
template <typename T>
struct Sgd {
  using Value = T;

  T momentum;
  T gain;  // 1 - dampening
  T weight_decay;
  bool nesterov;
  bool maximize;

  Sgd(double momentum_, double dampening, double weight_decay_, bool nesterov_, bool maximize_)
      : momentum(static_cast<T>(momentum_)),
        gain(static_cast<T>(1 - dampening)),
        weight_decay(static_cast<T>(weight_decay_)),
        nesterov(nesterov_),
        maximize(maximize_) {}

  // What the elements of one row share; every member is a V.
  template <typename V>
  struct Shares {
    V lr;
    V first;  // 1: the buffer holds nothing yet and takes the gradient as it is; else 0
  };
  using Row = Shares<T>;

  // `updates` is the number of updates that the row has had before this one.
  NSS_HOST_DEVICE Row row(double lr, double updates) const {
    return {static_cast<T>(lr), static_cast<T>(updates == 0)};
  }
};

// Adam: Kingma, Ba: Adam: A Method for Stochastic Optimization, 2015. Weight decay is decoupled
// from the gradient (Loshchilov, Hutter: Decoupled Weight Decay Regularization, 2019) or part of
// it; the maximum (AMSGrad) is from Reddi, Kale, Kumar: On the Convergence of Adam and Beyond,
// 2018. Its state is exp_avg, exp_avg_sq and, with AMSGrad, max_exp_avg_sq.
template <typename T>
struct Adamw {
  using Value = T;

  double beta1;
  double beta2;
  double decoupled_decay;
  T coupled_decay;
  T forget1;  // 1 - beta1
  T keep2;    // beta2
  T forget2;  // 1 - beta2
  T eps;
  bool amsgrad;
  bool maximize;

  Adamw(double beta1_, double beta2_, double eps_, double weight_decay, bool decoupled,
        bool amsgrad_, bool maximize_)
      : beta1(beta1_),
        beta2(beta2_),
        decoupled_decay(decoupled ? weight_decay : 0),
        coupled_decay(static_cast<T>(decoupled ? 0 : weight_decay)),
        forget1(static_cast<T>(1 - beta1_)),
        keep2(static_cast<T>(beta2_)),
        forget2(static_cast<T>(1 - beta2_)),
        eps(static_cast<T>(eps_)),
        amsgrad(amsgrad_),
        maximize(maximize_) {}

  // What the elements of one row share; every member is a V.
  template <typename V>
  struct Shares {
    V keep;              // 1 - lr * weight_decay
    V step_size;         // lr, corrected for the bias of exp_avg
    V root_correction2;  // square root of the bias correction of exp_avg_sq
  };
  using Row = Shares<T>;

  // `updates` is the number of updates that the row has had before this one.
  NSS_HOST_DEVICE Row row(double lr, double updates) const {
    const double correction1 = 1 - std::pow(beta1, updates + 1);
    const double correction2 = 1 - std::pow(beta2, updates + 1);
    return {static_cast<T>(1 - lr * decoupled_decay), static_cast<T>(lr / correction1),
            static_cast<T>(std::sqrt(correction2))};
  }
};

#include "common/optimizer_steps.h"

}  // namespace neusemslice
