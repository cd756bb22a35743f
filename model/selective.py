"""Selective recomputation: outputs of norms and of silu(gate) * up are recomputed in the backward pass.

These functions are cheap, but their outputs are large, and autograd saves them as inputs of the block's matmuls.
Instead of such an output, and of the tensors that the function itself saves, a block keeps a recipe: the function and
its inputs, which are saved in any case. A block of width d and FFN width F thus keeps 2 d + 2 F fewer elements per
token. Korthikanti et al. (2022, arXiv 2205.05198) recompute the attention core in this way; fused attention kernels
make that unnecessary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Result = TypeVar("Result", Tensor, tuple[Tensor, Tensor])


class Recipe:
    """A function and its inputs. The first access to a result recomputes all results; later ones reuse them."""

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Any]) -> None:
        # Detach stores the current data of a gain [d]: under ZeRO-3 it may not be gathered when it is recomputed.
        self._function = function
        self._inputs = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs]
        self._outputs: tuple[Tensor, ...] | None = None
        self._kept: list[Tensor] = []

    def outputs(self) -> tuple[Tensor, ...]:
        """Outputs of the function."""
        if self._outputs is None:
            with torch.enable_grad(), saved_tensors_hooks(self._collect, lambda kept: kept):
                self._outputs = tuple(x.detach() for x in _as_tuple(self._function(*self._inputs)))
        return self._outputs

    def kept(self, index: int) -> Tensor:
        """The `index`-th tensor that autograd saves for the function's backward pass."""
        self.outputs()
        return self._kept[index]

    def _collect(self, tensor: Tensor) -> None:
        """Collect a saved tensor, detached: the graph of the recomputation is not used and must not hold memory."""
        self._kept.append(tensor.detach())


class SelectiveRecompute:
    """Context manager for one forward pass of a block whose recomputed functions are wrapped by `piece`.

    `observe` is called with every tensor that is kept until the backward pass: tensors that autograd saves, and inputs
    of pieces. Pieces are deterministic, so gradients are bitwise equal to those without recomputation. The inputs of a
    piece must not be modified in place. An output that was modified in place is kept instead of recomputed.
    """

    def __init__(self) -> None:
        self.observe: Callable[[Tensor], object] = lambda tensor: None
        # Address -> an output of a piece, its version, its recipe and its index. The output is held until the end of
        # the block, so that no other tensor can get its address.
        self._results: dict[int, tuple[Tensor, int, Recipe, int]] = {}
        self._hooks: list[saved_tensors_hooks] = []

    def __enter__(self) -> None:
        self._hooks.append(saved_tensors_hooks(self._pack, _unpack))
        self._hooks[-1].__enter__()

    def __exit__(self, *args: Any) -> None:
        self._hooks.pop().__exit__(*args)
        self._results.clear()

    def piece(self, function: Callable[..., Result]) -> Callable[..., Result]:
        """Wrap `function` of tensors and numbers. It is recomputed if the context is open and gradients are enabled."""
        return partial(self._run, function)  # not a closure, so that a deep copy of a module has pieces of its own

    def _run(self, function: Callable[..., Result], *inputs: Any) -> Result:
        if not self._hooks or not torch.is_grad_enabled():
            return function(*inputs)
        recipe = Recipe(function, inputs)
        given = {x.untyped_storage().data_ptr() for x in inputs if isinstance(x, Tensor)}
        count = 0

        def pack(tensor: Tensor) -> Any:
            nonlocal count
            count += 1
            if tensor.untyped_storage().data_ptr() in given:
                return _held(tensor)
            return recipe, count - 1

        for x in inputs:
            if isinstance(x, Tensor):
                self.observe(x)
        with saved_tensors_hooks(pack, _unpack_kept):
            result = function(*inputs)
        for index, output in enumerate(_as_tuple(result)):
            address = output.untyped_storage().data_ptr()
            if address not in given:
                self._results[address] = output, output._version, recipe, index
        return result

    def _pack(self, tensor: Tensor) -> Any:
        found = self._results.get(tensor.untyped_storage().data_ptr())
        if found is None or found[0]._version != found[1]:
            self.observe(tensor)
            return _held(tensor)
        _, _, recipe, index = found
        return recipe, index, (tensor.size(), tensor.stride(), tensor.storage_offset())


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    recipe, index, view = cast(tuple[Recipe, int, Any], packed)
    return recipe.outputs()[index].as_strided(*view)


def _unpack_kept(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    recipe, index = cast(tuple[Recipe, int], packed)
    return recipe.kept(index)


def _held(tensor: Tensor) -> Tensor:
    """A tensor to save for autograd. Detached to avoid a reference cycle, except leaves: ZeRO-3 gathers parameters."""
    return tensor if tensor.is_leaf else tensor.detach()


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
