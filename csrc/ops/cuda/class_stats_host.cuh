#pragma once

// From an operator's checked batch to what the launches of class_stats_ and contribution_ are
// given.

#include <ATen/ops/empty.h>

#include <cstddef>

#include "ops/checks.h"
#include "ops/class_stats.h"
#include "ops/cuda/class_stats_launch.cuh"

namespace neusemslice::ops {

// Rooms of one tensor, one after the other; without the tensor, only how many bytes they take.
// Memory of the caching allocator lives until the kernels on this stream have read it.
class DeviceWorkspace {
 public:
  explicit DeviceWorkspace(std::byte* begin = nullptr) : begin_(begin) {}

  template <typename T>
  T* take(int64_t count) {
    constexpr int64_t kAlignment = 256;
    std::byte* room = begin_ ? begin_ + bytes_ : nullptr;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(room);
  }
  int64_t bytes() const { return bytes_; }

 private:
  std::byte* begin_;
  int64_t bytes_ = 0;
};

inline cuda::SiteInput site_input(const ClassState& state, const ClassBatch& batch) {
  return {
      state,
      batch.x.const_data_ptr(),
      element_of(batch.x),
      batch.mask.defined() ? batch.mask.const_data_ptr<bool>() : nullptr,
      batch.positions,
      batch.stride_n,
      batch.stride_p,
      batch.stride_c,
  };
}

inline cuda::BatchInput batch_input(const ClassBatch& batch, const at::Tensor& order,
                                    const at::Tensor& offsets) {
  return {
      order.const_data_ptr<int64_t>(),
      offsets.const_data_ptr<int64_t>(),
      batch.share.defined() ? batch.share.const_data_ptr<double>() : nullptr,
      batch.weight.defined() ? batch.weight.const_data_ptr<double>() : nullptr,
      order.size(0),
      batch.samples,
      offsets.size(0) - 1,
  };
}

// Runs what make(workspace) gives, which asks for the same rooms each time.
template <typename Make>
void with_workspace(const at::TensorOptions& options, const Make& make) {
  DeviceWorkspace sizes;
  make(sizes);
  const at::Tensor room = at::empty({sizes.bytes()}, options.dtype(at::kByte));
  DeviceWorkspace workspace(static_cast<std::byte*>(room.mutable_data_ptr()));
  make(workspace).run();
}

}  // namespace neusemslice::ops
