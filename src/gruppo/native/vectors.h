// Vectors of floats as wide as the processor's, where loops alone do not become good code.

#pragma once

#include <cstdint>
#include <cstring>

#include "numbers.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRegisters = 32;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

inline Vector load(const float* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}
inline Vector load(const uint16_t* from) {  // bfloat16
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  const Words words = __builtin_convertvector(halves, Words) << 16;
  Vector vector;
  std::memcpy(&vector, &words, sizeof vector);
  return vector;
}
inline void store(Vector vector, float* to) { std::memcpy(to, &vector, sizeof vector); }
inline void store(Vector vector, uint16_t* to) {  // as bfloat16
#ifdef __AVX512BF16__
  const __m256bh halves = _mm512_cvtneps_pbh((__m512)vector);
#else
  Words words;
  std::memcpy(&words, &vector, sizeof words);
  const Halves halves = __builtin_convertvector((words + 0x7fff + ((words >> 16) & 1)) >> 16, Halves);
#endif
  std::memcpy(to, &halves, sizeof halves);
}
inline Vector spread(float x) { return x - Vector{}; }

// Sums of neighbours, first those of a, then those of b.
inline Vector pairwise(Vector a, Vector b) {
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined(__AVX__)
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
#else
  Vector sums;
  for (int i = 0; i < kLanes / 2; ++i) {
    sums[i] = a[2 * i] + a[2 * i + 1];
    sums[i + kLanes / 2] = b[2 * i] + b[2 * i + 1];
  }
  return sums;
#endif
}

// The sum of each of kLanes vectors, side by side; they are overwritten.
inline Vector sums_of(Vector* vectors) {
#pragma GCC unroll 4
  for (int left = kLanes; left > 1; left /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < left / 2; ++i)
      vectors[i] = pairwise(vectors[2 * i], vectors[2 * i + 1]);
  return vectors[0];
}

// Some neighbouring numbers of a row (a key's, a query's, a matrix's) a lane, and their products
// added up in float.
template <typename T>
struct Parts {
  static constexpr int kDeep = 1;  // numbers a lane
  using Lane = float;
  using Loaded = Vector;
  static Lane lane(const T* from) { return widen(*from); }
  static Loaded lanes(const Lane* from) { return load(from); }
  static Loaded everywhere(const T* from) { return spread(widen(*from)); }
  static Loaded whole(const T* from) { return load(from); }
  static Loaded first(const T* from, int64_t count) {  // and zeros behind
    float wide[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) wide[i] = widen(from[i]);
    return load(wide);
  }
  static Vector add(Vector sums, Loaded a, Loaded b) { return sums + a * b; }
};

#ifdef __AVX512BF16__
template <>
struct Parts<uint16_t> {
  static constexpr int kDeep = 2;
  using Lane = uint32_t;
  using Loaded = __m512i;
  static Lane lane(const uint16_t* from) {
    Lane both;
    std::memcpy(&both, from, sizeof both);
    return both;
  }
  static Loaded lanes(const Lane* from) { return _mm512_loadu_si512(from); }
  static Loaded everywhere(const uint16_t* from) { return _mm512_set1_epi32(lane(from)); }
  static Loaded whole(const uint16_t* from) { return _mm512_loadu_si512(from); }
  static Loaded first(const uint16_t* from, int64_t count) {
    return _mm512_maskz_loadu_epi16((1u << count) - 1, from);
  }
  static Vector add(Vector sums, Loaded a, Loaded b) {
    return (Vector)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
  }
};
#endif

}  // namespace
