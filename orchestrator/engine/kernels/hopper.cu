// y[M, N] = x[M, K] W[N, K]^T on Hopper: of up to 256 rows (few_rows), or SiLU(gate) * up of many (many_rows).
//
// A block has MX rows of x, BN rows of W and, in few_rows, one of SPLIT parts of K; a cluster has all parts of SHARE
// neighbouring tiles. Its blocks of the same part share what they load of x (multicast). A producer warp keeps STAGES
// blocks of K on their way, WGS warpgroups multiply. GATED: W's gate and up rows alternate by eights, so that a thread
// holds both of what it multiplies.
//
// Defined from outside: MX, BN, WGS, STAGES, SPLIT, SHARE, GATED, MANY, to_element (a float rounded to the element type,
// as its bits) and wgmma. In front of it: hopper_parts.cu.

#define CLUSTER (SPLIT * SHARE)
#define W_BYTES (BN * 128)
#define STAGE_BYTES (X_BYTES + W_BYTES)
#define EVICT_FIRST 0x12F0000000000000ull

__device__ __forceinline__ void load_w(const TensorMap* map, u32 to, u32 barrier, int k, int row) {
#if GATED  // dimensions: k, 8 rows, gate or up, groups of 8
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %4, %5}], [%2], %6;" ::"r"(to), "l"(map), "r"(barrier), "r"(k), "r"(0), "r"(row / 16),
      "l"(EVICT_FIRST) : "memory");
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to), "l"(map), "r"(barrier), "r"(k), "r"(row), "l"(EVICT_FIRST)
      : "memory");
#endif
}

// 64 columns of K, 16 at a time: begun, not ended.
template <int COUNT>
__device__ __forceinline__ void multiply(float (&d)[COUNT], u64 a, u64 b, int add) {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  wgmma(d, a, b, add);
  wgmma(d, a + 2, b + 2, 1);
  wgmma(d, a + 4, b + 4, 1);
  wgmma(d, a + 6, b + 6, 1);
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

#if MANY
// silu(gate) * up of many rows: whole tiles of MX rows of x and BN of W (gate and up), strided over the clusters, GROUP
// row tiles of x by all of W at a time, which L2 keeps. The next tile's blocks come while one is finished.
#define GROUP 8
#define OUT_BYTES (MX * 128)
extern "C" __global__ void __launch_bounds__(CONSUMERS + 32, 1) __cluster_dims__(SHARE, 1, 1)
    many_rows(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,
              const __grid_constant__ TensorMap out_map, int M, int N, int K) {
  extern __shared__ char raw[];
  const u32 tiles_at = ((u32)__cvta_generic_to_shared(raw) + 1023) & ~1023u;
  const u32 made_at = tiles_at + STAGES * STAGE_BYTES;
  const u32 full = made_at + OUT_BYTES, empty = full + STAGES * 8;
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  const int cluster = blockIdx.x / SHARE, clusters = gridDim.x / SHARE;
  asm volatile("griddepcontrol.launch_dependents;");
  open_stages(full, empty);
  asm volatile("griddepcontrol.wait;" ::: "memory");

  const int blocks = (K + 63) / 64;
  const int row_tiles = (M + MX - 1) / MX, column_tiles = (N + SHARE * OUT_COLUMNS - 1) / (SHARE * OUT_COLUMNS);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = threadIdx.x / 128;
  float d[MX / 2];
  u32 s = 0, phase = threadIdx.x >= CONSUMERS;
  for (int tile = cluster; tile < row_tiles * column_tiles; tile += clusters) {
    const int block_of_rows = tile / (GROUP * column_tiles), within = tile - block_of_rows * GROUP * column_tiles;
    const int high = row_tiles - block_of_rows * GROUP < GROUP ? row_tiles - block_of_rows * GROUP : GROUP;
    const int row_tile = block_of_rows * GROUP + within % high, column_tile = within / high * SHARE + rank;
    if (threadIdx.x >= CONSUMERS) {
      if (threadIdx.x == CONSUMERS)
        for (int i = 0; i < blocks; i++) {
          const u32 stage = tiles_at + s * STAGE_BYTES;
          barrier_wait(empty + 8 * s, phase);
          barrier_expect(full + 8 * s, STAGE_BYTES);
          load_w(&w_map, stage + X_BYTES, full + 8 * s, i * 64, column_tile * BN);
          load_x(&x_map, stage + rank * (X_BYTES / SHARE), full + 8 * s, i * 64,
                 row_tile * MX + rank * (MX / SHARE), (1 << SHARE) - 1);
          if (++s == STAGES) s = 0, phase ^= 1;
        }
      continue;
    }
    u32 before = 0;
    for (int i = 0; i < blocks; i++) {
      barrier_wait(full + 8 * s, phase);
      const u32 stage = tiles_at + s * STAGE_BYTES;
      const u64 w = matrix(stage + X_BYTES + group * 8192), x = matrix(stage);
      multiply(d, w, x, i != 0);
      if (i) {
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (lane < SHARE) barrier_arrive(empty + 8 * before, lane);
      }
      before = s;
      if (++s == STAGES) s = 0, phase ^= 1;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (lane < SHARE) barrier_arrive(empty + 8 * before, lane);
#pragma unroll
    for (int j = 0; j < MX / 2; j++) asm volatile("" : "+f"(d[j])::"memory");
    if (threadIdx.x == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    consumers_sync();
    // [MX][64] elements, swizzled by 128 bytes. A warp has 8 of the columns, and all rows, by eights.
#pragma unroll
    for (int j = 0; j < MX / 8; j += 4) {
      u32 two[4];
#pragma unroll
      for (int q = 0; q < 4; q++) {
        const float* of = d + 4 * (j + q);
        two[q] = to_element(silu_times(of[0], of[2])) | (u32)to_element(silu_times(of[1], of[3])) << 16;
      }
      const u32 m = j * 8 + lane, to = made_at + m * 128 + ((warp ^ (m & 7)) << 4);
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(two[0]),
                   "r"(two[1]), "r"(two[2]), "r"(two[3]) : "memory");
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    consumers_sync();
    if (threadIdx.x == 0) {
      asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&out_map),
                   "r"(column_tile * OUT_COLUMNS), "r"(row_tile * MX), "r"(made_at) : "memory");
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    }
  }
  if (threadIdx.x == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  if (SHARE > 1) cluster_sync();
}
#else
// Up to MX rows, as fast as the weights arrive. 64 rows of x a warpgroup are wgmma's M, W's rows are its N. Each block of a
// tile adds up some of its rows, in the order of K, out of the others' shared memory: the same sum every time.
#define PITCH (BN + 8)  // floats from row to row of a part: no two threads on one bank

__device__ __forceinline__ float4 load_part(u32 at, u32 block) {
  float4 v;
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}\n"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(at), "r"(block) : "memory");
  return v;
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 32, 1) __cluster_dims__(CLUSTER, 1, 1)
    few_rows(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, u16* out, int M, int N,
             int K) {
  extern __shared__ char raw[];
  const u32 tiles_at = ((u32)__cvta_generic_to_shared(raw) + 1023) & ~1023u;
  const u32 full = tiles_at + STAGES * STAGE_BYTES, empty = full + STAGES * 8;
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  const u32 part = rank % SPLIT, place = rank / SPLIT;
  const int tile = blockIdx.x / CLUSTER * SHARE + place;
  const int blocks = (K + 63) / 64, begin = blocks * part / SPLIT, count = blocks * (part + 1) / SPLIT - begin;
  asm volatile("griddepcontrol.launch_dependents;");
  open_stages(full, empty);

  float d[BN / 2];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = threadIdx.x / 128;
  if (threadIdx.x >= CONSUMERS) {
    if (threadIdx.x == CONSUMERS) {
      const int ahead = count < STAGES ? count : STAGES;
      u16 sharers = 0;
      for (int i = 0; i < SHARE; i++) sharers |= 1 << (i * SPLIT + part);
      for (int i = 0; i < ahead; i++) {  // weights come from no kernel: on their way while x is still being made
        barrier_expect(full + 8 * i, STAGE_BYTES);
        load_w(&w_map, tiles_at + i * STAGE_BYTES + X_BYTES, full + 8 * i, (begin + i) * 64, tile * BN);
      }
      asm volatile("griddepcontrol.wait;" ::: "memory");
      u32 s = 0, phase = 1;
      for (int i = 0; i < count; i++) {
        const u32 stage = tiles_at + s * STAGE_BYTES;
        if (i >= STAGES) {
          barrier_wait(empty + 8 * s, phase);
          barrier_expect(full + 8 * s, STAGE_BYTES);
          load_w(&w_map, stage + X_BYTES, full + 8 * s, (begin + i) * 64, tile * BN);
        }
        load_x(&x_map, stage + place * (X_BYTES / SHARE), full + 8 * s, (begin + i) * 64, place * (MX / SHARE), sharers);
        if (++s == STAGES) s = 0, phase ^= 1;
      }
    }
  } else {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    u32 s = 0, phase = 0, before = 0;
    for (int i = 0; i < count; i++) {
      barrier_wait(full + 8 * s, phase);
      const u32 stage = tiles_at + s * STAGE_BYTES;
      const u64 x = matrix(stage + group * 8192), w = matrix(stage + X_BYTES);
      multiply(d, x, w, i != 0);
      if (i) {
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (lane < SHARE) barrier_arrive(empty + 8 * before, lane * SPLIT + part);
      }
      before = s;
      if (++s == STAGES) s = 0, phase ^= 1;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int j = 0; j < BN / 2; j++) asm volatile("" : "+f"(d[j])::"memory");
    const int m = warp * 16 + lane / 4, n = lane % 4 * 2;
#if SPLIT == 1
    u16* to = out + (long long)m * N + tile * OUT_COLUMNS + n;
    const int columns = N - tile * OUT_COLUMNS - n;
#pragma unroll
    for (int j = 0; j < OUT_COLUMNS / 8; j++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
#if GATED
        const float* of = d + 8 * j + 2 * h;
        const float a = silu_times(of[0], of[4]), b = silu_times(of[1], of[5]);
#else
        const float a = d[4 * j + 2 * h], b = d[4 * j + 2 * h + 1];
#endif
        if (m + 8 * h < M && j * 8 < columns)
          *(u32*)(to + (long long)h * 8 * N + j * 8) = to_element(a) | (u32)to_element(b) << 16;
      }
#else
    consumers_sync();  // all have read the last stage
    const u32 to = tiles_at + (m * PITCH + n) * 4;
#pragma unroll
    for (int j = 0; j < BN / 8; j++)
#pragma unroll
      for (int h = 0; h < 2; h++)
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to + (h * 8 * PITCH + j * 8) * 4), "f"(d[4 * j + 2 * h]),
                     "f"(d[4 * j + 2 * h + 1]) : "memory");
#endif
  }
#if SPLIT > 1
  cluster_sync();
  if (threadIdx.x < CONSUMERS) {
    const int first = part * (MX / SPLIT);  // of the rows that this block adds up
    const int rows = M - first < MX / SPLIT ? M - first : MX / SPLIT;
    for (int u = threadIdx.x; u < rows * (OUT_COLUMNS / 4); u += CONSUMERS) {
      const int m = first + u / (OUT_COLUMNS / 4), n = u % (OUT_COLUMNS / 4) * 4;
      const u32 at = tiles_at + (m * PITCH + (GATED ? n / 8 * 16 + n % 8 : n)) * 4;
      float4 parts[SPLIT], ups[SPLIT];
#pragma unroll
      for (int i = 0; i < SPLIT; i++) {
        parts[i] = load_part(at, place * SPLIT + i);
        if (GATED) ups[i] = load_part(at + 32, place * SPLIT + i);
      }
      float4 sum = parts[0], up = ups[0];
#pragma unroll
      for (int i = 1; i < SPLIT; i++) {
        sum.x += parts[i].x, sum.y += parts[i].y, sum.z += parts[i].z, sum.w += parts[i].w;
        if (GATED) up.x += ups[i].x, up.y += ups[i].y, up.z += ups[i].z, up.w += ups[i].w;
      }
      if (GATED) {
        sum.x = silu_times(sum.x, up.x), sum.y = silu_times(sum.y, up.y);
        sum.z = silu_times(sum.z, up.z), sum.w = silu_times(sum.w, up.w);
      }
      const int to_n = tile * OUT_COLUMNS + n;
      if (to_n < N)
        *(ushort4*)(out + (long long)m * N + to_n) =
            make_ushort4(to_element(sum.x), to_element(sum.y), to_element(sum.z), to_element(sum.w));
    }
  }
#endif
  if (CLUSTER > 1) cluster_sync();  // no block ends while another may still read its parts or arrive at its barriers
}
#endif
