"""The mixes of an ablation: those that the user names, or a set of their own."""

import re
from collections.abc import Mapping, Sequence

from mmssl.config import ObjectiveConfig
from mmssl.errors import UserError
from mmssl.objectives import reference
from mmssl.objectives._mix_spec import ALL, Mix, parse_mix


def parse_mixes(texts: Sequence[str], configured: Mapping[str, ObjectiveConfig]) -> list[Mix]:
    """The mixes to compare, the baseline first; without any, the default ones.

    Raises:
        UserError: a mix names what is not configured, is written twice or wrongly, or there are fewer than two.
    """
    mixes = [parse_mix(text, configured) for text in texts or default_mixes(configured)]
    if len(mixes) < 2:
        raise UserError(
            f"an ablation compares at least two mixes, found {', '.join(m.name for m in mixes)}; add objectives to the "
            f"configuration, for example objectives.mlm.weight=0.05, or name them with --mix"
        )
    seen: dict[str, Mix] = {}
    for mix in mixes:
        other = seen.setdefault(slug(mix.name), mix)
        if other is not mix:
            raise UserError(f"the mixes {other.name!r} and {mix.name!r} have the same name; leave one of them out")
    return mixes


def default_mixes(configured: Mapping[str, ObjectiveConfig]) -> list[str]:
    """Contrastive (or siglip) alone, or the first objective where there is neither; with each other one; and all."""
    names = [name for name, entry in configured.items() if entry.weight > 0]
    base = reference(names) or names[0]
    others = [name for name in names if name != base]
    return [base, *(f"{base}+{name}" for name in others), *([ALL] if len(others) > 1 else [])]


def slug(name: str) -> str:
    """The name of a mix as a name of a folder."""
    return re.sub(r"[^A-Za-z0-9.+=-]+", "_", name).strip("_")
