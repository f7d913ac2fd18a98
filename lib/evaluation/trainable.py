"""Named groups of parameters that test-time training may change. Adding one: a line in `GROUPS` and a count in its test."""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from lib.errors import UserError

if TYPE_CHECKING:  # parameter classes import this module, and need no torch
    from lib.model.parts import Part

SCALES = ("block_scale", "bigram_scale", "value_embedding_scale")
GROUPS = {  # name -> roles of its parameters, as the model declares them; None = every parameter
    "scales": SCALES,  # pr585: whatever is called a scale: of blocks, bigram and value embedding
    "block_scales": ("block_scale",),  # pr410
    "residual_mix": ("residual_mix",),
    "q_gain": ("q_gain",),
    "skip_weights": ("skip_weights", "skip_gates"),
    "attention_gate": ("attention_gate",),
    "lanes": ("lanes",),
    "smear_gate": ("smear_gate",),
    "embedding": ("embedding",),  # with a tied head this is the head as well
    "head": ("head",),
    "bigram": ("bigram", "bigram_scale"),
    "value_embedding": ("value_embedding", "value_embedding_scale"),
    "all": None,
}
LAST_BLOCKS = re.compile(r"last_([1-9]\d*)_blocks")
GROUP_NAMES = (*GROUPS, "last_N_blocks")


def is_group(name: str) -> bool:
    """Whether `name` is a group: one of `GROUPS`, or ``last_N_blocks`` with a positive number N."""
    return name in GROUPS or LAST_BLOCKS.fullmatch(name) is not None


def match_groups(groups: Iterable[str], parts: "Mapping[str, Part]") -> dict[str, list[str]]:
    """The parameters of each group.

    Args:
        groups: names of groups; their members may overlap.
        parts: table of the whole model, from `lib.model.parts.parts_of`.

    Returns:
        Group -> names of its parameters, in the model's order.

    Raises:
        UserError: a group that does not exist, or one that matches no parameter of this model.
    """
    num_blocks = 1 + max((part.layer for part in parts.values() if part.layer is not None), default=-1)

    def find(group: str) -> list[str]:
        if last := LAST_BLOCKS.fullmatch(group):
            first = num_blocks - int(last[1])
            return [name for name, part in parts.items() if part.layer is not None and part.layer >= first >= 0]
        return [name for name, part in parts.items() if (roles := GROUPS[group]) is None or part.role in roles]

    members = {}
    for group in groups:
        if not is_group(group):
            raise UserError(f"trainable group {group}: expected one of {', '.join(GROUP_NAMES)}")
        members[group] = find(group)
        if not members[group]:
            raise UserError(f"trainable group {group}: matches no parameter of this model, which has {num_blocks} blocks and "
                            f"the groups {', '.join(filter(find, GROUPS))}")
    return members


def describe_groups(members: Mapping[str, list[str]], sizes: Mapping[str, int]) -> str:
    """One line with the exact numbers of tensors and parameters, of each group and of their union.

    Args:
        members: from `match_groups`.
        sizes: parameter name -> number of elements.
    """
    union = {name for names in members.values() for name in names}
    parts = ", ".join(f"{group} {sum(sizes[name] for name in names):,}" for group, names in members.items())
    return f"{len(union)} tensors, {sum(sizes[name] for name in union):,} parameters ({parts})"
