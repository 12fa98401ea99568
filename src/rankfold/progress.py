"""How long-running functions say where they are, without knowing who listens."""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Wraps a loop: yields the items of `work`, telling `description` and how many are done."""

    def __call__(
        self, work: Iterable[T], description: str, total: int | None = None
    ) -> Iterator[T]: ...


def silent(work: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """The `Progress` that tells nobody."""
    yield from work
