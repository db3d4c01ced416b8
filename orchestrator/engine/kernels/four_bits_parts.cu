// What the kernels of four_bits_few.cu and four_bits_tens.cu have in common.
//
// The weights are the left operand: an instruction takes 16 channels, 16 columns and 8 rows of x, whichever columns, if both
// sides have the same ones. So a thread's words stay where they are, and of a chunk of 128 columns each of a channel's four
// threads has a quarter, 16 bytes: all of one group. The code at `plane` and the one four planes on are 16 bits apart in a
// word, a pair as the instruction wants it. A code's bits go into the mantissa of 128 (1024 in float16): BASE + code, exactly.
//
// Behind codes.cu. Defined from outside besides: GROUP (128, 64, 32).

#define GROUPS (128 / GROUP)  // of a chunk
#define EIGHTH (GROUP / 8)    // words of a group, and columns of a plane

__device__ __forceinline__ int group_of(int place) { return place * GROUPS / 4; }
__device__ __forceinline__ int column_of(int place) { return group_of(place) * GROUP + place * 4 % EIGHTH; }  // at plane 0

__device__ __forceinline__ void multiply_add(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

struct Words {  // of a thread, of a chunk
  u32 at[4];
  __device__ __forceinline__ void load(const u32* from) {  // once a step: not to stay in L1
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(at[0]), "=r"(at[1]), "=r"(at[2]), "=r"(at[3]) : "l"(from));
  }
};

struct Raw {  // x of a thread's words' eight planes, as it lies
  uint2 at[8];
  __device__ __forceinline__ void load(const u16* from) {
#pragma unroll
    for (int plane = 0; plane < 8; plane++) at[plane] = *(const uint2*)(from + plane * EIGHTH);
  }
  __device__ __forceinline__ u32 pair(int plane, int word) const {  // of this plane and the one four on
    const u32 first = word < 2 ? at[plane].x : at[plane].y, second = word < 2 ? at[plane + 4].x : at[plane + 4].y;
    return __byte_perm(first, second, word % 2 ? 0x7632 : 0x5410);
  }
};
