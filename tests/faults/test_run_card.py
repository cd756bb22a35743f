"""A rank that differs from the others is refused before a model is built, and named."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from headway.data.config import DataError
from headway.launcher.base.errors import HeadwayError, SpecError
from headway.launcher.hosts.commands import free_port, worker_environment
from headway.launcher.run import identity
from headway.launcher.run.card import run_card, with_attempts
from headway.launcher.run.identity import check_identity, identity_hash, run_identity
from headway.launcher.spec.spec import Spec

SPEC = {
    "model": {"width": 32, "layers": 2, "ffn_width": 48, "vocab_size": 32},
    "attention": {"type": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 8},
    "data": {
        "seq_len": 32,
        "source": {"type": "synthetic", "task": "mqar", "vocab_size": 32, "pairs": 4, "queries": 4},
    },
    "optimizer": {"lr": 3e-3},
    "train": {"tokens": 10240, "global_batch": 8, "micro_batch": 2},
}


class Among:
    """Stands in for one rank's communication: it gathers its own value and those of ranks on hosts a, b, c."""

    def __init__(self, rank, specs, cards):
        self.rank, self.specs, self.cards = rank, specs, cards

    def gather_json(self, value):
        if "card" not in value:
            return [identity.flatten(spec.model_dump(mode="json")) for spec in self.specs]
        assert value["card"] == self.cards[self.rank]
        return [{"host": "abc"[rank], "card": card} for rank, card in enumerate(self.cards)]


def spec(**changes):
    return Spec.model_validate({**SPEC, **changes}, strict=False)


@pytest.mark.parametrize("odd", [0, 1, 2])
@pytest.mark.parametrize(
    ("changes", "key", "values"),
    [
        ({"seed": 7}, "seed", ("7", "1")),
        ({"optimizer": {"lr": 1e-3}}, "optimizer.lr", ("0.001", "0.003")),
        ({"parallel": {"zero": 2}}, "parallel.zero", ("2", "1")),
    ],
)
def test_a_rank_with_another_spec_or_seed_is_named_on_all_ranks(odd, changes, key, values):
    # F20
    specs = [spec(**(changes if rank == odd else {})) for rank in range(3)]
    cards = [run_identity(s, "f00d") for s in specs]
    for rank in range(3):
        with pytest.raises(SpecError) as caught:
            check_identity(specs[rank], "f00d", Among(rank, specs, cards))
        usual = 0 if odd else 1
        expected = f"rank {odd} on {'abc'[odd]} has {key} {values[0]}, rank {usual} on {'abc'[usual]} has {values[1]}"
        assert expected in str(caught.value) and caught.value.exit_code == 64
        assert str(caught.value).count(" has ") == 2  # one line: nothing else differs


@pytest.mark.parametrize(
    ("name", "change", "key", "error", "code"),
    [
        ("versions", lambda: {"python": "3.11.0", "torch": "2.0.0"}, "torch", HeadwayError, 70),
        ("code_hash", lambda: "0123456789abcdef", "code", HeadwayError, 70),
    ],
)
def test_a_rank_with_another_torch_or_other_sources_is_named(monkeypatch, name, change, key, error, code):
    # F20
    whole = spec()
    usual = run_identity(whole, None)
    with monkeypatch.context() as patch:
        patch.setattr(identity, name, change)
        other = run_identity(whole, None)
        with pytest.raises(error) as seen_there:
            check_identity(whole, None, Among(1, [whole] * 3, [usual, other, usual]))
    with pytest.raises(error) as seen_here:
        check_identity(whole, None, Among(0, [whole] * 3, [usual, other, usual]))
    assert str(seen_here.value) == str(seen_there.value) and seen_here.value.exit_code == code
    assert f"rank 1 on b has {key} {other[key]}, rank 0 on a has {usual[key]}" in str(seen_here.value)


def test_a_rank_that_sees_other_data_is_named():
    # F20
    whole = spec()
    cards = [run_identity(whole, "f00d"), run_identity(whole, "beef")]
    with pytest.raises(DataError, match="rank 1 on b has data fingerprint beef, rank 0 on a has f00d"):
        check_identity(whole, "beef", Among(1, [whole] * 2, cards))


def test_equal_ranks_pass_and_different_cards_have_different_hashes():
    whole, card = spec(), run_identity(spec(), "f00d")
    check_identity(whole, "f00d", Among(0, [whole] * 2, [card, card]))
    assert identity_hash(card) == identity_hash(dict(reversed(card.items())))
    assert identity_hash(card) != identity_hash(run_identity(spec(seed=2), "f00d"))


def test_a_card_has_the_options_of_speed_as_they_apply_here(monkeypatch):
    info = {"fingerprint": None}

    def speed(available, **sections):
        monkeypatch.setattr("torch.cuda.is_available", lambda: available)
        monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
        return run_card(spec(**sections), info)["speed"]

    assert {key: speed(False)[key] for key in ("device", "compile")} == {"device": "cpu", "compile": "none"}
    assert {key: speed(True)[key] for key in ("device", "compile")} == {"device": "cuda", "compile": "elementwise"}
    assert speed(True, launch={"device": "cpu"})["compile"] == "none"
    assert speed(False, speed={"compile": "elementwise", "norm": "liger"})["compile"] == "elementwise"
    assert speed(True, speed={"compile": "none"})["compile"] == "none"
    card = run_card(spec(speed={"compile": "elementwise", "norm": "liger"}), info)
    assert card["speed"]["norm"] == "liger"
    later = with_attempts(run_card(spec(), info), with_attempts(card, {}, spec(), from_step=0), spec(), from_step=9)
    assert [attempt["speed"]["compile"] for attempt in later["attempts"]] == ["elementwise", later["speed"]["compile"]]


# ---------------------------------------------------------------- real ranks


ROOT = Path(__file__).parents[2]


def other_spec(folder, environment):
    path = folder / "spec.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seed": 7}))
    return "seed 7", "1", 64


def other_data(folder, environment):
    path = folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data_fingerprint": "beef"}))
    return "data fingerprint beef", "None", 65


def other_sources(folder, environment):
    """Simulate a host on which a source file was edited."""
    for name in ("launcher", "parallel", "model", "data", "kernels"):
        shutil.copytree(ROOT / name, folder / "code" / "headway" / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "code" / "headway" / "model" / "decoder.py").open("a") as f:
        f.write("# edited\n")
    environment["PYTHONPATH"] = str(folder / "code")
    return "code", "", 70


@pytest.mark.parametrize("odd", [other_spec, other_data, other_sources])
def test_real_ranks_that_differ_end_before_a_model_is_built(headway, odd):
    # F20: two workers, each started from a folder of its own as hosts without a common file system are
    done = headway.train("run_dir=rank-0", "train.tokens=256", "schedule.warmup_tokens=0", "launch.processes=2")
    assert done.returncode == 0, done.stderr
    folders = [headway.folder / "rank-0", headway.folder / "rank-1"]
    shutil.rmtree(folders[0] / "checkpoints")
    shutil.copytree(*folders)
    whole = Spec.model_validate_json((folders[0] / "spec.json").read_text())
    common = {**os.environ, **worker_environment(whole), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environments = [{**common, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    here, usual, status = odd(folders[1], environments[1])
    ranks = [
        subprocess.Popen([sys.executable, "-P", "-m", "headway.launcher.train.worker", str(folder)], env=environment)
        for folder, environment in zip(folders, environments, strict=True)
    ]
    try:
        assert [rank.wait(timeout=60) for rank in ranks] == [status, status]
    finally:
        for rank in ranks:
            rank.kill()
    said = [
        json.loads((folder / "logs" / f"rank-{i}.error.json").read_text())["message"]
        for i, folder in enumerate(folders)
    ]
    assert said[0] == said[1] and re.search(rf"rank 1 on \S+ has {here}.*, rank 0 on \S+ has .*{usual}$", said[0], re.M)
    assert not list(folders[0].glob("checkpoints/*"))
