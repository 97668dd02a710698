// Rows into the slots of experts and back. A warp moves one row, four 16-byte accesses of a lane in flight.

constexpr int ROWS = 8, THREADS = 32 * ROWS;
constexpr int FLIGHT = 4;

__device__ __forceinline__ void load_some(const uint4* row, u32 begin, u32 vectors, uint4 (&to)[FLIGHT]) {
#pragma unroll
  for (int i = 0; i < FLIGHT; i++)
    if (begin + 32 * i < vectors) to[i] = row[begin + 32 * i];
}
__device__ __forceinline__ void store_some(uint4* row, u32 begin, u32 vectors, const uint4 (&from)[FLIGHT]) {
#pragma unroll
  for (int i = 0; i < FLIGHT; i++)
    if (begin + 32 * i < vectors) row[begin + 32 * i] = from[i];
}

__device__ __forceinline__ u32 row_of_warp() { return blockIdx.x * ROWS + threadIdx.x / 32; }

// Copies bits, so the format does not matter. `vectors` are those of a row.
extern "C" __global__ void __launch_bounds__(THREADS)
dispatch(const uint4* tokens, const int* token_of_slot, u32 slots, u32 vectors, uint4* out) {
  u32 slot = row_of_warp();
  if (slot >= slots) return;
  int token = token_of_slot[slot];
  const uint4* row = tokens + u64(max(token, 0)) * vectors;
  out += u64(slot) * vectors;
  for (u32 v = threadIdx.x % 32; v < vectors; v += 32 * FLIGHT) {
    uint4 held[FLIGHT] = {};
    if (token >= 0) load_some(row, v, vectors, held);
    store_some(out, v, vectors, held);
  }
}

// out[token] = onto[token] + sum over the token's slots of gates[slot] * rows[slot], the lowest slot first;
// no `onto` is 0, no `gates` are 1. `out` may be `onto`.
template <class T, int CHOICES>
__device__ __forceinline__ void gather(const uint4* rows, const float* gates, const uint4* onto,
                                       const int* slot_of_token, u32 tokens, u32 vectors, uint4* out) {
  u32 token = row_of_warp();
  if (token >= tokens) return;
  int slot[CHOICES];
  float gate[CHOICES];
#pragma unroll
  for (int c = 0; c < CHOICES; c++) slot[c] = slot_of_token[u64(token) * CHOICES + c];
  if (CHOICES == 2 && slot[0] > slot[CHOICES - 1]) {
    int high = slot[0];
    slot[0] = slot[CHOICES - 1], slot[CHOICES - 1] = high;
  }
#pragma unroll
  for (int c = 0; c < CHOICES; c++) gate[c] = slot[c] >= 0 && gates ? gates[slot[c]] : 1.f;
  for (u32 v = threadIdx.x % 32; v < vectors; v += 32 * FLIGHT) {
    uint4 sum[FLIGHT] = {}, held[CHOICES][FLIGHT] = {};
    if (onto) load_some(onto + u64(token) * vectors, v, vectors, sum);
#pragma unroll
    for (int c = 0; c < CHOICES; c++)
      if (slot[c] >= 0) load_some(rows + u64(slot[c]) * vectors, v, vectors, held[c]);
#pragma unroll
    for (int i = 0; i < FLIGHT; i++) {
      float of_sum[Lanes<T>::count], of_row[Lanes<T>::count];
      unpack(sum[i], of_sum);
#pragma unroll
      for (int c = 0; c < CHOICES; c++) {
        if (slot[c] < 0) continue;
        unpack(held[c][i], of_row);
#pragma unroll
        for (int j = 0; j < Lanes<T>::count; j++) of_sum[j] += gate[c] * of_row[j];
      }
      sum[i] = pack(of_sum);
    }
    store_some(out + u64(token) * vectors, v, vectors, sum);
  }
}

// Per slot: gate * gradient[token] for the expert's output, and the gate's own gradient, their inner product.
template <class T>
__device__ __forceinline__ void combine_backward(const uint4* gradient, const uint4* outputs,
                                                 const float* gates, const int* token_of_slot, u32 slots,
                                                 u32 vectors, uint4* of_outputs, float* of_gates) {
  u32 slot = row_of_warp();
  if (slot >= slots) return;
  int token = token_of_slot[slot];
  float gate = gates[slot], product = 0.f;
  const uint4* from = gradient + u64(max(token, 0)) * vectors;
  outputs += u64(slot) * vectors;
  of_outputs += u64(slot) * vectors;
  for (u32 v = threadIdx.x % 32; v < vectors; v += 32 * FLIGHT) {
    uint4 g[FLIGHT] = {}, output[FLIGHT] = {};
    if (token >= 0) {
      load_some(from, v, vectors, g);
      load_some(outputs, v, vectors, output);
#pragma unroll
      for (int i = 0; i < FLIGHT; i++) {
        float of_g[Lanes<T>::count], of_output[Lanes<T>::count];
        unpack(g[i], of_g);
        unpack(output[i], of_output);
#pragma unroll
        for (int j = 0; j < Lanes<T>::count; j++) {
          product += of_g[j] * of_output[j];
          of_g[j] *= gate;
        }
        g[i] = pack(of_g);
      }
    }
    store_some(of_outputs, v, vectors, g);
  }
  product = warp_sum(product);
  if (threadIdx.x % 32 == 0) of_gates[slot] = product;
}

#define GATHER(T, CHOICES, SUFFIX)                                                                        \
  extern "C" __global__ void __launch_bounds__(THREADS) gather_##CHOICES##_##SUFFIX(                      \
      const uint4* rows, const float* gates, const uint4* onto, const int* slot_of_token, u32 tokens,     \
      u32 vectors, uint4* out) {                                                                          \
    gather<T, CHOICES>(rows, gates, onto, slot_of_token, tokens, vectors, out);                           \
  }
#define DISPATCH(T, SUFFIX)                                                                               \
  GATHER(T, 1, SUFFIX)                                                                                    \
  GATHER(T, 2, SUFFIX)                                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS) combine_backward_##SUFFIX(                        \
      const uint4* gradient, const uint4* outputs, const float* gates, const int* token_of_slot,          \
      u32 slots, u32 vectors, uint4* of_outputs, float* of_gates) {                                       \
    combine_backward<T>(gradient, outputs, gates, token_of_slot, slots, vectors, of_outputs, of_gates);   \
  }
DISPATCH(float, f32)
DISPATCH(bf16, bf16)
