""".deepspeed_env as characters, beside what the launcher makes of it; which names are secret, and which travel."""

import os
import shlex
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune import launcher
from finetune.config import build_parser
from finetune.config.arguments import SECRETS
from finetune.launcher import deepspeed_args as launcher_flags
from finetune.utils.errors import ConfigError
from tests.helpers.launcher_tests import property_test

pytestmark = pytest.mark.usefixtures("private_files")

SECRET = "correct-horse"


# --- .deepspeed_env --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        f"HF_TOKEN {SECRET}",
        f"HF_TOKEN: {SECRET}",
        SECRET,
        f"{SECRET}==",
        f"HF TOKEN={SECRET}",
        f"HF_TOKEN ={SECRET}",
        f"HF_TOKEN= {SECRET}",
        f"HF-TOKEN={SECRET}",
        f"HF_TOKEN={SECRET}\0",
    ],
)
def test_no_value_is_shown(tmp_path, line):
    path = tmp_path / "env"
    path.write_text(f"{line}\n" * 2)
    with pytest.raises(ConfigError) as caught:
        launcher.read_environment_file(path)
    assert str(caught.value).startswith("2 bad environment lines:\n")
    assert SECRET not in str(caught.value)
    assert SECRET[:9] not in str(caught.value)


@pytest.mark.parametrize("mode", [0o660, 0o606, 0o622, 0o777])
def test_a_file_that_others_can_write_is_refused(tmp_path, mode):
    path = tmp_path / "env"
    path.write_text("K=1\n")
    path.chmod(mode)
    with pytest.raises(ConfigError) as caught:
        launcher.read_environment_file(path)
    assert str(caught.value) == f"{path} can be written by others (mode {mode:o}): chmod go-w {path}"
    path.chmod(mode & ~0o022)
    assert launcher.read_environment_file(path) == {"K": "1"}


def test_a_file_of_somebody_else_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "env"
    path.write_text("K=1\n")
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
        owner, me = 12345, 0
    else:
        owner, me = os.geteuid(), os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: me)
    with pytest.raises(ConfigError, match=f"env belongs to user {owner}, not to you \\({me}\\)"):
        launcher.read_environment_file(path)
    monkeypatch.setattr(os, "geteuid", lambda: owner)
    assert launcher.read_environment_file(path) == {"K": "1"}


def test_a_file_of_root_is_good_for_all(tmp_path, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("only root can write a file of root")
    path = tmp_path / "env"
    path.write_text("K=1\n")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert launcher.read_environment_file(path) == {"K": "1"}


@pytest.fixture
def places(tmp_path, monkeypatch) -> SimpleNamespace:
    """A home and a working directory."""
    home, work = tmp_path / "home", tmp_path / "work"
    for folder in (home, work):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("DS_ENV_FILE", raising=False)
    monkeypatch.chdir(work)
    return SimpleNamespace(home=home, work=work)


def file_variables() -> dict[str, str]:
    return {name: value for name, value in launcher.environment_of_ranks().items() if name in "ABC"}


def test_the_working_directory_wins(places):
    assert launcher.environment_files() == [] and file_variables() == {}
    (places.work / ".deepspeed_env").write_text("A=work\nB=work\n")
    (places.home / ".deepspeed_env").write_text("B=home\nC=home\n")
    assert [path.absolute() for path in launcher.environment_files()] == [
        places.home / ".deepspeed_env",
        places.work / ".deepspeed_env",
    ]
    assert file_variables() == {"A": "work", "B": "work", "C": "home"}


def test_another_name_for_the_file(places, monkeypatch, tmp_path):
    (places.work / ".deepspeed_env").write_text("A=1\n")
    (places.work / "other").write_text("A=2\n")
    (places.home / "other").write_text("B=2\n")
    monkeypatch.setenv("DS_ENV_FILE", "other")
    assert file_variables() == {"A": "2", "B": "2"}
    monkeypatch.setenv("DS_ENV_FILE", str(places.home / "other"))
    assert launcher.environment_files() == [places.home / "other"]  # one file, though DeepSpeed opens it twice
    monkeypatch.setenv("DS_ENV_FILE", "")
    assert launcher.environment_files() == []
    monkeypatch.setenv("DS_ENV_FILE", "missing")
    assert launcher.environment_files() == []
    with pytest.raises(ConfigError, match="DS_ENV_FILE=missing: there is no such file in .*work or .*home"):
        file_variables()
    monkeypatch.delenv("DS_ENV_FILE")
    monkeypatch.chdir(places.home)
    (places.home / ".deepspeed_env").write_text("A=3\n")
    assert len(launcher.environment_files()) == 1


def test_the_places_are_those_of_the_launcher(runner):
    assert runner.DEEPSPEED_ENVIRONMENT_PATHS == [os.path.expanduser("~"), "."]
    assert runner.DEEPSPEED_ENVIRONMENT_NAME == ".deepspeed_env"


# --- names -----------------------------------------------------------------------------------------------------------


def test_of_all_flags_the_known_secrets_are_secret():
    assert {name for name in build_parser().types if launcher.is_secret(name)} == {*SECRETS, "verify_key"}
    assert not [name for name in launcher_flags.build_parser().types if launcher.is_secret(name)]


@pytest.mark.parametrize(
    "name",
    "HF_TOKEN HUGGING_FACE_HUB_TOKEN hub_token hub-token token HF_OIDC_ID_TOKEN HFTOKEN accessToken AUTH_TOKENS "
    "WANDB_API_KEY WANDB_API_KEY2 AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN api_key apiKey APIKEY "
    "OPENAI_API_KEYS SSH_KEY key MLFLOW_TRACKING_PASSWORD PGPASSWORD passwd DB_PASS MYSQL_PWD SSHPASS "
    "GOOGLE_APPLICATION_CREDENTIALS WEBHOOK_SECRET client-secret PASSPHRASE".split(),
)
def test_secret_names(name):
    assert launcher.is_secret(name)


@pytest.mark.parametrize(
    "name",
    "human_token_ids model_token_ids new_tokens max_new_tokens content_tokens tokens_per_device_batch tokens "
    "TOKENIZERS_PARALLELISM tokenizer eos_token pad_token_id include_num_input_tokens_seen keys num_key_value_heads "
    "primary_key PWD OLDPWD PATH HF_HOME KEYBOARD MONKEY secretary passes output_dir".split(),
)
def test_names_that_are_not_secret(name):
    assert not launcher.is_secret(name)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--hub_token", SECRET, "--lr", "1"], ["--hub_token", "***", "--lr", "1"]),
        (["--hub-token=" + SECRET, "x"], ["--hub-token=***", "x"]),
        (["--password", "-" + SECRET, "more", "--lr", "1"], ["--password", "***", "***", "--lr", "1"]),
        (["--password", "--lr", "1"], ["--password", "--lr", "1"]),
        (["env", "HF_TOKEN=" + SECRET, "HF_HOME=/x"], ["env", "HF_TOKEN=***", "HF_HOME=/x"]),
        (["--human_token_ids", "3", "--max_new_tokens=5"], ["--human_token_ids", "3", "--max_new_tokens=5"]),
        ([f"export HF_TOKEN={SECRET}; export A=1; cd /x;"], ["export HF_TOKEN=***; export A=1; cd /x;"]),
        ([f"export A=1; export HF_TOKEN='a b{SECRET}'; c"], ["export A=1; export HF_TOKEN=***; c"]),
        ([f"train --hub_token {SECRET} --lr 1"], ["train --hub_token *** --lr 1"]),
        ([f'say HF_TOKEN="a {SECRET}'], ["say HF_TOKEN=***"]),
        ([f"bash -c 'HF_TOKEN={SECRET}'"], ["bash -c 'HF_TOKEN=***"]),
        ([f"https://me:{SECRET}@example.org/a"], ["https://***@example.org/a"]),
        ([f'{{"api_key": "{SECRET}", "lr": "1"}}'], ['{"api_key": "***", "lr": "1"}']),
        (["--lr=1", "a@b:0", "", "K=1"], ["--lr=1", "a@b:0", "", "K=1"]),
    ],
)
def test_redacted(words, shown):
    assert launcher.redact(words) == shown
    assert SECRET not in " ".join(launcher.redact(words))


@property_test
@given(
    value=st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=4).map(lambda text: f"s3cr{text}3t"),
    name=st.sampled_from(["hub_token", "HF_TOKEN", "apiKey"]),
    form=st.sampled_from(["--{0} {1}", "--{0}={1}", "{0}={1}", "x 'cd /; export {0}={1}; y'", "x 'y --{0} {1}'"]),
)
def test_no_spelling_of_a_secret_is_shown(value, name, form):
    """Quoted as a shell wants it, and once more where it stands in a command for another shell."""
    quoted = shlex.quote(value)
    command = form.format(name, quoted) if "'" not in form else form[:2] + shlex.quote(form[3:-1].format(name, quoted))
    words = ["ssh", "n0", *shlex.split(command), "--lr", "1"]
    said = " ".join(launcher.redact(words))
    assert "s3cr" not in said and "3t" not in said
    assert said.startswith("ssh n0") and said.endswith("--lr 1")


def test_what_travels():
    for name in "HF_HOME HF_TOKEN PYTHONPATH LD_LIBRARY_PATH OMP_NUM_THREADS DS_ACCELERATOR WANDB_API_KEY".split():
        assert launcher.is_exported(name)
    for name in "NCCL_DEBUG NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME UCX_TLS FI_PROVIDER RCCL_MSCCL_ENABLE".split():
        assert launcher.is_exported(name)
    alone = "CUDA_VISIBLE_DEVICES MASTER_ADDR MASTER_PORT RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE CROSS_RANK"
    for name in [*alone.split(), *"PATH HOME USER TMPDIR SSH_AUTH_SOCK HTTPS_PROXY NCCL_HOSTID NCCL hf_home".split()]:
        assert not launcher.is_exported(name)


def test_a_file_that_is_written_anew_is_kept_beside_the_new_one(tmp_path):
    path = tmp_path / ".deepspeed_env"

    assert launcher.write_environment_file(path, {"NCCL_DEBUG": "INFO"}) is None
    copies = [launcher.write_environment_file(path, {"NCCL_DEBUG": level}) for level in ("WARN", "")]

    assert [copy.name for copy in copies] == [".deepspeed_env.before-1", ".deepspeed_env.before-2"]
    assert [copy.read_text() for copy in copies] == ["NCCL_DEBUG=INFO\n", "NCCL_DEBUG=WARN\n"]
    assert launcher.read_environment_file(path) == {"NCCL_DEBUG": ""} and path.stat().st_mode & 0o777 == 0o600
