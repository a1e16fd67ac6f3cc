"""Two systems compared: what they wrote is found, paired by id, counted by utterance."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from isthmus.errors import IsthmusError
from isthmus.scoring import compare, paired_bootstrap, score

REFERENCES = {f"u{number}": "a b c d" for number in range(40)}
GOOD = REFERENCES | {"u0": "a b c x"}
BAD = REFERENCES | {f"u{number}": "a b x x" for number in range(1, 21)}
PAIR = {"a.jsonl": GOOD, "b.jsonl": BAD}
Isthmus = Callable[..., tuple[int, str, str]]


def manifest(file: Path, hypotheses: Mapping[str, str], references: Mapping[str, str]) -> Path:
    """As `isthmus evaluate -o` writes them."""
    file.parent.mkdir(exist_ok=True)
    rows = [
        {"id": id, "text": references[id], "pred_text": text} for id, text in hypotheses.items()
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def table(file: Path, texts: Mapping[str, str]) -> Path:
    file.write_text("".join(f"{id}\t{text}\n" for id, text in texts.items()))
    return file


def test_the_test_is_that_of_the_scores(tmp_path: Path) -> None:
    a, b = (manifest(tmp_path / name, texts, REFERENCES) for name, texts in PAIR.items())
    found = compare(a, b, resamples=500)
    scores = [score(REFERENCES, texts, resamples=0) for texts in (GOOD, BAD)]
    assert found.pooled.paired == paired_bootstrap(*scores, resamples=500)
    assert (found.pooled.a.wer, found.pooled.b.wer) == (1 / 160, 40 / 160)
    assert (found.pooled.wins, found.pooled.losses, found.pooled.ties) == (20, 1, 19)
    assert found.left_out is None
    turned = compare(b, a, resamples=500).pooled
    assert (turned.wins, turned.losses, turned.ties) == (1, 20, 19)
    assert turned.paired.difference == -found.pooled.paired.difference


def test_hypotheses_alone_are_compared_by_a_reference(tmp_path: Path) -> None:
    a, b, reference = (
        table(tmp_path / f"{name}.tsv", texts)
        for name, texts in (("a", GOOD), ("b", BAD), ("ref", REFERENCES))
    )
    manifests = [manifest(tmp_path / name, texts, REFERENCES) for name, texts in PAIR.items()]
    by_reference = compare(a, b, reference, resamples=200).pooled
    assert by_reference.to_dict() == compare(*manifests, resamples=200).pooled.to_dict()
    with pytest.raises(IsthmusError, match=r"a\.tsv: no transcripts beside .* Add --reference"):
        compare(a, b)


def test_sets_of_folders_are_paired_by_name_and_pooled(tmp_path: Path) -> None:
    few = {"u0": "one two"}
    for side, texts in (("a", GOOD), ("b", BAD)):
        turned = dict(reversed(texts.items())) if side == "b" else texts
        manifest(tmp_path / side / "test_clean.jsonl", turned, REFERENCES)
        manifest(tmp_path / side / "few.jsonl", {"u0": "one"}, few)
        (tmp_path / side / "metrics.jsonl").write_text('{"step": 1}\n')  # of a run
    manifest(tmp_path / "b" / "more.jsonl", few, few)
    found = compare(tmp_path / "a", tmp_path / "b", resamples=200)
    assert set(found.sets) == {"test_clean", "few"}
    assert len(found.pooled.a.utterances) == 41
    assert found.pooled.ties == 20
    assert (
        found.left_out
        == f"left out are the utterances that not all have (1 not in {tmp_path / 'a'}: more/u0)"
    )
    assert found.to_dict()["sets"]["test_clean"]["wins"] == 20


def test_what_only_one_side_has_is_said_in_one_line(isthmus: Isthmus, tmp_path: Path) -> None:
    less = {id: text for id, text in BAD.items() if id not in ("u1", "u2")}
    a, b = (table(tmp_path / name, texts) for name, texts in (("a.tsv", GOOD), ("b.tsv", less)))
    said = {id: text for id, text in REFERENCES.items() if id != "u3"}
    reference = table(tmp_path / "ref.tsv", said)
    code, out, err = isthmus("compare", a, b, "--reference", reference, "--json")
    assert (code, err) == (
        0,
        f"warning: left out are the utterances that not all have (2 not in {b}: ref/u1, ref/u2; "
        f"1 not in {reference}: ref/u3).\n",
    )
    report = json.loads(out)
    assert (report["utterances"], report["a"], report["b"]) == (37, str(a), str(b))
    assert report["difference_interval"][0] < report["difference"] < 0
    code, out, err = isthmus("compare", a, a, "--reference", reference)
    assert code == 0
    assert out.splitlines()[1].split()[:4] == ["ref", "0.64", "0.64", "+0.00"]


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    a = manifest(tmp_path / "a.jsonl", GOOD, REFERENCES)
    other = manifest(tmp_path / "other.jsonl", GOOD, REFERENCES | {"u7": "else"})
    with pytest.raises(IsthmusError, match=r"1 utterances differ in id or reference \(u7\)"):
        compare(a, other)
    with pytest.raises(IsthmusError, match="no utterance id is in all of them"):
        compare(a, manifest(tmp_path / "c.jsonl", {"v": "a"}, {"v": "a"}))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(IsthmusError, match="no transcripts beside"):
        compare(a, tmp_path / "nothing")
