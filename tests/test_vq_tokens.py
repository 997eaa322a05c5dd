"""Images through a tokenizer: the cache of tokens, what it is made of, and what is reported and refused."""

from __future__ import annotations

import errno
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dmmd_codecs.kmeans_patches import KMeansPatches
from dmmd_codecs.vq_autoencoder import VQAutoencoder
from dmmd_core import BadImageError, Draws, FieldError, ImageCodec, RunError
from dmmd_data import token_cache
from dmmd_data.image_folder import ImageFolder
from dmmd_data.picture_reader import PictureReader
from dmmd_data.shapes import Shapes
from dmmd_data.vq_tokens import VQTokens

SMALL: dict[str, Any] = {
    "codes": 300, "factor": 4, "height": 16, "width": 16, "base_channels": 8, "code_width": 4, "steps": 5,
    "batch_size": 8, "learning_rate": 3e-3,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty pictures of 20x16 pixels in four class folders."""
    source = Shapes(Shapes.Config(height=16, width=20, num_classes=4))
    for number in range(40):
        below = tmp_path / "pictures" / f"class{number % 4}"
        below.mkdir(parents=True, exist_ok=True)
        source.read("train", number).image.save(below / f"{number:02}.png")
    return tmp_path


def _tokenizer(**params: Any) -> VQAutoencoder:
    return VQAutoencoder(VQAutoencoder.Config(**{**SMALL, **params}))


def _data(folder: Path, tokenizer: ImageCodec | None = None, **params: Any) -> VQTokens:
    """The folder's pictures through a tokenizer, prepared."""
    config = VQTokens.Config(
        source=None,
        fit="crop",
        cache=str(folder / "cache"),
        workers=2,
        **params,  # type: ignore[arg-type]
    )
    source = ImageFolder(ImageFolder.Config(train=str(folder / "pictures"), num_classes=4, held_out=0.25))
    data = VQTokens(config, source=source, tokenizer=tokenizer or _tokenizer())
    data.prepare()
    return data


def _caches(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "cache").glob("vq-*") if path.is_dir())


def test_tokens_are_those_of_the_tokenizer_with_labels_and_real_images_beside_them(folder: Path) -> None:
    data = _data(folder)
    assert (data.spec.vocab_size, data.spec.length, data.spec.grid, data.spec.num_classes) == (300, 16, (4, 4), 4)
    assert data.size("train") + data.size("test") == 40
    for split in ("train", "test"):
        rows = range(data.source.size(split))
        pictures = [data.reader.read(split, row) for row in rows]
        images = torch.from_numpy(np.stack([pixels for pixels, _ in pictures]))
        batch = data.split(split)
        assert torch.equal(batch.tokens, data.codec.encode(images))
        assert batch.labels.tolist() == [label for _, label in pictures]
        assert torch.equal(data.originals(split), images)
        some = torch.tensor([3, 1])
        assert torch.equal(data.take_originals(split, some), images[some])
        assert torch.equal(data.take(split, some).tokens, batch.tokens[some])
    assert data._arrays["train_tokens"].dtype == np.uint16
    assert isinstance(data._arrays["train_tokens"], np.memmap)
    with pytest.raises(KeyError, match=r"no split 'valid'; there are \['test', 'train'\]"):
        data.take("valid", torch.tensor([0]))


def test_every_epoch_shows_every_image_once(folder: Path) -> None:
    data = _data(folder)
    size = data.size("train")
    epochs = [data.training_batch(Draws.for_range(3, 0, start, size)).tokens for start in (0, size)]
    rows = [sorted(map(tuple, epoch.tolist())) for epoch in epochs]
    assert rows[0] == rows[1] == sorted(map(tuple, data.split("train").tokens.tolist()))
    assert torch.equal(data.training_batch(Draws.for_range(3, 9, 2, 3)).tokens, epochs[0][2:5])


def test_reconstruction_and_codebook_use_are_measured(folder: Path) -> None:
    data = _data(folder)
    facts, test = data.facts(), data.originals("test")
    error = float((data.codec.decode(data.split("test").tokens).double() - test.double()).div(255).square().mean())
    assert facts["tokenizer_mse"] == pytest.approx(error, rel=1e-9)
    assert facts["tokenizer_psnr_db"] == pytest.approx(-10 * math.log10(error))
    assert facts["tokenizer_judged_images"] == len(test)
    uses = torch.bincount(data.split("train").tokens.flatten(), minlength=300).double()
    assert facts["codebook_used_share"] == pytest.approx(float((uses > 0).double().mean()))
    shares = (uses / uses.sum())[uses > 0]
    assert facts["codebook_perplexity"] == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())))
    few = _data(folder, _tokenizer(seed=1), judged=2)
    assert few.facts()["tokenizer_judged_images"] == 2


def test_a_second_run_reads_the_cache_and_tokenises_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _data(folder)
    monkeypatch.setattr(PictureReader, "chunks", lambda *_: pytest.fail("tokenised twice"))
    second = _data(folder)
    assert torch.equal(first.split("train").tokens, second.split("train").tokens)
    assert first.facts() == second.facts()
    assert len(_caches(folder)) == 1


def test_the_caches_key_is_tokenizer_source_and_reading(folder: Path) -> None:
    _data(folder)
    _data(folder, _tokenizer(seed=1))
    _data(folder, _tokenizer(codes=299))
    _data(folder, bad_images="skip")
    assert len(_caches(folder)) == 4
    Image.new("RGB", (20, 16)).save(folder / "pictures" / "class0" / "new.png")
    _data(folder)
    assert len(_caches(folder)) == 5
    _data(folder, judged=3)
    assert len(_caches(folder)) == 5, "how many images are judged makes no other tokens"


def test_a_cache_of_another_tokenizer_is_refused_by_name(folder: Path) -> None:
    _data(folder)
    (mine,) = _caches(folder)
    named = _data(folder, tokens=str(mine))
    assert torch.equal(named.split("train").tokens, _data(folder).split("train").tokens)
    words = (
        r"the token cache .* was made with tokenizer vq_autoencoder of 300 codes, 5 steps, seed 0 \(\w{16}\) instead "
        r"of vq_autoencoder of 300 codes, 5 steps, seed 1 \(\w{16}\); name the cache that fits"
    )
    with pytest.raises(RunError, match=words):
        _data(folder, _tokenizer(seed=1), tokens=str(mine))
    with pytest.raises(RunError, match=r"classes, size and reading .*refuse.* instead of .*skip"):
        _data(folder, bad_images="skip", tokens=str(mine))
    other = _data(folder, _tokenizer(seed=1))
    (theirs,) = set(_caches(folder)) - {mine}
    shutil.rmtree(mine)
    theirs.rename(mine)  # under the name of the first one's cache
    with pytest.raises(RunError, match="instead of vq_autoencoder of 300 codes, 5 steps, seed 0"):
        _data(folder)
    assert other.codec.title.endswith("seed 1")
    with pytest.raises(FieldError, match="no token cache"):
        VQTokens.check(VQTokens.Config(source=None, tokens=str(folder)))  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "labels", "facts", "manifest"])
def test_a_damaged_cache_is_made_again_and_one_that_was_named_is_refused(folder: Path, damage: str) -> None:
    expected = _data(folder).split("train")
    (path,) = _caches(folder)
    name = {"labels": "train_labels.bin", "facts": "facts.json", "manifest": "manifest.json"}.get(
        damage, "train_tokens.bin"
    )
    file = path / name
    content = file.read_bytes()
    if damage in ("missing", "manifest"):
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:-10])
    else:
        file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    from dmmd_core import CheckpointError

    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        _data(folder, tokens=str(path))
    again = _data(folder).split("train")
    assert torch.equal(again.tokens, expected.tokens)
    assert torch.equal(again.labels, expected.labels)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_cache_leaves_nothing_and_is_made_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    written = []
    append = token_cache.ArrayWriter.append

    def fail(writer: Any, name: str, rows: np.ndarray) -> None:
        written.append(name)
        if len(written) > 4:
            raise error
        append(writer, name, rows)

    with monkeypatch.context() as patched:
        patched.setattr(token_cache.ArrayWriter, "append", fail)
        with pytest.raises((RunError, KeyboardInterrupt), match=r"No space left on device\); free space, or set|^$"):
            _data(folder)
    assert not [path for path in (folder / "cache").iterdir() if "vq-" in path.name and path.is_dir()]
    assert list((folder / "cache").glob("vq_autoencoder-*/model.safetensors")), "the tokenizer is not lost"
    assert _data(folder).size("train") > 20


def test_bad_images_are_named_or_skipped_and_counted(folder: Path) -> None:
    whole = _data(folder)
    file = Path(whole.source.origin("train", 5))
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(BadImageError, match=f"data vq_tokens: {file} cannot be read as an image.*bad_images to skip"):
        _data(folder)
    data = _data(folder, bad_images="skip")
    assert (data.facts()["skipped_train_images"], data.facts()["skipped_test_images"]) == (1, 0)
    kept = torch.tensor([row for row in range(whole.size("train")) if row != 5])
    assert data.size("train") == len(kept)
    images = data.originals("train")
    assert torch.equal(images, whole.take_originals("train", kept)), "real images stay beside their tokens"
    assert torch.equal(data.split("train").tokens, data.codec.encode(images))
    with pytest.raises(BadImageError):
        whole.take_originals("train", torch.tensor([5]))


def test_other_codecs_tokenise_as_well_and_tokens_beyond_the_codebook_are_refused(folder: Path) -> None:
    for file in folder.rglob("*.png"):
        Image.open(file).convert("L").save(file)
    data = _data(folder, KMeansPatches(KMeansPatches.Config(codes=12, height=16, width=16, patch=4)))
    assert int(data.split("train").tokens.max()) == 11
    with pytest.raises(RunError, match=r"token 12 is beyond the codebook of KMeansPatches, which has the tokens 0..11"):
        data.codec.decode(torch.full((1, 16), 12))


def test_images_too_many_to_hold_are_refused_with_a_way_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _data(folder)
    monkeypatch.setattr("dmmd_data.picture_reader._WHOLE_BYTES", 1000)
    with pytest.raises(RunError, match=r"are not held at once; use metrics that read images in parts"):
        data.originals("train")
    assert data.take_originals("train", torch.tensor([0])).shape == (1, 3, 16, 16)


# ---- the command line ----------------------------------------------------------------------------------------------

RECIPE = """
schema: 1
name: tiny_vq
data:
  name: vq_tokens
  params:
    source: {name: image_folder, params: {train: FOLDER, num_classes: 4, held_out: 0.25}}
    tokenizer: {name: diffusers_vq, params: {path: MODEL, codes: 32, factor: 4, height: 16, width: 16}}
    fit: crop
    cache: CACHE
process: {name: masked}
backbone: {name: transformer, params: {width: 16, depth: 1, heads: 1, layout: grid, class_conditional: true}}
teacher: {objective: {name: denoising}, train: {steps: 2, batch_size: 4}}
generator: {name: noise_conditioned, params: {latent: pyramid, width: 2}}
objective: {name: moment_matching}
distill: {num_steps: 2, steps: 2, batch_size: 4}
sampler: {name: ancestral}
evaluate: {teacher_steps: [2], student_steps: [2], num_samples: 8, metrics: [{name: token_entropy}]}
run: {directory: RUN}
"""


def _recipe(folder: Path, **names: object) -> Path:
    content = RECIPE.replace("CACHE", str(folder / "cache")).replace("RUN", str(folder / "run"))
    for name, value in names.items():
        content = content.replace(name, str(value))
    (folder / "recipe.yaml").write_text(content)
    return folder / "recipe.yaml"


def _command(module: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = f"import sys; from dmmd_core.cli import {module}; sys.exit({module}())"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd, timeout=300, check=False
    )


def test_a_run_reports_the_tokenizer_before_it_trains_and_its_student_needs_neither_data_nor_model(
    folder: Path,
) -> None:
    from test_vq import _save_model

    _save_model(folder / "model")
    recipe = _recipe(folder, FOLDER=folder / "pictures", MODEL=folder / "model")
    done = _command("run_command", str(recipe), cwd=folder)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    told = [place for place, line in enumerate(lines) if line.startswith(("  tokenizer psnr db: ", "  codebook used"))]
    assert len(told) == 2
    assert max(told) < min(place for place, line in enumerate(lines) if line.startswith("teacher:"))
    facts = json.loads((folder / "run" / "metrics.json").read_text())["facts"]
    assert {"tokenizer_mse", "tokenizer_psnr_db", "codebook_used_share", "codebook_perplexity"} <= set(facts)
    assert "codebook perplexity" in (folder / "run" / "report.md").read_text()
    for gone in ("pictures", "model", "cache"):
        shutil.rmtree(folder / gone)
    sampled = _command("sample_command", str(folder / "run"), "--num", "3", "--out", str(folder / "out"), cwd=folder)
    assert sampled.returncode == 0, sampled.stderr
    assert len(list((folder / "out").glob("*.png"))) == 1


def test_what_is_missing_is_said_before_anything_is_written_and_smoke_needs_none_of_it(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, FOLDER=tmp_path / "nowhere", MODEL="nobody/nothing")
    done = _command("run_command", str(recipe), cwd=tmp_path)
    assert done.returncode == 2
    assert "data.params.source.params.train: there is no folder" in done.stderr
    assert "data.params.tokenizer.params.path: there is no folder 'nobody/nothing'" in done.stderr
    check = _command("run_command", str(recipe), "--check", cwd=tmp_path)
    assert check.returncode == 0, check.stderr
    assert "16 tokens of 32, grid 4 x 4, 4 classes" in check.stdout
    assert "nobody/nothing" in check.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]
    smoke = _command("run_command", str(recipe), "--smoke", cwd=tmp_path)
    assert smoke.returncode == 0, smoke.stderr
    content = (tmp_path / "run-smoke" / "recipe.yaml").read_text()
    assert "shapes" in content
    assert "vq_autoencoder" in content
