"""A dataset of pairs, and an encoder-decoder on it that was not trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from untrained_runs import untrained_run

from headway.data.build import build
from headway.data.corpus.config import CorpusConfig

SHAPE: dict[str, Any] = {
    "type": "encoder_decoder", "positions": "relative_t5", "width": 24, "layers": 2, "ffn_width": 32,
}  # fmt: skip


def pair_run(folder: Path, *, seq_len: int, encoder_tokens: int, **sections: dict[str, Any]) -> Path:
    """Write rows.jsonl, the dataset `pairs` and the run `run` into `folder`, and return it. `sections`: as there."""
    rows = [{"prompt": f"{n} " + "words and " * (n % 9), "target": f"Sum {n}.\nEnd."} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = {"type": "pairs", "paths": [str(folder / "rows.jsonl")], "prompt": "prompt", "target": "target"}
    settings = {
        "name": "pairs",
        "corpus": {**corpus, "separator": " ->"},
        "tokenizer": {"type": "train_bpe", "vocab_size": 280},
        "validation_fraction": 0.3,
    }
    build(CorpusConfig.model_validate(settings), out=folder / "pairs")
    source = {"type": "pairs", "path": str(folder / "pairs")}
    given: dict[str, Any] = {
        "attention": {"type": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 6},
        "model": {**SHAPE, "init_std": 0.3},
        "data": {"source": source, "seq_len": seq_len, "encoder_tokens": encoder_tokens},
    }
    untrained_run(folder / "run", **{**given, **sections})
    return folder
