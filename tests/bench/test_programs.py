"""The programs of a GPU, on a stand-in for it: CUDA graphs, budgets, what an earlier process measured, what is missing.

The stand-in is that of bench/stages/rehearsal.py, here for one test at a time; kernels take the plain path.
"""

import dataclasses

import pytest
import torch

from primer_fast.bench import environment, models, peers, units
from primer_fast.bench.op import OURS
from primer_fast.bench.programs import dpo_step, generation, loss_head, ppo_step, to_accuracy, transformer_step
from primer_fast.bench.programs.transformer_step import COMPILED, GRAPH, NANOGPT, NO_GRAPH, PLAIN, compare
from primer_fast.bench.report import FAILED, NOT_AVAILABLE, OK, ProgramRow, load
from primer_fast.bench.stages import rehearsal
from primer_fast.data.drawn_digits import draw_digits
from primer_fast.models.transformer import Transformer, TransformerConfig
from primer_fast.train import cuda_graphs
from primer_fast.train.language_model import LanguageModelConfig

SMALL = TransformerConfig(19, 8, 16, 1, 2, **PLAIN)
TRAIN = LanguageModelConfig(batch_size=3, warmup_steps=2, steps=20, clip_norm=0.5)
TOKENS = torch.randint(19, (500,), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def gpu(plain_path, monkeypatch):
    """Counts the replays of CUDA graphs."""
    replays, replay = [], rehearsal._Graph.replay
    monkeypatch.setattr(rehearsal._Graph, "replay", lambda graph: (replays.append(graph), replay(graph))[1])
    with rehearsal.stand_in():
        yield replays


PROGRAMS = {
    "gpt2": lambda: compare("gpt2", SMALL, TRAIN, TOKENS, "cuda", 0.0, False, {}),
    "dpo": lambda: dpo_step.dpo_step("cuda", 0.0, False, small=True),
    "ppo": lambda: ppo_step.ppo_step("cuda", 0.0, False, small=True),
}


@pytest.mark.parametrize(("pays", "other"), [(True, NO_GRAPH), (False, GRAPH)])
@pytest.mark.parametrize("program", PROGRAMS)
def test_with_cuda_graphs_and_without_the_losses_are_equal(gpu, monkeypatch, program, pays, other):
    monkeypatch.setattr(cuda_graphs, "pays", lambda model, rows: pays)
    found = {row.provider: row for row in PROGRAMS[program]()}
    beside = {"gpt2": NANOGPT, "dpo": dpo_step.PLAIN_TORCH, "ppo": ppo_step.TRL}[program]
    assert found.keys() == {OURS, other, beside} and found[OURS].status == found[other].status == OK
    assert found[other].loss_difference == 0 and (gpu or (program, pays) == ("dpo", False))
    assert f"ours {'with' if pays else 'without'} a CUDA graph by default" in found[OURS].setting
    if program == "ppo":
        assert found[beside].status == NOT_AVAILABLE
    else:
        assert found[beside].status == OK and found[beside].loss_difference < (1e-4 if program == "gpt2" else 2e-3)


def test_a_graph_that_computes_something_else_is_noticed(gpu, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "pays", lambda model, rows: False)
    loss = transformer_step.language_model.loss_sum

    def other(*arguments):
        return loss(*arguments) * (1.1 if torch.cuda.is_current_stream_capturing() else 1)

    monkeypatch.setattr(transformer_step.language_model, "loss_sum", other)
    found = {t.provider: t for t in compare("gpt2", SMALL, TRAIN, TOKENS, "cuda", 0.0, False, {})}
    assert found[GRAPH].status == "wrong" and found[OURS].status == OK


def test_beside_torch_compile_the_goal_is_judged(gpu):
    ours, compiled = transformer_step.gpt2_compiled("cuda", 0.0, True, small=True)
    assert (ours.provider, compiled.provider, compiled.status) == (OURS, COMPILED, OK)
    assert compiled.targets[0]["value"] == compiled.versus
    assert ours.setting != transformer_step.gpt2("cuda", 0.0, True, small=True)[0].setting
    with pytest.raises(peers.NotAvailable):
        transformer_step.gpt2_compiled("cuda", 0.0, False, small=True)


def test_dpo_at_another_rate_is_noticed(gpu, monkeypatch):
    step, compare_steps = dpo_step.plain_step, dpo_step.compare_steps
    monkeypatch.setattr(
        dpo_step,
        "plain_step",
        lambda model, batches, config: step(model, batches, dataclasses.replace(config, lr=10.0)),
    )
    longer = {"small": False, "compared": 4, "least": 1}  # the first loss is log 2 at any rate
    monkeypatch.setattr(dpo_step, "compare_steps", lambda *found, **options: compare_steps(*found, **options | longer))
    assert dpo_step.beside_plain("cuda", 0.0, True)[-1].status == "wrong"


def test_training_to_99_percent(gpu, monkeypatch):
    monkeypatch.delenv(to_accuracy.FOLDER, raising=False)
    first, mnist = to_accuracy.cnn_99("cuda", 0.0, False, small=True)[::4]
    assert mnist.status == NOT_AVAILABLE and "MNIST" in mnist.reason and mnist.targets == first.targets == []
    assert first.reason.startswith("not 99 % but ")
    monkeypatch.setattr(to_accuracy.supervised, "evaluate", lambda *_: (0.0, to_accuracy.ENOUGH))
    races = to_accuracy.mlp_99("cuda", 0.0, False, small=True)
    assert [t.provider for t in races] == [OURS, to_accuracy.TORCH, NO_GRAPH, to_accuracy.TORCH_GRAPH]
    assert len(gpu) > 0 and {t.status for t in races} == {OK} and races[0].rate > 0


def test_how_far_training_came_is_said(plain_path):
    trials = {name: ProgramRow("mlp", "s", name) for name in (OURS, "a", "b", "c")}
    results = {OURS: [(2.0, 0.995, 50), (3.0, 0.99, 50)], "a": [(1.0, 0.5, 80)], "b": [(1.0, 0.9, 99)], "c": []}
    trials["c"].status, trials["c"].reason = FAILED, "no memory"
    to_accuracy._fill_in(trials, results, 99, 10)
    assert trials[OURS].status == OK and trials[OURS].median_ms == 2500 and trials[OURS].rate == pytest.approx(200)
    assert (trials["a"].status, trials["b"].status, trials["c"].reason) == (NOT_AVAILABLE, FAILED, "no memory")
    assert trials["b"].reason == "not 99 % but 90.0% of the test images right after 99 steps"


@pytest.fixture
def parts(gpu, monkeypatch):
    """Three parts that only say that they ran."""
    ran = []
    monkeypatch.setattr(environment, "commit", lambda: None)  # which git takes long to tell

    def part(name):
        def run(*options):
            ran.append(name)
            row = ProgramRow(name, str(options), OURS, unit="images")
            row.time([1.0], [1.0], 5)
            return [row]

        return run

    monkeypatch.setattr(models, "PARTS", {name: part(name) for name in ("a", "b", "c")})
    monkeypatch.setattr(models, "ESTIMATES", {"a": 1.0, "b": 100.0, "c": 2.0})
    return ran


def test_what_does_not_fit_the_budget_is_left_out_and_said(parts, tmp_path, capsys):
    path = tmp_path / "programs.json"
    arguments = ["a", "b", "c", "--device", "cuda", "--no-compile", "--json", str(path)]
    assert models.main([*arguments, "--budget", "50"]) == 0
    found = load(path)
    assert parts == ["a", "c"] and found.left_out == ["b"] and "b: no time was left" in capsys.readouterr().out
    assert found.header["command"].endswith(" ".join([*arguments, "--budget 50"])) and found.header["load_before"] >= 0
    (row,) = [t for t in found.rows if t.name == "b"]
    assert (row.status, row.reason) == (NOT_AVAILABLE, models.NO_TIME)
    assert models.main([*arguments, "--resume"]) == 0
    found = load(path)
    assert parts == ["a", "c", "b"] and found.left_out == [] and [t.name for t in found.rows] == ["a", "c", "b"]
    assert {t.setting for t in found.rows} == {
        "('cuda', 1.0, False, False)"
    } and "5 images/s" in capsys.readouterr().out


def test_a_part_that_fails_or_loses_the_gpu_costs_itself_alone(parts, monkeypatch, tmp_path, capsys):
    def lost(*options):
        raise units.DeviceLost("illegal address")

    def broken(*options):
        raise RuntimeError("no luck")

    monkeypatch.setitem(models.PARTS, "b", lost)
    monkeypatch.setitem(models.PARTS, "a", broken)
    arguments = ["a", "b", "c", "--device", "cuda", "--json", str(tmp_path / "p.json"), "--resume"]
    assert models.main(arguments) == units.LOST
    assert models.main(arguments) == 1
    found = load(tmp_path / "p.json")
    assert [(t.name, t.status) for t in found.rows] == [("a", FAILED), ("b", FAILED), ("c", OK)] and parts == ["c"]
    assert [t.reason for t in found.rows[:2]] == ["RuntimeError: no luck", "the GPU was lost: illegal address"]
    assert "failed: RuntimeError: no luck" in capsys.readouterr().out


def test_a_provider_that_loses_the_gpu_is_not_taken_for_one_that_fails(gpu, monkeypatch):
    assert peers.failure(ValueError("x"), "cuda") == (FAILED, "ValueError: x")

    def gone():
        raise RuntimeError("unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    with pytest.raises(units.DeviceLost, match="ValueError: x"):
        peers.failure(ValueError("x"), "cuda")


def test_a_folder_of_digits_is_called_by_its_name(monkeypatch):
    found = draw_digits(20, 10)
    monkeypatch.setattr(to_accuracy, "load_digits", lambda where: found)
    monkeypatch.setenv(to_accuracy.FOLDER, "/data/others")
    to_accuracy.digits.cache_clear()
    assert to_accuracy.digits(True) == ("digits of others", found)
    to_accuracy.digits.cache_clear()


def test_wrong_calls(monkeypatch, capsys):
    monkeypatch.setattr("primer_fast.backend.interpreting", True)
    assert models.main(["mlp"]) == 2 and "TRITON_INTERPRET" in capsys.readouterr().err
    for arguments in ([], ["nothing"], ["mlp", "--resume"]):
        with pytest.raises(SystemExit) as refused:
            models.parse(arguments)
        assert refused.value.code == 2


def test_every_part_has_an_estimate(monkeypatch, tmp_path):
    assert set(models.ON_GPU) <= set(models.PARTS) <= set(models.ESTIMATES)
    monkeypatch.setattr(models, "_warmed", lambda: tmp_path / "warm")
    cold = models.estimate("gpt2_compiled")
    assert models.order()[-1] == "gpt2_compiled" and sorted(models.order()) == sorted(models.ON_GPU)
    (tmp_path / "warm").touch()
    assert models.estimate("gpt2_compiled") < cold and models.order() == list(models.ON_GPU)


def test_texts_may_part_where_two_tokens_are_a_tie(plain_path):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(7, 8, 16, 1, 2)).eval()
    tokens = torch.tensor([[1, 2, 3, 4]])
    assert generation.same_text(model, tokens, tokens.clone())
    other = torch.tensor([[1, 2, 5, 6]])
    assert not generation.same_text(model, tokens, other)
    with torch.no_grad():
        model.embedding.weight[5] = model.embedding.weight[3]  # the output is tied to it
    assert generation.same_text(model, tokens, other)


def test_the_loss_head_of_a_gpu_is_in_bfloat16(gpu):
    ours, logits, *_ = loss_head.loss_head("cuda", 0.0, False, small=True)
    assert ours.status == logits.status == OK and "bfloat16" in ours.setting
