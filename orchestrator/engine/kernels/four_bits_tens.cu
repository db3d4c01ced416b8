// y[M, N] = x[M, K] W[N, K]^T, W in 4 bits, of tens of rows (sm_80 and up): as fast as tensor cores take them.
//
// A block has 16 MT WARPS channels, all rows, and one of the parts of K, which `splits` says: it writes float32 sums to
// parts[split], or y itself where there is one. A chunk of x is brought to shared memory by all, in pairs, a chunk ahead.
// Weights are rounded to x's type, as y is, before they are multiplied.
//
// Behind codes.cu and four_bits_parts.cu. Defined from outside besides: MT (16s of a warp's channels), NT (8s of rows), WARPS,
// BLOCKS (at once on a processor).

#define CHANNELS (16 * MT)  // of a warp
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

  Words now[MT][2], coming[MT][2];
  Scale now_scales[MT][2], coming_scales[MT][2];
  u32 channels[MT][2];
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) channels[i][half] = min(first + i * 16 + half * 8 + quad, N - 1);
  auto fetch = [&](int chunk) {
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        coming[i][half].load(words + channels[i][half] * (K / 8) + chunk * 16 + place * 4);
        coming_scales[i][half].load(scales, channels[i][half] * (K / GROUP) + chunk * GROUPS + group_of(place));
      }
  };
  Raw raw;
  auto fetch_x = [&](int i, int chunk) {
    const int task = threadIdx.x + i * WARPS * 32, row = task / 4;
    if (row < M) raw.load(x + (u32)row * K + chunk * 128 + column_of(task % 4));
  };
  // A unit has the four pairs of a word; so that eight threads read all banks, odd rows' are four further on.
  auto unit = [&](int buffer, int row, int word, int of) {
    return (buffer * NT * 8 + row) * UNITS_A_ROW + ((word * 4 + of) ^ (row % 2 * 4));
  };
  auto put_x = [&](int i, int buffer) {
    const int task = threadIdx.x + i * WARPS * 32, row = task / 4;
    if (row < M)
#pragma unroll
      for (int word = 0; word < 4; word++)
        shared[unit(buffer, row, word, task % 4)] =
            make_uint4(raw.pair(0, word), raw.pair(1, word), raw.pair(2, word), raw.pair(3, word));
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
      for (int half = 0; half < 2; half++) {
        now[i][half] = coming[i][half];
        now_scales[i][half] = coming_scales[i][half];
      }
    __syncthreads();  // this chunk of x is there, and nobody reads the buffer of the next one
    const bool more = chunk + 1 < end;
#pragma unroll
    for (int word = 0; word < 4; word++) {
      if (more && word == 2) fetch(chunk + 1);  // no sooner: half of the registers that now has are free
      if (more && word % WORDS_A_TASK == 0) fetch_x(word / WORDS_A_TASK, chunk + 1);
      u32 left[MT][2][4];
#pragma unroll
      for (int i = 0; i < MT; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const Scale& of = now_scales[i][half];
#if WIDE_SCALES
          const float scale = of.scale(), offset = of.away();
#else
          const u32 scale = __byte_perm(of.pair, 0, 0x1010), offset = __byte_perm(of.pair, 0, 0x3232);
#endif
#pragma unroll
          for (int plane = 0; plane < 4; plane++)
            left[i][plane / 2][plane % 2 * 2 + half] = weights(now[i][half].at[word], plane, scale, offset);
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
