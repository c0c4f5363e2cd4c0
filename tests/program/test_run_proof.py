"""What the proof of a run finds: every mutant of a lowered program, by enumeration."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch

import sparda_compile
from sparda_compile import SpardaConfig
from sparda_compile.errors import TransferRaceError
from sparda_compile.graph.effects import argument, bound_arguments, stream_of, takes
from sparda_compile.graph.fake_runner import leaves_of, map_leaves
from sparda_compile.graph.nodes import call_name, find_ops, snapshot
from sparda_compile.isa.engines import ImmediateEngine, current_engine, use_engine
from sparda_compile.isa.streams import COMPUTE, STREAM_NAMES
from sparda_compile.isa.table import INSTRUCTIONS
from sparda_compile.program.lower import LoweredProgram, Register, lower, set_frees
from sparda_compile.program.recording import record_run
from sparda_compile.program.run_proof import check_recording

SMALL = {
    "top_k": 2, "sink_blocks": 1, "local_blocks": 1, "block_size": 16, "pool_size": 8,
    "pool_stride": 4, "offload": "always", "max_tokens": 512, "machine": "h200",
    "attend_before_repair": "always", "lowering": "eager",
}  # fmt: skip
CASES = {
    "forecast": {"mode": "forecast"},
    "exact-next_query": {"mode": "exact", "hint": "next_query"},
    "exact-previous_step": {"mode": "exact", "hint": "previous_step"},
    "exact-ema": {"mode": "exact", "hint": "ema"},
    "exact-ema+forecast": {"mode": "exact", "hint": ("ema", "forecast")},
    "exact-previous_layer": {"mode": "exact", "hint": "previous_layer"},
    "query": {"mode": "query"},
    "forecast-of-two": {"mode": "forecast", "batch_size": 2},
    "prefill": {"mode": "forecast", "phase": "prefill"},
    "speculate": {"mode": "speculate", "offload": "never", "speculate_where": "always"},
}
STREAMS = frozenset(range(len(STREAM_NAMES)))


class Lab:
    """A program whose calls tests change, and what it is run on."""

    def __init__(self, traced, phase="decode", batch_size=1, **settings):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fast = sparda_compile.optimize(traced, SpardaConfig(**{**SMALL, **settings}))
        cache = fast.new_cache()
        fast(torch.randint(2, 250, (batch_size, 90)), past_key_values=cache)
        self.kv = cache.kv
        self.state = {name: tensor.clone() for name, tensor in cache.kv.state.items()}
        self.program = fast.programs.get(phase, batch_size, 512, last_only=True)
        self.graph = self.program.plan.graph_module.graph
        self.lowered = lower(self.program.plan.graph_module, "eager")
        # Of each value its shape and dtype; nothing of one without memory, such as an op's token.
        self.forms = {
            node.name: (tuple(val.shape), val.dtype)
            if isinstance(val := node.meta.get("val"), torch.Tensor) and val.numel()
            else None
            for node in self.graph.nodes
        }
        num_tokens = 1 if phase == "decode" else 40
        self.call = {
            "input_ids": torch.full((batch_size, num_tokens), 7),
            "position_ids": 90 + torch.arange(num_tokens).expand(batch_size, -1),
            "sparda_token_mask": torch.ones(batch_size, num_tokens, dtype=torch.bool),
            "sparda_num_past": cache.kv.longest,
            "sparda_may_hide": True,
            "num_tokens": num_tokens,
            "batch_size": batch_size,
        }

    def calls(self) -> LoweredProgram:
        """Return the program as it should be, to be changed."""
        program = copy.copy(self.lowered)
        program.calls = [copy.copy(call) for call in program.calls]
        return program

    def check(self, program, engine=None):
        """Run a program and check the run."""
        for name, tensor in self.state.items():
            self.kv.state[name].copy_(tensor)
        inputs = self.program._bound(self.call, self.kv)
        with use_engine(engine or ImmediateEngine()):
            _, recording = record_run(program, inputs)
        return check_recording(self.graph, recording)

    def dies(self, program, words=""):
        """Check that a mutant is refused by the proof."""
        with pytest.raises(TransferRaceError, match=f"lowered program: .*{words}"):
            self.check(program)

    def dies_or_fails(self, program, words=""):
        """Check that a mutant is refused by the proof, or cannot run to its end."""
        with pytest.raises((TransferRaceError, RuntimeError, IndexError)) as raised:
            self.check(program)
        if raised.type is TransferRaceError:
            assert words in str(raised.value)


@pytest.fixture(scope="module", params=CASES)
def lab(request, traced_llama):
    return Lab(traced_llama, **CASES[request.param])


def named(program, i):
    return call_name(program.calls[i].node).removeprefix("sparda.")


def ops(program, *names):
    """Return the places of ops by name; of all without one."""
    return [
        i for i, call in enumerate(program.calls)
        if call.node is not None and (not names or named(program, i) in names)
    ]  # fmt: skip


def put(call, name, value):
    """Give a call another argument."""
    names = [n for n, _, _ in bound_arguments(call.node)]
    if name in call.kwargs:
        call.kwargs = {**call.kwargs, name: value}
    else:
        place = names.index(name)
        call.args = (*call.args[:place], value, *call.args[place + 1 :])


def registers(value):
    return [leaf for leaf in leaves_of(value) if type(leaf) is Register]


def test_the_program_itself_is_proved(lab):
    program = lab.calls()
    proof = lab.check(program)
    assert proof.ops == len(ops(program))
    assert proof.pieces == len(program.calls) - proof.ops
    assert proof.conflicts > 0
    assert proof.storages > 0


def test_every_hold_is_missed(lab):
    """Of each tensor that a wait keeps alive."""
    for i in ops(lab.calls(), "wait_blocks"):
        kept = argument(lab.calls().calls[i].node, "keepalive")
        for place in range(len(kept)):
            program = lab.calls()
            held = program.calls[i].args[2]
            put(program.calls[i], "keepalive", [*held[:place], *held[place + 1 :]])
            set_frees(program)
            lab.dies(program)


def test_every_early_release_is_found(lab):
    """Of each tensor that a side stream uses: freed right after its last use on this stream."""
    reference = lab.calls()
    waits = ops(reference, "wait_blocks")
    found = 0
    for i in ops(reference):
        call = reference.calls[i]
        if stream_of(call.node) == COMPUTE:
            continue
        wait = min(w for w in waits if w > i)
        for register in {*registers((call.args, call.kwargs)), *map(Register, call.results)}:
            freed = next((j for j, c in enumerate(reference.calls) if register in c.frees), -1)
            if freed < wait or not lab.forms[reference.names[register]]:
                continue
            last = max(
                j for j, c in enumerate(reference.calls[:wait])
                if j == i or register in registers((c.args, c.kwargs))
            )  # fmt: skip
            program = lab.calls()
            if _release(program, register, freed, last):
                found += 1
                lab.dies(program)
    assert found


def _release(program, register, freed, earlier):
    """Let go of a register earlier; False where something in between still takes it."""
    for call in program.calls[earlier + 1 : freed + 1]:
        if call.node is not None and call_name(call.node) == "sparda.wait_blocks":
            kept = [r for r in call.args[2] if r != register]
            put(call, "keepalive", kept)
        elif register in registers((call.args, call.kwargs)):
            return False
    set_frees(program)
    program.calls[earlier].frees = (*program.calls[earlier].frees, register)
    return True


def test_memory_that_a_side_stream_uses_is_not_given_again(lab):
    """A piece, or an op that runs one, that returns what the copy or select stream still uses."""
    reference = lab.calls()
    sides = [i for i in ops(reference) if stream_of(reference.calls[i].node) != COMPUTE]
    found = 0
    for i, piece in enumerate(reference.calls):
        for j in sides:
            side = reference.calls[j]
            gone = [r for call in reference.calls[: i + 1] for r in call.frees]
            kept = [
                r for r in registers((side.args, side.kwargs))
                if r >= reference.num_inputs and lab.forms[reference.names[r]]
                and r not in gone and r not in registers((piece.args, piece.kwargs))
            ]  # fmt: skip
            if piece.piece is None or j >= i or not kept:
                continue
            program = lab.calls()
            taken = []
            place = [*registers((side.args, side.kwargs))].index(kept[0])
            program.calls[j].function = _noting(side.function, taken)
            program.calls[i].function = _reusing(piece.function, taken, place)
            found += 1
            lab.dies(program, "(still in use|not ordered)")
    assert found


def _noting(function, taken):
    def call(*args, **kwargs):
        taken.extend(x for x in leaves_of((args, kwargs)) if isinstance(x, torch.Tensor))
        return function(*args, **kwargs)

    return call


def _reusing(function, taken, place):
    def call(*args, **kwargs):
        made = function(*args, **kwargs)
        is_one = isinstance(made, torch.Tensor)
        results = [made] if is_one else list(made)
        first = torch.empty(0, dtype=results[0].dtype).set_(taken[place].untyped_storage())[:1]
        results[0] = first.expand(results[0].shape)
        return results[0] if is_one else results

    return call


def test_every_swap_of_two_ops_is_found(lab):
    """Whether or not it is a race: the graph that was proved has them the other way round."""
    places = ops(lab.calls())
    for i, j in itertools.pairwise(places):
        program = lab.calls()
        one, other = program.calls[i], program.calls[j]
        needs = set(map(Register, one.results)) & set(registers((other.args, other.kwargs)))
        if needs or j != i + 1:
            continue  # cannot run
        program.calls[i], program.calls[j] = other, one
        set_frees(program)
        lab.dies(program, "ran where the graph has")


def test_every_op_that_is_left_out_or_made_twice_is_found(lab):
    for i in ops(lab.calls()):
        program = lab.calls()
        if any(type(r) is Register for r in _needed(program, i)):
            continue
        del program.calls[i]
        set_frees(program)
        lab.dies(program, "ran where the graph has")
        program = lab.calls()
        program.calls.insert(i, copy.copy(program.calls[i]))
        set_frees(program)
        lab.dies(program, "ran where the graph has")


def _needed(program, i):
    """Return the results of a call that others take."""
    mine = set(map(Register, program.calls[i].results))
    later = program.calls[i + 1 :]
    return [r for call in later for r in registers((call.args, call.kwargs)) if r in mine]


def test_every_wrong_event_is_found(lab):
    for i in ops(lab.calls(), "prefetch_blocks", "offload_blocks", "record_event", "wait_blocks"):
        program = lab.calls()
        event = argument(program.calls[i].node, "event")
        put(program.calls[i], "event", event + 1)
        lab.dies(program, "event")


def test_every_wrong_stream_is_found(lab):
    for i in ops(lab.calls()):
        node = lab.lowered.calls[i].node
        for stream in STREAMS - {stream_of(node)}:
            if takes(node, "stream"):
                program = lab.calls()
                call = program.calls[i]
                call.kwargs = {**call.kwargs, "stream": stream}
                names = [n for n, _, _ in bound_arguments(node)]
                if "stream" in names and names.index("stream") < len(call.args):
                    call.kwargs.pop("stream")
                    put(call, "stream", stream)
                lab.dies(program, "stream")


class Astray(ImmediateEngine):
    """Notes where work goes, and does that of one submission on another stream."""

    def __init__(self, place=None, stream=None):
        self.place, self.stream = place, stream
        self.noted = []

    def submit(self, stream, work):
        if len(self.noted) == self.place:
            current_engine().records[-1].streams[-1] = self.stream
        self.noted.append(stream)
        super().submit(stream, work)


def test_every_submission_to_another_stream_is_found(lab):
    faithful = Astray()
    lab.check(lab.calls(), faithful)
    assert faithful.noted
    for place, right in enumerate(faithful.noted):
        for stream in STREAMS - {right}:
            with pytest.raises(TransferRaceError, match="stream"):
                lab.check(lab.calls(), Astray(place, stream))


def test_every_other_argument_is_found(lab):
    """A tensor of the same form in the place of each that an op takes."""
    reference = lab.calls()
    mutants = 0
    for i in ops(reference):
        if named(reference, i) in ("wait_blocks", "fork_stream"):
            continue
        for register in dict.fromkeys(registers((reference.calls[i].args,))):
            form = lab.forms[reference.names[register]]
            others = [
                Register(r) for r, name in enumerate(reference.names)
                if r != register and form and lab.forms[name] == form
                and name.startswith("sparda_") and r < reference.num_inputs
            ]  # fmt: skip
            for other in others[:1]:
                program = lab.calls()
                call = program.calls[i]
                call.args = map_leaves(
                    call.args, lambda leaf, a=register, b=other: b if leaf == a and
                    type(leaf) is Register else leaf,
                )  # fmt: skip
                set_frees(program)
                mutants += 1
                lab.dies_or_fails(program, "took something else than")
    assert mutants


@pytest.fixture(scope="module")
def mine(traced_llama):
    return Lab(traced_llama, **CASES["speculate"])


class TestSpeculation:
    """Programs made of graphs that are wrong themselves: the run's own clocks find the race."""

    def check(self, lab, change):
        """Run the program of a changed graph, and check it against that graph."""
        module = snapshot(lab.program.plan.graph_module)
        change(module.graph)
        program = lower(module, "eager")
        for name, tensor in lab.state.items():
            lab.kv.state[name].copy_(tensor)
        with use_engine(ImmediateEngine()):
            _, recording = record_run(program, lab.program._bound(lab.call, lab.kv))
        return check_recording(module.graph, recording)

    def wait(self, graph, name):
        return next(iter(next(n for n in graph.nodes if n.name == name).users))

    def test_nothing_changed(self, mine):
        assert self.check(mine, lambda graph: None).conflicts > 0

    def test_without_the_wait(self, mine):
        with pytest.raises(TransferRaceError, match=r"attend_predicted_1 .*repair_predicted_1"):
            self.check(mine, lambda graph: graph.erase_node(self.wait(graph, "parts_1")))

    def test_wait_too_late(self, mine):
        def later(graph):
            find_ops(graph, "repair_predicted")[1].append(self.wait(graph, "parts_1"))

        with pytest.raises(TransferRaceError, match=r"attend_predicted_1 .*repair_predicted_1"):
            self.check(mine, later)

    def test_prediction_that_is_not_awaited(self, mine):
        def erase(graph):
            for name in ("prediction_0", "prediction_1"):
                graph.erase_node(self.wait(graph, name))

        with pytest.raises(TransferRaceError, match=r"(predict|update)\w+_\d"):
            self.check(mine, erase)

    def test_token_written_to_what_was_predicted(self, mine, monkeypatch):
        """The two touch different blocks: without that knowledge the run would be refused."""
        append, attend = INSTRUCTIONS["append_kv"], INSTRUCTIONS["attend_predicted"]
        for it in (append, attend):
            monkeypatch.setitem(it.__dict__, "parts", ())
        with pytest.raises(TransferRaceError, match=r"attend_predicted_0 .*append_kv_0"):
            self.check(mine, lambda graph: None)
