// Products of some rows with vectors of others, a number a lane: what scores of attention are.

#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.h"

namespace {

constexpr int kTogether = kRegisters / 4;  // rows that meet two vectors of others
constexpr int64_t kRun = 32;               // products in one sum: more would round too often

// Asks for what is read next, `count` numbers: own keys and values come in runs too short for the
// processor to see them coming.
template <typename T>
void ask_for(const T* next, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(next + i, 0, 2);
}

int64_t rounded_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// scores[x * stride + lane] of VECTORS vectors of queries, which lie [width / kDeep, stride].
template <int VECTORS, typename T>
void score_together(const T* keys, int64_t count, int64_t width,
                    const typename Parts<T>::Lane* queries, int64_t stride, float scaling,
                    float* scores, const T* next) {
  using P = Parts<T>;
  for (int64_t x = 0; x < count; x += kTogether) {
    const T* key[kTogether];
    ask_for(next + x * width, kTogether * width);
    for (int k = 0; k < kTogether; ++k) key[k] = keys + std::min(x + k, count - 1) * width;
    Vector totals[kTogether][VECTORS] = {};
    for (int64_t from = 0; from < width; from += kRun) {
      Vector sums[kTogether][VECTORS] = {};
      for (int64_t d = from; d < std::min(width, from + kRun); d += P::kDeep) {
        typename P::Loaded query[VECTORS];
        for (int v = 0; v < VECTORS; ++v)
          query[v] = P::lanes(queries + d / P::kDeep * stride + v * kLanes);
        for (int k = 0; k < kTogether; ++k) {
          const auto number = P::everywhere(key[k] + d);
          for (int v = 0; v < VECTORS; ++v) sums[k][v] = P::add(sums[k][v], number, query[v]);
        }
      }
      for (int k = 0; k < kTogether; ++k)
        for (int v = 0; v < VECTORS; ++v) totals[k][v] += sums[k][v];
    }
    for (int k = 0; k < kTogether; ++k)
      for (int v = 0; v < VECTORS; ++v)
        store(totals[k][v] * scaling, scores + (x + k) * stride + v * kLanes);
  }
}

}  // namespace
