"""`video-panda serve` as a command: its options, and what it says before it serves."""

import dataclasses
import importlib.util
import re
import socket
from pathlib import Path

import pytest

from helpers.reference_checkpoint import write_reference
from video_panda_cli import serve
from video_panda_hf import SHIPPED_MODEL
from video_panda_hf.cli import build_parser, main


def served(*arguments, monkeypatch):
    """The settings, socket address and log level with which the command would serve."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    from video_panda_hf import serving

    found = []
    monkeypatch.setattr(serving, "create_app", lambda model, processor, settings: found.append(settings))
    monkeypatch.setattr(serving, "run", lambda app, sock, level: found.extend([sock.getsockname(), level]))
    assert main(["serve", str(SHIPPED_MODEL), "--port", "0", *arguments]) == 0
    return found


def test_nothing_is_open_by_default(monkeypatch, capsys):
    monkeypatch.delenv("VIDEO_PANDA_API_KEY", raising=False)
    settings, address, level = served(monkeypatch=monkeypatch)
    assert (address[0], level) == ("127.0.0.1", "warning") and address[1] > 0
    defaults = type(settings)(str(SHIPPED_MODEL), allowed_hosts=("127.0.0.1",))
    assert dataclasses.asdict(settings) == dataclasses.asdict(defaults)
    assert settings.api_key is None and settings.allowed_media_domains == () and not settings.allow_private_networks
    said = capsys.readouterr()
    assert f"is at http://127.0.0.1:{address[1]}/v1" in said.err and said.out == ""
    assert "anybody" not in said.err


def test_options_become_settings(monkeypatch, tmp_path, capsys):
    options = "--host 0.0.0.0 --served-model-name panda --allowed-host a.example b.example --log-level info"
    options += " --allowed-media-domains c.example --allowed-media-domains d.example --allow-private-networks"
    options += f" --allowed-local-media-path {tmp_path} --allowed-origin https://e.example --max-media-seconds 2.5"
    limits = {name.replace("-", "_"): 7 for name in serve.LIMITS if name != "max-media-seconds"}
    options += "".join(f" --{name.replace('_', '-')} {value}" for name, value in limits.items())
    settings, address, level = served(*options.split(), monkeypatch=monkeypatch)
    assert (address[0], level, settings.model_name) == ("0.0.0.0", "info", "panda")
    assert settings.allowed_hosts == ("a.example", "b.example", "0.0.0.0")
    assert settings.allowed_media_domains == ("c.example", "d.example") and settings.allow_private_networks
    assert settings.allowed_local_media_path == str(tmp_path) and settings.allowed_origins == ("https://e.example",)
    assert {name: getattr(settings, name) for name in limits} == limits and settings.max_media_seconds == 2.5
    assert "anybody who reaches 0.0.0.0 may ask: set VIDEO_PANDA_API_KEY" in capsys.readouterr().err


def test_options_of_before_still_work(monkeypatch):
    settings, address, _ = served("--host", "localhost", "--device", "auto", "--enable-cors", monkeypatch=monkeypatch)
    assert settings.allowed_origins == ("*",) and address[0] in ("127.0.0.1", "::1")


def test_the_key_comes_from_the_environment_or_the_option(monkeypatch):
    monkeypatch.setenv("VIDEO_PANDA_API_KEY", "from outside")
    assert served(monkeypatch=monkeypatch)[0].api_key == "from outside"
    assert served("--api-key", "given", monkeypatch=monkeypatch)[0].api_key == "given"


def test_without_its_packages_it_says_how_to_get_them(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else find(name))
    assert main(["serve", str(SHIPPED_MODEL)]) == 2
    assert 'pip install "video-panda-hf[serve]"' in capsys.readouterr().err


def test_what_cannot_be_served_is_said_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, message in (
            ([str(tmp_path / "none")], "no such folder"),
            ([str(write_reference(tmp_path / "reference"))], "is no Video-Panda checkpoint"),
            ([str(SHIPPED_MODEL), "--port", port], f"--port {port}: Address already in use"),
            ([str(SHIPPED_MODEL), "--host", "no-such-host.invalid"], "--host no-such-host.invalid: "),
            ([str(SHIPPED_MODEL), "--allowed-local-media-path", str(tmp_path / "none")], "is not a folder"),
        ):
            assert main(["serve", *arguments]) == 2
            error = capsys.readouterr().err
            assert message in error and "Traceback" not in error


@pytest.mark.parametrize(
    "wrong", [["--port", "65536"], ["--max-media", "0"], ["--max-media-seconds", "-1"], ["--trust-remote-code"]]
)
def test_an_option_that_cannot_be_is_wrong_use(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        build_parser().parse_args(["serve", "panda", *wrong])
    assert stopped.value.code == 2 and wrong[-1] in capsys.readouterr().err


def test_each_option_of_the_server_is_on_its_page(capsys):
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    named = re.findall(r"--[\w-]+", capsys.readouterr().out)
    assert len(set(named)) > 20
    assert not [option for option in named if option != "--help" and f"`{option}" not in page]
