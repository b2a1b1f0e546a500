// What a decoder layer does between its products in a training pass, and its gradients, for CPUs.
//
// The residual stream is float; T is the type of products. Sums over rows are made by each thread
// over its own rows and then added in order, so they do not change from run to run.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "numbers.h"
#include "room.h"

namespace {

// sum = hidden + update (if there is one), out = its RMS norm times weight, scale = 1 / its root.
template <typename T>
void norm_forward(int64_t rows, int64_t width, float epsilon, const float* hidden, const T* update,
                  const float* weight, float* sum, T* out, float* scale) {
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < rows; ++n) {
    const float* x = hidden + n * width;
    if (update) {
      const T* added = update + n * width;
      float* to = sum + n * width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) to[i] = x[i] + widen(added[i]);
      x = to;
    }
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; ++i) squares += x[i] * x[i];
    const float r = 1.0f / std::sqrt(squares / static_cast<float>(width) + epsilon);
    scale[n] = r;
    T* to = out + n * width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) narrow(x[i] * r * weight[i], to + i);
  }
}

// grad is that of the norm's output; total = carry + gradient of x; again = the norm's output.
template <typename T>
void norm_backward(int64_t rows, int64_t width, const float* x, const float* weight,
                   const float* scale, const T* grad, const float* carry, float* total,
                   T* total_narrow, T* again, float* weight_grad) {
  std::vector<float> sums(omp_get_max_threads() * width, 0.0f);
#pragma omp parallel
  {
    float* own = sums.data() + omp_get_thread_num() * width;
#pragma omp for schedule(static)
    for (int64_t n = 0; n < rows; ++n) {
      const int64_t at = n * width;
      const float r = scale[n];
      float shared = 0;
#pragma omp simd reduction(+ : shared)
      for (int64_t i = 0; i < width; ++i)
        shared += widen(grad[at + i]) * weight[i] * x[at + i];
      const float pull = shared * r * r * r / static_cast<float>(width);
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        const float g = widen(grad[at + i]), unit = x[at + i] * r;
        own[i] += g * unit;
        const float sum = carry[at + i] + g * weight[i] * r - x[at + i] * pull;
        total[at + i] = sum;
        narrow(sum, total_narrow + at + i);
        narrow(unit * weight[i], again + at + i);
      }
    }
  }
  std::fill(weight_grad, weight_grad + width, 0.0f);
  for (int t = 0; t < omp_get_max_threads(); ++t)
    for (int64_t i = 0; i < width; ++i) weight_grad[i] += sums[t * width + i];
}

template <typename T>
void swiglu_backward(int64_t rows, int64_t width, const T* gate_up, const T* grad, T* gradient,
                     T* again) {
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < rows; ++n) {
    const T *gate = gate_up + n * 2 * width, *up = gate + width, *given = grad + n * width;
    T *to_gate = gradient + n * 2 * width, *to_up = to_gate + width, *out = again + n * width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float g = widen(gate[i]), u = widen(up[i]), d = widen(given[i]);
      const float decay = exp_negative(-std::fabs(g));
      const float open = (g < 0 ? decay : 1.0f) / (1.0f + decay);  // the sigmoid
      const float gated = rounded<T>(g * open);
      narrow(gated * u, out + i);
      narrow(d * gated, to_up + i);
      narrow(rounded<T>(d * u) * open * (1.0f + g * (1.0f - open)), to_gate + i);
    }
  }
}

// Queries, keys and values of a row lie side by side; here they are ordered by key head.
struct Heads {
  int64_t rows, key_heads, repeats, width;

  int64_t packed() const { return key_heads * (repeats + 2) * width; }
};

// The halves of a head rotated; `sign` -1 turns back, which is the gradient.
template <typename From, typename To>
void turn(const From* x, int64_t width, const float* cosine, const float* sine, float sign, To* out) {
  const int64_t half = width / 2;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float a = widen(x[i]), b = widen(x[i + half]);
    const float low = sign > 0 ? sine[i] : sine[i + half];
    const float high = sign > 0 ? sine[i + half] : sine[i];
    narrow(a * cosine[i] - sign * b * low, out + i);
    narrow(b * cosine[i + half] + sign * a * high, out + i + half);
  }
}

template <typename T>
void split_heads(const Heads& s, const T* packed, const float* cosine, const float* sine, T* query,
                 T* key, T* value) {
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < s.rows; ++n) {
    const T* from = packed + n * s.packed();
    const float *c = cosine + n * s.width, *d = sine + n * s.width;
    for (int64_t k = 0; k < s.key_heads; ++k)
      for (int64_t r = 0; r < s.repeats; ++r, from += s.width)
        turn(from, s.width, c, d, 1.0f, query + ((k * s.rows + n) * s.repeats + r) * s.width);
    for (int64_t k = 0; k < s.key_heads; ++k, from += s.width)
      turn(from, s.width, c, d, 1.0f, key + (k * s.rows + n) * s.width);
    for (int64_t k = 0; k < s.key_heads; ++k, from += s.width)
      std::copy(from, from + s.width, value + (k * s.rows + n) * s.width);
  }
}

template <typename T>
void join_heads(const Heads& s, const float* query, const float* key, const float* value,
                const float* cosine, const float* sine, T* packed) {
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < s.rows; ++n) {
    T* to = packed + n * s.packed();
    const float *c = cosine + n * s.width, *d = sine + n * s.width;
    for (int64_t k = 0; k < s.key_heads; ++k)
      for (int64_t r = 0; r < s.repeats; ++r, to += s.width)
        turn(query + ((k * s.rows + n) * s.repeats + r) * s.width, s.width, c, d, -1.0f, to);
    for (int64_t k = 0; k < s.key_heads; ++k, to += s.width)
      turn(key + (k * s.rows + n) * s.width, s.width, c, d, -1.0f, to);
    for (int64_t k = 0; k < s.key_heads; ++k, to += s.width)
      for (int64_t i = 0; i < s.width; ++i) narrow(value[(k * s.rows + n) * s.width + i], to + i);
  }
}

template <typename T>
void add(int64_t count, float* total, const T* part) {
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < count; ++i) total[i] += widen(part[i]);
}

}  // namespace

// All tensors are contiguous. hidden, sum, x, carry and total [N, E] float; update, out, grad,
// total_narrow and again [N, E]; scale [N]; weight and weight_grad [E]. gate_up and gradient
// [N, 2 I]. packed [N, K (R + 2) D]; query [K, N, R, D]; key and value [K, N, D]; cosine and sine
// [N, D].
// total and part of `add` [count]. `norm_backward` returns -1 where there is not memory enough.
#define TRAINING(NAME, T)                                                                         \
  extern "C" void norm_forward_##NAME(int64_t rows, int64_t width, float epsilon,                 \
                                      const float* hidden, const T* update, const float* weight,  \
                                      float* sum, T* out, float* scale) {                         \
    norm_forward<T>(rows, width, epsilon, hidden, update, weight, sum, out, scale);               \
  }                                                                                               \
  extern "C" int64_t norm_backward_##NAME(int64_t rows, int64_t width, const float* x,            \
                                          const float* weight, const float* scale, const T* grad, \
                                          const float* carry, float* total, T* total_narrow,      \
                                          T* again, float* weight_grad) try {                     \
    norm_backward<T>(rows, width, x, weight, scale, grad, carry, total, total_narrow, again,      \
                     weight_grad);                                                                \
    return 0;                                                                                     \
  } OR_NO_MEMORY                                                                                  \
  extern "C" void swiglu_backward_##NAME(int64_t rows, int64_t width, const T* gate_up,           \
                                         const T* grad, T* gradient, T* again) {                  \
    swiglu_backward<T>(rows, width, gate_up, grad, gradient, again);                              \
  }                                                                                               \
  extern "C" void split_heads_##NAME(int64_t rows, int64_t key_heads, int64_t repeats,            \
                                     int64_t width, const T* packed, const float* cosine,         \
                                     const float* sine, T* query, T* key, T* value) {             \
    split_heads<T>(Heads{rows, key_heads, repeats, width}, packed, cosine, sine, query, key,      \
                   value);                                                                        \
  }                                                                                               \
  extern "C" void join_heads_##NAME(int64_t rows, int64_t key_heads, int64_t repeats,             \
                                    int64_t width, const float* query, const float* key,          \
                                    const float* value, const float* cosine, const float* sine,   \
                                    T* packed) {                                                  \
    join_heads<T>(Heads{rows, key_heads, repeats, width}, query, key, value, cosine, sine,        \
                  packed);                                                                        \
  }                                                                                               \
  extern "C" void add_##NAME(int64_t count, float* total, const T* part) {                        \
    add<T>(count, total, part);                                                                   \
  }

TRAINING(float32, float)
TRAINING(bfloat16, uint16_t)
