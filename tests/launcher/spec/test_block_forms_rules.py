"""Forms of the block that do not fit a spec, or that a Llama does not have, are refused with the key and a way out."""

from pathlib import Path

import pytest

from headway.launcher.base.errors import SpecError
from headway.launcher.plan.memory import memory
from headway.launcher.plan.stages import grid_of
from headway.launcher.spec.load import load_spec
from headway.model.attention.gqa import GqaConfig
from headway.model.config import ModelConfig
from headway.model.cost import account
from headway.model.huggingface.llama import llama_config

SPEC = """
model: {width: 32, layers: 1, ffn_width: 64}
attention: {type: gqa, heads: 4, kv_heads: 2, head_dim: 8}
data:
  seq_len: 32
  source: {type: synthetic, task: mqar, vocab_size: 32, pairs: 4, queries: 4}
optimizer: {lr: 3.0e-3}
train: {tokens: 2560, global_batch: 8, micro_batch: 8}
"""


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.positions=learned"], "max_positions: missing"),
        (["model.positions=learned", "model.max_positions=31"], "use 32 or more, or data.seq_len 31"),
        (["model.max_positions=32"], "max_positions: 32 has no effect with positions rope"),
        (["model.positions=none", "attention.rope_fraction=0.5"], "attention.rope_fraction: has no effect"),
        (["model.norm=layernorm", "speed.norm=liger"], "speed.norm: liger replaces RMSNorm"),
        (["model.head_bias=true", "speed.loss=torch"], "speed.loss: torch is given no bias of the head"),
        (["model.positions=relative_xl", "attention.rope_base=500.0"], "attention.rope_base: has no effect"),
        (["model.positions=relative_xl", "attention.windows=8"], "model.positions: relative_xl has no form for"),
        (["model.positions=relative_xl", "speed.attention=flash"], "speed.attention: flash takes no scores"),
        (["model.positions=relative_xl", "parallel.context=2", "launch.processes=2"], "use parallel.context 1, or"),
        (["attention.bias=true"], "attention.biases"),
        (["model.dropout=1.0"], "model.dropout: must be >= 0, < 1; got 1.0"),
        (["model.dropout=-0.1"], "model.dropout: must be >= 0, < 1; got -0.1"),
        (["model.dropout=high"], "model.dropout: expected a number (>= 0, < 1); got 'high'"),
        (["model.dropout=.nan"], "model.dropout: expected a number"),
        (["model.dropout=true"], "model.dropout: expected a number"),
        (["model.dropout_places=[]"], "model.dropout_places: no place; use embedding, branches, hidden or head"),
        (["model.dropout_places=[attention]"], "Legal: embedding, branches, hidden, head"),
        (["model.dropout_places=[head, head]"], "head, head names a place twice"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, overrides: list[str], said: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(SPEC)
    assert load_spec(str(path), [], no_auto=None)
    with pytest.raises(SpecError) as caught:
        load_spec(str(path), overrides, no_auto=None)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [("mlp", "relu"), ("mlp_biases", True), ("norm", "layernorm"), ("positions", "none"), ("head_bias", True)],
)
def test_a_llama_has_only_the_default_form(key: str, value: object) -> None:
    attention = GqaConfig(heads=4, kv_heads=2, head_dim=8)
    plain = {"width": 32, "layers": 1, "ffn_width": 64}
    sizes = {"vocab_size": 32, "seq_len": 32, "eos_token_id": None}
    assert llama_config(ModelConfig.model_validate(plain), attention, **sizes)
    with pytest.raises(ValueError, match=rf"model\.{key}: .* use the format safetensors"):
        llama_config(ModelConfig.model_validate({**plain, key: value}), attention, **sizes)
    with pytest.raises(ValueError, match=r"attention\.biases: "):
        llama_config(ModelConfig.model_validate(plain), attention.model_copy(update={"biases": True}), **sizes)


PUBLISHED = """
model: {width: WIDTH, layers: LAYERS, ffn_width: FFN, vocab_size: 8000, tied_embeddings: false, head_bias: true,
  mlp: relu, mlp_biases: true, norm: layernorm, positions: relative_xl}
attention: ATTENTION
data: {seq_len: 256, source: {type: mds, path: datasets/web}}
optimizer: {lr: 2.5e-4}
train: {tokens: 1e6, global_batch: 64, micro_batch: 8}
"""


@pytest.mark.parametrize(
    ("sizes", "attention", "total"),
    [
        ((412, 16, 2053), "{type: mha, heads: 10, head_dim: 41, rope_fraction: 0.0}", 47_260_104),
        ((1024, 18, 4188), "{type: switchhead, kv_heads: 4, head_dim: 112, experts: 4, top_k: 2}", 262_370_744),
    ],
)
def test_the_published_transformer_xl_models_are_specs(
    tmp_path: Path, sizes: tuple[int, int, int], attention: str, total: int
) -> None:
    text = PUBLISHED.replace("ATTENTION", attention)
    for name, size in zip(("WIDTH", "LAYERS", "FFN"), sizes, strict=True):
        text = text.replace(name, str(size))
    path = tmp_path / "x.yaml"
    path.write_text(text)
    spec = load_spec(str(path), [], no_auto=None).spec
    found = account(spec.model, spec.attention, vocab_size=8000, seq_len=256)
    assert found.num_params == total
    grid = grid_of(spec)
    assert sum(stage.num_params for stage in grid.stages) == total
    scores = memory(grid, grid.stages[0]).backward
    rope = spec.model_copy(update={"model": spec.model.model_copy(update={"positions": "none"})})
    plain = grid_of(rope)
    heads = spec.attention.layer(0, spec.model.layers).score_maps
    # 8 sequences, blocks of 128 query rows over 256 keys, eight fp32 values each, and half of what the layer keeps more
    assert scores - memory(plain, plain.stages[0]).backward >= 8 * heads * 128 * 256 * 32
