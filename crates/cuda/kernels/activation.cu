// The pointwise half of feed-forward layers: activation, gate and dropout of hidden values, and the way back.
// A warp has a row or a part of one, as in noise.cu. Rows may be slots of experts, of which only some hold a
// token: the others come out as zeros and are not read.

// 1 / (1 + e^-x)
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + exp_2(-log2_e * x)); }

// Each gives its value and its derivative; those of Activation in crates/kernels/src/activation.rs.
struct Both {
  float value, derivative;
};
struct Relu {
  // Not a maximum, which would turn a NaN into 0 and hide it.
  static __device__ __forceinline__ float value(float x) { return x < 0.f ? 0.f : x; }
  static __device__ __forceinline__ Both both(float x) { return {value(x), x > 0.f ? 1.f : 0.f}; }
};
struct GeluTanh {
  // 0.5 (1 + tanh(u)) is the sigmoid of 2 u.
  static __device__ __forceinline__ float half_sum(float x) {
    return sigmoid(2.f * 0.7978846f * (x + 0.044715f * x * x * x));
  }
  static __device__ __forceinline__ float value(float x) { return x * half_sum(x); }
  static __device__ __forceinline__ Both both(float x) {
    float s = half_sum(x), inner = 0.7978846f * (1.f + 3.f * 0.044715f * x * x);
    return {x * s, s + 2.f * x * s * (1.f - s) * inner};
  }
};
struct Gelu {
  static __device__ __forceinline__ float cdf(float x) { return 0.5f * erfcf(-0.70710678f * x); }
  static __device__ __forceinline__ float value(float x) { return x * cdf(x); }
  static __device__ __forceinline__ Both both(float x) {
    float c = cdf(x);
    return {x * c, c + x * 0.3989423f * exp_2(-0.5f * log2_e * x * x)};
  }
};
struct Silu {
  static __device__ __forceinline__ float value(float x) { return x * sigmoid(x); }
  static __device__ __forceinline__ Both both(float x) {
    float s = sigmoid(x);
    return {x * s, s * (1.f + x * (1.f - s))};
  }
};

// Rows and columns of hidden values, which rows hold a token, and the dropout of all.
#define HIDDEN_PARAMETERS                                                                              \
  u32 rows, u32 width, const int *used, u32 segment_rows, TOKEN_NOISE_PARAMETERS, const uint2 *places, \
      u32 plane_rows, u32 first_plane, u32 first_kept, float kept
#define HIDDEN_ARGUMENTS \
  rows, width, used, segment_rows, TOKEN_NOISE_ARGUMENTS, places, plane_rows, first_plane, first_kept, kept

// The dropout of one row. Without a step there is nothing to draw, and all is multiplied by `kept`.
struct RowDropout {
  Philox philox;
  bool draws;
  u32 row, plane;
  u64 start;
  Dropout dropout;

  __device__ __forceinline__ RowDropout(u32 at, TOKEN_NOISE_PARAMETERS, const uint2* places, u32 plane_rows,
                                        u32 first_plane, u32 first_kept, float kept)
      : philox{0, 0}, draws(step != nullptr), row(0), plane(0), start(0), dropout{first_kept, kept} {
    if (!draws) return;
    philox = noise_of(seed, *step, site);
    u32 token;
    if (places) {
      uint2 place = places[at];
      row = place.x, token = place.y, plane = first_plane + at / plane_rows;
    } else {
      row = first_row + at / row_tokens, token = at % row_tokens;
    }
    start = u64(token) * all_columns + first_column;
  }

  template <int lanes> __device__ __forceinline__ void apply(u32 column, float (&values)[lanes]) const {
    if (draws) {
      u32 words[lanes];
      noise_words(philox, start + column, row, plane, words);
#pragma unroll
      for (int k = 0; k < lanes; k++) values[k] *= dropout.factor(words[k]);
    } else {
#pragma unroll
      for (int k = 0; k < lanes; k++) values[k] *= dropout.kept;
    }
  }
};

// What a thread has of its row: `accesses` pieces of 16 bytes, those of a warp side by side.
template <class T, int accesses> struct Columns {
  static constexpr int lanes = Lanes<T>::count;
  u32 row, first, width;
  bool empty;

  __device__ __forceinline__ Columns(u32 rows, u32 width, const int* used, u32 segment_rows)
      : row(blockIdx.x * 4 + threadIdx.x / 32),
        first((blockIdx.y * accesses * 32 + threadIdx.x % 32) * lanes),
        width(row < rows ? width : 0),
        empty(row < rows && used && int(row % segment_rows) >= used[row / segment_rows]) {}

  __device__ __forceinline__ u32 column(int i) const { return first + i * 32 * lanes; }

  __device__ __forceinline__ void load(const T* from, size_t stride, uint4 (&raw)[accesses]) const {
    const T* at = from + row * stride;
#pragma unroll
    for (int i = 0; i < accesses; i++)
      if (column(i) < width) raw[i] = *reinterpret_cast<const uint4*>(at + column(i));
  }
  __device__ __forceinline__ void clear(T* to, size_t stride) const {
#pragma unroll
    for (int i = 0; i < accesses; i++)
      if (column(i) < width)
        *reinterpret_cast<uint4*>(to + row * stride + column(i)) = make_uint4(0, 0, 0, 0);
  }
};

// out = dropout(act(x) linear), or dropout(act(x)) without `linear`.
template <class Activation, class T>
__device__ __forceinline__ void activate(const T* x, const T* linear, u64 in_stride, T* out,
                                         HIDDEN_PARAMETERS) {
  constexpr int lanes = Lanes<T>::count, accesses = 4;
  Columns<T, accesses> columns(rows, width, used, segment_rows);
  if (columns.width == 0) return;
  if (columns.empty) return columns.clear(out, width);
  uint4 xs[accesses], factors[accesses];
  columns.load(x, in_stride, xs);
  if (linear) columns.load(linear, in_stride, factors);
  RowDropout dropout(columns.row, TOKEN_NOISE_ARGUMENTS, places, plane_rows, first_plane, first_kept, kept);
#pragma unroll
  for (int i = 0; i < accesses; i++) {
    u32 column = columns.column(i);
    if (column >= width) continue;
    float values[lanes], others[lanes];
    unpack(xs[i], values);
#pragma unroll
    for (int k = 0; k < lanes; k++) values[k] = Activation::value(values[k]);
    if (linear) {
      unpack(factors[i], others);
#pragma unroll
      for (int k = 0; k < lanes; k++) values[k] *= others[k];
    }
    if (dropout.draws) {
      unpack(pack(values), values);
      dropout.apply(column, values);
    }
    *reinterpret_cast<uint4*>(out + size_t(columns.row) * width + column) = pack(values);
  }
}

// From the gradient of what `activate` wrote, those of `x` and, if there was one, of `linear`.
template <class Activation, class T>
__device__ __forceinline__ void activate_backward(const T* gradient, const T* x, const T* linear,
                                                  u64 in_stride, T* gx, T* g_linear, u64 out_stride,
                                                  HIDDEN_PARAMETERS) {
  constexpr int lanes = Lanes<T>::count, accesses = 2;
  Columns<T, accesses> columns(rows, width, used, segment_rows);
  if (columns.width == 0) return;
  if (columns.empty) {
    columns.clear(gx, out_stride);
    if (linear) columns.clear(g_linear, out_stride);
    return;
  }
  uint4 gs[accesses], xs[accesses], factors[accesses];
  columns.load(gradient, width, gs);
  columns.load(x, in_stride, xs);
  if (linear) columns.load(linear, in_stride, factors);
  RowDropout dropout(columns.row, TOKEN_NOISE_ARGUMENTS, places, plane_rows, first_plane, first_kept, kept);
#pragma unroll
  for (int i = 0; i < accesses; i++) {
    u32 column = columns.column(i);
    if (column >= width) continue;
    float values[lanes], gradients[lanes], others[lanes];
    unpack(gs[i], gradients);
    dropout.apply(column, gradients);
    unpack(pack(gradients), gradients);
    unpack(xs[i], values);
    size_t at = columns.row * out_stride + column;
    if (linear) {
      unpack(factors[i], others);
      float linears[lanes];
#pragma unroll
      for (int k = 0; k < lanes; k++) {
        Both both = Activation::both(values[k]);
        values[k] = gradients[k] * others[k] * both.derivative;
        linears[k] = gradients[k] * both.value;
      }
      *reinterpret_cast<uint4*>(g_linear + at) = pack(linears);
    } else {
#pragma unroll
      for (int k = 0; k < lanes; k++) values[k] = gradients[k] * Activation::both(values[k]).derivative;
    }
    *reinterpret_cast<uint4*>(gx + at) = pack(values);
  }
}

// Rows without a token become zeros, the others stay. `vectors` are the 16-byte accesses of a row.
extern "C" __global__ void __launch_bounds__(128)
clear_empty(uint4* values, u32 rows, u32 vectors, const int* used, u32 segment_rows) {
  u32 row = blockIdx.x * 4 + threadIdx.x / 32;
  if (row >= rows || int(row % segment_rows) < used[row / segment_rows]) return;
  for (u32 v = threadIdx.x % 32; v < vectors; v += 32) values[u64(row) * vectors + v] = make_uint4(0, 0, 0, 0);
}

#define KERNELS(T, suffix, Activation, name)                                                         \
  extern "C" __global__ void __launch_bounds__(128)                                                  \
      name##_##suffix(const T* x, const T* linear, u64 in_stride, T* out, HIDDEN_PARAMETERS) {       \
    activate<Activation>(x, linear, in_stride, out, HIDDEN_ARGUMENTS);                               \
  }                                                                                                  \
  extern "C" __global__ void __launch_bounds__(128)                                                  \
      name##_backward_##suffix(const T* gradient, const T* x, const T* linear, u64 in_stride, T* gx, \
                               T* g_linear, u64 out_stride, HIDDEN_PARAMETERS) {                     \
    activate_backward<Activation>(gradient, x, linear, in_stride, gx, g_linear, out_stride,          \
                                  HIDDEN_ARGUMENTS);                                                 \
  }
#define ACTIVATIONS(T, suffix)            \
  KERNELS(T, suffix, Relu, relu)          \
  KERNELS(T, suffix, GeluTanh, gelu_tanh) \
  KERNELS(T, suffix, Gelu, gelu)          \
  KERNELS(T, suffix, Silu, silu)
ACTIVATIONS(float, f32)
ACTIVATIONS(bf16, bf16)
