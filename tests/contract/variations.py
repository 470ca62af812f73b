"""Variations of a written model, with what a server makes of each.

The verdicts are those of Triton Inference Server 2.51.0 (release 24.10), as `nvidia-pytriton` 0.7.0 carries it, with
its Python backend on CPUs; `test_triton_lint.py` asks a server again.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TypeAlias

Change: TypeAlias = Callable[[Path], object]
"""Changes a model folder."""


class Verdict(Enum):
    """What a server does with a model."""

    SERVES = "loads it, and it answers as it states"
    WRONG = "loads it, and requests fail or get something else than stated"
    REFUSES = "says why it does not load it"
    UNASKED = "lint alone looks at it; no test asks a server"
    MACHINE = "refuses it for what this machine lacks, so lint cannot tell"


SERVES, WRONG, REFUSES, UNASKED, MACHINE = Verdict


@dataclass(frozen=True, slots=True)
class Variation:
    """A change of a model, the server's verdict and a part of the place and text that lint finds."""

    change: Change
    verdict: Verdict
    needle: str = ""
    model: str = "l2p"


def _text(change: Callable[[str], str]) -> Change:
    def changed(folder: Path) -> None:
        path = folder / "config.pbtxt"
        text = path.read_text()
        assert change(text) != text
        path.write_text(change(text))

    return changed


def add(line: str) -> Change:
    return _text(lambda text: f"{text}{line}\n")


def sub(pattern: str, new: str, count: int = 1) -> Change:
    return _text(lambda text: re.sub(pattern, lambda _: new, text, count=count, flags=re.DOTALL))


def tensor(name: str, new: str) -> Change:
    """Describe an input or output otherwise; empty for leaving it out."""
    if new:
        return sub(rf'(?<=put \{{\n)  name: "{name}"\n.*?\n\}}', f'  name: "{name}" {new}\n}}')
    return sub(rf'(in|out)put \{{\n  name: "{name}"\n.*?\n\}}\n', "")


def parameter(name: str, value: str) -> Change:
    return sub(rf'(?<=key: "{name}"\n  value \{{\n).*?(?=  \}})', f'    string_value: "{value}"\n')


def all_of(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def file(path: str, content: str | bytes) -> Change:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / path).write_bytes(data)


def front(path: str, data: bytes) -> Change:
    return lambda folder: (folder / path).write_bytes(data + (folder / path).read_bytes())


def move(old: str, new: str) -> Change:
    return lambda folder: (folder / old).rename(folder / new)


def drop(path: str) -> Change:
    return lambda folder: (folder / path).unlink()


def make(name: str) -> Change:
    return lambda folder: (folder / name).mkdir()


def link(path: str) -> Change:
    """Keep a file or folder outside the repository, and a link to it inside."""

    def changed(folder: Path) -> None:
        outside = folder.parents[1] / "outside"
        shutil.rmtree(outside, ignore_errors=True)
        outside.mkdir()
        shutil.move(folder / path, outside / "kept")
        (folder / path).symlink_to(outside / "kept")

    return changed


def of_other(other: str) -> Change:
    """Put the code of another model there."""
    return lambda folder: shutil.copy(folder.parents[1] / "written" / other / "1" / "model.py", folder / "1")


NO_WARM_UP = sub(r"model_warmup \{.*?\n\}\n", "")
NO_BATCHING = sub(r"dynamic_batching \{.*?\n\}\n", "")
POLICY = r"version_policy \{.*?\n\}\n"
ENSEMBLE = 'ensemble_scheduling { step { model_name: "x" model_version: -1 } }'
BODY = "class TritonPythonModel:\n    def execute(self, requests):\n        return []\n"
INSTANCE = "KIND_CPU"
BATCHING = r"dynamic_batching \{"
STREAM, EMBEDS = "l2p_stream", "l2p_embeddings"

NAMES_AND_BACKENDS: dict[str, Variation] = {
    "as written": Variation(make("nothing"), SERVES),
    "stream as written": Variation(make("nothing"), SERVES, model=STREAM),
    "embeddings as written": Variation(make("nothing"), SERVES, model=EMBEDS),
    "no name": Variation(sub(r'^name: "l2p"\n', ""), SERVES),
    "another name": Variation(sub('name: "l2p"', 'name: "l2q"'), REFUSES, "name: is `l2q`"),
    "another case": Variation(sub('name: "l2p"', 'name: "L2P"'), REFUSES, "name: is `L2P`"),
    "no backend": Variation(sub('backend: "python"\n', ""), SERVES),
    "no backend, other file": Variation(
        all_of(
            sub('backend: "python"\n', ""), add('default_model_filename: "other.py"'), move("1/model.py", "1/other.py")
        ),
        REFUSES,
        "backend: is missing",
    ),
    "backend in capitals": Variation(sub('backend: "python"', 'backend: "Python"'), REFUSES, "is `Python`"),
    "unknown backend": Variation(sub('backend: "python"', 'backend: "nosuch"'), REFUSES, "is `nosuch`"),
    "another backend": Variation(sub('backend: "python"', 'backend: "pytorch"'), REFUSES, "expected `python`"),
    "platform python": Variation(sub("backend:", "platform:"), REFUSES, "platform: is `python`"),
    "platform beside backend": Variation(add('platform: "tensorrt_plan"'), SERVES),
    "platform ensemble": Variation(sub('backend: "python"', 'platform: "ensemble"'), REFUSES, "ensemble"),
    "runtime": Variation(add('runtime: "libtriton_python.so"'), SERVES),
    "unknown runtime": Variation(add('runtime: "model.py"'), REFUSES, "runtime: is `model.py`"),
    "compute capabilities": Variation(add('cc_model_filenames { key: "9.0" value: "x.py" }'), SERVES),
    "hidden files": Variation(all_of(file("._config.pbtxt", b"\0"), file(".DS_Store", b"\0"), make(".git")), SERVES),
    "not text": Variation(file("config.pbtxt", 'name: "l2p'), REFUSES, "config.pbtxt: line 1"),
    "empty": Variation(file("config.pbtxt", ""), REFUSES, "does not say bundle"),
    "unknown field": Variation(add("instance_grp { }"), REFUSES, "instance_grp"),
    "field twice": Variation(add('name: "l2p"'), REFUSES, "multiple"),
    "byte order mark": Variation(front("config.pbtxt", b"\xef\xbb\xbf"), REFUSES, "line 1:1"),
    "comment in Latin-1": Variation(front("config.pbtxt", b"# \xe4\n"), SERVES),
    "Windows lines": Variation(sub("\n", "\r\n", 0), SERVES),
    "no config": Variation(drop("config.pbtxt"), REFUSES, "config.pbtxt: is missing"),
    "config in capitals": Variation(move("config.pbtxt", "Config.pbtxt"), REFUSES, "config.pbtxt: is missing"),
    "config elsewhere": Variation(link("config.pbtxt"), SERVES),
}

CODE: dict[str, Variation] = {
    "empty model.py": Variation(file("1/model.py", ""), REFUSES, "defines no class"),
    "broken model.py": Variation(file("1/model.py", "def x(:\n"), REFUSES, "1/model.py: is not Python: line 1"),
    "zeros in model.py": Variation(file("1/model.py", b"\0\0"), REFUSES, "is not Python"),
    "return in model.py": Variation(file("1/model.py", f"{BODY}return\n"), REFUSES, "line 4"),
    "another class": Variation(file("1/model.py", BODY.replace("Triton", "")), REFUSES, "defines no class"),
    "no execute": Variation(file("1/model.py", "class TritonPythonModel:\n    pass\n"), UNASKED, "no method `execute`"),
    "class of another module": Variation(
        all_of(move("1/model.py", "1/own.py"), file("1/model.py", "from own import TritonPythonModel\n")), SERVES
    ),
    "class by *": Variation(all_of(move("1/model.py", "1/own.py"), file("1/model.py", "from own import *\n")), SERVES),
    "encoded model.py": Variation(front("1/model.py", b"# coding: latin-1\n# \xe4\n"), SERVES),
    "model.py elsewhere": Variation(link("1/model.py"), SERVES),
    "model.py above": Variation(move("1/model.py", "model.py"), UNASKED, "1/model.py: is missing"),
    "model.py in capitals": Variation(move("1/model.py", "1/Model.py"), UNASKED, "1/model.py: is missing"),
    "code of the stream": Variation(of_other(STREAM), UNASKED, "is that of `l2p_stream`"),
    "code without a stream": Variation(of_other("l2p"), UNASKED, "is that of `l2p`", STREAM),
    "no glue.py": Variation(drop("1/glue.py"), REFUSES, "1/glue.py: is missing"),
    "empty glue.py": Variation(file("1/glue.py", ""), REFUSES, "1/glue.py: does not define `Host`"),
    "broken glue.py": Variation(file("1/glue.py", "def x(:\n"), REFUSES, "1/glue.py: is not Python"),
    "glue.py above": Variation(move("1/glue.py", "glue.py"), SERVES),
    "no such package": Variation(file("1/model.py", f"import nosuch\n{BODY}"), MACHINE),
    "file name": Variation(all_of(add('default_model_filename: "other.py"'), move("1/model.py", "1/other.py")), SERVES),
    "absent file name": Variation(add('default_model_filename: "other.py"'), UNASKED, "1/other.py: is missing"),
    "file name above": Variation(
        all_of(add('default_model_filename: "../other.py"'), move("1/model.py", "other.py")), REFUSES, "no name of"
    ),
    "file name with a hyphen": Variation(
        all_of(add('default_model_filename: "my-model.py"'), move("1/model.py", "1/my-model.py")), SERVES
    ),
    "file name of no module": Variation(
        all_of(add('default_model_filename: "my.model.py"'), move("1/model.py", "1/my.model.py")), REFUSES, "no name of"
    ),
    "file name without .py": Variation(
        all_of(add('default_model_filename: "other"'), move("1/model.py", "1/other")), REFUSES, "no name of"
    ),
}

VERSIONS: dict[str, Variation] = {
    "version 01": Variation(move("1", "01"), REFUSES, "ignores `01`"),
    "version latest": Variation(move("1", "latest"), REFUSES, "versions: there is none"),
    "version 0": Variation(move("1", "0"), SERVES),
    "version 1.0": Variation(move("1", "1.0"), UNASKED, "`1.0` is version 1 to the server"),
    "version -1": Variation(move("1", "-1"), UNASKED, "`-1` is version -1"),
    "empty version": Variation(all_of(make("2"), NO_WARM_UP), UNASKED, "2/model.py: is missing"),
    "copy of a version": Variation(make("2.bak"), UNASKED, "`2.bak` is version 2 to the server"),
    "copy of the version": Variation(make("1 (copy)"), SERVES),
    "other folders": Variation(all_of(make("01"), make("latest"), make("configs")), SERVES),
    "version elsewhere": Variation(link("1"), SERVES),
    "no policy": Variation(sub(POLICY, ""), SERVES),
    "no version by the policy": Variation(
        sub(POLICY, "version_policy { specific { versions: 7 } }"), REFUSES, "version_policy: serves none"
    ),
    "specific without versions": Variation(
        sub(POLICY, "version_policy { specific { } }"), REFUSES, "version_policy: serves none"
    ),
    "one version by the policy": Variation(
        sub(POLICY, "version_policy { specific { versions: 1 versions: 7 } }"), SERVES
    ),
    "latest of none": Variation(
        sub(POLICY, "version_policy { latest { num_versions: 0 } }"), REFUSES, "version_policy: serves none"
    ),
    "broken older version": Variation(
        all_of(sub(POLICY, "version_policy { all { } }"), make("0"), file("0/model.py", "")), REFUSES, "0/model.py"
    ),
}

SCHEDULING: dict[str, Variation] = {
    "no count": Variation(sub("count: 1\n", ""), SERVES),
    "count 0": Variation(sub("count: 1", "count: 0"), SERVES),
    "count -1": Variation(sub("count: 1", "count: -1"), SERVES),
    "no instance group": Variation(sub(r"instance_group \{.*?\n\}\n", ""), SERVES),
    "two instance groups": Variation(add("instance_group { kind: KIND_CPU }"), SERVES),
    "KIND_GPU": Variation(sub(INSTANCE, "KIND_GPU"), MACHINE),
    "a GPU": Variation(sub(INSTANCE, "KIND_GPU gpus: 7"), MACHINE),
    "no GPU": Variation(sub(INSTANCE, "KIND_GPU gpus: -1"), REFUSES, "has gpus [-1]"),
    "KIND_CPU on a GPU": Variation(sub(INSTANCE, "KIND_CPU gpus: 0"), REFUSES, "has gpus [0]"),
    "KIND_MODEL": Variation(sub(INSTANCE, "KIND_MODEL"), SERVES),
    "KIND_MODEL on a GPU": Variation(sub(INSTANCE, "KIND_MODEL gpus: 0"), REFUSES, "has gpus [0]"),
    "profile": Variation(sub(INSTANCE, 'KIND_CPU profile: "0"'), REFUSES, "only TensorRT"),
    "passive": Variation(sub(INSTANCE, "KIND_CPU passive: true"), WRONG, "is passive"),
    "host policy": Variation(sub(INSTANCE, 'KIND_CPU host_policy: "x"'), SERVES),
    "batches": Variation(add("max_batch_size: 4"), WRONG, "max_batch_size: is 4"),
    "batches of 1": Variation(add("max_batch_size: 1"), WRONG, "max_batch_size: is 1", STREAM),
    "negative batches": Variation(add("max_batch_size: -1"), REFUSES, "max_batch_size: is -1"),
    "cache": Variation(add("response_cache { enable: true }"), WRONG, "response_cache: is enabled"),
    "cache of a stream": Variation(add("response_cache { enable: true }"), REFUSES, "response_cache", STREAM),
    "no cache": Variation(add("response_cache { enable: false }"), SERVES, model=STREAM),
    "no dynamic batching": Variation(NO_BATCHING, SERVES),
    "preferred size": Variation(sub(BATCHING, "dynamic_batching { preferred_batch_size: 4"), REFUSES, "preferred"),
    "ordering": Variation(sub(BATCHING, "dynamic_batching { preserve_ordering: true"), REFUSES, "preserve_ordering"),
    "queue delay": Variation(sub(BATCHING, "dynamic_batching { max_queue_delay_microseconds: 100"), SERVES),
    "no default priority": Variation(sub(r"  default_priority_level: 2\n", ""), REFUSES, "default_priority_level 0"),
    "default priority": Variation(sub(r"_level: 2", "_level: 3"), REFUSES, "default_priority_level 3"),
    "queue of a priority": Variation(
        sub(BATCHING, "dynamic_batching { priority_queue_policy { key: 5 value { } }"), REFUSES, "for level 5"
    ),
    "two schedulers": Variation(add("sequence_batching { }"), REFUSES, "sequence_batching"),
    "sequences": Variation(all_of(NO_BATCHING, add("sequence_batching { }")), WRONG, "sequence_batching: is set"),
    "ensemble": Variation(all_of(NO_BATCHING, add(ENSEMBLE)), REFUSES, "ensemble_scheduling", STREAM),
    "one answer of a stream": Variation(sub("decoupled: true", "decoupled: false"), UNASKED, "decoupled", STREAM),
    "answers of no stream": Variation(
        add("model_transaction_policy { decoupled: true }"), UNASKED, "model_transaction_policy"
    ),
}

TENSORS: dict[str, Variation] = {
    "input dtype": Variation(tensor("height", "data_type: TYPE_INT64 dims: 1 optional: true"), UNASKED, "TYPE_INT64"),
    "unknown dtype": Variation(tensor("height", "data_type: TYPE_INT dims: 1 optional: true"), REFUSES, "TYPE_INT."),
    "no dtype": Variation(add('input { name: "x" dims: 1 optional: true }'), REFUSES, "has no data_type"),
    "no name of an input": Variation(add("input { data_type: TYPE_INT32 dims: 1 }"), REFUSES, "has no name"),
    "no dims": Variation(tensor("height", "data_type: TYPE_INT32 optional: true"), REFUSES, "has no dims"),
    "dims 0": Variation(tensor("height", "data_type: TYPE_INT32 dims: 0 optional: true"), REFUSES, "has dims [0]"),
    "rank": Variation(tensor("height", "data_type: TYPE_INT32 dims: [1, 1] optional: true"), UNASKED, "[1, 1]"),
    "looser dims": Variation(tensor("height", "data_type: TYPE_INT32 dims: -1 optional: true"), SERVES),
    "reshape": Variation(
        tensor("height", "data_type: TYPE_INT32 dims: 1 reshape { shape: [1, 1] } optional: true"), SERVES
    ),
    "reshape to more": Variation(
        tensor("height", "data_type: TYPE_INT32 dims: 1 reshape { shape: 2 } optional: true"), REFUSES, "reshape [2]"
    ),
    "shape tensor": Variation(
        tensor("height", "data_type: TYPE_INT32 dims: 1 is_shape_tensor: true optional: true"), REFUSES, "is_shape"
    ),
    "format": Variation(
        tensor("height", "data_type: TYPE_INT32 dims: 1 format: FORMAT_NHWC optional: true"), REFUSES, "has format"
    ),
    "no prompt": Variation(all_of(NO_WARM_UP, tensor("prompt", "")), WRONG, "input prompt: is missing"),
    "no seed": Variation(tensor("seed", ""), WRONG, "input seed: is missing"),
    "no coarse height": Variation(tensor("coarse_height", ""), WRONG, "input coarse_height: is missing"),
    "no positions": Variation(tensor("positions", ""), WRONG, "input positions: is missing", EMBEDS),
    "renoise in single precision": Variation(
        tensor("renoise", "data_type: TYPE_FP32 dims: 1 optional: true"), WRONG, "the bundle's is TYPE_FP64 [1]"
    ),
    "one side of the grid": Variation(
        tensor("base_grid", "data_type: TYPE_INT32 dims: 1 optional: true"), WRONG, "the bundle's is TYPE_INT32 [2]"
    ),
    "no negative prompt": Variation(tensor("negative_prompt", ""), WRONG, "input negative_prompt: is missing"),
    "required seed": Variation(tensor("seed", "data_type: TYPE_UINT64 dims: 1"), WRONG, "is not optional"),
    "optional prompt": Variation(tensor("prompt", "data_type: TYPE_STRING dims: 1 optional: true"), SERVES),
    "another input": Variation(add('input { name: "x" data_type: TYPE_FP32 dims: 1 optional: true }'), SERVES),
    "another required input": Variation(add('input { name: "x" data_type: TYPE_FP32 dims: 1 }'), WRONG, "input x: is"),
    "input twice": Variation(add('input { name: "seed" data_type: TYPE_UINT64 dims: 1 optional: true }'), SERVES),
    "no image": Variation(tensor("image", ""), WRONG, "output image: is missing"),
    "no report": Variation(tensor("report", ""), WRONG, "output report: is missing"),
    "no PNG": Variation(tensor("image_png", ""), WRONG, "output image_png: is missing"),
    "no preview": Variation(tensor("preview", ""), WRONG, "output preview: is missing", STREAM),
    "another output": Variation(add('output { name: "x" data_type: TYPE_FP32 dims: 1 }'), WRONG, "output x: is"),
    "output dtype": Variation(tensor("image", "data_type: TYPE_FP32 dims: [-1, -1, 3]"), WRONG, "TYPE_FP32"),
    "output rank": Variation(tensor("image", "data_type: TYPE_UINT8 dims: [-1, 3]"), WRONG, "[-1, 3]"),
    "looser output": Variation(tensor("image", "data_type: TYPE_UINT8 dims: [-1, -1, -1]"), SERVES),
    "label file": Variation(
        tensor("report", 'data_type: TYPE_UINT8 dims: -1 label_filename: "labels.txt"'), REFUSES, "labels.txt"
    ),
    "looser embeddings": Variation(
        tensor("negative_embeds", "data_type: TYPE_FP32 dims: [-1, -1] optional: true"), SERVES, model=EMBEDS
    ),
}

PARAMETERS: dict[str, Variation] = {
    "own parameter": Variation(add('parameters { key: "mine" value { string_value: "x" } }'), SERVES),
    "environment": Variation(
        add('parameters { key: "EXECUTION_ENV_PATH" value { string_value: "$$TRITON_MODEL_DIRECTORY/env" } }'),
        REFUSES,
        "EXECUTION_ENV_PATH",
    ),
    "environment of the server": Variation(
        add('parameters { key: "EXECUTION_ENV_PATH" value { string_value: "/nowhere" } }'), MACHINE
    ),
    "inputs on the CPU": Variation(
        add('parameters { key: "FORCE_CPU_ONLY_INPUT_TENSORS" value { string_value: "Yes" } }'), REFUSES, "'Yes'"
    ),
    "bundle of the server": Variation(parameter("bundle", "/nowhere/bundle"), MACHINE),
    "relative bundle": Variation(parameter("bundle", "other"), REFUSES, "`1/other` does not exist"),
    "no bundle there": Variation(parameter("bundle", "/"), REFUSES, "has no bundle.json"),
    "bundle above": Variation(all_of(parameter("bundle", "../kept"), move("1/bundle", "kept")), SERVES),
    "digest": Variation(parameter("bundle_digest", "0" * 64), REFUSES, "bundle_digest: is 000000000000"),
    "no digest": Variation(sub('"bundle_digest"', '"bundle_digets"'), REFUSES, "does not say bundle_digest"),
    "plan": Variation(parameter("plan", "fp32"), SERVES),
    "unknown plan": Variation(parameter("plan", "int4"), REFUSES, "plan is `int4`, the bundle has fp32"),
    "runtime backend": Variation(parameter("backend", "onnx"), SERVES),
    "unknown runtime backend": Variation(parameter("backend", "abacus"), REFUSES, "backend is `abacus`"),
    "no engines": Variation(parameter("backend", "tensorrt"), REFUSES, "no files"),
    "no CUDA": Variation(parameter("backend", "onnx-cuda"), MACHINE),
    "budget": Variation(parameter("memory_budget", "junk"), REFUSES, "'junk' is no size"),
    "dtype": Variation(parameter("dtype", "float32"), REFUSES, "dtype is 'float32'"),
    "dtype of the image": Variation(parameter("dtype", "float16"), WRONG, "the bundle's is TYPE_FP16"),
    "limit": Variation(parameter("max_steps", "0"), REFUSES, "max_steps is '0'"),
    "limit below the warm-up": Variation(parameter("max_pixels", "16"), UNASKED, "the limit is 16 pixels"),
    "stated default": Variation(parameter("default_height", "999"), WRONG, "default_height is 999"),
    "default not stated": Variation(sub('"default_height"', '"default_heigth"'), WRONG, "default_height is missing"),
    "no warm-up": Variation(NO_WARM_UP, SERVES),
    "warm-up skipped": Variation(sub("batch_size: 1", "batch_size: 0"), WRONG, "skips it"),
    "warm-up in batches": Variation(sub("batch_size: 1", "batch_size: 2"), UNASKED, "has batch_size 2"),
    "warm-up twice": Variation(sub("batch_size: 1", "batch_size: 1 count: 2"), SERVES),
    "no file of the warm-up": Variation(drop("warmup/height"), UNASKED, "warmup/height, which is missing"),
    "file of the warm-up": Variation(file("warmup/height", b"1"), UNASKED, "of 1 byte, `height` takes 4"),
    "longer file of the warm-up": Variation(file("warmup/height", b"\x10\0\0\0more"), SERVES),
    "size of the warm-up": Variation(file("warmup/height", b"\x18\0\0\0"), UNASKED, "does not divide"),
    "large warm-up": Variation(file("warmup/height", b"\0\x10\0\0"), UNASKED, "the limit is 4,096 pixels"),
    "no data of the warm-up": Variation(sub("zero_data: true", ""), UNASKED, "without data"),
    "bundle elsewhere": Variation(link("1/bundle"), SERVES),
}

VARIATIONS = NAMES_AND_BACKENDS | CODE | VERSIONS | SCHEDULING | TENSORS | PARAMETERS
