"""primer-fast show attention: "What is your name" through one layer of causal attention, every number worked out."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table
from torch import Tensor

from primer_fast import functional as F
from primer_fast.cli.options.show.attention import parse
from primer_fast.cli.plots import BLUES, INK, SIDES, picture
from primer_fast.cli.show import worked_example
from primer_fast.models.transformer import sinusoids

WORDS = ("What", "is", "your", "name")
VOCABULARY = ("is", "name", "What", "your")  # a token is its place in it
EMBEDDING = [  # a row per word of the vocabulary, as a trained model could have them
    [0.2, -0.6, 0.9, -0.1],
    [-0.7, 0.8, 0.3, 1.1],
    [1.0, 0.4, -0.5, 0.6],
    [0.5, 1.2, -0.8, -0.4],
]
W_Q = [[0.8, -0.3, 0.5, 0.1], [0.2, 0.9, -0.4, 0.6], [-0.5, 0.4, 0.7, -0.2], [0.3, -0.1, 0.2, 0.8]]
W_K = [[0.6, 0.2, -0.7, 0.4], [-0.3, 0.8, 0.5, -0.1], [0.9, -0.2, 0.3, 0.5], [0.1, 0.7, -0.4, 0.6]]
W_V = [[0.5, -0.6, 0.3, 0.9], [0.7, 0.4, -0.2, 0.1], [-0.1, 0.8, 0.6, -0.5], [0.4, 0.2, -0.9, 0.3]]


@dataclass(frozen=True)
class AttentionExample:
    """Matrices of the example, as the library computes them; a line for each of T words, d = d_k columns."""

    embedding: Tensor  # (T, d) E[tokens]
    position: Tensor  # (T, d)
    x: Tensor  # (T, d)
    query: Tensor  # (T, d)
    key: Tensor  # (T, d)
    value: Tensor  # (T, d)
    scores: Tensor  # (T, T) query @ key^T / sqrt(d)
    weights: Tensor  # (T, T) softmax of the scores that the mask leaves
    attended: Tensor  # (T, d) weights @ value
    normed: Tensor  # (T, d) LayerNorm(attended + x)


def compute() -> AttentionExample:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table, w_q, w_k, w_v = (torch.tensor(rows, device=device) for rows in (EMBEDDING, W_Q, W_K, W_V))
    tokens = torch.tensor([VOCABULARY.index(word) for word in WORDS], device=device)
    length, width = len(WORDS), table.shape[1]
    position = sinusoids(length, width).to(device)
    x = F.embedding(tokens, table, position=position)
    query, key, value = (F.linear(x, w.T) for w in (w_q, w_k, w_v))  # X W: a weight of `linear` is transposed
    scores = F.linear(query / math.sqrt(width), key)
    # Attention to the rows of a unit matrix answers with its weights.
    unit = torch.eye(length, device=device)
    weights, attended = (_attention(query, key, rows) for rows in (unit, value))
    normed = F.layer_norm(attended, width, residual=x)
    results = F.embedding(tokens, table), position, x, query, key, value, scores, weights, attended, normed
    return AttentionExample(*(t.cpu() for t in results))


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # (T, d), (T, d), (T, e) -> (T, e)
    return F.scaled_dot_product_attention(query[None, None], key[None, None], value[None, None], is_causal=True)[0, 0]


def report(example: AttentionExample, console: Console) -> None:
    """Print the example to the terminal, one step of the layer after another."""

    def say(text: str) -> None:
        console.print(text, markup=False)

    tokens = ", ".join(f"{word} = {VOCABULARY.index(word)}" for word in WORDS)
    say(f'1. "{" ".join(WORDS)}" is cut into tokens: {tokens}.')
    say("   Each takes its row of the embedding E; the row of its position in P is added (sines and cosines of t,")
    say("   t / 100 in the last two columns):  X = E[tokens] + P")
    console.print(tables(("E[tokens]", example.embedding), ("P", example.position), ("X", example.x)))
    say("2. Three products make queries, keys and values:  Q = X W_Q,  K = X W_K,  V = X W_V  with")
    matrices = ((name, torch.tensor(rows)) for name, rows in (("W_Q", W_Q), ("W_K", W_K), ("W_V", W_V)))
    console.print(tables(*matrices, names=()))
    console.print(tables(("Q", example.query), ("K", example.key), ("V", example.value)))
    last, width = len(WORDS) - 1, example.query.shape[1]
    say(f"3. The score of a query and a key is their product over the square root of d_k = {width} columns:")
    say("   S = Q K^T / sqrt(d_k).  For the query of every word and the key of the first:")
    for i, word in enumerate(WORDS):
        sum_ = dot(example.query[i], example.key[0])
        say(f"   {word:>5}, {WORDS[0]}: ({sum_}) / {math.sqrt(width):g} = {number(example.scores[i, 0])}")
    say("   (The primer divides by sqrt(d_model) where it has one head and by sqrt(d_k) where it has several. Both are")
    say("   d_k, the columns of one head's queries: with one head d_k = d_model.)")
    say("4. A word sees itself and those before it: the scores of later keys are set to -inf, and the softmax of each")
    say("   line, exp(s) over the sum of the line's, makes weights that sum to 1.")
    console.print(tables(("S", example.scores), ("S, masked", masked(example.scores)), ("A", example.weights)))
    line = example.scores[last]
    exponentials = " + ".join(f"exp({number(s)})" for s in line)
    say(f"   {WORDS[last]}, {WORDS[0]}: exp({number(line[0])}) / ({exponentials}) = {number(example.weights[last, 0])}")
    say("\n5. The answer of each word is the sum of the values that it sees, each times its weight:  O = A V.")
    say(f"   First column of {WORDS[last]}: {dot(example.weights[last], example.value[:, 0])}"
        f" = {number(example.attended[last, 0])}")  # fmt: skip
    total = example.attended + example.x
    say("6. The sum with what came in, each line brought to mean 0 and variance 1:  Y = LayerNorm(O + X).")
    mean, variance = total[last].mean(), total[last].var(correction=0)
    say(f"   {WORDS[last]} has mean {number(mean)} and variance {number(variance)}; its first number becomes")
    first, answer = number(total[last, 0]), number(example.normed[last, 0])
    say(f"   ({first} - {number(mean)}) / sqrt({number(variance)}) = {answer}")
    console.print(tables(("O", example.attended), ("O + X", total), ("Y", example.normed)))
    say("With H heads the columns of Q, K and V are cut into H parts of d_k = d_model / H, each attends on its own,")
    say("and the answers are put side by side again. Y goes on to the perceptron, and the last word's line of the")
    say("last layer is what the next word is predicted from.\n")


def number(value: Tensor | float) -> str:
    """A number with two digits after the point."""
    value = float(value)
    return "-inf" if value == -math.inf else f"{value:.2f}".replace("-0.00", "0.00")


def dot(a: Tensor, b: Tensor) -> str:
    """The sum of products in full: ``0.20*1.10 + -0.60*0.30``."""
    return " + ".join(f"{number(p)}*{number(q)}" for p, q in zip(a, b, strict=True))


def masked(scores: Tensor) -> Tensor:  # (T, T) -> (T, T)
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)


def tables(*named: tuple[str, Tensor], names: tuple[str, ...] = WORDS) -> Table:
    """Matrices side by side under their names, and the words before their lines."""
    texts = ((name, "\n".join(" ".join(f"{number(v):>5}" for v in row) for row in t)) for name, t in named)
    return worked_example.side_by_side(*texts, lines=names)


def draw(path: Path, example: AttentionExample) -> None:
    """The layer from left to right: what comes in, queries, keys, values; scores, weights, answers, what goes out."""
    panels = [
        ("$X = E$[tokens] + $P$", example.x), ("$Q = X W_Q$", example.query), ("$K = X W_K$", example.key),
        ("$V = X W_V$", example.value), ("$S = Q K^T / \\sqrt{d_k}$, masked", masked(example.scores)),
        ("$A$ = softmax($S$)", example.weights), ("$O = A V$", example.attended),
        ("$Y$ = LayerNorm($O + X$)", example.normed),
    ]  # fmt: skip
    with picture(path, 12.5, 6.2, f'One layer of causal attention: "{" ".join(WORDS)}"') as figure:
        for axes, (name, t) in zip(figure.subplots(2, 4).flat, panels, strict=True):
            _numbers(axes, t, name, keys=name[1] in "SA")


def _numbers(axes: Axes, t: Tensor, name: str, keys: bool) -> None:
    """A matrix with its numbers, a line per word; columns are words too where they are ``keys``."""
    if name[1] == "A":
        colours: dict = {"cmap": BLUES, "vmin": 0, "vmax": 1.6}  # lighter than the darkest, for dark numbers on it
    else:
        bound = 1.5 * t.nan_to_num(neginf=0.0).abs().max().item()
        colours = {"cmap": SIDES, "vmin": -bound, "vmax": bound}
    worked_example.draw_numbers(axes, t, number, 11, **colours)
    axes.set_yticks(range(len(WORDS)), WORDS, color=INK)
    axes.set_xticks(range(len(WORDS)) if keys else [], WORDS if keys else [], color=INK)
    axes.tick_params(length=0)
    axes.set_title(name, fontsize=11, loc="center")


def main(argv: list[str]) -> int:
    return worked_example.show(parse(argv).out, compute(), report, draw, columns=96)
