// Rows of a table by their number, and the gradient of the table.
//
// The gradient sums the tokens of each row in ascending order, wherever they were processed. For that tokens
// are sorted by id in two stable steps: into buckets of neighbouring ids, tile by tile, then each bucket by
// id. A token is a number that runs through two lists, such as the ids of encoder and decoder.

constexpr u32 tile = 2048;    // tokens of a block in the first step
constexpr u32 buckets = 256;  // at most; also the threads of the blocks that sort
constexpr u32 warps = buckets / 32;
constexpr u32 max_digits = 1024;
constexpr u32 nowhere = 0xffffffffu;

// Ids of two lists as rows of this table; `nowhere` for those that are no number of a row.
struct Ids {
  const int *first_list, *second_list;
  u32 first_tokens;
  u32 rows;

  __device__ __forceinline__ u32 row(u32 token) const {
    int id = token < first_tokens ? first_list[token] : second_list[token - first_tokens];
    return u32(id) < rows ? u32(id) : nowhere;
  }
};

#define IDS_PARAMETERS const int *first_list, const int *second_list, u32 first_tokens, u32 rows
#define IDS \
  Ids { first_list, second_list, first_tokens, rows }

// Exclusive sums over 256 threads.
__device__ __forceinline__ u32 sum_before(u32 value) {
  __shared__ u32 of_warp[warps];
  u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, sum = value;
#pragma unroll
  for (u32 offset = 1; offset < 32; offset <<= 1) {
    u32 other = __shfl_up_sync(0xffffffffu, sum, offset);
    if (lane >= offset) sum += other;
  }
  __syncthreads();
  if (lane == 31) of_warp[warp] = sum;
  __syncthreads();
  u32 before = sum - value;
#pragma unroll
  for (u32 i = 0; i < warps; i++) before += i < warp ? of_warp[i] : 0;
  return before;
}

// Places items by their digit, equal ones in their order. Every warp has a part of the items, whole groups of
// 32. `item(i, digit)` gives item and digit, of which those from `digits` on are left out; `counts`,
// [warps][digits], is zero before; `begin_digits` is called between counting and placing, must turn counts
// into places, and synchronise before it reads and after it writes.
template <class Item, class Begin>
__device__ __forceinline__ void place(u32 items, u32 digits, u32* counts, u32* out, Item item,
                                      Begin begin_digits) {
  u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  u32 groups = (items + 31) / 32, per_warp = (groups + warps - 1) / warps;
  u32 first = warp * per_warp * 32, end = min(items, first + per_warp * 32);
  u32* mine = counts + warp * digits;
  for (u32 i = first + lane; i < end; i += 32) {
    u32 digit;
    item(i, digit);
    if (digit < digits) atomicAdd(mine + digit, 1u);
  }
  begin_digits();
  for (u32 group = first; group < end; group += 32) {
    u32 i = group + lane, digit = nowhere, value = 0;
    if (i < end) value = item(i, digit);
    u32 same = __match_any_sync(0xffffffffu, digit);
    u32 before = __popc(same & ((1u << lane) - 1));
    if (digit < digits) out[mine[digit] + before] = value;
    __syncwarp();
    if (digit < digits && before == 0) mine[digit] += __popc(same);
    __syncwarp();
  }
}

// Tokens of each tile in each bucket. `[tiles, buckets]`
extern "C" __global__ void __launch_bounds__(buckets)
    embedding_count(IDS_PARAMETERS, u32 tokens, u32 low_bits, u32* of_tiles) {
  __shared__ u32 counts[buckets];
  counts[threadIdx.x] = 0;
  __syncthreads();
  Ids ids = IDS;
  u32 end = min(tokens, (blockIdx.x + 1) * tile);
#pragma unroll 4
  for (u32 token = blockIdx.x * tile + threadIdx.x; token < end; token += buckets) {
    u32 row = ids.row(token);
    if (row != nowhere) atomicAdd(counts + (row >> low_bits), 1u);
  }
  __syncthreads();
  of_tiles[blockIdx.x * buckets + threadIdx.x] = counts[threadIdx.x];
}

// Tokens by bucket, and where each bucket begins. `[tokens]`, `[buckets + 1]`
extern "C" __global__ void __launch_bounds__(buckets)
    embedding_bucket(IDS_PARAMETERS, u32 tokens, u32 low_bits, const u32* of_tiles, u32* by_bucket,
                     u32* bucket_start) {
  __shared__ u32 counts[warps * buckets];
  u32 bucket = threadIdx.x;
#pragma unroll
  for (u32 i = 0; i < warps; i++) counts[i * buckets + bucket] = 0;
  u32 earlier = 0, all = 0;
#pragma unroll 8
  for (u32 i = 0; i < gridDim.x; i++) {
    u32 count = of_tiles[i * buckets + bucket];
    earlier += i < blockIdx.x ? count : 0;
    all += count;
  }
  u32 start = sum_before(all);
  if (blockIdx.x == 0) {
    bucket_start[bucket] = start;
    if (bucket == buckets - 1) bucket_start[buckets] = start + all;
  }
  __syncthreads();
  Ids ids = IDS;
  u32 first = blockIdx.x * tile;
  auto item = [&](u32 i, u32& digit) {
    u32 row = ids.row(first + i);
    digit = row == nowhere ? nowhere : row >> low_bits;
    return first + i;
  };
  auto begin_digits = [&] {
    __syncthreads();
    u32 at = start + earlier;
#pragma unroll
    for (u32 i = 0; i < warps; i++) {
      u32 count = counts[i * buckets + bucket];
      counts[i * buckets + bucket] = at;
      at += count;
    }
    __syncthreads();
  };
  place(first < tokens ? min(tile, tokens - first) : 0, buckets, counts, by_bucket, item, begin_digits);
}

// Tokens by row, and where each row begins: a block for each bucket. `[tokens]`, `[rows + 1]`
extern "C" __global__ void __launch_bounds__(buckets)
    embedding_sort(IDS_PARAMETERS, u32 low_bits, const u32* by_bucket, const u32* bucket_start, u32* by_row,
                   u32* row_start) {
  __shared__ u32 counts[warps * max_digits];
  u32 digits = 1u << low_bits, start = bucket_start[blockIdx.x], end = bucket_start[blockIdx.x + 1];
  u32 first_of_bucket = blockIdx.x << low_bits;
  for (u32 i = threadIdx.x; i < warps * digits; i += buckets) counts[i] = 0;
  __syncthreads();
  Ids ids = IDS;
  auto item = [&](u32 i, u32& digit) {
    u32 token = by_bucket[start + i];
    digit = ids.row(token) - first_of_bucket;
    return token;
  };
  auto begin_digits = [&] {
    __syncthreads();
    // A thread has neighbouring digits, so that sums over threads are sums over digits.
    u32 per_thread = (digits + buckets - 1) / buckets;
    u32 first = threadIdx.x * per_thread, last = min(digits, first + per_thread), mine = 0;
    for (u32 digit = first; digit < last; digit++)
      for (u32 i = 0; i < warps; i++) mine += counts[i * digits + digit];
    u32 at = start + sum_before(mine);
    for (u32 digit = first; digit < last; digit++) {
      if (first_of_bucket + digit <= rows) row_start[first_of_bucket + digit] = at;
      for (u32 i = 0; i < warps; i++) {
        u32 count = counts[i * digits + digit];
        counts[i * digits + digit] = at;
        at += count;
      }
    }
    if (threadIdx.x == 0 && first_of_bucket + digits == rows) row_start[rows] = end;
    __syncthreads();
  };
  place(end - start, digits, counts, by_row, item, begin_digits);
}

// Tokens of a long list that are summed on their own. The piece of row `r` that covers a multiple `k` of this
// number among the sorted tokens is piece `k`: there is no other.
constexpr u32 piece = 64;

// Gradients of two lists, as one.
template <class T> struct Gradients {
  const T *first_list, *second_list;
  u32 first_tokens, width;

  __device__ __forceinline__ const T* token(u32 token) const {
    return token < first_tokens ? first_list + size_t(token) * width
                                : second_list + size_t(token - first_tokens) * width;
  }
};

// A load that stays where it stands: left to itself, the compiler waits for one row before it asks for the
// next.
__device__ __forceinline__ uint4 load_now(const void* from) {
  uint4 raw;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
               : "l"(from));
  return raw;
}

// Adds `values`, `count` rows, one after the other; several loads are under way at any time.
template <class T, class At, int lanes>
__device__ __forceinline__ void add_all(u32 count, At at, float (&sums)[lanes]) {
  constexpr u32 at_once = 8;
  u32 i = 0;
  for (; i + at_once <= count; i += at_once) {
    const T* from[at_once];
    uint4 raw[at_once];
#pragma unroll
    for (u32 k = 0; k < at_once; k++) from[k] = at(i + k);
#pragma unroll
    for (u32 k = 0; k < at_once; k++) raw[k] = load_now(from[k]);
#pragma unroll
    for (u32 k = 0; k < at_once; k++) {
      float values[lanes];
      unpack(raw[k], values);
#pragma unroll
      for (int j = 0; j < lanes; j++) sums[j] += values[j];
    }
  }
#pragma unroll 1
  for (; i < count; i += 2) {
    bool two = i + 1 < count;
    uint4 a = *reinterpret_cast<const uint4*>(at(i)), b = make_uint4(0, 0, 0, 0);
    if (two) b = *reinterpret_cast<const uint4*>(at(i + 1));
    float values[lanes];
    unpack(a, values);
#pragma unroll
    for (int j = 0; j < lanes; j++) sums[j] += values[j];
    if (two) {
      unpack(b, values);
#pragma unroll
      for (int j = 0; j < lanes; j++) sums[j] += values[j];
    }
  }
}

#define GRADIENT_PARAMETERS                                                                                \
  const T *first_gradients, const T *second_gradients, u32 width, const u32 *by_row, const u32 *row_start, \
      float *partial
#define GRADIENTS \
  Gradients<T> { first_gradients, second_gradients, first_tokens, width }

// Sums whole pieces, a warp for each and 32 * lanes columns. `partial`, `[tokens / piece + 1, width]`.
template <class T> __device__ __forceinline__ void sum_pieces(IDS_PARAMETERS, GRADIENT_PARAMETERS) {
  constexpr int lanes = Lanes<T>::count;
  u32 k = blockIdx.x * 8 + threadIdx.x / 32, column = (blockIdx.y * 32 + threadIdx.x % 32) * lanes;
  u32 covered = k * piece;
  if (covered >= row_start[rows] || column >= width) return;
  u32 row = (IDS).row(by_row[covered]), start = row_start[row], end = row_start[row + 1];
  u32 first = start + (covered - start) / piece * piece;
  if (first + piece > end) return;
  Gradients<T> gradients = GRADIENTS;
  float sums[lanes];
#pragma unroll
  for (int j = 0; j < lanes; j++) sums[j] = 0.f;
  add_all<T>(piece, [&](u32 i) { return gradients.token(by_row[first + i]) + column; }, sums);
#pragma unroll
  for (int j = 0; j < lanes; j += 4)
    *reinterpret_cast<float4*>(partial + size_t(k) * width + column + j) =
        make_float4(sums[j], sums[j + 1], sums[j + 2], sums[j + 3]);
}

// Sums of all rows, a warp for each and 32 * lanes columns: whole pieces first, then what is left.
template <class T>
__device__ __forceinline__ void sum_rows(IDS_PARAMETERS, GRADIENT_PARAMETERS, T* table, u32 onto) {
  constexpr int lanes = Lanes<T>::count;
  u32 row = blockIdx.x * 8 + threadIdx.x / 32, column = (blockIdx.y * 32 + threadIdx.x % 32) * lanes;
  if (row >= rows || column >= width) return;
  u32 start = row_start[row], end = row_start[row + 1];
  if (onto && start == end) return;
  T* to = table + size_t(row) * width + column;
  float sums[lanes];
#pragma unroll
  for (int j = 0; j < lanes; j++) sums[j] = 0.f;
  if (onto) load_lanes(to, sums);
  Gradients<T> gradients = GRADIENTS;
  u32 whole = (end - start) / piece;
#pragma unroll 4
  for (u32 i = 0; i < whole; i++) {
    u32 k = (start + i * piece + piece - 1) / piece;
    const float* from = partial + size_t(k) * width + column;
#pragma unroll
    for (int j = 0; j < lanes; j += 4) {
      float4 part = *reinterpret_cast<const float4*>(from + j);
      sums[j] += part.x, sums[j + 1] += part.y, sums[j + 2] += part.z, sums[j + 3] += part.w;
    }
  }
  u32 left = start + whole * piece;
  add_all<T>(end - left, [&](u32 i) { return gradients.token(by_row[left + i]) + column; }, sums);
  store_lanes(to, sums);
}

// Rows of the table for all tokens, a warp for each and four accesses of a lane; zeros for rows elsewhere.
template <class T> __device__ __forceinline__ void gather(const T* table, IDS_PARAMETERS, T* out, u32 width) {
  constexpr int lanes = Lanes<T>::count, accesses = 4;
  u32 token = blockIdx.x * 4 + threadIdx.x / 32;
  if (token >= first_tokens) return;
  u32 row = (IDS).row(token), first = (blockIdx.y * accesses * 32 + threadIdx.x % 32) * lanes;
  const T* from = table + size_t(row == nowhere ? 0 : row) * width;
  uint4 raw[accesses];
#pragma unroll
  for (int i = 0; i < accesses; i++) {
    u32 column = first + i * 32 * lanes;
    raw[i] = make_uint4(0, 0, 0, 0);
    if (column < width && row != nowhere) raw[i] = *reinterpret_cast<const uint4*>(from + column);
  }
#pragma unroll
  for (int i = 0; i < accesses; i++) {
    u32 column = first + i * 32 * lanes;
    if (column < width) *reinterpret_cast<uint4*>(out + size_t(token) * width + column) = raw[i];
  }
}

#define KERNELS(Format, suffix)                                                                              \
  namespace of_##suffix {                                                                                    \
    using T = Format;                                                                                        \
    extern "C" __global__ void __launch_bounds__(256)                                                        \
        embedding_pieces_##suffix(IDS_PARAMETERS, GRADIENT_PARAMETERS) {                                     \
      sum_pieces<T>(first_list, second_list, first_tokens, rows, first_gradients,                            \
                    second_gradients, width, by_row, row_start, partial);                                    \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(256)                                                        \
        embedding_rows_##suffix(IDS_PARAMETERS, GRADIENT_PARAMETERS, T * table, u32 onto) {                  \
      sum_rows<T>(first_list, second_list, first_tokens, rows, first_gradients, second_gradients,            \
                  width, by_row, row_start, partial, table, onto);                                           \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(128)                                                        \
        embedding_##suffix(const T* table, IDS_PARAMETERS, T* out, u32 width) {                              \
      gather<T>(table, first_list, second_list, first_tokens, rows, out, width);                             \
    }                                                                                                        \
  }
KERNELS(float, f32)
KERNELS(bf16, bf16)
