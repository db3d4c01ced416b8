// y[M, N] = x[M, K] W[N, K]^T on Hopper, W in 4 bits, x of up to 256 rows; GATED: SiLU(gate) * up, the gate's rows first in W.
//
// W is wgmma's left operand, out of registers: 64 channels a warpgroup, widened while the columns before are multiplied. x
// is the right one, in shared memory, as a producer brings it. A thread's codes come straight from memory, RING chunks of
// 128 columns ahead. Of a plane of 8 or 16 columns it has those of neighbouring words, two halves of which make a pair of
// neighbouring columns: the instruction's own order, so that x lies as it is.
//
// The chunks of all tiles are one row, tile after tile, of which each block has an equal stretch: no processor is idle at
// the end. Of a tile that several blocks have a part of, each warp writes its part down, and the last to come adds them up
// in the order of K: the same sum every time, and nobody waits for another.
//
// In front of it: codes.cu and hopper_parts.cu, and what they name. Defined from outside besides: GROUP (128 or 64), RING,
// CONSUMER_REGISTERS and PRODUCER_REGISTERS, KIND's wgmma with its left operand in registers. GATED: channels of gate and
// up alternate by eights, so that a thread holds both of what it multiplies.

#define GROUPS (128 / GROUP)  // of a chunk
#define QUADS (MX / 8)  // of a thread's sums: two rows of x, two channels

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
    const float scale = of.scale(), offset = of.away();
#else
    const u32 scale = __byte_perm(of.pair, 0, 0x1010), offset = __byte_perm(of.pair, 0, 0x3232);
#endif
#if GROUP == 128
    const uint2 low = chunk.at[half][0], high = chunk.at[half][1];
    const u32 select = half_of_chunk ? 0x7632 : 0x5410;
    const u32 first = __byte_perm(low.x, low.y, select), second = __byte_perm(high.x, high.y, select);
#pragma unroll
    for (int step = 0; step < 4; step++) {
      left[step][half] = weights(first, step, scale, offset);
      left[step][2 + half] = weights(second, step, scale, offset);
    }
#else
    const uint2 words = chunk.at[half][half_of_chunk];
    const u32 first = __byte_perm(words.x, words.y, 0x5410), second = __byte_perm(words.x, words.y, 0x7632);
#pragma unroll
    for (int step = 0; step < 4; step++) {
      left[step][half] = weights(step < 2 ? first : second, step % 2 * 2, scale, offset);
      left[step][2 + half] = weights(step < 2 ? first : second, step % 2 * 2 + 1, scale, offset);
    }
#endif
  }
}

__device__ __forceinline__ u32 count_arrival(u32* at) {  // sees what those counted before have written
  u32 before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(at) : "memory");
  return before;
}

// A channel's two rows of x -> a row's two channels, over the eight channels and rows of a warp.
__device__ __forceinline__ u32 turned(float low, float high) {
  u32 two = narrow(low) | (u32)narrow(high) << 16;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(two));
  return two;
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)
    tens_of_rows(const __grid_constant__ TensorMap x_map, const u32* __restrict__ words, const void* __restrict__ scales,
                 const u16* __restrict__ bias, u16* out, float4* parts, u32* arrived, int M, int N, int K) {
  extern __shared__ char raw[];
  const u32 tiles_at = ((u32)__cvta_generic_to_shared(raw) + 1023) & ~1023u;
  const u32 full = tiles_at + STAGES * X_BYTES, empty = full + STAGES * 8;
  const u32 chunks = K / 128, total = (N + OUT_COLUMNS - 1) / OUT_COLUMNS * chunks;
  const u32 begin = blockIdx.x * total / gridDim.x, end = (blockIdx.x + 1) * total / gridDim.x;
  asm volatile("griddepcontrol.launch_dependents;");
  open_stages(full, empty);

  if (threadIdx.x >= CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
    if (threadIdx.x == CONSUMERS) {
      asm volatile("griddepcontrol.wait;" ::: "memory");
      u32 s = 0, phase = 1;
      for (u32 block = 2 * begin; block < 2 * end; block++) {
        barrier_wait(empty + 8 * s, phase);
        barrier_expect(full + 8 * s, X_BYTES);
        load_x(&x_map, tiles_at + s * X_BYTES, full + 8 * s, block % (2 * chunks) * 64, 0, 1);
        if (++s == STAGES) s = 0, phase ^= 1;
      }
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, column = lane % 4 * 2;
  auto channel = [&](u32 tile, int half) {  // of W
#if GATED
    return min(tile * OUT_COLUMNS + warp * 8 + quad, N - 1) + half * N;
#else
    return min(tile * BN + warp * 16 + half * 8 + quad, N - 1);
#endif
  };
  const u32* words_of[2];
  u32 scales_of[2];
  Chunk ring[RING];
  auto fetch = [&](Chunk& to, u32 chunk) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int i = 0; i < 2; i++) to.at[half][i] = load_words(words_of[half] + chunk * 16 + i * 8);
#pragma unroll
      for (int g = 0; g < GROUPS; g++) to.pairs[half][g].load(scales, scales_of[half] + chunk * GROUPS + g);
    }
  };
  auto last_of = [&](u32 unit) { return min(unit / chunks * chunks + chunks, end) - 1; };  // of this block, in its tile
  auto fetch_first = [&](u32 unit) {
    const u32 tile = unit / chunks, last = last_of(unit);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      words_of[half] = words + (u64)channel(tile, half) * (K / 8) + column;
      scales_of[half] = channel(tile, half) * (K / GROUP);
      asm volatile("" : "+l"(words_of[half]), "+r"(scales_of[half]));  // not to be worked out again for each chunk
    }
#pragma unroll
    for (int i = 0; i < RING; i++) fetch(ring[i], min(unit + i, last) - tile * chunks);
  };
  fetch_first(begin);
  asm volatile("griddepcontrol.wait;" ::: "memory");

  float d[MX / 2];
  u32 left[2][4][4];
  u32 s = 0, phase = 0, before = 0;
  for (u32 unit = begin; unit < end;) {
    const u32 tile = unit / chunks, first = unit - tile * chunks, last = last_of(unit) - tile * chunks;
    for (u32 round = first; round <= last; round += RING) {
#pragma unroll
      for (int of_ring = 0; of_ring < RING; of_ring++) {
        const u32 chunk = round + of_ring;
        if (RING > 1 && chunk > last) break;
#pragma unroll
        for (int half = 0; half < 2; half++) {
          widen(left[half], ring[of_ring], half);
          if (half) fetch(ring[of_ring], min(chunk + RING, last));
          barrier_wait(full + 8 * s, phase);
          const u64 x = matrix(tiles_at + s * X_BYTES);
          asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
          for (int step = 0; step < 4; step++) wgmma(d, left[half][step], x + 2 * step, half || step || chunk > first);
          asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
          asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
#pragma unroll
          for (int i = 0; i < 16; i++) asm volatile("" : "+r"(left[1 - half][i / 4][i % 4])::"memory");  // were read till now
          if ((half || chunk > first) && lane == 0) barrier_arrive(empty + 8 * before, 0);
          before = s;
          if (++s == STAGES) s = 0, phase ^= 1;
        }
      }
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int j = 0; j < MX / 2; j++) asm volatile("" : "+f"(d[j])::"memory");
    if (lane == 0) barrier_arrive(empty + 8 * before, 0);
    unit += last + 1 - first;
    if (unit < end) fetch_first(unit);  // comes while this tile is finished

    if (last + 1 - first < chunks) {
      const u32 lowest = ((tile * chunks + 1) * gridDim.x - 1) / total;  // the blocks that have parts of the tile
      const u32 highest = ((tile * chunks + chunks) * gridDim.x - 1) / total;
      auto part_of = [&](u32 block) {  // a block has at most one tile that another begins, and one that another ends
        return parts + (2 * block + (block == lowest)) * (QUADS * CONSUMERS) + threadIdx.x;
      };
      float4* to = part_of(blockIdx.x);
#pragma unroll
      for (int j = 0; j < QUADS; j++)
        __stcg(to + j * CONSUMERS, make_float4(d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]));
      __syncwarp();
      u32* const counter = arrived + tile * (CONSUMERS / 32) + warp;
      const u32 others = __shfl_sync(~0u, lane == 0 ? count_arrival(counter) : 0, 0);
      if (others != highest - lowest) continue;
      __syncwarp();
      if (lane == 0) *counter = 0;  // for the next kernel
#pragma unroll
      for (int j = 0; j < MX / 2; j++) d[j] = 0.0f;
      for (u32 block = lowest; block <= highest; block++) {
        const float4* of = part_of(block);
#pragma unroll
        for (int j = 0; j < QUADS; j++) {
          const float4 some = __ldcg(of + j * CONSUMERS);
          d[4 * j] += some.x, d[4 * j + 1] += some.y, d[4 * j + 2] += some.z, d[4 * j + 3] += some.w;
        }
      }
    }
    float offset[2];
#pragma unroll
    for (int half = 0; half < 2; half++) offset[half] = bias ? wide(bias[channel(tile, half)]) : 0.0f;
#if GATED
    const int n = tile * OUT_COLUMNS + warp * 8 + column;
#pragma unroll
    for (int j = 0; j < QUADS; j++) {
      const float* of = d + 4 * j;
      const u32 two = turned(silu_times(of[0] + offset[0], of[2] + offset[1]), silu_times(of[1] + offset[0], of[3] + offset[1]));
      if (j * 8 + quad < M && n < N) *(u32*)(out + (u64)(j * 8 + quad) * N + n) = two;
    }
#else
    const int n = tile * BN + warp * 16 + column;
#pragma unroll
    for (int j = 0; j < MX / 4; j++) {
      const int half = j % 2, m = j / 2 * 8 + quad;
      const u32 two = turned(d[2 * j] + offset[half], d[2 * j + 1] + offset[half]);
      if (m < M && n + half * 8 < N) *(u32*)(out + (u64)m * N + n + half * 8) = two;
    }
#endif
  }
}
