from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest

from sparda_compile.bench.plots import check_matplotlib, write_plot, write_prefill_plot
from sparda_compile.environment import describe
from sparda_compile.errors import BackendUnavailableError, ConfigError

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
COMMITTED = RESULTS / "2026-11-26-h200-decode-8b.json"


def content(results, shape="8b", **more):
    return {"shape": shape, "max_tokens": 131072, "results": results, **more}


@pytest.fixture
def figure(monkeypatch):
    """Draws results, and returns the figure instead of a file."""
    matplotlib = pytest.importorskip("matplotlib.figure")

    def draw(given, tmp_path, write=write_plot):
        kept = []
        save = matplotlib.Figure.savefig
        monkeypatch.setattr(
            matplotlib.Figure,
            "savefig",
            lambda self, *a, **k: kept.append(self) or save(self, *a, **k),
        )
        write(given, tmp_path / "decode.png")
        (drawn,) = kept
        return drawn

    return draw


def panels(drawn):
    """Return the panels of times, the panel of rates, and the one with words."""
    axes = [each for each in drawn.get_axes() if each.axison or each.texts]
    return axes[:-2], axes[-2], axes[-1]


def words(drawn, renderer):
    """Return every text but the numbers at the ticks, with its box in dots."""
    from matplotlib.text import Text

    ticks = {
        label
        for each in drawn.get_axes()
        for axis in (each.xaxis, each.yaxis)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        for label in (tick.label1, tick.label2)
    }
    shown = [each for each in drawn.findobj(Text) if each.get_text().strip() and each not in ticks]
    return [(each, each.get_window_extent(renderer)) for each in shown]


def test_times_of_all_batch_sizes_have_one_scale_that_holds_them(figure, decode_results, tmp_path):
    times, _, _ = panels(figure(content(decode_results), tmp_path))
    assert [each.get_title() for each in times] == ["1 sequence", "16 sequences"]
    assert len({each.get_ylim() for each in times}) == 1
    low, high = times[0].get_ylim()
    values = [y for each in times for line in each.lines for y in line.get_ydata()]
    assert (low, max(values)) == (0, 30.0)
    assert high > max(values)
    assert [list(line.get_ydata()) for line in times[1].lines[:2]] == [[30.0, 13.5], [20.0, 9.0]]


def test_rates(figure, decode_results, tmp_path):
    _, rates, _ = panels(figure(content(decode_results), tmp_path))
    assert [list(line.get_ydata()) for line in rates.lines] == [
        [row["tokens_per_s"] for row in result["by_overlap"].values()]
        for result in decode_results[:2]
    ]


def test_model_and_gpu_are_named_and_every_line_is_explained(figure, decode_results, tmp_path):
    environment = describe("abc") | {"gpu": "ACME 9000", "date": "2031-02-03"}
    drawn = figure(content(decode_results, environment=environment), tmp_path)
    title = drawn.get_suptitle()
    for text in ("8b", "32 layers", "2 KV heads", "128K tokens", "ACME 9000", "2031-02-03"):
        assert text in title
    legend = [text.get_text() for text in panels(drawn)[2].get_legend().texts]
    names = [text.partition(":")[0] for text in legend]
    assert names == ["inline", "scheduled", "resident", "body", "floor"]
    assert all(len(text) > len(name) + 10 for text, name in zip(legend, names, strict=True))
    assert panels(drawn)[2].texts[0].get_text().startswith("Overlap: ")


def test_shape_that_is_not_known_and_no_environment(figure, decode_results, tmp_path):
    assert "Llama mine\n" in figure(content(decode_results, "mine"), tmp_path).get_suptitle()


@pytest.mark.parametrize("count", [1, 4, 5])
def test_it_is_read_at_the_width_of_a_page(figure, decode_results, tmp_path, count):
    results = [decode_results[1] | {"batch_size": 2**n} for n in range(count)]
    drawn = figure(content(results), tmp_path)
    assert drawn.get_figwidth() == 9
    canvas = pytest.importorskip("matplotlib.backends.backend_agg").FigureCanvasAgg(drawn)
    canvas.draw()
    renderer = canvas.get_renderer()
    shown = words(drawn, renderer)
    assert min(text.get_fontsize() for text, _ in shown) >= 9
    page = drawn.bbox.padded(1)
    assert [
        text for text, box in shown if not page.containsx(box.x0) or not page.containsx(box.x1)
    ] == []
    assert [
        text for text, box in shown if not page.containsy(box.y0) or not page.containsy(box.y1)
    ] == []
    for (one, a), (other, b) in itertools.combinations(shown, 2):
        assert not a.overlaps(b), (one, other)


def test_committed_results_are_drawn(figure, tmp_path):
    times, _, _ = panels(figure(json.loads(COMMITTED.read_text()), tmp_path))
    assert [each.get_title() for each in times] == [
        "1 sequence", "4 sequences", "8 sequences", "16 sequences"
    ]  # fmt: skip


def test_ending_says_the_format(tmp_path, decode_results):
    pytest.importorskip("matplotlib")
    path = write_plot(content(decode_results), tmp_path / "new" / "decode.svg")
    assert path.read_text().count("<svg") == 1


def test_plot_of_nothing(tmp_path, decode_results):
    pytest.importorskip("matplotlib")
    path = write_plot(content(decode_results[2:]), tmp_path / "decode.png")
    assert path.stat().st_size > 1000


def test_bad_path_is_refused_and_leaves_nothing(tmp_path, decode_results):
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match="it is a folder"):
        write_plot(content(decode_results), tmp_path)
    with pytest.raises(ConfigError, match=r"\.abc.* png"):
        write_plot(content(decode_results), tmp_path / "x.abc")
    assert list(tmp_path.iterdir()) == []


def test_plot_needs_matplotlib(tmp_path, monkeypatch, decode_results):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BackendUnavailableError, match="leave --plot out"):
        check_matplotlib()
    with pytest.raises(BackendUnavailableError, match=r"sparda-compile\[plot\]"):
        write_plot(content(decode_results), tmp_path / "decode.png")
    assert not (tmp_path / "decode.png").exists()


def prompt(tokens, by_law=(), **seconds):
    rows = {name: {"first_token_s": {"median": s}} for name, s in seconds.items()}
    return {
        "tokens": tokens,
        "programs": {name: row for name, row in rows.items() if name not in by_law},
        "by_law": {name: {"first_token_s": seconds[name]} for name in by_law},
        "skipped": {},
    }


PROMPTS = [
    prompt(1024, sparse_forecast=0.13, transformers_cudnn=0.06, transformers_flash=0.05),
    prompt(131072, sparse_forecast=8.0, transformers_cudnn=11.0, transformers_flash=12.0),
    prompt(1 << 20, ("transformers_cudnn",), sparse_forecast=70.0, transformers_cudnn=500.0),
]


def test_prompts_by_powers(figure, tmp_path):
    drawn = figure({"shape": "8b", "results": PROMPTS}, tmp_path, write_prefill_plot)
    (panel,) = drawn.get_axes()
    assert (panel.get_xscale(), panel.get_yscale()) == ("log", "log")
    assert [label.get_text() for label in panel.get_xticklabels()] == ["1K", "128K", "1M"]
    ours, theirs, law = panel.lines
    assert list(ours.get_ydata()) == [0.13, 8.0, 70.0]
    assert list(theirs.get_ydata()) == [0.05, 11.0]  # the faster one of each length
    assert (list(law.get_xdata()), list(law.get_ydata())) == ([131072, 1 << 20], [11.0, 500.0])
    assert law.get_linestyle() == "--"
    assert law.get_markerfacecolor() == "white"
    legend = panel.get_legend()
    names = [text.get_text().partition(":")[0] for text in legend.texts]
    assert names == ["sparse_forecast", "transformers"]
    assert "not measured" in legend.get_title().get_text()
    assert "2 KV heads" in drawn.get_suptitle()


def test_no_prompts(figure, tmp_path):
    drawn = figure({"shape": "8b", "results": []}, tmp_path, write_prefill_plot)
    assert drawn.get_axes()[0].texts[0].get_text() == "Nothing was measured."


def test_prompts_are_written_as_the_ending_says(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match=r"\.abc.* png"):
        write_prefill_plot({"shape": "8b", "results": PROMPTS}, tmp_path / "x.abc")
    path = write_prefill_plot({"shape": "8b", "results": PROMPTS}, tmp_path / "x.svg")
    assert path.read_text().count("<svg") == 1
