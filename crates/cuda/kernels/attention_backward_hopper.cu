// The backward pass of attention in bfloat16 for heads of 64 in one go, on Hopper: scores, exponentials and gradients
// of probabilities are computed once for all three gradients, where attention_hopper.cu computes them twice.
//
// A block of two warpgroups has a head to itself. It takes 128 keys at a time, 64 a warpgroup, and with them walks
// over the queries, 128 at a time in two chunks of 64. Scores are transposed, keys by queries: so they are left
// factors of the products for the gradients of keys and values, whose sums stay in registers, as they come. For the
// gradient of queries they pass through shared memory, where both warpgroups leave them; each then multiplies one of
// the two chunks with all 128 keys. It does so while the scores of the next tile are on their way, and adds the result
// to sums that lie in global memory in the order of the registers: a thread adds to what it alone has written, so the
// order of these sums is that of the keys, every time, and nobody waits for them.
//
// Keys and values are left factors in registers, since a right factor alone takes half of what shared memory can
// deliver.

// Threads of a block, and its warps.
constexpr int ALL = 2 * THREADS, ALL_WARPS = ALL / 32;
// Keys of a block at a time, and queries of a tile and of its chunks.
constexpr int KEYS = 128, QUERIES = 128, CHUNK = 64;
constexpr int TILE_BYTES = 128 * ROW_BYTES;
// Tiles are copied while the one before is worked on.
constexpr int STAGES = 2;
constexpr int N = CHUNK / 8, STEPS = CHUNK / 16;

// ---- Gradient of the bias ----
//
// Its values are sums along diagonals. A lane's values of row `g + 8` of its warp's 16 keys lie on the diagonals of
// those of row `g` in the 8 columns before, so it adds two of them in registers as columns pass by. What comes out
// for row `g` and a column is turned in shared memory: a lane then adds what eight rows have for one diagonal.

constexpr int TURN_PITCH = CHUNK + 8;
constexpr int TURN_BYTES = 8 * TURN_PITCH * 4;

struct Diagonals {
  // This lane's columns in its row of the turned sums, and where its first diagonal starts in them.
  float *mine, *across;
  // Of the columns before, the sums of the last eight, and what is to be added to the next eight.
  Pair last, under_way;

  __device__ __forceinline__ void start(float* turn) {
    const int lane = threadIdx.x & 31;
    mine = turn + (lane >> 2) * TURN_PITCH + 2 * (lane & 3), across = turn + lane;
    last = under_way = Pair{0.f, 0.f};
  }
  __device__ __forceinline__ void leave(int n, Pair x) const { *reinterpret_cast<Pair*>(mine + 8 * n) = x; }
  // Sum of the diagonal that is `place + lane` columns from the first, to `to`.
  __device__ __forceinline__ float sum(int place) const {
    float x = across[place];
#pragma unroll
    for (int g = 1; g < 8; g++) x += across[g * TURN_PITCH + place + g];
    return x;
  }
  // Adds a chunk, and writes the sums of the 64 diagonals that it completes.
  __device__ __forceinline__ void add(const float (&x)[N][4], float* to) {
    __syncwarp();
    leave(0, last);
#pragma unroll
    for (int n = 0; n < N; n++) {
      last = Pair{under_way.x + x[n][2], under_way.y + x[n][3]};
      under_way = Pair{x[n][0], x[n][1]};
      leave(n + 1, last);
    }
    __syncwarp();
    const int lane = threadIdx.x & 31;
    to[lane] = sum(0), to[lane + 32] = sum(32);
  }
  // Writes the sums of the 16 that are left.
  __device__ __forceinline__ void finish(float* to) const {
    __syncwarp();
    leave(0, last), leave(1, under_way), leave(2, Pair{0.f, 0.f});
    __syncwarp();
    const int lane = threadIdx.x & 31;
    if (lane < 16) to[lane] = sum(0);
    __syncwarp();
  }
};

// ---- Gradient of queries ----

// A warpgroup's sums for a chunk of queries: 16 bytes of each of its threads, then the next 16.
__device__ __forceinline__ float* place_of_sums(float* q_sums, int chunk) {
  return q_sums + u32(chunk * (N * THREADS * 4) + threadIdx.x % THREADS * 4);
}
__device__ __forceinline__ void add_sums(float* to, const float (&x)[N][4], bool is_first) {
  if (is_first) {
#pragma unroll
    for (int n = 0; n < N; n++) {
      asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to + n * THREADS * 4), "f"(x[n][0]),
                   "f"(x[n][1]), "f"(x[n][2]), "f"(x[n][3])
                   : "memory");
    }
  } else {
#pragma unroll
    for (int n = 0; n < N; n++) {
      asm volatile("red.global.v4.f32.add [%0], {%1, %2, %3, %4};" ::"l"(to + n * THREADS * 4), "f"(x[n][0]),
                   "f"(x[n][1]), "f"(x[n][2]), "f"(x[n][3])
                   : "memory");
    }
  }
}
// From the second-level cache, where they were added.
__device__ __forceinline__ void load_sums(float (&x)[1][N][4], const float* from) {
#pragma unroll
  for (int n = 0; n < N; n++) {
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x[0][n][0]), "=f"(x[0][n][1]), "=f"(x[0][n][2]), "=f"(x[0][n][3])
                 : "l"(from + n * THREADS * 4)
                 : "memory");
  }
}

// ---- The pass ----

struct Room {
  // Of these keys and of those whose last gradients of scores are yet to be multiplied.
  static constexpr int k = 0;
  // Queries and gradients.
  static constexpr int stages = 2 * TILE_BYTES;
  // Gradients of scores: of each of two tiles of queries two chunks, 128 keys by 64 queries.
  static constexpr int ds = stages + STAGES * 2 * TILE_BYTES;
  // Values are in registers before anything is turned.
  static constexpr int v = ds + 2 * 2 * TILE_BYTES;
  static constexpr int turn = v;
  static constexpr int bias = turn + ALL_WARPS * TURN_BYTES;
  static constexpr int window = 2 * 4 * WINDOW<KEYS, QUERIES>;
  static constexpr int kept = bias + STAGES * window;
  static constexpr int range = kept + STAGES * QUERIES * 16;
  // For every query, padded to whole tiles: what the forward pass left, `-log2` of the sum of exponentials, minus the
  // sum of probability times its gradient; for every warp diagonals, 16 more than queries; for every tile two words.
  static constexpr int queries = range + 128;

  static_assert(ALL_WARPS * TURN_BYTES >= TILE_BYTES && TILE_BYTES % 1024 == 0, "whole tiles");
};

template <bool DROPOUT>
__device__ __forceinline__ void backward(const Given<bf16> given, const bf16* out, int out_stride,
                                         const bf16* gradient, int gradient_stride, const float* all_sums,
                                         bf16* q_gradient, int q_gradient_stride, bf16* k_gradient,
                                         int k_gradient_stride, bf16* v_gradient, int v_gradient_stride,
                                         float* q_sums, float* diagonals, int diagonals_pitch) {
  const u32 base = shared_address(shared);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
  // The same for a whole warp, which the compiler does not see by itself.
  const int group = __shfl_sync(ALL_LANES, threadIdx.x / THREADS, 0);
  const int tiles = (given.queries + QUERIES - 1) / QUERIES, padded = tiles * QUERIES;
  const int blocks = (given.keys + KEYS - 1) / KEYS;
  const size_t query_row = size_t(blockIdx.z) * given.queries;
  const int column = blockIdx.y * D;
  out += query_row * out_stride + column, gradient += query_row * gradient_stride + column;
  all_sums += given.head() * given.queries;
  q_sums += given.head() * padded * D;
  const int bias_count = given.queries + given.keys - 1;
  const float* bias = given.bias + size_t(blockIdx.y) * bias_count;

  float* sums = reinterpret_cast<float*>(shared + Room::queries);
  float *minus_sums = sums + padded, *minus_dots = minus_sums + padded, *along = minus_dots + padded;
  const int along_pitch = padded + 16;
  u32 *flags = reinterpret_cast<u32*>(along + ALL_WARPS * along_pitch), *touched = flags + tiles;

  const Mover<QUERIES, D, ALL> q(base + Room::stages, given.q + query_row * given.q_stride + column,
                                 given.q_stride);
  const Mover<QUERIES, D, ALL> gradients(base + Room::stages + TILE_BYTES, gradient, gradient_stride);

  auto start_tile = [&](int block, int tile, int stage) {
    const int first = tile * QUERIES;
    q.start(tile, 2 * stage * TILE_BYTES, given.queries - first);
    gradients.start(tile, 2 * stage * TILE_BYTES, given.queries - first);
    if (given.bias) {
      copy_bias<KEYS, QUERIES, -1, ALL>(base + Room::bias + stage * Room::window, bias,
                                        block * KEYS - first + KEYS + given.queries - 2, bias_count);
    }
    if (DROPOUT && threadIdx.x < QUERIES) {
      const size_t row = given.head() * given.queries + first + threadIdx.x;
      copy<16>(base + Room::kept + (stage * QUERIES + threadIdx.x) * 16,
               given.kept + row * given.kept_words() + block * (KEYS / 32),
               first + threadIdx.x < given.queries);
    }
  };
  // The tile that is first unless masks hide it.
  auto guess = [&](int block) {
    return given.causal ? max(block * KEYS - given.query_offset, 0) / QUERIES : 0;
  };
  // Where tiles and their gradients of scores, and where keys lie.
  int stage = 0, k_stage = 0;
  auto start_block = [&](int block) {
    const size_t row = size_t(blockIdx.z) * given.keys + block * KEYS;
    const int keys_there = given.keys - block * KEYS;
    const bf16 *k = given.k + row * given.k_stride + column, *v = given.v + row * given.v_stride + column;
    Mover<KEYS, D, ALL>(base + Room::k + k_stage * TILE_BYTES, k, given.k_stride).start(0, 0, keys_there);
    Mover<KEYS, D, ALL>(base + Room::v, v, given.v_stride).start(0, 0, keys_there);
    if (guess(block) < tiles) start_tile(block, guess(block), stage);
  };

  start_block(0);
  for (int i = threadIdx.x; i < padded; i += ALL) {
    const float sum = i < given.queries ? all_sums[i] : 0.f;
    sums[i] = sum, minus_sums[i] = i < given.queries ? minus_log2(sum, given.keys) : minus_infinity();
  }
#pragma unroll 8
  for (int first = 0; first < padded; first += ALL / 8) {
    const int row = first + threadIdx.x / 8;
    const float dot = dot_of_rows<D>(out, out_stride, gradient, gradient_stride, row, given.queries);
    if (threadIdx.x % 8 == 0) minus_dots[row] = -dot;
  }
  for (int tile = threadIdx.x; tile < tiles; tile += ALL) touched[tile] = 0;
  __syncthreads();

  const u32 place_of_ds = rows_first<D>(base + Room::ds + warp * (16 * ROW_BYTES));
  const float* window_lane =
      reinterpret_cast<const float*>(shared + Room::bias) + place_in_window<KEYS, QUERIES, ALL>();
  Diagonals turned;

  // The tile whose gradients of scores are yet to be multiplied, whether its sums are the first, and its keys.
  int before = -1;
  bool is_first = false;
  u32 keys_before = place_of(base + Room::k);
  // Without a tile, the product is of whatever lies there, and left to nobody: around a branch, the compiler would let
  // no product run beside another.
  auto multiply_ds = [&](float (&dq)[N][4]) {
    const u32 ds_at = place_of(base + Room::ds) + (2 * (stage ^ 1) + group) * units(TILE_BYTES);
#pragma unroll
    for (int step = 0; step < KEYS / 16; step++) {
      const u64 left_at = matrix_at(ds_at + units(16 * ROW_BYTES * step));
      const u64 right_at = matrix_at(keys_before + units(16 * ROW_BYTES * step));
      if (step == 0) product_over_rows<false>(dq, left_at, right_at);
      else product_over_rows<true>(dq, left_at, right_at);
    }
    end_group();
  };
  auto leave_dq = [&](const float (&dq)[N][4]) {
    if (before >= 0) add_sums(place_of_sums(q_sums, 2 * before + group), dq, is_first);
  };

  for (int block = 0; block < blocks; block++) {
    const int first_key = block * KEYS, key = first_key + 16 * warp + g;
    u32 seen = 0;
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const int j = key + 8 * row;
      const bool may =
          j < given.keys && (!given.key_mask || given.key_mask[size_t(blockIdx.z) * given.keys + j] != 0);
      seen |= u32(may) << row;
    }
    look_over_queries<QUERIES, KEYS, ALL>(given, first_key, sums, flags,
                                          reinterpret_cast<int*>(shared + Room::range));
    const int first_tile = next_wanted(flags, -1, tiles);
    await_copies();
    __syncthreads();
    if (first_tile != guess(block) && first_tile < tiles) start_tile(block, first_tile, stage);
    Left<D, 1, true> keys, values;
    keys.start(base + Room::k + k_stage * TILE_BYTES + warp * (16 * ROW_BYTES));
    values.start(base + Room::v + warp * (16 * ROW_BYTES));

    float dk[1][D / 8][4] = {}, dv[1][D / 8][4] = {};
    turned.start(reinterpret_cast<float*>(shared + Room::turn + warp * TURN_BYTES));
    float* along_warp = along + warp * along_pitch;
    int tile = first_tile, end = first_tile;
    while (tile < tiles) {
      const int following = next_wanted(flags, tile, tiles);
      await_copies(), show_copies();
      // Of what the warps have left for products everything is there, and nothing that they read is needed any more.
      __syncthreads();

      const float* window = window_lane + stage * (Room::window / 4);
      const float* rows = minus_sums + tile * QUERIES + 2 * c;
      const u32 queries_at = place_of(base + Room::stages + stage * 2 * TILE_BYTES);
      const u32 gradients_at = queries_at + units(TILE_BYTES);
      const bool masked = flags[tile] & MASKED || first_key + KEYS > given.keys;
      float s[2][N][4], dp[N][4];
      // Probabilities, then the gradients of their scores: registers would not do for both at once.
      u32 left[STEPS][4];

      auto start_scores = [&](int chunk, float (&to)[N][4]) {
        begin_products();
#pragma unroll
        for (int step = 0; step < D / 16; step++) {
          const u64 right_at = matrix_at(queries_at + units(CHUNK * ROW_BYTES * chunk + 32 * step));
          if (step == 0) product_of_64_rows<false>(to, keys.held[step][0], right_at);
          else product_of_64_rows<true>(to, keys.held[step][0], right_at);
        }
        end_group();
      };
      auto start_gradients_of_p = [&](int chunk) {
        begin_products();
#pragma unroll
        for (int step = 0; step < D / 16; step++) {
          const u64 right_at = matrix_at(gradients_at + units(CHUNK * ROW_BYTES * chunk + 32 * step));
          if (step == 0) product_of_64_rows<false>(dp, values.held[step][0], right_at);
          else product_of_64_rows<true>(dp, values.held[step][0], right_at);
        }
        end_group();
      };
      // Bits of a column's query for this lane's upper row, and 8 bits further on for its lower one.
      auto kept_bits = [&](int chunk, int n, int e) {
        const u32* words = reinterpret_cast<const u32*>(shared + Room::kept) +
                           (stage * QUERIES + CHUNK * chunk + 8 * n + 2 * c + e) * 4;
        return words[warp >> 1] >> (16 * (warp & 1) + g);
      };
      auto exponentiate = [&](int chunk, float (&p)[N][4]) {
        if (given.bias) add_bias<N>(p, window + CHUNK * chunk, 0);
        if (masked) {
          float(&scores)[1][N][4] = reinterpret_cast<float(&)[1][N][4]>(p);
          hide_from_queries<1, N>(scores, given, sums, tile * QUERIES + CHUNK * chunk, key, seen);
          // Keys that there are not hide from queries that see nothing too.
#pragma unroll
          for (int r = 0; r < 4; r++) {
            if (key + 8 * (r >> 1) >= given.keys) {
#pragma unroll
              for (int n = 0; n < N; n++) p[n][r] = minus_infinity();
            }
          }
        }
#pragma unroll
        for (int n = 0; n < N; n++) {
          const Pair sum = *reinterpret_cast<const Pair*>(rows + CHUNK * chunk + 8 * n);
#pragma unroll
          for (int r = 0; r < 4; r++) p[n][r] = power_of_two(fmaf(p[n][r], LOG2_E, r & 1 ? sum.y : sum.x));
        }
      };
      auto add_to_values = [&](int chunk, const float (&p)[N][4]) {
        if constexpr (DROPOUT) {
          float kept_p[N][4];
#pragma unroll
          for (int n = 0; n < N; n++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
              const u32 bits = kept_bits(chunk, n, e);
              kept_p[n][e] = bits & 1 ? p[n][e] : 0.f;
              kept_p[n][2 + e] = (bits >> 8) & 1 ? p[n][2 + e] : 0.f;
            }
          }
          as_left<N>(left, kept_p);
        } else {
          as_left<N>(left, p);
        }
        hold(left), hold(dv);
        begin_products();
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
          const u64 right_at = matrix_at(gradients_at + units((CHUNK * chunk + 16 * step) * ROW_BYTES));
          add_product_with_rows(dv[0], left[step], right_at);
        }
        end_group();
      };
      // From probabilities and their gradients those of scores.
      auto differentiate = [&](int chunk, float (&p)[N][4]) {
#pragma unroll
        for (int n = 0; n < N; n++) {
          const Pair dot = *reinterpret_cast<const Pair*>(rows + padded + CHUNK * chunk + 8 * n);
#pragma unroll
          for (int e = 0; e < 2; e++) {
            float upper = dp[n][e], lower = dp[n][2 + e];
            if (DROPOUT) {
              const u32 bits = kept_bits(chunk, n, e);
              upper = bits & 1 ? upper * given.kept_scale : 0.f;
              lower = (bits >> 8) & 1 ? lower * given.kept_scale : 0.f;
            }
            p[n][e] *= upper + (e ? dot.y : dot.x), p[n][2 + e] *= lower + (e ? dot.y : dot.x);
          }
        }
      };
      auto store_ds = [&](int chunk) {
#pragma unroll
        for (int step = 0; step < STEPS; step++)
          store_matrices((place_of_ds ^ (step << 5)) + (2 * stage + chunk) * TILE_BYTES, left[step]);
      };
      auto add_to_keys = [&](int chunk, const float (&ds)[N][4]) {
        as_left<N>(left, ds);
        hold(left), hold(dk);
        begin_products();
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
          const u64 right_at = matrix_at(queries_at + units((CHUNK * chunk + 16 * step) * ROW_BYTES));
          add_product_with_rows(dk[0], left[step], right_at);
        }
        end_group();
      };

      start_scores(0, s[0]);
      start_gradients_of_p(0);
      multiply_ds(s[1]);
      if (following < tiles) start_tile(block, following, stage ^ 1);

      await_products<2>();
      hold(s[0]);
      exponentiate(0, s[0]);
      add_to_values(0, s[0]);
      await_products<1>();
      hold(dp), hold(s[1]);
      leave_dq(s[1]);
      start_scores(1, s[1]);
      differentiate(0, s[0]);
      await_products<1>();
      hold(left);
      add_to_keys(0, s[0]);
      hold(dp);
      start_gradients_of_p(1);
      store_ds(0);
      if (diagonals) turned.add(s[0], along_warp + tile * QUERIES);

      await_products<2>();
      hold(s[1]);
      exponentiate(1, s[1]);
      await_products<1>();
      hold(left);
      add_to_values(1, s[1]);
      await_products<1>();
      hold(dp);
      differentiate(1, s[1]);
      await_products<0>();
      hold(left);
      add_to_keys(1, s[1]);
      store_ds(1);
      if (diagonals) {
        turned.add(s[1], along_warp + tile * QUERIES + CHUNK);
        // Tiles between that are not wanted.
        if (following < tiles) {
          const float nothing[N][4] = {};
#pragma unroll 1
          for (int chunk = 2 * (tile + 1); chunk < 2 * following; chunk++)
            turned.add(nothing, along_warp + chunk * CHUNK);
        }
      }
      await_products<0>();
      hold(dk), hold(dv), hold(left);
      before = tile, is_first = !touched[tile];
      keys_before = place_of(base + Room::k) + k_stage * units(TILE_BYTES);
      end = tile + 1, tile = following, stage ^= 1;
    }
    might_read(given.queries < 0, keys.held), might_read(given.queries < 0, values.held);
    const bool any = end > first_tile;
    if (diagonals && any) turned.finish(along_warp + end * QUERIES);
    k_stage ^= any;

    // What the next block takes the place of has been read by all.
    __syncthreads();
    if (block + 1 < blocks) start_block(block + 1);
    for (int at = threadIdx.x; at < tiles; at += ALL) touched[at] |= flags[at];
    if (diagonals) {
      float* to = diagonals + (given.head() * blocks + block) * diagonals_pitch;
      const int low = first_tile * QUERIES, high = end * QUERIES + (any ? 16 : 0);
      for (int at = threadIdx.x; at < given.queries + KEYS - 1; at += ALL) {
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < ALL_WARPS; w++) {
          const int place = at - (KEYS - 16 - 1) + 16 * w;
          if (low <= place && place < high) sum += along[w * along_pitch + place];
        }
        to[at] = sum;
      }
    }
    // The gradients of scores of the tile before the last have been read by all.
    u8* room = shared + Room::ds + stage * 2 * TILE_BYTES + warp * (32 * ROW_BYTES);
    const float one[2] = {1.f, 1.f};
    const float kept_factor[2] = {DROPOUT ? given.kept_scale : 1.f, DROPOUT ? given.kept_scale : 1.f};
    const int warp_key = first_key + 16 * warp;
    const size_t row = size_t(blockIdx.z) * given.keys + warp_key;
    store_rows<D, 1>(dk, one, room, k_gradient + row * k_gradient_stride + column, k_gradient_stride,
                     given.keys - warp_key);
    store_rows<D, 1>(dv, kept_factor, room + 16 * ROW_BYTES, v_gradient + row * v_gradient_stride + column,
                     v_gradient_stride, given.keys - warp_key);
  }

  show_copies();
  __syncthreads();
  float last_dq[N][4];
  begin_products();
  multiply_ds(last_dq);
  await_products<0>();
  hold(last_dq);
  leave_dq(last_dq);
  const float one[2] = {1.f, 1.f};
#pragma unroll 2
  for (int tile = 0; tile < tiles; tile++) {
    float dq[1][N][4] = {};
    if (touched[tile]) load_sums(dq, place_of_sums(q_sums, 2 * tile + group));
    const int warp_query = tile * QUERIES + 16 * warp;
    store_rows<D, 1>(dq, one, shared + Room::stages + warp * (16 * ROW_BYTES),
                     q_gradient + (query_row + warp_query) * q_gradient_stride + column, q_gradient_stride,
                     given.queries - warp_query);
  }
}

#define KERNEL(DROPOUT, NAME)                                                                             \
  extern "C" __global__ void __launch_bounds__(ALL, 1) attention_backward_##NAME##_bf16(                  \
      GIVEN(bf16), const bf16* out, int out_stride, const bf16* gradient, int gradient_stride,            \
      const float* sums, bf16* q_gradient, int q_gradient_stride, bf16* k_gradient,                       \
      int k_gradient_stride, bf16* v_gradient, int v_gradient_stride, float* q_sums, float* diagonals,    \
      int diagonals_pitch) {                                                                              \
    backward<DROPOUT>(TAKEN, out, out_stride, gradient, gradient_stride, sums, q_gradient,                \
                      q_gradient_stride, k_gradient, k_gradient_stride, v_gradient, v_gradient_stride,    \
                      q_sums, diagonals, diagonals_pitch);                                                \
  }

KERNEL(false, 64)
KERNEL(true, 64_dropout)
