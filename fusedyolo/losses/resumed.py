"""What a loss saves of a training, where it changes while that goes on."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

_EXTRA = "_extra_state"  # of a state_dict


class Resumed(nn.Module):
    """Saves in ``state_dict`` how far a training has come: the attribute named ``_counter``, where it changes the loss.

    It is a 0-dim int64 tensor there, for averages of weights go through all values of a state as tensors.
    """

    _counter: ClassVar[str]

    @property
    def _counting(self) -> bool:
        """Whether it does."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self._counting:
            del destination[prefix + _EXTRA]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *found: Any
    ) -> None:
        """A checkpoint that knows nothing of the loss is complete."""
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *found)
        missing = found[0]
        missing[:] = [key for key in missing if key != prefix + _EXTRA]

    def get_extra_state(self) -> Tensor:
        """The counter, for ``state_dict``."""
        return torch.tensor(getattr(self, self._counter), dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: Tensor | dict[str, int]) -> None:
        """The counter, from ``load_state_dict``; of an older version by its name."""
        setattr(self, self._counter, int(state[self._counter] if isinstance(state, dict) else state))
