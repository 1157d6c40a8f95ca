"""Settings come from flags, environment and file, in this order, and a wrong one is named."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from gradwire_proto.values import Limits
from gradwire_server.config import ConfigError, ServerConfig, load_config, read_config
from gradwire_server.private_folders import private_folder


def test_flags_go_before_environment_before_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "gradwire.toml"
    file.write_text('models = 1\nvariants = 1\nworkers = 1\nmessage_bytes = "1MiB"\n')
    monkeypatch.setenv("GRADWIRE_VARIANTS", "2")
    monkeypatch.setenv("GRADWIRE_WORKERS", "2")
    config = read_config(["--config", str(file), "--workers", "3"], "gradwire")
    assert (config.models, config.variants, config.workers, config.message_bytes) == (1, 2, 3, 1 << 20)
    monkeypatch.setenv("GRADWIRE_CONFIG", str(file))
    assert read_config([], "gradwire").models == 1


def test_every_limit_is_a_setting_with_the_limits_default() -> None:
    assert load_config(None, {}).limits == Limits()
    changed = {field.name: getattr(Limits(), field.name) // 2 for field in fields(Limits)}
    assert load_config(None, changed).limits == Limits(**changed)


def test_flags_of_a_config_make_the_same_config(tmp_path: Path) -> None:
    config = load_config(None, {"listen": "127.0.0.1:0", "storage": tmp_path, "held_seconds": 1.5, "models": 3})
    assert read_config(config.flags(), "gradwire") == config


@pytest.mark.parametrize(
    ("setting", "value", "bound"),
    [
        ("models", 0, "greater than or equal to 1"),
        ("workers", "many", "valid integer"),
        ("listen", "localhost", "HOST:PORT"),
        ("listen", "127.0.0.1:65536", "65535"),
        ("message_bytes", "1KiB", "greater than or equal to 65536"),
        ("message_bytes", "3GiB", "less than or equal to"),
        ("held_seconds", 0, "greater than 0"),
        ("held_seconds", "nan", "held_seconds"),
        ("log_level", "loud", "'debug', 'info'"),
        ("durability", "sometimes", "'none', 'process' or 'disk'"),
        ("checkpoint_bytes", "1KiB", "greater than or equal to 1048576"),
        ("checkpoint_seconds", 0, "greater than 0"),
        ("keep_checkpoints", 0, "greater than or equal to 1"),
    ],
)
def test_wrong_setting_is_named_with_its_bound_in_one_line(setting: str, value: Any, bound: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {setting: value})
    message = str(caught.value)
    assert message.startswith(f"{setting}: ") and bound in message and "\n" not in message


def test_source_of_a_wrong_setting_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "gradwire.toml"
    file.write_text("models = -1\n")
    with pytest.raises(ConfigError, match=r"gradwire\.toml"):
        load_config(file, {})
    monkeypatch.setenv("GRADWIRE_MODELS", "-1")
    with pytest.raises(ConfigError, match=r"\$GRADWIRE_MODELS"):
        load_config(None, {})
    with pytest.raises(ConfigError, match="--models"):
        load_config(None, {"models": -1})


def test_unknown_settings_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gradwire.toml"
    file.write_text("modles = 1\n")
    with pytest.raises(ConfigError, match="modles: no such setting"):
        load_config(file, {})
    with pytest.raises(SystemExit):
        read_config(["--modles", "1"], "gradwire")
    with pytest.raises(SystemExit):
        read_config(["--model", "1"], "gradwire")
    assert "unrecognized arguments" in capsys.readouterr().err


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.toml", {})
    broken = tmp_path / "broken.toml"
    broken.write_text("models = [")
    with pytest.raises(ConfigError, match=r"broken\.toml is not valid TOML"):
        load_config(broken, {})


def test_variables_of_other_programs_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADWIRE_TARGET", "elsewhere:1")
    assert load_config(None, {}) == ServerConfig()


def test_private_folder_is_this_users_alone(tmp_path: Path) -> None:
    with private_folder("runtime_dir", tmp_path / "new") as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
    assert folder.exists()
    folder.chmod(0o755)
    with pytest.raises(ConfigError, match=r"runtime_dir: .*0700"), private_folder("runtime_dir", folder):
        pass
    with private_folder("runtime_dir", None) as temporary:
        (temporary / "file").write_text("x")
    assert not temporary.exists()


def test_the_folder_of_weights_must_be_there_and_is_known_by_its_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(tmp_path)
    config = load_config(None, {"weights_folder": "weights"})
    assert config.weights_folder == tmp_path / "weights"
    assert read_config(config.flags(), "gradwire") == config
    with pytest.raises(ConfigError, match="weights_folder"):
        load_config(None, {"weights_folder": "nowhere"})
