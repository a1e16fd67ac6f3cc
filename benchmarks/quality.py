"""What the shipped tiny system reads, on real speakers it never heard, and how exactly.

Needs the speech in ISTHMUS_SPEECH (../shared/speech unless set). Prints a Markdown table: WER of
the system by beam search and of its encoder's own CTC on each set, and whether texts are the same
when utterances are decoded one by one, or eight together in random order.

    python benchmarks/quality.py [RUN]
"""

import random
import sys

from isthmus.decoding.evaluate import ctc_scores, evaluate
from isthmus.decoding.transcriber import load
from isthmus.scoring import ErrorCounts, Score
from isthmus.speech.corpora import expand_path, load_cut, read_corpus

SETS = ("en_digits", "en_keywords", "en_speech_commands", "en_barista")


def main() -> None:
    run = sys.argv[1] if len(sys.argv) > 1 else "tiny"
    paths = dev_sets()
    transcriber = load(run)
    evaluation = evaluate(transcriber, paths)
    system, ctc = evaluation.scores, ctc_scores(evaluation)
    real = sum((score.counts for score in list(system.sets.values())[1:]), ErrorCounts())

    print("| set | utterances | words | WER % | 95 % | encoder's own CTC, WER % |")
    print("|---|---|---|---|---|---|")
    for name, score in system.sets.items():
        print(row(name, score, ctc.sets[name]))
    print(row("all", system.pooled, ctc.pooled))
    print(f"\nkeywords, commands and orders together: WER {percent(real.wer)} %")
    same, total = batch_independence(run, paths)
    print(f"one by one against eight in random order: {same} of {total} texts identical")


def dev_sets() -> list[str]:
    """Manifests of the validation sets; ends the program where they are not."""
    paths = [f"${{ISTHMUS_SPEECH}}/{name}/dev.jsonl" for name in SETS]
    missing = [path for path in paths if not expand_path(path).exists()]
    if missing:
        sys.exit(
            f"{expand_path(missing[0])} is not there. Set ISTHMUS_SPEECH to the speech folder."
        )
    return paths


def batch_independence(run: str, paths: list[str]) -> tuple[int, int]:
    """How many utterances have the same text alone and in random batches of eight."""
    single, batched = load(run, batch_size=1), load(run, batch_size=8)
    cuts = [cut for path in paths for cut in read_corpus(path)]
    random.Random(0).shuffle(cuts)
    waveforms = [load_cut(cut) for cut in cuts]
    alone = single.transcribe(waveforms)
    together = []
    for start in range(0, len(cuts), 8):  # by eights, or the transcriber would sort by length
        together += batched.transcribe(waveforms[start : start + 8])
    return sum(a.text == b.text for a, b in zip(alone, together, strict=True)), len(cuts)


def row(name: str, score: Score, ctc: Score) -> str:
    low, high = score.interval or (None, None)
    counts = f"{len(score.utterances)} | {score.counts.words}"
    between = f"{percent(low)}-{percent(high)}"
    return f"| {name} | {counts} | {percent(score.wer)} | {between} | {percent(ctc.wer)} |"


def percent(rate: float | None) -> str:
    return "-" if rate is None else f"{rate * 100:.1f}"


if __name__ == "__main__":
    main()
