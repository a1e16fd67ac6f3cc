"""The language model: any causal model of transformers, frozen, with LoRA, or trained whole."""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from isthmus.errors import IsthmusError
from isthmus.model.parts import PartSettings, PretrainedSettings, Tune, resolve


class LoraSettings(PartSettings):
    """Low-rank adapters (arXiv 2106.09685) on the named linear layers."""

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


class LLMSettings(PretrainedSettings):
    """Any causal language model by Hugging Face name or folder."""

    tune: Tune = "frozen"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights; auto is the model's own."""
    lora: LoraSettings = LoraSettings()
    """Used with `tune: lora`."""

    def build(self) -> "LLM":
        folder = resolve(self.path, self.revision)
        try:
            network = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, dtype=self.dtype)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (ValueError, OSError, KeyError) as error:
            raise IsthmusError(f"llm: {self.path} cannot be loaded: {error}") from error
        if self.tune == "lora":
            network = _with_lora(network, self.lora)
        return LLM(network, tokenizer)


class LLM(nn.Module):
    """A causal language model with its tokenizer."""

    def __init__(self, network: nn.Module, tokenizer: PreTrainedTokenizerFast):
        super().__init__()
        self.network = network
        self.tokenizer = tokenizer

    @property
    def dim(self) -> int:
        return int(self.network.get_input_embeddings().weight.shape[1])

    @property
    def max_tokens(self) -> int | None:
        """Longest sequence the model takes, None if it states none."""
        limit = getattr(self.network.config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit else None

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (...) to embeddings (..., E)."""
        embedded: Tensor = self.network.get_input_embeddings()(tokens)
        return embedded

    def end_tokens(self, end: int) -> list[int]:
        """Tokens that end a transcript: the prompt's own and the model's."""
        stated = self.network.generation_config.eos_token_id
        more = stated if isinstance(stated, list) else [stated]
        return sorted({end, *(token for token in more if token is not None)})

    def logits(self, embeddings: Tensor, mask: Tensor, keep: Tensor) -> Tensor:
        """Logits (B, K, V) at the positions `keep` (K,) of sequences (B, L, E), padded at the end."""
        output = self.network(inputs_embeds=embeddings, attention_mask=mask, logits_to_keep=keep, use_cache=False)
        logits: Tensor = output.logits
        return logits.float()


def _with_lora(network: nn.Module, settings: LoraSettings) -> nn.Module:
    from peft import LoraConfig, get_peft_model  # takes seconds to import

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
        task_type="CAUSAL_LM",
    )
    try:
        adapted: nn.Module = get_peft_model(network, config)
    except ValueError as error:
        linear = sorted({name.rpartition(".")[2] for name, m in network.named_modules() if isinstance(m, nn.Linear)})
        raise IsthmusError(
            f"llm.lora.targets {list(settings.targets)}: the model has none of these layers. Its "
            f"linear layers are {', '.join(linear)}."
        ) from error
    return adapted


class LLMArchitecture(PartSettings):
    """Sizes of a small Llama to be trained from nothing."""

    hidden_size: int = 192
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 512
    max_position_embeddings: int = 1024

    def build(self, tokenizer: PreTrainedTokenizerFast) -> LLM:
        config = AutoConfig.for_model(
            "llama",
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
            **self.model_dump(),
        )
        return LLM(AutoModelForCausalLM.from_config(config), tokenizer)


CHAT_TEMPLATE = (
    "{% for turn in messages %}"
    "{{ 'USER: ' if turn['role'] == 'user' else 'ASSISTANT: ' if turn['role'] == 'assistant' else '' }}"
    "{{ turn['content'] }}{{ eos_token if turn['role'] == 'assistant' else ' ' }}"
    "{% endfor %}{{ 'ASSISTANT: ' if add_generation_prompt else '' }}"
)


def character_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """Letters in, letters out: printable ASCII and the line break, a token each."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = ["\n", *map(chr, range(32, 127))]
    names = ["<unk>", "<s>", "</s>", "<pad>", *characters]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def save_llm(llm: LLM, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write weights in `dtype` (loaded again in fp32: the configuration says so) and the tokenizer."""
    llm.network.save_pretrained(folder, state_dict={k: v.to(dtype) for k, v in llm.network.state_dict().items()})
    llm.tokenizer.save_pretrained(folder)
