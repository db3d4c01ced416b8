// y[M, N] = x[M, K] W[N, K]^T + bias, W in 4 bits, M up to 8 NT rows: as fast as the codes arrive (sm_80 and up).
//
// A warp has 16 MT channels and every WARPS-th chunk of 128 columns; a block's warps add their parts in shared memory, in
// a fixed order. Tensor cores multiply, the weights on the left: an instruction takes 16 channels, 16 columns, 8 rows of
// x, whichever columns, if both sides have the same ones. So a thread's words stay where they are: the code at `plane`
// and the one four planes on are 16 bits apart in a word, a pair as the instruction wants it.
//
// A code's bits go into the mantissa of 128 (1024 in float16): B + code, exactly. A group's part of a sum is then
// scale * (sum of (B + code) x) + (zero - (B + 8) scale) * (sum of x), in float32: no weight is rounded. The sum of x
// is one more product, by ones, which has it where it is needed.
//
// Defined from outside: GROUP (128, 64, 32), MT, NT, WARPS, DEPTH (chunks on their way), IS_HALF (float16; else bfloat16),
// WIDE_SCALES (float32; else x's type), GATED (SiLU(gate) * up: the first half of W's rows are the gate's).

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#define V (GROUP / 32)     // words of a group that a thread has
#define GROUPS (128 / GROUP)  // of a chunk
#define CHANNELS (16 * MT)
#define ROWS (8 * NT)
#if IS_HALF
#define MAGIC 0x64006400u
#define ONES 0x3C003C00u
#define BASE 1024.0f
#define KIND "f16"
#else
#define MAGIC 0x43004300u
#define ONES 0x3F803F80u
#define BASE 128.0f
#define KIND "bf16"
#endif

__device__ __forceinline__ float wide(u16 bits) {
  float value;
#if IS_HALF
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
#else
  value = __uint_as_float((u32)bits << 16);
#endif
  return value;
}
__device__ __forceinline__ u16 narrow(float value) {
  u16 bits;
  asm("cvt.rn." KIND ".f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
__device__ __forceinline__ void multiply_add(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ u32 codes_at(u32 word, int plane) {  // and four planes on
  u32 pair;
  asm("lop3.b32 %0, %1, 0x000F000F, %2, 0xEA;" : "=r"(pair) : "r"(word >> (4 * plane)), "n"(MAGIC));
  return pair;
}
__device__ __forceinline__ u32 zipped(u32 first, u32 second, int odd) {
  return __byte_perm(first, second, odd ? 0x7632 : 0x5410);
}

template <int COUNT>
struct Words {
  u32 at[COUNT];
};
__device__ __forceinline__ void load_codes(Words<V>& to, const u32* from) {  // once a step: not to stay in L1
#if GROUP == 128
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to.at[0]), "=r"(to.at[1]), "=r"(to.at[2]), "=r"(to.at[3]) : "l"(from));
#elif GROUP == 64
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(to.at[0]), "=r"(to.at[1]) : "l"(from));
#else
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(to.at[0]) : "l"(from));
#endif
}

struct Scale {
#if WIDE_SCALES
  float2 pair;
  __device__ __forceinline__ void load(const void* scales, u64 index) { pair = __ldg((const float2*)scales + index); }
  __device__ __forceinline__ float scale() const { return pair.x; }
  __device__ __forceinline__ float zero() const { return pair.y; }
#else
  u32 pair;
  __device__ __forceinline__ void load(const void* scales, u64 index) { pair = __ldg((const u32*)scales + index); }
  __device__ __forceinline__ float scale() const { return wide((u16)pair); }
  __device__ __forceinline__ float zero() const { return wide((u16)(pair >> 16)); }
#endif
};

struct Chunk {  // what a thread has of one: two channels of each 16
  Words<V> codes[MT][2][GROUPS];
  Scale scales[MT][2][GROUPS];
};

// x of four planes and the four after them, in pairs: [plane][word].
__device__ __forceinline__ void load_x(u32 (&pairs)[4][V], const u16* from) {
#pragma unroll
  for (int plane = 0; plane < 4; plane++) {
    const u16* first = from + plane * (GROUP / 8);
    const u16* second = first + GROUP / 2;
#if GROUP == 128
    const uint2 one = *(const uint2*)first, other = *(const uint2*)second;
    pairs[plane][0] = zipped(one.x, other.x, 0);
    pairs[plane][1] = zipped(one.x, other.x, 1);
    pairs[plane][2] = zipped(one.y, other.y, 0);
    pairs[plane][3] = zipped(one.y, other.y, 1);
#elif GROUP == 64
    const u32 one = *(const u32*)first, other = *(const u32*)second;
    pairs[plane][0] = zipped(one, other, 0);
    pairs[plane][1] = zipped(one, other, 1);
#else
    pairs[plane][0] = (u32)*first | (u32)*second << 16;
#endif
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    few_rows4(const u32* __restrict__ words, const void* __restrict__ scales, const u16* x, const u16* __restrict__ bias,
              u16* out, int M, int N, int K) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, place = lane % 4;
#if GATED
  const int outputs = N / 2, first = blockIdx.x * (CHANNELS / 2);
#else
  const int outputs = N, first = blockIdx.x * CHANNELS;
#endif
  const u32* codes_of[MT][2];
  u64 scales_of[MT][2];
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
#if GATED
      const int in_half = min(first + (i % (MT / 2)) * 16 + half * 8 + quad, outputs - 1);
      const u64 channel = in_half + (i < MT / 2 ? 0 : outputs);
#else
      const u64 channel = min(first + i * 16 + half * 8 + quad, outputs - 1);
#endif
      codes_of[i][half] = words + channel * (K / 8) + place * V;
      scales_of[i][half] = channel * (K / GROUP);
    }
  const int chunks = K / 128;

  auto fetch = [&](Chunk& to, int chunk) {
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
          load_codes(to.codes[i][half][group], codes_of[i][half] + chunk * 16 + group * (GROUP / 8));
          to.scales[i][half][group].load(scales, scales_of[i][half] + chunk * GROUPS + group);
        }
  };

  Chunk coming[DEPTH];
#pragma unroll
  for (int i = 0; i < DEPTH; i++)
    if (warp + i * WARPS < chunks) fetch(coming[i], warp + i * WARPS);
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif

  float total[MT][NT][4] = {};
  for (int begin = warp; begin < chunks; begin += DEPTH * WARPS)
#pragma unroll
    for (int stage = 0; stage < DEPTH; stage++) {
      const int chunk = begin + stage * WARPS;
      if (chunk >= chunks) break;
      Chunk& now = coming[stage];
#pragma unroll
      for (int group = 0; group < GROUPS; group++) {
        u32 left[MT][V][2][4];  // [word][half of the planes]: rows quad and quad + 8 of one plane, then of the next
        float scale[MT][2], zero[MT][2];
#pragma unroll
        for (int i = 0; i < MT; i++) {
#pragma unroll
          for (int word = 0; word < V; word++)
#pragma unroll
            for (int pair = 0; pair < 2; pair++)
#pragma unroll
              for (int which = 0; which < 4; which++)
                left[i][word][pair][which] = codes_at(now.codes[i][which % 2][group].at[word], 2 * pair + which / 2);
#pragma unroll
          for (int half = 0; half < 2; half++) {
            scale[i][half] = now.scales[i][half][group].scale();
            zero[i][half] = now.scales[i][half][group].zero() - (BASE + 8.0f) * scale[i][half];
          }
        }
        if (group == GROUPS - 1 && chunk + DEPTH * WARPS < chunks) fetch(now, chunk + DEPTH * WARPS);
#pragma unroll
        for (int j = 0; j < NT; j++) {
          u32 right[4][V];
          load_x(right, x + (u64)min(j * 8 + quad, M - 1) * K + chunk * 128 + group * GROUP + place * V);
          float part[MT][4] = {}, sum[4] = {};
#pragma unroll
          for (int word = 0; word < V; word++)
#pragma unroll
            for (int pair = 0; pair < 2; pair++) {
              const u32 b0 = right[2 * pair][word], b1 = right[2 * pair + 1][word];
              multiply_add(sum, ONES, ONES, ONES, ONES, b0, b1);
#pragma unroll
              for (int i = 0; i < MT; i++) {
                const u32(&a)[4] = left[i][word][pair];
                multiply_add(part[i], a[0], a[1], a[2], a[3], b0, b1);
              }
            }
#pragma unroll
          for (int i = 0; i < MT; i++)
#pragma unroll
            for (int c = 0; c < 4; c++)
              total[i][j][c] += scale[i][c / 2] * part[i][c] + zero[i][c / 2] * sum[c];
        }
      }
    }

  __shared__ float parts[WARPS][ROWS][CHANNELS + 4];
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
      for (int c = 0; c < 4; c++) parts[warp][j * 8 + place * 2 + c % 2][i * 16 + c / 2 * 8 + quad] = total[i][j][c];
  __syncthreads();
  const int of_block = GATED ? CHANNELS / 2 : CHANNELS;
  for (int at = threadIdx.x; at < M * of_block; at += WARPS * 32) {
    const int row = at / of_block, channel = at % of_block, n = first + channel;
    if (n >= outputs) continue;
    float value = bias ? wide(bias[n]) : 0.0f;
    for (int i = 0; i < WARPS; i++) value += parts[i][row][channel];
#if GATED
    float up = bias ? wide(bias[outputs + n]) : 0.0f;
    for (int i = 0; i < WARPS; i++) up += parts[i][row][CHANNELS / 2 + channel];
    value = value / (1.0f + __expf(-value)) * up;
#endif
    out[(u64)row * outputs + n] = narrow(value);
  }
}
