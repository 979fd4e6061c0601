#pragma once

// Workspace and elements for tests of kernels on the simulated device.

#include <bit>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "common/elements.h"

namespace neusemslice::cuda {

// Each request is an allocation of its own, so that AddressSanitizer knows its bounds; all bits
// set, so that what nobody has written is NaN.
class HeapWorkspace {
 public:
  template <typename T>
  T* take(int64_t count) {
    const size_t bytes = count * sizeof(T);
    rooms_.push_back(std::make_unique<char[]>(bytes));
    std::memset(rooms_.back().get(), 0xff, bytes);
    return reinterpret_cast<T*>(rooms_.back().get());
  }

 private:
  std::vector<std::unique_ptr<char[]>> rooms_;
};

inline uint16_t half_bits(float value) {
  // Rounds towards zero, which is as good as any rounding for test data.
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const int exponent = static_cast<int>(bits >> 23 & 0xffu) - 127 + 15;
  if ((bits & 0x7fffffffu) >= 0x7f800000u) {
    return static_cast<uint16_t>(sign | 0x7c00u | ((bits & 0x7fffffu) ? 0x200u : 0u));
  }
  if (exponent <= 0) return static_cast<uint16_t>(sign);
  if (exponent >= 31) return static_cast<uint16_t>(sign | 0x7bffu);
  return static_cast<uint16_t>(sign | static_cast<uint32_t>(exponent) << 10 |
                               (bits >> 13 & 0x3ffu));
}

template <typename T>
T make_element(double value) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {static_cast<uint16_t>(std::bit_cast<uint32_t>(static_cast<float>(value)) >> 16)};
  } else if constexpr (std::is_same_v<T, Float16>) {
    return {half_bits(static_cast<float>(value))};
  } else {
    return static_cast<T>(value);
  }
}

template <typename T>
constexpr Element kElement = Element::kFloat64;
template <>
constexpr Element kElement<float> = Element::kFloat32;
template <>
constexpr Element kElement<Float16> = Element::kFloat16;
template <>
constexpr Element kElement<BFloat16> = Element::kBFloat16;

}  // namespace neusemslice::cuda
