// y[M, N] = x[M, K] W[N, K]^T, W in 4 bits, x of up to 8 / GROUPS rows (sm_80 and up), as fast as the codes arrive. GATED: y[M, N
// / 2] = SiLU(gate) * up, the gate's rows first.
//
// A warp keeps its C chunks of x in registers, in pairs and with the sums of their groups, and takes one tile of 16 channels
// (gated: eight of each) after another: what it reads are codes and scales, two tiles ahead, C neighbouring chunks of a row
// at once. Tiles go to blocks in turn; a block's warps have a slab of K between them. Where K has several slabs, TILES tiles
// of a block are taken slab after slab, each warp adding to its own sums in shared memory; they are added up, in a fixed
// order, once the last slab is done. x comes by way of shared memory, where the next slab's lies while one is multiplied: all
// of a slab is on its way at once, with no registers to wait in.
//
// A group's part of a sum is scale * (sum of (BASE + code) x) + (zero - (BASE + 8) scale) * (sum of x), in float32: no
// weight is rounded. The sum of x is one more product, by ones, which has it where it is needed. Where a chunk has several
// groups they are kept apart by columns of the product: x's row r stands in GROUPS of its eight, in each with one group's
// columns, the others zero.
//
// Behind codes.cu and four_bits_parts.cu. Defined from outside besides: GATED, C, WARPS, BLOCKS, TILES, EVEN (the slabs fill
// K), VECTOR (a warp's four pairs of scales are 16 bytes that lie aligned), PART_ROW (floats of a row's sums).

#define SLAB (WARPS * C)  // chunks
#define X_ROW (C * 128 + 16)  // of what is staged: eight rows' columns lie in other banks
#define DEPTH 2
#define OF_TILE (GATED ? 8 : 16)  // outputs

__device__ __forceinline__ void copy_async(void* to, const void* from) {  // 16 bytes to shared memory
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

struct Position {  // tiles as the block counts its own
  int batch, tile, slab;
  __device__ __forceinline__ void advance(int own, int slabs) {
    if (++tile < min(batch + TILES, own)) return;
    if (++slab == slabs) slab = 0, batch += TILES;
    tile = batch;
  }
};

struct Scales {  // of a warp's chunks, of the groups that a thread has sums of: one, or two neighbours
  Scale at[C][GROUPS > 1 ? 2 : 1];
  __device__ __forceinline__ void load(const void* scales, u64 index, int place) {
#if VECTOR
    const uint4 four = __ldg((const uint4*)((const u32*)scales + index));
    at[0][0].pair = four.x, at[1][0].pair = four.y, at[2][0].pair = four.z, at[3][0].pair = four.w;
#elif GROUPS == 1
#pragma unroll
    for (int i = 0; i < C; i++) at[i][0].load(scales, index + i);
#else
#pragma unroll
    for (int i = 0; i < C; i++) load_two(at[i], scales, index + i * GROUPS + place * 2 % GROUPS);
#endif
  }
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
    few_rows(const u32* __restrict__ words, const void* __restrict__ scales, const u16* x, const u16* __restrict__ bias,
             u16* out, int M, int N, int K) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  extern __shared__ uint4 shared[];
  float* const parts = (float*)shared;                            // [TILES][WARPS][rows][channels]
  u16* const staged = (u16*)(parts + TILES * WARPS * M * PART_ROW);  // [WARPS][rows][columns]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, place = lane % 4;
  const int outputs = GATED ? N / 2 : N, tiles = (outputs + OF_TILE - 1) / OF_TILE;
  const int own = (tiles - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;  // one at least
  const int chunks = K / 128, slabs = (chunks + SLAB - 1) / SLAB;
  auto first_output = [&](int tile) { return (int)(blockIdx.x + tile * gridDim.x) * OF_TILE; };
  auto channel_of = [&](int tile, int half) -> u64 {
    if (GATED) return min(first_output(tile) + quad, outputs - 1) + half * outputs;
    return min(first_output(tile) + half * 8 + quad, outputs - 1);
  };
  auto first_of = [&](int slab) {  // chunk of this warp; of the last slab some may be others'
    return EVEN ? slab * SLAB + warp * C : min(slab * SLAB + warp * C, chunks - C);
  };

  Words codes[DEPTH][C][2];
  Scales pairs[DEPTH][2];
  auto fetch = [&](int d, const Position& at) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const u64 channel = channel_of(at.tile, half);
      const u32* from = words + channel * (K / 8) + first_of(at.slab) * 16 + place * 4;
#pragma unroll
      for (int c = 0; c < C; c++) codes[d][c][half].load(from + c * 16);
      pairs[d][half].load(scales, channel * (K / GROUP) + first_of(at.slab) * GROUPS, place);
    }
  };
  Position now = {0, 0, 0}, ahead = now;
#pragma unroll
  for (int d = 0; d < DEPTH; d++)
    if (ahead.tile < own) {
      fetch(d, ahead);
      ahead.advance(own, slabs);
    }
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif

  u32 right[C][4][4];  // of x: [word][plane, and four planes on]
  float sums[C][2];
  u16* const own_x = staged + warp * M * X_ROW;
  auto send_for_x = [&](int slab) {
    const u16* const from = x + first_of(slab) * 128;
    for (int i = lane; i < M * C * 16; i += 32) {
      const int row = i / (C * 16), column = i % (C * 16) * 8;
      copy_async(own_x + row * X_ROW + column, from + (u64)row * K + column);
    }
  };
  auto keep_x = [&](int slab) {
    await_copies();
    __syncwarp();
#pragma unroll
    for (int c = 0; c < C; c++) {
      const bool is_own = EVEN || first_of(slab) + c >= slab * SLAB + warp * C;
      Raw raw;
      raw.load(own_x + min(quad / GROUPS, M - 1) * X_ROW + c * 128 + column_of(place));
      float sum[4] = {};
#pragma unroll
      for (int word = 0; word < 4; word++) {
        u32(&to)[4] = right[c][word];
#pragma unroll
        for (int plane = 0; plane < 4; plane++)
          to[plane] = is_own && quad % GROUPS == group_of(place) ? raw.pair(plane, word) : 0;
        multiply_add(sum, ONES, ONES, ONES, ONES, to[0], to[1]);
        multiply_add(sum, ONES, ONES, ONES, ONES, to[2], to[3]);
      }
      sums[c][0] = sum[0], sums[c][1] = sum[1];
    }
    __syncwarp();
    if (slab + 1 < slabs)
      send_for_x(slab + 1);
    else if (slabs > 1 && now.batch + TILES < own)
      send_for_x(0);
  };
  auto multiply = [&](float (&total)[4], int d, int c) {
    const Words&low = codes[d][c][0], &high = codes[d][c][1];
    float part[4] = {};
#pragma unroll
    for (int word = 0; word < 4; word++)
#pragma unroll
      for (int pair = 0; pair < 2; pair++) {
        const u32(&b)[4] = right[c][word];
        multiply_add(part, codes_at(low.at[word], 2 * pair), codes_at(high.at[word], 2 * pair),
                     codes_at(low.at[word], 2 * pair + 1), codes_at(high.at[word], 2 * pair + 1), b[2 * pair], b[2 * pair + 1]);
      }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const Scale& of = pairs[d][i / 2].at[c][GROUPS > 1 ? i % 2 : 0];
      total[i] += of.scale() * part[i] + of.away() * sums[c][i % 2];
    }
  };
  float* const own_parts = parts + (warp * M + place * 2 / GROUPS) * PART_ROW + quad;
  const bool has_row = place * 2 / GROUPS < M && (GROUPS < 4 || place % 2 == 0), has_next = GROUPS == 1 && place * 2 + 1 < M;
  auto write_down = [&](float (&total)[4]) {
#if GROUPS > 1
    total[0] += total[1], total[2] += total[3];
#endif
#if GROUPS > 2
    total[0] += __shfl_xor_sync(~0u, total[0], 1), total[2] += __shfl_xor_sync(~0u, total[2], 1);
#endif
    float* const to = own_parts + (now.tile - now.batch) * (WARPS * M * PART_ROW);
    if (now.slab) {
      if (has_row) total[0] += to[0], total[2] += to[8];
      if (has_next) total[1] += to[PART_ROW], total[3] += to[PART_ROW + 8];
    }
    if (has_row) to[0] = total[0], to[8] = total[2];
    if (has_next) to[PART_ROW] = total[1], to[PART_ROW + 8] = total[3];
  };
  auto add_up = [&](int batch) {
#pragma unroll 1
    for (int i = threadIdx.x; i < M * TILES * OF_TILE; i += WARPS * 32) {
      const int row = i / (TILES * OF_TILE), tile = i / OF_TILE % TILES, channel = i % OF_TILE;
      const int n = first_output(batch + tile) + channel;
      if (batch + tile >= own || n >= outputs) continue;
      const float* const of = parts + (tile * WARPS * M + row) * PART_ROW + channel;
      float value = bias ? wide(bias[n]) : 0.0f;
      for (int w = 0; w < WARPS; w++) value += of[w * M * PART_ROW];
      if (GATED) {
        float up = bias ? wide(bias[outputs + n]) : 0.0f;
        for (int w = 0; w < WARPS; w++) up += of[w * M * PART_ROW + 8];
        value = value / (1.0f + __expf(-value)) * up;
      }
      out[(u64)row * outputs + n] = narrow(value);
    }
  };

  send_for_x(0);
  while (now.tile < own) {
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      if (now.tile >= own) break;
      if (now.tile == now.batch && (slabs > 1 || now.batch == 0)) keep_x(now.slab);
      float total[4] = {};
#pragma unroll
      for (int c = 0; c < C; c++) multiply(total, d, c);
      if (ahead.tile < own) fetch(d, ahead);
      ahead.advance(own, slabs);
      write_down(total);
      const int batch = now.batch;
      now.advance(own, slabs);
      if (now.batch != batch) {
        __syncthreads();
        add_up(batch);
        if (now.tile < own) __syncthreads();
      }
    }
  }
}
