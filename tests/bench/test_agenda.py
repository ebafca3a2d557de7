from primer_fast.bench import op as ops
from primer_fast.bench.agenda import AGENDA, ROWS, planned
from primer_fast.bench.op import FORWARD, FORWARD_BACKWARD, PASSES, PRECISIONS


def keys(device):
    groups = planned([ops.load(name) for name in ops.names()], PRECISIONS, PASSES, device)
    return [(g.op.name, g.case.name, g.precision, g.pass_name) for g in groups]


def test_the_rows_of_the_agenda_come_first_and_all_others_follow_once():
    found = keys("cuda")
    assert found[: len(ROWS)] == ROWS and len(set(found)) == len(found)
    assert set(found) == {
        (op.name, case.name, precision, p)
        for op in map(ops.load, ops.names())
        for case in op.gpu_cases
        for precision in PRECISIONS
        for p in op.passes()
        if case.gradients or p == FORWARD
    }


def test_every_target_of_a_gpu_that_names_a_case_is_on_the_agenda():
    """Where time is short, what a bound was set for is measured."""
    first = {(e.op, case) for e in AGENDA for case in e.cases}
    for name in ops.names():
        op = ops.load(name)
        for target in op.goals:
            if target.metric in ("rate", "median_ms", "peak_mib"):
                named = [case.name for case in op.gpu_cases if target.where(case)]
                assert all((name, case) in first for case in named), (name, target.goal.what)


def test_on_a_cpu_the_order_is_that_of_the_declarations():
    found, first = keys("cpu"), [ops.names()[0], ops.load(ops.names()[0]).cpu_cases[0].name]
    assert [k[2] for k in found] == sorted((k[2] for k in found), key=list(PRECISIONS).index)
    assert [list(k) for k in found[:2]] == [[*first, next(iter(PRECISIONS)), p] for p in (FORWARD, FORWARD_BACKWARD)]
