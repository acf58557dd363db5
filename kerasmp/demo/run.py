"""The demo itself: the same network, weights and images, once under each recipe."""

from __future__ import annotations

import dataclasses
import time
import warnings
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from kerasmp.callbacks import OverflowMonitor
from kerasmp.demo.dataset import Images, load
from kerasmp.demo.environment import environment
from kerasmp.demo.exponents import gradient_exponents
from kerasmp.demo.model import activation_bytes, build_cnn, weight_bytes
from kerasmp.demo.results import DemoResult, ExponentHistogram, RunResult
from kerasmp.demo.settings import DemoError, DemoSettings, Recipe
from kerasmp.demo.watch import Progress, Watch
from kerasmp.errors import KerasMPWarning
from kerasmp.model import Model
from kerasmp.optimizer import LossScaleOptimizer
from kerasmp.policy import policy_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Progress", "run_demo"]

LEARNING_RATE = 2e-3
_TEST_BATCH = 256


def run_demo(
    settings: DemoSettings | None = None,
    *,
    progress: Callable[[Progress], None] | None = None,
) -> DemoResult:
    """Train the demo's network under each recipe and return what came of it.

    Every run starts from the same weights and sees the same images in the same order, so that the
    curves differ by number format and scaling only.

    Args:
        settings: What to train on and how long; the defaults take well under two minutes.
        progress: Called now and then with how far it has come.

    Returns:
        The results; nothing is printed or written.

    Raises:
        KerasMPError: If the data cannot be had; see `kerasmp.demo.dataset.load`.

    Example:

        result = run_demo(DemoSettings(epochs=2), progress=print)
        print(result.runs[0].test_accuracy[-1])
    """
    settings = settings or DemoSettings()
    started = time.perf_counter()
    images = load(settings)
    batches = _Batches(images.train, settings.batch_size, settings.seed)
    start = _Start(settings, images, batches, _initial_weights(images, settings))
    runs: list[RunResult] = []
    histograms = [*_exponents(start, start.weights, "start")]
    for number, recipe in enumerate(settings.recipes, start=1):
        teller = _teller(progress, start, number)
        result, weights = _train(start, recipe.within(start.steps), teller)
        runs.append(result)
        if number == 1:
            histograms += _exponents(start, weights, "end")
    return DemoResult(
        settings=settings,
        environment=environment(),
        dataset=images.name,
        image_shape=images.spec.shape,
        classes=images.classes,
        train_images=len(images.train[0]),
        test_images=len(images.test[0]),
        learning_rate=LEARNING_RATE,
        parameters=sum(int(weight.size) for weight in start.weights),
        runs=tuple(runs),
        histograms=tuple(histograms),
        seconds=time.perf_counter() - started,
    )


class _Batches(keras.utils.PyDataset):
    """Full batches in an order that depends on seed and epoch alone, on every backend."""

    def __init__(self, part: tuple[np.ndarray, np.ndarray], batch_size: int, seed: int) -> None:
        super().__init__()
        self._images, self._labels = part
        self._size = batch_size
        self._seed = seed
        if len(self._labels) < batch_size:
            raise DemoError(
                "There are fewer training images than one step takes.",
                received=f"{len(self._labels)} images, {batch_size} a step",
                expected="at least one full batch",
                fix="Use more images (--limit), or a smaller batch_size.",
            )
        self.rewind()

    def rewind(self) -> None:
        """Go back to the order of the first epoch."""
        self._epoch = 0
        self._shuffle()

    def on_epoch_end(self) -> None:
        self._epoch += 1
        self._shuffle()

    def _shuffle(self) -> None:
        generator = np.random.default_rng((self._seed, self._epoch))
        self._order = generator.permutation(len(self._labels))

    def __len__(self) -> int:
        return len(self._labels) // self._size

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = self._order[index * self._size : (index + 1) * self._size]
        return self._images[chosen].astype("float32"), self._labels[chosen]


@dataclasses.dataclass(frozen=True)
class _Start:
    """What all runs of a demo have in common."""

    settings: DemoSettings
    images: Images
    batches: _Batches
    weights: list[np.ndarray]

    @property
    def steps(self) -> int:
        return len(self.batches) * self.settings.epochs


def _initial_weights(images: Images, settings: DemoSettings) -> list[np.ndarray]:
    keras.utils.set_random_seed(settings.seed)
    with policy_scope("float32"):
        model = build_cnn(images.spec)
    return list(model.get_weights())


def _exponents(
    start: _Start, weights: Sequence[np.ndarray], moment: str
) -> tuple[ExponentHistogram, ExponentHistogram]:
    start.batches.rewind()
    return gradient_exponents(start.images.spec, weights, start.batches[0], moment)


def _teller(
    progress: Callable[[Progress], None] | None, start: _Start, number: int
) -> Callable[..., None]:
    """Return what fills in the facts of this run and passes them on."""
    recipes = start.settings.recipes

    def tell(step: int, loss: float | None, *, finished: bool = False) -> None:
        if progress is not None:
            name = recipes[number - 1].name
            progress(Progress(name, number, len(recipes), step, start.steps, loss, finished))

    return tell


def _train(
    start: _Start, recipe: Recipe, tell: Callable[..., None]
) -> tuple[RunResult, list[np.ndarray]]:
    """Train under one recipe and return the result and the trained weights."""
    started = time.perf_counter()
    keras.utils.set_random_seed(start.settings.seed)
    model = _compiled(recipe, start.images)
    model.set_weights(start.weights)
    start.batches.rewind()
    watch = Watch(tell, len(start.batches))
    x_test, y_test = start.images.test
    callbacks: list[Any] = [watch, *([OverflowMonitor()] if recipe.loss_scale else [])]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", KerasMPWarning)
        history = model.fit(
            start.batches,
            epochs=start.settings.epochs,
            validation_data=(x_test.astype("float32"), y_test),
            validation_batch_size=_TEST_BATCH,
            callbacks=callbacks,
            shuffle=False,
            verbose=0,
        ).history
    tell(start.steps, history["loss"][-1], finished=True)
    return RunResult(
        recipe=recipe,
        loss=tuple(history["loss"]),
        test_loss=tuple(history["val_loss"]),
        test_accuracy=tuple(history["val_accuracy"]),
        steps=start.steps,
        seconds_per_step=watch.seconds_per_step,
        seconds=time.perf_counter() - started,
        skipped_steps=history["total_skipped_steps"][-1] if recipe.loss_scale else None,
        final_scale=history["loss_scale"][-1] if recipe.loss_scale else None,
        scales=tuple(watch.scales),
        activation_bytes=activation_bytes(model, start.settings.batch_size),
        weight_bytes=weight_bytes(model),
        warnings=_own(caught),
    ), list(model.get_weights())


def _compiled(recipe: Recipe, images: Images) -> Any:
    with policy_scope(recipe.policy):
        model = build_cnn(images.spec, model_class=Model if recipe.guarded else keras.Model)
    optimizer = keras.optimizers.Adam(LEARNING_RATE)
    if recipe.loss_scale is not None:
        optimizer = LossScaleOptimizer(optimizer, loss_scale=recipe.loss_scale)
    model.compile(
        optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        # Without this, Keras would scale the cautionary case behind our back.
        auto_scale_loss=False,
    )
    return model


def _own(caught: Sequence[warnings.WarningMessage]) -> tuple[str, ...]:
    """Return kerasmp's warnings as text; hand all others on."""
    own = []
    for warning in caught:
        if issubclass(warning.category, KerasMPWarning):
            own.append(str(warning.message))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    return tuple(own)
