// Numbers that kernels share: bfloat16 to and from float, and a vectorisable exponential.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

inline int64_t rounded_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

inline float widen(float x) { return x; }
inline float widen(uint16_t x) {  // bfloat16 is the upper half of a float
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}
inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, uint16_t* to) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  *to = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// As a T stores it.
template <typename T>
inline float rounded(float x) {
  T stored;
  narrow(x, &stored);
  return widen(stored);
}

// exp for x <= 0, within 3e-7 of the true value relatively; 0 below -87.
inline float exp_negative(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float n = std::nearbyint(clamped * 1.44269504f);
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t exponent = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &exponent, 4);
  return x < -87.0f ? 0.0f : p * scale;
}

}  // namespace
