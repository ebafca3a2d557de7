"""Two processes, DDP and FSDP, against one: the same losses, weights, checkpoints, and one end for both.

One pair of processes trains everything, since each takes seconds to import torch.
"""

import functools
import os
import shutil
from pathlib import Path

import procedures
import pytest
import torch
from processes import run_processes
from train import distributed_cases as cases

from primer_fast.models.mlp import MLP, MLPConfig
from primer_fast.train import supervised
from primer_fast.train.parallel import World, joined
from primer_fast.train.state import distribute

pytestmark = pytest.mark.xdist_group("distributed")
plain = pytest.mark.usefixtures("plain_path")
both = pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
TESTS = str(Path(procedures.__file__).parent)
GPT = "language-model-post-norm"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of what the two processes write."""
    folder = tmp_path_factory.mktemp("distributed")
    run_processes(2, cases.__file__, folder, PYTHONPATH=TESTS)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return torch.load(folder / "found.pt", weights_only=False)


@functools.cache
def alone(name):
    """What one process finds, which computes with plain PyTorch."""
    return cases.run((cases.CASES | cases.KERNELS)[name])


def assert_same(got, want, rtol=1e-5, atol=1e-6):
    """Rows of metrics and weights."""
    (rows, weights), (want_rows, want_weights) = got, want
    assert len(rows) == len(want_rows) > 0
    for row, want_row in zip(rows, want_rows, strict=True):
        assert row.keys() == want_row.keys()
        for key, value in row.items():
            assert value == pytest.approx(want_row[key], rel=rtol, abs=atol), (key, want_row["step"])
    assert weights.keys() == want_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, want_weights[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def assert_equal(got, want):
    assert got[0] == want[0]
    assert all(torch.equal(t, want[1][name]) for name, t in got[1].items())


@plain
@both
@pytest.mark.parametrize("name", cases.CASES)
def test_two_processes_train_as_one(found, name, strategy):
    """Short last batches, micro-batches, shares without a sample; both processes report the same."""
    first, second = found[strategy, name]
    assert_equal(first, second)
    assert_same(first, alone(name))


@plain
@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels run natively: test_gpus_train_as_one")
@both
@pytest.mark.parametrize("name", cases.KERNELS)
def test_the_kernels_train_in_two_processes(found, name, strategy):
    """As plain PyTorch in one. conv2d and max_pool2d in the CNN, linear_log_prob in DPO, most others in the GPT."""
    first, second = found[strategy, name]
    assert_equal(first, second)
    assert_same(first, alone(name), rtol=1e-4)


@plain
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpus_train_as_one(tmp_path, monkeypatch):
    """Two of them where there are, with nccl; one alone shows that nothing lies on a wrong device."""
    run_processes(min(2, torch.cuda.device_count()), cases.__file__, tmp_path, "cuda", PYTHONPATH=TESTS)
    found = torch.load(tmp_path / "found.pt", weights_only=False)
    monkeypatch.setattr(procedures, "device", "cuda")
    for name, case in cases.CASES.items():
        (row, *_), _ = cases.run(case)
        for strategy in ("ddp", "fsdp"):
            key = "loss" if "loss" in row else "train/loss"
            assert found[strategy, name][0][0][0][key] == pytest.approx(row[key], rel=1e-3, abs=1e-4), (strategy, name)


@both
@pytest.mark.parametrize(("half", "whole"), [("halves", GPT), ("dropout-halves", "dropout")])
def test_resumed_is_uninterrupted_bit_for_bit(found, half, whole, strategy):
    """Dropout too goes on where each process left it."""
    want = found[strategy, whole]
    assert_equal(found[strategy, half], want[0] if whole == GPT else want)


@plain
@both
@pytest.mark.parametrize("source", ["from one", "from the other", "in one"])
def test_a_checkpoint_of_another_world_or_strategy_loads(found, folder, source, strategy):
    got = cases.resumed(cases.CASES[GPT], folder / strategy) if source == "in one" else found[strategy, source]
    rows, weights = alone(GPT)
    assert_same(got, (rows[2:], weights))


def test_a_sharded_checkpoint_has_a_part_of_each_process(folder):
    (path,) = (folder / "fsdp").glob("checkpoint*")
    parts = [file.stat().st_size for file in sorted(path.glob("*.safetensors"))]
    assert path.name == "checkpoint-2" and len(parts) == 2 and max(parts) < 0.7 * sum(parts)


DAMAGE = {
    "no state": lambda path: (path / "state.json").unlink(),
    "short state": lambda path: (path / "state.json").write_text("{"),
    "state that is a number": lambda path: (path / "state.json").write_text("3"),
    "short part": lambda path: os.truncate(min(path.glob("*.safetensors")), 1000),
    "first part gone": lambda path: min(path.glob("*.safetensors")).unlink(),
    "last part gone": lambda path: max(path.glob("*.safetensors")).unlink(),
    "no parts": lambda path: [part.unlink() for part in path.glob("*.safetensors")],
}


@plain
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_sharded_checkpoint_is_named(folder, tmp_path, damage):
    DAMAGE[damage](shutil.copytree(folder / "fsdp" / "checkpoint-2", tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match="checkpoint-2: "):
        cases.resumed(cases.CASES[GPT], tmp_path)


@both
def test_what_one_process_meets_both_heed(found, strategy):
    """A gradient that overflows, a loss that is no number, a reward that is none, and a wish to stop."""
    (scale, moved), second = found[strategy, "float16"]
    assert (scale, moved) == second and not moved and scale < 65536
    (message, step), second = found[strategy, "nan"]
    assert (message, step) == second and message.startswith("supervised: the loss is not finite at step ")
    (message, step), second = found[strategy, "no reward"]
    assert (message, step) == second == ("ppo: the reward raised KeyError at rollout 1: 'no such word'", 0)
    assert found[strategy, "stopped"] == [2, 2]


@pytest.mark.parametrize("count", [1, 2, 5, 8, 13])
@pytest.mark.parametrize("accumulate", [1, 3, 20])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_micro_batches_are_the_batch_and_as_many_for_each(count, accumulate, size):
    parts = [list(World(rank, size).micro_batches(count, accumulate)) for rank in range(size)]
    assert {len(p) for p in parts} == {len(range(0, count, -(-count // accumulate)))}
    rows = [range(count)[micro.rows] for p in zip(*parts, strict=True) for micro in p if not micro.empty]
    assert [row for r in rows for row in r] == list(range(count))
    assert all(len(range(count)[micro.rows]) == 1 for p in parts for micro in p if micro.empty)


@plain
def test_a_rollout_has_a_completion_for_each_process():
    state, config = procedures.PPO(batch_size=4).start()
    state.world = World(0, 5)
    with pytest.raises(ValueError, match="ppo: batch_size must be at least the number of processes, 5; got 4"):
        procedures.go_on(procedures.PPO(), state, config)


def test_each_process_needs_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="a GPU for each process of this machine; got 3 and 2"), joined("cuda"):
        pass


def test_several_processes_need_a_strategy():
    state = supervised.start(MLP(MLPConfig((2, 2))), supervised.SupervisedConfig())
    with pytest.raises(ValueError, match="strategy must be ddp or fsdp, or none for one process; got 'none'"):
        distribute(state, World(0, 2), "none")


def test_one_process_has_no_other_to_end():
    with pytest.raises(ValueError, match="there must be several processes; got one"):
        World().fail(lambda: 1)
