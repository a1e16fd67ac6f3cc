"""The Q-Former: learnt queries that attend to windows of frames.

Shapes: B batch, T encoder frames, W windows, M frames of a window, Q queries, A = W Q audio
embeddings, D encoder width, H hidden width, E LLM width.
"""

import torch
from torch import Tensor, nn

from isthmus.model.encoder import Encoder
from isthmus.model.llm import LLM
from isthmus.model.projector_base import Projector, build_projector, check_projector, within
from isthmus.settings.encoders import EncoderSettings
from isthmus.settings.projectors import QFormerSettings

SEGMENTS = 64  # that have a position of their own; those behind share the last


class QFormer(Projector):
    """In every window, queries attend to each other and to the frames, layer by layer; then Linear.

    With short windows and one query it is that of SALMONN (arXiv 2310.13289, section 3.1), with
    long ones and many queries that of Yu et al. (arXiv 2309.13963), where a learnt embedding tells
    the frames of one segment from those of the next. A short last window counts as one.
    """

    def __init__(self, encoder_dim: int, llm_dim: int, window: int, settings: "QFormerSettings"):
        super().__init__()
        self.window = window
        hidden = settings.hidden
        self.norm = nn.LayerNorm(encoder_dim)
        self.queries = nn.Parameter(0.02 * torch.randn(settings.queries, hidden))
        self.segments = nn.Embedding(SEGMENTS, encoder_dim) if settings.segment_positions else None
        if self.segments is not None:
            nn.init.normal_(self.segments.weight, std=0.02)
        self.layers = nn.ModuleList(
            _layer(encoder_dim, hidden, settings.heads) for _ in range(settings.layers)
        )
        self.linear = nn.Linear(hidden, llm_dim)

    def output_length(self, num_frames: int) -> int:
        return -(-num_frames // self.window) * len(self.queries)

    def forward(self, frames: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        lengths = -(-num_frames // self.window) * len(self.queries)
        batch, longest, dim = frames.shape
        size = min(self.window, longest)  # nothing to be gained by padding what is shorter
        if size == 0:
            return frames.new_zeros(batch, 0, self.linear.out_features), lengths
        count = -(-longest // size)
        windows = nn.functional.pad(self.norm(frames), (0, 0, 0, count * size - longest))
        windows = windows.view(batch, count, size, dim)
        if self.segments is not None:
            places = torch.arange(count, device=frames.device).clamp(max=SEGMENTS - 1)
            windows = windows + self.segments(places)[:, None]
        starts = size * torch.arange(count, device=frames.device)
        filled = (num_frames[:, None] - starts).flatten()  # (B W,) frames of each window
        padding = ~within(filled, size)
        hidden = self.queries.expand(batch * count, -1, -1)  # (B W, Q, H)
        for layer in self.layers:
            hidden = layer(hidden, windows.flatten(0, 1), memory_key_padding_mask=padding)
        return self.linear(hidden.reshape(batch, -1, hidden.shape[2])), lengths


@check_projector.register
def _(settings: QFormerSettings, encoder: Encoder, heard: EncoderSettings) -> None:
    settings.window(encoder.frame_rate, encoder.max_seconds)


@build_projector.register
def _(settings: QFormerSettings, encoder: Encoder, llm: LLM) -> QFormer:
    window = settings.window(encoder.frame_rate, encoder.max_seconds)
    return QFormer(encoder.dim, llm.dim, window, settings)


def _layer(encoder_dim: int, hidden: int, heads: int) -> nn.TransformerDecoderLayer:
    """A layer of BERT with attention to frames that are as wide as the encoder makes them."""
    layer = nn.TransformerDecoderLayer(hidden, heads, 4 * hidden, 0.0, "gelu", batch_first=True)
    layer.multihead_attn = nn.MultiheadAttention(
        hidden, heads, kdim=encoder_dim, vdim=encoder_dim, batch_first=True
    )
    return layer
