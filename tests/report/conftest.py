import pytest

from kerasmp.demo import (
    RECIPES,
    DemoResult,
    DemoSettings,
    Environment,
    ExponentHistogram,
    RunResult,
    ScaleReading,
)


def one_run(recipe, **changes):
    scaled = recipe.loss_scale is not None
    facts = {
        "recipe": recipe,
        "loss": (1.5, 0.25),
        "test_loss": (1.25, 0.5),
        "test_accuracy": (0.5, 0.875),
        "steps": 20,
        "seconds_per_step": 0.0025,
        "seconds": 1.5,
        "skipped_steps": 3 if scaled else None,
        "final_scale": 2.0**15 if scaled else None,
        "scales": (ScaleReading(0, 2.0**18, 0), ScaleReading(16, 2.0**15, 3)) if scaled else (),
        "activation_bytes": 2**20,
        "weight_bytes": 2**12,
    }
    return RunResult(**{**facts, **changes})


@pytest.fixture(scope="session")
def result():
    place = Environment(
        versions={"kerasmp": "9.8.7", "keras": "3.1.4"},
        backend="tensorflow",
        devices=("cpu:0",),
        processor="A <fast> processor",
        cores=2,
        system="Linux x86_64",
        recommended="float32",
        reason="It is right on any.",
    )
    histograms = tuple(
        ExponentHistogram(name, moment, -30, (1,) * 32, 0)
        for moment in ("start", "end")
        for name in ("activations", "weights")
    )
    return DemoResult(
        settings=DemoSettings(epochs=2),
        environment=place,
        dataset="stripes 1.0.0",
        image_shape=(8, 8, 1),
        classes=4,
        train_images=320,
        test_images=40,
        learning_rate=0.002,
        parameters=1234,
        runs=tuple(one_run(recipe) for recipe in RECIPES),
        histograms=histograms,
        seconds=75.0,
    )


@pytest.fixture(scope="session")
def broken(result):
    """A demo in which one run ended in NaN and one in infinity."""
    import dataclasses

    nan, inf = float("nan"), float("inf")
    runs = (
        one_run(RECIPES[0], loss=(1.0, nan), test_loss=(nan, nan), seconds_per_step=nan),
        one_run(RECIPES[2], loss=(inf, inf), test_loss=(inf, inf), warnings=("All is <lost>.",)),
    )
    return dataclasses.replace(result, runs=runs)
