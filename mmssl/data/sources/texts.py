"""The captions of shards as texts, for tokenizers that are trained on them."""

import logging
from collections.abc import Iterator, Sequence

from mmssl.config import HoldOutConfig
from mmssl.data.shards import BadSample, SampleLimits
from mmssl.data.shards.account import Account
from mmssl.data.shards.causes import leave_out
from mmssl.data.sources.hold_out import is_held_out
from mmssl.data.storage import iter_samples
from mmssl.data.transforms import captions
from mmssl.errors import UserError

_log = logging.getLogger(__name__)


def iter_captions(
    shards: Sequence[str],
    templates: Sequence[str],
    limits: SampleLimits | None = None,
    held_out: HoldOutConfig | None = None,
) -> Iterator[str]:
    """Every caption of the samples, in file order. Samples that lack a field are logged, counted by cause.

    Args:
        held_out: samples whose captions are left out.

    Raises:
        UserError: a template is malformed, or no caption can be rendered: names a sample, the cause and the remedy.
    """
    captions.check_templates(templates)
    account = Account()

    def report(bad: BadSample) -> None:
        leave_out(account, bad.shard, bad.key, bad.error)

    try:
        for sample in iter_samples(shards, limits, on_bad=report):
            if held_out is not None and is_held_out(sample, held_out):
                continue
            found, problem = _render(sample.fields, templates)
            if problem is not None:
                leave_out(account, sample.shard, sample.key, problem)
            account.used += bool(found)
            yield from found
    finally:
        for line in account.causes() if account.used else ():
            _log.warning("%s", line)
    if account.used == 0:
        causes = "; ".join(account.causes()) or "it holds no sample"
        more = f" and {len(shards) - 1} more shards" if len(shards) > 1 else ""
        raise UserError(f"no caption in {shards[0]}{more}: {causes}")


def _render(fields: dict[str, object], templates: Sequence[str]) -> tuple[list[str], str | None]:
    """The captions of a sample that can be rendered, and the first problem of the others."""
    found: list[str] = []
    problem: str | None = None
    for template in templates:
        try:
            found += captions.every_caption(fields, template)
        except UserError as error:
            problem = problem or str(error)
    return found, problem
