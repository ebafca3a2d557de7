"""Faults planted in the package one at a time, each of which its tests must notice: what the tests are worth.

``python tests/mutants.py`` runs all, ``python tests/mutants.py layer_norm ppo`` those whose file has such a part in its
name. Each changes a file of this checkout, runs the tests named beside it and puts the file back. The exit status is 1
if one survived. tests/test_mutants.py keeps the list up to date.
"""

import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Mutant(NamedTuple):
    file: str
    right: str  # text of the file, whose first occurrence is replaced
    wrong: str
    tests: list[str]  # arguments of pytest that notice it


def _of(tests: str | list[str], file: str, *changes: tuple[str, str]) -> list[Mutant]:
    """tests: arguments, or an op, all of whose tests are meant."""
    arguments = ["tests/functional", "-k", tests] if isinstance(tests, str) else tests
    return [Mutant(file, right, wrong, arguments) for right, wrong in changes]


_MASKS = ["tests/functional/test_attention_masks.py"]
_PREPARED = [
    f"tests/{name}.py" for name in ("proof/test_prepared", "properties/test_prepared", "functional/test_row_losses")
]
_REPLACE = ["tests/adopt/test_replace.py", "tests/adopt/test_replace_left.py"]
_HEADS = "cross_entropy or log_prob or masked_classes"

MUTANTS = [
    # Layer norm
    *_of("layer_norm", "kernels/layer_norm/__init__.py",
        ("count = tl.minimum(N - start, BLOCK_N)", "count = tl.minimum(N, BLOCK_N)"),
        ("step * step * share * start", "step * step * share"),
        ("tl.rsqrt(squares / N + eps)", "tl.rsqrt(squares / N)"),
        ("tl.where(inside, tiles[part] - mean[:, None], 0.0)", "tiles[part] - mean[:, None]"),
    ),
    *_of("layer_norm", "kernels/layer_norm/backward.py",
        ("mean_g[:, None] - n * mean_gn[:, None]", "mean_g[:, None]"),
        ("DB:\n                db += dy", "DB:\n                db += 0 * dy"),
        ("(row < last)[:, None] & (col < N)", "(row < rows)[:, None] & (col < N)"),
        ("part_ptr + DW * N", "part_ptr + N"),
    ),
    # What the interpreter remembers
    *_of(["tests/test_interpreter.py"], "primer_fast/interpreter/speed.py",
        ("number, kind, first", "number, first"),
        ("beside.dtype.name, id(beside.shape)", "id(beside.shape)"),
        ("whole=True", "whole=False"),
        ("or result.max() >", "or result.max() - 1 >"),
    ),
    # Linear, its activations, and products in general
    *_of("linear and not linear_", "kernels/activation.py",
        ("z <= 0, 0.0, z", "z > 0, z, 0.0"),
        ("saved <= 0, 0.01 * dy", "saved < 0, 0.01 * dy"),
        ("tl.abs(u) < 0.1", "tl.abs(u) < 0.5"),
        ("0.21406444881780074", "0.07135481627260025"),
        ("cdf + z * density", "cdf"),
    ),
    *_of("linear and not linear_", "kernels/matmul.py",
        ("n + HALF, M, N", "n, M, N"),
        ("part_ptr + numel + offs_m", "part_ptr + offs_m"),
        ("offs_row.to(tl.int64)[:, None] * strides[0]", "offs_row[:, None] * strides[0]"),
    ),
    *_of("linear and not linear_", "kernels/tile.py", ("tiles_m - first_m", "tiles_m")),
    # Which settings are taken from a file
    *_of(["tests/tuning/test_tunable.py"], "kernels/tunable.py",
        ("tuned is not None and self.fits(gpu, problem, tuned)", "tuned is not None"),
        ("(f\"{name}{int(value)}\" for name, value in flags.items())", "()"),
    ),
    # Convolution
    *_of("conv2d", "kernels/conv2d/depthwise.py", ("other=0.0", "other=1.0")),
    # Max pooling
    *_of("max_pool2d", "kernels/max_pool2d/__init__.py",
        ("(x > best) | (x != x)", "x > best"),
        ("(x > best) | (x != x)", "(x >= best) | (x != x)"),
        ("first = skip_h * KW", "first = skip_h"),
        ("h.to(tl.int64) * W + w", "h.to(tl.int64) * H + w"),
    ),
    # Embedding
    *_of("embedding", "kernels/embedding.py",
        ("(ids >= 0) & (ids < rows)", "ids < rows"),
        ("(v < V) & (v != padding)", "(v < V)"),
        ("begin > 0) & (tl.load(sorted_ptr + begin - 1", "begin > CHUNK) & (tl.load(sorted_ptr + begin - 1"),
        ("total.to(table_ptr", "(total - tl.sum(sums, axis=0)).to(table_ptr"),
        ("row % period", "row"),
    ),
    # Attention
    *_of(_MASKS, "kernels/attention/backward_kv.py", (" - tl.load(statistics + 2 * PAD)[None, :])", ")")),
    *_of(_MASKS, "kernels/attention/backward_q.py",
        ("(tl.exp2(-tl.load(statistics + 2 * PAD)) * dq_scale)[:, None]", "dq_scale")),
    *_of(_MASKS, "kernels/attention/tile.py",
        ("((3 if ADDED else 2) * PAD)", "(2 * PAD)"),
        ("before = (m & -PAD) * 2 if ADDED else m & -PAD", "before = m & -PAD"),
        ("unit = 1.0 if self.added else LOG2_E", "unit = LOG2_E"),
        ("self.softcap > 1000", "self.softcap > 1e30"),
    ),
    *_of(_MASKS, "kernels/attention/backward.py",
        ("rows + ((rows & -PAD) * 2 if ADDED else rows & -PAD)", "rows + (rows & -PAD)"),
        ("tl.where(nothing, 0.0, log_total)", "log_total"),
    ),
    *_of(_MASKS, "kernels/attention/mask.py", ("difference *= LOG2_E", "difference *= 1.0")),
    *_of(_MASKS, "kernels/attention/decode.py",
        ("log2_e = 1.0 if added else LOG2_E", "log2_e = LOG2_E"),
        ("tl.exp2(in_base_2(tops - base, ADDED))", "tl.exp2(tops - base)"),
    ),
    # Loss heads
    *_of(_HEADS, "kernels/logits/gradient.py",
        ("m, v + HALF, M, V", "m, v, M, V"),
        ("inside = (offs_m[:, None] < M) & (offs_v[None, :] < V)", "inside = (offs_m[:, None] < M) & (offs_v >= 0)"),
        ("slope = entropy_grad * LN_2", "slope = entropy_grad"),
        ("g = tl.exp2(log_e) * factor + uniform[:, None]", "g = tl.exp2(log_e) * factor"),
    ),
    *_of(_PREPARED, "kernels/logits/row_losses.py",
        ("dloss = tl.where(target == ignore_index, 0.0, dloss)", "dloss = dloss"),
        ("loss = tl.math.div_rn(loss, number)", "loss = loss"),
    ),
    # Launches that are prepared once for each kind of call
    *_of(_PREPARED, "kernels/launch/prepared.py",
        ('{a}.data_ptr() & 15"', '0"'), ("{a}.stride(), ", ""), ("{a}.dtype, ", ""),
        ("            self.plans.clear()\n", "            pass\n"),
        ("with torch.cuda.device(device):", "with contextlib.nullcontext():"),
    ),
    *_of(_PREPARED, "kernels/launch/recording.py",
        ("[None if t is None else t.detach() for t in arguments]", "list(arguments)"),
        ("            self.repeatable = False", "            pass"),
    ),
    *_of(_PREPARED, "kernels/launch/plan.py",
        ('return f"{name} + {offset}" if offset else name', "return name"),
        ("covers and _dense(t) and _dense(memory.tensor)", "True"),
        ('if name in self.names else str(t.storage_offset())', 'if name in self.names else "0"'),
        ("if step.memory.name in self.used:", "if step.memory.name not in self.used:"),
    ),
    *_of(_PREPARED, "kernels/launch/direct.py",
        ("active.get_current_device() != device", "False"),
        ("return bool(hooks[0].calls or hooks[1].calls)", "return False"),
        ("active is not driver or ", ""),
    ),
    # Losses and procedures
    *_of(["tests/train/test_dpo.py", "tests/train/test_preference_losses.py"], "primer_fast/train/dpo.py",
        ("-torch_F.logsigmoid(-beta * h)", "-torch_F.logsigmoid(beta * h)"),
        ("/ (1 - 2 * e)", "/ (1 - e)"),
        ("ratios / mask.sum(dim=1)", "ratios"),
        ("(rejected + 1 / (2 * beta)) ** 2", "(rejected - 1 / (2 * beta)) ** 2"),
    ),
    *_of(["tests/train/test_ppo_losses.py"], "primer_fast/train/ppo_losses.py",
        ("torch.expm1(-d) + d", "torch.expm1(-d)"),
        ("torch.where(mask, -coefficient * kl, 0.0)", "-coefficient * kl"),
        ("gamma * lam * ahead", "lam * ahead"),
        ("next_value = torch.where(here, values[:, t], 0.0)", "next_value = values[:, t]"),
        ("torch.where(mask, x - masked_mean(x, mask), 0.0)", "x - masked_mean(x, mask)"),
    ),
    *_of(["tests/train/test_procedures.py", "-k", "clipped or precision or means or figures"],
        "primer_fast/train/steps.py",
        ("    return norm\n\n\ndef apply", "    return norm * 0 + (clip_norm or norm)\n\n\ndef apply"),
        ("    state.scaler.unscale_(state.optimizer)\n", ""),
        ("enabled=dtype is not None)", "enabled=False)"),
        ("{name: values.mean().item()", "{name: values[-1].item()"),
    ),
    *_of(["tests/train/test_cuda_graphs.py", "-k", "sgd or outlive"], "primer_fast/train/cuda_graphs.py",
        ("            buffer.copy_(tensor)", "            pass"),
        ("state.step += found.steps", "state.step += 0"),
        ("value.clone() for name", "value for name"),
    ),
    # Modules in the place of others
    *_of(_REPLACE, "primer_fast/nn/exact_types.py",
        ("                module.__dict__.pop(name, None)", "                pass"),
        ("if type(module) is kind:", "if True:"),
    ),
    *_of(_REPLACE, "primer_fast/adopt/chain.py",
        ("return _rebuild, type(self).__bases__, state", "return _rebuild, type(self).__bases__[:1] * 2, state"),
        ("(code.co_code, code.co_names, code.co_varnames) ==", "True or () =="),
        ("or _has_any_global_hook():", "or False:"),
    ),
    *_of(_REPLACE, "primer_fast/adopt/recognise.py",
        ("return None if drew else", "return"),
        ("type(module).forward(module, x)", "type(module).forward(module, x.clone())"),
        ("module = copy.copy(module)\n", ""),
    ),
    # Models
    *_of(["tests/models/test_models.py", "-k", "dropout"], "primer_fast/models/block.py",
        ("if self.dropout and self.training else x", "if self.dropout else x"),
        ("self.dropout if self.training else 0.0", "self.dropout"),
    ),
    # Benchmarks, and what is kept of them
    *_of(["tests/bench/test_keep.py"], "bench/stages/folder.py",
        ('if header.get("small"):', "if False:"),
        ("sorted({str(header[\"source\"]) for header in found.headers.values()} - {here})", "[]"),
        ('if row["errors"]:', "if False:"),
        ("if op not in tried and op not in wrong", "if False"),
    ),
    *_of(["tests/bench/test_keep.py"], "bench/keep.py",
        ("elif bad and not partly:", "elif bad and partly:"),
        ("if entry == standing.get(choice, {}).get(bucket):", "if False:"),
        ("if (why := _rests_on(row[name], wrong))", "if (why := wrong.get(row[name]))"),
        ('made.texts[path] = json.dumps(data, indent=1)', 'replace_texts({path: json.dumps(data, indent=1)})'),
    ),
    *_of(["tests/bench/test_report.py"], "bench/report.py",
        ("not error <= budget", "error > 9e9 * budget"),
        ("work / self.median_ms * 1e3", "work / self.median_ms"),
        ("ratios = [theirs / own for", "ratios = [own / theirs for"),
    ),
    *_of(["tests/bench/test_units.py"], "bench/units.py",
        ("        done.add(str(unit))", "        pass"),
        ("            report.save(path)\n        after(", "            pass\n        after("),
        ("        marker.write_text(str(unit)", "        (lambda *_, **__: 0)(str(unit)"),
    ),
    *_of(["tests/bench/test_measure.py"], "bench/measure.py",
        ("if not contender.error <= tolerance:", "if contender.error > tolerance:"),
        ("        _poison(outputs, arrays)", "        pass"),
        ('self.part or "backward")', '"backward")'),
    ),
    *_of(["tests/bench/test_timing.py"], "bench/timing.py",
        ("            collected.clear()", "            pass"),
        ("max(abs(median - 1), (high - low) / len(ratios) ** 0.5)", "abs(median - 1)"),
        ("            self._cover_ms *= 2", "            self.exposed = True"),
    ),
    *_of(["tests/bench/test_training_steps.py"], "bench/programs/training_steps.py",
        ("if apart <= tolerance * max", "if not apart > tolerance * max"),
        ("if not all(map(math.isfinite, found)):", "if False:"),
    ),
    *_of(["tests/bench/test_results.py"], "bench/stages/verdicts.py", ('reverse="<=" in', 'reverse=">=" in')),
    *_of(["tests/bench/test_gpu.py"], "bench/gpu.py",
        ("code == LOST or code < 0", "code < 0"),
        ("preexec_fn=_accept_interrupt", "preexec_fn=None"),
        ('status == "passed" and not stage.leaves.exists()', "False"),
    ),
    # What decides the code of a launch, what a call imports, what several processes write, and which of them ends last
    *_of(["tests/train/test_distributed.py", "-k", "damaged"], "primer_fast/cli/run/sharded_checkpoint.py",
        ("if found != int(metadata.get(PARTS, found)):", "if False:"),
    ),
    *_of(["tests/cli/test_distributed.py"], "primer_fast/train/parallel.py",
        ("        if rank == 0:\n            store.wait", "        if False:\n            store.wait"),
    ),
    *_of(["tests/proof/test_offline.py"], "primer_fast/proof/offline.py",
        ("waiting.append(value)", "pass"),
        ("specialization, sorted(asked.items())", "specialization"),
    ),
    *_of(["tests/proof/test_prepared.py"], "kernels/launch/recording.py", ("return False", "return True")),
]  # fmt: skip


def survives(mutant: Mutant) -> bool:
    """Whether the tests pass with the fault in place."""
    path = ROOT / mutant.file
    before = path.read_text(encoding="utf-8")
    if mutant.right not in before:
        raise SystemExit(f"{mutant.file} no longer has the text {mutant.right!r}")
    path.write_text(before.replace(mutant.right, mutant.wrong, 1), encoding="utf-8")
    try:
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *mutant.tests]
        return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    finally:
        path.write_text(before, encoding="utf-8")


def main(words: list[str]) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by an exception, so that the file is put back
    chosen = [m for m in MUTANTS if not words or any(word in m.file for word in words)]
    survivors = 0
    for mutant in chosen:
        survived = survives(mutant)
        survivors += survived
        print("SURVIVED" if survived else "caught", mutant.file, "|", mutant.wrong.strip(), flush=True)
    print(f"{len(chosen)} faults, {survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
