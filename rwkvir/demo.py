"""`basicsr demo`: train a small network in minutes, and show on photographs that it has not seen what it has learnt."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from rwkvir_data.demo_data import bicubic, build_demo_data  # first, since it repairs `import basicsr`

# isort: split
import matplotlib.pyplot as plt
import numpy as np
import torch
from basicsr.archs import build_network
from basicsr.data import build_dataset
from basicsr.metrics import calculate_psnr, calculate_ssim
from basicsr.utils import tensor2img
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rwkvir import checks, pipeline, plugins, standard
from rwkvir.panels import Panel, Window, grid, squared_error, window_of_most

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
        grid(strip(photo, label)).savefig(results / f"{photo.name}.png")
    grid(overview(photos, label)).savefig(results / "overview.png")
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


def best_window(photo: Photo) -> Window:
    """The window in which the network gains most on bicubic interpolation."""
    bicubic_error, restored_error = (squared_error(picture, photo.gt) for picture in (photo.bicubic, photo.restored))
    return window_of_most(bicubic_error - restored_error, photo.lq)


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
