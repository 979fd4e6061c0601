#pragma once

// The types of a tensor's elements as they lie in memory, free of torch.

#include <bit>
#include <cstdint>

#include "common/host_device.h"

namespace neusemslice {

enum class Element { kFloat64, kFloat32, kFloat16, kBFloat16 };

struct Float16 {
  static constexpr bool kBrain = false;
  uint16_t bits;
};

struct BFloat16 {
  static constexpr bool kBrain = true;
  uint16_t bits;
};

NSS_HOST_DEVICE double to_value(double x) { return x; }
NSS_HOST_DEVICE float to_value(float x) { return x; }
NSS_HOST_DEVICE float to_value(BFloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
NSS_HOST_DEVICE float to_value(Float16 x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000u | (rest << 13));
  // Multiplying by 2^112 moves the exponent from one bias to the other and normalises subnormals.
  const float magnitude = std::bit_cast<float>(rest << 13) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
#endif
}

}  // namespace neusemslice
