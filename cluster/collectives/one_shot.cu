// One-shot all-reduce over the GPUs of one host. Every rank pushes its own input to where its peers read, polls what
// all of them pushed, and adds in float32 in rank order: the same bits everywhere. A launch is a numbered step.
// Two protocols say how a reader knows that data has come; all ranks choose by the message's size and the transport.
//
// - Lamport, as TensorRT-LLM calls it: data alone, into memory that holds NOTHING, a word that is never sent. Each word
//   of 4 bytes vouches for itself, so no flag, fence or barrier is needed. The reader writes NOTHING back, so each has
//   a copy of its own. That is free where its GPU has the memory, and as many bytes again over PCIe where the host has.
// - Simple, NCCL's name: data alone, once for all readers, then a flag for each chunk, released after the chunk's data:
//   a reader that has acquired the flag sees the data. The fence is a way over the wire, so it is for messages that
//   take longer than that, through memory of the host. The flag is the step's number, so no old one is taken for it.
//
// A rank has two slots for each protocol, used in turn. Two are enough, whatever protocols follow each other: what a
// rank sends of step k+2 it sends after its launch k+1 has ended, in which it has seen something that each peer sent in
// its own launch k+1, so after that peer's launch k had ended, with all it read, or wrote back, in the slot.
//
// From sm_90 on it takes part in programmatic dependent launch: it may start before its predecessor on the stream has
// ended, and lets its successor in before its own end. By itself that is when no block waits for a peer any more. Where
// `let_in_early` is set it is at the start, so that the successor loads its weights meanwhile. A successor comes only
// once every block here runs ("as soon as all other CTAs in the grid issue the same instruction or have completed",
// PTX ISA, griddepcontrol), so it takes no place that a block here needs. But it may take all places that are left, and
// a pipeline's sends and receives need one too: if a peer's sum hangs on those, all wait in a ring. So not there.
// Compiled at run time with -DRANKS=n and the other sizes that one_shot.py defines, with no header, for sm_75 and up.

typedef unsigned int u32;
typedef unsigned long long u64;

struct State {  // of this rank, in its device's memory; kept between launches, so that a CUDA graph can be replayed
    u32 sequence;     // of the step to come: from 1, never 0, which is what unwritten memory holds
    u32 blocks_done;  // of the step under way
    u32 failed;       // a peer did not answer: wait for nobody any more
};

struct Links {  // mirrored by _Links in one_shot.py
    uint4* to[MAX_RANKS];      // for Lamport: where this rank's data go, for its PEERS peers
    uint4* from[MAX_RANKS];    // and where each rank's come; the own entry is unused
    uint4* shared[MAX_RANKS];  // for Simple: where each rank writes what all others read
    State* state;
    u32* silent_rank;  // in host memory: 1 + the rank that did not answer, else 0
    u64 patience_ns;
    u32 rank;
    u32 let_in_early;  // whether a successor may take places on the GPU while blocks wait for peers
    u32 slot_packets;    // of 16 bytes, of one of Lamport's two slots
    u32 shared_packets;  // of one of Simple's two, after which its flags lie
};
static_assert(sizeof(Links) == LINKS_BYTES, "_Links in one_shot.py differs");

// -- the hardware; what follows it is plain C++, which tests/cpu/one_shot_machine.h runs on a simulated one --

__device__ uint4 load_packet(const uint4* at) {
    uint4 p;
    asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(p.x), "=r"(p.y), "=r"(p.z), "=r"(p.w) : "l"(at) : "memory");
    return p;
}

__device__ void store_packet(uint4* at, uint4 p) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1,%2,%3,%4};"
                 :: "l"(at), "r"(p.x), "r"(p.y), "r"(p.z), "r"(p.w) : "memory");
}

// Seen by who acquires a flag that was released after it.
__device__ void store_data(uint4* at, uint4 data) { *at = data; }

__device__ u32 load_acquire(const u32* at) {
    u32 flag;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(flag) : "l"(at) : "memory");
    return flag;
}

__device__ void store_release(u32* at, u32 flag) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" :: "l"(at), "r"(flag) : "memory");
}

__device__ u64 now_ns() {
    u64 now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}

__device__ float from_float16(u32 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((unsigned short)bits));
    return value;
}

__device__ u32 to_float16(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ void let_successor_in() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// In every thread and before all memory but the parameters: the state, the input, and peers' slots, which the last
// sum's reading must have left. So a grid here ends only after all before it on the stream have.
__device__ void await_predecessor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// -- elements: 8 bytes of them at a time --

struct BFloat16 {
    static __device__ float widen(u32 bits) { return __uint_as_float(bits << 16); }
    static __device__ u32 round(float value) {  // to nearest, ties to even; by hand, as sm_75 has no instruction
        u32 bits = __float_as_uint(value);
        if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;  // NaN, as CUDA's own conversion writes it
        return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    }
};

struct Float16 {
    static __device__ float widen(u32 bits) { return from_float16(bits); }
    static __device__ u32 round(float value) { return to_float16(value); }
};

template <class Half>
struct Four {
    static const int count = 4;
    static __device__ void unpack(uint2 data, float* value) {
        value[0] = Half::widen(data.x & 0xffffu);
        value[1] = Half::widen(data.x >> 16);
        value[2] = Half::widen(data.y & 0xffffu);
        value[3] = Half::widen(data.y >> 16);
    }
    static __device__ uint2 pack(const float* value) {
        return make_uint2(Half::round(value[0]) | Half::round(value[1]) << 16,
                          Half::round(value[2]) | Half::round(value[3]) << 16);
    }
};

struct TwoFloat32 {
    static const int count = 2;
    static __device__ void unpack(uint2 data, float* value) {
        value[0] = __uint_as_float(data.x), value[1] = __uint_as_float(data.y);
    }
    static __device__ uint2 pack(const float* value) {
        return make_uint2(__float_as_uint(value[0]), __float_as_uint(value[1]));
    }
};

template <class T>
struct Sum {  // over the ranks, of 8 bytes of elements
    float value[T::count];
    __device__ void add(u32 r, uint2 data) {
        float part[T::count];
        T::unpack(data, part);
#pragma unroll
        for (int i = 0; i < T::count; i++) value[i] = r == 0 ? part[i] : value[i] + part[i];
    }
};

// The tensor is 8-byte aligned; its last 8 bytes may be filled only in part. `halves`: its size in units of 2 bytes.
__device__ uint2 load_8(const void* tensor, u32 place, u32 halves) {
    if (4 * place + 4 <= halves) return ((const uint2*)tensor)[place];
    u32 half[4];
    for (u32 i = 0; i < 4; i++) half[i] = 4 * place + i < halves ? ((const unsigned short*)tensor)[4 * place + i] : 0;
    return make_uint2(half[0] | half[1] << 16, half[2] | half[3] << 16);
}

__device__ void store_8(void* tensor, u32 place, u32 halves, uint2 data) {
    if (4 * place + 4 <= halves) {
        ((uint2*)tensor)[place] = data;
        return;
    }
    u32 word[2] = {data.x, data.y};
    for (u32 i = 0; 4 * place + i < halves; i++)
        ((unsigned short*)tensor)[4 * place + i] = (unsigned short)(word[i / 2] >> (16 * (i % 2)));
}

// The same 16 bytes at a time. Apart and not inlined is what only an end or a tensor between two lines of 16 needs.
__device__ bool whole_16(const void* tensor, u32 place, u32 halves) {
    return (u64)tensor % 16 == 0 && 8 * place + 8 <= halves;
}

__device__ __noinline__ uint4 load_pair(const void* tensor, u32 place, u32 halves) {
    uint2 low = load_8(tensor, 2 * place, halves), high = load_8(tensor, 2 * place + 1, halves);
    return make_uint4(low.x, low.y, high.x, high.y);
}

__device__ __noinline__ void store_pair(void* tensor, u32 place, u32 halves, uint4 data) {
    store_8(tensor, 2 * place, halves, make_uint2(data.x, data.y));
    store_8(tensor, 2 * place + 1, halves, make_uint2(data.z, data.w));
}

__device__ uint4 load_16(const void* tensor, u32 place, u32 halves) {
    return whole_16(tensor, place, halves) ? ((const uint4*)tensor)[place] : load_pair(tensor, place, halves);
}

__device__ void store_16(void* tensor, u32 place, u32 halves, uint4 data) {
    if (whole_16(tensor, place, halves))
        ((uint4*)tensor)[place] = data;
    else
        store_pair(tensor, place, halves, data);
}

// -- one step --

const u32 POLLS_BETWEEN_LOOKS_AT_THE_CLOCK = 1024;

struct Step {
    u32 flag;
    u32 slot;      // 0 or 1
    u32 polls;     // that were in vain, of this thread
    u64 start_ns;  // of this thread's waiting; 0 until it has looked at the clock
};

__device__ Step begin(const Links& links) {
    if (links.let_in_early) let_successor_in();
    await_predecessor();
    u32 flag = ((volatile State*)links.state)->sequence;
    return Step{flag, flag & 1, 0, 0};
}

// The last block of all counts the step; each has read the sequence number before it says that it is done.
__device__ void end(const Links& links, const Step& step) {
    __syncthreads();
    let_successor_in();  // no thread waits any more; the first thread to say it says it for the block
    if (threadIdx.x == 0 && atomicInc(&links.state->blocks_done, gridDim.x - 1) == gridDim.x - 1)
        links.state->sequence = step.flag == 0xffffffffu ? 2 : step.flag + 1;  // past 0, to the slot whose turn it is
}

// Whether to wait no longer for `peer`. Names it to the host if the patience ran out here first.
__device__ bool gave_up(const Links& links, Step& step, u32 peer) {
    if (++step.polls % POLLS_BETWEEN_LOOKS_AT_THE_CLOCK) return false;
    if (((volatile State*)links.state)->failed) return true;
    u64 now = now_ns();
    if (step.start_ns == 0) step.start_ns = now;
    if (now - step.start_ns < links.patience_ns) return false;
    if (atomicExch(&links.state->failed, 1) == 0) *(volatile u32*)links.silent_rank = 1 + peer;
    return true;
}

const u32 PEERS = RANKS - 1;

// Peers are counted without the own rank where their packets are held: no registers for what is not there.
__device__ u32 rank_of(const Links& links, u32 peer) { return peer + (peer >= links.rank); }

// Stores the sum over all ranks at one place, rounded to T.
template <class T>
__device__ void store_sum(const Links& links, void* tensor, u32 place, u32 halves, uint4 own, const uint4* packet) {
    Sum<T> low, high;
#pragma unroll
    for (u32 r = 0; r < RANKS; r++) {
        uint4 data = own;
        if (r < PEERS && r < links.rank) data = packet[r];
        if (r > 0 && r > links.rank) data = packet[r - 1];
        low.add(r, make_uint2(data.x, data.y));
        high.add(r, make_uint2(data.z, data.w));
    }
    uint2 a = T::pack(low.value), b = T::pack(high.value);
    store_16(tensor, place, halves, make_uint4(a.x, a.y, b.x, b.y));
}

// -- Lamport --

const u32 NOTHING = 0xffffffffu;  // as one element or two, NaN; transports.py fills memory with it

__device__ u32 sent(u32 word) { return word - (word == NOTHING); }  // another NaN instead, so no sum differs

__device__ bool incomplete(uint4 data) {
    return data.x == NOTHING || data.y == NOTHING || data.z == NOTHING || data.w == NOTHING;
}

// The own data, which it pushes.
__device__ uint4 push(const Links& links, u32 slot_at, const void* tensor, u32 place, u32 halves) {
    uint4 own = load_16(tensor, place, halves);
    uint4 packet = make_uint4(sent(own.x), sent(own.y), sent(own.z), sent(own.w));
    for (u32 p = 0; p < PEERS; p++) store_packet(links.to[p] + slot_at + place, packet);
    return own;
}

// Polls all peers at once: each answer takes a way over the wire.
template <class T>
__device__ void sum(const Links& links, Step& step, u32 slot_at, void* tensor, u32 place, u32 halves, uint4 own) {
    uint4 packet[PEERS];
#pragma unroll
    for (u32 p = 0; p < PEERS; p++) packet[p] = load_packet(links.from[rank_of(links, p)] + slot_at + place);
#pragma unroll
    for (u32 p = 0; p < PEERS; p++) {
        uint4* from = links.from[rank_of(links, p)] + slot_at + place;
        while (incomplete(packet[p])) {
            if (gave_up(links, step, rank_of(links, p))) break;
            packet[p] = load_packet(from);
        }
        store_packet(from, make_uint4(NOTHING, NOTHING, NOTHING, NOTHING));
    }
    store_sum<T>(links, tensor, place, halves, own, packet);
}

template <class T>
__device__ void lamport(const Links& links, Step& step, void* tensor, u32 halves) {
    u32 slot_at = step.slot * links.slot_packets, packets = (halves + 7) / 8;
    u32 place = blockIdx.x * blockDim.x + threadIdx.x, stride = gridDim.x * blockDim.x;
    if (place >= packets) return;
    uint4 own = push(links, slot_at, tensor, place, halves);
#pragma unroll 1
    for (; place < packets; place += stride) {
        uint4 next = own;  // pushed before it waits, to keep the wire busy
        if (place + stride < packets) next = push(links, slot_at, tensor, place + stride, halves);
        sum<T>(links, step, slot_at, tensor, place, halves, own);
        own = next;
    }
}

// -- Simple: a warp pushes and sums a chunk --

const u32 WARP = 32, ALL_LANES = 0xffffffffu;
const u32 CHUNK = CHUNK_PACKETS / WARP;                   // packets of a lane
const u32 LOT = RANKS <= 2 ? CHUNK : RANKS <= 4 ? 2 : 1;  // that it loads at once of each peer; bound by registers
static_assert(CHUNK % LOT == 0, "a chunk is whole lots");

__device__ u32 flag_at(const Links& links, const Step& step, u32 chunk) {
    u32 slot_chunks = (links.shared_packets + CHUNK_PACKETS - 1) / CHUNK_PACKETS;
    return 2 * links.shared_packets + (step.slot * slot_chunks + chunk) * FLAG_PACKETS;
}

__device__ void push_chunk(const Links& links, const Step& step, const void* tensor, u32 halves, u32 chunk, u32 lane) {
    uint4* to = links.shared[links.rank];
    u32 first = chunk * CHUNK_PACKETS + lane, packets = (halves + 7) / 8;
    uint4 own[CHUNK];
#pragma unroll
    for (u32 i = 0; i < CHUNK; i++)
        if (first + i * WARP < packets) own[i] = load_16(tensor, first + i * WARP, halves);
#pragma unroll
    for (u32 i = 0; i < CHUNK; i++)
        if (first + i * WARP < packets) store_data(&to[step.slot * links.shared_packets + first + i * WARP], own[i]);
    __syncwarp();
    if (lane == 0) store_release((u32*)(to + flag_at(links, step, chunk)), step.flag);
}

__device__ void await_chunk(const Links& links, Step& step, u32 chunk, u32 lane) {
    bool here = lane >= PEERS;  // each lane waits for one peer
    u32 peer = here ? links.rank : rank_of(links, lane);
    while (!__all_sync(ALL_LANES, here))
        if (!here)
            here = load_acquire((const u32*)(links.shared[peer] + flag_at(links, step, chunk))) == step.flag ||
                   gave_up(links, step, peer);
    __syncwarp();
}

template <class T>
__device__ void sum_chunk(const Links& links, Step& step, void* tensor, u32 halves, u32 chunk, u32 lane) {
    await_chunk(links, step, chunk, lane);
    u32 packets = (halves + 7) / 8;
#pragma unroll
    for (u32 lot = 0; lot < CHUNK; lot += LOT) {
        u32 first = chunk * CHUNK_PACKETS + lot * WARP + lane;
        uint4 packet[LOT][PEERS];
#pragma unroll
        for (u32 i = 0; i < LOT; i++)
#pragma unroll
            for (u32 p = 0; p < PEERS; p++)
                if (first + i * WARP < packets)
                    packet[i][p] = load_packet(links.shared[rank_of(links, p)] +
                                               step.slot * links.shared_packets + first + i * WARP);
#pragma unroll
        for (u32 i = 0; i < LOT; i++) {
            u32 place = first + i * WARP;
            if (place < packets)
                store_sum<T>(links, tensor, place, halves, load_16(tensor, place, halves), packet[i]);
        }
    }
}

// Chunks go to warps in turn, first over the blocks. A warp pushes the next before it waits for the last.
template <class T>
__device__ void simple(const Links& links, Step& step, void* tensor, u32 halves) {
    u32 lane = threadIdx.x % WARP, warps = blockDim.x / WARP * gridDim.x;
    u32 chunks = ((halves + 7) / 8 + CHUNK_PACKETS - 1) / CHUNK_PACKETS;
    u32 chunk = threadIdx.x / WARP * gridDim.x + blockIdx.x;
    if (chunk < chunks) push_chunk(links, step, tensor, halves, chunk, lane);
#pragma unroll 1
    for (; chunk < chunks; chunk += warps) {
        if (chunk + warps < chunks) push_chunk(links, step, tensor, halves, chunk + warps, lane);
        sum_chunk<T>(links, step, tensor, halves, chunk, lane);
    }
}

// __grid_constant__: the arguments are read where they lie, in the constant bank, also when indexed.
#define KERNEL(protocol, name, T, threads, blocks_of_an_sm)                                         \
    extern "C" __global__ void __launch_bounds__(threads, blocks_of_an_sm)                          \
    all_reduce_##protocol##_##name(const __grid_constant__ Links links, void* tensor, u32 halves) { \
        Step step = begin(links);                                                                   \
        protocol<T>(links, step, tensor, halves);                                                   \
        end(links, step);                                                                           \
    }
#define KERNELS(protocol, threads, blocks_of_an_sm)                      \
    KERNEL(protocol, bfloat16, Four<BFloat16>, threads, blocks_of_an_sm) \
    KERNEL(protocol, float16, Four<Float16>, threads, blocks_of_an_sm)   \
    KERNEL(protocol, float32, TwoFloat32, threads, blocks_of_an_sm)

KERNELS(lamport, MOST_THREADS, BLOCKS_OF_AN_SM)
KERNELS(simple, SIMPLE_THREADS, 1)
