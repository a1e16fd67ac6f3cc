"""The command line: parsing and dispatch; a verb imports what it needs when it is called."""

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar, cast

import typer

from isthmus.errors import IsthmusError, suggest
from isthmus.options import limit, switch, takes

if TYPE_CHECKING:
    from isthmus.decoding.formats import Layout
    from isthmus.decoding.transcriber import DecodeChanges
    from isthmus.recipe import AnyRecipe, CTCRecipe, Experiment, LanguageRecipe, Recipe
    from isthmus.training.checkpoint import Progress
    from isthmus.training.loop import OnStep
    from isthmus.training.runs import Opening

    Kind = TypeVar("Kind", bound=Experiment, contravariant=True)

    class Job(Protocol[Kind]):
        def __call__(
            self, recipe: Kind, folder: Path, opening: Opening, *, on_step: OnStep
        ) -> Progress: ...


app = typer.Typer(
    name="isthmus",
    help="Speech recognition with language models: encoder, projector, LLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="File, or name of a shipped recipe.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]…", help="Settings to change, as train.steps=500."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in the folder; begin it if none is.")
]
AllowChange = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-change",
        metavar="KEY",
        help="With --resume: let this setting differ, or data, code, or a package's version.",
    ),
]
Curves = Annotated[
    bool, typer.Option("--tensorboard", help="Also draw TensorBoard curves in the run folder.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")]
RunFolder = Annotated[
    Path | None, typer.Option("--output-dir", "-o", help="Run folder; runs/<name> unless given.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Beam = Annotated[
    int | None,
    typer.Option("--beam-size", "--beam_size", min=1, help="Hypotheses kept; 1 is greedy."),
]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", "--batch_size", min=1, help="Utterances decoded together."),
]
Normaliser = Annotated[
    str, typer.Option(help="whisper, basic, basic-marks, lower, none or module:callable.")
]
Model = Annotated[
    str, typer.Option("--model", "-m", help="Run folder, or `default`, the shipped tiny system.")
]


@app.callback(invoke_without_command=True)
def main_options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(installed_version("isthmus"))
        raise typer.Exit


@app.command()
def quickstart(
    audio: Annotated[
        list[Path] | None, typer.Argument(help="Recordings of yours to transcribe with the result.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "-o", help="A new folder; runs/quickstart.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Watch a projector learn to join two frozen models, then read held-out voices with it."""
    from isthmus.quickstart import free_folder, run

    result = run(output_dir or free_folder(), audio or [])
    if as_json:
        _print_json(result)


def _training_verb(
    verb: str, purpose: str, parts: Callable[[], "tuple[type[AnyRecipe], Job[AnyRecipe]]"]
) -> None:
    """The verbs that train differ in `parts`: the kind of recipe, and the job that takes it."""

    @app.command(verb, help=purpose)
    def run(
        recipe: RecipeName,
        overrides: Overrides = None,
        output_dir: RunFolder = None,
        resume: Resume = False,
        overwrite: Overwrite = False,
        allow_change: AllowChange = None,
        tensorboard: Curves = False,
        as_json: Json = False,
    ) -> None:
        from isthmus.display import training_observer
        from isthmus.recipe import load_recipe
        from isthmus.training.parallel import leading
        from isthmus.training.runs import Opening

        kind, job = parts()
        chosen = load_recipe(recipe, overrides or [], kind=kind)
        folder = output_dir or Path("runs") / chosen.name
        if resume and overwrite:
            raise IsthmusError("--resume and --overwrite exclude each other. Give one of them.")
        opening = Opening(resume, overwrite, allow_change or ())
        curves = folder / "tensorboard" if tensorboard else None
        with training_observer(chosen.train.steps, curves) as observe:
            end = job(chosen, folder, opening, on_step=observe)
        if not leading():
            return
        if as_json:
            figures = {"step": end.step, "best_step": end.best_step, "best_loss": end.best_loss}
            _print_json({"run": str(folder)} | figures)
        else:
            typer.echo(f"Trained to step {end.step}: {folder}")


def _train() -> "tuple[type[Recipe], Job[Recipe]]":
    from isthmus.recipe import Recipe
    from isthmus.training.runs import train

    return Recipe, train


def _pretrain_ctc() -> "tuple[type[CTCRecipe], Job[CTCRecipe]]":
    from isthmus.recipe import CTCRecipe
    from isthmus.training.runs import pretrain_ctc

    return CTCRecipe, pretrain_ctc


def _pretrain_lm() -> "tuple[type[LanguageRecipe], Job[LanguageRecipe]]":
    from isthmus.recipe import LanguageRecipe
    from isthmus.training.runs import pretrain_lm

    return LanguageRecipe, pretrain_lm


_training_verb("train", "Train what a recipe does not freeze: the projector, usually.", _train)
_training_verb("pretrain-ctc", "Train a Conformer encoder with CTC.", _pretrain_ctc)
_training_verb("pretrain-lm", "Train a small LLM on text made on the spot.", _pretrain_lm)


@app.command()
def cache(
    recipe: RecipeName,
    overrides: Overrides = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Only read what is there, and count it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compute the encoder's frames of a recipe's utterances once, and keep them on disk."""
    from isthmus.display import counting
    from isthmus.recipe import load_recipe
    from isthmus.training.runs import cache_features

    chosen = load_recipe(recipe, overrides or [])
    with counting("utterances") as on_utterance:
        found = cache_features(chosen, on_utterance, only_verify=verify)
    if found is None:
        typer.echo("The frames of this process' share are kept; --verify reads them all.")
    elif as_json:
        _print_json(asdict(found))
    else:
        typer.echo(
            f"{found.sound} utterances, {found.bytes / 1e9:.2f} GB; {found.broken} broken entries"
        )


@dataclass(frozen=True)
class TranscribeOptions:
    """What `isthmus transcribe` takes."""

    audio: Annotated[
        list[str],
        typer.Argument(help="Recordings of any length and format; - for standard input."),
    ]
    model: Model = "default"
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "--output_dir", "-o", help="Write files here, not the text."),
    ] = None
    output_format: Annotated[
        str | None,
        typer.Option(
            "--output-format", "--output_format", "-f", help="txt, srt, vtt, tsv, json or all."
        ),
    ] = None
    word_timestamps: Annotated[bool, switch("word-timestamps", "When each word was said.")] = False
    align_model: Annotated[
        str | None,
        typer.Option("--align-model", "--align_model", help="A CTC model that times the words."),
    ] = None
    highlight_words: Annotated[bool, switch("highlight-words", "Underline each in turn.")] = False
    max_line_width: Annotated[int | None, limit("max-line-width", "Letters of a line.")] = None
    max_line_count: Annotated[int | None, limit("max-line-count", "Lines of a cue.")] = None
    max_words_per_line: Annotated[int | None, limit("max-words-per-line", "Words of a cue.")] = None
    beam_size: Beam = None
    length_penalty: Annotated[
        float | None, typer.Option("--length-penalty", "--length_penalty", help="As in the recipe.")
    ] = None
    nbest: Annotated[int | None, limit("nbest", "Hypotheses to write (--json).")] = None
    batch_size: BatchSize = None
    hotwords: Annotated[
        str | None, typer.Option("--hotwords", help="Phrases to be expected, parted by commas.")
    ] = None
    ngram: Annotated[
        str | None, typer.Option("--ngram", help="An n-gram language model, an ARPA file.")
    ] = None
    ray: Annotated[
        str | None,
        typer.Option("--ray", help="Corpora: over a Ray cluster, by its address, or local."),
    ] = None
    gate: Annotated[
        str | None, typer.Option("--gate", help="auto, silero, energy or none: who finds speech.")
    ] = None
    strict: Annotated[
        bool | None,
        typer.Option("--strict/--no-strict", help="The same to the last bit in any company; slow."),
    ] = None
    as_json: Json = False

    @property
    def layout(self) -> "Layout":
        from isthmus.decoding.formats import Layout

        return Layout(
            self.highlight_words, self.max_line_width, self.max_line_count, self.max_words_per_line
        )

    @property
    def decode(self) -> "DecodeChanges":
        """The decoding settings that were given."""
        return {
            "beam_size": self.beam_size,
            "length_penalty": self.length_penalty,
            "nbest": self.nbest,
            "batch_size": self.batch_size,
            "gate": cast(Any, self.gate),  # checked with the others
            "strict": self.strict,
            "ngram": self.ngram,
            "hotwords": tuple(filter(None, map(str.strip, (self.hotwords or "").split(","))))
            or None,
        }


@app.command()
@takes(TranscribeOptions)
def transcribe(options: TranscribeOptions) -> None:
    """Write what is said in recordings; of corpora (manifests, folders), into --output-dir."""
    from isthmus.decoding.formats import PLAIN, check_outputs, transcript_dict, write_transcript
    from isthmus.decoding.transcriber import load
    from isthmus.display import counting

    layout, names, folder = options.layout, options.audio, options.output_dir
    words = options.word_timestamps or layout != PLAIN
    output_format = options.output_format or "all"
    if folder is None and (options.output_format or layout != PLAIN):
        folder = Path()  # as whisper does
    if _corpora(names):
        if options.output_dir is None:
            raise IsthmusError("A corpus is transcribed into a folder: add --output-dir FOLDER.")
        _transcribe_corpora(options, words)
        return
    files = ["stdin" if name == "-" else name for name in names]
    check_outputs(files if folder is not None else (), output_format)
    if options.align_model and not words:
        typer.echo("warning: --align-model has no effect without --word-timestamps.", err=True)
    listed = options.as_json or (folder is not None and output_format in ("json", "all"))
    if options.nbest and not listed:
        typer.echo("warning: --nbest has no effect without --json, which lists them.", err=True)
    transcriber = load(options.model, align_model=options.align_model, **options.decode)
    audio: list[Any] = [sys.stdin.buffer.read() if name == "-" else name for name in names]
    found: dict[int, Any] = {}
    with counting("recordings") as on_recording:
        for result in transcriber.results(audio, word_timestamps=words):
            name, heard = names[result.index], result.found
            found[result.index] = heard
            if isinstance(heard, IsthmusError):
                typer.echo(f"error: {heard}", err=True)
            else:
                if heard.finish_reason not in ("stop", "no_speech"):
                    cut = f"the end of a text is missing or made up ({heard.finish_reason})"
                    typer.echo(f"warning: {name}: {cut}.", err=True)
                if folder is not None:
                    write_transcript(heard, files[result.index], folder, output_format, layout)
            on_recording(len(found), len(names))
    failed = {index for index, heard in found.items() if isinstance(heard, IsthmusError)}
    if options.as_json:
        report = [
            {"file": name, "error": str(found[index])}
            if index in failed
            else {"file": name, **transcript_dict(found[index])}
            for index, name in enumerate(names)
        ]
        settings = transcriber.settings.model_dump(mode="json")
        _print_json({"files": report, "decode": settings})
    elif folder is None:
        for index, name in enumerate(names):
            if index not in failed:
                text = found[index].text
                typer.echo(f"{name}: {text}" if len(names) > 1 else text)
    if failed:
        raise typer.Exit(1)


def _corpora(names: list[str]) -> bool:
    """Whether these are corpora, not recordings."""
    from isthmus.decoding.job import is_corpus

    kinds = {is_corpus(name) for name in names}
    if len(kinds) > 1:
        raise IsthmusError("Give corpora or recordings, not both at once.")
    return True in kinds


def _transcribe_corpora(options: TranscribeOptions, words: bool) -> None:
    from isthmus.decoding.job import Cluster, system, transcribe_corpora
    from isthmus.display import counting
    from isthmus.training.parallel import leading

    assert options.output_dir is not None
    chosen = system(options.model, align_model=options.align_model, settings=options.decode)
    local = options.ray == "local"
    cluster = Cluster(None if local else options.ray) if options.ray else None
    with counting("utterances") as on_utterance:
        report = transcribe_corpora(
            chosen,
            options.audio,
            options.output_dir,
            words=words,
            cluster=cluster,
            on_utterance=on_utterance,
        )
    if leading() and options.as_json:
        _print_json(report)
    elif leading():
        done = f"{report['utterances']} utterances, {report['failed']} of them failed"
        typer.echo(f"{done}: {options.output_dir}")
    raise typer.Exit(3 if report["failed"] else 0)


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder, or `default`.")],
    data: Annotated[
        list[str], typer.Argument(metavar="DATA…", help="Manifests or folders with transcripts.")
    ],
    beam_size: Beam = None,
    batch_size: BatchSize = None,
    normaliser: Normaliser = "basic",
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "--output_dir", "-o", help="Also write the transcripts here."),
    ] = None,
    ctc: Annotated[bool, typer.Option("--ctc", help="Also score the encoder's own CTC.")] = False,
    as_json: Json = False,
) -> None:
    """Transcribe corpora with a run and score the result."""
    from isthmus.analysis.evaluate import check_ctc, ctc_scores
    from isthmus.analysis.evaluate import evaluate as job
    from isthmus.decoding.transcriber import load
    from isthmus.display import counting, print_scores

    transcriber = load(run, beam_size=beam_size, batch_size=batch_size, cached=True)
    if ctc:
        check_ctc(transcriber)
    with counting("utterances") as on_batch:
        result = job(transcriber, data, normaliser=normaliser, folder=output_dir, on_batch=on_batch)
    report = result.to_dict()
    if ctc:
        report["ctc"] = ctc_scores(transcriber, result).to_dict()
    if as_json:
        _print_json(report)
    else:
        print_scores(report)
    if any(result.left_out.values()):
        raise typer.Exit(1)


@app.command()
def score(
    reference: Annotated[Path, typer.Argument(metavar="REF")],
    hypothesis: Annotated[Path, typer.Argument(metavar="HYP")],
    normaliser: Normaliser = "basic",
    missing: Annotated[
        str, typer.Option(help="A reference without hypothesis: error, or empty.")
    ] = "error",
    listing: Annotated[
        bool, typer.Option("--listing/--no-listing", help="List the errors.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Score hypotheses against references: JSON lines, Kaldi text, tables, or plain lines."""
    from isthmus.scoring import read_texts
    from isthmus.scoring import score as job

    if missing not in ("error", "empty"):
        raise IsthmusError(f"--missing is error or empty, not {missing!r}.")
    result = job(
        read_texts(reference, role="reference"),
        read_texts(hypothesis, role="hypothesis"),
        normaliser=normaliser,
        missing="empty" if missing == "empty" else "error",
    )
    if as_json:
        _print_json(result.to_dict())
    else:
        for line in result.listing(limit=None if listing else 0):
            typer.echo(line)


@app.command()
def check(
    data: Annotated[str, typer.Argument(metavar="DATA")],
    max_seconds: Annotated[float | None, typer.Option(help="Longer utterances are bad.")] = None,
    audio: Annotated[
        bool, typer.Option("--audio/--no-audio", help="Decode every recording.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Validate a corpus: audio, transcripts, ids. Exit code 1 if anything is bad."""
    from isthmus.speech.corpora import check_corpus, read_corpus

    report = check_corpus(read_corpus(data), decode_audio=audio, max_seconds=max_seconds)
    if as_json:
        _print_json(report.to_dict())
    else:
        typer.echo("\n".join(report.lines()))
    if report.n_rejected:
        raise typer.Exit(1)


@app.command()
def prepare(
    kind: Annotated[str, typer.Argument(help="librispeech, mls, folder, kaldi, nemo or slam-llm.")],
    source: Annotated[Path, typer.Argument(metavar="SRC")],
    out: Annotated[Path, typer.Argument(metavar="OUT")],
    as_json: Json = False,
) -> None:
    """Write manifests of a corpus on disk, one JSON-lines file a split."""
    from isthmus.speech.prepare import prepare as job

    splits = {name: str(path) for name, path in job(kind, source, out).items()}
    if as_json:
        _print_json(splits)
    else:
        typer.echo("\n".join(f"{name}: {path}" for name, path in splits.items()))


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    utterances: Annotated[int, typer.Option(min=1)] = 1000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Voices never used otherwise.")
    ] = False,
    domains: Annotated[
        str, typer.Option(help="Kinds of text and weights, as digit=1,order=4; all if empty.")
    ] = "",
    text: Annotated[Path | None, typer.Option(help="Speak the lines of this file instead.")] = None,
    workers: Annotated[int, typer.Option(min=1)] = 1,
    as_json: Json = False,
) -> None:
    """Synthesise English speech with transcripts and word timings (espeak-ng)."""
    from isthmus.speech.synthesis import draw_texts, synthesise_corpus

    if text is not None:
        try:
            lines = text.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise IsthmusError(f"{text}: not UTF-8 text ({error}). Convert it.") from error
        texts = [line for line in lines if line.strip()]
    else:
        texts = draw_texts(utterances, seed, _weights(domains))
    manifest = synthesise_corpus(out, texts, seed, held_out=held_out, workers=workers)
    if as_json:
        _print_json({"manifest": str(manifest), "utterances": len(texts)})
    else:
        typer.echo(f"{len(texts)} utterances: {manifest}")


@app.command()
def recipes(as_json: Json = False) -> None:
    """List the shipped recipes."""
    from isthmus.recipe import shipped_recipes

    shipped = {name: _headline(path) for name, path in shipped_recipes().items()}
    if as_json:
        _print_json(shipped)
    else:
        width = max(map(len, shipped), default=0)
        typer.echo("\n".join(f"{name:{width}}  {line}" for name, line in shipped.items()))


@app.command()
def cp(
    name: Annotated[str, typer.Argument(help="A shipped recipe.")],
    file: Annotated[Path, typer.Argument(help="Where to write it.")],
) -> None:
    """Copy a shipped recipe, to change it."""
    from isthmus.files import write_atomic
    from isthmus.recipe import find_recipe

    if file.exists():
        raise IsthmusError(f"{file} exists. Name another file.")
    write_atomic(file, find_recipe(name).read_text(encoding="utf-8"))
    typer.echo(f"Wrote {file}. Train it with: isthmus train {file}")


@app.command()
def schema(
    kind: Annotated[str, typer.Argument(help="recipe, ctc or lm.")] = "recipe",
) -> None:
    """Print the JSON schema of recipes, so that editors complete them."""
    from isthmus.recipe import CTCRecipe, Experiment, LanguageRecipe, Recipe

    kinds: dict[str, type[Experiment]] = {"recipe": Recipe, "ctc": CTCRecipe, "lm": LanguageRecipe}
    if kind not in kinds:
        raise IsthmusError(
            f"No recipe kind {kind!r}.{suggest(kind, kinds)} Known: {', '.join(kinds)}."
        )
    _print_json(kinds[kind].model_json_schema())


def main() -> None:
    """Entry point: faults of input are one line on standard error, not a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("isthmus").setLevel(logging.INFO)
    try:
        app()
    except (IsthmusError, ModuleNotFoundError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code if isinstance(error, IsthmusError) else 1)


def _weights(domains: str) -> dict[str, float] | None:
    weights = {}
    for item in filter(None, domains.split(",")):
        name, _, weight = item.partition("=")
        try:
            weights[name.strip()] = float(weight or 1)
        except ValueError as error:
            raise IsthmusError(f"--domains: {item!r} is not name=weight.") from error
    return weights or None


def _headline(path: Path) -> str:
    """The first comment line of a recipe."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, ensure_ascii=False)
    sys.stdout.write("\n")
