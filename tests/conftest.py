"""Fixtures that several test files share: tiny pictures, an option file for a tiny run, and the `basicsr` command."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
import pytest
import yaml

from rwkvir import compat

# torch.compile's cache knows graphs, not what the operators in them return: it outlives a change there.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
compat.apply()  # test files import BasicSR
compat.patch_training()  # so that a file's tests see the same BasicSR alone and among all others

SCALE = 2
PICTURES = 10  # not a multiple of the batch, so that drop_last drops something


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `gt` (32 x 32) and `lq` (16 x 16) pairs of PNG files, and the same as gt.lmdb and lq.lmdb."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for index in range(PICTURES):
        coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        gt = cv2.resize(coarse, (32, 32), interpolation=cv2.INTER_CUBIC)
        for kind, picture in (("gt", gt), ("lq", cv2.resize(gt, (16, 16), interpolation=cv2.INTER_AREA))):
            (root / kind).mkdir(exist_ok=True)
            cv2.imwrite(str(root / kind / f"picture{index}.png"), picture)
    for kind in ("gt", "lq"):
        make_lmdb(root / f"{kind}.lmdb", sorted((root / kind).iterdir()))
    return root


def make_lmdb(path: Path, files: list[Path]) -> None:
    """Write `files` as BasicSR expects an LMDB; the shapes in meta_info.txt are not read by it."""
    with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for file in files:
            transaction.put(file.stem.encode(), file.read_bytes())
    (path / "meta_info.txt").write_text("".join(f"{file.name} (0,0,3) 1\n" for file in files))


@pytest.fixture
def options(pictures: Path) -> dict[str, Any]:
    """The options of a tiny run, to be changed by the test and then written."""
    return tiny_options(pictures)


def tiny_options(pictures: Path) -> dict[str, Any]:
    """The options of a 20-iteration run of a tiny network on the CPU."""
    data = {
        "type": "PairedImageDataset",
        "dataroot_gt": str(pictures / "gt"),
        "dataroot_lq": str(pictures / "lq"),
        "io_backend": {"type": "disk"},
    }
    training = {"gt_size": 16, "use_hflip": True, "use_rot": True, "batch_size_per_gpu": 4, "num_worker_per_gpu": 0}
    return {
        "name": "tiny",
        "model_type": "SRModel",
        "scale": SCALE,
        "num_gpu": 0,
        "manual_seed": 0,
        "datasets": {"train": {"name": "tiny", **data, **training}, "val": {"name": "tinyval", **data}},
        "network_g": {"type": "MSRResNet", "num_feat": 8, "num_block": 1, "upscale": SCALE},
        "path": {"pretrain_network_g": None, "strict_load_g": True, "resume_state": None},
        "train": {
            "total_iter": 20,
            "optim_g": {"type": "Adam", "lr": 2e-4},
            "scheduler": {"type": "MultiStepLR", "milestones": [10], "gamma": 0.5},
            "pixel_opt": {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"},
        },
        "val": {
            "val_freq": 10,
            "save_img": False,
            "metrics": {"psnr": {"type": "calculate_psnr", "crop_border": 2}},
        },
        "logger": {"print_freq": 1, "save_checkpoint_freq": 5, "use_tb_logger": False},
    }


class Workspace:
    """A working directory in which `basicsr` runs as a process of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def write(self, options: dict[str, Any] | str, name: str = "tiny.yml") -> str:
        """Write an option file, and return its name."""
        (self.root / name).write_text(options if isinstance(options, str) else yaml.safe_dump(options))
        return name

    def start(self, *words: str, python: tuple[str, ...] = ("-m", "rwkvir")) -> subprocess.Popen:
        """Start `basicsr WORDS` and do not wait for it."""
        command = [sys.executable, *python, *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(
            command, cwd=self.root, env=self.environment, text=True, start_new_session=True, **pipes
        )

    def run(self, *words: str, python: tuple[str, ...] = ("-m", "rwkvir")) -> subprocess.CompletedProcess:
        """Run `basicsr WORDS` to its end, or for two minutes."""
        process = self.start(*words, python=python)
        try:
            output, errors = process.communicate(timeout=120)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(words, process.returncode, output, errors)

    def train(self, options: dict[str, Any] | str, *words: str) -> subprocess.CompletedProcess:
        """Run `basicsr train` with `options`."""
        return self.run("train", "-opt", self.write(options), *words)

    def log(self, name: str = "tiny") -> str:
        """The text of all logs of the run `name`."""
        logs = sorted((self.root / "experiments" / name).glob("*.log"))
        return "\n".join(log.read_text() for log in logs)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads in place of worker processes, which take seconds to start, for the commands of `resyn`."""
    from rwkvir_data import analyze, build, report, verify

    @contextmanager
    def pool(number: int) -> Iterator[ThreadPoolExecutor]:
        with ThreadPoolExecutor(number) as executor:
            yield executor

    for module in (analyze, build, report, verify):
        monkeypatch.setattr(module, "workers", pool)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


@pytest.fixture
def one_sentence() -> Callable[[subprocess.CompletedProcess], str]:
    """Checks that a process failed with one sentence for a person as the last line of its stderr, and returns it."""

    def check(result: subprocess.CompletedProcess) -> str:
        assert result.returncode not in (0, -9), result.stderr
        assert "Traceback" not in result.stderr
        return result.stderr.strip().splitlines()[-1]

    return check
