"""The report's tables about the layers of the FP8 MMDiT: from the export's audit.json."""

import html
from collections import Counter
from typing import Any

# column → heading; what no layer has is left out
_COLUMNS = {
    "name": "layer",
    "group": "group",
    "precision": "precision",
    "flops": "MFLOP a row",
    "weights": "weights",
    "bytes_fp16": "bytes in FP16",
    "bytes": "bytes",
    "weight_amax": "largest weight",
    "weight_scale": "weight scale",
    "amax": "largest input",
    "scale": "input scale",
    "reason": "reason",
}
_NAMES = {"fp8": "FP8", "fp8-weights": "FP8 weights", "fp16": "FP16", "fp32": "FP32"}


def layer_tables(audit: dict[str, Any]) -> str:
    """Layers, totals, remedies against overflow, placement rules: as far as the audit tells them."""
    content = audit
    layers: list[dict[str, Any]] = content["layers"]
    parts = [_by_precision(layers)]
    if products := content.get("attention"):
        counts = Counter(_NAMES.get(each["precision"], each["precision"]) for each in products)
        told = ", ".join(f"{count} in {html.escape(name)}" for name, count in counts.items())
        parts.append(f"<p>Attention's matrix products, by module: {told}.</p>")
    if totals := content.get("totals"):
        cells = "".join(
            f"<tr><td>{_words(name)}<td class=number>{_value(value)}" for name, value in totals.items()
        )
        parts.append(f"<h3>Totals</h3><table>{cells}</table>")
    parts.append(_remedies(content.get("remedies")))
    parts.append(_rules(content.get("rules")))
    columns = [name for name in _COLUMNS if any(layer.get(name) is not None for layer in layers)]
    head = "".join(f"<th>{_COLUMNS[name]}" for name in columns)
    rows = "".join(f"<tr>{''.join(_cell(name, layer.get(name)) for name in columns)}" for layer in layers)
    parts.append(
        f"<details><summary>Each of the {len(layers)} layers</summary><div class=wide><table class=layers>"
        f"<tr>{head}{rows}</table></div></details>"
    )
    return "".join(parts)


def _by_precision(layers: list[dict[str, Any]]) -> str:
    """One row for each precision and reason: how many layers, and their share of FLOPs and weights."""
    groups = Counter((layer.get("precision", ""), layer.get("reason", "")) for layer in layers)
    sums = {
        field: {
            key: sum(
                layer.get(field) or 0
                for layer in layers
                if (layer.get("precision", ""), layer.get("reason", "")) == key
            )
            for key in groups
        }
        for field in ("flops", "weights")
    }
    rows = ["<tr><th>precision<th>layers<th>share of linear FLOPs<th>share of weights<th>why"]
    order = list(_NAMES)
    for key in sorted(groups, key=lambda key: (order.index(key[0]) if key[0] in order else 9, -groups[key])):
        shares = [
            f"{100 * sums[field][key] / max(1, sum(sums[field].values())):.1f} %"
            for field in ("flops", "weights")
        ]
        rows.append(
            f"<tr><td>{_NAMES.get(key[0], html.escape(key[0]))}<td class=number>{groups[key]}"
            f"{''.join(f'<td class=number>{share}' for share in shares)}<td>{html.escape(key[1])}"
        )
    return f"<table>{''.join(rows)}</table>"


def _remedies(remedies: list[dict[str, Any]] | None) -> str:
    if remedies is None:
        return ""
    if not remedies:
        return "<h3>Overflow in FP16</h3><p>Nothing overflows in FP16: no remedy was needed.</p>"
    fields = ("component", "place", "remedy", "magnitude", "reason")
    rows = "".join(f"<tr>{''.join(f'<td>{_value(each.get(name))}' for name in fields)}" for each in remedies)
    head = "".join(f"<th>{name}" for name in fields)
    return f"<h3>Overflow in FP16</h3><table><tr>{head}{rows}</table>"


def _rules(rules: list[dict[str, Any]] | None) -> str:
    if not rules:
        return ""
    rows = []
    for rule in rules:
        broken = rule.get("broken") or []
        told = (
            f"<td class=bad>broken at {_value(', '.join(map(str, broken)))}"
            if broken
            else "<td class=good>kept"
        )
        rows.append(f"<tr><td>{_value(rule.get('rule'))}<td class=number>{_value(rule.get('places'))}{told}")
    return f"<h3>Q/DQ placement</h3><table><tr><th>rule<th>places<th>{''.join(rows)}</table>"


def _cell(name: str, value: Any) -> str:
    if name == "precision":
        return f"<td>{_NAMES.get(str(value), html.escape(str(value)))}"
    if isinstance(value, (int, float)):
        return (
            f"<td class=number>{value / 1e6:,.1f}" if name == "flops" else f"<td class=number>{_value(value)}"
        )
    return f"<td class=number>{_value(value)}" if isinstance(value, list) else f"<td>{_value(value)}"


def _words(name: str) -> str:
    return html.escape(name.replace("_", " "))


def _value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1 else f"{value:.4g}"
    if isinstance(value, list):  # the smallest and the largest of a scale for each channel
        return " to ".join(_value(each) for each in value)
    return f"{value:,}" if isinstance(value, int) else html.escape(str(value))
