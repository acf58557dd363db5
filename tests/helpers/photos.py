"""Real pictures: crops of the two photographs in scikit-learn."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image


@cache
def photo(name):
    """Return a photograph, "china" or "flower", as bytes of shape (427, 640, 3)."""
    package = Path(find_spec("sklearn").origin).parent  # importing it takes seconds
    with Image.open(package / "datasets" / "images" / f"{name}.jpg") as image:
        return np.asarray(image.convert("RGB"))


def crops(count, size, channels=3):
    """Return `count` different squares of both photographs, in 0 to 255, float32.

    Each shows another region of 100 to 400 pixels, resized to `size` pixels.
    """
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        image = photo(("china", "flower")[number % 2])
        side = int(rng.integers(100, 400))
        top, left = (int(rng.integers(0, edge - side)) for edge in image.shape[:2])
        region = Image.fromarray(image[top : top + side, left : left + side])
        region = region.convert("L" if channels == 1 else "RGB").resize((size, size))
        found.append(np.asarray(region, "float32").reshape(size, size, channels))
    return np.stack(found)
