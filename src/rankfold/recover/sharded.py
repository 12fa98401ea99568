"""Networks spread over processes, each of which holds a share of every weight (torch's FSDP)."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from rankfold import processes
from rankfold.copies import copy_of


def device_for_shares(device: torch.device) -> torch.device:
    """Where shares of a network on this device are trained: of one on the CPU, on GPUs if any."""
    if device.type == "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def in_shares(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a network of which this process holds a share of every parameter, on the device.

    The layers of lists and sequences are put together one by one when they run. Of a network whose
    parameters are all on the CPU no more than one such layer is whole on a device at a time.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(device.type, (processes.count(),))
    network = copy_of(model)
    for block in (*_blocks(network), network):
        fully_shard(block, mesh=mesh)
        if device.type == "cpu" and isinstance(block, FSDPModule):  # gloo has no means
            block.set_force_sum_reduction_for_comms(True)
    return network.to(device)


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The layers of the outermost lists and sequences; lists of lists are looked into."""
    for child in network.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            for one in child:
                if isinstance(one, nn.ModuleList | nn.ModuleDict):
                    yield from _blocks(nn.ModuleList([one]))
                elif any(True for _ in one.parameters()):
                    yield one
        else:
            yield from _blocks(child)


@torch.no_grad()
def spread(model: nn.Module, network: nn.Module) -> None:
    """The weights and buffers of a whole network into its sharded copy."""
    whole = dict(model.named_parameters())
    for name, share in _shares(network):
        share.copy_(_share_of(whole[name].detach(), share))
    buffers = dict(model.named_buffers())
    for name, buffer in network.named_buffers():
        buffer.copy_(buffers[name])


@torch.no_grad()
def put_together(network: nn.Module, model: nn.Module) -> None:
    """The weights of a sharded network into the whole one; of the buffers those of the first."""
    whole = dict(model.named_parameters())
    for name, share in _shares(network):
        whole[name].copy_(_whole(share))
    own = dict(network.named_buffers())
    buffers = processes.from_first(lambda: {name: one.cpu() for name, one in own.items()})
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


def whole_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an optimizer of shares, with whole tensors on the CPU."""
    entries = {
        place: {name: _whole(one).cpu() for name, one in entry.items()}
        for place, entry in state["state"].items()
    }
    return {"state": entries, "param_groups": state["param_groups"]}


def state_of_shares(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer, as `whole_state` gives it, for one of shares."""
    shares = [share for group in optimizer.param_groups for share in group["params"]]
    entries = {
        place: {
            name: _share_of(one, shares[place]) if one.shape == shares[place].shape else one
            for name, one in entry.items()
        }
        for place, entry in state["state"].items()
    }
    return {"state": entries, "param_groups": state["param_groups"]}


def _shares(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """By name; a pass without gradients leaves the outermost layers put together."""
    from torch.distributed.fsdp import FSDPModule

    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return network.named_parameters()


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _share_of(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, shared out as another; every process has all of it."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return whole
    there = whole.to(like.device)
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)
