"""Small untrained backbones of KerasHub: converted, trained, with LoRA, and restored."""

import keras
import numpy as np
import pytest
from helpers.flattened import flatten_layers

import kerasmp as mp
from kerasmp.probe import probe_findings

pytestmark = [
    pytest.mark.full,
    pytest.mark.keras("3.15.0"),  # KerasHub needs it
    # From KerasHub: a layer of T5 that takes no mask, and an embedding that is not tied.
    pytest.mark.filterwarnings("ignore:.*does not support masking and will therefore destroy"),
    pytest.mark.filterwarnings("ignore:Gradients do not exist for variables.*reverse_embeddings"),
]
TOKENS = np.arange(32).reshape(4, 8) % 50
ONES = np.ones((4, 8), "int32")
WORDS = {"token_ids": TOKENS, "padding_mask": ONES}


def bert(models):
    backbone = models.BertBackbone(50, 2, 2, 16, 32, dropout=0.0, max_sequence_length=8)
    return backbone, {**WORDS, "segment_ids": 0 * ONES}


def distil_bert(models):
    return models.DistilBertBackbone(50, 2, 2, 16, 32, dropout=0.0, max_sequence_length=8), WORDS


def roberta(models):
    return models.RobertaBackbone(50, 2, 2, 16, 32, dropout=0.0, max_sequence_length=8), WORDS


def gpt2(models):
    return models.GPT2Backbone(50, 2, 2, 16, 32, dropout=0.0, max_sequence_length=8), WORDS


def llama(models):
    return models.LlamaBackbone(50, 2, 4, 16, 32, 2), WORDS


def vit(models):
    pictures = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype("float32")
    return models.ViTBackbone((16, 16, 3), 4, 2, 2, 16, 32), pictures


def t5(models):
    return models.T5Backbone(50, 2, 2, 16, 32, dropout=0.0), {
        "encoder_token_ids": TOKENS,
        "encoder_padding_mask": ONES,
        "decoder_token_ids": TOKENS,
        "decoder_padding_mask": ONES,
    }


def made(build):
    """Return a backbone and its inputs."""
    import keras_hub  # takes a second

    return build(keras_hub.models)


def predictions(model, x):
    found = model.predict(x, verbose=0)
    return list(found.values()) if isinstance(found, dict) else [found]


def with_head(backbone):
    """Return a classifier of two classes."""
    output = backbone.output
    output = next(iter(output.values())) if isinstance(output, dict) else output
    x = keras.layers.GlobalAveragePooling1D()(output) if len(output.shape) == 3 else output
    return keras.Model(backbone.input, keras.layers.Dense(2)(x))


def train(model, x):
    """Take three steps in float16 without a skip; return whether the loss fell."""
    optimizer = mp.LossScaleOptimizer(keras.optimizers.Adam(1e-3), loss_scale=2.0**10)
    jit = "auto" if keras.backend.backend() == "jax" else False
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=jit)
    losses = model.fit(x, np.arange(4) % 2, epochs=3, verbose=0).history["loss"]
    assert optimizer.skipped_steps == 0
    return losses[-1] < losses[0]


# Llama's attention multiplies in float16 and sums in float32, which JAX lacks on a CPU.
LLAMA = pytest.param(llama, marks=pytest.mark.backend("tensorflow", "torch"))


@pytest.mark.parametrize("build", [bert, gpt2, LLAMA, vit])
def test_a_backbone_is_converted_trained_adapted_and_restored(build):
    backbone, x = made(build)
    exact = predictions(backbone, x)
    report = mp.convert(backbone)
    dtypes = [keras.dtype_policies.get(row.after).compute_dtype for row in report.rows[1:]]
    assert dtypes.count("float16") > dtypes.count("float32")
    for half, wanted in zip(predictions(backbone, x), exact, strict=True):
        # About thirty layers round: twice the root of twice their number; measured: 3.4.
        assert 0 < np.abs(half - wanted).max() < 16 * 2.0**-11 * np.abs(wanted).max()
    report.restore()
    for again, wanted in zip(predictions(backbone, x), exact, strict=True):
        np.testing.assert_array_equal(again, wanted)
    model = with_head(backbone)
    mp.convert(model)
    assert train(model, x)
    backbone.enable_lora(4)
    assert train(model, x)
    mp.convert(model, "float32")
    assert {layer.compute_dtype for layer in model.layers} <= {"float32", "int32"}


def test_t5_overflows_in_float16_as_in_stock_keras_and_a_rule_prevents_it():
    backbone, x = made(t5)
    attention = next(
        type(layer)
        for layer in flatten_layers(backbone)
        if type(layer).__name__ == "T5MultiHeadAttention"
    )
    exact = predictions(backbone, x)
    with np.errstate(over="ignore"):
        # Its mask is 0 * -1e9 where nothing is masked, and -1e9 is -inf in float16; torch alone
        # takes the factor as float32.
        mp.convert(backbone)
        broken = [np.isnan(half).any() for half in predictions(backbone, x)]
        assert broken == [keras.backend.backend() != "torch"] * 2
    mp.convert(backbone, rules=["safe", {attention: "float32"}])
    for half, wanted in zip(predictions(backbone, x), exact, strict=True):
        assert 0 < np.abs(half - wanted).max() < 16 * 2.0**-11 * np.abs(wanted).max()
    model = with_head(backbone)
    mp.convert(model, rules=["safe", {attention: "float32"}])
    assert train(model, x)


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("build", [bert, distil_bert, roberta, gpt2, LLAMA, vit])
def test_the_probe_is_silent_on_a_backbone(build, half):
    backbone, x = made(build)
    mp.convert(backbone, f"mixed_{half}")
    found = probe_findings(backbone, x)
    assert not [each for each in found if each.severity != "hint"]


@pytest.mark.backend("tensorflow", "jax")  # torch takes the factor as float32
def test_the_probe_finds_that_t5_overflows_in_float16():
    backbone, x = made(t5)
    with np.errstate(over="ignore"):
        mp.convert(backbone)
        found = [each for each in mp.lint(backbone, x).errors if each.rule == "not-finite"]
    assert found
    assert all("attention" in each.place for each in found)


# Their `get_config` leaves out the policies of layers, and a task compiles itself.
@pytest.mark.parametrize("build", [bert, gpt2])
def test_files_restore_policies_and_half_precision_variables(build, tmp_path):
    backbone, x = made(build)
    for policy, variables in (("mixed_float16", None), ("float16", "float16")):
        mp.convert(backbone, policy, variables=variables)
        backbone.save(tmp_path / "model.keras")
        assert_same(keras.models.load_model(tmp_path / "model.keras"), backbone, x)


@pytest.mark.backend("tensorflow")  # whose data pipeline KerasHub's tasks take
@pytest.mark.filterwarnings("ignore:`compile..` was not called as part of model loading")
@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed, but will be ignored")
@pytest.mark.filterwarnings("ignore:The saved state of .* is not loaded")
def test_a_task_restores_its_own_optimizer_only(tmp_path):
    backbone, x = made(bert)
    task = made(lambda models: models.BertTextClassifier(backbone, num_classes=2))
    mp.convert(task)
    task.fit(x, np.arange(4) % 2, verbose=0)
    task.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_same(loaded, task, x)
    assert loaded.optimizer.applied_steps + loaded.optimizer.skipped_steps == 1
    task.compile(mp.LossScaleOptimizer("sgd"))
    task.save(tmp_path / "model.keras")
    with pytest.warns(mp.errors.LossScaleWarning, match="it was SGD, and the class made"):
        keras.models.load_model(tmp_path / "model.keras")


def assert_same(loaded, model, x):
    pairs = zip(flatten_layers(loaded), flatten_layers(model), strict=True)
    assert all(one.dtype_policy == other.dtype_policy for one, other in pairs)
    assert [v.dtype for v in loaded.weights] == [v.dtype for v in model.weights]
    for one, other in zip(predictions(loaded, x), predictions(model, x), strict=True):
        np.testing.assert_array_equal(one, other)
