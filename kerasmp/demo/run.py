"""Runs the demo: trains the same network from the same weights under each recipe."""

from __future__ import annotations

import time
import warnings
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from kerasmp.callbacks import OverflowMonitor
from kerasmp.demo.dataset import Images, load
from kerasmp.demo.environment import environment
from kerasmp.demo.exponents import gradient_exponents
from kerasmp.demo.model import ImageSpec, activation_bytes, build_cnn, weight_bytes
from kerasmp.demo.results import DemoResult, RunResult
from kerasmp.demo.settings import DemoError, DemoSettings, Recipe
from kerasmp.demo.watch import Progress, Watch
from kerasmp.errors import KerasMPWarning
from kerasmp.model import Model
from kerasmp.optimizer import LossScaleOptimizer
from kerasmp.policy import policy_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LEARNING_RATE = 2e-3
_TEST_BATCH = 256


def run_demo(
    settings: DemoSettings | None = None,
    *,
    progress: Callable[[Progress], None] | None = None,
) -> DemoResult:
    """Train the demo's network under each recipe and return the results.

    Every run starts from the same weights and sees the same images in the same order. So the curves
    differ only by number format and loss scaling.

    Args:
        settings: What to train on and for how long. The defaults take well under two minutes.
        progress: Called every few steps with the progress.

    Returns:
        The results. Nothing is printed or written.

    Raises:
        KerasMPError: If the data cannot be loaded; see `kerasmp.demo.dataset.load`.

    Example:

        result = run_demo(DemoSettings(epochs=2), progress=print)
        print(result.runs[0].test_accuracy[-1])
    """
    settings = settings or DemoSettings()
    started = time.perf_counter()
    images = load(settings)
    batches = _Batches(images.train, settings)
    keras.utils.set_random_seed(settings.seed)
    with policy_scope("float32"):
        weights = build_cnn(images.spec).get_weights()
    histograms = gradient_exponents(images.spec, weights, batches[0], "start")
    runs: list[RunResult] = []
    steps = len(batches) * settings.epochs
    for number, recipe in enumerate(settings.recipes, start=1):
        start = Progress(recipe.name, number, len(settings.recipes), step=0, steps=steps)
        watch = Watch(progress, start, len(batches))
        run, trained = _train(recipe.within(steps), settings, images, weights, watch)
        runs.append(run)
        if number == 1:
            histograms += gradient_exponents(images.spec, trained, batches[0], "end")
    return DemoResult(
        settings=settings,
        environment=environment(),
        dataset=images.name,
        image_shape=images.spec.shape,
        classes=images.spec.classes,
        train_images=len(images.train[0]),
        test_images=len(images.test[0]),
        learning_rate=LEARNING_RATE,
        parameters=sum(weight.size for weight in weights),
        runs=tuple(runs),
        histograms=tuple(histograms),
        seconds=time.perf_counter() - started,
    )


class _Batches(keras.utils.PyDataset):
    """Full batches, in an order that depends only on the seed and the epoch."""

    def __init__(self, part: tuple[np.ndarray, np.ndarray], settings: DemoSettings) -> None:
        super().__init__()
        self._images, self._labels = part
        self._size, self._seed = settings.batch_size, settings.seed
        if len(self._labels) < self._size:
            raise DemoError(
                "There are not enough training images for one step.",
                received=f"{len(self._labels)} images, {self._size} a step",
                expected="at least one full batch",
                fix="Raise --limit, or use a smaller batch_size.",
            )
        self._epoch = -1
        self.on_epoch_end()

    def on_epoch_end(self) -> None:
        self._epoch += 1
        generator = np.random.default_rng((self._seed, self._epoch))
        self._order = generator.permutation(len(self._labels))

    def __len__(self) -> int:
        return len(self._labels) // self._size

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = self._order[index * self._size : (index + 1) * self._size]
        return self._images[chosen].astype("float32"), self._labels[chosen]


def _train(
    recipe: Recipe,
    settings: DemoSettings,
    images: Images,
    weights: Sequence[np.ndarray],
    watch: Watch,
) -> tuple[RunResult, list[np.ndarray]]:
    """Train under one recipe. Return the result and the trained weights."""
    started = time.perf_counter()
    keras.utils.set_random_seed(settings.seed)
    model = _compiled(recipe, images.spec)
    model.set_weights(weights)
    batches = _Batches(images.train, settings)
    x_test, y_test = images.test
    callbacks: list[Any] = [watch, *([OverflowMonitor()] if recipe.loss_scale else [])]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", KerasMPWarning)
        history = model.fit(
            batches,
            epochs=settings.epochs,
            validation_data=(x_test.astype("float32"), y_test),
            validation_batch_size=_TEST_BATCH,
            callbacks=callbacks,
            shuffle=False,
            verbose=0,
        ).history
    return RunResult(
        recipe=recipe,
        loss=tuple(history["loss"]),
        test_loss=tuple(history["val_loss"]),
        test_accuracy=tuple(history["val_accuracy"]),
        steps=len(batches) * settings.epochs,
        seconds_per_step=watch.seconds_per_step,
        seconds=time.perf_counter() - started,
        skipped_steps=history["total_skipped_steps"][-1] if recipe.loss_scale else None,
        final_scale=history["loss_scale"][-1] if recipe.loss_scale else None,
        scales=tuple(watch.scales),
        activation_bytes=activation_bytes(model, settings.batch_size),
        weight_bytes=weight_bytes(model),
        warnings=_kerasmp_warnings(caught),
    ), model.get_weights()


def _compiled(recipe: Recipe, spec: ImageSpec) -> Any:
    with policy_scope(recipe.policy):
        model = build_cnn(spec, model_class=Model if recipe.guarded else keras.Model)
    optimizer = keras.optimizers.Adam(LEARNING_RATE)
    if recipe.loss_scale is not None:
        optimizer = LossScaleOptimizer(optimizer, loss_scale=recipe.loss_scale)
    model.compile(
        optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        # Otherwise Keras would scale the loss of the unscaled recipe.
        auto_scale_loss=False,
    )
    return model


def _kerasmp_warnings(caught: Sequence[warnings.WarningMessage]) -> tuple[str, ...]:
    """Return the messages of kerasmp's warnings, and issue all other warnings again."""
    messages = []
    for each in caught:
        if issubclass(each.category, KerasMPWarning):
            messages.append(str(each.message))
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return tuple(messages)
