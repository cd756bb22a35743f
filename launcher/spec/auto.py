"""`auto` in a spec file: taken out before validation, so that whoever reads a spec finds a number."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from headway.launcher.base.errors import SpecError
from headway.launcher.spec.fields import AUTO
from headway.launcher.spec.yamlio import Node, Place

if TYPE_CHECKING:
    from headway.launcher.spec.spec import Spec

MICRO_BATCH = "train.micro_batch"


def replaced(tree: Node) -> tuple[Node, dict[str, Place]]:
    """The tree with 1 where `train.micro_batch` says `auto`, and where each key that did so stands.

    1 is legal wherever any number is: what else is wrong with the spec is then found as ever.
    """
    train = tree.value.get("train")
    if train is None or not train.is_mapping:
        return tree, {}
    node = train.value.get("micro_batch")
    if node is None or node.value != AUTO:
        return tree, {}
    # New nodes: the old ones may belong to a layer that is merged again.
    one = Node(1, node.place, node.key_place)
    inner = Node({**train.value, "micro_batch": one}, train.place, train.key_place)
    return Node({**tree.value, "train": inner}, tree.place, tree.key_place), {MICRO_BATCH: node.at}


def refuse(spec: Spec, places: dict[str, Place], path: str, reason: str) -> NoReturn:
    """Raises SpecError for the keys that say `auto`, with what can be done instead. `spec` has 1 in their place."""
    raise SpecError(
        "\n".join(f"{place}: {key}: {AUTO} {reason}; {alternatives(spec, path)}" for key, place in places.items())
    )


def alternatives(spec: Spec, path: str) -> str:
    """What to do where `auto` cannot be."""
    from headway.launcher.spec.layouts import listed, micro_batches  # imports torch

    return (
        f"write train.micro_batch {listed(micro_batches(spec))}, or find the number with `headway bench micro-batch "
        f"{path}` on one host and write that"
    )
