"""Verbs that transcribe and score."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from isthmus.errors import IsthmusError
from isthmus.options import limit, switch, takes
from isthmus.verbs.common import BatchSize, Beam, Json, Model, Normaliser, print_json

app = typer.Typer()

if TYPE_CHECKING:
    from isthmus.decoding.formats import Layout
    from isthmus.decoding.transcriber import DecodeChanges


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
        print_json({"files": report, "decode": settings})
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
        print_json(report)
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
        print_json(report)
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
        print_json(result.to_dict())
    else:
        for line in result.listing(limit=None if listing else 0):
            typer.echo(line)
