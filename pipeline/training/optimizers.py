"""The optimizers of a training job: AdamW, or Muon for the matrices of the layers and AdamW for the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.training import Distill, Finetune
from pipeline.models.hidden_states import WithStates
from pipeline.models.sharded import is_part, part_like, whole
from pipeline.quant.modules import quantizers
from pipeline.training.muon import UPDATE_RMS, StackedMuon
from pipeline.training.schedule import learning_rate


class Optimizers:
    """Parameter groups with rates of their own: matrices, word embedding and untied head, vectors (norms, biases and
    position embeddings), scales of the quantizers."""

    def __init__(self, model: WithStates, recipe: Finetune | Distill) -> None:
        self._names = {parameter: name for name, parameter in model.model.named_parameters()}
        self._recipe = recipe
        scales = {id(p) for _, _, quantizer in quantizers(model) for p in quantizer.parameters()}
        weights = [p for p in model.parameters() if id(p) not in scales]
        ends = (model.model.get_input_embeddings(), model.model.get_output_embeddings())
        tables = [p for p in weights if any(p is getattr(end, "weight", None) for end in ends)]
        positions = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} - {id(p) for p in tables}
        vectors = [p for p in weights if p.ndim <= 1 or id(p) in positions]
        others = {id(p) for p in (*tables, *vectors)}
        matrices = [p for p in weights if id(p) not in others]
        groups = [
            _group(tables, recipe.lr * recipe.embedding_lr_scale, recipe.weight_decay),
            _group(vectors, recipe.lr * recipe.vector_lr_scale, 0.0),
        ]
        if isinstance(recipe, Distill):
            learned = [p for p in model.parameters() if id(p) in scales and p.requires_grad]
            groups.append(_group(learned, recipe.gamma_lr, 0.0))
        self.all: list[torch.optim.Optimizer] = []
        if recipe.optimizer == "muon":
            self.all.append(_muon(matrices, recipe))
        else:
            groups.append(_group(matrices, recipe.lr, recipe.weight_decay))
        self.all.append(torch.optim.AdamW(_joined(groups), betas=recipe.betas, fused=True))
        self.clipped = [*matrices, *tables, *vectors]

    def step(self, step: int, steps: int) -> None:
        """Move all parameters by one step, at the rates of optimizer step `step` (from 0) of `steps`."""
        recipe = self._recipe
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, group["peak"], recipe.warmup_steps, recipe.schedule)
            optimizer.step()

    def zero_grad(self) -> None:
        """Clear the gradients of all parameters."""
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    def second_moment(self, weight: nn.Parameter) -> Tensor | None:
        """Return Adam's second moment of a weight; None if Adam does not move it."""
        moment: Tensor | None = self._state(weight).get("exp_avg_sq")
        return moment

    def tensors(self) -> dict[str, Tensor]:
        """Return the state, named `KEY.PARAMETER`."""
        names = self._names.items()
        return {f"{key}.{name}": value for p, name in names for key, value in self._state(p).items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore the state that `tensors` returned."""
        parameters = {name: parameter for parameter, name in self._names.items()}
        owners = {p: o for o in self.all for group in o.param_groups for p in group["params"]}
        for name, tensor in tensors.items():
            key, _, parameter_name = name.partition(".")
            parameter = parameters[parameter_name]
            owners[parameter].state[parameter][key] = part_like(tensor.to(parameter.device), parameter)

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return next((o.state[parameter] for o in self.all if parameter in o.state), {})


def _muon(matrices: list[nn.Parameter], recipe: Finetune | Distill) -> torch.optim.Optimizer:
    """Return Muon with one group a matrix: an update moves it by about `muon_lr` times its own root mean square at the
    start, whatever its shape and size. A 2-bit code changes when a weight has moved by a share of its scale."""
    groups = []
    for matrix in matrices:
        rms = float(whole(matrix.detach()).square().mean().sqrt())
        groups.append(_group([matrix], recipe.muon_lr * rms / UPDATE_RMS, recipe.weight_decay))
    return StackedMuon(groups, momentum=recipe.muon_momentum, adjust_lr_fn="match_rms_adamw")


def _group(parameters: list[nn.Parameter], peak: float, weight_decay: float) -> dict[str, Any]:
    return {"params": parameters, "lr": peak, "peak": peak, "weight_decay": weight_decay}


def _joined(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return groups such that no two have the same rate and decay: each is moved by operations of its own, which take
    no whole tensors beside parts of others that workers share out."""
    alike: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for group in groups:
        for parameter in group["params"]:
            alike.setdefault((group["peak"], group["weight_decay"], is_part(parameter)), []).append(parameter)
    return [_group(parameters, peak, decay) for (peak, decay, _), parameters in alike.items()]
