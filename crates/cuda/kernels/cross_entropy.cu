// Cross-entropy of rows of logits, which become their own gradients. A block has a row and, where it can,
// keeps it in registers between the sum of its exponentials and the gradients. Of a vocabulary split into
// shards a launch sums the exponentials, and another makes the gradients once the sums have been joined.

// Below every logit, and finite with room to spare, so that differences are numbers.
constexpr float lowest = -1e38f;

// e^(x - largest)
__device__ __forceinline__ float exponential(float x, float largest) { return exp_2((x - largest) * log2_e); }

// Some logits: the largest, and the sum of e^(logit - largest).
struct Exponentials {
  float largest, total;
};

template <class T> struct Pieces;
template <> struct Pieces<float> {
  static constexpr u32 minus_infinity = 0xff800000u;
  // e^(x - largest)
  static __device__ __forceinline__ float exponential(float x, float largest) {
    return ::exponential(x, largest);
  }
  static __device__ __forceinline__ float largest(uint4 raw) {
    return fmaxf(fmaxf(__uint_as_float(raw.x), __uint_as_float(raw.y)),
                 fmaxf(__uint_as_float(raw.z), __uint_as_float(raw.w)));
  }
};
template <> struct Pieces<bf16> {
  static constexpr u32 minus_infinity = 0xff80ff80u;
  // One operation less, exact to what 24 bits of `largest` leave.
  static __device__ __forceinline__ float exponential(float x, float largest) {
    return exp_2(fmaf(x, log2_e, -largest * log2_e));
  }
  static __device__ __forceinline__ u32 larger(u32 a, u32 b) {
    u32 c;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
  }
  static __device__ __forceinline__ float largest(uint4 raw) {
    u32 pair = larger(larger(raw.x, raw.y), larger(raw.z, raw.w));
    return fmaxf(low_half(pair), high_half(pair));
  }
};

// A row as pieces of 16 bytes. Unless rows are `aligned`, the first and the last piece are shared with other
// rows: what is theirs reads as minus infinity and is not written.
template <class T, bool aligned> struct Row {
  static constexpr u32 lanes = Lanes<T>::count;
  T* values;
  u32 vocab;
  u32 lead;  // values of the row before in the first piece

  __device__ __forceinline__ Row(T* values, u32 vocab)
      : values(values),
        vocab(vocab),
        lead(aligned ? 0 : u32(reinterpret_cast<size_t>(values) / sizeof(T)) % lanes) {}

  __device__ __forceinline__ u32 pieces() const { return (lead + vocab + lanes - 1) / lanes; }
  // Where a piece begins among the row's values; negative for a first one that is shared.
  __device__ __forceinline__ int start(u32 piece) const { return int(piece * lanes) - int(lead); }
  __device__ __forceinline__ bool whole(int start) const {
    return aligned ? start < int(vocab) : start >= 0 && start + int(lanes) <= int(vocab);
  }

  __device__ __forceinline__ uint4 load(u32 piece) const {
    int at = start(piece);
    if (whole(at)) return *reinterpret_cast<const uint4*>(values + at);
    constexpr u32 none = Pieces<T>::minus_infinity;
    uint4 raw = make_uint4(none, none, none, none);
    if constexpr (!aligned) {
      float logits[lanes];
      unpack(raw, logits);
#pragma unroll
      for (int k = 0; k < int(lanes); k++)
        if (at + k >= 0 && at + k < int(vocab)) logits[k] = widen(values[at + k]);
      raw = pack(logits);
    }
    return raw;
  }
  __device__ __forceinline__ void store(u32 piece, const float (&gradients)[lanes]) const {
    int at = start(piece);
    if (whole(at)) {
      *reinterpret_cast<uint4*>(values + at) = pack(gradients);
    } else if constexpr (!aligned) {
#pragma unroll
      for (int k = 0; k < int(lanes); k++)
        if (at + k >= 0 && at + k < int(vocab)) values[at + k] = rounded<T>(gradients[k]);
    }
  }
  // The thread of a block that has the piece of this value.
  __device__ __forceinline__ bool mine(u32 at) const {
    return (lead + at) / lanes % blockDim.x == threadIdx.x;
  }
};

template <class T> __device__ __forceinline__ void add_piece(uint4 raw, float largest, float (&totals)[4]) {
  float logits[Lanes<T>::count];
  unpack(raw, logits);
#pragma unroll
  for (int k = 0; k < Lanes<T>::count; k++) totals[k % 4] += Pieces<T>::exponential(logits[k], largest);
}

// Joins what the threads of a block have; all of them get the same.
__device__ __forceinline__ Exponentials join(Exponentials mine) {
  __shared__ Exponentials parts[32];
  u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  auto over_warp = [](Exponentials e) {
    float largest = warp_max(e.largest);
    return Exponentials{largest, warp_sum(e.total * exponential(e.largest, largest))};
  };
  mine = over_warp(mine);
  if (lane == 0) parts[warp] = mine;
  __syncthreads();
  return over_warp(lane < blockDim.x / 32 ? parts[lane] : Exponentials{lowest, 0.f});
}

// What is known of a row once its logits have been read.
struct Position {
  float largest, factor, weight, target_gradient;
};

#define LOSS_PARAMETERS                                                                                 \
  T *logits, const int *targets, const float *weights, const float *loss_scale, float z, u32 gradients, \
      float *loss, float *correct, float *log_z, u32 vocab
#define LOSS_ARGUMENTS logits, targets, weights, loss_scale, z, gradients, loss, correct, log_z, vocab

// The id of a shard's first logit, and what rows come to: their largest logit, the sum of
// e^(logit - largest), and the target's logit.
#define SHARD_PARAMETERS u32 first_id, float *largest, float *total, float *target_logit
#define SHARD_ARGUMENTS first_id, largest, total, target_logit

// Writes the results of a row and prepares its gradients, e^(logit - largest) factor. A target outside the
// vocabulary has a loss that is not a number.
__device__ __forceinline__ Position finish(Exponentials all, float target_logit,
                                           const float* weights, const float* loss_scale, float z,
                                           u32 gradients, float* loss, float* correct, float* log_z) {
  u32 row = blockIdx.x;
  float logsumexp = all.largest + logf(all.total);
  if (threadIdx.x == 0) {
    loss[row] = logsumexp - target_logit;
    correct[row] = target_logit >= all.largest ? 1.f : 0.f;
    log_z[row] = logsumexp;
  }
  if (!gradients) return {};
  float weight = weights[row] * *loss_scale;
  float factor = weight * (1.f + 2.f * z * logsumexp) / all.total;
  return {all.largest, factor, weight, exponential(target_logit, all.largest) * factor - weight};
}

template <class T, bool aligned>
__device__ __forceinline__ void store_gradients(const Row<T, aligned>& row, u32 piece, uint4 raw,
                                                const Position& position) {
  float values[Lanes<T>::count];
  unpack(raw, values);
#pragma unroll
  for (int k = 0; k < Lanes<T>::count; k++)
    values[k] = Pieces<T>::exponential(values[k], position.largest) * position.factor;
  row.store(piece, values);
}

// Rows of up to `threads * accesses` pieces, each read once.
template <class T, bool aligned, int threads, int accesses>
__device__ __forceinline__ void losses_kept(LOSS_PARAMETERS) {
  Row<T, aligned> row(logits + size_t(blockIdx.x) * vocab, vocab);
  u32 target = targets[blockIdx.x];
  bool known = target < vocab;
  uint4 raw[accesses];
#pragma unroll
  for (int i = 0; i < accesses; i++) raw[i] = row.load(threadIdx.x + i * threads);
  float target_logit = known ? widen(row.values[target]) : __int_as_float(0x7fc00000);
  float largest = lowest;
#pragma unroll
  for (int i = 0; i < accesses; i++) largest = fmaxf(largest, Pieces<T>::largest(raw[i]));
  float totals[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
  for (int i = 0; i < accesses; i++) add_piece<T>(raw[i], largest, totals);
  Exponentials all = join({largest, (totals[0] + totals[1]) + (totals[2] + totals[3])});
  Position position =
      finish(all, target_logit, weights, loss_scale, z, gradients, loss, correct, log_z);
  if (!gradients) return;
#pragma unroll
  for (int i = 0; i < accesses; i++) store_gradients(row, threadIdx.x + i * threads, raw[i], position);
  // Behind the store of its piece by the same thread.
  if (known && row.mine(target)) row.values[target] = rounded<T>(position.target_gradient);
}

// Pieces that a thread reads at once of rows that it does not keep.
constexpr u32 streamed = 4;

// A row of any length, read once.
template <class T, bool aligned>
__device__ __forceinline__ Exponentials exponentials(const Row<T, aligned>& row) {
  u32 pieces = row.pieces();
  float largest = lowest;
  float totals[4] = {0.f, 0.f, 0.f, 0.f};
  for (u32 first = threadIdx.x; first < pieces; first += streamed * blockDim.x) {
    uint4 raw[streamed];
#pragma unroll
    for (u32 i = 0; i < streamed; i++) raw[i] = row.load(first + i * blockDim.x);
    float before = largest;
#pragma unroll
    for (u32 i = 0; i < streamed; i++) largest = fmaxf(largest, Pieces<T>::largest(raw[i]));
    float rescale = exponential(before, largest);
#pragma unroll
    for (int k = 0; k < 4; k++) totals[k] *= rescale;
#pragma unroll
    for (u32 i = 0; i < streamed; i++) add_piece<T>(raw[i], largest, totals);
  }
  return join({largest, (totals[0] + totals[1]) + (totals[2] + totals[3])});
}

// Rows of any length: read twice, or once where what all shards come to has been `joined`.
template <class T, bool aligned, bool joined>
__device__ __forceinline__ void losses_streamed(LOSS_PARAMETERS, SHARD_PARAMETERS) {
  Row<T, aligned> row(logits + size_t(blockIdx.x) * vocab, vocab);
  u32 target = targets[blockIdx.x] - first_id, pieces = row.pieces();
  bool known = target < vocab;
  float logit;
  Exponentials all;
  if constexpr (joined) {
    logit = target_logit[blockIdx.x];
    all = {largest[blockIdx.x], total[blockIdx.x]};
  } else {
    logit = known ? widen(row.values[target]) : __int_as_float(0x7fc00000);
    all = exponentials(row);
  }
  Position position = finish(all, logit, weights, loss_scale, z, gradients, loss, correct, log_z);
  if (!gradients) return;
  for (u32 first = threadIdx.x; first < pieces; first += streamed * blockDim.x) {
    uint4 raw[streamed];
#pragma unroll
    for (u32 i = 0; i < streamed; i++) raw[i] = row.load(first + i * blockDim.x);
#pragma unroll
    for (u32 i = 0; i < streamed; i++) store_gradients(row, first + i * blockDim.x, raw[i], position);
  }
  if (known && row.mine(target)) row.values[target] = rounded<T>(position.target_gradient);
}

// What the rows of one shard come to.
template <class T, bool aligned>
__device__ __forceinline__ void sums_of_shard(T* logits, const int* targets, u32 vocab, SHARD_PARAMETERS) {
  Row<T, aligned> row(logits + size_t(blockIdx.x) * vocab, vocab);
  u32 target = targets[blockIdx.x] - first_id;
  float logit = target < vocab ? widen(row.values[target]) : 0.f;
  Exponentials all = exponentials(row);
  if (threadIdx.x) return;
  largest[blockIdx.x] = all.largest;
  total[blockIdx.x] = all.total;
  target_logit[blockIdx.x] = logit;
}

#define KEPT(T, suffix, aligned, name, threads, accesses)                         \
  extern "C" __global__ void __launch_bounds__(threads, 1024 / threads)           \
      cross_entropy_##name##_##threads##x##accesses##_##suffix(LOSS_PARAMETERS) { \
    losses_kept<T, aligned, threads, accesses>(LOSS_ARGUMENTS);                   \
  }
#define ROWS(T, suffix, aligned, name)                                                       \
  KEPT(T, suffix, aligned, name, 512, 2)                                                     \
  KEPT(T, suffix, aligned, name, 512, 4)                                                     \
  KEPT(T, suffix, aligned, name, 512, 8)                                                     \
  KEPT(T, suffix, aligned, name, 1024, 8)                                                    \
  extern "C" __global__ void __launch_bounds__(1024)                                         \
      cross_entropy_##name##_streamed_##suffix(LOSS_PARAMETERS) {                            \
    losses_streamed<T, aligned, false>(LOSS_ARGUMENTS, 0, nullptr, nullptr, nullptr);        \
  }                                                                                          \
  extern "C" __global__ void __launch_bounds__(512, 2)                                       \
      cross_entropy_##name##_shard_##suffix(T* logits, const int* targets, u32 vocab,        \
                                            SHARD_PARAMETERS) {                              \
    sums_of_shard<T, aligned>(logits, targets, vocab, SHARD_ARGUMENTS);                      \
  }                                                                                          \
  extern "C" __global__ void __launch_bounds__(512, 2)                                       \
      cross_entropy_##name##_joined_##suffix(LOSS_PARAMETERS, SHARD_PARAMETERS) {            \
    losses_streamed<T, aligned, true>(LOSS_ARGUMENTS, SHARD_ARGUMENTS);                      \
  }
#define KERNELS(Format, suffix)       \
  namespace of_##suffix {             \
    using T = Format;                 \
    ROWS(T, suffix, true, aligned)    \
    ROWS(T, suffix, false, unaligned) \
  }
KERNELS(float, f32)
KERNELS(bf16, bf16)

// Sums over the rows that count: their losses with the z term, their cross-entropies, how many are correct
// and their weights, each times the weight. One block; float64, in an order that does not depend on the
// device.
extern "C" __global__ void __launch_bounds__(512)
    cross_entropy_sums(const float* loss, const float* correct, const float* log_z, const float* weights,
                       u32 rows, double z, float* sums) {
  __shared__ double parts[4][512];
  double totals[4] = {0.0, 0.0, 0.0, 0.0};
#pragma unroll 4
  for (u32 row = threadIdx.x; row < rows; row += 512) {
    float w = weights[row];
    double weight = w, cross_entropy = loss[row], logsumexp = log_z[row], hit = correct[row];
    if (w != 0.f) {
      totals[0] += weight * (cross_entropy + z * logsumexp * logsumexp);
      totals[1] += weight * cross_entropy;
      totals[2] += weight * hit;
      totals[3] += weight;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++) parts[i][threadIdx.x] = totals[i];
  for (u32 half = 256; half; half >>= 1) {
    __syncthreads();
    if (threadIdx.x < half) {
#pragma unroll
      for (int i = 0; i < 4; i++) parts[i][threadIdx.x] += parts[i][threadIdx.x + half];
    }
  }
  __syncthreads();
  if (threadIdx.x < 4) sums[threadIdx.x] = float(parts[threadIdx.x][0]);
}
