"""The stand-in for CUDA, in a process of its own: it stays for good."""

import os
import subprocess
import sys

PROGRAM = """
import multiprocessing
import threading

import torch

from primer_fast import functional as F


def in_a_child(_):
    return torch.cuda.get_device_name()


def main(arguments):
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(2, 3, device="cuda", generator=generator)
    layer = torch.nn.Linear(3, 4, device="cuda:0").to("cuda")
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.empty(2, device="cuda").device.type))
    thread.start(), thread.join()
    print(arguments, x.to(torch.device("cuda")).device.type, found, torch.cuda.is_available())

    buffer, weights = torch.zeros(2, 3, device="cuda"), [p.detach().clone() for p in layer.parameters()]
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        y = F.linear(buffer, layer.weight, layer.bias, activation="gelu")
        y.sum().backward()
        optimizer.step()
    untouched = all(torch.equal(p, w) for p, w in zip(layer.parameters(), weights))
    want = F.linear(x, layer.weight, layer.bias, activation="gelu")
    buffer.copy_(x)
    graph.replay()
    print("captured", untouched, "replayed", torch.equal(y, want), not torch.equal(layer.weight, weights[0]))
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            float(buffer.sum())
    except RuntimeError as error:
        print(error)

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(), end.record()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(start.elapsed_time(end) > 0, torch.compile(len)("ab"), *pool.map(in_a_child, [0]))
    return 7
"""


def test_a_program_for_a_gpu_runs_here(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "primer_fast.bench.stages.rehearsal", "program", "--one", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.stdout.splitlines() == [
        "['--one', '2'] cpu ['cpu'] True",
        "captured True replayed True True",
        "operation not permitted when stream is capturing",
        "True 2 Stand-in",
    ], done.stderr
    assert done.returncode == 7
