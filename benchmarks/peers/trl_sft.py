"""TRL: `SFTTrainer`'s own preparation, with the loss on the assistant's turns only."""

from __future__ import annotations

from measured import CHATML_WITH_GENERATION, MAX_LENGTH, Clock, given_task, report, token_counts


def main() -> None:
    task = given_task()
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(task.tokenizer)
    tokenizer.chat_template = CHATML_WITH_GENERATION
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size))
    clock, reading = Clock(), Clock()
    with clock, reading:
        data = load_dataset("json", data_files=str(task.messages), split="train")
    arguments = SFTConfig(
        output_dir=str(task.cache / "output"),
        assistant_only_loss=True,
        max_length=MAX_LENGTH,
        dataset_num_proc=None if task.processes == 1 else task.processes,
        use_cpu=True,
        report_to="none",
    )
    SFTTrainer._prepare_dataset = clock.around(SFTTrainer._prepare_dataset)
    trainer = SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
    prepared = trainer.train_dataset
    counts = token_counts(prepared["input_ids"], prepared["labels"])
    report(task, clock, rows=len(prepared), reading=reading, **counts)


if __name__ == "__main__":
    main()
