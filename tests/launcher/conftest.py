"""For tests of `train.micro_batch: auto`."""

from pathlib import Path

import pytest

AUTO = """
name: tiny
model: {width: 32, layers: 2, ffn_width: 48, vocab_size: 32}
attention: {type: rgqa, heads: 4, kv_heads: 2, head_dim: 8, top_k: 1}
data: {seq_len: 32, source: {type: synthetic, task: mqar, vocab_size: 32, pairs: 4, queries: 4}}
optimizer: {lr: 3.0e-3}
train:
  tokens: 10240
  global_batch: 8
  micro_batch: auto
  validation_tokens: 512
launch: {processes: 1, threads: 1, restarts: 0, device: cpu}
"""


@pytest.fixture
def auto_spec(tmp_path: Path) -> Path:
    """The file of a spec whose micro-batch is to be found."""
    path = tmp_path / "tiny.yaml"
    path.write_text(AUTO)
    return path
