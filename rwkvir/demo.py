"""`basicsr demo`: train a small network in minutes, and show on photographs that it has not seen what it has learnt."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from rwkvir_data.demo_data import bicubic, build_demo_data  # first, since it repairs `import basicsr`

# isort: split
import cv2
import matplotlib.pyplot as plt
import numpy as np
import torch
from basicsr.archs import build_network
from basicsr.data import build_dataset
from basicsr.metrics import calculate_psnr, calculate_ssim
from basicsr.utils import tensor2img
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rwkvir import checks, pipeline, plugins, standard

OPTION_FILE = "options/rwkvir_demo.yml"
DATA = Path("datasets/demo")  # where the option file expects it


class Score(NamedTuple):
    """PSNR in dB and SSIM, of the Y channel, without a border of `scale` pixels."""

    psnr: float
    ssim: float

    def __str__(self) -> str:
        return f"{self.psnr:.2f} / {self.ssim:.4f}"


class Photo(NamedTuple):
    """A photograph and its versions, each (H, W, 3) uint8 RGB; lq is smaller by the scale."""

    name: str
    lq: np.ndarray
    bicubic: np.ndarray
    restored: np.ndarray
    gt: np.ndarray
    bicubic_score: Score
    restored_score: Score


class Panel(NamedTuple):
    """One picture of a figure, and a part of it to mark: (x, y, width, height) as shares of its sides."""

    title: str
    picture: np.ndarray
    mark: tuple[float, float, float, float] | None = None


def main(argv: list[str]) -> int:
    """Run the demo with the arguments `argv`; 0 if the network beats bicubic interpolation on every photograph."""
    args = _parser().parse_args(argv)
    if args.opt == OPTION_FILE and not Path(OPTION_FILE).exists():  # rwkvir was installed without its source folder
        Path(OPTION_FILE).parent.mkdir(exist_ok=True)
        Path(OPTION_FILE).write_text(standard.demo())
    opt = checks.load_options(args.opt)
    build_demo_data(DATA)
    run = Path("experiments", opt["name"])
    if args.restart or not is_finished(run, args.opt):
        _train(args.opt, resume=not args.restart)
    results = Path(args.output or Path("results", opt["name"]))
    results.mkdir(parents=True, exist_ok=True)
    label = {"RWKVIR": "RWKV-IR"}.get(opt["network_g"]["type"], opt["network_g"]["type"])
    photos = restore_photos(opt, run / "models" / "net_g_latest.pth")
    (results / "table.md").write_text(table(photos, label))
    print(table(photos, label))
    for photo in photos:
        save_grid(results / f"{photo.name}.png", strip(photo, label))
    save_grid(results / "overview.png", overview(photos, label))
    save_learning_curve(results / "learning_curve.png", opt, photos, label)
    print(f"Pictures, table and learning curve: {results}/")
    worse = [photo for photo in photos if photo.restored_score.psnr <= photo.bicubic_score.psnr]
    for photo in worse:
        print(
            f"basicsr demo: {photo.name}: {label}'s {photo.restored_score.psnr:.2f} dB do not beat bicubic's "
            f"{photo.bicubic_score.psnr:.2f} dB; raise train:total_iter in {args.opt} and run the demo again",
            file=sys.stderr,
        )
    return 1 if worse else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="basicsr demo", description=__doc__.split(": ", 1)[1])
    parser.add_argument("-opt", "--opt", default=OPTION_FILE, metavar="FILE.yml", help="the option file (%(default)s)")
    parser.add_argument("--restart", action="store_true", help="train from the start; else an unfinished run goes on")
    parser.add_argument("--output", metavar="FOLDER", help="where to write table and pictures (results/<name>)")
    return parser


def is_finished(run: Path, option_file: str) -> bool:
    """Whether `run`, a folder in experiments/, has final weights that were trained with the present options."""
    weights, used = run / "models" / "net_g_latest.pth", run / Path(option_file).name
    if not (weights.is_file() and used.is_file()) or weights.stat().st_mtime < used.stat().st_mtime:
        return False
    return checks.load_options(str(used)) == checks.load_options(option_file)


def _train(option_file: str, resume: bool) -> None:
    try:
        pipeline.train(["-opt", option_file, *(["--auto_resume"] if resume else [])], root_path=os.getcwd())
    except pipeline.Interrupted as stop:
        stop.args = ("interrupted; to continue, run the demo again, without --restart",)
        raise


@torch.inference_mode()
def restore_photos(opt: dict[str, Any], weights: Path) -> list[Photo]:
    """Apply the network of `opt` with `weights` to its validation set, and compare it with bicubic interpolation."""
    plugins.load_plugins()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = build_network(opt["network_g"]).to(device).eval()
    network.load_state_dict(torch.load(weights, map_location=device, weights_only=True)["params"])
    scale = opt["scale"]
    dataset = build_dataset({**opt["datasets"]["val"], "phase": "val", "scale": scale})
    photos = []
    for i in range(len(dataset)):
        item = dataset[i]
        restored = tensor2img(network(item["lq"][None].to(device)), rgb2bgr=False)
        lq, gt = (tensor2img(item[kind], rgb2bgr=False) for kind in ("lq", "gt"))
        enlarged = bicubic(lq, scale)
        scores = (score(picture, gt, scale) for picture in (enlarged, restored))
        photos.append(Photo(Path(item["gt_path"]).stem, lq, enlarged, restored, gt, *scores))
    return photos


def score(picture: np.ndarray, gt: np.ndarray, scale: int) -> Score:
    """Compare two (H, W, 3) uint8 RGB pictures by BasicSR's own metrics, which want BGR."""
    pair = picture[..., ::-1], gt[..., ::-1]
    return Score(
        *(metric(*pair, crop_border=scale, test_y_channel=True) for metric in (calculate_psnr, calculate_ssim))
    )


def mean_scores(photos: list[Photo]) -> tuple[Score, Score]:
    """The means over the photographs: (bicubic's, the network's)."""
    columns = zip(*((photo.bicubic_score, photo.restored_score) for photo in photos), strict=True)
    bicubic_mean, restored_mean = (Score(*np.mean(column, axis=0)) for column in columns)
    return bicubic_mean, restored_mean


def table(photos: list[Photo], label: str) -> str:
    """A Markdown table of the scores, with their means in the last row."""
    rows = [(photo.name, photo.bicubic_score, photo.restored_score) for photo in photos]
    rows.append(("mean", *mean_scores(photos)))
    lines = [f"| photo | bicubic PSNR / SSIM | {label} PSNR / SSIM | gain, dB |", "|---|---|---|---|"]
    lines += [f"| {name} | {old} | {new} | {new.psnr - old.psnr:+.2f} |" for name, old, new in rows]
    return "\n".join(lines) + "\n"


class Window(NamedTuple):
    """A part of a photograph, in pixels of its LQ version."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, picture: np.ndarray, scale: int) -> np.ndarray:
        """The window in a picture that is `scale` times as large as LQ."""
        top, left, height, width = (scale * length for length in self)
        return picture[top : top + height, left : left + width]

    def mark(self, lq: np.ndarray) -> tuple[float, float, float, float]:
        height, width = lq.shape[:2]
        return self.left / width, self.top / height, self.width / width, self.height / height


def best_window(photo: Photo, share: float = 0.2) -> Window:
    """A window, `share` of each side long, about where the network gains most on bicubic interpolation."""
    height, width = photo.lq.shape[:2]
    tall, wide = round(height * share), round(width * share)
    bicubic_error, restored_error = (
        np.square(np.float32(picture) - photo.gt).mean(axis=2) for picture in (photo.bicubic, photo.restored)
    )
    gain = cv2.resize(bicubic_error - restored_error, (width, height), interpolation=cv2.INTER_AREA)
    gain = cv2.GaussianBlur(gain, (0, 0), sigmaX=wide / 4, sigmaY=tall / 4, borderType=cv2.BORDER_CONSTANT)
    y, x = np.unravel_index(gain.argmax(), gain.shape)
    top, left = np.clip(y - tall // 2, 0, height - tall), np.clip(x - wide // 2, 0, width - wide)
    return Window(int(top), int(left), tall, wide)


def strip(photo: Photo, label: str) -> list[list[Panel]]:
    """LQ, bicubic, the network's result and GT side by side, and below them the window where the network gains most."""
    window, scale = best_window(photo), photo.gt.shape[0] // photo.lq.shape[0]
    mark = window.mark(photo.lq)
    whole = [
        Panel(f"{photo.name}, LQ {photo.lq.shape[1]}x{photo.lq.shape[0]}", photo.lq, mark),
        Panel(f"bicubic {photo.bicubic_score}", photo.bicubic, mark),
        Panel(f"{label} {photo.restored_score}", photo.restored, mark),
        Panel(f"GT {photo.gt.shape[1]}x{photo.gt.shape[0]}", photo.gt, mark),
    ]
    factors = (1, scale, scale, scale)
    return [whole, [Panel("", window.cut(panel.picture, factor)) for panel, factor in zip(whole, factors, strict=True)]]


def overview(photos: list[Photo], label: str, count: int = 3) -> list[list[Panel]]:
    """A row for each of the `count` photographs that gained most: GT, and its best window in each version."""
    ranked = sorted(photos, key=lambda photo: photo.restored_score.psnr - photo.bicubic_score.psnr, reverse=True)
    rows = []
    for photo in ranked[:count]:
        window, scale = best_window(photo), photo.gt.shape[0] // photo.lq.shape[0]
        rows.append(
            [
                Panel(photo.name, photo.gt, window.mark(photo.lq)),
                Panel("LQ", window.cut(photo.lq, 1)),
                Panel(f"bicubic {photo.bicubic_score.psnr:.2f} dB", window.cut(photo.bicubic, scale)),
                Panel(f"{label} {photo.restored_score.psnr:.2f} dB", window.cut(photo.restored, scale)),
                Panel("GT", window.cut(photo.gt, scale)),
            ]
        )
    return rows


def save_grid(path: Path, rows: list[list[Panel]], width: float = 4.0) -> None:
    """Draw rows of panels, each `width` inches wide; the panels of a row have the same aspect ratio."""
    gap = 0.08
    heights = [width * row[0].picture.shape[0] / row[0].picture.shape[1] for row in rows]
    heads = [0.35 if row[0].title else gap for row in rows]
    size = (len(rows[0]) * (width + gap) + gap, sum(heights) + sum(heads) + gap)
    figure = plt.figure(figsize=size, dpi=100)
    bottom = size[1]
    for row, height, head in zip(rows, heights, heads, strict=True):
        bottom -= height + head
        for i, panel in enumerate(row):
            left = gap + i * (width + gap)
            axes = figure.add_axes((left / size[0], bottom / size[1], width / size[0], height / size[1]))
            axes.imshow(panel.picture, interpolation="nearest", extent=(0, 1, 1, 0), aspect="auto")
            axes.set_axis_off()
            axes.set_title(panel.title, fontsize=13, pad=5)
            if panel.mark:
                x, y, wide, tall = panel.mark
                axes.add_patch(plt.Rectangle((x, y), wide, tall, fill=False, edgecolor="red", linewidth=2))
    figure.savefig(path)
    plt.close(figure)


def save_learning_curve(path: Path, opt: dict[str, Any], photos: list[Photo], label: str) -> None:
    """Draw the validation PSNR, beside bicubic's, and the training loss over the iterations that BasicSR has logged."""
    events = EventAccumulator(str(Path("tb_logger", opt["name"])), size_guidance={"scalars": 0}).Reload()
    metric = next(name for name, entry in opt["val"]["metrics"].items() if entry["type"] == "calculate_psnr")

    def curve(tag: str) -> tuple[np.ndarray, np.ndarray]:
        # a resumed run logs some iterations again: the last one holds
        points = {event.step: event.value for event in events.Scalars(tag)}
        return np.array(sorted(points)), np.array([points[step] for step in sorted(points)])

    figure, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), dpi=100, layout="constrained")
    upper.plot(*curve(f"metrics/{opt['datasets']['val']['name']}/{metric}"), marker=".", label=label)
    upper.axhline(mean_scores(photos)[0].psnr, linestyle="--", color="grey", label="bicubic")
    upper.set_ylabel("validation PSNR, dB")
    upper.legend()
    steps, loss = curve("losses/l_pix")
    window = max(len(loss) // 20, 1)
    lower.plot(steps, loss, alpha=0.3)
    lower.plot(steps[window - 1 :], np.convolve(loss, np.ones(window) / window, "valid"), color="C0")
    lower.set_ylabel("training loss")
    lower.set_xlabel("iteration")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.savefig(path)
    plt.close(figure)
