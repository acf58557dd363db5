"""Images from tensorflow-datasets, from this disk only: no call here can reach the network."""

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

# Package to install, by the module that is imported.
_NEEDED = {
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
    """A classification data set, in memory.

    Args:
        name: Name and version, as tfds writes them.
        train: Images `(n, height, width, channels)` and labels `(n,)`.
        test: The same, for testing.
        classes: Number of classes.
    """

    name: str
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    classes: int

    @property
    def spec(self) -> ImageSpec:
        """What a network must know; the largest pixel value, at least 1, is that in training."""
        height, width, channels = (int(side) for side in self.train[0].shape[1:])
        brightest = max(1.0, float(self.train[0].max()))
        return ImageSpec((height, width, channels), self.classes, brightest)


def require_packages() -> None:
    """Check that everything the demo and its report import is installed, before any work.

    Raises:
        MissingDependencyError: If a package is missing; all of them are named.
    """
    missing = [name for module, name in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingDependencyError(
            "The demo needs packages that are not installed.",
            received=", ".join(missing) + " missing",
            fix='Install them with: pip install "kerasmp[demo]"',
        )


def load(settings: DemoSettings) -> Images:
    """Return the images that the settings ask for, preparing the digits if need be.

    Args:
        settings: The settings; `dataset`, `data_dir` and `limit` count here.

    Returns:
        The images, all in memory.

    Raises:
        DatasetError: If the data set is not on this disk, or damaged.
        DemoError: If it is there but holds no images of one size with class labels, or no split
            for training or testing.
        OutputError: If the digits cannot be prepared in the folder.
        MissingDependencyError: If a package is missing that reading needs.
    """
    require_packages()
    try:
        with _quiet():
            builder = _builder(settings)
            image, label, classes = _keys(builder)
            train, test = (
                _read(builder, split, image, label, settings.limit) for split in _splits(builder)
            )
    except (KerasMPError, MemoryError):
        raise
    except Exception as error:
        # TensorFlow, protobuf and tfds say in their own ways that files are damaged or missing.
        raise DatasetError(
            "This data set is on this disk, but cannot be read.",
            received=f"{settings.dataset!r} in {settings.folder} ({type(error).__name__}: {error})",
            expected="all files as tensorflow-datasets wrote them",
            fix="Prepare it again.",
        ) from error
    return Images(builder.info.full_name.replace("/", " "), train, test, classes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep tfds's own progress bars, messages and advice out of ours."""
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


def _builder(settings: DemoSettings) -> Any:
    import tensorflow_datasets as tfds

    if settings.dataset == DIGITS:
        return _digits(settings.folder)
    return tfds.builder_from_directory(str(find(settings.folder, settings.dataset)))


def _digits(folder: Path) -> Any:
    import tensorflow_datasets as tfds

    from kerasmp.demo.digits import KerasmpDigits

    there = folder / DIGITS / str(KerasmpDigits.VERSION)
    if (there / _INFO).exists():
        return tfds.builder_from_directory(str(there))
    # Both are tfds's own formats; only the first can be read without TensorFlow.
    file_format = "array_record" if importlib.util.find_spec("array_record") else "tfrecord"
    if file_format == "tfrecord":
        _require_tensorflow(file_format)
    try:
        builder = KerasmpDigits(data_dir=str(folder), file_format=file_format)
        builder.download_and_prepare()
    except OSError as error:
        raise OutputError(
            "The digits cannot be prepared in this folder.",
            received=f"{folder} ({error.strerror or error})",
            expected="a folder that can be written",
            fix="Pass another one with --data-dir.",
        ) from error
    return builder


def find(folder: Path, dataset: str) -> Path:
    """Return the folder of the newest prepared version of a data set.

    It looks for tfds's own files, since asking tfds for a data set by name may try to reach a
    server, and offline that takes minutes.

    Args:
        folder: Folder with prepared data sets.
        dataset: "name", "name/config", each also with ":1.2.3".

    Raises:
        DatasetError: If there is none.
    """
    name, _, version = dataset.partition(":")
    found = sorted(
        (path.parent for path in (folder / name).glob(f"*/{_INFO}")),
        key=_version_key,
    )
    found = [path for path in found if _VERSION.fullmatch(path.name) and version in {"", path.name}]
    if found and name:
        return found[-1]
    known = prepared(folder)
    raise DatasetError(
        "This data set is not prepared on this disk.",
        received=f"{dataset!r}, looked for in {folder}",
        expected=", ".join([DIGITS, *known]),
        fix=did_you_mean(dataset, [DIGITS, *known])
        or "Prepare it once with tensorflow-datasets, and pass its folder with --data-dir.",
    )


def prepared(folder: Path) -> list[str]:
    """Return the names, with their configs, of the data sets that are prepared in a folder."""
    places = [path.parent for depth in ("*/*", "*/*/*") for path in folder.glob(f"{depth}/{_INFO}")]
    return sorted({path.parent.relative_to(folder).as_posix() for path in places})


def _version_key(path: Path) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", path.name)]


def _keys(builder: Any) -> tuple[str, str, int]:
    """Return the names of the image and the label, and the number of classes."""
    features = builder.info.features
    image, label = (builder.info.supervised_keys or ("image", "label"))[:2]
    known = dict(features.items()) if hasattr(features, "items") else {}
    shape = getattr(known.get(image), "shape", None) or ()
    classes = getattr(known.get(label), "num_classes", None)
    named = ", ".join(sorted(known)) or "without names"
    if len(shape) != 3 or None in shape or not classes:  # noqa: PLR2004 - height, width, channels
        raise DemoError(
            "The demo cannot train on this data set.",
            received=f"{builder.info.full_name} with features {named}",
            expected="images of one size, and a class label",
            fix="Choose another one with --dataset.",
        )
    return image, label, int(classes)


def _splits(builder: Any) -> tuple[str, str]:
    names = list(builder.info.splits)
    testing = next((name for name in ("test", "validation") if name in names), None)
    if "train" not in names or testing is None:
        raise DemoError(
            "The demo cannot train on this data set.",
            received=f"{builder.info.full_name} with splits {', '.join(sorted(names)) or 'none'}",
            expected='a split "train", and "test" or "validation"',
            fix="Choose another one with --dataset.",
        )
    return "train", testing


def _read(
    builder: Any, split: str, image: str, label: str, limit: int | None
) -> tuple[np.ndarray, np.ndarray]:
    part = split if limit is None else f"{split}[:{limit}]"
    if _can_be_indexed(builder):
        examples = list(builder.as_data_source(split=part))
        images = np.stack([example[image] for example in examples])
        labels = np.asarray([example[label] for example in examples])
    else:
        _require_tensorflow(builder.info.file_format.value)
        import tensorflow_datasets as tfds

        batch = tfds.as_numpy(builder.as_dataset(split=part, batch_size=-1))
        images, labels = batch[image], batch[label]
    if len(labels) and labels.min() < 0:
        raise DemoError(
            "The demo cannot train on this data set.",
            received=f"{builder.info.full_name}, whose split {split} has images without a label",
            expected="a label for every image",
            fix="Choose another one with --dataset.",
        )
    return images, labels.astype("int32")


def _can_be_indexed(builder: Any) -> bool:
    return builder.info.file_format is not None and builder.info.file_format.value == "array_record"


def _require_tensorflow(file_format: str) -> None:
    if importlib.util.find_spec("tensorflow") is None:
        raise MissingDependencyError(
            f"Reading data in the {file_format} format needs TensorFlow, whatever Keras runs on.",
            received="no tensorflow",
            fix='Install it with: pip install "kerasmp[tensorflow-cpu]"',
        )
