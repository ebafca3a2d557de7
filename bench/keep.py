"""python -m primer_fast.bench.keep FOLDER: puts what `make gpu` and `make gpu-tune` left in place, to be committed.

Results go to bench/results/<gpu>/<date>-<time>-<stage>.json, tuned settings into kernels/tuned/<gpu>.json, beside the
entries that stand there; then README.md and docs/performance.md say what is measured. All is checked before anything
is written: a folder that was measured on other code, or found a kernel wrong, changes nothing. Kept twice is kept once.

Without FOLDER only the documents are written again, from what is there.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from primer_fast.bench import environment, results
from primer_fast.bench import op as ops
from primer_fast.bench.files import replace_texts
from primer_fast.bench.report import FAST, PROGRAMS, RIGHT, SANITIZER, SCHEMAS, TUNE, Report, parse
from primer_fast.bench.stages import scoreboard, stages
from primer_fast.bench.stages.folder import GpuFolder, Refused, elsewhere, gpu_of, not_right, read
from primer_fast.kernels.tunable import read_tuned

DOCUMENTS = {"README.md": False, "docs/performance.md": True}  # whether every case stands there, or the worst ones
_TRANSFORMER = {"embedding", "layer_norm", "linear", "mlp", "scaled_dot_product_attention"}
_TRAINED = _TRANSFORMER | {"linear_cross_entropy", "linear_log_prob"}
OPS_OF = {  # the ops that a program's figures rest on
    "mlp": {"linear", "mlp"}, "cnn": {"conv2d", "linear", "max_pool2d", "mlp"}, "nanogpt": _TRAINED, "gpt2": _TRAINED,
    "dpo": _TRAINED, "ppo": _TRAINED, "generation": _TRANSFORMER, "loss_head": {"linear_cross_entropy"},
}  # fmt: skip


@dataclass
class Changes:
    """``texts``: what is to be written; ``said``: what was not good, and what is left out for it."""

    texts: dict[Path, str] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)


def changes(folder: Path, root: Path, partly: bool = False) -> Changes:
    """What is to be written below ``root``, a checkout; this writes nothing.

    Args:
        partly: leave out what rests on something that was not right, instead of refusing all.

    Raises:
        Refused: with every reason.
    """
    found, made = read(folder), Changes()
    reasons = [*elsewhere(found), *_uncommitted(root)]
    committed = root / "bench" / "results" / gpu_of(found.header)
    right = _right_of(found, committed)
    wrong = not_right(found, right) if right else {}
    bad = [f"{name} is not known to be right: {why}" for name, why in wrong.items()]
    if SANITIZER in found.stages:  # it does not say whose kernel it was
        bad += stages.failures(parse(found.stages[SANITIZER], SANITIZER))
    if right is None:
        reasons.append("right.json is missing: nothing says that what was timed was right")
    elif bad and not partly:
        reasons += [*bad, "nothing is kept; --partly leaves out what rests on an op that is not right"]
    made.said += bad
    _merge_tuned(found, root, wrong, made, reasons)
    if reasons:
        raise Refused(reasons)
    _leave_out(found, wrong, made.said)
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    for kind, data in found.stages.items():
        day, time = data["header"]["date"][:10], re.sub(r"\D", "", data["header"]["date"][11:19])
        path = committed / f"{day}-{time}-{kind}.json"
        before = _standing(path)
        known = before.get("header", {}).get("commit") or (commit[0] if commit else data["header"].get("commit"))
        data["header"]["commit"] = known  # the GPU's machine had no git, and later commits have the same source
        if data != before:
            made.texts[path] = json.dumps(data, indent=1)
    return made


def _uncommitted(root: Path) -> list[str]:
    """Files of the source that belong to no commit; none where there is no git."""
    places = [f"{place}/*.py" for place in ("bench", "kernels", "primer_fast")]
    lines = _git(root, "status", "--porcelain", "--untracked-files=all", "--", *places)
    return [f"{line[3:]} is not committed: commit the source that was measured first" for line in lines]


def _git(root: Path, *command: str) -> list[str]:
    return environment.said("git", "--no-optional-locks", "-C", str(root), *command)


def _right_of(found: GpuFolder, committed: Path) -> Report | None:
    """What this run found right; where it did not check, as in a search for settings, an earlier run of this source."""
    if RIGHT in found.stages:
        return parse(found.stages[RIGHT], RIGHT)
    kept = [one.content for one in results.read(committed.parent).of_kind(RIGHT) if one.machine == committed.name]
    kept = [one for one in kept if one.header.get("source") == found.header["source"]]
    return kept[-1] if kept else None


def _standing(path: Path) -> dict:
    """What stands there already; nothing if it is not there or cannot be read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _merge_tuned(found: GpuFolder, root: Path, wrong: dict[str, str], made: Changes, reasons: list[str]) -> None:
    """The tuned file that there will be: an entry of this run takes the place of its bucket's.

    Several ops may share a choice. An entry is judged by the op that tune.json names for it.
    """
    path = root / "kernels" / "tuned" / f"{gpu_of(found.header)}.json"
    try:
        standing = read_tuned(path)["settings"] if path.exists() else {}
    except (OSError, ValueError) as error:
        reasons.append(f"{path}: it stands there already and cannot be read: {error}")
        return
    ops_of = {row["site"]: row["op"] for row in found.rows(TUNE)}
    settings = {choice: dict(section) for choice, section in standing.items()}
    for name, content in found.tuned.items():
        for choice, bucket, entry in _entries(content["settings"]):
            op = ops_of.get(f"{choice} {bucket}")
            if entry == standing.get(choice, {}).get(bucket):
                continue
            if op is None:
                reasons.append(f"{name}: {choice} {bucket}: tune.json must say for which op it was found; it does not")
            elif op in wrong:
                made.said.append(f"left out of {path.name}: {choice} {bucket}: {op} is not right")
            else:
                settings.setdefault(choice, {})[bucket] = entry
        if settings != standing:
            settings = {choice: dict(sorted(section.items())) for choice, section in sorted(settings.items())}
            made.texts[path] = json.dumps(content | {"settings": settings}, indent=1)


def _entries(settings: dict[str, dict[str, dict]]) -> Iterable[tuple[str, str, dict]]:
    return ((choice, bucket, entry) for choice, of in settings.items() for bucket, entry in of.items())


def _leave_out(found: GpuFolder, wrong: dict[str, str], said: list[str]) -> None:
    """Take out of the figures those that rest on what is not right."""
    for kind, name in ((FAST, "op"), (TUNE, "op"), (PROGRAMS, "name")):
        data, key = found.stages.get(kind), SCHEMAS[kind].rows
        if data is None:
            continue
        out = {row[name]: why for row in data[key] if (why := _rests_on(row[name], wrong))}
        data[key] = [row for row in data[key] if row[name] not in out]
        data["header"] |= {"not_kept": out} if out else {}
        said += [f"left out of {kind}.json: {what}" for what in out]


def _rests_on(name: str, wrong: dict[str, str]) -> str:
    """Why an op or a program is left out; "" if it is not.

    A failed check that belongs to no op, such as a training step, counts against every program.
    """
    every = set(ops.names())
    first, _, op = name.partition(" of ")
    known = {op} & every if first in ("call", "launch") else OPS_OF.get(name, every)
    parts = {name} if name in every else {name} | known | (wrong.keys() - every - OPS_OF.keys())
    return "; ".join(f"{part} is not right: {wrong[part]}" for part in sorted(parts & wrong.keys()))


def documents(root: Path) -> dict[Path, str]:
    """Those whose places do not say what is committed, as they should be.

    Raises:
        Refused: one is missing, or has no such place.
    """
    committed, made, reasons = results.read(root / "bench" / "results"), {}, []
    for name, whole in DOCUMENTS.items():
        try:
            old = (root / name).read_text(encoding="utf-8")
            new = scoreboard.refreshed(old, committed, whole)
            made |= {root / name: new.removesuffix("\n")} if new != old else {}
        except (OSError, ValueError) as error:
            reasons.append(f"{root / name}: {error}")
    if reasons:
        raise Refused(reasons)
    return made


def keep(folder: Path | None, root: Path, partly: bool = False) -> tuple[list[Path], list[str]]:
    """Write it all; the files that changed, and what is to be said of what was left out.

    Raises:
        Refused: nothing is written.
    """
    documents(root)  # one without its place refuses before anything is written
    made = Changes() if folder is None else changes(folder, root, partly)
    replace_texts(made.texts)
    texts = documents(root)
    replace_texts(texts)
    return [*made.texts, *texts], made.said


def main(argv: list[str] | None = None) -> int:
    """The exit status is 0, or 1 if it refused, or 2 for a wrong call."""
    first, *_, last = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(prog="python -m primer_fast.bench.keep", description=f"{first} {last}")
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="the folder that `make gpu` wrote")
    parser.add_argument("--partly", action="store_true", help="leave out what rests on an op that was not right")
    parser.add_argument(
        "--root", type=Path, metavar="DIR", default=results.FOLDER.parents[1], help="the checkout to write to"
    )
    args = parser.parse_args(argv)
    if args.folder is not None and not args.folder.is_dir():
        parser.error(f"FOLDER must be a folder; got {args.folder}")
    try:
        written, said = keep(args.folder, args.root, args.partly)
    except Refused as refused:
        print("\n".join(f"refused: {reason}" for reason in refused.reasons), file=sys.stderr)
        print("nothing was changed", file=sys.stderr)
        return 1
    print("\n".join([*said, *(f"written: {path}" for path in written)] or ["all of it stands there already"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
