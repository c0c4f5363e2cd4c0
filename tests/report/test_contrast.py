"""The page's own colours: every text on every ground it stands on has a contrast of 4.5 (WCAG)."""

from __future__ import annotations

import re
from importlib import resources

import pytest

STYLE = resources.files("sparda_compile.report").joinpath("template.html").read_text("utf-8")
STYLE = STYLE[STYLE.index("<style>") : STYLE.index("</style>")]
PRINT = STYLE[STYLE.index("@media print") :]
DARK = STYLE[STYLE.index("prefers-color-scheme: dark") : STYLE.index("* { box-sizing")]
LIGHT = STYLE[: STYLE.index("@media")]

KINDS = ("linear", "sparda", "copy", "exposed", "early", "repair", "ahead", "other")
# Text -> what it stands on. A row under the pointer is `well`, a chosen one `tint`.
PAIRS = {
    "ink": "page card well tint bad-tint add del mark wait wait-odd band band-even",
    "soft": "page card well tint add del band band-even",
    "accent": "page card well tint",
    "bad": "card well bad-tint",
    "add-ink": "card well tint add",
    "del-ink": "card well tint",
    "label": " ".join(f"{kind} {kind}-odd" for kind in KINDS),
}


def variables(text):
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", text))


def parts(colour):
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def mix(top, below, share):
    mixed = [share * a + (1 - share) * b for a, b in zip(parts(top), parts(below), strict=True)]
    return "#" + "".join(f"{round(each):02x}" for each in mixed)


def contrast(one, other):
    def luminance(colour):
        shares = [each / 255 for each in parts(colour)]
        linear = [s / 12.92 if s <= 0.03928 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def number(pattern):
    (found,) = re.findall(pattern, STYLE)
    return float(found)


def colours_of(mode):
    """Return the page's colours by name, those that it mixes too."""
    colours = variables(LIGHT) | variables({"light": "", "dark": DARK, "print": PRINT}[mode])
    odd = number(r"\.bar\.odd \{ fill: color-mix\(in srgb, var\(--c\) (\d+)%, black\)") / 100
    for kind in (*KINDS, "wait"):
        colours[f"{kind}-odd"] = mix(colours[kind], "#000000", odd)
    for name, pattern in (("band", r"\.band \{"), ("band-even", r"\.band\.even \{")):
        share = number(pattern + r"[^}]*fill-opacity: (\.\d+)")
        colours[name] = mix(colours["ink"], colours["card"], share)
    return colours


def test_contrast_is_that_of_wcag():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#ffffff", "#b4bcc8") == pytest.approx(1.9, abs=0.05)


@pytest.mark.parametrize("mode", ["light", "dark", "print"])
def test_every_text_can_be_read(mode):
    colours = colours_of(mode)
    ratios = {
        (text, ground): contrast(colours[text], colours[ground])
        for text, grounds in PAIRS.items()
        for ground in grounds.split()
    }
    assert {pair: ratio for pair, ratio in ratios.items() if ratio < 4.5} == {}


def test_tip_can_be_read():
    ground, text = re.findall(
        r"\.tip \{[^}]*background: (#\w{6}); color: (#\w{6})", STYLE
    )[0]  # fmt: skip
    assert contrast(ground, text) >= 4.5


def test_no_text_has_a_colour_that_is_not_checked():
    used = re.findall(r"[;{ ]color: ([^;]+);", STYLE)
    used += re.findall(r"\.viewport text[^{]*\{[^}]*fill: ([^;]+);", STYLE)
    allowed = {f"var(--{name})" for name in PAIRS} | {"inherit", "#f2f4f7"}
    assert set(used) <= allowed
    faint = re.findall(r"([^{}\n]*)\{[^}]*[;{ ]opacity: ", STYLE)
    assert [rule.strip() for rule in faint] == [".row.blank"]


def test_labels_of_bars_have_the_ink_that_was_checked():
    script = resources.files("sparda_compile.report").joinpath("template.html").read_text("utf-8")
    assert 'row.kind === "wait" ? "on-wait" : "on-bar"' in script
    assert ".viewport text.on-wait { fill: var(--ink); }" in STYLE
    assert ".viewport text.on-bar { fill: var(--label); }" in STYLE


def test_no_text_is_smaller_than_12_pixels():
    sizes = re.findall(r"font(?:-size)?: (?:\d{3} )?(\d+)px", STYLE)
    assert len(sizes) > 20
    assert min(map(int, sizes)) == 12


def test_headings_of_tables_have_the_ink_of_the_text():
    for rule in (r"thead th \{([^}]*)\}", r"\nh3 \{([^}]*)\}"):
        (found,) = [each for each in re.findall(rule, STYLE) if "font" in each]
        assert "--soft" not in found


def test_paper_is_light_and_shows_whole_tables():
    assert variables(PRINT)["page"] == "#ffffff"
    dark = set(variables(DARK))
    assert dark <= set(variables(PRINT)), "a dark colour would stay on paper"
    assert re.search(r"\.scroll \{ max-height: none; overflow: visible; \}", PRINT)
    assert re.search(r"nav, \.tip, \.bar-row[^{]*\{ display: none; \}", PRINT)
