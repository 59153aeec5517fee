#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, digits = x.bits & 1023;
  float size = exponent == 0 ? std::ldexp(digits, -24) : std::ldexp(1024 + digits, exponent - 25);
  if (exponent == 31) size = digits == 0 ? INFINITY : NAN;
  return x.bits & 0x8000 ? -size : size;
}

inline __half __float2half_rn(float x) {
  const unsigned sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  unsigned bits = 0;
  if (size != size) {
    bits = 0x7fff;
  } else if (size >= 65520.0f) {
    bits = 0x7c00;
  } else if (size > 0) {
    const int exponent = std::ilogb(size) < -14 ? -14 : std::ilogb(size);
    // The leading digit of a normal number, and the carry of one rounded up, go into the exponent.
    bits = ((exponent + 14) << 10) + static_cast<unsigned>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  }
  return {static_cast<uint16_t>(sign | bits)};
}
