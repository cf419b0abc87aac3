"""Write the starting point of the tiny model: tokenizer, chat template, config and random weights.

python tiny_model/make_tokenizer.py data/corpus/train.jsonl data/corpus/start
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AddedToken, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaAttention

VOCAB_SIZE = 2048
CONTEXT_LENGTH = 1024
BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SPECIAL_TOKENS = [PAD, BOS, EOS, "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
SPECIAL_TOKENS += [f"<|reserved_{index}|>" for index in range(16)]
# Not special: they are part of what the assistant says, so decoding must keep them.
TOOL_CALL_TOKENS = ["<tool_call>", "</tool_call>"]
# A word that may have to be copied never takes its space along: "a lamp" and {"item": "lamp"} hold the same
# token. What stands between such words, little words included, is one piece. Every digit stands alone.
LITTLE_WORDS = "a|an|and|are|at|for|from|has|I|in|is|it|my|My|of|on|the|The|to|was|What|with|you|You|your|Your"
PIECES = rf"(?:[^\p{{L}}\p{{N}}]|\b(?:{LITTLE_WORDS})\b)+|\p{{L}}+|\p{{N}}"


def read_strings(corpus: Path) -> Iterator[str]:
    """Yield every string that the model will read."""
    with corpus.open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            if "text" in row:
                yield row["text"]
                continue
            for message in row["messages"]:
                yield message["content"]
                for call in message.get("tool_calls", []):
                    yield json.dumps({"name": call["function"]["name"], "arguments": {}})
                    yield call["function"]["arguments"]
            for tool in row.get("tools", []):
                yield json.dumps(tool["function"])


def make_tokenizer(corpus: Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the corpus and give it the chat template beside this file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(TOOL_CALL_TOKENS),
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(read_strings(corpus), trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in TOOL_CALL_TOKENS])
    # As Llama 3 does: plain text starts with bos; the chat template writes its own.
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A",
                pair=f"{BOS} $A {BOS} $B",
                special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8"),
    )


@torch.no_grad()
def start_as_copier(attention: LlamaAttention) -> None:
    """Let heads begin by looking for tokens like the one they stand on, and by passing on what they find.

    "Mimetic initialization" (Trockman and Kolter 2023). A model this small otherwise spends most of its few
    training tokens on finding out that text repeats itself.
    """
    width, head = attention.config.hidden_size, attention.head_dim
    groups, shared = attention.config.num_key_value_heads, attention.num_key_value_groups
    query = attention.q_proj.weight.view(groups, shared, head, width)
    query[:, 0] = attention.k_proj.weight.view(groups, head, width)
    output = attention.o_proj.weight.view(width, groups, shared, head)
    output[:] = attention.v_proj.weight.view(groups, 1, head, width).permute(3, 0, 1, 2)


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Make a small Llama with random weights, the same ones for the same seed."""
    token_ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.06,
        **token_ids,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        start_as_copier(layer.self_attn)
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=128, **token_ids)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = make_tokenizer(args.corpus)
    model = make_model(tokenizer, args.seed)
    tokenizer.save_pretrained(args.folder)
    model.save_pretrained(args.folder)
    print(f"{args.folder}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens")


if __name__ == "__main__":
    main()
