"""Selective recomputation: what norms and silu(gate) * up give is computed again where the backward pass asks for it.

These pieces are cheap and their results wide: a block's matrix products keep them as their inputs. Here such a result,
and whatever the piece itself keeps, gives way to a recipe: the function and its inputs, which are kept anyway. So a
block of width d and FFN width F keeps 2 d + 2 F numbers per token less (Korthikanti et al., 2022, arXiv 2205.05198, do
the same to the attention core, which needs it no more).
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
    """A piece and its inputs. Computed again at the first question, once for all that ask."""

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Any]) -> None:
        # A gain of width d is held as it is now: a partitioned one may not be gathered when the result is asked for.
        self._function = function
        self._inputs = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs]
        self._outputs: tuple[Tensor, ...] | None = None
        self._kept: list[Tensor] = []

    def outputs(self) -> tuple[Tensor, ...]:
        """The piece's results."""
        if self._outputs is None:
            with torch.enable_grad(), saved_tensors_hooks(self._collect, lambda kept: kept):
                self._outputs = tuple(x.detach() for x in _as_tuple(self._function(*self._inputs)))
        return self._outputs

    def kept(self, index: int) -> Tensor:
        """The `index`-th tensor that autograd keeps of the piece."""
        self.outputs()
        return self._kept[index]

    def _collect(self, tensor: Tensor) -> None:
        """The graph of the second pass is never used, and is to hold nothing."""
        self._kept.append(tensor.detach())


class SelectiveRecompute:
    """As a context around one forward pass of a block, whose pieces are wrapped by `piece`.

    `observe` is called with every tensor that stays until the backward pass: what autograd keeps, and inputs of pieces.
    Gradients are bit by bit those without it, as pieces are deterministic. Nothing may be written in place into a
    piece's inputs; a result that was written into is kept as it is.
    """

    def __init__(self) -> None:
        self.observe: Callable[[Tensor], object] = lambda tensor: None
        # Address -> a piece's result, its version, its recipe and which result it is. Held until the block is done, so
        # that no other tensor gets the address.
        self._results: dict[int, tuple[Tensor, int, Recipe, int]] = {}
        self._hooks: list[saved_tensors_hooks] = []

    def __enter__(self) -> None:
        self._hooks.append(saved_tensors_hooks(self._pack, _unpack))
        self._hooks[-1].__enter__()

    def __exit__(self, *args: Any) -> None:
        self._hooks.pop().__exit__(*args)
        self._results.clear()

    def piece(self, function: Callable[..., Result]) -> Callable[..., Result]:
        """`function` of tensors and numbers, computed again where the context is open and gradients are on."""
        return partial(self._run, function)  # not a closure: a copied module's pieces are to be the copy's

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
    """As autograd is to hold it: without its graph, which would hold itself; a parameter is itself, to be gathered."""
    return tensor if tensor.is_leaf else tensor.detach()


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
