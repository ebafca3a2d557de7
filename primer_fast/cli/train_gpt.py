"""primer-fast train gpt: a decoder transformer on text."""

from primer_fast.cli import threads  # noqa: F401

# isort: split


from primer_fast.cli import training
from primer_fast.cli.console import Display
from primer_fast.cli.gpt_tasks import SHAPE, TOKENIZER, TextTask, read_shape
from primer_fast.cli.options.train_gpt import OF_THE_MODEL, SYNTAX, Options
from primer_fast.cli.options.train_gpt import default_options as default_options
from primer_fast.cli.training import Command, Outcome
from primer_fast.data import tokenizers
from primer_fast.data.text import load_text, tokenize
from primer_fast.models.pretrained import load_gpt2
from primer_fast.models.transformer import Transformer, TransformerConfig


def load_task(options: Options) -> TextTask:
    text = load_text(options.data)
    saved = COMMAND.folder(options) / TOKENIZER
    if options.resume and saved.exists():
        tokenizer = tokenizers.load(saved)
    else:
        tokenizer = tokenizers.make(options.tokenizer, text)
    try:
        tokens = tokenize(text, tokenizer, options.context)
    except ValueError as error:
        raise ValueError(f"{options.data}: {error}") from error
    return TextTask(
        tokens, tokenizer, context=options.context, sample_tokens=options.sample_tokens, seed=options.train.seed
    )


def make_model(options: Options, task: TextTask) -> Transformer:
    saved = COMMAND.folder(options) / SHAPE
    if options.resume and saved.exists():
        return Transformer(read_shape(saved))
    shape = {name: getattr(options, name) for name in OF_THE_MODEL}
    vocab = task.tokenizer.vocab_size
    if options.init_from is None:
        return Transformer(TransformerConfig(vocab, **shape))
    model = load_gpt2(options.init_from, dropout=options.dropout)
    for name, ours in shape.items():
        theirs = getattr(model.config, name)
        if theirs != ours:
            raise ValueError(f"--{name.replace('_', '-')} must be the checkpoint's {theirs}; got {ours}")
    if vocab > model.config.vocab:
        raise ValueError(f"--tokenizer must have at most the checkpoint's {model.config.vocab} tokens; got {vocab}")
    return model


COMMAND = Command(SYNTAX, load_task, make_model)


def main(argv: list[str]) -> int:
    return training.main(COMMAND, argv)


def run(options: Options, display: Display) -> Outcome:
    return training.run(COMMAND, options, display)
