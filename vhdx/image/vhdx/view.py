# SPDX-License-Identifier: MIT
"""Which of its copies a damaged image is looked at through: for forensics, never for writing."""

from __future__ import annotations

from dataclasses import dataclass

from vhdx.errors import DamagedError, InvalidArgumentError, Reason
from vhdx.format import header as headers
from vhdx.format import log as logs

__all__ = ["AS_SPECIFIED", "View"]


@dataclass(frozen=True)
class View:
    """What is looked at where a file says something more than once.

    Attributes:
        header: copy 1 or 2, current or not; None for the current one.
        region_table: copy 1 or 2; None for the first that is valid.
        log: replay the active sequence in memory (None), nothing (0), or the sequence whose last
            entry has this sequence number, such as ``vhdx dump log`` shows.
    """

    header: int | None = None
    region_table: int | None = None
    log: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("header", self.header), ("region table", self.region_table)):
            if value not in {None, 1, 2}:
                raise InvalidArgumentError(f"there is no {name} {value}", hint="choose 1 or 2")
        if self.log is not None and not 0 <= self.log < 1 << 64:
            raise InvalidArgumentError(f"{self.log} is no sequence number")

    def choose_header(self, copies: list[headers.Header | None]) -> headers.Header:
        """One of the two copies.

        Raises:
            DamagedError: it is not valid.
        """
        if self.header is None:
            return headers.choose_header(copies[0], copies[1])
        found = copies[self.header - 1]
        if found is None:
            raise DamagedError(
                f"header {self.header} is not valid",
                reason=Reason.HEADERS,
                offset=headers.HEADER_OFFSETS[self.header - 1],
            )
        return headers.choose_header(found, None)  # it must say what can be, all the same

    def choose_sequence(self, data: bytes, header: headers.Header) -> logs.Sequence | None:
        """What of the log in ``data`` is replayed.

        Raises:
            DamagedError: there is no such sequence.
        """
        if self.log is None:
            return logs.find_active_sequence(data, header.log_guid, header.log_offset)
        if self.log == 0:
            return None
        found = logs.find_sequence(data, header.log_guid, header.log_offset, self.log)
        if found is None:
            raise DamagedError(
                f"the log has no valid sequence that ends with entry {self.log}",
                reason=Reason.LOG_EMPTY,
                offset=header.log_offset,
                hint="vhdx dump log shows what is there",
            )
        return found


AS_SPECIFIED = View()
"""As every other reader looks at an image ([MS-VHDX] 2.2.2, 2.2.3, 2.3.3)."""
