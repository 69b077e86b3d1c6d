"""What is counted in place of time: operations that launch work."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# Views move no number, and what only makes room or asks for facts about a tensor launches nothing.
FREE = {
    *("detach", "alias", "_unsafe_view", "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"),
    *("_record_function_enter_new", "_record_function_exit"),
}


class Launches(TorchDispatchMode):
    """Counts the operations, inside, that compute something; of a list of tensors at once it is one."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    @property
    def count(self) -> int:
        """How many there were."""
        return len(self.names)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if not func.is_view and name not in FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))
