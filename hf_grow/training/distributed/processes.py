"""What several processes tell each other about work that they share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_grow.errors import ExecutionError, GrowError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """The processes of a launch, and which of them this one is. Every method is a collective: all of them must call it."""

    index: int = 0
    count: int = 1

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in their order."""
        if self.count == 1:
            return [value]
        from torch import distributed

        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, value)
        return found

    def sum_(self, tensor: Tensor) -> Tensor:
        """Adds up a tensor of all processes, in place."""
        if self.count > 1:
            from torch import distributed

            distributed.all_reduce(tensor)
        return tensor

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Work that counts only if all processes do it: where one raises a GrowError, the others raise an ExecutionError that quotes it."""
        own: GrowError | None = None
        try:
            yield
        except GrowError as error:
            own = error
        errors = self.gather(own and own.message)
        if own is not None:
            raise own
        for index, message in enumerate(errors):
            if message is not None:
                raise ExecutionError(f"Process {index} failed: {message}")


ALONE = Processes()
