// Decode attention over a shared prompt and a completion's own tokens, for CPUs.
//
// Plain C interface, no torch headers: compiled in seconds with whatever compiler is there, for
// the processor it runs on. Rows of one prompt are computed together: their queries meet its keys
// in one small matrix product, a query a lane. A row's own keys are met by its own queries alone.
// What is computed for a row does not depend on its company, rounding included.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "numbers.h"
#include "room.h"
#include "vectors.h"

namespace {

struct Shape {
  int64_t rows, key_heads, repeats, width;
  int64_t prompt_columns, own_columns;  // allocated, not filled
  int64_t window;                       // 0: none
  float scaling;
};

template <typename T>
struct Tensors {
  const T *query, *prompt_keys, *prompt_values, *own_keys, *own_values;
  const int64_t *place, *prompt_length, *own_length;
  T* out;
};

// Rows rows[from] to rows[to - 1] have the same prompt.
struct Chunk {
  int64_t from, to;
};
struct Keys {
  int64_t from, to;  // those that are seen
};

constexpr int kTogether = kRegisters / 4;    // keys that meet two vectors of queries
constexpr int64_t kRun = 32;                 // products in one sum: more would round too often
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr int64_t kTasks = 4;                // a thread, so that none waits long for another
constexpr int kBeside = kRegisters / 8;      // own keys, or vectors of a value's numbers ...
constexpr int kMost = 6;                     // ... and so many queries or less

// Asks for what is read next, `count` numbers: own keys and values come in runs too short for the
// processor to see them coming.
template <typename T>
void ask_for(const T* next, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(next + i, 0, 2);
}

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

// Calls visit(from, constant) for even parts of `count`, each at most kMost.
template <typename Visit>
void in_parts(int64_t count, Visit visit) {
  int64_t from = 0;
  for (int64_t left = (count + kMost - 1) / kMost; left > 0; --left) {
    const int64_t size = (count - from + left - 1) / left;
    switch (size) {
      case 1: visit(from, std::integral_constant<int, 1>()); break;
      case 2: visit(from, std::integral_constant<int, 2>()); break;
      case 3: visit(from, std::integral_constant<int, 3>()); break;
      case 4: visit(from, std::integral_constant<int, 4>()); break;
      case 5: visit(from, std::integral_constant<int, 5>()); break;
      default: visit(from, std::integral_constant<int, kMost>());
    }
    from += size;
  }
}

// scores[j * stride + x] of COUNT queries, which lie as the keys do. The last vector of scores is
// filled up with what a softmax takes for nothing.
template <int COUNT, typename T>
void score_own(const T* keys, int64_t count, int64_t width, const T* queries, float scaling,
               float* scores, int64_t stride, const T* next) {
  using P = Parts<T>;
  constexpr int64_t kStep = P::kDeep * kLanes;
  const int64_t whole = width / kStep * kStep;
  Vector sums[COUNT][kLanes];
  for (int64_t x = 0; x < count; x += kLanes) {
    for (int64_t at = 0; at < kLanes; at += kBeside) {
      const T* key[kBeside];
      ask_for(next + (x + at) * width, kBeside * width);
      for (int k = 0; k < kBeside; ++k) key[k] = keys + std::min(x + at + k, count - 1) * width;
      Vector part[kBeside][COUNT] = {};
      const auto meet = [&](auto taken) {
        typename P::Loaded query[COUNT];
        for (int j = 0; j < COUNT; ++j) query[j] = taken(queries + j * width);
        for (int k = 0; k < kBeside; ++k) {
          const auto numbers = taken(key[k]);
          for (int j = 0; j < COUNT; ++j) part[k][j] = P::add(part[k][j], numbers, query[j]);
        }
      };
      for (int64_t d = 0; d < whole; d += kStep)
        meet([d](const T* from) { return P::whole(from + d); });
      if (whole < width)
        meet([whole, width](const T* from) { return P::first(from + whole, width - whole); });
      for (int k = 0; k < kBeside; ++k)
        for (int j = 0; j < COUNT; ++j) sums[j][at + k] = part[k][j];
    }
    for (int j = 0; j < COUNT; ++j) store(sums_of(sums[j]) * scaling, scores + j * stride + x);
  }
  for (int j = 0; j < COUNT; ++j)
    std::fill(scores + j * stride + count, scores + j * stride + rounded_up(count, kLanes),
              -std::numeric_limits<float>::infinity());
}

// mixed[q * width + i] += sum over x of weights[q * of_query + x * of_key] * values[x * width + i]
// for COUNT queries q and COLUMNS vectors of numbers i.
template <int COUNT, int COLUMNS, typename T>
void mix_columns(const T* values, int64_t count, int64_t width, const float* weights,
                 int64_t of_query, int64_t of_key, float* mixed, const T* next) {
  Vector sums[COUNT][COLUMNS];
  for (int q = 0; q < COUNT; ++q)
    for (int c = 0; c < COLUMNS; ++c) sums[q][c] = load(mixed + q * width + c * kLanes);
  for (int64_t x = 0; x < count; ++x) {
    Vector value[COLUMNS];
    ask_for(next + x * width, COLUMNS * kLanes);
    for (int c = 0; c < COLUMNS; ++c) value[c] = load(values + x * width + c * kLanes);
    for (int q = 0; q < COUNT; ++q) {
      const Vector weight = spread(weights[q * of_query + x * of_key]);
      for (int c = 0; c < COLUMNS; ++c) sums[q][c] += weight * value[c];
    }
  }
  for (int q = 0; q < COUNT; ++q)
    for (int c = 0; c < COLUMNS; ++c) store(sums[q][c], mixed + q * width + c * kLanes);
}

// The same for all numbers of the values and `queries` queries.
template <typename T>
void mix(const T* values, int64_t count, int64_t width, int64_t queries, const float* weights,
         int64_t of_query, int64_t of_key, float* mixed, const T* next) {
  in_parts(queries, [&](int64_t from, auto size) {
    const float* weight = weights + from * of_query;
    float* to = mixed + from * width;
    int64_t i = 0;
    for (; i + kBeside * kLanes <= width; i += kBeside * kLanes)
      mix_columns<size, kBeside>(values + i, count, width, weight, of_query, of_key, to + i,
                                 next + i);
    for (; i + kLanes <= width; i += kLanes)
      mix_columns<size, 1>(values + i, count, width, weight, of_query, of_key, to + i,
                                 next + i);
    for (; i < width; ++i)
      for (int q = 0; q < size; ++q)
        for (int64_t x = 0; x < count; ++x)
          to[q * width + i] += weight[q * of_query + x * of_key] * widen(values[x * width + i]);
  });
}

// The keys that a row's query sees: the row's newest token is the last.
Keys seen_of_prompt(const Shape& s, int64_t prompt_length, int64_t own_length) {
  const int64_t seen = prompt_length + own_length;
  const int64_t first = s.window > 0 ? std::max<int64_t>(0, seen - s.window) : 0;
  return {std::min(first, prompt_length), prompt_length};
}
Keys seen_of_own(const Shape& s, int64_t own_length) {
  return {s.window > 0 ? std::max<int64_t>(0, own_length - s.window) : 0, own_length};
}

// Where the own keys that a row sees begin, and its values.
template <typename T>
int64_t start_of_own(const Shape& s, const Tensors<T>& t, int64_t row, int64_t head) {
  const int64_t first = seen_of_own(s, t.own_length[row] + 1).from;
  return ((row * s.key_heads + head) * s.own_columns + first) * s.width;
}

// Rows of one prompt, of one key head: their attention to it, not yet divided by its sum.
template <typename T>
struct Together {
  std::vector<typename Parts<T>::Lane> queries;
  std::vector<float> scores, top, total, mixed, own;

  // Room for so many queries of so many keys of the prompt, and of so many own keys.
  Together(const Shape& s, int64_t used, int64_t length, int64_t own_length) {
    const int64_t lanes = rounded_up(used, kLanes);
    queries.reserve(s.width / Parts<T>::kDeep * lanes);
    scores.reserve(rounded_up(length, kTogether) * lanes);
    top.reserve(lanes);
    total.reserve(lanes);
    mixed.reserve(used * s.width);
    own.reserve(s.repeats * rounded_up(own_length, kLanes));
  }

  void attend(const Shape& s, const Tensors<T>& t, const int64_t* rows, int64_t count,
              int64_t head, const T* next) {
    constexpr int kDeep = Parts<T>::kDeep;
    const int64_t used = count * s.repeats, lanes = rounded_up(used, kLanes);
    queries.assign(s.width / kDeep * lanes, {});
    Keys keys{t.prompt_length[rows[0]], t.prompt_length[rows[0]]};
    for (int64_t r = 0; r < count; ++r) {
      const int64_t n = rows[r];
      const T* query = t.query + (n * s.key_heads + head) * s.repeats * s.width;
      for (int64_t j = 0; j < s.repeats; ++j)
        for (int64_t d = 0; d < s.width; d += kDeep)
          queries[d / kDeep * lanes + r * s.repeats + j] = Parts<T>::lane(query + j * s.width + d);
      keys.from = std::min(keys.from, seen_of_prompt(s, keys.to, t.own_length[n] + 1).from);
    }
    const int64_t length = keys.to - keys.from;
    scores.resize(rounded_up(length, kTogether) * lanes);
    const int64_t at = ((t.place[rows[0]] * s.key_heads + head) * s.prompt_columns + keys.from);
    for (int64_t lane = 0; lane < lanes; lane += 2 * kLanes) {
      const auto score = lanes - lane > kLanes ? score_together<2, T> : score_together<1, T>;
      score(t.prompt_keys + at * s.width, length, s.width, queries.data() + lane, lanes, s.scaling,
            scores.data() + lane, t.prompt_values + at * s.width);
    }
    for (int64_t r = 0; r < count && s.window > 0; ++r) {
      const int64_t from = seen_of_prompt(s, keys.to, t.own_length[rows[r]] + 1).from;
      for (int64_t x = 0; x < from - keys.from; ++x)
        std::fill_n(scores.data() + x * lanes + r * s.repeats, s.repeats,
                    -std::numeric_limits<float>::infinity());
    }
    weigh(length, lanes);
    mixed.assign(used * s.width, 0.0f);
    mix(t.prompt_values + at * s.width, length, s.width, used, scores.data(), 1, lanes,
        mixed.data(), next);
  }

  // Scores to exponentials, their largest and their sum.
  void weigh(int64_t length, int64_t lanes) {
    top.assign(lanes, kLowest);
    total.assign(lanes, 0.0f);
    float *highest = top.data(), *sum = total.data();
    for (int64_t x = 0; x < length; ++x) {
      const float* row = scores.data() + x * lanes;
#pragma omp simd
      for (int64_t i = 0; i < lanes; ++i) highest[i] = row[i] > highest[i] ? row[i] : highest[i];
    }
    for (int64_t x = 0; x < length; ++x) {
      float* row = scores.data() + x * lanes;
#pragma omp simd
      for (int64_t i = 0; i < lanes; ++i) {
        row[i] = exp_negative(row[i] - highest[i]);
        sum[i] += row[i];
      }
    }
  }
};

// One row's queries of one key head: goes on from what they saw of the prompt, to the end.
template <typename T>
void attend_own(const Shape& s, const T* query, const T* keys, const T* values, int64_t count,
                const float* prompt_top, const float* prompt_total, float* mixed, T* out,
                std::vector<float>& scratch, const T* next) {
  const int64_t stride = rounded_up(count, kLanes);
  scratch.resize(s.repeats * stride);
  float* scores = scratch.data();
  in_parts(s.repeats, [&](int64_t from, auto size) {
    score_own<size>(keys, count, s.width, query + from * s.width, s.scaling,
                    scores + from * stride, stride, values);
  });
  float inverse[s.repeats];
  for (int64_t j = 0; j < s.repeats; ++j) {
    float* row = scores + j * stride;
    float top = prompt_top[j], sum = 0;
#pragma omp simd reduction(max : top)
    for (int64_t x = 0; x < stride; ++x) top = row[x] > top ? row[x] : top;
#pragma omp simd reduction(+ : sum)
    for (int64_t x = 0; x < stride; ++x) {
      row[x] = exp_negative(row[x] - top);
      sum += row[x];
    }
    const float kept = exp_negative(prompt_top[j] - top);
#pragma omp simd
    for (int64_t i = 0; i < s.width; ++i) mixed[j * s.width + i] *= kept;
    inverse[j] = 1.0f / (sum + kept * prompt_total[j]);
  }
  mix(values, count, s.width, s.repeats, scores, stride, 1, mixed, next);
  for (int64_t j = 0; j < s.repeats; ++j)
#pragma omp simd
    for (int64_t i = j * s.width; i < (j + 1) * s.width; ++i) narrow(mixed[i] * inverse[j], out + i);
}

// Rows ordered by their prompt, and parts of them that are computed together.
template <typename T>
std::vector<Chunk> chunks_of(const Shape& s, const Tensors<T>& t, std::vector<int64_t>& rows) {
  const auto same = [&](int64_t a, int64_t b) {
    return t.place[a] == t.place[b] && t.prompt_length[a] == t.prompt_length[b];
  };
  std::iota(rows.begin(), rows.end(), 0);
  const auto before = [&](int64_t a, int64_t b) { return t.place[a] < t.place[b]; };
  if (!std::is_sorted(rows.begin(), rows.end(), before))
    std::stable_sort(rows.begin(), rows.end(), before);
  const int64_t even = s.rows * s.key_heads / (kTasks * omp_get_max_threads());
  const int64_t most = std::max<int64_t>(1, std::min(even, 2 * kLanes / s.repeats));
  std::vector<Chunk> chunks;
  for (int64_t from = 0, to; from < s.rows; from = to) {
    for (to = from + 1; to < s.rows && same(rows[from], rows[to]);) ++to;
    for (int64_t left = (to - from + most - 1) / most, at = from; left > 0; --left) {
      const int64_t size = (to - at + left - 1) / left;
      chunks.push_back({at, at + size});
      at += size;
    }
  }
  return chunks;
}

// What each thread computes in: room for the largest chunk and the longest prompt and completion.
template <typename T>
std::vector<Together<T>> rooms_for(const Shape& s, const Tensors<T>& t,
                                   const std::vector<Chunk>& chunks) {
  int64_t rows = 0, prompt = 0, own = 0;
  for (const Chunk& chunk : chunks) rows = std::max(rows, chunk.to - chunk.from);
  for (int64_t n = 0; n < s.rows; ++n) {
    const int64_t length = t.prompt_length[n], drawn = t.own_length[n] + 1;
    const Keys shared = seen_of_prompt(s, length, drawn), alone = seen_of_own(s, drawn);
    prompt = std::max(prompt, shared.to - shared.from);
    own = std::max(own, alone.to - alone.from);
  }
  std::vector<Together<T>> rooms;
  rooms.reserve(omp_get_max_threads());
  for (int thread = 0; thread < omp_get_max_threads(); ++thread)
    rooms.emplace_back(s, rows * s.repeats, prompt, own);
  return rooms;
}

template <typename T>
void decode(const Shape& s, const Tensors<T>& t) {
  std::vector<int64_t> rows(s.rows);
  const std::vector<Chunk> chunks = chunks_of(s, t, rows);
  const int64_t of_head = s.repeats * s.width;
  std::vector<Together<T>> rooms = rooms_for(s, t, chunks);
#pragma omp parallel
  {
    Together<T> together = std::move(rooms[omp_get_thread_num()]);
#pragma omp for collapse(2) schedule(dynamic)
    for (size_t c = 0; c < chunks.size(); ++c) {
      for (int64_t h = 0; h < s.key_heads; ++h) {
        const int64_t *row = rows.data() + chunks[c].from, *last = rows.data() + chunks[c].to - 1;
        together.attend(s, t, row, last + 1 - row, h, t.own_keys + start_of_own(s, t, *row, h));
        for (int64_t lane = 0; row <= last; ++row, lane += s.repeats) {
          const int64_t at = (*row * s.key_heads + h) * of_head, own = start_of_own(s, t, *row, h);
          const Keys keys = seen_of_own(s, t.own_length[*row] + 1);
          attend_own(s, t.query + at, t.own_keys + own, t.own_values + own, keys.to - keys.from,
                     together.top.data() + lane, together.total.data() + lane,
                     together.mixed.data() + lane * s.width, t.out + at, together.own,
                     t.own_keys + start_of_own(s, t, row < last ? row[1] : *row, h));
        }
      }
    }
  }
}

}  // namespace

// Tensors are contiguous: query and out [N, K * R, D], prompt keys and values [P, K, W, D], own
// ones [S, K, C, D]; place, prompt_length and own_length [N] are int64. own_length does not count
// the token being computed, whose key and value are in the buffer already. D is even. Returns -1
// where there is not memory enough.
#define DECODE(NAME, T)                                                                           \
  extern "C" int64_t NAME(int64_t rows, int64_t key_heads, int64_t repeats, int64_t width,        \
                       int64_t prompt_columns, int64_t own_columns, int64_t window, float scaling, \
                       const T* query, const T* prompt_keys, const T* prompt_values,              \
                       const T* own_keys, const T* own_values, const int64_t* place,              \
                       const int64_t* prompt_length, const int64_t* own_length, T* out) try {     \
    decode<T>({rows, key_heads, repeats, width, prompt_columns, own_columns, window, scaling},    \
              {query, prompt_keys, prompt_values, own_keys, own_values, place, prompt_length,     \
               own_length, out});                                                                 \
    return 0;                                                                                     \
  } OR_NO_MEMORY

DECODE(decode_attention_float32, float)
DECODE(decode_attention_bfloat16, uint16_t)
