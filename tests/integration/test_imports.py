"""What starts without torch: flags, hostfiles, manifests, reports; `--help` waits for no library."""

import subprocess
import sys

import finetune
from tests.helpers.checkpoint_files import sealed
from tests.helpers.flag_parsing import PUBLISHED
from tests.helpers.paths import ROOT
from tests.helpers.reported import output_dir


def test_a_manifest_needs_no_torch(tmp_path):
    sealed(tmp_path, 4)
    code = (
        "import sys; from pathlib import Path; from finetune import checkpoint\n"
        f"print(checkpoint.verify_checkpoint(Path({str(tmp_path)!r}) / 'checkpoint-4'), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["[]", "False"], done.stderr


def test_parsing_and_checking_start_without_torch():
    code = (
        "import sys; import finetune.config, finetune.dataset.conversation_reader, finetune.config.hardware\n"
        "import finetune.config.deepspeed_config\n"
        "print(finetune.config.parse(sys.argv[1:]).training['output_dir'], "
        "[name for name in ('torch', 'transformers', 'deepspeed', 'peft', 'numpy') if name in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", code, *PUBLISHED], cwd=ROOT, capture_output=True, text=True)

    assert (done.stdout, done.stderr) == ("output []\n", "")


def test_help_and_version_wait_for_no_library():
    code = (
        "import sys; from finetune import cli\n"
        "def run(*words):\n"
        "    try:\n        cli.main(words)\n"
        "    except SystemExit as end:\n        assert not end.code\n"
        "run('--help'), run('--version')\n"
        "print([name for name in sys.modules if name.startswith('finetune.cli.')])\n"
        "for verb in cli.VERBS:\n"
        "    print('>', verb)\n"
        "    run(verb, '--help')\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'peft', 'datasets', 'gradio', 'lm_eval'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    verbs = {line.removeprefix("> ") for line in lines if line.startswith("> ")}
    assert {
        "preview",
        "convert",
        "launch",
        "doctor",
        "merge",
        "push",
        "evaluate",
        "quickstart",
        "report",
        "chat",
        "train",
        "convert-config",
        "recipes",
    } == verbs
    assert f"finetune {finetune.__version__}" in lines
    assert lines.count("[]") == 2, lines


def test_it_needs_no_torch(tmp_path):
    folder = output_dir(tmp_path / "one")
    code = (
        "import sys\nfrom finetune import cli\n"
        f"cli.main(['report', {str(folder)!r}, '--no_answers'])\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'plotly') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
