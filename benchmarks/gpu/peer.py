"""One epoch of another trainer on the examples of run.py: python benchmarks/gpu/peer.py NAME MODEL TRAIN.jsonl

NAME: trainer (transformers, with the loss on answers), trl, trl_checkpointing or unsloth. Prints one line of JSON.
"""

import json
import os
import sys
import time

name, model_id, data = sys.argv[1:]
os.environ |= {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
if name == "unsloth":  # it wants to be imported before what it changes
    from unsloth import FastLanguageModel

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments  # noqa: E402

GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
tokenizer = AutoTokenizer.from_pretrained(model_id)


def encode(messages: list[dict]) -> dict:
    """The tokens of a conversation, and labels on what the answer adds to its prompt."""
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    return {"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]}


def collate(batch: list[dict]) -> dict:
    longest = max(len(row["input_ids"]) for row in batch)
    fill = {"input_ids": tokenizer.pad_token_id, "labels": -100}
    tensors = {
        key: torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in batch])
        for key, value in fill.items()
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in batch])
    return tensors | {"attention_mask": (torch.arange(longest) < lengths[:, None]).long()}


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *words, **more) -> None:
        if GPU:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


with open(data, encoding="utf-8") as lines:
    rows = [encode(json.loads(line)["messages"]) for line in lines]
clock, checkpointing = Clock(), name.endswith("_checkpointing")
common = {
    "output_dir": "runs/benchmark-gpu/peer", "per_device_train_batch_size": 16, "num_train_epochs": 1,
    "learning_rate": 1e-4, "report_to": "none", "save_strategy": "no", "bf16": GPU, "use_cpu": not GPU,
    "disable_tqdm": True, "optim": "adamw_torch_fused", "gradient_checkpointing": checkpointing,
    "remove_unused_columns": False,
}  # fmt: skip
if name == "trainer":
    base = AutoModelForCausalLM.from_pretrained(model_id, dtype=DTYPE)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **LORA))
    trainer = Trainer(model, TrainingArguments(**common), collate, rows, callbacks=[clock])
else:
    from trl import SFTConfig, SFTTrainer

    if name == "unsloth":
        model, tokenizer = FastLanguageModel.from_pretrained(model_id, max_seq_length=2048, dtype=DTYPE)
        linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model, settings = FastLanguageModel.get_peft_model(model, target_modules=linear, **LORA), None
    else:
        model = AutoModelForCausalLM.from_pretrained(model_id, dtype=DTYPE)
        settings = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **LORA)
    options = SFTConfig(max_length=2048, dataset_kwargs={"skip_prepare_dataset": True}, **common)
    trainer = SFTTrainer(
        model,
        options,
        collate,
        Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=settings,
        callbacks=[clock],
    )
if GPU:
    torch.cuda.reset_peak_memory_stats()
trainer.train()
# The first five steps warm up; of all others, the mean.
seconds = (clock.times[-1] - clock.times[4]) / (len(clock.times) - 5)
tokens = sum(len(row["input_ids"]) for row in rows) / len(clock.times)
peak = torch.cuda.max_memory_allocated() / 1e9 if GPU else None
print(json.dumps({
    "tokens_per_second": round(tokens / seconds), "milliseconds_per_step": round(1000 * seconds, 1),
    "peak_gigabytes": peak and round(peak, 2),
}))  # fmt: skip
