"""`l2p-export judge`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from l2p_export.cli.console import example, json_option, print_json
from l2p_export.cli.inputs import InputPath

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@click.command("judge", epilog=example("judge picture.png --prompt 'a red circle'"))
@click.argument("picture", type=InputPath("picture"))
@click.option("--prompt", required=True, help="A caption of the small world, e.g. `a red circle above a blue square`.")
@json_option
def command(picture: Path, prompt: str, *, as_json: bool) -> None:
    """Judge whether PICTURE shows what a caption of the small world says.

    A wrong picture is a result, not an error: the exit code is 0 either way.
    """
    from l2p_export.world.captions import describe
    from l2p_export.world.judge import judge, require_judge

    description = describe(prompt)
    require_judge()
    verdict = judge(_pixels(picture), description)
    if as_json:
        print_json(asdict(verdict))
    else:
        click.echo(verdict.text)


def _pixels(picture: Path) -> NDArray[np.uint8]:
    from l2p_export.training.corpus.pictures import FILE_BYTES_MAX, decode_picture
    from l2p_runtime.errors import UsageError

    try:
        with picture.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise UsageError(f"cannot read `{picture}`: {error.strerror or error}", hint="give a picture") from error
    if len(data) > FILE_BYTES_MAX:
        raise UsageError(f"`{picture}` has more than {FILE_BYTES_MAX:,} bytes", hint="give a picture")
    return decode_picture(data, str(picture), "give a picture that other programs can open").pixels
