"""The yardstick of the benchmarks: a step of projector training as SLAM-LLM makes it.

Random utterances, audio and prompt padded on the left, the answer on the right; Whisper's padding
to 30 s stays, for the LLM too; the encoder runs in every step; logits, loss and accuracy at all
positions. Those who know X-LANCE/SLAM-LLM will find its dataset's collator in `collate` and its
model's forward in `forward`; as in the scripts that it ships, no keys and values are kept.

Shapes: B batch, S samples, A audio embeddings, L positions, E LLM width, V tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from isthmus.model.encoder import SelfSupervisedEncoder, WhisperEncoder
from isthmus.model.llm import LLM
from isthmus.model.parts import freeze
from isthmus.model.projector import Projector
from isthmus.model.prompt import Prompt, tokenise
from isthmus.speech.audio import SAMPLE_RATE

IGNORE = -100


@dataclass(frozen=True)
class SlamBatch:
    """B utterances, padded."""

    audio: Tensor  # (B, S), or Whisper's features (B, mels, 3000)
    audio_mask: Tensor  # (B, S) 1 where there is a sample; unused by Whisper
    num_frames: Tensor  # (B,) that the projector is given
    tokens: Tensor  # (B, L) 0 in the places of audio and of padding
    attention_mask: Tensor  # (B, L)
    modality_mask: Tensor  # (B, L) True in the places of audio
    labels: Tensor  # (B, L) IGNORE without loss

    def to(self, device: torch.device) -> "SlamBatch":
        return SlamBatch(*(getattr(self, field.name).to(device) for field in fields(self)))


class SlamBaseline:
    """Encoder and LLM frozen in their precision, the projector trained by AdamW.

    `autocast` is the type of the products; on a GPU it is float16, as there, unless given.
    """

    def __init__(
        self,
        encoder: SelfSupervisedEncoder | WhisperEncoder,
        projector: Projector,
        llm: LLM,
        prompt: Prompt,
        autocast: torch.dtype | None = None,
    ):
        freeze(encoder)
        freeze(llm)
        self.encoder, self.projector, self.llm, self.prompt = encoder, projector, llm, prompt
        self.optimiser = torch.optim.AdamW(projector.parameters(), lr=1e-4, weight_decay=0.0)
        on_gpu = next(llm.parameters()).is_cuda
        self.scaler = torch.amp.GradScaler("cuda", enabled=on_gpu)
        self.autocast = autocast or (torch.float16 if on_gpu else None)

    def collate(self, waveforms: Sequence[np.ndarray], texts: Sequence[str]) -> SlamBatch:
        """Waveforms (S,) with their transcripts to one batch."""
        audio_parts = self._padded(waveforms)
        prompts, answers = [], []
        for length, text in zip(audio_parts[2].tolist(), texts, strict=True):
            pieces = tokenise(self.prompt, self.llm.tokenizer, text)
            audio = [None] * self.projector.output_length(length)
            prompts.append([t for p in pieces if not p.loss for t in p.tokens or audio])
            answers.append([t for p in pieces if p.loss for t in p.tokens or ()])
        left, right = max(map(len, prompts)), max(map(len, answers))
        tokens = torch.zeros(len(texts), left + right, dtype=torch.long)
        mask, heard = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
        labels = torch.full_like(tokens, IGNORE)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            own = slice(left - len(prompt), left + len(answer))
            tokens[row, own] = torch.tensor([*(token or 0 for token in prompt), *answer])
            mask[row, own] = 1
            heard[row, own] = torch.tensor([t is None for t in prompt] + [False] * len(answer))
            labels[row, left : own.stop] = torch.tensor(answer)
        return SlamBatch(*audio_parts, tokens, mask, heard, labels)

    def _padded(self, waveforms: Sequence[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
        """What the encoder's network takes, its mask, and how many frames (B,) are used of each."""
        encoder = self.encoder
        if isinstance(encoder, WhisperEncoder):
            given = {"sampling_rate": SAMPLE_RATE, "return_tensors": "pt"}
            extractor: Any = encoder.extractor
            mels = extractor(list(waveforms), padding="max_length", **given)["input_features"]
            frames = torch.full((len(mels),), encoder.output_length(extractor.n_samples))
            return mels, torch.empty(len(mels), 0), frames
        samples = torch.zeros(len(waveforms), max(map(len, waveforms)))
        samples_mask = torch.zeros(samples.shape, dtype=torch.long)
        for row, waveform in enumerate(waveforms):
            own_samples = torch.from_numpy(waveform)
            samples[row, : len(waveform)] = nn.functional.layer_norm(own_samples, own_samples.shape)
            samples_mask[row, : len(waveform)] = 1
        lengths = [encoder.output_length(len(waveform)) for waveform in waveforms]
        return samples, samples_mask, torch.tensor(lengths)

    def forward(self, batch: SlamBatch) -> tuple[CausalLMOutputWithPast, Tensor]:
        """Logits (B, L, V) with the mean cross-entropy () of the answers in nats; accuracy ()."""
        whisper = isinstance(self.encoder, WhisperEncoder)
        options = {} if whisper else {"attention_mask": batch.audio_mask}
        with torch.no_grad():
            encoded = self.encoder.network(batch.audio, **options)
        embedded, num_audio = self.projector(encoded.last_hidden_state, batch.num_frames)
        embeddings = self.llm.embed(batch.tokens)  # (B, L, E)
        placed = torch.zeros_like(embeddings)
        starts = batch.modality_mask.int().argmax(dim=1).tolist()
        for row, (start, length) in enumerate(zip(starts, num_audio.tolist(), strict=True)):
            placed[row, start : start + length] = embedded[row, :length].to(placed)
        embeddings = placed + embeddings * ~batch.modality_mask[:, :, None]
        output: CausalLMOutputWithPast = self.llm.network(
            inputs_embeds=embeddings,
            attention_mask=batch.attention_mask,
            labels=batch.labels,
            use_cache=False,
        )
        assert output.logits is not None
        predicted = output.logits.detach().argmax(dim=-1)[:, :-1]  # position n predicts n + 1
        targets = batch.labels[:, 1:]
        counted = targets != IGNORE
        accuracy = ((predicted == targets) & counted).sum() / counted.sum()
        return output, accuracy

    def step(self, batch: SlamBatch) -> tuple[float, float]:
        """One optimiser step; loss and accuracy before it."""
        device = next(self.projector.parameters()).device
        self.optimiser.zero_grad(set_to_none=True)
        with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            # as there, the logits are held until the step is done
            output, accuracy = self.forward(batch.to(device))
        assert output.loss is not None
        self.scaler.scale(output.loss).backward()
        self.scaler.step(self.optimiser)
        self.scaler.update()
        return float(output.loss.detach()), float(accuracy)
