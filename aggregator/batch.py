"""What one reading of the log says: rows as columns, and what could not be a row."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aggregator.seen import Keys
from meters.log import Record


class Chunk(NamedTuple):
    """Rows of one organization, as columns."""

    rows: pa.RecordBatch
    keys: Keys
    raws: Sequence[bytes]
    stamped: npt.NDArray[np.bool_]  # whether the line carried its own timestamp
    organization_id: str


class Batch(NamedTuple):
    """``positions`` are the next offsets after it, for the partitions it moved, and ``last`` the records before.

    ``organizations`` and ``subjects`` are those that were numbered on the way.
    """

    chunks: list[Chunk]
    dead: pa.Table  # of ``aggregator.letters``
    positions: dict[int, int]
    last: dict[int, Record]
    lines: int
    organizations: list[tuple[int, str]]
    subjects: list[tuple[int, int, str, str]]
