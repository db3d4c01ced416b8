// y[M, N] = x[M, K] W[N, K]^T on Hopper, W in 4 bits, x of up to 256 rows; GATED: SiLU(gate) * up, the gate's rows first in W.
//
// W is wgmma's left operand, out of registers: 64 channels a warpgroup, widened while the columns before are multiplied. x
// is the right one, in shared memory, as a producer brings it. A thread's codes come straight from memory, RING chunks of
// 128 columns ahead. Of a plane of 8 or 16 columns it has those of neighbouring words, two halves of which make a pair of
// neighbouring columns: the instruction's own order, so that x lies as it is.
//
// In front of it: codes.cu and hopper_parts.cu, and what they name. Defined from outside besides: GROUP (128 or 64), RING,
// CONSUMER_REGISTERS and PRODUCER_REGISTERS (0: as the compiler has them), KIND's wgmma with its left operand in registers.
// GATED: channels of gate and up alternate by eights, so that they meet in add_parts.

#define GROUPS (128 / GROUP)  // of a chunk
#define PITCH (BN + 4)  // floats from row to row of a part: no two threads on one bank

struct Chunk {  // of this thread's two channels: of each half of the words two neighbours
  uint2 at[2][2];
  Scale pairs[2][GROUPS];
};

__device__ __forceinline__ uint2 load_words(const u32* from) {  // once a step: not to stay in L1
  uint2 two;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v2.u32 {%0, %1}, [%2];" : "=r"(two.x), "=r"(two.y) : "l"(from));
  return two;
}

// 64 columns' weights, 16 at a time: channels quad and quad + 8 of a place's two columns, then of those 8 further on.
__device__ __forceinline__ void widen(u32 (&left)[4][4], const Chunk& chunk, int half_of_chunk) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const Scale& of = chunk.pairs[half][half_of_chunk * GROUPS / 2];
#if WIDE_SCALES
    const float scale = of.scale(), zero = of.zero();
#else
    const u32 scale = __byte_perm(of.pair, 0, 0x1010), zero = __byte_perm(of.pair, 0, 0x3232);
#endif
#if GROUP == 128
    const uint2 low = chunk.at[half][0], high = chunk.at[half][1];
    const u32 select = half_of_chunk ? 0x7632 : 0x5410;
    const u32 first = __byte_perm(low.x, low.y, select), second = __byte_perm(high.x, high.y, select);
#pragma unroll
    for (int step = 0; step < 4; step++) {
      left[step][half] = weights(first, step, scale, zero);
      left[step][2 + half] = weights(second, step, scale, zero);
    }
#else
    const uint2 words = chunk.at[half][half_of_chunk];
    const u32 first = __byte_perm(words.x, words.y, 0x5410), second = __byte_perm(words.x, words.y, 0x7632);
#pragma unroll
    for (int step = 0; step < 4; step++) {
      left[step][half] = weights(step < 2 ? first : second, step % 2 * 2, scale, zero);
      left[step][2 + half] = weights(step < 2 ? first : second, step % 2 * 2 + 1, scale, zero);
    }
#endif
  }
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1) __cluster_dims__(CLUSTER, 1, 1)
    tens_of_rows(const __grid_constant__ TensorMap x_map, const u32* __restrict__ words, const void* __restrict__ scales,
                 const u16* __restrict__ bias, u16* out, int M, int N, int K) {
  extern __shared__ char raw[];
  const u32 tiles_at = ((u32)__cvta_generic_to_shared(raw) + 1023) & ~1023u;
  const u32 full = tiles_at + STAGES * X_BYTES, empty = full + STAGES * 8;
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  const u32 part = rank % SPLIT, place = rank / SPLIT;
  const int tile = blockIdx.x / CLUSTER * SHARE + place;
  const int chunks = K / 128, begin = chunks * part / SPLIT, end = chunks * (part + 1) / SPLIT;
  asm volatile("griddepcontrol.launch_dependents;");
  open_stages(full, empty);

  if (threadIdx.x >= CONSUMERS) {
#if CONSUMER_REGISTERS
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
#endif
    if (threadIdx.x == CONSUMERS) {
      u16 sharers = 0;
      for (int i = 0; i < SHARE; i++) sharers |= 1 << (i * SPLIT + part);
      asm volatile("griddepcontrol.wait;" ::: "memory");
      u32 s = 0, phase = 1;
      for (int block = 2 * begin; block < 2 * end; block++) {
        barrier_wait(empty + 8 * s, phase);
        barrier_expect(full + 8 * s, X_BYTES);
        load_x(&x_map, tiles_at + s * X_BYTES + place * (X_BYTES / SHARE), full + 8 * s, block * 64, place * (MX / SHARE),
               sharers);
        if (++s == STAGES) s = 0, phase ^= 1;
      }
    }
    if (SPLIT > 1) cluster_sync();
    if (CLUSTER > 1) cluster_sync();
    return;
  }
#if CONSUMER_REGISTERS
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
#endif
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, column = lane % 4 * 2;
  const u32* words_of[2];
  u32 scales_of[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
#if GATED
    const u32 channel = min(tile * OUT_COLUMNS + warp * 8 + quad, N - 1) + half * N;
#else
    const u32 channel = min(tile * BN + warp * 16 + half * 8 + quad, N - 1);
#endif
    words_of[half] = words + (u64)channel * (K / 8) + column;
    scales_of[half] = channel * (K / GROUP);
    asm volatile("" : "+l"(words_of[half]), "+r"(scales_of[half]));  // not to be worked out again for each chunk
  }
  Chunk ring[RING];
  auto fetch = [&](Chunk& to, int chunk) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int i = 0; i < 2; i++) to.at[half][i] = load_words(words_of[half] + chunk * 16 + i * 8);
#pragma unroll
      for (int g = 0; g < GROUPS; g++) to.pairs[half][g].load(scales, scales_of[half] + chunk * GROUPS + g);
    }
  };
#pragma unroll
  for (int i = 0; i < RING; i++) fetch(ring[i], min(begin + i, end - 1));
  asm volatile("griddepcontrol.wait;" ::: "memory");

  float d[MX / 2];
  u32 left[2][4][4];
  u32 s = 0, phase = 0, before = 0;
  for (int first = begin; first < end; first += RING) {
#pragma unroll
    for (int of_ring = 0; of_ring < RING; of_ring++) {
      const int chunk = first + of_ring;
      if (RING > 1 && chunk >= end) break;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        widen(left[half], ring[of_ring], half);
        if (half) fetch(ring[of_ring], min(chunk + RING, end - 1));
        barrier_wait(full + 8 * s, phase);
        const u64 x = matrix(tiles_at + s * X_BYTES);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int step = 0; step < 4; step++) wgmma(d, left[half][step], x + 2 * step, half || step || chunk > begin);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
#pragma unroll
        for (int i = 0; i < 16; i++) asm volatile("" : "+r"(left[1 - half][i / 4][i % 4])::"memory");  // were read till now
        if ((half || chunk > begin) && lane < SHARE) barrier_arrive(empty + 8 * before, lane * SPLIT + part);
        before = s;
        if (++s == STAGES) s = 0, phase ^= 1;
      }
    }
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int j = 0; j < MX / 2; j++) asm volatile("" : "+f"(d[j])::"memory");
  consumers_sync();  // all have read the last stage
  const u32 to = tiles_at + (column * PITCH + warp * 16 + quad) * 4;
#pragma unroll
  for (int j = 0; j < MX / 2; j++)
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(to + ((j / 4 * 8 + j % 2) * PITCH + j / 2 % 2 * 8) * 4), "f"(d[j])
                 : "memory");
  if (SPLIT > 1) cluster_sync(); else consumers_sync();
  add_parts<PITCH>(tiles_at, part, place, tile, out, M, N, [&](int n) { return bias ? wide(bias[n]) : 0.0f; });
  if (CLUSTER > 1) cluster_sync();  // no block ends while another may still read its parts or arrive at its barriers
}
