"""Loads images that tensorflow-datasets (tfds) prepared on this disk. It uses no network."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import logging
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from kerasmp.demo.model import ImageSpec
from kerasmp.demo.settings import DIGITS, DemoError, DemoSettings
from kerasmp.errors import (
    DatasetError,
    KerasMPError,
    MissingDependencyError,
    OutputError,
    did_you_mean,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Modules that the demo imports, and the package that provides each.
_REQUIRED = {
    "importlib_resources": "importlib_resources",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
    "rich": "rich",
    "sklearn": "scikit-learn",
    "tensorflow_datasets": "tensorflow-datasets",
}
_INFO = "dataset_info.json"
_VERSION = re.compile(r"\d+\.\d+\.\d+")


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """A data set for classification, in memory.

    Args:
        name: Name and version, as tfds writes them.
        train: Training images `(n, height, width, channels)` and labels `(n,)`.
        test: Test images and labels.
        spec: Shape, classes and brightness of the images. `brightest` is the largest pixel value
            of the training images, and at least 1.
    """

    name: str
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    spec: ImageSpec


def load(settings: DemoSettings) -> Images:
    """Load the images that the settings name. The first time, this prepares the digits on disk.

    Args:
        settings: The settings. Only `dataset`, `data_dir` and `limit` matter here.

    Returns:
        The images, all in memory.

    Raises:
        DatasetError: If the data set is not on this disk, or is damaged.
        DemoError: If the data set does not have images of one size with class labels, and splits
            for training and testing.
        OutputError: If the digits cannot be written to the folder.
        MissingDependencyError: If a package that reads the data is not installed.
    """
    require_packages()
    try:
        import tensorflow_datasets as tfds

        with _quiet():
            name, parent = settings.dataset, settings.folder
            folder = _digits(parent) if name == DIGITS else find(parent, name)
            return _read(tfds.builder_from_directory(str(folder)), settings.limit)
    except (KerasMPError, MemoryError):
        raise
    except Exception as error:
        # TensorFlow, protobuf and tfds raise many kinds of errors for damaged or missing files.
        raise DatasetError(
            "The data set is on this disk, but it cannot be read.",
            received=f"{settings.dataset!r} in {settings.folder} ({type(error).__name__}: {error})",
            expected="all files as tensorflow-datasets wrote them",
            fix="Prepare the data set again.",
        ) from error


def require_packages() -> None:
    """Check that all packages of the demo and its report are installed.

    Raises:
        MissingDependencyError: If packages are missing. The message names all of them.
    """
    missing = [name for module, name in _REQUIRED.items() if not importlib.util.find_spec(module)]
    if missing:
        raise MissingDependencyError(
            "The demo needs packages that are not installed.",
            received=", ".join(missing) + " missing",
            fix='Install them with: pip install "kerasmp[demo]"',
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars and messages of tfds."""
    import tensorflow_datasets as tfds

    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl.setLevel(level)


def _digits(folder: Path) -> Path:
    """Return the folder of the digits, and prepare them if they are not there yet."""
    from kerasmp.demo.digits import KerasmpDigits

    digits = folder / DIGITS / str(KerasmpDigits.VERSION)
    if (digits / _INFO).exists():
        return digits
    # array_record can be read without TensorFlow.
    file_format = "array_record" if importlib.util.find_spec("array_record") else "tfrecord"
    _require_tensorflow(file_format)
    try:
        KerasmpDigits(data_dir=str(folder), file_format=file_format).download_and_prepare()
    except OSError as error:
        raise OutputError(
            "The digits cannot be written to this folder.",
            received=f"{folder} ({error.strerror or error})",
            expected="a writable folder",
            fix="Pass another folder with --data-dir.",
        ) from error
    return digits


def find(folder: Path, dataset: str) -> Path:
    """Return the folder of a prepared data set, in its newest version.

    This searches for files, because `tfds.builder(name)` may try to reach a server, which takes
    minutes offline.

    Args:
        folder: The folder with prepared data sets.
        dataset: "name" or "name/config", optionally with a version: "name:1.2.3".

    Raises:
        DatasetError: If the data set is not there.
    """
    name, _, version = dataset.partition(":")
    versions = [path.parent for path in (folder / name).glob(f"*/{_INFO}")]
    found = [
        path for path in versions if _VERSION.fullmatch(path.name) and version in {"", path.name}
    ]
    if found and name:
        return max(found, key=lambda path: [int(part) for part in path.name.split(".")])
    known = [DIGITS, *prepared(folder)]
    raise DatasetError(
        "The data set is not prepared on this disk.",
        received=f"{dataset!r}, searched in {folder}",
        expected=", ".join(known),
        fix=did_you_mean(dataset, known)
        or "Prepare it once with tensorflow-datasets, and pass its folder with --data-dir.",
    )


def prepared(folder: Path) -> list[str]:
    """Return "name" or "name/config" of each data set that is prepared in a folder."""
    files = [*folder.glob(f"*/*/{_INFO}"), *folder.glob(f"*/*/*/{_INFO}")]
    return sorted({file.parents[1].relative_to(folder).as_posix() for file in files})


def _read(builder: Any, limit: int | None) -> Images:
    info = builder.info
    features = dict(info.features.items()) if hasattr(info.features, "items") else {}
    image, label = (info.supervised_keys or ("image", "label"))[:2]
    shape = getattr(features.get(image), "shape", None) or ()
    classes = getattr(features.get(label), "num_classes", None)
    if len(shape) != 3 or None in shape or not classes:  # noqa: PLR2004 - height, width, channels
        raise _unsuitable(
            f"{info.full_name} with features {', '.join(sorted(features)) or 'without names'}",
            "images of one size, and a class label",
        )
    tests = [name for name in ("test", "validation") if name in info.splits]
    if "train" not in info.splits or not tests:
        raise _unsuitable(
            f"{info.full_name} with splits {', '.join(sorted(info.splits)) or 'none'}",
            'a split "train", and "test" or "validation"',
        )
    train, test = (
        _read_split(builder, split, image, label, limit) for split in ("train", tests[0])
    )
    spec = ImageSpec(tuple(train[0].shape[1:]), int(classes), max(1.0, float(train[0].max())))
    return Images(info.full_name.replace("/", " "), train, test, spec)


def _read_split(
    builder: Any, split: str, image: str, label: str, limit: int | None
) -> tuple[np.ndarray, np.ndarray]:
    part = split if limit is None else f"{split}[:{limit}]"
    file_format = getattr(builder.info.file_format, "value", None)
    if file_format == "array_record":
        examples = list(builder.as_data_source(split=part))
        images = np.stack([example[image] for example in examples])
        labels = np.asarray([example[label] for example in examples])
    else:
        _require_tensorflow(file_format)
        import tensorflow_datasets as tfds

        batch = tfds.as_numpy(builder.as_dataset(split=part, batch_size=-1))
        images, labels = batch[image], batch[label]
    if len(labels) and labels.min() < 0:
        raise _unsuitable(
            f"{builder.info.full_name}, whose split {split} has images without labels",
            "a label for every image",
        )
    return images, labels.astype("int32")


def _unsuitable(received: str, expected: str) -> DemoError:
    return DemoError(
        "The demo cannot train on this data set.",
        received=received,
        expected=expected,
        fix="Choose another data set with --dataset.",
    )


def _require_tensorflow(file_format: str | None) -> None:
    if file_format != "array_record" and importlib.util.find_spec("tensorflow") is None:
        raise MissingDependencyError(
            f"Data in the {file_format} format can only be read with TensorFlow, whatever backend "
            "Keras runs on.",
            received="no tensorflow",
            fix='Install it with: pip install "kerasmp[tensorflow-cpu]"',
        )
