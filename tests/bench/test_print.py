"""The page on paper and for readers who prefer dark, in a real browser that is told so over its debugging pipe."""

from __future__ import annotations

import re
import zlib

from dlops.bench.results import Measured
from dlops.report import Profile, ProfiledOperator, ProviderUse

# Between the margins of A4 at 96 pixels an inch.
PAPER_WIDTH = 703
# Of small text, by the Web Content Accessibility Guidelines.
LEAST_CONTRAST = 4.5
# [contrast, text] of everything readable, against the nearest ground that is opaque. The text inside the bars of a
# waterfall lies on shapes, which is no ground that styles tell of; its colours are fixed in the style sheet.
CONTRASTS = """(() => {
  const parse = (text) => [...text.match(/[\\d.]+/g).map(Number), 1].slice(0, 4);
  const luminance = (colour) => {
    const [red, green, blue] = colour.slice(0, 3).map((value) => value / 255)
      .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue; };
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), own = walker.currentNode.parentElement;
    if (!text || !own.getClientRects().length || own.matches(".inside")) continue;
    const style = getComputedStyle(own);
    const ink = luminance(parse(own.closest("svg") ? style.fill : style.color));
    let one = own;
    while (one.parentElement && parse(getComputedStyle(one).backgroundColor)[3] < 1) one = one.parentElement;
    const behind = parse(getComputedStyle(one).backgroundColor);
    const ground = behind[3] < 1 ? 1 : luminance(behind);
    found.push([(Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05), text]);
  }
  return found; })()"""


def _with_a_profile(measured: Measured) -> Measured:
    operator = ProfiledOperator(name="conv", op_type="Conv", provider="cpu", calls=7, total_ns=9, share=0.2)
    profile = Profile(
        target="digits/onnx-int8", artifact="onnx-int8", runtime="onnxruntime", provider="cpu", device="cpu", threads=1,
        batch=1, calls=10, total_ns=3_000_000, operators=(operator,) * 4, others=2, others_share=0.1, outside_share=0.1,
        op_types=dict.fromkeys(("Conv", "Gemm", "Relu", "Add", "Mul", "Pad", "Tanh", "Exp"), 0.1125),
        providers={"cpu": ProviderUse(operators=6, share=0.9)}, trace="trace00", traced_calls=3,
    )  # fmt: skip
    return Measured(report=measured.report.model_copy(update={"profiles": (profile,)}), samples=measured.samples)


def _with_every_column(measured: Measured, *, rows: int) -> Measured:
    """The example's variants again and again under long names, with every number that a table can have."""
    base = measured.measurements[1]
    filled = {
        "provider": "TensorrtExecutionProvider", "accuracy": 0.9861, "accuracy_samples": 10_000, "flips": 1234,
        "drop_points": 0.28, "model_bytes": 97_000_000, "speedup": base.speedup, "service": base.latency,
        "energy_j_per_item": 0.0123, "peak_memory_bytes": 1_200_000_000,
        "load": base.load.model_copy(update={"metric": "p99"}),
    }  # fmt: skip
    made = [
        base.model_copy(update=filled | {"target": slug, "artifact": slug})
        for slug in (f"openvino-int8-pruned50-sparse24-{number}" for number in range(rows))
    ]
    report = measured.report.model_copy(update={"measurements": tuple(made), "chosen": None, "chosen_because": None})
    return Measured(report=report, samples=measured.samples)


def test_all_text_stands_out_on_light_and_dark_screens_and_paper_is_white_for_all(example, open_tab) -> None:
    tab = open_tab(_with_a_profile(example()))
    for paper, dark, ground in (
        (False, False, "rgb(246, 247, 249)"), (False, True, "rgb(16, 20, 27)"), (True, False, "rgb(255, 255, 255)"),
        (True, True, "rgb(255, 255, 255)"),
    ):  # fmt: skip
        tab.be(width=PAPER_WIDTH if paper else 1200, paper=paper, dark=dark)
        assert tab.tell("getComputedStyle(document.body).backgroundColor") == ground
        contrasts = tab.tell(CONTRASTS)
        assert len(contrasts) > 150
        assert [text for contrast, text in contrasts if contrast < LEAST_CONTRAST] == [], (paper, dark)
        assert tab.tell("document.documentElement.scrollWidth <= innerWidth")


def test_a_table_with_every_column_fits_on_paper_and_breaks_between_its_rows(example, open_tab) -> None:
    tab = open_tab(_with_every_column(example(), rows=32))
    tab.be(width=PAPER_WIDTH, paper=True)
    assert tab.tell("document.querySelectorAll('thead th').length") == 12
    assert tab.tell("document.documentElement.scrollWidth") <= PAPER_WIDTH
    cut = "[...document.querySelectorAll('.scroll')].filter((one) => one.scrollWidth > one.clientWidth).length"
    assert tab.tell(cut) == 0
    assert (
        tab.tell("new Set([...document.querySelectorAll('tr')].map((one) => getComputedStyle(one).breakInside)).size")
        == 1
    )
    assert tab.tell("getComputedStyle(document.querySelector('tr')).breakInside") == "avoid"
    assert tab.tell("getComputedStyle(document.querySelector('thead')).display") == "table-header-group"
    texts = _texts_a_page(tab.pdf())
    assert len(texts) > 4
    assert texts[0] > 100, "a table that is longer than a page begins on the first, under the summary"


def test_a_short_table_and_every_figure_stay_on_one_page(example, open_tab) -> None:
    tab = open_tab(example())
    tab.be(width=PAPER_WIDTH, paper=True)
    breaks = "[...document.querySelectorAll('.scroll, figure, .card')].map((one) => getComputedStyle(one).breakInside)"
    assert set(tab.tell(breaks)) == {"avoid"}
    highest = "Math.max(...[...document.querySelectorAll('figure')].map((one) => one.getBoundingClientRect().height))"
    # A4 is 1,123 pixels high, 106 of them margins.
    assert tab.tell(highest) < 1000


def _texts_a_page(pdf: bytes) -> list[int]:
    """How many texts each page of a PDF shows, in order."""
    found = []
    for stream in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.DOTALL):
        try:
            drawn = zlib.decompress(stream)
        except zlib.error:
            continue  # no page: a picture or a font as it is
        if b"BT" in drawn and b"Tf" in drawn:
            found.append(drawn.count(b"BT"))
    return found
