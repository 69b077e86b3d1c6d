"""Models that no worker holds whole: each keeps a part of every parameter, of its gradient and of what the optimizer
remembers of it, and gathers a layer's parameters while that layer computes (torch's FSDP2).

Levels come from whole matrices, as one worker computes them: a layer's latent weights are gathered, quantized and let
go, and in the backward pass again, so that neither they nor their levels are kept meanwhile. What is learned differs by
the order of sums alone. Embeddings, head and what else is outside the layers is one group, whole during a pass: a tied
table is gathered once for all its names. Parameters of quantizers are few, and whole on every worker.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.config.resources import Resources
from pipeline.quant.modules import QuantizedLinear, quantizers

if TYPE_CHECKING:  # which take long to import, for those who only plan
    from torch.distributed.tensor import DTensor

    from pipeline.models.hidden_states import WithStates

Module = TypeVar("Module", bound=nn.Module)


def shares(resources: Resources) -> bool:
    """Tell whether workers, of which this process is one, share models out among them."""
    return resources.strategy == "fsdp" and dist.is_initialized() and dist.get_world_size() > 1


def share_out(model: WithStates, device: torch.device) -> WithStates:
    """Leave of a model what this worker keeps, in place and on its device. All workers do so at once, and from then on
    pass rows through the model equally often: each waits for the others' parts."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    if device.type == "cuda":
        torch.cuda.set_device(device)  # which is where parts go
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    scales = {parameter for _, _, quantizer in quantizers(model) for parameter in quantizer.parameters()}
    for parameter in scales:
        parameter.data = parameter.data.to(device)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # which nobody changes in place
    for module in [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)] + [model]:
        group = fully_shard(module, mesh=mesh, ignored_params=scales)
        group.set_gradient_divide_factor(1.0)  # workers' losses are parts of one mean
        group.set_force_sum_reduction_for_comms(True)  # gloo has no other
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and module.quantizer is not None:
            module.forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)  # type: ignore[method-assign]
    if model.padding_row is not None:
        _keep_row(_table(model), model.padding_row)
    return model


def let_go(model: WithStates) -> None:
    """Keep no more than this worker's part of a model that was shared out, when passes are over that nothing goes back
    through."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule) and not is_part(_table(model)):
        model.reset_iter_state()


def is_part(tensor: Tensor) -> bool:
    """Tell whether other workers hold the rest of a tensor."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def own(tensor: Tensor) -> Tensor:
    """Return what this worker holds of a tensor."""
    from torch.distributed.tensor import DTensor

    return cast(DTensor, tensor.detach()).to_local() if isinstance(tensor, DTensor) else tensor


def like(part: Tensor, parameter: Tensor) -> Tensor:
    """Return what this worker holds as a part of a tensor that is shared out as a parameter is."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return part
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part, mesh, placements, shape=parameter.shape, stride=parameter.stride())


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor whole, for which all workers ask at once, in the same order."""
    from torch.distributed.tensor import DTensor

    return cast(DTensor, tensor.detach()).full_tensor() if isinstance(tensor, DTensor) else tensor


def give_parts(tensors: Iterable[Tensor]) -> None:
    """Take part where another worker alone keeps what `whole` returns."""
    for tensor in tensors:
        whole(tensor)


def part_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return this worker's part of a whole tensor, as a parameter of its shape is shared out; a copy. Tensors of other
    shapes, and those of parameters that are whole here, come back as they are."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return _rows_like(tensor, parameter)


def hollow(model: Module) -> Module:
    """Return a copy of a model whose parameters have shapes and no memory; tied ones are one, as they were."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, empty)


def filled(model: Module, tensors: dict[str, Tensor]) -> Module:
    """Give a hollow model its parameters, in place."""
    for name, parameter in model.named_parameters():
        torch.utils.swap_tensors(parameter, nn.Parameter(tensors[name], parameter.requires_grad))
    return model


def _keep_row(table: DTensor, row: int) -> None:
    """Keep a row of a table that is shared out as it is: its gradient is zero."""
    moves = torch.ones(len(table), 1)
    moves[row] = 0
    moving = _rows_like(moves, table)

    def keep(parameter: Tensor) -> None:
        cast(Tensor, parameter.grad).mul_(moving)

    table.register_post_accumulate_grad_hook(keep)


def _table(model: WithStates) -> Any:
    return model.model.get_input_embeddings().weight


def _rows_like(tensor: Tensor, parameter: DTensor) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    # No rank is asked for its rows: each has them all.
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None).clone()
