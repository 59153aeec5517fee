"""Every workaround for a version of BasicSR, torchvision or torch: one function each.

`apply()` makes BasicSR importable and comes before its first import; `patch_training()` repairs the training and test
loop and comes after BasicSR and all plugins are imported. Both do their work once per process.
"""

import atexit
import functools
import importlib.util
import math
import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any


@functools.cache
def apply() -> None:
    """Make `import basicsr` work. Call it before the first import of BasicSR, also in spawned workers."""
    torchvision_operators()
    functional_tensor()


@functools.cache
def patch_training() -> None:
    """Repair BasicSR's training and test loop. Call it after `apply()` and after all plugins are imported."""
    resume_anywhere()
    ddp_without_gpu()
    forked_workers()
    dead_workers()
    shared_lmdb()
    prefetcher_thread()
    corrupt_images()
    whole_checkpoints()
    safetensors_weights()
    checkpoint_mismatch()
    exact_training_length()
    iteration_seeds()
    undisturbed_validation()
    remaining_time()
    archive_names()


@functools.cache
def torchvision_operators() -> Any:
    """Symptom: `operator torchvision::nms does not exist` on `import torchvision`, when its operators were built for
    another torch (PyPI's CUDA build beside a CPU build of torch) and cannot be loaded. Nothing here calls them.

    Returns the library that holds their schemas; the cache keeps it alive. Delete when torchvision imports without.
    """
    import torch

    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401 - the schemas exist now

        return library
    return None


def functional_tensor() -> None:
    """Symptom: `No module named 'torchvision.transforms.functional_tensor'` with torchvision >= 0.17.

    Delete when BasicSR's data/degradations.py takes `rgb_to_grayscale` from torchvision.transforms.functional.
    """
    name = "torchvision.transforms.functional_tensor"
    if name in sys.modules or importlib.util.find_spec(name):
        return
    from torchvision.transforms.functional import rgb_to_grayscale

    module = ModuleType(name)
    module.rgb_to_grayscale = rgb_to_grayscale  # type: ignore[attr-defined]
    sys.modules[name] = module


def resume_anywhere() -> None:
    """Symptoms: resuming on a CPU ends in `Torch not compiled with CUDA enabled`, and on a GPU moves Adam's step
    counters there; `--auto_resume` looks below the current folder, not the run's root, and takes a truncated state.

    Also removes what a kill amid saving left behind, and notes the point of resumption as
    `opt['resume'] = {'epoch': int, 'iter': int}`. Delete when BasicSR's `load_resume_state` loads to the CPU, reads
    `opt['path']['training_states']` and passes over damaged files.
    """
    import basicsr.train
    import torch
    from basicsr.utils import check_resume

    def load_state(path: Path, opt: dict) -> dict:
        state = torch.load(path, map_location="cpu")
        ignored = opt["path"].get("ignore_resume_networks") or ()
        for network in (key for key in opt if key.startswith("network_") and key not in ignored):
            file = f"net_{network.removeprefix('network_')}_{state['iter']}.pth"
            torch.load(Path(opt["path"]["models"], file), map_location="cpu")
        return state

    def load_resume_state(opt: dict) -> dict | None:
        if opt["auto_resume"] and opt["rank"] == 0:
            for kind in ("models", "training_states"):
                for leftover in Path(opt["path"][kind]).glob("*.partial"):
                    leftover.unlink()
        saved = Path(opt["path"]["training_states"]).glob("*.state") if opt["auto_resume"] else ()
        candidates = sorted(saved, key=lambda path: float(path.stem), reverse=True)
        if not candidates and opt["path"].get("resume_state"):
            candidates = [Path(opt["path"]["resume_state"])]
        for path in candidates:
            try:
                state = load_state(path, opt)
            except Exception as error:  # a damaged file raises whatever its bytes happen to mean
                reason = " ".join(str(error).split())[:200]
                if opt["rank"] == 0:
                    print(f"Cannot resume from {path}: {type(error).__name__}: {reason}", flush=True)
                continue
            opt["path"]["resume_state"] = str(path)
            opt["resume"] = {"epoch": state["epoch"], "iter": state["iter"]}
            check_resume(opt, state["iter"])
            return state
        if candidates:
            raise ValueError(
                f"none of the {len(candidates)} training states can be resumed from, the newest being {candidates[0]} "
                f"(the last one fails with {reason}); start afresh without --auto_resume and path:resume_state"
            )
        return None

    basicsr.train.load_resume_state = load_resume_state


def ddp_without_gpu() -> None:
    """Symptom: `--launcher pytorch` on a machine without a GPU ends in `ZeroDivisionError`, then in an error about
    device_ids; `--launcher slurm` ends in the former. Delete when BasicSR chooses gloo and plain
    DistributedDataParallel there.
    """
    import torch
    from basicsr.models.base_model import BaseModel
    from basicsr.utils import dist_util
    from torch.nn.parallel import DistributedDataParallel

    stock_init, stock_to_device = dist_util._init_dist_pytorch, BaseModel.model_to_device
    stock_slurm = dist_util._init_dist_slurm

    def init_dist_pytorch(backend: str, **options: Any) -> None:
        if torch.cuda.is_available():
            stock_init(backend, **options)
        else:
            torch.distributed.init_process_group("gloo", **options)

    def init_dist_slurm(backend: str, port: int | None = None) -> None:
        if not torch.cuda.is_available():
            raise ValueError(
                "--launcher slurm needs a GPU, and torch sees none; start the processes inside the job with: "
                "srun torchrun ... -m rwkvir train -opt FILE.yml --launcher pytorch"
            )
        stock_slurm(backend, port)

    def model_to_device(self: Any, net: torch.nn.Module) -> torch.nn.Module:
        if self.opt["dist"] and self.device.type == "cpu":
            unused = self.opt.get("find_unused_parameters", False)
            return DistributedDataParallel(net.to(self.device), find_unused_parameters=unused)
        return stock_to_device(self, net)

    dist_util._init_dist_pytorch = init_dist_pytorch
    dist_util._init_dist_slurm = init_dist_slurm
    BaseModel.model_to_device = model_to_device


def forked_workers() -> None:
    """Symptom: with a launcher, training with workers is ten times slower, because BasicSR chooses the start method
    spawn and each worker imports everything again in each epoch. Delete when BasicSR keeps its workers or forks them.
    """
    import torch.multiprocessing

    if torch.multiprocessing.get_start_method(allow_none=True) is None:
        torch.multiprocessing.set_start_method("fork")


def dead_workers() -> None:
    """Symptom: a signal to all processes of a run (Ctrl-C, a batch system's SIGTERM) is told as the death of a worker,
    with a traceback, when that is noticed first. Delete when torch's DataLoader reports a dead worker only where it
    reads from it.
    """
    from torch.utils.data._utils import signal_handling

    stock = signal_handling._error_if_any_worker_fails

    def error_if_any_worker_fails() -> None:
        try:
            stock()
        except RuntimeError:
            time.sleep(0.3)  # the signal may be on its way here; its handler then raises
            raise

    signal_handling._error_if_any_worker_fails = error_if_any_worker_fails


_environments: dict[str, tuple[Any, Any]] = {}


def lmdb_environment(path: str) -> Any:
    """The one read-only, lock-free `lmdb.Environment` of the LMDB folder `path` in this process, opened at first use.

    One that came over in a fork, or whose file has been replaced since, is closed (in this process only) and opened
    anew. Raises lmdb.Error, also for a file that is shorter than its header says: reading behind its end would kill the
    process with SIGBUS.
    """
    import lmdb

    path = os.path.realpath(path)
    try:
        file = os.stat(os.path.join(path, "data.mdb"))
    except OSError as error:
        raise lmdb.Error(f"data.mdb: {error.strerror}") from error
    opened_as = os.getpid(), file.st_dev, file.st_ino
    was, environment = _environments.get(path, (None, None))
    if was != opened_as:
        if environment is not None:
            environment.close()
        environment = lmdb.open(path, readonly=True, lock=False, readahead=False)
        _environments[path] = opened_as, environment
    size = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if file.st_size < size:
        raise lmdb.CorruptedError(f"data.mdb is truncated: {file.st_size} of {size} bytes")
    return environment


def shared_lmdb() -> None:
    """Symptoms: `The environment ... is already open in this process` with lmdb >= 3, when two datasets read one LMDB;
    a missing key arrives as `a bytes-like object is required, not 'NoneType'`.

    Other options of the back end (readonly, lock, readahead) are accepted and always at BasicSR's defaults. Delete when
    BasicSR's LmdbBackend shares its environments and reports missing keys.
    """
    from basicsr.utils.file_client import FileClient, LmdbBackend

    class SharedLmdbBackend(LmdbBackend):
        def __init__(self, db_paths: str | list[str], client_keys: str | list[str] = "default", **_: Any) -> None:
            paths = [db_paths] if isinstance(db_paths, str) else db_paths
            keys = [client_keys] if isinstance(client_keys, str) else client_keys
            self.paths = dict(zip(keys, paths, strict=True))

        def get(self, filepath: str, client_key: str = "default") -> bytes:
            with lmdb_environment(self.paths[client_key]).begin() as transaction:
                value = transaction.get(str(filepath).encode("ascii"))
            if value is None:
                raise ValueError(
                    f"{self.paths[client_key]} has no key '{filepath}': its meta_info.txt and data.mdb do not belong "
                    "together; make the LMDB again"
                )
            return value

    FileClient._backends["lmdb"] = SharedLmdbBackend


def prefetcher_thread() -> None:
    """Symptoms: with `prefetch_mode: cpu` training hangs for ever when the dataset raises, since only the prefetching
    thread sees the error; an interrupted run can end in `terminate called without an active exception` (SIGABRT), when
    the interpreter is torn down under that thread. Delete when BasicSR's PrefetchGenerator passes errors on and ends.
    """
    from basicsr.data.prefetch_dataloader import PrefetchGenerator

    stock_next = PrefetchGenerator.__next__
    threads: weakref.WeakSet[Any] = weakref.WeakSet()
    exiting = threading.Event()

    def run(self: Any) -> None:
        threads.add(self)
        self.error = None
        try:
            for batch in self.generator:
                if exiting.is_set():
                    return
                self.queue.put(batch)
        except Exception as error:
            self.error = error
        self.queue.put(None)

    def next_item(self: Any) -> Any:
        try:
            return stock_next(self)
        except StopIteration:
            if self.error is not None:
                raise self.error from None
            raise

    def end_threads() -> None:
        exiting.set()
        deadline = time.monotonic() + 10  # a DataLoader takes 5 s to notice that its workers are gone
        for thread in list(threads):
            while thread.is_alive() and time.monotonic() < deadline:
                with suppress(queue.Empty):
                    thread.queue.get_nowait()  # it may wait for room
                thread.join(0.05)

    PrefetchGenerator.run = run
    PrefetchGenerator.__next__ = next_item
    atexit.register(end_threads)


class _FileBytes(bytes):
    """The content of a file, and where it came from."""

    source = "an image"


def corrupt_images() -> None:
    """Symptom: a file that is no image ends in `'NoneType' object has no attribute 'astype'` and is not named.

    Delete when BasicSR's imfrombytes raises and its callers name the file.
    """
    import cv2
    from basicsr.utils import img_util
    from basicsr.utils.file_client import FileClient

    stock_get, stock_imfrombytes = FileClient.get, img_util.imfrombytes

    def get(self: Any, filepath: str, client_key: str = "default") -> bytes:
        content = _FileBytes(stock_get(self, filepath, client_key))
        lmdb = f" in {self.client.paths[client_key]}" if self.backend == "lmdb" else ""
        content.source = f"{filepath}{lmdb}"
        return content

    def imfrombytes(content: bytes, flag: str = "color", float32: bool = False) -> Any:
        try:
            image = stock_imfrombytes(content, flag, float32)
        except (AttributeError, cv2.error):
            image = None
        if image is None:
            source = getattr(content, "source", "an image")
            raise ValueError(
                f"{source} ({len(content)} bytes) is not an image that OpenCV can read; replace or remove it"
            )
        return image

    FileClient.get = get
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and vars(module).get("imfrombytes") is stock_imfrombytes:
            module.imfrombytes = imfrombytes  # type: ignore[attr-defined]


@contextmanager
def _atomic_torch_save() -> Iterator[None]:
    """Lets torch.save write beside its target and rename; raises OSError at the end if the last attempt failed."""
    import torch

    stock_save = torch.save
    failures: list[tuple[str, BaseException]] = []

    def save(content: Any, path: str) -> None:
        aside = f"{path}.partial"
        try:
            with open(aside, "wb") as file:
                stock_save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
            failures.clear()
        except BaseException as error:
            Path(aside).unlink(missing_ok=True)
            failures.append((path, error))
            raise

    torch.save = save  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.save = stock_save
    if failures:
        path, error = failures[-1]
        raise OSError(f"cannot save {path} ({error}); make room there and continue with --auto_resume") from error


def whole_checkpoints() -> None:
    """Symptoms: a run killed while it saves leaves a truncated checkpoint under the final name; on a full disk training
    goes on for days without saving anything. Delete when BasicSR's save methods rename and raise.
    """
    from basicsr.models.base_model import BaseModel

    BaseModel.save_network = _atomic_torch_save()(BaseModel.save_network)
    BaseModel.save_training_state = _atomic_torch_save()(BaseModel.save_training_state)


def safetensors_weights() -> None:
    """Symptom: path:pretrain_network_g takes no .safetensors file. Such a file holds one set of parameters, and
    path:param_key_g means nothing for it. Delete when BasicSR's load_network reads them.
    """
    from basicsr.models.base_model import BaseModel

    stock = BaseModel.load_network

    def load_network(self: Any, net: Any, load_path: str, strict: bool = True, param_key: Any = "params") -> None:
        if not load_path.endswith(".safetensors"):
            return stock(self, net, load_path, strict, param_key)
        from safetensors.torch import load_file

        loaded = load_file(load_path)
        self._print_different_keys_loading(net, loaded, strict)
        self.get_bare_model(net).load_state_dict(loaded, strict=strict)

    BaseModel.load_network = load_network


def checkpoint_mismatch() -> None:
    """Symptom: a checkpoint of another configuration ends in pages of key names, a damaged one in an error of the zip
    reader, neither with the file's name at hand. Delete when BasicSR's load_network sums them up.
    """
    from basicsr.models.base_model import BaseModel

    stock_load, stock_compare = BaseModel.load_network, BaseModel._print_different_keys_loading

    def compare(self: Any, net: Any, loaded: dict, strict: bool = True) -> None:
        if not strict:
            return stock_compare(self, net, loaded, strict)
        wanted = self.get_bare_model(net).state_dict()
        differences = {
            "missing": [key for key in wanted if key not in loaded],
            "unexpected": [key for key in loaded if key not in wanted],
            "of another shape": [k for k in wanted if k in loaded and wanted[k].shape != loaded[k].shape],
        }
        counts = [f"{len(keys)} {kind} (first {keys[0]})" for kind, keys in differences.items() if keys]
        if counts:
            raise ValueError(
                f"its keys do not fit the network: {', '.join(counts)} of {len(wanted)}; give the network the options "
                "that it was trained with or, to train from what fits, set path:strict_load_g: false"
            )

    def load_network(
        self: Any, net: Any, load_path: str, strict: bool = True, param_key: str | None = "params"
    ) -> None:
        try:
            stock_load(self, net, load_path, strict, param_key)
        except FileNotFoundError:
            raise
        except KeyError as error:
            raise ValueError(f"{load_path} has no parameters under the key {error}; set path:param_key_g") from error
        except Exception as error:
            raise ValueError(f"cannot load {load_path}: {error}") from error

    BaseModel._print_different_keys_loading = compare
    BaseModel.load_network = load_network


def exact_training_length() -> None:
    """Symptoms: training ends before total_iter without a word, as BasicSR counts the iterations of an epoch without
    drop_last and DataParallel; a batch larger than the dataset trains nothing and reports success.

    Delete when BasicSR counts an epoch by len(train_loader).
    """
    import basicsr.train

    stock = basicsr.train.create_train_val_dataloader

    def create_train_val_dataloader(opt: dict, logger: Any) -> tuple:
        loader, sampler, val_loaders, _, total_iters = stock(opt, logger)
        if len(loader) == 0:
            raise ValueError(
                f"datasets:train holds {len(sampler)} pictures per process, less than a batch of {loader.batch_size}; "
                "lower batch_size_per_gpu or raise dataset_enlarge_ratio"
            )
        done = opt.get("resume", {"epoch": 0, "iter": 0})
        begun_at = done["iter"] - getattr(sampler, "skipped", 0)  # the epoch to resume
        epochs = math.ceil((total_iters - begun_at) / len(loader))
        logger.info(f"An epoch has {len(loader)} full batches; {epochs} epochs reach iteration {total_iters}.")
        last_epoch = done["epoch"] + epochs - 1
        return loader, sampler, val_loaders, last_epoch, total_iters

    basicsr.train.create_train_val_dataloader = create_train_val_dataloader


def iteration_seeds() -> None:
    """Symptom: a resumed run draws other random numbers (dropout, drop path, degradations in the model) than the run
    would have drawn without the interruption. Seeds them for each iteration by (manual_seed, rank, iteration).

    Delete when BasicSR's training state holds them.
    """
    import torch
    from basicsr.models.base_model import BaseModel

    from rwkvir_data.enlarged_sampler import seed_all

    stock = BaseModel.update_learning_rate

    def update_learning_rate(self: Any, current_iter: int, warmup_iter: int = -1) -> None:
        seed_all(self.opt["manual_seed"], self.opt["rank"], current_iter)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(torch.initial_seed())
        stock(self, current_iter, warmup_iter)

    BaseModel.update_learning_rate = update_learning_rate


def undisturbed_validation() -> None:
    """Symptoms: with a launcher, rank 0 validates through DistributedDataParallel, which sends the buffers of batch
    normalisation to processes that are training; the last validation is done again, as of iteration total_iter + 1.

    Delete when BasicSR validates the bare network, and does not leave the loop one iteration late.
    """
    from basicsr.models.base_model import BaseModel

    stock = BaseModel.validation

    def validation(self: Any, dataloader: Any, current_iter: Any, tb_logger: Any, save_img: bool = False) -> None:
        if self.is_train:
            current_iter = min(current_iter, int(self.opt["train"]["total_iter"]))
            done = self.__dict__.setdefault("validated", {})
            if done.get(dataloader) == current_iter:
                return
            done[dataloader] = current_iter
        wrapped = self.net_g
        self.net_g = self.get_bare_model(wrapped)
        try:
            stock(self, dataloader, current_iter, tb_logger, save_img)
        finally:
            self.net_g = wrapped

    BaseModel.validation = validation


def remaining_time() -> None:
    """Symptom: the last line of a log says `eta: -1 day, 23:59:59`. Delete when BasicSR's MessageLogger counts the
    iterations that are left without subtracting one more.
    """
    from basicsr.utils import MessageLogger

    stock = MessageLogger.__init__

    def init(self: Any, opt: dict, start_iter: int = 1, tb_logger: Any = None) -> None:
        stock(self, opt, start_iter, tb_logger)
        self.max_iters = int(self.max_iters) + 1

    MessageLogger.__init__ = init


def archive_names() -> None:
    """Symptom: `Directory not empty`, when a run is archived twice within a second: its archives get the same name.

    Delete when BasicSR's mkdir_and_rename finds a free name.
    """
    import basicsr.train
    from basicsr.utils import misc

    stock = misc.mkdir_and_rename

    def mkdir_and_rename(path: str) -> None:
        while os.path.exists(f"{path}_archived_{misc.get_time_str()}"):
            time.sleep(0.1)
        stock(path)

    misc.mkdir_and_rename = basicsr.train.mkdir_and_rename = mkdir_and_rename
