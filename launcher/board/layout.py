"""The order of charts in TensorBoard's custom layout: loss and speed come first."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Margin(NamedTuple):
    """A chart of one scalar with its interval: names of three scalars."""

    value: str
    low: str
    high: str


Charts = Mapping[str, tuple[str, ...] | Margin]
"""Title of a chart -> regular expressions of the scalars in it, or a scalar with its interval."""

CATEGORIES: Mapping[str, Charts] = {
    "Loss": {
        "loss of training and validation": ("train/loss$", "val/loss$"),
        "validation loss, 95 % interval over documents": Margin("val/loss", "val/loss_low", "val/loss_high"),
        "validation sets": ("val_sets/",),
        "bits per byte": ("val/bits_per_byte$", "val_sets_bits_per_byte/"),
        "accuracy in validation": ("val/accuracy$",),
    },
    "Speed": {
        "tokens per second": ("perf/tokens_per_s$",),
        "share of a step that waits for data": ("perf/data_wait_share$",),
    },
    "Optimizer": {
        "gradient norm before clipping": ("train/grad_norm$",),
        "learning rate": ("train/lr$",),
        "auxiliary losses of routers": ("train/aux_loss$",),
        "skipped steps": ("guard/skipped_steps$",),
    },
    "Routers, over all layers": {
        "entropy and effective experts": ("router/all/.*_entropy$", "router/all/.*_effective_experts$"),
        "dead experts": ("router/all/.*_dead$",),
        "largest load": ("router/all/.*_peak$",),
        "gate and margin": ("router/all/.*_gate$", "router/all/.*_top1_margin$"),
        "tokens that change their expert": ("router/all/.*_switch_rate$", "router/all/.*_close_share$"),
        "information about the token": ("router/all/.*_mutual_information(_share)?$",),
    },
    "Heads, mean over layers": {
        "similarity": ("heads/mean/c_w$", "heads/mean/c_q$", "heads/mean/c_o$", "heads/mean/cka$"),
        "effective rank": ("heads/mean/effective_rank$",),
    },
}
"""Title of a category -> its charts. TensorBoard opens the first category and shows the others below it."""


def layout_of(tags: Iterable[str]) -> dict[str, dict[str, tuple[str, ...] | Margin]]:
    """The categories and charts for which there are scalars with these names."""
    names = tuple(tags)

    def known(wanted: tuple[str, ...] | Margin) -> bool:
        if isinstance(wanted, Margin):
            return set(wanted) <= {*names}
        return any(re.match(pattern, name) for pattern in wanted for name in names)

    found = {
        title: {chart: wanted for chart, wanted in charts.items() if known(wanted)}
        for title, charts in CATEGORIES.items()
    }
    for name in names:
        if name.startswith("val_sets/"):
            title = name.removeprefix("val_sets/")
            margin = Margin(name, f"val_sets_low/{title}", f"val_sets_high/{title}")
            if known(margin):
                found["Loss"][f"{title}, 95 % interval over documents"] = margin
    return {title: charts for title, charts in found.items() if charts}
