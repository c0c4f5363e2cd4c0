"""The generated parts of docs/, and what docs and README promise.

A generated part stands between `<!-- generated: name -->` and `<!-- end -->`. After a change of
the code, `SPARDA_UPDATE_GOLDEN=1 pytest tests/test_docs.py` writes these parts anew.
"""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch

from sparda_compile import errors, ops, optimize
from sparda_compile.capture.cache_name import cache_of
from sparda_compile.config import SpardaConfig
from sparda_compile.demo.small_model import small_model_folder
from sparda_compile.graph.nodes import is_sparda
from sparda_compile.graph.text import graph_text
from sparda_compile.isa.streams import STREAM_NAMES
from sparda_compile.isa.table import INSTRUCTIONS
from sparda_compile.module import arguments
from sparda_compile.module.bypasses import BYPASSES
from sparda_compile.module.captures_of import captures_of
from sparda_compile.passes import OPTIONAL_PASSES, PIPELINE
from sparda_compile.program.plan import make_plan
from sparda_compile.state.layout import LENGTHS, CacheLayout, LayerShape
from sparda_compile.testing import tiny_llama

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
UPDATE = "SPARDA_UPDATE_GOLDEN" in os.environ
OTHER_TORCH = not torch.__version__.startswith("2.13")
PART = re.compile(r"(<!-- generated: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
CONFIG = SpardaConfig(mode="forecast", top_k=8, local_blocks=4, machine="h200")


def fence(text):
    return f"```text\n{text}\n```\n"


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def code(values):
    return ", ".join(f"`{value}`" for value in values)


@cache
def plan():
    captures = captures_of(tiny_llama())
    return make_plan(
        captures, "decode", CONFIG, batch_size=1, max_tokens=8192,
    )  # fmt: skip


def excerpt(gm):
    """Return the lines of sparda ops, the nodes next to them and the readers of sparda inputs."""
    shown = set()
    for node in gm.graph.nodes:
        if is_sparda(node):
            near = [node, *node.all_input_nodes, *node.users]
            shown |= {n.name for n in near if n.op != "placeholder"}
        elif any(n.name.startswith("sparda_") for n in node.all_input_nodes):
            shown.add(node.name)
    lines = []
    for line in graph_text(gm.graph).splitlines():
        if re.match(r"%?(\w+)", line)[1] in shown:
            lines.append(line)
        elif line.startswith("return") or " = input" in line:
            continue
        elif lines[-1:] != ["..."]:
            lines.append("...")
    return "\n".join(lines)


def stage_text(name):
    names = [stage.name for stage in plan().stages]
    stage = plan().stages[names.index(name)]
    counts = ", ".join(f"{key} {value}" for key, value in stage.counts.items())
    if name == "find_attention":
        return f"Counts: {counts}.\n\n{site_table()}"
    # The graph stays as it was.
    if name in ("fuse_projections", "insert_speculation", "verify_transfers"):
        return f"Counts: {counts}.\n"
    return f"Counts: {counts}.\n\n{fence(excerpt(stage.graph_module))}"


def site_table():
    fields = ("layer", "query", "k", "v", "hidden", "projection", "rotation_input", "anchor")
    rows = [[f"`{getattr(site, field)}`" for field in fields] for site in plan().sites]
    return table(fields, rows)


def pass_table():
    head = ("pass", "requires", "ensures", "numerics", "may be disabled")
    rows = [
        (
            f"`{p.name}`",
            code(sorted(fact.name for fact in p.requires)) or "nothing",
            code(sorted(fact.name for fact in p.ensures)),
            "kept" if p.preserves_numerics else "may change",
            "yes" if p.name in OPTIONAL_PASSES else "no",
        )
        for p in PIPELINE
    ]
    return table(head, rows)


def fact_table():
    from sparda_compile.passes.base import Fact

    return table(("fact", "what holds"), [(f"`{fact.name}`", fact.value) for fact in Fact])


def op_sections():
    sections = []
    for name, op in sorted(ops.OPS.items(), key=lambda item: place(item[1])):
        sections.append(
            f"### {name}\n\n{op._init_fn.__doc__.splitlines()[0]}\n\n"
            + fence(str(op._opoverload._schema).removeprefix("sparda::"))
            + "\n"
            + "".join(f"- {line}\n" for line in op_facts(INSTRUCTIONS[name]))
        )
    return "\n".join(sections)


def place(op):
    """Return where an op is defined: the order of the page, whoever imported what first."""
    return op._init_fn.__module__, op._init_fn.__code__.co_firstlineno


def op_facts(instruction):
    """Yield what the table of instructions says of an op; what it does not have is left out."""
    yield f"defined in `{instruction.op._init_fn.__module__.replace('.', '/')}.py`"
    writes = [name for name, is_written, _ in instruction.arguments if is_written]
    yield f"writes: {code(writes) or 'nothing'}"
    named = "the one that its argument `stream` names"
    yield f"stream: {named if instruction.stream is None else STREAM_NAMES[instruction.stream]}"
    if instruction.starts:
        yield "event: starts `event`"
    if instruction.waits:
        yield "event: awaits `event`"
    if instruction.forks:
        yield "event: lets a side stream go on from here"
    if instruction.results:
        yield f"results: {code(instruction.results)}"
    if instruction.kernels:
        yield f"kernels: {code(dict.fromkeys(instruction.kernels))}"
    orders = {"before": instruction.before, "behind": instruction.behind}
    order = "; ".join(f"{word} {code(names)}" for word, names in orders.items() if names)
    if order:
        yield f"order in its layer: {order}"


def state_table():
    """Return every state tensor that some configuration has, with its shape in letters."""
    sizes = {2: "B", 3: "G", 128: "N", 20: "D", 21: "C", 64: "P", 511: "W", 96: "window", 14: "K"}
    sizes[18] = "W"  # predicted
    shapes = (
        LayerShape(0, "sparse", 3, 20, 0, torch.bfloat16),
        LayerShape(1, "window", 3, 20, 96, torch.bfloat16),
    )
    rows = {}
    for changes in (
        {"mode": "forecast"},
        {"mode": "query", "selector": "quest"},
        {"mode": "query", "selector": "lowbit4"},
        {"mode": "exact", "hint": ("previous_step", "ema")},
        {"mode": "speculate", "offload": "never"},
    ):
        layout = CacheLayout(CONFIG.replace(**changes), shapes, 2, 8192)
        specs = {LENGTHS.removeprefix("sparda_"): layout.all_tensors()[LENGTHS]}
        for shape in shapes:
            specs |= layout.tensors(shape)
        for name, spec in specs.items():
            if name in rows:
                continue
            letters = [sizes.get(s, str(s)) for s in spec.shape]
            # Two is the number of sequences in front, and K and V or two bounds elsewhere.
            letters = [letters[0], *("2" if x == "B" else x for x in letters[1:])]
            dtype = "the model's" if spec.dtype == torch.bfloat16 else str(spec.dtype)[6:]
            home = "CPU memory" if spec.on_host else "device"
            rows[name] = (f"`{name}`", f"[{', '.join(letters)}]", dtype, home)
    return table(("tensor", "shape", "dtype", "where"), list(rows.values()))


def argument_table(rows):
    """Return what happens to each argument; names that share a row stand together."""
    groups = {}
    for name, row in rows.items():
        groups.setdefault((row.kind, row.only, row.what), []).append(name)
    lines = []
    for kind in ("used", "no effect", "refused"):
        for (of, only, what), names in groups.items():
            if of == kind:
                mark = f" (transformers {only})" if only else ""
                lines.append((code(names) + mark, kind, what))
    return table(("argument", "kind", "what happens"), lines)


def bypass_table():
    """Return what an optimized module refuses to hand on, by why."""
    names = {}
    for name, why in BYPASSES.items():
        names.setdefault(why, []).append(name)
    return table(("names", "why, and what to do"), [(code(n), why) for why, n in names.items()])


GENERATED = {
    "arguments.md": {
        "forward": lambda: argument_table(arguments.FORWARD),
        "generate": lambda: argument_table(arguments.GENERATE),
        "config": lambda: argument_table(arguments.CONFIG),
    },
    "pass_by_pass.md": {
        stage: (lambda stage=stage: stage_text(stage))
        for stage in ("capture", *(p.name for p in PIPELINE))
    },
    "limits.md": {"bypasses": bypass_table},
    "passes.md": {"passes": pass_table, "facts": fact_table},
    "ops.md": {"ops": op_sections},
    "kv_cache.md": {"tensors": state_table},
}


SHOWS_TRACED_GRAPHS = pytest.mark.skipif(
    OTHER_TORCH,
    reason="the page prints whole graphs as torch 2.13 traces them, which `make test` installs; "
    f"torch {torch.__version__} traces the same model to other nodes (2.11: 186, not 187), so that "
    "a difference would not mean that the page is out of date",
)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=SHOWS_TRACED_GRAPHS if page == "pass_by_pass.md" else ())
        for page in GENERATED
    ],
)
def test_generated_parts_are_up_to_date(page):
    path = DOCS / page
    text = path.read_text(encoding="ascii")
    parts = [match[2] for match in PART.finditer(text)]
    assert parts == list(GENERATED[page])
    fresh = PART.sub(lambda m: f"{m[1]}\n{GENERATED[page][m[2]]().strip()}\n\n{m[4]}", text)
    if UPDATE:
        path.write_text(fresh, encoding="ascii")
    else:
        assert text == fresh, f"run SPARDA_UPDATE_GOLDEN=1 pytest {Path(__file__).name}"


def test_every_error_is_explained():
    rows = re.findall(r"^\| `(\w+)` \|", (DOCS / "errors.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(errors.__all__)


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]


def programs(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.usefixtures("no_deprecations")
def test_readme_program_is_short_and_prints_the_right_answer(capsys):
    (program,) = programs(ROOT / "README.md")
    assert len([line for line in program.splitlines() if line.strip()]) <= 10
    scope = {}
    exec(compile(program, "README.md", "exec"), scope)
    answer, stats, selection = capsys.readouterr().out.splitlines()
    shown = re.search(r"```text\n(found: .*)\n```", (ROOT / "README.md").read_text())[1]
    assert answer == shown
    found, right = re.findall(r"\[[\d, ]+\]", answer)
    assert found == right
    # What README says of it: most of the answer is found by steps that read few blocks.
    layout = scope["fast"].programs.latest_plan("decode").layout
    assert f"reads {layout.num_selected} of {layout.num_blocks} blocks" in (
        " ".join((ROOT / "README.md").read_text().split())
    )
    assert re.search(r"[1-9]\d* hits, [1-9]\d* misses", stats)
    assert selection.startswith("Selection begins at ")


# What a page's programs need in place of what they name, and what they have from the page.
IN_PLACE = {
    "gpu.md": {'"path/to/model"': repr(str(small_model_folder())), '"cuda"': '"cpu"'},
    "training.md": {"steps=20": "steps=2"},
}
# Pages whose program needs what need not be installed, and the test that runs it.
ELSEWHERE = {"quality.md": "tests/e2e/test_lm_eval.py"}


def given(page):
    if page != "debugging.md":
        return {}
    config = SpardaConfig(mode="query", top_k=2, local_blocks=1, lowering="eager")
    return {"fast": optimize(tiny_llama(), config), "ids": torch.randint(0, 256, (1, 300))}


@pytest.mark.usefixtures("no_deprecations")
@pytest.mark.parametrize(
    "page", [p for p in PAGES[1:] if programs(p) and p.name not in ELSEWHERE], ids=lambda p: p.name
)
def test_programs_of_pages_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = given(page.name)
    for program in programs(page):
        for shown, used in IN_PLACE.get(page.name, {}).items():
            assert shown in program
            program = program.replace(shown, used)
        exec(compile(program, page.name, "exec"), scope)
    made = {"quickstart.md": "decode.html", "training.md": "forecast.safetensors"}
    assert (tmp_path / made.get(page.name, ".")).exists()


# Pages whose program needs a GPU, or is one of several processes.
NOT_RUN_HERE = {"profiling.md", "parallel.md"}


def test_python_of_pages_is_run():
    """No page hides a program from the test above in a fence of another name."""
    hidden = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            if name != "python" and re.search(r"^(from|import) ", body, re.MULTILINE):
                hidden.add(page.name)
    assert hidden == NOT_RUN_HERE
    assert all(page in (ROOT / test).read_text() for page, test in ELSEWHERE.items())


@pytest.mark.usefixtures("no_deprecations")
def test_example_runs(capsys):
    path = ROOT / "examples" / "optimize_tiny_llama.py"
    spec = importlib.util.spec_from_file_location("example", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        example.main()
    out = capsys.readouterr().out
    assert "all blocks, same tokens: True" in out
    assert "times traced: 2" in out


def test_lengths_that_are_read_whole_are_as_quickstart_says():
    text = " ".join((DOCS / "quickstart.md").read_text().split())
    (shown,) = re.findall(r"SpardaConfig\((mode=.*?)\)", text)
    configs = (eval(f"SpardaConfig({shown})", {"SpardaConfig": SpardaConfig}), SpardaConfig())
    for config in configs:
        assert config.num_forced == config.sink_blocks + config.local_blocks + 1
        blocks = config.num_forced + config.top_k
        assert f"after {blocks} blocks, {blocks * config.block_size} tokens" in text


def test_names_of_the_glossary_are_in_the_code():
    rows = re.findall(
        r"^\| [^|]+ \| [^|]+ \| ([^|]*) \|$", (DOCS / "glossary.md").read_text(), re.M
    )
    names = {name for row in rows for name in re.findall(r"`(\w+)(?:=[^`]*)?`", row)}
    source = " ".join(path.read_text() for path in (ROOT / "sparda_compile").rglob("*.py"))
    assert len(names) > 30
    assert sorted(name for name in names if not re.search(rf"\b{name}\b", source)) == []


def test_loglikelihoods_are_dense_as_limits_says():
    model = tiny_llama()
    ids = torch.randint(0, 256, (1, 300))
    config = SpardaConfig(mode="query", block_size=16, top_k=1, local_blocks=1, lowering="eager")
    fast = optimize(model, config)
    dense = model(ids).logits.log_softmax(-1)
    whole = fast(ids)
    torch.testing.assert_close(whole.logits.log_softmax(-1), dense, rtol=1e-4, atol=1e-4)
    # One token at a time, the same text reads few blocks, and its scores differ.
    cache = cache_of(fast(ids[:, :-1]))
    last = fast(ids[:, -1:], cache=cache).logits.log_softmax(-1)
    assert (last[0, -1] - dense[0, -1]).abs().max() > 1e-3


def test_capacity_is_as_kv_cache_says():
    config = SpardaConfig(mode="query", top_k=2, local_blocks=1, lowering="eager")
    ids = torch.randint(0, 256, (1, 100))
    grows = optimize(tiny_llama(), config)
    cache = grows(ids).past_key_values
    before = cache.get_max_cache_shape()
    grows(torch.randint(0, 256, (1, before)), past_key_values=cache)
    assert cache.get_max_cache_shape() > before
    fixed = optimize(grows, config.replace(max_tokens=128))
    with pytest.raises(errors.KVCacheError, match="max_tokens=128"):
        fixed.generate(ids, max_new_tokens=29)
