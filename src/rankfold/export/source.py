"""A factorized network as a readable Python file, with its weights: no rankfold to load it."""

import copy
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from rankfold.copies import copy_of
from rankfold.errors import CheckpointError, ModelError
from rankfold.version import __version__

SOURCE, WEIGHTS = "architecture.py", "model.safetensors"

_PAGE = '''"""The layers of a factorized network, made by rankfold {version}.

Needs torch and safetensors alone. With the dense network, whatever its weights are:

    from architecture import load

    network = load(make_model())
"""

from pathlib import Path

{torch}from safetensors.torch import load_file
from torch import nn


def rebuild(network: nn.Module) -> nn.Module:
    """Give the dense network the layers of the factorized one, without their weights."""
{changes}
    return network


def load(network: nn.Module, file: Path = Path(__file__).with_name("{weights}")) -> nn.Module:
    """The factorized network, in eval mode."""
    network = rebuild(network)
    network.load_state_dict(load_file(file))
    return network.eval()
'''


def write_source(
    model: nn.Module,
    like: Callable[[], nn.Module] | nn.Module,
    directory: str | os.PathLike[str],
) -> Path:
    """Write `architecture.py` and `model.safetensors` into a directory; the path of the first.

    `like` is the factory of the dense network, or such a network, from which the file will build
    the factorized one. Raises ModelError, naming the layer, for a network with layers that torch
    itself does not have; CheckpointError for a directory that cannot be written.
    """
    dense = copy_of(like) if isinstance(like, nn.Module) else like()
    changes = [*_changes(dense, model, ""), *_shared(model)]
    text = _PAGE.format(
        version=__version__,
        torch="import torch\n" if any("torch." in change for change in changes) else "",
        changes="\n".join(f"    {line}" for change in changes for line in change.splitlines()),
        weights=WEIGHTS,
    )
    _check(text, dense, model)
    target = Path(directory)
    state = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    try:
        target.mkdir(parents=True, exist_ok=True)
        save_file(state, target / WEIGHTS)
        (target / SOURCE).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}") from error
    return target / SOURCE


def _changes(dense: nn.Module, model: nn.Module, path: str) -> Iterator[str]:
    """Statements that put the layers of `model` that `dense` does not have in their places."""
    others = dict(dense.named_children())
    for name, child in model.named_children():
        place = f"{path}.{name}" if path else name
        other = others.get(name)
        if type(child) is type(other) and (_is_inside(child) or repr(child) == repr(other)):
            assert other is not None
            yield from _changes(other, child, place)
        else:
            parent = f'network.get_submodule("{path}")' if path else "network"
            made = _expression(child, place, "")
            yield f'{parent}.register_module("{name}", {made})'


def _is_inside(module: nn.Module) -> bool:
    """Whether all that it differs in may be modules in it."""
    return next(module.children(), None) is not None and not _is_ours(module)


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "rankfold"


def _expression(module: nn.Module, path: str, indent: str) -> str:
    """Python that makes a module of this kind and shape."""
    children = list(module.named_children())
    kind = type(module)
    is_chain = isinstance(module, nn.Sequential) and kind.forward is nn.Sequential.forward
    if is_chain and [name for name, _ in children] == [str(n) for n in range(len(children))]:
        inner = "".join(
            f"{indent}    {_expression(child, f'{path}.{name}', indent + '    ')},\n"
            for name, child in children
        )
        return f"nn.Sequential(\n{inner}{indent})"
    if (
        children
        or not kind.__module__.startswith("torch.nn.")
        or getattr(nn, kind.__name__, None) is not kind
    ):
        raise ModelError(
            f"layer '{path}' is a {kind.__name__}, which torch does not have: export to ONNX or "
            "torch.export instead"
        )
    # Torch writes the words of a padding without quotes.
    made = re.sub(r"(padding(?:_mode)?)=([a-z]+)", r'\1="\2"', f"nn.{module!r}")
    dtypes = {own.dtype for own in module.parameters()} - {torch.float32}
    return made + "".join(f".to({dtype})" for dtype in dtypes)


def _shared(model: nn.Module) -> Iterator[str]:
    """Statements that make parameters one that are one."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    for first, *others in names.values():
        for other in others:
            parent, _, own = other.rpartition(".")
            place = f'network.get_submodule("{parent}")' if parent else "network"
            yield f'{place}.{own} = network.get_parameter("{first}")'


def _check(text: str, dense: nn.Module, model: nn.Module) -> None:
    """Raise ModelError unless the file builds a network of these modules and tensors."""
    namespace: dict[str, Any] = {"__name__": "architecture", "__file__": SOURCE}
    exec(compile(text, SOURCE, "exec"), namespace)
    built = namespace["rebuild"](copy.deepcopy(dense))
    ours, theirs = (
        {n: (v.shape, v.dtype) for n, v in one.state_dict().items()} for one in (model, built)
    )
    if ours != theirs:
        odd = sorted(dict(ours.items() ^ theirs.items()))[0]
        raise ModelError(
            f"'{odd}' cannot be rebuilt from the dense network: export to ONNX instead"
        )
