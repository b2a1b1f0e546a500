// What a decoder layer does to one token a row between its matrix products, for CPUs.
//
// Plain C interface, no torch headers. H is the type of the residual stream, T that of products.
// Sums are in float; results are rounded where the layer written in torch rounds them.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "numbers.h"
#include "room.h"

namespace {

constexpr int64_t kApart = 16;  // numbers between two threads' room: no line of memory is shared

template <typename T>
float scale_to_unit(const T* x, int64_t width, float epsilon) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < width; ++i) squares += widen(x[i]) * widen(x[i]);
  return 1.0f / std::sqrt(squares / static_cast<float>(width) + epsilon);
}

template <typename H, typename T>
void add_norm(int64_t rows, int64_t width, float epsilon, H* hidden, const T* update,
              const float* weight, T* out) {
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < rows; ++n) {
    H* x = hidden + n * width;
    T* to = out + n * width;
    if (update) {
      const T* added = update + n * width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) narrow(widen(x[i]) + widen(added[i]), x + i);
    }
    const float scale = scale_to_unit(x, width, epsilon);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i)
      narrow(rounded<H>(widen(x[i]) * scale) * weight[i], to + i);
  }
}

template <typename T>
void swiglu(int64_t rows, int64_t width, const T* gate_up, T* out) {
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < rows; ++n) {
    const T* gate = gate_up + n * 2 * width;
    const T* up = gate + width;
    T* to = out + n * width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float g = widen(gate[i]);
      const float decay = exp_negative(-std::fabs(g));  // of the sign that cannot overflow
      const float gated = g * (g < 0 ? decay : 1.0f) / (1.0f + decay);
      narrow(rounded<T>(gated) * widen(up[i]), to + i);
    }
  }
}

struct Heads {
  int64_t rows, heads, key_heads, width, own_columns;
};

// One head: its halves rotated.
template <typename T, typename Number>
void rotate(const Number* x, int64_t width, const float* cosine, const float* sine, T* out) {
  const int64_t half = width / 2;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float a = widen(x[i]), b = widen(x[i + half]);
    narrow(a * cosine[i] - b * sine[i], out + i);
    narrow(b * cosine[i + half] + a * sine[i + half], out + i + half);
  }
}

// The same after a norm, if there is a weight. `normed` has room for one head.
template <typename T>
void norm_and_rotate(const T* x, int64_t width, const float* cosine, const float* sine,
                     const float* weight, float epsilon, float* normed, T* out) {
  if (!weight) return rotate(x, width, cosine, sine, out);
  const float scale = scale_to_unit(x, width, epsilon);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) normed[i] = rounded<T>(widen(x[i]) * scale) * weight[i];
  rotate(normed, width, cosine, sine, out);
}

template <typename T>
void rotate_and_keep(const Heads& s, const T* packed, const float* cosine, const float* sine,
                     const float* query_weight, const float* key_weight, float query_epsilon,
                     float key_epsilon, const int64_t* own_length, T* query, T* own_keys,
                     T* own_values) {
  const Room<float> rooms(query_weight || key_weight ? s.width + kApart : 0);
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < s.rows; ++n) {
    float* normed = rooms.own();
    const T* from = packed + n * (s.heads + 2 * s.key_heads) * s.width;
    const float* c = cosine + n * s.width;
    const float* d = sine + n * s.width;
    T* to = query + n * s.heads * s.width;
    for (int64_t h = 0; h < s.heads; ++h, from += s.width, to += s.width)
      norm_and_rotate(from, s.width, c, d, query_weight, query_epsilon, normed, to);
    const T* value = from + s.key_heads * s.width;
    for (int64_t h = 0; h < s.key_heads; ++h, from += s.width, value += s.width) {
      const int64_t at = ((n * s.key_heads + h) * s.own_columns + own_length[n]) * s.width;
      norm_and_rotate(from, s.width, c, d, key_weight, key_epsilon, normed, own_keys + at);
      std::copy(value, value + s.width, own_values + at);
    }
  }
}

}  // namespace

// Tensors are contiguous. hidden, update and out [N, E]: hidden += update (if not null), and out
// is its RMS norm times weight [E].
#define ADD_NORM(NAME, H, T)                                                                     \
  extern "C" void NAME(int64_t rows, int64_t width, float epsilon, H* hidden, const T* update,   \
                       const float* weight, T* out) {                                            \
    add_norm<H, T>(rows, width, epsilon, hidden, update, weight, out);                           \
  }

ADD_NORM(add_norm_float32_float32, float, float)
ADD_NORM(add_norm_float32_bfloat16, float, uint16_t)
ADD_NORM(add_norm_bfloat16_bfloat16, uint16_t, uint16_t)

// gate_up [N, 2 I], out [N, I].
#define SWIGLU(NAME, T)                                                              \
  extern "C" void NAME(int64_t rows, int64_t width, const T* gate_up, T* out) {      \
    swiglu<T>(rows, width, gate_up, out);                                            \
  }

SWIGLU(swiglu_float32, float)
SWIGLU(swiglu_bfloat16, uint16_t)

// packed [N, (H + 2 K) D]; cosine and sine [N, D]; weights [D] or null; query [N, H, D]; own keys
// and values [S, K, C, D], written at column own_length [N]. Returns -1 where there is not memory
// enough.
#define ROTATE(NAME, T)                                                                          \
  extern "C" int64_t NAME(int64_t rows, int64_t heads, int64_t key_heads, int64_t width,         \
                          int64_t own_columns, float query_epsilon, float key_epsilon,           \
                          const T* packed, const float* cosine, const float* sine,               \
                          const float* query_weight, const float* key_weight,                    \
                          const int64_t* own_length, T* query, T* own_keys, T* own_values) try { \
    rotate_and_keep<T>(Heads{rows, heads, key_heads, width, own_columns}, packed, cosine, sine,  \
                       query_weight, key_weight, query_epsilon, key_epsilon, own_length, query,  \
                       own_keys, own_values);                                                    \
    return 0;                                                                                    \
  } OR_NO_MEMORY

ROTATE(rotate_float32, float)
ROTATE(rotate_bfloat16, uint16_t)
