#pragma once

// One step of SGD and of AdamW for one element, with every option of torch.optim's. The order of
// the operations, and so the rounding, is that of torch.optim's plain implementation. T, float or
// double, is the type of the state and of the arithmetic; what depends on the number of the step
// is found in double, once per row, before it is rounded to T.

#include <cmath>

#include "common/host_device.h"

namespace neusemslice {

// Stochastic gradient descent. Sutskever, Martens, Dahl, Hinton: On the importance of
// initialization and momentum in deep learning, 2013.
template <typename T>
struct Sgd {
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

  // What the elements of one row share.
  struct Row {
    T lr;
    bool first;  // the buffer holds nothing yet and takes the gradient as it is
  };

  // `updates` is the number of updates that the row has had before this one.
  NSS_HOST_DEVICE Row row(double lr, double updates) const {
    return {static_cast<T>(lr), updates == 0};
  }

  // The new value of a parameter. `buffer` is its momentum, null where momentum is 0; the gradient
  // arrives multiplied by `scale`. Products are fused with sums by name, where torch's vectorised
  // kernels fuse them: nothing pulls the weights together again, and after a thousand steps the
  // roundings would show as eight units in the last place.
  NSS_HOST_DEVICE T step(const Row& row, T param, T grad, T scale, T* buffer) const {
    T g = grad / scale;
    if (maximize) g = -g;
    if (weight_decay != 0) g = std::fma(weight_decay, param, g);
    if (buffer) {
      *buffer = row.first ? g : std::fma(gain, g, momentum * *buffer);
      g = nesterov ? std::fma(momentum, *buffer, g) : *buffer;
    }
    return std::fma(-row.lr, g, param);
  }
};

// Adam with decoupled weight decay. Loshchilov, Hutter: Decoupled Weight Decay Regularization,
// 2019; the maximum (AMSGrad) is from Reddi, Kale, Kumar: On the Convergence of Adam and Beyond,
// 2018.
template <typename T>
struct Adamw {
  double beta1;
  double beta2;
  double weight_decay;
  T forget1;  // 1 - beta1
  T keep2;    // beta2
  T forget2;  // 1 - beta2
  T eps;
  bool maximize;

  Adamw(double beta1_, double beta2_, double eps_, double weight_decay_, bool maximize_)
      : beta1(beta1_),
        beta2(beta2_),
        weight_decay(weight_decay_),
        forget1(static_cast<T>(1 - beta1_)),
        keep2(static_cast<T>(beta2_)),
        forget2(static_cast<T>(1 - beta2_)),
        eps(static_cast<T>(eps_)),
        maximize(maximize_) {}

  // What the elements of one row share.
  struct Row {
    T keep;              // 1 - lr * weight_decay
    T step_size;         // lr, corrected for the bias of exp_avg
    T root_correction2;  // square root of the bias correction of exp_avg_sq
  };

  // `updates` is the number of updates that the row has had before this one.
  NSS_HOST_DEVICE Row row(double lr, double updates) const {
    const double correction1 = 1 - std::pow(beta1, updates + 1);
    const double correction2 = 1 - std::pow(beta2, updates + 1);
    return {static_cast<T>(1 - lr * weight_decay), static_cast<T>(lr / correction1),
            static_cast<T>(std::sqrt(correction2))};
  }

  // The new value of a parameter. `max_exp_avg_sq` is null without AMSGrad; the gradient arrives
  // multiplied by `scale`.
  NSS_HOST_DEVICE T step(const Row& row, T param, T grad, T scale, T* exp_avg, T* exp_avg_sq,
                         T* max_exp_avg_sq) const {
    T g = grad / scale;
    if (maximize) g = -g;
    // The form of the interpolation that is exact at the nearer end.
    const T m = forget1 < T(0.5) ? *exp_avg + forget1 * (g - *exp_avg)
                                 : g - (g - *exp_avg) * (T(1) - forget1);
    const T v = *exp_avg_sq * keep2 + forget2 * g * g;
    *exp_avg = m;
    *exp_avg_sq = v;
    T bound = v;
    if (max_exp_avg_sq) {
      // A NaN stays, as in torch.maximum.
      if (v > *max_exp_avg_sq || std::isnan(v)) *max_exp_avg_sq = v;
      bound = *max_exp_avg_sq;
    }
    const T denominator = std::sqrt(bound) / row.root_correction2 + eps;
    return param * row.keep - row.step_size * (m / denominator);
  }
};

}  // namespace neusemslice
