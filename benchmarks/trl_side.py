"""TRL's trainers as the other side of a benchmark: their own train(), paused before each step."""
import queue
import threading

import common
from transformers import AutoProcessor, PrinterCallback, TrainerCallback

try:  # here, before any memory is measured
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
except ImportError as error:
    raise SystemExit(f"{error}: pip install -r benchmarks/requirements.txt") from error


def sft(inputs_of):
    """inputs_of: Setup → what the trainer's model takes. → the side, Setup → step function"""
    def side(setup):
        config = SFTConfig(**options(setup))
        return step_of(SFTTrainer, config, ("prompt", "completion"), setup, inputs_of(setup))
    return side


def dpo(inputs_of):
    """The same for the DPOTrainer, which loads its reference model itself."""
    def side(setup):
        config = DPOConfig(beta=setup.options.beta, **options(setup))
        return step_of(DPOTrainer, config, ("prompt", "chosen", "rejected"), setup, inputs_of(setup))
    return side


def options(setup):
    """Our optimiser and learning rate, no recomputed activations, one log per step."""
    return dict(
        output_dir=setup.folder, use_cpu=True, bf16=setup.args.dtype == "bf16",
        max_steps=common.WARM_UP + setup.args.rounds, per_device_train_batch_size=setup.args.batch,
        learning_rate=common.LR, lr_scheduler_type="constant", optim="adamw_torch_fused", max_grad_norm=1.0,
        activation_checkpointing=False, max_length=None, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False)


def step_of(Trainer, config, columns, setup, inputs):
    """→ a function that runs one step of a trainer, always on the same inputs. train() runs in a thread that
    waits before each step; the data set is empty records, and the collator returns the inputs."""
    go, done = queue.Queue(), queue.Queue()

    class Turns(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            go.get()

        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs:
                done.put([logs["loss"]])

    def train():
        try:
            trainer.train()
        except Exception as error:
            done.put(error)

    def step():
        go.put(None)
        result = done.get()
        if isinstance(result, Exception):
            raise result
        return result
    rows = config.max_steps * setup.args.batch
    trainer = Trainer(
        common.build_theirs(setup), args=config, data_collator=lambda rows: dict(inputs),
        train_dataset=Dataset.from_dict({"images": [[]] * rows, **{name: [""] * rows for name in columns}}),
        processing_class=AutoProcessor.from_pretrained(setup.folder), callbacks=[Turns()])
    trainer.remove_callback(PrinterCallback)
    threading.Thread(target=train, daemon=True).start()
    return step
