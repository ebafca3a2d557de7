"""Two runs in one folder, a full disk, one that may not be written to, a folder that vanishes."""

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from cli.commands import CALLS, at_step, differences, saved_step, whole

from primer_fast.cli import align, main
from primer_fast.cli.run import folder as run_folder
from primer_fast.cli.run.folder import RunFolder, WriteError, write_bytes, writing

pytestmark = pytest.mark.usefixtures("folder", "undrawn")


GPT = CALLS["gpt"]
AGAIN = ["train", "gpt", "--resume", "--out"]


def test_a_second_run_in_the_folder_is_refused(refused):
    shutil.copytree(whole("gpt"), "run")
    with RunFolder("run", "train gpt").held():
        for more in ("--resume", "--overwrite"):
            message = refused(GPT.argv("run", more))
            assert f"run: another run is writing here (process {os.getpid()} on " in message
            assert "wait for its end, or choose another --out" in message
    assert differences("run", whole("gpt")) == [], "and no lock is left"
    assert main(GPT.argv("run", "--overwrite")) == 0


def test_a_second_align_is_refused(monkeypatch, refused):
    monkeypatch.setattr(align, "load_material", lambda options: None)
    with RunFolder("run", "align").held():
        assert "another run is writing here" in refused("align --out run")


def hold(path, ready):
    with RunFolder(path, "train gpt").held():
        ready.set()
        signal.pause()


def test_the_lock_of_a_killed_run_is_gone(tmp_path):
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    process = fork.Process(target=hold, args=(tmp_path / "run", ready))
    process.start()
    assert ready.wait(20)
    with pytest.raises(ValueError, match=rf"another run is writing here \(process {process.pid} on "):
        RunFolder(tmp_path / "run", "train gpt").held().__enter__()
    process.kill()
    process.join()
    assert (tmp_path / "run" / ".lock").exists()
    run = RunFolder(tmp_path / "run", "train gpt")
    with run.held():
        run.begin({}, overwrite=False)
    assert [p.name for p in run.path.iterdir()] == ["config.json"]


def test_a_lock_that_its_holder_removes_meanwhile_is_not_taken(tmp_path, monkeypatch):
    """Opened before, locked after: the descriptor is of a file that nobody else will find."""
    run = RunFolder(tmp_path / "run", "train gpt")
    flock, calls = run_folder.fcntl.flock, []

    def late(descriptor, how):
        calls.append(descriptor)
        if len(calls) == 1:
            run.lock.unlink()
        flock(descriptor, how)

    monkeypatch.setattr(run_folder.fcntl, "flock", late)
    with run.held():
        assert len(calls) == 2 and run.lock.read_text().startswith(f"process {os.getpid()} on ")


def test_a_file_system_without_locks_is_not_guarded_but_works(tmp_path, monkeypatch):
    def unsupported(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "flock", unsupported)
    run = RunFolder(tmp_path / "run", "train gpt")
    with run.held():
        run.begin({}, overwrite=False)
        run.log({"step": 1})
    assert run.rows() == [{"step": 1}]


def test_a_full_disk_stops_the_run_with_the_checkpoint_before_whole(refused):
    """/dev/full takes no byte, as a full disk."""
    temporary = Path("run/checkpoint.safetensors.tmp")
    with at_step(6, lambda: temporary.symlink_to("/dev/full")):
        message = refused(GPT.argv("run"), status=1)
    assert "run/checkpoint.safetensors: cannot be written (No space left on device); make room on" in message
    assert "the checkpoint in run is of an earlier step and kept" in message
    assert saved_step("run") == 4 and not os.path.lexists(temporary), "what was half written is removed"
    assert main([*AGAIN, "run"]) == 0
    assert differences("run", whole("gpt")) == []


@pytest.fixture
def disk(tmp_path):
    """A disk of 256 kB, where it can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a disk of its own needs the right to mount")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def remount(folder, how):
    subprocess.run(["mount", "-o", f"remount,{how}", folder], check=True)


@pytest.mark.parametrize("room", [3, 20, 60, 100])
def test_a_disk_that_fills_up_and_is_cleared(room, disk, refused):
    """Whichever file is the one that does not fit: the run goes on when there is room again."""
    out, ballast, size = disk / "run", disk / "ballast", os.statvfs(disk)
    ballast.write_bytes(b"x" * (size.f_bavail * size.f_frsize - room * 1024))
    message = refused(GPT.argv(out), status=1)
    assert str(out) in message and "No space left on device); make room on that disk" in message
    ballast.unlink()
    remount(disk, "size=2m")
    assert main([*AGAIN, str(out)] if (out / "config.json").exists() else GPT.argv(out)) == 0
    assert differences(out, whole("gpt")) == []


def test_a_disk_that_may_not_be_written_to(disk, refused):
    remount(disk, "size=4m")
    out = disk / "run"
    with at_step(6, lambda: signal.raise_signal(signal.SIGINT)):
        assert main(GPT.argv(out)) == 130
    remount(disk, "ro")
    for call, name in (([*AGAIN, str(out)], out / ".lock"), (GPT.argv(disk / "b"), disk / "b")):
        message = refused(call, status=1)
        assert f"{name}: cannot be written (Read-only file system); choose an --out" in message
    assert saved_step(out) == 6
    remount(disk, "rw")
    assert main([*AGAIN, str(out)]) == 0


def test_a_folder_that_vanishes(refused):
    with at_step(2, lambda: shutil.rmtree("run")):
        message = refused(GPT.argv("run"), status=1)
    assert "run: the folder was removed or replaced while the run wrote to it; start anew" in message
    assert "no checkpoint had been written yet" in message and not Path("run").exists()


def test_a_folder_that_another_run_has_taken_over_is_not_written_to(refused):
    def replace():
        shutil.rmtree("run")
        RunFolder("run", "train gpt").begin({}, overwrite=False)

    with at_step(6, replace):
        assert "removed or replaced" in refused(GPT.argv("run"), status=1)
    assert [p.name for p in Path("run").iterdir()] == ["config.json"]


def test_a_limit_of_the_size_of_files(tmp_path):
    """The kernel's own refusal, in a process that may write four bytes."""

    def limited(path, queue):
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (4, 4))
        try:
            write_bytes(path, b"new content")
        except WriteError as error:
            queue.send(str(error))

    path = tmp_path / "file"
    path.write_bytes(b"old")
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=limited, args=(path, theirs))
    process.start()
    assert ours.poll(20)
    assert ours.recv() == f"{path}: cannot be written (File too large); raise the limit of the size of files"
    process.join()
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "number, advice",
    [(errno.EACCES, "choose an --out that can be written to"), (errno.EDQUOT, "make room in the quota"),
     (errno.ENOENT, "its folder is gone"), (errno.ENOTDIR, "a part of this path is a file"), (errno.EIO, None)],
)  # fmt: skip
def test_each_reason_has_its_advice(number, advice, tmp_path):
    with pytest.raises(WriteError) as caught, writing(tmp_path / "file"):
        raise OSError(number, os.strerror(number), "elsewhere")
    want = f"{tmp_path / 'file'}: cannot be written ({os.strerror(number)})"
    assert str(caught.value).startswith(want) and (advice is None or f"; {advice}" in str(caught.value))
    assert "elsewhere" not in str(caught.value)


def test_a_run_that_was_killed_before_it_had_begun_leaves_room_for_another(tmp_path):
    run = RunFolder(tmp_path / "run", "train gpt")
    run.path.mkdir()
    (run.path / "config.json.tmp").write_text("{")
    run.lock.write_text("process 1 on elsewhere\n")
    run.begin({"lr": 1}, overwrite=False)
    assert run.read_options() == {"lr": 1}


def test_what_the_run_before_was_shaped_like_is_forgotten(tmp_path):
    """Killed between its configuration and its files, a run must not go on with those of the run that it replaces."""
    run = RunFolder(tmp_path / "run", "train gpt")
    run.begin({}, overwrite=False)
    run.write_files({"transformer.json": "old", "tokenizer.json": "old"})
    run.begin({}, overwrite=True)
    assert [p.name for p in run.path.iterdir()] == ["config.json"]
    run.write_files({"transformer.json": "new"}, keep=True)
    run.write_files({"transformer.json": "newer", "tokenizer.json": "newer"}, keep=True)
    assert (run.path / "transformer.json").read_text() == "new"
    assert (run.path / "tokenizer.json").read_text() == "newer"


def test_rows_are_on_the_disk_before_the_checkpoint_that_is_beyond_them(tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run", "train gpt")
    run.begin({}, overwrite=False)
    run.log({"step": 1})
    synced, sync = [], os.fsync
    monkeypatch.setattr(
        run_folder.os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd))
    )
    run.save_checkpoint({"w": torch.zeros(1)}, {})
    assert [os.path.basename(name) for name in synced] == ["metrics.jsonl", "checkpoint.safetensors.tmp", "run"]
