// Rows of the segments of a packed row, and their products.
//
// A segment is a run of positions that have all their keys and all their queries in common. T is the
// type of what comes and of products; sums are float.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "numbers.h"
#include "room.h"
#include "vectors.h"

namespace {

constexpr int kAcross = 4;                  // vectors of a tile
constexpr int kDown = kRegisters / 16 * 3;  // its rows: sums and what they are made of fill the registers
constexpr int64_t kBlock = 8 * kDown;       // most rows that meet columns together

struct Sizes {
  int64_t heads, length, repeats, width;
  float scale;

  int64_t wide() const { return rounded_up(width, kLanes); }
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
      vector_.push_back((down ? rounded_up(count, P::kDeep) : sizes.width) / P::kDeep * kLanes);
      head_ += vector_.back() * (down ? sizes.wide() : rounded_up(count, kLanes)) / kLanes;
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
    for (int64_t x = block.from; x < rounded_up(block.to, kLanes); ++x) {
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
