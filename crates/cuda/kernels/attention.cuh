// What the kernels of attention in bfloat16 have in common, whichever instructions multiply: arguments, tiles in
// shared memory, the window of the relative bias, masks, and the sums along diagonals that are the gradient of
// that bias. attention.cu has the kernels for any GPU, attention_hopper.cu those that only Hopper can run.

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / 32;
constexpr u32 ALL_LANES = 0xffffffffu;
constexpr float LOG2_E = 1.44269504088896341f;
// A greatest score may lag behind by so much before sums are brought to a new one.
constexpr float LAG = 5.f;
struct __align__(8) Pair {
  float x, y;
};

// Arguments that all passes have in common.
template <class T> struct Given {
  const T *q, *k, *v;
  const float* bias;
  const int *key_mask, *query_segments, *key_segments;
  const u32* kept;
  float kept_scale;
  int q_stride, k_stride, v_stride, queries, keys, key_room, causal, query_offset;

  // One bit a probability, rows of whole 16 bytes.
  __device__ __forceinline__ int kept_words() const { return (keys + 127) / 128 * 4; }
  // Number of this block's head among those of the batch.
  __device__ __forceinline__ size_t head() const { return size_t(blockIdx.z) * gridDim.y + blockIdx.y; }
};

#define GIVEN(T)                                                                                            \
  const T *q, const T *k, const T *v, const float *bias, const int *key_mask, const int *query_segments,    \
      const int *key_segments, const u32 *kept, float kept_scale, int q_stride, int k_stride, int v_stride, \
      int queries, int keys, int key_room, int causal, int query_offset
#define TAKEN                                                                                              \
  {q,        k,        v,        bias,    key_mask, query_segments, key_segments, kept,        kept_scale, \
   q_stride, k_stride, v_stride, queries, keys,     key_room,       causal,       query_offset}

extern __shared__ __align__(1024) u8 shared[];

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

// ---- Instructions ----

__device__ __forceinline__ u32 shared_address(const void* at) { return u32(__cvta_generic_to_shared(at)); }

__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Copies of 16, 8 or 4 bytes to shared memory; zeros, and nothing is read, where nothing is `there`.
template <int BYTES> __device__ __forceinline__ void copy(u32 to, const void* from, bool there) {
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0));
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(BYTES),
                 "r"(there ? BYTES : 0));
  }
}
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four matrices of 8 x 8, from the rows whose addresses the lanes name.
__device__ __forceinline__ void load_matrices(u32 (&to)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from));
}
// ---- Tiles in shared memory ----
//
// Rows of D values in pieces of 16 bytes. Piece `p` of row `r` lies at place `p ^ (r % 8)`, so that the eight
// rows of a matrix lie in different banks. Tiles start at multiples of 1,024 bytes.

// Rows of the tiles that a pass walks over.
template <int D> constexpr int TILE = D == 64 ? 64 : 32;

// Copies tiles of ROWS rows of one head; each of a block's ALL threads has its place in each.
template <int ROWS, int D, int ALL = THREADS> struct Mover {
  static constexpr int PIECES = D / 8, ROWS_AT_ONCE = ALL / PIECES;
  const u8* from;
  u32 to, bytes_at_once;
  int row;

  __device__ __forceinline__ Mover(u32 tile, const bf16* first_row, int stride) {
    const int piece = threadIdx.x % PIECES;
    row = threadIdx.x / PIECES;
    from = reinterpret_cast<const u8*>(first_row + size_t(row) * stride + piece * 8);
    to = tile + row * (2 * D) + ((piece ^ (row & 7)) << 4);
    bytes_at_once = ROWS_AT_ONCE * 2 * stride;
  }
  // Of the rows from number `ROWS * tile` on, `rows_there` exist; the others become zeros.
  __device__ __forceinline__ void start(u32 tile, u32 offset, int rows_there) const {
    const u8* at = from + u64(tile) * (bytes_at_once * (ROWS / ROWS_AT_ONCE));
#pragma unroll
    for (int first = 0; first < ROWS; first += ROWS_AT_ONCE, at += bytes_at_once) {
      copy<16>(to + offset + first * (2 * D), at, row < rows_there - first);
    }
  }
};

// What a lane names to load_matrices for matrices in the order (rows 0-7, 8-15) x (pieces 0, 1), rows first:
// a left factor's 16 x 16, or transposed two right factors' 16 x 8. `^ (step << 5)` walks along the pieces.
template <int D> __device__ __forceinline__ u32 rows_first(u32 tile) {
  u32 lane = threadIdx.x & 31;
  return tile + (lane & 15) * (2 * D) + (((lane >> 4) ^ (lane & 7)) << 4);
}
// The left factor of a warp: 16 BLOCKS rows of D values, read once where registers allow it.
template <int D, int BLOCKS, bool IN_REGISTERS> struct Left {
  u32 at;
  u32 held[IN_REGISTERS ? D / 16 : 1][BLOCKS][4];

  __device__ __forceinline__ void fetch(u32 (&to)[BLOCKS][4], int step) const {
#pragma unroll
    for (int block = 0; block < BLOCKS; block++)
      load_matrices(to[block], (at ^ (step << 5)) + block * (32 * D));
  }
  __device__ __forceinline__ void start(u32 rows) {
    at = rows_first<D>(rows);
    if constexpr (IN_REGISTERS) {
#pragma unroll
      for (int step = 0; step < D / 16; step++) fetch(held[step], step);
    }
  }
  __device__ __forceinline__ void take(u32 (&to)[BLOCKS][4], int step) const {
    if constexpr (IN_REGISTERS) {
#pragma unroll
      for (int block = 0; block < BLOCKS; block++) {
#pragma unroll
        for (int i = 0; i < 4; i++) to[block][i] = held[step][block][i];
      }
    } else {
      fetch(to, step);
    }
  }
};

// ---- Relative bias ----
//
// A tile of ROWS rows (of this block) and TILE columns needs ROWS + TILE - 1 values: that of a row and a
// column is number `column - row + ROWS - 1`. They lie in shared memory twice, the second time one place
// further on, so that a lane finds the values of its two columns side by side on a multiple of 8 bytes.

template <int ROWS, int TILE> constexpr int WINDOW = ROWS + TILE + 16;

// Value `m` of the window is `bias[first + STEP * m]`, 0 beyond the ends.
template <int ROWS, int TILE, int STEP, int ALL = THREADS>
__device__ __forceinline__ void copy_bias(u32 to, const float* bias, int first, int count) {
  const int at = first + STEP * int(threadIdx.x);
  const float* from = bias + at;
  to += 4 * threadIdx.x;
#pragma unroll
  for (int start = 0; start < ROWS + TILE; start += ALL) {
    if (start + ALL > ROWS + TILE && threadIdx.x >= ROWS + TILE - start) break;
    const int value = at + STEP * start, before = value - STEP;
    copy<4>(to + 4 * start, from + STEP * start, u32(value) < u32(count));
    copy<4>(to + 4 * (WINDOW<ROWS, TILE> + start), from + STEP * start - STEP, u32(before) < u32(count));
  }
}
template <int ROWS, int TILE> __device__ __forceinline__ void no_bias(float* windows) {
  for (int m = threadIdx.x; m < 4 * WINDOW<ROWS, TILE>; m += THREADS) windows[m] = 0.f;
}
// Where a lane's values of its first row and first columns lie, if the ALL threads share the rows; 8 rows on they
// are what they were 8 columns before.
template <int ROWS, int TILE, int ALL = THREADS> __device__ __forceinline__ int place_in_window() {
  int warp = threadIdx.x >> 5, g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3;
  return ROWS - 1 - ROWS / (ALL / 32) * warp - g + 2 * c + (g & 1 ? 0 : WINDOW<ROWS, TILE> + 1);
}
// ---- Masks, where rows are queries ----

constexpr u32 WANTED = 1, MASKED = 2;

// Finds which keys the block's queries may see at all, one bit a key, and which tiles of keys are wanted, and
// of these which need masks. Returns whether the queries are of several segments. Ends with a barrier.
template <int TILE>
__device__ __forceinline__ bool look_over_keys(const Given<bf16>& given, int first_query, bool blind_queries,
                                               u64* visible, u32* flags, int* range) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, tiles = (given.keys + TILE - 1) / TILE;
  int low = 0, high = 0;
  if (given.query_segments) {
    int i = first_query + threadIdx.x;
    low = 0x7fffffff, high = -0x7fffffff - 1;
    if (i < given.queries) low = high = given.query_segments[size_t(blockIdx.z) * given.queries + i];
    low = __reduce_min_sync(ALL_LANES, low), high = __reduce_max_sync(ALL_LANES, high);
    if (lane == 0) range[2 * warp] = low, range[2 * warp + 1] = high;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < WARPS; w++) low = min(low, range[2 * w]), high = max(high, range[2 * w + 1]);
  }
  const bool mixed = low != high;
  const int last_seen = min(first_query + THREADS, given.queries) - 1 + given.query_offset;
  for (int tile = warp; tile < tiles; tile += WARPS) {
    u64 seen = 0;
#pragma unroll
    for (int part = 0; part < TILE / 32; part++) {
      int j = tile * TILE + part * 32 + lane;
      size_t at = size_t(blockIdx.z) * given.keys + j;
      bool may = j < given.keys;
      if (may && given.key_mask) may = given.key_mask[at] != 0;
      if (may && given.query_segments) {
        int segment = given.key_segments[at];
        may = low <= segment && segment <= high;
      }
      seen |= u64(__ballot_sync(ALL_LANES, may)) << (32 * part);
    }
    if (lane == 0) {
      constexpr u64 WHOLE = TILE == 64 ? ~u64(0) : (u64(1) << (TILE & 63)) - 1;
      int first_key = tile * TILE;
      bool wanted = seen != 0 && (!given.causal || first_key <= last_seen);
      bool whole = seen == WHOLE && !mixed &&
                   (!given.causal || first_key + TILE - 1 <= first_query + given.query_offset);
      visible[tile] = seen;
      flags[tile] = blind_queries ? WANTED | MASKED : wanted ? (whole ? WANTED : WANTED | MASKED) : 0;
    }
  }
  __syncthreads();
  return mixed;
}

// The next wanted tile after `tile`, `tiles` when there is none.
__device__ __forceinline__ int next_wanted(const u32* flags, int tile, int tiles) {
  do tile++;
  while (tile < tiles && !flags[tile]);
  return tile;
}

// Masks scores of 16 BLOCKS queries of a warp and 8 N keys. Hidden ones become minus infinity; those of queries
// that see nothing (bits of `blind`, one for each of a lane's rows) become equal.
template <int BLOCKS, int N>
__device__ __forceinline__ void hide(float (&scores)[BLOCKS][N][4], const Given<bf16>& given, u64 visible,
                                     int first_query, int first_key, bool mixed, u32 blind) {
  const int c = threadIdx.x & 3;
  float fill[2 * BLOCKS];
#pragma unroll
  for (int row = 0; row < 2 * BLOCKS; row++) {
    const int i = first_query + 8 * row;
    fill[row] = (blind >> row) & 1 ? 0.f : minus_infinity();
    u64 bits = visible;
    if (given.causal) {
      int last = i + given.query_offset - first_key;
      bits = last < 0 ? 0 : last >= 63 ? bits : bits & ((u64(2) << last) - 1);
    }
    bits >>= 2 * c;
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        if (!((bits >> (8 * n + e)) & 1)) scores[row >> 1][n][(row & 1) * 2 + e] = fill[row];
      }
    }
  }
  if (mixed) {
    const int* segments = given.key_segments + size_t(blockIdx.z) * given.keys;
    int of_query[2 * BLOCKS];
#pragma unroll
    for (int row = 0; row < 2 * BLOCKS; row++) {
      const int i = min(first_query + 8 * row, given.queries - 1);
      of_query[row] = given.query_segments[size_t(blockIdx.z) * given.queries + i];
    }
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int of_key = segments[min(first_key + 8 * n + 2 * c + e, given.keys - 1)];
#pragma unroll
        for (int row = 0; row < 2 * BLOCKS; row++) {
          if (of_query[row] != of_key) scores[row >> 1][n][(row & 1) * 2 + e] = fill[row];
        }
      }
    }
  }
  if (first_key + 8 * N > given.keys) {
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
      for (int r = 0; r < 4; r++) {
        if (first_key + 8 * n + 2 * c + (r & 1) >= given.keys) {
#pragma unroll
          for (int block = 0; block < BLOCKS; block++) scores[block][n][r] = minus_infinity();
        }
      }
    }
  }
}

// Bits of dropout of the block's 128 queries and a tile of keys, 8 bytes a query.
template <int TILE>
__device__ __forceinline__ void copy_kept(u32 to, const Given<bf16>& given, int first_query, int first_key) {
  int i = first_query + threadIdx.x;
  bool there = i < given.queries;
  size_t at = (given.head() * given.queries + i) * given.kept_words() + first_key / 32;
  copy<TILE / 8>(to + 8 * threadIdx.x, given.kept + at, there);
}

// Writes a warp's rows, each times its factor, through `room` in shared memory (as many rows, this warp's
// own).
template <int D, int BLOCKS>
__device__ __forceinline__ void store_rows(const float (&x)[BLOCKS][D / 8][4],
                                           const float (&factor)[2 * BLOCKS], u8* room, bf16* to, int stride,
                                           int rows_there) {
  const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
  constexpr int PIECES = D / 8;
  __syncwarp();
#pragma unroll
  for (int row = 0; row < 2 * BLOCKS; row++) {
#pragma unroll
    for (int n = 0; n < PIECES; n++) {
      const float* pair = &x[row >> 1][n][(row & 1) * 2];
      *reinterpret_cast<u32*>(room + (8 * row + g) * (2 * D) + ((n ^ g) << 4) + 4 * c) =
          round_pair(pair[0] * factor[row], pair[1] * factor[row]);
    }
  }
  __syncwarp();
#pragma unroll
  for (int step = 0; step < BLOCKS * 16 * PIECES / 32; step++) {
    int at = step * 32 + lane, row = at / PIECES, piece = at % PIECES;
    if (row < rows_there) {
      *reinterpret_cast<uint4*>(to + size_t(row) * stride + piece * 8) =
          *reinterpret_cast<const uint4*>(room + row * (2 * D) + ((piece ^ (row & 7)) << 4));
    }
  }
}

// ---- Backward: what is known of every query ----

// `-log2` of a query's sum of exponentials, from what the forward pass left; of all keys' if it sees none.
__device__ __forceinline__ float minus_log2(float sum, int keys) {
  return sum == minus_infinity() ? -log2f(float(keys)) : -sum * LOG2_E;
}
// The sum of products of the output and its gradient over row `row`, the same for the D / 8 lanes that share it. Zero
// for rows that there are not.
template <int D>
__device__ __forceinline__ float dot_of_rows(const bf16* out, int out_stride, const bf16* gradient,
                                             int gradient_stride, int row, int rows_there) {
  constexpr int LANES = D / 8;
  const int piece = threadIdx.x % LANES;
  float dot = 0.f;
  if (row < rows_there) {
    float a[8], b[8];
    load_lanes(out + size_t(row) * out_stride + 8 * piece, a);
    load_lanes(gradient + size_t(row) * gradient_stride + 8 * piece, b);
#pragma unroll
    for (int i = 0; i < 8; i++) dot = fmaf(a[i], b[i], dot);
  }
#pragma unroll
  for (int offset = LANES / 2; offset; offset >>= 1) dot += __shfl_xor_sync(ALL_LANES, dot, offset);
  return dot;
}

// Leaves of the block's 128 queries, in `rows` and for the pass over keys, `-log2` of the sum of exponentials and
// minus the sum of probability times its gradient; rows are padded to 128. Returns whether this thread's query
// sees nothing.
template <int D>
__device__ __forceinline__ bool sums_of_rows(const Given<bf16>& given, int first_query, const bf16* out,
                                             int out_stride, const bf16* gradient, int gradient_stride,
                                             const float* sums, float* rows, float* minus_sums,
                                             float* minus_dots) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const size_t padded_row = given.head() * gridDim.x * THREADS + first_query;
  bool is_blind = false;
  float minus_sum = minus_infinity();
  if (first_query + threadIdx.x < given.queries) {
    const float sum = sums[given.head() * given.queries + first_query + threadIdx.x];
    is_blind = sum == minus_infinity();
    minus_sum = minus_log2(sum, given.keys);
  }
  rows[threadIdx.x] = minus_sum;
  minus_sums[padded_row + threadIdx.x] = minus_sum;
#pragma unroll
  for (int step = 0; step < D / 8; step++) {
    constexpr int LANES = D / 8;
    const int row = 32 * warp + step * (32 / LANES) + lane / LANES;
    const float dot =
        dot_of_rows<D>(out, out_stride, gradient, gradient_stride, row, given.queries - first_query);
    if (lane % LANES == 0) rows[THREADS + row] = -dot, minus_dots[padded_row + row] = -dot;
  }
  return is_blind;
}

// ---- Backward: gradient of the bias ----
//
// Gradients of the bias are sums along diagonals. In a warp's 32 rows and the 8 columns of number `n`, a
// lane's values of its row `r` (of four, 8 apart) lie on the diagonals of its values of the row before in the
// 8 columns before. So it adds four of them in registers as columns pass by, and three sums are always under
// way. What comes out for row `g` of the warp and column `y` goes to a ring of 256 columns with 32 rows, one
// for every `g` of every warp; the sum over these along a diagonal is one value of the block.

constexpr int RING = 256, RING_PITCH = RING + 8;
// A diagonal's values lie in the ring at columns from `diagonal - RING_BACK` on.
constexpr int RING_BACK = 103;

// The sum of one diagonal from the ring's rows that thread `part` of PARTS takes; with END only from columns
// before `end`.
template <int PARTS, bool END>
__device__ __forceinline__ float along(const float* ring, int diagonal, int part, int end) {
  float sum = 0.f;
#pragma unroll
  for (int r = 0; r < 32 / PARTS; r++) {
    const int g = PARTS == 1   ? r & 7
                  : PARTS == 2 ? (r & 1) | (part << 1) | ((r & 2) << 1)
                               : (r & 1) | (part << 1);
    const int warp = r / (8 / PARTS), column = diagonal - RING_BACK + g + 32 * warp;
    if (!END || column < end) sum += ring[(8 * warp + g) * RING_PITCH + (column & (RING - 1))];
  }
  return sum;
}

// Writes the sums of the diagonals that are complete once the ring holds tile `tile` of KEYS keys.
template <int KEYS>
__device__ __forceinline__ void leave_diagonals(const float* ring, float* diagonals, int tile) {
  constexpr int PARTS = THREADS / KEYS, OF_WARP = KEYS / WARPS;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int diagonal = tile * KEYS + OF_WARP * warp + lane % OF_WARP;
  float sum = along<PARTS, false>(ring, diagonal, lane / OF_WARP, 0);
#pragma unroll
  for (int offset = OF_WARP; offset < 32; offset <<= 1) sum += __shfl_xor_sync(ALL_LANES, sum, offset);
  if (lane < OF_WARP) diagonals[diagonal] = sum;
}
// Writes all others once the ring holds the last of `tiles` tiles.
template <int KEYS>
__device__ __forceinline__ void leave_last_diagonals(const float* ring, float* diagonals, int tiles, int keys) {
  const int columns = tiles * KEYS + 24;
  for (int at = max(tiles - 1, 0) * KEYS + threadIdx.x; at < keys + THREADS - 1; at += THREADS) {
    diagonals[at] = at - RING_BACK < columns ? along<1, true>(ring, at, 0, columns) : 0.f;
  }
}

// ---- Masks, where rows are keys ----

// Finds which tiles of queries see the KEYS keys of the block's ALL threads, and which of these need masks. `sums`
// are those of the head's queries. Ends with a barrier.
template <int TILE, int KEYS, int ALL = THREADS>
__device__ __forceinline__ void look_over_queries(const Given<bf16>& given, int first_key, const float* sums,
                                                  u32* flags, int* range) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, tiles = (given.queries + TILE - 1) / TILE;
  {
    const int j = first_key + threadIdx.x;
    const size_t at = size_t(blockIdx.z) * given.keys + j;
    const bool there = threadIdx.x < KEYS && j < given.keys;
    const bool seen = there && (!given.key_mask || given.key_mask[at] != 0);
    int low = 0x7fffffff, high = -0x7fffffff - 1;
    if (seen) low = high = given.key_segments ? given.key_segments[at] : 0;
    low = __reduce_min_sync(ALL_LANES, low), high = __reduce_max_sync(ALL_LANES, high);
    const int any = __any_sync(ALL_LANES, seen), all = __all_sync(ALL_LANES, seen || !there);
    if (lane == 0)
      range[4 * warp] = low, range[4 * warp + 1] = high, range[4 * warp + 2] = any, range[4 * warp + 3] = all;
  }
  __syncthreads();
  int low = range[0], high = range[1];
  bool any = range[2], all = range[3];
#pragma unroll
  for (int w = 1; w < ALL / 32; w++) {
    low = min(low, range[4 * w]), high = max(high, range[4 * w + 1]);
    any |= range[4 * w + 2] != 0, all &= range[4 * w + 3] != 0;
  }
  for (int tile = warp; tile < tiles; tile += ALL / 32) {
    bool blind = false, meets = false, strange = false;
#pragma unroll
    for (int part = 0; part < TILE / 32; part++) {
      const int i = tile * TILE + part * 32 + lane;
      if (i < given.queries) {
        blind |= sums[i] == minus_infinity();
        const int segment =
            given.query_segments ? given.query_segments[size_t(blockIdx.z) * given.queries + i] : 0;
        meets |= low <= segment && segment <= high;
        strange |= low != segment || segment != high;
      }
    }
    blind = __any_sync(ALL_LANES, blind), meets = __any_sync(ALL_LANES, meets);
    strange = __any_sync(ALL_LANES, strange);
    if (lane == 0) {
      const int first = tile * TILE + given.query_offset;
      const int last = min(tile * TILE + TILE, given.queries) - 1 + given.query_offset;
      const bool wanted = any && meets && (!given.causal || first_key <= last);
      const bool whole = all && !strange && (!given.causal || first_key + KEYS - 1 <= first);
      flags[tile] = blind ? WANTED | MASKED : wanted ? (whole ? WANTED : WANTED | MASKED) : 0;
    }
  }
  __syncthreads();
}

// Masks scores whose rows are keys and whose columns are 8 N queries.
template <int BLOCKS, int N>
__device__ __forceinline__ void hide_from_queries(float (&scores)[BLOCKS][N][4], const Given<bf16>& given,
                                                  const float* sums, int first_query, int first_key,
                                                  u32 seen) {
  const int c = threadIdx.x & 3;
  int of_key[2 * BLOCKS] = {};
  if (given.query_segments) {
#pragma unroll
    for (int row = 0; row < 2 * BLOCKS; row++) {
      const int j = min(first_key + 8 * row, given.keys - 1);
      of_key[row] = given.key_segments[size_t(blockIdx.z) * given.keys + j];
    }
  }
#pragma unroll
  for (int column = 0; column < 2 * N; column++) {
    const int i = first_query + 8 * (column >> 1) + 2 * c + (column & 1);
    const bool there = i < given.queries;
    const float fill = there && sums[i] == minus_infinity() ? 0.f : minus_infinity();
    const bool segments = given.query_segments && there;
    const int of_query = segments ? given.query_segments[size_t(blockIdx.z) * given.queries + i] : 0;
#pragma unroll
    for (int row = 0; row < 2 * BLOCKS; row++) {
      const int j = first_key + 8 * row;
      const bool hidden = !((seen >> row) & 1) || (given.causal && j > i + given.query_offset) ||
                          (segments && of_key[row] != of_query);
      if (hidden) scores[row >> 1][column >> 1][(row & 1) * 2 + (column & 1)] = fill;
    }
  }
}
