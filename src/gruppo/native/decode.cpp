// All layers of a decode step in one call: what the other kernels do, one after the other.

#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

#include "numbers.h"
#include "room.h"

namespace {

struct Sizes {
  int64_t rows, width, heads, key_heads, head_width, inner;

  int64_t packed() const { return (heads + 2 * key_heads) * head_width; }
  int64_t mixed() const { return heads * head_width; }
};

struct Norm {
  const float* weight;  // null: none
  double epsilon;
};

struct Product {
  const void* panels;
  const float* bias;  // null: none
  const void *down, *up;  // an adapter's two matrices, its scale in the second
  int64_t rank;           // 0: no adapter
};

struct Layer {
  Norm before_attention, of_query, of_key, before_mlp;
  Product query_key_value, out, gate_up, down;
  const void *prompt_keys, *prompt_values;
  void *own_keys, *own_values;
  void *packed, *attended, *gates, *update;  // where to leave the products' results; null: nowhere
  int64_t prompt_columns, own_columns, window;  // 0: no window
  double scaling;
};

// What the rows have beside their hidden states.
struct Rows {
  const float *cosine, *sine;
  const int64_t *place, *prompt_length, *own_length;
};

// The kernels of a type: those of layer.cpp, attention.cpp and product.cpp, where they are explained.
template <typename H, typename T>
struct Kernels {
  using Norm = void(int64_t, int64_t, float, H*, const T*, const float*, T*);
  using Rotate = int64_t(int64_t, int64_t, int64_t, int64_t, int64_t, float, float, const T*,
                         const float*, const float*, const float*, const float*, const int64_t*,
                         T*, T*, T*);
  using Attend = int64_t(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float,
                         const T*, const T*, const T*, const T*, const T*, const int64_t*,
                         const int64_t*, const int64_t*, T*);
  using Swiglu = void(int64_t, int64_t, const T*, T*);
  using Multiply = void(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, const T*, const T*,
                        const float*, T*);
  Norm* add_norm;
  Rotate* rotate;
  Attend* attend;
  Swiglu* swiglu;
  Multiply* multiply;
};

template <typename H, typename T>
class Step {
  const Kernels<H, T> kernels_;
  const Sizes& sizes_;
  const Rows& rows_;
  H* hidden_;
  std::vector<T> normed_, packed_, query_, mixed_, update_, gates_, open_, low_, beside_;
  const T* added_ = nullptr;  // what the residual stream has still to take

 public:
  Step(const Kernels<H, T>& kernels, const Sizes& s, const Rows& rows, H* hidden)
      : kernels_(kernels), sizes_(s), rows_(rows), hidden_(hidden), normed_(s.rows * s.width),
        packed_(s.rows * s.packed()), query_(s.rows * s.mixed()), mixed_(s.rows * s.mixed()),
        update_(s.rows * s.width), gates_(s.rows * 2 * s.inner), open_(s.rows * s.inner) {}

  void run(int64_t count, const Layer* layers, const Norm& last, T* out) {
    for (const Layer* layer = layers; layer < layers + count; ++layer) {
      norm(layer->before_attention, normed_.data());
      attend(*layer);
      norm(layer->before_mlp, normed_.data());
      const T* gates = multiply(layer->gate_up, normed_, gates_, layer->gates);
      kernels_.swiglu(sizes_.rows, sizes_.inner, gates, open_.data());
      added_ = multiply(layer->down, open_, update_, layer->update);
    }
    norm(last, out);
  }

 private:
  static void enough(int64_t result) {
    if (result < 0) throw std::bad_alloc();
  }

  void norm(const Norm& by, T* to) {
    kernels_.add_norm(sizes_.rows, sizes_.width, by.epsilon, hidden_, added_, by.weight, to);
  }

  // To `kept`, if there is such a place, else to `room`; returns where.
  const T* multiply(const Product& by, const std::vector<T>& left, std::vector<T>& room, void* kept) {
    const int64_t inner = left.size() / sizes_.rows, columns = room.size() / sizes_.rows;
    T* to = kept ? static_cast<T*>(kept) : room.data();
    multiply(by.panels, by.bias, left.data(), inner, to, columns);
    if (by.rank) adapt(by, left.data(), inner, to, columns);
    return to;
  }

  void multiply(const void* panels, const float* bias, const T* left, int64_t inner, T* to,
                int64_t columns) {
    kernels_.multiply(sizes_.rows, inner, columns, inner, columns, 0, left,
                      static_cast<const T*>(panels), bias, to);
  }

  // Adds what an adapter makes of the same rows, rounded before the sum, as the layers do.
  void adapt(const Product& by, const T* left, int64_t inner, T* to, int64_t columns) {
    const int64_t count = sizes_.rows * columns;
    low_.resize(std::max<int64_t>(low_.size(), sizes_.rows * by.rank));
    beside_.resize(std::max<int64_t>(beside_.size(), count));
    multiply(by.down, nullptr, left, inner, low_.data(), by.rank);
    multiply(by.up, nullptr, low_.data(), by.rank, beside_.data(), columns);
    const T* added = beside_.data();
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < count; ++i) narrow(widen(to[i]) + widen(added[i]), to + i);
  }

  void attend(const Layer& layer) {
    const Sizes& s = sizes_;
    T *keys = static_cast<T*>(layer.own_keys), *values = static_cast<T*>(layer.own_values);
    const T* packed = multiply(layer.query_key_value, normed_, packed_, layer.packed);
    enough(kernels_.rotate(s.rows, s.heads, s.key_heads, s.head_width, layer.own_columns,
                    layer.of_query.epsilon, layer.of_key.epsilon, packed, rows_.cosine,
                    rows_.sine, layer.of_query.weight, layer.of_key.weight, rows_.own_length,
                    query_.data(), keys, values));
    enough(kernels_.attend(s.rows, s.key_heads, s.heads / s.key_heads, s.head_width, layer.prompt_columns,
                    layer.own_columns, layer.window, layer.scaling, query_.data(),
                    static_cast<const T*>(layer.prompt_keys),
                    static_cast<const T*>(layer.prompt_values), keys, values, rows_.place,
                    rows_.prompt_length, rows_.own_length, mixed_.data()));
    added_ = multiply(layer.out, mixed_, update_, layer.attended);
  }
};

}  // namespace

// hidden [N, E]: the residual stream; out [N, E]: it after all layers, normed. There are rows.
// Returns -1 where there is not memory enough.
#define STEP(NAME, H, T, NORM, ROTATE, ATTEND, SWIGLU, MULTIPLY)                               \
  extern "C" Kernels<H, T>::Norm NORM;                                                         \
  extern "C" Kernels<H, T>::Rotate ROTATE;                                                     \
  extern "C" Kernels<H, T>::Attend ATTEND;                                                     \
  extern "C" Kernels<H, T>::Swiglu SWIGLU;                                                     \
  extern "C" Kernels<H, T>::Multiply MULTIPLY;                                                 \
  extern "C" int64_t NAME(const Sizes* sizes, int64_t count, const Layer* layers,              \
                          const Rows* rows, const Norm* last, H* hidden, T* out) {             \
    try {                                                                                      \
      const Kernels<H, T> kernels{NORM, ROTATE, ATTEND, SWIGLU, MULTIPLY};                     \
      Step<H, T>(kernels, *sizes, *rows, hidden).run(count, layers, *last, out);               \
      return 0;                                                                                \
    } OR_NO_MEMORY                                                                             \
  }

STEP(decode_step_float32_float32, float, float, add_norm_float32_float32, rotate_float32,
     decode_attention_float32, swiglu_float32, multiply_float32_float32)
#ifdef __AVX512BF16__
STEP(decode_step_float32_bfloat16, float, uint16_t, add_norm_float32_bfloat16, rotate_bfloat16,
     decode_attention_bfloat16, swiglu_bfloat16, multiply_bfloat16_bfloat16)
STEP(decode_step_bfloat16_bfloat16, uint16_t, uint16_t, add_norm_bfloat16_bfloat16, rotate_bfloat16,
     decode_attention_bfloat16, swiglu_bfloat16, multiply_bfloat16_bfloat16)
#endif
