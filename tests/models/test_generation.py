import math

import numpy as np
import pytest
import torch
from parity import varied

from primer_fast import backend
from primer_fast.models.generation import DecodeStep, Sampling, generate, restrict, sample
from primer_fast.models.transformer import Transformer, TransformerConfig

SMALL = {"vocab": 31, "context": 40, "width": 24, "layers": 2, "heads": 4}
CONFIGS = {
    "post-LN": {},
    "GPT-2's": {"norm": "pre", "positions": "learned"},
    "grouped heads": {"kv_heads": 2, "norm": "pre"},
    "untied, head bias": {"tied": False, "head_bias": True, "kv_heads": 1},
}


def build(name="GPT-2's", device="cpu", **options):
    """Weights large enough that the next token depends on the whole text."""
    torch.manual_seed(0)
    return varied(Transformer(TransformerConfig(**SMALL | CONFIGS[name] | options)), 0.4).to(device)


def prompts(*lengths):
    torch.manual_seed(1)
    return [torch.randint(31, (n,)) for n in lengths]


@torch.no_grad()
def by_hand(model, prompt, count):
    """Greedy decoding as its definition says: one row, the whole text for every token."""
    text = prompt.to(model.embedding.weight.device)[None]
    for _ in range(count):
        text = torch.cat((text, model(text)[:, -1].argmax(-1, keepdim=True)), dim=1)
    return text[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_with_and_without_cache_alone_and_in_a_batch(plain_path, device, name):
    model = build(name, device).eval()
    rows = prompts(3, 9, 1, 9)
    expected = [by_hand(model, row, 20) for row in rows]
    assert len(torch.cat(expected).unique()) > 8
    for cache in (True, False):
        got = generate(model, rows, max_new_tokens=20, temperature=0, cache=cache)
        assert got.lengths.tolist() == [23, 29, 21, 29] and got.prompt_lengths.tolist() == [3, 9, 1, 9]
        assert got.tokens.shape == (4, 29)
        for sequence, completion, wanted, row in zip(got.sequences(), got.completions(), expected, rows, strict=True):
            assert torch.equal(sequence, wanted) and torch.equal(completion, wanted[len(row) :])
        alone = generate(model, rows[0][None], max_new_tokens=20, temperature=0, cache=cache)
        assert torch.equal(alone.tokens[0], expected[0])
        even = generate(model, [rows[1], rows[3]], max_new_tokens=20, temperature=0, cache=cache)
        assert torch.equal(even.tokens, torch.stack([expected[1], expected[3]]))


def test_padded_prompts_are_the_list(plain_path, device):
    model, rows = build(device=device), prompts(3, 9, 1)
    expected = generate(model, rows, max_new_tokens=9, temperature=0)
    for padding in (0, 30, -1):
        padded = torch.full((3, 12), padding)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
        got = generate(model, padded, lengths=torch.tensor([3, 9, 1]), max_new_tokens=9, temperature=0)
        assert torch.equal(got.tokens, expected.tokens) and torch.equal(got.lengths, expected.lengths)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "top_k": 5}, {"top_p": 0.7}], ids=str)
def test_drawn_tokens_with_and_without_cache(plain_path, device, options):
    model, rows = build(device=device), prompts(5, 8, 2)
    runs = [
        generate(model, rows, max_new_tokens=25, seed=seed, cache=cache, log_probs=True, **options)
        for seed, cache in ((7, True), (7, False), (8, True))
    ]
    assert torch.equal(runs[0].tokens, runs[1].tokens) and not torch.equal(runs[0].tokens, runs[2].tokens)
    torch.testing.assert_close(runs[0].log_probs, runs[1].log_probs, rtol=1e-4, atol=1e-4)
    generator = torch.Generator(device).manual_seed(7)
    assert torch.equal(generate(model, rows, max_new_tokens=25, generator=generator, **options).tokens, runs[0].tokens)
    again = generate(model, rows, max_new_tokens=25, generator=generator, **options)
    assert not torch.equal(again.tokens, runs[0].tokens)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = generate(model, rows, max_new_tokens=9, **options).tokens
        torch.manual_seed(3)
        assert torch.equal(generate(model, rows, max_new_tokens=9, **options).tokens, first)


@pytest.mark.parametrize("options", [{}, {"top_k": 5, "top_p": 0.9}])
def test_a_part_of_a_batch_draws_as_within_the_whole(plain_path, device, options):
    model, rows = build("GPT-2's", device), prompts(3, 9, 1, 9, 4)
    options = {"max_new_tokens": 12, "seed": 3, "stop_tokens": [7], **options}
    whole = generate(model, rows, **options).completions()
    first = generate(model, rows[:2], place=(0, 5), **options).completions()
    rest = generate(model, rows[2:], place=(2, 5), **options).completions()
    assert [c.tolist() for c in (*first, *rest)] == [c.tolist() for c in whole]
    assert [c.tolist() for c in generate(model, rows[2:], **options).completions()] != [c.tolist() for c in rest]


@pytest.mark.parametrize("temperature", [0, 0.5, 1.0])
def test_log_probs_are_the_model_s(plain_path, device, temperature):
    model, rows = build(device=device).eval(), prompts(5, 8, 2)
    got = generate(
        model, rows, max_new_tokens=12, temperature=temperature, top_k=9, seed=0, stop_tokens=[4, 9], log_probs=True
    )
    assert got.log_probs.dtype == torch.float32 and got.log_probs.shape == (3, 12)
    options = {"temperature": temperature or 1.0}
    expected = model.log_prob(got.tokens[:, :-1], got.tokens[:, 1:], **options)  # enters the gradient's graph
    expected.sum().backward()
    for b, (start, end) in enumerate(zip(got.prompt_lengths.tolist(), got.lengths.tolist(), strict=True)):
        torch.testing.assert_close(
            got.log_probs[b, : end - start], expected[b, start - 1 : end - 1], rtol=1e-4, atol=1e-4
        )
        assert (got.log_probs[b, end - start :] == 0).all()


@pytest.mark.parametrize("cache", [True, False])
def test_stop_tokens_end_a_row(plain_path, device, cache):
    model, rows = build(device=device), prompts(3, 9, 1, 6)
    free = generate(model, rows, max_new_tokens=20, temperature=0)
    stops = {int(free.completions()[0][4]), int(free.completions()[1][7])}
    wanted = []
    for completion in free.completions():
        ends = [t + 1 for t, token in enumerate(completion.tolist()) if token in stops]
        wanted.append(completion[: ends[0] if ends else 20])
    assert len({len(w) for w in wanted}) > 1
    for pad in (None, 29):
        got = generate(
            model, rows, max_new_tokens=20, temperature=0, stop_tokens=sorted(stops), pad_token=pad, cache=cache
        )
        assert got.completion_lengths.tolist() == [len(w) for w in wanted]
        for b, completion in enumerate(got.completions()):
            assert torch.equal(completion, wanted[b])
            assert (got.tokens[b, got.lengths[b] :] == (min(stops) if pad is None else pad)).all()


def test_generation_ends_when_all_rows_have(plain_path, device, monkeypatch):
    model = build(device=device)
    calls = []
    monkeypatch.setattr(DecodeStep, "__call__", lambda self, own=DecodeStep.__call__: calls.append(own(self)))
    got = generate(model, prompts(3, 4), max_new_tokens=30, temperature=0, stop_tokens=range(31))
    assert got.completion_lengths.tolist() == [1, 1] and len(calls) <= 8
    assert got.tokens.shape == (2, 34)


def test_the_window_slides_past_the_context(plain_path, device):
    model, rows = build(device=device).eval(), prompts(30, 36, 50)
    fits = generate(model, rows[:2], max_new_tokens=5, temperature=0)  # 36 + 5 - 1 is the context
    with pytest.raises(ValueError, match="must fit the context of 40, or slide=True must be given; got 36 and 6"):
        generate(model, rows[:2], max_new_tokens=6, temperature=0)
    for chosen in (rows[:2], rows):
        for cache in (True, False):
            got = generate(model, chosen, max_new_tokens=25, temperature=0, slide=True, cache=cache)
            for row, sequence in zip(chosen, got.sequences(), strict=True):
                text = row.to(device)
                with torch.no_grad():
                    for _ in range(25):
                        text = torch.cat((text, model(text[None, -40:])[0, -1:].argmax(-1)))
                assert torch.equal(sequence, text)
    assert torch.equal(fits.sequences()[1], generate(model, rows[1:2], max_new_tokens=5, temperature=0).tokens[0])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("fixed", [False, True])
def test_cached_hidden_states_are_those_of_the_whole_text(plain_path, device, name, fixed):
    """The prompt, then one token, then three at once, for rows of different and of equal lengths."""
    model = build(name, device).eval()
    text = torch.randint(31, (3, 20), device=device)
    with torch.no_grad():
        whole = model.hidden(text)
        for counts in ([9, 9, 9], [9, 4, 1]):
            lengths = torch.tensor(counts, device=device)
            cache = model.new_cache(3, 16, fixed=fixed)
            prompt = torch.stack([torch.cat((row[:n], row[:0].new_zeros(9 - n))) for row, n in zip(text, counts)])  # noqa: B905
            first = model.hidden(prompt, cache=cache, lengths=None if counts == [9, 9, 9] else lengths)
            for b, n in enumerate(counts):
                torch.testing.assert_close(first[b, :n], whole[b, :n], rtol=1e-4, atol=1e-4)
            for T in (1, 3, 1, 2):
                places = cache.lengths[:, None] + torch.arange(T, device=device)
                got = model.hidden(text.gather(1, places), cache=cache)
                expected = whole.gather(1, places[..., None].expand(-1, -1, 24))
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            assert cache.lengths.tolist() == [n + 7 for n in counts]


def test_the_step_of_a_graph_works_on_the_same_addresses(plain_path, device):
    """What a CUDA graph replays, run eagerly: no buffer moves, and the tokens are generate's."""
    model, rows = build(device=device).eval(), prompts(7, 2)
    expected = generate(model, rows, max_new_tokens=10, seed=3, log_probs=True)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    lengths = torch.tensor([7, 2], device=device)
    cache = model.new_cache(2, 16, fixed=True)
    step = DecodeStep(model, cache, 2, Sampling(), torch.Generator(device).manual_seed(3), log_prob=True)
    tokens, log_probs = [], []
    with torch.no_grad():
        hidden = model.hidden(padded, cache=cache, lengths=lengths)
        step.choose(hidden[torch.arange(2), lengths - 1])
        addresses = [t.data_ptr() for t in (step.token, step.log_prob, cache.store, cache.lengths)]
        for t in range(10):
            if t:
                step()
            tokens.append(step.token.clone())
            log_probs.append(step.log_prob.clone())
    assert addresses == [t.data_ptr() for t in (step.token, step.log_prob, cache.store, cache.lengths)]
    assert torch.equal(torch.stack(tokens, 1), torch.stack(expected.completions()))
    torch.testing.assert_close(torch.stack(log_probs, 1), expected.log_probs, rtol=1e-4, atol=1e-4)


def test_only_a_step_on_a_fixed_cache_is_recorded():
    model = build()
    for cache, got in ((None, "None"), (model.new_cache(2, 16), "fixed=False")):
        with pytest.raises(ValueError, match=f"DecodeStep: cache must be a fixed one; got {got}"):
            DecodeStep(model, cache, 2, Sampling()).record()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 3, "top_k": 9, "log_probs": True}], ids=str)
def test_cuda_graph(options):
    model, rows = build(device="cuda"), prompts(7, 2, 4)
    eager = generate(model, rows, max_new_tokens=20, **options)
    recorded = generate(model, rows, max_new_tokens=20, cuda_graph=True, **options)
    assert torch.equal(eager.tokens, recorded.tokens)
    if options.get("log_probs"):
        torch.testing.assert_close(eager.log_probs, recorded.log_probs, rtol=1e-4, atol=1e-4)


def test_the_kernels_decode(device):
    """In the interpreter, or on the GPU: rows of different lengths."""
    model = build(device=device, layers=1)
    rows = prompts(4, 2)
    assert backend.runs_triton(model.embedding.weight)
    expected = [by_hand(model.eval(), row, 3) for row in rows]
    torch.testing.assert_close(
        generate(model, rows, max_new_tokens=3, temperature=0).sequences(), expected, rtol=0, atol=0
    )


def test_dropout_is_off_and_modes_are_kept(plain_path):
    model = build(dropout=0.5)
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    rows = prompts(3, 5)
    got = generate(model, rows, max_new_tokens=9, temperature=0)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(got.tokens, generate(model, rows, max_new_tokens=9, temperature=0).tokens)
    assert not got.tokens.is_inference() and torch.is_grad_enabled()


def kept_by_definition(logits, top_k, top_p):
    """Which tokens top-k and top-p leave, from the largest on."""
    kept = np.ones(len(logits), dtype=bool)
    if top_k is not None:
        kept = logits >= np.sort(logits)[::-1][min(top_k, len(logits)) - 1]
    if top_p is not None:
        weights = np.exp(np.where(kept, logits, -np.inf) - logits.max())
        weights, total, nucleus = weights / weights.sum(), 0.0, np.zeros_like(kept)
        for token in np.argsort(-weights, kind="stable"):
            nucleus[token] = True
            total += weights[token]
            if total >= top_p:
                break
        kept &= nucleus
    return kept


@pytest.mark.parametrize("top_p", [None, 1e-6, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 5, 31, 100])
def test_top_k_and_top_p_keep_what_their_definition_says(top_k, top_p):
    torch.manual_seed(0)
    logits = torch.randn(20, 31) * torch.linspace(0.1, 4, 20)[:, None]
    got = restrict(logits, top_k, top_p)
    for row, before in zip(got, logits, strict=True):
        kept = torch.from_numpy(kept_by_definition(before.double().numpy(), top_k, None if top_p == 1 else top_p))
        assert torch.equal(row > -math.inf, kept) and torch.equal(row[kept], before[kept])


def test_ties():
    logits = torch.tensor([[2.0, 1.0, 2.0, 1.0, 0.0]])
    assert (restrict(logits, top_k=3) > -math.inf).tolist() == [[True, True, True, True, False]]  # as in transformers


@pytest.mark.parametrize(("parts", "top_p", "kept"), [
    ((0.5, 0.3, 0.1, 0.1), 0.8, 2), ((0.4, 0.3, 0.2, 0.1), 0.7, 2), ((0.4, 0.3, 0.2, 0.1), 0.9, 3),
    ((0.1,) * 10, 0.3, 3), ((0.1,) * 10, 0.7, 7), ((0.6, 0.2, 0.2), 0.6, 1), ((0.5, 0.3, 0.2), 1e-320, 1),
    ((0.001,) * 1000, 0.999, 999), ((0.25,) * 4, 0.5, 2),
])  # fmt: skip
def test_tokens_that_sum_to_top_p_exactly_are_enough(parts, top_p, kept):
    logits = torch.tensor(parts).log()[None]
    assert (restrict(logits, top_p=top_p) > -math.inf).sum() == kept


@pytest.mark.parametrize("temperature", [5e-324, 1e-42, 1e-38, 1e-30, 1e300])
def test_any_temperature_draws_from_a_distribution(temperature):
    logits = torch.tensor([[1.0, 3.0, -math.inf, 3.0, 2.0]]).expand(2000, -1)
    tokens = sample(logits, Sampling(temperature), torch.Generator().manual_seed(0))
    possible = {1, 3} if temperature < 1 else {0, 1, 3, 4}
    assert set(tokens.tolist()) == possible
    assert (tokens == 1).float().mean().item() == pytest.approx(1 / len(possible), abs=0.05)


@pytest.mark.parametrize("temperature", [1e-42, 1e300])
def test_log_probs_at_any_temperature_are_finite(plain_path, temperature):
    got = generate(build(layers=1), prompts(3), max_new_tokens=4, temperature=temperature, seed=0, log_probs=True)
    expected = 0.0 if temperature < 1 else -math.log(31)
    torch.testing.assert_close(got.log_probs, torch.full((1, 4), expected))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 0, "top_k": 3, "top_p": 0.5}], ids=str)
def test_weights_that_are_not_finite_end_in_an_error(plain_path, bad, options):
    model = build(layers=1)
    with torch.no_grad():
        model.embedding.weight[3] = bad
    with pytest.raises(FloatingPointError, match="logits must be finite, or -inf for some tokens; got NaN"):
        generate(model, prompts(3), max_new_tokens=4, **options)


def test_draws_follow_the_distribution():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -math.inf, 0.5])
    draws = 40000
    for sampling, kept in (
        (Sampling(0.7), logits),
        (Sampling(1.0, top_k=2), torch.tensor([1, -math.inf, -math.inf, 2])),
    ):
        generator = torch.Generator().manual_seed(0)
        tokens = sample(logits.expand(draws, -1), sampling, generator)
        share = torch.bincount(tokens, minlength=6) / draws
        expected = torch.zeros(6)
        expected[: len(kept)] = (kept / sampling.temperature).softmax(-1)
        assert (share - expected).abs().max() < 4 * 0.5 / draws**0.5
        assert share[4] == 0


WRONG = {
    "temperature": ({"temperature": -1}, ValueError, "temperature must be 0 or more and finite; got -1"),
    "top_k": ({"top_k": 0}, ValueError, "top_k must be a positive integer; got 0"),
    "top_p": ({"top_p": 0}, ValueError, r"top_p must be in \(0, 1\]; got 0"),
    "count": ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be a positive integer; got 0"),
    "two sources of noise": ({"seed": 1, "generator": torch.Generator()}, ValueError, "seed or generator"),
    "empty": ({"prompts": [torch.zeros(0, dtype=torch.int64)]}, ValueError, r"a token in each; got lengths \[0\]"),
    "none": ({"prompts": []}, ValueError, r"there must be a prompt.*got lengths \[\]"),
    "vocabulary": ({"prompts": [torch.tensor([3, 31])]}, ValueError, r"tokens must be in \[0, 31\); got 3 to 31"),
    "negative": ({"prompts": torch.tensor([[3, -1]])}, ValueError, r"tokens must be in \[0, 31\); got -1 to 3"),
    "dtype": ({"prompts": torch.zeros(2, 3)}, TypeError, r"prompts must be \(B, P\) int64; got torch.float32 \(2, 3\)"),
    "list": ({"prompts": [[1, 2]]}, TypeError, r"each prompt must be \(P,\) int64; got list"),
    "lengths": ({"lengths": torch.tensor([4])}, ValueError, r"lengths must be 1, at most 3; got \[4\]"),
    "place": ({"place": (2, 2)}, ValueError, r"place must be \(first, count\) that holds 1 prompts; got \(2, 2\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_named(plain_path, case):
    options, error, message = WRONG[case]
    with pytest.raises(error, match=f"^generate: .*{message}"):
        generate(build(), **{"prompts": torch.ones(1, 3, dtype=torch.int64), "max_new_tokens": 4} | options)


def test_wrong_models_and_caches_are_named(plain_path):
    tokens = torch.ones(1, 3, dtype=torch.int64)
    encoder, model = build(causal=False), build()
    with pytest.raises(ValueError, match="must be a decoder"):
        generate(encoder, tokens, max_new_tokens=2)
    with pytest.raises(ValueError, match="only a decoder may have a cache"):
        encoder(tokens, cache=encoder.new_cache(1, 8))
    with pytest.raises(ValueError, match="capacity must be at most the context 40; got 41"):
        model.new_cache(1, 41)
    cache = model.new_cache(1, 4)
    with pytest.raises(ValueError, match="padding is given by lengths; got a mask"):
        model(tokens, cache=cache, mask=tokens > 0)
    model(tokens, cache=cache)
    with pytest.raises(ValueError, match="at most 4 tokens fit; got 6"):
        model(tokens, cache=cache)
    with pytest.raises(ValueError, match="only the first tokens may be padded"):
        model(tokens[:, :1], cache=cache, lengths=torch.tensor([1]))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0}, {"temperature": 0, "cache": False}, {}, {"cache": False}, {"temperature": 50.0},
        {"top_k": 30}, {"top_p": 0.999}, {"slide": True, "max_new_tokens": 60}, {"cuda_graph": True},
    ],
    ids=str,
)  # fmt: skip
def test_ids_without_a_token_are_never_drawn(plain_path, device, options):
    model = build(device=device, head_bias=True)
    missing = torch.tensor([4, *range(17, 31)])
    with torch.no_grad():
        model.head_bias[missing] += 100.0  # what would be drawn otherwise, and nothing else
    call = {"max_new_tokens": 30, "seed": 0} | options
    rows = [row % 17 for row in prompts(3, 9, 1, 9)]
    assert torch.isin(torch.cat(generate(model, rows, **call).completions()), missing.to(device)).any()
    model.exclude(missing)
    found = generate(model, rows, log_probs=True, **call)
    assert not torch.isin(torch.cat(found.completions()), missing.to(device)).any()
    assert found.log_probs.isfinite().all() and found.log_probs.max() <= 0
