"""A picture of the page with a finished drawing, for the documentation.

    python tests/tools/page_screenshot.py BUNDLE [--prompt TEXT] [--size 1024x1024] [--out docs/page.png]

Starts a real server, the page and Chromium, draws, and writes what the window shows, at most 200 KB of it.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from PIL import Image

from l2p_export.cli.console import parse_size
from l2p_export.serving.configs import Placement
from l2p_export.serving.repository import RepositorySpec, write_repository
from l2p_runtime.bundle import open_bundle
from l2p_runtime.client.page import PageSpec, open_page
from l2p_runtime.progress import Silent
from tools.chromium import browse
from tools.triton_server import serve

ROOT = Path(__file__).parents[2]
BYTES_MAX = 200_000
COLOURS = (256, 128, 64, 32, 16)
MODEL = "l2p_stream"


def main() -> int:
    """Draw and write; 3 where the server cannot load the bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="with a text encoder")
    parser.add_argument("--prompt", default="a red circle left of a blue square")
    parser.add_argument("--size", help="WIDTHxHEIGHT; the bundle's preferred size otherwise")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--window", default="1160x880", help="WIDTHxHEIGHT")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long the drawing may take")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "page.png")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        repository = Path(work) / "repository"
        spec = RepositorySpec(models=(MODEL,), placement=Placement("cpu"))
        write_repository(open_bundle(options.bundle), repository, spec, Silent())
        with serve(repository, Path(work)) as server:
            if reason := server.load(MODEL):
                sys.stderr.write(f"{reason}\n")
                return 3
            with open_page(PageSpec(server.http, port=0)) as page:
                thread = threading.Thread(target=page.serve_forever)
                thread.start()
                try:
                    shown = _draw(page.url, options)
                finally:
                    page.shutdown()
                    thread.join()
    options.out.write_bytes(_small(shown))
    sys.stdout.write(f"{options.out}\n")
    return 0


def _draw(url: str, options: argparse.Namespace) -> bytes:
    height, width = parse_size(options.window)
    fields = {"prompt": options.prompt, "seed": str(options.seed)}
    if options.steps is not None:
        fields["steps"] = str(options.steps)
    if options.size is not None:
        picture_height, picture_width = parse_size(options.size)
        fields |= {"width": str(picture_width), "height": str(picture_height)}
    with browse(width, height) as browser:
        browser.look(width, height, dark=options.dark)
        browser.open(url)
        browser.wait("document.querySelector('#page')?.dataset.state == 'idle'")
        if options.size is not None:
            name = f"{fields['width']}x{fields['height']}"
            browser.ask(
                f"(s => {{ s.value = [...s.options].some(o => o.value == '{name}') ? '{name}' : 'own';"
                "s.dispatchEvent(new Event('change', {bubbles: true})); })(document.querySelector('#size'))"
            )
        for field, value in fields.items():
            browser.ask(f"document.querySelector('#{field}').value = {json.dumps(value)}")
        browser.press("Enter", 13, "\r")
        browser.wait("['done', 'refused'].includes(document.querySelector('#page').dataset.state)", options.seconds)
        browser.ask("document.activeElement.blur()")
        return browser.screenshot()


def _small(data: bytes) -> bytes:
    """The picture with as many colours as its bytes allow."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    for colours in (None, *COLOURS):
        file = io.BytesIO()
        (image if colours is None else image.quantize(colours)).save(file, "PNG", optimize=True)
        if len(file.getvalue()) <= BYTES_MAX:
            break
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(main())
