"""The audit as a page: what was done to each layer, in colours. One file, no network."""

import html
from collections.abc import Iterable
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px;
  margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: .5em 0 2em; width: 100% }
th, td { padding: .25em .7em; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd }
th { position: sticky; top: 0; background: #fff }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.fp8, .fp8-weights, .fp16, .fp32 { border-radius: 3px; padding: 0 .4em; white-space: nowrap }
.fp8 { background: #cdeac0 } .fp8-weights { background: #e3f0c4 } .fp16 { background: #e4e7eb }
.fp32 { background: #ffd9b3 } .good { color: #176b2c } .bad { color: #b3261e; font-weight: 600 }
.bar { display: flex; height: 1.6em; border-radius: 4px; overflow: hidden; margin: .3em 0 1em;
  font-size: 13px }
.bar span { overflow: hidden; text-align: center; border-radius: 0; line-height: 1.6em }
"""
_HEADINGS = ("layer", "precision", "input amax", "scale", "weight amax", "FLOPs", "bytes", "of FP16")


def page(name: str, content: dict[str, Any]) -> str:
    """The audit's content (of `audit.json`) as HTML."""
    totals, layers, attention = content["totals"], content["layers"], content["attention"]
    broken = sum(len(rule["broken"]) for rule in content["rules"])
    flops = sum(layer["flops"] for layer in layers)
    saved = totals["weight_bytes"] / totals["weight_bytes_fp16"]
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{html.escape(name)}: FP8 audit</title>",
        f"<style>{_STYLE}</style>",
        f"<h1>{html.escape(name)}: what FP8 does to each layer</h1>",
        f"<p>FP8 runs <b>{totals['linear_flops_in_fp8']:.1%}</b> of the linear FLOPs and "
        f"<b>{totals['all_flops_in_fp8']:.1%}</b> of all FLOPs of the MMDiT; its weights take "
        f"<b>{saved:.1%}</b> of FP16's bytes ({_size(totals['weight_bytes'])} for "
        f"{_size(totals['weight_bytes_fp16'])}). "
        f"Attention's two products are {attention[0]['precision'].upper()}. "
        + (
            "Every placement rule holds."
            if not broken
            else f"<span class=bad>{broken} places break a rule.</span>"
        ),
        "</p><h2>Linear FLOPs</h2>",
        _bar((layer["precision"], layer["flops"]) for layer in layers),
        "<h2>Weight bytes in FP16 that became</h2>",
        _bar((layer["precision"], layer["bytes_fp16"]) for layer in layers),
        "<h2>Overflow remedies</h2>",
        _remedies(content["remedies"]),
        "<h2>Q/DQ placement</h2>",
        _table(
            ("rule", "places", ""),
            (
                (
                    html.escape(rule["rule"]),
                    _number(f"{rule['places']:,}"),
                    "<td class=good>kept"
                    if not rule["broken"]
                    else f"<td class=bad>{html.escape(rule['broken'][0])}",
                )
                for rule in content["rules"]
            ),
        ),
    ]
    shares: dict[str, int] = {}
    for layer in layers:
        shares[layer["group"]] = shares.get(layer["group"], 0) + layer["flops"]
    for group in sorted(shares, key=lambda name: -shares[name]):
        members = [layer for layer in layers if layer["group"] == group]
        share = shares[group] / flops
        reasons = dict.fromkeys(layer["reason"] for layer in members)
        parts.append(f"<h2>{html.escape(group)}: {len(members)} layers, {share:.1%} of the linear FLOPs</h2>")
        parts.append(f"<p>{html.escape('; '.join(reasons))}.</p>")
        parts.append(_table(_HEADINGS, (_layer(layer) for layer in members)))
    parts.append("<h2>Attention's products</h2>")
    parts.append(
        _table(
            ("module", "precision", "FLOPs", "scales of q, k, softmax, v"),
            (
                (
                    html.escape(product["name"]),
                    _precision(product["precision"]),
                    _number(_count(product["flops"])),
                    ", ".join(f"{operand} {scale:.3g}" for operand, scale in product["scales"].items())
                    or "none",
                )
                for product in attention
            ),
        )
    )
    return "\n".join(parts)


def _layer(layer: dict[str, Any]) -> tuple[str, ...]:
    def number(value: float | None) -> str:
        return _number("" if value is None else f"{value:.4g}")

    return (
        html.escape(layer["name"]),
        _precision(layer["precision"]),
        number(layer["amax"]),
        number(layer["scale"]),
        number(layer["weight_amax"]),
        _number(_count(layer["flops"])),
        _number(f"{layer['bytes']:,}"),
        _number(f"{layer['bytes'] / layer['bytes_fp16']:.0%}"),
    )


def _remedies(remedies: list[dict[str, Any]]) -> str:
    if not remedies:
        return "<p>None: the scan found nothing that FP16 cannot hold.</p>"
    return _table(
        ("component", "remedy", "where", "called for by", "magnitude"),
        (
            (
                each["component"],
                html.escape(each["remedy"]),
                html.escape(each["place"] or "all of it"),
                html.escape(each["tensor"]),
                _number(f"{each['magnitude']:.4g}"),
            )
            for each in remedies
        ),
    )


def _bar(shares: Iterable[tuple[str, float]]) -> str:
    amounts: dict[str, float] = {}
    for precision, amount in shares:
        amounts[precision] = amounts.get(precision, 0) + amount
    whole = sum(amounts.values())
    spans = [
        f'<span class="{precision}" style="width:{100 * amount / whole:.2f}%"'
        f' title="{precision} {amount / whole:.1%}">'
        f"{precision} {amount / whole:.1%}</span>"
        for precision, amount in sorted(amounts.items(), key=lambda item: -item[1])
    ]
    return f"<div class=bar>{''.join(spans)}</div>"


def _table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["".join(cell if cell.startswith("<td") else f"<td>{cell}" for cell in row) for row in rows]
    return f"<table><tr>{''.join(f'<th>{heading}' for heading in headings)}<tr>{'<tr>'.join(lines)}</table>"


def _precision(name: str) -> str:
    return f'<span class="{name}">{name}</span>'


def _number(text: str) -> str:
    return f"<td class=number>{text}"


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _count(flops: float) -> str:
    return f"{flops / 1e9:,.1f} G" if flops >= 1e9 else f"{flops / 1e6:,.2f} M"
