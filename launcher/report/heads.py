"""Report section on routers and heads: selected experts, router confidence, and similarity of the heads of a group."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from headway.launcher.compare.analyse import StudyResult, VariantResult
from headway.launcher.compare.findings import signed_interval
from headway.launcher.compare.simultaneous import Simultaneous, compare_paired
from headway.launcher.report.page import Block, Heading, Image, Table, Text
from headway.launcher.report.plots.study import Plot
from headway.launcher.run.records_heads import HEAD_KEYS, ROUTER_KEYS, Heads, Router, mean


def router_and_head_blocks(result: StudyResult, plots: Mapping[str, Plot]) -> Iterator[Block]:
    """Tables over layers and seeds, and the figures `heads` and `routers`. No blocks if no run recorded either."""
    routed = [v for v in result.variants if v.routers]
    pooled = [v for v in result.variants if v.heads]
    if not routed and not pooled:
        return
    yield Heading("Routers and heads")
    if routed:
        yield from _routers(routed)
    if pooled:
        yield from _heads(pooled)
        if result.pairing.status != "UNPAIRED":
            yield from _against_baseline(pooled, result.baseline.name)
    yield from (Image(plots[name]) for name in ("heads", "routers") if name in plots)


def _routers(variants: Sequence[VariantResult]) -> Iterator[Block]:
    yield Text(
        "Routers in the last tenth of training, mean over records, groups, layers and seeds. Greatest load: that of "
        "the busiest expert of any group, over an even share. Effective: exp of the entropy of an expert's share of "
        "the load. Dead: experts with less than 0.1 % of their group's choices since the record before the last one, "
        "worst seed. Entropy of the router's softmax over ln N: 1 is undecided, 0 always certain. Top-1 margin: best "
        "logit minus second-best; close: tokens where it is below 0.1. Switch: chosen experts that the token before "
        "had not chosen. Token information: mutual information of the token's id and the chosen expert, bias "
        "subtracted; share: of what it can be at most, near 100 % the router only looks the token up. Per layer: "
        "`routers.csv`."
    )
    header = ["variant", "router", "greatest load", "effective", "dead", "entropy / ln N", "top-1 margin", "close"]
    rows = [[*header, "switch", "gate", "token information (nats)", "share"]]
    for v in variants:
        for name in sorted({r.name for r in v.routers}):
            rows.append([v.name, name, *_router_cells([r for r in v.routers if r.name == name])])
    yield Table(rows, frozenset({0, 1}))


def _router_cells(routers: Sequence[Router]) -> list[str]:
    def average(value: Callable[[Router], float]) -> float:
        return mean(value(r) for r in routers)

    sizes = {r.load.shape[1] for r in routers}
    of = f" of {min(sizes)}" if len(sizes) == 1 else ""
    return [
        _shown(max(float(r.load.max()) * r.load.shape[1] for r in routers), ".2f"),
        _shown(average(lambda r: r.effective), ".2f") + of,
        f"{sum(r.dead for r in routers)} of {sum(r.load.size for r in routers)}",
        _shown(average(relative_entropy), ".3f"),
        _shown(average(lambda r: r.means["top1_margin"]), ".2f"),
        _shown(average(lambda r: r.means["close"]), ".1%"),
        _shown(average(lambda r: r.means["switch_rate"]), ".1%"),
        _shown(average(lambda r: r.means["gate"]), ".2f"),
        _shown(average(lambda r: r.means["mutual_information"]), ".3f"),
        _shown(average(lambda r: r.means["information_share"]), ".1%"),
    ]


def relative_entropy(router: Router) -> float:
    """Entropy of the softmax / its maximum; 0 for a router with one expert."""
    experts = router.load.shape[1]
    return router.means["entropy"] / math.log(experts) if experts > 1 else 0.0


def _heads(variants: Sequence[VariantResult]) -> Iterator[Block]:
    yield Text(
        "Likeness of the interchangeable heads (or value experts) of a group, all of them computed for every token of "
        "a fixed probe batch of the validation text, chosen or not; first record \u2192 last, mean over pairs, "
        "groups, layers and seeds. C_W: absolute cosine of their weights; C_q, C_o: cosine of their projections and "
        "attention outputs, token by token; effective rank of their weights, at most their number; CKA: likeness of "
        "their outputs whatever their rotation. Random heads are nearly orthogonal in their weights already, and "
        "random query heads have nearly equal outputs (they attend to all tokens alike), so compare with the start "
        "and between variants. Per layer: `heads.csv`."
    )
    rows = [["variant", "compared", "C_W", "C_q", "C_o", "effective rank", "CKA"]]
    for v in variants:
        found = list(v.heads.values())
        cells = [f"{found[0].members or 'unequal numbers of'} {found[0].member}s per group"]
        for key in HEAD_KEYS:
            ends = [mean(float(h.mean(key)[i]) for h in found) for i in (0, -1)]
            places = ".2f" if key == "effective_rank" else ".3f"
            cells.append(" \u2192 ".join(_shown(end, places) for end in ends))
        rows.append([v.name, *cells])
    yield Table(rows, frozenset({0, 1}))


def _against_baseline(variants: Sequence[VariantResult], baseline: str) -> Iterator[Block]:
    """Differences of the last measures to the baseline's, for variants whose pools are of the same kind and size, in
    the same layers: the measures depend on the number of members, and on the depth.
    """
    kinds = {v.name: {_pool(h) for h in v.heads.values() if h.members} for v in variants}
    alike = [v for v in variants if len(kinds[v.name]) == 1 and kinds[v.name] == kinds.get(baseline)]
    if len(alike) < 2 or baseline not in kinds:
        return
    found = {key: compare_paired({v.name: _last(v, key) for v in alike}, baseline).differences for key in HEAD_KEYS}
    yield Text(
        f"Differences to {baseline} at the end of training, with 95 % intervals over seeds that are simultaneous for "
        "the variants, not for the measures. Heads are less alike than the baseline where the interval of C_o is below "
        "0. A variant whose choice is random is the control: what it has too is no effect of a learned router."
    )
    rows = [["variant", "n", *(_TITLES[key] for key in HEAD_KEYS), "outputs of heads"]]
    for v in alike:
        differences = {key: found[key].get(v.name) for key in HEAD_KEYS}
        outputs = differences["c_o"]
        if v.name == baseline or outputs is None:
            continue
        cells = [signed_interval(differences[key], 2 if key == "effective_rank" else 3) for key in HEAD_KEYS]
        rows.append([v.name, str(outputs.n), *cells, _verdict(outputs)])
    yield Table(rows, frozenset({0, 7}))


def _pool(heads: Heads) -> tuple[str, ...]:
    """What is compared in a run: kind and number of the members of a group, and the layers."""
    return heads.member, str(heads.members), *sorted(heads.layers)


def _last(variant: VariantResult, key: str) -> dict[int, float]:
    """Seed -> the last value of a measure, where it is finite."""
    values = {seed: float(found.mean(key)[-1]) for seed, found in variant.heads.items()}
    return {seed: value for seed, value in values.items() if math.isfinite(value)}


_TITLES = {"c_w": "C_W", "c_q": "C_q", "c_o": "C_o", "effective_rank": "effective rank", "cka": "CKA"}


def _verdict(outputs: Simultaneous) -> str:
    if not outputs.excludes(0):
        return "no difference shown"
    return "less alike" if outputs.mean < 0 else "more alike"


def _shown(value: float, places: str) -> str:
    return format(value, places) if math.isfinite(value) else "-"


def router_rows(result: StudyResult) -> Iterator[dict[str, Any]]:
    """One row per finished cell, layer and router. Values are means over groups, empty if a run did not record them."""
    for c in result.cells:
        for r in c.record.routers if c.done else ():
            load = r.load * r.load.shape[1]
            yield {
                "variant": c.variant,
                "seed": c.seed,
                "layer": r.layer.removeprefix("layer_"),
                "router": r.name,
                "groups": r.load.shape[0],
                "experts_per_group": r.load.shape[1],
                "least_load": float(load.min()),
                "greatest_load": float(load.max()),
                "effective_experts": r.effective,
                "dead": r.dead,
                **{key: _known(r.means[key]) for key in ROUTER_KEYS},
            }


def head_rows(result: StudyResult) -> Iterator[dict[str, Any]]:
    """One row per finished cell, record and layer."""
    for c in result.cells:
        heads = c.record.heads if c.done else None
        for i, tokens in enumerate(heads.tokens if heads else ()):
            for layer, measures in heads.layers.items() if heads else ():
                yield {
                    "variant": c.variant,
                    "seed": c.seed,
                    "tokens": int(tokens),
                    "layer": layer.removeprefix("layer_"),
                    **{key: _known(float(measures[key][i])) for key in HEAD_KEYS},
                }


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
