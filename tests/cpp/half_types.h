#pragma once

// 16-bit types that convert as those of torch do, for device code that is a template of its type.

#include <bit>
#include <cstdint>

namespace neusemslice {

struct Half16 {
  _Float16 value = 0;

  Half16() = default;
  explicit Half16(double v) : value(static_cast<_Float16>(v)) {}
  explicit Half16(float v) : value(static_cast<_Float16>(v)) {}
  explicit operator float() const { return static_cast<float>(value); }
  explicit operator double() const { return static_cast<double>(value); }
};

struct Brain16 {
  uint16_t bits = 0;

  Brain16() = default;
  explicit Brain16(double value) : Brain16(static_cast<float>(value)) {}
  // Rounds to the nearest, ties to even.
  explicit Brain16(float value) {
    const uint32_t raw = std::bit_cast<uint32_t>(value);
    const bool nan = value != value;
    bits = static_cast<uint16_t>((nan ? raw | 0x400000u : raw + 0x7fffu + (raw >> 16 & 1u)) >> 16);
  }
  explicit operator float() const { return std::bit_cast<float>(uint32_t{bits} << 16); }
  explicit operator double() const { return static_cast<float>(*this); }
};

}  // namespace neusemslice
