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
    from l2p_export.training.corpus.corpus import decode_image
    from l2p_runtime.errors import UsageError

    try:
        data = picture.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read `{picture}`: {error.strerror or error}", hint="give a picture") from error
    return decode_image(data, str(picture), "give a picture that other programs can open")
