#pragma once

// From an operator's checked batch to what its kernels are given.

#include "ops/class_stats.h"
#include "ops/cuda/class_batch.cuh"

namespace neusemslice::cuda {

inline DeviceSamples device_samples(const ops::ClassBatch& batch, const at::Tensor& order,
                                    const at::Tensor& offsets) {
  return {
      batch.mask.defined() ? batch.mask.const_data_ptr<bool>() : nullptr,
      batch.share.defined() ? batch.share.const_data_ptr<double>() : nullptr,
      batch.weight.defined() ? batch.weight.const_data_ptr<double>() : nullptr,
      order.const_data_ptr<int64_t>(),
      offsets.const_data_ptr<int64_t>(),
      batch.samples,
      batch.positions,
  };
}

template <typename scalar_t>
DeviceOperand<scalar_t> device_operand(const ops::ClassOperand& operand) {
  return {operand.x.const_data_ptr<scalar_t>(), operand.stride_n, operand.stride_p,
          operand.stride_c};
}

}  // namespace neusemslice::cuda
