"""A fault written by hand."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Planted:
    """`before`, which stands in the file exactly once, becomes `after`. host: it is code of the launcher."""

    file: str
    before: str
    after: str
    host: bool = False
