"""Verbs that transcribe and score."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from isthmus.errors import IsthmusError
from isthmus.options import limit, switch, takes
from isthmus.verbs.common import (
    BatchSize,
    Beam,
    Device,
    Json,
    Language,
    Model,
    Normaliser,
    print_json,
    systems,
)

app = typer.Typer()

if TYPE_CHECKING:
    from isthmus.decoding.formats import Layout
    from isthmus.decoding.transcript import Transcript
    from isthmus.speech.audio import Recording


Instruction = Annotated[
    str | None,
    typer.Option("--instruction", help="Another instruction than the run was trained with."),
]
CTCWeight = Annotated[
    float | None,
    typer.Option("--ctc-weight", min=0, help="How much of a say the CTC head has."),
]
Ears = Annotated[
    str | None,
    typer.Option(
        "--ears",
        metavar="RUN",
        help="Hear with encoder and projector of this run.",
        autocompletion=systems,
    ),
]


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """What verbs take that decode: of the settings under `decode` those that are often wanted."""

    beam_size: Beam = None
    batch_size: BatchSize = None
    ctc_weight: CTCWeight = None
    hotwords: Annotated[
        str | None, typer.Option("--hotwords", help="Phrases to be expected, parted by commas.")
    ] = None
    strict: Annotated[
        bool | None,
        typer.Option("--strict/--no-strict", help="The same to the last bit in any company; slow."),
    ] = None
    instruction: Instruction = None
    language: Language = None
    ears: Ears = None
    device: Device = "auto"
    decode: dict[str, Any] = field(default_factory=dict)  # all settings that were given

    def given(self) -> dict[str, Any]:
        """The settings that options give."""
        phrases = tuple(filter(None, map(str.strip, (self.hotwords or "").split(","))))
        names = ("beam_size", "batch_size", "ctc_weight", "strict", "instruction", "language")
        values = {name: getattr(self, name) for name in names} | {"hotwords": phrases or None}
        return {name: value for name, value in values.items() if value is not None}

    def parted(self, words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
        """What is no decode.x=y among the words, and all settings that were given.

        Raises IsthmusError for one that was given twice.
        """
        from isthmus.recipe_files import parted_settings

        names, settings = parted_settings(words)
        given = self.given()
        for name in settings.keys() & given.keys():
            flag = name.replace("_", "-")
            raise IsthmusError(f"--{flag} and decode.{name} are one setting. Give one of them.")
        return names, settings | given


@dataclass(frozen=True, kw_only=True)
class TranscribeOptions(DecodeOptions):
    """What `isthmus transcribe` takes."""

    audio: Annotated[
        list[str],
        typer.Argument(
            help="Recordings, or with -f folders of them; - for standard input; and settings, as "
            "decode.length_penalty=0.5.",
        ),
    ]
    model: Model = "default"
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", help="Write files here, not the text."),
    ] = None
    output_format: Annotated[
        str | None,
        typer.Option("--output-format", "-f", help="txt, srt, vtt, tsv, json or all."),
    ] = None
    channel: Annotated[
        int | None, typer.Option("--channel", min=0, help="Hear this channel, not the mean of all.")
    ] = None
    track: Annotated[
        int | None, typer.Option("--track", min=0, help="Hear this of a video's audio tracks.")
    ] = None
    word_timestamps: Annotated[bool, switch("word-timestamps", "When each word was said.")] = False
    align_model: Annotated[
        str | None,
        typer.Option("--align-model", help="A CTC model that times the words."),
    ] = None
    highlight_words: Annotated[bool, switch("highlight-words", "Underline each in turn.")] = False
    max_line_width: Annotated[int | None, limit("max-line-width", "Letters of a line.")] = None
    max_line_count: Annotated[int | None, limit("max-line-count", "Lines of a cue.")] = None
    max_words_per_line: Annotated[int | None, limit("max-words-per-line", "Words of a cue.")] = None
    nbest: Annotated[int | None, limit("nbest", "Hypotheses to write (--json).")] = None
    length_penalty: Annotated[
        float | None, typer.Option("--length-penalty", help="As in the recipe.")
    ] = None
    ngram: Annotated[
        Path | None,
        typer.Option(
            "--ngram", exists=True, dir_okay=False, help="An n-gram language model, an ARPA file."
        ),
    ] = None
    gate: Annotated[
        Literal["auto", "silero", "energy", "none"] | None,
        typer.Option("--gate", help="Who finds the speech."),
    ] = None
    ray: Annotated[
        str | None,
        typer.Option("--ray", help="Corpora: over a Ray cluster, by its address, or local."),
    ] = None
    as_json: Json = False

    @property
    def files(self) -> list[str]:
        """What outputs are named after."""
        return ["stdin" if name == "-" else name for name in self.audio]

    def recordings(self) -> "list[Recording]":
        """What is heard of each; standard input is read to its end."""
        from isthmus.speech.audio import Recording

        return [
            Recording(sys.stdin.buffer.read() if name == "-" else name, self.channel, self.track)
            for name in self.audio
        ]

    @property
    def layout(self) -> "Layout":
        from isthmus.decoding.formats import Layout

        return Layout(
            self.highlight_words, self.max_line_width, self.max_line_count, self.max_words_per_line
        )

    @property
    def system(self) -> dict[str, Any]:
        """What there is to a system but its settings."""
        return {"align_model": self.align_model, "ears": self.ears, "device": self.device}

    def given(self) -> dict[str, Any]:
        values = {
            "nbest": self.nbest,
            "length_penalty": self.length_penalty,
            "ngram": None if self.ngram is None else str(self.ngram),
            "gate": self.gate,
        }
        return super().given() | {name: one for name, one in values.items() if one is not None}


@app.command()
@takes(TranscribeOptions)
def transcribe(options: TranscribeOptions) -> None:
    """Write what is said in recordings; of corpora (manifests, folders), into --output-dir."""
    from isthmus.decoding.formats import PLAIN, check_outputs, outputs
    from isthmus.decoding.inputs import are_corpora
    from isthmus.model.device import check_device
    from isthmus.runs.folder import DEFAULT, local_system

    check_device(options.device)
    names, decode = options.parted(options.audio)
    options = replace(options, audio=names, decode=decode)
    laid_out = options.layout != PLAIN
    words = options.word_timestamps or laid_out
    output_format, folders = options.output_format or "all", []
    if options.output_format or laid_out:  # into files, as whisper does
        pairs = outputs(options.audio, output_format, options.output_dir)
        options = replace(options, audio=[name for name, _ in pairs])
        folders = [folder for _, folder in pairs]
    elif options.output_dir is not None:
        folders = [options.output_dir] * len(options.audio)
    if options.model != DEFAULT:  # which may have to be downloaded: only for good recordings
        local_system(options.model)
    if corpora := are_corpora(options.audio):
        _check_corpora(options)
    _check_nbest(options)
    if corpora:
        _transcribe_corpora(options)
        return
    check_outputs(zip(options.files, folders, strict=bool(folders)), output_format)
    if options.align_model and not words:
        _no_effect("--align-model", "without --word-timestamps")
    listed = options.as_json or (folders and output_format in ("json", "all"))
    if decode.get("nbest") and not listed:
        _no_effect("--nbest", "without --json, which lists them")
    if options.ray:
        _no_effect("--ray", "on recordings, only on corpora")
    _transcribe_recordings(options, words, folders)


def _no_effect(flag: str, where: str) -> None:
    typer.echo(f"warning: {flag} has no effect {where}.", err=True)


def _check_corpora(options: TranscribeOptions) -> None:
    """Raise IsthmusError for what is wrong with corpora; warn of options without effect on them."""
    from isthmus.decoding.formats import check_folder
    from isthmus.speech.formats import read_lines, recognise
    from isthmus.speech.utterances import find_corpus

    for folder in filter(Path.is_dir, map(find_corpus, options.audio)):
        next(read_lines(folder, recognise(folder)), None)  # says so where there is no audio in it
    if options.output_dir is None:
        raise IsthmusError("A corpus is transcribed into a folder: add --output-dir FOLDER.")
    check_folder(options.output_dir)
    fixed = {
        "--output-format": options.output_format,
        "--highlight-words": options.highlight_words,
        "--max-line-width": options.max_line_width,
        "--max-line-count": options.max_line_count,
        "--max-words-per-line": options.max_words_per_line,
    }
    for flag in (flag for flag, given in fixed.items() if given):
        _no_effect(flag, "on corpora, whose transcripts are lines of transcripts.jsonl")
    nbest = options.decode.get("nbest")
    if not options.word_timestamps:  # which add the segments to a line
        for flag, given in (("--align-model", options.align_model), ("--nbest", nbest)):
            if given:
                _no_effect(flag, "on corpora without --word-timestamps")


def _check_nbest(options: TranscribeOptions) -> None:
    """Raise IsthmusError where more hypotheses are asked for than are kept."""
    from isthmus.runs.folder import RECIPE, local_system

    nbest, beam = map(options.decode.get, ("nbest", "beam_size"))
    if not nbest:
        return
    run = local_system(options.model) if beam is None else None
    recipe = run / RECIPE if run is not None else None
    if recipe is not None and recipe.is_file():
        from isthmus.recipe_files import read_yaml

        beam = (read_yaml(recipe).get("decode") or {}).get("beam_size")  # runs have every default
    if isinstance(beam, int) and isinstance(nbest, int) and nbest > beam:
        raise IsthmusError(
            f"--nbest {nbest} is more than --beam-size {beam}, the hypotheses that are "
            f"kept. Add --beam-size {nbest}, or ask for fewer."
        )


def _transcribe_recordings(
    options: TranscribeOptions, words: bool, folders: Sequence[Path]
) -> None:
    from isthmus.decoding.formats import transcript_dict, write_transcript
    from isthmus.decoding.inputs import audio_faults
    from isthmus.display import counting, loading

    names = options.audio
    audio = options.recordings()
    found: dict[int, Any] = {**audio_faults(audio)}
    for fault in found.values():
        typer.echo(f"error: {fault}", err=True)
    good = [index for index in range(len(names)) if index not in found]
    if not good and not options.as_json:
        raise typer.Exit(1)
    with loading("the model"):
        from isthmus.decoding.lazy_imports import defer_compiler_imports

        defer_compiler_imports()
        from isthmus.decoding.systems import load_system

        transcriber = load_system(options.model, **options.system, **options.decode)
    with counting("recordings") as on_recording:
        for result in transcriber.results([audio[i] for i in good], word_timestamps=words):
            index, heard = good[result.index], result.found
            found[index] = heard
            _tell(names[index], heard)
            if folders and not isinstance(heard, IsthmusError):
                form, file = options.output_format or "all", options.files[index]
                for path in write_transcript(heard, file, folders[index], form, options.layout):
                    if not options.as_json:
                        typer.echo(path, err=True)
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
    elif not folders:
        for index, name in enumerate(names):
            if index not in failed:
                text = found[index].text
                typer.echo(f"{name}: {text}" if len(names) > 1 else text)
    if failed:
        raise typer.Exit(1)


def _tell(name: str, heard: "Transcript | IsthmusError") -> None:
    """Say on standard error what is wrong with a transcript, a line for each fault."""
    if isinstance(heard, IsthmusError):
        typer.echo(f"error: {heard}", err=True)
        return
    if heard.finish_reason == "no_speech":
        typer.echo(f"{name}: no speech was found in it.", err=True)
    elif heard.finish_reason != "stop":
        cut = f"the end of a text is missing or made up ({heard.finish_reason})"
        typer.echo(f"warning: {name}: {cut}.", err=True)
    if heard.doubtful:
        typer.echo(f"warning: {name}: {_doubt(heard)}.", err=True)


def _doubt(heard: "Transcript") -> str:
    """Why the text should not be trusted."""
    facts = [f"it is {heard.confidence:.0%} sure"]
    if heard.ctc_distance is not None:
        facts.append(f"its CTC head heard {heard.ctc_distance:.0%} of the letters otherwise")
    return f"the system seems out of its depth ({', '.join(facts)})"


def _transcribe_corpora(options: TranscribeOptions) -> None:
    from isthmus.display import counting, loading

    assert options.output_dir is not None
    with loading("the model"):
        from isthmus.decoding.job import Cluster, system, transcribe_corpora
        from isthmus.training.parallel import leading

    chosen = system(options.model, settings=options.decode, **options.system)
    local = options.ray == "local"
    cluster = Cluster(None if local else options.ray) if options.ray else None
    with counting("utterances") as on_utterance:
        report = transcribe_corpora(
            chosen,
            options.audio,
            options.output_dir,
            words=options.word_timestamps,
            cluster=cluster,
            on_utterance=on_utterance,
        )
    if leading() and options.as_json:
        print_json(report)
    elif leading():
        done = [f"{report['utterances']} utterances, {report['failed']} of them failed"]
        ended = {why: number for why, number in report["finish_reasons"].items() if why != "stop"}
        done += [f"{number} ended by {why}" for why, number in ended.items()]
        typer.echo(f"{', '.join(done)}: {options.output_dir}")
    raise typer.Exit(3 if report["failed"] else 0)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(DecodeOptions):
    """What `isthmus evaluate` takes."""

    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="Run, or base, tiny, or a model such as Whisper.",
            autocompletion=systems,
        ),
    ]
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA…",
            help="Manifests or folders with transcripts; and settings, as decode.gate=none.",
        ),
    ]
    normaliser: Normaliser = "basic"
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", help="Also write the transcripts here."),
    ] = None
    ctc: Annotated[bool, typer.Option("--ctc", help="Also score the CTC head alone.")] = False
    as_json: Json = False


@app.command()
@takes(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> None:
    """Transcribe corpora with a run or a pretrained model, and score the result."""
    from isthmus.decoding.formats import check_folder
    from isthmus.display import counting, loading, print_scores
    from isthmus.model.device import check_device
    from isthmus.runs.folder import local_system
    from isthmus.scoring import normaliser as find_normaliser
    from isthmus.speech.utterances import find_corpus

    check_device(options.device)
    corpora, decode = options.parted(options.data)
    local_system(options.run)
    find_normaliser(options.normaliser)
    for corpus in corpora:
        find_corpus(corpus)
    if options.output_dir is not None:
        check_folder(options.output_dir)
    with loading("the model"):
        from isthmus.decoding.evaluate import check_ctc, ctc_scores
        from isthmus.decoding.evaluate import evaluate as job
        from isthmus.decoding.systems import load_system, system_folder, system_settings

        own = system_settings(system_folder(options.run), {}, options.ears)
        recogniser = load_system(
            options.run,
            ears=options.ears,
            device=options.device,
            cached=True,
            **decode,
        )
    if options.ctc:
        check_ctc(recogniser)
    with counting("utterances") as on_batch:
        result = job(
            recogniser,
            corpora,
            normaliser=options.normaliser,
            folder=options.output_dir,
            on_batch=on_batch,
        )
    report = result.to_dict()
    if options.ctc:
        report["ctc"] = ctc_scores(result).to_dict()
    if options.as_json:
        print_json(report)
    else:
        print_scores(report, own.model_dump(mode="json"))
    if result.unwritten:
        raise result.unwritten
    if any(result.left_out.values()) or any(result.unheard.values()):
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
    form: Annotated[
        Literal["auto", "json", "csv", "tsv", "kaldi", "trn", "lines"],
        typer.Option("--format", help="What both files are; auto looks at both."),
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Score hypotheses against references: JSON lines, Kaldi text, trn, tables, or plain lines."""
    from isthmus.scoring import read_pair
    from isthmus.scoring import score as job

    if missing not in ("error", "empty"):
        raise IsthmusError(f"--missing is error or empty, not {missing!r}.")
    references, hypotheses, notes = read_pair(reference, hypothesis, form=form)
    for note in notes:
        typer.echo(f"note: {note}.", err=True)
    result = job(
        references,
        hypotheses,
        normaliser=normaliser,
        missing="empty" if missing == "empty" else "error",
    )
    if as_json:
        print_json(result.to_dict())
    else:
        for line in result.listing(limit=None if listing else 0):
            typer.echo(line)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Hypotheses, or what evaluate -o wrote.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Those of the other system.")],
    reference: Annotated[
        Path | None, typer.Option("--reference", metavar="REF", help="Of files of hypotheses.")
    ] = None,
    normaliser: Normaliser = "basic",
    as_json: Json = False,
) -> None:
    """Is one system better than another, or is it luck? A paired test on the same utterances."""
    from isthmus.display import print_comparison
    from isthmus.scoring import compare as job

    found = job(a, b, reference, normaliser=normaliser)
    if found.left_out:
        typer.echo(f"warning: {found.left_out}.", err=True)
    if as_json:
        print_json({"a": str(a), "b": str(b)} | found.to_dict())
    else:
        print_comparison(found.to_dict())
