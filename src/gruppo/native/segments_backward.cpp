// The gradient of attention over the segments of a packed row, for CPUs.
//
// Weights are made again from the log-sum-exps (arXiv:2307.08691, algorithm 2). A thread takes
// queries, whose gradients it has at once; what goes to keys that others see too is summed up at the
// end, in an order that does not depend on the number of threads.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "numbers.h"
#include "segments.h"
#include "vectors.h"

namespace {

constexpr int64_t kChunk = 256;  // most columns at a time

template <typename T>
struct Given {
  Rows<T> query, key, value, grad;
  const T* out;
  const float* lse;
  float *to_query, *to_key, *to_value;
};

// Some columns of a segment: its queries, each with all its heads.
struct Chunk {
  int64_t segment, from, to;

  int64_t count() const { return to - from; }
};

// Chunks that one thread takes, and where their sums for keys are: for each segment a number of
// rows before it, kWhole where they are all there is of it, kNone where it is not seen.
struct Piece {
  std::vector<Chunk> chunks;
  std::vector<int64_t> place;
};

constexpr int64_t kPiece = 512;  // least columns of a piece, and no fewer than it sees keys
constexpr int64_t kWhole = -1, kNone = -2;

// All chunks in pieces. Only sizes decide, so that sums do not depend on the number of threads.
std::vector<Piece> pieces_of(const Sizes& sizes, const std::vector<Segment>& segments) {
  std::vector<Piece> pieces;
  int64_t columns = 0, keys = 0;
  for (int64_t s = 0; s < static_cast<int64_t>(segments.size()); ++s)
    for (int64_t from = 0, end = segments[s].count() * sizes.repeats; from < end; from += kChunk) {
      if (pieces.empty() || columns >= std::max(kPiece, keys)) {
        pieces.push_back({{}, std::vector<int64_t>(segments.size(), kNone)});
        columns = keys = 0;
      }
      Piece& piece = pieces.back();
      piece.chunks.push_back({s, from, std::min(end, from + kChunk)});
      columns += piece.chunks.back().count();
      for (const Seen& seen : segments[s].keys)
        if (piece.place[seen.segment] == kNone) {
          piece.place[seen.segment] = kWhole;
          keys += segments[seen.segment].count();
        }
    }
  return pieces;
}

template <typename T>
class Backward {
  static constexpr int kDeep = Parts<T>::kDeep;
  const Sizes& sizes_;
  const std::vector<Segment>& segments_;
  const Given<T>& given_;
  const Right<T> keys_down_, query_, queries_down_, grad_, grads_down_;
  std::unique_ptr<float[]> delta_;
  std::vector<Piece> pieces_;
  std::vector<int64_t> seen_by_;  // pieces that see a segment
  int64_t rows_ = 0;              // of all sums that are not all there is of a segment, of a head
  std::unique_ptr<float[]> sums_;
  Room<float> scores_, grads_, queries_, product_;
  Room<T> weights_, gradient_, turned_;

 public:
  Backward(const Sizes& sizes, const std::vector<Segment>& segments, const Given<T>& given)
      : sizes_(sizes), segments_(segments), given_(given),
        keys_down_(sizes, segments, given.key, true), query_(sizes, segments, given.query, false),
        queries_down_(sizes, segments, given.query, true), grad_(sizes, segments, given.grad, false),
        grads_down_(sizes, segments, given.grad, true),
        delta_(new float[sizes.heads * sizes.length * sizes.repeats]),
        pieces_(pieces_of(sizes, segments)), seen_by_(segments.size()), scores_(kBlock * kChunk),
        grads_(kBlock * kChunk), queries_((kChunk + kDown) * sizes.wide()),
        product_(kBlock * sizes.wide()), weights_(kBlock * kChunk), gradient_(kBlock * kChunk),
        turned_(kBlock * kChunk) {
    for (const Piece& piece : pieces_)
      for (size_t s = 0; s < segments.size(); ++s) seen_by_[s] += piece.place[s] != kNone;
    for (Piece& piece : pieces_)
      for (size_t s = 0; s < segments.size(); ++s)
        if (piece.place[s] == kWhole && seen_by_[s] > 1) {
          piece.place[s] = rows_;
          rows_ += segments[s].count();
        }
    sums_.reset(new float[2 * sizes.heads * rows_ * sizes.width]);
  }

  void run() const {
    const std::vector<Block> keys =
        blocks_of(sizes_, segments_, 1, [](int64_t) { return kBlock; });
    const int64_t pieces = pieces_.size();
#pragma omp parallel
    {
#pragma omp for schedule(static)
      for (int64_t row = 0; row < sizes_.heads * rows(); ++row)
        delta_[row] = delta(row / rows(), row % rows());
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < sizes_.heads * pieces; ++i) take(i / pieces, pieces_[i % pieces]);
#pragma omp for schedule(static)
      for (size_t i = 0; i < keys.size(); ++i) sum_up(keys[i]);
    }
  }

 private:
  struct Sums {
    float *key, *value;
  };

  int64_t rows() const { return sizes_.length * sizes_.repeats; }

  // Where a piece adds up what goes to the keys of a segment.
  Sums sums(int64_t head, const Piece& piece, int64_t segment) const {
    const int64_t place = piece.place[segment];
    if (place == kWhole) {
      const int64_t at = (head * sizes_.length + segments_[segment].from) * sizes_.width;
      return {given_.to_key + at, given_.to_value + at};
    }
    float* key = sums_.get() + (head * rows_ + place) * sizes_.width;
    return {key, key + sizes_.heads * rows_ * sizes_.width};
  }

  void take(int64_t head, const Piece& piece) const {
    for (size_t s = 0; s < segments_.size(); ++s)
      if (piece.place[s] != kNone) {
        const Sums to = sums(head, piece, s);
        const int64_t count = segments_[s].count() * sizes_.width;
        std::fill(to.key, to.key + count, 0.0f);
        std::fill(to.value, to.value + count, 0.0f);
      }
    for (const Chunk& chunk : piece.chunks) {
      float* queries = queries_.own();
      std::fill(queries, queries + rounded_up(chunk.count(), kDown) * sizes_.wide(), 0.0f);
      for (const Seen& seen : segments_[chunk.segment].keys) {
        const Sums to = sums(head, piece, seen.segment);
        const int64_t most = seen.causal ? (chunk.to - 1) / sizes_.repeats + 1
                                         : segments_[seen.segment].count();
        for (int64_t from = 0; from < most; from += kBlock)
          meet({head, seen.segment, from, std::min(most, from + kBlock)}, chunk, seen.causal, to);
      }
      const Segment& segment = segments_[chunk.segment];
      const int64_t at = head * rows() + segment.from * sizes_.repeats + chunk.from;
      emit(queries, chunk.count(), given_.to_query + at * sizes_.width, false);
    }
  }

  // Some keys and the columns of a chunk: what each gives to the gradient of the other.
  void meet(const Block& block, const Chunk& chunk, bool causal, Sums to) const {
    float *scores = scores_.own(), *grads = grads_.own();
    T *weights = weights_.own(), *gradient = gradient_.own();
    const int64_t first = segments_[block.segment].from + block.from;
    // columns that see none of the keys are left out, in whole vectors
    const int64_t from = causal ? std::max(chunk.from, block.from * sizes_.repeats / kLanes * kLanes)
                                : chunk.from;
    const int64_t count = chunk.to - from, even = rounded_up(count, kDeep);
    const int64_t at = block.head * rows() + segments_[chunk.segment].from * sizes_.repeats + from;
    by_columns(block, first, given_.key, query_, chunk.segment, from, count, scores);
    by_columns(block, first, given_.value, grad_, chunk.segment, from, count, grads);
    for (int64_t r = 0; r < block.count(); ++r) {
      const int64_t unseen = causal ? (block.from + r) * sizes_.repeats - from : 0;
      const int64_t skip = std::clamp<int64_t>(unseen, 0, count), row = r * kChunk;
      differentiate(scores + row + skip, grads + row + skip, count - skip, at + skip,
                    weights + row + skip, gradient + row + skip);
      if (skip > 0 || even > count)
        for (T* made : {weights + row, gradient + row}) {
          std::fill(made, made + skip, T(0));
          std::fill(made + count, made + even, T(0));
        }
    }
    add_columns(block, gradient, queries_down_, chunk.segment, from, count, to.key);
    add_columns(block, weights, grads_down_, chunk.segment, from, count, to.value);
    add_keys(block, gradient, count, queries_.own() + (from - chunk.from) * sizes_.wide());
  }

  // Weights of some columns of a key, and the gradient of their scores.
  void differentiate(const float* scores, const float* grads, int64_t count, int64_t at, T* weights,
                     T* gradient) const {
    const float *lse = given_.lse + at, *mean = delta_.get() + at, scale = sizes_.scale;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float apart = scores[i] * scale - lse[i];  // never above 0 but for rounding
      const float weight = exp_negative(apart > 0.0f ? 0.0f : apart);
      narrow(weight, weights + i);
      narrow(weight * (grads[i] - mean[i]) * scale, gradient + i);
    }
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
  void by_columns(const Block& block, int64_t first, const Rows<T>& rows, const Right<T>& right,
                  int64_t segment, int64_t from, int64_t count, float* out) const {
    const int64_t vector = right.vector(segment);
    multiply<T>([&](int64_t i) { return rows.at(block.head, first + i); }, block.count(),
                right.at(block.head, segment) + from / kLanes * vector, vector,
                rounded_up(count, kLanes) / kLanes, sizes_.width / kDeep, out, kChunk, false);
  }

  // Adds to each key what belongs to some columns, each times a number of the row.
  void add_columns(const Block& block, const T* left, const Right<T>& right, int64_t segment,
                   int64_t from, int64_t count, float* to) const {
    float* product = product_.own();
    multiply<T>([&](int64_t i) { return left + i * kChunk; }, block.count(),
                right.at(block.head, segment) + from / kDeep * kLanes, right.vector(segment),
                sizes_.wide() / kLanes, rounded_up(count, kDeep) / kDeep, product, sizes_.wide(), false);
    emit(product, block.count(), to + block.from * sizes_.width, true);
  }

  // Adds to each column the block's keys, each times a number of the column.
  void add_keys(const Block& block, const T* gradient, int64_t count, float* queries) const {
    T* turned = turned_.own();
    const int64_t keys = rounded_up(block.count(), kDeep);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t r = 0; r < block.count(); ++r) turned[i * kBlock + r] = gradient[r * kChunk + i];
      for (int64_t r = block.count(); r < keys; ++r) turned[i * kBlock + r] = T(0);
    }
    multiply<T>([&](int64_t i) { return turned + i * kBlock; }, count,
                keys_down_.at(block.head, block.segment) + block.from / kDeep * kLanes,
                keys_down_.vector(block.segment), sizes_.wide() / kLanes, keys / kDeep, queries,
                sizes_.wide(), true);
  }

  // Rows without what fills up their last vector.
  void emit(const float* from, int64_t count, float* to, bool adds) const {
    for (int64_t r = 0; r < count; ++r, from += sizes_.wide(), to += sizes_.width)
#pragma omp simd
      for (int64_t d = 0; d < sizes_.width; ++d) to[d] = adds ? to[d] + from[d] : from[d];
  }

  // The sums of all pieces that see some keys.
  void sum_up(const Block& block) const {
    if (seen_by_[block.segment] == 1) return;
    const int64_t count = block.count() * sizes_.width, skip = block.from * sizes_.width;
    const int64_t at = (block.head * sizes_.length + segments_[block.segment].from) * sizes_.width + skip;
    std::fill(given_.to_key + at, given_.to_key + at + count, 0.0f);
    std::fill(given_.to_value + at, given_.to_value + at + count, 0.0f);
    for (const Piece& piece : pieces_) {
      if (piece.place[block.segment] == kNone) continue;
      const Sums from = sums(block.head, piece, block.segment);
      for (int64_t i = 0; i < count; ++i) given_.to_key[at + i] += from.key[skip + i];
      for (int64_t i = 0; i < count; ++i) given_.to_value[at + i] += from.value[skip + i];
    }
  }
};

}  // namespace

// As in segments_forward.cpp. grad [N, K, R, D]; gradients are float, and lie as what they are of.
#define BACKWARD(NAME, T)                                                                          \
  extern "C" int64_t segments_backward_##NAME(                                                     \
      int64_t heads, int64_t length, int64_t repeats, int64_t width, int64_t count, float scale,   \
      const int64_t* parts, const T* query, const T* key, const T* value, const T* out,            \
      const float* lse, const T* grad, float* to_query, float* to_key, float* to_value) try {      \
    const Sizes sizes{heads, length, repeats, width, scale};                                       \
    const auto segments = segments_of(length, count, parts);                                       \
    const Given<T> given{queries(sizes, query), keys(sizes, key), keys(sizes, value),              \
                         outputs(sizes, grad), out, lse, to_query, to_key, to_value};              \
    const Backward<T> backward(sizes, segments, given);                                            \
    backward.run();                                                                                \
    return 0;                                                                                      \
  } OR_NO_MEMORY

BACKWARD(float32, float)
BACKWARD(bfloat16, uint16_t)
