"""`basicsr report`: what it reads of an experiment's folder, what it makes of it, and the page."""

import base64
import html
import math
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import Workspace, tiny_options

from rwkvir import comparison, panels, report, report_figures
from rwkvir.experiment import Curve, Experiment, Record, read_curve, read_experiment, read_experiments
from rwkvir_data import page

LOG = """\
2026-11-22 10:00:00,000 INFO: {start}
  val_freq: 15
  print_freq: 10
  total_iter: 40
2026-11-22 10:00:01,000 INFO: Network: MSRResNet, with parameters: 12,345
2026-11-22 10:00:02,000 INFO: Start training from epoch: 0, iter: {begin}
"""
LINE = "2026-11-22 10:{time},000 INFO: [tiny..][epoch:  0, iter:   {iter:5,d}, lr:(2.000e-04,)] [eta: 0:00:01, time (data): 0.1 (0.0)] l_pix: {loss} \n"  # noqa: E501 - as BasicSR logs it
VALIDATION = "2026-11-22 10:{time},000 INFO: Validation set\n\t # psnr: {psnr}\tBest: 99.0000 @ 1 iter\n\n"


def write_log(folder: Path, number: int, begin: int, *entries: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"train_tiny_20261122_10000{number}.log"
    path.write_text(LOG.format(start="", begin=begin) + "".join(entries))
    return path


def test_a_log_tells_when_it_validated_and_what_a_resumed_run_replaced(tmp_path):
    first = (
        LINE.format(time="30:02", iter=10, loss="4.0000e-02"),
        VALIDATION.format(time="45:02", psnr=30.0),  # 15 iterations, between two lines
        LINE.format(time="50:02", iter=20, loss="3.0000e-02"),
        LINE.format(time="55:02", iter=30, loss="3.5000e-02"),
    )
    second = (
        LINE.format(time="10:02", iter=30, loss="2.0000e-02"),
        VALIDATION.format(time="12:02", psnr=31.5),
        LINE.format(time="20:02", iter=40, loss="1.0000e-02"),
        "2026-11-22 10:20:02,000 INFO: End of training. Time consumed: 0:00:01\n",
        VALIDATION.format(time="30:02", psnr=32.5),
    )
    write_log(tmp_path, 1, 0, *first)
    write_log(tmp_path, 2, 20, *second)
    run = read_experiment(tmp_path, "tiny")
    assert run.resumes == [20] and run.parameters == 12345
    assert run.curve("set", "psnr") == Curve(
        [15, 30, 40], pytest.approx([0.75, 1.0333, 1.3333], abs=1e-4), [30.0, 31.5, 32.5]
    )
    assert run.curve("", "l_pix").values == [0.04, 0.03, 0.02, 0.01]
    assert run.curve("", "l_pix").hours == pytest.approx([0.5, 0.8333, 1.0, 1.1667], abs=1e-4)
    assert run.curve("", "lr").values == [2e-4] * 4
    assert run.hours_at([0, 25]) == pytest.approx([0, 0.9167], abs=1e-4)


def test_a_damaged_log_is_told_and_the_rest_of_it_counts(tmp_path):
    good = LINE.format(time="30:02", iter=10, loss="4.0000e-02")
    write_log(tmp_path, 1, 0, good[:60] + "\n", good, LINE.format(time="40:02", iter=20, loss="nan"), good[:-9])
    run = read_experiment(tmp_path, "tiny")
    assert run.curve("", "l_pix").values == [0.04]
    assert any("1 lines of train_tiny" in note for note in run.notes)
    assert any("l_pix is nan at iteration 20" in note for note in run.notes)
    assert any("nothing was validated yet" in note for note in run.notes)


def test_a_learning_curve_comes_before_the_log(tmp_path):
    write_log(tmp_path, 1, 0, LINE.format(time="30:02", iter=10, loss="4.0000e-02"))
    curve = tmp_path / "learning_curve.csv"
    rows = "10,0.1,,l_pix,0.05\n20,x,,l_pix,0.04\n20,0.2,set,psnr,31.5\n20,0.3,set,psnr,31.5\n10,0.1,set,psnr,3\n"
    curve.write_text(f"iter,hours,dataset,name,value\n{rows}30,0.3,set,psnr,3")  # the last row was cut short
    notes: list[str] = []
    read = read_curve(curve, notes)
    assert read == [
        Record(10, 0.1, "", "l_pix", 0.05),
        Record(10, 0.1, "set", "psnr", 3.0),
        Record(20, 0.2, "set", "psnr", 31.5),
    ]
    assert notes == ["1 rows of learning_curve.csv are damaged and left out; compare with the log"]
    assert read_experiment(tmp_path, "tiny").records == read


def test_options_are_those_that_the_command_line_forced(tmp_path):
    write_log(tmp_path, 1, 0)
    command = "# GENERATE TIME: now\n# CMD:\n# basicsr train -opt a.yml --force_yml train:lr=0.5 name=b --auto_resume\n"
    (tmp_path / "a.yml").write_text(command + "name: a\ntrain: {lr: 0.1}\n")
    assert read_experiment(tmp_path, "a").options == {"name": "b", "train": {"lr": 0.5}}


def curves(**values: list[float]) -> dict[str, Curve]:
    iters = [10 * (i + 1) for i in range(4)]
    return {
        name: Curve(iters[: len(some)], [i / 100 for i in iters[: len(some)]], some) for name, some in values.items()
    }


def test_convergence():
    slow, fast = report.convergence(curves(slow=[29.0, 30.0, 30.96, 31.0], fast=[30.5, 31.5, 31.92]))
    assert slow.final == 31.0 and slow.reached == [(30, 0.3), (30, 0.3), (40, 0.4)]
    assert fast.reached == [(30, 0.3), (30, 0.3), (20, 0.2)]  # 31 dB, to which `slow` came, after 20
    assert slow.area == pytest.approx((29.5 * 10 + 30.48 * 10) / 20)  # from 10 to 30, which both have
    assert fast.area == pytest.approx((31.0 * 10 + 31.71 * 10) / 20)
    assert report.convergence(curves(one=[30.0]))[0].area is None
    between = Curve([5, 25], [0, 0], [0.0, 20.0])
    assert report.mean(between, 10, 20) == pytest.approx(10)


def test_smoothing_is_a_mean_also_at_the_ends():
    assert report_figures.smoothed([3.0] * 100) == pytest.approx([3.0] * 100)
    ramp = report_figures.smoothed(list(range(100)))  # a window of 5
    assert ramp[:2] == pytest.approx([1.0, 1.5]) and ramp[50] == 50
    assert report_figures.smoothed([1.0]) == [1.0]


def experiment(label: str, options: dict, records: list[Record] | None = None) -> Experiment:
    return Experiment(label, Path(label), options, records or [], [], None, None, [])


def test_differences():
    one = {"name": "a", "train": {"optim_g": {"lr": 0.1, "betas": [0.9, 0.99]}, "total_iter": 5}}
    two = {"name": "b", "train": {"optim_g": {"lr": 0.2, "betas": [0.9, 0.99]}, "total_iter": 5}, "scale": 2}
    runs = [experiment("a", one), experiment("b", two), experiment("unknown", {})]
    assert report.differences(runs) == {"train:optim_g:lr": ["0.1", "0.2", "–"], "scale": ["–", "2", "–"]}
    assert report.differences(runs[:1]) == {}


def test_finals_heed_what_is_better():
    def rows(psnr: list[float], lpips: list[float]) -> list[Record]:
        both = {"psnr": psnr, "lpips": lpips}
        return [Record(i, 0, "set", name, value) for name, some in both.items() for i, value in enumerate(some, 1)]

    options = {"val": {"metrics": {"psnr": {}, "lpips": {"better": "lower"}}}}
    runs = [
        experiment("a", options, rows([30, 32, 31], [0.3, 0.1, 0.2])),
        experiment("b", options, rows([30], [0.4])),
        experiment("c", options),
    ]
    (metrics, ((_, a), (_, b), (_, c))) = report.finals(runs)["set"]
    assert metrics == ["psnr", "lpips"] and c == [None, None]
    assert [(cell["last"], cell["best"], cell["iter"], cell["best_is_top"]) for cell in a] == [
        (31, 32, 2, True),
        (0.2, 0.1, 2, True),
    ]
    assert not any(cell["best_is_top"] or cell["last_is_top"] for cell in b)


def test_the_window_is_where_the_values_are_highest():
    values = np.zeros((80, 120), np.float32)
    values[40:44, 90:96] = 1
    values[0, 0] = 20  # a single pixel counts less than all of a window
    window = panels.window_of_most(values, np.zeros((40, 60, 3)))
    assert window[2:] == (8, 12)
    assert np.sum(window.cut(values, 2) == 1) == 24


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory) -> Path:
    """experiments/tiny, trained, and experiments/other: the same with another learning rate and disturbed weights."""
    root = tmp_path_factory.mktemp("runs")
    options = tiny_options(pictures)
    options["datasets"]["val"]["name"] = "a <set>"
    options["val"]["val_freq"] = 5
    result = Workspace(root).train(options)
    assert result.returncode == 0, result.stderr
    tiny, other = root / "experiments" / "tiny", root / "experiments" / "other"
    shutil.copytree(tiny, other)
    (other / "tiny.yml").write_text(yaml.safe_dump(options | {"name": "other"}).replace("0.0002", "0.5"))
    weights = torch.load(other / "models" / "net_g_latest.pth")
    weights["params"]["conv_last.bias"] += 0.1
    torch.save(weights, other / "models" / "net_g_latest.pth")
    return root / "experiments"


def test_pictures_score_as_in_the_validation(trained):
    runs = read_experiments([str(trained / "tiny"), str(trained / "other")])
    compared = comparison.compare(runs, 2)
    assert not runs[0].notes and compared.labels() == ["bicubic", "tiny", "other"]
    assert len(compared.pictures) == 10 and len(compared.examples) == 2
    validated = runs[0].curve("a <set>", "psnr").values[-1]
    assert compared.points("tiny")[:, 1].mean() == pytest.approx(validated, abs=5e-5)
    spreads = [abs(one.psnr["tiny"] - one.psnr["other"]) for one in compared.pictures]
    assert [one.scored.spread() for one in compared.examples] == sorted(spreads, reverse=True)[:2]
    assert {label: crop.shape for label, crop in compared.examples[0].crops().items()} == {
        "LQ": (3, 3, 3),
        **dict.fromkeys(("bicubic", "tiny", "other", "GT"), (6, 6, 3)),
    }


def make(tmp_path: Path, *words: str) -> str:
    assert report.main([*words, "-o", str(tmp_path / "out.html")]) == 0
    page = (tmp_path / "out.html").read_text()
    assert not re.findall(r"\b(?:None|nan)\b", re.sub('<style>.*?</style>|base64,[^"]*', "", page, flags=re.DOTALL))
    return page


def test_the_page(trained, tmp_path, capsys):
    (tmp_path / "out.html").write_text("an earlier page")
    page = make(tmp_path, str(trained / "tiny"), str(trained / "other"), "--title", "Tiny & other")
    text = re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", page))
    for heading in ("Learning curves", "Convergence", "Results", "What was done differently", "Where they differ most"):
        assert heading in text
    assert "Tiny &amp; other" in text and "a &lt;set&gt;" in text and "What is amiss" not in text
    assert "train:optim_g:lr 0.0002 0.5" in text
    uris = re.findall(r'src="data:image/\w+;base64,([^"]*)"', page)
    assert len(uris) == 2 + 2 + 2 + 4 * (1 + 5)  # curves, losses, complexity; four pictures with five crops
    assert all(cv2.imdecode(np.frombuffer(base64.b64decode(uri), np.uint8), -1) is not None for uri in uris)
    assert "<script" not in page and "http" not in re.sub('base64,[^"]*', "", page)  # self-contained
    figures = {file.name for file in (tmp_path / "out_figures").iterdir()}
    assert {"l_pix_hours.png", "complexity_gain.png", "picture_4.png"} < figures
    assert not list(tmp_path.rglob("*.partial"))
    assert capsys.readouterr().err.count("basicsr report") == 0


def broken(folder: Path, what: str) -> str:
    """Break a copy of a run, and return what the page has to say of it."""
    if what == "weights":
        shutil.rmtree(folder / "models")
        return "holds no net_g_*.pth; without weights there are no pictures of it"
    if what == "damaged weights":
        (folder / "models" / "net_g_latest.pth").write_bytes(b"PK")
        return "its network cannot be had"
    if what == "options":
        (folder / "tiny.yml").unlink()
        return "it holds no option file"
    if what == "yaml":
        (folder / "tiny.yml").write_text("name: [")
        return "tiny.yml is not YAML"
    if what == "data":
        text = (folder / "tiny.yml").read_text()
        (folder / "tiny.yml").write_text(re.sub("dataroot_(..): .*", r"dataroot_\1: gone", text))
        return "validation set a <set> cannot be read"
    if what == "validation":
        for file in (*folder.glob("train_*.log"), *folder.glob("*.csv")):
            lines = file.read_text().splitlines(keepends=True)
            file.write_text("".join(line for line in lines if "psnr" not in line or line.startswith("  ")))
        return "nothing was validated yet"
    for file in (*folder.glob("train_*.log"), *folder.glob("*.csv")):
        file.write_text("")
    return "nothing was validated yet"


@pytest.mark.parametrize(
    "kinds", [["data"], ["everything"], ["weights", "damaged weights", "options", "yaml", "validation"]]
)
def test_half_written_experiments_are_told_on_the_page(trained, tmp_path, capsys, kinds):
    folders = [tmp_path / kind for kind in kinds]
    for folder in folders:
        shutil.copytree(trained / "tiny", folder)
    sentences = [broken(folder, folder.name) for folder in folders]
    page = make(tmp_path, *map(str, folders))
    errors = capsys.readouterr().err
    for folder, sentence in zip(folders, sentences, strict=True):
        assert re.search(f"basicsr report: {folder.name}: .*{re.escape(sentence)}", errors)
        assert re.search(f"<b>{folder.name}</b>: .*{re.escape(html.escape(sentence))}", page)
    assert ("<h2>Learning curves</h2>" in page) == (kinds != ["everything"])
    assert ("<h2>Where they differ most</h2>" in page) == (kinds != ["data"])


def test_a_page_without_figures_announces_none(tmp_path, capsys):
    page.write(tmp_path / "out.html", "a page", {})
    assert capsys.readouterr().out == f"{tmp_path}/out.html (0.0 MB)\n"


def test_what_is_no_experiment(trained, tmp_path):
    (tmp_path / "out.html").write_text("an earlier page")
    words = ["-o", str(tmp_path / "out.html"), "--pictures", "0"]
    with pytest.raises(ValueError, match="--pictures is -1; give 0 or more"):
        report.main([str(trained / "tiny"), "--pictures", "-1"])
    with pytest.raises(
        FileNotFoundError, match=r"there is no folder .*gone; give a run's folder, experiments/NAME say"
    ):
        report.main([str(tmp_path / "gone"), *words])
    with pytest.raises(
        ValueError, match=r"experiments is not an experiment's folder: .* learning_curve.csv nor train_"
    ):
        report.main([str(trained), *words])
    (tmp_path / "out_figures").write_text("in the way")
    with pytest.raises(OSError, match="out_figures"):
        report.main([str(trained / "tiny"), *words])
    assert (tmp_path / "out.html").read_text() == "an earlier page"


def test_runs_of_one_name_are_told_apart(trained, tmp_path):
    shutil.copytree(trained / "tiny", tmp_path / "tiny")
    runs = read_experiments([str(trained / "tiny"), f"{tmp_path}/tiny/"])
    assert [run.label for run in runs] == [str(trained / "tiny"), str(tmp_path / "tiny")]


def test_durations():
    assert [report.duration(hours) for hours in (0, 0.001, 0.07, 12.34)] == ["0.0 s", "3.6 s", "4.2 min", "12.3 h"]
    assert math.isclose(report_figures.time_unit(0.5)[1], 60)
