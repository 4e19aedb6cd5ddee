"""How a model lies on the ranks of a run: a copy on each (DDP), a shard of every weight on each (FSDP2), or copies of
all but the experts, which are shared out among the ranks. Sharded tensors are DTensors."""

import warnings
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from moe.distributed import ranks
from moe.distributed.sharding import full, full_state, shard_like
from moe.model.decoder import MoEForCausalLM


def layout(*, expert_parallel: bool) -> str:
    """single | replicated | sharded | experts; sharded if the launch file says FSDP."""
    if ranks.world_size() == 1:
        return "single"
    if expert_parallel:
        return "experts"
    return "sharded" if ranks.launched_with("FSDP") else "replicated"


def spread(model: MoEForCausalLM, accelerator: Accelerator, *, expert_parallel: bool) -> nn.Module:
    """Lay `model`, of which every rank has a copy, out over ranks and devices, in place; returns the module to call in
    training. Optimizers are to be made afterwards.

    FSDP gathers a layer's experts when they are needed, and all the rest, in which routers may share modules, at once.
    """
    kind = layout(expert_parallel=expert_parallel)
    if kind in ("single", "replicated"):
        return accelerator.prepare_model(model)
    mesh = init_device_mesh(accelerator.device.type, (ranks.world_size(),))
    model.to(accelerator.device)
    if kind == "sharded":
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # of writing into its outputs, which nobody does
        accelerator.prepare_model(model, evaluation_mode=True)  # the precision alone
        for layer in model.moe_layers:
            fully_shard(layer.experts, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model
    apart = set()
    for layer in model.moe_layers:
        for name, p in layer.experts.named_parameters():
            part = nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]), requires_grad=p.requires_grad)
            if part.requires_grad:  # its gradient is the sum over all ranks' tokens; of the others DDP takes the mean
                part.register_hook(lambda gradient: gradient / ranks.world_size())
            layer.experts.register_parameter(name, part)
            apart.add(part)
    names = [name for name, p in model.named_parameters() if p in apart]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return accelerator.prepare_model(model)


def state(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Everything that training has changed, in whole tensors: the same in all layouts, so that another can go on."""
    return {"model": full_state(model), "optimizers": [full(o.state_dict()) for o in optimizers]}


def load_state(model: nn.Module, optimizers: list[torch.optim.Optimizer], saved: dict[str, Any]) -> None:
    """Take over what `state` gave."""
    own = model.state_dict()
    model.load_state_dict({name: shard_like(value, own[name]) for name, value in saved["model"].items()})
    for optimizer, theirs in zip(optimizers, saved["optimizers"], strict=True):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        states = {number: _shared_out(values, params[number]) for number, values in theirs["state"].items()}
        optimizer.load_state_dict({**theirs, "state": states})


def _shared_out(values: dict[str, Any], p: nn.Parameter) -> dict[str, Any]:
    """What an optimizer knows of a parameter, with whatever has its shape sharded as it is."""
    return {name: shard_like(v, p) if torch.is_tensor(v) and v.shape == p.shape else v for name, v in values.items()}
