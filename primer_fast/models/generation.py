"""Generation: draw the next token from the model's distribution, append it, go on.

    z = logits(last token) / temperature        k: the top_k largest        p: the smallest set of probability >= top_p
    token ~ softmax(z restricted to k, then to p), or argmax z where temperature is 0

Source of top-p: Holtzman et al. 2020 (arXiv:1904.09751). A token is drawn as argmax(z + Gumbel noise), which has that
distribution and needs neither a sum nor a word from the device.
Legend: B batch, P longest prompt, N new tokens, V vocabulary.
"""

__all__ = ["CHECK_EVERY", "DecodeStep", "Generation", "Sampling", "generate", "restrict", "sample"]

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from primer_fast.models.kv_cache import KVCache
from primer_fast.models.transformer import Transformer

CHECK_EVERY = 8  # steps on a GPU between looks at whether all rows have stopped: each look waits for the device


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits."""

    temperature: float = 1.0  # 0: the most probable token
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"generate: temperature must be 0 or more and finite; got {self.temperature!r}")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise ValueError(f"generate: top_k must be a positive integer; got {self.top_k!r}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"generate: top_p must be in (0, 1]; got {self.top_p!r}")

    def scaled(self, logits: Tensor) -> Tensor:  # (..., V)
        """Over the temperature, the largest at 0: however small a temperature is, no logit becomes infinite or NaN."""
        least, most = torch.finfo(logits.dtype).tiny, torch.finfo(logits.dtype).max
        temperature = min(max(self.temperature, least), most) if self.temperature > 0 else 1.0
        return (logits - logits.amax(dim=-1, keepdim=True)) / temperature


@dataclass(frozen=True)
class Generation:
    """What was written, and how probable each token was."""

    tokens: Tensor  # (B, P + N) int64: each row its prompt, its completion, then padding
    lengths: Tensor  # (B,) int64: prompt and completion, the stop token included
    prompt_lengths: Tensor  # (B,) int64
    log_probs: Tensor | None  # (B, N) float32: of each completion's tokens under softmax(logits / temperature); 0 after

    @property
    def completion_lengths(self) -> Tensor:  # (B,)
        return self.lengths - self.prompt_lengths

    def sequences(self) -> list[Tensor]:
        """Prompts with their completions, (lengths[b],) each."""
        return [row[:n] for row, n in zip(self.tokens, self.lengths.tolist(), strict=True)]

    def completions(self) -> list[Tensor]:
        ends = zip(self.tokens, self.prompt_lengths.tolist(), self.lengths.tolist(), strict=True)
        return [row[start:end] for row, start, end in ends]


def restrict(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:  # (..., V)
    """``logits`` with -inf for tokens outside of top-k, then of top-p.

    top-k keeps ties with the k-th. top-p keeps the most probable tokens until they sum to ``top_p``, at least one.
    Rounding must not decide where they sum to it exactly, so a millionth less is enough.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probability = ordered.softmax(dim=-1, dtype=torch.float64)
        before = probability.cumsum(dim=-1) - probability  # of the more probable tokens: 0 for the first, which stays
        drop = before >= top_p * (1 - 1e-6)
        logits = logits.masked_fill(torch.empty_like(drop).scatter_(-1, order, drop), -math.inf)
    return logits


def sample(
    logits: Tensor,  # (B, V) float32
    sampling: Sampling,
    generator: torch.Generator | None = None,
    place: tuple[int, int] | None = None,
) -> Tensor:  # (B,)
    """One token for each row; with ``place`` = (first, count) as if these were rows first, first + 1, ... of count.

    Where the largest logit of a row is not finite, its token means nothing.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    z = restrict(sampling.scaled(logits), sampling.top_k, sampling.top_p)
    first, count = place or (0, len(z))
    waiting = z.new_empty(count, z.shape[1]).exponential_(generator=generator)[first : first + len(z)]
    waiting.clamp_min_(torch.finfo(z.dtype).tiny)
    return z.sub_(waiting.log_()).argmax(dim=-1)  # -log of an exponential variate is Gumbel noise


def generate(
    model: Transformer,
    prompts: Sequence[Tensor] | Tensor,  # (P_b,) int64 each; or (B, P), padded on the right where lengths says so
    *,
    max_new_tokens: int,
    lengths: Tensor | None = None,  # (B,): of a padded prompts tensor; None: no padding
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    pad_token: int | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    cache: bool = True,
    slide: bool = False,
    log_probs: bool = False,
    cuda_graph: bool = False,
    place: tuple[int, int] | None = None,
) -> Generation:
    """Continue every prompt by up to ``max_new_tokens`` tokens, without dropout and without gradients.

    A row ends with its first stop token, which belongs to it; what follows is padding. Rows do not influence each
    other's logits; drawn tokens depend on a row's place in the batch through the noise.

    Args:
        pad_token: fills rows after their end; None: the first stop token, else 0.
        seed, generator: of the noise, one or the other; a generator lives on the model's device.
        cache: keep keys and values; False encodes the whole text for every token.
        slide: past the context go on with the last ``context`` tokens, encoded anew for every token.
        log_probs: also return the log-probabilities of the chosen tokens under ``softmax(logits / temperature)``,
            before top-k and top-p; at temperature 0 under ``softmax(logits)``.
        cuda_graph: record the step of one token as a CUDA graph and replay it; a model on another device runs eagerly.
        place: (first, count), for a part of a batch of ``count`` prompts, of which the first here is number ``first``:
            its rows draw what they would have drawn within the whole batch.

    Raises:
        ValueError: an empty prompt, a token out of the vocabulary, or prompt and new tokens beyond the context without
            ``slide``; options out of their range.
        TypeError: prompts that are no int64 tensors.
        FloatingPointError: the model's logits are NaN or infinite.
    """
    sampling = Sampling(temperature, top_k, top_p)
    tokens, host_lengths = _collect(model, prompts, lengths, max_new_tokens)
    if seed is not None:
        if generator is not None:
            raise ValueError("generate: seed or generator, one of them; got both")
        generator = torch.Generator(tokens.device).manual_seed(seed)
    longest, context = max(host_lengths), model.config.context
    if longest + max_new_tokens - 1 > context and not slide:
        raise ValueError(
            f"generate: prompt and new tokens must fit the context of {context}, or slide=True must be given; "
            f"got {longest} and {max_new_tokens}"
        )
    if place is not None and not 0 <= place[0] <= place[0] + len(tokens) <= place[1]:
        raise ValueError(f"generate: place must be (first, count) that holds {len(tokens)} prompts; got {place}")
    stops = torch.tensor(list(stop_tokens), dtype=torch.int64, device=tokens.device)
    pad = pad_token if pad_token is not None else next(iter(stop_tokens), 0)

    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            new, chosen, finite = _continue(
                model, tokens, host_lengths, max_new_tokens, sampling, generator, log_probs, stops, cache, cuda_graph,
                place,
            )  # fmt: skip
    finally:
        for module in training:
            module.training = True
    if not finite:  # the first look at it: a look waits for the device
        raise FloatingPointError(
            "generate: the model's logits must be finite, or -inf for some tokens; got NaN, inf, or -inf for all"
        )
    return _result(tokens, torch.tensor(host_lengths, device=tokens.device), new, chosen, stops, pad)


class DecodeStep:
    """One more token for every row: reads and overwrites ``token`` (B,), and ``log_prob`` (B,) if asked for.

    ``record`` makes of the step a CUDA graph, the same kernels on the same addresses, launched as one. The cache must
    then be ``fixed`` and hold the prompts.
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache | None,
        batch: int,
        sampling: Sampling,
        generator=None,
        log_prob: bool = False,
        place: tuple[int, int] | None = None,
    ):
        device = model.embedding.weight.device
        self.place = place
        self.model, self.cache, self.sampling, self.generator = model, cache, sampling, generator
        self.token = torch.zeros(batch, dtype=torch.int64, device=device)
        self.log_prob = torch.zeros(batch, device=device) if log_prob else None
        self.finite = torch.ones((), dtype=torch.bool, device=device)  # whether all logits so far gave a distribution
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        else:
            self.choose(self.model.hidden(self.token[:, None], cache=self.cache)[:, 0])

    def choose(self, hidden: Tensor) -> None:  # (B, W) of the last tokens
        logits = self.model.logits(hidden).float()
        self.finite &= logits.amax(dim=-1).isfinite().all()
        self.token.copy_(sample(logits, self.sampling, self.generator, self.place))
        if self.log_prob is not None:
            self.log_prob.copy_(self.sampling.scaled(logits).log_softmax(dim=-1).gather(-1, self.token[:, None])[:, 0])

    def record(self) -> None:
        """Capture the step after trial runs, and leave token, cache and generator as they were."""
        cache = self.cache
        if cache is None or not cache.fixed:
            raise ValueError(f"DecodeStep: cache must be a fixed one; got {'fixed=False' if cache else None}")
        state = [self.token, cache.lengths]
        before, longest = [t.clone() for t in state], cache.longest
        device = self.token.device
        generator = torch.cuda.default_generators[device.index] if self.generator is None else self.generator
        noise = generator.get_state()
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(3):  # kernels are compiled and libraries initialised outside of the capture
                self()
                self._restore(cache, state, before, longest)
        torch.cuda.current_stream(device).wait_stream(side)
        generator.set_state(noise)
        graph = torch.cuda.CUDAGraph()
        if self.generator is not None:
            graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph, stream=side):  # the default one may be another GPU's
            self()
        self._restore(cache, state, before, longest)
        self.graph = graph

    def _restore(self, cache, state, before, longest):
        for t, value in zip(state, before, strict=True):
            t.copy_(value)
        cache.longest = longest


def _continue(model, prompts, host_lengths, N, sampling, generator, log_probs, stops, cached, cuda_graph, place):
    """(B, N) tokens, their log-probabilities, whether all are finite: finished rows go on, and are cut afterwards."""
    B, P = prompts.shape
    device, context = prompts.device, model.config.context
    prompt_lengths = torch.tensor(host_lengths, device=device)
    lengths = None if min(host_lengths) == P else prompt_lengths
    serves = min(N, context - P + 1) if cached else 0  # tokens that the cache gives before the window slides
    graph = cuda_graph and prompts.is_cuda and serves > 1
    cache = model.new_cache(B, P + serves - 1, fixed=graph) if serves > 0 else None
    step = DecodeStep(model, cache, B, sampling, generator, log_probs, place)
    new = torch.zeros(B, N, dtype=torch.int64, device=device)
    chosen = torch.zeros(B, N, device=device) if log_probs else None
    stopped = torch.zeros(B, dtype=torch.bool, device=device)
    for t in range(N):
        if t >= serves:
            step.choose(_last_hidden(model, _text(prompts, prompt_lengths, new), prompt_lengths + t, P + t))
        elif t == 0:
            step.choose(_last(model.hidden(prompts, lengths=lengths, cache=cache), lengths))
            if graph:
                step.record()
        else:
            step()
        new[:, t] = step.token
        if chosen is not None and step.log_prob is not None:
            chosen[:, t] = step.log_prob
        if len(stops):
            stopped |= (step.token[:, None] == stops).any(dim=1)
            if (t + 1) % (CHECK_EVERY if device.type == "cuda" else 1) == 0 and stopped.all():
                break
    return new, chosen, step.finite


def _last(hidden, lengths):  # (B, T, W) -> (B, W) of each row's last token
    if lengths is None:
        return hidden[:, -1]
    return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]


def _last_hidden(model, text, lengths, longest):
    """Encode the last ``context`` tokens of each row anew: (B, longest or more) -> (B, W)."""
    context = model.config.context
    if longest <= context:
        return _last(model.hidden(text[:, :longest]), lengths)
    start = (lengths - context).clamp_(min=0)
    window = text.gather(1, start[:, None] + torch.arange(context, device=text.device))
    return _last(model.hidden(window), lengths - start)


def _text(prompts, prompt_lengths, new):
    """Each prompt with its new tokens right after it: (B, P), (B,), (B, N) -> (B, P + N)."""
    places = prompt_lengths[:, None] + torch.arange(new.shape[1], device=new.device)
    return torch.cat((prompts, torch.zeros_like(new)), dim=1).scatter_(1, places, new)


def _result(prompts, prompt_lengths, new, chosen, stops, pad):
    """Cut each row after its first stop token."""
    N = new.shape[1]
    stop = (new[:, :, None] == stops).any(dim=-1)  # (B, N)
    kept = torch.where(stop.any(dim=1), stop.int().argmax(dim=1) + 1, N)  # (B,)
    lengths = prompt_lengths + kept
    tokens = _text(prompts, prompt_lengths, new)
    tokens.masked_fill_(torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None], pad)
    if chosen is not None:
        chosen = chosen.masked_fill(torch.arange(N, device=new.device) >= kept[:, None], 0.0)
    return Generation(tokens, lengths, prompt_lengths, chosen)


def _collect(model, prompts, lengths, max_new_tokens):
    """The prompts side by side (B, P), padded with 0, on the model's device, and their lengths as integers."""
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens must be a positive integer; got {max_new_tokens!r}")
    if not model.config.causal:
        raise ValueError("generate: the model must be a decoder; got one with causal=False")
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2 or prompts.dtype != torch.int64:
            raise TypeError(f"generate: prompts must be (B, P) int64; got {prompts.dtype} {tuple(prompts.shape)}")
        rows = prompts
        counts = [rows.shape[1]] * len(rows) if lengths is None else lengths.tolist()
        if len(counts) != len(rows) or any(n > rows.shape[1] for n in counts):
            raise ValueError(f"generate: lengths must be {len(rows)}, at most {rows.shape[1]}; got {counts}")
    else:
        if lengths is not None:
            raise ValueError("generate: a list of prompts has its own lengths; got lengths beside it")
        for row in prompts:
            if not isinstance(row, Tensor) or row.dim() != 1 or row.dtype != torch.int64:
                got = f"{row.dtype} {tuple(row.shape)}" if isinstance(row, Tensor) else type(row).__name__
                raise TypeError(f"generate: each prompt must be (P,) int64; got {got}")
        counts = [len(row) for row in prompts]
        rows = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True) if counts else torch.empty(0, 0)
    if not counts or min(counts) < 1:
        raise ValueError(f"generate: there must be a prompt, and a token in each; got lengths {counts}")
    rows = rows[:, : max(counts)].to(model.embedding.weight.device)
    inside = torch.arange(max(counts), device=rows.device) < torch.tensor(counts, device=rows.device)[:, None]
    rows = rows.masked_fill(~inside, 0)
    low, high = rows.aminmax()
    if low < 0 or high >= model.config.vocab:
        raise ValueError(f"generate: tokens must be in [0, {model.config.vocab}); got {int(low)} to {int(high)}")
    return rows, counts
