"""What the HTML reports of `resyn` and `basicsr` share: their look, their pictures, and how they are written."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
from matplotlib.figure import Figure

INK, BLUE, ORANGE, GREEN, PURPLE, GREY = "#1d2430", "#3b75af", "#d9773f", "#2f8f6b", "#8a5ea8", "#aab2bf"
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#eceef1",
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


def template(file: Path) -> jinja2.Template:
    """The template `file`, which may extend page.html."""
    folders = [file.parent, Path(__file__).parent]
    loader = jinja2.FileSystemLoader(folders)
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(file.name)


def write(out: Path, page: str, figures: dict[str, bytes]) -> None:
    """Write the page, and its figures (PNG files by name) to NAME_figures/ beside it; each replaces what it was whole.

    Raises:
        OSError: it cannot be written; what was there before is left.
    """
    folder = out.with_name(f"{out.stem}_figures")
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        replace(folder / f"{name}.png", figure)
    replace(out, page.encode())
    pictures = f" and {folder}: {', '.join(f'{name}.png' for name in figures)}" if figures else ""
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB){pictures}")


def replace(path: Path, content: bytes) -> None:
    """Write a file aside and rename it, so that `path` never holds half.

    Raises:
        OSError: it cannot be written; what was there before is left.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({error.strerror}); make room there or give another -o") from error


def png(fig: Figure) -> bytes:
    """A figure as a PNG file."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=170)
    return buffer.getvalue()


def fit(picture: np.ndarray, side: int) -> np.ndarray:
    """The picture (H, W[, 3]) reduced so that its longest side is at most `side`."""
    factor = min(1, side / max(picture.shape[:2]))
    height, width = (max(round(length * factor), 1) for length in picture.shape[:2])
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)


def png_file(picture: np.ndarray) -> bytes:
    """The picture (H, W, 3) uint8 RGB as a PNG file."""
    return cv2.imencode(".png", picture[..., ::-1])[1].tobytes()


def jpeg(picture: np.ndarray) -> bytes:
    """The picture (H, W, 3) uint8 RGB as a JPEG file."""
    return cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])[1].tobytes()


def data_uri(image: bytes | None, kind: str) -> str | None:
    """A file's content as a page holds it; None stays None."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}" if image else None
