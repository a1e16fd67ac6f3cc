"""What a language model remembers of a sequence, its cache, and how hypotheses go on from it.

Shapes: N utterances, K hypotheses of each, L prompt positions, E width of the LLM, V tokens.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from isthmus.errors import IsthmusError, one_line

# What transformers calls it, since 5.24 and before, where it takes it and where it gives it back.
CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"
ROUNDING = 0.1  # of the size of logits: any precision does less, and another's words do tenfold


class Steps(ABC):
    """The next-token logits of the hypotheses of N utterances."""

    @abstractmethod
    def prefill(self) -> Tensor:
        """Logits (N, 1, V) after the prompts."""

    @abstractmethod
    def next(
        self, rows: Sequence[int], parents: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]
    ) -> Tensor:
        """Logits (N, K, V) after one more token of each hypothesis.

        `rows` are the places of the utterances that go on, among those of the last step;
        `parents` (N, K) the hypotheses of the last step that those of this one continue, with
        `tokens` (N, K).
        """


class CopiedSteps(Steps):
    """A row of the cache a hypothesis, the prompt in each."""

    def __init__(self, network: nn.Module, prompts: Sequence[Tensor]):
        self.network = network
        self.embeddings, self.mask = pad_left(prompts, network)
        self.width = 1
        self.cache: Any = None  # the network's own kind
        self.takes_positions = "position_ids" in inspect.signature(network.forward).parameters

    def prefill(self, keep: int = 1) -> Tensor:
        """Logits (N, keep, V): those before them too, of the last positions."""
        return self._forward(keep, inputs_embeds=self.embeddings)

    def next(
        self, rows: Sequence[int], parents: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]
    ) -> Tensor:
        origins = [
            row * self.width + parent
            for row, own in zip(rows, parents, strict=True)
            for parent in own
        ]
        self.width = len(tokens[0])
        chosen = torch.tensor(origins, device=self.mask.device)
        self.cache.reorder_cache(chosen)
        self.mask = nn.functional.pad(self.mask[chosen], (0, 1), value=1)
        found = torch.tensor(tokens, device=chosen.device).view(-1, 1)
        return self._forward(1, input_ids=found).view(len(rows), self.width, -1)

    def _forward(self, keep: int, **inputs: Tensor) -> Tensor:
        if self.takes_positions:
            new = next(iter(inputs.values())).shape[1]
            positions = self.mask.cumsum(dim=1) - 1
            inputs["position_ids"] = positions[:, -new:].clamp_min(0)
        output = self.network(
            **inputs,
            attention_mask=self.mask,
            **{CACHE: self.cache},
            use_cache=True,
            logits_to_keep=keep,
        )
        self.cache = getattr(output, CACHE)
        logits: Tensor = output.logits[:, -keep:]
        return logits


def pad_left(prompts: Sequence[Tensor], network: nn.Module) -> tuple[Tensor, Tensor]:
    """Prompts (L, E) as (N, L, E) in the network's precision, and where they are (N, L), 1 or 0."""
    longest = max(len(prompt) for prompt in prompts)
    rows = [nn.functional.pad(p, (0, 0, longest - len(p), 0)) for p in prompts]
    embeddings = torch.stack(rows).to(next(network.parameters()).dtype)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
    return embeddings, mask.to(embeddings.device)


@torch.no_grad()
def require_cache(network: nn.Module, name: str) -> None:
    """Raise IsthmusError unless hypotheses can go on from what the network remembers of others.

    Two prompts of noise change places, and the logits of a token more must be those of the network
    when it reads all again. Recurrent networks whose state cannot be had or moved do not pass.
    """
    embedding = cast(Any, network).get_input_embeddings()
    table, tokens = embedding.weight, [1, 2]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(6, table.shape[1], generator=generator) * float(table[:1000].float().std())
    prompts = list(noise.to(table).split([4, 2]))
    new = embedding(torch.tensor(tokens, device=table.device)).split(1)
    try:
        steps = CopiedSteps(network, prompts)
        steps.prefill()
        found = steps.next([1, 0], [[0], [0]], [[token] for token in tokens])[:, 0].float()
        whole = [torch.cat(pair)[None] for pair in zip(reversed(prompts), new, strict=True)]
        logits = [network(inputs_embeds=one, use_cache=False).logits[:, -1] for one in whole]
        expected = torch.cat(logits).float()
        fault = None
        if not (found - expected).norm() <= ROUNDING * expected.norm():
            fault = "what it computes from it is not what it computes from the whole"
    except Exception as error:  # whatever a network makes of it
        fault = f"{type(error).__name__}: {one_line(error)}"
    if fault:
        raise IsthmusError(
            f"llm.path: {name} could be trained but not decoded with: the search cannot use what a "
            f"{type(network).__name__} remembers of a sequence ({fault}). Take another LLM."
        )
