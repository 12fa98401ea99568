"""Networks built with no memory for their parameters."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from torch import nn


@contextmanager
def without_weights() -> Iterator[None]:
    """Within: parameters of modules that are made are on the meta device, shared ones once.

    Buffers are made as ever: those that no file holds have to be right.
    """
    register = nn.Module.register_parameter

    def register_without_weight(
        module: nn.Module, name: str, parameter: nn.Parameter | None
    ) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    with mock.patch.object(nn.Module, "register_parameter", register_without_weight):
        yield
