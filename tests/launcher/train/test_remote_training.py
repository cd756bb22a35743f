"""Training over http through a cache with a limit that two ranks share: the batches of a local run."""

import json
import shutil
from pathlib import Path

import pytest
from run_folders import records
from web_server import serving

from headway.data.build import build
from headway.data.corpus.config import CorpusConfig


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("dataset")
    words = ["the", "of", "and", "a", "to", "in", "is", "was", "that", "for", "with", "they", "from", "word", "heat"]
    lines = [" ".join(words[(n * k) % 15] for k in range(1, 90)) + f" {n}." for n in range(400)]
    (root / "text.txt").write_text("\n".join(lines))
    config = {
        "name": "lines",
        "corpus": {"type": "text", "paths": [str(root / "text.txt")], "document": "line"},
        "tokenizer": {"type": "train_bpe", "vocab_size": 300},
        "shard_bytes": 4096,
    }
    build(CorpusConfig.model_validate(config), out=root / "set", progress=False)
    return root / "set"


def test_ranks_train_from_a_web_server_within_the_limit_of_their_cache(dataset, headway):
    own = ("train.tokens=20480", "data.shuffle_window=2", "checkpoint.every_tokens=null")
    # not a key after the other: the type of the base has other keys
    local = f"data.source={{type: mds, path: {dataset}}}"
    done = headway.train(*own, local, "run_dir=local")
    assert done.returncode == 0, done.stderr
    limit, environment = 4 * 4096, {**headway.environment(), "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    cache = headway.folder / "cache"

    def train(url: str, limit: int):
        source = f"data.source={{type: mds, path: {cache}, remote: '{url}', cache_bytes: {limit}}}"
        return headway.train(*own, source, "launch.processes=2", "run_dir=web", env=environment)

    with serving(Path(shutil.copytree(dataset, headway.folder / "served"))) as web:
        done = train(web.url, 4096)
        assert done.returncode == 65 and "data.source.cache_bytes: 4,096 bytes do not hold the 3" in done.stderr
        assert not (headway.folder / "web").exists()
        done = train(web.url, limit)
    assert done.returncode == 0, done.stderr
    ours, theirs = records(headway.folder / "web"), records(headway.folder / "local")
    assert [record["batch_hash"] for record in ours] == [record["batch_hash"] for record in theirs]
    assert sum(path.stat().st_size for path in cache.rglob("*.mds")) <= limit
    fetched = [request.path for request in web.fetched(".mds")]
    assert len(fetched) > len(set(fetched)) > 4
    cards = [json.loads((headway.folder / name / "run.json").read_text()) for name in ("web", "local")]
    assert cards[0]["data_fingerprint"] == cards[1]["data_fingerprint"]


def test_a_login_in_an_address_is_refused_and_written_nowhere(headway):
    source = "data.source={type: mds, path: cache, remote: 'https://reader:geheim@host/x'}"
    done = headway.train(source, "run_dir=web")
    assert done.returncode == 64 and "data.source.remote: contains a login" in done.stderr
    assert "geheim" not in done.stderr + done.stdout
    assert [path for path in headway.folder.rglob("*") if path.is_file()] == [headway.spec]
