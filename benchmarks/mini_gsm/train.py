"""Trains mini-llada from scratch on generated problems, on a CPU.

    python train.py --tokenizer FOLDER --out RUN --minutes 100 --decay-minutes 25

The rate stays constant and then falls linearly to zero over the last `--decay-minutes`. Every `--save-seconds` the
averaged weights go to RUN/model.safetensors (a complete model folder, usable at any time) and the full state to
RUN/state.pt; `--resume` goes on from there, with another length or another share of drills if asked.
"""

import argparse
import copy
import json
import random
import shutil
import time
from pathlib import Path

import torch
import torch._inductor.config as inductor_config
import torch.nn.functional as F
from batches import (
    BUCKETS,
    DRILL_LENGTH,
    Batch,
    Vocabulary,
    drills,
    encoded,
    mask_answers,
    next_tokens,
    rows_for,
)
from model import LLaDA, make_config, save_weights
from optimizer import Muon
from tokenizers import Tokenizer

CONTROL = "control.json"  # read now and then during a run: {"minutes": ..., "decay_minutes": ..., "drills": ...}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class ThreadChooser:
    """Runs with one or two threads, whichever has lately been faster: on a busy machine that changes by the minute."""

    def __init__(self, most: int) -> None:
        self.most, self.current, self.speed = most, most, {}

    def before(self, step: int) -> None:
        if self.most > 1:
            phase = step % 80
            best = max(self.speed, key=self.speed.get) if self.speed else self.most
            self.current = self.most if phase in (0, 1) else 1 if phase in (2, 3) else best
            torch.set_num_threads(self.current)

    def after(self, tokens: int, seconds: float) -> None:
        speed = tokens / seconds
        self.speed[self.current] = 0.7 * self.speed.get(self.current, speed) + 0.3 * speed


def loss_of(model: LLaDA, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the scored positions."""
    return F.cross_entropy(model(batch.noisy, batch.scored), batch.ids.view(-1)[batch.scored])


class Trainer:
    """Model, optimisers, averaged weights, and where in the schedule they are."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.vocab = Vocabulary.of(Tokenizer.from_file(str(options.tokenizer / "tokenizer.json")))
        vocab = self.vocab
        config = make_config(vocab.tokenizer.get_vocab_size(), vocab.mask, vocab.eos, vocab.bos)
        torch.manual_seed(options.seed)
        self.model = LLaDA(config, bf16=True, compiled=True)
        self.model.initialise(vocab.number_tokens())
        self.content = vocab.content_tokens()
        parts = self.model.model.transformer
        matrices = [p for n, p in parts.named_parameters() if p.dim() == 2 and n.startswith("blocks.")]
        others = [p for n, p in parts.named_parameters() if p.dim() == 1 or not n.startswith("blocks.")]
        self.muon = Muon(matrices, options.matrix_rate, options.weight_decay)
        self.adam = torch.optim.AdamW(others, lr=options.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self.averaged = copy.deepcopy(self.model.state_dict())
        self.step, self.sequences, self.tokens, self.seconds = 0, 0, 0, 0.0
        self.curve: list[dict] = []
        if options.resume:
            self.load()

    def load(self) -> None:
        state = torch.load(self.options.out / "state.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.averaged = state["averaged"]
        self.adam.load_state_dict(state["adam"])
        self.muon.momentum = state["muon"]
        self.step, self.sequences, self.tokens, self.seconds, self.curve = state["progress"]

    def save(self) -> None:
        """Writes the state and the model folder; both replace the old ones whole."""
        out = self.options.out
        progress = [self.step, self.sequences, self.tokens, self.seconds, self.curve]
        state = {
            "model": self.model.state_dict(),
            "averaged": self.averaged,
            "adam": self.adam.state_dict(),
            "muon": self.muon.momentum,
            "progress": progress,
        }
        torch.save(state, out / "state.part")
        (out / "state.part").replace(out / "state.pt")
        save_weights(self.averaged, self.model.config, out)
        for name in TOKENIZER_FILES:
            shutil.copy(self.options.tokenizer / name, out / name)
        log = {"sequences": self.sequences, "tokens": self.tokens, "seconds": self.seconds, "curve": self.curve}
        (out / "train_log.json").write_text(json.dumps(log, indent=1) + "\n")

    def compile(self) -> None:
        """Compiles the block for every length and thread count, so that the run proper is not interrupted by it."""
        began = time.time()
        for count in range(1, self.options.threads + 1):
            torch.set_num_threads(count)
            for length in sorted({*BUCKETS, DRILL_LENGTH}):
                ids = torch.zeros(rows_for(self.options.tokens, length), length, dtype=torch.long)
                self.model(ids, torch.arange(8)).sum().backward()
        self.model.zero_grad(set_to_none=True)
        print(f"compiled in {time.time() - began:.0f}s", flush=True)

    def update(self, loss: torch.Tensor, factor: float) -> None:
        """One optimiser step at `factor` times the full rates, then the running average of the weights."""
        self.adam.zero_grad(set_to_none=True)
        self.muon.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.adam.param_groups[0]["params"], 1.0)
        self.adam.param_groups[0]["lr"] = self.options.rate * factor
        self.adam.step()
        self.muon.step(factor)
        keep = min(self.options.average, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                self.averaged[name].lerp_(value, 1 - keep)
        self.step += 1

    @torch.no_grad()
    def validate(self, count: int = 6) -> dict[str, float]:
        """On held-out problems, with the averaged weights: the loss, and how many results, and how many of the other
        numbers, names and words that the question decides, are right given what precedes them."""
        model = LLaDA(self.model.config)
        model.load_state_dict(self.averaged)
        generator = torch.Generator().manual_seed(3)
        source, losses, results, copies = encoded(self.vocab, 555, "test", self.options.tokens), [], [], []
        for index in range(count):
            ids, prompt = next(source)
            losses.append(loss_of(model, mask_answers(self.vocab, self.content, ids, prompt, generator)).item())
            after_equals = torch.roll(ids == self.vocab.equals, 1, 1)
            for chosen, right in ((after_equals, results), (self.content[ids] & ~after_equals, copies)):
                batch = next_tokens(self.vocab, chosen, ids, prompt, 2 * index)
                predicted = model(batch.noisy, batch.scored).argmax(-1)
                right.append((predicted == ids.view(-1)[batch.scored]).float().mean().item())
        return {"validation": sum(losses) / count, "results": sum(results) / count, "copies": sum(copies) / count}


def train(options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    trainer = Trainer(options)
    trainer.compile()
    threads = ThreadChooser(options.threads)
    seed = options.seed + 1000 + trainer.step  # a resumed run sees new problems
    problems = encoded(trainer.vocab, seed, "train", options.tokens)
    equations = drills(trainer.vocab, seed + 7, options.tokens)
    generator = torch.Generator().manual_seed(seed + 13)
    rng = random.Random(seed + 17)
    print(f"{sum(p.numel() for p in trainer.model.parameters())} parameters, {vars(options)}", flush=True)
    before, began = trainer.seconds, time.time()
    saved = logged = began
    story, drill = [], []
    while True:
        elapsed = time.time() - began
        left = options.minutes * 60 - elapsed
        if left <= 0:
            break
        factor = min(1.0, left / (options.decay_minutes * 60)) * min(1.0, (trainer.step + 1) / options.warmup)
        threads.before(trainer.step)
        at = time.time()
        if trainer.step % 50 == 0 and (options.out / CONTROL).exists():
            vars(options).update(json.loads((options.out / CONTROL).read_text()))
        is_drill = rng.random() < options.drills
        if is_drill:
            batch = next(equations)
        else:
            ids, prompt = next(problems)
            batch = mask_answers(trainer.vocab, trainer.content, ids, prompt, generator)
            trainer.sequences += len(ids)
        loss = loss_of(trainer.model, batch)
        trainer.update(loss, factor)
        trainer.tokens += batch.ids.numel()
        threads.after(batch.ids.numel(), time.time() - at)
        (drill if is_drill else story).append(loss.item())
        trainer.seconds = before + time.time() - began
        if time.time() - logged > 30:
            logged = time.time()
            means = [sum(part) / max(1, len(part)) for part in (story, drill)]
            line = f"{trainer.seconds:.0f}s step {trainer.step} loss {means[0]:.4f} drills {means[1]:.4f}"
            speed = {count: round(value) for count, value in threads.speed.items()}
            print(f"{line} sequences {trainer.sequences} rate {factor:.2f} tok/s {speed}", flush=True)
            story, drill = [], []
        if time.time() - saved > options.save_seconds:
            saved = time.time()
            record(trainer)
    record(trainer)


def record(trainer: Trainer) -> None:
    """Validates, adds a point to the curve, saves."""
    point = {"seconds": round(trainer.seconds), "step": trainer.step, "sequences": trainer.sequences}
    point |= {name: round(value, 4) for name, value in trainer.validate().items()}
    trainer.curve.append(point)
    trainer.save()
    print(f"  {point}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train mini-llada.")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder that tokenizer.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, the state and the log")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/state.pt")
    parser.add_argument("--minutes", type=float, default=100, help="length of this run")
    parser.add_argument("--decay-minutes", type=float, default=25, help="the rate falls to zero over the last so many")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens in a batch")
    parser.add_argument("--drills", type=float, default=0.2, help="share of batches that are bare equations")
    parser.add_argument("--rate", type=float, default=2e-3, help="AdamW: embedding, head, norms")
    parser.add_argument("--matrix-rate", type=float, default=0.02, help="Muon: the blocks' matrices")
    parser.add_argument("--weight-decay", type=float, default=0.05, help="of the blocks' matrices")
    parser.add_argument("--average", type=float, default=0.998, help="decay of the running average of the weights")
    parser.add_argument("--warmup", type=int, default=100, help="steps until the full rate")
    parser.add_argument("--threads", type=int, default=2, help="two: the faster of one and two is chosen all along")
    parser.add_argument("--save-seconds", type=float, default=240)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    inductor_config.cpp.dynamic_threads = True
    torch._dynamo.config.recompile_limit = 64
    train(options)


if __name__ == "__main__":
    main()
