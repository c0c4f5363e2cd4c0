from __future__ import annotations

import json

from typer.testing import CliRunner

from sparda_compile.cli import main as cli

ROW = {
    "task": "perplexity", "mode": "query", "kv_format": "int8", "selector": "infllm2",
    "budget": 0.05, "perplexity": {"value": 9.5}, "ratio": {"value": 1.02}, "kl": {"value": 0.01},
}  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(cli.app, ["bench", "tradeoff", *map(str, arguments)])


def files(folder):
    """Write results of both commands; return the options that name them."""
    by_overlap = {"0.7": {"tokens_per_s": 1500.0}}
    speed = {
        "name": "decode", "kv_format": "int8", "max_tokens": 131_072,
        "results": [{"batch_size": 16, "by_overlap": by_overlap}],
    }  # fmt: skip
    contents = {"--decode": speed, "--text": {"name": "eval_text", "rows": [ROW]}}
    for option, content in contents.items():
        (folder / f"{option.strip('-')}.json").write_text(json.dumps(content))
    return [each for o in contents for each in (o, folder / f"{o.strip('-')}.json")]


def test_a_table_a_plot_and_json(tmp_path):
    given, plot = files(tmp_path), tmp_path / "formats.svg"
    result = run(*given, "--plot", plot)
    assert result.exit_code == 0, result.output
    assert all(word in result.stdout for word in ("int8", "1500.0", "9.50", "1.020", "5%"))
    assert "<svg" in plot.read_text()
    (point,) = json.loads(run(*given, "--json").stdout)["points"]
    assert (point["kv_format"], point["tokens_per_s"], point["perplexity"]) == ("int8", 1500.0, 9.5)


def test_what_cannot_be_joined_is_refused(tmp_path):
    given = files(tmp_path)
    result = run(*given, "--batch", 4)
    assert result.exit_code == 2
    assert "speeds are there of nothing" in " ".join(result.stderr.split())
    result = run(given[0], given[3], *given[2:])
    assert result.exit_code == 2
    assert "no result of the kind decode" in " ".join(result.stderr.split())
