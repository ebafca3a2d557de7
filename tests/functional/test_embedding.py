import numpy as np
import pytest
import torch
from functional.wrong_calls import refuses

from primer_fast import functional as F
from primer_fast import nn
from primer_fast.functional.embedding import embedding_plain
from primer_fast.kernels.embedding import RunSettings, embedding_bwd, embedding_fwd
from primer_fast.kernels.tile_settings import GridSettings
from primer_fast.proof.numerics import exact, worst
from primer_fast.reference.embedding import embedding_grad

CUTS = [
    RunSettings(1, 16, 1),  # every run crosses, chunk by chunk
    RunSettings(4, 32, 2),  # a long run's partial sums come in several blocks, the last one full or not
    RunSettings(8, 8, 4),  # several blocks of columns
    RunSettings(64, 32, 2),  # one chunk, longer than there are indices
]
RUNS = {
    "one run": [0] * 40,
    "runs that end with a chunk": [0] * 8 + [1] * 8 + [2] * 4 + [3] * 12,
    "runs that end one off": [0] * 7 + [1] * 10 + [3] * 17 + [5] * 5,
    "no run": [5, 3, 1, 0, 2, 4],
    "shuffled": [3, 1, 3, 3, 0, 5, 1, 3, 3, 3, 1, 0, 3, 3, 1, 3, 3, 3, 3, 3, 3, 5, 5, 3, 1, 1],
}


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("settings", CUTS, ids=lambda s: "x".join(map(str, s)))
def test_every_way_to_cut_runs_gives_the_same_answer(settings, runs, device):
    ids = torch.tensor(RUNS[runs], device=device)
    dy = torch.randn(len(ids), 19, device=device)
    want = embedding_grad(exact(dy), ids.cpu().numpy(), np.zeros((6, 19)), 1)["weight"]
    got = embedding_bwd(dy, ids, 6, torch.float32, 1, settings)
    assert worst(exact(got), want) < 1e-5


def test_tiles_of_the_forward(device):
    ids, table = torch.randint(7, (3, 5), device=device), torch.randn(7, 37, device=device)
    y = embedding_fwd(ids, table, table, None, 5, GridSettings(2, 16))
    assert torch.equal(y, table[ids] + table[:5])


def test_indices_outside_the_table_give_nan_and_no_gradient(device):
    """On a GPU nobody waits to raise PyTorch's IndexError; memory outside the tables is not read."""
    ids = torch.tensor([[0, 5, -1], [4, 2**40, 2]], device=device)
    w = torch.randn(5, 8, device=device, requires_grad=True)
    p = torch.randn(3, 8, device=device, requires_grad=True)
    places = torch.tensor([[0, 1, 2], [3, 0, -2]], device=device)
    y = F.embedding(ids, w, position=p, position_ids=places)
    assert y.isnan().all(-1).tolist() == y.isnan().any(-1).tolist() == [[False, True, True], [True, True, True]]
    dw, dp = torch.autograd.grad(y, (w, p), torch.ones_like(y))
    assert dw[:, 0].tolist() == [1, 0, 1, 0, 1] and dp[:, 0].tolist() == [2, 1, 1]


def test_nan_and_infinity_stay_in_their_rows(device):
    """A one-hot product would spread them: 0 times NaN."""
    ids = torch.tensor([0, 1, 1, 2, 3], device=device)
    dy = torch.ones(5, 8, device=device)
    dy[1], dy[3] = float("nan"), float("inf")
    dw = embedding_bwd(dy, ids, 5, torch.float32)
    assert dw[0].eq(1).all() and dw[1].isnan().all() and dw[2].isinf().all() and dw[3].eq(1).all() and dw[4].eq(0).all()


def test_the_sum_is_rounded_once(device):
    ids = torch.randint(9, (4, 6), device=device)
    w, p = (torch.randn(9, 16, device=device, dtype=torch.bfloat16) for _ in range(2))
    assert torch.equal(F.embedding(ids, w, position=p), (w.float()[ids] + p.float()[:6]).bfloat16())


def test_tables_of_two_dtypes_are_promoted_as_in_torch(device):
    """A sinusoidal float32 buffer beside a bfloat16 table; it needs no gradient."""
    ids = torch.randint(9, (4, 6), device=device)
    w = torch.randn(9, 16, device=device, dtype=torch.bfloat16, requires_grad=True)
    p = torch.randn(9, 16, device=device)
    got, want = F.embedding(ids, w, position=p), embedding_plain(ids, w, position=p)
    assert torch.equal(got, want) and got.dtype == torch.float32
    dy = torch.randn_like(got)
    grads = (torch.autograd.grad(y, w, dy) for y in (got, want))
    torch.testing.assert_close(*grads, rtol=2e-2, atol=2e-2)


IDS, TABLE = torch.zeros(2, 3, dtype=torch.int64), torch.ones(5, 4)
WRONG = [
    (TypeError, r"input must be int32 or int64; got torch.float32", (torch.ones(2), TABLE), {}),
    (TypeError, r"input must be int32 or int64; got torch.int16", (IDS.short(), TABLE), {}),
    (TypeError, r"input must be a tensor; got list", ([0], TABLE), {}),
    (TypeError, r"weight must be a tensor; got NoneType", (IDS, None), {}),
    (TypeError, r"position_ids must be int32 or int64; got torch.bool", (IDS, TABLE),
     {"position": TABLE, "position_ids": IDS.bool()}),
    (TypeError, r"padding_idx must be an integer; got float", (IDS, TABLE, 1.0), {}),
    (ValueError, r"weight must have shape \(rows, D\); got \(5,\)", (IDS, torch.ones(5)), {}),
    (ValueError, r"position must have shape \(rows, D\); got \(1, 3, 4\)", (IDS, TABLE),
     {"position": torch.ones(1, 3, 4)}),
    (ValueError, r"position must have weight's 4 features; got \(3, 5\)", (IDS, TABLE), {"position": torch.ones(3, 5)}),
    (ValueError, r"last axis; got 2 for input \(2, 3\)", (IDS, TABLE), {"position": torch.ones(2, 4)}),
    (ValueError, r"last axis; got 5 for input \(\)", (IDS[0, 0], TABLE), {"position": TABLE}),
    (ValueError, r"broadcast to input \(2, 3\); got \(2,\)", (IDS, TABLE),
     {"position": TABLE, "position_ids": IDS[:, 0]}),
    (ValueError, r"broadcast to input \(2, 3\); got \(1, 2, 3\)", (IDS, TABLE),
     {"position": TABLE, "position_ids": IDS[None]}),
    (ValueError, r"position_ids need position", (IDS, TABLE), {"position_ids": IDS}),
    (ValueError, r"padding_idx must be a row of weight, -5 to 4; got 5", (IDS, TABLE, 5), {}),
    (ValueError, r"padding_idx must be a row of weight, -5 to 4; got -6", (IDS, TABLE, -6), {}),
    (ValueError, r"weight cpu, position meta", (IDS, TABLE), {"position": torch.ones(5, 4, device="meta")}),
]  # fmt: skip

test_wrong_arguments = refuses("embedding", WRONG)


def test_offsets_pass_two_to_the_31(far_rows):
    """Row times stride is formed in 64 bits."""
    device, rows = far_rows.device, len(far_rows)
    table = far_rows[:, :16]
    table.copy_(torch.randn(rows, 16, device=device))
    ids = torch.tensor([4, 0, 4, 3], dtype=torch.int32, device=device)
    assert torch.equal(F.embedding(ids, table), table.clone()[ids])


def test_torch_s_other_arguments_have_their_defaults(either):
    ids, weight = torch.tensor([1, 0, 1], device=either), torch.randn(3, 4, device=either)
    assert torch.equal(F.embedding(ids, weight, None, None, 2.0, False, False), weight[ids])
    assert torch.equal(F.embedding(ids, weight, norm_type=1.0, sparse=False), weight[ids])
    for options in ({"max_norm": 0.0}, {"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}):
        ((name, value),) = options.items()
        with pytest.raises(NotImplementedError, match=f"embedding: {name}={value} is not built; use torch.nn.func"):
            F.embedding(ids, weight, **options)
        with pytest.raises(NotImplementedError, match=f"Embedding: {name}={value} is not built; use torch.nn.Emb"):
            nn.Embedding(3, 4, **options)
