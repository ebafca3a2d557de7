"""A recorded training step does what the step does, bit for bit.

Without a GPU a stand-in records: it keeps the operators that a step calls, on the tensors that it calls them on, and
calls them again on these. Like a CUDA graph it runs no Python, so a number that the host had computed stays the first.
"""

import contextlib
import dataclasses

import procedures
import pytest
import torch
from procedures import DPO, PPO, PRE, SHAPE, Language, Supervised, go_on, mlp, start

from primer_fast.bench.stages.rehearsal import Operators
from primer_fast.data.completions import CompletionPairs, Completions
from primer_fast.models.cnn import CNN, CNNConfig
from primer_fast.models.mlp import MLP, MLPConfig
from primer_fast.models.transformer import Transformer, TransformerConfig
from primer_fast.train import cuda_graphs, supervised
from primer_fast.train.cuda_graphs import MOST, WARM_UP, RecordedUpdate, pays, recorded
from primer_fast.train.log_probs import rounded, to_device
from primer_fast.train.parallel import ALONE
from primer_fast.train.state import pack, unpack

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


class StandIn:
    """CudaGraphs on a CPU."""

    device_type, rate = "cpu", torch.float64
    captured = replayed = 0  # of all stand-ins

    def __init__(self, device):
        assert device.type == "cpu"

    def warm_up(self, step):
        step()

    def capture(self, step):
        random = torch.get_rng_state()
        with Operators() as operators:
            step()
        operators.undo()
        torch.set_rng_state(random)
        StandIn.captured += 1
        return lambda: self.replay(operators)

    def replay(self, operators):
        operators.replay()
        StandIn.replayed += 1


@pytest.fixture
def stand_in(plain_path, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "CudaGraphs", StandIn)
    monkeypatch.setattr(StandIn, "captured", 0)
    monkeypatch.setattr(StandIn, "replayed", 0)
    return StandIn


def cnn():
    return CNN(CNNConfig((1, 8, 8), channels=(3, 5), kernel_size=2, hidden=(6,), classes=3))


def pairs_of(*lengths, count=22):
    """``count`` pairs of prompts of 3 tokens and completions of one of ``lengths``."""
    draw = torch.Generator().manual_seed(3)

    def side():
        tokens = torch.randint(1, PRE.vocab, (count, 3 + max(lengths)), generator=draw)
        written = torch.tensor(lengths)[torch.randint(len(lengths), (count,), generator=draw)]
        prompts = torch.full((count,), 3)
        return Completions(tokens, prompts, prompts + written)

    return CompletionPairs(side(), side(), torch.zeros(count))


SGD = {"optimizer": "sgd", "lr": 0.05}
TEXT = {"steps": 11, "batch_size": 4, "eval_every": 6, "eval_batches": 2}
PAIRS = {"pairs": pairs_of(4), "epochs": 2, "accumulate": 1}
UNLIKE = {"pairs": pairs_of(2, 3), "epochs": 6}
ROLLOUTS = {"steps": 8, "batch_size": 8, "minibatches": 2, "max_new_tokens": 2, "schedule": "cosine", "kl_target": 0.05}
RUNS = {  # and how many of their batches are full
    "supervised": (Supervised(mlp, epochs=4, accumulate=1), 8),
    "sgd": (Supervised(mlp, epochs=4, **SGD, momentum=0.9, clip_norm=None), 8),
    "plain sgd": (Supervised(mlp, epochs=4, **SGD, clip_norm=0.1), 8),
    "bfloat16": (Supervised(mlp, epochs=4, precision="bfloat16", label_smoothing=0.1), 8),
    "float16": (Supervised(mlp, epochs=6, precision="float16"), 12),
    "whole data": (Supervised(mlp, epochs=6, batch_size=None), 6),
    "cnn": (Supervised(cnn, steps=8, augmentation="shift"), 6),
    "gpt": (Language(dataclasses.replace(SHAPE, dropout=0.1), **TEXT, accumulate=1), 11),
    "gpt float16": (Language(**TEXT, precision="float16"), 11),
    "dpo": (DPO("sigmoid", **PAIRS), 10),
    "dpo ipo": (DPO("ipo", **PAIRS, clip_norm=None), 10),
    "dpo accumulate": (DPO("cdpo", **PAIRS | {"accumulate": 3}, label_smoothing=0.1, batch_size=5), 8),
    "dpo bfloat16": (DPO("sigmoid", **PAIRS, precision="bfloat16"), 10),
    "dpo float16": (DPO("sigmoid", **PAIRS, precision="float16"), 10),
}
OF_MANY_SIZES = {
    "dpo, unlike pairs": DPO("sigmoid", **UNLIKE, accumulate=1),
    "dpo, unlike pairs, accumulate": DPO("sigmoid", **UNLIKE),
    "ppo": PPO(**ROLLOUTS),
    "ppo, shared critic": PPO("shared", **ROLLOUTS, gamma=0.9, precision="bfloat16", stop_kl=0.01),
    "ppo, accumulate": PPO(**ROLLOUTS | {"steps": 12, "batch_size": 10}, accumulate=2),
    "ppo, unlike minibatches": PPO(**ROLLOUTS | {"batch_size": 11, "minibatches": 3}),
}
CASES = {name: case for name, (case, _) in RUNS.items()} | OF_MANY_SIZES


def begin(name, recording=True):
    return start(CASES[name], log_every=2, cuda_graphs=recording)


def finish(name, state, config):
    """-> rows, and all that a checkpoint holds"""
    return go_on(CASES[name], state, config), *pack(state, {}, 0.0)


def agree(got, want):
    assert got[0] == want[0] and got[2] == want[2]
    assert got[1].keys() == want[1].keys()
    for name, value in want[1].items():
        assert torch.equal(got[1][name], value), name


@pytest.mark.parametrize("name", CASES)
def test_a_recorded_run_is_the_run(name, stand_in):
    """Schedule, metrics, weights, optimizer and generator; the last batches of epochs are shorter, and not recorded.

    Batches of other sizes have recordings of their own, if they come often.
    """
    agree(finish(name, *begin(name)), finish(name, *begin(name, recording=False)))
    if name in RUNS:
        assert stand_in.captured == 1 and stand_in.replayed == RUNS[name][1] - WARM_UP
    else:
        assert 1 < stand_in.captured < stand_in.replayed


@needs_gpu
@pytest.mark.parametrize("name", CASES)
def test_a_recorded_run_is_the_run_on_a_gpu(name, monkeypatch):
    monkeypatch.setattr(procedures, "device", "cuda")
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph)))
    agree(finish(name, *begin(name)), finish(name, *begin(name, recording=False)))
    graphs = len(set(map(id, replays)))
    assert graphs == 1 if name in RUNS else graphs > 1


@pytest.mark.parametrize("name", ["supervised", "sgd", "float16", "gpt", "dpo", "dpo float16", "ppo"])
@pytest.mark.parametrize("stop", [2, 6])  # before and after the recording
def test_resume_is_the_uninterrupted_run(name, stop, stand_in):
    want = finish(name, *begin(name, recording=False))
    first, config = begin(name)
    rows = go_on(CASES[name], first, config, stop)
    content = pack(first, {}, 0.0)
    second, _ = begin(name)
    unpack(second, *content)
    went_on, *rest = finish(name, second, config)
    agree((rows + went_on, *rest), want)
    assert name == "ppo" or stand_in.captured == (1 if stop == 2 else 2)


def test_overflows_are_skipped_in_a_recording(stand_in):
    """The scale starts so high that gradients overflow before and after the recording, and then no longer."""
    results, scales = [], []
    for recording in (True, False):
        state, config = begin("float16", recording)
        state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
        results.append(finish("float16", state, config))
        scales.append(state.scaler.get_scale())
    agree(*results)
    skipped = 24 - torch.tensor(scales).log2()
    assert (skipped > WARM_UP + 1).all() and (skipped < 12).all()


def batch(size=4):
    return torch.randn(size, 8, 8), torch.randint(0, 3, (size,))


def stepped(steps):
    state, config = begin("supervised")
    step = recorded(supervised.update, state, asked=True, batch=4, rows=4, procedure="supervised")
    for i in range(steps):
        torch.manual_seed(i)
        supervised.train_step(state, *batch(), config, 99, step)
    return state, config, step


def test_metrics_outlive_the_next_step(stand_in):
    state, _, _ = stepped(WARM_UP + 1)
    kept = {name: values[-1] for name, values in state.window.items()}
    before = {name: value.item() for name, value in kept.items()}
    state, _, step = stepped(WARM_UP + 3)
    replayed = state.window["loss"][WARM_UP:]
    assert len({loss.item() for loss in replayed}) == len({loss.data_ptr() for loss in replayed}) == 3
    assert {name: value.item() for name, value in kept.items()} == before
    (recording,) = step.recordings.values()
    assert all(loss.data_ptr() != recording.measured["loss"].data_ptr() for loss in replayed)


def test_no_buffer_moves(stand_in):
    """Weights, optimizer state and learning rate are where they were recorded."""
    state, config, step = stepped(WARM_UP + 1)

    def addresses():
        optimizer = [t.data_ptr() for values in state.optimizer.state.values() for t in values.values()]
        rates = [group["lr"].data_ptr() for group in state.optimizer.param_groups]
        (recording,) = step.recordings.values()
        return [t.data_ptr() for t in (*state.model.parameters(), *recording.batch)] + optimizer + rates

    before = addresses()
    for size in (4, 2, 4):
        supervised.train_step(state, *batch(size), config, 99, step)
    assert addresses() == before and state.step == WARM_UP + 4
    assert not any(group["capturable"] for group in state.optimizer.param_groups)


def test_a_step_that_reads_from_the_device_is_refused(stand_in):
    state, config = begin("supervised")

    def reading(state, x, target, config):
        supervised.update(state, x, target, config)
        state.window["loss"][-1].item()

    step = RecordedUpdate(reading, state, 4, "supervised")
    for _ in range(WARM_UP):
        step(state, *batch(), config)
    with pytest.raises(RuntimeError, match=r"supervised: the step cannot be recorded .*; cuda_graphs=False trains"):
        step(state, *batch(), config)
    assert state.step == WARM_UP == len(state.window["loss"])


def test_the_recording_used_longest_ago_goes_first(stand_in):
    """And is made anew, after steps as any other, where its sizes come back."""
    state, _ = begin("supervised")

    def sum_of(state, x):
        state.window.setdefault("sum", []).append(x.sum())

    step = RecordedUpdate(sum_of, state, 2, "sums")

    def times(count, width):
        for _ in range(count):
            step(state, torch.full((2, width), 0.5))
            assert state.window["sum"][-1] == width and state.step == 0

    for width in range(1, MOST + 1):
        times(WARM_UP + 1, width)
    times(1, 1)
    times(WARM_UP + 1, MOST + 1)
    kept = [width for ((_, width),) in step.recordings]
    assert stand_in.captured == MOST + 1 and kept == [*range(3, MOST + 1), 1, MOST + 1]
    times(1, 1)
    times(WARM_UP, 2)
    assert stand_in.captured == MOST + 1
    times(1, 2)
    assert stand_in.captured == MOST + 2 and len(step.recordings) == MOST


def test_sizes_recur():
    assert [rounded(n) for n in (1, 7, 15, 16, 17, 31, 33, 100, 256, 257)] == [1, 7, 15, 16, 18, 32, 36, 104, 256, 288]
    for n in range(1, 5000):
        assert n <= rounded(n) <= 9 / 8 * n and rounded(rounded(n)) == rounded(n)
    assert len({rounded(n) for n in range(1025, 2049)}) == 8


@pytest.mark.parametrize("sides", [1, 2])
def test_a_batch_for_the_device(sides, stand_in):
    """The places are those of the mask, micro-batch by micro-batch; sizes go up, but not past what the model takes."""
    tokens, prompts = torch.ones(6, 33, dtype=torch.int64), torch.tensor([1, 2, 3, 4, 5, 6])
    batch = Completions(tokens, prompts, torch.tensor([33, 20, 9, 33, 31, 7]))
    parts = list(ALONE.micro_batches(6 // sides, 2))
    for longest, width in ((33, 33), (35, 35), (64, 36)):
        tokens, *lengths, places = to_device(batch, parts, torch.device("cpu"), longest, sides=sides)
        assert tokens.shape == (6, width) and torch.equal(lengths[0], batch.prompt_lengths)
        mask = Completions(tokens, *lengths).mask().view(sides, -1, width - 1)
        for micro, where in zip(parts, places, strict=True):
            chosen = mask[:, micro.rows].flatten()
            count = int(chosen.sum())
            assert chosen[where[:count]].all() and (where[count:] == -1).all() and len(set(where.tolist())) >= count
        assert places.shape[1] == rounded(max(int(mask[:, micro.rows].sum()) for micro in parts))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("asked", [None, False])
def test_on_a_cpu_nothing_changes(asked):
    state, _ = begin("supervised")
    assert recorded(supervised.update, state, asked=asked, batch=4, rows=4, procedure="x") is supervised.update
    assert all(type(group["lr"]) is float for group in state.optimizer.param_groups)


def test_obstacles(stand_in, monkeypatch):
    state, _ = begin("supervised")
    assert cuda_graphs.obstacle(state) is None
    state.optimizer = torch.optim.AdamW(state.model.parameters())
    assert "must be fused" in cuda_graphs.obstacle(state)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert "several processes" in cuda_graphs.obstacle(state)
    state.model.layers[0].to("meta")
    assert "one GPU; it is on cpu, meta" in cuda_graphs.obstacle(state)


def test_it_pays_for_small_models():
    with torch.device("meta"):
        small = Transformer(TransformerConfig(vocab=65, context=256, width=384, layers=6, heads=6))
        gpt2 = Transformer(TransformerConfig(vocab=50257, context=1024, width=768, layers=12, heads=12))
        digits = MLP(MLPConfig((784, 512, 256, 10)))
    assert pays(small, 64 * 256) and pays(digits, 256)
    assert not pays(gpt2, 12 * 1024)


def test_a_recording_that_fails_leaves_the_stream_as_it_was(monkeypatch):
    """torch's own context does not."""
    streams = ["the caller's"]

    @contextlib.contextmanager
    def graph(recording, pool, stream):
        streams.append(stream)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "the recording's")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: streams[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(ZeroDivisionError):
        cuda_graphs.CudaGraphs(torch.device("cuda")).capture(lambda: 1 // 0)
    assert streams == ["the caller's", "the recording's", "the caller's"]
