"""Image data: sources, splits, sizes, flips, caches, and what is refused or skipped."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dmmd_codecs.kmeans_patches import KMeansPatches
from dmmd_codecs.pixels import Pixels
from dmmd_core import BadImageError, Draws, FieldError, ImageSource, RunError, hub_problem, show_progress
from dmmd_data.cifar10 import Cifar10
from dmmd_data.image_arrays import ImageArrays
from dmmd_data.image_dataset import ImageDataset
from dmmd_data.image_folder import ImageFolder
from dmmd_data.image_pixels import ImagePixels
from dmmd_data.picture_reader import PictureReader, ReadingConfig
from dmmd_data.shapes import CLASSES, Shapes

NAMES = ("ant", "bee", "cat")
SIDE = 6


def _pixels(number: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """A colorful picture of its own for every number, uint8 ``[height, width, 3]``."""
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _codec(channels: int = 3) -> Pixels:
    return Pixels(Pixels.Config(levels=256, height=SIDE, width=SIDE, channels=channels))


def _data(source: ImageSource, codec: Any = None, **params: Any) -> ImagePixels:
    data = ImagePixels(ImagePixels.Config(workers=2, **params), source=source, codec=codec or _codec())
    data.prepare()
    return data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty training and six test pictures in three class folders."""
    for split, count in (("train", 30), ("test", 6)):
        for number in range(count):
            below = tmp_path / split / NAMES[number % 3]
            below.mkdir(parents=True, exist_ok=True)
            Image.fromarray(_pixels(number)).save(below / f"{number:02}.png")
    (tmp_path / "train" / "ant" / "notes.txt").write_text("no picture")
    return tmp_path


def _folder(folder: Path, **params: Any) -> ImageFolder:
    given = {"train": str(folder / "train"), "test": str(folder / "test"), "num_classes": 3, **params}
    return ImageFolder(ImageFolder.Config(**given))


# ---- sources -------------------------------------------------------------------------------------------------------


def test_all_sources_give_the_same_pictures_and_labels(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    order = sorted(range(30), key=lambda number: (number % 3, number))
    images, labels = np.stack([_pixels(number) for number in order]), np.array([number % 3 for number in order])
    np.save(folder / "images.npy", images)
    np.save(folder / "first.npy", images.transpose(0, 3, 1, 2))
    np.save(folder / "labels.npy", labels)
    np.savez(folder / "both.npz", images=images, labels=labels)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(NAMES)))
    rows = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(image) for image in images], "label": labels.tolist()}, features=features
    )
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(folder / "saved")
    rows.to_parquet(folder / "rows.parquet")

    def arrays(file: str, labels: str | None) -> ImageArrays:
        given = {"train": str(folder / file), "test": str(folder / file), "num_classes": 3}
        extra = {} if labels is None else {f"{split}_labels": str(folder / labels) for split in ("train", "test")}
        return ImageArrays(ImageArrays.Config(**given, **extra))

    hub = {"num_classes": 3, "train_split": "train"}
    sources = {
        "folder": _folder(folder, test=str(folder / "train")),
        "npy": arrays("images.npy", "labels.npy"),
        "channels first": arrays("first.npy", "labels.npy"),
        "npz": arrays("both.npz", None),
        "saved": ImageDataset(ImageDataset.Config(dataset=str(folder / "saved"), test_split="test", **hub)),
        "parquet": ImageDataset(
            ImageDataset.Config(dataset="parquet", data_files=[str(folder / "rows.parquet")], test_split="train", **hub)
        ),
    }
    expected = torch.from_numpy(images).permute(0, 3, 1, 2)
    for name, source in sources.items():
        data = _data(source)
        for split in ("train", "test"):
            assert torch.equal(data.originals(split), expected), name
            assert data.split(split).labels.tolist() == labels.tolist(), name
        assert torch.equal(data.codec.decode(data.split("train").tokens), expected)
        assert data.spec.num_classes == 3
        assert (data.spec.vocab_size, data.spec.length, data.spec.grid) == (256, 108, (6, 6, 3))
    assert len({source.fingerprint() for source in sources.values()}) == len(sources)


def test_cifar10_is_read_as_torchvision_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    below = tmp_path / "cifar-10-batches-py"
    below.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)

    def write(name: str, content: dict[str, Any]) -> list[str]:
        raw = pickle.dumps(content)
        (below / name).write_bytes(raw)
        return [name, hashlib.md5(raw).hexdigest()]

    flat = images.transpose(0, 3, 1, 2).reshape(30, -1)
    lists = [write(f"part{k}", {"data": flat[10 * k : 10 * k + 10], "labels": list(range(10))}) for k in range(3)]
    name, digest = write("meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(CIFAR10, "train_list", lists[:2])
    monkeypatch.setattr(CIFAR10, "test_list", lists[2:])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": digest})
    config = Cifar10.Config(folder=str(tmp_path))
    Cifar10.check(config)
    codec = Pixels(Pixels.Config(levels=256, height=32, width=32, channels=3))
    data = _data(Cifar10(config), codec)
    assert (data.size("train"), data.size("test"), data.spec.length) == (20, 10, 3072)
    assert torch.equal(data.originals("test"), torch.from_numpy(images[20:]).permute(0, 3, 1, 2))
    assert data.split("train").labels.tolist() == [*range(10), *range(10)]
    (below / "part0").write_bytes(b"damaged")
    with pytest.raises(RunError, match=r"cifar10: .* cannot be used .*corrupted"):
        _data(Cifar10(config), codec)
    with pytest.raises(FieldError, match=r"no cifar-10-batches-py in .*set download to true"):
        Cifar10.check(Cifar10.Config(folder=str(tmp_path / "nowhere")))
    Cifar10.check(Cifar10.Config(folder=str(tmp_path / "nowhere"), download=True))


def test_generated_pictures_are_the_same_for_a_seed_and_differ_between_classes() -> None:
    source = Shapes(Shapes.Config(height=16, width=12))
    pictures = [source.read("train", index) for index in range(40)]
    assert [picture.label for picture in pictures] == [index % len(CLASSES) for index in range(40)]
    assert pictures[0].image.size == (12, 16)
    raw = [picture.image.tobytes() for picture in pictures]
    assert raw == [source.read("train", index).image.tobytes() for index in range(40)]
    assert len(set(raw)) == 40
    assert source.read("test", 0).image.tobytes() != raw[0]
    assert Shapes(Shapes.Config(height=16, width=12, seed=1)).read("train", 0).image.tobytes() != raw[0]
    grey = Shapes(Shapes.Config(channels=1)).read("train", 3).image
    assert (grey.mode, grey.size) == ("L", (32, 32))
    assert np.asarray(grey).std() > 10


def test_images_held_out_stay_so_when_others_come(folder: Path) -> None:
    before = _folder(folder, test=None, held_out=0.3)
    before.prepare()
    held = {before.origin("test", index) for index in range(before.size("test"))}
    assert 3 <= len(held) <= 15
    assert before.size("train") + before.size("test") == 30
    for number in range(100, 130):
        Image.fromarray(_pixels(number)).save(folder / "train" / "bee" / f"{number}.png")
    after = _folder(folder, test=None, held_out=0.3)
    after.prepare()
    now = {after.origin("test", index) for index in range(after.size("test"))}
    assert {name for name in now if int(Path(name).stem) < 100} == held
    assert len(now) > len(held)
    assert after.fingerprint() != before.fingerprint()
    with pytest.raises(RunError, match=r"of the 60 pictures in .* none is left for split 'test' .* another held_out"):
        _folder(folder, test=None, held_out=1e-9).prepare()


def test_folders_without_classes_and_with_wrong_ones(folder: Path) -> None:
    plain = _data(_folder(folder, num_classes=None))
    assert plain.spec.num_classes is None
    assert plain.split("test").labels is None
    assert "labels" not in ImageFolder.provides(plain.source.config)
    with pytest.raises(RunError, match=r"3 class folders \(ant, bee, cat\), but num_classes is 2; set num_classes to"):
        _folder(folder, num_classes=2).prepare()
    (folder / "test" / "dog").mkdir()
    Image.fromarray(_pixels(0)).save(folder / "test" / "dog" / "x.png")
    with pytest.raises(RunError, match=r"dog/x.png is of class 'dog', which .*train does not have"):
        _folder(folder).prepare()
    Image.fromarray(_pixels(0)).save(folder / "train" / "loose.png")
    with pytest.raises(RunError, match=r"loose.png lies in no class folder"):
        _folder(folder).prepare()
    (folder / "empty").mkdir()
    with pytest.raises(RunError, match=r"no image .* below .*empty"):
        _folder(folder, train=str(folder / "empty")).prepare()
    with pytest.raises(FieldError, match=r"no folder '.*nowhere'; set train to what holds one subfolder per class"):
        ImageFolder.check(ImageFolder.Config(train=str(folder / "nowhere"), num_classes=3))
    with pytest.raises(FieldError, match=r"no folder '.*nowhere' and no folder '.*gone'; set train and test to what"):
        ImageFolder.check(ImageFolder.Config(train=str(folder / "nowhere"), test=str(folder / "gone")))


def test_data_sets_that_do_not_fit_are_refused_and_say_what_there_is(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"picture": [Image.fromarray(_pixels(0))] * 8, "text": ["a"] * 8, "n": [1] * 8})
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "saved")

    def source(**params: Any) -> ImageDataset:
        return ImageDataset(ImageDataset.Config(dataset=str(tmp_path / "saved"), **params))

    with pytest.raises(RunError, match=r"no column 'image'; it has n, picture, text; set image"):
        source().prepare()
    with pytest.raises(RunError, match=r"column 'n' .* holds Value and no images"):
        source(image="n").prepare()
    paths = source(image="text", held_out=0.4)
    paths.prepare()
    with pytest.raises(BadImageError, match=r"row \d of split 'train' .* cannot be read as an image"):
        paths.read("train", 0)  # text is taken for the path of an image
    with pytest.raises(RunError, match=r"no column 'label'; .*set label"):
        source(image="picture", num_classes=2).prepare()
    with pytest.raises(RunError, match="no split 'validation', it has 'train'"):
        source(image="picture", test_split="validation").prepare()
    found = source(image="picture", label="text", num_classes=2, held_out=0.4)
    found.prepare()
    with pytest.raises(BadImageError, match=r"row \d of split 'train' .* has the label 'a'"):
        found.read("train", 0)
    with pytest.raises(FieldError, match=r"no folder 'nobody/nothing'.*give a folder, or a loader"):
        ImageDataset.check(ImageDataset.Config(dataset="nobody/nothing"))
    with pytest.raises(FieldError, match=r"no file 'nowhere\.parquet'"):
        ImageDataset.check(ImageDataset.Config(dataset="parquet", data_files=["nowhere.parquet"]))


def test_arrays_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    def source(images: np.ndarray, labels: np.ndarray | None = None, **params: Any) -> ImageArrays:
        np.save(tmp_path / "images.npy", images)
        given: dict[str, Any] = {"train": str(tmp_path / "images.npy"), "held_out": 0.3, **params}
        if labels is not None:
            np.save(tmp_path / "labels.npy", labels)
            given |= {"train_labels": str(tmp_path / "labels.npy"), "num_classes": 3}
        return ImageArrays(ImageArrays.Config(**given))

    good = np.zeros((20, 6, 6, 3), np.uint8)
    for images, words in (
        (good.astype(np.float32), "float32 of shape .*must be uint8"),
        (good[0, 0], "uint8 of shape .*must be uint8"),
        (np.zeros((20, 3, 6, 3), np.uint8), "does not tell where its channels"),
        (np.zeros((20, 6, 6, 6), np.uint8), "does not tell where its channels"),
    ):
        with pytest.raises(RunError, match=words):
            source(images).prepare()
    with pytest.raises(RunError, match="have 6 channels in layout channels_first"):
        source(good, layout="channels_first").prepare()
    source(np.zeros((20, 3, 6, 3), np.uint8), layout="channels_first").prepare()
    grey = source(np.zeros((20, 6, 6), np.uint8))
    grey.prepare()
    assert grey.read("train", 0).image.mode == "L"
    for labels in (np.zeros(19, np.int64), np.zeros(20), np.zeros((20, 1), np.int64)):
        with pytest.raises(RunError, match=r"for the 20 images of .*must be whole numbers of shape \[20\]"):
            source(good, labels).prepare()
    np.savez(tmp_path / "some.npz", pictures=good)
    with pytest.raises(RunError, match="has no array 'images'; it has pictures"):
        ImageArrays(ImageArrays.Config(train=str(tmp_path / "some.npz"))).prepare()
    for name in ("broken.npz", "broken.npy"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 and no more")
        with pytest.raises(RunError, match=rf"{name} cannot be read as NumPy's arrays"):
            ImageArrays(ImageArrays.Config(train=str(tmp_path / name))).prepare()
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(RunError, match="cannot be read as NumPy's arrays"):
        ImageArrays(ImageArrays.Config(train=str(tmp_path / "objects.npy"))).prepare()
    for params in (
        {"train": "images.txt"},
        {"train": "a.npy", "num_classes": 3},
        {"train": "a.npy", "train_labels": "b.npy"},
        {"train": "a.npz", "test_labels": "b.npy", "num_classes": 3},
    ):
        with pytest.raises(FieldError):
            ImageArrays.Config(**params)  # type: ignore[arg-type]
    with pytest.raises(FieldError, match=r"no file 'nowhere\.npy'"):
        ImageArrays.check(ImageArrays.Config(train="nowhere.npy"))


def test_a_hub_that_is_out_of_reach_is_said_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "HF_HUB_OFFLINE forbids" in str(hub_problem("nobody/nothing", "config.json"))
    assert "no name on the hub" in str(hub_problem("a/b/c", "config.json"))
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "file_exists", lambda *_, **__: False)
    assert "no model of this name with a file config.json" in str(hub_problem("nobody/nothing", "config.json"))
    monkeypatch.setattr(HfApi, "file_exists", lambda *_, **__: True)
    assert hub_problem("nobody/nothing", "config.json") is None
    monkeypatch.setattr(HfApi, "repo_exists", lambda *_, **__: (_ for _ in ()).throw(OSError("no route")))
    assert "cannot be reached (OSError: no route)" in str(hub_problem("nobody/nothing", kind="dataset"))


# ---- size, mode, flips ---------------------------------------------------------------------------------------------


def _one(image: Image.Image, **config: Any) -> np.ndarray:
    channels = config.pop("channels", 3)
    reader = PictureReader(Shapes(Shapes.Config()), _codec(channels), ReadingConfig(**config), "data test")
    return reader._pixels(image)


def test_cropping_keeps_the_centre_and_stretching_keeps_everything() -> None:
    wide = np.zeros((SIDE, 3 * SIDE, 3), np.uint8)
    wide[:, SIDE : 2 * SIDE] = _pixels(0)
    centre = _one(Image.fromarray(wide), fit="crop")
    assert np.array_equal(centre, _pixels(0).transpose(2, 0, 1)), "the middle third needs no scaling"
    tall = _one(Image.fromarray(wide.transpose(1, 0, 2)), fit="crop")
    assert np.array_equal(tall, _pixels(0).transpose(2, 1, 0))
    large = np.repeat(np.repeat(np.full((SIDE, SIDE, 3), 7, np.uint8), 4, 0), 4, 1)
    assert (_one(Image.fromarray(large), fit="crop") == 7).all()
    halves = np.zeros((4, 40, 3), np.uint8)
    halves[:, 20:] = 200
    stretched = _one(Image.fromarray(halves), fit="stretch")
    assert (stretched[:, :, :2] <= 5).all()
    assert (abs(stretched[:, :, -2:].astype(int) - 200) <= 5).all(), "a bicubic kernel overshoots a little"


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16"])
def test_other_modes_are_refused_unless_converted(mode: str) -> None:
    grey = Image.fromarray(_pixels(0)[..., 0])
    image = Image.fromarray(np.asarray(grey).astype(np.uint16)) if mode == "I;16" else grey.convert(mode)
    with pytest.raises(ValueError, match=rf"channels \(mode {mode}\) where 3 \(mode RGB\) are wanted; set convert"):
        _one(image)
    converted = _one(image, convert=True)
    assert converted.shape == (3, SIDE, SIDE)
    if mode in ("L", "RGBA"):
        assert (converted == np.asarray(grey)).all()


def test_flips_mirror_about_half_the_visits_and_depend_on_the_sample_alone(folder: Path) -> None:
    plain, flipped = _data(_folder(folder)), _data(_folder(folder), flips=True)
    size = plain.size("train")
    count = mirrored = 0
    for step in range(20):
        draws = Draws.for_range(5, step, step * size, size)
        before, after = (data.training_batch(draws) for data in (plain, flipped))
        assert torch.equal(before.labels, after.labels)
        images, seen = (plain.codec.decode(batch.tokens) for batch in (before, after))
        same = (images == seen).flatten(1).all(1)
        assert torch.equal(seen[~same], images[~same].flip(-1))
        count, mirrored = count + size, mirrored + int((~same).sum())
        part = flipped.training_batch(Draws.for_range(5, step, step * size + 3, 4))
        assert torch.equal(part.tokens, after.tokens[3:7])
    assert abs(mirrored - count / 2) < 5 * (count / 4) ** 0.5
    assert torch.equal(plain.originals("train"), flipped.originals("train")), "the reference is never mirrored"


def test_every_epoch_shows_every_image_once(folder: Path) -> None:
    data = _data(_folder(folder))
    epochs = [data.training_batch(Draws.for_range(0, step, 30 * step, 30)) for step in range(2)]
    rows = [sorted(map(tuple, epoch.tokens.tolist())) for epoch in epochs]
    assert rows[0] == rows[1] == sorted(map(tuple, data.split("train").tokens.tolist()))
    assert not torch.equal(epochs[0].tokens, epochs[1].tokens)
    with pytest.raises(KeyError, match=r"no split 'valid'; there are \['test', 'train'\]"):
        data.size("valid")


def test_another_codec_is_fitted_to_the_images(folder: Path) -> None:
    for file in folder.rglob("*.png"):
        Image.open(file).convert("L").save(file)
    codec = KMeansPatches(KMeansPatches.Config(codes=12, height=SIDE, width=SIDE))
    data = _data(_folder(folder), codec)
    assert data.spec.vocab_size == 12
    assert int(data.split("train").tokens.max()) == 11
    assert data.codec.decode(data.split("test").tokens).shape == (6, 1, SIDE, SIDE)


# ---- the cache of pixels -------------------------------------------------------------------------------------------


def test_pixels_on_disk_are_those_in_memory_and_are_read_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = _data(_folder(folder))
    disk = _data(_folder(folder), storage="disk", cache=str(tmp_path / "cache"))
    monkeypatch.setattr(PictureReader, "chunks", lambda *_: pytest.fail("read twice"))
    again = _data(_folder(folder), storage="disk", cache=str(tmp_path / "cache"), flips=True)
    for data in (disk, again):
        for split in ("train", "test"):
            assert torch.equal(data.originals(split), memory.originals(split))
            assert torch.equal(data.split(split).labels, memory.split(split).labels)
    assert isinstance(disk._images["train"], np.memmap)
    draws = Draws.for_range(0, 0, 0, 8)
    assert torch.equal(disk.training_batch(draws).tokens, memory.training_batch(draws).tokens)


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "facts"])
def test_damaged_pixels_are_read_again(folder: Path, tmp_path: Path, damage: str) -> None:
    params = {"storage": "disk", "cache": str(tmp_path / "cache")}
    expected = _data(_folder(folder), **params).originals("train").clone()
    (path,) = (tmp_path / "cache").glob("images-*[0-9a-f]")
    file = path / "train_images.bin"
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[:-10])
    elif damage == "flip":
        file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif damage == "missing":
        file.unlink()
    else:
        (path / "facts.json").write_text("{")
    assert torch.equal(_data(_folder(folder), **params).originals("train"), expected)


# ---- what cannot be used -------------------------------------------------------------------------------------------


def _spoil(folder: Path, fault: str) -> tuple[str, str]:
    """Spoil one training picture; returns its name and what the error must say."""
    file = folder / "train" / "bee" / "04.png"
    if fault == "text":
        file.write_text("this is no picture")
        return str(file), "cannot be read as an image"
    if fault == "cut":
        file.write_bytes(file.read_bytes()[:-40])
        return str(file), "cannot be read as an image"
    if fault == "empty":
        file.write_bytes(b"")
        return str(file), "cannot be read as an image"
    if fault == "size":
        Image.fromarray(_pixels(4, SIDE, SIDE + 3)).save(file)
        return str(file), "has 9x6 pixels where 6x6 are wanted; set fit to crop or stretch"
    Image.fromarray(_pixels(4)[..., 0]).save(file)
    return str(file), r"has 1 channels \(mode L\) where 3 \(mode RGB\) are wanted; set convert"


@pytest.mark.parametrize("fault", ["text", "cut", "empty", "size", "channels"])
@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_a_bad_image_is_named_or_skipped_and_counted(folder: Path, tmp_path: Path, fault: str, storage: str) -> None:
    whole = _data(_folder(folder))
    file, words = _spoil(folder, fault)
    params = {"storage": storage, "cache": str(tmp_path / "cache")}
    with pytest.raises(BadImageError, match=f"data image_pixels: {file} {words}.*set bad_images to skip"):
        _data(_folder(folder), **params)
    assert not list((tmp_path / "cache").glob("*/")), "nothing half made is left"
    data = _data(_folder(folder), bad_images="skip", **params)
    assert data.facts() == {"skipped_train_images": 1, "skipped_test_images": 0}
    assert data.size("train") == 29
    kept = [row for row in range(30) if not torch.equal(whole.originals("train")[row], _image(4))]
    assert torch.equal(data.originals("train"), whole.originals("train")[kept])
    assert torch.equal(data.split("train").labels, whole.split("train").labels[kept])
    if storage == "disk":
        assert _data(_folder(folder), bad_images="skip", **params).facts()["skipped_train_images"] == 1


def _image(number: int) -> torch.Tensor:
    return torch.from_numpy(_pixels(number)).permute(2, 0, 1)


def test_labels_out_of_range_are_named_or_skipped(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.stack([_pixels(number) for number in range(20)]))
    np.save(tmp_path / "labels.npy", np.array([*[0, 1, 2] * 6, 3, -1]))
    files = {"train": str(tmp_path / "images.npy"), "train_labels": str(tmp_path / "labels.npy")}
    source = ImageArrays(ImageArrays.Config(**files, test=files["train"], test_labels=files["train_labels"],
                                            num_classes=3))  # fmt: skip
    with pytest.raises(BadImageError, match=r"image 18 of .*images.npy has label 3, outside 0..2"):
        _data(source)
    assert _data(source, bad_images="skip").facts() == {"skipped_train_images": 2, "skipped_test_images": 2}


def test_a_source_with_nothing_that_can_be_used_is_refused(folder: Path) -> None:
    with pytest.raises(RunError, match=r"none of the 30 images of split 'train' can be used; all were skipped"):
        _data(_folder(folder), Pixels(Pixels.Config(height=9, width=9, channels=3)), bad_images="skip")
    with pytest.raises(FieldError, match="1, 3 or 4 channels"):
        _data(_folder(folder), _codec(2))


def test_a_damaged_row_of_a_data_set_is_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    good = (tmp_path / "x.png", tmp_path / "y.png")
    for file in good:
        Image.fromarray(_pixels(1)).save(file)
    raw = [{"bytes": good[0].read_bytes(), "path": None}] * 9
    raw[5] = {"bytes": b"nothing", "path": None}
    rows = datasets.Dataset.from_dict({"image": raw}, features=datasets.Features(image=datasets.Image()))
    datasets.DatasetDict(train=rows, test=rows.select(range(3))).save_to_disk(tmp_path / "saved")
    source = ImageDataset(ImageDataset.Config(dataset=str(tmp_path / "saved"), test_split="test"))
    with pytest.raises(BadImageError, match=r"row 5 of split 'train' of .*saved' cannot be read as an image"):
        _data(source)
    assert _data(source, bad_images="skip").size("train") == 8


def test_progress_tells_rate_and_eta_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("dmmd_core.progress.time.monotonic", lambda: now[0])
    for _ in show_progress(range(10), "reading train", total=1000, unit="images", per_item=100):
        now[0] += 10
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "reading train: 200/1000  10.0 images/s  ETA 1:20"
    assert len(lines) == 5


# ---- the command line ----------------------------------------------------------------------------------------------

RECIPE = """
schema: 1
name: tiny_images
data:
  name: image_pixels
  params:
    source: {name: image_folder, params: {train: FOLDER, num_classes: 3, held_out: 0.3}}
    codec: {name: pixels, params: {levels: 256, height: 6, width: 6, channels: 3}}
    flips: true
    bad_images: skip
process: {name: masked}
backbone: {name: transformer, params: {width: 16, depth: 1, heads: 1, layout: grid, positions: learned}}
teacher: {objective: {name: denoising}, train: {steps: 2, batch_size: 4}}
generator: {name: noise_conditioned, params: {latent: pyramid, width: 2}}
objective: {name: moment_matching}
distill: {num_steps: 2, steps: 2, batch_size: 4}
sampler: {name: ancestral}
evaluate: {teacher_steps: [2], student_steps: [2], num_samples: 8, metrics: [{name: token_entropy}]}
run: {directory: RUN}
"""


def _command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dmmd_core", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300, check=False)


def test_a_run_on_a_folder_counts_what_it_skipped(folder: Path) -> None:
    _spoil(folder, "cut")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.replace("FOLDER", str(folder / "train")).replace("RUN", str(folder / "run")))
    done = _command(str(recipe), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert re.search("skipped (train|test) images: 1", done.stderr)
    facts = json.loads((folder / "run" / "metrics.json").read_text())["facts"]
    assert facts["skipped_train_images"] + facts["skipped_test_images"] == 1
    assert re.search("skipped (train|test) images: 1", (folder / "run" / "report.md").read_text())


def test_check_and_smoke_need_no_images_and_the_run_refuses_before_it_writes(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("FOLDER", str(tmp_path / "nowhere")).replace("RUN", str(tmp_path / "run")))
    done = _command(str(recipe), "--check", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "108 tokens of 256" in done.stdout
    assert "data.params.source.params.train: there is no folder" in done.stdout
    done = _command(str(recipe), cwd=tmp_path)
    assert done.returncode == 2
    assert "data.params.source.params.train: there is no folder" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]
    done = _command(str(recipe), "--smoke", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    content = (tmp_path / "run-smoke" / "recipe.yaml").read_text()
    assert "shapes" in content
