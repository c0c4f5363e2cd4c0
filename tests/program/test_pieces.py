"""Equal pieces are one, and are compiled once for all layers, capacities and lengths."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import warnings

import pytest
import torch
from hand_written import Written

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import PassError
from sparda_compile.graph.nodes import find_ops, tensor_shape
from sparda_compile.program.compiled_piece import CompiledPiece
from sparda_compile.program.lower import lower
from sparda_compile.program.pieces import compiled_pieces, make_piece, piece_of_op
from sparda_compile.sizes import BATCH_SIZE, NUM_TOKENS, SAMPLES
from sparda_compile.testing import tiny_llama

SMALL = {"top_k": 2, "local_blocks": 1, "block_size": 16, "pool_size": 8, "pool_stride": 4}
MODES = ({"mode": "query"}, {"mode": "forecast"}, {"mode": "exact", "hint": "next_query"})


def _fast(num_layers, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny_llama(num_hidden_layers=num_layers)
        return optimize(model, SpardaConfig(**{**SMALL, "offload": "always", **settings}))


def _keys(fast, phase, batch_size=1, max_tokens=512):
    plan = fast.programs.get(phase, batch_size, max_tokens, last_only=True).plan
    return [piece.key for piece in lower(plan.graph_module, "eager").pieces()]


@pytest.mark.parametrize("settings", MODES, ids=str)
def test_models_of_any_depth_have_the_same_pieces(settings):
    """Four layers have a first, a last and two in the middle; seven have more in the middle."""
    few, many = (_fast(n, machine="h200", lowering="eager", **settings) for n in (4, 7))
    for phase in ("prefill", "decode"):
        assert _keys(few, phase) == _keys(many, phase)
        assert len(_keys(few, phase)) <= 8


def test_capacities_and_batch_sizes_share_pieces():
    fast = _fast(3, mode="forecast", machine="h200", lowering="eager")
    for phase in ("prefill", "decode"):
        assert _keys(fast, phase, 1, 512) == _keys(fast, phase, 1, 4096)
        assert _keys(fast, phase, 1, 512) == _keys(fast, phase, 5, 1024)


def _compiled_by(fast):
    """Return how often each piece of a module's programs has been compiled in this process."""
    programs = fast.programs.compiled()
    mine = {piece.key for program in programs for piece in program.lowered.pieces()}
    return {key: compiled_pieces()[key].num_variants for key in mine}


def _generate(fast, batch_size, length):
    ids = torch.randint(2, 250, (batch_size, length))
    fast.generate(ids, max_new_tokens=3, do_sample=False)


@pytest.mark.slow
def test_ten_lengths_and_three_batch_sizes_compile_each_piece_once():
    """Whatever the lengths and the number of sequences; and as often for 4 layers as for 12."""
    fast = _fast(4, mode="forecast")
    for length in (40, 55, 71, 130, 520, 1100):
        _generate(fast, 1, length)
    for batch_size, length in ((2, 40), (2, 90), (3, 60), (3, 64)):
        _generate(fast, batch_size, length)
    counts = _compiled_by(fast)
    assert set(counts.values()) == {1}
    assert len(counts) == 9  # 3 of a prefill and 6 of a decode
    deep = _fast(12, mode="forecast")
    _generate(deep, 2, 40)
    assert _compiled_by(deep) == counts


def _sum_piece(name, width=4):
    written = Written()
    x = written.input(name, 2, width)
    doubled = written.method("mul", x, 2)
    total = written.method("sum", doubled, -1)
    return make_piece([doubled, total], [total])


def test_names_do_not_matter_and_forms_do():
    assert _sum_piece("x").key == _sum_piece("weight_of_layer_7").key
    assert _sum_piece("x").key != _sum_piece("x", width=5).key
    assert _sum_piece("x").name == f"piece_{_sum_piece('x').key[:8]}"


def test_constants_are_part_of_the_key():
    keys = set()
    for factor in (2, 2.0, 3, True):
        written = Written()
        node = written.method("mul", written.input("x", 2, 4), factor)
        keys.add(make_piece([node], [node]).key)
    assert len(keys) == 4


def test_a_piece_computes_what_its_nodes_did():
    piece = _sum_piece("x")
    x = torch.randn(2, 4)
    for lowering in ("eager", "inductor"):
        (total,) = piece.callable(lowering)(x)
        torch.testing.assert_close(total, (x * 2).sum(-1))


def test_open_sizes_are_passed_in_and_any_number_will_do():
    written = Written()
    tokens = written.size()
    x = written.input("x", 1, SAMPLES.tokens * 4)
    rows = written.method("view", x, tokens, 4)
    total = written.method("sum", rows, -1)
    piece = make_piece([rows, total], [total])
    assert piece.sizes == (NUM_TOKENS,)
    function = piece.callable("inductor")
    for number in (2, 7, 1, 1000):
        x = torch.randn(1, number * 4)
        (got,) = function(number, x)
        torch.testing.assert_close(got, x.view(number, 4).sum(-1))
    assert isinstance(function, CompiledPiece)
    assert 1 <= function.num_variants <= 2  # a prompt of one token may need its own


def test_a_sample_passed_as_a_number_is_refused():
    written = Written()
    node = written.method("view", written.input("x", 1, SAMPLES.tokens * 4), SAMPLES.tokens, 4)
    with pytest.raises(PassError, match="524309 stands for T in the graph"):
        make_piece([node], [node])


def test_what_a_piece_has_made_it_may_change():
    written = Written()
    mine = written.method("mul", written.input("x", 2, 4), 2)
    changed = written.method("add_", mine, 1)
    piece = make_piece([mine, changed], [changed])
    x = torch.randn(2, 4)
    for lowering in ("eager", "inductor"):
        (got,) = piece.callable(lowering)(x)
        torch.testing.assert_close(got, x * 2 + 1)


@pytest.mark.parametrize("view", [False, True])
def test_what_another_piece_has_made_it_may_not(view):
    written = Written()
    x = written.input("x", 2, 4)
    nodes = [written.method("view", x, 8)] if view else []
    nodes.append(written.method("add_", nodes[0] if view else x, 1))
    with pytest.raises(PassError, match="changes a tensor in place"):
        make_piece(nodes, nodes[-1:])


@pytest.mark.parametrize("hint", ["forecast", "next_query"])
def test_what_an_op_runs_is_a_piece_that_writes_its_result(hint):
    fast = _fast(3, mode="exact", hint=hint, machine="h200", lowering="eager")
    graph = fast.programs.get("decode", 1, 512, last_only=True).plan.graph_module.graph
    pieces = [piece_of_op(node) for node in find_ops(graph, "run_piece")]
    assert len(pieces) == (3 if hint == "forecast" else 2)
    assert len({piece.key for piece in pieces}) == 1  # for all layers
    (piece, *_) = pieces
    assert (piece.sizes, piece.outputs) == ((BATCH_SIZE,), ())
    for batch in (1, 2, 5):
        shapes = [[batch if s == SAMPLES.batch else s for s in tensor_shape(n)]
                  for n in piece.inputs]  # fmt: skip
        *given, _ = (torch.randn(shape) for shape in shapes)
        results = [torch.full(shapes[-1], float("nan")) for _ in range(2)]
        for lowering, result in zip(("eager", "inductor"), results, strict=True):
            assert tuple(piece.callable(lowering)(batch, *given, result)) == ()
        torch.testing.assert_close(*results)


_A_PROCESS = """
import sys, warnings
warnings.simplefilter("ignore")
from torch._dynamo.utils import counters
from sparda_compile import SpardaConfig, optimize
from sparda_compile.testing import tiny_llama
model = tiny_llama(num_hidden_layers=1, rms_norm_eps=float(sys.argv[1]))
fast = optimize(model, SpardaConfig(mode="query", top_k=2, local_blocks=1))
fast.programs.get("decode", 1, 512, last_only=True).compile()
counts = counters["aot_autograd"]
print(*(counts["autograd_cache_" + what] for what in ("miss", "hit", "bypass")))
"""


@pytest.mark.slow
def test_a_second_process_traces_and_compiles_nothing(tmp_path):
    """In a folder of their own: other tests compile meanwhile, and may leave variables behind.

    Without vectors, for which Inductor would try the compiler seven times in a new folder.
    """
    kept = ("PATH", "HOME", "PYTHONPATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")
    env = {name: os.environ[name] for name in kept if name in os.environ}
    new = repr(1e-6 * (1 + random.random()))  # a model that no process has compiled before
    printed = []
    for _ in range(2):
        ran = subprocess.run(
            [sys.executable, "-c", _A_PROCESS, new], capture_output=True, text=True, check=False,
            env={**env, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_VEC_ISA_OK": "0"},
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr[-3000:]
        printed.append(ran.stdout.split())
    # A piece before the attention and one behind it.
    assert printed == [["2", "0", "0"], ["0", "2", "0"]]
