"""Verbs that analyse: plans, sweeps, figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.errors import IsthmusError
from isthmus.options import WholeSummaries
from isthmus.verbs.common import AllowChange, Json, Overrides, RecipeName, RunName, print_json

if TYPE_CHECKING:
    from isthmus.lab.sweep_table import Table

app = typer.Typer()
analyse = typer.Typer(
    cls=WholeSummaries,
    help="What training did, and how the result works.",
    no_args_is_help=True,
)
app.add_typer(analyse, name="analyse")


Page = Annotated[
    Path | None, typer.Option("--output", "-o", help="Also draw it: a new page, FILE.html.")
]


@analyse.command()
def emergence(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="Run folders, also unfinished.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also draw it: FILE.html or FILE.svg.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Where next-token accuracy jumped in training, run beside run."""
    from isthmus.display import print_table
    from isthmus.lab.curves import check_output, emergence_row, read_runs, write_emergence

    if output is not None:
        check_output(output)
    found = read_runs(runs)
    if output is not None:
        write_emergence(found, output)
    if as_json:
        print_json({"runs": [run.to_dict() for run in found]})
    else:
        titles = ("run", "steps", "jump at", "from %", "to %")
        print_table(titles, [emergence_row(run) for run in found])


@analyse.command()
def alignment(
    run: RunName,
    data: Annotated[
        list[str], typer.Argument(metavar="DATA…", help="Manifests or folders with transcripts.")
    ],
    utterances: Annotated[int, typer.Option(min=2, help="Measured, drawn by chance.")] = 100,
    drawn: Annotated[int, typer.Option(min=0, help="Of them on the page.")] = 8,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    output: Page = None,
    as_json: Json = False,
) -> None:
    """Whether tokens find their sound in the order in which they were spoken, and by chance."""
    from isthmus.decoding.evaluate import load_sets
    from isthmus.decoding.transcriber import load
    from isthmus.display import counting
    from isthmus.lab.curves import PAGE, check_output
    from isthmus.lab.order import mean_text, measure_order, pick_spoken, write_order

    if output is not None:
        check_output(output, [PAGE])
    cuts = [cut for cuts in load_sets(data)[0].values() for cut in cuts]
    model = load(run).model
    spoken = pick_spoken(model, cuts, utterances, seed)
    with counting("utterances") as on_utterance:
        order = measure_order(model, spoken, seed=seed, drawn=drawn, on_utterance=on_utterance)
    if output is not None:
        write_order(order, f"What each token resembles: {run}", output)
    if as_json:
        print_json({"run": run, "seed": seed} | order.to_dict())
    else:
        means = order.means
        typer.echo(f"order of {len(spoken)} utterances; 1 is perfect, 0 chance (95 % interval)")
        typer.echo(f"own audio:           {mean_text(means['own'])}")
        typer.echo(f"audio of another:    {mean_text(means['control'])}")
        typer.echo(f"own above another's: {mean_text(means['difference'])}")


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    hours: Annotated[float | None, typer.Option(min=0.001, help="Of speech to suppose.")] = None,
    mean_seconds: Annotated[
        float | None, typer.Option(min=0.1, help="Of the mean utterance to suppose.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="Name, as h200, a100 or 'rtx 4090'.")] = "h200",
    gpus: Annotated[int, typer.Option(min=1, help="How many of them.")] = 1,
    mfu: Annotated[
        float, typer.Option(min=0.001, max=1, help="Share of their peak that is reached.")
    ] = 0.35,
    as_json: Json = False,
) -> None:
    """Sizes, memory and hours of a training, before anything is downloaded."""
    from isthmus.recipe import load_any_recipe
    from isthmus.training.hardware import named_peak

    chosen = load_any_recipe(recipe, overrides or [])  # whose faults need not wait for torch
    named_peak(gpu)
    from isthmus.lab.plan import Hardware, make_plan

    hardware = Hardware(gpu, gpus, mfu)
    found = make_plan(chosen, hardware, hours=hours, mean_seconds=mean_seconds)
    if as_json:
        print_json(found.to_dict())
    else:
        typer.echo("\n".join(found.lines()))


@app.command()
def presets(as_json: Json = False) -> None:
    """List the models whose sizes are known offline."""
    from isthmus.lab.plan import short, table
    from isthmus.lab.sizes import presets_table

    rows = presets_table()
    if as_json:
        print_json(rows)
    else:
        cells = [[row["name"], row["kind"], short(row["parameters"]), row["note"]] for row in rows]
        typer.echo("\n".join(table(["name", "kind", "parameters", ""], cells)))


@analyse.command("text-ability")
def text_ability(
    run: RunName,
    text: Annotated[
        str, typer.Argument(metavar="TEXT", help="A file of a text a line, or corpus.")
    ],
    normaliser: Annotated[
        str, typer.Option(help="As of `isthmus score`: what the models read.")
    ] = "none",
    as_json: Json = False,
) -> None:
    """What training did to the LLM's way with text. Exit code 1 if frozen weights moved."""
    from isthmus.decoding.transcriber import run_folder
    from isthmus.lab.perplexity import texts_of
    from isthmus.lab.text_ability import text_ability as job

    found = job(run_folder(run), texts_of(text, normaliser))
    if as_json:
        print_json({"run": run, "text": text, "normaliser": normaliser} | found.to_dict())
    else:
        typer.echo("\n".join(found.lines()))
    if not found.sound:
        raise typer.Exit(1)


@analyse.command()
def perplexity(
    llm: Annotated[str, typer.Argument(metavar="LLM", help="Name, folder, or a run's folder.")],
    texts: Annotated[
        list[str],
        typer.Argument(metavar="TEXT…", help="Manifests, corpora, or files of a text a line."),
    ],
    normaliser: Annotated[
        str, typer.Option(help="As of `isthmus score`: what the model reads, and its words.")
    ] = "lower",
    as_json: Json = False,
) -> None:
    """Perplexity a word of texts for a language model, or for the one of a run."""
    from isthmus.lab.perplexity import open_llm, perplexity_text, texts_of, word_perplexity

    read = {name: texts_of(name, normaliser) for name in texts}
    model = open_llm(llm)
    found = {name: word_perplexity(model, lines) for name, lines in read.items()}
    if as_json:
        sets = {name: one.to_dict() for name, one in found.items()}
        print_json({"llm": llm, "normaliser": normaliser, "sets": sets})
    else:
        for name, one in found.items():
            values = (one.value, one.without_end, one.slam_llm)
            own, without, theirs = map(perplexity_text, values)
            typer.echo(
                f"{name}: perplexity {own} a word, {without} without the end token, {theirs} by "
                f"SLAM-LLM's script ({one.words:,} words, {one.precision})"
            )


@app.command()
def reproduce(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[SWEEP]", help="A shipped sweep, or a file; all listed without."),
    ] = None,
    scale: Annotated[
        str, typer.Option(help="paper, or tiny: models that train in minutes anywhere.")
    ] = "tiny",
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="ROW", help="Do this row; give it again for more."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and what is.")
    ] = False,
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "-o", help="Runs and tables; shared by all sweeps.")
    ] = Path("runs/reproduce"),
    allow_change: AllowChange = None,
    as_json: Json = False,
) -> None:
    """Do the runs of a paper's table, and put what came out beside what was expected."""
    from isthmus.recipe_files import find_sweep

    if name is None:
        _print_sweeps(as_json)
        return
    find_sweep(name)  # a typing error need not wait for torch
    from isthmus.lab.sweep import make_plan

    plan = make_plan(name, scale, output_dir)
    from isthmus.display import training_observer
    from isthmus.lab.sweep_runs import Sweeper, states

    if dry_run:
        _print_states(states(plan, only or []), as_json)
        return
    sweeper = Sweeper(plan, training_observer, allow_change or ())
    table = sweeper.reproduce(only or [])
    if as_json:
        print_json(table.to_dict())
    else:
        _print_table(table)
    failed = [row for row in table.failed if not only or row in only]
    if failed:
        raise IsthmusError(
            f"{len(failed)} rows failed: {', '.join(failed)}; the table says why. Mend that "
            "and give the same command again: what is finished stays."
        )


def _print_sweeps(as_json: bool) -> None:
    from isthmus.recipe_files import sweep_titles

    titles = sweep_titles()
    if as_json:
        print_json(titles)
        return
    width = max(map(len, titles), default=0)
    for name, sweep in titles.items():
        scales = ", ".join(sweep["scales"])
        typer.echo(f"{name:{width}}  {sweep['title']}: {sweep['source']} ({scales})")


def _print_states(found: Sequence[dict[str, Any]], as_json: bool) -> None:
    from isthmus.recipe_files import as_override

    if as_json:
        print_json(found)
        return
    for run in found:
        changes = [as_override(key, value) for key, value in run["set"].items()]
        typer.echo(f"{run['state']:8}{run['row']}: {' '.join([run['recipe'], *changes])}")
        typer.echo(f"{8 * ' '}{run['run']}")


def _print_table(table: "Table") -> None:
    from rich.console import Console
    from rich.table import Table as Drawing
    from rich.text import Text

    from isthmus.lab.sweep_table import brief

    console = Console()
    titles, rows = brief(table)
    drawing = Drawing(box=None)
    for title in titles:
        drawing.add_column(Text(title), justify="left" if title == "Row" else "right")
    for row in rows:
        drawing.add_row(*map(Text, row))
    console.print(drawing)
    for claim, verdict, figures in table.verdicts:
        console.print(Text(f"{claim.says} {verdict.capitalize()}. {figures}"))
    console.print(Text(f"{table.plan.folder / table.plan.name}.html"), soft_wrap=True)


@app.command("export-run")
def export_run(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")],
    as_json: Json = False,
) -> None:
    """Write a run so that it can be read on any machine, what it trained in bfloat16."""
    from isthmus.decoding.transcriber import run_folder
    from isthmus.runs.export import export_run as job

    num_bytes = job(run_folder(run), folder)
    if as_json:
        print_json({"run": str(folder), "bytes": num_bytes})
    else:
        typer.echo(f"{num_bytes / 1e6:.1f} MB were trained: {folder}")


@app.command("export-adapter")
def export_adapter(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder with llm.tune: lora.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder, for peft.")],
    as_json: Json = False,
) -> None:
    """Write the LoRA adapters of a run's LLM so that peft opens them."""
    from isthmus.decoding.transcriber import run_folder
    from isthmus.runs.export import export_adapter as job

    base = job(run_folder(run), folder)
    if as_json:
        print_json({"adapter": str(folder), "base": base})
    else:
        typer.echo(f"Adapters of {base}: {folder}")
