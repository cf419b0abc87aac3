"""What other fine-tuning tools call today's keys: an unknown key gets the name to use instead.

suggest_key("per_device_train_batch_size", known)    ": did you mean 'train_batch_size_per_device'?"
"""

from collections.abc import Iterable

from forgebook.errors import near_miss

__all__ = ["OTHER_NAMES", "suggest_key"]

# By today's key of the top level: names of transformers' Trainer, TRL, axolotl, LLaMA-Factory, unsloth and ms-swift.
OTHER_NAMES = {
    "attention": "attn_implementation attn_impl flash_attn flash_attention use_flash_attention_2",
    "context_length": "max_length max_seq_length max_seq_len model_max_length cutoff_len sequence_len",
    "dtype": "bf16 fp16 torch_dtype precision",
    "eval_batch_size_per_device": "per_device_eval_batch_size eval_batch_size",
    "gradient_accumulation_steps": "grad_accum accumulate_grad_batches",
    "learning_rate": "lr",
    "liger_kernel": "use_liger_kernel enable_liger_kernel",
    "lora_config.lora_alpha": "lora_alpha",
    "lora_config.lora_dropout": "lora_dropout",
    "lora_config.r": "lora_r lora_rank",
    "lora_config.target_modules": "lora_target lora_target_modules target_modules",
    "lora_config.use_dora": "use_dora",
    "lora_config.use_rslora": "use_rslora",
    "model_id": "model model_name model_name_or_path base_model",
    "num_checkpoints_to_keep": "save_total_limit",
    "num_epochs": "epochs num_train_epochs max_epochs",
    "num_warmup_steps": "warmup_steps warmup_ratio",
    "optimizer": "optim",
    "quantization": "load_in_4bit load_in_8bit quantization_bit quant_bits",
    "train_batch_size_per_device": "per_device_train_batch_size micro_batch_size batch_size train_batch_size",
    "train_path": "dataset datasets dataset_name train_file train_dataset",
    "valid_path": "val_dataset eval_dataset validation_file eval_file test_datasets",
}
_TODAY = {other: today for today, others in OTHER_NAMES.items() for other in others.split()}


def suggest_key(key: object, known: Iterable[str]) -> str:
    """Suggest the key that was meant by an unknown one of the top level; empty when none is known or close."""
    today = _TODAY.get(str(key))
    return f": it is called {today!r} here" if today else near_miss(key, known)
