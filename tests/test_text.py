"""Text data: sources, tokenizers, cache, packing, and what is refused."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmmd_codecs.characters import BOUNDARY_TEXT, Bytes, Characters
from dmmd_codecs.subwords import BytePairs, Pretrained
from dmmd_core import Draws, FieldError, RunError, TextCodec
from dmmd_data import token_cache
from dmmd_data.permutation import permuted
from dmmd_data.text import Text
from dmmd_data.text_sources import embedded_documents

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "runs", "away"]


def _document(number: int) -> str:
    return " ".join(WORDS[(number * 7 + place * place) % len(WORDS)] for place in range(60))


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    folder = tmp_path / "corpus" / "inner"
    folder.mkdir(parents=True)
    for number in range(25):
        (folder / f"{number:02}.txt").write_text(_document(number), encoding="utf-8")
    return [str(tmp_path / "corpus")]


def _text(tmp_path: Path, codec: TextCodec | None = None, **params: Any) -> Text:
    config = Text.Config(**{"length": 16, "cache": str(tmp_path / "cache"), **params})
    return Text(config, tokenizer=codec or Bytes(Bytes.Config()))


def _prepared(tmp_path: Path, codec: TextCodec | None = None, **params: Any) -> Text:
    data = _text(tmp_path, codec, **params)
    data.prepare()
    return data


# ---- tokenizers ----------------------------------------------------------------------------------------------------


def test_bytes_and_characters_go_there_and_back() -> None:
    text = "Grüße, 世界!\nπ"
    for codec in (Bytes(Bytes.Config()), Characters(Characters.Config(alphabet="Grüße, 世界!\nπ"))):
        tokens = torch.tensor([[*codec.encode_text(text), codec.boundary]])
        assert int(tokens.max()) < codec.vocab_size
        assert codec.decode(tokens) == [text + BOUNDARY_TEXT]


def test_characters_outside_the_alphabet_are_replaced_or_refused() -> None:
    kept = Characters(Characters.Config(alphabet="ab"))
    assert kept.encode_text("a☃b\U0001f600") == [0, 2, 1, 2]
    assert kept.decode(torch.tensor([[0, 2, 1]])) == ["a\N{REPLACEMENT CHARACTER}b"]
    strict = Characters(Characters.Config(alphabet="ab", unknown="error"))
    with pytest.raises(RunError, match=r"'☃' \(2 times\).*add them to alphabet"):
        strict.encode_text("a☃b☃")
    with pytest.raises(FieldError, match="each once"):
        Characters.Config(alphabet="aba")


def test_byte_pairs_are_trained_kept_and_restored() -> None:
    codec = BytePairs(BytePairs.Config(vocab_size=300))
    codec.fit([_document(number) for number in range(40)])
    text = "the lazy fox — naïve"
    tokens = codec.encode_text(text)
    assert len(tokens) < len(text.encode())
    restored = BytePairs(BytePairs.Config(vocab_size=300))
    with pytest.raises(RunError, match="neither fitted nor loaded"):
        restored.encode_text(text)
    restored.load_state(codec.state())
    assert restored.encode_text(text) == tokens
    assert restored.fingerprint() == codec.fingerprint()
    assert restored.decode(torch.tensor([[*tokens, codec.boundary]])) == [text + BOUNDARY_TEXT]
    with pytest.raises(RunError, match="and no more, but vocab_size is 5000"):
        BytePairs(BytePairs.Config(vocab_size=5000)).fit(["too short a text"])


def test_a_tokenizer_of_the_libraries_is_loaded_from_file_and_folder(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    trained = BytePairs(BytePairs.Config(vocab_size=280))
    trained.fit([_document(number) for number in range(40)])
    file = tmp_path / "tokenizer.json"
    file.write_bytes(trained.state()["tokenizer_json"].numpy().tobytes())
    PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token=BOUNDARY_TEXT).save_pretrained(tmp_path / "folder")
    for path in (file, tmp_path / "folder"):
        codec = Pretrained(Pretrained.Config(path=str(path), vocab_size=280))
        codec.fit([])
        assert codec.encode_text("the fox") == trained.encode_text("the fox")
        assert codec.boundary == trained.boundary
    wrong = Pretrained(Pretrained.Config(path=str(file), vocab_size=50257))
    with pytest.raises(RunError, match="has 280 tokens, but vocab_size is 50257"):
        wrong.fit([])
    with pytest.raises(RunError, match="has no token '</s>'"):
        Pretrained(Pretrained.Config(path=str(file), vocab_size=280, boundary="</s>")).fit([])
    with pytest.raises(RunError, match="with the hub within reach"):
        Pretrained(Pretrained.Config(path="nobody/nothing", vocab_size=280)).fit([])
    file.write_text("{}")
    with pytest.raises(RunError, match="is no tokenizer"):
        Pretrained(Pretrained.Config(path=str(file), vocab_size=280)).fit([])


def test_texts_of_unequal_length_have_no_common_tensor() -> None:
    codec = Bytes(Bytes.Config())
    assert codec.encode(["ab", "cd"]).tolist() == [[97, 98], [99, 100]]
    with pytest.raises(ValueError, match="2 to 3 tokens"):
        codec.encode(["ab", "cde"])


# ---- packing and cache ---------------------------------------------------------------------------------------------


def test_documents_are_packed_with_boundaries_and_nothing_is_lost(tmp_path: Path, files: list[str]) -> None:
    data = _prepared(tmp_path, files=files)
    flat = {name: data.split(name).tokens.flatten() for name in ("train", "test")}
    texts = {name: data.codec.decode(tokens.unsqueeze(0))[0] for name, tokens in flat.items()}
    found = [part for text in texts.values() for part in text.split(BOUNDARY_TEXT)]
    documents = [_document(number) for number in range(25)]
    whole = [part for part in found if part in documents]
    assert sorted(set(whole)) == sorted(set(documents)) or len(whole) >= 23  # each split may cut its last document
    assert sum(len(tokens) for tokens in flat.values()) > sum(len(text) for text in documents) - 2 * 16
    assert data.spec.vocab_size == 257
    plain = _prepared(tmp_path, files=files, boundary=False)
    assert not bool((plain.split("train").tokens == 256).any())


def test_every_epoch_shows_every_sequence_once(tmp_path: Path, files: list[str]) -> None:
    data = _prepared(tmp_path, files=files)
    size = data.size("train")
    epochs = [data.training_batch(Draws.for_range(3, 0, start, size)).tokens for start in (0, size)]
    rows = [sorted(map(tuple, epoch.tolist())) for epoch in epochs]
    assert rows[0] == rows[1] == sorted(map(tuple, data.split("train").tokens.tolist()))
    assert not torch.equal(*epochs)
    part = data.training_batch(Draws.for_range(3, 7, 2, 3)).tokens
    assert torch.equal(part, epochs[0][2:5]), "a sample depends on its number alone"


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 65, 1000])
def test_permutations_are_bijections(size: int) -> None:
    first, second = (permuted(np.arange(size), size, key) for key in ("a", "b"))
    assert sorted(first.tolist()) == list(range(size))
    assert size < 17 or first.tolist() != second.tolist()
    assert permuted(np.array([size - 1]), size, "a")[0] == first[-1]


def test_permutations_are_even_far_beyond_memory() -> None:
    size = 10**12
    places = permuted(np.arange(20_000), size, "a")
    assert len(set(places.tolist())) == len(places)
    counts = np.bincount(places * 10 // size, minlength=10)
    assert abs(counts - 2000).max() < 6 * 2000**0.5


def test_a_second_run_reads_the_cache_and_no_source(tmp_path: Path, files: list[str], monkeypatch: Any) -> None:
    first = _prepared(tmp_path, BytePairs(BytePairs.Config(vocab_size=280)), files=files)
    monkeypatch.setattr(Text, "_documents", lambda self: pytest.fail("tokenised twice"))
    second = _prepared(tmp_path, BytePairs(BytePairs.Config(vocab_size=280)), files=files)
    assert torch.equal(first.split("train").tokens, second.split("train").tokens)
    assert second.codec.fingerprint() == first.codec.fingerprint()


def test_the_caches_key_is_source_tokenizer_and_length(tmp_path: Path, files: list[str]) -> None:
    paths = {
        _text(tmp_path, files=files)._cache_path(),
        _text(tmp_path, files=files, length=32)._cache_path(),
        _text(tmp_path, files=files, boundary=False)._cache_path(),
        _text(tmp_path, files=files, held_out=0.2)._cache_path(),
        _text(tmp_path, files=files, unit="line")._cache_path(),
        _text(tmp_path, Characters(Characters.Config()), files=files)._cache_path(),
        _text(tmp_path, Characters(Characters.Config(unknown="error")), files=files)._cache_path(),
        _text(tmp_path, BytePairs(BytePairs.Config(vocab_size=300)), files=files)._cache_path(),
        _text(tmp_path, BytePairs(BytePairs.Config(vocab_size=301)), files=files)._cache_path(),
        _text(tmp_path)._cache_path(),
    }
    next(Path(files[0]).rglob("*.txt")).write_text("changed", encoding="utf-8")
    paths.add(_text(tmp_path, files=files)._cache_path())
    assert len(paths) == 11


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "facts"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, files: list[str], damage: str) -> None:
    expected = _prepared(tmp_path, files=files).split("train").tokens
    (folder,) = (tmp_path / "cache").glob("text-*[0-9a-f]")
    file = folder / "train.bin"
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[:-10])
    elif damage == "flip":
        file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif damage == "missing":
        file.unlink()
    else:
        (folder / "facts.json").write_text("{")
    assert torch.equal(_prepared(tmp_path, files=files).split("train").tokens, expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_cache_leaves_nothing_and_is_made_again(
    tmp_path: Path, files: list[str], monkeypatch: Any, error: BaseException
) -> None:
    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(token_cache.json, "dumps", fail)  # after the tokens, before the manifest
        with pytest.raises((RunError, KeyboardInterrupt), match=r"free space|^$"):
            _prepared(tmp_path, files=files)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert _prepared(tmp_path, files=files).size("train") > 0


# ---- sources -------------------------------------------------------------------------------------------------------


def test_the_embedded_corpus_is_there_and_held_out_by_topic(tmp_path: Path) -> None:
    documents = embedded_documents()
    assert len(documents) > 50
    assert sum(map(len, documents)) > 300_000
    data = _prepared(tmp_path, Characters(Characters.Config()), length=64)
    share = data.size("test") / (data.size("test") + data.size("train"))
    assert 0.01 < share < 0.25


def test_few_documents_are_cut_at_their_ends(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("a" * 800 + "b" * 200)
    data = _prepared(tmp_path, files=[str(file)], held_out=0.2)
    assert set(data.split("train").tokens.flatten().tolist()) <= {97, 256}
    assert set(data.split("test").tokens.flatten().tolist()) <= {98, 256}


def test_documents_of_a_file_are_paragraphs_or_lines(tmp_path: Path) -> None:
    file = tmp_path / "some.txt"
    file.write_text("one\ntwo\n\nthree three three\n" * 40)
    for unit, documents in (("file", 1), ("paragraph", 41), ("line", 120)):
        data = _prepared(tmp_path, files=[str(file)], validation_files=[str(file)], unit=unit)
        boundaries = int((data.split("train").tokens == 256).sum())
        assert documents - 4 <= boundaries <= documents


def test_validation_text_is_taken_where_given(tmp_path: Path, files: list[str]) -> None:
    other = tmp_path / "other.txt"
    other.write_text("z" * 100)
    data = _prepared(tmp_path, files=files, validation_files=[str(other)])
    assert set(data.split("test").tokens.flatten().tolist()) == {ord("z")}


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_from_disk_and_from_a_loader(tmp_path: Path, streaming: bool) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"body": [_document(number) for number in range(30)]}
    saved = tmp_path / "saved"
    datasets.DatasetDict(
        train=datasets.Dataset.from_dict(rows), validation=datasets.Dataset.from_dict({"body": ["z" * 50] * 3})
    ).save_to_disk(saved)
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps({"body": text}) + "\n" for text in rows["body"]))
    shared = {"column": "body", "streaming": streaming}
    disk = _prepared(tmp_path, dataset=str(saved), validation_split="validation", **shared)
    assert set(disk.split("test").tokens.flatten().tolist()) == {ord("z"), 256}
    loader = _prepared(tmp_path, dataset="json", data_files=[str(lines)], validation_split="train", **shared)
    assert torch.equal(loader.split("train").tokens, disk.split("train").tokens)
    some = _prepared(tmp_path, dataset=str(saved), max_documents=22, **shared)
    assert some.size("train") + some.size("test") < disk.size("train")
    with pytest.raises(RunError, match="no column 'text'; it has body"):
        _prepared(tmp_path, dataset=str(saved), streaming=streaming)
    with pytest.raises(RunError, match="no split 'dev', it has 'train', 'validation'"):
        _prepared(tmp_path, dataset=str(saved), train_split="dev", **shared)
    with pytest.raises(RunError, match="hub is within reach"):
        _prepared(tmp_path, dataset="nobody/nothing", **shared)


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"fine line\ncaf\xe9 au lait\n" * 50)
    for unit in ("file", "line"):
        with pytest.raises(RunError, match=r"latin.txt is no UTF-8 at byte 13 \(0xe9\).*set errors to replace"):
            _prepared(tmp_path, files=[str(file)], unit=unit)
    assert _prepared(tmp_path, files=[str(file)], errors="replace").size("train") > 0


def test_empty_and_short_texts_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "empty.txt"
    file.write_text("")
    with pytest.raises(RunError, match=r"'train' has [01] tokens, fewer than one sequence of 16"):
        _prepared(tmp_path, files=[str(file)])
    file.write_text("x" * 100)
    with pytest.raises(RunError, match="'test' has 6 tokens"):
        _prepared(tmp_path, files=[str(file)], held_out=0.05)


def test_sources_that_exclude_each_other_and_missing_paths(tmp_path: Path) -> None:
    for params in (
        {"files": ["a"], "dataset": "b"},
        {"validation_files": ["a"]},
        {"validation_split": "a"},
        {"data_files": ["a"]},
    ):
        with pytest.raises(FieldError):
            Text.Config(**params)  # type: ignore[arg-type]
    with pytest.raises(FieldError, match="no file or folder"):
        Text.check(Text.Config(files=[str(tmp_path / "nowhere.txt")]))
    with pytest.raises(FieldError, match=r"has no \.txt file"):
        Text.check(Text.Config(files=[str(tmp_path)]))


# ---- the command line ----------------------------------------------------------------------------------------------

RECIPE = """
schema: 1
name: tiny_text
data:
  name: text
  params: {files: [FILES], length: 24, held_out: 0.2, tokenizer: {name: bpe, params: {vocab_size: 270}}}
process: {name: PROCESS}
backbone: {name: transformer, params: {width: 16, depth: 1, heads: 2, convolutions: 1}}
teacher: {objective: {name: denoising}, train: {steps: 4, batch_size: 8}}
generator: {name: noise_conditioned, params: {width: 4}}
objective: {name: moment_matching, params: {temperature: 0.05, top_p: 0.01, chunk_rows: 16}}
distill: {num_steps: 2, steps: 4, batch_size: 8}
sampler: {name: ancestral}
evaluate:
  teacher_steps: [2]
  student_steps: [2]
  num_samples: 12
  teacher_sampler: {name: ancestral, params: {temperature: 0.05, top_p: 0.01}}
  metrics:
    - name: gradient_moment
      params: {batch_size: 4, reference: {name: causal_transformer, params: {width: 16, depth: 1, steps: 5}}}
    - name: generative_perplexity
      params: {reference: {name: causal_transformer, params: {width: 16, depth: 1, steps: 5}}}
    - {name: token_entropy}
    - {name: ngram_divergence}
run: {directory: RUN}
"""


def _command(module: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = f"import sys; from dmmd_core.cli import {module}; sys.exit({module}())"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd, timeout=300, check=False
    )


@pytest.mark.parametrize("process", ["masked", "uniform"])
def test_a_text_run_from_recipe_to_prompted_samples(tmp_path: Path, files: list[str], process: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    content = RECIPE.replace("FILES", files[0]).replace("RUN", str(tmp_path / "run")).replace("PROCESS", process)
    recipe.write_text(content)
    done = _command("run_command", str(recipe), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "metrics.json").read_text())["results"]
    assert all(np.isfinite(row["value"]) for row in results), "an extreme temperature and nucleus train without NaN"
    assert {"gradient_moment", "generative_perplexity", "token_entropy"} <= {row["metric"] for row in results}
    for path in Path(files[0]).rglob("*.txt"):
        path.unlink()  # a saved student needs no corpus
    out = tmp_path / "samples"
    told = ["--prompt", "the quick", "--suffix", "lazy dog", "--num", "3", "--out", str(out), "--top-p", "0.9"]
    done = _command("sample_command", str(tmp_path / "run"), *told, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (text,) = out.glob("*.txt")
    lines = text.read_text().split("\n")
    assert lines[0].startswith("the quick")
    assert sum(line.endswith("lazy dog") for line in lines) >= 3
    refused = _command("sample_command", str(tmp_path / "run"), "--prompt", "far too long " * 30, cwd=tmp_path)
    assert refused.returncode == 2
    assert "leave nothing of 24 to fill in" in refused.stderr


def test_check_and_smoke_need_no_data_and_check_says_what_is_missing(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    content = RECIPE.replace("FILES", str(tmp_path / "nowhere.txt")).replace("PROCESS", "masked")
    recipe.write_text(content.replace("RUN", str(tmp_path / "run")))
    done = _command("run_command", str(recipe), "--check", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no file or folder" in done.stdout
    done = _command("run_command", str(recipe), "--smoke", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = _command("run_command", str(recipe), cwd=tmp_path)
    assert done.returncode == 2
    assert "no file or folder" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("unit", ["file", "line"])
def test_tokenising_knows_how_much_there_is(files: list[str], tmp_path: Path, unit: str) -> None:
    data = _text(tmp_path, files=files, unit=unit)
    size = sum(file.stat().st_size for file in Path(files[0]).rglob("*.txt"))
    amounts = data._amounts()
    assert amounts["train"].total == pytest.approx(size * 0.95)
    assert amounts["test"].total == pytest.approx(size * 0.05)
    assert _text(tmp_path, files=files, max_documents=3)._amounts()["train"].total is None
    assert _text(tmp_path)._amounts()["train"].total == pytest.approx(0.95 * len(embedded_documents()))


def test_tokenising_a_data_set_knows_its_rows(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": [_document(number) for number in range(12)]})
    rows.save_to_disk(tmp_path / "set")
    assert _text(tmp_path, dataset=str(tmp_path / "set"))._amounts()["train"].total == pytest.approx(12 * 0.95)
    streaming = _text(tmp_path, dataset=str(tmp_path / "set"), streaming=True)
    assert streaming._amounts()["train"].total is None
