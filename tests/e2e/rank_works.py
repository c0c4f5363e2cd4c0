"""What ranks do beside decoding, `sparda bench` and `sparda train`; `rank_cases.py` calls it."""

from __future__ import annotations

import torch
from typer.testing import CliRunner

from sparda_compile import SpardaConfig, train_forecast
from sparda_compile.bench.prefill import PrefillSetting
from sparda_compile.bench.rank_prompts import RankLab
from sparda_compile.bench.result_file import ResultFile
from sparda_compile.bench.turns import TurnSetting
from sparda_compile.cli.main import app
from sparda_compile.errors import RanksDisagreeError
from sparda_compile.forecast.projection import to_tensors
from sparda_compile.training.trainer import ForecastTrainer


def make_texts(folder):
    """Write documents to train on."""
    (folder / "texts").mkdir()
    for number in range(5):
        text = "".join(f"Line {n} says {n * n * (number + 3) % 97}.\n" for n in range(30))
        (folder / "texts" / f"{number}.txt").write_text(text)


TRAINED = {"pool_size": 8, "pool_stride": 4, "local_blocks": 1, "top_k": 3, "block_size": 16,
           "forecast_rank": 12}  # fmt: skip


def training_batches(count):
    """Return sequences to train on, and one that is held out."""
    generator = torch.Generator().manual_seed(7)
    made = [torch.randint(0, 256, (1, 100), generator=generator) for _ in range(count + 1)]
    return made[:-1], made[-1:]


def trained(model, **settings):
    """Train for two steps; return weights, and what each step and measurement saw."""
    batches, held_out = training_batches(4)
    steps, measures = [], []
    weights = train_forecast(
        model, batches, config=SpardaConfig(**TRAINED), steps=2, lr=3e-3, held_out=held_out,
        on_step=steps.append, on_measure=measures.append, progress=False, **settings,
    )  # fmt: skip
    said_of = [(each.losses, each.recalls, each.num_tokens) for each in (*steps, *measures)]
    return {"weights": to_tensors(weights.projections), "reports": said_of}


def trained_by_command(folder, rank, *options, accumulate=1):
    """Return what `sparda train` prints; it writes a file for each process that writes one."""
    sizes = {name.replace("_", "-"): str(value) for name, value in TRAINED.items()}
    sizes["rank"] = sizes.pop("forecast-rank")
    words = [word for name, value in sizes.items() for word in (f"--{name}", value)]
    words += ["--document", str(folder / "texts"), "--tokenizer", "bytes", "--held-out", "0.4"]
    words += [
        "--length",
        "100",
        "--steps",
        "2",
        "--lr",
        "3e-3",
        "--json",
        "--accumulate",
        str(accumulate),
        *options,
    ]
    out = str(folder / f"trained{rank}.safetensors")
    ran = CliRunner().invoke(app, ["train", str(folder / "llama"), "--out", out, *words])
    assert ran.exit_code == 0, ran.output
    return ran.stdout


def start_of(trainer):
    """Return where a training starts."""
    return {name: weight.detach().clone() for name, weight in trainer.parameters.items()}


def gathered_start(fast):
    """Return where a training starts for a model of which every rank has all heads."""
    return start_of(ForecastTrainer(fast, SpardaConfig(**TRAINED), 3e-3))


def training_of_a_part(fast, rank):
    """Return where a training of a sharded model starts, and what is said of other batches."""
    trainer = ForecastTrainer(fast, SpardaConfig(**TRAINED), 3e-3)
    start = start_of(trainer)
    try:
        trainer.step([training_batches(4)[0][rank]])
        said_of = "nothing was raised"
    except RanksDisagreeError as error:
        said_of = str(error)
    return {"start": start, "other batches": said_of}


def benchmarks(folder):
    """Write what `sparda bench prefill --tp 2` and `bench turns --tp 2` do."""
    lab = RankLab("tiny", lambda text: None, torch.device("cpu"), 2)
    small = {"block_size": 16, "top_k": 2, "local_blocks": 2, "machine": "h200"}
    common = {"rounds": 1, "settings": small}
    file = ResultFile(folder / "prefill.json", {"name": "prefill-tp"}, "tokens")
    lab.prefill(PrefillSetting((120,), ("sparse_query",), **common), file)
    file = ResultFile(folder / "turns.json", {"name": "turns-tp"}, "past")
    names = ("sparse_query", "transformers_flash")
    lab.turns(TurnSetting((200,), (1, 20), names, **common), file)
