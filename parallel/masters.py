"""fp32 weights of a single process, in the pieces that AdamW updates.

A piece is one parameter (in bf16: its fp32 copy), or several small ones that lie one after the other in a flat tensor.
The result of AdamW is bit for bit that of DeepSpeed's ZeRO-1, which updates all parameters of a group in one flat
tensor: on a CPU, PyTorch computes the elements of a tensor in vectors and the few at its end one by one, and the two
round differently. So a parameter may be a piece of its own only if no element of it changes from one to the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LANES = 16
"""fp32 elements of the largest vector (AVX-512). The sizes of smaller vectors divide it."""

SMALL = 4096
"""Parameters with fewer elements are joined. To copy their gradients takes less time than separate updates."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A tensor that AdamW updates.

    value: fp32; a parameter itself, the fp32 copy of one, or several of them in a flat tensor.
    parameters: The parameters in it, in the order of the group.
    is_flat: Whether `value` is a flat tensor, perhaps with an element of padding at its end.
    """

    value: Tensor
    parameters: tuple[nn.Parameter, ...]
    is_flat: bool

    def parts(self, whole: Tensor) -> list[Tensor]:
        """Views of a tensor of the shape of `value` (a moment), one for each parameter and of its shape."""
        sizes = [p.numel() for p in self.parameters]
        flat = whole.view(-1)[: sum(sizes)]
        return [part.view(p.shape) for part, p in zip(flat.split(sizes), self.parameters, strict=True)]

    def gradient(self, gradients: Sequence[Tensor]) -> Tensor:
        """The gradient of `value`, from those of its parameters. Copies them only into a flat tensor."""
        if not self.is_flat:
            return gradients[0]
        rest = self.value.numel() - sum(p.numel() for p in self.parameters)
        return torch.cat([*(g.reshape(-1) for g in gradients), self.value.new_zeros(rest)])


@torch.no_grad()
def pieces_of(group: Sequence[nn.Parameter]) -> list[Piece]:
    """The pieces of a parameter group. fp32 parameters become the pieces, or views of them."""
    padding = sum(p.numel() for p in group) % 2  # DeepSpeed pads to an even number of elements
    joined = _joined(group, padding)
    pieces = []
    for parameter in group:
        if id(parameter) not in joined:
            bf16 = parameter.dtype != torch.float32
            value = parameter.detach().float() if bf16 else parameter
            pieces.append(Piece(value=value, parameters=(parameter,), is_flat=False))
    small = tuple(p for p in group if id(p) in joined)
    if small:
        flat = torch.cat([*(p.float().reshape(-1) for p in small), small[0].new_zeros(padding, dtype=torch.float32)])
        piece = Piece(value=flat, parameters=small, is_flat=True)
        for parameter, part in zip(small, piece.parts(flat), strict=True):
            if parameter.dtype == torch.float32:
                parameter.data = part
        pieces.append(piece)
    return pieces


def _joined(group: Sequence[nn.Parameter], padding: int) -> set[int]:
    """Ids of the parameters that share a flat tensor, which ends as the flat tensor of the whole group would."""
    found: set[int] = set()
    behind = padding  # elements of the group behind the parameter
    alone = (sum(p.numel() for p in group) + padding) % LANES  # elements at the end of the group that fill no vector
    for parameter in reversed(group):
        size = parameter.numel()
        if size < SMALL or size % LANES or behind < alone:
            found.add(id(parameter))
        behind += size
    return found
