// Sums and conversions of whole buffers, whatever their shape. A thread has two pieces of 8 values, a block
// apart, and the last thread of all what is left.

constexpr u32 block = 256, pieces = 2;

__device__ __forceinline__ void load_piece(const float* from, float (&to)[8]) {
  float4 a = *reinterpret_cast<const float4*>(from), b = *reinterpret_cast<const float4*>(from + 4);
  to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}
__device__ __forceinline__ void load_piece(const bf16* from, float (&to)[8]) { load_lanes(from, to); }
__device__ __forceinline__ void store_piece(float* to, const float (&from)[8]) {
  *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
  *reinterpret_cast<float4*>(to + 4) = make_float4(from[4], from[5], from[6], from[7]);
}
__device__ __forceinline__ void store_piece(bf16* to, const float (&from)[8]) { store_lanes(to, from); }

// out[i] = f(a[i], b[i]); `b` may be `a`.
template <bool two, class A, class Out, class F>
__device__ __forceinline__ void map(const A* a, const A* b, Out* out, u64 len, F f) {
  u64 first = u64(blockIdx.x) * block * pieces + threadIdx.x;
  float x[pieces][8], y[pieces][8];
#pragma unroll
  for (u32 i = 0; i < pieces; i++) {
    u64 at = (first + i * block) * 8;
    if (at + 8 <= len) {
      load_piece(a + at, x[i]);
      if (two) load_piece(b + at, y[i]);
    }
  }
#pragma unroll
  for (u32 i = 0; i < pieces; i++) {
    u64 at = (first + i * block) * 8;
    if (at + 8 <= len) {
#pragma unroll
      for (int k = 0; k < 8; k++) x[i][k] = f(x[i][k], two ? y[i][k] : 0.f);
      store_piece(out + at, x[i]);
    } else {
#pragma unroll 1
      for (; at < len; at++) out[at] = rounded<Out>(f(widen(a[at]), two ? widen(b[at]) : 0.f));
    }
  }
}

#define ADD(T, suffix)                                                 \
  extern "C" __global__ void __launch_bounds__(block)                  \
      add_##suffix(const T* a, const T* b, T* out, u64 len) {          \
    map<true>(a, b, out, len, [](float x, float y) { return x + y; }); \
  }
ADD(float, f32)
ADD(bf16, bf16)
#define CONVERT(From, To, names)                                                                         \
  extern "C" __global__ void __launch_bounds__(block) convert_##names(const From* a, To* out, u64 len) { \
    map<false>(a, a, out, len, [](float x, float) { return x; });                                        \
  }
CONVERT(float, bf16, f32_bf16)
CONVERT(bf16, float, bf16_f32)
