"""What has been found out about the layers, their storage, order and entries, holds as long as this count does."""

from __future__ import annotations


class Changes:
    """How often something changed that addresses or indices may have been taken of: in any layer of the process, as
    changes are rare and asking is not."""

    count = 0

    def add(self) -> None:
        self.count += 1


changes = Changes()
