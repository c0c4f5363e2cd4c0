from __future__ import annotations

import itertools
import random

import pytest
import torch

from sparda_compile.kernels.gpu import hopper_blocks
from sparda_compile.kernels.gpu.hopper_blocks import PLACES, STEP
from sparda_compile.kernels.gpu.token_blocks import Prompt, Unions
from sparda_compile.kernels.workspace import HALVES_ROWS

FIRST_TILE, LENGTHS = 3, (1000, 64)


def listed(device, bits, blocks, counts, room):
    """Return what kernels make of who reads which blocks: [pairs, tiles, U, tokens] bool."""
    pairs, tiles, most, tokens = bits.shape
    readers = (bits.long() << torch.arange(tokens)).sum(-1).int()[..., None].contiguous()
    slots = torch.arange(most, dtype=torch.int32).flip(0).expand(pairs, tiles, most).contiguous()
    union = Unions(*(t.to(device) for t in (counts, blocks, readers, slots)))
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    staging = torch.empty(2, pairs // 2, 1, 2, 64, 1, device=device)
    prompt = Prompt(lengths, lengths, lengths, staging, torch.empty(2, pairs // 2, 1))
    return [t.cpu() for t in hopper_blocks.list_entries(union, prompt, FIRST_TILE, room)]


def random_bits(share, shape, generator):
    """Return who reads each block: somebody does."""
    bits = torch.rand(shape, generator=generator) < share
    some = torch.randint(shape[-1], shape[:-1], generator=generator)
    return torch.where(bits.any(-1, keepdim=True), bits, some[..., None] == torch.arange(shape[-1]))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("room", [4, 16, 128])
def test_each_half_lists_what_it_reads_and_leaves_out_no_long_run(device, room, share):
    tokens, most = HALVES_ROWS // room, 300
    generator = torch.Generator().manual_seed(1)
    counts = torch.tensor([[0, 1, 2], [7, 171, most]], dtype=torch.int32)
    bits = random_bits(share, (2, 3, most, tokens), generator)
    blocks = torch.arange(most, dtype=torch.int32).expand(2, 3, most).contiguous()
    words, own, brought = listed(device, bits, blocks, counts, room)
    for pair, tile, half in itertools.product(range(2), range(3), range(2)):
        count, total = int(counts[pair, tile]), int(own[pair, tile, half])
        first = half * tokens // 2 if room <= 64 else 0
        mine = bits[pair, tile, :count, first : first + max(64 // room, 1)]
        word, end = words[pair, tile, half, :total], words[pair, tile, half, total]
        sides = brought[pair, tile, :count] & 3
        entry = torch.where(sides >> half & 1 != 0)[0]
        assert len(entry) == total
        assert mine.sum() == mine[entry].sum()
        steps = [after - before for before, after in itertools.pairwise(entry.tolist())]
        assert max(steps, default=0) <= STEP
        assert brought[pair, tile, :count].equal(most - 1 - torch.arange(count).int() << 2 | sides)
        read = (mine[entry].long() << torch.arange(mine.shape[1])).sum(-1)
        position = LENGTHS[pair] + FIRST_TILE * tokens + tile * tokens + first
        last = (blocks[pair, tile, entry] - position // 64 + 1).clamp(min=0)
        shared = (sides[entry] == 3).int()
        want = read | entry % PLACES << 16 | shared << 20 | last.long() << 22
        assert word.long().equal(want)
        # Behind them is one of no reader, in the place of the last one.
        place = int(entry[-1]) % PLACES if total else 0
        assert int(end) == place << 16 | 1 << 21


class Barrier:
    """Of one arrival a phase."""

    def __init__(self):
        self.phases = 0

    def passes(self, parity):
        return (self.phases - 1) & 1 == parity


class Tile:
    """The barriers of a tile, and who waits for them, step by step.

    Args:
        sides: Bits of the halves that list an entry.
        places: Of keys, and as many of values.
    """

    def __init__(self, sides, places):
        self.sides, self.places = sides, places
        self.ready = [[Barrier() for _ in range(3 * places)] for _ in range(2)]
        self.free = [[Barrier() for _ in range(2 * places)] for _ in range(2)]
        self.there = [[None] * places for _ in range(2)]

    def bring(self, kind):
        """Bring keys, 0, or values, 1; yields what is waited for."""
        phases, held = [0] * (2 * self.places), [False] * (2 * self.places)
        for entry, sides in enumerate(self.sides):
            place = entry % self.places
            for half in range(2):
                at = half * self.places + place
                if held[at]:
                    yield self.free[kind][at], phases[at]
                    phases[at] ^= 1
                held[at] = bool(sides >> half & 1)
            self.there[kind][place] = entry
            self.ready[kind][(sides - 1) * self.places + place].phases += 1
            yield None

    def multiply(self, half):
        """Multiply a half's pairs; yields what is waited for."""
        own = [entry for entry, sides in enumerate(self.sides) if sides >> half & 1]
        pairs = [own[i : i + 2] for i in range(0, len(own), 2)]
        phases = [[0] * (3 * self.places) for _ in range(2)]

        def await_pair(kind, pair):
            for entry in pair:
                group = 2 if self.sides[entry] == 3 else half
                at = group * self.places + entry % self.places
                yield self.ready[kind][at], phases[kind][at]
                phases[kind][at] ^= 1
                assert self.there[kind][entry % self.places] == entry

        def free(kind, pair):
            for entry in pair:
                assert self.there[kind][entry % self.places] == entry
                self.free[kind][half * self.places + entry % self.places].phases += 1

        for before, pair in itertools.pairwise([[], *pairs, []]):
            yield from await_pair(0, pair)
            yield from await_pair(1, before)
            yield None
            free(0, pair)
            yield None
            free(1, before)

    def ends(self, speeds):
        """Whether all end, of whom each takes a step as often as its speed says."""
        workers = dict(
            enumerate([self.bring(0), self.bring(1), self.multiply(0), self.multiply(1)])
        )
        waits = dict.fromkeys(workers)
        while workers:
            able = [i for i in workers if waits[i] is None or waits[i][0].passes(waits[i][1])]
            if not able:
                return False
            turn = random.choices(able, [speeds[i] for i in able])[0]
            try:
                waits[turn] = next(workers[turn])
            except StopIteration:
                del workers[turn]
        return True


@pytest.mark.parametrize(("places", "end"), [(PLACES, True), (PLACES - 2, False)])
def test_nobody_waits_for_ever(device, places, end):
    """Whoever is fast or slow, with runs of blocks that one half reads; too few places are seen."""
    random.seed(1)
    generator, most = torch.Generator().manual_seed(2), 48
    share = torch.rand(64, 6, generator=generator).repeat_interleave(8, 1)[..., None]
    half = torch.rand(64, 6, 1, generator=generator).repeat_interleave(8, 1) < 0.5
    bits = torch.rand(64, most, 2, generator=generator) < share * torch.cat([half, ~half], -1)
    bits[..., 0] |= ~bits.any(-1)
    counts = torch.randint(most + 1, (2, 32), generator=generator, dtype=torch.int32)
    blocks = torch.arange(most, dtype=torch.int32).expand(2, 32, most).contiguous()
    brought = listed(device, bits.view(2, 32, most, 2), blocks, counts, 64)[2]
    all_end = True
    for count, sides in zip(counts.view(-1).tolist(), brought.view(64, most) & 3, strict=True):
        for _ in range(4):
            speeds = random.choices([0.01, 0.1, 1.0], k=4)
            all_end &= Tile(sides[:count].tolist(), places).ends(speeds)
    assert all_end == end
