"""TRL's trainers as the other side of a benchmark: their own train(), paused before each step."""
import queue
import threading

import common
import numpy as np
from PIL import Image
from transformers import AutoProcessor, PrinterCallback, TrainerCallback

try:  # here, before any memory is measured
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
except ImportError as error:
    raise SystemExit(f"{error}: pip install -r benchmarks/requirements.txt") from error

import fsdp

# a chat template that renders a prompt as common.make_examples builds it
PROMPT = """<s>{% for part in messages[0]['content'] %}{{
    '<image>' if part['type'] == 'image' else ' ' + part['text'] }}{% endfor %}"""


def sft(inputs_of):
    """inputs_of: Setup → what the trainer's model takes. → the side, Setup → step function"""
    def side(setup):
        config = SFTConfig(max_length=None, **options(setup))
        return on_inputs(SFTTrainer, config, ("prompt", "completion"), setup, inputs_of(setup))
    return side


def dpo(inputs_of):
    """The same for the DPOTrainer, which loads its reference model itself."""
    def side(setup):
        config = DPOConfig(beta=setup.options.beta, max_length=None, **options(setup))
        return on_inputs(DPOTrainer, config, ("prompt", "chosen", "rejected"), setup, inputs_of(setup))
    return side


def grpo(reward, samples, timed):
    """The GRPOTrainer, which reads our images and prompts itself, and loads its reference model. reward:
    texts → scores; timed(function, *args) calls its function that generates. The setup's answers take the
    place of the sampled ones."""
    def side(setup):
        args = setup.options
        config = GRPOConfig(
            num_generations=samples, max_completion_length=args.max_new_tokens, beta=args.kl_coef,
            temperature=args.temperature, top_k=0, shuffle_dataset=False,
            generation_kwargs={"suppress_tokens": [*setup.processor.banned, *setup.processor.end_ids]},
            adam_beta2=fsdp.ADAM_BETAS[1], adam_epsilon=1e-5,  # ppo.adam's
            **{**options(setup), "per_device_train_batch_size": setup.args.batch * samples})
        processor = AutoProcessor.from_pretrained(setup.folder)
        processor.chat_template = PROMPT
        prompts, images = [], []
        for example in setup.examples:
            text = processor.tokenizer.decode(example.prompt[2:])  # without <s> and <image>
            prompts.append([{"role": "user", "content": text}])
            images.append([Image.open(path) for path in example.images])
        records = Dataset.from_dict({"prompt": prompts, "images": images}).repeat(config.max_steps)
        trainer = GRPOTrainer(common.build_theirs(setup), lambda completions, **_: reward(
            [message["content"] for message, in completions]), config, records, processing_class=processor)
        given = [ids.tolist() for example in setup.examples for ids in example.answers]
        generate = trainer._generate_single_turn

        def answers(prompt_ids, *args):
            prompt_tokens = [np.repeat(e.prompt, setup.processor.lengths(e.prompt, e.images)).tolist()
                             for e in setup.examples]
            assert prompt_ids == [ids for ids in prompt_tokens for _ in range(samples)]
            sampled, logprobs = timed(generate, prompt_ids, *args)
            assert list(map(len, sampled)) == list(map(len, given))
            return given, logprobs
        trainer._generate_single_turn = answers
        return in_turns(trainer, ("grad_norm", "entropy"))
    return side


def options(setup):
    """Our optimiser and learning rate, no recomputed activations, one log per step."""
    return dict(
        output_dir=setup.folder, use_cpu=True, bf16=setup.args.dtype == "bf16",
        max_steps=common.WARM_UP + setup.args.rounds, per_device_train_batch_size=setup.args.batch,
        learning_rate=common.LR, lr_scheduler_type="constant", optim="adamw_torch_fused", max_grad_norm=1.0,
        activation_checkpointing=False, logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False)


def on_inputs(Trainer, config, columns, setup, inputs):
    """→ a function that runs one step of a trainer, always on the same inputs: the data set is empty records,
    and the collator returns the inputs."""
    rows = config.max_steps * setup.args.batch
    return in_turns(Trainer(
        common.build_theirs(setup), args=config, data_collator=lambda rows: dict(inputs),
        train_dataset=Dataset.from_dict({"images": [[]] * rows, **{name: [""] * rows for name in columns}}),
        processing_class=AutoProcessor.from_pretrained(setup.folder)), ("loss",))


def in_turns(trainer, names):
    """→ a function that runs one step and returns what the trainer logs under these names. train() runs in a
    thread that waits before each step."""
    go, done = queue.Queue(), queue.Queue()

    class Turns(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            go.get()

        def on_log(self, args, state, control, logs, **kwargs):
            if names[0] in logs:
                done.put([logs[name] for name in names])

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
    trainer.add_callback(Turns())
    trainer.remove_callback(PrinterCallback)
    threading.Thread(target=train, daemon=True).start()
    return step
