"""What a training run has shown: whether its curves agree, tables, remarks and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from rich.table import Table

from .measure import EAGER, FUSED
from .phases import PHASES
from .pictures import Bar, Pictures, draw_curves, draw_predictions, draw_steps

NAMES = {EAGER: "eager reference", FUSED: "fused"}
COMPARED = 10  # first steps, over which the curves are held to BOUND
JUDGED = 100  # steps of a run, from which on its loss must have fallen
BOUND = 2e-5  # relative; 3.4e-6 was seen. Tens of steps later one flipped assignment sets any two roundings 1e-2 apart
SHOWN = 12  # pictures in predictions.png
CLOCKS = "host: until the calls had returned, nothing being queued before; busy: what the GPU had to do"
INTERPRETED = "?: the fused loss ran in Triton's interpreter"


def fell(steps: Sequence[dict[str, float]]) -> bool:
    """Whether the last quarter of a curve lies below its first."""
    quarter = max(1, len(steps) // 4)
    return fmean(s["total"] for s in steps[-quarter:]) < fmean(s["total"] for s in steps[:quarter])


def faults(result: dict) -> list[str]:
    """What is wrong with the curves. A fused run that stopped early is held to the other one alone.

    Whether the loss fell is asked of longer runs: from batch to batch it differs by the number of objects.
    """
    found = []
    early = max(result["difference"][:COMPARED])
    if not early <= BOUND:
        found.append(f"The curves differ by {early:.1e} within {COMPARED} steps, want at most {BOUND:g}.")
    for provider, run in result["runs"].items():
        if result["config"]["steps"] == len(run["steps"]) >= JUDGED and not fell(run["steps"]):
            found.append(f"The loss of the {NAMES.get(provider, provider)} run did not fall.")
    return found


def phase_table(result: dict) -> Table:
    """Where a step goes."""
    config, gpu = result["config"], not result["interpreted"]
    title = f"{config['loss']}, batches of {config['batch']} images of {config['size']} x {config['size']}"
    table = Table(title=title, caption=CLOCKS if gpu else INTERPRETED)
    table.add_column("ms of a step")
    for provider in result["runs"]:
        for column in (NAMES.get(provider, provider), "share", *["host", "busy"] * gpu):
            table.add_column(column, justify="right")
    for name in (*PHASES, "step"):
        cells = []
        for provider, run in result["runs"].items():
            step = run["step_seconds"]["p50"]
            seconds = run["seconds"].get(name, step)
            told = gpu or provider != FUSED
            cells.append(f"{1e3 * seconds:.2f}" if told or name not in ("loss", "step") else "?")
            cells.append(f"{seconds / step:.1%}" if told else "?")
            for clock in ("host_seconds", "busy_seconds") * gpu:
                cells.append(f"{1e3 * (sum(run[clock].values()) if name == 'step' else run[clock].get(name, 0)):.2f}")
        table.add_row(name, *cells, end_section=name == PHASES[-1])
    return table


def table(result: dict) -> Table:
    """The summary."""
    runs, rows = list(result["runs"].values()), Table()
    rows.add_column()
    for provider in result["runs"]:
        rows.add_column(NAMES.get(provider, provider), justify="right")
    shared = len(result["difference"])
    rows.add_row("steps, and those timed", *(f"{len(run['steps'])}, {run['timed_steps']}" for run in runs))
    for title, step in (("the first step", 0), (f"step {shared}", shared - 1), ("the last step", -1)):
        rows.add_row(f"loss at {title}", *(f"{run['steps'][step]['total']:.4f}" for run in runs))
    for steps in sorted({min(COMPARED, shared), shared}):
        rows.add_row(
            f"largest relative difference, first {steps} steps", "", f"{max(result['difference'][:steps]):.1e}"
        )
    rates = [" ".join(f"{rate:.1f}" for rate in run["images_per_second"].values()) for run in runs]
    rows.add_row("images/s, p20 p50 p80", rates[0], "?" if result["interpreted"] else rates[1])
    where = "of the loss alone, counted" if result["interpreted"] else "of a step"
    waits = ("?" if run["waits"] is None else f"{sum(run['waits'].values()):g}" for run in runs)
    rows.add_row(f"host waits {where}", *waits)
    rows.add_row("held-out annotations found", f"{result['recall']:.0%}", "")
    rows.add_row("detections that are annotated", f"{result['precision']:.0%}", "")
    return rows


def remarks(result: dict) -> Iterator[str]:
    """What bounds each run, and where its host waits."""
    for provider, run in result["runs"].items():
        name, found = NAMES.get(provider, provider), run["verdict"]
        if not (result["interpreted"] and provider == FUSED):
            here = ", on this CPU" * result["interpreted"]
            saving = f"A faster loss could save at most {found['saving']:.0%} of a step{here}."
            yield f"{name}: {found['bound']} ({found['why']}). {saving}"
        if run["waits"]:
            yield f"{name}, host waits: " + ", ".join(f"{n:g} x {place}" for place, n in run["waits"].items())


def bars(result: dict) -> list[Bar]:
    """The two runs as they are drawn; on a GPU the host's time under each."""
    found, gpu = [], not result["interpreted"]
    for provider, run in result["runs"].items():
        name, phases = NAMES.get(provider, provider), run["seconds"]
        if not gpu and provider == FUSED:
            found.append(Bar(name, phases, f"{len(run['steps'])} steps, loss interpreted", untold="loss"))
            continue
        note = f"{1e3 * run['step_seconds']['p50']:.3g} ms, {run['images_per_second']['p50']:.3g} images/s"
        found.append(Bar(name, phases, f"{note}, {run['verdict']['bound']}" if gpu else note))
        if gpu:
            calls = run["host_seconds"]
            note = f"{1e3 * sum(calls.values()):.3g} ms until all calls return"
            found.append(Bar("its host", calls, note, under=True))
    return found


def draw(result: dict, out: Path, validation: Pictures, detections: Sequence[dict], names: Sequence[str]) -> None:
    """The pictures."""
    config, curves = result["config"], [run["steps"] for run in result["runs"].values()]
    labels = [NAMES.get(provider, provider) for provider in result["runs"]]
    draw_curves(out / "curves.png", labels, curves, result["difference"], BOUND)
    title = f"{config['loss']}: where a step goes. {config['batch']} images of {config['size']} x {config['size']}"
    draw_steps(out / "steps.png", f"{title} on {result['device']}", bars(result))
    title = f"Held-out images after {config['steps']} steps: detections in colour, annotations dashed in white"
    draw_predictions(out / "predictions.png", validation, detections[:SHOWN], names, title)
