"""From the files that a GPU left to files to commit: all of them or none, and nothing that was not right."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from made_folders import MATMUL, SOURCE, TUNED, changed, gpu_folder, right_row, tune_row, tuned_file, wrong_row

from primer_fast.bench import environment, keep, models, op, results
from primer_fast.bench.agenda import ROWS
from primer_fast.bench.report import KINDS
from primer_fast.bench.stages import scoreboard

ROOT = Path(__file__).parents[2]
SETTINGS = "tuned/nvidia_h200.json"
FOUND = {"matmul": {"4096x4096 item2": MATMUL | TUNED}}  # by the search in a made folder


@pytest.fixture(autouse=True)
def source(monkeypatch):
    monkeypatch.setattr(environment, "source", lambda: SOURCE)


@pytest.fixture
def root(tmp_path):
    """A checkout of what is written to, without figures of a GPU."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "bench" / "results" / "cpu", root / "bench" / "results" / "cpu")
    for name in keep.DOCUMENTS:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(f"# Title\n\n{scoreboard.BEGIN}\nold\n{scoreboard.END}\n\nThe \u2265 rest.\n")
    assert call(root=root) == 0
    return root


@pytest.fixture
def folder(tmp_path):
    return gpu_folder(tmp_path / "gpu-out")


def call(*arguments, root):
    return keep.main([*map(str, arguments), "--root", str(root)])


def tree(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def committed(root, stage):
    (path,) = (root / "bench" / "results" / "nvidia_h200").glob(f"*-{stage}.json")
    return json.loads(path.read_text())


def settings(root):
    return json.loads((root / "kernels" / SETTINGS).read_text())["settings"]


def refused(root, *arguments, capsys):
    """The reasons; nothing was written."""
    before = tree(root)
    capsys.readouterr()
    assert call(*arguments, root=root) == 1
    assert tree(root) == before
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "nothing was changed"
    return lines[:-1]


def append(stage, row, key="rows"):
    """A change of a folder: a stage's file has one more row."""
    return lambda folder: changed(folder, stage, lambda data: data[key].append(row))


def header(*stages, **entries):
    """A change of a folder: some files' headers say something else, or those of all files."""

    def change(folder):
        for stage in stages or KINDS:
            changed(folder, stage, lambda data: data["header"].update(entries))

    return change


def write(name, content):
    return lambda folder: (folder / name).write_text(content)


def tuned(found, name=SETTINGS):
    return lambda folder: tuned_file(folder / name, found)


def only(*stages):
    return lambda folder: [(folder / f"{stage}.json").unlink() for stage in KINDS if stage not in stages]


def test_what_was_right_is_put_in_place_once(root, folder, capsys):
    """The folder may be read-only: a temporary file in it would show by the folder's time."""
    before, given = tree(root), {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}
    capsys.readouterr()
    assert call(folder, root=root) == 0
    assert {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))} == given
    new = tree(root).keys() - before.keys()
    placed = {f"bench/results/nvidia_h200/2026-01-02-030{n}05-{stage}.json" for n, stage in enumerate(KINDS)}
    assert new == {f"kernels/{SETTINGS}"} | placed
    said = capsys.readouterr().out.splitlines()
    assert sorted(said) == sorted(f"written: {root / name}" for name in new | keep.DOCUMENTS.keys())
    found = results.read(root / "bench" / "results")
    assert found.unreadable == {} and {one.content.kind for one in found.reports} == set(KINDS)
    assert settings(root) == FOUND
    for name in keep.DOCUMENTS:
        text = (root / name).read_text()
        assert "| linear square_4096 | time of torch.compile over ours \u2265 1 | 1.25 |" in text
        assert "NVIDIA H200, 2026-01-02" in text and "None failed; of what the kernels compute, 2 checks" in text
        assert f"\nNot measured: {len(ROWS) - 1} of the {len(ROWS)} cases" in text
        assert text.startswith("# Title") and text.endswith("\n\nThe \u2265 rest.\n") and scoreboard.NOTHING not in text
    before = tree(root)
    assert call(folder, root=root) == 0
    assert tree(root) == before and capsys.readouterr().out == "all of it stands there already\n"


def test_the_readme_shows_the_worst_case_of_each_target_and_performance_every_case(root, folder):
    row = json.loads((folder / "fast.json").read_text())["rows"][0]
    for case, ratio in (("square_8192", 0.9), ("gpt2_up", 1.1), ("no_such_case", 0.1)):
        target = {"what": "versus torch.compile >= 1", "value": ratio, "met": ratio >= 1, "ratio": ratio}
        append("fast", row | {"case": case, "targets": [target]})(folder)
    append("right", wrong_row("layer_norm"))(folder)
    assert call(folder, "--partly", root=root) == 0
    readme, performance = (
        [line for line in (root / name).read_text().splitlines() if line.startswith("| linear")]
        for name in ("README.md", "docs/performance.md")
    )
    assert len(performance) == 3 and len(readme) == 1
    assert readme[0].startswith("| linear square_8192 (worst of 3) |") and "**0.900**" in readme[0]
    assert "**1 failed**, for example layer_norm square_4096 bfloat16 output" in (root / "README.md").read_text()


def test_another_day_stands_beside_the_first(root, folder, tmp_path):
    call(folder, root=root)
    before = tree(root)
    later = gpu_folder(tmp_path / "later")
    header(date="2026-03-04T05:06:07+00:00")(later)
    assert call(later, root=root) == 0
    after = tree(root)
    assert all(after[name] == content for name, content in before.items() if name not in keep.DOCUMENTS)
    assert len(after) == len(before) + len(KINDS) and "2026-03-04" in (root / "README.md").read_text()


REFUSED = {
    "no JSON": (write("fast.json", "{"), "fast.json: "),
    "of another stage": (lambda folder: shutil.copy(folder / "tune.json", folder / "right.json"),
                         "right.json: its content: schema must be 'right 1'; got 'tune 1'"),
    "nothing checked": (lambda folder: (folder / "right.json").unlink(), "right.json is missing"),
    "nothing at all": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "must hold one of compile.json"),
    "a rehearsal": (header(device=environment.STAND_IN), "on a stand-in for a GPU"),
    "a CPU": (header(kind="cpu"), "it is of no GPU"),
    "small sizes": (header("fast", small=True), "fast.json: it was made with --small"),
    "another GPU": (header("fast", device="NVIDIA H100"), "device 'NVIDIA H100', not 'NVIDIA H200'"),
    "another driver": (header("tune", driver="1"), "driver '1', not '580.1'"),
    "two sources": (header("fast", source="other"), "source 'other', not '0123456789abcdef'"),
    "other code": (header(source="other"), "measured is other, and that of this checkout is 0123456789abcdef"),
    "no name for a folder": (header(device="../../escaped"), "must be fit to name a folder"),
    "no date": (header(date="yesterday"), "Invalid isoformat string"),
    "no driver": (lambda folder: changed(folder, "programs", lambda data: data["header"].pop("driver")),
                  "programs.json: its header must have device, details, driver"),
    "settings of nothing tried": (tuned({"matmul": {"512x512 item2": TUNED}}),
                                  "matmul 512x512 item2: tune.json must say for which op it was found"),
    "settings without times": (tuned({"matmul": {"4096x4096 item2": {"seconds": 0, "default_seconds": 1}}}),
                               f"{SETTINGS}: matmul 4096x4096 item2 must have seconds, default_seconds, positive"),
    "settings of no bucket": (tuned({"matmul": {"four": TUNED}}), "must have buckets of sizes and flags; got 'four'"),
    "no settings": (tuned({"matmul": []}), 'it must hold {"settings"'),
    "another GPU's settings": (tuned({}, "tuned/nvidia_h100.json"), "nvidia_h100.json: it must be of nvidia_h200"),
    "an unknown file": (write("notes.json", "[]"), "notes.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trusted_is_refused(root, folder, capsys, name):
    change, reason = REFUSED[name]
    change(folder)
    lines = refused(root, folder, capsys=capsys)
    assert any(reason in line for line in lines) and all(line.startswith("refused: ") for line in lines)
    assert refused(root, folder, "--partly", capsys=capsys) == lines


@pytest.mark.parametrize("name", [*keep.DOCUMENTS, f"kernels/{SETTINGS}"])
def test_what_stands_there_and_is_broken_is_not_overwritten(root, folder, capsys, name):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    begin, end = scoreboard.BEGIN, scoreboard.END
    for broken in ("{", f"{end}\n{begin}\n", f"{begin}\n{end}\n" * 2):
        (root / name).write_text(broken)
        (line,) = refused(root, folder, capsys=capsys)
        assert name in line and ("must have one place" in line or "stands there already and cannot be read" in line)


def test_every_reason_is_named(root, folder, capsys):
    append("right", wrong_row("layer_norm"))(folder)
    header("fast", source="other")(folder)
    text = "\n".join(refused(root, folder, capsys=capsys))
    assert "of one machine and one source" in text and "the source measured is other" in text
    assert "layer_norm is not known to be right: layer_norm square_4096 bfloat16 output values: error 1" in text


NOT_RIGHT = {
    "a row of right.json": append("right", wrong_row()),
    "one without figures": append("right", right_row(passed=False, error=None, budget=None, reason="the GPU was lost")),
    "a kernel that does not compile": lambda folder: changed(
        folder, "compile", lambda data: data["rows"][0].update(errors=["_k: no registers"])),
    "ours is wrong where it was timed": lambda folder: changed(
        folder, "fast", lambda data: data["rows"][0].update(status="wrong", reason="0.5 from eager")),
    "settings that fail": append("tune", tune_row("linear", "matmul 64", status="failed: hung")),
    "nobody tried it": lambda folder: changed(folder, "right", lambda data: data.update(rows=data["rows"][1:2])),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_RIGHT)
def test_what_was_not_right_is_refused_or_left_out(root, folder, capsys, name):
    """Something of linear is wrong: nothing of it is kept, and nothing that rests on it; layer_norm is."""
    NOT_RIGHT[name](folder)
    row = json.loads((folder / "fast.json").read_text())["rows"][1]
    append("fast", row | {"op": "layer_norm", "provider": "x"})(folder)
    append("tune", tune_row("layer_norm", "layer_norm 1024"))(folder)
    found = {"layer_norm": {"1024": {"warps": 8} | TUNED}}
    tuned(found | FOUND)(folder)
    lines = refused(root, folder, capsys=capsys)
    assert lines[0].startswith("refused: linear is not known to be right: ") and "--partly" in lines[-1]
    assert call(folder, "--partly", root=root) == 0
    said = capsys.readouterr().out
    assert all(f"left out of {stage}.json: " in said for stage in ("fast", "tune", "programs", "nvidia_h200"))
    assert {row["op"] for row in committed(root, "fast")["rows"]} == {"layer_norm"}
    assert [row["op"] for row in committed(root, "tune")["rows"]] == ["layer_norm"]
    assert committed(root, "programs")["trials"] == [] and settings(root) == found
    why = lines[0].removeprefix("refused: linear is not known to be right: ")
    assert committed(root, "programs")["header"]["not_kept"] == {"gpt2": f"linear is not right: {why}"}
    assert committed(root, "right")["rows"] == json.loads((folder / "right.json").read_text())["rows"], "whole"
    assert results.read(root / "bench" / "results").unreadable == {}
    before = tree(root)
    assert call(folder, "--partly", root=root) == 0 and tree(root) == before


@pytest.mark.parametrize(
    ("wrong", "kept"),
    [("linear", {"call of conv2d"}), ("conv2d", {"gpt2"}), ("max_pool2d", {"gpt2", "call of conv2d"}), ("step", set())],
)
def test_programs_that_rest_on_what_was_wrong_are_left_out(root, folder, wrong, kept):
    append("right", wrong_row(wrong))(folder)
    for name in ("cnn", "call of conv2d", "unknown"):
        row = {"name": name, "setting": "s", "provider": "x", "status": "failed", "reason": "y"}
        append("programs", row, "trials")(folder)
    assert call(folder, "--partly", root=root) == 0
    assert {trial["name"] for trial in committed(root, "programs")["trials"]} == kept


def test_a_program_of_ours_that_failed_is_left_out_alone(root, folder, capsys):
    failed = {"name": "cnn", "setting": "s", "provider": "primer_fast", "status": "failed", "reason": "no memory"}
    append("programs", failed, "trials")(folder)
    assert "cnn is not known to be right: failed in programs.json: no memory" in refused(root, folder, capsys=capsys)[0]
    assert call(folder, "--partly", root=root) == 0
    assert {trial["name"] for trial in committed(root, "programs")["trials"]} == {"gpt2"}
    assert len(committed(root, "fast")["rows"]) == 3


def test_an_error_of_the_sanitizer_is_refused_or_said(root, folder, capsys):
    """A setting that ran out of memory in a search is no such error."""
    append("tune", tune_row("linear", "matmul 64", status="failed: OutOfMemoryError: CUDA out of memory"))(folder)
    assert call(folder, root=root) == 0
    changed(folder, "sanitizer", lambda data: data["rows"][0].update(status="errors", errors=2, lines=["Invalid read"]))
    assert "memcheck: 2 errors: Invalid read" in refused(root, folder, capsys=capsys)[0]
    assert call(folder, "--partly", root=root) == 0
    assert "memcheck: 2 errors: Invalid read" in capsys.readouterr().out


def test_settings_found_later_rest_on_what_was_right_before(root, folder, tmp_path, capsys, monkeypatch):
    """Where both runs were of the same source."""
    later = gpu_folder(tmp_path / "later")
    only("tune")(later)
    assert "right.json is missing" in refused(root, later, capsys=capsys)[0]
    (folder / SETTINGS).unlink()
    only("right", "fast")(folder)
    assert call(folder, root=root) == 0 and call(later, root=root) == 0
    assert settings(root) == FOUND
    header("tune", source="newer")(later := gpu_folder(tmp_path / "newer"))
    only("tune")(later)
    monkeypatch.setattr(environment, "source", lambda: "newer")
    assert "right.json is missing" in refused(root, later, capsys=capsys)[0]


def test_an_entry_takes_the_place_of_its_bucket(root, folder):
    """What stands there needs no proof: a search goes on with it, and tune.json names only what it tried itself."""
    other = {"decode": {"64": {"split": 2} | TUNED}}
    tuned_file(root / "kernels" / SETTINGS, {"matmul": {"4096x4096 item2": TUNED, "1024x64 item4": TUNED}} | other)
    tuned(FOUND | other)(folder)
    assert call(folder, root=root) == 0
    assert settings(root) == {"matmul": {"1024x64 item4": TUNED} | FOUND["matmul"]} | other


def test_a_missing_folder_is_a_wrong_call(root, tmp_path):
    with pytest.raises(SystemExit) as left:
        call(tmp_path / "nowhere", root=root)
    assert left.value.code == 2


@pytest.mark.parametrize(("function", "after"), [("fsync", 3), *(("replace", n) for n in (0, 1, 4, 7))])
def test_interrupted_at_any_moment_files_are_whole(root, folder, tmp_path, monkeypatch, function, after):
    """While the first are written nothing changes; while they are renamed each is the old one or the new one."""
    whole = tmp_path / "whole"
    shutil.copytree(root, whole)
    call(folder, root=whole)
    old, new, calls, real = tree(root), tree(whole), [], getattr(os, function)

    def interrupted(*arguments):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(arguments)
        real(*arguments)

    monkeypatch.setattr(os, function, interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(folder, root=root)
    left = tree(root)
    assert all(content in (old.get(name), new[name]) for name, content in left.items()), "no half, no temporary name"
    renamed = after if function == "replace" else 0
    assert sum(content != old.get(name) for name, content in left.items()) == renamed
    monkeypatch.setattr(os, function, real)
    assert call(folder, root=root) == 0 and tree(root) == new


def git(root, *command):
    told = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.hooksPath=/dev/null", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", root, *told, *command], check=True, capture_output=True)


def test_the_commit_is_that_of_the_source(root, folder, capsys):
    (root / "bench" / "part.py").write_text("x = 1\n")
    git(root, "init")
    git(root, "add", ".")
    git(root, "commit", "-m", "all")
    (root / "bench" / "part.py").write_text("x = 2\n")
    (root / "bench" / "new.py").write_text("")
    lines = refused(root, folder, capsys=capsys)
    assert [line.split()[1] for line in lines] == ["bench/part.py", "bench/new.py"]
    git(root, "checkout", "bench/part.py")
    (root / "bench" / "new.py").unlink()
    (root / "README.md").write_text((root / "README.md").read_text() + "Words are no source.\n")
    assert call(folder, root=root) == 0
    commit = environment.commit(root).partition("+")[0]
    assert {committed(root, stage)["header"]["commit"] for stage in KINDS} == {commit}
    git(root, "add", ".")
    git(root, "commit", "-m", "figures")
    before = tree(root)
    assert call(folder, root=root) == 0 and tree(root) == before, "a later commit of the same source"


@pytest.mark.parametrize("name", keep.DOCUMENTS)
def test_documents_say_what_is_committed(name):
    text = (ROOT / name).read_text()
    fresh = scoreboard.refreshed(text, results.read(), keep.DOCUMENTS[name])
    assert text == fresh, "python -m primer_fast.bench.keep writes its place again"


def test_every_program_has_its_ops():
    assert all(part.startswith(tuple(keep.OPS_OF)) for part in set(models.PARTS) - {"wrappers", "launchers"})
    assert set().union(*keep.OPS_OF.values()) <= set(op.names())
