// Log-probabilities of tokens and their gradient over a large vocabulary, one pass each, for CPUs.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "numbers.h"

namespace {

constexpr int64_t kBlock = 2048;  // logits whose largest is known before they are summed
constexpr int64_t kLanes = 16;    // sums side by side: what fits two vector registers and more
constexpr float kFar = -100.0f;   // far enough below for a probability of 0; and 0 * kFar is 0

inline float largest(const float* x, int64_t count) {
  float lanes[kLanes];
  std::fill(lanes, lanes + kLanes, -INFINITY);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
#pragma omp simd
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] = lanes[j] < x[i + j] ? x[i + j] : lanes[j];
  float top = *std::max_element(lanes, lanes + kLanes);
  for (; i < count; ++i) top = std::max(top, x[i]);
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
template <bool MOMENT>
void add(const float* z, int64_t count, float scale, Sums& sums) {
  const float here = largest(z, count) * scale;
  if (here > sums.top) sums.raise(here);
  const float top = sums.top;
  // nothing but -inf so far: only a NaN must not get lost
  if (top == -INFINITY) {
    for (int64_t i = 0; i < count; ++i)
      if (std::isnan(z[i])) sums.total = sums.moment = NAN;
    return;
  }
  float total = 0, moment = 0;
#pragma omp simd reduction(+ : total, moment)
  for (int64_t i = 0; i < count; ++i) {
    const float apart = z[i] * scale - top;
    const float weight = exp_negative(apart);
    total += weight;
    if (MOMENT) moment += weight * (apart < kFar ? kFar : apart);
  }
  sums.total += total;
  sums.moment += moment;
}

template <bool MOMENT>
void forward(int64_t rows, int64_t width, float scale, const float* z, const int64_t* token,
             float* logp, float* lse, float* entropy) {
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < rows; ++n) {
    const float* row = z + n * width;
    Sums sums;
    for (int64_t i = 0; i < width; i += kBlock)
      add<MOMENT>(row + i, std::min(kBlock, width - i), scale, sums);
    const double spread = std::log(sums.total);
    lse[n] = static_cast<float>(sums.top + spread);
    logp[n] = static_cast<float>(static_cast<double>(row[token[n]] * scale) - sums.top - spread);
    if (MOMENT) entropy[n] = static_cast<float>(spread - sums.moment / sums.total);
  }
}

template <bool ENTROPY>
void backward(int64_t rows, int64_t width, float scale, float* z, const int64_t* token,
              const float* lse, const float* entropy, const float* grad_logp,
              const float* grad_entropy) {
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < rows; ++n) {
    float* row = z + n * width;
    const float shift = lse[n], factor = -grad_logp[n] * scale;
    const float slope = ENTROPY ? -grad_entropy[n] * scale : 0.0f;
    const float base = ENTROPY ? factor + slope * entropy[n] : factor;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float apart = row[i] * scale - shift;
      const float weight = exp_negative(apart);
      if (ENTROPY)
        row[i] = weight * (base + slope * (apart < kFar ? kFar : apart));
      else
        row[i] = weight * base;
    }
    row[token[n]] -= factor;
  }
}

}  // namespace

// z [rows, width] contiguous; token, and all others, [rows]. `entropy` may be null.
extern "C" void softmax_forward_float32(int64_t rows, int64_t width, float scale, const float* z,
                                        const int64_t* token, float* logp, float* lse,
                                        float* entropy) {
  const auto run = entropy ? forward<true> : forward<false>;
  run(rows, width, scale, z, token, logp, lse, entropy);
}

// Turns z into the gradient. `grad_entropy` may be null; then `entropy` is not read.
extern "C" void softmax_backward_float32(int64_t rows, int64_t width, float scale, float* z,
                                         const int64_t* token, const float* lse,
                                         const float* entropy, const float* grad_logp,
                                         const float* grad_entropy) {
  const auto run = grad_entropy ? backward<true> : backward<false>;
  run(rows, width, scale, z, token, lse, entropy, grad_logp, grad_entropy);
}
