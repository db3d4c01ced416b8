// What the kernels of four_bits_few.cu and four_bits_tens.cu have in common.
//
// The weights are the left operand: an instruction takes 16 channels, 16 columns and 8 rows of x, whichever columns, if both
// sides have the same ones. So a thread's words stay where they are: the code at `plane` and the one four planes on are
// 16 bits apart in a word, a pair as the instruction wants it. A code's bits go into the mantissa of 128 (1024 in float16):
// BASE + code, exactly. A group's part of a sum is scale * (sum of (BASE + code) x) + (zero - (BASE + 8) scale) * (sum of
// x), in float32: of a few rows no weight is rounded. The sum of x is one more product, by ones, which has it where it is needed.
//
// Behind codes.cu. Defined from outside besides: GROUP (128, 64, 32).

#define V (GROUP / 32)     // words of a group that a thread has
#define GROUPS (128 / GROUP)  // of a chunk
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

