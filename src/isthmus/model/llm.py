"""The language model: any causal model of transformers, frozen, with LoRA, or trained whole."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D  # the linear layer of GPT-2

from isthmus.errors import IsthmusError
from isthmus.model.parts import (
    Source,
    load_config,
    load_network,
    load_tokenizer,
    resolve,
    save_half,
    source,
    sources,
)
from isthmus.model.prompt import plain_tokens, special_tokens
from isthmus.settings.llms import LLMArchitecture, LLMSettings, LoraSettings

CAUSAL = ("forcausallm", "lmheadmodel")  # how classes of causal language models are called


class LLM(nn.Module):
    """A causal language model with its tokenizer."""

    def __init__(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.network = network
        self.tokenizer: Any = tokenizer  # transformers leaves half of its methods without types

    @property
    def dim(self) -> int:
        return self._embedding.embedding_dim

    @property
    def dtype(self) -> torch.dtype:
        """Precision of its embeddings."""
        return self._embedding.weight.dtype

    @property
    def max_tokens(self) -> int | None:
        """Longest sequence the model takes, None if it states none."""
        limit = getattr(self.network.config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit else None

    @property
    def _embedding(self) -> nn.Embedding:
        return cast(nn.Embedding, self.network.get_input_embeddings())

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (...) to embeddings (..., E)."""
        embedded: Tensor = self._embedding(tokens)
        return embedded

    @torch.no_grad()
    def mean_embedding(self) -> Tensor:
        """Mean (E,) of the embeddings of all tokens, in float32."""
        table = self._embedding
        rows = torch.arange(table.num_embeddings, device=table.weight.device)
        # a part at a time: the table of a large vocabulary takes gigabytes in float32
        parts = [self.embed(some).float().sum(dim=0) for some in rows.split(8192)]
        return torch.stack(parts).sum(dim=0) / len(rows)

    @property
    def rows(self) -> int:
        """Tokens that the network has embeddings of, which may be more than the tokenizer's."""
        return self._embedding.num_embeddings

    def require_rows(self, tokens: Sequence[int], where: str) -> None:
        """Raise IsthmusError for tokens that the network has no embeddings of."""
        if lacking := sorted({token for token in tokens if token >= self.rows}):
            names = ", ".join(map(repr, self.tokenizer.convert_ids_to_tokens(lacking[:3])))
            raise IsthmusError(
                f"{where} uses {names}, of which the language model has no embedding: its "
                f"tokenizer has {len(self.tokenizer)} tokens, the model {self.rows} rows. Take the "
                "tokenizer that belongs to it, or add rows with resize_token_embeddings()."
            )

    def unspelt(self, texts: Sequence[str]) -> tuple[int, list[str]]:
        """How many of the texts the tokenizer cannot spell, and the letters that it cannot."""
        unknown, tokenizer = self.tokenizer.unk_token_id, self.tokenizer
        if unknown is None:
            return 0, []
        letters = {one for one in set("".join(texts)) if unknown in plain_tokens(tokenizer, one)}
        # a letter may be known within a word alone
        bad = [t for t in texts if letters & set(t) and unknown in plain_tokens(tokenizer, t)]
        return len(bad), sorted(letters & set("".join(bad)))

    def store(self, dtype: torch.dtype) -> None:
        """Hold the weights in another precision."""
        cast(nn.Module, self.network).to(dtype)

    def end_tokens(self, end: int) -> list[int]:
        """Tokens that end a transcript: the prompt's own and the model's."""
        generation: Any = self.network.generation_config
        stated = generation.eos_token_id  # None, a token, or a list of them
        more = stated if isinstance(stated, list) else [stated]
        return sorted({end, *(int(token) for token in more if token is not None)})

    def logits(self, embeddings: Tensor, mask: Tensor, keep: Tensor) -> Tensor:
        """Logits (B, K, V) at positions `keep` (K,) of sequences (B, L, E), padded at the end."""
        output = self.network(
            inputs_embeds=embeddings, attention_mask=mask, logits_to_keep=keep, use_cache=False
        )
        logits: Tensor = output.logits
        return logits.float()


def build_llm(settings: LLMSettings) -> LLM:
    """The language model of these settings, its weights loaded. Raises IsthmusError."""
    if settings.tune != "lora" and settings.lora != LoraSettings():
        warnings.warn(f"llm.lora is ignored with tune: {settings.tune}.", stacklevel=2)
    place = resolve(*settings.files)
    _require_causal(place, settings.path)
    network = load_network(AutoModelForCausalLM, place, settings.path, settings.dtype)
    tokenizer = load_tokenizer(place, settings.path)
    if settings.tune == "lora":
        _add_lora(network, settings.lora)
    llm = LLM(network, tokenizer)
    _require_tokens(llm, settings.path)
    return llm


@sources.register
def _(settings: LLMSettings) -> dict[str, Source]:
    return {"": source(*settings.files)}


def _require_causal(place: Path, path: str) -> None:
    """Raise IsthmusError for a model that says it is something else than a causal LM."""
    config = load_config(place, path)
    fits = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    declared = config.architectures or [fits]
    known = any(str(one).lower().endswith(CAUSAL) or one == fits for one in declared)
    if fits is None or config.is_encoder_decoder or not known:
        what = declared[0] or f"{config.model_type!r} model"
        raise IsthmusError(
            f"llm.path: {path} is a {what}, no causal language model, which goes on with a text. "
            "Name one that is; an encoder of speech stands in encoder.path."
        )


def _require_tokens(llm: "LLM", path: str) -> None:
    """Raise IsthmusError unless the tokenizer can write, with tokens that the network has."""
    tokenizer, special = llm.tokenizer, special_tokens(llm.tokenizer)
    if len(tokenizer) <= len(special):
        raise IsthmusError(
            f"llm.path: the tokenizer of {path} has {len(tokenizer)} entries and none for text: "
            "its files are missing (tokenizer.json, tokenizer.model or vocab.json): download them."
        )
    vocabulary = tokenizer.get_vocab() if len(tokenizer) > llm.rows else {}
    llm.require_rows([number for number in vocabulary.values() if number not in special], path)


def _add_lora(network: PreTrainedModel, settings: LoraSettings) -> None:
    """Adapters into the layers of `network`; nothing else of it stays trainable."""
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
    )
    linear = {
        name.rpartition(".")[2]
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    unknown = set(settings.targets) - linear
    if unknown:
        raise IsthmusError(
            f"llm.lora.targets: the model has no layers {', '.join(sorted(unknown))}. Its linear "
            f"layers are {', '.join(sorted(linear))}."
        )
    inject_adapter_in_model(config, network)  # the network's own way asks for a newer peft


def new_llm(settings: LLMArchitecture, tokenizer: PreTrainedTokenizerFast) -> LLM:
    """A language model of these sizes with random weights."""
    config = AutoConfig.for_model(
        settings.family,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        **settings.model_dump(exclude={"family"}),
    )
    return LLM(AutoModelForCausalLM.from_config(config, trust_remote_code=False), tokenizer)


CHAT_TEMPLATE = (
    "{% for turn in messages %}"
    "{% if turn['role'] != 'system' %}{{ turn['role'] | upper + ': ' }}{% endif %}"
    "{{ turn['content'] }}{{ eos_token if turn['role'] == 'assistant' else ' ' }}"
    "{% endfor %}{{ 'ASSISTANT: ' if add_generation_prompt else '' }}"
)


def character_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """Letters in, letters out: printable ASCII and the line break, a token each."""
    names = ["<unk>", "<s>", "</s>", "<pad>", "\n", *map(chr, range(32, 127))]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def save_llm(llm: LLM, folder: Path) -> None:
    """Write the folder that LLMSettings reads; weights in half precision, loaded as fp32 again."""
    save_half(llm.network, folder)
    llm.tokenizer.save_pretrained(folder)
