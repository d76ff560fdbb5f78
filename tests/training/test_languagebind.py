"""LanguageBind's video tower as a teacher: the reference's features, its repository's layout; other video models."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from helpers.hub_server import LoopbackHub
from helpers.training import VISION, make_trainer
from video_panda_hf.training import LanguageBindVideoTower, VideoPandaTeacher, VideoPandaTrainer


GOLDEN = Path(__file__).parents[1] / "golden" / "languagebind_tiny.safetensors"
LAST_LAYER = "vision_model.encoder.layers.3.layer_norm1.bias"


@pytest.fixture(scope="module")
def golden() -> tuple[dict, dict]:
    """The cases, and the weights."""
    with safe_open(GOLDEN, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}
    weights = {key: value for key, value in tensors.items() if key.startswith("vision_model.")}
    return {key: value for key, value in tensors.items() if key not in weights}, weights


def write_folder(folder: Path, weights: dict, form: str = "safetensors", **settings) -> Path:
    """A folder in the layout of LanguageBind's repository on the Hub."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"patch_size": 4, "image_size": 16, "num_frames": 8, "add_time_attn": True}
    others = {"hidden_act": "quick_gelu", "force_patch_dropout": 0.5, "lora_r": 2, "top_k": 50}
    config = {"model_type": "LanguageBindVideo", "vision_config": {**sizes, **others, **settings}, "text_config": {}}
    (folder / "config.json").write_text(json.dumps(config))
    weights = {**weights, "text_model.final_layer_norm.bias": torch.ones(3), "logit_scale": torch.ones(())}
    if form == "safetensors":
        save_file(weights, folder / "model.safetensors")
    else:
        torch.save(weights, folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def tower(golden, tmp_path_factory) -> LanguageBindVideoTower:
    return LanguageBindVideoTower.from_pretrained(write_folder(tmp_path_factory.mktemp("tower"), golden[1])).eval()


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("case", ["one_window", "two_windows"])
def test_features_are_the_references(golden, tmp_path, case, form):
    teacher = VideoPandaTeacher.from_pretrained(str(write_folder(tmp_path, golden[1], form)), VISION)
    assert isinstance(teacher.model, LanguageBindVideoTower)
    with torch.no_grad():
        features = teacher.model.features(golden[0][f"{case}.pixels"])
    torch.testing.assert_close(features, golden[0][f"{case}.features"], atol=1e-5, rtol=0)


def test_the_last_window_is_a_whole_one_that_begins_earlier(golden, tower):
    frames = golden[0]["two_windows.pixels"]
    with torch.no_grad():
        first, last = tower.features(frames[:8]), tower.features(frames[3:11])
        torch.testing.assert_close(tower.features(frames[:11]), torch.cat([first, last[5:]]))


def test_a_video_shorter_than_a_window_is_a_shorter_window(golden, tower):
    """Its frames look at each other, and their number counts; a single one has no temporal embedding."""
    frames = golden[0]["one_window.pixels"]
    with torch.no_grad():
        three, one = tower.features(frames[:3]), tower.features(frames[:1])
        assert three.shape == (3, 16, 32) and one.shape == (1, 16, 32)
        assert (three[:1] - one).abs().max() > 0.01
        embedding = [layer.temporal_embedding.data for layer in tower.layers]
        for layer in tower.layers:
            layer.temporal_embedding.data = torch.zeros(1, 8, 32)
        try:
            torch.testing.assert_close(tower.features(frames[:1]), one)
            assert (tower.features(frames[:3]) - three).abs().max() > 0.01
            repeated = tower.features(frames[:1].repeat(3, 1, 1, 1))  # attention over equal frames is over one of them
            torch.testing.assert_close(repeated, one.repeat(3, 1, 1))
        finally:
            for layer, values in zip(tower.layers, embedding, strict=True):
                layer.temporal_embedding.data = values


def test_the_last_layer_is_neither_needed_nor_loaded(golden, tmp_path):
    weights = {key: value for key, value in golden[1].items() if ".layers.3." not in key}
    tower = LanguageBindVideoTower.from_pretrained(write_folder(tmp_path, weights), torch.bfloat16)
    assert len(tower.layers) == 3 and {value.dtype for value in tower.parameters()} == {torch.bfloat16}
    features = tower.features(golden[0]["one_window.pixels"])
    torch.testing.assert_close(features.float(), golden[0]["one_window.features"], atol=0.15, rtol=0)


BAD = [
    ("vision_model.encoder.layers.1.temporal_attn.k_proj.weight", None, "lacks .*temporal_attn.k_proj.weight.*1 of"),
    ("vision_model.pre_layrnorm.bias", torch.ones(16), r"pre_layrnorm.bias. has the shape \(16,\), not \(32,\)"),
]


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize(("key", "value", "message"), BAD)
def test_weights_that_do_not_fit_are_named(golden, tmp_path, key, value, message, form):
    weights = {name: tensor for name, tensor in golden[1].items() if name != key}
    weights |= {} if value is None else {key: value}
    with pytest.raises(ValueError, match=message):
        LanguageBindVideoTower.from_pretrained(write_folder(tmp_path, weights, form))


def test_damaged_files_and_pickles_of_code_are_refused(golden, tmp_path):
    folder = write_folder(tmp_path / "bin", golden[1], "bin")
    torch.save({"vision_model.pre_layrnorm.bias": Path("code")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is damaged, or a pickle of more than tensors"):
        LanguageBindVideoTower.from_pretrained(folder)
    torch.save({"vision_model.pre_layrnorm.bias": 3}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin should hold tensors by name"):
        LanguageBindVideoTower.from_pretrained(folder)
    folder = write_folder(tmp_path / "safetensors", golden[1])
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        LanguageBindVideoTower.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no weights"):
        LanguageBindVideoTower.from_pretrained(folder)


def test_a_model_without_attention_over_time_is_no_tower(golden, tmp_path):
    with pytest.raises(ValueError, match="no `add_time_attn`"):
        LanguageBindVideoTower.from_pretrained(write_folder(tmp_path, golden[1], add_time_attn=False))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_only_the_tower_comes_into_memory(golden, tmp_path, form):
    """The rest of the file, 96 MB here, is not read."""
    folder = write_folder(tmp_path, golden[1] | {"text_model.embeddings": torch.zeros(24, 1 << 20)}, form)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is used now
    before = peak_kilobytes()
    LanguageBindVideoTower.from_pretrained(folder)
    assert peak_kilobytes() - before < 48_000


def peak_kilobytes() -> int:
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


@pytest.mark.slow
def test_from_the_hub_only_what_is_needed_is_downloaded(bare_forks, golden, tmp_path):
    """Safetensors go before a `.bin`."""
    code = "from video_panda_hf.training import LanguageBindVideoTower as Tower\n"
    code += "print(*(len(Tower.from_pretrained(f'bind/{name}').layers) for name in ('old', 'new')))"
    with LoopbackHub(tokens={}) as hub:
        for name, form in [("old", "bin"), ("new", "safetensors")]:
            write_folder(tmp_path / "source", golden[1], form)
            files = {file.name: file.read_bytes() for file in (tmp_path / "source").iterdir()}
            hub.create("models", f"bind/{name}").commit("main", {**files, "training_args.bin": b"", "README.md": b""})
        done = bare_forks.run(["-c", code], env=hub.environment(tmp_path / "cache"))
        assert done.stdout == "3 3\n", done.stderr
        fetched = {(path.split("/")[2], path.split("/")[-1]) for _, path, _ in hub.requests if "/resolve/" in path}
    weights = {("old", "pytorch_model.bin"), ("new", "model.safetensors")}
    assert fetched == {("old", "config.json"), ("new", "config.json"), *weights}


# The teacher


def packed(videos: list[torch.Tensor]):
    """Packed patches of 4 × 4 and grids of frames (T, 3, H, W)."""
    patches = [
        v.unflatten(2, (-1, 4)).unflatten(4, (-1, 4)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2).flatten(1)
        for v in videos
    ]
    return torch.cat(patches), torch.tensor([[len(v), v.shape[2] // 4, v.shape[3] // 4] for v in videos])


class MeanOfVideo(nn.Module):
    """A video model by the protocol: each patch has the mean of the whole video, and the number of the frame."""

    config = SimpleNamespace(patch_size=4, hidden_size=16)

    def features(self, frames):
        features = frames.new_zeros(len(frames), 64, 16)
        features[:, :, 0], features[:, :, 1] = frames.mean(), torch.arange(len(frames))[:, None]
        return features


def test_a_video_model_gets_each_video_by_itself():
    teacher = VideoPandaTeacher(MeanOfVideo(), VISION, (0.0,) * 3, (1.0,) * 3, (0.0,) * 3, (1.0,) * 3)
    pixels, grids = packed([torch.full((4, 3, 64, 64), 0.25), torch.full((2, 3, 64, 64), 0.75)])
    features = teacher(pixels, grids).view(6, 64, 16)
    torch.testing.assert_close(features[:, 0, 0], torch.tensor([0.25] * 4 + [0.75] * 2))
    assert features[:, 63, 1].tolist() == [0, 1, 2, 3, 0, 1]


def test_features_of_a_wrong_shape_are_an_error():
    class WithClassToken(MeanOfVideo):
        def features(self, frames):
            return torch.zeros(len(frames), 65, 16)

    teacher = VideoPandaTeacher(WithClassToken(), VISION, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ValueError, match=r"WithClassToken returned the shape \(4, 65, 16\), not .* \(4, 64, 16\)"):
        teacher(*packed([torch.zeros(4, 3, 64, 64)]))


def test_the_trainer_distils_from_languagebind(golden, tmp_path):
    """By its folder's name alone; the student's canvas is half as large as the tower's positions."""
    folder = write_folder(tmp_path / "teacher", golden[1])
    trainer = make_trainer(tmp_path, distillation_teacher=str(folder))
    assert isinstance(trainer.teacher.model, LanguageBindVideoTower) and trainer.teacher.hidden_size == 32
    trainer.train()
    losses = [entry["distillation_loss"] for entry in trainer.state.log_history if "distillation_loss" in entry]
    assert len(losses) == 2 and 0 < losses[1] < losses[0]


def test_the_trainer_takes_a_video_model_of_ones_own(tmp_path):
    class OwnTrainer(VideoPandaTrainer):
        def load_teacher(self):
            vision_config = self.model.config.vision_config
            model = MeanOfVideo()
            model.config = SimpleNamespace(patch_size=vision_config.image_size // 16, hidden_size=16)
            return VideoPandaTeacher(model, vision_config, (0.5,) * 3, (0.5,) * 3)

    trainer = make_trainer(tmp_path, trainer_class=OwnTrainer, distillation_teacher="own")
    trainer.train()
    assert trainer.state.log_history[0]["distillation_loss"] > 0


def test_an_empty_name_turns_distillation_off(tmp_path):
    trainer = make_trainer(tmp_path, distillation_teacher="", distillation_head="")
    assert trainer.teacher is None and trainer.args.distillation_head is None
