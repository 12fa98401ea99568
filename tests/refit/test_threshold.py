import torch

from rankfold.refit.threshold import stand_in


def test_the_stand_in_is_the_least_of_a_fine_grid() -> None:
    target = torch.rand(200, dtype=torch.float64) * (torch.rand(200) > 0.4)
    predicted = torch.randn(200, dtype=torch.float64)
    grid = torch.linspace(-5, 5, 20001, dtype=torch.float64)[:, None]
    for tie in (0.01, 0.3, 1.0):

        def cost(z, tie=tie):
            return (target - z.clamp_min(0)).square() + tie * (z - predicted).square()

        best = cost(grid).min(0).values
        assert (cost(stand_in(target, predicted, tie)) <= best + 1e-12).all()
