// Attention over the segments of a packed row, for CPUs.
//
// Every query's softmax is over the keys of all segments that it sees, so nothing is merged
// afterwards and no weights are kept. Some rows at a time meet the keys that they see: a product, the
// softmax, and a product with the values, all within the cache. A key that a query does not see may be
// multiplied by 0, so what is kept must be finite.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <new>
#include <vector>

#include "numbers.h"
#include "segments.h"
#include "vectors.h"

namespace {

// Scores at a time, unless kDown rows have more: all of a row must be at hand.
constexpr int64_t kScores = 1 << 16;

template <typename T>
class Forward {
  const Sizes& sizes_;
  const std::vector<Segment>& segments_;
  const Rows<T> query_;
  const Right<T> key_, value_;
  std::vector<int64_t> columns_;  // scores of a query of each segment, in whole vectors
  Room<float> scores_, mixed_;
  Room<T> weights_;

  static int64_t rows_for(int64_t columns) {
    return std::clamp<int64_t>(kScores / std::max<int64_t>(columns, 1) / kDown * kDown, kDown, kBlock);
  }
  int64_t most() const {
    int64_t most = 0;
    for (const int64_t columns : columns_) most = std::max(most, rows_for(columns) * columns);
    return most;
  }
  static std::vector<int64_t> columns_of(const std::vector<Segment>& segments) {
    std::vector<int64_t> columns;
    for (const Segment& segment : segments) {
      columns.push_back(0);
      for (const Seen& seen : segment.keys)
        columns.back() += rounded_up(segments[seen.segment].count(), kLanes);
    }
    return columns;
  }

 public:
  Forward(const Sizes& sizes, const std::vector<Segment>& segments, Rows<T> query, Rows<T> key,
          Rows<T> value)
      : sizes_(sizes), segments_(segments), query_(query), key_(sizes, segments, key, false),
        value_(sizes, segments, value, true), columns_(columns_of(segments)), scores_(most()),
        mixed_(kBlock * sizes.wide()), weights_(most()) {}

  void run(T* out, float* lse) const {
    const std::vector<Block> blocks = blocks_of(
        sizes_, segments_, sizes_.repeats, [&](int64_t s) { return rows_for(columns_[s]); });
#pragma omp parallel for schedule(dynamic)
    for (size_t i = 0; i < blocks.size(); ++i) attend(blocks[i], out, lse);
  }

 private:
  // Keys of a segment that the row sees.
  int64_t visible(const Seen& seen, int64_t row) const {
    return seen.causal ? row / sizes_.repeats + 1 : segments_[seen.segment].count();
  }

  void attend(const Block& block, T* out, float* lse) const {
    const Segment& segment = segments_[block.segment];
    const int64_t first = segment.from * sizes_.repeats + block.from, stride = columns_[block.segment];
    float *scores = scores_.own(), *mixed = mixed_.own();
    T* weights = weights_.own();
    int64_t at = 0;
    for (const Seen& seen : segment.keys) {
      const int64_t vectors = rounded_up(visible(seen, block.to - 1), kLanes) / kLanes;
      multiply<T>([&](int64_t i) { return query_.at(block.head, first + i); }, block.count(),
                  key_.at(block.head, seen.segment), key_.vector(seen.segment), vectors,
                  sizes_.width / Parts<T>::kDeep, scores + at, stride, false);
      at += rounded_up(segments_[seen.segment].count(), kLanes);
    }
    float inverse[kBlock];
    for (int64_t r = 0; r < block.count(); ++r)
      inverse[r] = weigh(segment, block, r, scores + r * stride, weights + r * stride,
                         lse + block.head * sizes_.length * sizes_.repeats + first + r);
    std::fill(mixed, mixed + rounded_up(block.count(), kDown) * sizes_.wide(), 0.0f);
    at = 0;
    for (const Seen& seen : segment.keys) {
      const int64_t depth = rounded_up(visible(seen, block.to - 1), Parts<T>::kDeep) / Parts<T>::kDeep;
      multiply<T>([&](int64_t i) { return weights + i * stride + at; }, block.count(),
                  value_.at(block.head, seen.segment), value_.vector(seen.segment),
                  sizes_.wide() / kLanes, depth, mixed, sizes_.wide(), true);
      at += rounded_up(segments_[seen.segment].count(), kLanes);
    }
    for (int64_t r = 0; r < block.count(); ++r) {
      const int64_t position = (first + r) / sizes_.repeats, repeat = (first + r) % sizes_.repeats;
      T* to = out + ((position * sizes_.heads + block.head) * sizes_.repeats + repeat) * sizes_.width;
      const float *from = mixed + r * sizes_.wide(), factor = inverse[r];
#pragma omp simd
      for (int64_t d = 0; d < sizes_.width; ++d) narrow(from[d] * factor, to + d);
    }
  }

  // Weights of a row, up to a factor, which is returned.
  float weigh(const Segment& segment, const Block& block, int64_t r, const float* scores, T* weights,
              float* lse) const {
    const float scale = sizes_.scale;
    float top = -INFINITY, total = 0;
    const float* s = scores;
    for (const Seen& seen : segment.keys) {
      const int64_t count = visible(seen, block.from + r);
#pragma omp simd reduction(max : top)
      for (int64_t i = 0; i < count; ++i) top = s[i] > top ? s[i] : top;
      s += rounded_up(segments_[seen.segment].count(), kLanes);
    }
    top *= scale;
    s = scores;
    for (const Seen& seen : segment.keys) {
      const int64_t count = visible(seen, block.from + r);
#pragma omp simd reduction(+ : total)
      for (int64_t i = 0; i < count; ++i) {
        const float weight = exp_negative(s[i] * scale - top);
        total += weight;
        narrow(weight, weights + i);
      }
      std::fill(weights + count, weights + rounded_up(visible(seen, block.to - 1), Parts<T>::kDeep), T(0));
      s += rounded_up(segments_[seen.segment].count(), kLanes);
      weights += rounded_up(segments_[seen.segment].count(), kLanes);
    }
    *lse = total > 0 || std::isnan(total) ? top + std::log(total) : -INFINITY;
    return total > 0 || std::isnan(total) ? 1.0f / total : 0.0f;
  }
};

}  // namespace

// query [K, N, R, D]; key and value [K, N, D]; out [N, K, R, D]; lse [K, N, R]. `count` parts of 5
// numbers: see segments_of. D is even. Returns -1 where there is not memory enough.
#define FORWARD(NAME, T)                                                                           \
  extern "C" int64_t segments_forward_##NAME(                                                      \
      int64_t heads, int64_t length, int64_t repeats, int64_t width, int64_t count, float scale,   \
      const int64_t* parts, const T* query, const T* key, const T* value, T* out, float* lse) try { \
    const Sizes sizes{heads, length, repeats, width, scale};                                       \
    const auto segments = segments_of(length, count, parts);                                       \
    const Forward<T> forward(sizes, segments, queries(sizes, query), keys(sizes, key),             \
                             keys(sizes, value));                                                  \
    forward.run(out, lse);                                                                         \
    return 0;                                                                                      \
  } OR_NO_MEMORY

FORWARD(float32, float)
FORWARD(bfloat16, uint16_t)
