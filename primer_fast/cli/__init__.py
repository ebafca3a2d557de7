"""The ``primer-fast`` command: each command is one module here, imported only when it is called."""

import importlib
import sys

COMMANDS = {  # words on the command line -> module, what it does
    ("verify",): ("verify", "compare every kernel with its NumPy reference"),
    ("kernels",): ("kernels", "compile the kernels for any GPU, without one, and list registers and instructions"),
    ("tune",): ("tune", "search this GPU's fastest launch settings, and keep them"),
    ("train", "mlp"): ("train_mlp", "train the multilayer perceptron"),
    ("train", "cnn"): ("train_cnn", "train the convolutional network on digits"),
    ("train", "vit"): ("train_vit", "train the vision transformer on digits"),
    ("train", "gpt"): ("train_gpt", "train the transformer on text"),
    ("train", "sft"): ("train_sft", "fine-tune a transformer on prompts and their completions"),
    ("train", "reward"): ("train_reward", "train a reward model on what people prefer"),
    ("train", "dpo"): ("train_dpo", "align a transformer with preferences, without a reward model"),
    ("train", "ppo"): ("train_ppo", "align a transformer with a reward model or any function"),
    ("sample",): ("sample", "print text that a trained transformer writes"),
    ("show", "convolution"): ("show_convolution", "work a convolution and a max-pool out, number by number"),
    ("show", "attention"): ("show_attention", "work a layer of attention out, number by number"),
    ("align",): ("align", "pretrain, learn what people prefer, PPO and DPO side by side, one page of results"),
    ("report",): ("report", "one page of everything measured, and what was not"),
    ("demo",): ("demo", "verify, train and write a report with pictures"),
}


def usage() -> str:
    width = max(len(" ".join(words)) for words in COMMANDS)
    lines = [f"  {' '.join(words):{width}}  {what}" for words, (_, what) in COMMANDS.items()]
    return "usage: primer-fast COMMAND [options]; primer-fast COMMAND --help says more\n\n" + "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit status is 0 for success, 1 for a failure it reports, 2 for a wrong call."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    for words, (module, _) in COMMANDS.items():
        if tuple(argv[: len(words)]) == words:
            try:
                command = importlib.import_module(f"primer_fast.cli.{module}")
            except ModuleNotFoundError as error:
                if error.name is None or error.name.startswith("primer_fast"):
                    raise
                print(f"primer-fast needs the package {error.name}: pip install 'primer-fast[cli]'", file=sys.stderr)
                return 2
            return command.main(argv[len(words) :])
    print(f"primer-fast: unknown command {' '.join(argv[:2])!r}\n\n{usage()}", file=sys.stderr)
    return 2
