"""`auto` in a spec file: it is replaced before validation, so that a validated spec always contains a number."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from headway.launcher.base.errors import SpecError
from headway.launcher.spec.fields import AUTO
from headway.launcher.spec.yamlio import Node, Place

if TYPE_CHECKING:
    from headway.launcher.spec.spec import Spec

MICRO_BATCH = "train.micro_batch"


def replaced(tree: Node) -> tuple[Node, dict[str, Place]]:
    """Replace `auto` at `train.micro_batch` with 1. Returns the tree and the place of each replaced key.

    1 is legal wherever a number is, so that validation still finds all other problems of the spec.
    """
    train = tree.value.get("train")
    if train is None or not train.is_mapping:
        return tree, {}
    node = train.value.get("micro_batch")
    if node is None or node.value != AUTO:
        return tree, {}
    # Create new nodes, because the old ones may belong to a layer that is merged again.
    one = Node(1, node.place, node.key_place)
    inner = Node({**train.value, "micro_batch": one}, train.place, train.key_place)
    return Node({**tree.value, "train": inner}, tree.place, tree.key_place), {MICRO_BATCH: node.at}


def refuse(spec: Spec, places: dict[str, Place], path: str, reason: str) -> NoReturn:
    """Raise SpecError for the keys that are `auto`, with the alternatives. `spec` has 1 in their place."""
    raise SpecError(
        "\n".join(f"{place}: {key}: {AUTO} {reason}; {alternatives(spec, path)}" for key, place in places.items())
    )


def alternatives(spec: Spec, path: str) -> str:
    """Advice on what to write where `auto` is not possible."""
    from headway.launcher.spec.layouts import listed, micro_batches  # imports torch

    return (
        f"write train.micro_batch {listed(micro_batches(spec))}, or find the number with `headway bench micro-batch "
        f"{path}` on one host and write that"
    )
