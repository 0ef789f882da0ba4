"""The damage of one choice of quantizers after another, each measured once.

What was measured is kept in a file: an interrupted study goes on, and one with a budget does not measure
again what the ranking had measured.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from export.comparison import Comparison, Damage
from export.policy import LayerPrecision
from export.switches import Switches
from mmdit.artifact import digest


class Measurements:
    """`damage` sets the switches and compares, unless it has done so before.

    `identity` is the hash of everything else that the figures depend on; those of another are dropped.
    """

    def __init__(self, switches: Switches, comparison: Comparison, path: Path, identity: str) -> None:
        self.comparison = comparison
        self._switches = switches
        self._path = path
        self._identity = identity
        self._known: dict[str, dict[str, object]] = {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["identity"] == identity:
                self._known = found["damages"]
        except (OSError, ValueError, KeyError, TypeError):
            pass

    def damage(
        self,
        layers: Mapping[str, LayerPrecision],
        *,
        attention: bool,
        after_call: Callable[[], None] = lambda: None,
    ) -> Damage:
        """The damage with exactly these layers, and attention's products or not, quantized.

        `after_call` is called `comparison.calls` times, also when nothing had to be run.
        """
        key = digest([{name: precision.value for name, precision in layers.items()}, attention])
        if key in self._known:
            for _ in range(self.comparison.calls):
                after_call()
            return Damage.model_validate(self._known[key])
        self._switches.set(layers, attention=attention)
        found = self.comparison.measure(after_call)
        self._known[key] = found.model_dump()
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps({"identity": self._identity, "damages": self._known}))
        partial.replace(self._path)
        return found
