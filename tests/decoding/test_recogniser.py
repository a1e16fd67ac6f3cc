"""Pretrained recognisers are systems: their texts are transformers' own, in whatever company."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForCTC,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
    GenerationConfig,
    MoonshineConfig,
    ParakeetTokenizer,
    PreTrainedTokenizerFast,
    Speech2TextConfig,
    Speech2TextFeatureExtractor,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from isthmus.decoding import pretrained
from isthmus.decoding.job import system
from isthmus.decoding.pretrained import CTCRecogniser, Seq2SeqRecogniser
from isthmus.decoding.systems import load_system
from isthmus.decoding.timestamps import CTC_TYPES
from isthmus.errors import IsthmusError
from isthmus.model.conformer import ConformerCTC
from isthmus.recipe import CTCRecipe, dump_recipe, load_recipe
from isthmus.speech.corpora import read_corpus
from tests.conftest import SIZES, scramble, write_parakeet

Isthmus = Callable[..., tuple[int, str, str]]
Waves = Callable[..., Tensor]
LETTERS = [*"abcdefghijklmnopqrstuvwxyz '"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
OF_WHISPER = ["<|startoftranscript|>", "<|en|>", "<|de|>", "<|transcribe|>", "<|translate|>"]
OF_WHISPER += ["<|startofprev|>", "<|notimestamps|>"]
LISTENING = 6.0
VOCABULARY = [*SPECIAL, *LETTERS, *OF_WHISPER]
PLACE = {unit: place for place, unit in enumerate(VOCABULARY)}
DIMS = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
DIMS |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
ENDS = {
    "vocab_size": len(VOCABULARY),
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_letters(folder: Path) -> None:
    """A tokenizer of letters, in which what is special is special."""
    tokenizer = Tokenizer(models.WordLevel(PLACE, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True)),
        extra_special_tokens=OF_WHISPER,
    )
    fast.save_pretrained(folder)


def write_seq2seq(config: Any, extractor: Any, folder: Path, **generation: Any) -> None:
    network = AutoModelForSpeechSeq2Seq.from_config(config)
    scramble(network)
    with torch.no_grad():
        for name, value in network.named_parameters():
            if name.endswith(("q_proj.weight", "o_proj.weight", "out_proj.weight")):
                value.mul_(LISTENING)  # else each would write the same, whatever it hears
    network.generation_config = GenerationConfig(
        decoder_start_token_id=generation.pop("start"),
        **{name: value for name, value in ENDS.items() if name.endswith("_token_id")},
        **{"max_length": 24, **generation},
    )
    network.save_pretrained(folder)
    extractor.save_pretrained(folder)
    write_letters(folder)


def write_whisper(folder: Path, *, english: bool = False, **generation: Any) -> None:
    config = WhisperConfig(**DIMS, **ENDS, num_mel_bins=80, decoder_start_token_id=PLACE["<s>"])
    multilingual = {
        "lang_to_id": {name: PLACE[name] for name in ("<|en|>", "<|de|>")},
        "task_to_id": {name: PLACE[f"<|{name}|>"] for name in ("transcribe", "translate")},
    }
    write_seq2seq(
        config,
        WhisperFeatureExtractor(feature_size=80),
        folder,
        start=PLACE["<|startoftranscript|>"],
        is_multilingual=not english,
        no_timestamps_token_id=PLACE["<|notimestamps|>"],
        prev_sot_token_id=PLACE["<|startofprev|>"],
        suppress_tokens=[PLACE["z"]],
        begin_suppress_tokens=[2, PLACE[" "]],
        **({} if english else multilingual),
        **generation,
    )


def write_moonshine(folder: Path) -> None:
    config = MoonshineConfig(
        **ENDS,
        hidden_size=16,
        intermediate_size=32,
        encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=1,
        encoder_num_attention_heads=2,
        decoder_num_attention_heads=2,
        decoder_start_token_id=1,
    )
    extractor = Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
    write_seq2seq(config, extractor, folder, start=1)


def write_speech2text(folder: Path) -> None:
    config = Speech2TextConfig(**DIMS, **ENDS, conv_channels=16, decoder_start_token_id=2)
    spared = [PLACE[name] for name in (*SPECIAL, *OF_WHISPER) if name != "</s>"]
    options = {"num_beams": 2, "min_new_tokens": 8, "suppress_tokens": spared}
    write_seq2seq(config, Speech2TextFeatureExtractor(), folder, start=2, **options)


def write_self_supervised(kind: str, norm: str, folder: Path) -> None:
    config = AutoConfig.for_model(
        kind,
        **SIZES,
        conv_dim=[8] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm=norm,
        do_stable_layer_norm=norm == "layer",
        vocab_size=len(SPECIAL) + len(LETTERS),
        pad_token_id=0,
    )
    network = AutoModelForCTC.from_config(config)
    scramble(network)
    network.save_pretrained(folder)
    units = [unit.replace(" ", "|") for unit in [*SPECIAL, *LETTERS]]
    (folder / "vocab.json").write_text(json.dumps({unit: i for i, unit in enumerate(units)}))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=norm == "layer").save_pretrained(folder)


def write_pieces(folder: Path) -> None:
    """A Parakeet with the tokenizer of its kind."""
    write_parakeet(folder)
    pieces = ["<unk>", "▁", "▁ab", *"abcdefghijklmnop"]
    tokenizer = Tokenizer(models.Unigram([(one, -1.0) for one in pieces], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    fast = ParakeetTokenizer(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
    assert fast.pad_token_id == 19
    fast.save_pretrained(folder)


WRITERS: dict[str, Callable[[Path], None]] = {
    "whisper": write_whisper,
    "whisper.en": lambda folder: write_whisper(folder, english=True),
    "moonshine": write_moonshine,
    "speech_to_text": write_speech2text,
    "parakeet": write_pieces,
    **{
        f"{kind}-{norm}": lambda folder, kind=kind, norm=norm: write_self_supervised(  # type: ignore[misc]
            kind, norm, folder
        )
        for kind, norm in (("wav2vec2", "group"), ("hubert", "layer"), ("wavlm", "group"))
    },
}


@pytest.fixture(scope="module")
def recogniser_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny random recogniser of a name in WRITERS; not to be changed."""
    folders: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            WRITERS[name](folders[name])
        return folders[name]

    return folder_of


def own_text(folder: Path, waveform: np.ndarray, **options: Any) -> str:
    """What transformers writes of one utterance, by the way its documentation goes."""
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = extractor(waveform, sampling_rate=16_000, return_tensors="pt")
    kind = AutoConfig.from_pretrained(folder).model_type
    auto = AutoModelForCTC if kind in CTC_TYPES else AutoModelForSpeechSeq2Seq
    network = auto.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        if kind in CTC_TYPES and kind != "parakeet_ctc":
            ids = network(**inputs).logits.argmax(dim=-1)
        else:
            ids = network.generate(**inputs, **options)
    text = tokenizer.batch_decode(ids, skip_special_tokens=kind not in CTC_TYPES)[0]
    return str(text).strip()


@pytest.fixture(scope="module")
def audio(waves: Waves) -> list[np.ndarray]:
    """Of unlike lengths, two of them the same."""
    lengths = [9_000, 31_000, 16_000, 16_000, 50_321, 22_000]
    return [waves(length, seed=seed).numpy() for seed, length in enumerate(lengths)]


@pytest.mark.parametrize("name", WRITERS)
def test_texts_are_transformers_own_in_any_company(
    name: str, recogniser_folder: Callable[[str], Path], audio: list[np.ndarray]
) -> None:
    folder = recogniser_folder(name)
    options = {"language": "de", "task": "transcribe"} if name == "whisper" else {}
    expected = [own_text(folder, one, **options) for one in audio]
    assert len(set(expected)) > 3, "they hardly differ, so nothing is shown"
    asked = {"language": "de"} if options else {}
    for batch_size in (1, 3, 8):
        recogniser = load_system(folder, batch_size=batch_size, **asked)
        assert [one.text for one in recogniser.transcribe(list(audio))] == expected


def test_padding_would_be_seen(
    recogniser_folder: Callable[[str], Path], audio: list[np.ndarray]
) -> None:
    """Why utterances of unlike lengths do not share a batch, where the front end does not pad."""
    folder = recogniser_folder("wav2vec2-group")
    network = AutoModelForCTC.from_pretrained(folder).eval()
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    inputs = extractor(audio[:2], sampling_rate=16_000, padding=True, return_tensors="pt")
    alone = extractor(audio[0], sampling_rate=16_000, return_tensors="pt")
    with torch.inference_mode():
        one, both = network(**alone).logits[0], network(**inputs).logits[0]
    assert not torch.allclose(one, both[: len(one)], atol=1e-3)


def test_beams_are_searched_as_generate_does(
    recogniser_folder: Callable[[str], Path], audio: list[np.ndarray]
) -> None:
    folder = recogniser_folder("moonshine")
    assert load_system(recogniser_folder("speech_to_text")).settings.model_dump()["beam_size"] == 2
    greedy = load_system(folder).transcribe(list(audio))
    wide = load_system(folder, beam_size=4).transcribe(list(audio))
    assert [one.text for one in wide] == [own_text(folder, one, num_beams=4) for one in audio]
    assert [one.text for one in wide] != [one.text for one in greedy]


def test_the_end_of_a_text_is_told(tmp_path: Path, audio: list[np.ndarray]) -> None:
    """A text that the limit cut off says so, one that ended does not."""
    for name, limit in (("short", 8), ("long", 400)):
        (tmp_path / name).mkdir()
        torch.manual_seed(1)
        write_whisper(tmp_path / name, english=True, max_length=limit)
    (cut,) = load_system(tmp_path / "short").transcribe([audio[0]])
    assert cut.finish_reason == "length"
    recogniser = load_system(tmp_path / "short")
    assert isinstance(recogniser, Seq2SeqRecogniser)
    recogniser.network.generation_config.suppress_tokens = [
        place for unit, place in PLACE.items() if unit != "</s>"
    ]
    recogniser.network.generation_config.begin_suppress_tokens = None
    (ended,) = recogniser.transcribe([audio[0]])
    assert (ended.text, ended.finish_reason) == ("", "stop")


def manifest(folder: Path, audio: list[np.ndarray], languages: list[str]) -> Path:
    rows = []
    for number, (waveform, language) in enumerate(zip(audio, languages, strict=False)):
        soundfile.write(folder / f"{number}.wav", waveform, 16_000, subtype="FLOAT")
        row = {"id": str(number), "audio": f"{number}.wav", "text": "go left"}
        rows.append(json.dumps(row | ({"language": language} if language else {})) + "\n")
    (folder / "data.jsonl").write_text("".join(rows))
    return folder / "data.jsonl"


def test_whisper_is_told_the_language_of_the_data(
    recogniser_folder: Callable[[str], Path], audio: list[np.ndarray], tmp_path: Path
) -> None:
    folder = recogniser_folder("whisper")
    spoken = ["en", "de-CH", "German", "", "en"]
    cuts = list(read_corpus(manifest(tmp_path, audio, spoken)))
    asked = ["en", "de", "de", None, "en"]
    expected = [
        own_text(folder, one, language=code, task="transcribe")
        for one, code in zip(audio, asked, strict=False)
    ]
    assert [one.text for one in load_system(folder).transcribe(cuts)] == expected
    german = [one.text for one in load_system(folder, language="de").transcribe(cuts)]
    assert german == [own_text(folder, a, language="de", task="transcribe") for a in audio[:5]]
    assert german != expected
    english = load_system(recogniser_folder("whisper.en"))
    assert english.transcribe(cuts[:1])  # and needs none
    with pytest.raises(IsthmusError, match="de-CH"):
        english.transcribe(cuts)


def test_a_whisper_without_generation_config_knows_its_languages(
    recogniser_folder: Callable[[str], Path],
    audio: list[np.ndarray],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = recogniser_folder("whisper")
    folder = without(source, tmp_path, "generation_config.json")
    recogniser = load_system(folder, language="de")
    assert isinstance(recogniser, Seq2SeqRecogniser)
    assert not caplog.records
    stored, found = GenerationConfig.from_pretrained(source), recogniser.network.generation_config
    for name in ("lang_to_id", "task_to_id", "is_multilingual", "no_timestamps_token_id"):
        assert getattr(found, name) == getattr(stored, name)
    german, english = (
        load_system(folder, language=one).transcribe(list(audio)) for one in ("de", "en")
    )
    assert [one.text for one in german] != [one.text for one in english]
    with pytest.raises(IsthmusError, match=r"'eng'.*'en'"):
        load_system(folder, language="eng")


@pytest.mark.parametrize("name", ["whisper-tiny.en", "whisper-base"])
def test_generation_configs_of_real_whispers_follow_from_their_tokens(
    name: str, parts: Path
) -> None:
    """Tokenizers of Whispers of English have all the languages too."""
    stored, found = GenerationConfig.from_pretrained(parts / name), GenerationConfig()
    pretrained.complete_generation(found, AutoTokenizer.from_pretrained(parts / name))
    for key in ("lang_to_id", "task_to_id", "no_timestamps_token_id"):
        assert getattr(found, key, None) == getattr(stored, key, None)


def test_a_whisper_without_preprocessor_config_hears_the_same(
    recogniser_folder: Callable[[str], Path], audio: list[np.ndarray], tmp_path: Path
) -> None:
    source = recogniser_folder("whisper.en")
    folder = without(source, tmp_path, "preprocessor_config.json")
    expected, found = (load_system(one).transcribe(list(audio)) for one in (source, folder))
    assert [one.text for one in found] == [one.text for one in expected]


def test_long_recordings_are_heard_to_their_end(
    recogniser_folder: Callable[[str], Path], waves: Waves
) -> None:
    long = waves(75 * 16_000, seed=5).numpy()
    for name, most in (("whisper.en", 30.0), ("moonshine", 60.0), ("wav2vec2-group", 60.0)):
        recogniser = load_system(recogniser_folder(name), gate="none")
        assert recogniser.longest == most
        transcript = recogniser.transcribe(long)
        assert len(transcript.segments) >= 75 / most
        assert transcript.segments[-1].end == pytest.approx(75)
        assert transcript.duration == 75
        gaps = zip(transcript.segments[:-1], transcript.segments[1:], strict=True)
        assert all(after.start <= before.end for before, after in gaps)
    assert load_system(recogniser_folder("moonshine"), chunk_seconds=20).longest == 20
    assert load_system(recogniser_folder("whisper"), chunk_seconds=50).longest == 30


@pytest.mark.parametrize("name", WRITERS)
def test_nothing_is_too_short(name: str, recogniser_folder: Callable[[str], Path]) -> None:
    recogniser = load_system(recogniser_folder(name))
    assert recogniser.transcribe(np.full(20, 0.01, np.float32)).duration == 20 / 16_000


def test_ctc_models_of_isthmus_are_recognisers(
    isthmus: Isthmus,
    audio: list[np.ndarray],
    model_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """By the name of one that ships, and by the folder of a run of `pretrain-ctc`."""
    code, out, _ = isthmus("evaluate", "isthmus/tiny-conformer", manifest(tmp_path, audio, ["en"]))
    assert (code, "WER" in out) == (0, True)
    run = tmp_path / "run"
    ConformerCTC.load(model_folder("conformer")).save((run / "model").absolute())
    (run / "recipe.yaml").write_text("name: letters\n")
    found = load_system(run)
    assert isinstance(found, CTCRecogniser)
    head = ConformerCTC.load(model_folder("conformer")).float().eval()
    samples = torch.from_numpy(audio[1])[None]
    with torch.inference_mode():
        frames, lengths = head(samples, torch.tensor([samples.shape[1]]))
        [expected] = head.greedy(head.log_probs(frames), lengths)
    assert found.transcribe(audio[1]).text == expected


def test_ctc_times_its_words_and_an_aligner_those_of_others(
    recogniser_folder: Callable[[str], Path],
    model_folder: Callable[[str], Path],
    audio: list[np.ndarray],
) -> None:
    aligner = str(model_folder("conformer"))
    for name, options in (("wav2vec2-group", {}), ("moonshine", {"align_model": aligner})):
        recogniser = load_system(recogniser_folder(name), **options)
        plain = recogniser.transcribe(list(audio))
        timed = recogniser.transcribe(list(audio), word_timestamps=True)
        assert [one.text for one in timed] == [one.text for one in plain]
        assert any(one.words for one in timed)
    with pytest.raises(IsthmusError, match="--align-model"):
        load_system(recogniser_folder("moonshine")).transcribe(audio[0], word_timestamps=True)


def test_the_commands_take_them(
    isthmus: Isthmus,
    recogniser_folder: Callable[[str], Path],
    audio: list[np.ndarray],
    tmp_path: Path,
) -> None:
    folder = recogniser_folder("whisper")
    data = manifest(tmp_path, audio, ["en"] * 6)
    code, out, err = isthmus("evaluate", folder, data, "--json", "-o", tmp_path / "out")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert report["words"] == 12
    assert (report["decode"]["language"], report["decode"]["beam_size"]) == (None, 1)
    rows = [json.loads(line) for line in next((tmp_path / "out").iterdir()).open()]
    texts = {row["id"]: row["pred_text"] for row in rows}
    assert texts["0"] == own_text(folder, audio[0], language="en", task="transcribe")
    _, out, _ = isthmus("evaluate", folder, data, "--language", "de")
    assert "language de" in out
    _, out, _ = isthmus("transcribe", tmp_path / "0.wav", "-m", folder, "--language", "en")
    assert out.strip() == texts["0"]
    code, _, _ = isthmus("transcribe", data, "-m", folder, "-o", tmp_path / "j")
    found = [json.loads(line) for line in (tmp_path / "j" / "transcripts.jsonl").open()]
    assert {row["id"]: row["text"] for row in found} == texts
    other = recogniser_folder("whisper.en")
    assert system(folder).model != system(other).model


def test_a_recording_that_is_not_there_is_deleted_by_a_baseline_too(
    isthmus: Isthmus,
    recogniser_folder: Callable[[str], Path],
    audio: list[np.ndarray],
    tmp_path: Path,
) -> None:
    data = manifest(tmp_path, audio, ["en"] * 3)
    with data.open("a") as lines:
        lines.write('{"id": "gone", "audio": "gone.wav", "text": "one two three"}\n')
        lines.write('{"id": "gone too", "audio": "g.wav", "duration": 1.0, "text": "four"}\n')
    code, out, _ = isthmus("evaluate", recogniser_folder("whisper"), data, "--json")
    report = json.loads(out)
    assert code == 1
    assert (report["words"], report["missing"]) == (10, 2)
    assert report["del"] >= 4
    assert report["unheard"] == {f"{tmp_path.name}/data": {"missing": 2}}


def test_settings_without_effect_are_told(
    recogniser_folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    load_system(recogniser_folder("wav2vec2-group"), beam_size=4, language="en", batch_size=2)
    assert "beam_size, language" in caplog.text
    assert "batch_size" not in caplog.text
    load_system(recogniser_folder("moonshine"), language="en")
    assert "one language only" in caplog.text
    caplog.clear()
    load_system(recogniser_folder("whisper.en"), language="english")
    assert not caplog.text
    with pytest.raises(IsthmusError, match="'de'"):
        load_system(recogniser_folder("whisper.en"), language="de")
    load_system("tiny", language="de")
    assert "no effect on a run" in caplog.text
    for name in ("whisper.en", "wav2vec2-group"):
        with pytest.raises(IsthmusError, match=r"unknown key decode\.batch_sise\. Did you mean"):
            load_system(recogniser_folder(name), batch_sise=2)


def test_a_system_of_the_hub_is_what_its_files_say(
    recogniser_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def snapshot(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.append(allow_patterns)
        return str(recogniser_folder("whisper"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert isinstance(load_system("someone/whisper"), Seq2SeqRecogniser)
    assert not any(file.endswith("safetensors") for file in asked[0])
    assert len(asked) == 2


def without(source: Path, folder: Path, *patterns: str) -> Path:
    """A copy of a model's folder that lacks some files."""
    gone = {file.name for pattern in patterns for file in source.glob(pattern)}
    assert gone
    for file in source.iterdir():
        if file.name not in gone:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("name", "gone", "says"),
    [
        ("whisper", "tokenizer*", "tokenizer"),
        ("hubert-layer", "preprocessor_config.json", "no preprocessor_config.json"),
        ("moonshine", "*.safetensors", "no weights"),
    ],
)
def test_a_recogniser_without_a_part_is_refused_in_one_line(
    name: str,
    gone: str,
    says: str,
    isthmus: Isthmus,
    recogniser_folder: Callable[[str], Path],
    audio: list[np.ndarray],
    tmp_path: Path,
) -> None:
    (tmp_path / "model").mkdir()
    folder = without(recogniser_folder(name), tmp_path / "model", gone)
    code, _, err = isthmus("evaluate", folder, manifest(tmp_path, audio, ["en"]))
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("error: ")
    assert says in err


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ("isthmus/tiny-llama", (), "recognises no speech"),
        ("isthmus/tiny-lama", (), "Did you mean 'isthmus/tiny-llama'"),
        ("whisper-base", (), "owner/name"),
        ("whisper", ("--language", "eng"), "'eng'. Did you mean 'en'"),
        ("whisper", ("--ctc",), "no CTC head"),
    ],
)
def test_what_is_no_recogniser_is_refused_in_one_line(
    model: str,
    options: tuple[str, ...],
    says: str,
    isthmus: Isthmus,
    recogniser_folder: Callable[[str], Path],
    audio: list[np.ndarray],
    tmp_path: Path,
) -> None:
    given = recogniser_folder(model) if model in WRITERS else model
    code, _, err = isthmus("evaluate", given, manifest(tmp_path, audio, ["en"]), *options)
    assert (code, err.count("\n")) == (1, 1)
    assert says in err


def test_a_language_of_the_data_is_refused_before_anything_is_decoded(
    isthmus: Isthmus,
    recogniser_folder: Callable[[str], Path],
    audio: list[np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = manifest(tmp_path, audio, ["en", "en", "tlh"])
    with monkeypatch.context() as patched:
        patched.setattr(pretrained.Seq2SeqRecogniser, "_decode", lambda *_: pytest.fail("decoded"))
        code, _, err = isthmus("evaluate", recogniser_folder("whisper"), data)
    assert (code, "'tlh'" in err, "--language" in err) == (1, True, True)
    assert isthmus("evaluate", recogniser_folder("whisper"), data, "--language", "en")[0] == 0


def test_models_that_have_to_be_asked_are_refused(
    recogniser_folder: Callable[[str], Path],
    audio: list[np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "voxtral"}')
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(IsthmusError, match="'voxtral' model, an LLM"):
        load_system(tmp_path)

    def ask(**_: Any) -> None:
        raise ValueError("You must specify a `tgt_lang`")

    recogniser = load_system(recogniser_folder("moonshine"))
    assert isinstance(recogniser, Seq2SeqRecogniser)
    monkeypatch.setattr(recogniser.network, "generate", ask)
    with pytest.raises(IsthmusError, match=r"moonshine.*tgt_lang"):
        recogniser.transcribe(audio[0])


def test_a_run_of_ctc_that_has_not_ended_is_refused(
    isthmus: Isthmus, audio: list[np.ndarray], tmp_path: Path
) -> None:
    recipe = load_recipe("tiny/conformer-start", kind=CTCRecipe)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(dump_recipe(recipe))
    code, _, err = isthmus("evaluate", tmp_path / "run", manifest(tmp_path, audio, ["en"]))
    assert (code, err.count("\n")) == (1, 1)
    assert "pretrain-ctc" in err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whisper-tiny.en", "whisper-base"])
def test_real_whispers_write_what_generate_writes(name: str, parts: Path) -> None:
    folder = parts / name
    speech = os.environ.get("ISTHMUS_SPEECH")
    if not speech:
        pytest.skip("needs real speech: set ISTHMUS_SPEECH to its folder")
    cuts = list(read_corpus(f"{speech}/en_kathleen/dev.jsonl"))[:6]
    recogniser = load_system(folder, batch_size=4)
    options = {"language": "en", "task": "transcribe"} if name == "whisper-base" else {}
    expected = [own_text(folder, recogniser.load(cut), **options) for cut in cuts]
    assert [one.text for one in recogniser.transcribe(cuts)] == expected
