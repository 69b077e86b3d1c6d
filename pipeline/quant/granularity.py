"""How many weights share a scale, as a value: the only place that knows the shape of a scale.

A weight (rows, columns) is folded to one row a scale, quantized there, and unfolded again:

| granularity   | folded            | scale as stored   |
|---------------|-------------------|-------------------|
| per_tensor    | (1, rows columns) | (1, 1)            |
| per_channel   | (rows, columns)   | (rows, 1)         |
| per_group n   | (rows groups, n)  | (rows, groups)    |

Nothing but methods of tensors is used, so that a configuration can hold one without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["per_tensor", "per_channel", "per_group"]
GROUP_SIZES = (32, 64, 128)
Shape = tuple[int, int]


@dataclass(frozen=True)
class Granularity:
    """The weights that share a scale: a matrix, a row (an output channel), or `group_size` neighbours in a row."""

    kind: Kind
    group_size: int = 0

    @classmethod
    def parse(cls, value: str | Mapping[str, int]) -> Granularity:
        """Return the granularity written as `per_channel` or `{per_group: 64}`. Raises ValueError for another."""
        for whole in (PER_TENSOR, PER_CHANNEL):
            if value == whole.kind:
                return whole
        if isinstance(value, Mapping) and [*value] == ["per_group"] and value["per_group"] in GROUP_SIZES:
            return cls("per_group", int(value["per_group"]))
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise ValueError(f"granularity {value!r} is not known; valid: per_tensor, per_channel, {{per_group: {sizes}}}")

    @classmethod
    def of_scale(cls, scale: tuple[int, ...], shape: Shape) -> Granularity:
        """Return the granularity of a weight's stored scale, by their shapes. Raises ValueError if none gives it."""
        rows, columns = shape
        if scale in ((1, 1), (rows, 1)):
            return PER_TENSOR if scale == (1, 1) else PER_CHANNEL
        groups = {(rows, columns // size): size for size in GROUP_SIZES if columns % size == 0}
        if scale in groups:
            return cls("per_group", groups[scale])
        raise ValueError(f"a scale of shape {scale} is not one a matrix, a row or a group of a weight of shape {shape}")

    def written(self) -> str | dict[str, int]:
        """Return the granularity as a configuration writes it."""
        return {"per_group": self.group_size} if self.kind == "per_group" else self.kind

    def __str__(self) -> str:
        return f"per_group {self.group_size}" if self.kind == "per_group" else self.kind

    def divides(self, columns: int) -> bool:
        """Tell whether rows of so many columns are whole groups."""
        return self.kind != "per_group" or columns % self.group_size == 0

    def fold(self, weight: Tensor) -> Tensor:
        """Return a weight (rows, columns) with one scale a row."""
        if self.kind == "per_channel":
            return weight
        return weight.reshape(1, -1) if self.kind == "per_tensor" else weight.reshape(-1, self.group_size)

    def unfold(self, folded: Tensor, shape: Shape | tuple[int, ...]) -> Tensor:
        """Return the weight that `fold` took, or anything of its shape."""
        return folded if self.kind == "per_channel" else folded.reshape(shape)

    def fold_scale(self, scale: Tensor) -> Tensor:
        """Return stored scales as one a row of the folded weight."""
        return scale.reshape(-1, 1)

    def scale_shape(self, shape: Shape) -> Shape:
        """Return the shape in which the scales of a weight are stored."""
        rows, columns = shape
        if self.kind == "per_group":
            return rows, columns // self.group_size
        return (1, 1) if self.kind == "per_tensor" else (rows, 1)

    def block_scales(self, scale: Tensor, shape: Shape, blocks: int) -> Tensor:
        """Return the scale (rows, blocks) of each of so many equal blocks of a row; a group is whole blocks. Raises
        ValueError if a block would lie in two groups."""
        groups = scale.shape[1]
        if blocks % groups:
            raise ValueError(f"{blocks} blocks of a row do not lie in {groups} groups")
        rows = scale.expand(shape[0], groups)
        return rows.expand(shape[0], blocks) if groups == 1 else rows.repeat_interleave(blocks // groups, 1)


PER_TENSOR, PER_CHANNEL = Granularity("per_tensor"), Granularity("per_channel")
