"""Time of the complexity metric, beside its dense reference and beside decoding the picture that it scores.

    python benchmarks/complexity.py [PICTURE ...] [--size 2040x1356] [--repeats 15]

Each picture (by default scikit-image's coffee and grass, and noise) is resized, saved as PNG (compression level 6) and
JPEG (quality 90), and scored and decoded on one core. Every round times each contender once, in turn; the table gives
the median and the spread (max - min) / median over the rounds. The dense form is timed once.
"""

import argparse
import io
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import cv2
import numpy as np
import skimage.data
from PIL import Image

from rwkvir_data.complexity import complexity, complexity_reference
from rwkvir_data.sources import decode


def milliseconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def encode(picture: np.ndarray, kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind, **options)
    return file.getvalue()


def contenders(picture: np.ndarray) -> dict[str, Callable[[], object]]:
    png, jpeg = encode(picture, "PNG"), encode(picture, "JPEG", quality=90)
    return {
        "complexity": partial(complexity, picture),
        "with map": partial(complexity, picture, map=True),
        "mean over orientations": partial(complexity, picture, "mean"),
        "decode PNG, Pillow": partial(decode, png),
        "decode PNG, OpenCV": lambda: cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR),
        "decode JPEG, Pillow": partial(decode, jpeg),
    }


def bench(name: str, picture: np.ndarray, repeats: int) -> None:
    functions = contenders(picture)
    times: dict[str, list[float]] = {label: [] for label in functions}
    for label in [*functions] * (repeats + 1):
        times[label].append(milliseconds(functions[label]))
    dense = milliseconds(partial(complexity_reference, picture))
    own = statistics.median(times["complexity"][1:])
    print(f"\n{name}, score {complexity(picture).score:.2f}")
    for label, (_, *taken) in times.items():  # the first round compiles and fills caches
        median = statistics.median(taken)
        print(f"  {label:<24}{median:9.1f} ms{median / own:8.2f} x   spread {(max(taken) - min(taken)) / median:.0%}")
    print(f"  {'dense reference':<24}{dense:9.0f} ms{dense / own:8.0f} x")


def pictures(paths: list[str]) -> dict[str, np.ndarray]:
    if paths:
        return {path: decode(open(path, "rb").read()) for path in paths}
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    grass = np.repeat(skimage.data.grass()[..., None], 3, axis=2)
    return {"coffee": skimage.data.coffee(), "grass": grass, "noise": noise}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", nargs="*", metavar="PICTURE")
    parser.add_argument("--size", default="2040x1356", help="WIDTHxHEIGHT that pictures are resized to")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    cv2.setNumThreads(1)
    print(f"{platform.processor() or platform.machine()}, {args.size}, median of {args.repeats} rounds, one core")
    for name, picture in pictures(args.pictures).items():
        bench(name, cv2.resize(picture, (width, height), interpolation=cv2.INTER_CUBIC), args.repeats)


if __name__ == "__main__":
    main()
