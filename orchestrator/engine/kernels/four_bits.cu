// y[M, N] = x[M, K] W[N, K]^T, W in 4 bits (sm_80 and up): of a few rows (few_rows) as fast as the codes arrive, of tens
// (tens_of_rows) as fast as tensor cores take them.
//
// The weights are the left operand: an instruction takes 16 channels, 16 columns and 8 rows of x, whichever columns, if both
// sides have the same ones. So a thread's words stay where they are: the code at `plane` and the one four planes on are
// 16 bits apart in a word, a pair as the instruction wants it. A code's bits go into the mantissa of 128 (1024 in float16):
// BASE + code, exactly.
//
// Defined from outside: TENS (which kernel), GROUP (128, 64, 32), MT (16s of a warp's channels), NT (of tens: 8s of rows),
// WARPS, BLOCKS (at once on a processor), IS_HALF (float16; else bfloat16), WIDE_SCALES (float32; else x's type).

#define V (GROUP / 32)     // words of a group that a thread has
#define GROUPS (128 / GROUP)  // of a chunk
#define CHANNELS (16 * MT)  // of a warp
__device__ __forceinline__ void multiply_add(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
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

// x of a group's eight planes, as it lies: a thread's V columns of each.
struct Raw {
#if GROUP == 128
  uint2 at[8];
#elif GROUP == 64
  u32 at[8];
#else
  u16 at[8];
#endif
  __device__ __forceinline__ void load(const u16* from) {
#pragma unroll
    for (int plane = 0; plane < 8; plane++) at[plane] = *(decltype(&at[0]))(from + plane * (GROUP / 8));
  }
  __device__ __forceinline__ u32 pair(int plane, int word) const {  // of this plane and the one four on
#if GROUP == 128
    return word < 2 ? zipped(at[plane].x, at[plane + 4].x, word) : zipped(at[plane].y, at[plane + 4].y, word - 2);
#elif GROUP == 64
    return zipped(at[plane], at[plane + 4], word);
#else
    return (u32)at[plane] | (u32)at[plane + 4] << 16;
#endif
  }
};

#if !TENS
// Up to eight rows. A warp has 16 MT channels and every WARPS-th chunk of 128 columns, and a chunk of codes is on its way
// while one is multiplied; a block's warps add their parts in shared memory, in a fixed order. A group's part of a sum is
// scale * (sum of (BASE + code) x) + (zero - (BASE + 8) scale) * (sum of x), in float32: no weight is rounded. The sum of x
// is one more product, by ones, which has it where it is needed.
//
// GATED: SiLU(gate) * up, the gate's rows first in W.

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
    few_rows(const u32* __restrict__ words, const void* __restrict__ scales, const u16* x, const u16* __restrict__ bias,
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
      const int in_half = min(first + i % (MT / 2) * 16 + half * 8 + quad, outputs - 1);
      const u64 channel = in_half + (i < MT / 2 ? 0 : outputs);
#else
      const u64 channel = min(first + i * 16 + half * 8 + quad, outputs - 1);
#endif
      codes_of[i][half] = words + channel * (K / 8) + place * V;
      scales_of[i][half] = channel * (K / GROUP);
    }
  const int chunks = K / 128;

  Words<V> codes[MT][2][GROUPS];
  Scale pairs[MT][2][GROUPS];
  auto fetch = [&](int chunk) {
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
          load_codes(codes[i][half][group], codes_of[i][half] + chunk * 16 + group * (GROUP / 8));
          pairs[i][half][group].load(scales, scales_of[i][half] + chunk * GROUPS + group);
        }
  };
  if (warp < chunks) fetch(warp);
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif

  const u16* own_x = x + (u64)min(quad, M - 1) * K + place * V;
  float total[MT][4] = {};
  for (int chunk = warp; chunk < chunks; chunk += WARPS)
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
              left[i][word][pair][which] = codes_at(codes[i][which % 2][group].at[word], 2 * pair + which / 2);
#pragma unroll
        for (int half = 0; half < 2; half++) {
          scale[i][half] = pairs[i][half][group].scale();
          zero[i][half] = pairs[i][half][group].zero() - (BASE + 8.0f) * scale[i][half];
        }
      }
      if (group == GROUPS - 1 && chunk + WARPS < chunks) fetch(chunk + WARPS);
      Raw raw;
      raw.load(own_x + chunk * 128 + group * GROUP);
      float part[MT][4] = {}, sum[4] = {};
#pragma unroll
      for (int word = 0; word < V; word++)
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
          const u32 b0 = raw.pair(2 * pair, word), b1 = raw.pair(2 * pair + 1, word);
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
        for (int c = 0; c < 4; c++) total[i][c] += scale[i][c / 2] * part[i][c] + zero[i][c / 2] * sum[c];
    }

  __shared__ float parts[WARPS][8][CHANNELS + 4];
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int c = 0; c < 4; c++) parts[warp][place * 2 + c % 2][i * 16 + c / 2 * 8 + quad] = total[i][c];
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

#else
// A block has 16 MT WARPS channels, all rows, and one of the parts of K, which `splits` says: it writes float32 sums to
// parts[split], or y itself where there is one. A chunk of x is brought to shared memory by all, in pairs, a chunk ahead.
// Weights are rounded to x's type, as y is, before they are multiplied.
#define TASKS (NT * 8 * 4)  // a row's columns of one place in a quad
#define TASKS_EACH ((TASKS + WARPS * 32 - 1) / (WARPS * 32))
#define WORDS_A_TASK (4 / TASKS_EACH)  // that are multiplied while a task's x is on its way
#define UNITS_A_ROW 16  // of four pairs

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
    tens_of_rows(const u32* __restrict__ words, const void* __restrict__ scales, const u16* x,
                 const u16* __restrict__ bias, u16* out, float* parts, int M, int N, int K, int splits) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  extern __shared__ uint4 shared[];  // [2][rows][units]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, place = lane % 4;
  const int split = blockIdx.x % splits, first = (blockIdx.x / splits * WARPS + warp) * CHANNELS;
  const int chunks = K / 128, begin = (u64)chunks * split / splits, end = (u64)chunks * (split + 1) / splits;

  Words<V> now[MT][2][GROUPS], coming[MT][2][GROUPS];
  Scale now_scales[MT][2][GROUPS], coming_scales[MT][2][GROUPS];
  u32 channels[MT][2];
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) channels[i][half] = min(first + i * 16 + half * 8 + quad, N - 1);
  auto fetch = [&](int chunk) {
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
          const u32 word = channels[i][half] * (K / 8) + chunk * 16 + group * (GROUP / 8) + place * V;
          load_codes(coming[i][half][group], words + word);
          coming_scales[i][half][group].load(scales, channels[i][half] * (K / GROUP) + chunk * GROUPS + group);
        }
  };
  Raw raw[GROUPS];
  auto fetch_x = [&](int i, int chunk) {
    const int task = threadIdx.x + i * WARPS * 32, row = task / 4;
    if (row < M)
#pragma unroll
      for (int group = 0; group < GROUPS; group++)
        raw[group].load(x + (u32)row * K + chunk * 128 + group * GROUP + task % 4 * V);
  };
  // A unit has the four pairs of a word; so that eight threads read all banks, odd rows' are four further on.
  auto unit = [&](int buffer, int row, int word, int of) {
    return (buffer * NT * 8 + row) * UNITS_A_ROW + ((word * 4 + of) ^ (row % 2 * 4));
  };
  auto put_x = [&](int i, int buffer) {
    const int task = threadIdx.x + i * WARPS * 32, row = task / 4;
    if (row < M)
#pragma unroll
      for (int word = 0; word < 4; word++) {
        const Raw& some = raw[word / V];
        shared[unit(buffer, row, word, task % 4)] = make_uint4(some.pair(0, word % V), some.pair(1, word % V),
                                                               some.pair(2, word % V), some.pair(3, word % V));
      }
  };

  fetch(begin);
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
#pragma unroll
  for (int i = 0; i < TASKS_EACH; i++) {
    fetch_x(i, begin);
    put_x(i, 0);
  }
  float total[MT][NT][4] = {};
#pragma unroll 1
  for (int chunk = begin; chunk < end; chunk++) {
    const int buffer = (chunk - begin) % 2;
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
          now[i][half][group] = coming[i][half][group];
          now_scales[i][half][group] = coming_scales[i][half][group];
        }
    __syncthreads();  // this chunk of x is there, and nobody reads the buffer of the next one
    const bool more = chunk + 1 < end;
#pragma unroll
    for (int word = 0; word < 4; word++) {
      const int group = word / V;
      if (more && word == 2) fetch(chunk + 1);  // no sooner: half of the registers that now has are free
      if (more && word % WORDS_A_TASK == 0) fetch_x(word / WORDS_A_TASK, chunk + 1);
      u32 left[MT][2][4];
#pragma unroll
      for (int i = 0; i < MT; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const Scale& of = now_scales[i][half][group];
#if WIDE_SCALES
          const float scale = of.scale(), zero = of.zero();
#else
          const u32 scale = __byte_perm(of.pair, 0, 0x1010), zero = __byte_perm(of.pair, 0, 0x3232);
#endif
#pragma unroll
          for (int plane = 0; plane < 4; plane++)
            left[i][plane / 2][plane % 2 * 2 + half] = weights(now[i][half][group].at[word % V], plane, scale, zero);
        }
#pragma unroll
      for (int j = 0; j < NT; j++) {
        const uint4 right = shared[unit(buffer, j * 8 + quad, word, place)];
#pragma unroll
        for (int i = 0; i < MT; i++) {
          multiply_add(total[i][j], left[i][0][0], left[i][0][1], left[i][0][2], left[i][0][3], right.x, right.y);
          multiply_add(total[i][j], left[i][1][0], left[i][1][1], left[i][1][2], left[i][1][3], right.z, right.w);
        }
      }
      if (more && (word + 1) % WORDS_A_TASK == 0) put_x(word / WORDS_A_TASK, 1 - buffer);
    }
  }

  float* part = parts + (u64)split * M * N;
#pragma unroll
  for (int j = 0; j < NT; j++)
#pragma unroll
    for (int odd = 0; odd < 2; odd++) {
      const int row = j * 8 + place * 2 + odd;
      const u32 at = row * N + first + quad;
      if (row >= M) continue;
#pragma unroll
      for (int i = 0; i < 2 * MT; i++) {
        const int channel = first + quad + i * 8;
        const float value = total[i / 2][j][i % 2 * 2 + odd];
        if (channel >= N) continue;
        if (splits > 1)
          part[at + i * 8] = value;
        else
          out[at + i * 8] = narrow(value + (bias ? wide(bias[channel]) : 0.0f));
      }
    }
}
#endif
