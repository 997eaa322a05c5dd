"""Model cards, models on the hub (a stand-in for the network), and masked language models as teachers."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from helpers import tiny_recipe, write_recipe
from huggingface_hub import constants

from dmmd_core import (
    CheckpointError,
    FieldError,
    RecipeError,
    Run,
    RunError,
    load_student,
    load_teacher,
    run,
    upload_model,
)
from dmmd_core.cli import sample_command
from dmmd_teachers.transformers_masked import MaskedLanguageModel, TransformersMasked

# ---- cards and the hub ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with a trained teacher."""
    folder = tmp_path_factory.mktemp("cards")
    recipe = tiny_recipe(folder, teacher={"objective": {"name": "denoising"}, "train": {"steps": 2, "batch_size": 4}})
    recipe["distill"] = {"num_steps": 2, "steps": 2, "batch_size": 4}
    recipe["evaluate"]["metrics"] = [{"name": "total_variation"}]
    return run(write_recipe(folder, recipe), quiet=True)


def test_a_card_states_recipe_figures_and_versions(finished: Run) -> None:
    for role, steps in (("teacher", 1), ("student", 2)):
        card = huggingface_hub.ModelCard.load(finished.directory / role / "README.md")
        assert card.data.library_name == "dmmd"
        assert role in card.data.tags
        assert f"load_{role}(" in card.text
        (row,) = [row for row in finished.metrics["results"] if row["model"] == role]
        assert f"| {steps} | total_variation | {row['value']:.4g}" in card.text
        assert f"- torch {version('torch')}" in card.text
        assert "- `process:masked`: plugin 'processes' of package dmmd" in card.text
        assert "name: markov_chain" in card.text


def test_a_card_may_be_edited_and_weights_may_not(finished: Run, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    shutil.copytree(finished.directory / "student", folder)
    (folder / "README.md").write_text("my own words", encoding="utf-8")
    assert load_student(folder).sample(2).shape == (2, 3)
    (folder / "README.md").unlink()
    load_student(folder)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        load_student(folder)


class Hub:
    """Stands in for the network: repositories are folders."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.private: dict[str, bool] = {}
        self.cached: set[str] = set()
        self.asked: list[tuple[str, str | None, bool]] = []

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        self.private.setdefault(repo_id, private)
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, revision: str | None, commit_message: str) -> None:
        assert commit_message
        shutil.copytree(folder_path, self.root / repo_id / (revision or "main"))

    def snapshot_download(self, repo_id: str, *, revision: str | None, local_files_only: bool) -> str:
        self.asked.append((repo_id, revision, local_files_only))
        folder = self.root / repo_id / (revision or "main")
        if not folder.is_dir() or (local_files_only and repo_id not in self.cached):
            raise FileNotFoundError(f"no {repo_id}")
        self.cached.add(repo_id)
        return str(folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return made


def test_models_go_to_the_hub_and_come_back(finished: Run, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert upload_model(finished.directory, "me/student") == "https://hub/me/student"
    upload_model(finished.directory / "teacher", "me/teacher", role="teacher", private=False, revision="v1")
    assert hub.private == {"me/student": True, "me/teacher": False}
    wanted = load_student(finished.directory).sample(4)
    assert torch.equal(load_student("me/student").sample(4), wanted)
    assert load_teacher("me/teacher", revision="v1").role == "teacher"
    assert hub.asked[-1] == ("me/teacher", "v1", False)
    assert sample_command(["me/student", "--num", "2", "--steps", "1", "--out", "out"]) == 0
    assert "out/student_1_seed0" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="holds a student, not a teacher"):
        load_teacher("me/student")
    with pytest.raises(CheckpointError, match="holds a student, not a teacher"):
        upload_model(finished.directory / "student", "me/other", role="teacher")


def test_a_teacher_of_the_hub_starts_another_run(finished: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    upload_model(finished.directory, "me/teacher", role="teacher")
    monkeypatch.setattr("dmmd_teachers.from_run.hub_problem", lambda *arguments: None)
    load = {"name": "from_run", "params": {"path": "me/teacher", "unlabelled": True}}
    recipe = tiny_recipe(Path("there"), teacher={"load": load})
    recipe["distill"] = {"num_steps": 2, "steps": 1, "batch_size": 4}
    with pytest.raises(RunError, match="was trained without label dropout"):
        run(write_recipe(Path(), recipe), quiet=True)
    with pytest.raises(RecipeError, match="was trained without label dropout"):  # known, now that it is in the cache
        run(write_recipe(Path(), recipe), quiet=True)
    load["params"] = {"path": "me/teacher"}
    recipe["run"]["directory"] = "other"
    assert "distill" in run(write_recipe(Path(), recipe), quiet=True).stages


def test_what_is_nowhere_is_one_error(hub: Hub, tmp_path: Path, finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="model folder me/nothing, and 'me/nothing' cannot be had from the hub"):
        load_student("me/nothing")
    hub.asked.clear()
    (tmp_path / "runs").mkdir()
    for path in ("runs/quickstart", "./runs/none", "/nowhere/else", "quickstart"):
        with pytest.raises(CheckpointError, match="there is no model folder"):
            load_student(path)
    assert hub.asked == []  # these can only be folders

    def refuse(*arguments: Any, **more: Any) -> None:
        raise PermissionError("not logged in")

    monkeypatch.setattr(hub, "create_repo", refuse)
    with pytest.raises(RunError, match=r"cannot be uploaded to 'me/x' \(PermissionError: not logged in\); .*hf auth"):
        upload_model(finished.directory, "me/x")


# ---- masked language models -------------------------------------------------------------------------------------

WORDS = ["the", "cat", "sat", "on", "mat", "and", "dog", "ran", "to", "a"]
TOKENS = ["<end>", "[UNK]", "[MASK]", *WORDS]
MASK = 2


def save_tokenizer(folder: Path, tokens: list[str] = TOKENS) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, mask_token="[MASK]", unk_token="[UNK]", eos_token="<end>"
    ).save_pretrained(folder)


def save_bert(folder: Path, *, size: int = len(TOKENS), positions: int = 16, head: bool = True) -> None:
    from transformers import BertConfig, BertForMaskedLM, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        max_position_embeddings=positions, pad_token_id=0,
    )  # fmt: skip
    (BertForMaskedLM if head else BertModel)(config).save_pretrained(folder)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A tiny masked language model with a tokenizer."""
    save_bert(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert")
    return tmp_path / "bert"


def mlm_recipe(folder: Path, model: Path, *, tokenizer: Path | None = None, **params: Any) -> dict[str, Any]:
    (folder / "text.txt").write_text("the cat sat on the mat and a dog ran to the cat\n" * 60, encoding="utf-8")
    recipe = tiny_recipe(folder)
    chosen = {"path": str(tokenizer or model), "vocab_size": len(TOKENS), "boundary": "<end>"}
    text = {"length": 8, "files": [str(folder / "text.txt")], "unit": "line", "cache": str(folder / "cache")}
    recipe["data"] = {"name": "text", "params": {**text, "tokenizer": {"name": "pretrained", "params": chosen}}}
    recipe["teacher"] = {"load": {"name": "transformers_masked", "params": {"path": str(model), **params}}}
    return recipe


def test_a_masked_language_model_teaches_a_student(bert: Path, tmp_path: Path) -> None:
    from transformers import BertForMaskedLM

    finished = run(write_recipe(tmp_path, mlm_recipe(tmp_path, bert)), quiet=True)
    assert {"initialize", "distill", "evaluate"} <= set(finished.stages)
    assert {row["model"] for row in finished.metrics["results"]} >= {"teacher", "student"}
    drawn = finished.samples("teacher", 1)
    assert drawn is not None
    assert not (drawn.tokens == MASK).any()  # [MASK] is never an output
    denoiser = finished.assembly.teacher()
    size = len(TOKENS)
    z_t = torch.tensor([[3, size, 4, size, 5, 6, size, 0]])
    log_probs = denoiser(z_t, torch.tensor([0.5])).log_probs().view(8, size)
    with torch.no_grad():
        logits = BertForMaskedLM.from_pretrained(bert)(input_ids=torch.where(z_t == size, MASK, z_t)).logits[0]
    logits[:, MASK] = -torch.inf
    wanted = logits.log_softmax(-1)
    for place in range(8):
        if z_t[0, place] == size:
            torch.testing.assert_close(log_probs[place], wanted[place])
        else:
            assert int(log_probs[place].argmax()) == int(z_t[0, place])
            assert float(log_probs[place].max()) == 0
    rows = torch.tensor([6, 1])
    torch.testing.assert_close(denoiser(z_t, torch.tensor([0.5])).log_probs(rows), wanted[rows])
    student = load_student(finished.directory)
    assert all(text.startswith("the cat") for text in student.codec.decode(student.sample(2, prompt="the cat")))


def test_it_runs_as_smoke_with_other_tokens(tmp_path: Path) -> None:
    save_bert(tmp_path / "large", size=300, positions=40)
    save_tokenizer(tmp_path / "large")
    small = run(write_recipe(tmp_path, mlm_recipe(tmp_path, tmp_path / "large")), smoke=True, quiet=True)
    assert "evaluate" in small.stages


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mask_id": 5}, r"has \[MASK\] 2, but mask_id is 5; leave mask_id out"),
        ({"tokens": "unchecked"}, r"names no \[MASK\]; set mask_id"),
        ({"tokens": "unchecked", "mask_id": 99}, r"knows 13 input ids, \[MASK\] 99 is none of them"),
    ],
)
def test_a_wrong_mask_is_told(change: dict[str, Any], words: str, bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    model = tmp_path / "mute" if "tokens" in change else bert
    with pytest.raises(RunError, match=words):
        run(write_recipe(tmp_path, mlm_recipe(tmp_path, model, tokenizer=bert, **change)), quiet=True)


def test_another_tokenizer_is_told(bert: Path, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "other", [*TOKENS[:3], *WORDS[::-1]])
    with pytest.raises(RunError, match=r"speaks other tokens than the data: '.*' begins with .* in the model's tokens"):
        run(write_recipe(tmp_path, mlm_recipe(tmp_path, bert, tokenizer=tmp_path / "other")), quiet=True)
    save_tokenizer(tmp_path / "longer", [*TOKENS, "more"])
    recipe = mlm_recipe(tmp_path, bert, tokenizer=tmp_path / "longer")
    recipe["data"]["params"]["tokenizer"]["params"]["vocab_size"] = len(TOKENS) + 1
    with pytest.raises(RunError, match=r"speaks 13 tokens, the data 14; give the data the model's tokenizer"):
        run(write_recipe(tmp_path, {**recipe, "run": {"directory": str(tmp_path / "second")}}), quiet=True)


def test_a_mask_in_the_data_is_told(bert: Path, tmp_path: Path) -> None:
    recipe = mlm_recipe(tmp_path, bert)
    (tmp_path / "text.txt").write_text("the [MASK] sat on the mat and a dog\n" * 60, encoding="utf-8")
    with pytest.raises(RunError, match=r"the data contain the model's \[MASK\], token 2"):
        run(write_recipe(tmp_path, recipe), quiet=True)


def test_models_that_do_not_fit_are_told(bert: Path, tmp_path: Path) -> None:
    for name, sizes, words in (
        ("headless", {"head": False}, "lacks weights that a masked language model needs: cls"),
        ("short", {"positions": 4}, "cannot take 8 tokens"),
        ("narrow", {"size": 9}, r"gives logits \[1, 8, 9\] for tokens \[1, 8\]; expected a number for each of the"),
    ):
        folder = tmp_path / name
        save_bert(folder, **sizes)  # type: ignore[arg-type]
        save_tokenizer(folder)
        recipe = mlm_recipe(tmp_path, folder)
        recipe["run"]["directory"] = str(tmp_path / f"run_{name}")
        with pytest.raises(RunError, match=words):
            run(write_recipe(tmp_path, recipe), quiet=True)
    recipe = mlm_recipe(tmp_path, bert)
    recipe["process"] = {"name": "uniform"}
    with pytest.raises(RecipeError, match="needs capability 'masks'"):
        run(write_recipe(tmp_path, recipe), quiet=True)
    with pytest.raises(FieldError, match="no folder 'somebody/nothing'"):
        TransformersMasked.check(TransformersMasked.Config(path="somebody/nothing"))


CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput


class TinyConfig(PretrainedConfig):
    model_type = "tiny_diffusion"

    def __init__(self, vocab_size=13, **more):
        self.vocab_size = vocab_size
        super().__init__(**more)


class Tiny(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, timesteps=None):
        return MaskedLMOutput(logits=self.table(input_ids) + timesteps.view(-1, 1, 1))
"""


@pytest.mark.parametrize("auto_class", ["AutoModelForMaskedLM", "AutoModelForCausalLM"])
def test_code_of_strangers_runs_only_with_permission_in_words(
    auto_class: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    for place in ("transformers.dynamic_module_utils.HF_MODULES_CACHE", "transformers.utils.hub.HF_MODULES_CACHE"):
        monkeypatch.setattr(place, str(tmp_path / f"modules_{auto_class}"), raising=False)
    folder = tmp_path / f"tiny_{auto_class.lower()}"
    save_tokenizer(folder)
    (folder / "tiny.py").write_text(CODE, encoding="utf-8")
    described = {"model_type": "tiny_diffusion", "vocab_size": 13, "mask_token_id": MASK}
    classes = {"AutoConfig": "tiny.TinyConfig", auto_class: "tiny.Tiny"}
    (folder / "config.json").write_text(json.dumps({**described, "auto_map": classes}), encoding="utf-8")
    save_file({"table.weight": torch.randn(13, 13)}, folder / "model.safetensors", metadata={"format": "pt"})
    words = f"run the code of {folder}"
    recipe = mlm_recipe(tmp_path, folder)
    with pytest.raises(RecipeError, match=r"remote_code: .*brings its own code; .*write remote_code: 'run the code of"):
        run(write_recipe(tmp_path, recipe), quiet=True)
    with pytest.raises(RecipeError, match=r"must be 'run the code of .*', or left out, got 'yes'"):
        run(write_recipe(tmp_path, mlm_recipe(tmp_path, folder, remote_code="yes")), quiet=True)
    finished = run(write_recipe(tmp_path, mlm_recipe(tmp_path, folder, remote_code=words)), quiet=True)
    denoiser = finished.assembly.teacher()
    assert isinstance(denoiser, MaskedLanguageModel)
    assert denoiser.takes_noise_level


def test_the_hub_is_never_asked_here() -> None:
    assert constants.HF_HUB_OFFLINE
