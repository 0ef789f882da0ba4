"""Where sharing a call pays, told by a table of what calls take by their rows.

At small sizes and on small models it multiplies throughput; at 1024² on a large one the GPU is full with one
request, and sharing only delays.
"""

from collections.abc import Mapping

GAIN = 0.1  # of the time that a request's rows would take alone: less is not worth another's wait


def milliseconds_of(table: Mapping[int, float], rows: int) -> float:
    """What a call of `rows` rows takes: between two entries of a table a line, beyond the last its slope.

    `table`: rows → milliseconds, two entries at least.
    """
    known = sorted(table)
    after = next((index for index, each in enumerate(known) if each >= rows), len(known) - 1)
    low, high = known[max(after - 1, 0)], known[max(after, 1)]
    return table[low] + (table[high] - table[low]) / (high - low) * (rows - low)


def profitable_rows(table: Mapping[int, float], most: int, gain: float = GAIN) -> int:
    """The most rows, up to `most`, of which each pair saves `gain` of the time that it would take alone.

    A pair of rows is a request with guidance. With 20 + 2 r ms another pair costs 4 ms in place of 24; with
    19.4 r ms it saves nothing, and calls are not shared: 2, or 1 where not even requests without guidance,
    which take one row, save anything together. One entry tells nothing: then all rows are worth it.
    """
    if len(table) < 2:
        return most
    rows, alone = 2, milliseconds_of(table, 2)
    while rows + 2 <= most:
        if milliseconds_of(table, rows + 2) - milliseconds_of(table, rows) > (1 - gain) * alone:
            break
        rows += 2
    if rows == 2 and alone - milliseconds_of(table, 1) > (1 - gain) * milliseconds_of(table, 1):
        return 1
    return most if rows + 1 == most and rows > 2 else min(rows, most)
