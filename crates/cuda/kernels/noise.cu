// Dropout and jitter of [tokens, width] tensors. A warp has a row, or a part of a wide one, so that the
// place of its token is found once; all its loads are under way before the first random number is drawn.

struct Jitter {
  float epsilon;

  // Each step rounded on its own, as on the CPU.
  __device__ __forceinline__ float factor(u32 word) const {
    return __fadd_rn(1.f, __fmul_rn(epsilon, 2.f * unit(word) - 1.f));
  }
};

template <class T, class Factor>
__device__ __forceinline__ void scale(const T* x, T* out, u32 tokens, u32 width, TokenNoise noise,
                                      Factor factor) {
  constexpr int lanes = Lanes<T>::count, accesses = 4;
  u32 token = blockIdx.x * 4 + threadIdx.x / 32;
  if (token >= tokens) return;
  u32 first = (blockIdx.y * accesses * 32 + threadIdx.x % 32) * lanes;
  size_t row = size_t(token) * width;
  uint4 raw[accesses];
#pragma unroll
  for (int i = 0; i < accesses; i++) {
    u32 column = first + i * 32 * lanes;
    if (column < width) raw[i] = *reinterpret_cast<const uint4*>(x + row + column);
  }
#pragma unroll
  for (int i = 0; i < accesses; i++) {
    u32 column = first + i * 32 * lanes;
    if (column < width) {
      u32 words[lanes];
      noise.words(token, column, words);
      float values[lanes];
      unpack(raw[i], values);
#pragma unroll
      for (int k = 0; k < lanes; k++) values[k] *= factor.factor(words[k]);
      *reinterpret_cast<uint4*>(out + row + column) = pack(values);
    }
  }
}

#define KERNELS(T, suffix)                                                                                \
  extern "C" __global__ void __launch_bounds__(128) dropout_##suffix(                                     \
      const T* x, T* out, u32 tokens, u32 width, TOKEN_NOISE_PARAMETERS, u32 first_kept, float kept) {    \
    scale(x, out, tokens, width, TokenNoise(TOKEN_NOISE_ARGUMENTS), Dropout{first_kept, kept});           \
  }                                                                                                       \
  extern "C" __global__ void __launch_bounds__(128)                                                       \
      jitter_##suffix(const T* x, T* out, u32 tokens, u32 width, TOKEN_NOISE_PARAMETERS, float epsilon) { \
    scale(x, out, tokens, width, TokenNoise(TOKEN_NOISE_ARGUMENTS), Jitter{epsilon});                     \
  }
KERNELS(float, f32)
KERNELS(bf16, bf16)
