"""Verbs for corpora."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from isthmus.errors import IsthmusError
from isthmus.options import takes
from isthmus.text import raw_lines, text_lines
from isthmus.verbs.common import Json, print_json

app = typer.Typer()


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
        print_json(report.to_dict())
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
        print_json(splits)
    else:
        typer.echo("\n".join(f"{name}: {path}" for name, path in splits.items()))


@dataclass(frozen=True)
class SynthOptions:
    """What `isthmus synth` takes."""

    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")]
    utterances: Annotated[int, typer.Option(min=1)] = 1000
    seed: Annotated[int, typer.Option(min=0)] = 0
    held_out: Annotated[bool, typer.Option("--held-out", help="Voices never used otherwise.")] = (
        False
    )
    domains: Annotated[
        str, typer.Option(help="Kinds of text and weights, as digit=1,order=4; all if empty.")
    ] = ""
    language: Annotated[
        str, typer.Option(help="en, or digits and commands in de, es, fr, it, nl, pl, pt.")
    ] = "en"
    text: Annotated[Path | None, typer.Option(help="Speak the lines of this file instead.")] = None
    workers: Annotated[int, typer.Option(min=1)] = 1
    as_json: Json = False

    @property
    def texts(self) -> list[str]:
        """What is to be spoken."""
        from isthmus.lab.synthesis import draw_texts

        if self.text is None:
            return draw_texts(self.utterances, self.seed, _weights(self.domains), self.language)
        return [line for _, line in text_lines(raw_lines(self.text, strict=True))]


@app.command()
@takes(SynthOptions)
def synth(options: SynthOptions) -> None:
    """Synthesise speech with transcripts and word timings (espeak-ng)."""
    from isthmus.lab.synthesis import synthesise_corpus

    texts = options.texts
    manifest = synthesise_corpus(
        options.out,
        texts,
        options.seed,
        held_out=options.held_out,
        workers=options.workers,
        language=options.language,
    )
    if options.as_json:
        print_json({"manifest": str(manifest), "utterances": len(texts)})
    else:
        typer.echo(f"{len(texts)} utterances: {manifest}")


def _weights(domains: str) -> dict[str, float] | None:
    weights = {}
    for item in filter(None, domains.split(",")):
        name, _, weight = item.partition("=")
        try:
            weights[name.strip()] = float(weight or 1)
        except ValueError as error:
            raise IsthmusError(f"--domains: {item!r} is not name=weight.") from error
    return weights or None
