"""The job XML of OpenCue: what PyOutline 1.37 wrote for the same layer, and what Cuebot would change."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2p_export.farm import MANAGERS, Argument, CueOptions, Needs
from l2p_export.farm.job import PROMPTS
from l2p_export.farm.opencue import draw_command
from l2p_runtime.errors import UsageError
from l2p_runtime.frames.ranges import parse_frames
from unit.export.farm.jobs import ODD_PROMPT, make_job

FOLDER = Path("/jobs/sh 010")

# `OutlineLauncher.serialize(use_pycuerun=False)` of opencue-pyoutline 1.37.0, for a layer `draw` of the same values
# and the flag `nomail` and the user number 1000. The command stands for the text that `draw_command` returns.
PYOUTLINE = (
    '<?xml version="1.0"?><!DOCTYPE spec PUBLIC "SPI Cue  Specification Language" '
    '"http://localhost:8080/spcue/dtd/cjsl-1.15.dtd"><spec><facility>local</facility><show>show</show><shot>sh010</shot>'
    '<user>artist</user><uid>1000</uid><job name="sh010_draw"><paused>False</paused><priority>1</priority>'
    "<maxretries>2</maxretries><autoeat>False</autoeat><env /><layers>"
    '<layer name="draw" type="Render"><cmd>COMMAND</cmd><range>1-39x2</range><chunk>4</chunk><cores>2.0</cores>'
    "<memory>1024m</memory><gpus>1</gpus><gpu_memory>5120m</gpu_memory><timeout>1440</timeout><tags>gpu | big</tags>"
    '<env><key name="OMP_NUM_THREADS">2</key></env><services><service>l2p</service></services><outputs /></layer>'
    "</layers></job><depends /></spec>"
)


def parsed(job: Any) -> ET.Element:
    return ET.fromstring(MANAGERS["opencue"](job, FOLDER)["job.xml"])  # noqa: S314 - written here


def test_it_is_what_pyoutline_writes() -> None:
    job = make_job(needs=Needs(1 << 30, 5 << 30, 2))
    text = MANAGERS["opencue"](job, FOLDER)["job.xml"]
    layer = ET.fromstring(text).find("job/layers/layer/cmd")  # noqa: S314 - written here
    assert layer is not None
    assert layer.text == draw_command(job)
    assert text.replace(draw_command(job), "COMMAND").replace("\n", "") == PYOUTLINE


@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=200))
def test_the_shell_gets_any_prompt_as_it_is(text: str) -> None:
    try:
        argument = Argument("--prompt", text, "text")
    except UsageError:
        return
    job = make_job(arguments=(argument,))
    files = MANAGERS["opencue"](job, FOLDER)
    if PROMPTS in files:
        return
    (command,) = (element.text for element in parsed(job).iter("cmd"))
    words = shlex.split(str(command))
    assert words[-1] == f"--prompt={text}"
    assert words[:4] == ["l2p-export", "generate", "/shows/a show/demo.bundle", "--frames=#FRAMESPEC#"]


@pytest.mark.parametrize("prompt", [ODD_PROMPT, "x" * 1001, "a #LAYER# b", "a\r\nb"])
def test_what_would_be_changed_on_the_way_goes_into_a_file(prompt: str) -> None:
    files = MANAGERS["opencue"](make_job(prompt), FOLDER)
    assert (PROMPTS in files) == (prompt != ODD_PROMPT)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"name": "a b"}, "--name is 'a b', expected three or more"),
        ({"name": "ab"}, "expected three or more"),
        ({"pattern": "#JOB#.####.exr"}, "placeholders"),
        ({"folder": Path("/jobs/#LAYER#")}, "`#LAYER#` is in the command, and Cuebot would replace it"),
        ({"folder": Path("/" + "x/" * 2000)}, "characters, Cuebot holds 4,000"),
        ({"chunk": 1, "frames_text": "1-100001"}, "100,001 chunks, Cuebot takes 100,000"),
        ({"frames_text": ",".join(str(7 * n * n) for n in range(1, 900))}, "the frame range has"),
    ],
)
def test_what_cuebot_would_refuse_is_refused(changes: dict[str, Any], text: str) -> None:
    frames = changes.pop("frames_text", "1-40x2")
    with pytest.raises(UsageError, match=text):
        MANAGERS["opencue"](make_job(frames=frames, **changes), FOLDER)


@pytest.mark.parametrize(
    ("cue", "text"),
    [
        (CueOptions("show", "sh", "artist", 1), "--shot is 'sh'"),
        (CueOptions("a show", "sh010", "artist", 1), "--show is 'a show'"),
        (CueOptions("show", "sh010", "root", 0), "runs no jobs as root"),
        (CueOptions("show", "sh010", "toor", 0), "runs no jobs as root"),
        (CueOptions("show", "sh010", "artist", 1, "a/b"), "--service is 'a/b'"),
        (CueOptions("show", "sh010", "artist", 1, tags=("a b",)), "--tag is 'a b'"),
    ],
)
def test_names_that_cuebot_refuses_are_refused(cue: CueOptions, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        MANAGERS["opencue"](make_job(cue=cue), FOLDER)


@pytest.mark.parametrize(
    ("frames", "text"), [("10-1x3", "1-10x3"), ("1-5,3-7", "1-7"), ("5,1,3", "1-5x2"), ("1-10:3", "1-10"), ("7", "7")]
)
def test_frames_ascend_and_none_is_drawn_twice(frames: str, text: str) -> None:
    job = replace(make_job(), frames=parse_frames(frames, "fileseq"))
    assert [element.text for element in parsed(job).iter("range")] == [text]


def test_an_unknown_user_has_no_number_and_a_short_timeout_is_a_minute() -> None:
    spec = parsed(make_job(cue=CueOptions("show", "sh010", "artist", None), timeout_seconds=61))
    assert spec.find("uid") is None
    assert [element.text for element in spec.iter("timeout")] == ["2"]
    assert spec.find("job/layers/layer/tags") is None
