"""The digits of the demo, as a tensorflow-datasets (tfds) builder."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow_datasets as tfds

if TYPE_CHECKING:
    from collections.abc import Iterator

_TEST_SHARE = 5  # one image in five is a test image


class KerasmpDigits(tfds.core.GeneratorBasedBuilder):
    """Handwritten digits that ship with scikit-learn: 8 x 8 pixels from 0 to 16.

    The 1,797 images by 43 people are a part of "Optical Recognition of Handwritten Digits"
    (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998). 1,437 are for training and
    360 for testing, with the same share of each digit. The split depends only on the order in the
    file, so it is the same everywhere. Nothing is downloaded.
    """

    name = "kerasmp_digits"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: dict[str, str] = {"1.0.0": "First release."}  # noqa: RUF012 - tfds's own pattern

    def _info(self) -> Any:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits that ship with scikit-learn, 8 x 8 pixels, 0 to 16.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:  # noqa: ARG002 - nothing is downloaded
        from sklearn.datasets import load_digits

        digits = load_digits()
        # Sort by label first, so that each digit has the same share of the test images.
        by_label = np.argsort(digits.target, kind="stable")
        test = np.zeros(len(by_label), bool)
        test[by_label[::_TEST_SHARE]] = True
        return {
            "train": self._generate_examples(digits, np.flatnonzero(~test)),
            "test": self._generate_examples(digits, np.flatnonzero(test)),
        }

    def _generate_examples(self, digits: Any, chosen: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in chosen:
            yield (
                int(index),
                {"image": _png(digits.images[index]), "label": int(digits.target[index])},
            )


def _png(image: Any) -> io.BytesIO:
    # tfds needs TensorFlow to encode an array, and it may not be installed.
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(stream, "PNG")
    stream.seek(0)
    return stream
