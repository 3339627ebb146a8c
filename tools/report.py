# SPDX-License-Identifier: Apache-2.0
"""Draws the report of the main job: one self-contained HTML page, charts and selection maps as inline SVG.

Standard library only. `render(summary, steps, curve, maps)` returns the page; tools/main_job.py writes it. Tested in
tests/integration/test_report.py.
"""

import html
import math

INK, MUTED, GRID = "#1c2733", "#6b7785", "#e3e8ee"
COLOURS = ("#1f6feb", "#d9480f", "#2b8a3e", "#8250df", "#b08800")
MODES = {"dense": "dense", "sparse": "MSA", "window": "sink + window", "oracle": "true-mass blocks"}

STYLE = f"""
body {{ font: 16px/1.55 system-ui, sans-serif; color: {INK}; max-width: 62rem; margin: 2.5rem auto; padding: 0 1.2rem; }}
h1 {{ font-size: 1.9rem; margin-bottom: .2rem; }} h2 {{ font-size: 1.25rem; margin-top: 2.4rem; }}
p.lead {{ color: {MUTED}; margin-top: 0; }}
table {{ border-collapse: collapse; margin: .8rem 0; }}
th, td {{ padding: .32rem .9rem .32rem 0; border-bottom: 1px solid {GRID}; text-align: right; }}
th {{ color: {MUTED}; font-weight: 600; font-size: .85rem; }} th:first-child, td:first-child {{ text-align: left; }}
figure {{ margin: 1rem 0; }} figcaption {{ color: {MUTED}; font-size: .88rem; }}
.row {{ display: flex; flex-wrap: wrap; gap: 1.2rem; }} pre {{ background: #f6f8fa; padding: .8rem 1rem; white-space: pre-wrap; }}
svg text {{ font: 12px system-ui, sans-serif; fill: {MUTED}; }}
"""


def escape(value):
    return html.escape(str(value))


def number(value, digits=3):
    """A figure for a table; a dash where there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.{digits}f}"


def table(header, rows):
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def ticks(low, high, count=5):
    """Round values that cover [low, high]."""
    if not high > low:
        high = low + 1
    raw = (high - low) / count
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * 0.999)
    first = math.floor(low / step) * step
    values = [first]
    while values[-1] < high - 1e-9:
        values.append(values[-1] + step)
    return values


def line_chart(title, series, x_label, y_label, marks=(), width=460, height=270):
    """series: {name: [(x, y), ...]}; marks: [(x, label)] vertical lines."""
    points = [point for values in series.values() for point in values]
    if not points:
        return ""
    left, right, top, bottom = 54, 14, 30, 42
    xs = ticks(min(x for x, _ in points), max(x for x, _ in points))
    ys = ticks(min(y for _, y in points), max(y for _, y in points))

    def px(x):
        return left + (x - xs[0]) / (xs[-1] - xs[0]) * (width - left - right)

    def py(y):
        return height - bottom - (y - ys[0]) / (ys[-1] - ys[0]) * (height - top - bottom)

    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{escape(title)}">']
    parts.append(f'<text x="{left}" y="16" style="font-weight:600;fill:{INK}">{escape(title)}</text>')
    for y in ys:
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{py(y):.1f}" y2="{py(y):.1f}" stroke="{GRID}"/>')
        parts.append(f'<text x="{left - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in xs:
        parts.append(f'<text x="{px(x):.1f}" y="{height - bottom + 16}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>')
    for x, label in marks:
        parts.append(f'<line x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{top}" y2="{height - bottom}" stroke="{MUTED}" stroke-dasharray="3 3"/>')
        parts.append(f'<text x="{px(x) + 4:.1f}" y="{height - bottom - 6}">{escape(label)}</text>')
    for index, (name, values) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in values)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(series) > 1:  # the legend stands beside the title, where no curve runs
            x = width - right - 105 * (len(series) - index)
            parts.append(f'<rect x="{x}" y="7" width="10" height="10" fill="{colour}"/>')
            parts.append(f'<text x="{x + 15}" y="16">{escape(name)}</text>')
    parts.append(f"</svg><!-- {escape(y_label)} -->")
    return "".join(parts)


def heat_colour(value):
    """White to deep blue; the square root lifts rare blocks out of the background."""
    t = math.sqrt(min(max(value, 0.0), 1.0))
    low, high = (247, 250, 255), (9, 55, 130)
    return "#" + "".join(f"{round(a + (b - a) * t):02x}" for a, b in zip(low, high))


def heatmap(rows, caption, size=250):
    """rows[query block][key block]: share of the block's queries that chose the key block."""
    blocks = len(rows)
    if blocks == 0:
        return ""
    cell = size / blocks
    parts = [f'<svg viewBox="0 0 {size} {size}" width="{size}" height="{size}" role="img" aria-label="{escape(caption)}">',
             f'<rect width="{size}" height="{size}" fill="#fbfcfd"/>']
    for query, row in enumerate(rows):
        for key, value in enumerate(row[: query + 1]):
            if value > 0.004:
                parts.append(f'<rect x="{key * cell:.2f}" y="{query * cell:.2f}" width="{cell:.2f}" height="{cell:.2f}" fill="{heat_colour(value)}"/>')
    parts.append(f'<path d="M0 0L{size} {size}" stroke="{MUTED}" stroke-width=".5" fill="none"/></svg>')
    return f"<figure>{''.join(parts)}<figcaption>{escape(caption)}</figcaption></figure>"


def perplexity_rows(perplexity):
    """One row an attention: perplexity and ratio to dense, over all positions and the last 1024."""
    names = [("dense", "dense"), ("sparse_1_4", "MSA, 1/4 of the context"), ("sparse_1_8", "MSA, 1/8 of the context"),
             ("oracle_1_8", "true-mass blocks, 1/8 (upper bound)"), ("window_1_8", "sink + window, 1/8")]
    rows = []
    for key, label in names:
        if perplexity.get(key) is None:
            continue
        row = [label]
        for suffix in ("", "_last1024"):
            value, dense = perplexity.get(key + suffix), perplexity.get("dense" + suffix)
            row += [number(value), number(value / dense) if value and dense else "–"]
        rows.append(row)
    return rows


def passkey_rows(passkey):
    lengths = sorted({int(length) for results in passkey.values() for length in results})
    rows = []
    for mode, results in passkey.items():
        cells = [f"{results[str(n)][0]} / {results[str(n)][1]}" if str(n) in results else "–" for n in lengths]
        rows.append([MODES.get(mode, mode), *cells])
    return ["", *(f"{n} tokens" for n in lengths)], rows


def speed_rows(speed, attention):
    rows = []
    for phase in ("prefill", "decode"):
        dense, sparse = speed.get(f"{phase}_dense"), speed.get(f"{phase}_sparse")
        if not dense or not sparse:
            continue
        dense_ms, sparse_ms = attention.get(f"{phase}_dense"), attention.get(f"{phase}_sparse")
        ratio = f"{dense_ms / sparse_ms:.1f}x" if dense_ms and sparse_ms else "–"
        rows.append([phase, number(dense, 1), number(sparse, 1), number(dense_ms, 2), number(sparse_ms, 2), ratio])
    return rows


def render(summary, curve, maps, answer):
    """summary: out/summary.json; curve: lines of the training log; maps: [{layer, group, rows}]; answer: generated text."""
    kl = [(e["step"], e["kl"]) for e in curve if e.get("kl") is not None]
    recalls = {
        name: [(e["step"], e[key]) for e in curve if e.get(key) is not None]
        for name, key in (("score recall", "score_recall"), ("block recall", "block_recall"))
    }
    stages = [(e["step"], e["stage"]) for i, e in enumerate(curve) if i > 0 and e.get("stage") != curve[i - 1].get("stage")]
    recall = summary["recall"]
    page = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>From dense to sparse</title>",
        f"<style>{STYLE}</style><h1>From a dense model to a sparse one</h1>",
        f"<p class='lead'>{escape(summary.get('model', 'model'))}, context {escape(summary.get('context', ''))}: an index branch was "
        "added to the dense model, aligned with its attention by the KL loss, and measured beside the dense model and two "
        "baselines of the same budget.</p>",
        "<h2>Perplexity</h2>",
        table(["attention", "all positions", "÷ dense", "last 1024", "÷ dense"], perplexity_rows(summary["perplexity"])),
        "<h2>What the index finds</h2>",
        table(["", "block recall", "score recall"],
              [["after convert, untrained", number(recall.get("block_untrained")), number(recall.get("score_untrained"))],
               ["after training", number(recall.get("block")), number(recall.get("score"))]]),
        "<div class='row'>",
        line_chart("KL of teacher and index", {"KL": kl}, "step", "KL", stages),
        line_chart("Recall on held-out rows", {k: v for k, v in recalls.items() if v}, "step", "recall", stages),
        "</div><h2>Passkey retrieval</h2>",
    ]
    header, rows = passkey_rows(summary["passkey"])
    page.append(table(header, rows))
    page.append("<h2>Speed</h2>")
    page.append(table(["", "dense tokens/s", "MSA tokens/s", "dense attention ms/token", "MSA attention ms/token", "attention speed-up"],
                      speed_rows(summary["tokens_per_second"], summary.get("attention_ms_per_token", {}))))
    if maps:
        page.append("<h2>Which blocks queries choose</h2><p class='lead'>Rows are query blocks, columns key blocks; the darker, the "
                    "more of a block's queries chose it. The left column is the sink, the diagonal the local block.</p><div class='row'>")
        page += [heatmap(m["rows"], f"layer {m['layer']}, group {m['group']}") for m in maps]
        page.append("</div>")
    if answer:
        page.append(f"<h2>An answer about a long document</h2><pre>{escape(answer)}</pre>")
    page.append("<h2>Time</h2>")
    page.append(table(["step", "seconds"], [[name, number(seconds, 1)] for name, seconds in summary["seconds"].items()]))
    page.append("</html>")
    return "\n".join(page)
