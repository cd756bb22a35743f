"""`headway data build` and `headway data verify`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from headway.data.config import CorpusConfig, MdsSource
from headway.launcher.spec.load import load_spec


def build_corpus(path: Path, overrides: Sequence[str]) -> int:
    """Build the dataset a corpus spec describes; nothing is done when it is there and unchanged."""
    from headway.data.build import build

    build(load_spec(path, overrides, root=CorpusConfig).spec)
    return 0


def verify_corpus(path: Path, overrides: Sequence[str]) -> int:
    """Check size and hash of every file of the dataset a corpus spec describes."""
    from headway.data.verify import verify

    out = load_spec(path, overrides, root=CorpusConfig).spec.out_dir()
    info = verify(MdsSource(type="mds", path=str(out)))
    print(
        f"{out}: whole; {info.train_tokens:,} training and {info.validation_tokens:,} validation tokens, "
        f"vocabulary {info.vocab_size:,}, fingerprint {info.fingerprint[:16]}"
    )
    return 0
