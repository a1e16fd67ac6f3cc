"""What a first command loads, and that what it does without is missed by nobody."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from isthmus.display import loading

# What `isthmus transcribe` of a recording has no use for. It names modules that are only there once
# a package was run: those of POSTPONED themselves are known from the beginning.
UNUSED = (
    "lhotse",
    "peft",
    "scipy",
    "sklearn",
    "torch._dynamo.eval_frame",
    "torch._inductor",
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.fsdp.api",
    "torch.distributed.tensor.placement_types",
    "isthmus.lab",
    "isthmus.scoring",
    "isthmus.speech.corpora",
    "isthmus.training.batches",
    "isthmus.runs.feature_cache",
    "isthmus.training.loop",
    "isthmus.training.runs",
)
TRANSCRIBE = """
from isthmus.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
AS_EVER = "import isthmus.decoding.lazy_imports as lazy; lazy.defer_compiler_imports = lambda: None"


def run(program: str, *arguments: object) -> str:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def loaded(program: str, *arguments: object) -> list[str]:
    """Those of UNUSED that a program has loaded by its end."""
    asked = f"import sys; print([name for name in {UNUSED} if name in sys.modules])"
    last = run(f"{program}\n{asked}", *arguments).splitlines()[-1]
    return list(json.loads(last.replace("'", '"')))


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seconds in which the gate hears somebody."""
    rng = np.random.default_rng(1)
    time = np.arange(48_000) / 16_000
    loudness = np.where(np.sin(2 * np.pi * 3 * time) > 0, 0.2, 0.001)
    path = tmp_path_factory.mktemp("cold") / "a.wav"
    soundfile.write(path, rng.standard_normal(48_000) * loudness, 16_000)
    return path


def test_transcribing_loads_what_it_uses(recording: Path) -> None:
    assert loaded(TRANSCRIBE, "transcribe", recording, "-m", "tiny", "--gate", "none") == []


def test_it_would_be_seen(recording: Path) -> None:
    found = loaded(
        f"{AS_EVER}\n{TRANSCRIBE}", "transcribe", recording, "-m", "tiny", "--gate", "none"
    )
    assert set(found) >= {
        "torch._dynamo.eval_frame",
        "torch._inductor",
        "torch.distributed.tensor.placement_types",
    }
    assert "lhotse" in loaded("import isthmus.training.runs")


def test_the_results_are_the_same(recording: Path) -> None:
    def heard(program: str) -> object:
        arguments = (
            "transcribe",
            recording,
            "-m",
            "tiny",
            "--gate",
            "none",
            "--json",
            "--word-timestamps",
        )
        (result,) = json.loads(run(program, *arguments))["files"]
        assert result.pop("seconds") > 0
        assert result["segments"][0]["tokens"], "nothing was decoded"
        return result

    assert heard(TRANSCRIBE) == heard(f"{AS_EVER}\n{TRANSCRIBE}")


POSTPONED = """
import sys
from isthmus.decoding.lazy_imports import defer_compiler_imports
defer_compiler_imports()
from transformers import LlamaForCausalLM
assert "torch._dynamo.eval_frame" not in sys.modules, "nothing was postponed"
"""


@pytest.mark.parametrize(
    "program",
    [
        # compiling
        "import torch; one = torch.ones(2)\n"
        "assert torch.compile(lambda x: x + 1, backend='eager')(one).tolist() == [2, 2]\n"
        "import torch._dynamo as compiler\n"
        "assert compiler.disable.__module__.startswith('torch._dynamo')",
        # a part of the compiler, which wants the whole of it first
        "from torch._dynamo.backends.registry import lookup_backend; lookup_backend('eager')",
        # masks that are functions
        "from transformers.masking_utils import TransformGetItemToIndex\n"
        "from torch.overrides import TorchFunctionMode\n"
        "assert isinstance(TransformGetItemToIndex(), TorchFunctionMode)",
        # models, by way of those who held the package before
        "import transformers, transformers.models as held\n"
        "from transformers.models.whisper import WhisperConfig\n"
        "assert held.WhisperConfig is WhisperConfig is transformers.models.WhisperConfig\n"
        "assert held.LlamaForCausalLM is LlamaForCausalLM",
        # adapters: peft looks for spread tensors without importing them
        "from isthmus.model.llm import LLMSettings, build_llm\n"
        "build_llm(LLMSettings(path='isthmus/tiny-llama', tune='lora'))",
        # what is nowhere
        "import torch._dynamo as compiler, transformers.models as models\n"
        "assert not hasattr(compiler, 'nothing') and not hasattr(models, 'nothing')",
    ],
    ids=["compile", "part", "mask", "models", "adapters", "nothing"],
)
def test_what_is_postponed_is_there_when_wanted(program: str) -> None:
    run(f"{POSTPONED}\n{program}")


def test_what_was_loaded_stays() -> None:
    program = """
import sys, torch._dynamo, transformers.models
before = torch._dynamo, transformers.models
from isthmus.decoding.lazy_imports import defer_compiler_imports
defer_compiler_imports()
assert before == (sys.modules["torch._dynamo"], sys.modules["transformers.models"])
assert callable(torch._dynamo.mark_dynamic)
"""
    run(program)


def test_garbage_is_looked_for_again_when_all_is_loaded() -> None:
    gc.unfreeze()  # what other tests left

    def fail() -> None:
        with loading("the model"):
            assert not gc.isenabled()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert gc.isenabled()
    assert gc.get_freeze_count()
    gc.unfreeze()
