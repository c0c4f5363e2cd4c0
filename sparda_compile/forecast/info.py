"""What Forecast weights were trained for, as their file says it."""

from __future__ import annotations

import dataclasses
import json
from typing import Final

from sparda_compile.checks import whole
from sparda_compile.errors import ConfigError

__all__ = ["ForecastInfo"]

FORMAT_VERSION: Final = 4
# Of a description without `heads`, which one head per KV head does not need.
_ONE_HEAD: Final = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForecastInfo:
    """What Forecast weights were trained for.

    Attributes:
        model: Class name of the model.
        layers: Target layers, ascending.
        groups: KV heads of each of them.
        head_dim: Width of one head of each.
        hidden: Width of the hidden state that each projection reads.
        ranks: Rank of each projection, None for a full one.
        block_size: Tokens of one KV block.
        pool_size: Tokens of one pooled key.
        pool_stride: Tokens between the starts of neighbouring pooled keys.
        top_k: Blocks that the teacher selected.
        steps: Optimizer steps taken.
        num_tokens: Tokens of one training sequence.
        versions: Versions of sparda_compile and torch.
        selector: The selector of `SpardaConfig` whose summary of the keys they score.
        heads: Heads of the Forecast for each KV head.
        format_version: Of this description.
    """

    model: str
    layers: tuple[int, ...]
    groups: tuple[int, ...]
    head_dim: tuple[int, ...]
    hidden: tuple[int, ...]
    ranks: tuple[int | None, ...]
    block_size: int
    pool_size: int
    pool_stride: int
    top_k: int
    steps: int
    num_tokens: int
    versions: dict[str, str]
    selector: str = "infllm2"
    heads: int = 1
    format_version: int = FORMAT_VERSION

    @property
    def sizes(self) -> dict[str, int]:
        """Fields of SpardaConfig that the blocks it picks depend on, as they were in training."""
        return {name: getattr(self, name) for name in ("block_size", "pool_size", "pool_stride")}

    @property
    def settings(self) -> dict[str, int]:
        """Fields of SpardaConfig that it is used with: `sizes`, and its heads if it has several."""
        return self.sizes | ({"forecast_heads": self.heads} if self.heads > 1 else {})

    def to_json(self) -> str:
        """Return the fields as a JSON object, in the oldest format that can say them."""
        fields = dataclasses.asdict(self)
        if self.heads == 1:
            del fields["heads"]
            fields["format_version"] = _ONE_HEAD
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> ForecastInfo:
        """Read what `to_json` wrote.

        Raises:
            ValueError: If it is something else, or of a later format.
        """
        fields = json.loads(text)
        if isinstance(fields, dict) and fields.get("format_version") == 1:
            # Then every projection was full.
            fields |= {"ranks": [None] * len(fields["layers"]), "format_version": 2}
        if isinstance(fields, dict) and fields.get("format_version") == 2:
            # Then every Forecast scored pooled keys.
            fields |= {"selector": "infllm2", "format_version": _ONE_HEAD}
        if isinstance(fields, dict) and fields.get("format_version") == _ONE_HEAD:
            fields = {"heads": 1, **fields, "format_version": FORMAT_VERSION}
        if not isinstance(fields, dict) or fields.get("format_version") != FORMAT_VERSION:
            found = fields.get("format_version") if isinstance(fields, dict) else None
            raise ValueError(f"format_version is {found}, this version reads {FORMAT_VERSION}")
        names = {field.name for field in dataclasses.fields(cls)}
        if set(fields) != names:
            raise ValueError(f"its fields are {sorted(fields)}, not {sorted(names)}")
        lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        info = cls(**(fields | lists))
        info.check()
        return info

    def check(self) -> None:
        """Look at the type and the range of each field.

        Raises:
            ConfigError: If one is not what a training writes; the text names it.
        """
        for name in ("block_size", "pool_size", "pool_stride", "heads"):
            whole(name, getattr(self, name), 1)
        for name in ("top_k", "steps", "num_tokens"):
            whole(name, getattr(self, name), 0)
        per_layer = ("layers", "groups", "head_dim", "hidden", "ranks")
        for name in per_layer:
            values = getattr(self, name)
            if not isinstance(values, tuple) or len(values) != len(self.layers):
                raise ConfigError(f"{name}={values!r:.80} is not one number for each layer.")
            for value in values:
                if name != "ranks" or value is not None:
                    whole(name, value, 0 if name == "layers" else 1)
        if list(self.layers) != sorted(set(self.layers)):
            raise ConfigError(f"layers={self.layers!r:.80} are not ascending.")
        texts = [self.model, self.selector]
        if isinstance(self.versions, dict):
            texts += [*self.versions, *self.versions.values()]
        if not isinstance(self.versions, dict) or not all(isinstance(t, str) for t in texts):
            raise ConfigError(
                f"model={self.model!r:.80}, selector={self.selector!r:.80} or versions has what is "
                "no text."
            )
