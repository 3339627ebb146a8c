# SPDX-License-Identifier: Apache-2.0
"""The report page: well-formed, complete with missing figures, and nothing of a user's text unescaped."""

import math
import sys
import xml.etree.ElementTree as ElementTree

import pytest


@pytest.fixture()
def report(root):
    sys.path.insert(0, str(root / "tools"))
    try:
        import report as module
    finally:
        sys.path.pop(0)
    return module


def make_summary():
    return {
        "model": "tiny", "context": 256,
        "perplexity": {"dense": 10.0, "sparse_1_4": 10.1, "sparse_1_8": 10.2, "window_1_8": 11.0, "oracle_1_8": 10.05,
                       "dense_last1024": None},
        "recall": {"block": 0.9, "score": 0.97, "block_untrained": 0.5, "score_untrained": math.nan},
        "passkey": {"dense": {"256": [3, 4]}, "sparse": {"256": [2, 4]}},
        "tokens_per_second": {"prefill_dense": 100.0, "prefill_sparse": 150.0, "decode_dense": 10.0, "decode_sparse": 12.0},
        "seconds": {"convert": 1.5},
    }


def test_page_holds_every_figure(report):
    curve = [{"step": i, "stage": "warmup" if i < 5 else "sparse", "kl": 1.0 / (i + 1), "block_recall": 0.5, "score_recall": None}
             for i in range(10)]
    page = report.render(make_summary(), curve, [{"layer": 1, "group": 0, "rows": [[1.0], [0.5, 1.0]]}], "<script>alert(1)</script>")
    assert "10.200" in page and "1.020" in page and "2 / 4" in page and "layer 1, group 0" in page
    assert "<script>" not in page and "&lt;script&gt;" in page
    for start in [i for i in range(len(page)) if page.startswith("<svg", i)]:
        ElementTree.fromstring(page[start : page.index("</svg>", start) + 6])


def test_page_without_curve_or_maps(report):
    assert "</html>" in report.render(make_summary(), [], [], "")


def test_ticks_cover_the_range(report):
    for low, high in [(0, 1), (0, 0), (-3, 250), (0.001, 0.0011), (5, 5.0001)]:
        values = report.ticks(low, high)
        assert values[0] <= low and values[-1] >= high - 1e-9 and 2 <= len(values) <= 12
