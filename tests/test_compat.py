"""Each workaround in rwkvir/compat.py: the symptom is gone, and nothing else changed."""

import math
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import make_lmdb

from rwkvir import compat

compat.apply()
compat.patch_training()

import basicsr.train  # noqa: E402 - importable only now
from basicsr.archs.srresnet_arch import MSRResNet  # noqa: E402
from basicsr.data.prefetch_dataloader import PrefetchDataLoader  # noqa: E402
from basicsr.models import base_model  # noqa: E402
from basicsr.utils import FileClient, get_root_logger, imfrombytes, misc  # noqa: E402


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_apply_makes_basicsr_importable_in_silence():
    result = python("from rwkvir import compat; compat.apply(); compat.apply(); import basicsr.train")
    assert (result.returncode, result.stderr) == (0, "")


def test_importing_compat_imports_neither_torch_nor_basicsr():
    result = python("import sys, rwkvir.compat; assert not {'torch', 'basicsr', 'numpy', 'cv2'} & set(sys.modules)")
    assert result.returncode == 0, result.stderr


def make_model(folder: Path, **network: Any) -> base_model.BaseModel:
    """A model with one tiny network, its optimiser, and the folders of a run."""
    for name in ("models", "training_states"):
        (folder / name).mkdir(exist_ok=True)
    paths = {"models": str(folder / "models"), "training_states": str(folder / "training_states")}
    model = base_model.BaseModel({"num_gpu": 0, "is_train": True, "dist": False, "path": paths})
    model.net_g = MSRResNet(**{"num_feat": 4, "num_block": 1, "upscale": 2, **network})
    model.optimizers = [torch.optim.Adam(model.net_g.parameters())]
    return model


def save(model: base_model.BaseModel, iteration: int) -> None:
    model.save_network(model.net_g, "net_g", iteration)
    model.save_training_state(0, iteration)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """The folder of a run that was saved at iterations 5, 10 and 15."""
    model = make_model(tmp_path)
    for iteration in (5, 10, 15):
        save(model, iteration)
    return tmp_path


def resume_options(folder: Path, auto_resume: bool = True, resume_state: Path | None = None) -> dict[str, Any]:
    path = {"models": str(folder / "models"), "training_states": str(folder / "training_states")}
    path["resume_state"] = resume_state and str(resume_state)
    return {"auto_resume": auto_resume, "rank": 0, "path": path, "network_g": {}}


def damage(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def test_resumes_from_the_newest_state_wherever_the_process_stands(run_folder):
    options = resume_options(run_folder)
    assert basicsr.train.load_resume_state(options)["iter"] == 15
    assert options["resume"] == {"epoch": 0, "iter": 15}
    assert options["path"]["pretrain_network_g"] == str(run_folder / "models" / "net_g_15.pth")


@pytest.mark.parametrize("file", ["training_states/15.state", "models/net_g_15.pth"])
@pytest.mark.parametrize("harm", [damage, Path.unlink, lambda file: file.write_bytes(b"")])
def test_resumes_from_the_state_before_a_damaged_one(run_folder, capsys, file, harm):
    harm(run_folder / file)
    assert basicsr.train.load_resume_state(resume_options(run_folder))["iter"] == 10
    reported = "15.state" in capsys.readouterr().out
    assert reported == (run_folder / "training_states/15.state").exists()


def test_never_starts_afresh_over_states_that_are_all_damaged(run_folder):
    for state in (run_folder / "training_states").iterdir():
        damage(state)
    with pytest.raises(ValueError, match=r"none of the 3 training states .*15\.state .*without --auto_resume"):
        basicsr.train.load_resume_state(resume_options(run_folder))


def test_resume_state_is_honoured(run_folder):
    options = resume_options(run_folder, auto_resume=False, resume_state=run_folder / "training_states/5.state")
    assert basicsr.train.load_resume_state(options)["iter"] == 5
    assert basicsr.train.load_resume_state(resume_options(run_folder, auto_resume=False)) is None


def test_two_datasets_of_a_process_share_an_lmdb_across_forks(pictures):
    def read() -> int:
        return len(FileClient("lmdb", db_paths=[str(pictures / "gt.lmdb")], client_keys=["gt"]).get("picture0", "gt"))

    first, second = read(), read()
    child = os.fork()
    if child == 0:
        os._exit(0 if read() == first else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert first == second == read()


def test_a_missing_key_names_lmdb_and_key(pictures):
    client = FileClient("lmdb", db_paths=str(pictures / "gt.lmdb"))
    with pytest.raises(ValueError, match=r"gt\.lmdb has no key 'absent'"):
        client.get("absent")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_the_dataset_reaches_the_main_thread(workers):
    class Failing(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> int:
            if index == 2:
                raise ValueError("picture 2 is broken")
            return index

    loader = PrefetchDataLoader(num_prefetch_queue=1, dataset=Failing(), num_workers=workers)
    outcome: queue.Queue = queue.Queue()

    def consume() -> None:
        try:
            outcome.put(list(loader))
        except ValueError as error:
            outcome.put(error)

    threading.Thread(target=consume, daemon=True).start()
    assert "picture 2 is broken" in str(outcome.get(timeout=30))


def test_images_are_still_read(pictures):
    content = FileClient("disk").get(pictures / "gt" / "picture0.png")
    image = imfrombytes(content, float32=True)
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image, cv2.imread(str(pictures / "gt" / "picture0.png")).astype(np.float32) / 255)


@pytest.mark.parametrize("float32", [True, False])
@pytest.mark.parametrize("content", [b"", b"no image"])
def test_a_corrupt_image_is_named(tmp_path, content, float32):
    file = tmp_path / "broken.png"
    file.write_bytes(content)
    make_lmdb(tmp_path / "some.lmdb", [file])
    with pytest.raises(ValueError, match=r"broken\.png \(\d bytes\) is not an image"):
        imfrombytes(FileClient("disk").get(file), float32=float32)
    with pytest.raises(ValueError, match=r"broken in .*some\.lmdb"):
        imfrombytes(FileClient("lmdb", db_paths=str(tmp_path / "some.lmdb")).get("broken"), float32=float32)


def test_every_module_reads_images_with_the_checked_function():
    from basicsr.data import paired_image_dataset

    assert paired_image_dataset.imfrombytes is basicsr.utils.imfrombytes is imfrombytes


def test_a_full_disk_ends_training_and_keeps_the_older_file(run_folder, monkeypatch):
    def full(content: Any, file: Any) -> None:
        file.write(b"a part")
        raise OSError(28, "No space left on device")

    model, saved = make_model(run_folder), (run_folder / "models/net_g_15.pth").read_bytes()
    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(base_model.time, "sleep", lambda seconds: None)
    with pytest.raises(OSError, match=r"net_g_15\.pth \(.*No space left on device\); .*--auto_resume"):
        model.save_network(model.net_g, "net_g", 15)
    with pytest.raises(OSError, match=r"20\.state"):
        model.save_training_state(0, 20)
    assert (run_folder / "models/net_g_15.pth").read_bytes() == saved
    assert sorted(file.name for file in (run_folder / "training_states").iterdir()) == [
        "10.state",
        "15.state",
        "5.state",
    ]
    assert torch.save is full


def test_a_disk_that_recovers_is_no_error(tmp_path, monkeypatch):
    attempts, stock_save = [], torch.save

    def flaky(content: Any, file: Any) -> None:
        attempts.append(file)
        if len(attempts) < 3:
            raise OSError(5, "Input/output error")
        stock_save(content, file)

    monkeypatch.setattr(torch, "save", flaky)
    monkeypatch.setattr(base_model.time, "sleep", lambda seconds: None)
    model = make_model(tmp_path)
    model.save_network(model.net_g, "net_g", 1)
    assert set(torch.load(tmp_path / "models/net_g_1.pth")) == {"params"}


def test_a_checkpoint_of_another_configuration_is_one_sentence(run_folder):
    model = make_model(run_folder, num_feat=8, num_block=2)
    with pytest.raises(ValueError) as caught:
        model.load_network(model.net_g, str(run_folder / "models/net_g_5.pth"))
    text = str(caught.value)
    assert "net_g_5.pth" in text and "4 missing (first body.1.conv1.weight)" in text
    assert "of another shape (first conv_first.weight)" in text and text.endswith("path:strict_load_g: false")
    assert len(text) < 400


def test_a_fitting_checkpoint_loads_and_a_damaged_one_is_named(run_folder):
    get_root_logger()
    model, file = make_model(run_folder), run_folder / "models/net_g_5.pth"
    model.load_network(model.net_g, str(file))
    torch.testing.assert_close(model.net_g.state_dict(), torch.load(file)["params"])
    make_model(run_folder, num_feat=8).load_network(model.net_g, str(file), strict=False)
    with pytest.raises(ValueError, match=r"net_g_5\.pth has no parameters under the key 'nothing'"):
        torch.save({"something": {}}, file)
        model.load_network(model.net_g, str(file), param_key="nothing")
    damage(file)
    with pytest.raises(ValueError, match=r"cannot load .*net_g_5\.pth"):
        model.load_network(model.net_g, str(file))


def loader_options(options: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """`options` as parse_options completes them."""
    for phase, dataset in options["datasets"].items():
        dataset.update(phase=phase, scale=options["scale"])
    return {**options, "world_size": 1, "rank": 0, "dist": False, **changes}


@pytest.mark.parametrize("batch, num_gpu", [(1, 0), (4, 0), (10, 0), (2, 2)])
@pytest.mark.parametrize("total, epoch, done", [(20, 0, 0), (21, 0, 0), (20, 3, 7), (20, 9, 7), (20, 2, 20)])
def test_the_loop_gets_exactly_the_epochs_that_reach_total_iter(options, batch, num_gpu, total, epoch, done):
    options["datasets"]["train"]["batch_size_per_gpu"] = batch
    options["train"]["total_iter"] = total
    complete = loader_options(options, num_gpu=num_gpu, resume={"epoch": epoch, "iter": done})
    loader, _, _, total_epochs, total_iters = basicsr.train.create_train_val_dataloader(complete, get_root_logger())
    epochs = len(range(epoch, total_epochs + 1))
    assert total_iters == total
    assert epochs == math.ceil((total - done) / len(loader))


def test_a_batch_larger_than_the_dataset_is_an_error(options):
    options["datasets"]["train"]["batch_size_per_gpu"] = 11
    with pytest.raises(ValueError, match=r"10 pictures per process, less than a batch of 11; lower batch_size_per_gpu"):
        basicsr.train.create_train_val_dataloader(loader_options(options), get_root_logger())


def test_a_run_can_be_archived_three_times_in_a_row(tmp_path):
    run = tmp_path / "run"
    for attempt in range(4):
        misc.mkdir_and_rename(str(run))
        (run / str(attempt)).touch()
    assert len(list(tmp_path.glob("run_archived_*"))) == 3
