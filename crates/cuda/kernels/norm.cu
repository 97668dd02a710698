// Root-mean-square norm. A row stays in registers between the sum of
// its squares and its output, so that everything is read once. Narrow rows have a warp each, wider ones a
// block; `accesses` 16-byte accesses of each of `threads` threads cover a row.

// Rows that a block has at once and its threads.
template <int threads> constexpr int block_rows = threads == 32 ? 4 : 1;
template <int threads> constexpr int block_threads = threads * block_rows<threads>;

// Blocks of a backward pass that share a multiprocessor; src/norm.rs starts as many for each of 132.
template <int threads, int accesses>
constexpr int resident_blocks = (accesses == 4 ? 512 : 640) / block_threads<threads>;

// Sum over the threads of a row. `turn` counts the calls of a block: buffers take turns, so that nobody
// overwrites what a slower warp still reads.
template <int threads> __device__ __forceinline__ float row_sum(float x, u32 turn) {
  x = warp_sum(x);
  if constexpr (threads > 32) {
    constexpr int warps = threads / 32;
    __shared__ float parts[2][warps];
    if (threadIdx.x % 32 == 0) parts[turn & 1][threadIdx.x / 32] = x;
    __syncthreads();
    x = 0.f;
#pragma unroll
    for (int i = 0; i < warps; i++) x += parts[turn & 1][i];
  }
  return x;
}

// Weights are float32 where activations may be bfloat16.
__device__ __forceinline__ void load_weights(const void* weight, u32 wide, u32 at, float (&to)[4]) {
  if (wide) {
    load_lanes(static_cast<const float*>(weight) + at, to);
  } else {
    uint2 raw = *reinterpret_cast<const uint2*>(static_cast<const bf16*>(weight) + at);
    to[0] = low_half(raw.x), to[1] = high_half(raw.x), to[2] = low_half(raw.y), to[3] = high_half(raw.y);
  }
}
__device__ __forceinline__ void load_weights(const void* weight, u32 wide, u32 at, float (&to)[8]) {
  if (wide) {
    float4 a = *reinterpret_cast<const float4*>(static_cast<const float*>(weight) + at);
    float4 b = *reinterpret_cast<const float4*>(static_cast<const float*>(weight) + at + 4);
    to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
    to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
  } else {
    load_lanes(static_cast<const bf16*>(weight) + at, to);
  }
}

// Where a thread's access number `i` begins within the row.
template <class T, int threads> __device__ __forceinline__ u32 column_of(int i) {
  return (threadIdx.x % threads + i * threads) * Lanes<T>::count;
}

template <class T, int threads, int accesses>
__device__ __forceinline__ void load_row(const T* row, u32 width, uint4 (&raw)[accesses]) {
#pragma unroll
  for (int i = 0; i < accesses; i++) {
    u32 column = column_of<T, threads>(i);
    raw[i] = column < width ? *reinterpret_cast<const uint4*>(row + column) : make_uint4(0, 0, 0, 0);
  }
}

template <class T, int threads, int accesses>
__device__ __forceinline__ void forward(const T* x, const void* weight, u32 wide, T* out, float* inverse_rms,
                                        u32 rows, u32 width, float epsilon) {
  constexpr int lanes = Lanes<T>::count;
  u32 row = blockIdx.x * block_rows<threads> + threadIdx.x / threads;
  if (row >= rows) return;
  size_t start = size_t(row) * width;
  uint4 raw[accesses];
  load_row<T, threads>(x + start, width, raw);
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < accesses; i++) {
    float values[lanes];
    unpack(raw[i], values);
#pragma unroll
    for (int k = 0; k < lanes; k++) squares += values[k] * values[k];
  }
  float inverse = 1.f / sqrtf(row_sum<threads>(squares, 0) / float(width) + epsilon);
  if (inverse_rms && threadIdx.x % threads == 0) inverse_rms[row] = inverse;
#pragma unroll
  for (int i = 0; i < accesses; i++) {
    u32 column = column_of<T, threads>(i);
    if (column < width) {
      float values[lanes], weights[lanes];
      unpack(raw[i], values);
      load_weights(weight, wide, column, weights);
#pragma unroll
      for (int k = 0; k < lanes; k++) values[k] = values[k] * inverse * weights[k];
      *reinterpret_cast<uint4*>(out + start + column) = pack(values);
    }
  }
}

// With y = w x r, r = 1 / rms: gx = r (g w - x r^2 mean(g w x)), plus what flows `beside`. A block walks over
// its rows and leaves its sum of g x r, the gradient of the weight, in `partial`, `[blocks, width]`.
template <class T, int threads, int accesses>
__device__ __forceinline__ void backward(const T* x, const void* weight, u32 wide, const float* inverse_rms,
                                         const T* g, const T* beside, T* gx, float* partial, u32 rows,
                                         u32 width) {
  constexpr int lanes = Lanes<T>::count, groups = block_rows<threads>;
  float gw[accesses][lanes];
#pragma unroll
  for (int i = 0; i < accesses; i++) {
#pragma unroll
    for (int k = 0; k < lanes; k++) gw[i][k] = 0.f;
  }
  u32 turn = 0;
  for (u32 row = blockIdx.x * groups + threadIdx.x / threads; row < rows; row += gridDim.x * groups, turn++) {
    size_t start = size_t(row) * width;
    uint4 xs[accesses], gs[accesses], others[accesses];
    load_row<T, threads>(x + start, width, xs);
    load_row<T, threads>(g + start, width, gs);
    if (beside) load_row<T, threads>(beside + start, width, others);
    float r = inverse_rms[row], dot = 0.f;
#pragma unroll
    for (int i = 0; i < accesses; i++) {
      u32 column = column_of<T, threads>(i);
      if (column < width) {
        float values[lanes], gradients[lanes], weights[lanes];
        unpack(xs[i], values), unpack(gs[i], gradients);
        load_weights(weight, wide, column, weights);
#pragma unroll
        for (int k = 0; k < lanes; k++) {
          dot += gradients[k] * weights[k] * values[k];
          gw[i][k] += gradients[k] * values[k] * r;
        }
      }
    }
    float mean = row_sum<threads>(dot, turn) / float(width) * r * r;
#pragma unroll
    for (int i = 0; i < accesses; i++) {
      u32 column = column_of<T, threads>(i);
      if (column < width) {
        float values[lanes], gradients[lanes], weights[lanes];
        unpack(xs[i], values), unpack(gs[i], gradients);
        load_weights(weight, wide, column, weights);
#pragma unroll
        for (int k = 0; k < lanes; k++) values[k] = r * (gradients[k] * weights[k] - values[k] * mean);
        if (beside) {
          unpack(others[i], gradients);
#pragma unroll
          for (int k = 0; k < lanes; k++) values[k] += gradients[k];
        }
        *reinterpret_cast<uint4*>(gx + start + column) = pack(values);
      }
    }
  }
  partial += size_t(blockIdx.x) * width;
  if constexpr (groups == 1) {
#pragma unroll
    for (int i = 0; i < accesses; i++) {
      u32 column = column_of<T, threads>(i);
      if (column < width) {
#pragma unroll
        for (int k = 0; k < lanes; k++) partial[column + k] = gw[i][k];
      }
    }
  } else {
    __shared__ float parts[groups][threads * accesses * lanes];
#pragma unroll
    for (int i = 0; i < accesses; i++) {
      // Lanes side by side, to keep to different banks.
#pragma unroll
      for (int k = 0; k < lanes; k++)
        parts[threadIdx.x / threads][(i * lanes + k) * threads + threadIdx.x % threads] = gw[i][k];
    }
    __syncthreads();
    for (u32 column = threadIdx.x; column < width; column += block_threads<threads>) {
      u32 access = column / lanes;
      u32 at = (access / threads * lanes + column % lanes) * threads + access % threads;
      float sum = 0.f;
#pragma unroll
      for (int group = 0; group < groups; group++) sum += parts[group][at];
      partial[column] = sum;
    }
  }
}

// Sums `partial`, `[parts, width]`, over its parts. A block has few columns, so that there are blocks for most
// multiprocessors, and reads whole sectors of 32 bytes.
constexpr int SUMMED_COLUMNS = 8, SUMMERS = 1024 / SUMMED_COLUMNS;
template <class T>
__device__ __forceinline__ void sum_parts(const float* partial, T* gw, u32 parts, u32 width) {
  __shared__ float sums[SUMMED_COLUMNS][SUMMERS + 1];
  u32 mine = threadIdx.x % SUMMED_COLUMNS, group = threadIdx.x / SUMMED_COLUMNS;
  u32 column = blockIdx.x * SUMMED_COLUMNS + mine;
  float sum = 0.f;
  if (column < width) {
#pragma unroll 8
    for (u32 part = group; part < parts; part += SUMMERS) sum += partial[size_t(part) * width + column];
  }
  sums[mine][group] = sum;
  __syncthreads();
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp >= SUMMED_COLUMNS) return;
  sum = 0.f;
#pragma unroll
  for (int i = 0; i < SUMMERS / 32; i++) sum += sums[warp][lane + 32 * i];
  sum = warp_sum(sum);
  column = blockIdx.x * SUMMED_COLUMNS + warp;
  if (lane == 0 && column < width) gw[column] = rounded<T>(sum);
}

#define ROWS(T, suffix, threads, accesses)                                                                   \
  extern "C" __global__ void __launch_bounds__(block_threads<threads>)                                       \
      rms_norm_forward_##threads##x##accesses##_##suffix(const T* x, const void* weight, u32 wide, T* out,   \
                                                         float* inverse_rms, u32 rows, u32 width,            \
                                                         float epsilon) {                                    \
    forward<T, threads, accesses>(x, weight, wide, out, inverse_rms, rows, width, epsilon);                  \
  }                                                                                                          \
  extern "C" __global__ void __launch_bounds__(block_threads<threads>, resident_blocks<threads, accesses>)   \
      rms_norm_backward_##threads##x##accesses##_##suffix(                                                   \
          const T* x, const void* weight, u32 wide, const float* inverse_rms, const T* g, const T* beside,   \
          T* gx, float* partial, u32 rows, u32 width) {                                                      \
    backward<T, threads, accesses>(x, weight, wide, inverse_rms, g, beside, gx, partial, rows, width);       \
  }
#define KERNELS(T, suffix)                                                          \
  ROWS(T, suffix, 32, 1)                                                            \
  ROWS(T, suffix, 32, 2)                                                            \
  ROWS(T, suffix, 32, 3)                                                            \
  ROWS(T, suffix, 32, 4)                                                            \
  ROWS(T, suffix, 128, 2)                                                           \
  ROWS(T, suffix, 128, 4)                                                           \
  ROWS(T, suffix, 512, 2)                                                           \
  ROWS(T, suffix, 512, 4)                                                           \
  extern "C" __global__ void __launch_bounds__(1024)                                \
      rms_norm_weight_##suffix(const float* partial, T* gw, u32 parts, u32 width) { \
    sum_parts(partial, gw, parts, width);                                           \
  }
KERNELS(float, f32)
KERNELS(bf16, bf16)
