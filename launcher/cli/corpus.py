"""`headway data build` and `headway data verify`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from headway.data.config import MdsSource
from headway.data.corpus.config import CorpusConfig
from headway.launcher.base import console
from headway.launcher.spec.load import load_spec


def build_corpus(path: Path, overrides: Sequence[str]) -> int:
    """Build the dataset that a corpus spec describes. Does nothing if the dataset exists and is unchanged."""
    from headway.data.build import build

    cfg = load_spec(path, overrides, root=CorpusConfig).spec
    made = build(cfg, progress=console.progress, say=console.note)
    out = cfg.out_dir().expanduser().resolve()
    _report(out, made.train.tokens, made.validation.tokens, made.vocab_size, made.fingerprint, only_quiet=True)
    return 0


def verify_corpus(path: Path, overrides: Sequence[str]) -> int:
    """Check every file and every token of the dataset that a corpus spec describes, and what its manifest tells."""
    from headway.data.verify import verify, verify_contents

    source = MdsSource(type="mds", path=str(load_spec(path, overrides, root=CorpusConfig).spec.out_dir()))
    out, info = Path(source.path), verify(source, progress=console.progress)
    verify_contents(source, progress=console.progress)
    _report(out, info.train_tokens, info.validation_tokens, info.vocab_size, info.fingerprint)
    return 0


def _report(
    out: Path, train_tokens: int, validation_tokens: int, vocab_size: int, fingerprint: str, *, only_quiet: bool = False
) -> None:
    if console.wants_json():
        facts = {"path": str(out), "train_tokens": train_tokens, "validation_tokens": validation_tokens}
        console.emit({**facts, "vocab_size": vocab_size, "fingerprint": fingerprint})
        return
    console.result(
        f"{out}: whole; {train_tokens:,} training and {validation_tokens:,} validation tokens, "
        f"vocabulary {vocab_size:,}, fingerprint {fingerprint[:16]}",
        only_quiet=only_quiet,
    )
