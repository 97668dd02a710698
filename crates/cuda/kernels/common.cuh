// What all kernels share: bfloat16 without headers (NVRTC has none at run time), 16-byte accesses,
// sums over a warp, and the counter-based random numbers of crates/random.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct bf16 {
  u16 bits;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }

// Rounds to nearest, ties to even.
__device__ __forceinline__ u32 round_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <class T> __device__ __forceinline__ T rounded(float x);
template <> __device__ __forceinline__ float rounded<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 rounded<bf16>(float x) { return bf16{u16(round_pair(x, 0.f))}; }

__device__ __forceinline__ float low_half(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_half(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// Values that a thread loads or stores at once: 16 bytes.
template <class T> struct Lanes;
template <> struct Lanes<float> {
  static constexpr int count = 4;
};
template <> struct Lanes<bf16> {
  static constexpr int count = 8;
};

__device__ __forceinline__ void load_lanes(const float* from, float (&to)[4]) {
  float4 v = *reinterpret_cast<const float4*>(from);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
__device__ __forceinline__ void load_lanes(const bf16* from, float (&to)[8]) {
  uint4 v = *reinterpret_cast<const uint4*>(from);
  u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) to[2 * i] = low_half(words[i]), to[2 * i + 1] = high_half(words[i]);
}
__device__ __forceinline__ void store_lanes(float* to, const float (&from)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
}
__device__ __forceinline__ void store_lanes(bf16* to, const float (&from)[8]) {
  *reinterpret_cast<uint4*>(to) = make_uint4(round_pair(from[0], from[1]), round_pair(from[2], from[3]),
                                             round_pair(from[4], from[5]), round_pair(from[6], from[7]));
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

constexpr float log2_e = 1.44269504f;
// To two units in the last place; e^x is exp_2(log2_e * x).
__device__ __forceinline__ float exp_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Philox4x32-10 (Salmon et al., SC 2011), the generator of crates/random.
struct Philox {
  u32 key0, key1;

  __device__ __forceinline__ uint4 block(u32 c0, u32 c1, u32 c2, u32 c3) const {
    u32 k0 = key0, k1 = key1;
#pragma unroll
    for (int round = 0; round < 10; round++) {
      u32 h0 = __umulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
      u32 h1 = __umulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
      c0 = h1 ^ c1 ^ k0, c1 = l1, c2 = h0 ^ c3 ^ k1, c3 = l0;
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return make_uint4(c0, c1, c2, c3);
  }
};

// The generator of one place (`site`) of one step; crates/kernels/src/noise.rs is the same on the CPU.
// Word `w` of an element is word `w % 4` of the block at counter (w / 4, its carry, batch row, plane).
__device__ __forceinline__ Philox noise_of(u64 seed, u32 step, u32 site) {
  uint4 words = Philox{u32(seed), u32(seed >> 32)}.block(site, step, 0x53574954u, 0x43485944u);
  return Philox{words.x, words.y};
}

// In [0, 1), from the upper 24 bits.
__device__ __forceinline__ float unit(u32 word) { return float(word >> 8) * (1.f / 16777216.f); }

// The same values as 16 bytes and one by one.
__device__ __forceinline__ void unpack(uint4 from, float (&to)[4]) {
  to[0] = __uint_as_float(from.x), to[1] = __uint_as_float(from.y);
  to[2] = __uint_as_float(from.z), to[3] = __uint_as_float(from.w);
}
__device__ __forceinline__ void unpack(uint4 from, float (&to)[8]) {
  u32 words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < 4; i++) to[2 * i] = low_half(words[i]), to[2 * i + 1] = high_half(words[i]);
}
__device__ __forceinline__ uint4 pack(const float (&from)[4]) {
  return make_uint4(__float_as_uint(from[0]), __float_as_uint(from[1]), __float_as_uint(from[2]),
                    __float_as_uint(from[3]));
}
__device__ __forceinline__ uint4 pack(const float (&from)[8]) {
  return make_uint4(round_pair(from[0], from[1]), round_pair(from[2], from[3]), round_pair(from[4], from[5]),
                    round_pair(from[6], from[7]));
}

// Random words of elements that follow each other in a batch row, from its element `start` on.
template <int count>
__device__ __forceinline__ void noise_words(Philox philox, u64 start, u32 row, u32 plane, u32 (&words)[count]) {
  static_assert(count % 4 == 0, "whole blocks");
  u64 block = start >> 2;
  u32 skip = u32(start) & 3;
  u32 all[count + 4];
#pragma unroll
  for (int i = 0; i < count / 4; i++, block++) {
    uint4 four = philox.block(u32(block), u32(block >> 32), row, plane);
    all[4 * i] = four.x, all[4 * i + 1] = four.y, all[4 * i + 2] = four.z, all[4 * i + 3] = four.w;
  }
  if (skip == 0) {
#pragma unroll
    for (int i = 0; i < count; i++) words[i] = all[i];
    return;
  }
  uint4 four = philox.block(u32(block), u32(block >> 32), row, plane);
  all[count] = four.x, all[count + 1] = four.y, all[count + 2] = four.z, all[count + 3] = four.w;
#pragma unroll
  for (int i = 0; i < count; i++) words[i] = skip == 1 ? all[i + 1] : skip == 2 ? all[i + 2] : all[i + 3];
}

// TokenNoise of src/noise.rs as a kernel is given it: a tensor's tokens come from consecutive batch rows,
// and of its `all_columns` columns those from `first_column` on are here.
#define TOKEN_NOISE_PARAMETERS \
  u64 seed, const u32 *step, u32 site, u32 first_row, u32 row_tokens, u32 first_column, u32 all_columns
#define TOKEN_NOISE_ARGUMENTS seed, step, site, first_row, row_tokens, first_column, all_columns

struct TokenNoise {
  Philox philox;
  u32 first_row, row_tokens, first_column, all_columns;

  __device__ __forceinline__ TokenNoise(TOKEN_NOISE_PARAMETERS)
      : philox(noise_of(seed, *step, site)), first_row(first_row), row_tokens(row_tokens),
        first_column(first_column), all_columns(all_columns) {}

  // Words of some columns of one token, from `column` of those that are here on.
  template <int count>
  __device__ __forceinline__ void words(u32 token, u32 column, u32 (&words)[count]) const {
    u64 start = u64(token % row_tokens) * all_columns + first_column + column;
    noise_words(philox, start, first_row + token / row_tokens, 0, words);
  }
};

// 0 for words whose upper 24 bits are below `first_kept`, else `kept`, which is 1 / (1 - rate).
struct Dropout {
  u32 first_kept;
  float kept;

  __device__ __forceinline__ float factor(u32 word) const { return (word >> 8) < first_kept ? 0.f : kept; }
};
