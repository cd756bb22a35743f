"""The decoder's memory within documents grows with the sequence, not with its square."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headway.kernels.documents import BLOCK
from headway.model.attention.gqa import GqaConfig
from headway.model.attention.gqe import GqeConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.attention.switchhead import SwitchHeadConfig
from headway.model.config import ModelConfig
from headway.model.decoder import Decoder, Placement

SEQ_LEN = 4096
MODEL = ModelConfig(width=16, layers=2, ffn_width=8)


class Largest(TorchDispatchMode):
    """Records the elements of the largest storage that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize(
    "attention",
    [
        GqaConfig(heads=2, kv_heads=1, head_dim=4),
        GqaConfig(heads=4, kv_heads=2, head_dim=4, windows=[None, 200]),
        RgqaConfig(heads=4, kv_heads=2, head_dim=4, top_k=1),
        SwitchHeadConfig(kv_heads=2, head_dim=4, experts=2, top_k=1),
        GqeConfig(heads=4, kv_heads=2, head_dim=4, top_k=1),
    ],
    ids=["gqa", "windows", "rgqa", "switchhead", "gqe"],
)
def test_no_pass_makes_a_tensor_of_the_square_of_the_sequence(attention, recompute):
    model = Decoder(MODEL, attention, vocab_size=8, seed=1, placement=Placement(recompute=recompute))
    tokens = torch.randint(0, 8, (1, SEQ_LEN))
    ends = torch.tensor([1500, 1501, 1560, 1620, 1700, 3000])
    segments = (torch.arange(SEQ_LEN)[:, None] >= ends).sum(1).int()[None]
    with Largest() as largest:
        out = model(tokens, tokens, segments)
        (out.loss_sum + out.aux_loss).backward()
    assert largest.elements <= SEQ_LEN * BLOCK < SEQ_LEN**2
    assert all(parameter.grad is not None for parameter in model.parameters())
