// Routing: logits to choices, slots and gates in two launches, and gradients back to the logits in one.
//
// A tile is up to TILE consecutive tokens of one group. The first launch knows a tile at a time: choices,
// gates, and how often each expert was chosen. In the second, every tile adds up the counts of those before
// it, so a token's slot follows from counting alone. Whole numbers are counted in any order; sums of
// fractions have a fixed one.

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int TILE = 128;
// Threads of a block that places a tile's tokens, and experts of one that makes means.
constexpr int PLACERS = 512, CHUNK = 32;
// Both choices of a tile are ranked by warps of their own, each with a row of counts.
static_assert(2 * TILE <= PLACERS && 2 * TILE / 32 <= WARPS, "a row of counts for every warp that ranks");
constexpr u32 ALL = 0xffffffffu;

extern __shared__ float shared[];

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

__device__ __forceinline__ void load_four(const float* from, float* to) {
  float4 v = *reinterpret_cast<const float4*>(from);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
__device__ __forceinline__ void load_four(const bf16* from, float* to) {
  uint2 v = *reinterpret_cast<const uint2*>(from);
  to[0] = low_half(v.x), to[1] = high_half(v.x), to[2] = low_half(v.y), to[3] = high_half(v.y);
}
__device__ __forceinline__ void store_four(float* to, const float* from) {
  *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
}
__device__ __forceinline__ void store_four(bf16* to, const float* from) {
  *reinterpret_cast<uint2*>(to) = make_uint2(round_pair(from[0], from[1]), round_pair(from[2], from[3]));
}

template <int LANES> __device__ __forceinline__ float lanes_sum(float x) {
#pragma unroll
  for (int offset = LANES / 2; offset; offset >>= 1) x += __shfl_xor_sync(ALL, x, offset);
  return x;
}
template <int LANES> __device__ __forceinline__ float lanes_max(float x) {
#pragma unroll
  for (int offset = LANES / 2; offset; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(ALL, x, offset));
  return x;
}

// Values of one token, one an expert, over LANES neighbouring lanes: lane `sub` has expert
// `(k * LANES + sub) * 4 + i` at `v[4 * k + i]`. Every lane of a warp must take part in what is done.
template <class T, int LANES, int K> struct Row {
  float v[4 * K];

  static __device__ __forceinline__ u32 sub() { return threadIdx.x % LANES; }
  static __device__ __forceinline__ u32 expert(int k, int i) { return (k * LANES + sub()) * 4 + i; }

  // What lies past the last expert, or belongs to no token, counts as minus infinity.
  __device__ __forceinline__ void load(const T* row, u32 experts, bool present) {
#pragma unroll
    for (int k = 0; k < K; k++) {
#pragma unroll
      for (int i = 0; i < 4; i++) v[4 * k + i] = minus_infinity();
      if (present && experts % 4 == 0) {
        if (expert(k, 0) < experts) load_four(row + expert(k, 0), v + 4 * k);
      } else if (present) {
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (expert(k, i) < experts) v[4 * k + i] = widen(row[expert(k, i)]);
      }
    }
  }

  __device__ __forceinline__ void store(T* row, u32 experts) const {
#pragma unroll
    for (int k = 0; k < K; k++) {
      if (experts % 4 == 0) {
        if (expert(k, 0) < experts) store_four(row + expert(k, 0), v + 4 * k);
      } else {
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (expert(k, i) < experts) row[expert(k, i)] = rounded<T>(v[4 * k + i]);
      }
    }
  }

  // Makes probabilities of logits, rounded to the format of the logits.
  __device__ __forceinline__ void softmax(float& log_z, float& entropy) {
    float largest = minus_infinity();
#pragma unroll
    for (int i = 0; i < 4 * K; i++) largest = fmaxf(largest, v[i]);
    largest = lanes_max<LANES>(largest);
    float total = 0.f, product = 0.f;
#pragma unroll
    for (int i = 0; i < 4 * K; i++) {
      float logit = v[i];
      v[i] = expf(logit - largest);
      total += v[i];
      product += logit == minus_infinity() ? 0.f : v[i] * logit;
    }
    total = lanes_sum<LANES>(total);
    product = lanes_sum<LANES>(product);
    log_z = largest + logf(total);
    // -sum p ln p, with ln p = logit - log_z; rounding may leave it just below 0.
    entropy = fmaxf(log_z - product / total, 0.f);
#pragma unroll
    for (int i = 0; i < 4 * K; i++) v[i] = widen(rounded<T>(v[i] / total));
  }

  // Expert with the largest value other than `except`, the lowest on ties. Where values are not numbers:
  // the lowest there is.
  __device__ __forceinline__ u32 argmax(u32 experts, u32 except) const {
    float most = -1.f;
    u32 at = ALL;
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (v[4 * k + i] > most && expert(k, i) != except) most = v[4 * k + i], at = expert(k, i);
#pragma unroll
    for (int offset = LANES / 2; offset; offset >>= 1) {
      float other = __shfl_xor_sync(ALL, most, offset);
      u32 other_at = __shfl_xor_sync(ALL, at, offset);
      if (other > most || (other == most && other_at < at)) most = other, at = other_at;
    }
    return at < experts ? at : (except == 0 ? 1 : 0);
  }

  // Value of `of`, the same expert for all lanes of a token.
  __device__ __forceinline__ float at(u32 of) const {
    float mine = 0.f;
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (expert(k, i) == of) mine = v[4 * k + i];
    return __shfl_sync(ALL, mine, of / 4 % LANES, LANES);
  }
};

// Choices, gates and entropy of a tile's tokens, and its counts and sums. Empties all slots.
template <class T, int LANES, int K>
__device__ __forceinline__ void scores(const T* logits, const int* mask, u32 experts, u32 group_tokens,
                                       u32 group_tiles, u32 tiles, u32 choices, u32 balanced, u32 slots,
                                       int* choice, int* second, float* entropy, int* token_of_slot,
                                       float* gates, float* gate_of_choice, u32* tile_counts,
                                       float* tile_sums, float* tile_z, u32* tile_counted) {
  __shared__ float z_of_warp[WARPS];
  __shared__ u32 counted_of_warp[WARPS];
  float* sums = shared;
  u32* counts = reinterpret_cast<u32*>(shared + experts);
  for (u32 slot = blockIdx.x * THREADS + threadIdx.x; slot < slots; slot += gridDim.x * THREADS) {
    token_of_slot[slot] = -1;
    gates[slot] = 0.f;
  }
  u32 tile = blockIdx.x;
  if (tile >= tiles) return;
  for (u32 i = threadIdx.x; i < experts; i += THREADS) sums[i] = 0.f;
  for (u32 i = threadIdx.x; i < experts * choices; i += THREADS) counts[i] = 0;
  __syncthreads();

  u32 begin = tile % group_tiles * TILE, first = tile / group_tiles * group_tokens + begin;
  u32 present = min(u32(TILE), group_tokens - begin);
  constexpr int AT_ONCE = THREADS / LANES, PASSES = TILE / AT_ONCE;
  constexpr int BATCH = K > 2 ? 1 : (PASSES < 4 / K ? PASSES : 4 / K);
  u32 sub = Row<T, LANES, K>::sub();
  float of_expert[4 * K] = {};
  float z = 0.f;
  u32 counted_tokens = 0;
  for (int pass = 0; pass < PASSES; pass += BATCH) {
    if (pass * AT_ONCE >= present) break;
    Row<T, LANES, K> rows[BATCH];
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      u32 local = (pass + b) * AT_ONCE + threadIdx.x / LANES;
      rows[b].load(logits + u64(first + local) * experts, experts, local < present);
    }
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      Row<T, LANES, K>& p = rows[b];
      u32 local = (pass + b) * AT_ONCE + threadIdx.x / LANES, token = first + local;
      bool counted = local < present && (!mask || mask[token] != 0);
      float log_z, nats;
      p.softmax(log_z, nats);
      u32 best = balanced ? token % experts : p.argmax(experts, ALL), other = 0;
      float gate = p.at(best), other_gate = 0.f;
      if (choices == 2) {
        other = balanced ? (best + 1) % experts : p.argmax(experts, best);
        other_gate = p.at(other);
        float both = gate + other_gate;
        gate /= both, other_gate /= both;
      }
      if (sub == 0 && local < present) {
        choice[token] = counted ? int(best) : -1;
        entropy[token] = counted ? nats : 0.f;
        gate_of_choice[u64(token) * choices] = widen(rounded<T>(gate));
        if (choices == 2) {
          second[token] = counted ? int(other) : -1;
          gate_of_choice[u64(token) * 2 + 1] = widen(rounded<T>(other_gate));
        }
      }
      if (counted) {
        if (sub == 0) {
          atomicAdd(&counts[best], 1u);
          if (choices == 2) atomicAdd(&counts[experts + other], 1u);
          z += log_z * log_z;
          counted_tokens++;
        }
#pragma unroll
        for (int i = 0; i < 4 * K; i++) of_expert[i] += p.v[i];
      }
    }
  }

#pragma unroll
  for (int i = 0; i < 4 * K; i++)
#pragma unroll
    for (int offset = LANES; offset < 32; offset <<= 1)
      of_expert[i] += __shfl_xor_sync(ALL, of_expert[i], offset);
  z = warp_sum(z);
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) counted_tokens += __shfl_xor_sync(ALL, counted_tokens, offset);
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane == 0) z_of_warp[warp] = z, counted_of_warp[warp] = counted_tokens;
  for (u32 turn = 0; turn < WARPS; turn++) {
    if (warp == turn && lane < LANES) {
#pragma unroll
      for (int k = 0; k < K; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          u32 expert = Row<T, LANES, K>::expert(k, i);
          if (expert < experts) sums[expert] += of_expert[4 * k + i];
        }
    }
    __syncthreads();
  }
  for (u32 i = threadIdx.x; i < experts; i += THREADS) tile_sums[u64(tile) * experts + i] = sums[i];
  for (u32 i = threadIdx.x; i < experts * choices; i += THREADS)
    tile_counts[u64(tile) * experts * choices + i] = counts[i];
  if (threadIdx.x == 0) {
    float z_of_tile = 0.f;
    u32 counted_of_tile = 0;
    for (int w = 0; w < WARPS; w++) z_of_tile += z_of_warp[w], counted_of_tile += counted_of_warp[w];
    tile_z[tile] = z_of_tile;
    tile_counted[tile] = counted_of_tile;
  }
}

// Means of one group for up to CHUNK experts: probabilities and shares of first choices; and z.
__device__ __forceinline__ void group_means(u32 group, u32 chunk, u32 experts, u32 group_tiles, u32 choices,
                                            const u32* tile_counts, const float* tile_sums,
                                            const float* tile_z, const u32* tile_counted, float* mean,
                                            float* fraction, float* z, int* counted) {
  constexpr u32 PARTS = PLACERS / CHUNK;
  __shared__ float share, sums[PARTS][CHUNK];
  __shared__ u32 counts[PARTS][CHUNK];
  u32 tile0 = group * group_tiles, expert = chunk * CHUNK + threadIdx.x % CHUNK, part = threadIdx.x / CHUNK;
  float sum = 0.f;
  u32 count = 0;
  if (expert < experts) {
#pragma unroll 4
    for (u32 tile = part; tile < group_tiles; tile += PARTS) {
      sum += tile_sums[u64(tile0 + tile) * experts + expert];
      count += tile_counts[u64(tile0 + tile) * experts * choices + expert];
    }
  }
  sums[part][threadIdx.x % CHUNK] = sum, counts[part][threadIdx.x % CHUNK] = count;
  if (threadIdx.x < 32) {
    float z_sum = 0.f;
    u32 total = 0;
    for (u32 tile = threadIdx.x; tile < group_tiles; tile += 32)
      z_sum += tile_z[tile0 + tile], total += tile_counted[tile0 + tile];
    z_sum = warp_sum(z_sum);
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) total += __shfl_xor_sync(ALL, total, offset);
    if (threadIdx.x == 0) {
      share = 1.f / float(max(total, 1u));
      if (chunk == 0) z[group] = z_sum * share, counted[group] = int(total);
    }
  }
  __syncthreads();
  if (threadIdx.x >= CHUNK || expert >= experts) return;
  sum = 0.f, count = 0;
  for (u32 p = 0; p < PARTS; p++) sum += sums[p][threadIdx.x], count += counts[p][threadIdx.x];
  mean[u64(group) * experts + expert] = sum * share;
  fraction[u64(group) * experts + expert] = float(count) * share;
}

// The first blocks make the groups' means, one for every CHUNK experts of a group; each of the others gives
// one tile's tokens their slots, and the last one says how many slots of each expert are in use.
extern "C" __global__ void __launch_bounds__(PLACERS)
route_place(u32 experts, u32 groups, u32 group_tokens, u32 group_tiles, u32 choices, u32 capacity,
            const int* choice, const int* second, const float* gate_of_choice, const u32* tile_counts,
            const float* tile_sums, const float* tile_z, const u32* tile_counted, int* token_of_slot,
            int* slot_of_token, float* gates, int* rows_used, float* mean, float* fraction, float* z,
            int* counted) {
  u32 chunks = (experts + CHUNK - 1) / CHUNK;
  if (blockIdx.x < groups * chunks) {
    group_means(blockIdx.x / chunks, blockIdx.x % chunks, experts, group_tiles, choices, tile_counts,
                tile_sums, tile_z, tile_counted, mean, fraction, z, counted);
    return;
  }
  bool last = blockIdx.x == gridDim.x - 1;
  u32 tile = blockIdx.x - groups * chunks;
  u32 group = group_tiles ? tile / group_tiles : groups - 1, in_group = group_tiles ? tile % group_tiles : 0;
  u32 row = experts * choices;
  // Slots that earlier groups take; then for each choice those who come before the tile, and all so far.
  u32* base = reinterpret_cast<u32*>(shared);
  u32 *before = base + experts, *total = before + row;
  u8* of_warp = reinterpret_cast<u8*>(total + row);
  for (u32 i = threadIdx.x; i < experts + 2 * row; i += PLACERS) base[i] = 0;
  for (u32 i = threadIdx.x; i < experts * WARPS; i += PLACERS) of_warp[i] = 0;
  __syncthreads();

  u32 parts = max(1u, PLACERS / experts);
  u32 tile0 = group * group_tiles;
  // Second choices wait for all first ones of the group.
  u32 seen = choices == 2 ? group_tiles : min(in_group + 1, group_tiles);
  for (u32 i = threadIdx.x; i < experts * parts; i += PLACERS) {
    u32 expert = i % experts, part = i / experts, taken = 0;
    for (u32 earlier = part; earlier < group; earlier += parts) {
      u32 count = 0;
#pragma unroll 4
      for (u32 t = 0; t < group_tiles; t++) {
        const u32* counts = tile_counts + u64(earlier * group_tiles + t) * row + expert;
        count += counts[0];
        if (choices == 2) count += counts[experts];
      }
      taken += min(count, capacity);
    }
    if (taken) atomicAdd(&base[expert], taken);
    u32 first_before = 0, first_total = 0, second_before = 0, second_total = 0;
#pragma unroll 8
    for (u32 t = part; t < seen; t += parts) {
      const u32* counts = tile_counts + u64(tile0 + t) * row + expert;
      u32 count = counts[0], other = choices == 2 ? counts[experts] : 0;
      first_total += count, second_total += other;
      if (t < in_group) first_before += count, second_before += other;
    }
    atomicAdd(&before[expert], first_before);
    atomicAdd(&total[expert], first_total);
    if (choices == 2) {
      atomicAdd(&before[experts + expert], second_before);
      atomicAdd(&total[experts + expert], second_total);
    }
  }

  // A warp has 32 tokens of one choice; those with the same expert are ranked among themselves.
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, which = threadIdx.x / TILE;
  u32 local = in_group * TILE + threadIdx.x % TILE, token = group * group_tokens + local;
  bool present = which < choices && local < group_tokens;
  int chosen = present ? (which == 0 ? choice : second)[token] : -1;
  u32 alike = __match_any_sync(ALL, chosen), earlier = alike & ((1u << lane) - 1u);
  if (chosen >= 0 && !earlier) of_warp[warp * experts + chosen] = u8(__popc(alike));
  __syncthreads();
  if (present) {
    int slot = -1;
    if (chosen >= 0) {
      u32 rank = __popc(earlier) + before[which * experts + chosen];
      for (u32 w = which * (TILE / 32); w < warp; w++) rank += of_warp[w * experts + chosen];
      if (which == 1) rank += total[chosen];
      if (rank < capacity) {
        slot = int(u32(chosen) * groups * capacity + base[chosen] + rank);
        token_of_slot[slot] = int(token);
        gates[slot] = gate_of_choice[u64(token) * choices + which];
      }
    }
    slot_of_token[u64(token) * choices + which] = slot;
  }
  if (last) {
    for (u32 expert = threadIdx.x; expert < experts; expert += PLACERS) {
      u32 count = total[expert] + (choices == 2 ? total[experts + expert] : 0);
      rows_used[expert] = int(base[expert] + min(count, capacity));
    }
  }
}

// Gradient of the logits from those of the gates, the mean probabilities and z; probabilities are made anew.
template <class T, int LANES, int K>
__device__ __forceinline__ void backward(const T* logits, u32 tokens, u32 experts, u32 group_tokens,
                                         u32 choices, const int* choice, const int* second,
                                         const int* slot_of_token, const int* counted, const float* of_gates,
                                         const float* of_mean, const float* of_z, T* gradient) {
  u32 token = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
  bool present = token < tokens;
  u32 place = present ? token : 0;
  Row<T, LANES, K> p;
  p.load(logits + u64(place) * experts, experts, present);
  int first = present ? choice[place] : -1;
  u32 group = place / group_tokens;
  bool routed = first >= 0;
  float share = routed ? 1.f / float(counted[group]) : 0.f;
  float log_z, nats;
  p.softmax(log_z, nats);

  u32 a = routed ? u32(first) : 0, b = ALL;
  float of_a = 0.f, of_b = 0.f;
  if (routed && of_gates) {
    int slot = slot_of_token[u64(place) * choices];
    of_a = slot >= 0 ? of_gates[slot] : 0.f;
  }
  if (choices == 2) {
    b = routed ? u32(second[place]) : 0;
    if (routed && of_gates) {
      int slot = slot_of_token[u64(place) * 2 + 1];
      of_b = slot >= 0 ? of_gates[slot] : 0.f;
    }
    // Of pa / (pa + pb) and pb / (pa + pb).
    float pa = p.at(a), pb = p.at(b), both = pa + pb;
    float common = routed ? (of_a - of_b) / (both * both) : 0.f;
    of_a = common * pb, of_b = -common * pa;
  }
  float of_p[4 * K], product = 0.f;
#pragma unroll
  for (int k = 0; k < K; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      u32 expert = p.expert(k, i);
      float g = expert == a ? of_a : 0.f;
      if (expert == b) g = of_b;
      if (routed && of_mean && expert < experts) g += share * of_mean[u64(group) * experts + expert];
      of_p[4 * k + i] = g;
      product += p.v[4 * k + i] * g;
    }
  product = lanes_sum<LANES>(product);
  if (!present) return;
  float through_z = routed && of_z ? 2.f * log_z * share * of_z[group] : 0.f;
#pragma unroll
  for (int i = 0; i < 4 * K; i++) p.v[i] = routed ? p.v[i] * (of_p[i] - product + through_z) : 0.f;
  p.store(gradient + u64(token) * experts, experts);
}

#define ROUTE(T, LANES, K, SUFFIX)                                                                         \
  extern "C" __global__ void __launch_bounds__(THREADS) route_scores_##LANES##x##K##_##SUFFIX(             \
      const T* logits, const int* mask, u32 experts, u32 group_tokens, u32 group_tiles, u32 tiles,         \
      u32 choices, u32 balanced, u32 slots, int* choice, int* second, float* entropy, int* token_of_slot,  \
      float* gates, float* gate_of_choice, u32* tile_counts, float* tile_sums, float* tile_z,              \
      u32* tile_counted) {                                                                                 \
    scores<T, LANES, K>(logits, mask, experts, group_tokens, group_tiles, tiles, choices, balanced, slots, \
                        choice, second, entropy, token_of_slot, gates, gate_of_choice, tile_counts,        \
                        tile_sums, tile_z, tile_counted);                                                  \
  }                                                                                                        \
  extern "C" __global__ void __launch_bounds__(THREADS) route_backward_##LANES##x##K##_##SUFFIX(           \
      const T* logits, u32 tokens, u32 experts, u32 group_tokens, u32 choices, const int* choice,          \
      const int* second, const int* slot_of_token, const int* counted, const float* of_gates,              \
      const float* of_mean, const float* of_z, T* gradient) {                                              \
    backward<T, LANES, K>(logits, tokens, experts, group_tokens, choices, choice, second, slot_of_token,   \
                          counted, of_gates, of_mean, of_z, gradient);                                     \
  }
#define ROUTE_SIZES(T, SUFFIX) \
  ROUTE(T, 2, 1, SUFFIX)       \
  ROUTE(T, 8, 1, SUFFIX)       \
  ROUTE(T, 16, 1, SUFFIX)      \
  ROUTE(T, 32, 1, SUFFIX)      \
  ROUTE(T, 32, 2, SUFFIX)      \
  ROUTE(T, 32, 4, SUFFIX)      \
  ROUTE(T, 32, 16, SUFFIX)
ROUTE_SIZES(float, f32)
ROUTE_SIZES(bf16, bf16)
