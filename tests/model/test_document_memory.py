"""The decoder's memory within documents grows with the sequence, not with its square."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headway.kernels.documents import BLOCK
from headway.model.attention.block_sparse import BlockSparseConfig
from headway.model.attention.gated_delta import GatedDeltaConfig
from headway.model.attention.gqa import GqaConfig
from headway.model.attention.gqe import GqeConfig
from headway.model.attention.mla import MlaConfig
from headway.model.attention.namoh import NamohConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.attention.switchhead import SwitchHeadConfig
from headway.model.config import ModelConfig
from headway.model.decoder import Decoder, Placement

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


ATTENTIONS = {
    "gqa": GqaConfig(heads=2, kv_heads=1, head_dim=4),
    "windows": GqaConfig(heads=4, kv_heads=2, head_dim=4, windows=[None, 200]),
    "rgqa": RgqaConfig(heads=4, kv_heads=2, head_dim=4, top_k=1),
    "switchhead": SwitchHeadConfig(kv_heads=2, head_dim=4, experts=2, top_k=1),
    "gqe": GqeConfig(heads=4, kv_heads=2, head_dim=4, top_k=1),
    "namoh": NamohConfig(heads=4, head_dim=4, top_k=2, shared_heads=1, window=200),
    "mla": MlaConfig(heads=2, head_dim=4, latent=6, rope_dim=2),
    "block-sparse": BlockSparseConfig(heads=4, kv_heads=2, head_dim=4, block=64, blocks=3),
    "gated-delta": GatedDeltaConfig(heads=2, head_dim=4),
}


def sequence(seq_len):
    """Tokens [1, S] and segments [1, S] of documents of 1 to about a third of the sequence."""
    ends = torch.tensor([3000, 3001, 3120, 3240, 3400, 6000]) * seq_len // 8192
    return torch.randint(0, 8, (1, seq_len)), (torch.arange(seq_len)[:, None] >= ends).sum(1).int()[None]


def largest_tensor(attention, recompute, seq_len, *, layers):
    model = Decoder(
        MODEL.model_copy(update={"layers": layers}),
        attention,
        vocab_size=8,
        seed=1,
        placement=Placement(recompute=recompute),
    )
    tokens, segments = sequence(seq_len)
    with Largest() as largest:
        out = model(tokens, tokens, segments)
        (out.loss_sum + out.aux_loss).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return largest.elements


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_no_pass_makes_a_tensor_of_the_square_of_the_sequence(name, recompute):
    assert largest_tensor(ATTENTIONS[name], recompute, 4096, layers=2) <= 4096 * BLOCK < 4096**2


def test_no_pass_at_32k_makes_a_tensor_of_the_square_of_the_sequence():
    assert largest_tensor(ATTENTIONS["gqa"], "none", 32768, layers=1) <= 32768 * BLOCK < 32768**2 / 32


@pytest.mark.parametrize("name", ATTENTIONS)
def test_kept_memory_grows_linearly_up_to_32k(name):
    """What autograd keeps for the backward pass, each storage once. Parameters are small beside it."""
    model = Decoder(MODEL.model_copy(update={"layers": 1}), ATTENTIONS[name], vocab_size=8, seed=1)

    def kept_bytes(seq_len):
        storages = {}

        def keep(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        tokens, segments = sequence(seq_len)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = model(tokens, tokens, segments)
        del out
        return sum(storages.values())

    # Beside what is proportional to the length there are masks of at most BLOCK x BLOCK for groups of short documents.
    assert kept_bytes(32768) <= 2.02 * kept_bytes(16384)
