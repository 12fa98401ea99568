"""The method that CONTRIBUTING shows, works."""

import re
from pathlib import Path

import torch
from geometry import relative
from tensors import weight_of
from torch import nn

from rankfold.methods import Moments, reduction

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
IMPORTS = """
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from rankfold.decompose import tucker
from rankfold.decompose.decomposition import working_precision
from rankfold.layers import Convolution, assign_factors, check_ranks
from rankfold.layers.chain import all_axes, link
from rankfold.layers.linked import LinkedConvolution
from rankfold.methods import Moments, Rank, aligned_ranks
from rankfold.methods.method import check_alignment, why_not_spatial
from rankfold.methods.sampled import SampledFamily
"""


def test_the_method_shown_factorizes_convolutions_of_every_kind() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict = {}
    exec(compile(IMPORTS + example, "CONTRIBUTING.md", "exec"), names)
    method = names["InputMixtures"]()
    assert "svd serves it" in method.why_not(nn.Conv2d(16, 16, 1))
    for layer in (
        nn.Conv2d(16, 12, 3, stride=2),
        nn.Conv2d(32, 12, (3, 2), groups=2),
        nn.ConvTranspose1d(12, 16, 3),
    ):
        assert reduction.why_not(method, layer) is None
        family = reduction.fit(method, layer, Moments())
        losses = [family.loss(rank) for rank in family.ranks()]
        assert losses[0] > 0.05 and losses[-1] < 1e-9
        form = family.build(family.ranks()[-1])
        assert relative(form.to_dense().weight, layer.weight) < 1e-5
        assert repr(reduction.skeleton(method, layer, family.ranks()[0])) == repr(
            family.build(family.ranks()[0])
        )


def test_it_is_fitted_in_the_metric() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict = {}
    exec(compile(IMPORTS + example, "CONTRIBUTING.md", "exec"), names)
    layer = nn.Conv2d(16, 12, 3, dtype=torch.float64)
    moments = Moments(weight_of(16, seed=1), weight_of(12, seed=2))
    errors = []
    for metric in (moments, Moments()):
        form = names["InputMixtures"]().fit(layer, metric).build((8,))
        errors.append(
            moments.squared_error(form.to_dense().weight.detach() - layer.weight.detach())
        )
    assert errors[0] < 0.95 * errors[1]
