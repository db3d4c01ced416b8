// One-shot all-reduce over the GPUs of one host.
//
// The wire format is that of NCCL's LL protocol: packets of 16 bytes, (data, flag, data, flag) by 4 bytes, where the
// flag is the step's sequence number. Each flag vouches for the 4 bytes before it, so it is enough that stores of 8
// bytes are seen whole, and no fence or barrier is needed. Every rank pushes its own input to where its peers read,
// polls the packets of all of them at the same places, and adds in float32 in rank order: the same bits everywhere.
//
// A rank has two slots, used in turn. Two are enough: a rank's packets of step k+1 are sent after it has read all of
// step k, and to end step k+1 is to have seen them, so nobody writes step k+2 over what is still being read.
//
// From sm_90 on it takes part in programmatic dependent launch: it may start before its predecessor on the stream has
// ended, and lets its successor in before its own end. By itself that is when no block waits for a peer any more. Where
// `let_in_early` is set it is at the start, so that the successor loads its weights meanwhile. A successor comes only
// once every block here runs ("as soon as all other CTAs in the grid issue the same instruction or have completed",
// PTX ISA, griddepcontrol), so it takes no place that a block here needs. But it may take all places that are left, and
// a pipeline's sends and receives need one too: if a peer's sum hangs on those, all wait in a ring. So not there.
//
// Compiled at run time with -DRANKS=n and the other sizes that one_shot.py defines, with no header, for sm_75 and up.

typedef unsigned int u32;
typedef unsigned long long u64;

struct State {  // of this rank, in its device's memory; kept between launches, so that a CUDA graph can be replayed
    u32 sequence;     // of the step to come: from 1, never 0, which is what unwritten memory holds
    u32 blocks_done;  // of the step under way
    u32 failed;       // a peer did not answer: wait for nobody any more
};

struct Links {  // mirrored by _Links in one_shot.py
    uint4* to[MAX_RANKS];    // where this rank's packets go; `pushes` of them
    uint4* from[MAX_RANKS];  // where each rank's packets come; the own entry is unused
    State* state;
    u32* silent_rank;  // in host memory: 1 + the rank that did not answer, else 0
    u64 patience_ns;
    u32 pushes;
    u32 rank;
    u32 slot_packets;  // of one of the two slots
    u32 let_in_early;  // whether a successor may take places on the GPU while blocks wait for peers
};
static_assert(sizeof(Links) == LINKS_BYTES, "_Links in one_shot.py differs");

const u32 POLLS_BETWEEN_LOOKS_AT_THE_CLOCK = 1024;

__device__ uint4 load_packet(const uint4* at) {
    uint4 p;
    asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(p.x), "=r"(p.y), "=r"(p.z), "=r"(p.w) : "l"(at) : "memory");
    return p;
}

__device__ void store_packet(uint4* at, uint2 data, u32 flag) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1,%2,%3,%4};"
                 :: "l"(at), "r"(data.x), "r"(flag), "r"(data.y), "r"(flag) : "memory");
}

__device__ u64 now_ns() {
    u64 now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}

// -- elements: 8 bytes of them at a time --

struct BFloat16 {
    static const int count = 4;
    static __device__ void unpack(uint2 data, float* value) {
        value[0] = __uint_as_float(data.x << 16);
        value[1] = __uint_as_float(data.x & 0xffff0000u);
        value[2] = __uint_as_float(data.y << 16);
        value[3] = __uint_as_float(data.y & 0xffff0000u);
    }
    static __device__ u32 round(float value) {  // to nearest, ties to even; by hand, as sm_75 has no instruction
        u32 bits = __float_as_uint(value);
        if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;  // NaN, as CUDA's own conversion writes it
        return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    }
    static __device__ uint2 pack(const float* value) {
        return make_uint2(round(value[0]) | round(value[1]) << 16, round(value[2]) | round(value[3]) << 16);
    }
};

struct Float16 {
    static const int count = 4;
    static __device__ float widen(u32 bits) {
        float value;
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((unsigned short)bits));
        return value;
    }
    static __device__ u32 round(float value) {
        unsigned short bits;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
        return bits;
    }
    static __device__ void unpack(uint2 data, float* value) {
        value[0] = widen(data.x & 0xffffu);
        value[1] = widen(data.x >> 16);
        value[2] = widen(data.y & 0xffffu);
        value[3] = widen(data.y >> 16);
    }
    static __device__ uint2 pack(const float* value) {
        return make_uint2(round(value[0]) | round(value[1]) << 16, round(value[2]) | round(value[3]) << 16);
    }
};

struct Float32 {
    static const int count = 2;
    static __device__ void unpack(uint2 data, float* value) {
        value[0] = __uint_as_float(data.x);
        value[1] = __uint_as_float(data.y);
    }
    static __device__ uint2 pack(const float* value) {
        return make_uint2(__float_as_uint(value[0]), __float_as_uint(value[1]));
    }
};

// The tensor is 8-byte aligned; its last packet may be filled only in part. `halves`: its size in units of 2 bytes.
__device__ uint2 load_data(const void* tensor, u32 place, u32 halves) {
    if (4 * place + 4 <= halves) return ((const uint2*)tensor)[place];
    u32 half[4];
    for (u32 i = 0; i < 4; i++)
        half[i] = 4 * place + i < halves ? ((const unsigned short*)tensor)[4 * place + i] : 0;
    return make_uint2(half[0] | half[1] << 16, half[2] | half[3] << 16);
}

__device__ void store_data(void* tensor, u32 place, u32 halves, uint2 data) {
    if (4 * place + 4 <= halves) {
        ((uint2*)tensor)[place] = data;
        return;
    }
    u32 word[2] = {data.x, data.y};
    for (u32 i = 0; 4 * place + i < halves; i++)
        ((unsigned short*)tensor)[4 * place + i] = (unsigned short)(word[i / 2] >> (16 * (i % 2)));
}

// -- one step --

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

struct Step {
    u32 flag;
    u32 slot;      // packets before this step's slot
    u32 polls;     // that were in vain, of this thread
    u64 start_ns;  // of this thread's waiting; 0 until it has looked at the clock
};

__device__ Step begin(const Links& links) {
    u32 flag = ((volatile State*)links.state)->sequence;
    return Step{flag, (flag & 1) * links.slot_packets, 0, 0};
}

// The last block of all counts the step; each has read the sequence number before it says that it is done.
__device__ void end(const Links& links, const Step& step) {
    __syncthreads();
    let_successor_in();  // no thread waits any more; the first thread to say it says it for the block
    if (threadIdx.x == 0 && atomicInc(&links.state->blocks_done, gridDim.x - 1) == gridDim.x - 1)
        links.state->sequence = step.flag == 0xffffffffu ? 2 : step.flag + 1;  // past 0, to the slot whose turn it is
}

__device__ void push(const Links& links, const Step& step, u32 place, uint2 data) {
    for (u32 i = 0; i < links.pushes; i++) store_packet(links.to[i] + step.slot + place, data, step.flag);
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

// The sum over all ranks at one place, rounded to T. Polls all peers at once: each answer takes a way over the wire.
template <class T>
__device__ uint2 sum(const Links& links, Step& step, u32 place, uint2 own) {
    uint4 packet[RANKS];
#pragma unroll
    for (u32 r = 0; r < RANKS; r++)
        if (r != links.rank) packet[r] = load_packet(links.from[r] + step.slot + place);
    float total[T::count];
#pragma unroll
    for (u32 r = 0; r < RANKS; r++) {
        uint2 data = own;
        if (r != links.rank) {
            while (packet[r].y != step.flag || packet[r].w != step.flag) {
                if (gave_up(links, step, r)) break;
                packet[r] = load_packet(links.from[r] + step.slot + place);
            }
            data = make_uint2(packet[r].x, packet[r].z);
        }
        float part[T::count];
        T::unpack(data, part);
#pragma unroll
        for (int i = 0; i < T::count; i++) total[i] = r == 0 ? part[i] : total[i] + part[i];
    }
    return T::pack(total);
}

template <class T>
__device__ void all_reduce(const Links& links, void* tensor, u32 halves) {
    if (links.let_in_early) let_successor_in();
    await_predecessor();
    Step step = begin(links);
    u32 packets = (halves + 3) / 4;
    u32 first = blockIdx.x * blockDim.x + threadIdx.x, stride = gridDim.x * blockDim.x;
    for (u32 place = first; place < packets; place += stride)
        push(links, step, place, load_data(tensor, place, halves));
    for (u32 place = first; place < packets; place += stride)
        store_data(tensor, place, halves, sum<T>(links, step, place, load_data(tensor, place, halves)));
    end(links, step);
}

// __grid_constant__: the arguments are read where they lie, in the constant bank, also when indexed.
#define KERNEL(name, T)                                                                 \
    extern "C" __global__ void __launch_bounds__(MOST_THREADS)                          \
    all_reduce_##name(const __grid_constant__ Links links, void* tensor, u32 halves) {  \
        all_reduce<T>(links, tensor, halves);                                           \
    }

KERNEL(bfloat16, BFloat16)
KERNEL(float16, Float16)
KERNEL(float32, Float32)
