from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2p_engines.builders.explanations import (
    EXPLANATIONS,
    LINES_SHOWN,
    Explanation,
    build_error,
    clean_line,
    explain,
    without_echoes,
)
from l2p_engines.builders.listeners import ERRORS_KEPT, WARNINGS_KEPT, Journal
from l2p_runtime.errors import ArtifactError, HostError, L2PError, UnsupportedError, UsageError

MYELIN = "Error Code 1: Myelin ("
ECHO = "Error Code 1: Cuda Runtime (In catchCudaError at /_src/common/cudaCheck.cpp:18: cudaError 35)"
IMPORT = "In node -1 with name: and operator: (importInitializers): UNSUPPORTED_NODE: Failed to import initializer: "

# Messages of TensorRT for RTX 1.7.1 to builds that were made to fail, and of TensorRT to people who reported them.
TOLD: tuple[tuple[str, type[L2PError], str, str], ...] = (
    (
        f"{MYELIN}Cannot compile for target(s) sm86, because the model contains HW-specific datatypes: fp8_e4m3. In x",
        UsageError,
        "computes in fp8_e4m3, which sm86 has no",
        "FP8 needs sm89",
    ),
    (
        "Cannot compile for target(s) sm75, sm80, because the model contains HW-specific datatypes: b16, fp8_e4m3",
        UsageError,
        "computes in b16, fp8_e4m3, which sm75, sm80 has",
        "BF16 sm80 or later",
    ),
    (
        f"{MYELIN}Cannot compile operation 'layers.4/node_linear' for Turing (SM75): FP32 GEMM is not supported. In x",
        UsageError,
        "Turing (SM75) has no FP32 GEMM, a matrix product, which `layers.4/node_linear` needs",
        "--precision fp16",
    ),
    (
        f"{MYELIN}CHECK(x->is_decomposable()) failed. Attention operation was not supported by a dedicated kernel.",
        ArtifactError,
        "no fused kernel takes this `Attention`",
        "opset 20",
    ),
    (
        "Error Code 10: Internal Error (Could not find any implementation for node {ForeignNode[/up/conv.../out]}.)",
        UnsupportedError,
        "no kernel runs {ForeignNode[/up/conv.../out]}",
        "smaller budget",
    ),
    (
        f"{MYELIN}Tactic Selection: no tactics to implement the operation within workspace limit. Consider",
        UnsupportedError,
        "within the memory that it may take",
        "raise the workspace",
    ),
    (
        "rt::MyelinHostBuffer::allocate(cudaStream_t)::206] Error Code 2: OutOfMemory (Requested size was 16 bytes.)",
        HostError,
        "this machine did not give 16 bytes",
        "free some memory",
    ),
    (
        "[virtualMemoryBuffer.cpp::resizePhysical] Error Code 2: OutOfMemory (Requested size was 8589934592 bytes.)",
        HostError,
        "8589934592 bytes of device memory",
        "raise the workspace",
    ),
    ("Unexpected exception std::bad_alloc", HostError, "out of memory", "free some memory"),
    ("Error Code 1: Cuda Runtime (out of memory)", HostError, "out of memory", "forecasts"),
    (
        f"{MYELIN}MyelinCheckException: myelin_tensor.h:47: CHECK(p) failed. In compileGraph at",
        HostError,
        "out of memory",
        "free some memory",
    ),
    (
        "addOptimizationProfile: Error Code 3: API Usage Error (Parameter check failed, condition: profile->isValid())",
        UsageError,
        "min is above opt",
        "min <= opt <= max",
    ),
    (
        "Profile kMAX values are not self-consistent. y: tensor volume exceeds 1099511627776, dimensions are [S,S]",
        UnsupportedError,
        "more values than the library counts",
        "lower the profile's max sizes",
    ),
    (
        "kOPT values for profile 0 violate shape constraints: a Reshape dimension of -1 has no solution.",
        UsageError,
        "cannot take the OPT shapes",
        "one height, width and caption",
    ),
    (
        "Profile kMIN values are not self-consistent. IElementWiseLayer: broadcast dimensions must be conformable",
        UsageError,
        "cannot take the MIN shapes",
        "one height, width and caption",
    ),
    (
        "Error Code 4: Internal Error (Network input `image` is missing dimensions in profile 0)",
        ArtifactError,
        "not those that the profiles are for",
        "one model",
    ),
    (
        "Error Code 4: Shape Error (reshape dimension with more than one -1 wildcard. Reshaping [S,4] to [-1,-1].",
        ArtifactError,
        "takes a size from a placeholder",
        "export the graph",
    ),
    (
        f"{IMPORT}layers.5.attention.norm_q.weight",
        ArtifactError,
        "weights are not where it says",
        "in one folder",
    ),
    (
        "WeightsContext.cpp:203: Failed to open file: tail.fp16.5ad672035efd8c67.safetensors",
        ArtifactError,
        "weights are not where it says",
        "in one folder",
    ),
    (
        f"{IMPORT}a name of blanks (UNSUPPORTED)",
        ArtifactError,
        "weights are not where it says",
        "in one folder",
    ),
    (
        "ModelImporter.cpp:951: No importer registered for op: Frobnicate. Attempting to import as plugin.",
        ArtifactError,
        "an operator Frobnicate",
        "export the graph",
    ),
    (
        'creator && "Plugin not found, are the plugin name, version, and namespace correct?"',
        ArtifactError,
        "an operator that the library does not know",
        "export the graph",
    ),
    (
        "ElementWiseOperation SUM must have same input types. But they are of types Float and Half.",
        ArtifactError,
        "mixes dtypes",
        "every cast",
    ),
    (
        "API Usage Error (node_of_y: IConvolutionLayer `input` and `kernel` must be of same type.",
        ArtifactError,
        "mixes dtypes",
        "every cast",
    ),
    (
        "API Usage Error (node_of_y: IConcatenationLayer `inputs` must all be of the same type.",
        ArtifactError,
        "mixes dtypes",
        "every cast",
    ),
    (
        "Assertion failed: model->ParseFromCodedStream(&codedInput): Failed to parse the ONNX model.",
        ArtifactError,
        "no ONNX graph",
        "build the bundle again",
    ),
    ("Network must have at least one output", ArtifactError, "no ONNX graph", "build the bundle again"),
    (
        "Unable to load library: libnvinfer_lean.so.1: cannot open shared object file",
        HostError,
        "needs libnvinfer_lean.so.1",
        "version_compatible",
    ),
    (
        "TensorRT-RTX does not support this compute capability, so the engine cannot be rebuilt for it",
        UnsupportedError,
        "does not build for this GPU",
        "sm75, 80, 86, 89, 120 and 121",
    ),
    (
        f"{MYELIN}graph_jit.cpp:278: CHECK(status == CUDA_SUCCESS) failed",
        HostError,
        "compiled on a GPU",
        "leave it out",
    ),
    (f"{MYELIN}CHECK(sm_vers_.size() == 1) failed", HostError, "compiled on a GPU", "only for that GPU"),
    (
        "createInferRuntime: Error Code 6: API Usage Error (CUDA initialization failure with error: 35.",
        HostError,
        "no NVIDIA driver",
        "--target rtx-sm89",
    ),
)


@pytest.mark.parametrize(("message", "kind", "cause", "cure"), TOLD, ids=[told[0][:60] for told in TOLD])
def test_a_message_is_explained(message: str, kind: type[L2PError], cause: str, cure: str) -> None:
    error = build_error("`head`", [message])
    assert type(error) is kind
    assert cause in str(error)
    assert cure in error.hint
    assert clean_line(message) in str(error)
    assert "{" not in error.hint


def test_every_row_of_the_table_has_a_message_here() -> None:
    found = [explain([message]) for message, *_ in TOLD]
    assert {row for row, _, _ in filter(None, found)} == set(EXPLANATIONS)


@pytest.mark.parametrize("row", EXPLANATIONS, ids=lambda row: row.cause[:40])
def test_rows_name_only_what_they_find(row: Explanation) -> None:
    assert set(re.findall(r"{(\w+)}", row.cause + row.cure)) <= set(re.compile(row.pattern).groupindex)


def test_an_unknown_message_is_told_as_it_is() -> None:
    error = build_error("`head` with a library", ["a", "b  \n c", "a"], "build() returned None")
    assert type(error) is HostError
    assert str(error) == ("cannot build `head` with a library: build() returned None; the library said:\n  a\n  b c")
    assert "not in the table" in error.hint


def test_silence_is_told() -> None:
    assert str(build_error("`head`", [])) == (
        "cannot build `head`: the library gave no engine, and the library said nothing"
    )
    assert explain([]) is None


def test_what_every_build_without_a_driver_says_is_left_out() -> None:
    assert without_echoes([ECHO, "b", ECHO, "a", "b"]) == ["b", "a"]
    error = build_error("`head`", [ECHO, "Unexpected exception std::bad_alloc", ECHO])
    assert "cudaError" not in str(error)
    assert "out of memory" in str(error)
    alone = build_error("`head`", [ECHO, ECHO])
    assert "no NVIDIA driver" in str(alone)
    assert str(alone).count(ECHO[:40]) == 1


def test_what_follows_from_something_else_is_not_the_cause() -> None:
    messages = [message for message, *_ in TOLD]
    fp8 = messages[0]
    for other in messages[2:]:
        for told in ([fp8, other], [other, fp8]):
            assert type(build_error("`head`", told)) is UsageError
            assert "fp8_e4m3" in str(build_error("`head`", told)).partition("; the library said")[0]


def test_the_last_lines_are_shown_and_all_are_explained() -> None:
    lines = ["Unexpected exception std::bad_alloc", *(f"line {number}" for number in range(30))]
    text = str(build_error("`head`", lines))
    assert "out of memory" in text
    assert text.splitlines()[1:] == [f"  line {number}" for number in range(30 - LINES_SHOWN, 30)]


@pytest.mark.parametrize("node", ["{ForeignNode[a", "{}", "{0}", "{node}", "{node.__class__}", "}{", "{op!r:>99999}"])
def test_braces_in_messages_stay(node: str) -> None:
    error = build_error("`{head}`", [f"Could not find any implementation for node {node}"], "{happened}")
    assert f"no kernel runs {node} for every shape" in str(error)
    assert "`{head}`" in str(error)
    assert f"{{happened}}; the library said:\n  {node}" in str(build_error("`head`", [node], "{happened}"))


@pytest.mark.parametrize(
    "filler", ["x", "-1 ", "reshape ", "volume", " sm86,", "Failed to parse ", "\n", "\N{SNOWMAN}"]
)
def test_a_huge_message_is_read_at_once_and_cut(filler: str) -> None:
    huge = filler * (1_000_000 // len(filler))
    started = time.monotonic()
    error = build_error("`head`", [huge, f"{huge} std::bad_alloc", f"Cannot compile for target(s) {huge}"])
    assert time.monotonic() - started < 5
    assert len(str(error)) < 2000


def test_a_line_is_fit_for_a_terminal() -> None:
    assert clean_line("a\r\n\tb\x1b[31m\x00c\x7f \udcff é") == "a b\ufffd[31m\ufffdc\ufffd \ufffd é"


@given(st.lists(st.text(), max_size=5), st.text())
def test_any_log_makes_an_error(messages: list[str], happened: str) -> None:
    error = build_error("`head`", messages, happened)
    assert error.exit_code in {2, 3, 4}
    assert error.hint
    assert str(error).startswith("cannot build `head`: ")


def test_a_log_keeps_its_last_errors_and_each_warning_once() -> None:
    told: list[str] = []
    journal = Journal(lambda severity, text: told.append(severity))
    for number in range(3 * WARNINGS_KEPT):
        journal.log("VERBOSE", "chatter")
        journal.log("ERROR" if number % 2 else "INTERNAL_ERROR", f"error {number}")
        journal.log("WARNING", f"warning {number // 2}")
    assert list(journal.errors) == [f"error {number}" for number in range(600 - ERRORS_KEPT, 600)]
    assert list(journal.warnings) == [f"warning {number}" for number in range(WARNINGS_KEPT)]
    assert len(told) == 2 * 3 * WARNINGS_KEPT
    journal.log("ERROR", "\udcff" * 1_000_000)
    assert len(journal.errors[-1].encode()) == 2000
