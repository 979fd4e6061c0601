#pragma once

// The types of a tensor's elements as they lie in memory, free of torch, and their conversion from
// and to the type that they are computed in.

#include <bit>
#include <cstdint>
#include <type_traits>

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

// To the nearest element, of two to the even one; a NaN stays one.
template <typename S>
NSS_HOST_DEVICE S from_value(double x) {
  return static_cast<S>(x);
}
template <typename S>
NSS_HOST_DEVICE S from_value(float x) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    const uint32_t raw = std::bit_cast<uint32_t>(x);
    const uint32_t rounded = x != x ? raw | 0x400000u : raw + 0x7fffu + (raw >> 16 & 1u);
    return {static_cast<uint16_t>(rounded >> 16)};
  } else if constexpr (std::is_same_v<S, Float16>) {
#if defined(__CUDA_ARCH__)
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return {bits};
#else
    const uint32_t raw = std::bit_cast<uint32_t>(x);
    const uint32_t sign = raw >> 16 & 0x8000u;
    const uint32_t magnitude = raw & 0x7fffffffu;
    uint32_t bits = 0;
    if (magnitude > 0x7f800000u) {  // not a number
      bits = 0x7e00u | (magnitude >> 13 & 0x3ffu);
    } else if (magnitude >= 0x477ff000u) {  // what rounds to 65536 or more
      bits = 0x7c00u;
    } else if (magnitude < 0x38800000u) {
      // Below 2^-14 elements are 2^-24 apart, as floats are in [0.5, 1): the sum is rounded so.
      const float aligned = std::bit_cast<float>(magnitude) + 0.5f;
      bits = std::bit_cast<uint32_t>(aligned) - 0x3f000000u;
    } else {
      bits = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
    }
    return {static_cast<uint16_t>(sign | bits)};
#endif
  } else {
    return static_cast<S>(x);
  }
}

// Calls f with a value of the type that the elements have.
template <typename F>
inline void with_element(Element element, const F& f) {
  switch (element) {
    case Element::kFloat64:
      return f(double{});
    case Element::kFloat32:
      return f(float{});
    case Element::kFloat16:
      return f(Float16{});
    case Element::kBFloat16:
      return f(BFloat16{});
  }
}

// What an element is computed in.
template <typename S>
using ValueOf = decltype(to_value(S{}));

}  // namespace neusemslice
