"""The whole: encoder, projector and language model, joined by the prompt.

Shapes: B batch, S samples, T encoder frames, A audio embeddings, L positions, K positions with
loss, E LLM width, V tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from isthmus.errors import IsthmusError
from isthmus.model.cross_entropy import summed_cross_entropy
from isthmus.model.encoder import Encoder, parameters
from isthmus.model.features import without_autocast
from isthmus.model.llm import LLM
from isthmus.model.packing import Choice, choose_attention, packed_hidden
from isthmus.model.parts import freeze
from isthmus.model.projector import Projector
from isthmus.model.prompt import Prompt, prompt_tokens, tokenise, transcript_tokens
from isthmus.settings.base import Tune
from isthmus.speech.audio import SAMPLE_RATE

IGNORE = -100  # label of a position without loss
AUDIO = -1  # stands for a token where an audio embedding goes


@dataclass(frozen=True)
class Row:
    """Embedded sequences, one behind the other."""

    embeddings: Tensor  # (L, E)
    labels: Tensor  # (L,) token ids, IGNORE without loss
    lengths: list[int]  # of each, L together


@dataclass(frozen=True)
class TranscriptLoss:
    """Cross-entropy of a batch of transcripts, in nats."""

    total: Tensor  # () summed over their tokens, differentiable
    tokens: int
    correct: Tensor  # () tokens that are the likeliest
    positions: int  # that the language model worked on, padding among them
    padding: int


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
        self.prompts: tuple[Prompt, ...] = prompt.variants()  # of which an utterance has one
        self.tune: dict[str, Tune] = {"encoder": "frozen", "llm": "frozen", **(tune or {})}
        for part in self.frozen_parts():
            freeze(part)
        for name, part in self.named_children():
            if self.tune.get(name) == "full":
                part.float()  # buffers too: batch norm takes no mixture
        for parameter in self.trainable().values():
            parameter.data = parameter.data.float()  # small steps get lost in half precision
        self.end_token = prompt.end_token(llm.tokenizer)
        for one in self.prompts if not next(llm.parameters()).is_meta else ():
            pieces = tokenise(one, llm.tokenizer)
            tokens = [token for piece in pieces for token in piece.tokens or ()]
            llm.require_rows([*tokens, self.end_token], "prompt.template")
        self.attention: Choice | None = None  # None: utterances padded to the longest
        self._mean_embedding: Tensor | None = None  # of the LLM's tokens

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
            total, trained = parameters(part)
            lines.append(f"{name}: {total:,} parameters, {trained:,} of them trained")
        device = next(self.parameters()).device
        reason = "there is no GPU" if device.type == "cpu" else "the first GPU"
        return [*lines, f"device: {device} ({reason})"]

    def audio_tokens(self, seconds: float) -> int:
        """Audio embeddings of an utterance that long; at most, if the projector is not exact."""
        frames = self.encoder.output_length(int(seconds * SAMPLE_RATE))
        return self.projector.output_length(frames)

    def positions(self, seconds: float, text_tokens: int) -> int:
        """Positions in the language model of an utterance, its prompt among them."""
        return self.prompt_tokens + self.audio_tokens(seconds) + text_tokens

    @cached_property
    def prompt_tokens(self) -> int:
        """Tokens of the longest of its prompts."""
        return max(prompt_tokens(prompt, self.llm.tokenizer) for prompt in self.prompts)

    def transcript_tokens(self, transcript: str) -> list[int]:
        """Those of a transcript behind its prompt, the end token apart."""
        return transcript_tokens(self.prompts[0], self.llm.tokenizer, transcript)

    def fault(self, seconds: float, text_tokens: int = 0) -> str | None:
        """Why an utterance that long, with a transcript of so many tokens, is too much; else None.

        The prompt is counted too.
        """
        limit = self.encoder.max_seconds
        if limit is not None and seconds > limit:
            return f"{seconds:.1f} s of audio are more than the {limit:g} s that the encoder takes"
        room = self.llm.max_tokens
        positions = self.positions(seconds, text_tokens)
        if room is not None and positions > room:
            takes = "takes" if self.projector.exact else "may take"
            return f"it {takes} {positions} positions, the language model has {room}"
        return None

    def pack(self) -> str:
        """Train on rows without padding, if the language model can; how, and why, in words.

        To be called once the model is on its device, under the precision of training.
        """
        choice = choose_attention(self.llm.network)
        if choice.backend is not None:
            self.attention = choice
        return choice.reason

    def encode(self, waveforms: Tensor, num_samples: Tensor) -> list[Tensor]:
        """Waveforms (B, S) to B tensors of encoder frames (T, D), each at its own length.

        A frozen encoder computes in what its weights are held in: the same in training, for the
        feature cache and in decoding.
        """
        frozen = self.tune["encoder"] == "frozen"
        with without_autocast(waveforms.device) if frozen else nullcontext():
            frames, num_frames = self.encoder(waveforms, num_samples)
        return [row[:length] for row, length in zip(frames, num_frames.tolist(), strict=True)]

    def encode_alone(self, waveform: Tensor) -> Tensor:
        """A waveform (S,) to its frames (T, D), the same to the bit in any company."""
        num_samples = torch.tensor([len(waveform)], device=waveform.device)
        return self.encode(waveform[None], num_samples)[0]

    def project(self, frames: Sequence[Tensor]) -> list[Tensor]:
        """B tensors of frames (T, D) to B tensors of audio embeddings (A, E)."""
        return _together(self.projector, [row.float() for row in frames])

    def spoken(self, frames: Sequence[Tensor]) -> list[Tensor]:
        """Frames (T, D) to the embeddings (A, E) that the projector's CTC head reads."""
        return _together(self.projector.spoken, [row.float() for row in frames])

    def audio(
        self, spoken: Sequence[Tensor], log_probs: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """What `spoken` gave, to what `project` gives.

        `log_probs` (A, V + 1) are what the projector's CTC head reads, where that is known already.
        """
        read = nn.utils.rnn.pad_sequence(list(log_probs), batch_first=True) if log_probs else None
        return _together(partial(self.projector.audio, log_probs=read), spoken)

    def embed_audio(self, waveforms: Tensor, num_samples: Tensor) -> list[Tensor]:
        """Waveforms (B, S) to B tensors of audio embeddings (A, E), each at its own length."""
        return self.project(self.encode(waveforms, num_samples))

    def sequence(
        self, audio: Tensor, transcript: str | None = None, prompt: Prompt | None = None
    ) -> tuple[Tensor, Tensor]:
        """One utterance's embeddings (L, E) and labels (L,) from its audio embeddings (A, E).

        Without a transcript it is the decoding prompt.
        """
        row = self.row([audio], [transcript], prompts=[prompt or self.prompts[0]])
        return row.embeddings, row.labels

    def row(
        self,
        audio: Sequence[Tensor],
        transcripts: Sequence[str | None],
        *,
        prompts: Sequence[Prompt] | None = None,
        masking: Sequence[float] | None = None,
    ) -> Row:
        """The sequences of a batch.

        `prompts` are those of the utterances, the first of the model's unless given; of each
        transcript a share of `masking` is hidden from the language model (torch's generator on the
        CPU). Raises IsthmusError for a sequence longer than the language model takes.
        """
        tokens: list[int] = []
        labels: list[int] = []
        masked: list[bool] = []
        lengths = []
        limit = self.llm.max_tokens
        prompts = prompts or [self.prompts[0]] * len(audio)
        fractions = masking or [0.0] * len(audio)
        for embeddings, transcript, prompt, fraction in zip(
            audio, transcripts, prompts, fractions, strict=True
        ):
            own_tokens, own_labels = self._layout(len(embeddings), transcript, prompt)
            if transcript is not None and limit is not None and len(own_tokens) > limit:
                raise IsthmusError(
                    f"A training sequence has {len(own_tokens)} positions, the language model "
                    f"takes {limit}. Lower data.max_seconds, or leave out the utterance with the "
                    f"transcript {transcript[:60]!r} ({len(transcript)} letters)."
                )
            tokens += own_tokens
            labels += own_labels
            if masking:
                masked += _masked(own_labels, fraction)
            lengths.append(len(own_tokens))
        placed = torch.tensor(tokens)
        heard = torch.cat(list(audio)).to(self.llm.dtype)
        where = (placed == AUDIO).nonzero()[:, 0].to(heard.device)
        text = self.llm.embed(placed.clamp(min=0).to(heard.device)).to(self.llm.dtype)
        if masking:
            mask = torch.tensor(masked).to(heard.device)
            text = torch.where(mask[:, None], self._mask_embedding().to(text), text)
        return Row(text.index_copy(0, where, heard), torch.tensor(labels).to(heard.device), lengths)

    def transcript_loss(
        self,
        audio: Sequence[Tensor],
        transcripts: Sequence[str],
        *,
        prompts: Sequence[Prompt] | None = None,
        masking: Sequence[float] | None = None,
    ) -> TranscriptLoss:
        """The loss of transcripts after their audio embeddings (A, E); options as of `row`."""
        row = self.row(audio, transcripts, prompts=prompts, masking=masking)
        return self._padded_loss(row) if self.attention is None else self._packed_loss(row)

    def loss(
        self, waveforms: Tensor, num_samples: Tensor, transcripts: Sequence[str]
    ) -> tuple[Tensor, int, int]:
        """Summed cross-entropy () of the transcripts, their tokens, and how many come out right."""
        found = self.transcript_loss(self.embed_audio(waveforms, num_samples), transcripts)
        return found.total, found.tokens, int(found.correct)

    def flops(self, positions: int, tokens: int, seconds: Sequence[float]) -> float:
        """Floating-point operations of the model, forward and backward, for a batch.

        `positions` and `tokens` are the language model's, `seconds` of each utterance encoded.
        Two for each weight and position forward, two for the gradient to the input, and two for
        that of a weight that is trained (arXiv 2001.08361, section 2.1). Attention's own products,
        the projector and what is recomputed are not counted.
        """
        body, head, trained = self._llm_sizes
        llm = (4 * body + 2 * trained) * positions + 4 * head * tokens
        passes = 1 if self.tune["encoder"] == "frozen" else 3
        return llm + passes * self.encoder.flops(seconds)

    @cached_property
    def _llm_sizes(self) -> tuple[int, int, int]:
        """Weights of the blocks, of the head, and how many of the former are trained."""
        network = self.llm.network
        tables = {network.get_input_embeddings(), network.get_output_embeddings()} - {None}
        outside = {id(value) for table in tables for value in table.parameters()}
        blocks = [value for value in network.parameters() if id(value) not in outside]
        trained = sum(value.numel() for value in blocks if value.requires_grad)
        head = self.llm.dim * int(network.config.get_text_config().vocab_size)
        return sum(value.numel() for value in blocks), head, trained

    def _mask_embedding(self) -> Tensor:
        """What stands in the place of a masked token (E,): the mean of all tokens' embeddings."""
        if self._mean_embedding is None or self.tune["llm"] == "full":
            self._mean_embedding = self.llm.mean_embedding()
        return self._mean_embedding

    def _layout(
        self, num_audio: int, transcript: str | None, prompt: Prompt
    ) -> tuple[list[int], list[int]]:
        """Tokens of one sequence, AUDIO in the places of its audio, and its labels."""
        tokens, labels = [], []
        for piece in tokenise(prompt, self.llm.tokenizer, transcript):
            ids = [AUDIO] * num_audio if piece.tokens is None else piece.tokens
            tokens += ids
            labels += ids if piece.loss else [IGNORE] * len(ids)
        return tokens, labels

    def _packed_loss(self, row: Row) -> TranscriptLoss:
        attention = self.attention
        assert attention is not None
        assert attention.backend is not None
        assert attention.head is not None
        hidden = packed_hidden(self.llm.network, row.embeddings, row.lengths, attention.backend)
        targets = row.labels.roll(-1)  # position n predicts token n + 1 ...
        ends = torch.tensor(row.lengths).cumsum(0) - 1
        targets[ends.to(targets.device)] = IGNORE  # ... of its own utterance
        supervised = (targets != IGNORE).nonzero()[:, 0]
        total, correct = summed_cross_entropy(
            hidden[supervised], targets[supervised], attention.head
        )
        return TranscriptLoss(total, len(supervised), correct, len(row.labels), 0)

    def _padded_loss(self, row: Row) -> TranscriptLoss:
        pad = nn.utils.rnn.pad_sequence
        embeddings = pad(row.embeddings.split(row.lengths), batch_first=True)  # (B, L, E)
        labels = pad(row.labels.split(row.lengths), batch_first=True, padding_value=IGNORE)
        lengths = torch.tensor(row.lengths, device=labels.device)
        mask = torch.arange(labels.shape[1], device=labels.device) < lengths[:, None]
        targets = labels[:, 1:]  # position n predicts token n + 1
        keep = (targets != IGNORE).any(dim=0).nonzero()[:, 0]  # (K,)
        logits = self.llm.logits(embeddings, mask.long(), keep)  # (B, K, V)
        targets = targets[:, keep]
        total = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        supervised = targets != IGNORE
        correct = ((logits.argmax(dim=-1) == targets) & supervised).sum()
        padding = labels.numel() - len(row.labels)
        return TranscriptLoss(total, int(supervised.sum()), correct, labels.numel(), padding)


def _together(
    projection: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], rows: Sequence[Tensor]
) -> list[Tensor]:
    """Rows of any lengths through what takes them padded."""
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    padded = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    found, lengths = projection(padded, lengths)
    return [row[:length] for row, length in zip(found, lengths.tolist(), strict=True)]


def _masked(labels: Sequence[int], fraction: float) -> list[bool]:
    """Which inputs of a sequence are masked: its transcript's tokens, each with that probability.

    What stands before the transcript stays, and so does the end token, which predicts nothing.
    """
    tokens = max(0, sum(label != IGNORE for label in labels) - 1)
    drawn: list[bool] = (torch.rand(tokens) < fraction).tolist()
    return [False] * (len(labels) - tokens - 1) + drawn + [False]
