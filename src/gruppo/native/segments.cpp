// Attention over the segments of a packed row, and its gradient, for CPUs.
//
// Every query's softmax is over the keys of all segments that it sees, so nothing is merged
// afterwards and no weights are kept. Some rows at a time meet the columns that they see: a product,
// the softmax, and a product with what belongs to the columns, all within the cache. The gradient
// makes the weights again, twice: for queries by their keys, and for keys by their queries
// (arXiv:2307.08691, algorithm 2, without its sums by several threads). So results do not depend on
// the number of threads. T is the type of what comes and of products; sums are float.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "numbers.h"
#include "vectors.h"

namespace {

constexpr int kAcross = 4;                   // vectors of a tile
constexpr int kDown = kRegisters / 16 * 3;   // its rows: sums and what they are made of fill the registers
constexpr int64_t kBlock = 8 * kDown;        // most rows that meet columns together ...
constexpr int64_t kScores = 1 << 16;         // ... and most scores, where all of a row must be at hand
constexpr int64_t kChunk = 256;              // columns at a time, elsewhere

int64_t up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

struct Sizes {
  int64_t heads, length, repeats, width;
  float scale;

  int64_t wide() const { return up(width, kLanes); }
};

struct Seen {
  int64_t segment;
  bool causal;  // the same segment: a key is seen by its own query and later ones
};

// Positions that have all their keys and all their queries in common, but for causality.
struct Segment {
  int64_t from, to;
  std::vector<Seen> keys, queries;

  int64_t count() const { return to - from; }
};

// All positions. Each part: first query, end of queries, first key, end of keys, whether causal.
std::vector<Segment> segments_of(int64_t length, int64_t count, const int64_t* parts) {
  std::vector<int64_t> bounds{0, length};
  for (int64_t i = 0; i < count; ++i) bounds.insert(bounds.end(), parts + 5 * i, parts + 5 * i + 4);
  std::sort(bounds.begin(), bounds.end());
  bounds.erase(std::unique(bounds.begin(), bounds.end()), bounds.end());
  std::vector<Segment> segments;
  for (size_t i = 0; i + 1 < bounds.size(); ++i) segments.push_back({bounds[i], bounds[i + 1], {}, {}});
  const auto place = [&](int64_t position) {
    return std::lower_bound(bounds.begin(), bounds.end(), position) - bounds.begin();
  };
  for (const int64_t* part = parts; part < parts + 5 * count; part += 5)
    for (int64_t q = place(part[0]); q < place(part[1]); ++q)
      for (int64_t k = place(part[2]); k < place(part[3]); ++k) {
        if (part[4] && k > q) continue;
        const bool causal = part[4] && k == q;
        segments[q].keys.push_back({k, causal});
        segments[k].queries.push_back({q, causal});
      }
  return segments;
}

// Rows of a segment: one for each position (keys), or one for each of its query heads.
template <typename T>
struct Rows {
  const T* from;
  int64_t repeats, head, position, row;  // numbers from one to the next

  const T* at(int64_t h, int64_t x) const {
    return from + h * head + x / repeats * position + x % repeats * row;
  }
};

// Some rows of a segment, of one head.
struct Block {
  int64_t head, segment, from, to;

  int64_t count() const { return to - from; }
};

template <typename Size>
std::vector<Block> blocks_of(const Sizes& sizes, const std::vector<Segment>& segments,
                             int64_t repeats, Size size) {
  std::vector<Block> blocks;
  for (int64_t s = 0; s < static_cast<int64_t>(segments.size()); ++s)
    for (int64_t head = 0; head < sizes.heads; ++head)
      for (int64_t from = 0, end = segments[s].count() * repeats; from < end; from += size(s))
        blocks.push_back({head, s, from, std::min(end, from + size(s))});
  return blocks;
}

// Rows of all segments and heads as the right side of a product.
template <typename T>
class Right {
  using P = Parts<T>;
  std::unique_ptr<typename P::Lane[]> lanes_;
  std::vector<int64_t> place_, vector_;  // of a segment; lanes between its vectors
  int64_t head_ = 0;

 public:
  using Lane = typename P::Lane;

  // `down`: rows are what is added up, a number of theirs is a lane. Else numbers are added up.
  Right(const Sizes& sizes, const std::vector<Segment>& segments, const Rows<T>& rows, bool down) {
    for (const Segment& segment : segments) {
      const int64_t count = segment.count() * rows.repeats;
      place_.push_back(head_);
      vector_.push_back((down ? up(count, P::kDeep) : sizes.width) / P::kDeep * kLanes);
      head_ += vector_.back() * (down ? sizes.wide() : up(count, kLanes)) / kLanes;
    }
    lanes_.reset(new Lane[sizes.heads * head_]);
    const std::vector<Block> blocks =
        blocks_of(sizes, segments, rows.repeats, [](int64_t) { return kBlock; });
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < blocks.size(); ++i) {
      const Segment& segment = segments[blocks[i].segment];
      down ? lay_down(sizes, segment, rows, blocks[i]) : lay_across(sizes, segment, rows, blocks[i]);
    }
  }

  const Lane* at(int64_t head, int64_t segment) const {
    return lanes_.get() + head * head_ + place_[segment];
  }
  int64_t vector(int64_t segment) const { return vector_[segment]; }

 private:
  void lay_across(const Sizes& sizes, const Segment& segment, const Rows<T>& rows, Block block) {
    const int64_t vector = vector_[block.segment];
    Lane* to = lanes_.get() + block.head * head_ + place_[block.segment];
    for (int64_t x = block.from; x < up(block.to, kLanes); ++x) {
      const T* from = rows.at(block.head, segment.from * rows.repeats + std::min(x, block.to - 1));
      Lane* lane = to + x / kLanes * vector + x % kLanes;
      for (int64_t d = 0; d < sizes.width; d += P::kDeep, lane += kLanes) *lane = P::lane(from + d);
    }
  }

  void lay_down(const Sizes& sizes, const Segment& segment, const Rows<T>& rows, Block block) {
    const int64_t vector = vector_[block.segment], first = segment.from * rows.repeats;
    Lane* start = lanes_.get() + block.head * head_ + place_[block.segment];
    for (int64_t x = block.from; x < block.to; x += P::kDeep) {
      const T* from[P::kDeep];
      for (int k = 0; k < P::kDeep; ++k)
        from[k] = x + k < block.to ? rows.at(block.head, first + x + k) : nullptr;
      for (int64_t d = 0; d < sizes.wide(); d += kLanes) {
        T numbers[kLanes * P::kDeep] = {};
        for (int k = 0; k < P::kDeep; ++k)
          for (int64_t i = 0; from[k] && i < std::min<int64_t>(kLanes, sizes.width - d); ++i)
            numbers[i * P::kDeep + k] = from[k][d + i];
        Lane* to = start + d / kLanes * vector + x / P::kDeep * kLanes;
        for (int i = 0; i < kLanes; ++i) to[i] = P::lane(numbers + i * P::kDeep);
      }
    }
  }
};

// `kDown` rows by Across vectors, added up over `depth` lanes.
template <typename T, int Across>
inline void tile(const T* const* left, const typename Parts<T>::Lane* right, int64_t vector,
                 int64_t depth, float* out, int64_t stride, bool adds) {
  using P = Parts<T>;
  Vector sums[kDown][Across] = {};
  for (int64_t p = 0; p < depth; ++p) {
    typename P::Loaded columns[Across];
    for (int j = 0; j < Across; ++j) columns[j] = P::lanes(right + j * vector + p * kLanes);
    for (int i = 0; i < kDown; ++i) {
      const auto number = P::everywhere(left[i] + p * P::kDeep);
      for (int j = 0; j < Across; ++j) sums[i][j] = P::add(sums[i][j], number, columns[j]);
    }
  }
  for (int i = 0; i < kDown; ++i)
    for (int j = 0; j < Across; ++j) {
      float* to = out + i * stride + j * kLanes;
      store(adds ? sums[i][j] + load(to) : sums[i][j], to);
    }
}

// out [count, stride] = rows times `vectors` vectors; `out` has whole tiles of rows.
template <typename T, typename Row>
void multiply(Row row, int64_t count, const typename Parts<T>::Lane* right, int64_t vector,
              int64_t vectors, int64_t depth, float* out, int64_t stride, bool adds) {
  for (int64_t j = 0; j < vectors; j += kAcross)
    for (int64_t i = 0; i < count; i += kDown) {
      const T* left[kDown];
      for (int k = 0; k < kDown; ++k) left[k] = row(std::min(i + k, count - 1));
      const auto* from = right + j * vector;
      float* to = out + i * stride + j * kLanes;
      switch (std::min<int64_t>(kAcross, vectors - j)) {
        case 1: tile<T, 1>(left, from, vector, depth, to, stride, adds); break;
        case 2: tile<T, 2>(left, from, vector, depth, to, stride, adds); break;
        case 3: tile<T, 3>(left, from, vector, depth, to, stride, adds); break;
        default: tile<T, kAcross>(left, from, vector, depth, to, stride, adds);
      }
    }
}

// What the threads compute in, one beside the other.
template <typename N>
class Room {
  std::unique_ptr<N[]> numbers_;
  int64_t size_;

 public:
  explicit Room(int64_t size) : numbers_(new N[size * omp_get_max_threads()]), size_(size) {}
  N* own() const { return numbers_.get() + size_ * omp_get_thread_num(); }
};

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
      for (const Seen& seen : segment.keys) columns.back() += up(segments[seen.segment].count(), kLanes);
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
      const int64_t vectors = up(visible(seen, block.to - 1), kLanes) / kLanes;
      multiply<T>([&](int64_t i) { return query_.at(block.head, first + i); }, block.count(),
                  key_.at(block.head, seen.segment), key_.vector(seen.segment), vectors,
                  sizes_.width / Parts<T>::kDeep, scores + at, stride, false);
      at += up(segments_[seen.segment].count(), kLanes);
    }
    float inverse[kBlock];
    for (int64_t r = 0; r < block.count(); ++r)
      inverse[r] = weigh(segment, block, r, scores + r * stride, weights + r * stride,
                         lse + block.head * sizes_.length * sizes_.repeats + first + r);
    std::fill(mixed, mixed + up(block.count(), kDown) * sizes_.wide(), 0.0f);
    at = 0;
    for (const Seen& seen : segment.keys) {
      const int64_t depth = up(visible(seen, block.to - 1), Parts<T>::kDeep) / Parts<T>::kDeep;
      multiply<T>([&](int64_t i) { return weights + i * stride + at; }, block.count(),
                  value_.at(block.head, seen.segment), value_.vector(seen.segment),
                  sizes_.wide() / kLanes, depth, mixed, sizes_.wide(), true);
      at += up(segments_[seen.segment].count(), kLanes);
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
      s += up(segments_[seen.segment].count(), kLanes);
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
      std::fill(weights + count, weights + up(visible(seen, block.to - 1), Parts<T>::kDeep), T(0));
      s += up(segments_[seen.segment].count(), kLanes);
      weights += up(segments_[seen.segment].count(), kLanes);
    }
    *lse = total > 0 || std::isnan(total) ? top + std::log(total) : -INFINITY;
    return total > 0 || std::isnan(total) ? 1.0f / total : 0.0f;
  }
};

template <typename T>
struct Given {
  Rows<T> query, key, value, grad;
  const T* out;
  const float* lse;
  float *to_query, *to_key, *to_value;
};

// Weights of some columns of a row, and the gradient of their scores.
template <typename T, typename Lse, typename Delta>
inline void differentiate(const float* scores, const float* grads, int64_t count, float scale, Lse lse,
                          Delta delta, T* weights, T* gradient) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float apart = scores[i] * scale - lse(i);  // never above 0 but for rounding
    const float weight = exp_negative(apart > 0.0f ? 0.0f : apart);
    narrow(weight, weights + i);
    narrow(weight * (grads[i] - delta(i)) * scale, gradient + i);
  }
}

template <typename T>
class Backward {
  static constexpr int kDeep = Parts<T>::kDeep;
  const Sizes& sizes_;
  const std::vector<Segment>& segments_;
  const Given<T>& given_;
  const Right<T> key_, keys_down_, value_, query_, queries_down_, grad_, grads_down_;
  std::unique_ptr<float[]> delta_;
  Room<float> scores_, grads_, first_, second_;
  Room<T> weights_, gradient_;

 public:
  Backward(const Sizes& sizes, const std::vector<Segment>& segments, const Given<T>& given)
      : sizes_(sizes), segments_(segments), given_(given),
        key_(sizes, segments, given.key, false), keys_down_(sizes, segments, given.key, true),
        value_(sizes, segments, given.value, false), query_(sizes, segments, given.query, false),
        queries_down_(sizes, segments, given.query, true), grad_(sizes, segments, given.grad, false),
        grads_down_(sizes, segments, given.grad, true),
        delta_(new float[sizes.heads * sizes.length * sizes.repeats]), scores_(kBlock * kChunk),
        grads_(kBlock * kChunk), first_(kBlock * sizes.wide()), second_(kBlock * sizes.wide()),
        weights_(kBlock * kChunk), gradient_(kBlock * kChunk) {}

  void run() const {
    const auto whole = [](int64_t) { return kBlock; };
    const std::vector<Block> queries = blocks_of(sizes_, segments_, sizes_.repeats, whole);
    const std::vector<Block> keys = blocks_of(sizes_, segments_, 1, whole);
#pragma omp parallel
    {
#pragma omp for schedule(dynamic)
      for (size_t i = 0; i < queries.size(); ++i) to_query(queries[i]);
      // of keys that many see: each takes long, and they come first
#pragma omp for schedule(dynamic)
      for (size_t i = 0; i < keys.size(); ++i) to_key(keys[i]);
    }
  }

 private:
  int64_t rows() const { return sizes_.length * sizes_.repeats; }

  void to_query(const Block& block) const {
    const Segment& segment = segments_[block.segment];
    const int64_t first = segment.from * sizes_.repeats + block.from, wide = sizes_.wide();
    const int64_t at = block.head * rows() + first;
    float *sums = first_.own(), *scores = scores_.own(), *grads = grads_.own();
    T *weights = weights_.own(), *gradient = gradient_.own();
    for (int64_t r = 0; r < block.count(); ++r) delta_[at + r] = delta(block.head, first + r);
    std::fill(sums, sums + up(block.count(), kDown) * wide, 0.0f);
    for (const Seen& seen : segment.keys) {
      const int64_t most = seen.causal ? (block.to - 1) / sizes_.repeats + 1
                                       : segments_[seen.segment].count();
      for (int64_t from = 0; from < most; from += kChunk) {
        const int64_t count = std::min(kChunk, most - from);
        meet(block, first, given_.query, key_, seen.segment, from, count, scores);
        meet(block, first, given_.grad, value_, seen.segment, from, count, grads);
        for (int64_t r = 0; r < block.count(); ++r) {
          const int64_t sees = seen.causal ? (block.from + r) / sizes_.repeats + 1 - from : count;
          const float lse = given_.lse[at + r], mean = delta_[at + r];
          const int64_t met = std::clamp<int64_t>(sees, 0, count), row = r * kChunk;
          differentiate(scores + row, grads + row, met, sizes_.scale, [=](int64_t) { return lse; },
                        [=](int64_t) { return mean; }, weights + row, gradient + row);
          std::fill(gradient + row + met, gradient + row + up(count, kDeep), T(0));
        }
        add(block, gradient, keys_down_, seen.segment, from, count, sums);
      }
    }
    emit(block, sums, given_.to_query + at * sizes_.width);
  }

  void to_key(const Block& block) const {
    const Segment& segment = segments_[block.segment];
    const int64_t first = segment.from + block.from, wide = sizes_.wide();
    float *of_key = first_.own(), *of_value = second_.own(), *scores = scores_.own(), *grads = grads_.own();
    T *weights = weights_.own(), *gradient = gradient_.own();
    for (float* sums : {of_key, of_value}) std::fill(sums, sums + up(block.count(), kDown) * wide, 0.0f);
    for (const Seen& seen : segment.queries) {
      const Segment& other = segments_[seen.segment];
      const int64_t end = other.count() * sizes_.repeats;
      const int64_t start = seen.causal ? block.from * sizes_.repeats / kLanes * kLanes : 0;
      const int64_t at = block.head * rows() + other.from * sizes_.repeats;
      for (int64_t from = start; from < end; from += kChunk) {
        const int64_t count = std::min(kChunk, end - from);
        meet(block, first, given_.key, query_, seen.segment, from, count, scores);
        meet(block, first, given_.value, grad_, seen.segment, from, count, grads);
        for (int64_t r = 0; r < block.count(); ++r) {
          const int64_t unseen = seen.causal ? (block.from + r) * sizes_.repeats - from : 0;
          const int64_t skip = std::clamp<int64_t>(unseen, 0, count), row = r * kChunk;
          const float *lse = given_.lse + at + from + skip, *mean = delta_.get() + at + from + skip;
          differentiate(scores + row + skip, grads + row + skip, count - skip, sizes_.scale,
                        [=](int64_t i) { return lse[i]; }, [=](int64_t i) { return mean[i]; },
                        weights + row + skip, gradient + row + skip);
          for (T* made : {weights + row, gradient + row}) {
            std::fill(made, made + skip, T(0));
            std::fill(made + count, made + up(count, kDeep), T(0));
          }
        }
        add(block, gradient, queries_down_, seen.segment, from, count, of_key);
        add(block, weights, grads_down_, seen.segment, from, count, of_value);
      }
    }
    const int64_t to = (block.head * sizes_.length + first) * sizes_.width;
    emit(block, of_key, given_.to_key + to);
    emit(block, of_value, given_.to_value + to);
  }

  // Weights times their gradients, summed over the keys: what the output times its gradient is.
  float delta(int64_t head, int64_t row) const {
    const T* grad = given_.grad.at(head, row);
    const T* out = given_.out + (grad - given_.grad.from);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < sizes_.width; ++d) sum += widen(out[d]) * widen(grad[d]);
    return sum;
  }

  // Products of a block's rows, the `first` and those behind it, with some columns.
  void meet(const Block& block, int64_t first, const Rows<T>& rows, const Right<T>& right,
            int64_t segment, int64_t from, int64_t count, float* out) const {
    const int64_t vector = right.vector(segment);
    multiply<T>([&](int64_t i) { return rows.at(block.head, first + i); }, block.count(),
                right.at(block.head, segment) + from / kLanes * vector, vector,
                up(count, kLanes) / kLanes, sizes_.width / kDeep, out, kChunk, false);
  }

  // Adds what belongs to some columns, each times a number of the row.
  void add(const Block& block, const T* left, const Right<T>& right, int64_t segment, int64_t from,
           int64_t count, float* sums) const {
    multiply<T>([&](int64_t i) { return left + i * kChunk; }, block.count(),
                right.at(block.head, segment) + from / kDeep * kLanes, right.vector(segment),
                sizes_.wide() / kLanes, up(count, kDeep) / kDeep, sums, sizes_.wide(), true);
  }

  void emit(const Block& block, const float* sums, float* to) const {
    for (int64_t r = 0; r < block.count(); ++r)
      std::copy(sums + r * sizes_.wide(), sums + r * sizes_.wide() + sizes_.width, to + r * sizes_.width);
  }
};

template <typename T>
Rows<T> queries(const Sizes& sizes, const T* from) {  // [K, N, R, D]
  const int64_t position = sizes.repeats * sizes.width;
  return {from, sizes.repeats, sizes.length * position, position, sizes.width};
}
template <typename T>
Rows<T> keys(const Sizes& sizes, const T* from) {  // [K, N, D]
  return {from, 1, sizes.length * sizes.width, sizes.width, 0};
}
template <typename T>
Rows<T> outputs(const Sizes& sizes, const T* from) {  // [N, K, R, D]
  const int64_t head = sizes.repeats * sizes.width;
  return {from, sizes.repeats, head, sizes.heads * head, sizes.width};
}

}  // namespace

// query [K, N, R, D]; key and value [K, N, D]; out and grad [N, K, R, D]; lse [K, N, R]; gradients in
// float, as what they are of. `count` parts of 5 numbers: see segments_of. D is even. They return 1
// where there is not memory enough.
#define SEGMENTS(NAME, T)                                                                          \
  extern "C" int64_t segments_forward_##NAME(                                                      \
      int64_t heads, int64_t length, int64_t repeats, int64_t width, int64_t count, float scale,   \
      const int64_t* parts, const T* query, const T* key, const T* value, T* out, float* lse) try { \
    const Sizes sizes{heads, length, repeats, width, scale};                                       \
    const auto segments = segments_of(length, count, parts);                                               \
    const Forward<T> forward(sizes, segments, queries(sizes, query), keys(sizes, key),             \
                             keys(sizes, value));                                                  \
    forward.run(out, lse);                                                                         \
    return 0;                                                                                      \
  } catch (const std::bad_alloc&) {                                                                \
    return 1;                                                                                      \
  }                                                                                                \
  extern "C" int64_t segments_backward_##NAME(                                                     \
      int64_t heads, int64_t length, int64_t repeats, int64_t width, int64_t count, float scale,   \
      const int64_t* parts, const T* query, const T* key, const T* value, const T* out,            \
      const float* lse, const T* grad, float* to_query, float* to_key, float* to_value) try {      \
    const Sizes sizes{heads, length, repeats, width, scale};                                       \
    const auto segments = segments_of(length, count, parts);                                               \
    const Given<T> given{queries(sizes, query), keys(sizes, key), keys(sizes, value),              \
                         outputs(sizes, grad), out, lse, to_query, to_key, to_value};              \
    const Backward<T> backward(sizes, segments, given);                                            \
    backward.run();                                                                                \
    return 0;                                                                                      \
  } catch (const std::bad_alloc&) {                                                                \
    return 1;                                                                                      \
  }

SEGMENTS(float32, float)
SEGMENTS(bfloat16, uint16_t)
