// What kernels of Hopper's own instructions have in common: barriers, copies of x into a ring of stages, matrix
// descriptors. PTX ISA: "mbarrier", "cp.async.bulk.tensor", "wgmma".
//
// Defined from outside: MX (rows of x), BN (channels of a block), WGS (warpgroups that multiply), STAGES (blocks of K on
// their way), SHARE (blocks of a cluster that share x), GATED.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

#define CONSUMERS (WGS * 128)
#define X_BYTES (MX * 128)
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
