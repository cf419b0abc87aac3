"""Make the tiny vision-language model: the tiny model with a vision tower before it, which learns to see characters.

    PYTHONPATH=data python tiny_vision_model/pretrain.py tiny_vision_model

The tower sees sheets of made-up words and numbers, and learns to give, for each patch, the language model's embedding
of the character on it. The language model stays as it is: it has seen no image, and no receipt.
"""

import argparse
import json
import random
import string
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from make_receipts import CELL, COLUMNS, ROWS, SIDE, draw_lines, pick_style
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    PreTrainedTokenizerBase,
)

TINY_MODEL = Path(__file__).resolve().parent.parent / "tiny_model"
IMAGE, AROUND, WHOLE, END = "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"
CHARACTERS = " " + string.ascii_letters + string.digits + ".-&"
TOWER = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.08,
}
PAPER, SPREAD = 0.9, 0.3  # of pixels: paper is about 0 for the tower
# The tiny model's format, with content that is text or a list of parts.
TEMPLATE = (
    "<|begin|>{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_sheet(rng: random.Random) -> list[tuple[str, str]]:
    """Make lines of a made-up word and a number, or of a date."""
    lines = []
    for _ in range(rng.randrange(5, ROWS + 1)):
        word = "".join(rng.choices(string.ascii_lowercase, k=rng.randrange(3, 7)))
        word = rng.choice((word, word.upper(), word.capitalize(), word.capitalize()))
        price = f"{rng.randrange(100)}.{rng.randrange(100):02}"
        date = f"20{rng.randrange(10, 40)}-{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02}"
        number = "".join(rng.choices(string.digits, k=rng.randrange(2, 6)))
        value = rng.choices((price, date, number), (45, 35, 20))[0]
        lines.append((value, "") if value is date else (word[: COLUMNS - 1 - len(value)], value))
    return lines


def draw_batch(rng: random.Random, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw sheets: pixels, and the number of the character on each patch."""
    drawn = [draw_lines(make_sheet(rng), pick_style(rng), rng) for _ in range(count)]
    pixels = np.stack([np.asarray(image).transpose(2, 0, 1) for image, _ in drawn])
    numbers = [[CHARACTERS.index(one) for row in characters for one in row] for _, characters in drawn]
    return (torch.from_numpy(pixels).float() / 255 - PAPER) / SPREAD, torch.tensor(numbers)


def make_model(tokenizer: PreTrainedTokenizerBase) -> Idefics3ForConditionalGeneration:
    """Put a random tower and projector before the tiny model."""
    language = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32)
    language.resize_token_embeddings(len(tokenizer))
    config = Idefics3Config(
        text_config=language.config.to_dict(),
        vision_config=TOWER | {"image_size": SIDE, "patch_size": CELL},
        scale_factor=1,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        tie_word_embeddings=True,
        bos_token_id=language.config.bos_token_id,
        eos_token_id=language.config.eos_token_id,
        pad_token_id=language.config.pad_token_id,
    )
    model = Idefics3ForConditionalGeneration(config)
    model.model.text_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    model.generation_config = language.generation_config
    return model


def reading_loss(vectors: torch.Tensor, numbers: torch.Tensor, embeddings: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return how far vectors are from the embeddings of their characters, and the share that is nearest to its own."""
    scores = 4 * F.rms_norm(vectors, vectors.shape[-1:]) @ F.normalize(embeddings, dim=-1).T
    distance = (vectors - embeddings[numbers]).square().mean() / embeddings.var()
    printed = numbers > 0
    right = (scores.argmax(-1) == numbers)[printed].float().mean().item()
    return F.cross_entropy(scores.float().flatten(0, 1), numbers.flatten()) + distance, right


def train(model, tokenizer: PreTrainedTokenizerBase, steps: int, rate: float, seed: int) -> None:
    """Train the tower and the projector, on fresh sheets at each step; the language model stays as it is."""
    rng = random.Random(seed)
    parameters = [*model.model.vision_model.parameters(), *model.model.connector.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    characters = torch.tensor(tokenizer.convert_tokens_to_ids(["Ġ", *CHARACTERS[1:]]))
    embeddings = model.get_input_embeddings().weight.detach()[characters]
    began = time.process_time()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, step / 40) * (1 - 0.95 * step / steps)
        pixels, numbers = draw_batch(rng, 16)
        with torch.autocast("cpu", torch.bfloat16):
            vectors = torch.stack(list(model.model.get_image_features(pixels[:, None]).pooler_output))
        loss, seen = reading_loss(vectors.float(), numbers, embeddings)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 20 == 0:
            print(
                f"step {step}: {time.process_time() - began:.0f} CPU s, loss {loss:.3f}, characters read {seen:.1%}",
                flush=True,
            )


def save(model: Idefics3ForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.config.text_config._name_or_path = ""  # where the language model lay on this machine
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    Idefics3ImageProcessorPil(
        size={"longest_edge": SIDE},
        max_image_size={"longest_edge": SIDE},
        do_image_splitting=False,
        image_mean=[PAPER] * 3,
        image_std=[SPREAD] * 3,
    ).save_pretrained(folder)
    settings = {"processor_class": "Idefics3Processor", "image_seq_len": ROWS * COLUMNS}
    (folder / "processor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=260)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="the folder of a model to train further")
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE, AROUND, WHOLE, END]})
    model = make_model(tokenizer)
    if given.start:
        model = Idefics3ForConditionalGeneration.from_pretrained(given.start, dtype=torch.float32)
    train(model, tokenizer, given.steps, given.rate, given.seed)
    save(model, tokenizer, given.folder)


if __name__ == "__main__":
    main()
