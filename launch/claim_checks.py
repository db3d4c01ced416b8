"""Claims of widely read deployment guides, each beside what data sheets and the cost model give.

Nothing is typed in but the claims and the prices that they compare: figures of an answer are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster import catalog
from launch.claim_model import DEPENDS, HOLDS, IMPOSSIBLE, WRONG, made, off_by, on, spec_of, weights_gb
from strategies.cost import estimate
from strategies.cost_memory import memories
from strategies.cost_steps import prefill_s
from strategies.place import rejection
from strategies.spec import Workload

_HOURS = 24 * 365
_NVME_BYTES_PER_S = 7e9  # the sheets of PCIe 4.0 drives
_DDR5_BYTES_PER_S = 80e9  # two channels


@dataclass(frozen=True, slots=True)
class Answer:
    gives: str  # what physics and the model give
    verdict: str
    why: str  # and what would make it true


@dataclass(frozen=True, slots=True)
class Claim:
    id: str
    said: str
    check: Callable[[], Answer]


CLAIMS: list[Claim] = []


def _claim(claim_id: str, said: str) -> Callable[[Callable[[], Answer]], Callable[[], Answer]]:
    def keep(check: Callable[[], Answer]) -> Callable[[], Answer]:
        CLAIMS.append(Claim(claim_id, said, check))
        return check

    return keep


@_claim("A1", "70B: FP16 weights 140 GB; INT8 70 GB or 35 GB")
def _a1() -> Answer:
    full, eight, four = (weights_gb("llama-3.3-70b", f"tp1{f}") for f in ("", "+int8", "+int4"))
    gives = f"FP16 {full:.0f} GB, INT8 {eight:.0f} GB, INT4 {four:.0f} GB, embedding and head in 16 bits"
    return Answer(gives, off_by(35, eight), "140 and 70 hold; 35 GB is INT4's, not INT8's")


@_claim("A2", "one RTX 4090 needs 36 s a token for 70B, at 83 TFLOP/s FP16 (3e15 FLOP for 512 + 128 tokens)")
def _a2() -> Answer:
    streamed = made("llama-3.3-70b", "tp1+offload", "rtx-4090", prompt_tokens=512, output_tokens=128)
    flop = 2 * spec_of("llama-3.3-70b").active_params * (512 + 128)
    gives = (
        f"{flop:.1e} FLOP in all; weights streamed from host memory bound it: {streamed.tpot_s:.1f} s a token"
    )
    why = "decode waits for memory, not FLOP; 83 TFLOP/s is the shader rate, the tensor cores do 165 with FP32 sums"
    return Answer(gives, off_by(36, streamed.tpot_s), why)


@_claim("A3", "RTX 4090 memory bandwidth 912 GB/s")
def _a3() -> Answer:
    real = catalog.sheet("rtx-4090").bandwidth_bytes_per_s / 1e9
    return Answer(
        f"{real:.0f} GB/s", f"off by {real / 912 - 1:.0%}", "384 bits at 21 Gb/s; 912 is the RTX 3080 Ti's"
    )


@_claim("A4", "70B INT8, one 4090: 0.83 tok/s, first token 1.2 s, 22.5 GB; two data-parallel: 2.5 tok/s")
def _a4() -> Answer:
    one = made("llama-3.3-70b", "tp1+int8+offload", "rtx-4090", prompt_tokens=512, output_tokens=1024)
    two = made(
        "llama-3.3-70b",
        "dp2+int8+offload",
        "rtx-4090",
        2,
        prompt_tokens=512,
        output_tokens=1024,
        concurrency=2,
    )
    gives = (
        f"streamed: one card {1 / one.tpot_s:.2f} tok/s, first token {one.ttft_s:.1f} s; "
        f"two replicas {two.output_tokens_per_s:.2f} tok/s together"
    )
    why = (
        "73 GB do not fit 24 GB, so what is left travels over PCIe at every step; replicas stream it twice, "
        "from the same host memory"
    )
    return Answer(gives, off_by(2.5, two.output_tokens_per_s), why)


@_claim(
    "A5",
    "two 4090s (¥25,998 + ¥1,600 a year) beat an API of ¥0.015 per 1,000 tokens from 100 million tokens a year",
)
def _a5() -> Answer:
    per_million = 0.015 * 1000
    even = (25_998 + 1_600) / per_million
    years = 100e6 / 2.5 / 3600 / _HOURS
    gives = (
        f"the API asks ¥{per_million:.0f} a million, ¥{100 * per_million:,.0f} for 100 million: even at {even:,.0f} "
        f"million; 100 million tokens at the claimed 2.5 tok/s take {years:.2f} years"
    )
    return Answer(gives, off_by(100, even), "a factor of 1,000 between per-thousand and per-million prices")


@_claim(
    "A6", "INT8 halves memory at < 2 % loss; pruning 30 % gives +20 %; graphs −15 % TTFT; pinned memory +10 %"
)
def _a6() -> Answer:
    ratio = weights_gb("llama-3.3-70b", "tp1+int8") / weights_gb("llama-3.3-70b")
    why = (
        "the memory holds; single weights set to zero move the same bytes unless they are 2:4 and the kernel knows; "
        "loss, graphs and pinned memory are for `claims --measure` on the machine"
    )
    return Answer(f"INT8 weights take {ratio:.0%} of FP16's", DEPENDS, why)


@_claim("A7", "tensor parallelism needs NVLink; data parallelism must synchronise gradients")
def _a7() -> Answer:
    one, two = made("llama-3.1-8b", "tp1", "rtx-4090"), made("llama-3.1-8b", "tp2", "rtx-4090", 2)
    gives = (
        f"8B on two 4090s through host memory: {one.tpot_s * 1e3:.1f} ms a token on one card, "
        f"{two.tpot_s * 1e3:.1f} ms on two"
    )
    why = "a step's sums are kilobytes, so latency counts; prefill's are megabytes and want links; no gradients exist"
    return Answer(gives, WRONG, why)


@_claim("A8", "a 16B mixture (DeepSeek-MoE-16B) runs in 20 GB")
def _a8() -> Answer:
    eight, full = 16.4, 32.8
    gives = f"16.4 billion parameters: {full} GB in FP16, {eight} GB in INT8"
    return Answer(
        gives, HOLDS, "in INT8; it runs at the speed of its 2.8 billion active parameters, all must be held"
    )


@_claim("B1", "671B: FP32 1342 GB, INT8 167 GB, INT4 83 GB")
def _b1() -> Answer:
    billions = spec_of("deepseek-r1").total_params / 1e9
    gives = (
        f"FP32 {4 * billions:.0f}, FP16 {2 * billions:.0f}, INT8 {billions:.0f}, INT4 {billions / 2:.0f} GB"
    )
    return Answer(gives, off_by(167, billions), "FP32 is off by 2, INT8 and INT4 by 4: as if of 168B")


@_claim("B2", "671B on one 4090 at INT4: 8.2 tok/s, 18.7 GB peak, 64 GB of RAM, NVMe")
def _b2() -> Answer:
    spec = spec_of("deepseek-r1")
    per_token = spec.active_params * 0.52
    slot = catalog.HOST_COPY * catalog.sheet("rtx-4090").pcie_bytes_per_s
    ram, nvme = slot / per_token, _NVME_BYTES_PER_S / per_token
    gives = (
        f"{per_token / 1e9:.0f} GB of active weights a token: {ram:.1f} tok/s if all were in RAM, "
        f"{nvme:.2f} from NVMe"
    )
    why = "336 GB do not fit 64 GB of RAM; experts computed by the CPU where they lie, or kept hot, would change it"
    return Answer(gives, off_by(8.2, nvme), why)


@_claim("B3", "4 × A100 80 GB serve 671B at 120 ms; 2 × T4 at 800 ms")
def _b3() -> Answer:
    reason = rejection(on("deepseek-r1", "tp4+int4", "a100-80gb", 4), Workload(), None)
    return Answer(str(reason), IMPOSSIBLE, "not in 4 bits, with any context; five such cards, or fewer bits")


@_claim("B4", "two 4090s by NVLink with FSDP in 16 bits")
def _b4() -> Answer:
    rate = catalog.sheet("rtx-4090").nvlink_bytes_per_s
    return Answer(
        f"NVLink of the RTX 4090: {rate / 1e9:.0f} GB/s", IMPOSSIBLE, "the card has no NVLink; the 3090 had"
    )


@_claim("B5", "one card serves 200 concurrent students, 500 consultations a day, in under 400 ms")
def _b5() -> Answer:
    alone = made("qwen2.5-7b", "tp1", "rtx-4090", prompt_tokens=512, output_tokens=256)
    crowd = made("qwen2.5-7b", "tp1", "rtx-4090", prompt_tokens=512, output_tokens=256, concurrency=200)
    at_once = 500 / 86400 * (alone.ttft_s + 255 * alone.tpot_s)
    gives = (
        f"7B on a 4090: first token after {alone.ttft_s * 1e3:.0f} ms alone, {crowd.ttft_s:.1f} s for 200 at once; "
        f"500 a day are {at_once:.2f} at once"
    )
    return Answer(gives, DEPENDS, "holds for 500 spread over a day, not for 200 in the same second")


@_claim("C1", "7B: FP32 28 GB, BF16 14, INT8 7; choose memory ≥ 2 × parameters")
def _c1() -> Answer:
    billions = spec_of("llama-2-7b").total_params / 1e9
    gives = f"{4 * billions:.0f}, {2 * billions:.0f} and {billions:.0f} GB; KV cache and runtime come on top"
    return Answer(gives, off_by(14, 2 * billions), "GB at 2 bytes a parameter, plus room for the context")


@_claim("C2", "PCIe 4.0 x16: 31.5 GB/s, 75 % real; a token 15–20 ms in memory, 80–120 ms beyond it")
def _c2() -> Answer:
    sheet = catalog.sheet("rtx-4090")
    inside = made("llama-2-7b", "tp1", "rtx-4090").tpot_s
    real = catalog.HOST_COPY * sheet.pcie_bytes_per_s
    share = (0.100 - inside) * real / (weights_gb("llama-2-7b") * 1e9)
    gives = (
        f"{sheet.pcie_bytes_per_s / 1e9:.1f} GB/s, {catalog.HOST_COPY:.0%} real; 7B on a 4090 {inside * 1e3:.1f} ms a "
        f"token, 100 ms with {share:.0%} of the weights streamed"
    )
    return Answer(gives, HOLDS, "where about a sixth of a 7B model is offloaded")


@_claim("C3", "6B FP16 at 512 × 32: A100 120 TFLOP/s, a consumer card 40")
def _c3() -> Answer:
    def rate(card: str) -> float:
        placed = on("llama-2-7b", "tp1", card)
        seconds, _ = prefill_s(placed, 0, 32, 512, 1.0)
        return 32 * 512 * 2 * placed.spec.active_params / seconds / 1e12

    a100, consumer = rate("a100-80gb"), rate("rtx-4090")
    gives = f"prefill of a 7B: A100 {a100:.0f} TFLOP/s, RTX 4090 {consumer:.0f}"
    return Answer(
        gives, off_by(120, a100), "both far below what prefill reaches; right for FP16 without FlashAttention"
    )


@_claim("C4", "13B INT8 on a T4: 120 tok/s, 3.2 × FP16")
def _c4() -> Answer:
    def tokens(n: int) -> float:
        return made(
            "llama-2-13b", "tp1+int8", "t4", prompt_tokens=128, output_tokens=128, concurrency=n
        ).output_tokens_per_s

    single = 1 / made("llama-2-13b", "tp1+int8", "t4", prompt_tokens=128, output_tokens=128).tpot_s
    gives = f"{single:.0f} tok/s for one request, {tokens(8):.0f} for 8 at once; FP16 (26 GB) does not fit 16 GB at all"
    return Answer(gives, off_by(120, single), "320 GB/s over 13 GB a token; only a batch gives more")


@_claim("C5", "adaptive batch size (queue > 16: up to 32; > 8: half + 8; else 4): +40 % throughput")
def _c5() -> Answer:
    def rate(n: int) -> float:
        load = Workload(512, 256, n, steady=True)
        return estimate(on("llama-2-7b", "tp1", "rtx-4090"), load).output_tokens_per_s

    four, twelve, many = rate(4), rate(12), rate(32)
    gives = f"7B on a 4090 with 4, 12 and 32 in flight: {four:.0f}, {twelve:.0f} and {many:.0f} tok/s"
    why = "the gain depends on the batch that it replaces; continuous batching needs no rule, it admits at every step"
    return Answer(gives, off_by(1.4, many / four), why)


@_claim("C6", "33B: cloud $2.1 an hour (p4d.24xlarge) against an A100 for $15,000: even at 21 months")
def _c6() -> Answer:
    months = 15_000 / 2.1 / (_HOURS / 12)
    market = 8 * (catalog.sheet("a100-80gb").rent_usd_per_hour or 0.0)
    gives = (
        f"at $2.1 an hour, used all the time, {months:.0f} months; a p4d.24xlarge is 8 × A100: ${market:.0f} an hour "
        "on a rental market, about $32 on demand"
    )
    return Answer(gives, off_by(2.1, 32), "holds for one rented A100 used 11 hours a day")


@_claim(
    "D1",
    "DeepSeek-R1, ms and tok/s: 4090 12.3/850, 3090 15.7/680, A100 80 8.9/1200, H100 6.2/1800, A40 14.5/750",
)
def _d1() -> Answer:
    told = {"rtx-4090": (12.3, 850), "rtx-3090": (15.7, 680), "a100-80gb": (8.9, 1200), "h100": (6.2, 1800)}
    told["a40"] = (14.5, 750)
    in_flight = [ms * rate / 1e3 for ms, rate in told.values()]
    base = catalog.sheet("rtx-4090").bandwidth_bytes_per_s
    worst = max(
        max(a / b, b / a)
        for key, (ms, _) in told.items()
        for a, b in [(12.3 / ms, catalog.sheet(key).bandwidth_bytes_per_s / base)]
    )
    gives = (
        f"latency times rate is {min(in_flight):.1f} to {max(in_flight):.1f} sequences in flight on every card; ratios "
        f"follow bandwidth within {worst:.1f}×; the full R1 has {weights_gb('deepseek-r1', 'tp1+int4'):.0f} GB in INT4"
    )
    return Answer(
        gives, IMPOSSIBLE, "for R1 itself; plausible for a distilled 7B in 8 bits, ten requests at once"
    )


@_claim("D2", "cost: 4090 $1,600 / 850 = $1.88 per 1,000 tokens, H100 $17.78")
def _d2() -> Answer:
    usd = (catalog.sheet("rtx-4090").usd_per_hour or 0.0) / 3600 / 850 * 1000
    gives = f"rented at ${catalog.sheet('rtx-4090').usd_per_hour:.2f} an hour, 850 tok/s: ${usd:.5f} per 1,000 tokens"
    return Answer(
        gives, off_by(1.88, usd), "a price divided by a rate is no price per token: the hours are missing"
    )


@_claim("E1", "7B FP16 needs 14 GB; a 4090 runs 7B only when quantized to 8 bits")
def _e1() -> Answer:
    room = memories(on("llama-2-7b", "tp1", "rtx-4090"), Workload())[0]
    gives = f"{room.weights / 1e9:.1f} of {room.free / 1e9:.1f} GB free; {room.kv_tokens:,} tokens of cache beside them"
    return Answer(gives, WRONG, "14 GB fit in 24")


@_claim("E2", "an A100 80 GB runs a 40B model in FP16; an A6000 48 GB runs 175B at 8 bits")
def _e2() -> Answer:
    a100, a6000 = (catalog.sheet(key).memory_bytes / 1e9 for key in ("a100-80gb", "rtx-a6000"))
    gives = f"80 GB of weights in {a100:.1f} GB leave {a100 - 80 - 1.4:.1f} GB for context; 175 GB in {a6000:.1f} GB"
    return Answer(
        gives, IMPOSSIBLE, "the first only just, for a few requests; the second takes four such cards"
    )


@_claim("E3", "3D parallelism brings 175B from eight H100s to four")
def _e3() -> Answer:
    four = 4 * catalog.sheet("h100").memory_bytes / 1e9
    return Answer(
        f"350 GB of FP16 weights in {four:.0f} GB",
        IMPOSSIBLE,
        "no split makes weights smaller; FP8 (175 GB) does",
    )


@_claim("E4", "2 × A100 40 GB with ZeRO-3: 7B at 20 requests a second")
def _e4() -> Answer:
    short = made("llama-2-7b", "dp2", "a100-40gb", 2, prompt_tokens=128, output_tokens=128, concurrency=128)
    long = made("llama-2-7b", "dp2", "a100-40gb", 2, prompt_tokens=1024, output_tokens=512, concurrency=64)
    gives = (
        f"two replicas: {short.output_tokens_per_s / 128:.0f} requests a second of 128 + 128 tokens, "
        f"{long.output_tokens_per_s / 512:.1f} of 1,024 + 512"
    )
    return Answer(
        gives,
        DEPENDS,
        "on the lengths; ZeRO-3 gathers the weights over the link at every step, replicas do not",
    )


@_claim("E5", "an H100 cluster at full load: 3 kW, ¥25,000 a year at ¥0.6 per kWh")
def _e5() -> Answer:
    yuan = 3 * _HOURS * 0.6
    watts = catalog.sheet("h100").watts
    return Answer(
        f"3 kW all year are ¥{yuan:,.0f}; one H100 is {watts:.0f} W", off_by(25_000, yuan), "holds at PUE 1.6"
    )


@_claim("E6", "a CPU is 10 to 20 times slower than a GPU")
def _e6() -> Answer:
    ratio = catalog.sheet("rtx-4090").bandwidth_bytes_per_s / _DDR5_BYTES_PER_S
    return Answer(
        f"decode by bandwidth: 1008 GB/s over 80 GB/s, {ratio:.0f}×",
        HOLDS,
        "for decode; prefill, by FLOP/s, 50 to 200×",
    )


@_claim(
    "E7", "liquid cooling PUE 1.2; maintenance 8 % of hardware a year; power and depreciation in total cost"
)
def _e7() -> Answer:
    return Answer(
        "inputs of `shardwise advise`: --pue, --maintenance, --years, --usd-per-kwh", HOLDS, "as inputs"
    )
