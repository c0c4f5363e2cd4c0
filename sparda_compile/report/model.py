"""`Report`: everything that is known about a rewritten model without running it."""

from __future__ import annotations

import dataclasses
import html
from typing import TYPE_CHECKING, Any, Final

from sparda_compile.config import MACHINE_NAMES
from sparda_compile.report.text import format_bytes, html_table

if TYPE_CHECKING:
    from pathlib import Path

    from sparda_compile.report.schedule import Schedule

__all__ = ["LayerPlan", "PassSummary", "PromptMemory", "Report", "SiteSummary"]

_MORE: Final = "print() shows passes and attentions, to_html(path) writes a page with all."


@dataclasses.dataclass(frozen=True)
class SiteSummary:
    """One attention of the model, as FindAttention saw it.

    Attributes:
        layer: Index of the decoder layer.
        module: Path of the attention module, `model.layers.0.self_attn`.
        form: `sdpa` or `eager`.
        kind: `sparse` (rewritten), `window` (kept dense over a sliding window).
        reason: Why it stays dense; empty for sparse ones.
        num_heads: Query heads.
        num_groups: KV heads.
        head_dim: Width of one head.
        scale: Factor on the scores.
        window: Sliding window in tokens, 0 for none.
        softcap: Soft cap on the scores, 0.0 for none.
        projection: Module path of the linear that makes the query.
        position: What rotates the query: `rope` or `none`.
    """

    layer: int
    module: str
    form: str
    kind: str
    reason: str
    num_heads: int
    num_groups: int
    head_dim: int
    scale: float
    window: int
    softcap: float
    projection: str
    position: str


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """Planned bytes of one layer's KV cache, for the whole batch."""

    layer: int
    host_bytes: int
    page_bytes: int
    summary_bytes: int
    table_bytes: int


@dataclasses.dataclass(frozen=True)
class PromptMemory:
    """What reading a prompt takes on a GPU, beside weights and KV cache.

    Attributes:
        num_tokens: Columns that are read at once, of each sequence: one chunk.
        peak_bytes: Most bytes that are held at once.
        peak_call: Name of the op or piece that holds them.
        whole: Pieces that cannot run on slices of a prompt, each with the reason.
        logits_bytes: Logits of the chunk, which are part of it.
        room_bytes: Memory that is left for all of it; None where nothing limits it.
        kept_bytes: Most that CUDA graphs of short prompts keep between calls, once a shape of
            prompt has come twice; see `program/prompt_graphs.py`.
    """

    num_tokens: int
    peak_bytes: int
    peak_call: str
    whole: tuple[tuple[str, str], ...] = ()
    logits_bytes: int = 0
    room_bytes: int | None = None
    kept_bytes: int = 0

    @property
    def fits(self) -> bool:
        """Whether there is room for it."""
        return self.room_bytes is None or self.peak_bytes <= self.room_bytes


@dataclasses.dataclass(frozen=True)
class PassSummary:
    """What one pass did to one graph.

    Attributes:
        phase: `prefill` or `decode`.
        name: The pass.
        counts: What it counted, `{"sites": 32}`.
        ms: Milliseconds that it took.
        nodes_before: Nodes of the graph before it.
        nodes_after: Nodes of the graph after it.
        before: Text of the graph before it; left out of `repr`.
        after: Text of the graph after it; left out of `repr`.
    """

    phase: str
    name: str
    counts: dict[str, int]
    ms: float
    nodes_before: int
    nodes_after: int
    before: str = dataclasses.field(repr=False)
    after: str = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """What `explain` returns; `str()` prints it, `to_html` writes the whole of it.

    Attributes:
        model: Class name of the model.
        mode: Mode of the configuration.
        batch_size: Sequences that the plan is for.
        max_tokens: Tokens per sequence that the plan is for.
        sites: Every attention found, in layer order.
        layers: Planned bytes per layer.
        passes: What each pass did, in order, prefill and decode.
        schedules: Predicted schedules, by phase.
        forecast_parameters: Number of Forecast weights that the mode needs.
        model_parameters: Number of weights of the model.
        error: Why the model cannot be rewritten; empty when it can.
        selection_starts_at: Tokens of a sequence from which on a step leaves blocks out; None if
            it never does.
        selection: The same as a sentence.
        speculation: In mode `speculate`, which layers begin their attention early, in a sentence;
            else empty.
        weight_bytes: Of the model's weights and buffers, of Forecasts, and of joined copies.
        num_ranks: Processes that share the model; bytes and heads are those of one of them.
        collectives: What they do together in a step, in words; empty for one.
        kv_copies: Ranks that keep each KV head: one, or all of them.
        prompt: Memory of a prompt that fills the KV cache; None where nothing is read.
        kv_format: How full blocks are written.
        has_stored_pages: Whether pages of some layers hold full blocks as CPU memory does.
        page_reason: Why, where `page_format="auto"` was given.
        machine: What was planned for; empty where nothing was.
    """

    model: str
    mode: str
    batch_size: int
    max_tokens: int
    sites: tuple[SiteSummary, ...]
    layers: tuple[LayerPlan, ...]
    passes: tuple[PassSummary, ...]
    schedules: tuple[Schedule, ...]
    forecast_parameters: int
    model_parameters: int
    error: str = ""
    selection_starts_at: int | None = None
    selection: str = ""
    weight_bytes: int = 0
    prompt: PromptMemory | None = None
    speculation: str = ""
    num_ranks: int = 1
    collectives: str = ""
    kv_copies: int = 1
    kv_format: str = "model"
    has_stored_pages: bool = False
    page_reason: str = ""
    machine: str = ""

    @property
    def host_bytes(self) -> int:
        """CPU memory that the KV cache will take."""
        return sum(layer.host_bytes for layer in self.layers)

    @property
    def device_bytes(self) -> int:
        """Device memory that the KV cache will take."""
        return sum(p.page_bytes + p.summary_bytes + p.table_bytes for p in self.layers)

    @property
    def replicated_bytes(self) -> int:
        """Memory of all ranks together for copies of KV heads that another rank keeps, too."""
        return (self.kv_copies - 1) * (self.host_bytes + self.device_bytes)

    @property
    def peak_device_bytes(self) -> int:
        """Device memory that is taken while a prompt is read: weights, KV cache, all the rest."""
        reading = self.prompt.peak_bytes if self.prompt is not None else 0
        return self.weight_bytes + self.device_bytes + reading

    @property
    def sparse_sites(self) -> tuple[SiteSummary, ...]:
        """Attentions that are rewritten."""
        return tuple(site for site in self.sites if site.kind == "sparse")

    @property
    def dense_sites(self) -> tuple[SiteSummary, ...]:
        """Attentions that stay dense, each with its reason."""
        return tuple(site for site in self.sites if site.kind != "sparse")

    def __str__(self) -> str:
        """Return the report as text: a line for each pass, attention and schedule."""
        if self.error:
            return self._refusal
        lines = [
            f"{self.model}, {self._rewritten}",
            *self._known,
        ]
        lines += [f"  {p.phase:7} {p.name}: {_counts(p.counts)}" for p in self.passes]
        lines += [
            f"  layer {site.layer}: {site.form} {site.num_heads}/{site.num_groups} heads of "
            f"{site.head_dim}, {site.kind}" + (f" ({site.reason})" if site.reason else "")
            for site in self.sites
        ]
        return "\n".join([*lines, *(schedule.summary for schedule in self.schedules)])

    def __repr__(self) -> str:
        """Return what is known of the whole model: one screen, however deep it is."""
        if self.error:
            return f"<Report of {self._refusal}>"
        lines = [
            f"<Report of {self.model}, {self._rewritten}>",
            *self._known,
            *(schedule.summary for schedule in self.schedules),
            _MORE,
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return the same for a notebook."""
        if self.error:
            return f"<p>{html.escape(self._refusal)}</p>"
        rows = [*self._facts.items(), ("Selection", self.selection)]
        rows += [("Speculation", self.speculation)] if self.speculation else []
        rows += [("Step", schedule.summary) for schedule in self.schedules]
        table = html_table(f"Report of {self.model}, {self._rewritten}", (), rows)
        return f"{table}<p>{html.escape(_MORE)}</p>"

    @property
    def _refusal(self) -> str:
        return f"{self.model}: cannot be rewritten. {self.error}"

    @property
    def _rewritten(self) -> str:
        return (
            f"mode {self.mode}: {len(self.sparse_sites)} attentions rewritten, "
            f"{len(self.dense_sites)} left dense"
        )

    @property
    def _known(self) -> list[str]:
        lines = [f"{name}: {value}" for name, value in self._facts.items()]
        return [*lines, *(text for text in (self.selection, self.speculation) if text)]

    @property
    def _facts(self) -> dict[str, str]:
        share = self.forecast_parameters / max(self.model_parameters, 1)
        facts = {
            f"KV cache of {self.batch_size} x {self.max_tokens} tokens": (
                f"{format_bytes(self.host_bytes)} in CPU memory, "
                f"{format_bytes(self.device_bytes)} on the device"
            ),
            "Forecast": f"{self.forecast_parameters} parameters, {100 * share:.2f}% of the model",
        }
        if self.kv_format != "model":
            where = ", in pages too" if self.has_stored_pages else ""
            if self.page_reason:
                pages = where or ", in pages in the model's dtype"
                where = f"{pages} (auto: {self.page_reason})"
            facts["Full blocks"] = f"written in {self.kv_format}{where}"
        return self._shared | facts | self._reading

    @property
    def _shared(self) -> dict[str, str]:
        if self.num_ranks == 1:
            return {}
        heads = sorted({site.num_groups for site in self.sites})
        return {
            f"Each of {self.num_ranks} ranks": (
                f"{', '.join(map(str, heads))} KV heads of a layer{self._copies}; a step has "
                f"{self.collectives or 'no collectives'}. What follows is of one rank"
            )
        }

    @property
    def _copies(self) -> str:
        if self.kv_copies == 1:
            return ""
        return (
            f", the same on every rank, as its plan gathers them: {self.kv_copies} times the KV "
            f"cache, {format_bytes(self.replicated_bytes)} of it replicated"
        )

    @property
    def _reading(self) -> dict[str, str]:
        if self.prompt is None:
            return {}
        chunk, room = self.prompt.num_tokens, self.prompt.room_bytes
        whole = "".join(f"; {name} runs whole: {reason}" for name, reason in self.prompt.whole)
        if room is not None and not self.prompt.fits:
            whole = f", for which {format_bytes(max(room, 0))} are left: it does not fit{whole}"
        at_once = f", {chunk} at once" if chunk < self.max_tokens else ""
        if self.prompt.kept_bytes:
            kept = format_bytes(self.prompt.kept_bytes)
            whole += f"; up to {kept} stay in CUDA graphs of short prompts"
        where = "GPU memory"
        if self.machine == "cpu":
            # What is joined, replayed and copied beside compute on a GPU is none of this plan.
            others = " or ".join(name for name in MACHINE_NAMES if name != "cpu")
            where = "Memory"
            whole += f"; planned for a CPU: SpardaConfig.machine plans for {others}"
        return {
            f"{where} while {self.batch_size} x {self.max_tokens} tokens are read{at_once}": (
                f"{format_bytes(self.peak_device_bytes)}: {format_bytes(self.weight_bytes)} of "
                f"weights, {format_bytes(self.device_bytes)} of KV cache, "
                f"{format_bytes(self.prompt.peak_bytes)} in {self.prompt.peak_call}{whole}"
            )
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON; graph texts are left out."""
        plain = dataclasses.asdict(dataclasses.replace(self, schedules=()))
        for entry in plain["passes"]:
            del entry["before"], entry["after"]
        plain["schedules"] = [schedule.to_dict() for schedule in self.schedules]
        plain["host_bytes"] = self.host_bytes
        plain["device_bytes"] = self.device_bytes
        plain["peak_device_bytes"] = self.peak_device_bytes
        plain["replicated_bytes"] = self.replicated_bytes
        return plain

    def to_html(self, path: str | Path) -> Path:
        """Write the whole report as one self-contained HTML file and return its path.

        Raises:
            ConfigError: If the file cannot be written; nothing of it is left then.
        """
        from sparda_compile.report.html import write_html

        return write_html(
            path, title=f"sparda: {self.model}", schedules=self.schedules, report=self
        )


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{value} {name}" for name, value in counts.items()) or "nothing to do"
