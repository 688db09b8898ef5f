"""A stand-in for a model with code of its own: one fused `qkv_proj` a layer, as LingoWhale-8B has."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast


class QkvConfig(PretrainedConfig):
    model_type = "qkv_stand_in"

    def __init__(self, vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)


class QkvLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.norm = nn.LayerNorm(config.hidden_size)
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden, mask):
        rows, length, width = hidden.shape
        query, key, value = self.qkv_proj(self.norm(hidden)).chunk(3, dim=-1)
        query, key, value = (x.view(rows, length, self.heads, -1).transpose(1, 2) for x in (query, key, value))
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + mask
        mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(rows, length, width)
        return hidden + self.o_proj(mixed)


class QkvForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = QkvConfig
    _no_split_modules = ["QkvLayer"]

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(QkvLayer(config) for _ in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        hidden = self.embed_tokens(input_ids)
        length = input_ids.shape[1]
        blocked = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).triu(1)[None, None]
        if attention_mask is not None:
            blocked = blocked | (attention_mask[:, None, None, :] == 0)
        mask = torch.zeros(blocked.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(blocked, -1e4)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        return {"input_ids": input_ids, "attention_mask": attention_mask}
