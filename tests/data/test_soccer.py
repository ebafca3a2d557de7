import torch

from primer_fast.data.soccer import load_soccer


def test_features_are_standardised_over_the_table():
    soccer = load_soccer()
    x = soccer.standardise(soccer.players)
    torch.testing.assert_close(x.mean(dim=0), torch.zeros(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(x.square().mean(dim=0), torch.ones(2), rtol=0, atol=1e-5)


def test_half_of_the_players_are_drafted_and_none_is_there_twice():
    soccer = load_soccer()
    assert soccer.drafted.sum() == 20 and soccer.drafted.unique().tolist() == [0, 1]
    assert len(soccer.players.unique(dim=0)) == len(soccer.players) == 40


def test_no_straight_line_separates_them():
    soccer = load_soccer()
    angle = torch.linspace(0, 2 * torch.pi, 20_000)
    along = soccer.standardise(soccer.players) @ torch.stack([angle.cos(), angle.sin()])  # (N, directions)
    gap = along[soccer.drafted == 1].amin(dim=0) - along[soccer.drafted == 0].amax(dim=0)
    assert gap.max() < -0.1
