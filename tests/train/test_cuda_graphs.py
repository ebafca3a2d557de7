"""A recorded training step does what the step does, bit for bit.

Without a GPU a stand-in records: it keeps the operators that a step calls, on the tensors that it calls them on, and
calls them again on these. Like a CUDA graph it runs no Python, so a number that the host had computed stays the first.
"""

import contextlib
import dataclasses

import pytest
import torch

from primer_fast.bench.rehearsal import Operators
from primer_fast.data.text import TokenizedText
from primer_fast.models.cnn import CNN, CNNConfig
from primer_fast.models.mlp import MLP, MLPConfig
from primer_fast.models.transformer import Transformer, TransformerConfig
from primer_fast.train import cuda_graphs, language_model, supervised
from primer_fast.train.common import pack, unpack
from primer_fast.train.cuda_graphs import WARM_UP, RecordedUpdate, pays, recorded
from primer_fast.train.language_model import LanguageModelConfig
from primer_fast.train.supervised import SupervisedConfig

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


class StandIn:
    """CudaGraph on a CPU."""

    device_type, rate = "cpu", torch.float64
    captured = replayed = 0  # of all stand-ins

    def __init__(self, device):
        assert device.type == "cpu"

    def warm_up(self, step):
        step()

    def capture(self, step):
        random = torch.get_rng_state()
        with Operators() as self.operators:
            step()
        self.operators.undo()
        torch.set_rng_state(random)
        StandIn.captured += 1

    def replay(self):
        self.operators.replay()
        StandIn.replayed += 1


@pytest.fixture
def stand_in(plain_path, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "CudaGraph", StandIn)
    monkeypatch.setattr(StandIn, "captured", 0)
    monkeypatch.setattr(StandIn, "replayed", 0)
    return StandIn


def mlp(config, device="cpu"):
    """22 samples in batches of 4: the last of an epoch has 2."""
    torch.manual_seed(3)
    inputs, targets = torch.randn(22, 6), torch.randint(0, 3, (22,))
    state = supervised.start(MLP(MLPConfig((6, 8, 3))).to(device), config)
    return state, lambda: supervised.train(state, inputs, targets, config)


def cnn(config, device="cpu"):
    torch.manual_seed(3)
    inputs, targets = torch.randint(0, 256, (22, 28, 28), dtype=torch.uint8), torch.randint(0, 10, (22,))
    state = supervised.start(CNN(CNNConfig()).to(device), config)
    return state, lambda: supervised.train(state, inputs, targets, config)


def gpt(config, device="cpu"):
    torch.manual_seed(3)
    shape = TransformerConfig(vocab=16, context=8, width=16, layers=1, heads=2, dropout=0.1)
    tokens = torch.randint(0, 16, (200,), dtype=torch.uint8)
    text = TokenizedText(tokens[:150], tokens[150:])
    state = language_model.start(Transformer(shape).to(device), config)
    return state, lambda: language_model.train(state, text, config)


SUPERVISED = SupervisedConfig(lr=0.05, warmup_steps=3, batch_size=4, epochs=3, log_every=2, cuda_graphs=True)
TEXT = LanguageModelConfig(
    warmup_steps=3, steps=11, batch_size=4, log_every=3, eval_every=6, eval_batches=2, cuda_graphs=True
)
RUNS = {
    "mlp": (mlp, SUPERVISED),
    "mlp sgd": (mlp, dataclasses.replace(SUPERVISED, optimizer="sgd", momentum=0.9, clip_norm=None)),
    "mlp plain sgd": (mlp, dataclasses.replace(SUPERVISED, optimizer="sgd", clip_norm=0.1)),
    "mlp accumulate": (mlp, dataclasses.replace(SUPERVISED, accumulate=3)),
    "mlp bfloat16": (mlp, dataclasses.replace(SUPERVISED, precision="bfloat16", label_smoothing=0.1)),
    "mlp float16": (mlp, dataclasses.replace(SUPERVISED, precision="float16")),
    "mlp whole data": (mlp, dataclasses.replace(SUPERVISED, batch_size=None, epochs=9)),
    "cnn": (cnn, dataclasses.replace(SUPERVISED, steps=7, augmentation="shift")),
    "gpt": (gpt, TEXT),
    "gpt float16": (gpt, dataclasses.replace(TEXT, precision="float16", accumulate=2)),
}


def finish(run):
    """-> rows without times, and all that a checkpoint holds"""
    state, train = run
    rows = [{k: v for k, v in row.items() if "second" not in k} for row in train()]
    return rows, *pack(state, {}, 0.0)


def agree(got, want):
    assert got[0] == want[0] and got[2] == want[2]
    assert got[1].keys() == want[1].keys()
    for name, value in want[1].items():
        assert torch.equal(got[1][name], value), name


@pytest.mark.parametrize("name", RUNS)
def test_a_recorded_run_is_the_run(name, stand_in):
    """Schedule, metrics, weights, optimizer and generator; the last batches of epochs are shorter."""
    make, config = RUNS[name]
    agree(finish(make(config)), finish(make(dataclasses.replace(config, cuda_graphs=False))))
    assert stand_in.captured == 1
    full = {"gpt": 11, "gpt float16": 11, "cnn": 6, "mlp whole data": 9}.get(name, 15)
    assert stand_in.replayed == full - WARM_UP


@needs_gpu
@pytest.mark.parametrize("name", RUNS)
def test_a_recorded_run_is_the_run_on_a_gpu(name, monkeypatch):
    make, config = RUNS[name]
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph)))
    agree(finish(make(config, "cuda")), finish(make(dataclasses.replace(config, cuda_graphs=False), "cuda")))
    assert len(set(map(id, replays))) == 1


@pytest.mark.parametrize("name", ["mlp", "mlp sgd", "mlp float16", "gpt"])
@pytest.mark.parametrize("stop", [2, 6])  # before and after the recording
def test_resume_is_the_uninterrupted_run(name, stop, stand_in, monkeypatch):
    make, config = RUNS[name]
    want = finish(make(dataclasses.replace(config, cuda_graphs=False)))
    first, train = make(config)
    procedure = language_model if make is gpt else supervised
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(procedure, "train_step", stop_before(procedure.train_step, stop))
        list(train())
    tensors, metadata = pack(first, {}, 0.0)
    second, train = make(config)
    unpack(second, tensors, metadata)
    rows, *rest = finish((second, train))
    agree((rows, *rest), (want[0][-len(rows) :], *want[1:]))
    assert stand_in.captured == (1 if stop == 2 else 2)


def test_overflows_are_skipped_in_a_recording(stand_in):
    """The scale starts so high that gradients overflow before and after the recording, and then no longer."""
    results, scales = [], []
    for recording in (True, False):
        run = mlp(dataclasses.replace(SUPERVISED, precision="float16", log_every=1, cuda_graphs=recording))
        run[0].scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
        results.append(finish(run))
        scales.append(run[0].scaler.get_scale())
    agree(*results)
    skipped = 24 - torch.tensor(scales).log2()
    assert (skipped > WARM_UP + 1).all() and (skipped < 15).all()


def stop_before(train_step, last):
    def step(state, *rest):
        if state.step == last:
            raise KeyboardInterrupt
        train_step(state, *rest)

    return step


def stepped(config, steps):
    state, _ = mlp(config)
    step = recorded(supervised.update, state, asked=True, batch=4, rows=4, procedure="supervised")
    for i in range(steps):
        torch.manual_seed(i)
        supervised.train_step(state, torch.randn(4, 6), torch.randint(0, 3, (4,)), config, 99, step)
    return state, step


def test_metrics_outlive_the_next_step(stand_in):
    state, _ = stepped(SUPERVISED, WARM_UP + 1)
    kept = {name: values[-1] for name, values in state.window.items()}
    before = {name: value.item() for name, value in kept.items()}
    state, step = stepped(SUPERVISED, WARM_UP + 3)
    replayed = state.window["loss"][WARM_UP:]
    assert len({loss.item() for loss in replayed}) == len({loss.data_ptr() for loss in replayed}) == 3
    assert {name: value.item() for name, value in kept.items()} == before
    assert all(loss.data_ptr() != step.measured["loss"].data_ptr() for loss in replayed)


def test_no_buffer_moves(stand_in):
    """Weights, optimizer state and learning rate are where they were recorded."""
    state, step = stepped(SUPERVISED, WARM_UP + 1)

    def addresses():
        optimizer = [t.data_ptr() for values in state.optimizer.state.values() for t in values.values()]
        rates = [group["lr"].data_ptr() for group in state.optimizer.param_groups]
        return [t.data_ptr() for t in (*state.model.parameters(), *step.buffers)] + optimizer + rates

    before = addresses()
    for size in (4, 2, 4):
        supervised.train_step(state, torch.randn(size, 6), torch.randint(0, 3, (size,)), SUPERVISED, 99, step)
    assert addresses() == before and state.step == WARM_UP + 4
    assert not any(group["capturable"] for group in state.optimizer.param_groups)


def test_a_step_that_reads_from_the_device_is_refused(stand_in):
    state, _ = mlp(SUPERVISED)

    def reading(state, x, target, config):
        supervised.update(state, x, target, config)
        state.window["loss"][-1].item()

    step = RecordedUpdate(reading, state, 4, "supervised")
    x, target = torch.randn(4, 6), torch.randint(0, 3, (4,))
    for _ in range(WARM_UP):
        step(state, x, target, SUPERVISED)
    with pytest.raises(RuntimeError, match=r"supervised: the step cannot be recorded .*; cuda_graphs=False trains"):
        step(state, x, target, SUPERVISED)
    assert state.step == WARM_UP == len(state.window["loss"])


def test_where_it_cannot_be_it_says_why():
    state, _ = mlp(SUPERVISED)
    options = {"batch": 4, "rows": 4, "procedure": "supervised"}
    with pytest.warns(
        RuntimeWarning, match=r"supervised: no CUDA graph, .*: the model must be on one GPU; it is on cpu"
    ):
        assert recorded(supervised.update, state, asked=True, **options) is supervised.update


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("asked", [None, False])
def test_on_a_cpu_nothing_changes(asked):
    state, _ = mlp(SUPERVISED)
    assert recorded(supervised.update, state, asked=asked, batch=4, rows=4, procedure="x") is supervised.update
    assert all(type(group["lr"]) is float for group in state.optimizer.param_groups)


def test_obstacles(stand_in, monkeypatch):
    state, _ = mlp(SUPERVISED)
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
    def graph(recording, stream):
        streams.append(stream)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "the recording's")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: streams[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(ZeroDivisionError):
        cuda_graphs.CudaGraph(torch.device("cuda")).capture(lambda: 1 // 0)
    assert streams == ["the caller's", "the recording's", "the caller's"]
