"""Text of a forecast: a few aligned tables, each under a title line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise

from l2p_engines.forecast.calls import CallSize, HostNeeds
from l2p_engines.forecast.fitting import STEP_NETWORKS, Fit, Setting
from l2p_export.cli.console import format_bytes
from l2p_export.performance.forecast import BuildForecast, DeviceForecast, Forecast, Placement

_ONE = "one network at a time"
_ALL = "all networks"


def forecast_lines(found: Forecast) -> Iterator[str]:
    """The whole report, line by line."""
    yield from _model(found)
    yield from _operations(found)
    yield from _weights(found)
    yield from _activations(found)
    yield from _build(found.build)
    if found.card is not None:
        yield from _device(found.card, _card_title(found.card))
        yield from _bounds(found.card)
    else:
        where = f"On the CPU, with {_size(found.cpu.memory_bytes)} of memory; activations are float32 there"
        yield from _device(found.cpu, where)
        yield "  No GPU was named; --device 'RTX 4090' or --vram 12GiB shows what fits one."
    yield ""
    yield "Not forecast: seconds, workspace of an engine's kernels, and accuracy. Only a run on a GPU shows them."


def table(rows: Sequence[Sequence[str]], left: int) -> Iterator[str]:
    """Format rows in aligned columns; the first row is the header.

    Args:
        rows: cells; all rows have the same length.
        left: number of left-aligned columns; the others are right-aligned.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield f"  {'   '.join(cells)}".rstrip()


def _model(found: Forecast) -> Iterator[str]:
    subject = found.subject
    spec, sampling = subject.spec, subject.sampling
    parameters = sum(weights.parameters for network, weights in found.weights.items() if network != "text_encoder")
    yield f"{spec.family} {spec.variant}: {parameters:,} parameters, patches of {spec.patch_px} px"
    if subject.checkpoint:
        known = f", which has the shapes of {subject.known_as}" if subject.known_as else ""
        yield f"  checkpoint  {subject.checkpoint}{known}"
    else:
        yield f"  checkpoint  none given: the known shapes of {subject.known_as}; nothing was read"
    for profile in subject.profiles:
        height, width, caption = profile.height_px, profile.width_px, profile.caption_tokens
        sizes = f"{width.min}x{height.min} to {width.max}x{height.max}"
        yield f"  profile     {profile.name}: {sizes} px, captions of {caption.min} to {caption.max} tokens"
    forwards = {1: "one forward a step", 2: "two forwards a step"}[found.forwards_per_step]
    yield f"  sampling    {sampling.steps} steps, guidance {sampling.guidance:g}: {forwards}"


def _operations(found: Forecast) -> Iterator[str]:
    yield from _head("Tokens, and TFLOP of one forward (a multiply-add is 2 FLOP)")
    rows: list[tuple[str, ...]] = [
        ("image", "caption", "image tokens", "sequence", "linear", "attention", "U-Net", "total")
    ]
    for item in found.calls:
        total = item.total
        flops = (_tera(count) for count in (total.linear, total.attention, total.unet, total.total))
        tokens = (f"{item.tokens.caption:,}", f"{item.tokens.image:,}", f"{item.tokens.sequence:,}")
        rows.append((_image(item.call), *tokens, *flops))
    yield from table(rows, left=1)
    outside = [_image(item.call) for item in found.calls if not item.in_profile]
    if outside:
        yield f"  {', '.join(outside)}: outside the profiles; ONNX graphs take it, an engine does not."


def _weights(found: Forecast) -> Iterator[str]:
    yield from _head("Weights")
    rows: list[tuple[str, ...]] = [("network", "tensors", "parameters", *found.precisions)]
    for network, weights in found.weights.items():
        sizes = (_size(weights.bytes[precision]) for precision in found.precisions)
        rows.append((network, f"{weights.tensors:,}", f"{weights.parameters:,}", *sizes))
    total = [sum(weights.bytes[precision] for weights in found.weights.values()) for precision in found.precisions]
    tensors = sum(weights.tensors for weights in found.weights.values())
    parameters = sum(weights.parameters for weights in found.weights.values())
    rows.append(("total", f"{tensors:,}", f"{parameters:,}", *map(_size, total)))
    yield from table(rows, left=1)


def _activations(found: Forecast) -> Iterator[str]:
    yield from _head("Memory of one call in an engine besides the weights, with the longest caption")
    rows: list[tuple[str, ...]] = [("image", "precision", "buffers", "transformer", "head, whole", "head, a token row")]
    longest = _longest_captions(item.call for item in found.calls)
    for item in (item for item in found.calls if item.call in longest):
        for precision, memory in item.memory.items():
            whole = item.tokens.rows * memory.head_row_bytes
            sizes = (memory.buffers_bytes, memory.tokens_bytes, whole, memory.head_row_bytes)
            rows.append((_image(item.call), precision, *map(_size, sizes)))
    yield from table(_grouped(rows, 1), left=2)
    halo = found.subject.spec.head.halo_rows
    cut = (
        f"stripes of the head read {halo} more token rows on each side"
        if halo is not None
        else "the head is not striped"
    )
    # Attention in float32 is decomposed in engines; on the CPU, fused graphs run.
    yield f"  Only engines in fp32 store whole attention scores; {cut}."


def _build(build: BuildForecast) -> Iterator[str]:
    yield from _head("A build: host memory and disk")
    rows: list[tuple[str, ...]] = [("precision", "memory, ONNX", "memory, engines", "disk, ONNX", "disk, engines")]
    named = [*build.each.items(), *([("all of them", build.together)] if len(build.each) > 1 else [])]
    for name, needs in named:
        sizes = (needs.export, needs.engine, needs.graphs, needs.engines)
        rows.append((name, *map(_size, sizes)))
    yield from table(rows, left=1)
    yield f"  Free on this machine: {_size(build.memory_bytes)} of memory, {_size(build.disk_bytes)} of disk."
    for what, engines in (("graphs", False), ("graphs and engines", True)):
        yield f"  {_build_verdict(build, what, engines=engines)}"
    fits = (
        "which fits" if build.reference_bytes <= build.memory_bytes else "which does not fit: they would not be checked"
    )
    yield f"  Checking ONNX graphs against torch takes {_size(build.reference_bytes)} of memory, {fits}."


def _build_verdict(build: BuildForecast, what: str, *, engines: bool) -> str:
    """Whether a build fits, and which single precisions would; each is tried by itself."""

    def lacks(needs: HostNeeds) -> str:
        memory = needs.memory if engines else needs.export
        disk = needs.disk if engines else needs.disk - needs.engines
        short = [
            f"{_size(need)} of {kind}"
            for kind, need, free in (("memory", memory, build.memory_bytes), ("disk", disk, build.disk_bytes))
            if need > free
        ]
        return " and ".join(short)

    of = "" if len(build.each) == 1 else " of all precisions"
    short = lacks(build.together)
    if not short:
        return f"{what.capitalize()}{of} fit."
    alone = [precision for precision, needs in build.each.items() if not lacks(needs)]
    if len(build.each) == 1:
        return f"{what.capitalize()} do not fit: they need {short}."
    instead = f"by itself, {_words(alone)} would" if alone else "nor does any single precision"
    # On a line of its own: with memory and disk both short, one line would be 138 wide.
    return f"{what.capitalize()}{of} do not fit: they need {short};\n    {instead}."


def _device(device: DeviceForecast, title: str) -> Iterator[str]:
    longest = _longest_captions(placement.call for placement in device.placements)
    placements = [placement for placement in device.placements if placement.call in longest]
    if not placements:
        return
    yield from _head(title)
    rows: list[tuple[str, ...]] = [("image", "precision", _ALL, _ONE)]
    for placement in placements:
        cells = ("does not run there", "")
        if placement.runs:
            cells = (_fit(placement.all_networks), _fit(placement.one_network))
        rows.append((_image(placement.call), placement.precision, *cells))
    yield from table(_grouped(rows, 1), left=4)
    failing = [placement for placement in placements if placement.runs and not placement.all_networks.fits]
    if not failing:
        return
    yield "  Where all networks do not fit, these would:"
    rows = [(_image(placement.call), placement.precision, _instead(placement)) for placement in failing]
    yield from (f"  {line}" for line in table(_grouped(rows, 1), left=3))
    if any(setting.residence == "one" for placement in failing for setting in placement.instead):
        # Rounded down, so that the budget does not exceed the memory.
        budget = math.floor(device.budget_bytes / (1 << 30) * 10) / 10
        yield f"  Networks take turns where all do not fit; generate --memory-budget {budget:g}GiB sets the limit."


def _instead(placement: Placement) -> str:
    wanted = Setting(placement.call, placement.precision, "all")
    found = [_setting(setting, wanted) for setting in placement.instead]
    return "; or ".join(found) or f"nothing that was tried: it takes {_size(placement.one_network.needed_bytes)}"


def _setting(setting: Setting, wanted: Setting) -> str:
    """The options that differ from the wanted setting."""
    parts = []
    if setting.call != wanted.call:
        parts.append(f"--size {_image(setting.call)}")
    if setting.precision != wanted.precision:
        parts.append(f"--precision {setting.precision}")
    if setting.residence != wanted.residence:
        parts.append(_ONE)
    return ", ".join(parts)


def _bounds(device: DeviceForecast) -> Iterator[str]:
    card = device.card
    if card is None:
        yield "  BF16 runs from sm80, FP8 from sm89. --device NAME also gives lower bounds of time."
        return
    yield from _head(f"Lower bounds of time on {card.name}: arithmetic, not a measurement; real runs are slower")
    rows: list[tuple[str, ...]] = [
        ("image", "caption", "precision", *(f"{network} ms" for network in STEP_NETWORKS), "step s", "image s")
    ]
    for bound in device.bounds:
        networks = [bound.networks[network] for network in STEP_NETWORKS]
        times = [_digits(item.seconds * 1e3) + ("" if item.compute_seconds is not None else "*") for item in networks]
        total = (_digits(bound.step_seconds), _digits(bound.image_seconds))
        rows.append((_image(bound.call), f"{bound.call.caption_tokens:,}", bound.precision, *times, *total))
    yield from table(_grouped(rows, 2), left=3)
    peaks = [f"{name} {peak:g} TFLOPS" for name, peak in (("FP16", card.fp16_tflops), ("FP8", card.fp8_tflops)) if peak]
    dense = " Peaks are dense, with float32 accumulation; fp32 counts as TF32." if peaks else ""
    yield f"  From {', '.join([*peaks, f'{card.bandwidth_gb_s:g} GB/s'])}.{dense}"
    yield "  Counts weights and boundary tensors once; traffic inside a network is left out, most of it in the head."
    if any(item.compute_seconds is None for bound in device.bounds for item in bound.networks.values()):
        yield "  *: the table has no peak for this card, so bandwidth alone bounds it."


def _card_title(device: DeviceForecast) -> str:
    name = f"{device.card.name} (sm{device.card.sm})" if device.card is not None else "A GPU"
    kept = _size(device.memory_bytes - device.budget_bytes)
    return f"{name} with {_size(device.memory_bytes)}, of which {kept} are reserved for driver and desktop"


def _fit(fit: Fit) -> str:
    if not fit.fits:
        return f"no, at least {_size(fit.needed_bytes)}"
    return f"{_size(fit.needed_bytes)}, head {'whole' if fit.stripes == 1 else f'in {fit.stripes} stripes'}"


def _grouped(rows: Sequence[tuple[str, ...]], key: int) -> list[list[str]]:
    """Join neighbouring rows that differ only in the precision, as fp16 and bf16 often do, and blank what repeats.

    Args:
        rows: the header and the cells.
        key: number of columns before the precision; they are blank where they equal the row above.
    """
    joined = []
    for rest, group in groupby(rows, key=lambda row: (row[:key], row[key + 1 :])):
        joined.append([*rest[0], " ".join(row[key] for row in group), *rest[1]])
    shown = joined[:1]
    for above, row in pairwise(joined):
        shown.append([*([""] * key if above[:key] == row[:key] else row[:key]), *row[key:]])
    return shown


def _longest_captions(calls: Iterable[CallSize]) -> set[CallSize]:
    """The call with the longest caption of each image size; captions change memory little."""
    longest: dict[tuple[int, int, int], CallSize] = {}
    for call in calls:
        size = (call.height_px, call.width_px, call.batch)
        if size not in longest or call.caption_tokens > longest[size].caption_tokens:
            longest[size] = call
    return set(longest.values())


def _head(text: str) -> Iterator[str]:
    yield ""
    yield text


def _image(call: CallSize) -> str:
    batch = f" x {call.batch}" if call.batch > 1 else ""
    return f"{call.width_px}x{call.height_px}{batch}"


def _size(value: int) -> str:
    return format_bytes(value)


def _tera(flops: int) -> str:
    return _digits(flops / 1e12)


def _digits(value: float) -> str:
    """Three digits, and at most five after the decimal point: 1,413, 56.5, 0.83, 0.00085."""
    behind = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 5
    return f"{value:,.{behind}f}"


def _words(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last
