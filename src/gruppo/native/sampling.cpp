// Drawing one token a row: softmax, filters and the inverse CDF in one visit of the row.
//
// Plain C interface, no torch headers. What is kept and drawn, ties included, is defined by the
// plain version in engine/sampler.py; this one differs from it by rounding alone.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "numbers.h"
#include "room.h"

namespace {

constexpr int64_t kBlock = 128;       // numbers summed together before looking inside one block
constexpr int64_t kCandidates = 512;  // largest ones looked at before top-p sorts the whole row

struct Rule {
  float temperature;
  int64_t top_k;  // 0: off
  double top_p;   // 1: off
  float min_p;    // 0: off
};

struct Scratch {
  std::vector<float> mass, ranked;
  std::vector<double> edges;

  // Nothing is allocated after this.
  void reserve(int64_t width, const Rule& rule) {
    if (rule.temperature == 0) return;
    mass.reserve(width);
    edges.reserve((width + kBlock - 1) / kBlock);
    if (rule.top_k || rule.top_p < 1) ranked.reserve(width);
  }
};

// The largest logit, -1 in `at` if none can be drawn: NaN or +inf among them, or -inf alone.
template <typename T>
float largest(const T* logits, int64_t width, int64_t* at) {
  float top = -std::numeric_limits<float>::infinity();
  int broken = 0;
#pragma omp simd reduction(max : top) reduction(| : broken)
  for (int64_t i = 0; i < width; ++i) {
    const float x = widen(logits[i]);
    top = x > top ? x : top;
    broken |= x != x;
  }
  *at = -1;
  if (broken || !std::isfinite(top)) return top;
  for (*at = 0; widen(logits[*at]) != top;) ++*at;
  return top;
}

// Smallest mass that the filters keep (ties with it are kept); masses are relative to the largest.
float threshold(const Rule& rule, int64_t width, Scratch& s) {
  float least = 0;
  const auto descending = std::greater<float>();
  if (rule.top_k && rule.top_k < width) {
    s.ranked = s.mass;
    std::nth_element(s.ranked.begin(), s.ranked.begin() + rule.top_k - 1, s.ranked.end(),
                     descending);
    least = s.ranked[rule.top_k - 1];
  }
  if (rule.top_p < 1) {
    s.ranked.clear();
    double total = 0;
    for (const float mass : s.mass)
      if (mass >= least) {
        total += mass;
        s.ranked.push_back(mass);
      }
    const double need = rule.top_p * total;
    size_t sorted = 0, at = 0;
    for (double reached = 0; at < s.ranked.size(); ++at) {
      if (at == sorted) {  // some hundred first, which is nearly always enough; then all
        sorted = at ? s.ranked.size() : std::min<size_t>(kCandidates, s.ranked.size());
        std::partial_sort(s.ranked.begin() + at, s.ranked.begin() + sorted, s.ranked.end(),
                          descending);
      }
      reached += s.ranked[at];
      if (reached >= need) break;
    }
    least = s.ranked[std::min(at, s.ranked.size() - 1)];
  }
  return std::max(least, rule.min_p);
}

// Inverse CDF in two levels, as a sum over the whole row in float would favour its end.
int64_t invert(double uniform, int64_t width, Scratch& s, double* total) {
  s.edges.clear();
  *total = 0;
  for (int64_t from = 0; from < width; from += kBlock) {
    float sum = 0;
    const int64_t to = std::min(width, from + kBlock);
#pragma omp simd reduction(+ : sum)
    for (int64_t i = from; i < to; ++i) sum += s.mass[i];
    *total += sum;
    s.edges.push_back(*total);
  }
  const double point = uniform * *total;
  auto edge = std::upper_bound(s.edges.begin(), s.edges.end(), point);
  if (edge == s.edges.end()) edge = std::lower_bound(s.edges.begin(), s.edges.end(), *total);
  const int64_t from = (edge - s.edges.begin()) * kBlock, to = std::min(width, from + kBlock);
  const double rest = point - (edge == s.edges.begin() ? 0.0 : edge[-1]);
  double inner = 0;
  int64_t drawn = from;
  for (int64_t i = from; i < to && inner <= rest; ++i) {
    if (s.mass[i] > 0) drawn = i;  // rounding may put the point behind the last one with mass
    inner += s.mass[i];
  }
  return drawn;
}

template <typename T>
bool draw(const T* logits, int64_t width, double uniform, const Rule& rule, Scratch& s,
          int64_t* token, float* logp) {
  int64_t at;
  const float top = largest(logits, width, &at);
  *token = at;
  *logp = 0;
  if (at < 0 || rule.temperature == 0) return at >= 0;
  const float temperature = rule.temperature, highest = top / temperature;
  s.mass.resize(width);
  float* mass = s.mass.data();
#pragma omp simd
  for (int64_t i = 0; i < width; ++i)
    mass[i] = exp_negative(widen(logits[i]) / temperature - highest);
  const float least = threshold(rule, width, s);
  if (least > 0) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) mass[i] = mass[i] >= least ? mass[i] : 0.0f;
  }
  double total;
  *token = invert(uniform, width, s, &total);
  *logp = static_cast<float>(widen(logits[*token]) / temperature - highest - std::log(total));
  return true;
}

// Returns how many rows hold numbers from which nothing can be drawn.
template <typename T>
int64_t sample(int64_t rows, int64_t width, const Rule& rule, const T* logits,
               const double* uniform, int64_t* token, float* logp) {
  int64_t broken = 0;
  std::vector<Scratch> rooms(omp_get_max_threads());
  for (Scratch& room : rooms) room.reserve(width, rule);
#pragma omp parallel reduction(+ : broken)
  {
    Scratch scratch = std::move(rooms[omp_get_thread_num()]);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < rows; ++n)
      broken += !draw(logits + n * width, width, uniform[n], rule, scratch, token + n, logp + n);
  }
  return broken;
}

}  // namespace

// Tensors are contiguous: logits [N, V], uniform, token and logp [N]. Returns how many rows hold
// numbers from which nothing can be drawn; -1 where there is not memory enough.
#define SAMPLE(NAME, T)                                                                          \
  extern "C" int64_t NAME(int64_t rows, int64_t width, float temperature, int64_t top_k,         \
                          double top_p, float min_p, const T* logits, const double* uniform,     \
                          int64_t* token, float* logp) try {                                     \
    return sample<T>(rows, width, Rule{temperature, top_k, top_p, min_p}, logits, uniform,       \
                     token, logp);                                                               \
  } OR_NO_MEMORY

SAMPLE(sample_float32, float)
SAMPLE(sample_bfloat16, uint16_t)
