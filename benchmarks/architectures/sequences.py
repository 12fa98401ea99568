"""Recurrent and convolutional networks on sequences: sound, text, time series."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from architectures.architecture import Architecture, batches, noise, settled, tokens


class WaveNet(nn.Module):
    """Oord et al. 2016: causal, dilated, gated; padded on the left by hand."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, width, 1)
        self.dilated = nn.ModuleList(
            nn.Conv1d(width, 2 * width, 2, dilation=2**i) for i in range(3)
        )
        self.mixing = nn.ModuleList(nn.Conv1d(width, 2 * width, 1) for _ in range(3))
        self.out = nn.Conv1d(width, 32, 1)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        hidden = self.first(given)
        total: Any = 0
        for dilated, mixing in zip(self.dilated, self.mixing, strict=True):
            padded = functional.pad(hidden, (dilated.dilation[0], 0))
            kept, gate = dilated(padded).chunk(2, 1)
            skip, onward = mixing(kept.tanh() * gate.sigmoid()).chunk(2, 1)
            total, hidden = total + skip, hidden + onward
        return self.out(torch.relu(total))


class Tagger(nn.Module):
    """An embedding, a recurrent layer of packed sequences, its last states, a head."""

    def __init__(self, kind: type[nn.RNNBase], **more: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(200, 48, padding_idx=0)
        self.rnn = kind(48, 64, batch_first=True, **more)
        directions = 2 if self.rnn.bidirectional else 1
        self.head = nn.Linear(directions * (self.rnn.proj_size or 64), 5)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = pack_padded_sequence(
            self.embedding(ids), lengths, batch_first=True, enforce_sorted=False
        )
        outputs, _ = self.rnn(packed)
        states, _ = pad_packed_sequence(outputs, batch_first=True)
        return self.head(states)


class LastState(nn.Module):
    """The classifier reads h_n, not the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(24, 64, num_layers=2, dropout=0.1)
        self.head = nn.Linear(64, 5)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        _, states = self.rnn(given)
        return self.head(states[-1])


class Cells(nn.Module):
    """A loop over cells, written out; states are handed on as attributes of nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(24, 48), nn.GRUCell(48, 48)
        self.head = nn.Linear(48, 6)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        first, second = None, None
        for step in given.unbind(1):
            first = self.lstm(step, first)
            second = self.gru(first[0], second)
        return self.head(second)


class Translator(nn.Module):
    """Bahdanau et al. 2015: an encoder, a decoder that attends to it, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(150, 32), nn.Embedding(120, 32)
        self.encoder = nn.GRU(32, 48, batch_first=True, bidirectional=True)
        self.bridge = nn.Linear(96, 64)
        self.decoder = nn.GRUCell(32 + 96, 64)
        self.query, self.key = nn.Linear(64, 32), nn.Linear(96, 32, bias=False)
        self.energy = nn.Linear(32, 1, bias=False)
        self.out = nn.Linear(64 + 96, 120)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        memory, _ = self.encoder(self.source(source))
        state = torch.tanh(self.bridge(memory[:, -1]))
        keys = self.key(memory)
        outputs = []
        for word in self.target(target).unbind(1):
            scores = self.energy(torch.tanh(keys + self.query(state)[:, None]))
            context = (scores.softmax(1) * memory).sum(1)
            state = self.decoder(torch.cat([word, context], 1), state)
            outputs.append(self.out(torch.cat([state, context], 1)))
        return torch.stack(outputs, 1)


class Carried(nn.Module):
    """Initial states are parameters; the final ones are returned beside the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(32, 48, batch_first=True)
        self.start = nn.ParameterList([torch.zeros(1, 1, 48), torch.zeros(1, 1, 48)])
        self.head = nn.Linear(48, 4)

    def forward(self, given: torch.Tensor) -> Any:
        start = tuple(one.expand(-1, len(given), -1).contiguous() for one in self.start)
        outputs, states = self.rnn(given, start)
        return self.head(outputs), states


def audio() -> nn.Module:
    """Sound to words: strides, batch norm, a stack of GRUs seen as outputs only."""

    class Recogniser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front = nn.Sequential(
                nn.Conv1d(20, 48, 7, 2, 3), nn.BatchNorm1d(48), nn.ReLU(), nn.Conv1d(48, 48, 3)
            )
            self.rnn = nn.GRU(48, 40, 2, batch_first=True, bidirectional=True)
            self.head = nn.Linear(80, 30)

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            outputs, _ = self.rnn(self.front(given).transpose(1, 2))
            return self.head(outputs).log_softmax(-1)

    return settled(Recogniser(), torch.randn(8, 20, 64))


def residual_audio() -> nn.Module:
    """Dai et al. 2017: very long kernels on raw sound."""
    layers: list[nn.Module] = [nn.Conv1d(1, 48, 80, 4), nn.BatchNorm1d(48), nn.ReLU()]
    layers += [nn.MaxPool1d(4), nn.Conv1d(48, 64, 3, bias=False), nn.BatchNorm1d(64), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 8)]
    return settled(nn.Sequential(*layers), torch.randn(8, 1, 1024))


PACKED = "a packed batch is counted as one sequence"


def packed_batch() -> dict[str, torch.Tensor]:
    return {"ids": torch.randint(1, 200, (4, 9)), "lengths": torch.tensor([9, 3, 7, 9])}


def word_bags() -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(500, 64, mode="mean"), nn.Linear(64, 64), nn.ReLU())


ARCHITECTURES = (
    Architecture("WaveNet, causal dilated", WaveNet, noise(2, 1, 64)),
    Architecture("Raw sound, kernel of 80", residual_audio, noise(4, 1, 1024)),
    Architecture("Speech, convolutions and GRUs", audio, noise(2, 20, 64)),
    Architecture(
        "LSTM of packed sequences", lambda: Tagger(nn.LSTM), batches(packed_batch), uneven=PACKED
    ),
    Architecture(
        "GRU of packed sequences, both ways",
        lambda: Tagger(nn.GRU, bidirectional=True),
        batches(packed_batch),
        uneven=PACKED,
    ),
    Architecture(
        "RNN of ReLUs",
        lambda: Tagger(nn.RNN, nonlinearity="relu"),
        batches(packed_batch),
        uneven=PACKED,
    ),
    Architecture(
        "LSTM with proj_size", lambda: Tagger(nn.LSTM, proj_size=24), batches(packed_batch)
    ),
    Architecture("GRU, last state of two layers", LastState, noise(10, 4, 24)),
    Architecture("LSTM with given states", Carried, noise(4, 8, 32)),
    Architecture("LSTM and GRU cells in a loop", Cells, noise(4, 6, 24)),
    Architecture(
        "Encoder and decoder with attention",
        Translator,
        batches(
            lambda: {
                "source": torch.randint(150, (3, 8)),
                "target": torch.randint(120, (3, 6)),
            }
        ),
    ),
    Architecture("EmbeddingBag classifier", word_bags, tokens(500)),
)
