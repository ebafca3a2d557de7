"""primer-fast train gpt: a decoder transformer on text."""

from primer_fast.cli.options.train.gpt import OF_THE_MODEL, SYNTAX, Options
from primer_fast.cli.options.train.gpt import default_options as default_options
from primer_fast.cli.run.training import TrainCommand
from primer_fast.cli.train.gpt_tasks import SHAPE, TOKENIZER, TextTask, read_shape
from primer_fast.data import tokenizers
from primer_fast.data.text import load_text, tokenize
from primer_fast.data.tokenizers import Tokenizer
from primer_fast.models.pretrained import gpt2_shape, load_gpt2
from primer_fast.models.transformer import Transformer, TransformerConfig


def load_task(options: Options) -> TextTask:
    text = load_text(options.data)
    saved = SYNTAX.folder(options) / TOKENIZER
    if options.resume and saved.exists():
        tokenizer = tokenizers.load(saved)
    else:
        tokenizer = tokenizers.make(options.tokenizer, text)
    _check_tokenizer(options, tokenizer)
    try:
        tokens = tokenize(text, tokenizer, options.context)
    except ValueError as error:
        raise ValueError(f"{options.data}: {error}") from error
    return TextTask(
        tokens, tokenizer, context=options.context, sample_tokens=options.sample_tokens, seed=options.train.seed
    )


def make_model(options: Options, task: TextTask) -> Transformer:
    model = _model(options, task.tokenizer.vocab_size)
    model.exclude(tokenizers.without_token(task.tokenizer, model.config.vocab))
    return model


def _check_tokenizer(options: Options, tokenizer: Tokenizer) -> None:
    """ValueError where the tokenizer has more tokens than the model that it is to be trained with."""
    saved = SYNTAX.folder(options) / SHAPE
    if options.resume and saved.exists():
        vocab, named = read_shape(saved).vocab, str(saved.with_name(TOKENIZER))
    elif options.init_from is not None:
        vocab, named = gpt2_shape(options.init_from).vocab, "--tokenizer"
    else:
        return  # the model is made for it
    try:
        tokenizers.check_fits(tokenizer, vocab)
    except ValueError as error:
        raise ValueError(f"{named}: {error}") from error


def _model(options: Options, vocab: int) -> Transformer:
    saved = SYNTAX.folder(options) / SHAPE
    if options.resume and saved.exists():
        return Transformer(read_shape(saved))
    shape = {name: getattr(options, name) for name in OF_THE_MODEL}
    if options.init_from is None:
        return Transformer(TransformerConfig(vocab, **shape))
    model = load_gpt2(options.init_from, dropout=options.dropout)
    for name, ours in shape.items():
        theirs = getattr(model.config, name)
        if theirs != ours:
            raise ValueError(f"--{name.replace('_', '-')} must be the checkpoint's {theirs}; got {ours}")
    return model


COMMAND = TrainCommand(SYNTAX, load_task, make_model)
main, run = COMMAND.main, COMMAND.run
