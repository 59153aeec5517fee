"""What only a GPU can show: streams, CUDA graphs, tensors beyond 2^31 elements. What the operator computes there is
tested by test_bi_wkv.py, which runs on every device there is."""

import pytest
import torch

from rwkvir_arch import cross_bi_wkv

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def example(*shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """w, u, k, v, gate and gy, for (B, H, W, C)."""
    generator = torch.Generator("cuda").manual_seed(0)
    w, u = torch.randn(2, 2, shape[-1], generator=generator, device="cuda").unbind()
    images = torch.randn(4, *shape, generator=generator, device="cuda", dtype=dtype).unbind()
    return [w / (shape[1] * shape[2]), u, *images]


def both_passes(w, u, k, v, gate, gy):
    y, state = torch.ops.rwkvir.wkv(w, u, k, v, gate)
    return [y, *torch.ops.rwkvir.wkv_backward(gy, w, u, k, v, gate, state)]


def test_every_run_gives_the_same_bits():
    inputs = example(2, 60, 70, 60)
    first = both_passes(*inputs)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, both_passes(*inputs), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_cuda_graph_replays_both_passes(dtype):
    inputs = example(2, 20, 30, 20, dtype=dtype)
    other = [x + 1 for x in inputs]
    want = both_passes(*other)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = both_passes(*inputs)
    for x, y in zip(inputs, other, strict=True):
        x.copy_(y)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_current_stream_is_used():
    w, u, k, v, gate, _ = example(1, 100, 100, 20)
    want = cross_bi_wkv(w, u, k, v, gate)
    torch.cuda.synchronize()
    late, stream = torch.empty_like(k), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # cycles; on another stream, the operator would read `late` before it is written
        late.copy_(k)
        y = cross_bi_wkv(w, u, late, v, gate)
    stream.synchronize()
    assert torch.equal(y, want)


def test_more_than_2_to_the_31_elements():
    B, H, W, C = 2, 4096, 4352, 61  # 1.01 * 2^31
    if torch.cuda.mem_get_info()[0] < 32 * 2**30:
        pytest.skip("less than 32 GiB of free GPU memory")
    w, u, *_ = example(1, 1, 1, C)
    k, v = (torch.randn(B, H, W, C, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    y, _ = torch.ops.rwkvir.wkv(w[:1] / (H * W), u[:1], k, v)
    last, _ = torch.ops.rwkvir.wkv(w[:1] / (H * W), u[:1], k[1:].clone(), v[1:].clone())
    assert torch.equal(y[1:], last)
