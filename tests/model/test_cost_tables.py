"""Every cell of the reference tables of sizes and FLOPs (cost_tables.md) equals the answers of the configs.

The tables were worked out by an independent calculator: formulas per mechanism, MLP width solved for a budget.
"""

from pathlib import Path

import pytest

from headway.model.attention.gqa import GqaConfig, MhaConfig, MqaConfig
from headway.model.attention.gqe import GqeConfig
from headway.model.attention.hybrid import HybridConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.attention.sqa import SqaConfig
from headway.model.attention.switchhead import SwitchHeadConfig
from headway.model.config import ModelConfig
from headway.model.cost import account

SIZES = {  # width, layers, heads, groups, parameters aimed at
    "82M": (768, 9, 12, 3, 82_000_000),
    "162M": (1024, 12, 16, 4, 162_000_000),
    "250M": (1024, 20, 16, 4, 250_000_000),
    "940M": (2048, 20, 32, 8, 940_000_000),
}
D = 64
TABLES = (Path(__file__).parent / "cost_tables.md").read_text().split("\n")


def mechanisms(heads, groups):
    """The rows of a table; all of them have heads of 64 channels."""
    pool, experts = {"heads": heads, "kv_heads": groups, "head_dim": D}, heads // groups
    return {
        "MHA": MhaConfig(heads=heads, head_dim=D),
        "MQA": MqaConfig(heads=heads, head_dim=D),
        "GQA": GqaConfig(**pool),
        "SQA k=2 (static)": SqaConfig(**pool, kept=2),
        "R-GQA k=1": RgqaConfig(**pool, top_k=1),
        "R-GQA k=2": RgqaConfig(**pool, top_k=2),
        "GQE k=1 (same G,M)": GqeConfig(**pool, top_k=1),
        "GQE k=1, G=H/2 (M=2)": GqeConfig(**{**pool, "kv_heads": heads // 2}, top_k=1),
        "SwitchHead n=G,E=M,k=2": SwitchHeadConfig(kv_heads=groups, experts=experts, top_k=2, head_dim=D),
        "Hybrid kq=1,kv=2,Ev=M": HybridConfig(**pool, top_k=1, value_experts=experts, value_top_k=2),
        "Hybrid kq=2,kv=2,Ev=M": HybridConfig(**pool, top_k=2, value_experts=experts, value_top_k=2),
    }


def cost(attention, size, ffn_width, *, vocab_size=32_000, tied=True, seq_len=2048):
    width, layers, *_ = SIZES[size]
    model = ModelConfig(width=width, layers=layers, ffn_width=ffn_width, tied_embeddings=tied)
    return account(model, attention, vocab_size=vocab_size, seq_len=seq_len)


def solved(target, slope, at_one):
    """The multiple of 16 whose cost is nearest: cost is at_one + slope (F - 1)."""
    return max(16, round((target - at_one + slope) / slope / 16) * 16)


def rows(heading):
    """The table under a heading: {first cells: the others}, without the head."""
    start = TABLES.index(heading) if heading in TABLES else pytest.fail(f"no table {heading!r}")
    lines = [line for line in _section(start + 1) if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def _section(start):
    for line in TABLES[start:]:
        if line.startswith("#"):
            return
        yield line


@pytest.mark.parametrize(("vocab_size", "tied"), [(32_000, True), (50_304, True), (32_000, False)])
@pytest.mark.parametrize("size", SIZES)
def test_parameter_matched_tables(size, vocab_size, tied):
    width, layers, heads, groups, target = SIZES[size]
    name = "tied" if tied else "untied"
    heading = f"#### {size} (d={width}, L={layers}, H={heads}, G={groups}, D=64, V={vocab_size}, {name}; S=2048)"
    table = {row[0].split(" (INFEASIBLE")[0]: row[1:] for row in rows(heading)}
    shape = {"vocab_size": vocab_size, "tied": tied}
    made, reference = {}, {}
    for label, attention in mechanisms(heads, groups).items():
        ffn_width = solved(target, 3 * width * layers, cost(attention, size, 1, **shape).num_params)
        at = {s: cost(attention, size, ffn_width, seq_len=s, **shape) for s in (2048, 8192, 32_768)}
        core = {s: attention.core_flops_per_token(seq_len=s) for s in at}
        if label == "GQA":
            reference = {"at": at, "core": core}
        made[label] = (attention, ffn_width, at, core)
    assert list(table) == list(made)
    for label, (attention, ffn_width, at, core) in made.items():
        flops = {s: c.flops_per_token.useful for s, c in at.items()}
        gqa = {s: c.flops_per_token.useful for s, c in reference["at"].items()}
        layer = attention.flops_per_token(width=width, seq_len=2048).useful - core[2048]
        router = router_flops(attention, width)
        pool = attention.kv_heads if label.startswith("SwitchHead") else heads
        kv_heads = attention.kv_bytes_per_token(seq_len=2048, bytes_per_element=1) / (2 * D)
        assert table[label] == [
            str(ffn_width),
            f"{attention.num_params(width=width):,}",
            f"{at[2048].num_params:,}",
            f"{attention.score_maps}/{pool}",
            f"{kv_heads:g}",
            f"{(layer - router) / 1e6:.2f}",
            f"{router / 1e6:.3f}",
            f"{core[2048] / 1e6:.2f}",
            f"{flops[2048] / 1e6:.1f}",
            f"{flops[2048] / gqa[2048]:.3f}",
            f"{core[8192] / reference['core'][8192]:.3f}",
            f"{flops[8192] / gqa[8192]:.3f}",
            f"{flops[32_768] / gqa[32_768]:.3f}",
        ], label


def router_flops(attention, width):
    """2 per weight of every router: what the mechanism has beyond heads, values and outputs."""
    match attention.type:
        case "rgqa" | "gqe":
            return 2 * width * attention.heads
        case "switchhead":
            return 4 * width * attention.kv_heads * attention.experts
        case "hybrid":
            return 2 * width * (attention.heads + attention.kv_heads * attention.value_experts)
    return 0


@pytest.mark.parametrize("size", SIZES)
def test_flop_matched_table(size):
    width, layers, heads, groups, target = SIZES[size]
    all_mechanisms = mechanisms(heads, groups)
    gqa_width = solved(target, 3 * width * layers, cost(all_mechanisms["GQA"], size, 1).num_params)
    budget = cost(all_mechanisms["GQA"], size, gqa_width).flops_per_token.useful
    made = []
    for label, attention in all_mechanisms.items():
        ffn_width = solved(budget, 6 * width * layers, cost(attention, size, 1).flops_per_token.useful)
        c = cost(attention, size, ffn_width)
        useful = c.flops_per_token.useful
        row = [size, label, str(ffn_width), f"{c.num_params:,}", f"{useful / 1e6:.1f}", f"{useful / budget:.4f}"]
        made.append(row)
    assert [row for row in rows("## FLOP-matched, V=32000 tied") if row[0] == size] == made


@pytest.mark.parametrize("size", SIZES)
def test_flop_speed_ups_of_routed_gqa(size):
    width, layers, heads, groups, target = SIZES[size]
    gqa = GqaConfig(heads=heads, kv_heads=groups, head_dim=D)
    ffn_width = solved(target, 3 * width * layers, cost(gqa, size, 1).num_params)
    made = []
    for k in (1, 2):
        routed = RgqaConfig(heads=heads, kv_heads=groups, head_dim=D, top_k=k)
        for tag, dense in (("ideal", 0.0), ("dense Q, sparse O", 0.5), ("dense Q and O", 1.0)):

            def speed_up(seq_len, routed=routed, dense=dense):
                flops = cost(routed, size, ffn_width, seq_len=seq_len).flops_per_token
                ours = flops.useful + dense * (flops.executed - flops.useful)  # half of the surplus is Q, half O
                return cost(gqa, size, ffn_width, seq_len=seq_len).flops_per_token.useful / ours

            low, high = 64, 1 << 24
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if speed_up(middle) >= 1.4 else (middle, high)
            ratios = [f"{speed_up(s):.2f}" for s in (512, 1024, 2048, 4096, 8192, 16_384, 32_768)]
            made.append([size, f"k={k} {tag}", *ratios, str(high)])
    heading = "### R-GQA: FLOP speed-up over GQA (same F), forward (= training, all terms x3), k=1 and k=2 of M=4"
    assert [row for row in rows(heading) if row[0] == size] == made


# total, width, layers, heads, head size, MLP width, experts (None: dense), Transformer-XL positions
PUBLISHED = [
    ("47.26M", 412, 16, 10, 41, 2053, None, True),
    ("47.26M", 412, 16, 2, 205, 2053, None, True),
    ("47.25M", 412, 16, 2, 76, 2080, 5, True),
    ("262.4M", 1024, 18, 4, 112, 4188, 4, True),
    ("44.51M", 412, 16, 2, 64, 2092, 5, False),
    ("243.35M", 1024, 18, 4, 100, 4136, 4, False),
]


@pytest.mark.parametrize(("total", "width", "layers", "heads", "head_dim", "mlp", "experts", "xl"), PUBLISHED)
def test_published_totals_of_switchhead(total, width, layers, heads, head_dim, mlp, experts, xl):
    """The authors' decoder around our count of the attention: 8000 untied tokens, ReLU MLP with biases, LayerNorms."""
    rotated = {"head_dim": head_dim, "rope_fraction": 0.0}  # an odd head size cannot be rotated, and XL does not
    if experts is None:
        attention = MhaConfig(heads=heads, **rotated).num_params(width=width)
    else:
        attention = SwitchHeadConfig(kv_heads=heads, experts=experts, top_k=2, **rotated).num_params(width=width)
    positions = (width + (2 if experts is None else 0)) * heads * head_dim if xl else 0  # matrix, and u and v biases
    block = attention + positions + (2 * width * mlp + mlp + width) + 4 * width
    params = layers * block + 2 * 8000 * width + 8000 + 2 * width
    digits = len(total.split(".")[1]) - 1
    assert f"{params / 1e6:.{digits}f}M" == total
