// Weights in 4 bits on their way to tensor cores. The code at `plane` of a word and the one four planes on are 16 bits
// apart: one AND and OR puts both into the mantissa of 128 (1024 in float16), which makes them BASE + code, exactly.
//
// Defined from outside: IS_HALF (x is float16; else bfloat16), SCALES (0: x's type; 1: float32; 2: float16, x being bfloat16).

#define WIDE_SCALES (SCALES != 0)  // weights are made in float32

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#if IS_HALF
#define MAGIC 0x64006400u
#define ONES 0x3C003C00u
#define BASE 1024.0f
#define KIND "f16"
#else
#define MAGIC 0x43004300u
#define ONES 0x3F803F80u
#define BASE 128.0f
#define KIND "bf16"
#endif

__device__ __forceinline__ float of_half(u16 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
__device__ __forceinline__ float wide(u16 bits) {
#if IS_HALF
  return of_half(bits);
#else
  return __uint_as_float((u32)bits << 16);
#endif
}
__device__ __forceinline__ u16 narrow(float value) {
  u16 bits;
  asm("cvt.rn." KIND ".f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
__device__ __forceinline__ u32 codes_at(u32 word, int plane) {  // and four planes on
  u32 pair;
  asm("lop3.b32 %0, %1, 0x000F000F, %2, 0xEA;" : "=r"(pair) : "r"(word >> (4 * plane)), "n"(MAGIC));
  return pair;
}
struct Scale {
#if SCALES == 1
  float2 pair;
  __device__ __forceinline__ void load(const void* scales, u64 index) { pair = __ldg((const float2*)scales + index); }
  __device__ __forceinline__ float scale() const { return pair.x; }
  __device__ __forceinline__ float zero() const { return pair.y; }
#else
  u32 pair;
  __device__ __forceinline__ void load(const void* scales, u64 index) { pair = __ldg((const u32*)scales + index); }
#if SCALES == 2
  __device__ __forceinline__ float scale() const { return of_half((u16)pair); }
  __device__ __forceinline__ float zero() const { return of_half((u16)(pair >> 16)); }
#else
  __device__ __forceinline__ float scale() const { return wide((u16)pair); }
  __device__ __forceinline__ float zero() const { return wide((u16)(pair >> 16)); }
#endif
#endif
  __device__ __forceinline__ float away() const { return zero() - (BASE + 8.0f) * scale(); }  // of codes as BASE + code
};
__device__ __forceinline__ void load_two(Scale (&to)[2], const void* scales, u64 index) {  // index is even
#if SCALES == 1
  const float4 two = __ldg((const float4*)scales + index / 2);
  to[0].pair = make_float2(two.x, two.y), to[1].pair = make_float2(two.z, two.w);
#else
  const uint2 two = __ldg((const uint2*)scales + index / 2);
  to[0].pair = two.x, to[1].pair = two.y;
#endif
}

// Two weights, rounded to x's type.
#if WIDE_SCALES
__device__ __forceinline__ u32 weights(u32 word, int plane, float scale, float away) {
  const u32 codes = codes_at(word, plane);
  const float low = wide((u16)codes) * scale + away, high = wide((u16)(codes >> 16)) * scale + away;
  u32 pair;
  asm("cvt.rn." KIND "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
#else
#if IS_HALF
#define AWAY 0xE408E408u  // -1032
#else
#define AWAY 0xC308C308u  // -136
#endif
__device__ __forceinline__ u32 weights(u32 word, int plane, u32 scale, u32 zero) {
  u32 pair;
  asm("fma.rn." KIND "x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(codes_at(word, plane)), "r"(ONES), "r"(AWAY));
  asm("fma.rn." KIND "x2 %0, %0, %1, %2;" : "+r"(pair) : "r"(scale), "r"(zero));
  return pair;
}
#endif
