"""Layers to write networks with."""

import torch
from torch import nn

import rankfold
from rankfold import nn as structured


def test_all_that_is_named_is_there() -> None:
    for name in structured.__all__:
        assert issubclass(getattr(structured, name), nn.Module)


def test_a_network_of_such_layers_is_trained_and_analysed() -> None:
    """Layers that no method takes are left, and the analysis says so."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = structured.StructuredRecurrent(
                nn.LSTM(24, 8, batch_first=True),
                lambda i, o: structured.TensorRingLinear(i, o, 2, bias=False),
            )
            self.hidden = structured.TensorTrainLinear(8, 32, 2)
            self.readout = nn.Linear(32, 16)

        def forward(self, tensor: torch.Tensor) -> torch.Tensor:
            return self.readout(self.hidden(self.recurrent(tensor)[0][:, -1]).relu())

    torch.manual_seed(0)
    network, batch, target = Network(), torch.randn(16, 5, 24), torch.randn(16, 16)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = (network(batch) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    analysis = rankfold.analyze(network, [batch], methods=["svd", "fewer-units"], metric="weight")
    small = rankfold.factorize(network, analysis.plan(fraction=0.5))
    assert small(batch).shape == target.shape


def test_a_network_of_few_factors_is_trained_and_analysed() -> None:
    """Its factors are layers of torch's own, which methods take further."""
    network = nn.Sequential(
        structured.SeparableConv2d(3, 16, 3, rank=8, padding=1, bias=False, batch_norm=True),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        structured.LowRankConv2d(16, 24, 3, rank=16, stride=2, padding=1),
        nn.ReLU(),
        structured.FlattenedConv2d(24, 32, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        structured.LowRankLinear(32, 10, rank=4),
    )
    data = list(zip(torch.randn(4, 16, 3, 8, 8), torch.randint(0, 10, (4, 16)), strict=True))
    recovery = rankfold.recover(
        network, data, loss_fn=nn.functional.cross_entropy, epochs=20, learning_rate=1e-2
    )
    losses = [epoch.loss for epoch in recovery.epochs if epoch.loss is not None]
    assert losses[-1] < 0.8 * losses[0]
    analysis = rankfold.analyze(network, data, methods=["svd"], metric="weight")
    small = rankfold.factorize(network, analysis.plan(macs=0.8))
    assert small(data[0][0]).shape == (16, 10)
