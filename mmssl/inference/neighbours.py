"""Groups of neighbours among stored embeddings, for batches of samples that are hard to tell apart.

The groups of an index are found once and stored in its folder: every process and every resumed run has the same.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from mmssl.data.order import NeighbourGroups, PlannedSource
from mmssl.data.shards import ShardIndex
from mmssl.data.sources import sample_keys
from mmssl.distributed import World
from mmssl.errors import UserError, console
from mmssl.files import atomic_write
from mmssl.inference import stored

LEAF = 8192
"""Most samples that are compared with each other; larger sets are divided first. The cost per sample grows with it."""
_ROWS = 1024
_SAMPLE = 1 << 14
"""Rows that tell the direction in which a set is divided."""
_ROUNDS = 10
"""Multiplications that find it."""
_KEY = "data.batching.neighbours"
_VERSION = 1
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Stored = npt.NDArray[np.float16] | Floats


def neighbour_groups(
    folder: Path,
    group: int,
    source: PlannedSource,
    indexes: Sequence[ShardIndex],
    *,
    most_lacking: float,
    world: World,
    say: Callable[[str], None],
) -> NeighbourGroups:
    """The groups of neighbours of a source, read from the folder of its embeddings, or found and stored there.

    Args:
        most_lacking: largest fraction of samples without an embedding (their images could not be decoded); these are
            grouped by chance, and counted.
        say: gets lines about the groups.

    Raises:
        UserError: the folder holds no embeddings, or those of other shards; too many samples lack one; or the folder
            cannot be written.
    """
    embeddings = _Embeddings(folder, indexes)
    digest = hashlib.blake2b(repr((_VERSION, source.fingerprint, embeddings.identity)).encode(), digest_size=8)
    path = folder / f"groups-of-{group}-{digest.hexdigest()}.npy"
    line = _read(path, source.samples)
    world.barrier()
    if line is None and world.rank == 0:
        line = _make(path, embeddings, group, most_lacking, say)
    world.barrier()
    if line is None:
        # On another machine that does not share the folder the groups are found again.
        line = _read(path, source.samples)
        line = _make(path, embeddings, group, most_lacking, say) if line is None else line
    found = NeighbourGroups(line, group)
    if world.broadcast(found.fingerprint) != found.fingerprint:
        raise UserError(f"{_KEY}: processes found different groups; copy {path} of the first machine to {folder}")
    say(f"data.batching: {len(line) // group:,} groups of {group} neighbours among {len(line):,} samples, from {path}")
    return found


def group_line(vectors: Stored, group: int) -> Ints:
    """All rows of `vectors` [N, D] (unit length) in an order in which each `group` of them in turn are neighbours,
    int64 [N]. The last N mod `group` are left over.

    The rows with the nearest neighbours come first: each that is still free takes its nearest free rows. More rows
    than LEAF are divided before, again and again, into halves along the direction in which they differ most.
    """
    found, waiting = [], [np.arange(len(vectors))]
    with Progress(console=console(stderr=True), transient=True, disable=not console(stderr=True).is_terminal) as bar:
        task = bar.add_task(f"groups of {group} neighbours", total=len(vectors))
        while waiting:
            rows = waiting.pop()
            if len(rows) > max(LEAF, 2 * group):
                # The left half first, so that what is left over comes last.
                waiting += reversed(_halves(vectors, rows, group))
                continue
            found.append(rows[_greedy(vectors[rows].astype(np.float32), group)])
            bar.advance(task, len(rows))
    return np.concatenate(found)


def _halves(vectors: Stored, rows: Ints, group: int) -> tuple[Ints, Ints]:
    """Two halves of `rows` along the first principal direction, the first of them a multiple of `group`.

    The direction is that of every n-th row, and rows are read a few at a time: all of them as float32 may be too many.
    """
    centred = vectors[rows[:: -(-len(rows) // _SAMPLE)]].astype(np.float32)
    centred -= centred.mean(0)
    direction = centred[np.argmax(np.square(centred).sum(1))]
    for _ in range(_ROUNDS):
        direction = centred.T @ (centred @ direction)
        direction /= max(float(np.linalg.norm(direction)), 1e-30)
    starts = range(0, len(rows), _SAMPLE)
    along = [vectors[rows[start : start + _SAMPLE]].astype(np.float32) @ direction for start in starts]
    order = rows[np.argsort(np.concatenate(along), kind="stable")]
    middle = len(order) // 2 // group * group
    return order[:middle], order[middle:]


def _greedy(values: Floats, group: int) -> Ints:
    """The rows in groups, those that are left over last."""
    free, left = np.ones(len(values), dtype=bool), len(values)
    found: list[Ints] = []
    near, near_values = np.arange(len(values)), values
    for seed in np.argsort(-_closeness(values, group), kind="stable") if left >= group else ():
        if not free[seed] or left < group:
            continue
        free[seed] = False
        if 2 * left < len(near):  # most rows are taken: compare with the free ones only
            near = np.flatnonzero(free)
            near_values = values[near]
        products = np.where(free[near], near_values @ values[seed], -np.inf)
        taken = near[np.argsort(-products, kind="stable")[: group - 1]]
        free[taken] = False
        left -= group
        found.append(np.array([seed, *taken], dtype=np.int64))
    return np.concatenate([*found, np.flatnonzero(free)])


def _closeness(values: Floats, group: int) -> Floats:
    """The mean cosine of each row with its group - 1 nearest others, [n]."""
    found = np.empty(len(values), dtype=np.float32)
    for start in range(0, len(values), _ROWS):
        products = values[start : start + _ROWS] @ values.T
        own = np.arange(len(products))
        products[own, start + own] = -np.inf
        found[start : start + _ROWS] = np.partition(products, -(group - 1), axis=1)[:, -(group - 1) :].mean(1)
    return found


class _Embeddings:
    """The stored embeddings of the samples of a source."""

    def __init__(self, folder: Path, indexes: Sequence[ShardIndex]) -> None:
        """
        Raises:
            UserError: there are none of a shard, or the shard changed since.
        """
        record = stored.read_record(folder)
        if record is None:
            raise UserError(f"{_KEY}={folder} holds no embeddings; make them: mmssl embed MODEL SHARDS --out {folder}")
        self._folder, self._indexes, self._record = folder, indexes, record
        find = stored.PartFinder(record)
        parts = [find(index.shard) for index in indexes]
        unknown = [index.shard for index, part in zip(indexes, parts, strict=True) if part is None]
        if unknown:
            raise UserError(
                f"{_KEY}={folder} has no embeddings of {len(unknown)} of {len(indexes)} training shards, such as "
                f"{unknown[0]}; embed all of them: mmssl embed MODEL SHARDS --out {folder}"
            )
        self._parts = [part for part in parts if part is not None]
        states = dict(zip(record.parts, record.states, strict=True))
        for index, part in zip(indexes, self._parts, strict=True):
            state = states[part]
            if (state is not None and state[0] != index.bytes) or not stored.vectors(folder, part).is_file():
                raise UserError(
                    f"{_KEY}={folder} has no embeddings of {index.shard} as it is now; call the same mmssl embed again"
                )
        self.identity = record.model, tuple(self._parts)

    def read(self, most_lacking: float) -> tuple[npt.NDArray[np.float16], Ints, list[str]]:
        """Embeddings [n, D], the numbers [n] of their samples, and the names of samples without one."""
        vectors, numbers, lacking, start = [], [], list[str](), 0
        for index, part in zip(self._indexes, self._parts, strict=True):
            array = stored.read_part(stored.vectors(self._folder, part), self._record)
            table = stored.read_table(stored.table(self._folder, part), len(array))
            rows = {key: row for row, key in enumerate(table.column("key").to_pylist())}
            keys = sample_keys(index)
            has = [(start + place, rows[key]) for place, key in enumerate(keys) if key in rows]
            lacking += [f"{index.shard}:{key}" for key in keys if key not in rows]
            start += len(keys)
            numbers.append(np.array([number for number, _ in has], dtype=np.int64))
            vectors.append(stored.as_unit(array[[row for _, row in has]]).astype(np.float16))
        if len(lacking) > most_lacking * start:
            raise UserError(
                f"{_KEY}={self._folder} lacks {len(lacking)} of {start} samples, such as {lacking[0]}, more than "
                f"data.bad_samples={most_lacking}; embed the shards again as they are now, into another folder"
            )
        return np.concatenate(vectors), np.concatenate(numbers), lacking


def _make(path: Path, embeddings: _Embeddings, group: int, most_lacking: float, say: Callable[[str], None]) -> Ints:
    """Find the groups, and store them."""
    vectors, numbers, lacking = embeddings.read(most_lacking)
    if lacking:
        say(f"data.batching: {len(lacking)} samples have no embedding, such as {lacking[0]}, and are grouped by chance")
    found = numbers[group_line(vectors, group)]
    others = np.setdiff1d(np.arange(len(numbers) + len(lacking)), numbers)
    # Only whole groups stay in front: the few that are left over join those without an embedding.
    line = np.concatenate([found, others])
    try:
        atomic_write(path, lambda partial: _save(partial, line))
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}; the groups are stored so that a resumed run has the same: "
            f"make the folder writable, or copy it"
        ) from None
    return line


def _save(path: Path, line: Ints) -> None:
    with path.open("wb") as file:  # np.save would add .npy to the name
        np.save(file, line)


def _read(path: Path, samples: int) -> Ints | None:
    """The stored groups; None if there are none, or the file is damaged."""
    try:
        line = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, TypeError, OverflowError, MemoryError):
        return None
    whole = line.dtype == np.int64 and line.shape == (samples,) and np.array_equal(np.sort(line), np.arange(samples))
    return line if whole else None
