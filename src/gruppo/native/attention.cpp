// Decode attention over a shared prompt and a completion's own tokens, for CPUs.
//
// Plain C interface, no torch headers: compiled in a second with whatever compiler is there, for
// the processor it runs on. Loops are written so that the compiler vectorises them at any width.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "numbers.h"

namespace {

struct Shape {
  int64_t rows, key_heads, repeats, width;
  int64_t prompt_columns, own_columns;  // allocated, not filled
  int64_t window;                       // 0: none
  float scaling;
};

constexpr int64_t kKeys = 4;    // keys at once: a query is read once for all of them
constexpr int64_t kLanes = 16;  // sums of a product that are carried side by side

// The product of a query with `count` keys, one after the other in memory.
template <int WIDTH, int COUNT, typename T>
void products(const T* keys, const float* query, int64_t width, float* out) {
  float sums[COUNT][kLanes] = {};
  const int64_t whole = WIDTH ? WIDTH : width / kLanes * kLanes;
  for (int64_t d = 0; d < whole; d += kLanes)
    for (int k = 0; k < COUNT; ++k) {
      const T* key = keys + k * width + d;
#pragma omp simd
      for (int64_t i = 0; i < kLanes; ++i) sums[k][i] += query[d + i] * widen(key[i]);
    }
  for (int k = 0; k < COUNT; ++k) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < kLanes; ++i) sum += sums[k][i];
    for (int64_t d = whole; d < width; ++d) sum += query[d] * widen(keys[k * width + d]);
    out[k] = sum;
  }
}

// Scores of `repeats` queries with keys [from, to), written to scores[j * stride + at]. WIDTH is
// the heads' width where it is a common one (loops unroll), else 0.
template <int WIDTH, typename T>
void score(const T* keys, int64_t from, int64_t to, const float* query, const Shape& s,
           float* scores, int64_t stride) {
  const int64_t width = WIDTH ? WIDTH : s.width;
  int64_t x = from;
  for (; x + kKeys <= to; x += kKeys)
    for (int64_t j = 0; j < s.repeats; ++j)
      products<WIDTH, kKeys>(keys + x * width, query + j * width, width,
                             scores + j * stride + (x - from));
  for (; x < to; ++x)
    for (int64_t j = 0; j < s.repeats; ++j)
      products<WIDTH, 1>(keys + x * width, query + j * width, width,
                         scores + j * stride + (x - from));
}

// mixed[j] += sum over x of weights[j * stride + at] * values[x]
template <int WIDTH, typename T>
void mix(const T* values, int64_t from, int64_t to, const float* weights, int64_t stride,
         const Shape& s, float* mixed) {
  constexpr int64_t kBlock = 64;  // sums that stay in registers
  const int64_t width = WIDTH ? WIDTH : s.width;
  for (int64_t j = 0; j < s.repeats; ++j) {
    const float* weight = weights + j * stride - from;
    float* out = mixed + j * width;
    int64_t d = 0;
    for (; d + kBlock <= width; d += kBlock) {
      float sums[kBlock];
      std::copy(out + d, out + d + kBlock, sums);
      for (int64_t x = from; x < to; ++x) {
        const T* value = values + x * width + d;
#pragma omp simd
        for (int64_t i = 0; i < kBlock; ++i) sums[i] += weight[x] * widen(value[i]);
      }
      std::copy(sums, sums + kBlock, out + d);
    }
    for (; d < width; ++d)
      for (int64_t x = from; x < to; ++x) out[d] += weight[x] * widen(values[x * width + d]);
  }
}

// One row and one key head: `repeats` queries over the prompt's and the row's own keys.
template <int WIDTH, typename T>
void attend(const Shape& s, const T* query, const T* prompt_keys, const T* prompt_values,
            int64_t prompt_length, const T* own_keys, const T* own_values, int64_t own_length,
            T* out, std::vector<float>& scratch) {
  const int64_t seen = prompt_length + own_length;  // the row's newest token is the last
  const int64_t first = s.window > 0 ? std::max<int64_t>(0, seen - s.window) : 0;
  const int64_t prompt_from = std::min(first, prompt_length);
  const int64_t own_from = std::max<int64_t>(0, first - prompt_length);
  const int64_t count = seen - first, of_prompt = prompt_length - prompt_from;
  scratch.assign(s.repeats * (count + 2 * s.width), 0.0f);
  float* scores = scratch.data();
  float* wide = scores + s.repeats * count;
  float* mixed = wide + s.repeats * s.width;
  for (int64_t i = 0; i < s.repeats * s.width; ++i) wide[i] = widen(query[i]) * s.scaling;
  score<WIDTH>(prompt_keys, prompt_from, prompt_length, wide, s, scores, count);
  score<WIDTH>(own_keys, own_from, own_length, wide, s, scores + of_prompt, count);
  for (int64_t j = 0; j < s.repeats; ++j) {
    float* row = scores + j * count;
    float top = row[0], total = 0;
    for (int64_t x = 1; x < count; ++x) top = std::max(top, row[x]);
#pragma omp simd reduction(+ : total)
    for (int64_t x = 0; x < count; ++x) {
      row[x] = exp_negative(row[x] - top);
      total += row[x];
    }
    const float inverse = 1.0f / total;
#pragma omp simd
    for (int64_t x = 0; x < count; ++x) row[x] *= inverse;
  }
  mix<WIDTH>(prompt_values, prompt_from, prompt_length, scores, count, s, mixed);
  mix<WIDTH>(own_values, own_from, own_length, scores + of_prompt, count, s, mixed);
  for (int64_t i = 0; i < s.repeats * s.width; ++i) narrow(mixed[i], out + i);
}

template <int WIDTH, typename T>
void decode(const Shape& s, const T* query, const T* prompt_keys, const T* prompt_values,
            const T* own_keys, const T* own_values, const int64_t* place,
            const int64_t* prompt_length, const int64_t* own_length, T* out) {
  const int64_t of_prompt = s.prompt_columns * s.width, of_own = s.own_columns * s.width;
#pragma omp parallel
  {
    std::vector<float> scratch;
#pragma omp for collapse(2) schedule(static)
    for (int64_t n = 0; n < s.rows; ++n) {
      for (int64_t h = 0; h < s.key_heads; ++h) {
        const int64_t at = (n * s.key_heads + h);
        const int64_t prompt = (place[n] * s.key_heads + h) * of_prompt;
        const int64_t mine = at * s.repeats * s.width;
        attend<WIDTH>(s, query + mine, prompt_keys + prompt, prompt_values + prompt, prompt_length[n],
               own_keys + at * of_own, own_values + at * of_own, own_length[n] + 1, out + mine,
               scratch);
      }
    }
  }
}

}  // namespace

// Tensors are contiguous: query and out [N, K * R, D], prompt keys and values [P, K, W, D], own
// ones [S, K, C, D]; place, prompt_length and own_length [N] are int64. own_length does not count
// the token being computed, whose key and value are in the buffer already.
#define DECODE(NAME, TYPE)                                                                        \
  extern "C" void NAME(int64_t rows, int64_t key_heads, int64_t repeats, int64_t width,           \
                       int64_t prompt_columns, int64_t own_columns, int64_t window, float scaling, \
                       const TYPE* query, const TYPE* prompt_keys, const TYPE* prompt_values,     \
                       const TYPE* own_keys, const TYPE* own_values, const int64_t* place,        \
                       const int64_t* prompt_length, const int64_t* own_length, TYPE* out) {      \
    const Shape shape{rows,   key_heads, repeats, width, prompt_columns, own_columns,             \
                      window, scaling};                                                           \
    const auto run = width == 64    ? decode<64, TYPE>                                            \
                     : width == 128 ? decode<128, TYPE>                                           \
                                    : decode<0, TYPE>;                                            \
    run(shape, query, prompt_keys, prompt_values, own_keys, own_values, place, prompt_length,     \
        own_length, out);                                                                         \
  }

DECODE(decode_attention_float32, float)
DECODE(decode_attention_bfloat16, uint16_t)
