"""Launches go to the device of the tensors and to the stream that is current there."""

import json

import pytest
import torch
from catalogue import OPS, run, upstream
from compiling import printed_where_kernels_compile

from primer_fast.train.cuda_graphs import WARM_UP

ops = pytest.mark.parametrize("name", OPS)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="streams need a GPU")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def both_ways(name, inputs):
    return run(OPS[name].ours, inputs)


@needs_gpu
@ops
def test_runs_on_the_current_stream(name):
    """Behind work that takes a while on a side stream: an op on another one would read its inputs before they are."""
    want = both_ways(name, OPS[name].floats(torch.float32, "cuda"))
    late = OPS[name].floats(torch.float32, "cuda")
    values = [x.detach().clone() for x in late]
    with torch.no_grad():
        for x in late:
            x.fill_(torch.nan)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            for x, value in zip(late, values, strict=True):
                x.copy_(value)
        got = both_ways(name, late)
    torch.cuda.current_stream().wait_stream(side)
    assert all(map(torch.equal, got, want))


@needs_gpu
@ops
def test_can_be_captured(name):
    """Forward and backward as a CUDA graph, replayed on other values in the same buffers."""
    inputs, other = (OPS[name].floats(torch.float32, "cuda", seed) for seed in (0, 1))
    want = both_ways(name, other)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    dy = upstream(want[0])
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            both_ways(name, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = OPS[name].ours(*inputs)
        got = y, *torch.autograd.grad(y, inputs, dy)
    with torch.no_grad():
        for x, value in zip(inputs, other, strict=True):
            x.copy_(value)
    graph.replay()
    assert all(map(torch.equal, got, want))


@needs_two
@ops
def test_runs_on_the_device_of_its_tensors(name):
    """Not on the current one, which is another."""
    first, second = (both_ways(name, OPS[name].floats(torch.float32, f"cuda:{i}")) for i in (0, 1))
    assert torch.cuda.current_device() == 0
    for a, b in zip(first, second, strict=True):
        assert b.device == torch.device("cuda:1") and torch.equal(a, b.to(a.device))


def test_settings_are_those_of_the_gpu_that_holds_the_tensors():
    """On a host with two kinds of GPU, where the current one is another: every kernel, see two_gpus_probe.py."""
    seen = json.loads(printed_where_kernels_compile("tests/citizenship/two_gpus_probe.py"))
    assert len(seen) >= 20
    assert {kernel: devices for kernel, devices in seen.items() if devices != [1]} == {}
