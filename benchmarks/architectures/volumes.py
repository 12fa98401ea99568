"""Three axes: video and medical images; and none: plain vectors."""

import torch
from torch import nn

from architectures.architecture import Architecture, noise, settled


def video() -> nn.Module:
    """Tran et al. 2015."""
    network = nn.Sequential(
        nn.Conv3d(3, 24, 3, padding=1),
        nn.BatchNorm3d(24),
        nn.ReLU(inplace=True),
        nn.MaxPool3d((1, 2, 2)),
        nn.Conv3d(24, 48, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(48, 10),
    )
    return settled(network, torch.randn(4, 3, 6, 12, 12))


def split_video() -> nn.Module:
    """Tran et al. 2018: (2+1)D, space and then time."""
    return nn.Sequential(
        nn.Conv3d(3, 32, (1, 3, 3), (1, 2, 2), (0, 1, 1)),
        nn.ReLU(),
        nn.Conv3d(32, 48, (3, 1, 1), padding=(1, 0, 0)),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(48, 10),
    )


class VolumeUNet(nn.Module):
    """Çiçek et al. 2016, with instance norms."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv3d(1, 16, 3, padding=1), nn.InstanceNorm3d(16, affine=True), nn.LeakyReLU()
        )
        self.middle = nn.Conv3d(16, 32, 3, 2, 1)
        self.up = nn.ConvTranspose3d(32, 16, 2, 2)
        self.out = nn.Conv3d(32, 2, 1)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        first = self.down(given)
        up = self.up(torch.relu(self.middle(first)))
        return self.out(torch.cat([first, up], 1))


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(40, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 3)
    )


class Points(nn.Module):
    """Qi et al. 2017: shared layers on points, an alignment predicted from them, a maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.align = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 9))
        self.points = nn.Sequential(nn.Conv1d(3, 48, 1), nn.ReLU(), nn.Conv1d(48, 96, 1))
        self.head = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 4))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        turn = self.align(given.mT).amax(1).view(-1, 3, 3) + torch.eye(3)
        return self.head(self.points(turn @ given).amax(2))


class Graph(nn.Module):
    """Kipf, Welling 2017: products with a sparse adjacency that is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.out = nn.Linear(64, 4)
        edges = torch.rand(30, 30) < 0.15
        self.register_buffer("adjacency", (edges | edges.T).float() / 4)

    def forward(self, nodes: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.adjacency @ self.first(nodes))
        return self.out(torch.relu(self.adjacency @ self.second(hidden)))


class Recommender(nn.Module):
    """Naumov et al. 2019: embeddings of several tables, their products, a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, 32) for n in (300, 100, 6))
        self.dense = nn.Linear(8, 32)
        self.top = nn.Sequential(nn.Linear(6 + 32, 64), nn.ReLU(), nn.Linear(64, 1), nn.Sigmoid())

    def forward(self, numbers: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        dense = torch.relu(self.dense(numbers))
        rows = [table(ids[:, i] % table.num_embeddings) for i, table in enumerate(self.tables)]
        every = torch.stack([dense, *rows], 1)
        places = torch.tril_indices(4, 4, -1)
        products = (every @ every.mT)[:, places[0], places[1]]
        return self.top(torch.cat([dense, products], 1)).squeeze(1)


def clicks() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [((torch.randn(8, 8), torch.randint(300, (8, 3))),) for _ in range(6)]


ARCHITECTURES = (
    Architecture("Video, Conv3d", video, noise(2, 3, 6, 12, 12)),
    Architecture("Video, (2+1)D", split_video, noise(2, 3, 6, 12, 12)),
    Architecture("U-Net of volumes", VolumeUNet, noise(2, 1, 8, 8, 8)),
    Architecture("Perceptron", perceptron, noise(8, 40)),
    Architecture("PointNet", Points, noise(4, 3, 50)),
    Architecture("Graph convolutions", Graph, noise(4, 30, 24)),
    Architecture("Recommender, tables of embeddings", Recommender, clicks),
)
