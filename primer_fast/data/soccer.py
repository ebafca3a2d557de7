"""A toy: which soccer players are drafted, from how long they juggle the ball and what they weigh.

The forty players are made up. Those drafted juggle well and are neither light nor heavy, a region that takes three
straight lines to cut out: no linear model separates it, and three hidden units can.
"""

__all__ = ["PLAYERS", "Soccer", "load_soccer"]

from dataclasses import dataclass

import torch
from torch import Tensor

PLAYERS = (  # juggles, weight in kg, drafted
    (53, 81, 1), (18, 91, 0), (93, 50, 0), (66, 72, 1), (27, 58, 0), (95, 71, 1), (6, 99, 0), (62, 76, 1),
    (92, 61, 0), (87, 69, 1), (34, 74, 0), (75, 80, 1), (9, 104, 0), (69, 91, 0), (79, 73, 1), (19, 63, 0),
    (54, 70, 1), (48, 51, 0), (96, 84, 1), (15, 67, 0), (62, 79, 1), (76, 103, 0), (89, 78, 1), (5, 55, 0),
    (73, 69, 1), (33, 86, 0), (61, 85, 1), (81, 54, 0), (87, 82, 1), (26, 89, 0), (55, 84, 1), (25, 76, 0),
    (91, 74, 1), (19, 94, 0), (96, 80, 1), (52, 102, 0), (67, 82, 1), (26, 55, 0), (56, 76, 1), (73, 72, 1),
)  # fmt: skip


@dataclass(frozen=True)
class Soccer:
    """The primer's players, and what their table is standardised by."""

    players: Tensor  # (N, 2) float32: juggles in a row, weight in kg
    drafted: Tensor  # (N,) float32: 1 drafted, 0 not
    mean: Tensor  # (2,) of the players
    std: Tensor  # (2,)

    def standardise(self, players: Tensor) -> Tensor:
        """(..., 2) juggles and kg -> (..., 2) of mean 0 and variance 1 over the table: what a network is fed."""
        return (players - self.mean) / self.std


def load_soccer() -> Soccer:
    """The built-in table of forty players, half of them drafted."""
    table = torch.tensor(PLAYERS, dtype=torch.float32)
    players = table[:, :2]
    return Soccer(players, table[:, 2], players.mean(dim=0), players.std(dim=0, correction=0))
