"""From the files that a GPU left to files to commit: all of them or none, and nothing that was not right."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from made_folders import (
    MATMUL,
    SOURCE,
    TUNED,
    changed,
    gpu_folder,
    gpu_header,
    right_row,
    tune_row,
    tuned_file,
    wrong_row,
)

from primer_fast.bench import environment, gpu_table, keep, results
from primer_fast.bench.agenda import ROWS
from primer_fast.bench.environment import STAND_IN

ROOT = Path(__file__).parents[2]
STAGES = ("compile", "right", "fast", "programs", "sanitizer", "tune")


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
        (root / name).write_text(f"# Title\n\n{gpu_table.BEGIN}\nold\n{gpu_table.END}\n\nThe \u2265 rest.\n")
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
    return json.loads((root / "kernels" / "tuned" / "nvidia_h200.json").read_text())["settings"]


def refused(root, *arguments, capsys):
    """The reasons; nothing was written."""
    before = tree(root)
    capsys.readouterr()
    assert call(*arguments, root=root) == 1
    assert tree(root) == before
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "nothing was changed"
    return lines[:-1]


def test_what_was_right_is_put_in_place(root, folder, capsys):
    before = tree(root)
    capsys.readouterr()
    assert call(folder, root=root) == 0
    new = tree(root).keys() - before.keys()
    placed = {f"bench/results/nvidia_h200/2026-01-02-030{n}05-{stage}.json" for n, stage in enumerate(STAGES)}
    assert new == {"kernels/tuned/nvidia_h200.json"} | placed
    said = capsys.readouterr().out.splitlines()
    assert sorted(said) == sorted(f"written: {root / name}" for name in new | keep.DOCUMENTS.keys())
    found = results.read(root / "bench" / "results")
    assert found.unreadable == {} and len(found.of_gpus()) == 1
    assert {"nvidia_h200"} < {one.machine for one in found.reports}
    assert {one.content.kind for one in found.reports} == set(STAGES)
    assert settings(root) == {"matmul": {"4096x4096 item2": MATMUL | TUNED}}
    for name in keep.DOCUMENTS:
        text = (root / name).read_text()
        assert "| linear square_4096 | time of torch.compile over ours \u2265 1 | 1.25 |" in text
        assert (
            "NVIDIA H200, 2026-01-02" in text
            and "None failed; of what the kernels compute, 2 checks passed and 1 had no time." in text
        )
        assert re.search(r"\nNot measured: (\d+) of the (\d+) cases", text)[1] == str(len(ROWS) - 1)
        assert text.startswith("# Title") and text.endswith("\n\nThe \u2265 rest.\n") and gpu_table.NOTHING not in text


def test_the_readme_shows_the_worst_case_of_each_target_and_performance_every_case(root, folder):
    def more(data):
        for case, ratio in (("square_8192", 0.9), ("gpt2_up", 1.1), ("no_such_case", 0.1)):
            target = {"what": "versus torch.compile >= 1", "value": ratio, "met": ratio >= 1, "ratio": ratio}
            data["rows"].append(data["rows"][0] | {"case": case, "targets": [target]})

    changed(folder, "fast", more)
    assert call(folder, root=root) == 0
    tables = {
        name: [line for line in (root / name).read_text().splitlines() if line.startswith("| linear")]
        for name in keep.DOCUMENTS
    }
    assert len(tables["docs/performance.md"]) == 3
    (line,) = tables["README.md"]
    assert line.startswith("| linear square_8192 (worst of 3) |") and "**0.900**" in line


def test_kept_twice_is_kept_once(root, folder, capsys):
    call(folder, root=root)
    before = tree(root)
    capsys.readouterr()
    assert call(folder, root=root) == 0
    assert tree(root) == before and capsys.readouterr().out == "all of it stands there already\n"


def test_another_day_stands_beside_the_first(root, folder, tmp_path):
    call(folder, root=root)
    before = tree(root)
    later = gpu_folder(tmp_path / "later")
    for stage in STAGES:
        changed(later, stage, lambda data: data["header"].update(date="2026-03-04T05:06:07+00:00"))
    assert call(later, root=root) == 0
    after = tree(root)
    assert all(after[name] == content for name, content in before.items() if name not in keep.DOCUMENTS)
    assert len(after) == len(before) + len(STAGES)
    assert "2026-03-04" in (root / "README.md").read_text()


def test_nothing_in_the_folder_is_touched(root, folder):
    """It may be read-only. Even a temporary file would show: it changes the folder's time."""
    times = {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}
    contents = tree(folder)
    assert call(folder, root=root) == 0
    assert {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))} == times
    assert tree(folder) == contents


REFUSALS = {
    "not JSON": ("fast", "{", "fast.json: "),
    "empty": ("tune", "", "tune.json: "),
    "another schema": ("right", {"schema": "right 9"}, "right.json: its content: schema must be"),
    "of another stage": ("right", {"schema": "sanitizer 1", "header": gpu_header(), "rows": []},
                         "schema must be 'right 1'; got 'sanitizer 1'"),
    "no rows": ("right", {"schema": "right 1", "header": gpu_header()}, "must have a header and rows"),
    "a row without a column": ("right", {"schema": "right 1", "header": gpu_header(), "rows": [{"op": "linear"}]},
                               "row 0 must have"),
    "a word for a figure": ("right", {"schema": "right 1", "header": gpu_header(), "rows": [right_row(error="small")]},
                            "row 0: error must be a number or null; got 'small'"),
    "missing": ("right", None, "right.json is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_a_file_that_cannot_be_read_is_refused(root, tmp_path, capsys, name):
    stage, content, reason = REFUSALS[name]
    folder = gpu_folder(tmp_path / "gpu-out", **{stage: content})
    (line,) = refused(root, folder, capsys=capsys)
    assert reason in line
    assert refused(root, folder, "--partly", capsys=capsys) == [line]


@pytest.mark.parametrize(
    ("stages", "change", "reason"),
    [
        (STAGES, {"device": STAND_IN}, "on a stand-in for a GPU"),
        (STAGES, {"kind": "cpu"}, "it is of no GPU"),
        *(([stage], {"small": True}, f"{stage}.json: it was made with --small") for stage in STAGES),
        (["fast"], {"device": "NVIDIA H100"}, "device 'NVIDIA H100', not 'NVIDIA H200'"),
        (["fast"], {"driver": "1"}, "driver '1', not '580.1'"),
        (["fast"], {"source": "other"}, "source 'other', not '0123456789abcdef'"),
        (STAGES, {"source": "other"}, "the source measured is other, and that of this checkout is 0123456789abcdef"),
        (STAGES, {"device": "../../escaped"}, "must be fit to name a folder"),
        (STAGES, {"date": "yesterday"}, "Invalid isoformat string"),
    ],
)
def test_what_comes_from_elsewhere_is_refused(root, folder, capsys, stages, change, reason):
    for stage in stages:
        changed(folder, stage, lambda data: data["header"].update(change))
    assert any(reason in line for line in refused(root, folder, capsys=capsys))
    assert any(reason in line for line in refused(root, folder, "--partly", capsys=capsys))


def test_a_file_without_a_source_is_refused(root, folder, capsys):
    changed(folder, "programs", lambda data: data["header"].pop("source"))
    (line,) = refused(root, folder, capsys=capsys)
    assert line.startswith("refused: programs.json: its header must have") and line.endswith("missing source")


def test_an_empty_folder_is_refused(root, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (line,) = refused(root, tmp_path / "empty", capsys=capsys)
    assert "must hold one of compile.json" in line


def test_every_reason_is_named(root, folder, capsys):
    changed(folder, "right", lambda data: data["rows"].append(wrong_row("layer_norm")))
    changed(folder, "fast", lambda data: data["header"].update(source="other"))
    text = "\n".join(refused(root, folder, capsys=capsys))
    assert "of one machine and one source" in text and "the source measured is other" in text
    assert "layer_norm is not known to be right: layer_norm square_4096 bfloat16 output values: error 1" in text


def mark_wrong(data):
    data["rows"][0] |= {"status": "wrong", "reason": "0.5 from eager"}


NOT_RIGHT = {
    "a row of right.json": ("right", lambda data: data["rows"].append(wrong_row())),
    "one without figures": ("right", lambda data: data["rows"].append(
        right_row(passed=False, error=None, budget=None, reason="the GPU was lost"))),
    "a kernel that does not compile": ("compile", lambda data: data["rows"][0].update(errors=["_k: no registers"])),
    "ours is wrong where it was timed": ("fast", mark_wrong),
    "settings that fail": ("tune", lambda data: data["rows"].append(
        tune_row("linear", "matmul 64", status="failed: hung"))),
    "nobody tried it": ("right", lambda data: data.update(rows=data["rows"][1:2])),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_RIGHT)
def test_what_was_not_right_is_refused_or_left_out(root, folder, tmp_path, capsys, name):
    """Something of linear is wrong: nothing of it is kept, and nothing that rests on it; layer_norm is."""
    changed(folder, *NOT_RIGHT[name])
    changed(folder, "fast", lambda data: data["rows"].append(data["rows"][1] | {"op": "layer_norm", "provider": "x"}))
    changed(folder, "tune", lambda data: data["rows"].append(tune_row("layer_norm", "layer_norm 1024")))
    found = {"layer_norm": {"1024": {"warps": 8} | TUNED}}
    tuned_file(folder / "tuned" / "nvidia_h200.json", found | {"matmul": {"4096x4096 item2": MATMUL | TUNED}})
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


def test_a_failure_is_said_in_the_readme(root, folder):
    changed(folder, "right", lambda data: data["rows"].append(wrong_row("layer_norm")))
    assert call(folder, "--partly", root=root) == 0
    assert "**1 failed**, for example layer_norm square_4096 bfloat16 output" in (root / "README.md").read_text()


@pytest.mark.parametrize(
    ("op", "kept"),
    [("linear", {"call of conv2d"}), ("conv2d", {"gpt2"}), ("max_pool2d", {"gpt2", "call of conv2d"}), ("step", set())],
)
def test_programs_that_rest_on_what_was_wrong_are_left_out(root, folder, op, kept):
    changed(folder, "right", lambda data: data["rows"].append(wrong_row(op)))
    names = ("cnn", "call of conv2d", "unknown")
    more = [{"name": name, "setting": "s", "provider": "x", "status": "failed", "reason": "y"} for name in names]
    changed(folder, "programs", lambda data: data["trials"].extend(more))
    assert call(folder, "--partly", root=root) == 0
    assert {trial["name"] for trial in committed(root, "programs")["trials"]} == kept


def test_a_program_of_ours_that_failed_is_left_out_alone(root, folder, capsys):
    failed = {"name": "cnn", "setting": "s", "provider": "primer_fast", "status": "failed", "reason": "no memory"}
    changed(folder, "programs", lambda data: data["trials"].append(failed))
    assert "cnn is not known to be right: failed in programs.json: no memory" in refused(root, folder, capsys=capsys)[0]
    assert call(folder, "--partly", root=root) == 0
    assert {trial["name"] for trial in committed(root, "programs")["trials"]} == {"gpt2"}
    assert len(committed(root, "fast")["rows"]) == 3


def test_an_error_of_the_sanitizer_is_refused_or_said(root, folder, capsys):
    changed(folder, "sanitizer", lambda data: data["rows"][0].update(status="errors", errors=2, lines=["Invalid read"]))
    assert "memcheck: 2 errors: Invalid read" in refused(root, folder, capsys=capsys)[0]
    assert call(folder, "--partly", root=root) == 0
    assert "memcheck: 2 errors: Invalid read" in capsys.readouterr().out


def test_want_of_memory_in_a_search_makes_nothing_wrong(root, folder):
    status = "failed: OutOfMemoryError: CUDA out of memory"
    changed(folder, "tune", lambda data: data["rows"].append(tune_row("linear", "matmul 64", status=status)))
    assert call(folder, root=root) == 0


def only(folder, *stages):
    for stage in STAGES:
        if stage not in stages:
            (folder / f"{stage}.json").unlink()


def test_settings_found_later_rest_on_what_was_right_before(root, folder, tmp_path, capsys):
    later = gpu_folder(tmp_path / "later")
    only(later, "tune")
    assert "right.json is missing" in refused(root, later, capsys=capsys)[0]
    (folder / "tuned" / "nvidia_h200.json").unlink()
    only(folder, "right", "fast")
    assert call(folder, root=root) == 0 and call(later, root=root) == 0
    assert settings(root) == {"matmul": {"4096x4096 item2": MATMUL | TUNED}}


def test_what_was_right_of_another_source_says_nothing(root, folder, tmp_path, capsys, monkeypatch):
    call(folder, root=root)
    later = gpu_folder(tmp_path / "later")
    only(later, "tune")
    changed(later, "tune", lambda data: data["header"].update(source="newer"))
    monkeypatch.setattr(environment, "source", lambda: "newer")
    assert "right.json is missing" in refused(root, later, capsys=capsys)[0]


def test_an_entry_takes_the_place_of_its_bucket(root, folder):
    other = {"split": 2} | TUNED
    standing = {"matmul": {"4096x4096 item2": TUNED, "1024x64 item4": TUNED}, "decode": {"64": other}}
    tuned_file(root / "kernels" / "tuned" / "nvidia_h200.json", standing)
    assert call(folder, root=root) == 0
    assert settings(root) == {
        "decode": {"64": other}, "matmul": {"1024x64 item4": TUNED, "4096x4096 item2": MATMUL | TUNED}
    }  # fmt: skip


def test_an_entry_that_stands_there_needs_no_proof(root, folder):
    """A search goes on with the entries it was given, and tune.json names only what it tried itself."""
    tuned_file(root / "kernels" / "tuned" / "nvidia_h200.json", {"decode": {"64": TUNED}})
    found = {"decode": {"64": TUNED}, "matmul": {"4096x4096 item2": MATMUL | TUNED}}
    tuned_file(folder / "tuned" / "nvidia_h200.json", found)
    assert call(folder, root=root) == 0 and settings(root) == found


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({"matmul": {"512x512 item2": TUNED}}, "tune.json must say for which op it was found"),
        (
            {"matmul": {"4096x4096 item2": {"seconds": 0, "default_seconds": 1}}},
            "must have seconds, default_seconds, positive",
        ),
        ({"matmul": {"four": TUNED}}, "four"),
        ({"matmul": []}, 'it must hold {"settings"'),
    ],
)
def test_settings_of_which_too_little_is_known_are_refused(root, folder, capsys, found, reason):
    tuned_file(folder / "tuned" / "nvidia_h200.json", found)
    (line,) = refused(root, folder, capsys=capsys)
    assert line.startswith("refused: tuned/nvidia_h200.json: ") and reason in line


def test_settings_of_another_gpu_and_unknown_files_are_refused(root, folder, capsys):
    tuned_file(folder / "tuned" / "nvidia_h100.json", {})
    (folder / "notes.json").write_text("[]")
    (line,) = refused(root, folder, capsys=capsys)
    assert "notes.json" in line
    (folder / "notes.json").unlink()
    (line,) = refused(root, folder, capsys=capsys)
    assert "tuned/nvidia_h100.json: it must be of nvidia_h200" in line


def test_broken_settings_that_stand_there_are_not_overwritten(root, folder, capsys):
    (root / "kernels" / "tuned").mkdir(parents=True)
    (root / "kernels" / "tuned" / "nvidia_h200.json").write_text("{")
    (line,) = refused(root, folder, capsys=capsys)
    assert "it stands there already and cannot be read" in line


@pytest.mark.parametrize("name", keep.DOCUMENTS)
def test_a_document_without_its_place_refuses(root, folder, capsys, name):
    (root / name).write_text("nothing")
    (line,) = refused(root, folder, capsys=capsys)
    assert name in line and "it must have one place" in line


def test_a_missing_folder_is_a_wrong_call(root, tmp_path):
    with pytest.raises(SystemExit) as left:
        call(tmp_path / "nowhere", root=root)
    assert left.value.code == 2


@pytest.mark.parametrize("after", range(8))
def test_interrupted_at_any_moment_files_are_whole(root, folder, tmp_path, monkeypatch, after):
    whole = tmp_path / "whole"
    shutil.copytree(root, whole)
    call(folder, root=whole)
    old, new, calls = tree(root), tree(whole), []

    def interrupted(source, target):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(target)
        replace(source, target)

    replace = os.replace
    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(folder, root=root)
    left = tree(root)
    assert all(content in (old.get(name), new[name]) for name, content in left.items()), "no half, no temporary name"
    assert sum(content != old.get(name) for name, content in left.items()) == after
    monkeypatch.setattr("os.replace", replace)
    assert call(folder, root=root) == 0 and tree(root) == new


def test_a_disk_that_is_full_changes_nothing(root, folder, monkeypatch):
    before, written = tree(root), []

    def full(descriptor):
        if len(written) == 3:
            raise OSError("No space left on device")
        written.append(descriptor)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        call(folder, root=root)
    assert tree(root) == before


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
    assert {committed(root, stage)["header"]["commit"] for stage in STAGES} == {commit}
    git(root, "add", ".")
    git(root, "commit", "-m", "figures")
    before = tree(root)
    assert call(folder, root=root) == 0 and tree(root) == before, "a later commit of the same source"


@pytest.mark.parametrize("name", keep.DOCUMENTS)
def test_documents_say_what_is_committed(name):
    text = (ROOT / name).read_text()
    fresh = gpu_table.refreshed(text, results.read(), keep.DOCUMENTS[name])
    assert text == fresh, "python -m primer_fast.bench.keep writes its place again"


def test_every_program_has_its_ops():
    from primer_fast.bench import models, op

    assert all(part.startswith(tuple(keep.OPS_OF)) for part in set(models.PARTS) - {"wrappers", "launchers"})
    assert set().union(*keep.OPS_OF.values()) <= set(op.names())
