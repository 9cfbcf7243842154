"""TRL's GRPOTrainer on sums that can be checked, with a sampler in a process of its own that follows by live patching.

python docs/examples/trl_grpo.py                       # the bundled model, offline, a minute on a CPU

The sampler holds a plain model of transformers. After each step it gets the entries that train (two bytes or four each)
and nothing else; its weights are then the trainer's, bit for bit.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

import sparseft

BUNDLED = Path(sparseft.__file__).parent / "bundled"
TOKENS = 4  # of an answer
SUMS = [(a, b) for a in range(1, 10) for b in range(1, 10) if a + b <= 10]  # 45
ANSWERS = 8  # to each, in each step


def question(a, b):
    return f"### Human: What is {a} + {b}?### Assistant:"


def right(prompts, completions, **_):
    """The reward: 1 where the first thing said is the sum."""
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        expected = sum(map(int, re.findall(r"\d+", prompt)))
        said = re.match(r"\s*(\d+)(?!\d)", completion)
        found.append(float(said is not None and int(said[1]) == expected))
    return found


@torch.no_grad()
def log_probabilities(model, prompt, answer):
    """Of each token of an answer (lists of ids)."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)].tolist()


def loaded(name):
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    return transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), tokenizer


def sample(name, live):
    """The sampler: a line of JSON on stdin asks for answers by the weights of a step, one on stdout has them."""
    torch.manual_seed(0)
    model, tokenizer = loaded(name)
    end = tokenizer.eos_token_id
    with sparseft.PatchReceiver(model, live) as receiver:
        for line in sys.stdin:
            asked = json.loads(line)
            while receiver.step < asked["step"]:
                receiver.receive()
            told = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
            given = tokenizer(asked["prompts"], padding=True, padding_side="left", return_tensors="pt")
            made = model.generate(
                input_ids=given["input_ids"], attention_mask=given["attention_mask"], pad_token_id=end,
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=TOKENS,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
            answers = made.sequences[:, given["input_ids"].shape[1] :]
            certain = torch.stack(made.logits, 1).log_softmax(-1).gather(2, answers[:, :, None])[:, :, 0]
            for prompt, answer, log_probability in zip(asked["prompts"], answers, certain, strict=True):
                length = (answer.tolist() + [end]).index(end) + 1  # its end is learnt too
                told["prompt_ids"].append(tokenizer(prompt)["input_ids"])
                told["completion_ids"].append(answer[:length].tolist())
                told["logprobs"].append(log_probability[:length].tolist())
            print(json.dumps(told), flush=True)


class SendsSteps(transformers.TrainerCallback):
    def __init__(self, sender):
        self.sender = sender

    def on_step_end(self, *_, **__):
        self.sender.send()


@torch.no_grad()
def accuracy(model, tokenizer):
    """The share of all sums that the likeliest answer has right."""
    asked = [question(*each) for each in SUMS]
    given = tokenizer(asked, padding=True, padding_side="left", return_tensors="pt")
    made = model.generate(
        input_ids=given["input_ids"], attention_mask=given["attention_mask"], pad_token_id=tokenizer.eos_token_id,
        do_sample=False, max_new_tokens=TOKENS,
    )  # fmt: skip
    said = tokenizer.batch_decode(made[:, given["input_ids"].shape[1] :])
    return sum(right(asked, said)) / len(SUMS)


def main(words=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=str(BUNDLED / "tiny"), help="a hub id or a folder")
    parser.add_argument("--out", default="grpo-example")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--sample", metavar="FOLDER", help=argparse.SUPPRESS)  # in the sampler's process
    args = parser.parse_args(words)
    if args.sample is not None:
        return sample(args.model, args.sample)

    torch.manual_seed(0)
    model, tokenizer = loaded(args.model)
    before = accuracy(model, tokenizer)
    sparseft.attach(model, sparseft.S2FTConfig(sparsity=0.9))
    apart, learnt = [], []
    plain, _ = loaded(args.model)  # to see that the two are not alike because nothing has changed

    with tempfile.TemporaryDirectory() as live, sparseft.PatchSender(model, live) as sender:
        command = [sys.executable, __file__, "--model", args.model, "--sample", live]
        sampler = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        sent = sender.send()  # what trains, and where it lies

        def ask(prompts, trainer):
            step = sent + trainer.state.global_step
            sampler.stdin.write(json.dumps({"step": step, "prompts": prompts}) + "\n")
            sampler.stdin.flush()
            line = sampler.stdout.readline()
            if not line:
                raise RuntimeError("the sampler has ended; what it said last stands above.")
            told = json.loads(line)
            prompt, answer, theirs = (told[name][0] for name in ("prompt_ids", "completion_ids", "logprobs"))
            own, base = (log_probabilities(each, prompt, answer) for each in (model, plain))
            apart.append(max(abs(x - y) for x, y in zip(own, theirs, strict=True)))
            learnt.append(max(abs(x - y) for x, y in zip(own, base, strict=True)))
            return told

        trainer = GRPOTrainer(
            model,
            reward_funcs=right,
            rollout_func=ask,
            args=GRPOConfig(
                output_dir=args.out,
                per_device_train_batch_size=len(SUMS) * ANSWERS,
                num_generations=ANSWERS,
                max_completion_length=TOKENS,
                learning_rate=args.learning_rate,
                max_steps=args.steps,
                lr_scheduler_type="constant",
                logging_steps=max(1, args.steps // 12),
                disable_tqdm=True,
                bf16=False,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_list([{"prompt": question(a, b)} for a, b in SUMS]),
            processing_class=tokenizer,
            callbacks=[SendsSteps(sender)],
        )
        with sampler:  # which ends with its questions
            trainer.train()

    sparseft.save_adapter(model, args.out)
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    after = accuracy(model, tokenizer)
    print(f"mean reward: {rewards[0]:.2f} in the first steps, {rewards[-1]:.2f} in the last")
    print(f"sums right: {before:.0%} before, {after:.0%} after")
    print(f"the sampler is {max(apart):.1e} nats a token from the trainer at most, its base {max(learnt):.1e}")
    return {"rewards": rewards, "before": before, "after": after, "apart": max(apart), "learnt": max(learnt)}


if __name__ == "__main__":
    main()
