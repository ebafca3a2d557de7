"""The bounds that whole programs are held to; single ops have theirs in bench/<op>.py."""

from primer_fast.bench.report import Goal

NANOGPT = Goal(">= 1.3 x nanoGPT's tokens/s at equal loss", at_least=1.3)
CNN = Goal(">= 1.0 x torch.nn's images/s", at_least=1.0)
DPO = Goal(">= 1.5 x TRL's pairs/s at equal loss", at_least=1.5)
CACHE = Goal(">= 3 x the tokens/s without a cache", at_least=3.0)
TRANSFORMERS = Goal(">= 1.5 x the tokens/s of transformers' generate", at_least=1.5)
LOSS_MEMORY = Goal("<= 1/4 of the peak memory of linear + cross_entropy", at_most=0.25)
CALL_US = Goal("<= +5 us a call beside torch.nn.functional", at_most=5.0)
HOST_US = Goal("<= 25 us of host time a call", at_most=25.0)
FORWARD = Goal("<= 3 bare launches a forward", at_most=3.0)
BOTH_WAYS = Goal("<= 8 bare launches a forward and backward, autograd included", at_most=8.0)
GPT2 = Goal(">= 1.1 x nanoGPT with torch.compile", at_least=1.1)
GPT2_USE = Goal(">= 0.45 of an H100's 989 TFLOP/s", at_least=0.45)
MNIST = Goal("MNIST to 99 % in <= 0.5 s", at_most=0.5)

# By kind of machine: what is compared, and the bound.
DECLARED: dict[str, tuple[tuple[str, Goal], ...]] = {
    "cpu": (
        ("nanogpt", NANOGPT), ("cnn", CNN), ("dpo", DPO), ("generation", CACHE), ("generation", TRANSFORMERS),
        ("loss_head", LOSS_MEMORY), ("call", CALL_US), ("launch", FORWARD), ("launch", BOTH_WAYS),
    ),
    "cuda": (
        ("gpt2", GPT2), ("gpt2", GPT2_USE),
        ("nanogpt", Goal("characters of Shakespeare to a validation loss of 1.47 in <= 30 s", at_most=30.0)),
        ("cnn", MNIST), ("generation", CACHE), ("generation", TRANSFORMERS), ("call", HOST_US),
        ("launch", FORWARD), ("launch", BOTH_WAYS),
        ("ppo", Goal(">= 10 x TRL's episodes/s", at_least=10.0)),
    ),
}  # fmt: skip
