"""Compiles FlashInfer's prefill for this machine's first GPU: `python -m launch.compile_flashinfer bfloat16 128`.

A start uses FlashInfer only where this was done or the wheel flashinfer-jit-cache is installed, and says so.
"""

from __future__ import annotations

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.compile_flashinfer", description=__doc__)
    parser.add_argument("dtype", choices=("float16", "bfloat16"))
    parser.add_argument("head_dim", type=int)
    parser.add_argument("--windowed", action="store_true", help="for layers with a sliding window")
    args = parser.parse_args()
    import torch

    from orchestrator.engine.flashinfer_attention import Unusable, compile_kernels

    try:
        compile_kernels(
            getattr(torch, args.dtype), args.head_dim, torch.device("cuda", 0), windowed=args.windowed
        )
    except Unusable as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
