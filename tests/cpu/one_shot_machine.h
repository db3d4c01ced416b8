// A GPU for one_shot.cu that is simulated: every thread is a fibre, run in random order, and what it stores reaches
// memory in words of 4 bytes, in random order and late. Only a release, or the end of a kernel, brings all of it there.
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)

struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

template <class To, class From>
To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}
inline float __uint_as_float(uint32_t bits) { return same_bits<float>(bits); }
inline uint32_t __float_as_uint(float value) { return same_bits<uint32_t>(value); }
inline float from_float16(uint32_t bits) { return (float)same_bits<_Float16>((uint16_t)bits); }
inline uint32_t to_float16(float value) { return same_bits<uint16_t>((_Float16)value); }

struct Index { uint32_t x; };
struct Word { uint32_t* at; uint32_t data; };  // that is on its way

struct Barrier {  // of a warp or a block; also tells whether all who came said yes
    int size = 0, arrived = 0;
    bool yes = true, all = true;
    unsigned round = 0;
};

struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    bool done = false;
    Index thread, block, threads, blocks;
    Barrier *of_warp, *of_block;
    std::vector<Thread*> warp;
    std::vector<Word> on_its_way;
    void land(size_t i) {
        *on_its_way[i].at = on_its_way[i].data;
        on_its_way[i] = on_its_way.back();
        on_its_way.pop_back();
    }
    void land_all() { while (!on_its_way.empty()) land(0); }
};

extern Thread* running;
extern ucontext_t scheduler;
extern std::mt19937 dice;
extern bool releases;  // whether a release waits for the stores before it, as it must

inline void yield() { swapcontext(&running->context, &scheduler); }
inline void maybe_yield() { if (dice() % 4 == 0) yield(); }

#define threadIdx (running->thread)
#define blockIdx (running->block)
#define blockDim (running->threads)
#define gridDim (running->blocks)

inline bool meet(Barrier* at, bool yes) {
    unsigned round = at->round;
    at->yes = at->yes && yes;
    if (++at->arrived == at->size) {
        at->all = at->yes;
        at->yes = true;
        at->arrived = 0;
        at->round++;
    }
    while (at->round == round) yield();
    return at->all;
}
inline void __syncthreads() { meet(running->of_block, true); }
inline void __syncwarp() { meet(running->of_warp, true); }
inline bool __all_sync(uint32_t, bool yes) { return meet(running->of_warp, yes); }
inline uint32_t atomicInc(uint32_t* at, uint32_t most) {
    uint32_t old = *at;
    *at = old >= most ? 0 : old + 1;
    return old;
}
inline uint32_t atomicExch(uint32_t* at, uint32_t value) {
    uint32_t old = *at;
    *at = value;
    return old;
}

// -- what one_shot.cu asks of the hardware --

inline uint4 load_packet(const uint4* at) {
    maybe_yield();
    return *at;
}
inline void store_packet(uint4* at, uint4 packet) {
    maybe_yield();
    uint32_t words[4] = {packet.x, packet.y, packet.z, packet.w};
    for (int i = 0; i < 4; i++) running->on_its_way.push_back({(uint32_t*)at + i, words[i]});
}
inline void store_data(uint4* at, uint4 data) { store_packet(at, data); }
inline uint32_t load_acquire(const uint32_t* at) {
    yield();
    return *at;
}
inline void store_release(uint32_t* at, uint32_t flag) {
    if (releases)
        for (Thread* mate : running->warp) mate->land_all();  // a warp's barrier before it makes it cover all lanes
    *at = flag;
}
inline uint64_t now_ns() { return 0; }
inline void let_successor_in() {}
inline void await_predecessor() {}
