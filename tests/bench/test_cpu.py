import subprocess

import pytest

from primer_fast.bench import cpu, models, trial
from primer_fast.bench.goals import DECLARED
from primer_fast.bench.op import OURS
from primer_fast.bench.trial import Goal, Trial, TrialReport


def timed(provider=OURS, name="nanogpt", ratio=1.0, goal=None):
    made = Trial(name, "small", provider, unit="tokens")
    made.time([ratio], [1.0], 5)
    made.targets += [goal.judged(ratio)] if goal else []
    return made


def process(status=0, stderr="", trials=None):
    """Stands in for subprocess.run; writes ``trials`` where the command says."""
    commands = []

    def run(command, **options):
        commands.append((command, options))
        if trials is not None:
            TrialReport(trial.header("cpu", "x"), trials).save(command[command.index("--json") + 1])
        return subprocess.CompletedProcess(command, status, "", stderr)

    run.commands = commands
    return run


def test_a_part_runs_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    run = process(trials=[timed()])
    assert cpu.measure("nanogpt", 3.0, False, run) == [timed()]
    ((command, options),) = run.commands
    assert command[1:4] == ["-m", "primer_fast.bench.models", "nanogpt"] and "--no-compile" in command
    assert command[command.index("--seconds") + 1] == "3.0" and options["timeout"] == cpu.LIMIT
    assert "TRITON_INTERPRET" not in options["env"]


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (process(1, "Traceback\nKilled: no memory\n"), "exit status 1: Killed: no memory"),
        (process(-9), "exit status -9: it printed nothing"),
    ],
)
def test_a_part_that_dies_says_why(run, reason):
    (row,) = cpu.measure("cnn", 1.0, True, run)
    assert (row.provider, row.status, row.reason) == (OURS, "failed", reason)


def test_a_part_that_hangs_is_stopped():
    def hangs(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    (row,) = cpu.measure("cnn", 1.0, True, hangs)
    assert row.reason == f"stopped after {cpu.LIMIT:.0f} s"


def test_what_was_measured_before_a_failure_is_kept():
    found = cpu.measure("cnn", 1.0, True, process(1, "boom", trials=[timed()]))
    assert found == [timed()]


def test_the_command_saves_after_every_part_and_says_what_is_missed(monkeypatch, tmp_path, capsys):
    path = tmp_path / "new" / "cpu.json"
    saved = []

    def measure(part, seconds, with_compile):
        saved.append(len(trial.load(path).trials) if path.exists() else 0)
        if part == "cnn":
            return [Trial("cnn", "all", OURS, "failed", "no memory")]
        goal = Goal(">= 1.3 x", at_least=1.3)
        return [timed(), timed("nanoGPT", ratio=1.1, goal=goal), timed("other", ratio=2.0, goal=goal)]

    monkeypatch.setattr(cpu, "measure", measure)
    assert cpu.main(["--only", "nanogpt", "cnn", "--json", str(path)]) == 1
    assert saved == [0, 3]
    found = trial.load(path)
    assert len(found.trials) == 4 and found.header["kind"] == "cpu"
    assert found.header["command"] == f"python -m primer_fast.bench.cpu --only nanogpt cnn --json {path}"
    closing = capsys.readouterr().out.strip().splitlines()[-3:]
    assert [line.split(":")[0] for line in closing] == ["NOT MEASURED", "MISSED", "met"]
    assert "is 1.1" in closing[1]
    assert cpu.main(["--only", "nanogpt"]) == 0, "a missed target is no failure"


def test_parts_exist_and_their_goals_are_declared():
    assert set(cpu.PARTS) <= set(models.PARTS)
    subjects = {"wrappers": "call", "launchers": "launch"}
    assert {subject for subject, _ in DECLARED["cpu"]} == {subjects.get(part, part) for part in cpu.PARTS}
