// What kernels of Hopper's own instructions have in common: barriers, copies of x into a ring of stages, matrix descriptors,
// and the sum of a cluster's parts. Barriers, copies and descriptors: PTX ISA, "mbarrier", "cp.async.bulk.tensor", "wgmma".
//
// Defined from outside: MX (rows of x), BN (channels of a block), WGS (warpgroups that multiply), STAGES (blocks of K on
// their way), SPLIT (parts of K), SHARE (tiles that share x), GATED, and to_element (a float rounded to the element type,
// as its bits). A cluster has all parts of SHARE neighbouring tiles.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

#define CONSUMERS (WGS * 128)
#define X_BYTES (MX * 128)
#define CLUSTER (SPLIT * SHARE)
#define OUT_COLUMNS (GATED ? BN / 2 : BN)
#define EVICT_LAST 0x14F0000000000000ull

struct __align__(64) TensorMap { char bytes[128]; };

__device__ __forceinline__ void barrier_init(u32 at, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count));
}
__device__ __forceinline__ void barrier_expect(u32 at, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 at, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n}\n" ::"r"(at), "r"(parity) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 at, u32 block) {  // of that block of the cluster
#if SHARE > 1  // nothing was written that the other block would read, so no wider scope, whose fence takes its time
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}\n" ::"r"(at), "r"(block) : "memory");
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
#endif
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;\n" ::: "memory");
}
__device__ __forceinline__ void consumers_sync() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory"); }

__device__ __forceinline__ void load_x(const TensorMap* map, u32 to, u32 barrier, int k, int row, u16 sharers) {
#if SHARE > 1
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
      " [%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(to), "l"(map), "r"(barrier), "r"(k), "r"(row), "h"(sharers),
      "l"(EVICT_LAST) : "memory");
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to), "l"(map), "r"(barrier), "r"(k), "r"(row), "l"(EVICT_LAST)
      : "memory");
#endif
}

// K-major tiles of 128 bytes a row, swizzled by 128 bytes: 1024 bytes from 8 rows to the next (PTX, matrix descriptor).
__device__ __forceinline__ u64 matrix(u32 address) {
  return (u64)((address & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

// Of each stage: its blocks have come, and all who read them have.
__device__ __forceinline__ void open_stages(u32 full, u32 empty) {
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, WGS * 4 * SHARE);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (SHARE > 1) cluster_sync(); else __syncthreads();
}

__device__ __forceinline__ float silu_times(float gate, float up) { return gate / (1.0f + __expf(-gate)) * up; }

__device__ __forceinline__ float4 load_part(u32 at, u32 block) {
  float4 v;
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}\n"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(at), "r"(block) : "memory");
  return v;
}

// The parts lie at `at` in shared memory, [MX][PITCH] floats each, the gate's and up's columns alternating by eights. Each
// block of a tile adds up some of its rows, in the order of K, out of the others' shared memory: the same sum every time.
template <int PITCH, class Offset>
__device__ __forceinline__ void add_parts(u32 parts_at, u32 part, u32 place, int tile, u16* out, int M, int N,
                                          Offset offset) {
  const int first = part * (MX / SPLIT);  // of the rows that this block adds up
  const int rows = M - first < MX / SPLIT ? M - first : MX / SPLIT;
  for (int u = threadIdx.x; u < rows * (OUT_COLUMNS / 4); u += CONSUMERS) {
    const int m = first + u / (OUT_COLUMNS / 4), n = u % (OUT_COLUMNS / 4) * 4, to_n = tile * OUT_COLUMNS + n;
    if (to_n >= N) continue;
    const u32 at = parts_at + (m * PITCH + (GATED ? n / 8 * 16 + n % 8 : n)) * 4;
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
    sum.x += offset(to_n), sum.y += offset(to_n + 1), sum.z += offset(to_n + 2), sum.w += offset(to_n + 3);
    if (GATED) {
      sum.x = silu_times(sum.x, up.x + offset(N + to_n)), sum.y = silu_times(sum.y, up.y + offset(N + to_n + 1));
      sum.z = silu_times(sum.z, up.z + offset(N + to_n + 2)), sum.w = silu_times(sum.w, up.w + offset(N + to_n + 3));
    }
    *(ushort4*)(out + (long long)m * N + to_n) =
        make_ushort4(to_element(sum.x), to_element(sum.y), to_element(sum.z), to_element(sum.w));
  }
}
