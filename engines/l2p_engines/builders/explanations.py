"""Explains messages of the engine libraries: a table from a message to its cause and its cure.

The libraries return nothing when they fail, and log which of their checks failed. Sources of the
table: builds that were made to fail (docs/design.md, "TensorRT facts"), and the trackers of the libraries and of
projects that use them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from l2p_runtime.errors import ArtifactError, HostError, L2PError, UnsupportedError, UsageError

Fault = Literal["artifact", "usage", "host", "unsupported"]
"""Whose fault: the graph's, the call's, the machine's, or nobody's."""

LINES_SHOWN = 8
LINE_CHARACTERS = 400

_ERRORS: dict[Fault, type[L2PError]] = {
    "artifact": ArtifactError,
    "usage": UsageError,
    "host": HostError,
    "unsupported": UnsupportedError,
}


@dataclass(frozen=True, slots=True)
class Explanation:
    """One kind of message.

    Attributes:
        pattern: regular expression of the message.
        cause: what it means; may name groups of the pattern in braces.
        cure: what to do about it, likewise.
    """

    pattern: str
    fault: Fault
    cause: str
    cure: str


EXPLANATIONS: tuple[Explanation, ...] = (
    Explanation(
        r"Cannot compile for target\(s\) (?P<targets>[^,]*(?:, ?sm\d+)*), because the model contains HW-specific "
        r"datatypes: (?P<dtypes>[\w, ]+)",
        "usage",
        "the graph computes in {dtypes}, which {targets} has no arithmetic for",
        "FP8 needs sm89, sm120 or sm121, BF16 sm80 or later; leave the others out of --target, or choose another "
        "--precision for them",
    ),
    Explanation(
        r"Attention operation was not supported by a dedicated kernel",
        "artifact",
        "no fused kernel takes this `Attention`: float32 is refused at every head size, float16 and bfloat16 where the "
        "head is no multiple of 8 from 16 to 256 channels wide",
        "export attention in float16 or bfloat16, or a float32 graph at opset 20, where attention is written out",
    ),
    Explanation(
        r"Cannot compile operation '(?P<operation>[^']*)' for (?P<gpu>.{1,40}): (?P<product>\S{1,20} GEMM) is not",
        "usage",
        "{gpu} has no {product}, a matrix product, which `{operation}` needs",
        "use --precision fp16; or leave this target out, and run the ONNX graphs there with --backend onnx-cuda",
    ),
    Explanation(
        r"[Cc]ould not find any implementation for node (?P<node>\S+)",
        "unsupported",
        "no kernel runs {node} for every shape of the profile within the memory that it may take",
        "lower the profile's max sizes or its range, give the head a smaller budget so that its stripes are shorter, "
        "or raise the workspace",
    ),
    Explanation(
        r"no tactics to implement the operation within workspace limit",
        "unsupported",
        "no kernel runs an operation within the memory that it may take",
        "raise the workspace, or leave it to the library; lower the profile's max sizes",
    ),
    Explanation(
        r"HostBuffer::allocate.{0,80}OutOfMemory \(Requested size was (?P<size>\d+) bytes",
        "host",
        "out of memory: this machine did not give {size} bytes more",
        "free some memory, or build where there is more; `l2p-export plan` forecasts what a build takes",
    ),
    Explanation(
        r"Requested size was (?P<size>\d+) bytes",
        "host",
        "one operation needs {size} bytes of device memory, more than the workspace or the GPU has",
        "raise the workspace, lower the profile's max sizes, or give the head a smaller budget",
    ),
    Explanation(
        r"std::bad_alloc|MEM_ALLOC_FAILED|[Cc]annot allocate memory|[Oo]ut of (?:host )?memory|MemoryError|OutOfMemory"
        r"|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY|myelin_tensor\.h:\d+: CHECK\(p\) failed",
        "host",
        "out of memory",
        "free some memory, or build where there is more; `l2p-export plan` forecasts what a build takes",
    ),
    Explanation(
        r"optimization profiles satisfy MIN<=OPT<=MAX|profile->isValid\(\)",
        "usage",
        "in a profile min is above opt or opt above max",
        "write every range with min <= opt <= max",
    ),
    Explanation(
        # Of the next kind too, and says more.
        r"[Tt]ensor volume exceeds|volume.{0,40}(?:2147483647|2\^31|INT32_MAX)",
        "unsupported",
        "a tensor holds more values than the library counts",
        "lower the profile's max sizes, or give the head a smaller budget so that its stripes are shorter",
    ),
    Explanation(
        r"k(?P<at>MIN|OPT|MAX) values (?:for profile \d+ violate shape constraints|are not self-consistent)",
        "usage",
        "the graph cannot take the {at} shapes of a profile: sizes of its inputs contradict one another or do not "
        "divide by the patch",
        "derive all shapes from one height, width and caption that the model takes",
    ),
    Explanation(
        r"is missing dimensions in profile|Dimension mismatch for tensor|dimensions but profile \d+ has",
        "artifact",
        "the graph's inputs are not those that the profiles are for",
        "build the bundle again, so that graphs and profiles come from one model",
    ),
    Explanation(
        r"zeroIsPlaceHolder|[Rr]eshape.{0,80}(?:placeholder|wildcard|infinite|volume)|(?:wildcard|-1).{0,60}reshape",
        "artifact",
        "a `Reshape` of the graph takes a size from a placeholder, 0 or -1, that these shapes leave open",
        "export the graph with this version of l2p-export, which writes every size but one as a number or a symbol",
    ),
    Explanation(
        r"Failed to import initializer: (?P<name>[\w.]+)\s*$|Failed to open file: (?P<file>.+)",
        "artifact",
        "the graph's weights are not where it says",
        "keep the .onnx and its .safetensors in one folder, or build the bundle again",
    ),
    Explanation(
        r"Failed to import initializer",
        "artifact",
        "the graph's weights are not where it says",
        "keep the .onnx and its .safetensors in one folder, or build the bundle again",
    ),
    Explanation(
        r"No importer registered for op: (?P<op>\w+)",
        "artifact",
        "the graph holds an operator {op} that the library does not know",
        "export the graph with this version of l2p-export",
    ),
    Explanation(
        r"Plugin not found, are the plugin name, version, and namespace correct",
        "artifact",
        "the graph holds an operator that the library does not know",
        "export the graph with this version of l2p-export",
    ),
    Explanation(
        r"must (?:all )?(?:have|be of)(?: the)? (?:same|matching)(?: input)? types?"
        r"|types? (?:must|do not|should) match",
        "artifact",
        "the graph mixes dtypes in one operation, which a strongly typed network may not",
        "export the graph with this version of l2p-export, which writes every cast",
    ),
    Explanation(
        r"must have at least one output|[Ff]ailed to parse.{0,40}(?:ONNX|model)"
        r"|[Cc]ould not (?:parse|open) .{0,20}model|Input file cannot be found|Failed to load model",
        "artifact",
        "the file is no ONNX graph, or an empty one",
        "build the bundle again",
    ),
    Explanation(
        r"Unable to load library: (?P<library>libnvinfer_lean\S*?):",
        "host",
        "an engine that runs on other versions needs {library}, which is not installed",
        "leave version_compatible out, or install the lean runtime",
    ),
    Explanation(
        r"does not support this compute capability|[Uu]nsupported (?:SM|compute capability)",
        "unsupported",
        "the library does not build for this GPU",
        "TensorRT for RTX builds for sm75, 80, 86, 89, 120 and 121; for another use ONNX Runtime or TensorRT",
    ),
    Explanation(
        r"graph_jit\.cpp:\d+.{0,20}CHECK\(status == CUDA_SUCCESS\)|CHECK\(sm_vers_\.size\(\) == 1\)",
        "host",
        "what was asked for is compiled on a GPU, as engines are whose weights can be replaced",
        "build it on a machine with a GPU and only for that GPU, or leave it out",
    ),
    Explanation(
        r"CUDA initialization failure|cudaError(?:_t)? ?(?:35|100)\b|driver version is insufficient|no CUDA-capable",
        "host",
        "the library asks for a GPU, and this machine has no NVIDIA driver or too old a one",
        "install a driver for CUDA 13, or build for a named target, as in --target rtx-sm89",
    ),
)
"""In the order in which they are tried: consequences stand after their causes."""

# On a machine without a driver, the library adds this to every error, even of builds that need no driver.
_ECHO = re.compile(r"Error Code 1: Cuda Runtime \(In catchCudaError .*cudaError 35")


def explain(messages: Sequence[str]) -> tuple[Explanation, str, str] | None:
    """The explanation of a library's messages, with its cause and cure filled in; None when the table has none.

    Args:
        messages: errors and warnings, oldest first.
    """
    told = without_echoes(messages)
    for explanation in EXPLANATIONS:
        for message in told:
            match = re.search(explanation.pattern, message)
            if match is not None:
                groups = {name: (text or "").strip() for name, text in match.groupdict().items()}
                return explanation, explanation.cause.format(**groups), explanation.cure.format(**groups)
    return None


def build_error(what: str, messages: Sequence[str], happened: str = "") -> L2PError:
    """The error for a build that failed.

    Args:
        what: the engine that was built, and the library.
        messages: the library's last messages, oldest first.
        happened: which call failed and how, for messages that are not in the table.
    """
    said = quote(messages) or ", and the library said nothing"
    found = explain(messages)
    if found is None:
        return HostError(
            f"cannot build {what}: {happened or 'the library gave no engine'}{said}",
            hint="this failure is not in the table of known ones; report it with these lines",
        )
    explanation, cause, cure = found
    return _ERRORS[explanation.fault](f"cannot build {what}: {cause}{said}", hint=cure)


def quote(messages: Sequence[str]) -> str:
    """The last messages of a library, as the end of an error's text; empty when there are none."""
    lines = "".join(f"\n  {clean_line(line)}" for line in without_echoes(messages)[-LINES_SHOWN:])
    return f"; the library said:{lines}" if lines else ""


def clean_line(text: str) -> str:
    """The beginning of a message as one line that a terminal can show."""
    line = " ".join(text.split())[:LINE_CHARACTERS]
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)


def without_echoes(messages: Sequence[str]) -> list[str]:
    """Messages without those that only repeat, each once; all of them when nothing else is there."""
    once = list(dict.fromkeys(messages))
    return [message for message in once if not _ECHO.search(message)] or once
