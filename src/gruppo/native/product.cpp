// Products of matrices, whose right one was cut into panels before.
//
// A panel holds kPanel columns, number after number of the inner dimension, so that the innermost
// loop reads it from end to end; a block of kDown rows by one panel is summed up in registers, in
// float. Panels are padded with zeros. Plain C interface, no torch headers; T is the type of
// products, S that of what is cut (cast on the way), C that of the result.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

#include "numbers.h"
#include "room.h"
#include "vectors.h"

namespace {

constexpr int kAcross = 3;                       // vectors of a panel's width
constexpr int kDown = kRegisters >= 32 ? 8 : 4;  // rows of a block: sums fill the registers
constexpr int kPanel = kAcross * kLanes;
constexpr int64_t kChunk = 256;   // most rows that one thread takes at a time ...
constexpr int64_t kHeld = 400 << 10;  // ... and most bytes: they stay in the second cache
constexpr int64_t kInner = 1024;  // lanes of a panel that stay in the second cache

constexpr int kLine = 64;         // bytes the processor fetches at once

template <typename T, typename S>
inline T as(S x) {
  if constexpr (std::is_same_v<T, S>) return x;
  T cast;
  narrow(widen(x), &cast);
  return cast;
}

// Lines of memory that a lane of a panel takes.
template <typename T>
constexpr int kLines = (kPanel * Parts<T>::kDeep * sizeof(T) + kLine - 1) / kLine;

// Inner numbers in whole lanes.
template <typename T>
int64_t depth_of(int64_t inner) {
  return (inner + Parts<T>::kDeep - 1) / Parts<T>::kDeep;
}
int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// Where each of the rows of several matrices begins, one matrix below the other.
template <typename S>
std::vector<const S*> rows_of(int64_t count, const S* const* parts, const int64_t* sizes,
                              int64_t stride) {
  std::vector<const S*> rows;
  rows.reserve(std::accumulate(sizes, sizes + count, int64_t{0}));
  for (int64_t part = 0; part < count; ++part)
    for (int64_t i = 0; i < sizes[part]; ++i) rows.push_back(parts[part] + i * stride);
  return rows;
}

// Panels whose columns are the matrices' rows.
template <typename S, typename T>
void cut_columns(int64_t count, const S* const* parts, const int64_t* sizes, int64_t stride,
                 int64_t inner, T* out) {
  constexpr int kDeep = Parts<T>::kDeep;
  constexpr int64_t kStretch = 128;  // inner numbers at a time: what they become stays in the cache
  const std::vector<const S*> rows = rows_of(count, parts, sizes, stride);
  const int64_t columns = rows.size(), depth = depth_of<T>(inner);
#pragma omp parallel for schedule(static)
  for (int64_t panel = 0; panel < panels_of(columns); ++panel) {
    T* to = out + panel * depth * kPanel * kDeep;
    const int64_t first = panel * kPanel;
    for (int64_t start = 0; start < depth * kDeep; start += kStretch) {
      const int64_t end = std::min(start + kStretch, depth * kDeep);
      for (int64_t j = 0; j < kPanel; ++j) {
        T taken[kStretch];
        const int64_t given = first + j < columns ? std::min(end, inner) - start : 0;
        const S* from = given ? rows[first + j] + start : nullptr;
#pragma omp simd
        for (int64_t i = 0; i < given; ++i) taken[i] = as<T>(from[i]);
        std::fill(taken + given, taken + (end - start), T{});
        T* at = to + (start / kDeep * kPanel + j) * kDeep;
        for (int64_t i = start; i < end; i += kDeep, at += kPanel * kDeep)
          std::memcpy(at, taken + i - start, kDeep * sizeof(T));
      }
    }
  }
}

// One panel of columns from `first` on of a matrix with these rows, its inner dimension.
template <typename S, typename T>
void rows_panel(const std::vector<const S*>& rows, int64_t first, int64_t columns, T* to) {
  constexpr int kDeep = Parts<T>::kDeep;
  const int64_t inner = rows.size(), width = std::min<int64_t>(kPanel, columns - first);
  for (int64_t start = 0; start < inner; start += kDeep, to += kPanel * kDeep) {
    const int64_t given = std::min<int64_t>(kDeep, inner - start);
    if (width == kPanel && given == kDeep) {
      typename Parts<T>::Lane lanes[kPanel];
      const S* from[kDeep];
      for (int deep = 0; deep < kDeep; ++deep) from[deep] = rows[start + deep] + first;
#pragma omp simd
      for (int j = 0; j < kPanel; ++j) {
        if constexpr (kDeep == 1) lanes[j] = as<T>(from[0][j]);
        else lanes[j] = as<T>(from[0][j]) | static_cast<uint32_t>(as<T>(from[1][j])) << 16;
      }
      std::memcpy(to, lanes, sizeof lanes);
      continue;
    }
    std::fill(to, to + kPanel * kDeep, T{});
    for (int64_t deep = 0; deep < given; ++deep)
      for (int64_t j = 0; j < width; ++j)
        to[j * kDeep + deep] = as<T>(rows[start + deep][first + j]);
  }
}

// Panels whose columns are the matrices' columns; their rows are the inner dimension.
template <typename S, typename T>
void cut_rows(int64_t count, const S* const* parts, const int64_t* sizes, int64_t stride,
              int64_t columns, T* out) {
  const std::vector<const S*> rows = rows_of(count, parts, sizes, stride);
  const int64_t size = depth_of<T>(rows.size()) * kPanel * Parts<T>::kDeep;
#pragma omp parallel for schedule(static)
  for (int64_t panel = 0; panel < panels_of(columns); ++panel)
    rows_panel<S, T>(rows, panel * kPanel, columns, out + panel * size);
}

// The left matrix: numbers between its rows, and between the lanes of a row.
template <typename T>
struct Left {
  const T* from;
  int64_t row, lane;
};

// `Rows` rows by one panel, added up over `depth` lanes. Meanwhile the panel at `ahead` is fetched.
template <typename T, int Rows>
inline void block(Left<T> left, const T* panel, int64_t depth, const char* ahead, float* sums) {
  constexpr int kDeep = Parts<T>::kDeep;
  Vector total[Rows][kAcross] = {};
  for (int64_t p = 0; p < depth; ++p, panel += kPanel * kDeep, left.from += left.lane) {
    typename Parts<T>::Loaded columns[kAcross];
    for (int j = 0; j < kAcross; ++j)
      columns[j] = Parts<T>::whole(panel + j * kLanes * kDeep);
    if (ahead) __builtin_prefetch(ahead + kLine * p, 0, 2);
    for (int i = 0; i < Rows; ++i) {
      const auto row = Parts<T>::everywhere(left.from + i * left.row);
      for (int j = 0; j < kAcross; ++j) total[i][j] = Parts<T>::add(total[i][j], row, columns[j]);
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < kAcross; ++j) store(total[i][j], sums + i * kPanel + j * kLanes);
}

template <typename T, int Rows = kDown>
inline void blocks(int64_t rows, Left<T> left, const T* panel, int64_t depth, const char* ahead,
                   float* sums) {
  if (rows == Rows) return block<T, Rows>(left, panel, depth, ahead, sums);
  if constexpr (Rows > 1) blocks<T, Rows - 1>(rows, left, panel, depth, ahead, sums);
}

// What a result becomes: the columns' bias is added, then the sum is stored, or added to.
template <typename C>
struct Result {
  C* to;
  int64_t stride, columns;
  const float* bias;
  bool adds;

  Result below(int64_t rows) const { return {to + rows * stride, stride, columns, bias, adds}; }
};

template <typename C>
inline void emit(const float* sums, int64_t rows, int64_t first, Result<C> result) {
  const int64_t width = std::min<int64_t>(kPanel, result.columns - first);
  const float* bias = result.bias ? result.bias + first : nullptr;
  for (int64_t i = 0; i < rows; ++i, sums += kPanel) {
    C* to = result.to + i * result.stride + first;
    if (width == kPanel) {
      for (int j = 0; j < kPanel; j += kLanes) {
        Vector sum = load(sums + j);
        if (bias) sum += load(bias + j);
        if (result.adds) sum += load(to + j);
        store(sum, to + j);
      }
    } else {
      for (int64_t j = 0; j < width; ++j)
        narrow(sums[j] + (bias ? bias[j] : 0) + (result.adds ? widen(to[j]) : 0), to + j);
    }
  }
}

// Up to kChunk rows by one panel: `result` begins with these rows.
template <typename T, typename C>
void chunk(int64_t rows, Left<T> left, const T* panel, int64_t depth, const T* ahead,
           int64_t first, Result<C> result) {
  constexpr int kDeep = Parts<T>::kDeep;
  float sums[kDown * kPanel], whole[kChunk * kPanel];
  for (int64_t start = 0; start < depth; start += kInner) {
    const int64_t length = std::min(kInner, depth - start);
    const bool is_first = start == 0, is_last = start + length == depth;
    for (int64_t row = 0; row < rows; row += kDown) {
      const int64_t count = std::min<int64_t>(kDown, rows - row);
      const Left<T> from{left.from + row * left.row + start * left.lane, left.row, left.lane};
      const bool fetches = ahead && row / kDown < kLines<T>;
      const char* lines = reinterpret_cast<const char*>(ahead + start * kPanel * kDeep);
      blocks<T>(count, from, panel + start * kPanel * kDeep, length,
                fetches ? lines + row / kDown * length * kLine : nullptr, sums);
      float* kept = whole + row * kPanel;
      if (!is_first)
        for (int64_t i = 0; i < count * kPanel; ++i) sums[i] += kept[i];
      if (!is_last) {
        std::copy(sums, sums + count * kPanel, kept);
        continue;
      }
      emit(sums, count, first, result.below(row));
    }
  }
}

// Rows a thread takes at a time: fewer where there would not be work for all.
int64_t chunk_of(int64_t rows, int64_t panels, int64_t row_bytes) {
  int64_t size = kChunk;
  while (size > 2 * kDown && size * row_bytes > kHeld) size /= 2;
  while (size > 2 * kDown && panels * ((rows + size - 1) / size) < 4 * omp_get_max_threads())
    size /= 2;
  return size;
}

template <typename T, typename C>
void multiply(int64_t rows, int64_t inner, int64_t stride, const T* left, const T* right,
              Result<C> result) {
  constexpr int kDeep = Parts<T>::kDeep;
  const int64_t depth = depth_of<T>(inner), panels = panels_of(result.columns);
  const int64_t size = chunk_of(rows, panels, inner * sizeof(T));
  const int64_t chunks = (rows + size - 1) / size;
#pragma omp parallel for schedule(static) collapse(2)
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t panel = 0; panel < panels; ++panel) {
      const T* from = right + panel * depth * kPanel * kDeep;
      const int64_t row = c * size;
      chunk<T, C>(std::min(size, rows - row), {left + row * stride, stride, kDeep}, from, depth,
                  from + depth * kPanel * kDeep, panel * kPanel, result.below(row));
    }
}

// The left matrix transposed times the right one, whose panels have the same inner dimension: the
// rows of both. A thread cuts the left one's panels as it needs them.
template <typename T>
void multiply_transposed(int64_t inner, int64_t rows, int64_t stride, const T* left,
                         const T* right, Result<float> result) {
  constexpr int kDeep = Parts<T>::kDeep;
  const std::vector<const T*> lines = rows_of(1, &left, &inner, stride);
  const int64_t depth = depth_of<T>(inner), size = depth * kPanel * kDeep;
  const int64_t downs = panels_of(rows), panels = panels_of(result.columns);
  if (!downs || !panels) return;
  const int64_t shares = std::clamp<int64_t>(4 * omp_get_max_threads() / downs, 1, panels);
  const Room<T> cuts(size);
#pragma omp parallel for schedule(static) collapse(2)
  for (int64_t down = 0; down < downs; ++down)
    for (int64_t share = 0; share < shares; ++share) {
      T* cut = cuts.own();
      const int64_t row = down * kPanel, end = panels * (share + 1) / shares;
      rows_panel<T, T>(lines, row, rows, cut);
      for (int64_t panel = panels * share / shares; panel < end; ++panel) {
        const T* from = right + panel * size;
        chunk<T, float>(std::min<int64_t>(kPanel, rows - row), {cut, kDeep, kPanel * kDeep}, from,
                        depth, from + size, panel * kPanel, result.below(row));
      }
    }
}

}  // namespace

// Numbers of T that a matrix of `inner` by `columns` takes as panels.
#define PANELS(NAME, T)                                                        \
  extern "C" int64_t NAME(int64_t inner, int64_t columns) {                    \
    return panels_of(columns) * depth_of<T>(inner) * kPanel * Parts<T>::kDeep; \
  }

// Functions that need memory of their own return -1 where there is not enough, else 0.
//
// `count` matrices below each other: part k has sizes[k] rows of `width`, `stride` numbers apart.
#define CUT(NAME, WAY, S, T)                                                                  \
  extern "C" int64_t NAME(int64_t count, const S* const* parts, const int64_t* sizes,         \
                          int64_t stride, int64_t width, T* out) try {                        \
    WAY<S, T>(count, parts, sizes, stride, width, out);                                       \
    return 0;                                                                                 \
  } OR_NO_MEMORY

// left [N, I], rows `stride` numbers apart; right are panels of [I, O]; bias [O] or null; out [N, O],
// rows `out_stride` apart. If `adds`, the result is added to out.
#define MULTIPLY(NAME, T, C)                                                                 \
  extern "C" void NAME(int64_t rows, int64_t inner, int64_t columns, int64_t stride,         \
                       int64_t out_stride, int64_t adds, const T* left, const T* right,      \
                       const float* bias, C* out) {                                          \
    multiply<T, C>(rows, inner, stride, left, right,                                         \
                   Result<C>{out, out_stride, columns, bias, adds != 0});                    \
  }

// left [I, N], rows `stride` numbers apart; right are panels of [I, O]; out [N, O], in float.
#define MULTIPLY_TRANSPOSED(NAME, T)                                                          \
  extern "C" int64_t NAME(int64_t inner, int64_t rows, int64_t columns, int64_t stride,       \
                          int64_t out_stride, int64_t adds, const T* left, const T* right,    \
                          float* out) try {                                                   \
    multiply_transposed<T>(inner, rows, stride, left, right,                                  \
                           Result<float>{out, out_stride, columns, nullptr, adds != 0});      \
    return 0;                                                                                 \
  } OR_NO_MEMORY

PANELS(panels_float32, float)
CUT(cut_columns_float32_float32, cut_columns, float, float)
CUT(cut_rows_float32_float32, cut_rows, float, float)
MULTIPLY(multiply_float32_float32, float, float)
MULTIPLY_TRANSPOSED(multiply_transposed_float32, float)
CUT(cut_columns_bfloat16_float32, cut_columns, uint16_t, float)
CUT(cut_rows_bfloat16_float32, cut_rows, uint16_t, float)

#ifdef __AVX512BF16__
PANELS(panels_bfloat16, uint16_t)
CUT(cut_columns_float32_bfloat16, cut_columns, float, uint16_t)
CUT(cut_columns_bfloat16_bfloat16, cut_columns, uint16_t, uint16_t)
CUT(cut_rows_float32_bfloat16, cut_rows, float, uint16_t)
CUT(cut_rows_bfloat16_bfloat16, cut_rows, uint16_t, uint16_t)
MULTIPLY(multiply_bfloat16_bfloat16, uint16_t, uint16_t)
MULTIPLY(multiply_bfloat16_float32, uint16_t, float)
MULTIPLY_TRANSPOSED(multiply_transposed_bfloat16, uint16_t)
extern "C" int64_t multiplies_bfloat16() { return 1; }
#else
extern "C" int64_t multiplies_bfloat16() { return 0; }
#endif
