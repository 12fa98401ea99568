"""What TensorBoard shows of a recovery."""

import os
from collections.abc import Callable

from rankfold import processes
from rankfold.errors import RankfoldError


def tensorboard_log(
    directory: str | os.PathLike[str],
) -> Callable[[str, float, int], None] | None:
    """A function that writes (what, value, number of the step) there; None but in one process.

    Raises RankfoldError, naming the extra, where TensorBoard is not installed.
    """
    if not processes.is_first():
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RankfoldError(
            "TensorBoard is not installed: pip install 'rankfold[tensorboard]'"
        ) from error
    writer = SummaryWriter(str(directory))

    def log(what: str, value: float, step: int) -> None:
        writer.add_scalar(what.replace(" ", "_"), value, step)
        writer.flush()

    return log
