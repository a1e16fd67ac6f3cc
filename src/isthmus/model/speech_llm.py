"""The whole: encoder, projector and language model, joined by the prompt.

Shapes: B batch, S samples, T encoder frames, A audio embeddings, L positions, K positions with
loss, E LLM width, V tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isthmus.errors import IsthmusError
from isthmus.model.encoder import Encoder
from isthmus.model.llm import LLM
from isthmus.model.parts import Tune, freeze
from isthmus.model.projector import Projector
from isthmus.model.prompt import Prompt, tokenise
from isthmus.speech.audio import SAMPLE_RATE

IGNORE = -100  # label of a position without loss


@dataclass(frozen=True)
class Sequences:
    """Embedded sequences, padded at the end."""

    embeddings: Tensor  # (B, L, E)
    mask: Tensor  # (B, L) 1 where valid
    labels: Tensor  # (B, L) token ids, IGNORE without loss


class SpeechLLM(nn.Module):
    """Waveforms and transcripts to a loss; waveforms to the decoding prompt."""

    def __init__(
        self,
        encoder: Encoder,
        projector: Projector,
        llm: LLM,
        prompt: Prompt,
        tune: Mapping[str, Tune] | None = None,
    ):
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.llm = llm
        self.prompt = prompt
        self.tune: dict[str, Tune] = {"encoder": "frozen", "llm": "frozen", **(tune or {})}
        for part in self.frozen_parts():
            freeze(part)
        for name, part in self.named_children():
            if self.tune.get(name) == "full":
                part.float()  # buffers too: batch norm takes no mixture
        for parameter in self.trainable().values():
            parameter.data = parameter.data.float()  # small steps get lost in half precision
        self.end_token = prompt.end_token(llm.tokenizer)

    def frozen_parts(self) -> list[nn.Module]:
        parts = {"encoder": self.encoder, "llm": self.llm}
        return [part for name, part in parts.items() if self.tune[name] == "frozen"]

    def train(self, mode: bool = True) -> "SpeechLLM":
        """Training mode for what is trained; frozen parts stay in evaluation mode."""
        super().train(mode)
        for part in self.frozen_parts():
            part.eval()
        return self

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters with a gradient, by name."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}

    def trained_state(self) -> dict[str, Tensor]:
        """All that training changes: parameters, and the statistics of an encoder trained whole."""
        trained: dict[str, Tensor] = dict(self.trainable())
        if self.tune["encoder"] == "full":
            stored = self.state_dict().keys()
            buffers = self.encoder.named_buffers(prefix="encoder")
            trained |= {name: value for name, value in buffers if name in stored}
        return trained

    def summary(self) -> list[str]:
        """A line a part: its parameters, how it is tuned, where it is."""
        lines = []
        for name, part in self.named_children():
            sizes = [(value.numel(), value.requires_grad) for value in part.parameters()]
            total, trained = sum(n for n, _ in sizes), sum(n for n, moved in sizes if moved)
            lines.append(f"{name}: {total:,} parameters, {trained:,} of them trained")
        device = next(self.parameters()).device
        reason = "there is no GPU" if device.type == "cpu" else "the first GPU"
        return [*lines, f"device: {device} ({reason})"]

    def audio_tokens(self, seconds: float) -> int:
        """Audio embeddings of an utterance that long."""
        frames = self.encoder.output_length(int(seconds * SAMPLE_RATE))
        return self.projector.output_length(frames)

    def fault(self, seconds: float, text_tokens: int = 0) -> str | None:
        """Why an utterance that long, with a transcript of so many tokens, is too much; else None.

        The prompt is counted too.
        """
        limit = self.encoder.max_seconds
        if limit is not None and seconds > limit:
            return f"{seconds:.1f} s of audio are more than the {limit:g} s that the encoder takes"
        room = self.llm.max_tokens
        prompt = tokenise(self.prompt, self.llm.tokenizer)
        positions = sum(len(piece.tokens) for piece in prompt if piece.tokens)
        positions += self.audio_tokens(seconds) + text_tokens
        if room is not None and positions > room:
            return f"it takes {positions} positions, the language model has {room}"
        return None

    def embed_audio(self, waveforms: Tensor, num_samples: Tensor) -> list[Tensor]:
        """Waveforms (B, S) to B tensors of audio embeddings (A, E), each at its own length."""
        frames, num_frames = self.encoder(waveforms, num_samples)
        embeddings, lengths = self.projector(frames.float(), num_frames)
        return [row[:length] for row, length in zip(embeddings, lengths.tolist(), strict=True)]

    def sequence(self, audio: Tensor, transcript: str | None = None) -> tuple[Tensor, Tensor]:
        """One utterance's embeddings (L, E) and labels (L,) from its audio embeddings (A, E).

        Without a transcript it is the decoding prompt.
        """
        embeddings, labels = [], []
        for piece in tokenise(self.prompt, self.llm.tokenizer, transcript):
            ids = [IGNORE] * len(audio) if piece.tokens is None else piece.tokens
            tokens = torch.tensor(ids, dtype=torch.long, device=audio.device)
            embeddings.append(audio if piece.tokens is None else self.llm.embed(tokens))
            labels.append(tokens if piece.loss else torch.full_like(tokens, IGNORE))
        dtype = self.llm.dtype
        return torch.cat([part.to(dtype) for part in embeddings]), torch.cat(labels)

    def sequences(self, audio: Sequence[Tensor], transcripts: Sequence[str]) -> Sequences:
        """Training sequences of a batch.

        Raises IsthmusError for a sequence longer than the language model takes.
        """
        built = [self.sequence(a, text) for a, text in zip(audio, transcripts, strict=True)]
        lengths = [len(labels) for _, labels in built]
        longest = max(lengths)
        limit = self.llm.max_tokens
        if limit is not None and longest > limit:
            transcript = transcripts[lengths.index(longest)]
            raise IsthmusError(
                f"A training sequence has {longest} positions, the language model takes {limit}. "
                "Lower data.max_seconds, or leave out the utterance with the transcript "
                f"{transcript[:60]!r} ({len(transcript)} letters)."
            )
        pad = nn.utils.rnn.pad_sequence
        labels = pad([row for _, row in built], batch_first=True, padding_value=IGNORE)
        positions = torch.arange(longest, device=labels.device)
        mask = positions < torch.tensor(lengths, device=labels.device)[:, None]
        embeddings = pad([row for row, _ in built], batch_first=True)
        return Sequences(embeddings, mask.long(), labels)

    def loss(
        self, waveforms: Tensor, num_samples: Tensor, transcripts: Sequence[str]
    ) -> tuple[Tensor, int, int]:
        """Summed cross-entropy () of the transcripts, their tokens, and how many come out right."""
        batch = self.sequences(self.embed_audio(waveforms, num_samples), transcripts)
        targets = batch.labels[:, 1:]  # position n predicts token n + 1
        keep = (targets != IGNORE).any(dim=0).nonzero()[:, 0]  # (K,)
        logits = self.llm.logits(batch.embeddings, batch.mask, keep)  # (B, K, V)
        targets = targets[:, keep]
        total = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        supervised = targets != IGNORE
        correct = (logits.argmax(dim=-1) == targets) & supervised
        return total, int(supervised.sum()), int(correct.sum())
