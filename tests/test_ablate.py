"""`basicsr ablate`: which runs it makes of an option file, how it goes on, and what it says of their spread."""

import argparse
import csv
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import pytest
import yaml

from rwkvir import ablate, cli
from rwkvir.ablation_report import BASELINE, Row, markdown, verdict
from rwkvir_arch.rwkvir_arch import SCANS

NETWORK = {"type": "RWKVIR", "num_feat": 8, "depths": [1], "upscale": 2}


@pytest.fixture
def tiny(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a run of 8 iterations of a tiny RWKV-IR."""
    options["network_g"] = NETWORK
    options["train"]["total_iter"] = 8
    options["logger"]["save_checkpoint_freq"] = 2
    return options


@pytest.fixture
def arguments(tmp_path: Path, tiny: dict[str, Any]) -> argparse.Namespace:
    """Those of `basicsr ablate --opt tiny.yml`, without anything else."""
    (tmp_path / "tiny.yml").write_text(yaml.safe_dump(tiny))
    return ablate._parser().parse_args(["--opt", str(tmp_path / "tiny.yml")])


def labels(words: list[str], grid: bool = False, **network: Any) -> list[str]:
    return [variant.label for variant in ablate.make_variants({**NETWORK, **network}, words, grid)]


def test_one_option_changes_at_a_time_through_all_its_values():
    assert labels(["scan,dc_norm"]) == [
        BASELINE,
        *(f"scan={scan}" for scan in SCANS[1:]),
        "dc_norm=instance",
        "dc_norm=none",
    ]
    assert labels(["shift"], shift="q") == [BASELINE, "shift=dc", "shift=none"]
    assert labels(["dc_ratio=0.5,1", "depths=[1],[1, 2]"]) == [BASELINE, "dc_ratio=0.5", "depths=[1, 2]"]


def test_a_grid_has_all_combinations():
    assert labels(["decay_scale", "dc_ratio=0.5"], grid=True) == [
        BASELINE,
        "dc_ratio=0.5",
        "decay_scale=side",
        "decay_scale=side dc_ratio=0.5",
    ]


@pytest.mark.parametrize(
    "words, message",
    [
        (["shfit"], "--what shfit is not an option of RWKVIR; did you mean shift?"),
        (["shift,scans"], "--what scans is not an option of RWKVIR; did you mean scan or upscale?"),
        (["dc_ratio"], "--what dc_ratio needs the values to try; give them as dc_ratio=VALUE,VALUE"),
        (["dc_ratio="], "--what dc_ratio needs the values"),
        (["depths=[1"], "is not of the form NAME=VALUE,VALUE"),
        (["scan=cross"], "has only the baseline's own values; add others"),
    ],
)
def test_what_cannot_be_ablated_is_named(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        labels(words)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--what", "scan=crosss"], "scan=crosss: RWKVIR: scan is 'crosss'; it must be one of"),
        (["--what", "scna"], "--what scna is not an option of RWKVIR; did you mean scan"),
        (["--name", "a/b"], "'a/b' cannot name folders of runs"),
        (["--opt", "absent.yml"], "the option file absent.yml does not exist"),
    ],
)
def test_bad_input_ends_in_a_sentence_before_anything_is_made(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["ablate", *words]) == 1
    errors = capsys.readouterr().err
    assert message in errors and len(errors.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_run_differs_from_its_baseline_in_network_seed_and_name_alone(arguments):
    base = ablate.base_options(arguments)
    variant = ablate.make_variants(NETWORK, ["scan"], grid=False)[1]
    run = ablate.make_run(base, variant, 5, Path("out"))
    own = {"name": "tiny_scan-alternate_seed5", "manual_seed": 5, "network_g": {**NETWORK, "scan": "alternate"}}
    assert run.options == {**base, **own}
    assert run.file == Path("out/options/tiny_scan-alternate_seed5.yml")


def test_the_miniature_is_the_demo_made_small():
    options = ablate.base_options(ablate._parser().parse_args([]))
    assert options["network_g"].items() >= {"num_feat": 16, "depths": [2, 2], "scan": "cross", "shift": "dc"}.items()
    assert options["train"]["total_iter"] == options["val"]["val_freq"] == ablate.ITERATIONS
    assert options["train"]["scheduler"]["milestones"] == [150, 230, 275, 290]  # the demo's, of 3000: 1500, 2300, ...
    assert len(ablate.make_variants(options["network_g"], [",".join(ablate.CHOICES)], grid=False)) == 9


def test_another_length_keeps_the_schedule_in_proportion(arguments):
    arguments.iterations = 2
    options = ablate.base_options(arguments)
    assert options["train"]["total_iter"] == 2
    assert options["train"]["scheduler"]["milestones"] == [2]  # the tiny run's, of 8 iterations: 10
    assert options["val"]["val_freq"] == 2


def test_other_pictures_take_the_place_of_the_training_set_alone(arguments, tiny):
    arguments.data = "my/pictures.lmdb"
    data = ablate.base_options(arguments)["datasets"]
    assert data["val"] == tiny["datasets"]["val"]
    place = {"dataroot_gt": "my/pictures.lmdb", "io_backend": {"type": "lmdb"}, "degradation": "x2"}
    assert data["train"].items() >= {"type": "ReSynPairedDataset", **place}.items()
    assert "dataroot_lq" not in data["train"]


def test_seeds_make_the_interval():
    """By hand: gains 1, 2, 3 have mean 2 and deviation 1; t of 2 degrees of freedom at 97.5 % is 4.3027."""
    row = Row("shift=q", "set", [31.0, 32.0, 33.0], [1.0, 2.0, 3.0], 1000, 1.0)
    half = 4.3027 / 3**0.5
    assert row.interval() == pytest.approx((2 - half, 2 + half), abs=1e-4)
    baseline = Row(BASELINE, "set", [30.0] * 3, [0.0] * 3, 2000, 1.0)
    table = markdown([baseline, row]).splitlines()
    assert table[2] == "| baseline | 2,000 | 1.00 | 30.00 ± 0.00 |  |  |  |"
    assert table[3] == "| shift=q | 1,000 | 1.00 | 32.00 ± 1.00 | +2.000 ± 1.000 | -0.484 .. +4.484 | -0.87 |"


def test_the_verdict_says_what_can_be_told_from_chance():
    def row(label: str, *gains: float) -> Row:
        return Row(label, "set", list(gains), list(gains), 1, 1.0)

    one = verdict([row(BASELINE, 0.0), row("a", 1.0)], 100)
    assert one.startswith("One seed has no spread")
    some = [row(BASELINE, 0.0, 0.0), row("a", 1.0, 1.01), row("b", -1.0, 1.0)]
    assert verdict(some, 100).startswith("Apart from 0 lie the intervals of a; of 2 intervals, 0.1 would")
    assert verdict([some[0], some[2]], 100).startswith("No interval lies apart from 0")


@pytest.mark.parametrize(
    "code, message",
    [
        ("raise SystemExit('basicsr train: the disk is full; make room there')", "failed: the disk is full; make room"),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9, for want of memory perhaps"),
        ("", "has no PSNR at its last iteration"),
    ],
)
def test_a_run_that_fails_is_named(tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    variant = ablate.make_variants(NETWORK, ["scan"], grid=False)[0]
    run = ablate.make_run(ablate.base_options(arguments), variant, 0, Path("out"))
    popen = subprocess.Popen
    monkeypatch.setattr(ablate.subprocess, "Popen", lambda command, **how: popen([sys.executable, "-c", code], **how))
    with pytest.raises(ValueError, match=f"tiny_baseline_seed0 .*{message}"):
        ablate.train([run], jobs=1)


def test_an_interrupted_ablation_goes_on_where_it_was(workspace, tiny):
    workspace.write(tiny)
    words = ("ablate", "--opt", "tiny.yml", "--what", "scan=row", "--seeds", "1")
    first, second = (workspace.root / f"experiments/tiny_{label}_seed0" for label in (BASELINE, "scan-row"))
    process = workspace.start(*words, "--jobs", "1")
    assert process.stdout is not None
    said = next(line for line in process.stdout if line.startswith("1 of 2: baseline, seed 0: "))
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    sentence = "interrupted with 1 of 2 runs finished; to go on, run the same command again"
    assert errors.strip().splitlines()[-1] == f"basicsr ablate: {sentence}"
    assert not list(second.glob("models/net_g_latest.pth"))

    for file in ("models/net_g_latest.pth", "models/net_g_8.pth", "training_states/8.state"):
        (first / file).unlink()  # as if it had been killed after iteration 6
    result = workspace.run(*words, "--jobs", "2")
    assert result.returncode == 0, result.stderr
    assert said in result.stdout.replace("2 of 2", "1 of 2")
    assert "iter: 6.\n" in workspace.log(first.name)

    out = workspace.root / "results/ablate/tiny"
    rows = list(csv.DictReader((out / "ablation.csv").open()))
    assert [row["variant"] for row in rows] == [BASELINE, "scan=row"]
    assert f"{float(rows[0]['psnr']):.2f} dB" in said
    assert "One seed has no spread" in (out / "ablation.md").read_text()
    assert cv2.imread(str(out / "ablation.png")) is not None
    used = yaml.safe_load((second / "tiny_scan-row_seed0.yml").read_text())
    assert used["network_g"] == {**NETWORK, "scan": "row"}
