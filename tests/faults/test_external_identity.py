"""Ranks with different versions or sources of an external mechanism are refused; the run card says which ran."""

import pytest

from headway.launcher.base.errors import HeadwayError
from headway.launcher.compare.fairness import run_differences
from headway.launcher.run.card import run_card, with_attempts
from headway.launcher.run.identity import check_identity, mechanism_identity, run_identity
from headway.launcher.run.records import RunRecord, read_run
from headway.launcher.spec.load import load_spec

INFO = {"fingerprint": None}
SPEC = """
model: {width: 32, layers: 2, ffn_width: 48, vocab_size: 32}
attention: {type: TYPE, heads: 4, kv_heads: 2, head_dim: 8}
data: {seq_len: 32, source: {type: synthetic, task: mqar, vocab_size: 32, pairs: 4, queries: 4}}
optimizer: {lr: 3.0e-3}
train: {tokens: 10240, global_batch: 8, micro_batch: 2}
launch: {processes: 1, threads: 1}
"""


class Ranks:
    """The cards of two ranks, as rank 0 gathers them."""

    def __init__(self, *cards):
        self.cards = cards

    def gather_json(self, value):
        return [{"host": "ab"[rank], "card": card} for rank, card in enumerate(self.cards)]


@pytest.fixture
def spec(tmp_path):
    def make(name):
        path = tmp_path / f"{name}.yaml"
        path.write_text(SPEC.replace("TYPE", name))
        return load_spec(path).spec

    return make


@pytest.mark.parametrize("change", ["version", "sources"])
def test_hosts_with_another_version_or_other_sources_are_refused(install, mechanism_source, spec, change):
    file = install("ours", mechanism_source("ours"))
    whole = spec("ours")
    mine = run_identity(whole, None)
    if change == "sources":
        file.write_text(file.read_text() + "# edited\n")
    else:
        old = file.parent / "outside-1.0.dist-info"
        (old / "METADATA").write_text((old / "METADATA").read_text().replace("Version: 1.0", "Version: 1.1"))
    other = run_identity(whole, None)
    assert {key for key in mine if mine[key] != other[key]} == {
        {"version": "mechanism package", "sources": "mechanism sources"}[change]
    }
    with pytest.raises(HeadwayError, match=r"rank 1 on b has mechanism \w+ .*\n.*the same packages") as caught:
        check_identity(whole, None, Ranks(mine, other))
    assert caught.value.exit_code == 70
    check_identity(whole, None, Ranks(mine, mine))


def test_built_in_mechanisms_have_the_identity_they_had(install, mechanism_source, spec):
    before = run_identity(spec("gqa"), None)
    install("ours", mechanism_source("ours"))
    assert run_identity(spec("gqa"), None) == before and mechanism_identity(spec("gqa")) == {}


def test_the_run_card_and_each_start_name_the_package(install, mechanism_source, spec):
    file = install("ours", mechanism_source("ours"))
    whole = spec("ours")
    first = with_attempts(run_card(whole, INFO), {}, whole, from_step=0)
    assert first["mechanism"]["package"] == "outside 1.0" and first["mechanism"]["name"] == "ours"
    assert first["attempts"][0]["mechanism"] == first["mechanism"]
    assert "mechanism" not in run_card(spec("gqa"), INFO)
    file.write_text(file.read_text() + "# edited\n")
    second = with_attempts(run_card(whole, INFO), first, whole, from_step=4)
    sources = [attempt["mechanism"]["sources"] for attempt in second["attempts"]]
    assert sources[0] != sources[1]


def test_a_report_says_that_the_package_changed_within_a_run(install, mechanism_source, spec, tmp_path):
    file = install("ours", mechanism_source("ours"))
    whole = spec("ours")
    first = with_attempts(run_card(whole, INFO), {}, whole, from_step=0)
    file.write_text(file.read_text() + "# edited\n")
    second = with_attempts(run_card(whole, INFO), first, whole, from_step=4)
    record: RunRecord = read_run(tmp_path)
    object.__setattr__(record, "run", second)
    lines = run_differences({"ours/seed-1": record})
    assert [line for line in lines if line.startswith("mechanism.sources changed within ours/seed-1")]
