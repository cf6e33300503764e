"""Causes for which samples are left out: their names without particulars, their remedies, their counts."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from mmssl.data.shards.account import DAMAGED, Account
from mmssl.data.shards.groups import NOT_ADJACENT, REPEATED, UNCOUNTED
from mmssl.data.shards.joining import APART, MISNAMED, join_parts
from mmssl.data.shards.samples import BadSample
from mmssl.data.shards.shard_index import ShardIndex

_PARTICULARS = re.compile(r"(: | \(|; ).*", re.DOTALL)
_NUMBER = re.compile(r"(?<!UTF-)\d[\d,]*")
_PACK = "mmssl shards pack SHARD --out FOLDER"
_NAME = "--{0}-member EXTENSION of the commands, data.members='{{{0}: [EXTENSION]}}' in training"
_REMEDIES = (
    (NOT_ADJACENT, f"write the tar with `tar --sort=name`, or pack it again: {_PACK}"),
    (APART, f"pack it again, which joins them by name: {_PACK}"),
    (MISNAMED, f"pack it again, which joins them by name: {_PACK}"),
    (REPEATED, f"give each sample a name of its own, or pack the shard again, which does so: {_PACK}"),
    ("is no text: ", f"write a caption, or pack without these samples: {_PACK}"),
    ("holds no text: ", f"write a caption, or pack without these samples: {_PACK}"),
    ("within a tar is not read", "unpack both, and pack the folder: mmssl shards pack FOLDER --out SHARDS"),
    ("no text: ", f"if one of these members is the caption, name it: {_NAME.format('caption')}"),
    ("no image: ", f"if one of these members is the image, name it: {_NAME.format('image')}"),
    ("no text", "put KEY.txt, or KEY.json with a caption, beside KEY.jpg in the tar"),
    ("no image", "put KEY.jpg beside KEY.txt in the tar, or train on captions alone with data.images=false"),
    ("the caption is empty", f"write a caption, or pack without these samples: {_PACK}"),
    (
        "data.max_pixels",
        "shrink them once: mmssl shards pack SOURCE --out FOLDER --resize 512 --max-pixels N; or raise data.max_pixels "
        "in training",
    ),
    ("save it anew", "open and save these images in another program"),
    ("more than the limit of", "raise --max-member-mib of the commands, data.max_member_mib in training"),
    ("name with a line break", "rename the file"),
    ("sparse file", "write the tar without --sparse"),
    ("tar readers", "unpack the shard and pack the folder: mmssl shards pack FOLDER --out SHARDS"),
    (" is refused: ", "store the file itself: tar --dereference --hard-dereference --sort=name"),
    ("is cut", "get the shard again"),
    (
        "names the field",
        "name a field that the samples have: --caption '{FIELD}', data.captions=['{FIELD}'] in training",
    ),
    ("characters, more than", "shorten it, or raise data.max_caption_chars in training"),
    ("null characters", "get the data again if it has a hole, else convert it to UTF-8: iconv -f utf-16"),
    ("is not UTF-8", "convert the captions to UTF-8, for example with iconv"),
    ("the image is broken or cut", f"get the image again, or pack without these samples: {_PACK}"),
    ("images of this kind are not read", "convert them to JPEG or PNG"),
)
"""A part of the reason, and its remedy; the first that fits."""


def cause_of(reason: str) -> str:
    """The kind of a reason, without the numbers and names of its sample."""
    return _NUMBER.sub("N", _PARTICULARS.sub("", reason))


def remedy_of(reason: str) -> str:
    """The remedy for a reason. Empty: none is known."""
    return next((remedy for part, remedy in _REMEDIES if part in reason), "")


def leave_out(account: Account, shard: str, key: str, reason: str) -> None:
    """Count a sample of a shard as left out. Without a key: the shard is damaged.

    Args:
        shard: empty for a file on its own.
    """
    if not key:
        account.leave_out(DAMAGED, f"{shard} ({reason})")  # the reason says what to do
        return
    name = f"{shard}:{key}" if shard else key
    account.leave_out(cause_of(reason), f"{name} ({reason})", remedy=remedy_of(reason))


def account_of_indexes(indexes: Sequence[ShardIndex]) -> Account:
    """The samples of indexed shards: used, and left out by cause. Damaged shards are named too."""
    account = _account_of_samples(indexes)
    for index in indexes:
        for problem in index.problems:
            leave_out(account, index.shard, "", problem)
    return account


def _account_of_samples(indexes: Sequence[ShardIndex]) -> Account:
    account = Account(used=sum(index.samples for index in indexes))
    for index in indexes:
        for out in index.lost:
            leave_out(account, index.shard, out.key, out.reason)
    return account


def join_bad(bad: Iterable[BadSample]) -> list[BadSample]:
    """The unusable samples of a pass over shards, each of them once."""
    shards: dict[str, list[BadSample]] = {}
    for sample in bad:
        shards.setdefault(sample.shard, []).append(sample)
    return [
        replace(sample, error=reason)
        for found in shards.values()
        for sample, reason in zip(found, join_parts([(s.key, s.error) for s in found]), strict=True)
        if reason not in UNCOUNTED
    ]


def account_of(used: int, bad: Iterable[BadSample]) -> Account:
    """The samples of a pass over shards, and the damage of shards, which has no key."""
    account = Account(used=used)
    for sample in bad:
        leave_out(account, sample.shard, sample.key, sample.error)
    return account


def describe_problems(indexes: Sequence[ShardIndex]) -> str | None:
    """One line about excluded samples and damaged shards, or None without any."""
    account = _account_of_samples(indexes)
    wrong = [f"{index.shard}: {problem}" for index in indexes for problem in index.problems]
    if not account.omitted and not wrong:
        return None
    shown = [*wrong[:3], *account.causes()][:4]
    more = " ..." if len(wrong) + len(account.left_out) > len(shown) else ""
    return f"unusable samples left out: {account.omitted:,}, damaged shards: {len(wrong):,}; {'; '.join(shown)}{more}"
