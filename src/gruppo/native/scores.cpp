// Softmax of attention scores and its gradient, one pass each, for CPUs.
//
// The products before and after are the caller's. T is the type in which these are made.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "numbers.h"

namespace {

// Rows are ordered by head, then query, then the query heads that share keys (`repeats`).
struct Part {
  int64_t rows, columns, queries, repeats;
  bool causal;  // the last query sees all keys, each one before it one less

  int64_t seen(int64_t row) const {
    return causal ? columns - queries + row / repeats % queries + 1 : columns;
  }
};

template <typename T>
void forward(const Part& part, float scale, const float* scores, float* lse, T* weights) {
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < part.rows; ++n) {
    const float* s = scores + n * part.columns;
    T* w = weights + n * part.columns;
    const int64_t seen = part.seen(n);
    float top = -INFINITY, total = 0;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < seen; ++i) top = s[i] > top ? s[i] : top;
    top *= scale;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < seen; ++i) total += exp_negative(s[i] * scale - top);
    lse[n] = top + std::log(total);
    const float inverse = 1.0f / total;
#pragma omp simd
    for (int64_t i = 0; i < seen; ++i) narrow(exp_negative(s[i] * scale - top) * inverse, w + i);
    std::fill(w + seen, w + part.columns, T(0));
  }
}

template <typename T>
void backward(const Part& part, float scale, const float* scores, const float* grad,
              const float* lse, const float* delta, T* weights, T* gradient) {
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < part.rows; ++n) {
    const int64_t at = n * part.columns, seen = part.seen(n);
    const float *s = scores + at, *g = grad + at;
    T *w = weights + at, *out = gradient + at;
    const float sum = lse[n], mean = delta[n];
#pragma omp simd
    for (int64_t i = 0; i < seen; ++i) {
      // merged with other keys, so it is never above 0 but for rounding
      const float apart = s[i] * scale - sum;
      const float weight = exp_negative(apart > 0.0f ? 0.0f : apart);
      narrow(weight, w + i);
      narrow(weight * (g[i] - mean) * scale, out + i);
    }
    std::fill(w + seen, w + part.columns, T(0));
    std::fill(out + seen, out + part.columns, T(0));
  }
}

}  // namespace

// scores, grad, weights and gradient [rows, columns] contiguous; lse and delta [rows].
#define SCORES(NAME, T)                                                                           \
  extern "C" void scores_forward_##NAME(int64_t rows, int64_t columns, int64_t queries,           \
                                        int64_t repeats, int64_t causal, float scale,             \
                                        const float* scores, float* lse, T* weights) {            \
    forward<T>(Part{rows, columns, queries, repeats, causal != 0}, scale, scores, lse, weights);  \
  }                                                                                               \
  extern "C" void scores_backward_##NAME(                                                         \
      int64_t rows, int64_t columns, int64_t queries, int64_t repeats, int64_t causal,            \
      float scale, const float* scores, const float* grad, const float* lse, const float* delta,  \
      T* weights, T* gradient) {                                                                  \
    backward<T>(Part{rows, columns, queries, repeats, causal != 0}, scale, scores, grad, lse,     \
                delta, weights, gradient);                                                        \
  }

SCORES(float32, float)
SCORES(bfloat16, uint16_t)
