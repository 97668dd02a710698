// What the kernels of attention for Hopper have in common, behind attention.cuh: products of warpgroups (wgmma), which
// run on their own and end in the order in which they start, and factors in registers.
//
// Sources: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions"; for descriptors of matrices also CUTLASS,
// include/cute/atom/mma_traits_sm90_gmma.hpp, and ThunderKittens, both of which say the same in other words.

constexpr int D = 64, ROW_BYTES = 2 * D;

// ---- Instructions ----

// Lets products see what this thread's copies wrote to shared memory; a barrier must follow.
__device__ __forceinline__ void show_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before products that read or add to registers which were written since the last ones.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Makes a group of the products that were started.
__device__ __forceinline__ void end_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until no more than GROUPS groups are under way.
template <int GROUPS> __device__ __forceinline__ void await_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}

// The compiler takes results for finished where a product starts, and left factors for read: this keeps it from
// moving what reads the ones or overwrites the others to before the wait for that product.
template <int N> __device__ __forceinline__ void hold(float (&x)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; n++) {
    asm volatile("" : "+f"(x[n][0]), "+f"(x[n][1]), "+f"(x[n][2]), "+f"(x[n][3])::"memory");
  }
}
template <int N> __device__ __forceinline__ void hold(u32 (&x)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; n++) {
    asm volatile("" : "+r"(x[n][0]), "+r"(x[n][1]), "+r"(x[n][2]), "+r"(x[n][3])::"memory");
  }
}
template <class T, int M, int N> __device__ __forceinline__ void hold(T (&x)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; m++) hold(x[m]);
}

// The lower half of the descriptor of a matrix that starts at `address` in shared memory; `+ units(n)` is n bytes
// further on. Beside the place it holds one of two distances, which is not used: no factor is wider than a row.
__device__ __forceinline__ u32 place_of(u32 address) { return (address & 0x3ffff) >> 4 | 1 << 16; }
__device__ constexpr u32 units(int bytes) { return u32(bytes >> 4); }

// Describes a matrix in a tile whose rows have 128 bytes, in the order of the 128-byte swizzle, which is that of
// Mover. From 8 rows to the next 8 there are 1,024 bytes, whether the inner dimension runs along rows (then a step
// of 16 is 32 bytes further on) or across them (then it is 16 rows).
__device__ __forceinline__ u64 matrix_at(u32 place) { return u64(1 << 30 | 1024 >> 4) << 32 | place; }

// d = a b, plus d if ADD, for `a` of 64 x 16 and `b` of 16 x 32, whose columns are rows of a tile. Warp `w` holds
// rows `16 w` to `16 w + 15` of `a` and `d`, as the mma.sync of one warp does.
template <bool ADD>
__device__ __forceinline__ void product_of_32_rows(float (&d)[4][4], const u32 (&a)[4], u64 b) {
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      "setp.ne.b32 add, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "{%16, %17, %18, %19}, %20, add, 1, 1, 0;\n"
      "}"
      : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),
        "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
        "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(ADD)));
}

#define SUMS_OF_64                                                                                            \
  "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]),    \
      "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]),               \
      "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]),               \
      "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]),               \
      "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3])

// The same for `b` of 16 x 64 and with `a` in a tile too.
template <bool ADD> __device__ __forceinline__ void product_of_64_rows(float (&d)[8][4], u64 a, u64 b) {
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      "setp.ne.b32 add, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, add, 1, 1, 0, 0;\n"
      "}"
      : SUMS_OF_64
      : "l"(a), "l"(b), "n"(int(ADD)));
}

// The same with `a` in registers.
template <bool ADD>
__device__ __forceinline__ void product_of_64_rows(float (&d)[8][4], const u32 (&a)[4], u64 b) {
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      "setp.ne.b32 add, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, add, 1, 1, 0;\n"
      "}"
      : SUMS_OF_64
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(ADD)));
}

// The same for 16 whole rows of a tile each, transposed for `a`: d = a^T b, plus d if ADD.
template <bool ADD> __device__ __forceinline__ void product_over_rows(float (&d)[8][4], u64 a, u64 b) {
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      "setp.ne.b32 add, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, add, 1, 1, 1, 1;\n"
      "}"
      : SUMS_OF_64
      : "l"(a), "l"(b), "n"(int(ADD)));
}

// d += a b for `a` of 64 x 16 and `b` of 16 x 64, which is 16 whole rows of a tile.
__device__ __forceinline__ void add_product_with_rows(float (&d)[8][4], const u32 (&a)[4], u64 b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
      : SUMS_OF_64
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// ---- Tiles and registers ----

// Four matrices of 8 x 8, to the rows whose addresses the lanes name, as load_matrices reads them.
__device__ __forceinline__ void store_matrices(u32 to, const u32 (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x[0]),
               "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

// Adds the bias to the scores of a block of 64 rows and 8 N columns. Of a lane's two rows the lower one has the
// values of the upper one 8 columns before, so every value is read once. (Were it what products start from, the
// compiler would wait for all others before it writes that.)
template <int N> __device__ __forceinline__ void add_bias(float (&x)[N][4], const float* window, int block) {
  Pair before = *reinterpret_cast<const Pair*>(window - 8 * (2 * block + 1));
#pragma unroll
  for (int n = 0; n < N; n++) {
    const Pair here = *reinterpret_cast<const Pair*>(window + 8 * (n - 2 * block));
    x[n][0] += here.x, x[n][1] += here.y, x[n][2] += before.x, x[n][3] += before.y;
    before = here;
  }
}

// The left factor of 8 N columns, 16 at a time, from values that lie as results of products do.
template <int N> __device__ __forceinline__ void as_left(u32 (&to)[N / 2][4], const float (&x)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; n++) {
    to[n / 2][n % 2 * 2] = round_pair(x[n][0], x[n][1]);
    to[n / 2][n % 2 * 2 + 1] = round_pair(x[n][2], x[n][3]);
  }
}

// The assembler of CUDA 13.0 may give registers that nothing but products in a loop reads to other values before the
// loop comes round. That something else might read them behind the loop keeps it from that; nothing does.
template <int STEPS, int BLOCKS>
__device__ __forceinline__ void might_read(bool never, const u32 (&x)[STEPS][BLOCKS][4]) {
  if (never) {
    u32* to = reinterpret_cast<u32*>(shared) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < STEPS * BLOCKS * 4; i++) to[i * THREADS] = x[i / (BLOCKS * 4)][i / 4 % BLOCKS][i % 4];
  }
}
