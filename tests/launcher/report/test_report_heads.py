"""The section on routers and heads: means over layers and seeds, with older and poorer records as well."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from headway.launcher.compare.simultaneous import compare_paired
from headway.launcher.report.heads import head_rows, router_and_head_blocks, router_rows
from headway.launcher.report.page import Heading, Table, Text
from headway.launcher.report.plots.heads import draw_routers
from headway.launcher.run.records import read_run
from headway.launcher.run.records_heads import ROUTER_KEYS, Router, mean_routers, read_heads, read_routers

OLD = {"load": [[0.5, 0.5], [1.0, 0.0]], "entropy": 0.6, "margin": 0.1, "dead": 1}
NEW = {
    "load": [[0.5, 0.5], [1.0, 0.0]],
    "entropy": [0.2, 0.4],
    "dead": [0, 1],
    "top1_margin": [1.0, 2.0],
    "information_share": [0.5, None],
}


def train(*figures):
    return [{"kind": "train", "step": i, "router": {"layer_03": {"q": f}}} for i, f in enumerate(figures, 1)]


def heads(step, **layers):
    values = {"member": "query head", "members": 2, "c_w": 0.1, "c_q": 0.1, "effective_rank": 1.9, "cka": 0.5}
    found = {layer: values | {"c_o": c_o} for layer, c_o in layers.items()}
    return {"kind": "heads", "step": step, "tokens": 10 * step, "layers": found}


def variant(routers=(), found=None, name="a"):
    return SimpleNamespace(name=name, routers=tuple(routers), heads=found or {})


def blocks(*variants):
    result: Any = SimpleNamespace(
        variants=variants, baseline=SimpleNamespace(name="a"), pairing=SimpleNamespace(status="PAIRED")
    )
    return list(router_and_head_blocks(result, {}))


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("figures", [OLD, NEW])
def test_figures_per_group_and_older_ones_per_router_are_both_read(figures):
    (router,) = read_routers(train(figures))
    assert (router.layer, router.name, router.dead) == ("layer_03", "q", 1)
    assert router.effective == pytest.approx(1.5)  # 2 in one group, 1 in the other
    assert router.means["entropy"] == pytest.approx(0.6 if figures is OLD else 0.3)
    assert set(router.means) == set(ROUTER_KEYS) and math.isnan(router.means["switch_rate"])
    if figures is NEW:
        assert router.means["information_share"] == 0.5  # of the group that has one


def test_routers_are_read_from_the_last_tenth_and_dead_from_the_last_record(tmp_path: Path):
    other = {**NEW, "load": [[0.0, 1.0], [0.0, 1.0]], "dead": [1, 1]}
    lines = train(*[OLD] * 18, NEW, other)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))
    (router,) = read_run(tmp_path).routers
    assert router.load.tolist() == [[0.25, 0.75], [0.5, 0.5]] and router.dead == 2
    assert router.means["top1_margin"] == pytest.approx(1.5)


def test_seeds_are_averaged_where_they_have_a_figure_and_dead_is_the_worst_seed():
    (mean,) = mean_routers([read_routers(train(OLD)), read_routers(train({**NEW, "dead": [1, 1]}))])
    assert mean.dead == 2 and mean.means["entropy"] == pytest.approx(0.45) and mean.means["top1_margin"] == 1.5


def test_heads_are_read_in_order_of_steps_whatever_is_missing(tmp_path: Path):
    lines = [heads(8, layer_00=0.5, layer_01=0.7), heads(0, layer_00=0.1, layer_01=0.2), {"kind": "heads", "step": 4}]
    lines += [{"kind": ["odd"], "step": 1}, heads(8, layer_00=0.6, layer_01=0.8)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"kind": "heads", "st')
    found = read_run(tmp_path).heads
    assert found is not None and (found.member, found.members) == ("query head", 2)
    assert found.tokens.tolist() == [0, 80]
    assert found.mean("c_o").tolist() == pytest.approx([0.15, 0.7])


def test_a_run_without_heads_has_none():
    assert read_heads([]) is None and read_heads([{"kind": "heads", "layers": {}}]) is None


# ---------------------------------------------------------------- writing


def router(layer="layer_00", load=((0.5, 0.5), (0.75, 0.25)), dead=0, **means):
    known = dict.fromkeys(ROUTER_KEYS, math.nan) | means
    return Router(layer=layer, name="q", load=np.array(load), means=known, dead=dead)


def test_nothing_recorded_makes_no_section():
    assert blocks(variant(), variant(name="b")) == []


def test_the_router_table_is_over_layers():
    first = router(dead=1, entropy=0.5 * math.log(2), top1_margin=1.0, switch_rate=0.2)
    second = router("layer_01", load=[[1.0, 0.0]], dead=1, entropy=0.1 * math.log(2), top1_margin=2.0, switch_rate=0.4)
    heading, text, table = blocks(variant([first, second]))
    assert isinstance(heading, Heading) and isinstance(text, Text) and isinstance(table, Table)
    cells = dict(zip(table.rows[0], table.rows[1], strict=True))
    effective = ((2 + math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))) / 2 + 1) / 2
    assert cells["greatest load"] == "2.00" and cells["effective"] == f"{effective:.2f} of 2"
    assert cells["dead"] == "2 of 6" and cells["entropy / ln N"] == "0.300"
    assert (cells["top-1 margin"], cells["switch"]) == ("1.50", "30.0%")
    assert cells["close"] == cells["gate"] == cells["share"] == "-"  # an older run


def test_dense_variants_stand_in_the_table_of_heads_alone():
    found = read_heads([heads(0, layer_00=0.1), heads(5, layer_00=0.4)])
    assert found is not None
    section = blocks(variant([router()], {1: found}), variant(found={1: found, 2: found}, name="dense"))
    routers, likeness, _ = [block for block in section if isinstance(block, Table)]
    assert [row[0] for row in routers.rows] == ["variant", "a"]
    assert [row[0] for row in likeness.rows] == ["variant", "a", "dense"]
    assert likeness.rows[2][4] == "0.100 \u2192 0.400"


def test_variants_with_pools_of_the_same_kind_are_compared_with_the_baseline_over_seeds():
    def seeds(*ends):
        return {seed: read_heads([heads(0, layer_00=0.9), heads(5, layer_00=end)]) for seed, end in enumerate(ends)}

    other = {
        0: read_heads([{**heads(5), "layers": {"layer_00": {"member": "value expert", "members": 4, "c_o": 0.1}}}])
    }
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 0.02, (3, 6))
    section = blocks(
        variant(found=seeds(*(0.7 + noise[0]))),
        variant(found=seeds(*(0.5 + noise[1])), name="routed"),
        variant(found=seeds(*(0.7 + noise[2])), name="random"),
        variant(found=other, name="experts"),
    )
    table = [block for block in section if isinstance(block, Table)][-1]
    rows = {row[0]: dict(zip(table.rows[0], row, strict=True)) for row in table.rows[1:]}
    assert list(rows) == ["routed", "random"]
    assert rows["routed"]["outputs of heads"] == "less alike" and rows["routed"]["n"] == "6"
    assert rows["random"]["outputs of heads"] == "no difference shown"
    expected = compare_paired({"a": seeds_of(0.7 + noise[0]), "routed": seeds_of(0.5 + noise[1]),
                               "random": seeds_of(0.7 + noise[2])}, "a").differences["routed"]  # fmt: skip
    assert rows["routed"]["C_o"] == f"{expected.mean:+.3f} [{expected.low:+.3f}, {expected.high:+.3f}]"


def test_layers_that_differ_are_named_and_not_compared():
    """Such as those of `mixed`: the measures depend on the members of a group, and on the layer."""

    def of_layers(*members):
        one = {"member": "query head", "c_w": 0.1, "c_q": 0.1, "c_o": 0.5, "effective_rank": 1.9, "cka": 0.5}
        layers = {f"layer_{i:02d}": one | {"members": m} for i, m in enumerate(members) if m}
        return {seed: read_heads([{"kind": "heads", "step": 5, "tokens": 50, "layers": layers}]) for seed in (1, 2)}

    base = variant(found=of_layers(4, 4))
    for members in ([4, 2], [4, None], [2, 2]):
        likeness = [b for b in blocks(base, variant(found=of_layers(*members), name="b")) if isinstance(b, Table)]
        assert len(likeness) == 1, members  # of heads, without differences
        size = "unequal numbers of" if members == [4, 2] else members[0]
        assert likeness[0].rows[2][:2] == ["b", f"{size} query heads per group"]
    same = [b for b in blocks(base, variant(found=of_layers(4, 4), name="b")) if isinstance(b, Table)]
    assert [row[0] for row in same[1].rows] == ["variant", "b"]
    unequal = [variant(found=of_layers(4, 2), name=name) for name in "ab"]
    assert sum(isinstance(block, Table) for block in blocks(*unequal)) == 1


def seeds_of(values):
    return dict(enumerate(values.tolist()))


def test_tables_per_layer_are_of_finished_cells():
    record = SimpleNamespace(routers=(router(gate=0.5),), heads=read_heads([heads(0, layer_00=0.1)]))
    cells = [SimpleNamespace(variant="a", seed=s, done=s == 1, record=record) for s in (1, 2)]
    result: Any = SimpleNamespace(cells=cells)
    (row,) = router_rows(result)
    assert (row["layer"], row["gate"], row["close"], row["greatest_load"]) == ("00", 0.5, None, 1.5)
    (row,) = head_rows(result)
    assert (row["seed"], row["tokens"], row["c_o"]) == (1, 0, 0.1)
    old: Any = SimpleNamespace(cells=[SimpleNamespace(**{**vars(cells[0]), "record": no_heads()})])
    assert list(head_rows(old)) == []


def no_heads():
    return SimpleNamespace(routers=(), heads=None)


# ---------------------------------------------------------------- figure


@pytest.mark.parametrize("experts", [4, 5, 8])
def test_numbers_of_a_heat_map_do_not_overlap(experts):
    from matplotlib.text import Text as Label

    load = np.linspace(0.5, 1.5, 2 * experts).reshape(2, experts) / experts
    routers = [Router(layer=f"layer_0{i}", name="router", load=load, means={}, dead=0) for i in range(4)]
    result: Any = SimpleNamespace(variants=[variant(routers, name=f"long-name-{i}") for i in range(4)])
    drawn = draw_routers(result)
    assert drawn is not None
    figure = drawn[0]
    figure.draw_without_rendering()
    for axis in figure.axes[:4]:
        boxes = [t.get_window_extent() for t in axis.texts if isinstance(t, Label)]
        assert len(boxes) == 8 * experts
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
