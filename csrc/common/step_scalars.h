#pragma once

#include "common/host_device.h"

namespace neusemslice {

// Scalars as both the host and the kernels read them; null where absent.
struct StepScalars {
  double lr_value = 0;  // used where both pointers are null
  const double* lr_double = nullptr;
  const float* lr_float = nullptr;
  const float* grad_scale = nullptr;
  const float* found_inf = nullptr;

  NSS_HOST_DEVICE double lr() const {
    return lr_double ? *lr_double : lr_float ? static_cast<double>(*lr_float) : lr_value;
  }
  NSS_HOST_DEVICE float scale() const { return grad_scale ? *grad_scale : 1.0f; }
  NSS_HOST_DEVICE bool skipped() const { return found_inf && *found_inf != 0; }
};

}  // namespace neusemslice
