"""Every number of the README's result comes from a file in docs/results."""

import csv
import json
import re
import statistics
from pathlib import Path

from headway.launcher.compare.simultaneous import compare_paired
from headway.launcher.compare.verdicts import verdict
from headway.launcher.run.run_dir import difference, identity

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "docs" / "results"


def cells(study: str = "quickstart") -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = {}
    with (RESULTS / study / "report.csv").open() as f:
        for row in csv.DictReader(f):
            if float(row.get("budget", 1)) == 1:
                found.setdefault(row["variant"], []).append(row)
    return found


def mean(rows: list[dict[str, str]], key: str) -> float:
    return statistics.mean(float(row[key]) for row in rows)


def losses(rows: list[dict[str, str]]) -> dict[int, float]:
    return {int(row["seed"]): float(row["validation_loss_nats"]) for row in rows}


def table(marker: str = "<!-- results: docs/results/quickstart") -> list[list[str]]:
    start = README.index(marker)
    lines = [line for line in README[start:].split("\n\n")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def first_table(study: str) -> dict[str, dict[str, str]]:
    """The first table of a report: variant -> column -> cell."""
    lines = [line for line in (RESULTS / study / "report.md").read_text().splitlines() if line.startswith("| ")]
    header, *rows = ([cell.strip().replace("\\", "") for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows[: len(cells(study)) + 1]}


def test_the_table_is_that_of_the_committed_study():
    found, rows = cells(), table()
    assert [row[0] for row in rows] == list(found)
    baseline = found[rows[0][0]]
    alone = first_table("quickstart")
    gaps = compare_paired({name: losses(variant) for name, variant in found.items()}, rows[0][0]).differences
    for name, loss, shown, said, speed, flops, kv in rows:
        variant = found[name]
        assert all(cell["state"] == "done" for cell in variant)
        assert loss == f"{mean(variant, 'validation_loss_nats'):.3f}"
        if variant is baseline:
            assert shown == said == "baseline"
        else:
            gap = gaps[name]
            assert shown == f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
            assert said == verdict(gap)
        assert speed == alone[name]["tokens/s"]
        assert flops == f"{float(variant[0]['flops_per_token_useful']) / 1e6:.2f} M"
        assert kv == f"{float(variant[0]['kv_bytes_per_token']):,.0f}"


def test_the_table_of_the_flagship_is_that_of_the_committed_ladder():
    with (RESULTS / "answer" / "report.csv").open() as f:
        found = {(row["size"], row["variant"]): row for row in csv.DictReader(f)}
    rows = table("<!-- results: docs/results/answer")
    assert [name for name, *_ in rows] == list(dict.fromkeys(name for _, name in found))

    def shown(size: str, name: str) -> list[str]:
        row = found[size, name]
        if not row["mean_loss_nats"]:
            return ["not trained yet", "not measured"]
        loss = f"{float(row['mean_loss_nats']):.3f} ({row['seeds']})"
        if name == "gqa":
            return [loss, "baseline"]
        low, high, gap = (row[f"difference_{key}"] for key in ("low", "high", "nats"))
        return [
            loss,
            f"{float(gap):+.3f} [{float(low):+.3f}, {float(high):+.3f}]" if low else f"{float(gap):+.3f}, one seed",
        ]

    for name, *cells_of_row, flops in rows:
        assert cells_of_row == [*shown("0.5m", name), *shown("1.2m", name)]
        assert flops == f"{float(found['1.2m', name]['flops_per_token_useful']) / 1e6:.2f} M"


def test_the_sentences_on_the_flagship_are_those_of_its_reports():
    with (RESULTS / "answer" / "report.csv").open() as f:
        rows = list(csv.DictReader(f))
    shown = README.replace("\n", " ")
    gaps = [row for row in rows if row["difference_low"]]
    assert all(float(row["difference_low"]) < 0 < float(row["difference_high"]) for row in gaps)  # none is shown
    half = {r["size"]: (float(r["difference_high"]) - float(r["difference_low"])) / 2 for r in gaps}
    assert f"±{half['0.5m']:.3f} nats at 0.5M and ±{half['1.2m']:.3f} at" in " ".join(shown.split())
    flops = {row["variant"]: float(row["flops_per_token_useful"]) for row in rows if row["size"] == "1.2m"}
    less = [f"{1 - flops[name] / flops['gqa']:.0%}".replace("%", " %") for name in ("rgqa-k1", "switchhead")]
    assert f"does {less[0]} less useful work per token than gqa at 1.2M, SwitchHead {less[1]}." in " ".join(
        shown.split()
    )
    report = (RESULTS / "answer" / "sizes" / "0.5m" / "report.md").read_text().replace("\\", "")
    table = report[report.index("| difference after | 1,216,512 tokens | 2,433,024 tokens |") :]
    (row,) = re.findall(r"^\| rgqa-k1 \| (.*?) \|$", table.split("\n\n")[0], re.MULTILINE)
    quarter, half_way = (re.findall(r"[\d.]+", cell) for cell in row.split(" | ")[:2])
    numbers = [f"{a} [{b}, {c}]" for a, b, c in (quarter, half_way)]
    assert f"by {numbers[0]} nats after a quarter" in shown and f"{numbers[1]} after half" in shown


def test_the_table_of_starts_compares_two_committed_studies():
    drawn, equal = cells("quickstart-as-drawn"), cells("quickstart-equal-starts")
    rows = table("<!-- results: docs/results/quickstart-as-drawn")
    assert [row[0] for row in rows] == list(equal) == list(drawn)
    for name, before, after, change in rows:
        old, new = mean(drawn[name], "validation_loss_nats"), mean(equal[name], "validation_loss_nats")
        assert (before, after, change) == (f"{old:.3f}", f"{new:.3f}", f"{new - old:+.3f}")
    designs = [
        json.loads((RESULTS / study / "study.json").read_text())
        for study in ("quickstart-as-drawn", "quickstart-equal-starts")
    ]
    for old, new in zip(designs[0]["cells"], designs[1]["cells"], strict=True):
        differing = difference(identity(old["spec"]), identity(new["spec"]))
        assert differing == [("model.branch_start", None, 0.3)]


def test_speeds_are_those_of_the_committed_measurements():
    bench = RESULTS / "bench"
    step = json.loads((bench / "step-gqa.json").read_text())
    routed = json.loads((bench / "step-rgqa-k1.json").read_text())
    long = json.loads((bench / "step-2048-rgqa-k1-against-gqa.json").read_text())
    quoted = re.search(
        r"costs ([\d.]+)x \(gqa\) and ([\d.]+)x \(R-GQA k=1\) .*? data wait is ([\d.]+) % .*? "
        r"takes ([\d.]+)x gqa's time",
        README.replace("\n", " "),
    )
    assert quoted is not None
    assert quoted[1] == f"{step['ratio_to_bare']['median']:.2f}"
    assert quoted[2] == f"{routed['ratio_to_bare']['median']:.2f}"
    assert quoted[3] == f"{100 * step['share_of_step']['data']:.1f}"
    assert quoted[4] == f"{long['ratio_to_against']['median']:.2f}"


def test_times_of_other_libraries_are_those_of_the_committed_measurement():
    rows = json.loads((RESULTS / "bench" / "peers.json").read_text())["rows"]
    docs, shown = (ROOT / "docs" / "speed.md").read_text(), []
    for row in rows:
        over = {name: engine["over_headway"] for name, engine in row["engines"].items() if name != "headway"}
        memory = [row["engines"][name]["alone"]["peak_bytes"] for name in ("headway", "bare")]
        cells = [f"{r['median']:.3f} ({r['q1']:.3f} to {r['q3']:.3f})" for r in over.values()]
        assert f"| {row['size']}, {row['precision']} | {' | '.join(cells)} | {memory[0] / memory[1]:.2f} |" in docs
        if row["precision"] == "fp32":
            shown.append(min(zip([r["median"] for r in over.values()], cells, strict=True))[1])
    assert ", ".join(shown[:2]) + f" and {shown[2]} of Headway's time" in README.replace("\n", " ")


def test_speeds_of_mechanisms_in_the_docs_are_those_of_the_committed_measurement():
    rows = json.loads((RESULTS / "bench" / "mechanisms.json").read_text())["rows"]
    passes = {(r["variant"], r["seq_len"]): r for r in rows if r["phase"] == "forward_backward"}
    docs = (ROOT / "docs" / "mechanisms.md").read_text().replace("\n", " ")
    number = r"([\d.]+), ([\d.]+) and ([\d.]+)"
    quoted = re.search(
        rf"takes {number} of gqa's time with `rgqa` .*? promise {number.replace(' and ', ', ')}\), {number} with "
        rf"`switchhead`, {number} with `hybrid`, and {number} with `sqa`",
        docs,
    )
    assert quoted is not None
    measured = [
        f"{passes[name, length][key] if key != 'ratio' else passes[name, length]['ratio']['median']:.2f}"
        for name, key in (
            ("rgqa-k1", "ratio"),
            ("rgqa-k1", "useful_flop_ratio"),
            ("switchhead", "ratio"),
            ("hybrid", "ratio"),
            ("sqa-1", "ratio"),
        )
        for length in (256, 1024, 2048)
    ]
    assert list(quoted.groups()) == measured
    # what the docs say of the distance to the useful FLOPs
    assert max(r["distance"] for (_, length), r in passes.items() if length == 256) < 1.5
    assert {r["variant"] for r in rows if r["distance"] > 1.5} == {"moh"}


def test_the_table_of_all_mechanisms_is_that_of_the_committed_report():
    first = first_table("all-mechanisms")
    header = list(first["gqa"])
    shown = table("<!-- results: docs/results/all-mechanisms")
    keys = [header[1], header[2], "effective speed-up, FLOPs", "effective speed-up, seconds", "KV bytes/token"]
    for name, *values in shown:
        assert values == [first[name][key] for key in keys], name
    decided = {name for name, row in first.items() if row[header[1]] in ("better", "worse")}
    assert decided <= {name for name, *_ in shown}
    assert f"Of {len(cells('all-mechanisms')) - 1} comparisons with gqa, six are shown" in README and len(decided) == 6


def test_the_recall_of_the_hybrid_is_that_of_the_committed_probes():
    rows = (RESULTS / "probes" / "probe.md").read_text().splitlines()
    hybrid = next(row for row in rows if row.startswith("| hybrid |")).split("|")
    assert [cell.split("%")[0].strip() for cell in hybrid[2:4]] == ["99.9", "99.9"]
    assert "it solves both (99.9 %)" in README
