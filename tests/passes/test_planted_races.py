"""VerifyTransfers on small programs written by hand: each kind of race, and its message."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from sparda_compile import ops
from sparda_compile.errors import TransferRaceError
from sparda_compile.graph.effects import accesses
from sparda_compile.graph.emit import Emitter
from sparda_compile.graph.tags import ORDER
from sparda_compile.isa.streams import COPY, SELECT
from sparda_compile.passes.check.issued import extract_program
from sparda_compile.passes.check.verify_transfers import check_program

assert ops.OPS  # registers the ops that the programs call


class Planted:
    """A program written by hand: state placeholders, then ops in semantic order."""

    def __init__(self):
        self.graph = fx.Graph()
        self.mode = FakeTensorMode()
        self.state = {
            name: self._input(f"sparda_{name}", shape, dtype)
            for name, shape, dtype in (
                ("pages_0", (1, 2, 4, 2, 16, 8), torch.float32),
                ("host_0", (1, 2, 8, 2, 16, 8), torch.float32),
                ("last_block_ids_0", (1, 2, 3), torch.int32),
                ("level_0", (1, 2, 8), torch.float32),
                ("trend_0", (1, 2, 8), torch.float32),
                ("lengths", (1,), torch.int32),
            )
        }
        self.ids = self._input("ids", (1, 2, 3), torch.int32)
        self.tail = self._input("tail", (1, 2), torch.int32)
        self.key = self._input("key", (1, 2, 1, 8), torch.float32)
        self.end = self.graph.output((self.ids,))
        self.emit = Emitter(self.graph, self.end, self.ids, 0)

    def _input(self, name, shape, dtype):
        node = self.graph.placeholder(name)
        with self.mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        return node

    def append(self):
        state = self.state
        args = (self.key, self.key, self.tail, state["lengths"], state["pages_0"])
        return self.emit.call("append_kv", *args, name="append")

    def prefetch(self, event, after=None):
        pools = (self.state["host_0"], self.state["pages_0"])
        args = (self.ids, self.ids, *pools, event, after)
        return self.emit.call("prefetch_blocks", *args, name=f"prefetch{event}")

    def wait(self, ticket, event, keepalive=(), buffers=("pages_0",)):
        args = (ticket, [self.state[name] for name in buffers], list(keepalive), event)
        return self.emit.call("wait_blocks", *args, name=f"wait{event}")

    def fork(self, event):
        return self.emit.call("fork_stream", [self.ids], event, name=f"fork{event}")

    def check(self):
        for i, node in enumerate(self.graph.nodes):
            if accesses(node):
                ORDER.put(node, i)
        return check_program(extract_program(self.graph))


class TestTwoSteps:
    """Programs whose first step is right whatever happens, and whose second one is not."""

    def test_write_at_the_end_of_a_step_races_with_a_copy_that_begins_the_next(self):
        planted = Planted()
        planted.wait(planted.prefetch(0), 0)
        planted.append()
        with pytest.raises(TransferRaceError, match=r"prefetch0 .* in the next step"):
            planted.check()

    def test_fork_orders_them(self):
        planted = Planted()
        planted.wait(planted.prefetch(0, planted.fork(1)), 0)
        planted.append()
        assert planted.check() == 3

    def test_memory_that_a_step_frees_is_not_given_to_a_side_stream_op_of_the_next(self):
        planted = Planted()
        ids = _select(planted, None)
        planted.wait(planted.prefetch(0), 0, [ids])
        with pytest.raises(TransferRaceError, match=r"allocation: wait0 .* picked"):
            planted.check()

    def test_copy_that_outlives_its_step(self):
        planted = Planted()
        ticket = planted.prefetch(0, planted.fork(1))
        planted.wait(ticket, 0)
        planted.prefetch(2)
        with pytest.raises(TransferRaceError, match="prefetch2"):
            planted.check()


def _select(planted, fork, stream=COPY):
    with planted.graph.inserting_before(planted.ids):
        scores = planted._input("scores", (1, 2, 8), torch.float32)
    args = (scores, planted.state["lengths"], 3, 16, 1, 1, stream, fork)
    return planted.emit.call("select_blocks", *args, name="picked")


class TestSelectStream:
    """A copy follows the selection whose list it takes, and no other."""

    def test_copy_follows_the_selection_of_its_list(self):
        planted = Planted()
        planted.ids = picked = _select(planted, planted.fork(1), SELECT)
        planted.wait(planted.prefetch(0), 0, [picked])
        planted.append()
        assert planted.check() == 3

    def test_copy_of_another_list_does_not_wait_for_a_selection(self):
        planted = Planted()
        picked = _select(planted, planted.fork(1), SELECT)
        planted.wait(planted.prefetch(0, planted.fork(2)), 0, [picked])
        with pytest.raises(TransferRaceError, match=r"join: picked runs on the select stream"):
            planted.check()

    def test_list_of_a_selection_is_kept_until_its_copy_has_ended(self):
        planted = Planted()
        planted.ids = _select(planted, planted.fork(1), SELECT)
        planted.wait(planted.prefetch(0), 0)
        with pytest.raises(TransferRaceError, match=r"keepalive: \w+ is used by picked on the sel"):
            planted.check()

    def test_selection_does_not_wait_for_copies(self):
        planted = Planted()
        fork = planted.fork(1)
        ticket = planted.prefetch(0, fork)
        last = planted.state["last_block_ids_0"]
        picked = _select(planted, fork, SELECT)
        planted.emit.call("remember_ids", picked, last, name="late")
        planted.wait(ticket, 0, [picked])
        with pytest.raises(TransferRaceError, match=r"picked \(select|picked runs on the select"):
            planted.check()


class TestPrediction:
    """What predicts a step reads, on the select stream, what the step before has written."""

    def program(self, *, fork=True, joins=True, updates_first=False):
        planted = Planted()
        kept = [planted.state["level_0"], planted.state["trend_0"]]
        forked = planted.fork(1) if fork else None
        sizes = (planted.state["lengths"], 3, 16, 1, 1, 0.0)
        predicted = planted.emit.call(
            "predict_blocks", *kept, *sizes, SELECT, forked, name="predicted"
        )
        args = (predicted, predicted, planted.state["host_0"], planted.state["pages_0"], 2, None)
        ticket = planted.emit.call("prefetch_blocks", *args, name="prefetch2")
        with planted.graph.inserting_before(planted.ids):
            scores = planted._input("scores", (1, 2, 8), torch.float32)

        def update():
            planted.emit.call("update_prediction", scores, *kept, 0.4, 0.3, True, name="update")

        def wait():
            if joins:
                planted.wait(ticket, 2, [predicted], ("pages_0", "level_0", "trend_0"))

        for part in (update, wait) if updates_first else (wait, update):
            part()
        return planted

    def test_the_wait_for_its_copy_orders_it_before_the_update(self):
        assert self.program().check() > 0

    def test_update_before_the_wait(self):
        with pytest.raises(
            TransferRaceError, match=r"predicted \(select.*update.*both use sparda_l"
        ):
            self.program(updates_first=True).check()

    def test_wait_that_is_gone(self):
        with pytest.raises(TransferRaceError, match="join: predicted runs on the select stream"):
            self.program(joins=False).check()

    def test_fork_that_is_gone_lets_the_next_step_predict_before_the_update(self):
        with pytest.raises(TransferRaceError, match=r"allocation|in the next step"):
            self.program(fork=False).check()


class TestMessages:
    """Each message names the two nodes."""

    def test_state(self):
        planted = Planted()
        fork = planted.fork(1)
        planted.append()
        planted.wait(planted.prefetch(0, fork), 0)
        with pytest.raises(TransferRaceError) as caught:
            planted.check()
        assert str(caught.value) == (
            "state: append (compute stream) and prefetch0 (copy stream) are not ordered: both use "
            "sparda_pages_0."
        )

    def test_wait_for_another_copy(self):
        planted = Planted()
        fork = planted.fork(9)
        first, second = planted.prefetch(0, fork), planted.prefetch(1, fork)
        planted.wait(first, 1)
        planted.wait(second, 0)
        with pytest.raises(TransferRaceError, match=r"prefetch0 .* wait1 .* another copy's event"):
            planted.check()

    def test_wait_for_an_event_that_nothing_records(self):
        planted = Planted()
        planted.wait(planted.prefetch(0, planted.fork(1)), 7)
        with pytest.raises(TransferRaceError, match=r"event [07]"):
            planted.check()

    def test_use_before_the_wait(self):
        planted = Planted()
        fork, last = planted.fork(1), planted.state["last_block_ids_0"]
        ids = _select(planted, fork)
        ticket = planted.prefetch(0)
        planted.emit.call("remember_ids", ids, last, name="early")
        planted.wait(ticket, 0, [ids])
        with pytest.raises(TransferRaceError, match=r"data: picked \(copy .* early \(compute"):
            planted.check()
