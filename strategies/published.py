"""How a published checkpoint's linear layers are stored, from the quantization_config of its config.json.

What keeps its form in memory, of 4 bits in groups or 8 bits with a scale a channel, has a format of FORMATS, which
every layout of the model then has. What has none is widened as it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cluster.errors import BadModel


class Stored(StrEnum):
    PACKED = "packed"  # compressed-tensors: weight_packed, weight_scale, weight_zero_point
    CHANNELS = "channels"  # int8 or float8 weights with weight_scale: of a tensor or of each channel
    BLOCKS = "blocks"  # float8 weights with weight_scale_inv of blocks (DeepSeek)
    GPTQ = "gptq"
    AWQ = "awq"
    NF4 = "nf4"  # bitsandbytes: a byte has two codes of a table (NF4 or FP4)
    GGUF = "gguf"  # blocks of a GGUF file; strategies/gguf_kept.py


@dataclass(frozen=True, slots=True)
class Published:
    stored: Stored
    bits: int
    group: int = 0  # columns that share a scale; 0: the whole row
    symmetric: bool = True
    format: str = ""  # that it keeps in memory; none: it is widened
    block: tuple[int, int] = (0, 0)  # rows and columns
    zero_offset: int = 0  # GPTQ's first format stores zero points less one
    kept_bytes: float = 0.0  # of a weight of a GGUF file's linear layers, where they stay codes; their mean
    kept_bytes_on_cpu: float = 0.0


_KNOWN = "compressed-tensors (W4A16, W8A16, INT8, FP8), gptq, awq, fp8 and bitsandbytes in 4 bits"
_EIGHT = {
    ("int", 8): ("int-quantized", "naive-quantized"),
    ("float", 8): ("float-quantized", "naive-quantized"),
}
_WAY_OUT = "use the bf16 weights, or a GGUF file"


def published(config: Mapping[str, Any], name: str) -> Published:
    """Raises BadModel for what is not known, naming it."""
    method = str(config.get("quant_method", "")).lower()
    readers = {
        "compressed-tensors": _compressed_tensors,
        "gptq": _gptq,
        "awq": _awq,
        "fp8": _fp8,
        "bitsandbytes": _bitsandbytes,
    }
    if method not in readers:
        raise BadModel(
            f"{name}: weights quantized by {method or 'no named method'} are not read; {_KNOWN} are; {_WAY_OUT}"
        )
    return readers[method](config, name)


def _number(
    config: Mapping[str, Any], key: str, allowed: tuple[int, ...], name: str, default: Any = None
) -> int:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or (allowed and value not in allowed):
        rule = f"it must be {' or '.join(map(str, allowed))}" if allowed else "it must be a whole number"
        raise BadModel(f"{name}: quantization_config's {key} is {value!r}; {rule}")
    return value


def _group(config: Mapping[str, Any], name: str) -> int:
    """0: the whole row."""
    group = _number(config, "group_size", (), name, default=-1)
    if group != -1 and (group < 1 or group % 8):
        raise BadModel(
            f"{name}: quantization_config's group_size is {group}; it must be -1 or a multiple of 8"
        )
    return max(0, group)


def _in_fours(bits: int, group: int) -> str:
    """The format of codes in groups: 4 bits are kept, as groups of 128, 64 or 32."""
    return "int4" if bits == 4 and group % 32 == 0 else ""


def _gptq(config: Mapping[str, Any], name: str) -> Published:
    bits, group = _number(config, "bits", (4, 8), name), _group(config, name)
    kept = "" if config.get("desc_act") else _in_fours(bits, group)
    offset = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
    return Published(Stored.GPTQ, bits, group, False, kept, zero_offset=offset)


def _awq(config: Mapping[str, Any], name: str) -> Published:
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise BadModel(f"{name}: AWQ's {version} layout is not read, gemm is; {_WAY_OUT}")
    bits = _number({"bits": config.get("bits", config.get("w_bit"))}, "bits", (4,), name)
    group = _group({"group_size": config.get("group_size", config.get("q_group_size", -1))}, name)
    return Published(Stored.AWQ, bits, group, False, _in_fours(bits, group))


def _fp8(config: Mapping[str, Any], name: str) -> Published:
    block = config.get("weight_block_size")
    if block is None:
        return Published(Stored.CHANNELS, 8, format="fp8")
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
        raise BadModel(f"{name}: quantization_config's weight_block_size is {block!r}; it must be two sizes")
    return Published(Stored.BLOCKS, 8, block=(block[0], block[1]))


def _bitsandbytes(config: Mapping[str, Any], name: str) -> Published:
    if not config.get("load_in_4bit"):
        raise BadModel(f"{name}: bitsandbytes' 8 bits are not read, its 4 bits are; {_WAY_OUT}")
    storage = config.get("bnb_4bit_quant_storage", "uint8")
    if storage not in ("uint8", None):
        raise BadModel(
            f"{name}: bitsandbytes' 4 bits stored as {storage} are not read, as uint8 they are; {_WAY_OUT}"
        )
    return Published(Stored.NF4, 4)


def _compressed_tensors(config: Mapping[str, Any], name: str) -> Published:
    groups = config.get("config_groups")
    schemes = [g.get("weights") for g in groups.values()] if isinstance(groups, Mapping) else []
    if (
        not schemes
        or not all(isinstance(s, Mapping) for s in schemes)
        or any(s != schemes[0] for s in schemes)
    ):
        ways = (
            f"store weights in {len(schemes)} ways"
            if len(schemes) > 1
            else "do not say how weights are stored"
        )
        raise BadModel(f"{name}: its config_groups {ways}; one way is read; {_WAY_OUT}")
    weights: Mapping[str, Any] = schemes[0]
    form, kind, strategy = (
        str(v) for v in (config.get("format"), weights.get("type"), weights.get("strategy"))
    )
    bits = _number(weights, "num_bits", (4, 8), name)
    symmetric = bool(weights.get("symmetric", True))
    if weights.get("actorder") in ("group", True):
        raise BadModel(f"{name}: columns in an order of their own (actorder group) are not read; {_WAY_OUT}")
    if form == "pack-quantized" and kind == "int" and strategy in ("group", "channel"):
        group = _group(weights, name) if strategy == "group" else 0
        return Published(Stored.PACKED, bits, group, symmetric, _in_fours(bits, group))
    if (
        (kind, bits) in _EIGHT
        and form in _EIGHT[kind, bits]
        and symmetric
        and strategy in ("channel", "tensor")
    ):
        return Published(Stored.CHANNELS, 8, format="int8" if kind == "int" else "fp8")
    told = f"{form}, {bits}-bit {kind} by {strategy}{'' if symmetric else ', asymmetric'}"
    raise BadModel(f"{name}: compressed-tensors' {told} is not read; {_WAY_OUT}")
