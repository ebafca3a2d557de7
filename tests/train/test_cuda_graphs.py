"""A recorded training step does what the step does, bit for bit.

Without a GPU a stand-in records: it keeps the operators that a step calls, on the tensors that it calls them on, and
calls them again on these. Like a CUDA graph it runs no Python, so a number that the host had computed stays the first.
"""

import contextlib
import dataclasses

import pytest
import torch

from primer_fast.bench.rehearsal import Operators
from primer_fast.data.completions import CompletionPairs, Completions
from primer_fast.data.text import TokenizedText
from primer_fast.models.actor_critic import ActorCritic
from primer_fast.models.cnn import CNN, CNNConfig
from primer_fast.models.mlp import MLP, MLPConfig
from primer_fast.models.transformer import Transformer, TransformerConfig
from primer_fast.train import cuda_graphs, dpo, language_model, ppo, supervised
from primer_fast.train.cuda_graphs import MOST, WARM_UP, RecordedUpdate, pays, recorded
from primer_fast.train.dpo import DPOConfig
from primer_fast.train.language_model import LanguageModelConfig
from primer_fast.train.log_probs import rounded, to_device
from primer_fast.train.parallel import ALONE
from primer_fast.train.ppo import PPOConfig
from primer_fast.train.scoring import reward_of_lists
from primer_fast.train.state import pack, unpack
from primer_fast.train.supervised import SupervisedConfig

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


POLICY = TransformerConfig(vocab=8, context=16, width=16, layers=1, heads=2, norm="pre", positions="learned")


def pairs_of(lengths, count=22):
    """``count`` pairs of prompts of 3 tokens and completions of one of ``lengths``."""

    def side():
        tokens = torch.randint(1, POLICY.vocab, (count, 3 + max(lengths)))
        prompts, written = torch.full((count,), 3), torch.tensor(lengths)[torch.randint(len(lengths), (count,))]
        return Completions(tokens, prompts, prompts + written)

    return CompletionPairs(side(), side(), torch.zeros(count))


def of_pairs(config, device="cpu", lengths=(4,)):
    """22 pairs in batches of 4."""
    torch.manual_seed(3)
    pairs, model = pairs_of(lengths), Transformer(POLICY).to(device)
    reference = dpo.reference_log_probs(model, pairs, config)
    state = dpo.start(model, config)
    return state, lambda: dpo.train(state, pairs, reference, config)


def of_unlike_pairs(config, device="cpu"):
    return of_pairs(config, device, lengths=(2, 3))


def of_rollouts(config, device="cpu"):
    """Completions end by themselves, so that the sizes of minibatches differ."""
    torch.manual_seed(3)
    policy = Transformer(POLICY).to(device)
    reference = Transformer(POLICY).to(device)
    reference.load_state_dict(policy.state_dict())
    state = ppo.start(ActorCritic(policy, "shared" if config.gamma < 1 else None).to(device), config)
    prompts, reward = [torch.tensor([0, 3, 5])], reward_of_lists(lambda _, texts: [float(t.count(3)) for t in texts])
    return state, lambda: ppo.train(state, prompts, reference, reward, config, end=0)


SUPERVISED = SupervisedConfig(lr=0.05, warmup_steps=3, batch_size=4, epochs=3, log_every=2, cuda_graphs=True)
TEXT = LanguageModelConfig(
    warmup_steps=3, steps=11, batch_size=4, log_every=3, eval_every=6, eval_batches=2, cuda_graphs=True
)
PAIRS = DPOConfig(lr=0.01, warmup_steps=3, batch_size=4, epochs=3, log_every=2, cuda_graphs=True)
ROLLOUTS = PPOConfig(
    steps=8, batch_size=8, minibatches=2, epochs=2, max_new_tokens=2, temperature=1.0, lr=3e-3, schedule="cosine",
    kl_target=0.05, kl_horizon=50, log_every=2, cuda_graphs=True,
)  # fmt: skip
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
    "dpo": (of_pairs, PAIRS),
    "dpo ipo": (of_pairs, dataclasses.replace(PAIRS, loss="ipo", clip_norm=None)),
    "dpo accumulate": (
        of_pairs,
        dataclasses.replace(PAIRS, loss="cdpo", label_smoothing=0.1, batch_size=5, accumulate=3),
    ),
    "dpo bfloat16": (of_pairs, dataclasses.replace(PAIRS, precision="bfloat16")),
    "dpo float16": (of_pairs, dataclasses.replace(PAIRS, precision="float16")),
}
OF_MANY_SIZES = {
    "dpo": (of_unlike_pairs, dataclasses.replace(PAIRS, epochs=9)),
    "dpo accumulate": (of_unlike_pairs, dataclasses.replace(PAIRS, epochs=9, accumulate=2)),
    "ppo": (of_rollouts, ROLLOUTS),
    "ppo shared critic": (of_rollouts, dataclasses.replace(ROLLOUTS, gamma=0.9, precision="bfloat16", stop_kl=0.01)),
    "ppo accumulate": (of_rollouts, dataclasses.replace(ROLLOUTS, steps=12, batch_size=10, accumulate=2)),
    "ppo unlike minibatches": (of_rollouts, dataclasses.replace(ROLLOUTS, batch_size=11, minibatches=3)),
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
    full = {"gpt": 11, "gpt float16": 11, "cnn": 6, "mlp whole data": 9, "dpo accumulate": 12}.get(name, 15)
    assert stand_in.replayed == full - WARM_UP


@pytest.mark.parametrize("name", OF_MANY_SIZES)
def test_batches_of_other_sizes_have_recordings_of_their_own(name, stand_in):
    """Of sizes that come often; the others are run as any step, and so are smaller batches."""
    make, config = OF_MANY_SIZES[name]
    agree(finish(make(config)), finish(make(dataclasses.replace(config, cuda_graphs=False))))
    assert 1 < stand_in.captured < stand_in.replayed


@needs_gpu
@pytest.mark.parametrize("name", [*RUNS, *(f"{name} of many sizes" for name in OF_MANY_SIZES)])
def test_a_recorded_run_is_the_run_on_a_gpu(name, monkeypatch):
    many = name.endswith(" of many sizes")
    make, config = (OF_MANY_SIZES if many else RUNS)[name.removesuffix(" of many sizes")]
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph)))
    agree(finish(make(config, "cuda")), finish(make(dataclasses.replace(config, cuda_graphs=False), "cuda")))
    graphs = len(set(map(id, replays)))
    assert graphs > 1 if many else graphs == 1


@pytest.mark.parametrize("name", ["mlp", "mlp sgd", "mlp float16", "gpt", "dpo", "dpo float16"])
@pytest.mark.parametrize("stop", [2, 6])  # before and after the recording
def test_resume_is_the_uninterrupted_run(name, stop, stand_in, monkeypatch):
    make, config = RUNS[name]
    want = finish(make(dataclasses.replace(config, cuda_graphs=False)))
    first, train = make(config)
    procedure = {gpt: language_model, of_pairs: dpo}.get(make, supervised)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(procedure, "train_step", stop_before(procedure.train_step, stop))
        list(train())
    tensors, metadata = pack(first, {}, 0.0)
    second, train = make(config)
    unpack(second, tensors, metadata)
    rows, *rest = finish((second, train))
    agree((rows, *rest), (want[0][-len(rows) :], *want[1:]))
    assert stand_in.captured == (1 if stop == 2 else 2)


@pytest.mark.parametrize("stop", [1, 5])
def test_a_resumed_ppo_is_the_uninterrupted_run(stop, stand_in):
    want = finish(of_rollouts(dataclasses.replace(ROLLOUTS, cuda_graphs=False)))
    first, train = of_rollouts(ROLLOUTS)
    next(row for row in train() if row["step"] >= stop)
    tensors, metadata = pack(first, {}, 0.0)
    second, train = of_rollouts(ROLLOUTS)
    unpack(second, tensors, metadata)
    rows, *rest = finish((second, train))
    agree((rows, *rest), (want[0][-len(rows) :], *want[1:]))


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
    (recording,) = step.recordings.values()
    assert all(loss.data_ptr() != recording.measured["loss"].data_ptr() for loss in replayed)


def test_no_buffer_moves(stand_in):
    """Weights, optimizer state and learning rate are where they were recorded."""
    state, step = stepped(SUPERVISED, WARM_UP + 1)

    def addresses():
        optimizer = [t.data_ptr() for values in state.optimizer.state.values() for t in values.values()]
        rates = [group["lr"].data_ptr() for group in state.optimizer.param_groups]
        (recording,) = step.recordings.values()
        return [t.data_ptr() for t in (*state.model.parameters(), *recording.batch)] + optimizer + rates

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


def test_the_recording_used_longest_ago_goes_first(stand_in):
    """And is made anew, after steps as any other, where its sizes come back."""
    state, _ = of_pairs(PAIRS)

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
    assert stand_in.captured == MOST + 1 and [width for ((_, width),) in step.recordings] == [
        *range(3, MOST + 1),
        1,
        MOST + 1,
    ]
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
