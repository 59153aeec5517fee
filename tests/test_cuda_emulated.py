"""The CUDA kernels, run on the CPU: compiled by g++ against the shim in tests/cuda_on_cpu, and held to the reference.

What this shows: the arithmetic, every index, and that no thread reads what another writes without a barrier between.
What it cannot show: what only a GPU does, such as launch limits, its own exp and division, and speed.

Blocks, and the threads of a block between two barriers, run in random orders; shared memory, workspace and outputs
start as NaN, and so does a margin around every tensor, which must come back untouched.
"""

import ctypes
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_bi_wkv import (
    BACKWARD,
    FORWARD,
    assert_matches_reference,
    example,
    gradients,
    large_values_in_the_neighbouring_chunk,
    largest_finite_numbers,
    limits_of_float,
)

from rwkvir_arch import bi_wkv, cross_bi_wkv
from rwkvir_arch.bi_wkv import CHUNK, LANES

SOURCE = Path(__file__).parents[1] / "csrc" / "bi_wkv_cuda.cu"
SHIM = Path(__file__).with_name("cuda_on_cpu")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # in the order of wkv::DType
MARGIN = 64  # elements

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")


class View(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("dtype", ctypes.c_int), ("strides", ctypes.c_int64 * 4))


class Scan(ctypes.Structure):
    _fields_ = (
        ("sizes", ctypes.c_int64 * 4),  # B, outer, inner, C
        *((name, ctypes.c_void_p) for name in ("w", "u")),
        *((name, View) for name in ("k", "v", "y", "gy", "gk", "gv", "gate", "ggate")),
        *((name, ctypes.c_void_p) for name in ("rates", "state", "gstate", "partial")),
        ("accumulate", ctypes.c_bool),
    )


def build(text, folder, checks=("-fsanitize=undefined,float-cast-overflow",)):
    """The text of csrc/bi_wkv_cuda.cu as a library of functions of the CPU."""
    text = re.sub(r"([\w:]+(?:<[\w, ]+>)?)<<<(.+?)>>>\((.*?)\);", r"cuda_on_cpu::launch(\2, [=] { \1(\3); });", text)
    text = re.sub(r"__shared__ (.+?) (\w+)((?:\[.+?\])*);", r"auto& \2 = cuda_on_cpu::shared<\1\3>(__LINE__);", text)
    text, replaced = re.subn(
        r"kExactBlocks = \d+", "kExactBlocks = 2", text
    )  # so that a block has much to look through
    assert "<<<" not in text and "__shared__" not in text and replaced == 1
    (folder / "kernels.cpp").write_text(f'#line 1 "{SOURCE}"\n{text}')
    information = Path("/proc/cpuinfo")
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas", f"-I{SHIM}", f"-I{SOURCE.parent}"]
    flags += checks
    if information.exists() and " fma " in information.read_text():
        flags += ["-mfma", "-ffp-contract=fast"]  # as nvcc contracts
    command = ["g++", *flags, SHIM / "driver.cpp", folder / "kernels.cpp", "-o", folder / "kernels.so"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder / "kernels.so"


def load(path):
    library = ctypes.CDLL(str(path))
    library.scan_size.restype = library.flag_count.restype = ctypes.c_int64
    for name in ("forward", "backward", "skip_a_barrier", "part_at_barriers"):
        getattr(library, name).restype = ctypes.c_char_p
    assert library.scan_size() == ctypes.sizeof(Scan)
    return library


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return load(build(SOURCE.read_text(), tmp_path_factory.mktemp("cuda_on_cpu")))


class Call:
    """One call of the operator, as csrc/bindings.cpp makes it: (S, C) w and u, (B, H, W, C) k, v and gate."""

    def __init__(self, library, w, u, k, v, gate=None):
        self.library, self.memories = library, []
        self.count = w.shape[0]
        self.w, self.u, self.k, self.v = self.copy(w.double()), self.copy(u.double()), self.copy(k), self.copy(v)
        self.gate = None if gate is None else self.copy(gate)
        tokens, C = k.shape[1] * k.shape[2], k.shape[3]
        self.chunks, self.lanes = -(-tokens // CHUNK), -(-C // LANES) * LANES
        self.flags = self.empty((library.flag_count(self.scans({}, {}), self.count),), dtype=torch.uint8)

    def empty(self, shape, strides=None, dtype=torch.float64):
        """A tensor that nobody has written: every byte of it and of the margins around it is 255."""
        strides = strides or torch.empty(shape, device="meta").stride()
        extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        memory = torch.full(((extent + 2 * MARGIN) * dtype.itemsize,), 255, dtype=torch.uint8)
        self.memories.append((memory, MARGIN * dtype.itemsize))
        return memory.view(dtype).as_strided(shape, strides, MARGIN)

    def copy(self, x):
        result = self.empty(x.shape, x.stride(), x.dtype)
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())
        result[once] = x[once]
        return result

    def output_like(self, x):
        dtype = torch.float32 if self.count == 2 and x.element_size() == 2 else x.dtype
        return self.empty(x.shape, torch.empty_like(x).stride(), dtype)

    def state(self):
        return self.empty((self.count, self.k.shape[0], self.chunks, 6, self.lanes))

    def scans(self, views, pointers):
        """Of the tensors in `pointers`, a row belongs to each scan."""
        return (Scan * self.count)(*(self.scan(index, views, pointers) for index in range(self.count)))

    def scan(self, index, views, pointers):
        axes = (0, 1, 2, 3) if index == 0 else (0, 2, 1, 3)
        scan = Scan(sizes=tuple(self.k.shape[a] for a in axes), accumulate=index == 1)
        if self.gate is not None and (index == self.count - 1 or "gy" in views):
            views = {"gate": self.gate, **views}
        for name, x in {"k": self.k, "v": self.v, **views}.items():
            strides = tuple(x.stride(a) for a in axes)
            setattr(scan, name, View(data=x.data_ptr(), dtype=DTYPES.index(x.dtype), strides=strides))
        for name, x in {"w": self.w, "u": self.u, **pointers}.items():
            setattr(scan, name, x[index].data_ptr())
        return scan

    def run(self, function, scans, *pointers):
        error = function(scans, self.count, *(ctypes.c_void_p(x.data_ptr()) for x in (self.flags, *pointers)))
        assert error is None, error.decode()
        for memory, margin in self.memories:
            assert (memory[:margin] == 255).all() and (memory[-margin:] == 255).all(), "written beyond a tensor"

    def forward(self):
        y, state = self.output_like(self.k), self.state()
        self.run(self.library.forward, self.scans({"y": y}, {"state": state}))
        return y.to(self.k.dtype), state

    def backward(self, gy, state):
        gw, gu = self.empty(self.w.shape), self.empty(self.u.shape)
        likes = {"gk": self.k, "gv": self.v} if self.gate is None else {"gk": self.k, "gv": self.v, "ggate": self.gate}
        out = {name: self.output_like(like) for name, like in likes.items()}
        partial = self.empty((self.count, self.k.shape[0] * self.chunks, 2, self.lanes))
        pointers = {"state": self.copy(state), "gstate": self.state(), "partial": partial}
        self.run(self.library.backward, self.scans({"gy": self.copy(gy), **out}, pointers), gw, gu)
        return gw, gu, out["gk"], out["gv"], out.get("ggate")


def emulated(library):
    """What stands in for rwkvir_arch.bi_wkv._wkv: the CUDA kernels, on tensors of the CPU."""

    class Emulated(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            y, state = Call(library, *inputs).forward()
            ctx.save_for_backward(*inputs, state)
            return y

        @staticmethod
        def backward(ctx, gy):
            *inputs, state = ctx.saved_tensors
            results = Call(library, *inputs).backward(gy, state)
            return tuple(x if x is None else x.to(like.dtype) for x, like in zip(results, inputs, strict=False))

    return Emulated.apply


@pytest.fixture(autouse=True)
def operator_on_emulated_cuda(kernels, monkeypatch, capfd):
    torch.manual_seed(0)
    monkeypatch.setattr(sys.modules["rwkvir_arch.bi_wkv"], "_wkv", emulated(kernels))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with tensors this small, more would wait for each other
    yield
    torch.set_num_threads(threads)
    assert "runtime error" not in (report := capfd.readouterr().err), report  # the words of g++'s sanitizers


def forward_and_gradients(inputs, gy):
    return gradients(cross_bi_wkv if inputs[0].dim() == 2 else bi_wkv, inputs, gy)


def one_channel(tensors, c):
    return [x[..., c : c + 1] for x in tensors]


def assert_every_channel_matches(inputs, gy):
    """As every channel on its own does, whose largest value is then the measure of its error."""
    together = forward_and_gradients(inputs, gy)
    for c in range(inputs[2].shape[-1]):
        alone = one_channel(inputs, c), gy[..., c : c + 1]
        for got, want in zip(one_channel(together, c), forward_and_gradients(*alone), strict=True):
            assert torch.equal(got, want), f"channel {c}"
        assert_matches_reference(*alone)


@pytest.mark.parametrize(
    "dtype, T",
    [
        *itertools.product((torch.float32, torch.float64), (1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 200)),
        *itertools.product((torch.float16, torch.bfloat16), (9, 200)),
    ],
)
@pytest.mark.parametrize("C", [1, 16, 37])
def test_lengths(C, T, dtype):
    assert_matches_reference(example(2, T, C, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 1, 70, 17), (2, 70, 1, 17), (1, 13, 5, 33), (2, 9, 8, 70)])
def test_both_orders(shape, dtype):
    assert_matches_reference(example(*shape, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 7, 20, 17), (1, 30, 3, 5)])
def test_gate(shape, dtype):
    w, u, k, v = example(*shape, dtype=dtype)
    k[..., :2] *= 1e4 if dtype != torch.float16 else 1e3  # beyond what float will do for
    gate = torch.randn(shape).mul(10).to(dtype)
    gate[..., -1] = 100
    gate[..., 0, 0] = -torch.inf
    assert_matches_reference([w, u, k, v, gate])
    assert_matches_reference([w, u, k, v, gate.transpose(1, 2).contiguous().transpose(1, 2)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 64 * 63 + 1, 5), (1, 64, 66, 5), (1, 64 * 257, 5)])
def test_threads_of_a_carry_with_several_chunks(shape, dtype):
    inputs = example(*shape, dtype=dtype, decay=50.0)
    gy = torch.randn(shape).to(dtype)
    w, u, k, v = (x.double() for x in inputs)
    if len(shape) == 3:
        w, u, k, v = w[None], u[None], k[:, None], v[:, None]
    y, state = torch.ops.rwkvir.wkv(w, u, k, v)  # the CPU's, which other tests hold to the reference
    want = [y, *torch.ops.rwkvir.wkv_backward(gy.double().view(y.shape), w, u, k, v, None, state)[:4]]
    for i, (ours, theirs) in enumerate(zip(forward_and_gradients(inputs, gy), want, strict=True)):
        tolerance = (BACKWARD if i else FORWARD)[dtype]
        assert (ours.double() - theirs.view(ours.shape)).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 150, 37), (1, 10, 15, 37)])
def test_single_channels_and_chunks_that_need_the_exact_path(shape, dtype):
    w, u, k, v = example(*shape, dtype=dtype)
    gy = torch.randn(shape).to(dtype)
    k, v, gy = (x.flatten(1, -2) for x in (k, v, gy))
    k[..., 1] *= 1e5
    w[..., 3] = 5.0
    u[..., 5] = 100.0
    k[:, 70, 7], k[:, 90, 7] = 80, -1000
    gy[..., 9] *= 1e30
    k[:, 20:140, 11] = -torch.inf
    v[:, 100:, 13] *= 1e-30
    v[:, :64, 15] = 0
    gy[:, :64, 17] = 0
    k[:, :, 19] += torch.linspace(0, 300, k.shape[1]).to(dtype)
    w[..., 21] = -0.4
    k[:, :64, 35] = -torch.inf
    k[:, :, 36] *= 1e4
    assert_every_channel_matches([w, u, k.view(shape), v.view(shape)], gy.view(shape))


def test_one_chunk_of_the_last_channel_needs_the_exact_path():
    w, u, k, v = example(1, 200, 37)
    k[:, 64:128, 36] *= 1e5
    assert_matches_reference([w, u, k, v])


def test_the_limits_of_float():
    for inputs, gy in limits_of_float():
        assert_matches_reference(inputs, gy=gy)
    assert_matches_reference(large_values_in_the_neighbouring_chunk())


def test_extremes_in_float64():
    w, u, k, v = example(1, 150, 6, dtype=torch.float64)
    k[..., 0] *= 1e10
    w[1] = -100.0
    u[2] = -1e4
    k[:, 20:140, 3] = -torch.inf
    v[..., 4] *= 1e150
    gy = torch.randn(1, 150, 6, dtype=torch.float64)
    gy[..., 5] *= 1e150
    assert_every_channel_matches([w, u, k, v], gy)


def test_the_largest_finite_numbers_stay_finite():
    assert all(bi_wkv(*inputs).isfinite().all() for inputs in largest_finite_numbers())


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_channel_and_batch(dtype):
    inputs, gy = example(2, 130, 40, dtype=dtype), torch.randn(2, 130, 40).to(dtype)
    clean = forward_and_gradients(inputs, gy)
    inputs[2][0, 7, 3] = inputs[3][1, 80, 5] = gy[0, 129, 33] = torch.nan
    y, gw, gu, gk, gv = results = forward_and_gradients(inputs, gy)
    assert y[0, :, 3].isnan().all() and y[1, :, 5].isnan().all()
    assert gk[0, :, 3].isnan().all() and gv[0, :, 3].isnan().all()
    assert gk[1, :, 5].isnan().all() and gk[0, :, 33].isnan().all() and gv[0, :, 33].isnan().all()
    assert gw[[3, 5, 33]].isnan().all() and gu[[3, 5, 33]].isnan().all()
    touched = torch.zeros(2, 130, 40, dtype=torch.bool)
    touched[0, :, 3] = touched[1, :, 5] = touched[0, :, 33] = True
    for got, want in zip(results, clean, strict=True):
        others = ~(touched if got.dim() == 3 else touched.any(dim=(0, 1)))
        assert torch.equal(got[others], want[others])


def test_keys_of_minus_infinity_are_masks():
    w, u, k, v = example(1, 130, 20)
    k[:, 40:125] = -torch.inf
    v[:, 60] = torch.nan
    masked = v.masked_fill(k == -torch.inf, 0)
    assert torch.allclose(bi_wkv(w, u, k, v), bi_wkv(w, u, k, masked), rtol=0, atol=2e-6)


def test_any_strides():
    w, u, _, _ = example(2, 13, 11, 20)
    _, _, k, v = example(2, 20, 11, 13)
    channels_first = [x.permute(0, 3, 2, 1) for x in (k, v)]
    expanded = [torch.randn(1, 13, 1, 20).expand(2, 13, 11, 20), torch.randn(20).expand(2, 13, 11, 20)]
    sliced = [torch.randn(2, 26, 11, 40)[:, ::2, :, 1::2], torch.randn(2, 13, 33, 20)[:, :, ::3]]
    gy = torch.randn(2, 20, 11, 13).permute(0, 3, 2, 1)
    for k, v in (channels_first, expanded, sliced):
        assert_matches_reference([w, u, k, v])
        results = forward_and_gradients([w, u, k, v], gy)
        contiguous = forward_and_gradients([w, u, k.contiguous(), v.contiguous()], gy.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(results, contiguous, strict=True))


def test_the_shim_reports_barriers_that_threads_skip(kernels):
    assert b"returned before a barrier" in kernels.skip_a_barrier()
    assert b"wait at different barriers" in kernels.part_at_barriers()


def test_offsets_beyond_32_bits(kernels, tmp_path):
    class WithoutCopies(Call):
        def copy(self, x):
            return x

    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2**32, dtype=torch.float16)
    w, u, _, _ = example(2, 1, 70, 3)
    near = torch.randn(3, 2, 1, 70, 3).half()  # k, v and the gate
    for batch_stride, token_stride in ((2**31 + 64, 16), (16, 2**25)):
        far = memory.as_strided(near.shape, (4, batch_stride, 1, token_stride, 1)).copy_(near)
        for x, y in ((near, far), (near.transpose(2, 3), far.transpose(2, 3))):
            results = [WithoutCopies(kernels, w[:1], u[:1], *tensors).forward()[0] for tensors in (x, y)]
            assert torch.equal(*results)


BARRIERS = [match.start() for match in re.finditer(r"__syncthreads\(\);", SOURCE.read_text())]


def check(path):
    """Raises an AssertionError, or crashes, if the kernels in that library race."""
    torch.manual_seed(0)
    sys.modules["rwkvir_arch.bi_wkv"]._wkv = emulated(load(path))
    for shape in ((1, 20, 20, 20), (2, 1, 130, 70)):
        for dtype in (torch.float32, torch.float64):
            assert_matches_reference(example(*shape, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("barrier", [None, *range(len(BARRIERS))])
def test_every_barrier_is_needed(barrier, tmp_path):
    text = SOURCE.read_text()
    if barrier is not None:
        place = BARRIERS[barrier]
        text = f"{text[:place]}{text[place:].replace('__syncthreads();', '', 1)}"
    path = build(text, tmp_path, checks=())
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_cuda_emulated as t; "
    run = subprocess.run([sys.executable, "-c", f"{code} t.check({str(path)!r})"], capture_output=True)
    assert (run.returncode == 0) == (barrier is None), run.stderr.decode()
