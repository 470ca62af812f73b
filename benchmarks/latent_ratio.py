"""Time saved by fewer tokens: one block of the published width, with latent and pixel tokens of a 4096 x 4096 image.

The latent source splits that image into 65,536 tokens, the 4k variant into 4,096; both read 64 caption tokens. Prints
seconds of each and the saved share, measured, by FLOPs, and in the paper (docs/model.md, "Operations"). A run takes
about fifteen minutes on two cores; `--tokens` sets other counts.
"""

from __future__ import annotations

import argparse
import time

import torch

from l2p_export.families.z_image_l2p.blocks import Block
from l2p_export.families.z_image_l2p.dimensions import published_dimensions

LATENT_TOKENS, PIXEL_TOKENS = 65_600, 4_160
PAPER = "the paper: 97.67 % of a step's latency at 4096 x 4096 (51.14 s to 1.19 s on a GPU)"


def main() -> None:
    """Time both token counts and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs=2, default=(LATENT_TOKENS, PIXEL_TOKENS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    block = _block(dtype)
    seconds = {tokens: _seconds(block, tokens, dtype) for tokens in sorted(arguments.tokens)}
    many, few = max(seconds), min(seconds)
    print(f"one block of width 3840 in {arguments.dtype}, {torch.get_num_threads()} threads\n")
    print("| tokens | seconds | TFLOP | GFLOP/s |\n| --- | --- | --- | --- |")
    for tokens, taken in seconds.items():
        print(f"| {tokens:,} | {taken:.2f} | {_flops(tokens) / 1e12:.2f} | {_flops(tokens) / taken / 1e9:.0f} |")
    print(
        f"\nsaved: {1 - seconds[few] / seconds[many]:.2%} measured, {1 - _flops(few) / _flops(many):.2%} by arithmetic"
    )
    print(PAPER)


def _block(dtype: torch.dtype) -> Block:
    torch.manual_seed(0)
    block = Block(published_dimensions("4k"), dtype, modulated=True).eval().requires_grad_(requires_grad=False)
    for name, value in block.named_parameters():
        value.copy_(torch.ones_like(value) if "norm" in name else 0.02 * torch.randn_like(value))
    return block


@torch.no_grad()
def _seconds(block: Block, tokens: int, dtype: torch.dtype) -> float:
    """Minimum of three runs, or one run if it is long, after a small warm-up call."""
    sizes = published_dimensions("4k")
    modulation = torch.randn(1, sizes.time_width).to(dtype)

    def run(count: int) -> float:
        x = torch.randn(1, count, sizes.width).to(dtype)
        angles = torch.randn(count, sizes.head_width // 2)
        started = time.perf_counter()
        block(x, modulation, angles.cos(), angles.sin())
        return time.perf_counter() - started

    run(128)
    first = run(tokens)
    return first if first > 60 else min(first, run(tokens), run(tokens))


def _flops(tokens: int) -> float:
    """FLOPs of a block, 2 per multiply-add: seven matrices per token, and attention between all tokens."""
    d = published_dimensions("4k")
    matrices = 4 * d.width**2 + 3 * d.width * d.ffn_width
    return 2.0 * tokens * matrices + 4.0 * tokens**2 * d.width


if __name__ == "__main__":
    main()
