"""FID, precision and recall, and the networks they look through."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmmd_codecs.pixels import Pixels
from dmmd_core import Data, Draws, Features, FieldError, Metric, RunError, Slot, Subject, Value
from dmmd_data.image_pixels import ImagePixels
from dmmd_data.shapes import Shapes
from dmmd_metrics.classifier import SmallClassifier
from dmmd_metrics.feature_networks import Inception, NetworkFile
from dmmd_metrics.fid import Fid
from dmmd_metrics.frechet import frechet_distance
from dmmd_metrics.precision_recall import PrecisionRecall, neighbour_radii, share_inside
from dmmd_metrics.real_images import chosen_rows
from dmmd_processes.masked import Masked
from dmmd_processes.schedules import Linear

SIDE = 8


@pytest.fixture(scope="module")
def data() -> ImagePixels:
    """Generated pictures, 300 for training and 60 held out."""
    source = Shapes(Shapes.Config(height=SIDE, width=SIDE, train=300, test=60))
    codec = Pixels(Pixels.Config(levels=256, height=SIDE, width=SIDE, channels=3))
    found = ImagePixels(ImagePixels.Config(workers=1), source=source, codec=codec)
    found.prepare()
    return found


class Means(Features):
    """Means of the channels and of the left half, which anybody can check."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def features(self, media: Tensor) -> Tensor:
        """See `Features.features`."""
        self.calls.append(len(media))
        images = media.double() / 255
        return torch.cat((images.mean((2, 3)), images[..., : SIDE // 2].mean((1, 2, 3)).unsqueeze(1)), 1)

    @property
    def reference_name(self) -> str:
        """See `Features.reference_name`."""
        return "means"


def _subject(tokens: Tensor) -> Subject:
    process = Masked(Masked.Config(), vocab_size=4, schedule=Linear(Linear.Config()))
    return Subject("student", 4, tokens, None, None, None, process, Draws.for_range(0, 0, 0, 1))


def _values(metric: Metric, tokens: Tensor) -> dict[str, Value]:
    return {value.metric: value for value in metric.evaluate(_subject(tokens))}


def _fid(data: Data, features: Features | None = None, cache: Path | None = None, **params: Any) -> Fid:
    config = Fid.Config(**{"batch_size": 64, **params})
    return Fid(config, features=features or Means(), data=data, codec=data.codec, cache_directory=cache)


# ---- fid -----------------------------------------------------------------------------------------------------------


def test_fid_is_the_frechet_distance_of_features_in_any_batches(data: ImagePixels) -> None:
    tokens = data.split("test").tokens
    means = Means()
    expected = frechet_distance(means.features(data.originals("test")), means.features(data.originals("train")))
    for batch_size in (7, 64, 1000):
        metric = _fid(data, batch_size=batch_size)
        metric.prepare()
        value = _values(metric, tokens)["fid"]
        assert value.value == pytest.approx(expected, rel=1e-7)
        assert _values(metric, tokens)["fid"].value == value.value, "one subject leaves nothing for the next"
        assert (value.num_samples, value.lower_is_better) == (60, True)
        assert value.reference == "imagepixels/train (300 images), means"
    assert _values(metric, data.split("train").tokens)["fid"].value == pytest.approx(0, abs=1e-8)
    assert metric.evaluate(_subject(tokens[:1])) == []


def test_fid_looks_at_real_images_once_and_finds_their_sums_again(data: ImagePixels, tmp_path: Path) -> None:
    tokens = data.split("test").tokens
    values, calls = [], []
    for damaged in (False, False, True):
        if damaged:
            (file,) = tmp_path.glob("fid-*/sums.safetensors")
            file.write_bytes(file.read_bytes()[:-9])
        features = Means()
        metric = _fid(data, features, tmp_path)
        metric.prepare()
        calls.append(sum(features.calls))
        values.append(_values(metric, tokens)["fid"].value)
    assert values[0] == values[1] == values[2]
    assert calls == [364, 64, 364]  # the width is known from a first batch of 64
    other = _fid(data, cache=tmp_path, reference="test")
    other.prepare()
    assert _values(other, tokens)["fid"].value == pytest.approx(0, abs=1e-8)
    assert len(list(tmp_path.glob("fid-*"))) == 2


def test_some_real_images_are_always_the_same(data: ImagePixels) -> None:
    rows = chosen_rows(data, "train", 40)
    assert torch.equal(rows, chosen_rows(data, "train", 40))
    assert len(rows.unique()) == 40
    assert torch.equal(chosen_rows(data, "train", 0), torch.arange(300))
    assert torch.equal(chosen_rows(data, "train", 500), torch.arange(300))
    metric = _fid(data, reference_images=40)
    metric.prepare()
    value = _values(metric, data.split("test").tokens)["fid"]
    assert value.reference == "imagepixels/train (40 images), means"
    means = Means()
    expected = frechet_distance(means.features(data.originals("test")), means.features(data.originals("train")[rows]))
    assert value.value == pytest.approx(expected, rel=1e-7)


def test_fid_through_a_trained_classifier_ranks_real_pictures_before_others(data: ImagePixels) -> None:
    features = SmallClassifier(
        SmallClassifier.Config(steps=150, width=16), data=data, num_classes=8, cache_directory=None
    )
    metric = _fid(data, features)
    assert metric.prepare()["classifier_test_accuracy"] > 0.3  # chance has 0.125
    real, labels = data.split("test").tokens, data.split("test").labels
    noise = torch.randint(0, 256, real.shape, generator=torch.Generator().manual_seed(0))
    found = [_values(metric, tokens)["fid"] for tokens in (real, real[labels == 2], noise)]
    assert found[0].value < found[1].value / 2
    assert found[0].value < found[2].value / 2
    assert "small_classifier seed 0" in found[0].reference


def test_data_without_real_images_are_refused() -> None:
    class Tokens(Data):
        """Nothing but tokens."""

        def training_batch(self, draws: Draws) -> Any: ...

        def split(self, name: str) -> list[int]:
            return [1, 2, 3]

    data: Any = Tokens()
    data.codec = None
    with pytest.raises(RunError, match="Tokens keeps no real images to compare with"):
        _fid(data).prepare()


def test_smoke_needs_no_weights_from_elsewhere() -> None:
    for cls in (Fid, PrecisionRecall):
        assert cls.smoke(cls.Config()).features.name == "small_classifier"
        mine = cls.Config(features=Slot(name="small_classifier", params={"steps": 7}))
        assert cls.smoke(mine) == mine


# ---- precision and recall ------------------------------------------------------------------------------------------


def test_radii_and_shares_are_those_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    other = torch.randn(30, 3, generator=generator, dtype=torch.float64) * 0.7 + 0.5
    for neighbours in (1, 3):
        radii = neighbour_radii(real, neighbours)
        for row in range(40):
            distances = sorted(math.dist(real[row].tolist(), real[k].tolist()) for k in range(40) if k != row)
            assert float(radii[row]) == pytest.approx(distances[neighbours - 1], abs=1e-9)
        balls = list(zip(real.tolist(), radii.tolist(), strict=True))
        inside = [any(math.dist(point, center) <= radius for center, radius in balls) for point in other.tolist()]
        assert 0 < sum(inside) < 30
        assert share_inside(other, real, radii) == pytest.approx(sum(inside) / 30)


def test_radii_do_not_depend_on_how_rows_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = neighbour_radii(points, 2), share_inside(points + 0.3, points, neighbour_radii(points, 2))
    monkeypatch.setattr("dmmd_metrics.precision_recall._ROWS", 7)
    torch.testing.assert_close(neighbour_radii(points, 2), whole[0])
    assert share_inside(points + 0.3, points, whole[0]) == whole[1]


def test_copies_of_a_point_are_neighbours_of_each_other() -> None:
    points = torch.tensor([[0.0], [0.0], [1.0], [3.0]], dtype=torch.float64)
    assert neighbour_radii(points, 1).tolist() == [0, 0, 1, 2]


def test_precision_and_recall_tell_wrong_pictures_from_missing_ones(data: ImagePixels) -> None:
    config = PrecisionRecall.Config(reference_images=200, batch_size=64)
    metric = PrecisionRecall(config, features=Means(), data=data, codec=data.codec)
    metric.prepare()
    train = data.split("train").tokens
    new = data.split("test").tokens
    white = torch.randint(240, 256, (100, train.shape[1]), generator=torch.Generator().manual_seed(0))
    few = train[:1].repeat(20, 1)
    results = {}
    for name, tokens in {"new": new, "white": torch.cat((new, white)), "few": few, "train": train}.items():
        found = _values(metric, tokens)
        results[name] = (found["precision"].value, found["recall"].value)
        assert found["precision"].lower_is_better is False
        assert found["recall"].reference == "imagepixels/train (200 images), means, neighbour 3"
    assert results["train"][1] == 1, "every real image lies among samples that contain it"
    assert results["new"][0] > 0.8
    assert results["white"][0] == pytest.approx(results["new"][0] * 60 / 160), "none of the white ones is a picture"
    assert results["few"][0] == 1
    assert results["few"][1] < 0.1
    assert metric.evaluate(_subject(train[:3])) == []
    small = PrecisionRecall(PrecisionRecall.Config(reference_images=3), features=Means(), data=data, codec=data.codec)
    with pytest.raises(RunError, match="3 real images of split 'train' are too few for neighbour 3"):
        small.prepare()


# ---- networks ------------------------------------------------------------------------------------------------------


def test_inception_is_loaded_from_a_file_and_refused_where_it_is_not(
    data: ImagePixels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FieldError, match=r"no Inception weights at .*6726825d\.pth'.*set download to true"):
        Inception.check(Inception.Config())
    Inception.check(Inception.Config(download=True))
    with pytest.raises(FieldError, match=r"no Inception weights at 'nowhere.pth'"):
        Inception.check(Inception.Config(path="nowhere.pth", download=True))
    with monkeypatch.context() as patched:  # the library builds its network only around weights
        patched.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patched.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        weights = FeatureExtractorInceptionV3("inception-v3-compat", ["64"]).state_dict()
    file = tmp_path / "weights.pth"
    torch.save(weights, file)
    config = Inception.Config(path=str(file), layer="64", device="cpu", chunk=3)
    Inception.check(config)
    network = Inception(config)
    with pytest.raises(RuntimeError, match="call prepare"):
        network.features(data.originals("test"))
    assert network.prepare() == {}
    images = data.take_originals("test", torch.arange(7))
    features = network.features(images)
    assert (features.shape, features.dtype) == ((7, 64), torch.float64)
    torch.testing.assert_close(network.features(images[5:]), features[5:], rtol=1e-4, atol=1e-5)
    grey = images.float().mean(1, keepdim=True).byte()
    assert torch.equal(network.features(grey), network.features(grey.repeat(1, 3, 1, 1)))
    assert network.reference_name == "inception 64 of weights.pth"
    with pytest.raises(RunError, match="1 or 3 channels, got 2"):
        network.features(images[:, :2])
    file.write_bytes(b"no weights")
    with pytest.raises(RunError, match=r"features inception: .*weights.pth cannot be used"):
        Inception(config).prepare()


class Halves(nn.Module):
    """Mean of the upper and of the lower half of every channel."""

    def forward(self, images: Tensor) -> Tensor:
        """Map images to ``[n, channels, 2]``."""
        x = images.float()
        return torch.stack((x[:, :, :4].mean((2, 3)), x[:, :, 4:].mean((2, 3))), -1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same network as TorchScript and as an exported program."""
    import warnings

    folder = tmp_path_factory.mktemp("networks")
    example = torch.rand(2, 3, SIDE, SIDE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Halves()).save(folder / "halves.pt")
        program = torch.export.export(Halves(), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.export.save(program, folder / "halves.pt2")
    return {"script": folder / "halves.pt", "export": folder / "halves.pt2"}


@pytest.mark.parametrize("kind", ["script", "export"])
def test_a_network_from_a_file_gives_its_features(files: dict[str, Path], data: ImagePixels, kind: str) -> None:
    images = data.take_originals("test", torch.arange(11))
    for pixels, scale, shift in (("zero_one", 1 / 255, 0), ("minus_one_one", 2 / 255, -1)):
        config = NetworkFile.Config(path=str(files[kind]), pixels=pixels, chunk=4)
        NetworkFile.check(config)
        network = NetworkFile(config)
        network.prepare()
        expected = Halves()(images.double() * scale + shift).flatten(1).double()
        torch.testing.assert_close(network.features(images), expected, rtol=1e-5, atol=1e-5)
        assert network.reference_name.startswith(f"network_file {files[kind].name} ")
        assert len(network.reference_name.split()[-1]) == 8
    large = images.repeat_interleave(3, -1).repeat_interleave(3, -2)
    scaled = NetworkFile(NetworkFile.Config(path=str(files[kind]), side=SIDE))
    scaled.prepare()
    torch.testing.assert_close(scaled.features(large), Halves()(images / 255).flatten(1).double(), rtol=0.05, atol=0.02)


def test_networks_that_are_none_or_take_other_images_are_refused(
    files: dict[str, Path], data: ImagePixels, tmp_path: Path
) -> None:
    with pytest.raises(FieldError, match=r"no file 'nowhere\.pt'"):
        NetworkFile.check(NetworkFile.Config(path="nowhere.pt"))
    for name in ("broken.pt", "broken.pt2"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(RunError, match=rf"{name} cannot be loaded .*torch.export.save"):
            NetworkFile(NetworkFile.Config(path=str(tmp_path / name))).prepare()
    strict = NetworkFile(NetworkFile.Config(path=str(files["export"]), side=SIDE + 1))
    strict.prepare()
    with pytest.raises(RunError, match=r"does not take images \[11, 3, 9, 9\] of torch.float32 .*set pixels and side"):
        strict.features(data.take_originals("test", torch.arange(11)))


def test_grids_of_features_count_as_one_row_per_image(files: dict[str, Path], data: ImagePixels) -> None:
    network = NetworkFile(NetworkFile.Config(path=str(files["script"])))
    metric = _fid(data, network)
    metric.prepare()
    value = _values(metric, data.split("train").tokens)["fid"]
    assert value.value == pytest.approx(0, abs=1e-8)
    assert "network_file halves.pt" in value.reference
