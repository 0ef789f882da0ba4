"""Where sharing a call pays, told by a table of what calls take by their rows.

At small sizes and on small models it multiplies throughput; at 1024² on a large one the GPU is full with one
request, and sharing only delays.
"""

from collections.abc import Mapping

GAIN = 0.1  # of the time that a request's rows would take alone: less is not worth another's wait


def rows_worth(milliseconds: Mapping[int, float], most: int, gain: float = GAIN) -> int:
    """The most rows, up to `most`, of which each pair saves `gain` of the time that it would take alone.

    `milliseconds`: rows of a call → its time; between two entries a line, beyond the last its slope. A pair
    of rows is a request with guidance. With 20 + 2 r ms another pair costs 4 ms in place of 24; with 19.4 r
    ms it saves nothing, and calls are not shared.
    """
    known = sorted(milliseconds)

    def time(rows: int) -> float:
        after = next((index for index, each in enumerate(known) if each >= rows), len(known) - 1)
        low, high = known[max(after - 1, 0)], known[max(after, 1)]
        slope = (milliseconds[high] - milliseconds[low]) / (high - low)
        return milliseconds[low] + slope * (rows - low)

    if len(known) < 2:
        return most
    rows = 2
    while rows + 2 <= most and time(rows + 2) - time(rows) <= (1 - gain) * time(2):
        rows += 2
    return most if rows + 1 == most and rows > 2 else min(rows, most)
