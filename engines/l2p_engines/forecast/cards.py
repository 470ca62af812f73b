"""NVIDIA cards: memory, bandwidth and peak arithmetic from their data sheets."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from l2p_runtime.errors import UsageError

_MIB, _GIB = 1 << 20, 1 << 30
# With error correction on, as these ship, GDDR6 keeps a sixteenth for itself.
_ECC = 15 / 16
_NOISE_WORDS = re.compile(r"nvidia|geforce|tesla|quadro|generation|edition|graphics|gpu|hbm\w*|sxm\d?")


@dataclass(frozen=True, slots=True)
class Card:
    """One card.

    Attributes:
        name: as people say it, without the maker's and the brand's name.
        vram_bytes: memory that the system shows.
        sm: compute capability times ten, as 89.
        bandwidth_gb_s: memory bandwidth in 10^9 bytes a second.
        fp16_tflops: dense tensor peak in 10^12 FLOP a second, float16 with float32 accumulation; None where no data
            sheet states it. BF16 runs at the same rate from sm80.
        fp8_tflops: the same for FP8; None where there is none or no data sheet states it.
        aliases: other spellings that mean this card.
    """

    name: str
    vram_bytes: int
    sm: int
    bandwidth_gb_s: float
    fp16_tflops: float | None = None
    fp8_tflops: float | None = None
    aliases: tuple[str, ...] = ()

    def runs(self, precision: str) -> bool:
        """Whether its tensor cores take the precision: BF16 from sm80, FP8 from sm89."""
        return self.sm >= {"bf16": 80, "fp8": 89}.get(precision, 0)

    def peak_tflops(self, precision: str) -> float | None:
        """Dense peak in 10^12 FLOP a second; None when unknown.

        For fp32 it is the peak of TF32: half of float16's on every card that has TF32. True float32 is no faster.
        """
        if precision == "fp8":
            return self.fp8_tflops
        if precision == "fp32":
            return self.fp16_tflops / 2 if self.fp16_tflops is not None and self.sm >= 80 else None
        return self.fp16_tflops if self.runs(precision) else None


# Peaks: NVIDIA's architecture white papers (Turing, GA102, Ada, RTX Blackwell) and data sheets (A10, L4, L40S, A100,
# H100, H200); figures stated with sparsity are halved. HBM cards: memory as the driver shows it.
CARDS: tuple[Card, ...] = (
    Card("RTX 2080 Ti", 11 * _GIB, 75, 616, 53.8),
    Card("RTX 3060 12GB", 12 * _GIB, 86, 360, aliases=("rtx3060",)),
    Card("RTX 3080", 10 * _GIB, 86, 760, 59.5, aliases=("rtx308010gb",)),
    Card("RTX 3090", 24 * _GIB, 86, 936, 71.0),
    Card("RTX 4060 Ti 16GB", 16 * _GIB, 89, 288),
    Card("RTX 4070", 12 * _GIB, 89, 504),
    Card("RTX 4080", 16 * _GIB, 89, 716.8, 97.5, 194.9),
    Card("RTX 4090", 24 * _GIB, 89, 1008, 165.2, 330.3),
    Card("RTX 5070 Ti", 16 * _GIB, 120, 896, 87.9, 175.8),
    Card("RTX 5080", 16 * _GIB, 120, 960, 112.6, 225.1),
    Card("RTX 5090", 32 * _GIB, 120, 1792, 209.5, 419.0),
    Card("RTX 6000 Ada", 48 * _GIB, 89, 960, 364.2, 728.5),
    Card(
        "RTX PRO 6000 Blackwell",
        96 * _GIB,
        120,
        1792,
        503.8,
        1007.6,
        aliases=("rtxpro6000", "rtxpro6000blackwellworkstation", "rtxpro6000blackwellserver"),
    ),
    Card("A10", int(24 * _GIB * _ECC), 86, 600, 125.0),
    Card("L4", int(24 * _GIB * _ECC), 89, 300, 121.0, 242.5),
    Card("L40S", int(48 * _GIB * _ECC), 89, 864, 362.0, 733.0),
    Card("A100 40GB", 40960 * _MIB, 80, 1555, 312.0, aliases=("a100pcie40gb",)),
    Card("A100 80GB", 81920 * _MIB, 80, 2039, 312.0, aliases=("a100",)),
    Card("A100 80GB PCIe", 81920 * _MIB, 80, 1935, 312.0, aliases=("a100pcie80gb",)),
    Card("H100 SXM", 81559 * _MIB, 90, 3350, 989.4, 1978.9, aliases=("h100", "h10080gb")),
    Card("H100 PCIe", 81559 * _MIB, 90, 2000, 756.0, 1513.0, aliases=("h100pcie80gb",)),
    Card("H200", 143771 * _MIB, 90, 4800, 989.4, 1978.9, aliases=("h200141gb",)),
)


def find_card(text: str) -> Card:
    """A card by any usual spelling: `rtx4090`, `4090`, `NVIDIA GeForce RTX 4090`.

    Raises:
        UsageError: no such card; names the nearest ones.
    """
    wanted = _key(text)
    known = {spelling: card for card in CARDS for spelling in _spellings(card)}
    if wanted in known:
        return known[wanted]
    near = [spelling for spelling in known if len(spelling) > 3 and spelling in wanted]
    near = near or difflib.get_close_matches(wanted, known, n=4, cutoff=0.6)
    names = dict.fromkeys(known[spelling].name for spelling in near) or {card.name: None for card in CARDS}
    raise UsageError(
        f"there is no card `{text[:80]}` in the table",
        hint=f"{'the nearest are' if near else 'known cards are'} {', '.join(names)}; for another give its memory: "
        "--vram 12GiB",
    )


def _spellings(card: Card) -> tuple[str, ...]:
    full = _key(card.name)
    return (full, full.removeprefix("rtx"), *card.aliases, *(alias.removeprefix("rtx") for alias in card.aliases))


def _key(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", _NOISE_WORDS.sub("", text.lower()))
