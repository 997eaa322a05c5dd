"""Image tokenizers with a codebook: loaded ones, and those trained here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from dmmd_codecs.autoencoder import Autoencoder, CodebookAverages
from dmmd_codecs.diffusers_vq import DiffusersVQ
from dmmd_codecs.vq_autoencoder import VQAutoencoder
from dmmd_core import FieldError, RunError
from dmmd_core.errors import CheckpointError
from dmmd_data.picture_reader import PictureReader, ReadingConfig
from dmmd_data.shapes import Shapes

SMALL: dict[str, Any] = {
    "codes": 16, "factor": 4, "height": 16, "width": 16, "base_channels": 8, "code_width": 4, "steps": 12,
    "batch_size": 8, "learning_rate": 3e-3, "checkpoint_every": 4,
}  # fmt: skip


def _small(**params: Any) -> VQAutoencoder:
    return VQAutoencoder(VQAutoencoder.Config(**{**SMALL, **params}))


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Sixty-four generated pictures, uint8 ``[64, 3, 16, 16]``."""
    source = Shapes(Shapes.Config(height=16, width=16, train=64))
    return PictureReader(source, _small(), ReadingConfig(workers=1), "test").all("train", torch.arange(64))


def _noisy(images: Tensor) -> Tensor:
    return torch.randint(0, 256, images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# ---- diffusers -----------------------------------------------------------------------------------------------------


def _save_model(folder: Path, **params: Any) -> Any:
    from diffusers import VQModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VQModel(
            **{
                "block_out_channels": (8, 8, 8), "down_block_types": ("DownEncoderBlock2D",) * 3,
                "up_block_types": ("UpDecoderBlock2D",) * 3, "latent_channels": 4, "num_vq_embeddings": 32,
                "norm_num_groups": 4, "mid_block_add_attention": False, **params,
            }
        )  # fmt: skip
        torch.nn.init.normal_(model.quantize.embedding.weight)
        torch.nn.init.normal_(model.quant_conv.weight, std=3.0)
    model.eval().save_pretrained(folder)
    return model


def _loaded(folder: Path, **params: Any) -> DiffusersVQ:
    sizes = {"codes": 32, "factor": 4, "height": 16, "width": 16, "chunk": 24}
    return DiffusersVQ(DiffusersVQ.Config(path=str(folder), **{**sizes, **params}))


@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize("pixel_range", ["zero_one", "minus_one_one"])
def test_a_model_of_diffusers_gives_its_own_tokens_and_pictures(
    tmp_path: Path, images: Tensor, lookup: bool, pixel_range: str
) -> None:
    model = _save_model(tmp_path, lookup_from_codebook=lookup, vq_embed_dim=3)
    codec = _loaded(tmp_path, pixel_range=pixel_range)
    codec.check(codec.config)
    assert (codec.vocab_size, codec.grid, codec.length) == (32, (4, 4), 16)
    codec.fit(images)
    tokens = codec.encode(images)
    scaled = images.float() / 255 if pixel_range == "zero_one" else images.float() / 127.5 - 1
    with torch.no_grad():
        latents = model.encode(scaled).latents
        _, _, (_, _, indices) = model.quantize(latents)
        # The model's own way from latents to pictures quantises by itself.
        expected = model.decode(latents).sample
    assert torch.equal(tokens, indices.reshape(64, 16))
    assert len(tokens.unique()) > 4
    nearest = torch.cdist(latents.permute(0, 2, 3, 1).reshape(-1, 3), model.quantize.embedding.weight).argmin(-1)
    assert torch.equal(tokens.flatten(), nearest)
    expected = expected if pixel_range == "zero_one" else (expected + 1) / 2
    decoded = codec.decode(tokens)
    assert decoded.dtype == torch.uint8
    assert decoded.shape == images.shape
    assert int((decoded.int() - (expected * 255).round().clamp(0, 255).int()).abs().max()) <= 1


def test_a_loaded_tokenizer_is_kept_beside_the_models(tmp_path: Path, images: Tensor) -> None:
    _save_model(tmp_path / "model" / "vqvae")
    codec = _loaded(tmp_path / "model", subfolder="vqvae")
    codec.check(codec.config)
    with pytest.raises(RunError, match="not loaded yet"):
        codec.encode(images)
    codec.fit(images)
    tokens, state = codec.encode(images), {name: tensor.clone() for name, tensor in codec.state().items()}
    other = _loaded(tmp_path / "gone")
    other.load_state(state)
    assert torch.equal(other.encode(images), tokens)
    assert torch.equal(other.decode(tokens), codec.decode(tokens))
    assert other.fingerprint() == codec.fingerprint()
    state["quantize.embedding.weight"][0, 0] += 1
    other.load_state(state)
    assert other.fingerprint() != codec.fingerprint()


def test_tokenizers_that_are_not_there_or_do_not_fit_are_refused(tmp_path: Path, images: Tensor) -> None:
    _save_model(tmp_path / "model")
    for params, words in (
        ({"codes": 64}, "codes is 64 and must be 32"),
        ({"factor": 8}, "factor is 8 and must be 4"),
        ({"channels": 1}, "channels is 1 and must be 3"),
    ):
        with pytest.raises(RunError, match=f"other sizes than the parameters say: {words}"):
            _loaded(tmp_path / "model", **params).fit(images)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FieldError, match=r"no config.json in .*empty"):
        DiffusersVQ.check(DiffusersVQ.Config(path=str(tmp_path / "empty")))
    with pytest.raises(RunError, match=r"diffusers_vq .*empty cannot be loaded"):
        _loaded(tmp_path / "empty").fit(images)
    with pytest.raises(FieldError, match=r"no folder 'amused/amused-256'.*or train a tokenizer here"):
        DiffusersVQ.check(DiffusersVQ.Config(subfolder="vqvae"))
    with pytest.raises(FieldError, match=r"'cuda:77' is not there"):
        DiffusersVQ.check(DiffusersVQ.Config(path=str(tmp_path / "model"), device="cuda:77"))
    with pytest.raises(FieldError, match="must divide 16 and 20"):
        DiffusersVQ.Config(height=16, width=20, factor=16)


def test_tokens_beyond_the_codebook_and_pictures_of_another_size_are_refused(tmp_path: Path, images: Tensor) -> None:
    _save_model(tmp_path)
    loaded, trained = _loaded(tmp_path), _small(steps=1)
    for codec in (loaded, trained):
        codec.fit(images)
        tokens = codec.encode(images[:2])
        for wrong in (codec.vocab_size, -1):
            tokens[1, 3] = wrong
            with pytest.raises(RunError, match=rf"token {wrong} is beyond the codebook of .*0..{codec.vocab_size - 1}"):
                codec.decode(tokens)
        with pytest.raises(RunError, match=r"takes images of \(3, 16, 16\), got \(1, 16, 16\)"):
            codec.encode(images[:, :1])
        assert codec.encode(images[:0]).shape == (0, 16)
        assert codec.decode(tokens[:0]).shape == (0, 3, 16, 16)


# ---- the codebook --------------------------------------------------------------------------------------------------


def test_codes_follow_the_means_of_their_vectors() -> None:
    codes = torch.tensor([[0.0], [10.0], [99.0]])
    averages = CodebookAverages(codes, decay=0.5, restart_below=0.1)
    averages.start(codes.clone())
    averages.update(torch.tensor([[2.0], [4.0], [10.0]]), torch.tensor([0, 0, 1]))
    # Counts (1 + 2) / 2, (1 + 1) / 2, 1 / 2; sums (0 + 6) / 2, (10 + 10) / 2, 99 / 2.
    assert averages.counts.tolist() == [1.5, 1.0, 0.5]
    assert codes.flatten().tolist() == [2.0, 10.0, 99.0]
    for _ in range(6):
        averages.update(torch.tensor([[2.0], [4.0], [10.0]]), torch.tensor([0, 0, 1]))
    torch.testing.assert_close(codes.flatten(), torch.tensor([3.0, 10.0, 99.0]), atol=0.02, rtol=0)


def test_dead_codes_start_anew_and_live_ones_stay() -> None:
    codes = torch.tensor([[0.0], [10.0], [99.0]])
    averages = CodebookAverages(codes, decay=0.1, restart_below=0.1)
    averages.start(codes.clone())
    for _ in range(3):
        averages.update(torch.tensor([[0.0], [10.0]]), torch.tensor([0, 1]))
    assert averages.restart(torch.tensor([[1.0], [2.0], [5.0]])) == 1
    assert codes.flatten().tolist() == [0.0, 10.0, 5.0]
    assert averages.restart(torch.tensor([[1.0], [2.0], [7.0]])) == 0, "a code that starts anew is not dead at once"
    never = CodebookAverages(codes, decay=0.1, restart_below=0.0)
    never.start(codes.clone())
    never.counts[2] = 0
    assert never.restart(torch.zeros(3, 1)) == 0


def test_nearest_codes_are_nearest_and_gradients_pass_straight_through(images: Tensor) -> None:
    codec = _small()
    network = codec._build()
    generator = torch.Generator().manual_seed(1)
    network.codes.copy_(torch.randn(16, 4, generator=generator))
    vectors = torch.randn(2, 3, 5, 4, generator=generator)
    nearest = torch.cdist(vectors.reshape(-1, 4), network.codes).argmin(-1)
    assert torch.equal(network.nearest(vectors), nearest.view(2, 3, 5))
    averages = CodebookAverages(network.codes, 0.9, 0.0)
    averages.start(network.codes.clone())
    loss = codec._step(network, images, averages, 1)
    loss.backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in network.encoder.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_every_factor_gives_its_grid(factor: int) -> None:
    network = Autoencoder(3, 8, factor.bit_length() - 1, 1, 16, 4)
    vectors = network.encode(torch.rand(2, 3, 16, 24))
    assert vectors.shape == (2, 16 // factor, 24 // factor, 4)
    assert network.decode(vectors).shape == (2, 3, 16, 24)


# ---- training ------------------------------------------------------------------------------------------------------


def _error(codec: VQAutoencoder, images: Tensor) -> float:
    return float((codec.decode(codec.encode(images)).double() - images.double()).square().mean())


def test_training_brings_pictures_back_and_uses_the_codebook(images: Tensor) -> None:
    from sklearn.cluster import KMeans

    codec = _small(steps=300, base_channels=16, code_width=8)
    codec.fit(images)
    patches = rearrange(images.double(), "n c (rows h) (columns w) -> (n rows columns) (c h w)", h=4, w=4).numpy()
    independent = KMeans(16, n_init=1, random_state=0).fit(patches).inertia_ / patches.size
    # As many codes for patches that know nothing of each other do worse than tokens that see their neighbours.
    assert _error(codec, images) < independent
    assert _error(codec, images) < _error(codec, _noisy(images)) / 5
    uses = torch.bincount(codec.encode(images).flatten(), minlength=16)
    assert int((uses > 0).sum()) >= 13


def test_the_same_seed_gives_the_same_tokenizer_and_another_another(images: Tensor) -> None:
    state = torch.get_rng_state()
    prints = []
    for params in ({}, {}, {"seed": 1}, {"steps": 13}):
        codec = _small(**params)
        codec.fit(images)
        prints.append(codec.fingerprint())
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    assert torch.equal(state, torch.get_rng_state())


class Interrupting:
    """Images that fail after a number of reads."""

    def __init__(self, images: Tensor, reads: int) -> None:
        self.images, self.reads = images, reads

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Tensor) -> Tensor:
        self.reads -= 1
        if self.reads < 0:
            raise KeyboardInterrupt
        return self.images[rows]


def test_an_interrupted_training_goes_on_and_ends_with_the_same_weights(tmp_path: Path, images: Tensor) -> None:
    whole = _small()
    whole.fit(images, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _small().fit(Interrupting(images, 1 + 9), tmp_path / "cache")  # one read for the key, nine steps
    (unfinished,) = (tmp_path / "cache").glob("*-unfinished")
    assert [path.name for path in unfinished.iterdir()] == ["step_000000008"]
    again = _small()
    reads = Interrupting(images, 1 + 4)  # steps 8 to 11 are left
    again.fit(reads, tmp_path / "cache")
    assert reads.reads == 0
    assert again.fingerprint() == whole.fingerprint()
    assert not list((tmp_path / "cache").glob("*-unfinished"))
    third = _small(chunk=3)
    third.fit(Interrupting(images, 1), tmp_path / "cache")  # from the cache: nothing but the key
    assert third.fingerprint() == whole.fingerprint()


@pytest.mark.parametrize("damage", ["cut", "missing", "manifest"])
def test_a_damaged_tokenizer_is_trained_again(tmp_path: Path, images: Tensor, damage: str) -> None:
    first = _small()
    first.fit(images, tmp_path)
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    file = folder / ("manifest.json" if damage == "manifest" else "model.safetensors")
    file.unlink() if damage == "missing" else file.write_bytes(file.read_bytes()[:-10])
    again = _small()
    again.fit(images, tmp_path)
    assert again.fingerprint() == first.fingerprint()


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, images: Tensor) -> None:
    with pytest.raises(KeyboardInterrupt):
        _small().fit(Interrupting(images, 1 + 9), tmp_path)
    (checkpoint,) = next(iter(tmp_path.glob("*-unfinished"))).iterdir()
    (checkpoint / "state.safetensors").write_bytes(b"damaged")
    again, whole = _small(), _small()
    again.fit(images, tmp_path)
    whole.fit(images)
    assert again.fingerprint() == whole.fingerprint()


def test_the_caches_key_is_settings_and_images(tmp_path: Path, images: Tensor) -> None:
    keys = {_small(**params)._key(images) for params in ({}, {"steps": 13}, {"codes": 17}, {"seed": 1}, {"decay": 0.9})}
    keys |= {_small()._key(images[:60]), _small()._key(_noisy(images))}
    assert len(keys) == 7
    assert {_small(device="cpu")._key(images), _small(chunk=1)._key(images)} <= keys


def test_a_trained_tokenizer_is_kept_and_restored(images: Tensor) -> None:
    codec = _small()
    with pytest.raises(RunError, match="not trained yet"):
        codec.encode(images)
    codec.fit(images)
    other = _small()
    other.load_state(codec.state())
    assert torch.equal(other.encode(images), codec.encode(images))
    assert other.fingerprint() == codec.fingerprint()
    with pytest.raises(CheckpointError, match="do not fit"):
        _small(codes=17).load_state(codec.state())
    with pytest.raises(FieldError, match="power of two"):
        VQAutoencoder.Config(factor=3, height=9, width=9)
    broken = _small(learning_rate=1e30)
    with pytest.raises(RunError, match="loss is not finite at step 4; lower learning_rate"):
        broken.fit(images)


def test_digits_through_a_trained_tokenizer_resume_from_the_run(tmp_path: Path) -> None:
    from helpers import dmmd_run, tiny_recipe, write_recipe

    params = {"height": 8, "width": 8, "channels": 1, "factor": 2, "codes": 12, "base_channels": 4, "steps": 5}
    train = {"steps": 2, "batch_size": 4}
    recipe = tiny_recipe(
        tmp_path,
        data={"name": "digits", "params": {"codec": {"name": "vq_autoencoder", "params": params}}},
        teacher={"objective": {"name": "denoising"}, "train": train},
        distill={"num_steps": 2, **train},
    )
    done = dmmd_run(write_recipe(tmp_path, recipe))
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run" / "student" / "config.json").read_text())
    assert config["spec"] == {"vocab_size": 12, "length": 16, "grid": [4, 4], "num_classes": 10}
    kept = list((tmp_path / "run" / "cache").glob("vq_autoencoder-*/model.safetensors"))
    assert len(kept) == 1
