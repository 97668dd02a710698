// Updates of many tensors: Adafactor, AdamW, and the norm of all gradients. src/optimizer.rs lays out the
// tables and says in which order what runs.
//
// Work comes in tiles of 256 columns: of a matrix whose rows and columns have moments of their own, else of
// its values in order, 256 a row. A warp takes a row at a time, a lane eight of its values. Every sum has a
// fixed order: partial sums lie in memory, and the block that completes a matrix adds them up.

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int COLS = 256, OF_LANE = COLS / 32;
// Rows of a tile: when gradients are summed, when updates are sized, and when they are applied.
constexpr int SUM_ROWS = 256, SIZE_ROWS = 128, APPLY_ROWS = 32;
// The bit of an item of work that tells tiles to apply from tiles to size.
constexpr u32 TO_APPLY = 1u << 31;

// Flags of a tensor: bfloat16 gradients; moments of rows and columns; every row begins at 16 bytes.
constexpr u32 NARROW = 1, FACTORED = 2, ALIGNED = 4;

struct Tensor {
  void* values;  // float32; bfloat16 if there are rests
  const void* gradient;
  u16* rest;   // what float32 values have beyond their bfloat16 ones, or null
  float* row;  // row means, or AdamW's first moment
  float* col;  // column means, or the second moment of every value
  u64 len;     // values of a matrix
  u64 row_sums, col_sums;
  u32 rows, cols;
  u32 flags;
  u32 first_matrix, first_size_tile, first_apply_tile, first_segment;
  u32 unused;
};

struct Control {
  double learning_rate;
  u64 updates;
  double squares, norm, correction1;
  float gradient_scale;
  u32 applied;
  float decay, inverse_root_correction2;
  u64 left_out;
};

__device__ __forceinline__ u32 parts(u32 whole, u32 part) { return (whole + part - 1) / part; }

__device__ __forceinline__ u32 load_acquire(const u32* from) {
  u32 value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
__device__ __forceinline__ void store_release(u32* to, u32 value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" : : "l"(to), "r"(value) : "memory");
}

// N neighbouring values as they lie in memory: held like this until all loads of a batch are on their way.
template <class T, int N> struct Chunk {
  static constexpr int WORDS = N * sizeof(T) / 4;
  u32 words[WORDS];

  // `STREAM`: nobody reads this again soon.
  template <bool STREAM> __device__ __forceinline__ void load(const T* from) {
    if constexpr (WORDS == 4) {
      const uint4* place = reinterpret_cast<const uint4*>(from);
      uint4 v = STREAM ? __ldcs(place) : *place;
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    } else {
      const uint2* place = reinterpret_cast<const uint2*>(from);
      uint2 v = STREAM ? __ldcs(place) : *place;
      words[0] = v.x, words[1] = v.y;
    }
  }
  // The first `valid` values, zeros behind them.
  __device__ __forceinline__ void load_some(const T* from, int valid) {
#pragma unroll
    for (int i = 0; i < WORDS; i++) words[i] = 0;
#pragma unroll
    for (int i = 0; i < N; i++) {
      if (i >= valid) continue;
      if constexpr (sizeof(T) == 4) words[i] = __float_as_uint(from[i]);
      else words[i / 2] |= u32(from[i].bits) << (16 * (i % 2));
    }
  }
  template <bool EDGE, bool STREAM>
  __device__ __forceinline__ void get(const T* from, int valid, bool aligned) {
    if (!EDGE || (aligned && valid >= N)) load<STREAM>(from);
    else load_some(from, valid);
  }
  __device__ __forceinline__ float value(int i) const {
    if constexpr (sizeof(T) == 4) return __uint_as_float(words[i]);
    else return i % 2 ? high_half(words[i / 2]) : low_half(words[i / 2]);
  }
};

template <bool EDGE>
__device__ __forceinline__ void put(float* to, const float (&v)[4], int valid, bool aligned) {
  if (!EDGE || (aligned && valid >= 4)) {
    __stcs(reinterpret_cast<float4*>(to), make_float4(v[0], v[1], v[2], v[3]));
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (i < valid) to[i] = v[i];
  }
}

// Four neighbouring values of a parameter as they lie in memory. Those that the model has in bfloat16 are float32
// to the optimizer: the model's value in the upper half of 32 bits, and a signed rest that is added to them.
template <bool SPLIT> struct Parameters;
template <> struct Parameters<false> {
  Chunk<float, 4> whole;

  template <bool EDGE> __device__ __forceinline__ void get(const Tensor& t, u64 at, int valid, bool aligned) {
    whole.get<EDGE, true>(static_cast<const float*>(t.values) + at, valid, aligned);
  }
  __device__ __forceinline__ float value(int i) const { return whole.value(i); }
  // The nearest value that can be kept.
  static __device__ __forceinline__ float kept(float x) { return x; }
  template <bool EDGE>
  static __device__ __forceinline__ void set(const Tensor& t, u64 at, const float (&v)[4], int valid, bool aligned) {
    put<EDGE>(static_cast<float*>(t.values) + at, v, valid, aligned);
  }
};
template <> struct Parameters<true> {
  Chunk<bf16, 4> upper, rest;

  template <bool EDGE> __device__ __forceinline__ void get(const Tensor& t, u64 at, int valid, bool aligned) {
    upper.get<EDGE, true>(static_cast<const bf16*>(t.values) + at, valid, aligned);
    rest.get<EDGE, true>(reinterpret_cast<const bf16*>(t.rest) + at, valid, aligned);
  }
  __device__ __forceinline__ float value(int i) const {
    u32 high = upper.words[i / 2], low = rest.words[i / 2];
    return __uint_as_float(i % 2 ? (high & 0xffff0000u) + u32(int(low) >> 16)
                                 : (high << 16) + u32(int(low << 16) >> 16));
  }
  // A value halfway between an even one and the next away from zero rounds to the even one: its rest alone has 17 bits.
  static __device__ __forceinline__ float kept(float x) {
    u32 bits = __float_as_uint(x);
    return x != x ? __uint_as_float(0x7fc00000u) : __uint_as_float(bits - ((bits & 0x1ffffu) == 0x8000u));
  }
  template <bool EDGE>
  static __device__ __forceinline__ void set(const Tensor& t, u64 at, const float (&v)[4], int valid, bool aligned) {
    bf16* values = static_cast<bf16*>(t.values) + at;
    u16* rests = t.rest + at;
    u32 bits[4];
#pragma unroll
    for (int i = 0; i < 4; i++) bits[i] = __float_as_uint(v[i]);
    if (!EDGE || (aligned && valid >= 4)) {
      u32 high[4];
#pragma unroll
      for (int i = 0; i < 4; i++) high[i] = bits[i] + 0x8000u;
      __stcs(reinterpret_cast<uint2*>(values),
             make_uint2(__byte_perm(high[0], high[1], 0x7632), __byte_perm(high[2], high[3], 0x7632)));
      __stcs(reinterpret_cast<uint2*>(rests),
             make_uint2(__byte_perm(bits[0], bits[1], 0x5410), __byte_perm(bits[2], bits[3], 0x5410)));
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (i < valid) values[i].bits = u16((bits[i] + 0x8000u) >> 16), rests[i] = u16(bits[i]);
    }
  }
};

// A tile of one matrix.
struct Tile {
  const Tensor& tensor;
  u32 matrix, row0, col0;

  __device__ __forceinline__ Tile(const Tensor* tensors, uint4 item, u32 rows)
      : tensor(tensors[item.x]), matrix(item.y), row0(item.z * rows), col0((item.w & ~TO_APPLY) * COLS) {}

  __device__ __forceinline__ u64 base() const { return matrix * tensor.len; }
  __device__ __forceinline__ u64 at(u32 row, u32 col) const { return u64(row) * tensor.cols + col; }
  // Values of the matrix that lie in one row from here on; none or less outside.
  template <bool BY_ROW> __device__ __forceinline__ int valid(u32 row, u32 col) const {
    if (BY_ROW) return row < tensor.rows ? int(tensor.cols) - int(col) : 0;
    long long left = (long long)tensor.len - (long long)at(row, col);
    return int(left < 0 ? 0 : left > COLS ? COLS : left);
  }
  // Whether all values are there and can be reached by 16 bytes.
  __device__ __forceinline__ bool whole(u32 rows) const {
    bool by_row = tensor.flags & FACTORED;
    return (tensor.flags & ALIGNED) && row0 + rows <= tensor.rows && col0 + COLS <= tensor.cols &&
           (by_row || u64(row0 + rows) * COLS <= tensor.len);
  }
  // Tiles of `rows` rows that a matrix has, and which of them this one is.
  __device__ __forceinline__ u32 tiles(u32 rows) const {
    return parts(tensor.rows, rows) * parts(tensor.cols, COLS);
  }
  __device__ __forceinline__ u32 number(u32 rows) const {
    return row0 / rows * parts(tensor.cols, COLS) + col0 / COLS;
  }
};

// Gradients of a lane in several rows, all on their way at once: its warp's rows from `row` on, and in each of
// them the chunks from `col` on, the first of which lies at `from`.
template <bool BY_ROW, bool EDGE, bool STREAM, class T, int N, int BATCH, int CHUNKS>
__device__ __forceinline__ void load_batch(const Tile& tile, const T* from, u32 row, u32 col, u32 cols,
                                           bool aligned, Chunk<T, N> (&to)[BATCH][CHUNKS]) {
#pragma unroll
  for (int b = 0; b < BATCH; b++)
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) {
      int valid = EDGE ? tile.valid<BY_ROW>(row + WARPS * b, col + 32 * N * k) : N;
      const T* place = from + u64(WARPS * b) * cols + 32 * N * k;
      to[b][k].template get<EDGE, STREAM>(place, valid, aligned);
    }
}

// Sum over the block, for its first thread. `of_warp` must not be in use.
__device__ __forceinline__ float block_sum(float x, float* of_warp) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x != 0) return 0.f;
  float total = 0.f;
  for (int w = 0; w < WARPS; w++) total += of_warp[w];
  return total;
}

// Sum of what other blocks have written, for all lanes of a warp.
__device__ __forceinline__ double warp_total(const float* values, u32 count) {
  double total = 0.0;
#pragma unroll 8
  for (u32 i = threadIdx.x % 32; i < count; i += 32) total += double(__ldcg(values + i));
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) total += __shfl_xor_sync(0xffffffffu, total, offset);
  return total;
}

// Of the first warp: says that a block has written its part, and whether it was the last of `count`. The
// counter is then 0 again.
__device__ __forceinline__ bool arrive(u32* counter, u32 count) {
  u32 last = 0;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(counter, 1u) == count - 1;
    if (last) *counter = 0;
  }
  last = __shfl_sync(0xffffffffu, last, 0);
  if (last) __threadfence();
  __syncwarp();
  return last;
}

// Sums of squares of a tile of gradients, by row and column for moments of those; what is returned is the sum
// of everything for the first thread.
template <class T, bool BY_ROW, bool EDGE>
__device__ __forceinline__ float sum_tile(const Tile& tile, float* sums, float* shared, float* of_warp) {
  constexpr int N = Lanes<T>::count, CHUNKS = OF_LANE / N, BATCH = EDGE ? 1 : 4;
  const Tensor& t = tile.tensor;
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = t.rows, cols = t.cols;
  u32 row = tile.row0 + warp, col = tile.col0 + lane * N;
  const T* from = static_cast<const T*>(t.gradient) + tile.base() + tile.at(row, col);
  bool aligned = t.flags & ALIGNED;
  float* row_sums = sums + t.row_sums + (u64(tile.matrix) * parts(cols, COLS) + tile.col0 / COLS) * rows;
  float of_col[OF_LANE] = {};
  for (int i = 0; i < SUM_ROWS / WARPS; i += BATCH) {
    if (EDGE && row >= rows) break;
    Chunk<T, N> g[BATCH][CHUNKS];
    load_batch<BY_ROW, EDGE, true>(tile, from, row, col, cols, aligned, g);
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      float of_row = 0.f;
#pragma unroll
      for (int k = 0; k < CHUNKS; k++)
#pragma unroll
        for (int j = 0; j < N; j++) {
          float value = g[b][k].value(j), square = value * value;
          of_col[k * N + j] += square;
          of_row += square;
        }
      if (BY_ROW) {
        of_row = warp_sum(of_row);
        if (lane == 0 && (!EDGE || row + WARPS * b < rows)) row_sums[row + WARPS * b] = of_row;
      }
    }
    row += WARPS * BATCH;
    from += u64(WARPS * BATCH) * cols;
  }
#pragma unroll
  for (int k = 0; k < CHUNKS; k++)
#pragma unroll
    for (int j = 0; j < N; j++) shared[warp * COLS + (k * 32 + lane) * N + j] = of_col[k * N + j];
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < WARPS; w++) total += shared[w * COLS + threadIdx.x];
  if (BY_ROW && tile.col0 + threadIdx.x < cols) {
    u64 row_tile = u64(tile.matrix) * parts(rows, SUM_ROWS) + tile.row0 / SUM_ROWS;
    sums[t.col_sums + row_tile * cols + tile.col0 + threadIdx.x] = total;
  }
  return block_sum(total, of_warp);
}

// Sums of squares of the gradients, unscaled.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
optimizer_sums(const Tensor* tensors, const uint4* items, float* of_tile, float* sums) {
  __shared__ float shared[WARPS * COLS], of_warp[WARPS];
  Tile tile(tensors, items[blockIdx.x], SUM_ROWS);
  u32 flags = tile.tensor.flags;
  bool whole = tile.whole(SUM_ROWS);
  float total;
  if (flags & FACTORED) {
    if (flags & NARROW)
      total = whole ? sum_tile<bf16, true, false>(tile, sums, shared, of_warp)
                    : sum_tile<bf16, true, true>(tile, sums, shared, of_warp);
    else
      total = whole ? sum_tile<float, true, false>(tile, sums, shared, of_warp)
                    : sum_tile<float, true, true>(tile, sums, shared, of_warp);
  } else {
    if (flags & NARROW)
      total = whole ? sum_tile<bf16, false, false>(tile, sums, shared, of_warp)
                    : sum_tile<bf16, false, true>(tile, sums, shared, of_warp);
    else
      total = whole ? sum_tile<float, false, false>(tile, sums, shared, of_warp)
                    : sum_tile<float, false, true>(tile, sums, shared, of_warp);
  }
  if (threadIdx.x == 0) of_tile[blockIdx.x] = total;
}

// One block of 1024 threads.
extern "C" __global__ void __launch_bounds__(1024)
optimizer_total(const float* of_tile, u32 tiles, Control* control) {
  __shared__ double of_warp[32];
  double total = 0.0;
#pragma unroll 8
  for (u32 i = threadIdx.x; i < tiles; i += 1024) total += double(of_tile[i]);
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) total += __shfl_xor_sync(0xffffffffu, total, offset);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x != 0) return;
  total = 0.0;
  for (int w = 0; w < 32; w++) total += of_warp[w];
  control->squares = total;
}

// One thread.
extern "C" __global__ void optimizer_prepare(Control* control, const float* loss, double max_norm,
                                             double decay_exponent, double beta1, double beta2) {
  double norm = sqrt(control->squares);
  bool finite = norm - norm == 0.0 && (!loss || *loss - *loss == 0.f);
  control->norm = norm;
  control->gradient_scale = max_norm > 0.0 ? float(fmin(max_norm / fmax(norm, 2.3e-308), 1.0)) : 1.f;
  // A step that was asked for before the host has seen that the one before it failed must not go on from it.
  bool applied = finite && control->left_out == 0;
  control->applied = applied;
  if (!applied) {
    control->left_out++;
    return;
  }
  double updates = double(++control->updates);
  control->decay = float(1.0 - pow(updates, -decay_exponent));
  control->correction1 = 1.0 - pow(beta1, updates);
  control->inverse_root_correction2 = float(1.0 / sqrt(1.0 - pow(beta2, updates)));
}

// New means over 256 rows or columns of one matrix, and the sum of the rows' means.
extern "C" __global__ void __launch_bounds__(THREADS)
adafactor_moments(const Control* control, const Tensor* tensors, const uint4* items, const float* sums,
                  float* segments, float eps) {
  if (!control->applied) return;
  __shared__ float of_warp[WARPS];
  uint4 item = items[blockIdx.x];
  const Tensor& t = tensors[item.x];
  u32 matrix = item.y, at = item.z * THREADS + threadIdx.x;
  bool of_rows = item.w == 0;
  u32 own = of_rows ? t.rows : t.cols, other = of_rows ? t.cols : t.rows;
  u32 tiles = of_rows ? parts(other, COLS) : parts(other, SUM_ROWS);
  const float* from = sums + (of_rows ? t.row_sums : t.col_sums) + u64(matrix) * tiles * own + at;
  float mean = 0.f;
  if (at < own) {
    float total = 0.f;
#pragma unroll 8
    for (u32 tile = 0; tile < tiles; tile++) total += from[u64(tile) * own];
    float scale = control->gradient_scale, decay = control->decay;
    float* state = (of_rows ? t.row : t.col) + u64(matrix) * own + at;
    mean = decay * *state + (1.f - decay) * (scale * scale * total / float(other) + eps);
    *state = mean;
  }
  if (!of_rows) return;
  float total = block_sum(mean, of_warp);
  if (threadIdx.x == 0) segments[t.first_segment + matrix * parts(t.rows, THREADS) + item.z] = total;
}

// Mean of the row means of a tile's matrix.
__device__ __forceinline__ float row_mean(const Tile& tile, const float* segments) {
  const Tensor& t = tile.tensor;
  u32 count = parts(t.rows, THREADS);
  float total = 0.f;
  for (u32 i = threadIdx.x % 32; i < count; i += 32)
    total += segments[t.first_segment + tile.matrix * count + i];
  return warp_sum(total) / float(t.rows);
}

// One over the root of each column's mean; 0 outside.
template <int N, bool EDGE>
__device__ __forceinline__ void column_factors(const Tile& tile, float (&factors)[OF_LANE]) {
  const Tensor& t = tile.tensor;
#pragma unroll
  for (int k = 0; k < OF_LANE / N; k++) {
    u32 c = tile.col0 + (k * 32 + threadIdx.x % 32) * N;
    const float* means = t.col + u64(tile.matrix) * t.cols + c;
    int valid = EDGE ? int(t.cols) - int(c) : N;
    float values[N];
#pragma unroll
    for (int j = 0; j < N; j += 4) {
      Chunk<float, 4> held;
      held.get<EDGE, false>(means + j, valid - j, t.flags & ALIGNED);
#pragma unroll
      for (int i = 0; i < 4; i++) values[j + i] = held.value(i);
    }
#pragma unroll
    for (int j = 0; j < N; j++) factors[k * N + j] = !EDGE || j < valid ? rsqrtf(values[j]) : 0.f;
  }
}

// The second moment of one value.
struct Moment {
  float decay, scale, eps;
  __device__ __forceinline__ float next(float v, float gradient) const {
    float g = gradient * scale;
    return decay * v + (1.f - decay) * (g * g + eps);
  }
};

// Sum of squares of a tile's updates, before the learning rate, in parts over the block's threads.
template <class T, bool BY_ROW, bool EDGE>
__device__ __forceinline__ float size_tile(const Tile& tile, const float* segments, Moment moment) {
  constexpr int N = Lanes<T>::count, CHUNKS = OF_LANE / N, BATCH = EDGE ? 1 : 4;
  const Tensor& t = tile.tensor;
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = t.rows, cols = t.cols;
  u32 row = tile.row0 + warp, col = tile.col0 + lane * N;
  const T* from = static_cast<const T*>(t.gradient) + tile.base() + tile.at(row, col);
  const float* second = t.col + tile.base() + tile.at(row, col);
  const float* row_means = t.row + u64(tile.matrix) * rows + row;
  bool aligned = t.flags & ALIGNED;
  float factors[OF_LANE], mean = 0.f, total = 0.f;
  if (BY_ROW) {
    column_factors<N, EDGE>(tile, factors);
    mean = row_mean(tile, segments);
  }
  for (int i = 0; i < SIZE_ROWS / WARPS; i += BATCH) {
    if (EDGE && row >= rows) break;
    Chunk<T, N> g[BATCH][CHUNKS];
    load_batch<BY_ROW, EDGE, false>(tile, from, row, col, cols, aligned, g);
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      float of_row = 0.f;
#pragma unroll
      for (int k = 0; k < CHUNKS; k++) {
        int valid = EDGE ? tile.valid<BY_ROW>(row + WARPS * b, col + 32 * N * k) : N;
#pragma unroll
        for (int j = 0; j < N; j++) {
          float value = g[b][k].value(j);
          if (BY_ROW) {
            float scaled = value * factors[k * N + j];
            of_row += scaled * scaled;
          } else if (!EDGE || j < valid) {
            float scaled = value * moment.scale;
            of_row += scaled * scaled / moment.next(second[u64(WARPS * b) * cols + 32 * N * k + j], value);
          }
        }
      }
      if (BY_ROW) {
        float factor = moment.scale * rsqrtf(row_means[WARPS * b] / mean);
        of_row *= factor * factor;
      }
      total += of_row;
    }
    row += WARPS * BATCH;
    from += u64(WARPS * BATCH) * cols;
    second += u64(WARPS * BATCH) * cols;
    row_means += WARPS * BATCH;
  }
  return total;
}

// What is kept of a parameter and the rate of its update, once all tiles of the matrix are sized.
__device__ __forceinline__ float2 step_of(const u32* ready, const float2* steps, u32 matrix, float2* shared) {
  if (threadIdx.x == 0) {
    while (!load_acquire(ready + matrix)) __nanosleep(100);
    *shared = __ldcg(steps + matrix);
  }
  __syncthreads();
  return *shared;
}

// Applies the update to a tile and returns the sum of squares of its new values, in parts over the threads.
template <class T, bool SPLIT, bool BY_ROW, bool EDGE>
__device__ __forceinline__ float apply_tile(const Tile& tile, const float* segments, Moment moment,
                                            const u32* ready, const float2* steps, float2* shared) {
  constexpr int N = 4, CHUNKS = OF_LANE / N, BATCH = EDGE ? 1 : 2;
  const Tensor& t = tile.tensor;
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = t.rows, cols = t.cols;
  u32 row = tile.row0 + warp, col = tile.col0 + lane * N;
  u64 at = tile.base() + tile.at(row, col);
  const T* gradient = static_cast<const T*>(t.gradient) + at;
  float* second = t.col + at;
  const float* row_means = t.row + u64(tile.matrix) * rows + row;
  bool aligned = t.flags & ALIGNED;
  float factors[OF_LANE], mean = 0.f, total = 0.f;
  float2 step = {};
#pragma unroll
  for (int i = 0; i < APPLY_ROWS / WARPS; i += BATCH) {
    Parameters<SPLIT> p[BATCH][CHUNKS];
    Chunk<T, N> g[BATCH][CHUNKS];
#pragma unroll
    for (int b = 0; b < BATCH; b++)
#pragma unroll
      for (int k = 0; k < CHUNKS; k++) {
        int valid = EDGE ? tile.valid<BY_ROW>(row + WARPS * b, col + 32 * N * k) : N;
        u64 place = u64(WARPS * b) * cols + 32 * N * k;
        p[b][k].template get<EDGE>(t, at + place, valid, aligned);
        g[b][k].template get<EDGE, true>(gradient + place, valid, aligned);
      }
    if (i == 0) {
      if (BY_ROW) {
        column_factors<N, EDGE>(tile, factors);
        mean = row_mean(tile, segments);
      }
      step = step_of(ready, steps, t.first_matrix + tile.matrix, shared);
      step.y *= BY_ROW ? moment.scale * sqrtf(mean) : moment.scale;
    }
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      if (EDGE && row + WARPS * b >= rows) continue;
      float rate = BY_ROW ? step.y * rsqrtf(row_means[WARPS * b]) : step.y;
#pragma unroll
      for (int k = 0; k < CHUNKS; k++) {
        int valid = EDGE ? tile.valid<BY_ROW>(row + WARPS * b, col + 32 * N * k) : N;
        u64 place = u64(WARPS * b) * cols + 32 * N * k;
        float next[N];
        if (BY_ROW) {
#pragma unroll
          for (int j = 0; j < N; j++)
            next[j] = Parameters<SPLIT>::kept(p[b][k].value(j) * step.x -
                                              rate * g[b][k].value(j) * factors[k * N + j]);
        } else {
          Chunk<float, N> held;
          held.template get<EDGE, true>(second + place, valid, aligned);
          float v[N];
#pragma unroll
          for (int j = 0; j < N; j++) {
            v[j] = moment.next(held.value(j), g[b][k].value(j));
            next[j] = Parameters<SPLIT>::kept(p[b][k].value(j) * step.x -
                                              rate * g[b][k].value(j) * rsqrtf(v[j]));
          }
          put<EDGE>(second + place, v, valid, aligned);
        }
        Parameters<SPLIT>::template set<EDGE>(t, at + place, next, valid, aligned);
#pragma unroll
        for (int j = 0; j < N; j++)
          if (!EDGE || j < valid) total += next[j] * next[j];
      }
    }
    u64 on = u64(WARPS * BATCH) * cols;
    row += WARPS * BATCH, row_means += WARPS * BATCH;
    at += on, gradient += on, second += on;
  }
  return total;
}

template <class T, bool SPLIT>
__device__ __forceinline__ float apply(const Tile& tile, const float* segments, Moment moment, const u32* ready,
                                       const float2* steps, float2* shared) {
  if (!(tile.tensor.flags & FACTORED))
    return apply_tile<T, SPLIT, false, true>(tile, segments, moment, ready, steps, shared);
  return tile.whole(APPLY_ROWS)
             ? apply_tile<T, SPLIT, true, false>(tile, segments, moment, ready, steps, shared)
             : apply_tile<T, SPLIT, true, true>(tile, segments, moment, ready, steps, shared);
}

// Keeps the sum of squares of a tile's parameters; once a matrix has all, so does `of_matrix`. Of the first
// warp; true for the last block of the matrix.
__device__ __forceinline__ bool keep_squares(const Tile& tile, float squares, float* of_tile, u32* applied,
                                             double* of_matrix) {
  const Tensor& t = tile.tensor;
  u32 tiles = tile.tiles(APPLY_ROWS), matrix = t.first_matrix + tile.matrix;
  float* own = of_tile + t.first_apply_tile + tile.matrix * tiles;
  if (threadIdx.x == 0) own[tile.number(APPLY_ROWS)] = squares;
  if (!arrive(applied + matrix, tiles)) return false;
  double total = warp_total(own, tiles);
  if (threadIdx.x == 0) of_matrix[matrix] = total;
  return true;
}

// One item of work a block, in the order of the table. A tile to apply waits until its matrix is sized; the
// tiles that this takes stand earlier in the table, so they have been begun, and wait for nobody.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
adafactor_update(const Control* control, const Tensor* tensors, const uint4* items, u32* ticket, u32* sized,
                 u32* applied, u32* ready, float2* steps, double* parameter_squares, float* of_size_tile,
                 float* of_apply_tile, const float* segments, float eps, double update_clip,
                 double weight_decay, double scale_floor, u32 scaled) {
  if (!control->applied) return;
  __shared__ float of_warp[WARPS];
  __shared__ float2 step;
  __shared__ u32 turn;
  if (threadIdx.x == 0) {
    turn = atomicAdd(ticket, 1u);
    if (turn == gridDim.x - 1) *ticket = 0;
  }
  __syncthreads();
  uint4 item = items[turn];
  Moment moment = {control->decay, control->gradient_scale, eps};
  u32 flags = tensors[item.x].flags;
  if (item.w & TO_APPLY) {
    Tile tile(tensors, item, APPLY_ROWS);
    float squares;
    if (tile.tensor.rest)
      squares = flags & NARROW ? apply<bf16, true>(tile, segments, moment, ready, steps, &step)
                               : apply<float, true>(tile, segments, moment, ready, steps, &step);
    else
      squares = flags & NARROW ? apply<bf16, false>(tile, segments, moment, ready, steps, &step)
                               : apply<float, false>(tile, segments, moment, ready, steps, &step);
    squares = block_sum(squares, of_warp);
    if (threadIdx.x >= 32) return;
    bool last = keep_squares(tile, squares, of_apply_tile, applied, parameter_squares);
    if (last && threadIdx.x == 0) ready[tile.tensor.first_matrix + tile.matrix] = 0;
    return;
  }

  Tile tile(tensors, item, SIZE_ROWS);
  bool whole = tile.whole(SIZE_ROWS);
  float squares;
  if (flags & FACTORED) {
    if (flags & NARROW)
      squares = whole ? size_tile<bf16, true, false>(tile, segments, moment)
                      : size_tile<bf16, true, true>(tile, segments, moment);
    else
      squares = whole ? size_tile<float, true, false>(tile, segments, moment)
                      : size_tile<float, true, true>(tile, segments, moment);
  } else {
    squares = flags & NARROW ? size_tile<bf16, false, true>(tile, segments, moment)
                             : size_tile<float, false, true>(tile, segments, moment);
  }
  squares = block_sum(squares, of_warp);
  if (threadIdx.x >= 32) return;
  const Tensor& t = tile.tensor;
  u32 tiles = tile.tiles(SIZE_ROWS), matrix = t.first_matrix + tile.matrix;
  float* own = of_size_tile + t.first_size_tile + tile.matrix * tiles;
  if (threadIdx.x == 0) own[tile.number(SIZE_ROWS)] = squares;
  if (!arrive(sized + matrix, tiles)) return;
  double of_update = warp_total(own, tiles);
  if (threadIdx.x != 0) return;
  double len = double(t.len);
  double scale = scaled ? fmax(sqrt(parameter_squares[matrix] / len), scale_floor) : 1.0;
  double clip = fmax(sqrt(of_update / len) / update_clip, 1.0), rate = control->learning_rate * scale;
  steps[matrix] = make_float2(float(1.0 - rate * weight_decay), float(rate / clip));
  store_release(ready + matrix, 1);
}

struct AdamwStep {
  float scale, beta1, beta2, eps, keep, rate, inverse_root_correction2;
};

template <class T, bool SPLIT, bool EDGE>
__device__ __forceinline__ float adamw_tile(const Tile& tile, AdamwStep s) {
  constexpr int N = 4, CHUNKS = OF_LANE / N;
  const Tensor& t = tile.tensor;
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = t.rows;
  u32 row = tile.row0 + warp, col = tile.col0 + lane * N;
  u64 at = tile.base() + tile.at(row, col);
  const T* gradient = static_cast<const T*>(t.gradient);
  float *first = t.row, *second = t.col;
  bool aligned = t.flags & ALIGNED;
  float total = 0.f;
  for (int i = 0; i < APPLY_ROWS / WARPS; i++) {
    if (EDGE && row >= rows) break;
    Parameters<SPLIT> p[CHUNKS];
    Chunk<float, N> m[CHUNKS], v[CHUNKS];
    Chunk<T, N> g[CHUNKS];
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) {
      int valid = EDGE ? tile.valid<false>(row, col + 32 * N * k) : N;
      u64 place = at + 32 * N * k;
      p[k].template get<EDGE>(t, place, valid, aligned);
      m[k].template get<EDGE, true>(first + place, valid, aligned);
      v[k].template get<EDGE, true>(second + place, valid, aligned);
      g[k].template get<EDGE, true>(gradient + place, valid, aligned);
    }
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) {
      int valid = EDGE ? tile.valid<false>(row, col + 32 * N * k) : N;
      u64 place = at + 32 * N * k;
      float next[N], next_m[N], next_v[N];
#pragma unroll
      for (int j = 0; j < N; j++) {
        float value = g[k].value(j) * s.scale;
        next_m[j] = s.beta1 * m[k].value(j) + (1.f - s.beta1) * value;
        next_v[j] = s.beta2 * v[k].value(j) + (1.f - s.beta2) * value * value;
        float update = s.rate * next_m[j] / (sqrtf(next_v[j]) * s.inverse_root_correction2 + s.eps);
        next[j] = Parameters<SPLIT>::kept(p[k].value(j) * s.keep - update);
        if (!EDGE || j < valid) total += next[j] * next[j];
      }
      Parameters<SPLIT>::template set<EDGE>(t, place, next, valid, aligned);
      put<EDGE>(first + place, next_m, valid, aligned);
      put<EDGE>(second + place, next_v, valid, aligned);
    }
    row += WARPS;
    at += u64(WARPS) * COLS;
  }
  return total;
}

template <class T, bool SPLIT> __device__ __forceinline__ float adamw(const Tile& tile, AdamwStep s) {
  return tile.whole(APPLY_ROWS) ? adamw_tile<T, SPLIT, false>(tile, s) : adamw_tile<T, SPLIT, true>(tile, s);
}

extern "C" __global__ void __launch_bounds__(THREADS, 3)
adamw_update(const Control* control, const Tensor* tensors, const uint4* items, u32* applied,
             double* parameter_squares, float* of_apply_tile, float beta1, float beta2, float eps,
             double weight_decay, double scale_floor, u32 scaled) {
  if (!control->applied) return;
  __shared__ float of_warp[WARPS];
  __shared__ float2 step;
  Tile tile(tensors, items[blockIdx.x], APPLY_ROWS);
  const Tensor& t = tile.tensor;
  if (threadIdx.x == 0) {
    double scale = 1.0, rate = control->learning_rate;
    // The last block of the matrix writes the new sum, after this one has arrived.
    if (scaled) {
      double squares = __ldcg(parameter_squares + t.first_matrix + tile.matrix);
      scale = fmax(sqrt(squares / double(t.len)), scale_floor);
    }
    step = make_float2(float(1.0 - rate * weight_decay), float(rate * scale / control->correction1));
  }
  __syncthreads();
  AdamwStep s = {control->gradient_scale, beta1, beta2, eps, step.x, step.y,
                 control->inverse_root_correction2};
  float squares;
  if (t.rest) squares = t.flags & NARROW ? adamw<bf16, true>(tile, s) : adamw<float, true>(tile, s);
  else squares = t.flags & NARROW ? adamw<bf16, false>(tile, s) : adamw<float, false>(tile, s);
  if (!scaled) return;
  squares = block_sum(squares, of_warp);
  if (threadIdx.x < 32) keep_squares(tile, squares, of_apply_tile, applied, parameter_squares);
}

template <bool SPLIT> __device__ __forceinline__ float tile_squares(const Tile& tile) {
  const Tensor& t = tile.tensor;
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < APPLY_ROWS / WARPS; i++) {
    u32 row = tile.row0 + threadIdx.x / 32 + WARPS * i;
#pragma unroll
    for (int k = 0; k < 2; k++) {
      u32 c = tile.col0 + (k * 32 + threadIdx.x % 32) * 4;
      int valid = t.flags & FACTORED ? tile.valid<true>(row, c) : tile.valid<false>(row, c);
      Parameters<SPLIT> p;
      p.template get<true>(t, tile.base() + tile.at(row, c), valid, t.flags & ALIGNED);
#pragma unroll
      for (int j = 0; j < 4; j++) total += p.value(j) * p.value(j);
    }
  }
  return total;
}

// Sums of squares of the parameters as they are: what each update leaves for the next one.
extern "C" __global__ void __launch_bounds__(THREADS)
optimizer_parameter_squares(const Tensor* tensors, const uint4* items, u32 all_apply, u32* applied,
                            double* parameter_squares, float* of_apply_tile) {
  __shared__ float of_warp[WARPS];
  uint4 item = items[blockIdx.x];
  if (!all_apply && !(item.w & TO_APPLY)) return;
  Tile tile(tensors, item, APPLY_ROWS);
  float total = tile.tensor.rest ? tile_squares<true>(tile) : tile_squares<false>(tile);
  total = block_sum(total, of_warp);
  if (threadIdx.x < 32) keep_squares(tile, total, of_apply_tile, applied, parameter_squares);
}
