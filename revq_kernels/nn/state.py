"""`QuantizerState`: what a quantizer holds, and how that is created, loaded, moved between devices and copied."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from revq_kernels.index import CodebookIndex
from revq_kernels.nn.codebook_updates import EMAUpdate, ReplaceDeadCodes
from revq_kernels.nn.processes import Processes, check_whole
from revq_kernels.nn.recomputation import CodeMemory
from revq_kernels.nn.statistics import SkippedVectors, follow_


class QuantizerState(nn.Module):
    """The part of `FastChannelVQ` that knows nothing of its calls."""

    codebook: nn.Parameter  # None where a module makes the codes, which only `_own_codebook` has to know
    count: Tensor

    def _create(
        self,
        num_groups: int,
        num_codes: int,
        code_dim: int,
        update: EMAUpdate | None,
        codes: nn.Module | None,
        dead_codes: ReplaceDeadCodes | None,
        process_group: Any,
    ) -> None:
        """Create the codes and what counts and moves them."""
        self._index: CodebookIndex | None = None
        self.processes = Processes(process_group)
        with torch.inference_mode(False):  # tensors made in that mode could not be trained outside it
            codebook = nn.Parameter(torch.randn(num_groups, num_codes, code_dim, dtype=torch.float32))
            self.register_buffer("count", torch.zeros(num_groups, num_codes, dtype=torch.int64))
            self.skipped, self._memory = SkippedVectors(), CodeMemory()
            if update is not None:
                update.bind(codebook)
            if dead_codes is not None:
                dead_codes.bind(codebook)
        self.register_parameter("codebook", codebook if codes is None else None)
        self.update, self.codes, self.dead_codes = update, codes, dead_codes

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the codes, counts and averages as the constructor does: after ``to_empty`` of a module made on "meta"."""
        if self.codebook is not None:
            self.codebook.normal_()
        self._restart()

    def _restart(self) -> None:
        """After the codes were set by other means: average and count from zero, and drop a tree over the old codes."""
        self._restart_averages(torch.ones_like(self.count, dtype=torch.bool))
        self._restart_count()

    def _restart_averages(self, moved: Tensor) -> None:
        if self.update is not None:
            self.update.restart_(self._own_codebook(), moved)

    def _restart_count(self) -> None:
        self._index = None
        self.count.zero_()
        if self.dead_codes is not None:
            self.dead_codes.restart_()

    def _own_codebook(self) -> nn.Parameter:
        if self.codebook is None:
            raise ValueError("codes: expected None for a codebook to move, got a module that makes the codes")
        return self.codebook

    def _whole_codebook(self) -> nn.Parameter:
        """The codebook, to be changed in place."""
        codebook = self._own_codebook()
        check_whole(codebook)
        return codebook

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse a shard as a codebook that moves: `fully_shard` would discard every move, without a word."""
        if name == "codebook" and (self.update is not None or self.dead_codes is not None):
            check_whole(value)
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load as any module does.  Codes without averages restart the averages: old ones would overwrite the codes."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._index = None
        place = self.count if self.codebook is None else self.codebook
        for module in (self, self.skipped, self.update, self.dead_codes):
            follow_(module, place)  # ``assign=True`` changes the device of what is loaded, and no other
        if prefix + "codebook" in state_dict and prefix + "update.embed_sum" not in state_dict:
            self._restart_averages(torch.ones_like(self.count, dtype=torch.bool))

    @torch.inference_mode(False)
    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizerState":
        """Convert as any module does (``to``, ``half``, ...); drops the tree, which has the old dtype and device."""
        self._index = None
        empty = self.count.is_meta
        super()._apply(fn, recurse)
        if empty and not self.count.is_meta:
            self._restart()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizerState":
        """A copy that can be trained, also if it is made in inference mode."""
        with torch.inference_mode(False):
            copied = type(self).__new__(type(self))
            memo[id(self)] = copied
            copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
            return copied

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are without the tree, which would double their size."""
        return {**self.__dict__, "_index": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore as any module does; pickles of earlier versions lack what the constructor gives a new module."""
        super().__setstate__(state)
        self.__dict__.setdefault("processes", Processes())
        self.__dict__.setdefault("_memory", CodeMemory())
        if "skipped" not in self._modules:
            self.skipped = SkippedVectors()
