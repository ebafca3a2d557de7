"""The demo's chapter on the transformer."""

from pathlib import Path

from primer_fast.cli import page
from primer_fast.cli.training import RunResult
from primer_fast.models.transformer import Transformer


def chapter(attention: Path, text: RunResult[Transformer]) -> page.Chapter:
    """The worked example with its picture, then the model on the built-in text."""
    config = text.model.config
    title = "Transformer"
    html = page.section(
        title,
        page.formula(
            "X = E[tokens] + P",
            "O = softmax(Q K<sup>T</sup> / √d<sub>k</sub>) V",
            "X ← LayerNorm(O + X)",
            "X ← LayerNorm(MLP(X) + X)",
            "L = &minus;mean<sub>t</sub> log softmax(X<sub>t</sub> E<sup>T</sup>)[token<sub>t+1</sub>]",
        ),
        page.text(
            "Every token asks (Q = X W_Q) all tokens before it (K = X W_K) and takes of what they hold (V = X W_V) as "
            "much as they fit; the last line of X is what the next token is predicted from. Attention never has its "
            "T x T weights in memory, the loss never its logits, and a sum and its layer norm are one pass."
        ),
        page.code(
            "o = primer_fast.functional.scaled_dot_product_attention(q, k, v, is_causal=True)\n"
            "x = primer_fast.functional.layer_norm(o, width, weight, bias, residual=x)\n"
            "loss = primer_fast.functional.linear_cross_entropy(x, embedding, targets)"
        ),
        page.section(
            '"What is your name"',
            page.picture(attention, "One layer of attention with one head; every number is real."),
            page.code("# each number worked out in the terminal: primer-fast show attention"),
            level=3,
        ),
        page.section(
            "Text, character by character",
            page.text(
                f"{config.layers} layers of {config.heads} heads, width {config.width}, a context of {config.context} "
                "characters, trained for about a minute on the language reference that comes with Python. Longer "
                "training and more text (`primer-fast train gpt --data FILE`) make words and sentences of it."
            ),
            page.number(text.result),
            page.code((text.folder / "sample.txt").read_text(encoding="utf-8")),
            page.picture(text.folder / "attention.png", "What each head of each layer looks at."),
            page.side_by_side(
                page.picture(text.folder / "positions.png", "What tells the positions apart."),
                page.picture(text.folder / "embeddings.png", "Characters that are used alike lie together."),
            ),
            page.picture(text.folder / "curves.png", "Loss on the text trained on and on the tenth held out."),
            page.code(
                "model = Transformer(TransformerConfig(vocab, context=64, width=128, layers=4, heads=4))\n"
                "for metrics in language_model.train(language_model.start(model, config), text, config): ...\n"
                "generate(model, [prompt], max_new_tokens=200, temperature=0.8)\n"
                "\n# or: primer-fast train gpt --data builtin; primer-fast sample runs/gpt-builtin --prompt 'The '"
            ),
            level=3,
        ),
    )
    return page.Chapter(title, text.result, html)
