# SPDX-License-Identifier: MIT
"""Selects the copies of its structures to read a damaged image through; never for writing."""

from __future__ import annotations

from dataclasses import dataclass

from vhdx.errors import DamagedError, InvalidArgumentError, Reason
from vhdx.format import header as headers
from vhdx.format import log as logs

__all__ = ["AS_SPECIFIED", "View"]


@dataclass(frozen=True)
class View:
    """Which copy to read where a file has several copies of a structure.

    Attributes:
        header: copy 1 or 2, current or not; None for the current one.
        region_table: copy 1 or 2; None for the first valid one.
        log: None replays the active sequence in memory, and 0 replays nothing. Any other number
            replays the sequence whose last entry has this number (see ``vhdx dump log``).
    """

    header: int | None = None
    region_table: int | None = None
    log: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("header", self.header), ("region table", self.region_table)):
            if value not in {None, 1, 2}:
                raise InvalidArgumentError(f"there is no {name} {value}", hint="choose 1 or 2")
        if self.log is not None and not 0 <= self.log < 1 << 64:
            raise InvalidArgumentError(f"{self.log} is not a valid sequence number")

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
        return headers.choose_header(found, None)  # validates its fields, too

    def choose_sequence(self, data: bytes, header: headers.Header) -> logs.Sequence | None:
        """The sequence to replay from the log in ``data``, or None.

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
"""The copies that [MS-VHDX] 2.2.2, 2.2.3 and 2.3.3 prescribe."""
