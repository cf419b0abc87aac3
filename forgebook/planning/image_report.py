"""The images of a tokenized set, for its report: how many, how large, and what the processor makes of them."""

from __future__ import annotations

import collections
import itertools
from typing import Any

import numpy as np

from forgebook.data.image_tokens import ImageTokens
from forgebook.data.token_store import Tokens

__all__ = ["image_line", "image_report"]

LISTED_SIZES = 5


def image_report(whole: Tokens, images: ImageTokens) -> dict[str, Any]:
    """Describe the images of a set: how many, and of the most frequent sizes what the processor makes of them."""
    per_example = [whole.images_of(k) for k in range(len(whole))]
    listed = list(itertools.chain.from_iterable(per_example))
    by_size = collections.Counter((one.file.width, one.file.height, one.stop - one.start) for one in listed)
    first = {(one.file.width, one.file.height): one.file for one in reversed(listed)}
    sizes = [
        {
            "pixels": f"{width} x {height}",
            "images": count,
            "tokens": tokens,
            "resized": str(images.resized(first[width, height])),
        }
        for (width, height, tokens), count in by_size.most_common(LISTED_SIZES)
    ]
    pixels = [one.file.width * one.file.height for one in listed] or [0]
    return {
        "images": len(listed),
        "examples": sum(map(bool, per_example)),
        "tokens": sum(one.stop - one.start for one in listed),
        "most_in_an_example": max(map(len, per_example), default=0),
        "pixels_p50": int(np.percentile(pixels, 50, method="inverted_cdf")),
        "pixels_max": max(pixels),
        "resized_pixels": sum(images.resized(one.file).pixels for one in listed),
        "sizes": sizes,
    }


def image_line(report: dict[str, Any]) -> str:
    """Write the images of a set's report in one line."""
    about = report["images"]
    if not about["images"]:
        return "0"
    share = about["tokens"] / max(1, report["tokens"])
    most = about["sizes"][0]
    return (
        f"{about['images']:,} in {about['examples']:,} examples, {share:.0%} of the tokens; most are {most['pixels']} "
        f"pixels, resized to {most['resized']}, {most['tokens']} tokens"
    )
