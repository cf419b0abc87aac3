"""Draw receipts, and write the examples that ask for their date and total.

    python data/make_receipts.py data/receipts

train.jsonl and valid.jsonl share shops, goods and layouts; test.jsonl has shops, goods and orders of lines that no
training image has. Fonts are matplotlib's DejaVu family; a till prints each character in a cell of its own.
"""

import argparse
import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

SIDE = 176  # pixels of an image's side
CELL = 16  # pixels of a character's cell
COLUMNS = ROWS = SIDE // CELL
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif")
SIZES = (14, 15, 16)
QUESTION = "Give the date and the total of this receipt as JSON."

# Words of training and validation, then those of the test alone.
SHOPS = (
    ("Norlin", "Bakery 12", "Corner Shop", "Alder & Co", "Market", "Book Den", "City Foods", "Lumen", "The Barn",
     "Harbor Cafe", "Old Mill", "Green Leaf"),
    ("Fern House", "Kiosk 7", "Quarto", "Pine Deli", "Marlow", "Dove & Sons"),
)  # fmt: skip
GOODS = (
    ("Bread", "Milk", "Tea", "Lamp", "Soap", "Pen", "Apples", "Rice", "Cup", "Book", "Cheese", "Oil", "Cards", "Towel",
     "Honey", "Coffee"),
    ("Butter", "Pasta", "Candle", "Jam", "Mug", "Salt", "Pears", "Ink"),
)  # fmt: skip
# The order of lines: s shop, d date, i items, t total, p what was paid.
LAYOUTS = (("sditp", "dsit", "sitd", "ditps"), ("sitpd", "dits", "itsd"))
TOTALS = ("TOTAL", "Total", "SUM", "Sum")
PAID = ("CASH", "Cash", "Card", "PAID")


@dataclass(frozen=True)
class Style:
    """How a sheet is printed: font, its size, ink, paper, and where right texts are."""

    font: str
    size: int
    ink: tuple[int, int, int]
    paper: tuple[int, int, int]
    align: str


@cache
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / f"fonts/ttf/{name}.ttf"), size)


@cache
def draw_glyph(font: str, size: int, character: str) -> Image.Image:
    """Draw one character in gray, centered in two cells, for some are wider than one."""
    glyph = Image.new("L", (2 * CELL, CELL))
    ImageDraw.Draw(glyph).text((CELL, 13), character, font=load_font(font, size), fill=255, anchor="ms")
    return glyph


def pick_style(rng: random.Random) -> Style:
    ink, paper = rng.randrange(0, 70), rng.randrange(215, 256)
    return Style(
        rng.choice(FONTS),
        rng.choice(SIZES),
        (ink, ink, min(255, ink + rng.randrange(0, 40))),
        (paper, paper, paper - rng.randrange(0, 30)),
        rng.choice(("right", "follow")),
    )


def draw_lines(lines: list[tuple[str, str]], style: Style, rng: random.Random) -> tuple[Image.Image, list[list[str]]]:
    """Draw lines of a left and a right text; return the image, and the characters by row and column."""
    image = Image.new("RGB", (SIDE, SIDE), style.paper)
    characters = [[" "] * COLUMNS for _ in range(ROWS)]
    x0, y0 = rng.randrange(-1, 2), rng.randrange(-1, 2)
    top = rng.randrange(ROWS - len(lines) + 1)
    for row, (left, right) in enumerate(lines, top):
        at = COLUMNS - len(right) if style.align == "right" else len(left) + 1
        for text, start in ((left, 0), (right, at)):
            for column, character in enumerate(text, start):
                corner = (x0 + column * CELL - CELL // 2, y0 + row * CELL)
                image.paste(style.ink, corner, draw_glyph(style.font, style.size, character))
                characters[row][column] = character
    return image, characters


def make_receipt(rng: random.Random, held_out: bool) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Make the lines of one receipt, and what is asked about it."""
    goods = rng.sample(GOODS[held_out], rng.randrange(2, 6))
    cents = [rng.randrange(50, 1000) for _ in goods]
    date = f"20{rng.randrange(20, 30)}-{rng.randrange(1, 13):02d}-{rng.randrange(1, 29):02d}"
    total = f"{sum(cents) / 100:.2f}"
    paid = f"{sum(cents) // 1000 * 10 + 10}.00"
    parts = {
        "s": [(rng.choice(SHOPS[held_out]), "")],
        "d": [(date, "")],
        "i": [(name, f"{price / 100:.2f}") for name, price in zip(goods, cents, strict=True)],
        "t": [(rng.choice(TOTALS), total)],
        "p": [(rng.choice(PAID), paid)],
    }
    layout = rng.choice(LAYOUTS[held_out])
    return [line for part in layout for line in parts[part]], {"date": date, "total": total}


def write_split(folder: Path, split: str, count: int, seed: int) -> None:
    """Write a split's images, and its file of rows in OpenAI's form."""
    rng = random.Random(f"{split}{seed}")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for k in range(count):
        lines, answer = make_receipt(rng, split == "test")
        image, _ = draw_lines(lines, pick_style(rng), rng)
        name = f"images/{split}-{k:03}.png"
        image.save(folder / name)
        content = [{"type": "image_url", "image_url": {"url": name}}, {"type": "text", "text": QUESTION}]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": json.dumps(answer)}]
        rows.append(json.dumps({"messages": turns}) + "\n")
    (folder / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")


COUNTS = {"train": 2000, "valid": 40, "test": 200}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for split, count in COUNTS.items():
        write_split(given.folder, split, count, given.seed)
    train, valid, test = COUNTS.values()
    print(f"wrote {given.folder}: {train:,} receipts to train on, {valid} to validate, {test} of other shops to test")


if __name__ == "__main__":
    main()
