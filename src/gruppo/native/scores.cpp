// Scores of attention, their softmax and its gradient, in one pass each, for CPUs.
//
// A few rows at a time meet the keys that they see; their scores stay in the cache until they have
// become weights. The products with values and of gradients are the caller's. T is the type of all
// that comes and goes; scores are float.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "meet.h"
#include "numbers.h"
#include "vectors.h"

extern "C" int omp_get_max_threads();
extern "C" int omp_get_thread_num();

namespace {

constexpr int64_t kRows = 24;  // whole runs of rows that meet keys together

// Rows are ordered by head, then query, then the query heads that share keys (`repeats`).
struct Part {
  int64_t heads, queries, repeats, columns, width;
  bool causal;     // the last query sees all keys, each one before it one less
  int64_t before;  // from a head's first row to the next one's, in rows
  int64_t behind;  // the same for keys
  float scale;

  int64_t rows() const { return queries * repeats; }
  int64_t lanes() const { return rounded_up(columns, 2 * kLanes); }
  int64_t seen(int64_t row) const {
    return causal ? columns - queries + row / repeats + 1 : columns;
  }
};

// The keys (or values) of a head, a key a lane; each thread has its own.
template <typename T>
class Lanes {
  using P = Parts<T>;
  std::vector<typename P::Lane> numbers_;
  int64_t head_ = -1;

 public:
  // `from` [columns, width] of `head`.
  void take(const Part& part, int64_t head, const T* from) {
    if (head == head_) return;
    head_ = head;
    const int64_t lanes = part.lanes();
    numbers_.resize(part.width / P::kDeep * lanes);  // lanes beyond the last key: whatever
    for (int64_t d = 0; d < part.width; d += P::kDeep)
      for (int64_t x = 0; x < part.columns; ++x)
        numbers_[d / P::kDeep * lanes + x] = P::lane(from + x * part.width + d);
  }

  // out [count, lanes]: products of `rows` [count, width] with the first `seen` of what was taken.
  void meet(const Part& part, const T* rows, int64_t count, int64_t seen, float* out) const {
    const int64_t lanes = part.lanes();
    for (int64_t x = 0; x < seen; x += 2 * kLanes)
      score_together<2, T>(rows, count, part.width, numbers_.data() + x, lanes, 1.0f, out + x,
                           rows);
  }
};

// Calls visit(head, first row, number of rows) for all rows, few at a time, on all threads.
template <typename Visit>
void in_runs(const Part& part, Visit visit) {
  const int64_t runs = (part.rows() + kRows - 1) / kRows;
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < part.heads * runs; ++n) {
    const int64_t from = n % runs * kRows;
    visit(n / runs, from, std::min(kRows, part.rows() - from));
  }
}

template <typename T>
void forward(const Part& part, const T* query, const T* key, float* lse, T* weights) {
  std::vector<Lanes<T>> keys(omp_get_max_threads());
  std::vector<float> buffers(omp_get_max_threads() * kRows * part.lanes());
  in_runs(part, [&](int64_t head, int64_t from, int64_t count) {
    const int thread = omp_get_thread_num();
    float* scores = buffers.data() + thread * kRows * part.lanes();
    keys[thread].take(part, head, key + head * part.behind * part.width);
    keys[thread].meet(part, query + (head * part.before + from) * part.width, count,
                      part.seen(from + count - 1), scores);
    for (int64_t row = from; row < from + count; ++row, scores += part.lanes()) {
      const float scale = part.scale;
      T* w = weights + (head * part.rows() + row) * part.columns;
      const int64_t seen = part.seen(row);
      float top = -INFINITY, total = 0;
#pragma omp simd reduction(max : top)
      for (int64_t i = 0; i < seen; ++i) top = scores[i] > top ? scores[i] : top;
      top *= scale;
#pragma omp simd reduction(+ : total)
      for (int64_t i = 0; i < seen; ++i) total += scores[i] = exp_negative(scores[i] * scale - top);
      lse[head * part.rows() + row] = top + std::log(total);
      const float inverse = 1.0f / total;
#pragma omp simd
      for (int64_t i = 0; i < seen; ++i) narrow(scores[i] * inverse, w + i);
      std::fill(w + seen, w + part.columns, T(0));
    }
  });
}

template <typename T>
struct Given {
  const T *query, *key, *value, *grad;
  const float *lse, *delta;
};

template <typename T>
void backward(const Part& part, const Given<T>& given, T* weights, T* gradient) {
  std::vector<Lanes<T>> keys(omp_get_max_threads()), values(omp_get_max_threads());
  std::vector<float> buffers(omp_get_max_threads() * 2 * kRows * part.lanes());
  in_runs(part, [&](int64_t head, int64_t from, int64_t count) {
    const int thread = omp_get_thread_num();
    float* scores = buffers.data() + thread * 2 * kRows * part.lanes();
    float* grads = scores + kRows * part.lanes();
    const int64_t first = head * part.before + from, seen_by_last = part.seen(from + count - 1);
    keys[thread].take(part, head, given.key + head * part.behind * part.width);
    values[thread].take(part, head, given.value + head * part.behind * part.width);
    keys[thread].meet(part, given.query + first * part.width, count, seen_by_last, scores);
    values[thread].meet(part, given.grad + first * part.width, count, seen_by_last, grads);
    for (int64_t r = 0; r < count; ++r, scores += part.lanes(), grads += part.lanes()) {
      const int64_t at = (head * part.rows() + from + r) * part.columns;
      T *w = weights + at, *out = gradient + at;
      const int64_t seen = part.seen(from + r);
      const float sum = given.lse[first + r], mean = given.delta[first + r], scale = part.scale;
#pragma omp simd
      for (int64_t i = 0; i < seen; ++i) {
        // merged with other keys, so it is never above 0 but for rounding
        const float apart = scores[i] * scale - sum;
        const float weight = exp_negative(apart > 0.0f ? 0.0f : apart);
        narrow(weight, w + i);
        narrow(weight * (grads[i] - mean) * scale, out + i);
      }
      std::fill(w + seen, w + part.columns, T(0));
      std::fill(out + seen, out + part.columns, T(0));
    }
  });
}

}  // namespace

// query and grad: rows [width] of each head, `before` apart; key and value the same, `behind`
// apart; lse and delta of `backward` as query, in float; lse of `forward` [heads, rows]; weights
// and gradient [heads, rows, columns]. width is even.
#define SCORES(NAME, T)                                                                           \
  extern "C" void scores_forward_##NAME(                                                          \
      int64_t heads, int64_t queries, int64_t repeats, int64_t columns, int64_t width,            \
      int64_t causal, int64_t before, int64_t behind, float scale, const T* query, const T* key,  \
      float* lse, T* weights) {                                                                   \
    const Part part{heads, queries, repeats, columns, width, causal != 0, before, behind, scale}; \
    forward<T>(part, query, key, lse, weights);                                                   \
  }                                                                                               \
  extern "C" void scores_backward_##NAME(                                                         \
      int64_t heads, int64_t queries, int64_t repeats, int64_t columns, int64_t width,            \
      int64_t causal, int64_t before, int64_t behind, float scale, const T* query, const T* key,  \
      const T* value, const T* grad, const float* lse, const float* delta, T* weights,            \
      T* gradient) {                                                                              \
    const Part part{heads, queries, repeats, columns, width, causal != 0, before, behind, scale}; \
    backward<T>(part, Given<T>{query, key, value, grad, lse, delta}, weights, gradient);          \
  }

SCORES(float32, float)
SCORES(bfloat16, uint16_t)
