"""Training and loading from Python, without the command line."""

import subprocess
import sys

SCRIPT = """
import gc
import os
import sys
import finetune
from finetune.utils.errors import ConfigError

model, data = sys.argv[1:]
before = dict(os.environ), gc.isenabled()
try:
    finetune.train(model_name_or_path=model, data_path=[data], output_dir="output", lora_r=0)
except ConfigError as error:
    print("refused", "--lora_r 0" in str(error), (dict(os.environ), gc.isenabled()) == before)
for output_dir in ("first", "output"):  # a process trains as often as it likes
    output_dir = finetune.train(
        model_name_or_path=model, data_path=[data], output_dir=output_dir, use_lora=True, max_steps=1,
        save_strategy="no", report_to="none", write_report=False, lora_target_modules=["q_proj", "v_proj"],
        deepspeed="zero2",
    )
print("as before", (dict(os.environ), gc.isenabled()) == before)
print(output_dir, type(finetune.load_for_inference(output_dir).tuned).__name__)
"""


def test_a_script_trains_and_loads_the_result(tiny_model, conversation_file, tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tiny_model), str(conversation_file)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    said = [line for line in lines if line.startswith(("refused ", "as before ", "output "))]
    assert said == ["refused True True", "as before True", "output PeftModelForCausalLM"]
