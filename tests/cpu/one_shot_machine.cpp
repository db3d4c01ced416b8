// machine SEED STEPS FIRST_SEQUENCE RELEASES: random all-reduces of all ranks on simulated GPUs, held to sums in rank
// order. Prints "right", or the first thing that went wrong and exits 1. See one_shot_machine.h.
#include "one_shot_machine.h"

#include <cstdio>
#include <cstdlib>

#include "kernels.inc"  // one_shot.cu but for its hardware
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

Thread* running;
ucontext_t scheduler;
std::mt19937 dice;
bool releases;

const u32 SLOT_PACKETS = 333, SHARED_PACKETS = 700;
const long MOST_IDLE_TURNS = 30000;
typedef void (*Kernel)(Links, void*, u32);

struct Dtype {
    Kernel kernels[2];  // Lamport's, Simple's
    u32 bytes;
    float (*widen)(u32);
    u32 (*round)(float);
};
const Dtype DTYPES[] = {
    {{all_reduce_lamport_bfloat16, all_reduce_simple_bfloat16}, 2, BFloat16::widen, BFloat16::round},
    {{all_reduce_lamport_float16, all_reduce_simple_float16}, 2, Float16::widen, Float16::round},
    {{all_reduce_lamport_float32, all_reduce_simple_float32}, 4, __uint_as_float, __float_as_uint},
};

struct Step_ {  // of one rank
    const Dtype* dtype;
    int protocol;
    u32 elements, blocks, threads, offset;
    std::vector<char> input;
};

struct Rank {
    Links links{};
    State state{};
    u32 silent = 0;
    alignas(16) char buffer[SHARED_PACKETS * 16 + 16];
    std::vector<Step_> steps;
    std::vector<std::vector<char>> outputs;
    std::vector<Thread> threads;  // of the kernel under way
    std::vector<Barrier> barriers;
};
static Rank ranks[RANKS];

u32 element(const Dtype& dtype, const std::vector<char>& from, u32 i) {
    u32 bits = 0;
    memcpy(&bits, &from[i * dtype.bytes], dtype.bytes);
    return bits;
}

void run_thread(int r) {
    Rank& rank = ranks[r];
    const Step_& step = rank.steps[rank.outputs.size()];
    step.dtype->kernels[step.protocol](rank.links, rank.buffer + step.offset, step.elements * step.dtype->bytes / 2);
    running->done = true;
    yield();
}

void launch(int r) {
    Rank& rank = ranks[r];
    const Step_& step = rank.steps[rank.outputs.size()];
    memcpy(rank.buffer + step.offset, step.input.data(), step.input.size());
    int count = step.blocks * step.threads, warps = count / 32;
    rank.threads = std::vector<Thread>(count);
    rank.barriers = std::vector<Barrier>(warps + step.blocks);
    for (int i = 0; i < count; i++) {
        Thread& thread = rank.threads[i];
        thread.thread.x = i % step.threads;
        thread.block.x = i / step.threads;
        thread.threads.x = step.threads;
        thread.blocks.x = step.blocks;
        thread.of_warp = &rank.barriers[i / 32];
        thread.of_block = &rank.barriers[warps + i / step.threads];
        thread.of_warp->size = 32;
        thread.of_block->size = step.threads;
        for (int lane = 0; lane < 32; lane++) thread.warp.push_back(&rank.threads[i / 32 * 32 + lane]);
        thread.stack.resize(32 << 10);
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        makecontext(&thread.context, (void (*)())run_thread, 1, r);
    }
}

// Runs threads of a rank for a while. Returns whether its kernel came to its end.
bool take_turn(Rank& rank) {
    for (int i = 0; i < 40; i++) {
        Thread& thread = rank.threads[dice() % rank.threads.size()];
        if (!thread.on_its_way.empty() && dice() % 3 == 0) thread.land(dice() % thread.on_its_way.size());
        if (thread.done) continue;
        running = &thread;
        swapcontext(&scheduler, &thread.context);
    }
    for (Thread& thread : rank.threads)
        if (!thread.done) return false;
    for (Thread& thread : rank.threads) thread.land_all();
    return true;
}

void fill(std::vector<char>& input, const Dtype& dtype, u32 elements, std::mt19937& plan) {
    input.resize(elements * dtype.bytes);
    for (u32 i = 0; i < elements; i++) {
        u32 bits = dtype.round((float)(int)(plan() % 2000) / 8 - 100);
        memcpy(&input[i * dtype.bytes], &bits, dtype.bytes);
    }
    for (u32 word = 0; word + 4 <= input.size() && plan() % 4 == 0; word += 4 * (1 + plan() % 50))
        memset(&input[word], 0xff, 4);  // what Lamport must not send
}

void plan_steps(int count, std::mt19937& plan) {
    for (int s = 0; s < count; s++) {
        const Dtype& dtype = DTYPES[plan() % 3];
        int protocol = plan() % 2;
        u32 most = (protocol ? SHARED_PACKETS : SLOT_PACKETS) * 16 / dtype.bytes;
        u32 elements = plan() % 8 == 0 ? most : 1 + plan() % (plan() % 2 ? 40 : most);
        for (Rank& rank : ranks) {
            rank.steps.push_back({&dtype, protocol, elements, 1 + plan() % 3u, 32u << plan() % 2, 8 * (plan() % 2u), {}});
            fill(rank.steps.back().input, dtype, elements, plan);
        }
    }
}

bool all_right() {
    for (size_t s = 0; s < ranks[0].steps.size(); s++) {
        const Step_& first = ranks[0].steps[s];
        for (u32 i = 0; i < first.elements; i++) {
            float total = 0;
            for (int r = 0; r < RANKS; r++) {
                float part = first.dtype->widen(element(*first.dtype, ranks[r].steps[s].input, i));
                total = r ? total + part : part;
            }
            float right = first.dtype->widen(first.dtype->round(total));
            for (int r = 0; r < RANKS; r++) {
                float got = first.dtype->widen(element(*first.dtype, ranks[r].outputs[s], i));
                if (got == right || (got != got && right != right)) continue;
                printf("step %zu, protocol %d, %u bytes each: element %u of %u on rank %d is %g, not %g\n", s,
                       first.protocol, first.dtype->bytes, i, first.elements, r, got, right);
                return false;
            }
        }
    }
    return true;
}

int main(int, char** argv) {
    unsigned seed = atoi(argv[1]), steps = atoi(argv[2]);
    releases = atoi(argv[4]);
    dice.seed(seed);
    std::mt19937 plan(seed + 1000);
    static std::vector<uint4> pair[RANKS][RANKS], shared[RANKS];  // pair[reader][writer]
    u32 flags = (SHARED_PACKETS + CHUNK_PACKETS - 1) / CHUNK_PACKETS * FLAG_PACKETS;
    for (int r = 0; r < RANKS; r++) {
        for (int writer = 0; writer < RANKS; writer++)
            pair[r][writer].assign(2 * SLOT_PACKETS, uint4{NOTHING, NOTHING, NOTHING, NOTHING});
        shared[r].assign(2 * (SHARED_PACKETS + flags), uint4{});
    }
    for (u32 r = 0; r < RANKS; r++) {
        Links& links = ranks[r].links;
        links.state = &ranks[r].state;
        links.state->sequence = strtoul(argv[3], nullptr, 0);
        links.silent_rank = &ranks[r].silent;
        links.patience_ns = ~0ull;
        links.rank = r;
        links.slot_packets = SLOT_PACKETS;
        links.shared_packets = SHARED_PACKETS;
        for (u32 other = 0; other < RANKS; other++) {
            links.from[other] = pair[r][other].data();
            links.shared[other] = shared[other].data();
            if (other) links.to[other - 1] = pair[(r + other) % RANKS][r].data();
        }
    }
    plan_steps(steps, plan);
    unsigned done = 0;
    long idle = 0, turns = 0;
    int slow = 0;
    while (done < RANKS * steps) {
        if (++turns % 5000 == 0) slow = dice() % (RANKS + 1);  // one falls behind, so that others run ahead of it
        int r = dice() % RANKS;
        if (r == slow && dice() % 50) continue;
        Rank& rank = ranks[r];
        if (rank.outputs.size() == steps) continue;
        if (rank.threads.empty()) launch(r);
        if (++idle > MOST_IDLE_TURNS) return printf("hangs: rank %d in step %zu\n", r, rank.outputs.size()), 1;
        if (!take_turn(rank)) continue;
        const Step_& step = rank.steps[rank.outputs.size()];
        char* tensor = rank.buffer + step.offset;
        rank.outputs.push_back(std::vector<char>(tensor, tensor + step.input.size()));
        rank.threads.clear();
        done++;
        idle = 0;
    }
    if (!all_right()) return 1;
    puts("right");
}
