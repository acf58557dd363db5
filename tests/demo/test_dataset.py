"""Data sets are read from the disk by tensorflow-datasets, or an error names what is missing."""

import json
import socket

import numpy as np
import pytest

from kerasmp.demo import DemoError, DemoSettings, dataset
from kerasmp.demo.dataset import find, load, prepared
from kerasmp.errors import DatasetError, MissingDependencyError, OutputError

# The demo's packages, and TensorFlow for tfrecord, are installed with TensorFlow only.
needs_packages = pytest.mark.backend("tensorflow")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    load(DemoSettings(data_dir=folder))
    return folder


def write(folder, title, features, splits=("train", "test")):
    """Prepare a data set of six examples, all labelled 1, in the tfrecord format."""
    import tensorflow_datasets as tfds

    values = {"image": np.zeros((5, 4, 3), "uint8"), "label": 1}
    example = {key: values[key] for key in features}

    with tfds.core.registered.skip_registration():

        class Builder(tfds.core.GeneratorBasedBuilder):
            name = title
            VERSION = tfds.core.Version("1.2.3")

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                )

            def _split_generators(self, dl_manager):  # noqa: ARG002 - tfds's signature
                return {split: self._generate_examples() for split in splits}

            def _generate_examples(self):
                yield from ((number, example) for number in range(6))

    Builder(data_dir=folder, file_format="tfrecord").download_and_prepare()


@needs_packages
def test_digits_are_those_of_scikit_learn_each_once(digits_folder):
    from sklearn.datasets import load_digits

    found = load(DemoSettings(data_dir=digits_folder))
    assert found.name == "kerasmp_digits 1.0.0"
    assert found.spec.shape == (8, 8, 1)
    assert found.spec.brightest == 16.0
    assert [len(part[1]) for part in (found.train, found.test)] == [1437, 360]
    images = np.concatenate([found.train[0], found.test[0]]).reshape(-1, 64)
    labels = np.concatenate([found.train[1], found.test[1]])
    ours = sorted(zip(images.tolist(), labels.tolist(), strict=True))
    digits = load_digits()
    theirs = sorted(zip(digits.data.astype(int).tolist(), digits.target.tolist(), strict=True))
    assert ours == theirs


@needs_packages
def test_digits_are_split_in_equal_shares(digits_folder):
    found = load(DemoSettings(data_dir=digits_folder))
    train, test = (np.bincount(part[1]) for part in (found.train, found.test))
    np.testing.assert_allclose(test / (train + test), 0.2, atol=0.005)


@needs_packages
def test_digits_are_prepared_once(digits_folder):
    info = digits_folder / "kerasmp_digits" / "1.0.0" / "dataset_info.json"
    before = info.stat().st_mtime_ns
    load(DemoSettings(data_dir=digits_folder))
    assert info.stat().st_mtime_ns == before


@needs_packages
def test_a_limit_takes_the_first_of_each_part(digits_folder):
    everything = load(DemoSettings(data_dir=digits_folder))
    few = load(DemoSettings(data_dir=digits_folder, limit=9))
    assert (len(few.train[0]), len(few.test[0])) == (9, 9)
    np.testing.assert_array_equal(few.train[0], everything.train[0][:9])


@needs_packages
def test_any_prepared_data_set_in_tfrecord(tmp_path):
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(5, 4, 3)),
        "label": tfds.features.ClassLabel(num_classes=3),
    }
    write(tmp_path, "tiny", features, splits=("train", "validation"))
    found = load(DemoSettings(dataset="tiny", data_dir=tmp_path, limit=4))
    assert found.name == "tiny 1.2.3"
    assert found.spec.shape == (5, 4, 3)
    assert found.spec.classes == 3
    assert found.train[1].tolist() == [1] * 4


@needs_packages
def test_data_sets_that_hold_something_else(tmp_path):
    import tensorflow_datasets as tfds

    image = tfds.features.Image(shape=(5, 4, 3))
    label = tfds.features.ClassLabel(num_classes=3)
    sizes = {"image": tfds.features.Image(shape=(None, None, 3)), "label": label}
    cases = {
        "no_label": ({"image": image}, ("train", "test"), "with features image"),
        "any_size": (sizes, ("train", "test"), "with features image, label"),
        "no_test": ({"image": image, "label": label}, ("train",), "with splits train"),
    }
    for name, (features, splits, what) in cases.items():
        write(tmp_path, name, features, splits)
        with pytest.raises(DemoError, match=rf"cannot train on this data set.*{what}"):
            load(DemoSettings(dataset=name, data_dir=tmp_path))


@needs_packages
def test_a_data_set_with_missing_files_is_a_kerasmp_error(tmp_path):
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(5, 4, 3)),
        "label": tfds.features.ClassLabel(num_classes=3),
    }
    write(tmp_path, "tiny", features)
    for shard in (tmp_path / "tiny" / "1.2.3").glob("*tfrecord*"):
        shard.unlink()
    with pytest.raises(DatasetError, match=r"cannot be read.*'tiny'.*Prepare the data set again"):
        load(DemoSettings(dataset="tiny", data_dir=tmp_path))


@needs_packages
def test_digits_that_cannot_be_prepared(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OutputError, match=r"cannot be written.*--data-dir"):
        load(DemoSettings(data_dir=file))


@pytest.mark.unit
def test_a_missing_package_is_named_before_any_work(monkeypatch):
    monkeypatch.setitem(dataset._REQUIRED, "no_such_module", "no-such-package")
    monkeypatch.setattr(
        dataset.importlib.util,
        "find_spec",
        lambda name: None if name in {"sklearn", "no_such_module"} else object(),
    )
    with pytest.raises(MissingDependencyError) as caught:
        load(DemoSettings())
    assert "scikit-learn, no-such-package missing" in str(caught.value)
    assert 'pip install "kerasmp[demo]"' in str(caught.value)


@pytest.mark.unit
def test_tfrecord_without_tensorflow(monkeypatch):
    monkeypatch.setattr(dataset.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match="tfrecord format can only be read with"):
        dataset._require_tensorflow("tfrecord")


def fake(folder, *places):
    for place in places:
        (folder / place).mkdir(parents=True)
        (folder / place / "dataset_info.json").write_text(json.dumps({}))


@pytest.mark.unit
def test_the_newest_version_counts_unless_one_is_named(tmp_path):
    fake(tmp_path, "a/9.0.0", "a/10.0.0", "a/incomplete.X_11.0.0", "b/config/1.0.0")
    assert find(tmp_path, "a") == tmp_path / "a" / "10.0.0"
    assert find(tmp_path, "a:9.0.0") == tmp_path / "a" / "9.0.0"
    assert find(tmp_path, "b/config") == tmp_path / "b" / "config" / "1.0.0"


@pytest.mark.unit
@pytest.mark.parametrize("name", ["fasion", "fashion:9.9.9", "cifar", "", "b"])
def test_a_missing_data_set_is_an_error_that_lists_those_present(tmp_path, name):
    fake(tmp_path, "fashion/1.0.0", "b/config/1.0.0")
    with pytest.raises(DatasetError) as caught:
        find(tmp_path, name)
    message = str(caught.value)
    assert f"{name!r}, searched in {tmp_path}" in message
    assert "Expected: kerasmp_digits, b/config, fashion." in message
    if name == "fasion":
        assert message.endswith('Did you mean "fashion"?')


@pytest.mark.unit
def test_a_missing_folder_holds_no_data_set(tmp_path):
    assert prepared(tmp_path / "nowhere") == []
