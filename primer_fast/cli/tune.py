"""``primer-fast tune``: search this GPU's fastest launch settings, or without one see what would be tried."""

from primer_fast.cli.options.tune import parse
from primer_fast.tuning.job import Request, run


def main(argv: list[str]) -> int:
    """Run the command; for its exit status see ``run``."""
    return run(Request(**vars(parse(argv))))
