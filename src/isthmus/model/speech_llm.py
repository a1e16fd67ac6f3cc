"""The whole: encoder, projector and language model, joined by the prompt.

Shapes: B batch, S samples, T encoder frames, A audio embeddings, L positions, E LLM width, V tokens.
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
        self.tune = {"encoder": "frozen", "llm": "frozen", **(tune or {})}
        for part in self.frozen_parts():
            freeze(part)
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
        """All that training changes: trainable parameters, and statistics of parts trained whole."""
        trained: dict[str, Tensor] = dict(self.trainable())
        if self.tune["encoder"] == "full":
            persistent = self.encoder.state_dict().keys()
            buffers = dict(self.encoder.named_buffers(prefix="encoder"))
            trained |= {k: v for k, v in buffers.items() if k.removeprefix("encoder.") in persistent}
        return trained

    def audio_tokens(self, seconds: float) -> int:
        """Audio embeddings of an utterance that long."""
        frames = self.encoder.output_length(int(seconds * SAMPLE_RATE))
        return self.projector.output_length(frames)

    def embed_audio(self, waveforms: Tensor, num_samples: Tensor) -> list[Tensor]:
        """Waveforms (B, S) to B tensors of audio embeddings (A, E), each at its own length."""
        frames, num_frames = self.encoder(waveforms, num_samples)
        embeddings, lengths = self.projector(frames.float(), num_frames)
        return [row[:length] for row, length in zip(embeddings, lengths.tolist(), strict=True)]

    def sequence(self, audio: Tensor, transcript: str | None = None) -> tuple[Tensor, Tensor]:
        """One utterance's embeddings (L, E) and labels (L,); without transcript the decoding prompt."""
        embeddings, labels = [], []
        for piece in tokenise(self.prompt, self.llm.tokenizer, transcript):
            if piece.tokens is None:
                embeddings.append(audio)
                labels.append(torch.full((len(audio),), IGNORE, device=audio.device))
            elif piece.tokens:
                tokens = torch.tensor(piece.tokens, device=audio.device)
                embeddings.append(self.llm.embed(tokens).to(audio.dtype))
                labels.append(tokens if piece.loss else torch.full_like(tokens, IGNORE))
        return torch.cat(embeddings), torch.cat(labels)

    def sequences(self, audio: Sequence[Tensor], transcripts: Sequence[str]) -> Sequences:
        """Training sequences of a batch."""
        built = [self.sequence(a, text) for a, text in zip(audio, transcripts, strict=True)]
        longest = max(len(labels) for _, labels in built)
        limit = self.llm.max_tokens
        if limit is not None and longest > limit:
            worst = max(transcripts, key=len)
            raise IsthmusError(
                f"A training sequence has {longest} positions, the language model takes {limit}. Set "
                f"data.max_seconds lower, or leave out long transcripts such as {worst[:60]!r}…"
            )
        pad = nn.utils.rnn.pad_sequence
        lengths = torch.tensor([len(labels) for _, labels in built], device=audio[0].device)
        return Sequences(
            pad([embeddings for embeddings, _ in built], batch_first=True),
            (torch.arange(longest, device=lengths.device) < lengths[:, None]).long(),
            pad([labels for _, labels in built], batch_first=True, padding_value=IGNORE),
        )

    def loss(
        self, waveforms: Tensor, num_samples: Tensor, transcripts: Sequence[str]
    ) -> tuple[Tensor, int, int]:
        """Summed cross-entropy () of the transcripts, their tokens, and how many come out right."""
        batch = self.sequences(self.embed_audio(waveforms, num_samples), transcripts)
        targets = batch.labels[:, 1:]  # position n predicts token n + 1
        keep = (targets != IGNORE).any(dim=0).nonzero()[:, 0]  # (K,)
        dtype = self.llm.embed(targets.new_zeros(1)).dtype
        logits = self.llm.logits(batch.embeddings.to(dtype), batch.mask, keep)  # (B, K, V)
        targets = targets[:, keep]
        total = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        supervised = targets != IGNORE
        correct = (logits.argmax(dim=-1) == targets) & supervised
        return total, int(supervised.sum()), int(correct.sum())
