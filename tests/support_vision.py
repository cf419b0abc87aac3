"""Tiny random models that read images, of each family's real classes, and rows with images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 7,
}  # fmt: skip
QWEN_TOWER = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 14, "out_hidden_size": 32,
}  # fmt: skip

# As published, but for their words around a turn, which are the tiny model's tokens. SmolVLM's reads lists alone.
SMOLVLM = (
    "<|begin|>{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ '' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
EITHER = (
    "<|begin|>{{% for message in messages %}}{{{{ '<|' + message['role'] + '|>' }}}}"
    "{{% if message['content'] is string %}}{{{{ message['content'] }}}}{{% else %}}"
    "{{% for item in message['content'] %}}{{% if item['type'] == 'image' %}}{{{{ '{image}' }}}}"
    "{{% else %}}{{{{ item['text'] }}}}{{% endif %}}{{% endfor %}}{{% endif %}}<|end|>{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '<|assistant|>' }}}}{{% endif %}}"
)
# LLaVA 1.5's writes all images of a message before its text.
LLAVA = (
    "<|begin|>{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Pixtral's takes lists of a user and plain text of an assistant.
PIXTRAL = (
    "<|begin|>{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'user' and message['content'] is not string %}{% for chunk in message['content'] %}"
    "{% if chunk['type'] == 'text' %}{{ chunk['text'] }}{% elif chunk['type'] == 'image' %}{{ '[IMG]' }}{% endif %}"
    "{% endfor %}{% else %}{{ message['content'] + '' }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# Family -> model type, config, image processor and its settings, processor and its settings, special tokens by their
# name for the tokenizer, template.
FAMILIES: dict[str, dict[str, Any]] = {
    "SmolVLM": {
        "type": "idefics3", "text": "llama", "tower": TOWER, "config": {"scale_factor": 2},
        "pixels": ("Idefics3ImageProcessorPil", {
            "size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}),
        "processor": ("Idefics3Processor", {"image_seq_len": 4}),
        "tokens": ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>",
                   *(f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2))],
        "template": SMOLVLM, "image": "<image>",
    },
    "SmolVLM 2": {
        "type": "smolvlm", "text": "llama", "tower": TOWER, "config": {"scale_factor": 2},
        "pixels": ("SmolVLMImageProcessorPil", {
            "size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}),
        "processor": ("SmolVLMProcessor", {"image_seq_len": 4}),
        "tokens": ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>",
                   *(f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2))],
        "template": SMOLVLM, "image": "<image>",
    },
    "Qwen 2.5 VL": {
        "type": "qwen2_5_vl", "text": "", "tower": QWEN_TOWER | {"fullatt_block_indexes": [1], "window_size": 56},
        "config": {}, "rope": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        "pixels": ("Qwen2VLImageProcessorPil", {"min_pixels": 784, "max_pixels": 784 * 6}),
        "processor": ("Qwen2_5_VLProcessor", {}),
        "tokens": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
        "template": EITHER.format(image="<|vision_start|><|image_pad|><|vision_end|>"), "image": "<|image_pad|>",
    },
    "Qwen 3 VL": {
        "type": "qwen3_vl", "text": "", "tower": QWEN_TOWER | {"deepstack_visual_indexes": [0]},
        "config": {}, "rope": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        "pixels": ("Qwen2VLImageProcessorPil", {"min_pixels": 784, "max_pixels": 784 * 6}),
        "processor": ("Qwen3VLProcessor", {}),
        "tokens": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
        "template": EITHER.format(image="<|vision_start|><|image_pad|><|vision_end|>"), "image": "<|image_pad|>",
    },
    "Gemma 3": {
        "type": "gemma3", "text": "gemma3_text", "tower": TOWER | {"vision_use_head": False},
        "config": {"mm_tokens_per_image": 4}, "layers": {"layer_types": ["sliding_attention", "full_attention"],
                                                       "sliding_window": 512, "query_pre_attn_scalar": 8},
        "pixels": ("Gemma3ImageProcessorPil", {"size": {"height": 28, "width": 28}}),
        "processor": ("Gemma3Processor", {"image_seq_length": 4}),
        "named": {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
                  "image_token": "<image_soft_token>"},
        "tokens": ["<start_of_image>", "<end_of_image>", "<image_soft_token>"],
        "template": EITHER.format(image="<start_of_image>"), "image": "<image_soft_token>",
    },
    "LLaVA": {
        "type": "llava", "text": "llama", "tower": TOWER | {"model_type": "clip_vision_model"},
        "config": {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"},
        "pixels": ("CLIPImageProcessorPil", {
            "size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}),
        "processor": ("LlavaProcessor", {
            "patch_size": 7, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}),
        "tokens": ["<image>"], "template": LLAVA, "image": "<image>",
    },
    "Pixtral": {
        "type": "llava", "text": "mistral", "tower": TOWER | {"model_type": "pixtral", "head_dim": 16},
        "config": {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        "pixels": ("PixtralImageProcessorPil", {"size": {"longest_edge": 28}, "patch_size": 7}),
        "processor": ("PixtralProcessor", {"patch_size": 7}),
        "tokens": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"], "template": PIXTRAL, "image": "[IMG]",
    },
}  # fmt: skip


def save_vision_model(name: str, folder: Path, dtype: str = "float32", **larger: dict[str, Any]) -> str:
    """Save a random model of a family that reads images, as it is published; return its folder.

    larger: see `save_vision_files`.
    """
    import torch

    from forgebook.models.load import auto_class

    config = save_vision_files(name, folder, **larger)
    torch.manual_seed(0)
    model = auto_class(config).from_config(config)
    assert type(model).__name__ == config.architectures[0]
    model.generation_config.pad_token_id = 0
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return str(folder)


def save_vision_files(name: str, folder: Path, **larger: dict[str, Any]) -> Any:
    """Save all files of such a model but its weights; return its config.

    larger: settings in the place of those of `text`, `tower`, `pixels`, `processor` and `config`.
    """
    import transformers
    from transformers import CONFIG_MAPPING, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as READS_IMAGES

    from conftest import TINY_MODEL

    about = FAMILIES[name]
    tower = about["tower"] | larger.get("tower", {})
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    tokenizer.add_special_tokens({"additional_special_tokens": about["tokens"]})
    tokenizer.chat_template = about["template"]
    tokenizer.save_pretrained(folder)
    if "named" in about:
        path = Path(folder) / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"extra_special_tokens": about["named"]}))
    ids = dict(zip(about["tokens"], tokenizer.convert_tokens_to_ids(about["tokens"]), strict=True))
    text = TEXT | {"vocab_size": len(tokenizer)} | about.get("layers", {})
    text |= {"model_type": about["text"]} if about["text"] else {}
    text |= {"rope_parameters": about["rope"]} if "rope" in about else {}
    text |= larger.get("text", {})
    marks = {"image_token_id": ids[about["image"]], "image_token_index": ids[about["image"]]}
    for key, token in (
        ("vision_start_token_id", "<|vision_start|>"), ("vision_end_token_id", "<|vision_end|>"),
        ("video_token_id", "<|video_pad|>"), ("boi_token_index", "<start_of_image>"),
        ("eoi_token_index", "<end_of_image>"),
    ):  # fmt: skip
        marks |= {key: ids[token]} if token in ids else {}
    config = CONFIG_MAPPING[about["type"]](
        text_config=text, vision_config=tower, architectures=[READS_IMAGES[about["type"]]],
        bos_token_id=1, eos_token_id=2, pad_token_id=0, **about["config"] | larger.get("config", {}), **marks,
    )  # fmt: skip
    config.save_pretrained(folder)
    kind, settings = about["pixels"]
    getattr(transformers, kind)(**settings | larger.get("pixels", {})).save_pretrained(folder)
    kind, settings = about["processor"]
    settings = {"processor_class": kind, **settings, **larger.get("processor", {})}
    (Path(folder) / "processor_config.json").write_text(json.dumps(settings))
    return config


def draw(path: Path, text: str = "", size: tuple[int, int] = (40, 30), color: str = "navy") -> Path:
    """Draw a picture with a text on it."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", size, color)
    ImageDraw.Draw(picture).text((2, 2), text, fill="white")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path


def image_row(question: str, answer: str, *paths: str, system: str | None = None) -> dict:
    """Make a row of OpenAI's form with images before the question."""
    content = [*({"type": "image_url", "image_url": {"url": str(path)}} for path in paths)]
    content.append({"type": "text", "text": question})
    first = [{"role": "system", "content": system}] if system else []
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": [*first, *turns]}
