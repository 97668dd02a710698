// The attention core, forward and backward: what crates/kernels/src/attention.rs is on the CPU.
//
// bfloat16: FlashAttention-2 (Dao, 2023, arXiv:2307.08691) on the tensor cores. The scores of a tile exist in
// registers only. The bias of a relative position depends on `key - query`, so a tile needs a short window of
// one vector, and it enters as the value that the product of queries and keys starts from. The backward pass
// computes the scores twice, once for the gradients of the queries and once for those of keys and values: so
// every gradient is a sum that one warp keeps in registers in a fixed order, and nothing is added atomically.
//
// float32: the same plainly, for comparisons.

// ---- Instructions ----

__device__ __forceinline__ void load_transposed(u32 (&to)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from));
}

// d = a b + c for a of 16 x 16, b of 16 x 8. Lane `4 g + c` holds rows `g` and `g + 8` and columns `2 c` and
// `2 c + 1` of `c` and `d`: first both columns of row `g`, then those of row `g + 8`.
__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1,
                                         const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]),
        "f"(c[3]));
}

// ---- Products ----

// Pieces first: two right factors' 16 x 8 whose columns are the tile's rows.
template <int D> __device__ __forceinline__ u32 pieces_first(u32 tile) {
  u32 lane = threadIdx.x & 31;
  return tile + ((lane & 7) + ((lane >> 4) << 3)) * (2 * D) + ((((lane >> 3) & 1) ^ (lane & 7)) << 4);
}

// What products of blocks of 16 rows with the 8 columns of number `n` start from.
__device__ __forceinline__ void start_from(float (&c)[4], const float* window, int block, int n) {
  Pair upper = *reinterpret_cast<const Pair*>(window + 8 * (n - 2 * block));
  Pair lower = *reinterpret_cast<const Pair*>(window + 8 * (n - 2 * block - 1));
  c[0] = upper.x, c[1] = upper.y, c[2] = lower.x, c[3] = lower.y;
}

// The left factor of 16 columns from values that lie as results of products do.
template <int BLOCKS>
__device__ __forceinline__ void as_left(u32 (&to)[BLOCKS][4], const float (&x)[BLOCKS][2][4]) {
#pragma unroll
  for (int block = 0; block < BLOCKS; block++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float* pair = &x[block][i >> 1][(i & 1) * 2];
      to[block][i] = round_pair(pair[0], pair[1]);
    }
  }
}

// sum += left * right, where row `k` of the 16 rows at `right` (and `offset` bytes) meets column `k` of
// `left`.
template <int D, int BLOCKS>
__device__ __forceinline__ void add_product(float (&sum)[BLOCKS][D / 8][4], const u32 (&left)[BLOCKS][4],
                                            u32 right, int offset) {
#pragma unroll
  for (int step = 0; step < D / 16; step++) {
    u32 b[4];
    load_transposed(b, (right ^ (step << 5)) + offset);
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
      multiply(sum[block][2 * step], left[block], b[0], b[1], sum[block][2 * step]);
      multiply(sum[block][2 * step + 1], left[block], b[2], b[3], sum[block][2 * step + 1]);
    }
  }
}

// ---- Forward ----

template <int D> struct ForwardRoom {
  static constexpr int tile = TILE<D> * D * 2;
  static constexpr int q = 0;
  static constexpr int stages = THREADS * D * 2;
  static constexpr int bias = stages + 4 * tile;
  static constexpr int window = 2 * 4 * WINDOW<THREADS, TILE<D>>;
  static constexpr int kept = bias + 2 * window;
  static constexpr int range = kept + 2 * THREADS * 8;
  static constexpr int visible = range + 64;
};

// One block for 128 queries of a head; a warp has 32 of them.
template <int D, bool DROPOUT>
__device__ __forceinline__ void forward(const Given<bf16> given, bf16* out, int out_stride, float* sums) {
  using Room = ForwardRoom<D>;
  constexpr int KEYS = TILE<D>, N = KEYS / 8;
  const u32 base = shared_address(shared);
  const int warp = threadIdx.x >> 5, g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3;
  const int tiles = (given.keys + KEYS - 1) / KEYS;
  const int first_query = blockIdx.x * THREADS, warp_query = first_query + 32 * warp;
  const size_t query_row = size_t(blockIdx.z) * given.queries + first_query;
  const size_t key_row = size_t(blockIdx.z) * given.key_room;
  const Mover<KEYS, D> k(base + Room::stages, given.k + key_row * given.k_stride + blockIdx.y * D,
                         given.k_stride);
  const Mover<KEYS, D> v(base + Room::stages + Room::tile,
                         given.v + key_row * given.v_stride + blockIdx.y * D, given.v_stride);
  const int bias_count = given.queries + given.keys - 1;
  const float* bias = given.bias + size_t(blockIdx.y) * bias_count;
  u64* visible = reinterpret_cast<u64*>(shared + Room::visible);
  u32* flags = reinterpret_cast<u32*>(visible + tiles);

  Mover<THREADS, D>(base + Room::q, given.q + query_row * given.q_stride + blockIdx.y * D, given.q_stride)
      .start(0, 0, given.queries - first_query);
  auto copy_values = [&](int tile, int stage) {
    v.start(tile, 2 * stage * Room::tile, given.keys - tile * KEYS);
    if (DROPOUT) copy_kept<KEYS>(base + Room::kept + stage * THREADS * 8, given, first_query, tile * KEYS);
  };
  auto start_tile = [&](int tile, int stage) {
    k.start(tile, 2 * stage * Room::tile, given.keys - tile * KEYS);
    if (given.bias) {
      copy_bias<THREADS, KEYS, 1>(base + Room::bias + stage * Room::window, bias,
                                  tile * KEYS - first_query - THREADS + given.queries, bias_count);
    }
    copy_values(tile, stage);
  };

  // The first tile is seldom not wanted, so it is on its way while that is found out.
  start_tile(0, 0);
  if (!given.bias) no_bias<THREADS, KEYS>(reinterpret_cast<float*>(shared + Room::bias));
  const bool mixed = look_over_keys<KEYS>(given, first_query, false, visible, flags,
                                          reinterpret_cast<int*>(shared + Room::range));
  int tile = next_wanted(flags, -1, tiles);
  await_copies();
  __syncthreads();
  if (0 < tile && tile < tiles) start_tile(tile, 0);
  Left<D, 2, D == 64> queries;
  queries.start(base + Room::q + warp * (64 * D));

  float o[2][D / 8][4] = {}, total[4] = {}, greatest[4];
#pragma unroll
  for (int row = 0; row < 4; row++) greatest[row] = minus_infinity();
  const u32 k_lane = pieces_first<D>(base + Room::stages);
  const u32 v_lane = rows_first<D>(base + Room::stages + Room::tile);
  const float* window_lane =
      reinterpret_cast<const float*>(shared + Room::bias) + place_in_window<THREADS, KEYS>();
  const uint2* kept_lane = reinterpret_cast<const uint2*>(shared + Room::kept) + 32 * warp + g;

  // Whether the probability of this tile's key `8 n + 2 c + e` and a lane's row is kept, at bit `8 n + e`.
  auto kept_bits = [&](int stage, int row) {
    uint2 words = kept_lane[stage * THREADS + 8 * row];
    return ((u64(words.y) << 32) | words.x) >> (2 * c);
  };

  for (int stage = 0; tile < tiles; stage ^= 1) {
    const int following = next_wanted(flags, tile, tiles);
    await_copies();
    __syncthreads();
    if (following < tiles) start_tile(following, stage ^ 1);

    float p[2][N][4];
    const float* window = window_lane + stage * (Room::window / 4);
    const u32 k_at = k_lane + stage * 2 * Room::tile;
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
      u32 a[2][4];
      queries.take(a, step);
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        u32 b[4];
        load_matrices(b, (k_at ^ (step << 5)) + n * (16 * D));
#pragma unroll
        for (int block = 0; block < 2; block++) {
#pragma unroll
          for (int x = 0; x < 2; x++) {
            if (step == 0) start_from(p[block][n + x], window, block, n + x);
            multiply(p[block][n + x], a[block], b[2 * x], b[2 * x + 1], p[block][n + x]);
          }
        }
      }
    }
    if (flags[tile] & MASKED) {
      hide<2, N>(p, given, visible[tile], warp_query + g, tile * KEYS, mixed, 0);
    }

    float most[4];
    bool behind = false;
#pragma unroll
    for (int row = 0; row < 4; row++) {
      const int block = row >> 1, r = (row & 1) * 2;
      float x = fmaxf(p[block][0][r], p[block][0][r + 1]);
#pragma unroll
      for (int n = 1; n < N; n++) x = fmaxf(x, fmaxf(p[block][n][r], p[block][n][r + 1]));
      x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
      most[row] = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
      behind |= most[row] > greatest[row] + LAG;
    }
    if (__any_sync(ALL_LANES, behind)) {
#pragma unroll
      for (int row = 0; row < 4; row++) {
        const float now = fmaxf(most[row], greatest[row]);
        const float factor = now == greatest[row] ? 1.f : power_of_two((greatest[row] - now) * LOG2_E);
        greatest[row] = now;
        total[row] *= factor;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
          o[row >> 1][n][(row & 1) * 2] *= factor, o[row >> 1][n][(row & 1) * 2 + 1] *= factor;
        }
      }
    }
#pragma unroll
    for (int row = 0; row < 4; row++) {
      const float shift = greatest[row] == minus_infinity() ? 0.f : -greatest[row] * LOG2_E;
      const u64 bits = DROPOUT ? kept_bits(stage, row) : 0;
#pragma unroll
      for (int n = 0; n < N; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& x = p[row >> 1][n][(row & 1) * 2 + e];
          x = power_of_two(fmaf(x, LOG2_E, shift));
          total[row] += x;
          if (DROPOUT && !((bits >> (8 * n + e)) & 1)) x = 0.f;
        }
      }
    }
    const u32 v_at = v_lane + stage * 2 * Room::tile;
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      u32 a[2][4];
      const float chunk[2][2][4] = {{{p[0][n][0], p[0][n][1], p[0][n][2], p[0][n][3]},
                                     {p[0][n + 1][0], p[0][n + 1][1], p[0][n + 1][2], p[0][n + 1][3]}},
                                    {{p[1][n][0], p[1][n][1], p[1][n][2], p[1][n][3]},
                                     {p[1][n + 1][0], p[1][n + 1][1], p[1][n + 1][2], p[1][n + 1][3]}}};
      as_left<2>(a, chunk);
      add_product<D, 2>(o, a, v_at, n * (16 * D));
    }
    tile = following;
  }

  // Queries that see nothing take the mean of all values.
  u32 blind = 0;
#pragma unroll
  for (int row = 0; row < 4; row++) {
    total[row] += __shfl_xor_sync(ALL_LANES, total[row], 1);
    total[row] += __shfl_xor_sync(ALL_LANES, total[row], 2);
    if (greatest[row] == minus_infinity() && warp_query + 8 * row + g < given.queries) blind |= 1u << row;
  }
  if (__syncthreads_or(blind != 0)) {
    for (tile = 0; tile < tiles; tile++) {
      __syncthreads();
      copy_values(tile, 0);
      await_copies();
      __syncthreads();
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        float ones[2][2][4];
#pragma unroll
        for (int row = 0; row < 4; row++) {
          const u64 bits = DROPOUT ? kept_bits(0, row) : ~u64(0);
#pragma unroll
          for (int x = 0; x < 4; x++) {
            const int at = 8 * (n + (x >> 1)) + (x & 1);
            const bool counts =
                tile * KEYS + at + 2 * c < given.keys && (bits >> at) & 1 && (blind >> row) & 1;
            ones[row >> 1][x >> 1][(row & 1) * 2 + (x & 1)] = counts ? 1.f : 0.f;
          }
        }
        u32 a[2][4];
        as_left<2>(a, ones);
        add_product<D, 2>(o, a, v_lane, n * (16 * D));
      }
    }
  }

  float factor[4];
#pragma unroll
  for (int row = 0; row < 4; row++) {
    const bool sees_nothing = (blind >> row) & 1;
    const float whole = sees_nothing ? float(given.keys) : total[row];
    factor[row] = (DROPOUT ? given.kept_scale : 1.f) / whole;
    const int i = warp_query + 8 * row + g;
    if (c == 0 && i < given.queries) {
      sums[given.head() * given.queries + i] = sees_nothing ? minus_infinity() : greatest[row] + logf(whole);
    }
  }
  store_rows<D, 2>(o, factor, shared + Room::q + warp * (64 * D),
                   out + (query_row + 32 * warp) * out_stride + blockIdx.y * D, out_stride,
                   given.queries - warp_query);
}

// ---- Backward: gradients of queries and bias ----

template <int D> struct QueriesRoom {
  static constexpr int tile = TILE<D> * D * 2;
  static constexpr int q = 0;
  static constexpr int gradient = THREADS * D * 2;
  // Queries are in registers before the ring is needed where D is 64.
  static constexpr int ring = D == 64 ? 0 : 2 * THREADS * D * 2;
  static constexpr int stages = ring + WARPS * 8 * RING_PITCH * 4;
  static constexpr int bias = stages + 4 * tile;
  static constexpr int window = 2 * 4 * WINDOW<THREADS, TILE<D>>;
  static constexpr int kept = bias + 2 * window;
  static constexpr int rows = kept + 2 * THREADS * 8;
  static constexpr int range = rows + 2 * THREADS * 4;
  static constexpr int visible = range + 64;
};

// One block for 128 queries of a head. Leaves for the pass over keys what it needs of every query: `-log2` of
// the sum of exponentials, and minus the sum of probability times its gradient; rows are padded to 128.
template <int D, bool DROPOUT>
__device__ __forceinline__ void backward_queries(const Given<bf16> given, const bf16* out, int out_stride,
                                                 const bf16* gradient, int gradient_stride, const float* sums,
                                                 bf16* q_gradient, int q_gradient_stride, float* minus_sums,
                                                 float* minus_dots, float* diagonals, int diagonals_pitch) {
  using Room = QueriesRoom<D>;
  constexpr int KEYS = TILE<D>;
  const u32 base = shared_address(shared);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
  const int tiles = (given.keys + KEYS - 1) / KEYS;
  const int first_query = blockIdx.x * THREADS, warp_query = first_query + 32 * warp;
  const size_t query_row = size_t(blockIdx.z) * given.queries + first_query;
  const size_t key_row = size_t(blockIdx.z) * given.key_room;
  const Mover<KEYS, D> k(base + Room::stages, given.k + key_row * given.k_stride + blockIdx.y * D,
                         given.k_stride);
  const Mover<KEYS, D> v(base + Room::stages + Room::tile,
                         given.v + key_row * given.v_stride + blockIdx.y * D, given.v_stride);
  const int bias_count = given.queries + given.keys - 1;
  const float* bias = given.bias + size_t(blockIdx.y) * bias_count;
  u64* visible = reinterpret_cast<u64*>(shared + Room::visible);
  u32* flags = reinterpret_cast<u32*>(visible + tiles);
  float* rows = reinterpret_cast<float*>(shared + Room::rows);
  float* ring = reinterpret_cast<float*>(shared + Room::ring);
  out += query_row * out_stride + blockIdx.y * D;
  gradient += query_row * gradient_stride + blockIdx.y * D;

  Mover<THREADS, D>(base + Room::q, given.q + query_row * given.q_stride + blockIdx.y * D, given.q_stride)
      .start(0, 0, given.queries - first_query);
  Mover<THREADS, D>(base + Room::gradient, gradient, gradient_stride)
      .start(0, 0, given.queries - first_query);
  auto start_tile = [&](int tile, int stage) {
    k.start(tile, 2 * stage * Room::tile, given.keys - tile * KEYS);
    v.start(tile, 2 * stage * Room::tile, given.keys - tile * KEYS);
    if (given.bias) {
      copy_bias<THREADS, KEYS, 1>(base + Room::bias + stage * Room::window, bias,
                                  tile * KEYS - first_query - THREADS + given.queries, bias_count);
    }
    if (DROPOUT) copy_kept<KEYS>(base + Room::kept + stage * THREADS * 8, given, first_query, tile * KEYS);
  };
  start_tile(0, 0);
  if (!given.bias) no_bias<THREADS, KEYS>(reinterpret_cast<float*>(shared + Room::bias));

  const bool is_blind = sums_of_rows<D>(given, first_query, out, out_stride, gradient, gradient_stride, sums, rows,
                                        minus_sums, minus_dots);
  const bool any_blind = __syncthreads_or(is_blind);
  const bool mixed = look_over_keys<KEYS>(given, first_query, any_blind, visible, flags,
                                          reinterpret_cast<int*>(shared + Room::range));

  const int first_tile = next_wanted(flags, -1, tiles);
  int end = tiles;
  while (end > 0 && !flags[end - 1]) end--;

  float minus_sum[4], minus_dot[4];
  u32 blind = 0;
#pragma unroll
  for (int row = 0; row < 4; row++) {
    const int at = 32 * warp + 8 * row + g, i = first_query + at;
    minus_sum[row] = rows[at], minus_dot[row] = rows[THREADS + at];
    if (any_blind && i < given.queries && sums[given.head() * given.queries + i] == minus_infinity()) {
      blind |= 1u << row;
    }
  }

  await_copies();
  __syncthreads();
  if (0 < first_tile && first_tile < tiles) start_tile(first_tile, 0);
  Left<D, 2, D == 64> queries, gradients;
  queries.start(base + Room::q + warp * (64 * D));
  gradients.start(base + Room::gradient + warp * (64 * D));
  if (diagonals) {
    if (D == 64) __syncthreads();
    for (int at = threadIdx.x; at < WARPS * 8 * RING_PITCH / 4; at += THREADS) {
      reinterpret_cast<float4*>(ring)[at] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
    diagonals += (given.head() * gridDim.x + blockIdx.x) * diagonals_pitch;
  }

  float dq[2][D / 8][4] = {};
  Pair under_way[3] = {};
  const u32 k_lane = pieces_first<D>(base + Room::stages);
  const u32 k_rows_lane = rows_first<D>(base + Room::stages);
  const float* window_lane =
      reinterpret_cast<const float*>(shared + Room::bias) + place_in_window<THREADS, KEYS>();
  const uint2* kept_lane = reinterpret_cast<const uint2*>(shared + Room::kept) + 32 * warp + g;
  float* ring_lane = ring + (8 * warp + g) * RING_PITCH + 2 * c;

  for (int tile = 0, stage = 0; tile < end; tile++) {
    const u32 flag = flags[tile];
    if (flag) await_copies();
    __syncthreads();
    if (diagonals && tile > 0) leave_diagonals<KEYS>(ring, diagonals, tile - 1);
    float* ring_at = ring_lane + (tile * KEYS & (RING - 1));
    if (!flag) {
      if (diagonals) {
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
          *reinterpret_cast<Pair*>(ring_at + 8 * n) = under_way[0];
          under_way[0] = under_way[1], under_way[1] = under_way[2], under_way[2] = Pair{0.f, 0.f};
        }
      }
      continue;
    }
    const int following = next_wanted(flags, tile, tiles);
    if (following < tiles) start_tile(following, stage ^ 1);

    const float* window = window_lane + stage * (Room::window / 4);
    u32 k_at = k_lane + stage * 2 * Room::tile, k_rows_at = k_rows_lane + stage * 2 * Room::tile;
    u64 seen = visible[tile];
#pragma unroll 1
    for (int chunk = 0; chunk < KEYS / 16; chunk++) {
      float p[2][2][4], dp[2][2][4];
#pragma unroll
      for (int step = 0; step < D / 16; step++) {
        u32 a[2][4], b[4];
        queries.take(a, step);
        load_matrices(b, k_at ^ (step << 5));
#pragma unroll
        for (int block = 0; block < 2; block++) {
#pragma unroll
          for (int x = 0; x < 2; x++) {
            if (step == 0) start_from(p[block][x], window, block, x);
            multiply(p[block][x], a[block], b[2 * x], b[2 * x + 1], p[block][x]);
          }
        }
      }
#pragma unroll
      for (int step = 0; step < D / 16; step++) {
        u32 a[2][4], b[4];
        gradients.take(a, step);
        load_matrices(b, (k_at ^ (step << 5)) + Room::tile);
#pragma unroll
        for (int block = 0; block < 2; block++) {
#pragma unroll
          for (int x = 0; x < 2; x++) {
            if (step == 0) {
#pragma unroll
              for (int r = 0; r < 4; r++) dp[block][x][r] = minus_dot[2 * block + (r >> 1)];
            }
            multiply(dp[block][x], a[block], b[2 * x], b[2 * x + 1], dp[block][x]);
          }
        }
      }
      if (flag & MASKED) {
        hide<2, 2>(p, given, seen, warp_query + g, tile * KEYS + 16 * chunk, mixed, blind);
      }
#pragma unroll
      for (int row = 0; row < 4; row++) {
        u32 bits = 0;
        if (DROPOUT) {
          uint2 words = kept_lane[stage * THREADS + 8 * row];
          bits = (chunk & 2 ? words.y : words.x) >> (16 * (chunk & 1) + 2 * c);
        }
#pragma unroll
        for (int x = 0; x < 2; x++) {
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int r = (row & 1) * 2 + e;
            float d = dp[row >> 1][x][r];
            if (DROPOUT) {
              const float rest = minus_dot[row] * (1.f - given.kept_scale);
              d = (bits >> (8 * x + e)) & 1 ? fmaf(d, given.kept_scale, rest) : minus_dot[row];
            }
            p[row >> 1][x][r] = power_of_two(fmaf(p[row >> 1][x][r], LOG2_E, minus_sum[row])) * d;
          }
        }
      }
      if (diagonals) {
#pragma unroll
        for (int x = 0; x < 2; x++) {
          const float (&low)[4] = p[0][x], (&high)[4] = p[1][x];
          *reinterpret_cast<Pair*>(ring_at + 8 * x) =
              Pair{under_way[0].x + high[2], under_way[0].y + high[3]};
          under_way[0] = Pair{under_way[1].x + high[0], under_way[1].y + high[1]};
          under_way[1] = Pair{under_way[2].x + low[2], under_way[2].y + low[3]};
          under_way[2] = Pair{low[0], low[1]};
        }
      }
      u32 a[2][4];
      as_left<2>(a, p);
      add_product<D, 2>(dq, a, k_rows_at, 0);
      window += 16, ring_at += 16, k_at += 32 * D, k_rows_at += 32 * D, seen >>= 16;
    }
    stage ^= 1;
  }

  if (diagonals) {
    float* ring_at = ring_lane + (end * KEYS & (RING - 1));
#pragma unroll
    for (int n = 0; n < 3; n++) *reinterpret_cast<Pair*>(ring_at + 8 * n) = under_way[n];
  }
  await_copies();
  __syncthreads();
  if (diagonals) leave_last_diagonals<KEYS>(ring, diagonals, end, given.keys);
  const float factor[4] = {1.f, 1.f, 1.f, 1.f};
  store_rows<D, 2>(dq, factor, shared + Room::stages + warp * (64 * D),
                   q_gradient + (query_row + 32 * warp) * q_gradient_stride + blockIdx.y * D,
                   q_gradient_stride, given.queries - warp_query);
}

// Sums what the blocks of `rows` queries left; of `rows` keys if `of_keys`, whose diagonals come in the opposite order.
// Blocks of 32 values of a head; batch rows are dealt out to eight groups, which are added in order.
extern "C" __global__ void __launch_bounds__(256)
    attention_bias_gradient(const float* diagonals, float* bias_gradient, int batch, int queries, int keys,
                            int rows, int tiles, int pitch, int of_keys) {
  __shared__ float parts[8][32];
  const int at = blockIdx.x * 32 + (threadIdx.x & 31), group = threadIdx.x >> 5, count = queries + keys - 1;
  const int first = of_keys ? queries - 1 - at : at - (queries - 1), columns = of_keys ? queries : keys;
  float sum = 0.f;
  for (int b = group; b < batch; b += 8) {
    const float* of_head = diagonals + (size_t(b) * gridDim.y + blockIdx.y) * tiles * pitch;
#pragma unroll 4
    for (int tile = 0; tile < tiles; tile++) {
      const int diagonal = first + tile * rows + rows - 1;
      if (0 <= diagonal && diagonal < columns + rows - 1) sum += of_head[size_t(tile) * pitch + diagonal];
    }
  }
  parts[group][threadIdx.x & 31] = sum;
  __syncthreads();
  if (group == 0 && at < count) {
#pragma unroll
    for (int other = 1; other < 8; other++) sum += parts[other][threadIdx.x];
    bias_gradient[size_t(blockIdx.y) * count + at] = sum;
  }
}

// ---- Backward: gradients of keys and values ----

template <int D> struct KeysRoom {
  // Keys of a block.
  static constexpr int keys = D == 64 ? 128 : 64;
  static constexpr int tile = TILE<D> * D * 2;
  static constexpr int k = 0;
  static constexpr int v = keys * D * 2;
  static constexpr int stages = 2 * keys * D * 2;
  static constexpr int bias = stages + 4 * tile;
  static constexpr int window = 2 * 4 * WINDOW<keys, TILE<D>>;
  static constexpr int rows = bias + 2 * window;
  static constexpr int kept = rows + 2 * 2 * TILE<D> * 4;
  static constexpr int range = kept + 2 * TILE<D> * 16;
  static constexpr int flags = range + 64;
};

// One block for 128 (or 64) keys of a head. Scores are transposed here, keys by queries, so that they are
// left factors of both products as they come.
template <int D, bool DROPOUT>
__device__ __forceinline__ void backward_keys(const Given<bf16> given, const bf16* gradient,
                                              int gradient_stride, const float* sums, const float* minus_sums,
                                              const float* minus_dots, bf16* k_gradient,
                                              int k_gradient_stride, bf16* v_gradient,
                                              int v_gradient_stride) {
  using Room = KeysRoom<D>;
  constexpr int QUERIES = TILE<D>, BLOCKS = Room::keys / (16 * WARPS), OF_WARP = 16 * BLOCKS;
  const u32 base = shared_address(shared);
  const int warp = threadIdx.x >> 5, g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3;
  const int tiles = (given.queries + QUERIES - 1) / QUERIES;
  const int first_key = blockIdx.x * Room::keys, warp_key = first_key + OF_WARP * warp;
  const size_t query_row = size_t(blockIdx.z) * given.queries;
  const size_t key_row = size_t(blockIdx.z) * given.key_room + first_key;
  const Mover<QUERIES, D> q(base + Room::stages, given.q + query_row * given.q_stride + blockIdx.y * D,
                            given.q_stride);
  const Mover<QUERIES, D> gradients(base + Room::stages + Room::tile,
                                    gradient + query_row * gradient_stride + blockIdx.y * D, gradient_stride);
  const int bias_count = given.queries + given.keys - 1;
  const float* bias = given.bias + size_t(blockIdx.y) * bias_count;
  const size_t padded_row = given.head() * ((given.queries + THREADS - 1) / THREADS * THREADS);
  u32* flags = reinterpret_cast<u32*>(shared + Room::flags);
  minus_sums += padded_row, minus_dots += padded_row;
  sums += given.head() * given.queries;

  Mover<Room::keys, D>(base + Room::k, given.k + key_row * given.k_stride + blockIdx.y * D, given.k_stride)
      .start(0, 0, given.keys - first_key);
  Mover<Room::keys, D>(base + Room::v, given.v + key_row * given.v_stride + blockIdx.y * D, given.v_stride)
      .start(0, 0, given.keys - first_key);

  auto start_tile = [&](int tile, int stage) {
    const int first = tile * QUERIES;
    q.start(tile, 2 * stage * Room::tile, given.queries - first);
    gradients.start(tile, 2 * stage * Room::tile, given.queries - first);
    if (given.bias) {
      copy_bias<Room::keys, QUERIES, -1>(base + Room::bias + stage * Room::window, bias,
                                         first_key - first + Room::keys + given.queries - 2, bias_count);
    }
    constexpr int PIECES = QUERIES / 4;
    if (threadIdx.x < 2 * PIECES) {
      const int piece = threadIdx.x % PIECES;
      const float* from = (threadIdx.x < PIECES ? minus_sums : minus_dots) + first + 4 * piece;
      copy<16>(base + Room::rows + stage * (2 * QUERIES * 4) + threadIdx.x * 16, from, true);
    }
    if (DROPOUT && threadIdx.x < QUERIES) {
      const bool there = first + threadIdx.x < given.queries;
      const size_t row = given.head() * given.queries + first + threadIdx.x;
      copy<Room::keys / 8>(base + Room::kept + (stage * QUERIES + threadIdx.x) * 16,
                           given.kept + row * given.kept_words() + first_key / 32, there);
    }
  };

  const int guess = given.causal ? max(first_key - given.query_offset, 0) / QUERIES : 0;
  if (guess < tiles) start_tile(guess, 0);
  if (!given.bias) no_bias<Room::keys, QUERIES>(reinterpret_cast<float*>(shared + Room::bias));
  u32 seen = 0;
#pragma unroll
  for (int row = 0; row < 2 * BLOCKS; row++) {
    const int j = warp_key + 8 * row + g;
    const bool may =
        j < given.keys && (!given.key_mask || given.key_mask[size_t(blockIdx.z) * given.keys + j] != 0);
    seen |= u32(may) << row;
  }
  look_over_queries<QUERIES, Room::keys>(given, first_key, sums, flags,
                                         reinterpret_cast<int*>(shared + Room::range));
  int tile = next_wanted(flags, -1, tiles);
  await_copies();
  __syncthreads();
  if (tile != guess && tile < tiles) start_tile(tile, 0);
  Left<D, BLOCKS, D == 64> keys, values;
  keys.start(base + Room::k + warp * (OF_WARP * 2 * D));
  values.start(base + Room::v + warp * (OF_WARP * 2 * D));

  float dk[BLOCKS][D / 8][4] = {}, dv[BLOCKS][D / 8][4] = {};
  const u32 q_lane = pieces_first<D>(base + Room::stages), q_rows_lane = rows_first<D>(base + Room::stages);
  const float* window_lane =
      reinterpret_cast<const float*>(shared + Room::bias) + place_in_window<Room::keys, QUERIES>();

  for (int stage = 0; tile < tiles; stage ^= 1) {
    const int following = next_wanted(flags, tile, tiles);
    await_copies();
    __syncthreads();
    if (following < tiles) start_tile(following, stage ^ 1);

    const float* window = window_lane + stage * (Room::window / 4);
    const float* rows = reinterpret_cast<const float*>(shared + Room::rows) + stage * 2 * QUERIES + 2 * c;
    u32 q_at = q_lane + stage * 2 * Room::tile, q_rows_at = q_rows_lane + stage * 2 * Room::tile;
    const bool masked = flags[tile] & MASKED;
#pragma unroll 1
    for (int chunk = 0; chunk < QUERIES / 16; chunk++) {
      float p[BLOCKS][2][4], dp[BLOCKS][2][4];
#pragma unroll
      for (int step = 0; step < D / 16; step++) {
        u32 a[BLOCKS][4], b[4];
        keys.take(a, step);
        load_matrices(b, q_at ^ (step << 5));
#pragma unroll
        for (int block = 0; block < BLOCKS; block++) {
#pragma unroll
          for (int x = 0; x < 2; x++) {
            if (step == 0) start_from(p[block][x], window, block, x);
            multiply(p[block][x], a[block], b[2 * x], b[2 * x + 1], p[block][x]);
          }
        }
      }
#pragma unroll
      for (int step = 0; step < D / 16; step++) {
        u32 a[BLOCKS][4], b[4];
        values.take(a, step);
        load_matrices(b, (q_at ^ (step << 5)) + Room::tile);
#pragma unroll
        for (int block = 0; block < BLOCKS; block++) {
#pragma unroll
          for (int x = 0; x < 2; x++) {
            if (step == 0) {
              const Pair dot = *reinterpret_cast<const Pair*>(rows + QUERIES + 8 * x);
#pragma unroll
              for (int r = 0; r < 4; r++) dp[block][x][r] = r & 1 ? dot.y : dot.x;
            }
            multiply(dp[block][x], a[block], b[2 * x], b[2 * x + 1], dp[block][x]);
          }
        }
      }
      if (masked) {
        hide_from_queries<BLOCKS, 2>(p, given, sums, tile * QUERIES + 16 * chunk, warp_key + g, seen);
      }
      u32 left[BLOCKS][4];
#pragma unroll
      for (int x = 0; x < 2; x++) {
        const Pair sum = *reinterpret_cast<const Pair*>(rows + 8 * x);
#pragma unroll
        for (int block = 0; block < BLOCKS; block++) {
#pragma unroll
          for (int r = 0; r < 4; r++) {
            p[block][x][r] = power_of_two(fmaf(p[block][x][r], LOG2_E, r & 1 ? sum.y : sum.x));
          }
        }
      }
      if constexpr (DROPOUT) {
        float kept_p[BLOCKS][2][4];
#pragma unroll
        for (int column = 0; column < 4; column++) {
          const int i = 8 * (column >> 1) + (column & 1);
          const u32* words = reinterpret_cast<const u32*>(shared + Room::kept) +
                             (stage * QUERIES + 16 * chunk + 2 * c + i) * 4;
          const u32 bits = words[OF_WARP * warp / 32] >> (OF_WARP * warp % 32 + g);
          const float dot = rows[QUERIES + i], rest = dot * (1.f - given.kept_scale);
#pragma unroll
          for (int row = 0; row < 2 * BLOCKS; row++) {
            const int r = (row & 1) * 2 + (column & 1);
            const bool is_kept = (bits >> (8 * row)) & 1;
            float& d = dp[row >> 1][column >> 1][r];
            d = is_kept ? fmaf(d, given.kept_scale, rest) : dot;
            kept_p[row >> 1][column >> 1][r] = is_kept ? p[row >> 1][column >> 1][r] : 0.f;
          }
        }
        as_left<BLOCKS>(left, kept_p);
      } else {
        as_left<BLOCKS>(left, p);
      }
      add_product<D, BLOCKS>(dv, left, q_rows_at, Room::tile);
#pragma unroll
      for (int block = 0; block < BLOCKS; block++) {
#pragma unroll
        for (int x = 0; x < 2; x++) {
#pragma unroll
          for (int r = 0; r < 4; r++) p[block][x][r] *= dp[block][x][r];
        }
      }
      as_left<BLOCKS>(left, p);
      add_product<D, BLOCKS>(dk, left, q_rows_at, 0);
      window += 16, rows += 16, q_at += 32 * D, q_rows_at += 32 * D;
    }
    tile = following;
  }

  float one[2 * BLOCKS], kept_factor[2 * BLOCKS];
#pragma unroll
  for (int row = 0; row < 2 * BLOCKS; row++)
    one[row] = 1.f, kept_factor[row] = DROPOUT ? given.kept_scale : 1.f;
  const size_t row = key_row + OF_WARP * warp;
  store_rows<D, BLOCKS>(dk, one, shared + Room::k + warp * (OF_WARP * 2 * D),
                        k_gradient + row * k_gradient_stride + blockIdx.y * D, k_gradient_stride,
                        given.keys - warp_key);
  store_rows<D, BLOCKS>(dv, kept_factor, shared + Room::v + warp * (OF_WARP * 2 * D),
                        v_gradient + row * v_gradient_stride + blockIdx.y * D, v_gradient_stride,
                        given.keys - warp_key);
}

#define KERNELS(D, DROPOUT, NAME)                                                                         \
  extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                \
      attention_forward_##NAME##_bf16(GIVEN(bf16), bf16* out, int out_stride, float* sums) {              \
    forward<D, DROPOUT>(TAKEN, out, out_stride, sums);                                                    \
  }                                                                                                       \
  extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_backward_queries_##NAME##_bf16(      \
      GIVEN(bf16), const bf16* out, int out_stride, const bf16* gradient, int gradient_stride,            \
      const float* sums, bf16* q_gradient, int q_gradient_stride, float* minus_sums, float* minus_dots,   \
      float* diagonals, int diagonals_pitch) {                                                            \
    backward_queries<D, DROPOUT>(TAKEN, out, out_stride, gradient, gradient_stride, sums, q_gradient,     \
                                 q_gradient_stride, minus_sums, minus_dots, diagonals, diagonals_pitch);  \
  }                                                                                                       \
  extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_backward_keys_##NAME##_bf16(         \
      GIVEN(bf16), const bf16* gradient, int gradient_stride, const float* sums, const float* minus_sums, \
      const float* minus_dots, bf16* k_gradient, int k_gradient_stride, bf16* v_gradient,                 \
      int v_gradient_stride) {                                                                            \
    backward_keys<D, DROPOUT>(TAKEN, gradient, gradient_stride, sums, minus_sums, minus_dots, k_gradient, \
                              k_gradient_stride, v_gradient, v_gradient_stride);                          \
  }

KERNELS(64, false, 64)
KERNELS(64, true, 64_dropout)
KERNELS(128, false, 128)
KERNELS(128, true, 128_dropout)

// ---- Dropout ----

// One bit a probability, set where it is kept; a thread draws those of a query and 32 keys.
extern "C" __global__ void __launch_bounds__(256)
    attention_dropout(u32* kept, u64 seed, u32 site, const u32* step, u32 first_row, u32 first_head,
                      int queries, int keys, u32 first_kept) {
  const int words = (keys + 127) / 128 * 4, at = blockIdx.x * 256 + threadIdx.x;
  if (at >= queries * words) return;
  const int i = at / words, j = at % words * 32;
  const Philox philox = noise_of(seed, *step, site);
  const u64 first = (u64(first_head + blockIdx.y) * queries + i) * keys + j;
  const u32 skip = u32(first & 3);
  u64 bits = 0;
#pragma unroll 1
  for (int block = 0; block < 8 + (skip != 0); block++) {
    const u64 counter = (first >> 2) + block;
    const uint4 drawn = philox.block(u32(counter), u32(counter >> 32), first_row + blockIdx.z, 0);
    const u64 four = u64(drawn.x >> 8 >= first_kept) | u64(drawn.y >> 8 >= first_kept) << 1 |
                     u64(drawn.z >> 8 >= first_kept) << 2 | u64(drawn.w >> 8 >= first_kept) << 3;
    bits |= four << (4 * block);
  }
  kept[(size_t(blockIdx.z) * gridDim.y + blockIdx.y) * queries * words + at] = u32(bits >> skip);
}

// ---- float32 ----
//
// Blocks of 32 rows and tiles of 32 columns; eight threads share a row, and each has every eighth column of
// it.

constexpr int PLAIN_THREADS = 256, PLAIN = 32, MOST_OF_HEAD = 128;

// Scores that no query may see. Beside it any true score vanishes, and equal ones stay equal.
constexpr float HIDDEN = -1e30f;

__device__ __forceinline__ void plain_tile(float* to, const float* from, size_t stride, int rows_there,
                                           int d_kv) {
  for (int at = threadIdx.x; at < PLAIN * d_kv; at += PLAIN_THREADS) {
    const int row = at / d_kv, d = at % d_kv;
    to[row * (d_kv + 1) + d] = row < rows_there ? from[row * stride + d] : 0.f;
  }
}
__device__ __forceinline__ float plain_dot(const float* a, const float* b, int d_kv) {
  float sum = 0.f;
  for (int d = 0; d < d_kv; d++) sum = fmaf(a[d], b[d], sum);
  return sum;
}
__device__ __forceinline__ float sum_of_eight(float x) {
#pragma unroll
  for (int offset = 4; offset; offset >>= 1) x += __shfl_xor_sync(ALL_LANES, x, offset);
  return x;
}
__device__ __forceinline__ bool plain_hidden(const Given<float>& given, int i, int j) {
  const size_t query = size_t(blockIdx.z) * given.queries + i, key = size_t(blockIdx.z) * given.keys + j;
  return (given.key_mask && given.key_mask[key] == 0) ||
         (given.query_segments && given.query_segments[query] != given.key_segments[key]) ||
         (given.causal && j > i + given.query_offset);
}
__device__ __forceinline__ float plain_bias(const Given<float>& given, int i, int j) {
  if (!given.bias) return 0.f;
  return given.bias[size_t(blockIdx.y) * (given.queries + given.keys - 1) + j - i + given.queries - 1];
}
// What dropout multiplies a probability by.
__device__ __forceinline__ float plain_factor(const Given<float>& given, int i, int j) {
  if (!given.kept) return 1.f;
  const u32 word = given.kept[(given.head() * given.queries + i) * given.kept_words() + j / 32];
  return (word >> (j & 31)) & 1 ? given.kept_scale : 0.f;
}
// The probability from the score without a mask and the row's sum.
__device__ __forceinline__ float plain_probability(const Given<float>& given, int i, int j, float score,
                                                   float sum) {
  if (sum == minus_infinity()) return 1.f / float(given.keys);
  return plain_hidden(given, i, j) ? 0.f : expf(score - sum);
}

extern "C" __global__ void __launch_bounds__(PLAIN_THREADS)
    attention_forward_f32(GIVEN(float), float* out, int out_stride, float* sums, int d_kv) {
  const Given<float> given = TAKEN;
  const int pitch = d_kv + 1, row = threadIdx.x / 8, part = threadIdx.x % 8;
  float *qs = reinterpret_cast<float*>(shared), *ks = qs + PLAIN * pitch, *vs = ks + PLAIN * pitch,
        *ps = vs + PLAIN * pitch;
  const int first_query = blockIdx.x * PLAIN, i = first_query + row;
  const size_t query_row = size_t(blockIdx.z) * queries + first_query,
               key_row = size_t(blockIdx.z) * key_room;
  const size_t column = size_t(blockIdx.y) * d_kv;
  plain_tile(qs, q + query_row * q_stride + column, q_stride, queries - first_query, d_kv);
  float o[MOST_OF_HEAD / 8] = {}, greatest = minus_infinity(), total = 0.f;
  for (int first = 0; first < keys; first += PLAIN) {
    __syncthreads();
    plain_tile(ks, k + (key_row + first) * k_stride + column, k_stride, keys - first, d_kv);
    plain_tile(vs, v + (key_row + first) * v_stride + column, v_stride, keys - first, d_kv);
    __syncthreads();
    float scores[4], most = greatest;
#pragma unroll
    for (int x = 0; x < 4; x++) {
      const int j = first + part + 8 * x;
      scores[x] = minus_infinity();
      if (i < queries && j < keys) {
        scores[x] =
            plain_hidden(given, i, j)
                ? HIDDEN
                : plain_dot(qs + row * pitch, ks + (part + 8 * x) * pitch, d_kv) + plain_bias(given, i, j);
      }
      most = fmaxf(most, scores[x]);
    }
#pragma unroll
    for (int offset = 4; offset; offset >>= 1) most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, offset));
    const float factor = most == greatest ? 1.f : expf(greatest - most);
    greatest = most, total *= factor;
#pragma unroll
    for (int x = 0; x < 4; x++) {
      const int j = first + part + 8 * x;
      const bool there = i < queries && j < keys;
      const float p = there ? expf(scores[x] - greatest) : 0.f;
      total += p;
      ps[row * (PLAIN + 1) + part + 8 * x] = there ? p * plain_factor(given, i, j) : 0.f;
    }
    __syncthreads();
#pragma unroll
    for (int x = 0; x < MOST_OF_HEAD / 8; x++) {
      const int d = part + 8 * x;
      if (d < d_kv) {
        float sum = o[x] * factor;
        for (int j = 0; j < PLAIN; j++) sum = fmaf(ps[row * (PLAIN + 1) + j], vs[j * pitch + d], sum);
        o[x] = sum;
      }
    }
  }
  total = sum_of_eight(total);
  if (i >= queries) return;
#pragma unroll
  for (int x = 0; x < MOST_OF_HEAD / 8; x++) {
    const int d = part + 8 * x;
    if (d < d_kv) out[(query_row + row) * out_stride + column + d] = o[x] / total;
  }
  if (part == 0) {
    sums[given.head() * queries + i] = greatest == HIDDEN ? minus_infinity() : greatest + logf(total);
  }
}

extern "C" __global__ void __launch_bounds__(PLAIN_THREADS)
    attention_backward_queries_f32(GIVEN(float), const float* out, int out_stride, const float* gradient,
                                   int gradient_stride, const float* sums, float* q_gradient,
                                   int q_gradient_stride, float* minus_dots, int padded, float* diagonals,
                                   int diagonals_pitch, int d_kv) {
  const Given<float> given = TAKEN;
  const int pitch = d_kv + 1, row = threadIdx.x / 8, part = threadIdx.x % 8;
  float *qs = reinterpret_cast<float*>(shared), *gs = qs + PLAIN * pitch, *ks = gs + PLAIN * pitch,
        *vs = ks + PLAIN * pitch, *ds = vs + PLAIN * pitch;
  const int first_query = blockIdx.x * PLAIN, i = first_query + row;
  const size_t query_row = size_t(blockIdx.z) * queries + first_query,
               key_row = size_t(blockIdx.z) * key_room;
  const size_t column = size_t(blockIdx.y) * d_kv;
  plain_tile(qs, q + query_row * q_stride + column, q_stride, queries - first_query, d_kv);
  plain_tile(gs, gradient + query_row * gradient_stride + column, gradient_stride, queries - first_query,
             d_kv);
  if (diagonals) {
    diagonals += (given.head() * gridDim.x + blockIdx.x) * diagonals_pitch;
    for (int at = threadIdx.x; at < keys + PLAIN - 1; at += PLAIN_THREADS) diagonals[at] = 0.f;
  }
  __syncthreads();
  float dot = 0.f, sum_of_row = 0.f;
  if (i < queries) {
    for (int d = part; d < d_kv; d += 8) {
      dot = fmaf(out[(query_row + row) * out_stride + column + d], gs[row * pitch + d], dot);
    }
    sum_of_row = sums[given.head() * queries + i];
  }
  dot = sum_of_eight(dot);
  if (part == 0 && i < queries) minus_dots[given.head() * padded + i] = -dot;
  float dq[MOST_OF_HEAD / 8] = {};
  for (int first = 0; first < keys; first += PLAIN) {
    __syncthreads();
    plain_tile(ks, k + (key_row + first) * k_stride + column, k_stride, keys - first, d_kv);
    plain_tile(vs, v + (key_row + first) * v_stride + column, v_stride, keys - first, d_kv);
    __syncthreads();
#pragma unroll
    for (int x = 0; x < 4; x++) {
      const int at = part + 8 * x, j = first + at;
      float d = 0.f;
      if (i < queries && j < keys) {
        const float score = plain_dot(qs + row * pitch, ks + at * pitch, d_kv) + plain_bias(given, i, j);
        const float dp = plain_dot(gs + row * pitch, vs + at * pitch, d_kv) * plain_factor(given, i, j);
        d = plain_probability(given, i, j, score, sum_of_row) * (dp - dot);
      }
      ds[row * (PLAIN + 1) + at] = d;
    }
    __syncthreads();
#pragma unroll
    for (int x = 0; x < MOST_OF_HEAD / 8; x++) {
      const int d = part + 8 * x;
      if (d < d_kv) {
        for (int j = 0; j < PLAIN; j++) dq[x] = fmaf(ds[row * (PLAIN + 1) + j], ks[j * pitch + d], dq[x]);
      }
    }
    const int diagonal = first + threadIdx.x;
    if (diagonals && threadIdx.x < 2 * PLAIN - 1 && diagonal < keys + PLAIN - 1) {
      float sum = diagonals[diagonal];
      for (int r = 0; r < PLAIN; r++) {
        const int j = int(threadIdx.x) - (PLAIN - 1) + r;
        if (0 <= j && j < PLAIN) sum += ds[r * (PLAIN + 1) + j];
      }
      diagonals[diagonal] = sum;
    }
  }
  if (i >= queries) return;
#pragma unroll
  for (int x = 0; x < MOST_OF_HEAD / 8; x++) {
    const int d = part + 8 * x;
    if (d < d_kv) q_gradient[(query_row + row) * q_gradient_stride + column + d] = dq[x];
  }
}

extern "C" __global__ void __launch_bounds__(PLAIN_THREADS)
    attention_backward_keys_f32(GIVEN(float), const float* gradient, int gradient_stride, const float* sums,
                                const float* minus_dots, int padded, float* k_gradient, int k_gradient_stride,
                                float* v_gradient, int v_gradient_stride, int d_kv) {
  const Given<float> given = TAKEN;
  const int pitch = d_kv + 1, row = threadIdx.x / 8, part = threadIdx.x % 8;
  float *ks = reinterpret_cast<float*>(shared), *vs = ks + PLAIN * pitch, *qs = vs + PLAIN * pitch,
        *gs = qs + PLAIN * pitch, *ps = gs + PLAIN * pitch, *ds = ps + PLAIN * (PLAIN + 1);
  const int first_key = blockIdx.x * PLAIN, j = first_key + row;
  const size_t query_row = size_t(blockIdx.z) * queries, key_row = size_t(blockIdx.z) * key_room + first_key;
  const size_t column = size_t(blockIdx.y) * d_kv;
  plain_tile(ks, k + key_row * k_stride + column, k_stride, keys - first_key, d_kv);
  plain_tile(vs, v + key_row * v_stride + column, v_stride, keys - first_key, d_kv);
  float dk[MOST_OF_HEAD / 8] = {}, dv[MOST_OF_HEAD / 8] = {};
  for (int first = 0; first < queries; first += PLAIN) {
    __syncthreads();
    plain_tile(qs, q + (query_row + first) * q_stride + column, q_stride, queries - first, d_kv);
    plain_tile(gs, gradient + (query_row + first) * gradient_stride + column, gradient_stride,
               queries - first, d_kv);
    __syncthreads();
#pragma unroll
    for (int x = 0; x < 4; x++) {
      const int at = part + 8 * x, i = first + at;
      float p = 0.f, d = 0.f;
      if (i < queries && j < keys) {
        const float score = plain_dot(qs + at * pitch, ks + row * pitch, d_kv) + plain_bias(given, i, j);
        const float factor = plain_factor(given, i, j);
        p = plain_probability(given, i, j, score, sums[given.head() * queries + i]);
        d = p * (plain_dot(gs + at * pitch, vs + row * pitch, d_kv) * factor +
                 minus_dots[given.head() * padded + i]);
        p *= factor;
      }
      ps[row * (PLAIN + 1) + at] = p, ds[row * (PLAIN + 1) + at] = d;
    }
    __syncthreads();
#pragma unroll
    for (int x = 0; x < MOST_OF_HEAD / 8; x++) {
      const int d = part + 8 * x;
      if (d < d_kv) {
        for (int i = 0; i < PLAIN; i++) {
          dv[x] = fmaf(ps[row * (PLAIN + 1) + i], gs[i * pitch + d], dv[x]);
          dk[x] = fmaf(ds[row * (PLAIN + 1) + i], qs[i * pitch + d], dk[x]);
        }
      }
    }
  }
  if (j >= keys) return;
#pragma unroll
  for (int x = 0; x < MOST_OF_HEAD / 8; x++) {
    const int d = part + 8 * x;
    if (d < d_kv) {
      k_gradient[(key_row + row) * k_gradient_stride + column + d] = dk[x];
      v_gradient[(key_row + row) * v_gradient_stride + column + d] = dv[x];
    }
  }
}
