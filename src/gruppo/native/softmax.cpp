// Log-probabilities of tokens and their gradient over a large vocabulary, one pass each, for CPUs.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "numbers.h"

namespace {

constexpr int64_t kBlock = 2048;  // logits whose largest is known before they are summed
constexpr int64_t kLanes = 16;    // sums side by side: what fits two vector registers and more
constexpr float kFar = -100.0f;   // far enough below for a probability of 0; and 0 * kFar is 0

template <typename T>
inline float largest(const T* x, int64_t count) {
  float lanes[kLanes];
  std::fill(lanes, lanes + kLanes, -INFINITY);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
#pragma omp simd
    for (int64_t j = 0; j < kLanes; ++j) {
      const float wide = widen(x[i + j]);
      lanes[j] = lanes[j] < wide ? wide : lanes[j];
    }
  float top = *std::max_element(lanes, lanes + kLanes);
  for (; i < count; ++i) top = std::max(top, widen(x[i]));
  return top;
}

// What is known of a distribution: total = sum exp(y - top), moment = sum exp(y - top) (y - top).
struct Sums {
  float top = -INFINITY;
  double total = 0, moment = 0;

  void raise(float higher) {
    if (total > 0) {
      const double shift = static_cast<double>(top) - higher, factor = std::exp(shift);
      moment = (moment + shift * total) * factor;
      total *= factor;
    }
    top = higher;
  }
};

// Adds a block of logits z, of which scale * z are meant.
template <bool MOMENT, typename T>
void add(const T* z, int64_t count, float scale, Sums& sums) {
  const float here = largest(z, count) * scale;
  if (here > sums.top) sums.raise(here);
  const float top = sums.top;
  // nothing but -inf so far: only a NaN must not get lost
  if (top == -INFINITY) {
    for (int64_t i = 0; i < count; ++i)
      if (std::isnan(widen(z[i]))) sums.total = sums.moment = NAN;
    return;
  }
  float total = 0, moment = 0;
#pragma omp simd reduction(+ : total, moment)
  for (int64_t i = 0; i < count; ++i) {
    const float apart = widen(z[i]) * scale - top;
    const float weight = exp_negative(apart);
    total += weight;
    if (MOMENT) moment += weight * (apart < kFar ? kFar : apart);
  }
  sums.total += total;
  sums.moment += moment;
}

template <bool MOMENT, typename T>
void forward(int64_t rows, int64_t width, float scale, const T* z, const int64_t* token,
             float* logp, float* lse, float* entropy) {
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < rows; ++n) {
    const T* row = z + n * width;
    Sums sums;
    for (int64_t i = 0; i < width; i += kBlock)
      add<MOMENT>(row + i, std::min(kBlock, width - i), scale, sums);
    const double spread = std::log(sums.total);
    lse[n] = static_cast<float>(sums.top + spread);
    logp[n] = static_cast<float>(static_cast<double>(widen(row[token[n]]) * scale) - sums.top - spread);
    if (MOMENT) entropy[n] = static_cast<float>(spread - sums.moment / sums.total);
  }
}

template <bool ENTROPY, typename T>
void backward(int64_t rows, int64_t width, float scale, T* z, const int64_t* token,
              const float* lse, const float* entropy, const float* grad_logp,
              const float* grad_entropy) {
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < rows; ++n) {
    T* row = z + n * width;
    const float drawn = widen(row[token[n]]) * scale - lse[n];
    const float shift = lse[n], factor = -grad_logp[n] * scale;
    const float slope = ENTROPY ? -grad_entropy[n] * scale : 0.0f;
    const float base = ENTROPY ? factor + slope * entropy[n] : factor;
    const auto gradient = [=](float apart) {
      const float weight = exp_negative(apart);
      return ENTROPY ? weight * (base + slope * (apart < kFar ? kFar : apart)) : weight * base;
    };
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) narrow(gradient(widen(row[i]) * scale - shift), row + i);
    narrow(gradient(drawn) - factor, row + token[n]);  // one rounding, not two
  }
}

}  // namespace

// z [rows, width] contiguous, of type T; token, and all others, [rows]. `forward`: `entropy` may be
// null. `backward` turns z into the gradient; `grad_entropy` may be null, `entropy` is then not read.
#define SOFTMAX(NAME, T)                                                                          \
  extern "C" void softmax_forward_##NAME(int64_t rows, int64_t width, float scale, const T* z,    \
                                         const int64_t* token, float* logp, float* lse,           \
                                         float* entropy) {                                        \
    const auto run = entropy ? forward<true, T> : forward<false, T>;                              \
    run(rows, width, scale, z, token, logp, lse, entropy);                                        \
  }                                                                                               \
  extern "C" void softmax_backward_##NAME(int64_t rows, int64_t width, float scale, T* z,         \
                                          const int64_t* token, const float* lse,                 \
                                          const float* entropy, const float* grad_logp,           \
                                          const float* grad_entropy) {                            \
    const auto run = grad_entropy ? backward<true, T> : backward<false, T>;                       \
    run(rows, width, scale, z, token, lse, entropy, grad_logp, grad_entropy);                     \
  }

SOFTMAX(float32, float)
SOFTMAX(bfloat16, uint16_t)
