"""Distribute a model over the ranks of a run, in one of three layouts.

- replicated: every rank has a copy of the model (DDP).
- sharded: every rank has a part of each weight (FSDP2).
- experts: every rank has some of the experts, and a copy of everything else (expert parallelism with DDP).

A run on one rank has the layout `single`. Sharded tensors are DTensors.
"""

import warnings

from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from moe.distributed import ranks
from moe.model.causal_lm import MoEForCausalLM


def layout(*, expert_parallel: bool) -> str:
    """Return the name of the layout; `sharded` if the launch file of Accelerate selects FSDP."""
    if ranks.world_size() == 1:
        return "single"
    if expert_parallel:
        return "experts"
    return "sharded" if ranks.launched_with("FSDP") else "replicated"


def distribute(model: MoEForCausalLM, accelerator: Accelerator, *, expert_parallel: bool) -> nn.Module:
    """Distribute `model` over ranks and devices, and return the module to train with.

    Every rank passes an equal copy of the model. The parameters of `model` are replaced in place, so the optimizers
    must be created afterwards.
    """
    kind = layout(expert_parallel=expert_parallel)
    if kind in ("single", "replicated"):
        return accelerator.prepare_model(model)
    model.to(accelerator.device)
    if kind == "sharded":
        return _shard(model, accelerator)
    return _divide_experts(model, accelerator)


def _shard(model: MoEForCausalLM, accelerator: Accelerator) -> nn.Module:
    """Shard all weights with FSDP2.

    The experts of a layer are gathered when that layer runs. All other weights are one group and are gathered at
    once, because routers of several layers may share modules.
    """
    mesh = init_device_mesh(accelerator.device.type, (ranks.world_size(),))
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # warns of changing outputs in place, which never happens
    accelerator.prepare_model(model, evaluation_mode=True)  # sets up autocast only
    for layer in model.moe_layers:
        fully_shard(layer.experts, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _divide_experts(model: MoEForCausalLM, accelerator: Accelerator) -> nn.Module:
    """Divide the experts of each layer over the ranks, and wrap all other weights in DDP."""
    mesh = init_device_mesh(accelerator.device.type, (ranks.world_size(),))
    divided = set()
    for layer in model.moe_layers:
        for name, p in layer.experts.named_parameters():
            part = nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]), requires_grad=p.requires_grad)
            if part.requires_grad:
                # an expert's gradient is the sum over the tokens of all ranks; DDP takes the mean for other weights
                part.register_hook(lambda gradient: gradient / ranks.world_size())
            layer.experts.register_parameter(name, part)
            divided.add(part)
    copied = [p for p in model.parameters() if p not in divided]
    if not any(p.requires_grad for p in copied):  # DDP refuses such a model; no gradient is left to exchange
        return accelerator.prepare_model(model, evaluation_mode=True)  # sets up autocast only
    names = [name for name, p in model.named_parameters() if p in divided]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return accelerator.prepare_model(model)
