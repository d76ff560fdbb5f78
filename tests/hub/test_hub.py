"""To the Hub and back, over HTTP, between processes that share nothing else: see `hub_server.py`, `hub_clients.py`."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard, ModelCardData

from helpers.hub_server import LoopbackHub
from helpers.tiny_models import tiny_model
from helpers.training import make_trainer
from video_panda_hf import SHIPPED_CLIPS, SHIPPED_MODEL, VideoPandaForConditionalGeneration, VideoPandaProcessor
from video_panda_hf.hub import ModelFacts, check_folder, remove_code, written
from video_panda_hf.hub.card import is_blank, is_generated
from video_panda_hf.hub.code import code_files, with_code
from video_panda_hf.hub.push import files_of


peft = pytest.importorskip("peft")
EDITED = "---\nlicense: mit\n---\nAnn wrote this.\n"
BLANK = ModelCard.from_template(
    ModelCardData(library_name="transformers", tags=[]),
    model_description="This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model "
    "card has been automatically generated.",
)
AUTO_CLASSES = {"AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"}


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub({"hf_ann": "ann", "hf_bob": "bob"}) as hub:
        clips = hub.create("datasets", "raushan-testing-hf/videos-test")  # the video of every card
        clips.commit("main", {"sample_demo_1.mp4": (SHIPPED_CLIPS / "red_circle_left.mp4").read_bytes()})
        hub.create("models", "ann/llm").commit("main", {"README.md": b"---\nlicense: llama2\n---\nA language model."})
        for name in ("ann/edited", "ann/trained-edited"):
            hub.create("models", name).commit("main", {"README.md": EDITED.encode()})
        yield hub


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def client(bare_forks, hub, shared) -> Callable:
    """What a task of `hub_clients.py` returns, in a process of its own with an empty cache."""

    def run(task: str, token: str | None = None, without: str = ""):
        home = shared / f"home-{len(list(shared.iterdir()))}"
        paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        environment = {**hub.environment(home, token), "OMP_NUM_THREADS": "1", "WITHOUT": without, "PYTHONPATH": paths}
        command = [Path(__file__).parents[1] / "helpers" / "hub_clients.py", task, shared]
        done = bare_forks.run(command, env=environment, cwd=shared, timeout=240)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def push_commands(client, shared) -> Callable:
    """Status, output and errors of each `video-panda push` with these arguments."""

    def run(*commands: list, token: str | None = None) -> list[dict]:
        (shared / "commands.json").write_text(json.dumps([[str(argument) for argument in line] for line in commands]))
        return client("commands", token)

    return run


@pytest.fixture(scope="module")
def pushed(client, hub) -> LoopbackHub:
    """The Hub after `hub_clients.push`."""
    client("push", token="hf_ann")
    return hub


def auto_map(files: dict[str, bytes], name: str = "config.json") -> dict | None:
    return json.loads(files[name]).get("auto_map")


# By id, in another process


@pytest.fixture(scope="module")
def pulled(client, pushed) -> dict:
    """What `hub_clients.pull` found, with the package and without it."""
    return {without: client("pull", without=without) for without in ("", "video_panda_hf")}


@pytest.mark.slow
@pytest.mark.parametrize("without", ["", "video_panda_hf"])
def test_what_is_pushed_loads_by_id_with_the_same_logits(pulled, without):
    got = pulled[without]
    home = "transformers_modules.ann.panda." if without else "video_panda_hf."
    assert got["modules"].keys() == AUTO_CLASSES | {"AutoProcessor", "AutoVideoProcessor"}
    modules = [*got["modules"].values(), *got["trusting"].values()]
    assert not [module for module in modules if not module.startswith(home)]
    assert got["answer"].endswith("A red circle moves to the left.")
    assert got["differences"].keys() == {"main", "secret", "lighter", "pull request", "adapter"}
    assert max(got["differences"].values()) < 2e-5, got["differences"]  # memory that is aligned in another way


@pytest.mark.slow
def test_the_code_of_the_card_runs_as_written(pulled):
    assert pulled["video_panda_hf"]["card"].strip().endswith(".")


@pytest.mark.slow
def test_what_was_loaded_by_its_own_code_is_pushed_with_it(pushed, pulled):
    theirs, ours = pushed.files("bob/panda"), pushed.files("ann/panda", "lighter")
    same = [name for name in ours if name.endswith((".py", ".safetensors", "config.json"))]
    same.remove("tokenizer_config.json")  # transformers notes in it whether it came from a folder
    assert len(same) >= 10 and not [name for name in same if theirs[name] != ours[name]]


def test_errors_say_what_to_do(client, pushed):
    errors = client("refused", without="video_panda_hf av")
    assert "ann/secret" in errors["private"] and "token" in errors["private"]
    assert "trust_remote_code=True" in errors["not trusted"]
    assert errors["no av"].startswith("ImportError") and "pip install av" in errors["no av"]
    assert "video_panda" in errors["no code"]


# What is on the Hub


def test_weights_in_several_files_leave_none_of_an_earlier_upload(pushed):
    main, branch = pushed.files("ann/panda"), pushed.files("ann/panda", "lighter")
    shards = {name for name in main if name.endswith(".safetensors")}
    assert len(shards) == 8 and set(json.loads(main["model.safetensors.index.json"])["weight_map"].values()) == shards
    assert {name for name in branch if "safetensors" in name} == {"model.safetensors"}
    assert {name for name in pushed.files("ann/panda", "refs/pr/1") if "safetensors" in name} == {"model.safetensors"}


def test_what_is_pushed_names_its_code_unless_told_not_to(pushed):
    files = pushed.files("ann/panda")
    config, processor = json.loads(files["config.json"]), json.loads(files["processor_config.json"])
    references = [*config["auto_map"].values(), *processor["auto_map"].values()]
    references += processor["video_processor"]["auto_map"].values()
    assert config["auto_map"].keys() == AUTO_CLASSES
    assert all(f"class {r.split('.')[1]}(" in files[r.split(".")[0] + ".py"].decode() for r in references)
    assert auto_map(pushed.files("ann/secret")).keys() == AUTO_CLASSES
    assert auto_map(pushed.files("ann/config")).keys() == {"AutoConfig"}
    files = pushed.files("ann/no-code")
    assert not [name for name, content in files.items() if name.endswith(".py") or b"auto_map" in content]


def test_a_private_repository_stays_private(pushed):
    assert pushed.repositories["models", "ann/secret"].private
    assert not pushed.repositories["models", "ann/panda"].private


def test_the_card_says_what_is_known(pushed):
    text = pushed.files("ann/panda")["README.md"].decode()
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "video-text-to-text")
    assert (data.base_model, data.license) == ("ann/llm", "llama2")
    assert data.tags == ["video-panda"] and is_generated(text)
    for word in (
        "type `llama` with 3 layers",
        "64 × 64 pixels",
        "1.7 M parameters",
        'model_id = "ann/panda"',
        "@inpro",
    ):
        assert word in text, word
    assert "trust_remote_code" not in pushed.files("ann/no-code")["README.md"].decode()  # and not a blank one


def test_a_card_that_someone_wrote_is_not_touched(pushed):
    files = pushed.files("ann/edited")
    assert files["README.md"].decode() == EDITED and "model.safetensors" in files


# video-panda push


def test_a_failed_upload_shows_nothing_and_can_be_repeated(hub, push_commands, tmp_path):
    checkpoint(tmp_path, max_shard_size="1MB")
    shards = {file.name for file in tmp_path.glob("*.safetensors")}
    hub.large_files.clear()
    hub.fail("PUT", "/lfs/", after=1)
    (broken,) = push_commands([tmp_path, "ann/again"], token="hf_ann")
    hub.failures.clear()
    assert broken["status"] == 2 and "Nothing has changed in ann/again" in broken["errors"]
    assert hub.files("ann/again").keys() == {".gitattributes"}
    assert len(hub.large_files) == 1 < len(shards)

    hub.requests.clear()
    (repeated,) = push_commands([tmp_path, "ann/again"], token="hf_ann")
    assert (repeated["status"], repeated["output"]) == (0, f"{hub.endpoint}/ann/again/tree/main\n")
    assert shards < hub.files("ann/again").keys() and "README.md" in hub.files("ann/again")
    assert sum(method == "PUT" for method, *_ in hub.requests) == len(shards) - 1  # one is there already
    assert sum("/commit/" in path for _, path, _ in hub.requests) == 1


def test_the_command_pushes_a_folder_as_it_is_with_code_and_card(hub, push_commands, tmp_path):
    peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=".*q_proj")).save_pretrained(tmp_path / "adapter")
    generated = str(ModelFacts(tiny_model().config).card("ann/kept", HfApi()))
    checkpoint(tmp_path / "carded")
    (tmp_path / "carded" / "README.md").write_text(generated, encoding="utf-8")
    hub.create("models", "ann/kept").commit("main", {"README.md": EDITED.encode()})
    before = {file.name: file.read_bytes() for file in SHIPPED_MODEL.iterdir()}
    options = ["--private", "--revision", "exp/one", "--license", "mit", "--message", "Shapes"]
    done, adapter, carded, kept, *refused = push_commands(
        [SHIPPED_MODEL, "ann/shipped", *options, "--token", "hf_ann"],
        [tmp_path / "adapter", "ann/adapter-folder", "--token", "hf_ann"],
        [tmp_path / "carded", "ann/carded", "--no-code", "--token", "hf_ann"],
        [tmp_path / "carded", "ann/kept", "--create-pr", "--token", "hf_ann"],
        [SHIPPED_MODEL, "ann/forbidden"],
        [SHIPPED_MODEL, "ann/forbidden", "--token", "hf_wrong"],
        [SHIPPED_MODEL, "ann/forbidden", "--token", "hf_bob"],
    )
    assert done == {"status": 0, "output": f"{hub.endpoint}/ann/shipped/tree/exp/one\n", "errors": ""}
    files, config = hub.files("ann/shipped", "exp/one"), json.loads(before["config.json"])
    assert hub.repositories["models", "ann/shipped"].private
    assert hub.files("ann/shipped").keys() == {".gitattributes"}
    assert json.loads(files["config.json"]) == {**config, "auto_map": auto_map(files)}
    assert files["model.safetensors"] == before["model.safetensors"]
    assert ModelCard(files["README.md"].decode()).data.license == "mit"
    assert {file.name: file.read_bytes() for file in SHIPPED_MODEL.iterdir()} == before

    assert adapter["status"] == 0
    assert hub.files("ann/adapter-folder").keys() >= {"adapter_config.json", "adapter_model.safetensors"}
    assert carded["status"] == 0 and hub.files("ann/carded")["README.md"].decode() == generated
    assert not [name for name in hub.files("ann/carded") if name.endswith(".py")]
    assert kept["output"] == f"{hub.endpoint}/ann/kept/discussions/1\n"
    assert hub.files("ann/kept", "refs/pr/1")["README.md"].decode() == EDITED

    for error, message in zip(refused, ("hf auth login", "hf auth login", "rights"), strict=True):
        assert error["status"] == 2 and message in error["errors"] and "Traceback" not in error["errors"]
    assert ("models", "ann/forbidden") not in hub.repositories


def checkpoint(folder: Path, **options) -> None:
    VideoPandaForConditionalGeneration.from_pretrained(SHIPPED_MODEL).save_pretrained(folder, **options)
    VideoPandaProcessor.from_pretrained(SHIPPED_MODEL).save_pretrained(folder)


BROKEN = {
    "no folder": (lambda folder: shutil.rmtree(folder), "is not a folder"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "another model": (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "'llama'"),
    "no processor": (lambda folder: (folder / "processor_config.json").unlink(), "no processor_config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors.index.json").unlink(), "no weights"),
    "a shard missing": (lambda folder: next(folder.glob("model-00002*")).unlink(), "model-00002-of-"),
    "a shard cut off": (lambda folder: cut(next(folder.glob("model-00002*"))), "is damaged"),
    "a shard of other tensors": (
        lambda folder: shutil.copy(next(folder.glob("model-00001*")), next(folder.glob("model-00002*"))),
        "lacks",
    ),
    "a shard elsewhere": (lambda folder: edit(folder / "model.safetensors.index.json"), "outside the folder"),
}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def edit(index: Path) -> None:
    index.write_text(index.read_text().replace("model-00002", "../model-00002"))


@pytest.fixture(scope="module")
def in_shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("in_shards")
    checkpoint(folder, max_shard_size="1MB")
    return folder


@pytest.mark.parametrize("fault", BROKEN)
def test_an_incomplete_folder_is_refused_before_anything_is_sent(fault, in_shards, tmp_path):
    folder = shutil.copytree(in_shards, tmp_path / "checkpoint")
    assert check_folder(folder) > 1_000_000
    spoil, message = BROKEN[fault]
    spoil(folder)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        check_folder(folder)


# Trainer


def test_training_pushes_checkpoints_that_load_and_a_card_that_tells_of_it(client, hub):
    during = client("train", token="hf_ann")
    for repo_id in ("ann/trained", "ann/trained-edited", "ann/plain"):
        files = hub.files(repo_id)
        modules = [reference.split(".")[0] + ".py" for reference in auto_map(files).values()]
        assert {*modules, "model.safetensors", "tokenizer.json", "processing_video_panda.py"} < files.keys()
    assert {"model.safetensors", "modeling_video_panda.py", "layout_video_panda.py"} < set(during["ann/trained"])

    card = ModelCard(hub.files("ann/trained")["README.md"].decode())
    assert (card.data.license, card.data.datasets) == ("mit", ["ann/clips"])
    assert [result.metric_type for result in card.data.eval_results] == ["Loss"]
    assert "* learning_rate: 0.001" in card.text and "* train_vision: True" in card.text
    assert hub.files("ann/trained-edited")["README.md"].decode() == EDITED


def test_the_trainer_leaves_a_card_that_was_edited(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.create_model_card(license="mit")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert is_generated(card) and "license: mit" in card
    (tmp_path / "README.md").write_text(card + "It counts to ten.", encoding="utf-8")
    trainer.create_model_card()
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == card + "It counts to ten."


# Folders and cards


def test_a_checkpoint_saved_again_is_the_same_with_code_and_without(tmp_path):
    model = VideoPandaForConditionalGeneration.from_pretrained(SHIPPED_MODEL)
    processor = VideoPandaProcessor.from_pretrained(SHIPPED_MODEL)
    kept = {}
    for name, include_code in (("one", True), ("two", False), ("three", True), ("four", False)):
        for part in (model, processor):
            part.save_pretrained(tmp_path / name)
        if not include_code:
            remove_code(tmp_path / name)
        kept[name] = {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        model = VideoPandaForConditionalGeneration.from_pretrained(tmp_path / "one", trust_remote_code=True)
        processor = VideoPandaProcessor.from_pretrained(tmp_path / "one", trust_remote_code=True)
    assert kept["one"] == kept["three"] and kept["two"] == kept["four"]
    assert not [name for name, content in kept["two"].items() if name.endswith(".py") or b"auto_" in content]

    with_it, without = with_code(files_of(tmp_path / "two"), True), with_code(files_of(tmp_path / "one"), False)
    assert with_it.keys() == kept["one"].keys() and without.keys() == kept["two"].keys()
    assert json.loads(with_it["config.json"]) == json.loads(kept["one"]["config.json"])
    assert json.loads(without["processor_config.json"]) == json.loads(kept["two"]["processor_config.json"])


def test_the_code_in_a_checkpoint_is_six_files_that_one_can_read():
    lengths = [len(file.read_text(encoding="utf-8").splitlines()) for file in code_files().values()]
    assert len(lengths) == 6 and sum(lengths) <= 2300


def test_the_code_is_the_models_own_whatever_wraps_it(tmp_path):
    model = tiny_model()
    wrapper = type("FSDPVideoPanda", (type(model),), {"__module__": "torch.nn.modules.linear"})
    wrapper.register_for_auto_class("AutoModelForImageTextToText")
    model.__class__ = wrapper
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "linear.py").exists() and (tmp_path / "modeling_video_panda.py").exists()
    assert set(auto_map({"config.json": (tmp_path / "config.json").read_bytes()})) == AUTO_CLASSES


def test_training_leftovers_are_not_uploaded(tmp_path):
    kept = ["model.safetensors", "chat_templates/short.jinja"]
    left = [
        "checkpoint-5/model.safetensors",
        "runs/Nov22/events",
        "optimizer.pt",
        "rng_state_0.pth",
        ".cache/x",
        ".env",
    ]
    for name in kept + left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert sorted(files_of(tmp_path)) == sorted(kept)


def test_a_card_that_was_edited_is_told_from_one_that_was_not(tmp_path):
    facts = ModelFacts(
        tiny_model().config, license="mit", metrics={"accuracy": 0.98}, training={"learning_rate": 1e-3}
    )
    text = str(facts.card("ann/panda", HfApi()))
    assert is_generated(text) and is_generated(str(ModelCard(text)))
    assert not is_generated(text.replace("mit", "apache-2.0")) and not is_generated(text + "One word more.")
    assert is_blank(str(BLANK)) and not is_blank(str(BLANK).replace("Uses", "Uses: none")) and not is_blank(text)
    assert [written(card) for card in (None, text, str(BLANK), EDITED)] == [None, None, None, EDITED]
    peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=".*q_proj")).save_pretrained(tmp_path)
    assert is_blank((tmp_path / "README.md").read_text(encoding="utf-8"))
