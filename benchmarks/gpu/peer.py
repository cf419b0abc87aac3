"""One epoch of another trainer on the examples of run.py: python benchmarks/gpu/peer.py NAME MODEL TRAIN.jsonl STARTED

NAME: trainer (transformers, with the loss on answers), trl or unsloth, with _checkpointing, _liger, _packed, _qlora,
_full, _full_packed or _dpo as run.py lists them. STARTED: the clock, as time.time(). Prints one line of JSON.
"""

import json
import os
import sys
import time

name, model_id, data, began = sys.argv[1:]
system, *options = name.split("_")
os.environ |= {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
if system == "unsloth":  # it wants to be imported before what it changes
    from unsloth import FastLanguageModel

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

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
        self.first = 0.0

    def on_train_begin(self, *words, **more) -> None:
        self.times.append(time.perf_counter())

    def on_step_end(self, *words, **more) -> None:
        if GPU:
            torch.cuda.synchronize()
        self.first = self.first or time.time() - float(began)
        self.times.append(time.perf_counter())


with open(data, encoding="utf-8") as lines:
    given = [json.loads(line) for line in lines]
rows = given if "dpo" in options else [encode(row["messages"]) for row in given]
clock, is_packed = Clock(), "packed" in options
micro = 1 if is_packed else 16
common = {
    "output_dir": "runs/benchmark-gpu/peer", "per_device_train_batch_size": micro, "num_train_epochs": 1,
    "learning_rate": 1e-5 if "full" in options else 1e-4, "report_to": "none", "save_strategy": "no", "bf16": GPU,
    "use_cpu": not GPU, "disable_tqdm": True, "optim": "adamw_torch_fused", "use_liger_kernel": "liger" in options,
    "gradient_checkpointing": "checkpointing" in options, "remove_unused_columns": False,
}  # fmt: skip
lora = None if "full" in options else LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **LORA)


def load_base():
    """Load the base, in four bits for QLoRA."""
    settings = {}
    if "qlora" in options:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=DTYPE
        )
    if is_packed:  # TRL's packing needs a kernel that keeps examples apart
        settings["attn_implementation"] = "flash_attention_2" if GPU else "sdpa"
    return AutoModelForCausalLM.from_pretrained(model_id, dtype=DTYPE, **settings)


if system == "trainer":
    model = get_peft_model(load_base(), lora)
    trainer = Trainer(model, TrainingArguments(**common), collate, rows, callbacks=[clock])
elif "dpo" in options:
    from trl import DPOConfig, DPOTrainer

    common |= {"per_device_train_batch_size": 8, "remove_unused_columns": True}
    trainer = DPOTrainer(
        load_base(),
        args=DPOConfig(max_length=2048, precompute_ref_log_probs=True, **common),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[clock],
    )
else:
    from trl import SFTConfig, SFTTrainer

    if system == "unsloth":
        model, tokenizer = FastLanguageModel.from_pretrained(
            model_id, max_seq_length=4096, dtype=DTYPE, load_in_4bit="qlora" in options
        )
        linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model, lora = FastLanguageModel.get_peft_model(model, target_modules=linear, **LORA), None
    else:
        model = load_base()
    packing = {"packing": True, "max_length": 4096} if is_packed else {"max_length": 2048}
    settings = SFTConfig(dataset_kwargs={"skip_prepare_dataset": not is_packed}, **packing, **common)
    trainer = SFTTrainer(
        model,
        settings,
        None if is_packed else collate,
        Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[clock],
    )
if GPU:
    torch.cuda.reset_peak_memory_stats()
trainer.train()
# The first five steps warm up; of all others, the mean.
steps = len(clock.times) - 1
warm = min(5, steps - 1)
seconds = (clock.times[-1] - clock.times[warm]) / (steps - warm)
sides = [encode(row[side]) for row in given for side in ("chosen", "rejected")] if "dpo" in options else rows
tokens = sum(len(row["input_ids"]) for row in sides) / steps
peak = torch.cuda.max_memory_allocated() / 1e9 if GPU else None
print(json.dumps({
    "tokens_per_second": round(tokens / seconds), "milliseconds_per_step": round(1000 * seconds, 1),
    "seconds_to_first_step": round(clock.first, 1), "peak_gigabytes": peak and round(peak, 2),
}))  # fmt: skip
