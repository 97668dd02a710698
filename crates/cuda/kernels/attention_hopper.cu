// Attention in bfloat16 for heads of 64, with the products of a warpgroup that only Hopper has (wgmma).
//
// The passes are those of attention.cu: forward, backward over the keys for the gradients of queries and bias,
// backward over the queries for those of keys and values. Where there are heads enough, attention_backward_hopper.cu
// goes backward instead, in one pass. A block is one warpgroup with 128 rows in two blocks of 64, and two of them
// share a multiprocessor: while one does arithmetic on scores, the other's products keep the tensor cores busy. Left
// factors lie in registers where there is room for them, since a right factor alone takes half of what shared
// memory can deliver. A block waits only for products that it is about to read: it exponentiates scores while the
// gradients of probabilities are on their way, and sums gradients while the next scores begin.

// Rows of a block, in BLOCKS blocks of 64, and of the tiles that it walks over.
constexpr int ROWS = THREADS, BLOCKS = 2, COLUMNS = TILE<D>;
constexpr int TILE_BYTES = COLUMNS * ROW_BYTES;
// Tiles are copied while the one before is worked on, and that before it may still be read by its last products.
constexpr int STAGES = 3;

__device__ __forceinline__ int next_stage(int stage) { return stage == STAGES - 1 ? 0 : stage + 1; }

// ---- Tiles ----

// Copies 128 rows so that the 16 of a warp in each block of 64 are, of all rows, 32 that follow each other.
__device__ __forceinline__ void copy_blocks(u32 to, const bf16* first_row, int stride, int rows_there) {
  const Mover<16, D> mover(to, first_row, stride);
#pragma unroll
  for (int part = 0; part < ROWS / 16; part++)
    mover.start(part, (part % BLOCKS * WARPS + part / BLOCKS) * 16 * ROW_BYTES, rows_there - 16 * part);
}

// ---- Forward ----

struct ForwardRoom {
  static constexpr int q = 0;
  static constexpr int stages = ROWS * ROW_BYTES;
  static constexpr int bias = stages + STAGES * 2 * TILE_BYTES;
  static constexpr int window = 2 * 4 * WINDOW<ROWS, COLUMNS>;
  static constexpr int kept = bias + STAGES * window;
  static constexpr int range = kept + STAGES * ROWS * 8;
  static constexpr int visible = range + 64;
};

// One block for 128 queries of a head; a warp has 32 that follow each other, 16 of them in each block of 64.
template <bool DROPOUT>
__device__ __forceinline__ void forward(const Given<bf16> given, bf16* out, int out_stride, float* sums) {
  using Room = ForwardRoom;
  constexpr int N = COLUMNS / 8, STEPS = COLUMNS / 16;
  const u32 base = shared_address(shared);
  const int warp = threadIdx.x >> 5, g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3;
  const int tiles = (given.keys + COLUMNS - 1) / COLUMNS;
  const int first_query = blockIdx.x * ROWS, warp_query = first_query + 32 * warp;
  const size_t query_row = size_t(blockIdx.z) * given.queries + first_query;
  const size_t key_row = size_t(blockIdx.z) * given.key_room;
  const Mover<COLUMNS, D> k(base + Room::stages, given.k + key_row * given.k_stride + blockIdx.y * D,
                            given.k_stride);
  const Mover<COLUMNS, D> v(base + Room::stages + TILE_BYTES,
                            given.v + key_row * given.v_stride + blockIdx.y * D, given.v_stride);
  const int bias_count = given.queries + given.keys - 1;
  const float* bias = given.bias + size_t(blockIdx.y) * bias_count;
  u64* visible = reinterpret_cast<u64*>(shared + Room::visible);
  u32* flags = reinterpret_cast<u32*>(visible + tiles);

  copy_blocks(base + Room::q, given.q + query_row * given.q_stride + blockIdx.y * D, given.q_stride,
              given.queries - first_query);
  auto copy_values = [&](int tile, int stage) {
    v.start(tile, 2 * stage * TILE_BYTES, given.keys - tile * COLUMNS);
    if (DROPOUT) copy_kept<COLUMNS>(base + Room::kept + stage * ROWS * 8, given, first_query, tile * COLUMNS);
  };
  auto start_tile = [&](int tile, int stage) {
    k.start(tile, 2 * stage * TILE_BYTES, given.keys - tile * COLUMNS);
    if (given.bias) {
      copy_bias<ROWS, COLUMNS, 1>(base + Room::bias + stage * Room::window, bias,
                                  tile * COLUMNS - first_query - ROWS + given.queries, bias_count);
    }
    copy_values(tile, stage);
  };

  // The first tile is seldom not wanted, so it is on its way while that is found out.
  start_tile(0, 0);
  const bool mixed = look_over_keys<COLUMNS>(given, first_query, false, visible, flags,
                                             reinterpret_cast<int*>(shared + Room::range));
  // Where none is wanted, all of the first is hidden: with one tile at least, the compiler sees that it need not
  // wait for products that are yet to be read.
  int tile = next_wanted(flags, -1, tiles);
  if (tile == tiles) tile = 0;
  await_copies();
  __syncthreads();
  if (tile > 0) start_tile(tile, 0);

  const u32 queries = place_of(base + Room::q);
  float o[BLOCKS][D / 8][4] = {}, total[4] = {}, greatest[4];
#pragma unroll
  for (int row = 0; row < 4; row++) greatest[row] = minus_infinity();
  u32 left[BLOCKS][STEPS][4] = {};
  const float* window_lane =
      reinterpret_cast<const float*>(shared + Room::bias) + place_in_window<ROWS, COLUMNS>();
  const uint2* kept_lane = reinterpret_cast<const uint2*>(shared + Room::kept) + 32 * warp + g;

  // Whether the probability of this tile's key `8 n + 2 c + e` and a lane's row is kept, at bit `8 n + e`.
  auto kept_bits = [&](int stage, int row) {
    uint2 words = kept_lane[stage * ROWS + 8 * row];
    return ((u64(words.y) << 32) | words.x) >> (2 * c);
  };
  auto add_values = [&](int block, u32 values) {
    hold(left[block]);
    begin_products();
#pragma unroll
    for (int step = 0; step < STEPS; step++)
      add_product_with_rows(o[block], left[block][step], matrix_at(values + units(16 * ROW_BYTES * step)));
    end_group();
  };

  int stage = 0;
  do {
    const int following = next_wanted(flags, tile, tiles);
    await_copies(), show_copies();
    __syncthreads();
    if (following < tiles) start_tile(following, next_stage(stage));

    const float* window = window_lane + stage * (Room::window / 4);
    const u32 keys = place_of(base + Room::stages + stage * 2 * TILE_BYTES);
    float p[BLOCKS][N][4];
    begin_products();
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
#pragma unroll
      for (int block = 0; block < BLOCKS; block++) {
        const u64 left_at = matrix_at(queries + units(64 * ROW_BYTES * block + 32 * step));
        const u64 right_at = matrix_at(keys + units(32 * step));
        if (step == 0) product_of_64_rows<false>(p[block], left_at, right_at);
        else product_of_64_rows<true>(p[block], left_at, right_at);
      }
    }
    end_group();
    // The scores, and before them what the last tile added to the output, which may have to be scaled.
    await_products<0>();
    hold(p), hold(left), hold(o);
    if (given.bias) {
#pragma unroll
      for (int block = 0; block < BLOCKS; block++) add_bias<N>(p[block], window, block);
    }
    if (flags[tile] != WANTED) {
      hide<BLOCKS, N>(p, given, visible[tile], warp_query + g, tile * COLUMNS, mixed, 0);
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
    hold(o);
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
      float kept_p[N][4];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = 2 * block + half;
        const float shift = greatest[row] == minus_infinity() ? 0.f : -greatest[row] * LOG2_E;
        const u64 bits = DROPOUT ? kept_bits(stage, row) : 0;
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const float x = power_of_two(fmaf(p[block][n][2 * half + e], LOG2_E, shift));
            total[row] += x;
            kept_p[n][2 * half + e] = !DROPOUT || (bits >> (8 * n + e)) & 1 ? x : 0.f;
          }
        }
      }
      as_left<N>(left[block], kept_p);
      add_values(block, keys + units(TILE_BYTES));
    }
    tile = following, stage = next_stage(stage);
  } while (tile < tiles);
  await_products<0>();
  hold(o), hold(left);

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
      await_copies(), show_copies();
      __syncthreads();
#pragma unroll
      for (int block = 0; block < BLOCKS; block++) {
        float ones[N][4];
#pragma unroll
        for (int r = 0; r < 4; r += 2) {
          const int row = 2 * block + r / 2;
          const u64 bits = DROPOUT ? kept_bits(0, row) : ~u64(0);
#pragma unroll
          for (int n = 0; n < N; n++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
              const bool counts = tile * COLUMNS + 8 * n + 2 * c + e < given.keys && (bits >> (8 * n + e)) & 1 &&
                                  (blind >> row) & 1;
              ones[n][r + e] = counts ? 1.f : 0.f;
            }
          }
        }
        as_left<N>(left[block], ones);
        add_values(block, place_of(base + Room::stages + TILE_BYTES));
        await_products<0>();
        hold(o[block]), hold(left[block]);
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
  store_rows<D, BLOCKS>(o, factor, shared + Room::q + warp * (32 * ROW_BYTES),
                        out + (query_row + 32 * warp) * out_stride + blockIdx.y * D, out_stride,
                        given.queries - warp_query);
}

// ---- Gradients of queries and bias ----

struct QueriesRoom {
  static constexpr int q = 0;
  static constexpr int gradient = ROWS * ROW_BYTES;
  // Queries and gradients are in registers before the ring is needed.
  static constexpr int ring = 0;
  static constexpr int stages = WARPS * 8 * RING_PITCH * 4;
  static constexpr int bias = stages + STAGES * 2 * TILE_BYTES;
  static constexpr int window = 2 * 4 * WINDOW<ROWS, COLUMNS>;
  static constexpr int kept = bias + STAGES * window;
  static constexpr int rows = kept + STAGES * ROWS * 8;
  static constexpr int range = rows + 2 * ROWS * 4;
  static constexpr int visible = range + 64;

  static_assert(stages >= 2 * ROWS * ROW_BYTES && stages % 1024 == 0 && TILE_BYTES % 1024 == 0, "whole tiles");
};

// One block for 128 queries of a head; what it leaves for the pass over keys is said at `sums_of_rows`. A warp has
// 32 queries that follow each other, 16 of them in each block of 64, so that its sums along diagonals are those of
// attention.cu. Keys are taken 32 at a time: then the scores of both blocks fit into registers at once.
template <bool DROPOUT>
__device__ __forceinline__ void backward_queries(const Given<bf16> given, const bf16* out, int out_stride,
                                                 const bf16* gradient, int gradient_stride, const float* sums,
                                                 bf16* q_gradient, int q_gradient_stride, float* minus_sums,
                                                 float* minus_dots, float* diagonals, int diagonals_pitch) {
  using Room = QueriesRoom;
  constexpr int CHUNK = 32, N = CHUNK / 8;
  const u32 base = shared_address(shared);
  const int warp = threadIdx.x >> 5, g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3;
  const int tiles = (given.keys + COLUMNS - 1) / COLUMNS;
  const int first_query = blockIdx.x * ROWS, warp_query = first_query + 32 * warp;
  const size_t query_row = size_t(blockIdx.z) * given.queries + first_query;
  const size_t key_row = size_t(blockIdx.z) * given.key_room;
  const Mover<COLUMNS, D> k(base + Room::stages, given.k + key_row * given.k_stride + blockIdx.y * D,
                            given.k_stride);
  const Mover<COLUMNS, D> v(base + Room::stages + TILE_BYTES,
                            given.v + key_row * given.v_stride + blockIdx.y * D, given.v_stride);
  const int bias_count = given.queries + given.keys - 1;
  const float* bias = given.bias + size_t(blockIdx.y) * bias_count;
  u64* visible = reinterpret_cast<u64*>(shared + Room::visible);
  u32* flags = reinterpret_cast<u32*>(visible + tiles);
  float* rows = reinterpret_cast<float*>(shared + Room::rows);
  float* ring = reinterpret_cast<float*>(shared + Room::ring);
  out += query_row * out_stride + blockIdx.y * D;
  gradient += query_row * gradient_stride + blockIdx.y * D;

  Mover<ROWS, D>(base + Room::q, given.q + query_row * given.q_stride + blockIdx.y * D, given.q_stride)
      .start(0, 0, given.queries - first_query);
  Mover<ROWS, D>(base + Room::gradient, gradient, gradient_stride).start(0, 0, given.queries - first_query);
  auto start_tile = [&](int tile, int stage) {
    k.start(tile, 2 * stage * TILE_BYTES, given.keys - tile * COLUMNS);
    v.start(tile, 2 * stage * TILE_BYTES, given.keys - tile * COLUMNS);
    if (given.bias) {
      copy_bias<ROWS, COLUMNS, 1>(base + Room::bias + stage * Room::window, bias,
                                  tile * COLUMNS - first_query - ROWS + given.queries, bias_count);
    }
    if (DROPOUT) copy_kept<COLUMNS>(base + Room::kept + stage * ROWS * 8, given, first_query, tile * COLUMNS);
  };
  start_tile(0, 0);

  const bool is_blind = sums_of_rows<D>(given, first_query, out, out_stride, gradient, gradient_stride, sums,
                                        rows, minus_sums, minus_dots);
  const bool any_blind = __syncthreads_or(is_blind);
  const bool mixed = look_over_keys<COLUMNS>(given, first_query, any_blind, visible, flags,
                                             reinterpret_cast<int*>(shared + Room::range));

  const int first_tile = next_wanted(flags, -1, tiles);
  int end = tiles;
  while (end > 0 && !flags[end - 1]) end--;

  float minus_sum[4], minus_dot[4];
  u32 blind = 0;
#pragma unroll
  for (int row = 0; row < 4; row++) {
    const int at = 32 * warp + 8 * row + g, i = first_query + at;
    minus_sum[row] = rows[at], minus_dot[row] = rows[ROWS + at];
    if (any_blind && i < given.queries && sums[given.head() * given.queries + i] == minus_infinity()) {
      blind |= 1u << row;
    }
  }

  await_copies();
  __syncthreads();
  if (0 < first_tile && first_tile < tiles) start_tile(first_tile, 0);
  Left<D, BLOCKS, true> queries, gradients;
  queries.start(base + Room::q + warp * (32 * ROW_BYTES));
  gradients.start(base + Room::gradient + warp * (32 * ROW_BYTES));
  if (diagonals) {
    __syncthreads();
    for (int at = threadIdx.x; at < WARPS * 8 * RING_PITCH / 4; at += THREADS) {
      reinterpret_cast<float4*>(ring)[at] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
    diagonals += (given.head() * gridDim.x + blockIdx.x) * diagonals_pitch;
  }

  float dq[BLOCKS][D / 8][4] = {};
  u32 left[BLOCKS][CHUNK / 16][4] = {};
  Pair under_way[3] = {};
  const float* window_lane =
      reinterpret_cast<const float*>(shared + Room::bias) + place_in_window<ROWS, COLUMNS>();
  const uint2* kept_lane = reinterpret_cast<const uint2*>(shared + Room::kept) + 32 * warp + g;
  float* ring_lane = ring + (8 * warp + g) * RING_PITCH + 2 * c;

  for (int tile = 0, stage = 0; tile < end; tile++) {
    const u32 flag = flags[tile];
    if (flag) await_copies(), show_copies();
    __syncthreads();
    if (diagonals && tile > 0) leave_diagonals<COLUMNS>(ring, diagonals, tile - 1);
    float* ring_at = ring_lane + (tile * COLUMNS & (RING - 1));
    if (!flag) {
      if (diagonals) {
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++) {
          *reinterpret_cast<Pair*>(ring_at + 8 * n) = under_way[0];
          under_way[0] = under_way[1], under_way[1] = under_way[2], under_way[2] = Pair{0.f, 0.f};
        }
      }
      continue;
    }
    const int following = next_wanted(flags, tile, tiles);
    if (following < tiles) start_tile(following, next_stage(stage));

    const float* window = window_lane + stage * (Room::window / 4);
    u32 keys = place_of(base + Room::stages + stage * 2 * TILE_BYTES);
    u64 seen = visible[tile];
#pragma unroll 1
    for (int chunk = 0; chunk < COLUMNS / CHUNK; chunk++) {
      float p[BLOCKS][N][4], dp[BLOCKS][N][4];
      begin_products();
#pragma unroll
      for (int step = 0; step < D / 16; step++) {
#pragma unroll
        for (int block = 0; block < BLOCKS; block++) {
          const u64 right = matrix_at(keys + units(32 * step));
          if (step == 0) product_of_32_rows<false>(p[block], queries.held[step][block], right);
          else product_of_32_rows<true>(p[block], queries.held[step][block], right);
        }
      }
      end_group();
#pragma unroll
      for (int step = 0; step < D / 16; step++) {
#pragma unroll
        for (int block = 0; block < BLOCKS; block++) {
          const u64 right = matrix_at(keys + units(TILE_BYTES + 32 * step));
          if (step == 0) product_of_32_rows<false>(dp[block], gradients.held[step][block], right);
          else product_of_32_rows<true>(dp[block], gradients.held[step][block], right);
        }
      }
      end_group();

      // The scores, and before them what the last chunk added to `dq`.
      await_products<1>();
      hold(p), hold(left);
      if (given.bias) {
#pragma unroll
        for (int block = 0; block < BLOCKS; block++) add_bias<N>(p[block], window, block);
      }
      if (flag & MASKED) {
        hide<BLOCKS, N>(p, given, seen, warp_query + g, tile * COLUMNS + CHUNK * chunk, mixed, blind);
      }
#pragma unroll
      for (int row = 0; row < 4; row++) {
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
          for (int r = (row & 1) * 2; r < (row & 1) * 2 + 2; r++)
            p[row >> 1][n][r] = power_of_two(fmaf(p[row >> 1][n][r], LOG2_E, minus_sum[row]));
        }
      }
      await_products<0>();
      hold(dp);
#pragma unroll
      for (int row = 0; row < 4; row++) {
        u32 bits = 0;
        if (DROPOUT) {
          const uint2 words = kept_lane[stage * ROWS + 8 * row];
          bits = (chunk ? words.y : words.x) >> (2 * c);
        }
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int r = (row & 1) * 2 + e;
            float d = dp[row >> 1][n][r];
            if (DROPOUT) d = (bits >> (8 * n + e)) & 1 ? d * given.kept_scale : 0.f;
            p[row >> 1][n][r] *= d + minus_dot[row];
          }
        }
      }
      if (diagonals) {
#pragma unroll
        for (int n = 0; n < N; n++) {
          const float (&low)[4] = p[0][n], (&high)[4] = p[1][n];
          *reinterpret_cast<Pair*>(ring_at + 8 * n) =
              Pair{under_way[0].x + high[2], under_way[0].y + high[3]};
          under_way[0] = Pair{under_way[1].x + high[0], under_way[1].y + high[1]};
          under_way[1] = Pair{under_way[2].x + low[2], under_way[2].y + low[3]};
          under_way[2] = Pair{low[0], low[1]};
        }
      }
#pragma unroll
      for (int block = 0; block < BLOCKS; block++) as_left<N>(left[block], p[block]);
      hold(left), hold(dq);
      begin_products();
#pragma unroll
      for (int step = 0; step < CHUNK / 16; step++) {
#pragma unroll
        for (int block = 0; block < BLOCKS; block++)
          add_product_with_rows(dq[block], left[block][step], matrix_at(keys + units(16 * ROW_BYTES * step)));
      }
      end_group();
      window += CHUNK, ring_at += CHUNK, keys += units(CHUNK * ROW_BYTES), seen >>= CHUNK;
    }
    stage = next_stage(stage);
  }

  await_products<0>();
  hold(dq), hold(left);
  might_read(given.queries < 0, queries.held), might_read(given.queries < 0, gradients.held);
  if (diagonals) {
    float* ring_at = ring_lane + (end * COLUMNS & (RING - 1));
#pragma unroll
    for (int n = 0; n < 3; n++) *reinterpret_cast<Pair*>(ring_at + 8 * n) = under_way[n];
  }
  await_copies();
  __syncthreads();
  if (diagonals) leave_last_diagonals<COLUMNS>(ring, diagonals, end, given.keys);
  const float factor[4] = {1.f, 1.f, 1.f, 1.f};
  store_rows<D, BLOCKS>(dq, factor, shared + Room::stages + warp * (32 * ROW_BYTES),
                        q_gradient + (query_row + 32 * warp) * q_gradient_stride + blockIdx.y * D,
                        q_gradient_stride, given.queries - warp_query);
}

// ---- Gradients of keys and values ----

struct KeysRoom {
  static constexpr int k = 0;
  static constexpr int v = ROWS * ROW_BYTES;
  static constexpr int stages = 2 * ROWS * ROW_BYTES;
  static constexpr int bias = stages + STAGES * 2 * TILE_BYTES;
  static constexpr int window = 2 * 4 * WINDOW<ROWS, COLUMNS>;
  static constexpr int rows = bias + STAGES * window;
  static constexpr int kept = rows + STAGES * 2 * COLUMNS * 4;
  static constexpr int range = kept + STAGES * COLUMNS * 16;
  static constexpr int flags = range + 64;
};

// One block for 128 keys of a head. Scores are transposed here, keys by queries, so that they are left factors of
// both products as they come. One block of 64 keys comes after the other: the sums of both leave no room for more.
template <bool DROPOUT>
__device__ __forceinline__ void backward_keys(const Given<bf16> given, const bf16* gradient,
                                              int gradient_stride, const float* sums, const float* minus_sums,
                                              const float* minus_dots, bf16* k_gradient,
                                              int k_gradient_stride, bf16* v_gradient,
                                              int v_gradient_stride) {
  using Room = KeysRoom;
  constexpr int N = COLUMNS / 8;
  const u32 base = shared_address(shared);
  const int warp = threadIdx.x >> 5, g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3;
  const int tiles = (given.queries + COLUMNS - 1) / COLUMNS;
  const int first_key = blockIdx.x * ROWS, warp_key = first_key + 32 * warp;
  const size_t query_row = size_t(blockIdx.z) * given.queries;
  const size_t key_row = size_t(blockIdx.z) * given.key_room + first_key;
  const Mover<COLUMNS, D> q(base + Room::stages, given.q + query_row * given.q_stride + blockIdx.y * D,
                            given.q_stride);
  const Mover<COLUMNS, D> g_rows(base + Room::stages + TILE_BYTES,
                                 gradient + query_row * gradient_stride + blockIdx.y * D, gradient_stride);
  const int bias_count = given.queries + given.keys - 1;
  const float* bias = given.bias + size_t(blockIdx.y) * bias_count;
  const size_t padded_row = given.head() * ((given.queries + ROWS - 1) / ROWS * ROWS);
  u32* flags = reinterpret_cast<u32*>(shared + Room::flags);
  minus_sums += padded_row, minus_dots += padded_row;
  sums += given.head() * given.queries;

  copy_blocks(base + Room::k, given.k + key_row * given.k_stride + blockIdx.y * D, given.k_stride,
              given.keys - first_key);
  copy_blocks(base + Room::v, given.v + key_row * given.v_stride + blockIdx.y * D, given.v_stride,
              given.keys - first_key);

  auto start_tile = [&](int tile, int stage) {
    const int first = tile * COLUMNS;
    q.start(tile, 2 * stage * TILE_BYTES, given.queries - first);
    g_rows.start(tile, 2 * stage * TILE_BYTES, given.queries - first);
    if (given.bias) {
      copy_bias<ROWS, COLUMNS, -1>(base + Room::bias + stage * Room::window, bias,
                                   first_key - first + ROWS + given.queries - 2, bias_count);
    }
    constexpr int PIECES = COLUMNS / 4;
    if (threadIdx.x < 2 * PIECES) {
      const int piece = threadIdx.x % PIECES;
      const float* from = (threadIdx.x < PIECES ? minus_sums : minus_dots) + first + 4 * piece;
      copy<16>(base + Room::rows + stage * (2 * COLUMNS * 4) + threadIdx.x * 16, from, true);
    }
    if (DROPOUT && threadIdx.x < COLUMNS) {
      const bool there = first + threadIdx.x < given.queries;
      const size_t row = given.head() * given.queries + first + threadIdx.x;
      copy<16>(base + Room::kept + (stage * COLUMNS + threadIdx.x) * 16,
               given.kept + row * given.kept_words() + first_key / 32, there);
    }
  };

  const int guess = given.causal ? max(first_key - given.query_offset, 0) / COLUMNS : 0;
  if (guess < tiles) start_tile(guess, 0);
  u32 seen = 0;
#pragma unroll
  for (int row = 0; row < 4; row++) {
    const int j = warp_key + 8 * row + g;
    const bool may =
        j < given.keys && (!given.key_mask || given.key_mask[size_t(blockIdx.z) * given.keys + j] != 0);
    seen |= u32(may) << row;
  }
  look_over_queries<COLUMNS, ROWS>(given, first_key, sums, flags,
                                   reinterpret_cast<int*>(shared + Room::range));
  int tile = next_wanted(flags, -1, tiles);
  await_copies();
  __syncthreads();
  if (tile != guess && tile < tiles) start_tile(tile, 0);

  const u32 keys = place_of(base + Room::k), values = place_of(base + Room::v);
  float dk[BLOCKS][D / 8][4] = {}, dv[BLOCKS][D / 8][4] = {};
  u32 left_p[COLUMNS / 16][4] = {}, left_ds[COLUMNS / 16][4] = {};
  const float* window_lane =
      reinterpret_cast<const float*>(shared + Room::bias) + place_in_window<ROWS, COLUMNS>();

  for (int stage = 0; tile < tiles; stage = next_stage(stage)) {
    const int following = next_wanted(flags, tile, tiles);
    await_copies(), show_copies();
    __syncthreads();
    if (following < tiles) start_tile(following, next_stage(stage));

    const float* window = window_lane + stage * (Room::window / 4);
    const float* rows = reinterpret_cast<const float*>(shared + Room::rows) + stage * 2 * COLUMNS + 2 * c;
    const u32 queries = place_of(base + Room::stages + stage * 2 * TILE_BYTES);
    const u32 gradients = queries + units(TILE_BYTES);
    const bool masked = flags[tile] & MASKED;
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
      float p[N][4], dp[N][4];
      begin_products();
#pragma unroll
      for (int step = 0; step < D / 16; step++) {
        const u64 left_at = matrix_at(keys + units(64 * ROW_BYTES * block + 32 * step));
        const u64 right_at = matrix_at(queries + units(32 * step));
        if (step == 0) product_of_64_rows<false>(p, left_at, right_at);
        else product_of_64_rows<true>(p, left_at, right_at);
      }
      end_group();
#pragma unroll
      for (int step = 0; step < D / 16; step++) {
        const u64 left_at = matrix_at(values + units(64 * ROW_BYTES * block + 32 * step));
        const u64 right_at = matrix_at(gradients + units(32 * step));
        if (step == 0) product_of_64_rows<false>(dp, left_at, right_at);
        else product_of_64_rows<true>(dp, left_at, right_at);
      }
      end_group();

      // The scores, and before them what the last block added to its sums.
      await_products<1>();
      hold(p), hold(left_p), hold(left_ds);
      if (given.bias) add_bias<N>(p, window, block);
      if (masked) {
        float(&scores)[1][N][4] = reinterpret_cast<float(&)[1][N][4]>(p);
        hide_from_queries<1, N>(scores, given, sums, tile * COLUMNS, warp_key + 16 * block + g,
                                seen >> (2 * block));
      }
      // Bits of a column's queries for this lane's upper row, and 8 bits further on for its lower one.
      auto kept_bits = [&](int n, int e) {
        const u32* words = reinterpret_cast<const u32*>(shared + Room::kept) +
                           (stage * COLUMNS + 8 * n + 2 * c + e) * 4;
        return words[warp] >> (16 * block + g);
      };
#pragma unroll
      for (int n = 0; n < N; n++) {
        const Pair sum = *reinterpret_cast<const Pair*>(rows + 8 * n);
#pragma unroll
        for (int r = 0; r < 4; r++) p[n][r] = power_of_two(fmaf(p[n][r], LOG2_E, r & 1 ? sum.y : sum.x));
      }
      if constexpr (DROPOUT) {
        float kept_p[N][4];
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const u32 bits = kept_bits(n, e);
            kept_p[n][e] = bits & 1 ? p[n][e] : 0.f;
            kept_p[n][2 + e] = (bits >> 8) & 1 ? p[n][2 + e] : 0.f;
          }
        }
        as_left<N>(left_p, kept_p);
      } else {
        as_left<N>(left_p, p);
      }
      hold(left_p), hold(dv[block]);
      begin_products();
#pragma unroll
      for (int step = 0; step < COLUMNS / 16; step++)
        add_product_with_rows(dv[block], left_p[step], matrix_at(gradients + units(16 * ROW_BYTES * step)));
      end_group();

      await_products<1>();
      hold(dp);
#pragma unroll
      for (int n = 0; n < N; n++) {
        const Pair dot = *reinterpret_cast<const Pair*>(rows + COLUMNS + 8 * n);
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float upper = dp[n][e], lower = dp[n][2 + e];
          if (DROPOUT) {
            const u32 bits = kept_bits(n, e);
            upper = bits & 1 ? upper * given.kept_scale : 0.f;
            lower = (bits >> 8) & 1 ? lower * given.kept_scale : 0.f;
          }
          p[n][e] *= upper + (e ? dot.y : dot.x), p[n][2 + e] *= lower + (e ? dot.y : dot.x);
        }
      }
      as_left<N>(left_ds, p);
      hold(left_ds), hold(dk[block]);
      begin_products();
#pragma unroll
      for (int step = 0; step < COLUMNS / 16; step++)
        add_product_with_rows(dk[block], left_ds[step], matrix_at(queries + units(16 * ROW_BYTES * step)));
      end_group();
    }
    tile = following;
  }

  await_products<0>();
  hold(dk), hold(dv), hold(left_p), hold(left_ds);
  // The room of keys and values is free once no warp's products read it.
  __syncthreads();
  float one[4], kept_factor[4];
#pragma unroll
  for (int row = 0; row < 4; row++) one[row] = 1.f, kept_factor[row] = DROPOUT ? given.kept_scale : 1.f;
  const size_t row = key_row + 32 * warp;
  store_rows<D, BLOCKS>(dk, one, shared + Room::k + warp * (32 * ROW_BYTES),
                        k_gradient + row * k_gradient_stride + blockIdx.y * D, k_gradient_stride,
                        given.keys - warp_key);
  store_rows<D, BLOCKS>(dv, kept_factor, shared + Room::v + warp * (32 * ROW_BYTES),
                        v_gradient + row * v_gradient_stride + blockIdx.y * D, v_gradient_stride,
                        given.keys - warp_key);
}

#define KERNELS(DROPOUT, NAME)                                                                            \
  extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                \
      attention_forward_##NAME##_bf16(GIVEN(bf16), bf16* out, int out_stride, float* sums) {              \
    forward<DROPOUT>(TAKEN, out, out_stride, sums);                                                       \
  }                                                                                                       \
  extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_backward_queries_##NAME##_bf16(      \
      GIVEN(bf16), const bf16* out, int out_stride, const bf16* gradient, int gradient_stride,            \
      const float* sums, bf16* q_gradient, int q_gradient_stride, float* minus_sums, float* minus_dots,   \
      float* diagonals, int diagonals_pitch) {                                                            \
    backward_queries<DROPOUT>(TAKEN, out, out_stride, gradient, gradient_stride, sums, q_gradient,        \
                              q_gradient_stride, minus_sums, minus_dots, diagonals, diagonals_pitch);     \
  }                                                                                                       \
  extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_backward_keys_##NAME##_bf16(         \
      GIVEN(bf16), const bf16* gradient, int gradient_stride, const float* sums, const float* minus_sums, \
      const float* minus_dots, bf16* k_gradient, int k_gradient_stride, bf16* v_gradient,                 \
      int v_gradient_stride) {                                                                            \
    backward_keys<DROPOUT>(TAKEN, gradient, gradient_stride, sums, minus_sums, minus_dots, k_gradient,    \
                           k_gradient_stride, v_gradient, v_gradient_stride);                             \
  }

KERNELS(false, 64)
KERNELS(true, 64_dropout)
